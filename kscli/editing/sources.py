"""The files that edits start from, and whether they are about the model that is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.artifacts import (
    IDENTITY,
    Artifact,
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    require_same_identity,
)
from kscli.errors import ArtifactError
from kscli.layers import format_layers, select_layers
from kscli.places import Places
from kscli.reporter import Reporter

if TYPE_CHECKING:
    from kscli.models.loading import LoadedModel


@dataclass(frozen=True)
class EditSources:
    """C, the facts' keys and P, open for reading, and the layers that are edited, ascending.

    Raises ArtifactError unless they are about one another and have the layers, and the keys are at
    the subjects' last tokens.
    """

    cov: CovarianceFile
    keys: KeysFile
    pm: PMatrixFile
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for file in (self.cov, self.keys, self.pm):
            file.require_layers(self.layers)
        require_same_identity(self.cov, self.keys)
        require_made_from(self.pm, {"cov": self.cov, "keys": self.keys})
        _require_subject_last(self.pm)
        _require_papers(self.pm)

    @classmethod
    @contextmanager
    def open(
        cls,
        places: Places,
        layers: str | Callable[[Artifact], str],
        *,
        cov: Path | None = None,
        keys: Path | None = None,
        pmatrix: Path | None = None,
    ) -> Iterator[EditSources]:
        """Open a model's files, or those named instead, for the layers selected.

        `layers` may be what chooses them, of the open pmatrix.h5.
        """
        with (
            PMatrixFile(pmatrix or places.path("pmatrix")) as pm,
            CovarianceFile(cov or places.path("cov")) as of_text,
            KeysFile(keys or places.path("keys")) as of_facts,
        ):
            spec = layers if isinstance(layers, str) else layers(pm)
            yield cls(of_text, of_facts, pm, select_layers(spec, pm.layers, str(pm.path)))

    @property
    def ridge(self) -> float:
        """What P was made with, and so C is inverted with."""
        return self.pm.about.ridge

    def check(self, model: LoadedModel, reporter: Reporter) -> None:
        """Raise ArtifactError unless all are about `model`; warn where that is not known."""
        # Keys in the dtype of the edit are as they should be, whatever C was measured in.
        fits = self.keys.about.dtype == model.dtype
        for warning in require_same_identity(self.cov, self.keys, ("dtype",) if fits else ()):
            reporter.warn(warning)
        require_about(self.keys, model)


def require_made_from(pm: PMatrixFile, files: Mapping[str, CovarianceFile | KeysFile]) -> None:
    """Raise ArtifactError where P was made from other files than these."""
    for name, file in files.items():
        if pm.about.inputs.get(name) != file.fingerprint:
            raise ArtifactError(
                f"{pm.path} was not made from {file.path} as it is now; make it again with "
                "`kscli pmatrix --force`."
            )


def _require_papers(pm: PMatrixFile) -> None:
    if pm.about.editor:
        raise ArtifactError(
            f"{pm.path} holds p of {pm.about.editor}; edits are compared with the paper's P, which "
            "`kscli pmatrix` writes without --editor."
        )


def _require_subject_last(pm: PMatrixFile) -> None:
    if pm.about.token != "subject-last":
        raise ArtifactError(
            f"{pm.path} is of keys at the token {pm.about.token!r}, and values are written at the "
            "subject's last; make keys and P of that with `kscli extract --token subject-last` and "
            "`kscli pmatrix`."
        )


def require_about(file: Artifact, model: LoadedModel) -> None:
    """Raise ArtifactError unless a file is about `model`, in whatever dtype."""
    # Of a model whose layers differ in size, a file is about those of one size.
    if set(file.layers) <= set(model.decoder.layers):
        model = model.of_layers(format_layers(file.layers))
    live = model.provenance()
    for name in IDENTITY:
        held = getattr(file.about, name)
        if held not in (live[name], None):
            raise ArtifactError(
                f"{file.path} and {model.identity.model_id} differ in {name} ({held} and "
                f"{live[name]}): the file is about another model. Make it again from this one."
            )
