"""The files that edits start from, and whether they are about the model that is edited."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kscli.artifacts import (
    IDENTITY,
    UNKNOWN,
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    require_same_identity,
)
from kscli.errors import ArtifactError
from kscli.models.loading import LoadedModel
from kscli.reporter import Reporter


@dataclass(frozen=True)
class EditSources:
    """C, the facts' keys and P, open for reading, and the layers that are edited, ascending."""

    cov: CovarianceFile
    keys: KeysFile
    pm: PMatrixFile
    layers: tuple[int, ...]

    @property
    def ridge(self) -> float:
        """What P was made with, and so C is inverted with."""
        return float(self.pm.attributes["ridge"])

    def check(self, model: LoadedModel, reporter: Reporter) -> None:
        """Raise ArtifactError unless all are about `model` and one another, and have the layers."""
        for file in (self.cov, self.keys, self.pm):
            file.require_layers(self.layers)
        for warning in require_same_identity(self.cov, self.keys):
            reporter.warn(warning)
        _require_made_from(self.pm, {"cov": self.cov, "keys": self.keys})
        _require_about(self.keys, model, reporter)


def _require_made_from(pm: PMatrixFile, files: dict[str, CovarianceFile | KeysFile]) -> None:
    inputs = json.loads(pm.attributes["inputs"])
    for name, file in files.items():
        if inputs.get(name) != file.fingerprint:
            raise ArtifactError(
                f"{pm.path} was not made from {file.path} as it is now; make it again with "
                "`kscli pmatrix --force`."
            )


def _require_about(keys: KeysFile, model: LoadedModel, reporter: Reporter) -> None:
    live = model.provenance()
    for name in IDENTITY:
        held = keys.attributes[name]
        if held not in (live[name], UNKNOWN):
            raise ArtifactError(
                f"{keys.path} and {model.identity.model_id} differ in {name} ({held} and "
                f"{live[name]}): the file is about another model. Make it again from this one."
            )
    if keys.attributes["dtype"] != model.dtype:
        reporter.warn(
            f"{keys.path} was made in {keys.attributes['dtype']} and the model is edited in "
            f"{model.dtype}; what the live model computes is off the prediction by the difference."
        )


def key_tokens_end_prompts(pm: PMatrixFile, lengths: Sequence[int], fact: int) -> bool:
    """Whether a fact's key is at its prompt's last token, from which the answer is read."""
    return int(pm.position[fact]) == lengths[fact] - 1
