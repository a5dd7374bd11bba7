"""Which artifacts are up to date, and what to do with one that is in the way.

A file is up to date when its recipe, the inputs and options that decided what it holds, is the
one of today's request. A stage makes its recipe once: it asks `must_make`, and writes the same
recipe into the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from kscli.artifacts.reading import Artifact, CovarianceFile
from kscli.artifacts.schema import CovarianceAbout, Kind, Recipe
from kscli.errors import ArtifactError, LockedError, UsageError
from kscli.layers import select_layers
from kscli.reporter import Reporter


class Existing(Enum):
    """What to do with a file that is in the way and not up to date.

    KEEP leaves it with a warning, REMAKE replaces it with a note; FORCE replaces even a file
    that is up to date.
    """

    REFUSE = "refuse"
    KEEP = "keep"
    REMAKE = "remake"
    FORCE = "force"


def must_make(
    path: Path,
    kind: Kind,
    recipe: Recipe,
    existing: Existing,
    reporter: Reporter,
    model_id: str = "",
) -> bool:
    """Whether the artifact at `path` has to be written, by `recipe`.

    Raises ArtifactError when another file is in the way and `existing` says to refuse, or when
    it is about a model of another `model_id`, two models' folders having one base name.
    """
    if existing is Existing.FORCE:
        return True
    reason = difference(path, kind, recipe)
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
    return True


def _refuse_another_model(path: Path, recipe: Recipe, model_id: str) -> None:
    try:
        with Artifact(path) as artifact:
            held, weights = artifact.about.model_id, artifact.about.recipe.get("weights")
    except ArtifactError:
        return
    if model_id not in ("", held) and weights != recipe.get("weights"):
        raise ArtifactError(
            f"{path} is about another model, {held}; give {model_id} a --dir of its own, or "
            "replace the file with --force."
        )


def difference(path: Path, kind: Kind, recipe: Mapping[str, Any]) -> str | None:
    """None if the artifact at `path` was made by `recipe`, else why it was not, in words.

    Raises LockedError where another program writes to it: what it holds is not known then.
    """
    if not path.exists():
        return "it does not exist"
    try:
        with Artifact(path, kind) as artifact:
            changed = [name for name in recipe if not _unchanged(name, recipe[name], artifact)]
    except LockedError:
        raise
    except ArtifactError:
        return "it cannot be read"
    return f"{', '.join(changed)} changed" if changed else None


def _unchanged(name: str, wanted: Any, artifact: Artifact) -> bool:
    """Whether an entry of the recipe asks for what the file holds, however it is spelled."""
    about = artifact.about
    if about.recipe.get(name) == wanted:
        return True
    if name == "layers":
        try:
            return select_layers(wanted, range(about.n_layers), "") == artifact.layers
        except UsageError:
            return False
    if not isinstance(about, CovarianceAbout):
        return False
    # Of a shard `documents` are its own, and not how far it read.
    if name == "samples" and about.whole_corpus and not about.recipe.get("shard"):
        return wanted is None or (about.documents is not None and wanted >= about.documents)
    return bool(name == "max_length" and wanted == about.max_length)


def is_imported(path: Path) -> bool:
    """Whether a covariance file lies at `path` that was imported, so not made from a model."""
    try:
        with CovarianceFile(path) as cov:
            return cov.about.imported
    except ArtifactError:
        return False
