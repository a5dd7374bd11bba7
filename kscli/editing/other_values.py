"""Values that another run found, to be written again: the same shifts along other directions.

So editors are compared by their directions alone, and the search, which is most of the time that a
run takes, is made once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import require_same_identity
from kscli.editing.editors import EDITORS, Editor, find_editor
from kscli.editing.editors.keys import clean, mean_to_bare
from kscli.editing.edits_file import EditsFile
from kscli.editing.sources import EditSources
from kscli.editing.value import DivergedError
from kscli.errors import UsageError
from kscli.facts import Fact
from kscli.layers import format_layers

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OtherValues:
    """The shifts (d,) of a run at `path`, by the fact's text and the new target.

    `identity` is the fingerprint of its file.
    """

    path: Path
    identity: str
    shifts: Mapping[tuple[str, str], Array]

    def of(self, fact: Fact, target_new: str) -> Array:
        """What is added to a fact's value. Raises DivergedError where the run did not find it."""
        shift = self.shifts.get((fact.text, target_new))
        if shift is None:
            raise DivergedError(f"{self.path} holds no value for it")
        return shift


def read_values(path: Path, sources: EditSources, method: str) -> OtherValues:
    """The values of the run at `path`, for edits by `method` at the layer of `sources`.

    Raises UsageError where that run or the method writes something else than the shift that was
    found, or at another layer, and ArtifactError where the file is about another model.
    """
    with EditsFile(path) as file:
        require_same_identity(file, sources.keys)
        for name in (method, file.about.method):
            if not _writes_shifts(find_editor(name)):
                able = [each for each in EDITORS if _writes_shifts(find_editor(each))]
                raise UsageError(
                    f"--value {path}: {name} does not write the shift that its search finds; "
                    f"values pass between {', '.join(able)}."
                )
        if file.layers != sources.layers:
            raise UsageError(
                f"--value {path}: its values are of layer {format_layers(file.layers)}, and layer "
                f"{format_layers(sources.layers)} is edited; name --layer "
                f"{format_layers(file.layers)}."
            )
        texts = [file.facts[fact].text for fact in file.values("edited").tolist()]
        targets = file.values("target_new").tolist()
        shifts = file.values("delta")[:, 0]
        return OtherValues(
            path, file.fingerprint, dict(zip(zip(texts, targets, strict=True), shifts, strict=True))
        )


def _writes_shifts(editor: Editor) -> bool:
    """Whether delta is the shift that is found at the bare prompt's key, at one layer."""
    one_value = not editor.value.reach and not editor.afterwards.one_layer
    return one_value and editor.key in (clean, mean_to_bare)
