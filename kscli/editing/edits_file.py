"""edits/METHOD-LAYERS-SEED.h5: a run of edits, what was predicted of each and what came of it.

The same file, not yet finished, is what a run that was stopped goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import SCHEMAS, EditsAbout, FactsFile, write_artifact
from kscli.artifacts.writing import LocatedFacts
from kscli.layers import format_layers

if TYPE_CHECKING:
    import pandas

_DATASETS = SCHEMAS["edits"].datasets
_OF_EDIT = [name for name, dataset in _DATASETS.items() if "edit" in dataset.axes]
_OF_PASS = [name for name, dataset in _DATASETS.items() if "pass" in dataset.axes]
_OF_LAYER = ("delta", "direction")
_SCORED = [f"{of}_{when}" for of in ("true", "new") for when in ("before", "previous", "after")]
_KEPT_OUT = tuple(name for name, dataset in _DATASETS.items() if "kept_out" in dataset.axes)


@dataclass
class EditLog:
    """What a run has found so far: a list over edits or passes for every dataset of the file.

    `delta` and `direction` of an edit are (layer, d) and (layer, d_m). `kept_out` are the edits
    that were not made, each with its number among those planned, from 0, its fact's index, its
    new target and the reason.
    """

    known: NDArray[np.bool_]
    protected: NDArray[np.bool_]
    paraphrase_known: NDArray[np.bool_]
    of_edit: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _OF_EDIT})
    of_pass: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _OF_PASS})
    kept_out: list[tuple[int, int, str, str]] = field(default_factory=list)

    @property
    def made(self) -> int:
        """How many edits were made."""
        return len(self.of_edit["edited"])

    @property
    def tried(self) -> int:
        """How many edits were made or kept out."""
        return self.made + len(self.kept_out)

    def add_edit(self, record: Mapping[str, Any]) -> None:
        """Add all that is known of one edit."""
        for name, values in self.of_edit.items():
            values.append(record[name])

    def add_pass(self, record: Mapping[str, Any]) -> None:
        """Add all that is known of one pass."""
        for name, values in self.of_pass.items():
            values.append(record[name])


class EditsFile(FactsFile):
    """A run of n edits of m facts' model, measured in s passes over all facts; read-only.

    The schema (`kscli.artifacts.schema`) gives the meaning of every dataset. W of a layer changes
    by the sum of delta direction^T over the edits so far. A shift is since the fact's own edit for
    those edited already (equation 15), else since the clean model (equation 11). The live model's
    shifts are of a whole forward pass where a pass was made, else of the edited down-projection at
    the live keys, which no edit of its own layer changes. Predictions and live outputs are NaN
    for editors that equations 11 and 15 do not describe.
    """

    of_kind = "edits"
    about: EditsAbout

    @property
    def edits(self) -> int:
        """How many edits were made."""
        return len(self.values("edited"))

    def values(self, name: str) -> NDArray[Any]:
        """A dataset by its name; `delta` and `direction` with the edit as first axis."""
        found = self._values(name)
        return found.swapaxes(0, 1) if name in _OF_LAYER else found

    def log(self) -> EditLog:
        """The run so far, to go on from."""
        known, protected, paraphrased = map(self.values, ("known", "protected", "paraphrase/known"))
        log = EditLog(known, protected, paraphrased)
        for columns in (log.of_edit, log.of_pass):
            for name in columns:
                columns[name] = list(self.values(name))
        kept = (self.values(name).tolist() for name in _KEPT_OUT)
        log.kept_out = list(zip(*kept, strict=True))
        return log

    def to_pandas(self) -> pandas.DataFrame:
        """An edit a row, with the columns of `kscli edit -f csv`."""
        from kscli.artifacts.frames import frame_of

        return frame_of(flat_edits(self.objects()))

    def objects(self) -> list[dict[str, Any]]:
        """The run as plain objects, one an edit, numbered from 1."""
        columns = {name: self.values(name) for name in _OF_EDIT if name not in _OF_LAYER}
        # Numbers as JSON has them; what is an array still is one.
        plain = {name: values.tolist() for name, values in columns.items() if values.ndim == 1}
        rows = [
            {name: (plain.get(name, values))[index] for name, values in columns.items()}
            for index in range(self.edits)
        ]
        return [self._object(number, row) for number, row in enumerate(rows, 1)]

    def _object(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        index = int(row["edited"])
        fact = self.facts[index]
        # Facts of the same text are one fact.
        others = row["p"][[other.text != fact.text for other in self.facts]]
        return {
            "edit": number,
            "method": self.about.method,
            "layers": list(self.layers),
            "fact": index,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "target_true": fact.target,
            "target_new": row["target_new"],
            "paraphrase_p": row["paraphrase_p"],
            "p_max_other": float(others[np.abs(others).argmax()]) if len(others) else None,
            "delta_norm": row["delta_norm"],
            "price": row["price"],
            "own_text_change": row["own_text_change"],
            **{f"prob_{end}": math.exp(row[f"logprob_{end}"]) for end in _SCORED},
            **{f"rank_{end}": row[f"rank_{end}"] for end in _SCORED},
            "took": row["rank_new_after"] == 1,
            "linear_error": row["linear_error"],
            "live_error": row["live_error"],
            "weight_change": row["weight_change"],
            "moved": [self._moved(row, place) for place in range(len(row["moved_index"]))],
        }

    def _moved(self, row: Mapping[str, Any], place: int) -> dict[str, Any]:
        index = int(row["moved_index"][place])
        fact = self.facts[index]
        before, after = row["moved_answer_before"][place], row["moved_answer_after"][place]
        return {
            "fact": index,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "target": fact.target,
            "p": float(row["p"][index]),
            "predicted": float(row["predicted"][index]),
            "measured": float(row["measured"][index]),
            **{f"logprob_{end}": float(row[f"moved_logprob_{end}"][place]) for end in _SCORED},
            "answer_before": before,
            "answer_after": after,
            "answer_changed": bool(before != after),
        }


def flat_edits(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`EditsFile.objects` as flat records, without the lists of facts that edits moved."""
    return [
        {name: of for name, of in edit.items() if name != "moved"}
        | {"layers": format_layers(edit["layers"])}
        for edit in objects
    ]


def write_edits(
    path: Path, log: EditLog, layers: Sequence[int], facts: LocatedFacts, about: EditsAbout
) -> None:
    """Write the run so far to `path`, replacing what is there."""
    with write_artifact(path, "edits", about, force=True) as writer:
        writer.layers(layers)
        writer.facts(facts)
        writer.write("known", log.known)
        writer.write("protected", log.protected)
        writer.write("paraphrase/known", log.paraphrase_known)
        for name, values in (log.of_edit | log.of_pass).items():
            writer.write(name, np.stack(values, axis=1) if name in _OF_LAYER else values)
        for column, name in enumerate(_KEPT_OUT):
            writer.write(name, [row[column] for row in log.kept_out])
