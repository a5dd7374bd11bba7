"""Stages and the files they make: where a model's artifacts lie, and which are up to date.

A file is up to date when its recipe, the inputs and options that decided what it holds, is
the one of today's request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.artifacts import (
    Artifact,
    CovarianceFile,
    KeysFile,
    Kind,
    PMatrixFile,
    Recipe,
    difference,
    is_imported,
)
from kscli.errors import ArtifactError
from kscli.layers import select_layers
from kscli.models.aliases import slug
from kscli.reporter import Reporter
from kscli.stats_file import statistics_recipe, write_statistics

if TYPE_CHECKING:
    from kscli.corpus import Corpus
    from kscli.covariance import CovarianceOptions
    from kscli.facts import FactSet
    from kscli.models.loading import LoadedModel, LocatedModel, ModelOptions
    from kscli.positions import KeyToken


class Existing(Enum):
    """What to do with a file that is in the way and not up to date.

    KEEP leaves it with a warning, REMAKE replaces it with a note; FORCE replaces even a file
    that is up to date.
    """

    REFUSE = "refuse"
    KEEP = "keep"
    REMAKE = "remake"
    FORCE = "force"


@dataclass(frozen=True)
class Places:
    """Where a model's artifacts lie: `root/SLUG/{cov,keys,pmatrix,stats}.h5` and `figures/`."""

    root: Path
    model: str

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.root / slug(self.model)

    @property
    def figures(self) -> Path:
        """The folder of the model's figures."""
        return self.folder / "figures"

    def path(self, kind: Kind) -> Path:
        """The artifact of that kind."""
        return self.folder / f"{kind}.h5"


def make(
    path: Path,
    kind: Kind,
    recipe: Recipe,
    maker: Callable[[], object],
    existing: Existing,
    reporter: Reporter,
    model_id: str = "",
) -> bool:
    """Call `maker`, which writes `path`, unless the file is up to date; whether it was called.

    Raises ArtifactError when another file is in the way and `existing` says to refuse, or when
    it is about a model of another `model_id`, two models' folders having one base name.
    """
    reason = difference(path, kind, recipe)
    if existing is not Existing.FORCE:
        if reason is None:
            reporter.note(f"{path} is up to date.")
            return False
        if path.exists():
            if existing is Existing.REFUSE:
                raise ArtifactError(f"{path} exists, and {reason}; add --force to replace it.")
            if existing is Existing.KEEP:
                reporter.warn(f"{path} was left as it is, though {reason}; --force replaces it.")
                return False
            _refuse_another_model(path, recipe, model_id)
            reporter.note(f"{path} is made again: {reason}.")
    maker()
    return True


def _refuse_another_model(path: Path, recipe: Recipe, model_id: str) -> None:
    try:
        with Artifact(path) as artifact:
            held, weights = artifact.attributes["model_id"], artifact.recipe.get("weights")
    except ArtifactError:
        return
    if model_id not in ("", held) and weights != recipe.get("weights"):
        raise ArtifactError(
            f"{path} is about another model, {held}; give {model_id} a --dir of its own, or "
            "replace the file with --force."
        )


class Session:
    """One model, found and loaded at most once, and the stages that run it."""

    def __init__(self, options: ModelOptions, existing: Existing, reporter: Reporter) -> None:
        self.options = options
        self.existing = existing
        self.reporter = reporter

    @cached_property
    def located(self) -> LocatedModel:
        """The model's files."""
        from kscli.models.loading import locate_model

        return locate_model(self.options, self.reporter)

    @cached_property
    def model(self) -> LoadedModel:
        """The model, loaded."""
        from kscli.models.loading import load_model

        with self.reporter.task(f"loading {self.options.model}"):
            return load_model(self.options, self.reporter, self.located)

    @cached_property
    def dtype(self) -> str:
        """The dtype that the model is run in."""
        from kscli.models.loading import resolve_device, resolve_dtype

        return resolve_dtype(self.options.dtype, resolve_device(self.options.device))

    def cache_cov(self, corpus: Corpus, options: CovarianceOptions, path: Path) -> bool:
        """Make cov.h5 at `path` unless it is up to date; whether it was made.

        An imported file cannot be made again, and is replaced by force alone.
        """
        from kscli.covariance import cache_covariance, covariance_recipe

        if self.existing is Existing.REMAKE and is_imported(path):
            self.reporter.note(f"{path} was imported, and is used as it is (--force measures C).")
            return False
        recipe = covariance_recipe(self.located.identity, corpus, options, self.dtype)
        return make(
            path,
            "cov",
            recipe,
            lambda: cache_covariance(
                self.model, corpus, options, path, force=True, reporter=self.reporter
            ),
            self.existing,
            self.reporter,
            self.located.identity.model_id,
        )

    def extract(self, facts: FactSet, token: KeyToken, layers: str, path: Path) -> bool:
        """Make keys.h5 at `path` unless it is up to date; whether it was made."""
        from kscli.extraction import extraction_recipe, write_keys

        recipe = extraction_recipe(self.located.identity, facts, token, layers, self.dtype)
        return make(
            path,
            "keys",
            recipe,
            lambda: write_keys(
                self.model,
                facts,
                path,
                token=token,
                layers=layers,
                force=True,
                reporter=self.reporter,
            ),
            self.existing,
            self.reporter,
            self.located.identity.model_id,
        )


@dataclass(frozen=True)
class PMatrixRequest:
    """Which files pmatrix reads and writes, at which layers, with which ridge."""

    cov: Path
    keys: Path
    output: Path
    layers: str = "all"
    ridge: float = 0.0


def make_pmatrix(request: PMatrixRequest, existing: Existing, reporter: Reporter) -> bool:
    """Make pmatrix.h5 unless it is up to date; whether it was made.

    `all` layers are those that keys.h5 holds.
    """
    from kscli.superposition import superposition_recipe, write_pmatrix

    with CovarianceFile(request.cov) as cov, KeysFile(request.keys) as keys:
        layers = select_layers(request.layers, keys.layers, str(request.keys))
        return make(
            request.output,
            "pmatrix",
            superposition_recipe(cov, keys, layers, request.ridge),
            lambda: write_pmatrix(
                cov,
                keys,
                request.output,
                layers=layers,
                ridge=request.ridge,
                force=True,
                reporter=reporter,
            ),
            existing,
            reporter,
        )


def make_statistics(
    pm: PMatrixFile, layers: tuple[int, ...], path: Path, existing: Existing, reporter: Reporter
) -> bool:
    """Make stats.h5, of `layers` of `pm`, unless it is up to date; whether it was made."""
    return make(
        path,
        "stats",
        statistics_recipe(pm, layers),
        lambda: write_statistics(pm, layers, path, force=True),
        existing,
        reporter,
    )
