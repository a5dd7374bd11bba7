"""What the shell offers for an option's value: aliases, and the layers of an artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kscli.escaping import escaped

ARTIFACTS = ("pmatrix", "keys", "cov")


def complete_model(ctx: Any, incomplete: str) -> list[str]:
    """Aliases and the folders of `--dir` that begin with what was typed."""
    from kscli.models.aliases import ALIASES

    root = _directory(ctx.params)
    made = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    names = sorted({*(alias.name for alias in ALIASES), *made})
    # A name that would act on the terminal is not offered.
    return [name for name in names if name.startswith(incomplete) and name == escaped(name)]


def complete_editor(incomplete: str) -> list[str]:
    """The editors whose names begin with what was typed."""
    from kscli.editing.editors import EDITORS

    return [name for name in EDITORS if name.startswith(incomplete)]


def complete_layers(ctx: Any, incomplete: str) -> list[str]:
    """`all` and the layers that the model's artifacts hold, or that its alias has."""
    layers = _known_layers(ctx.params)
    head, comma, last = incomplete.rpartition(",")
    offers = [str(layer) for layer in layers] + ([] if comma else ["all", "-1"])
    return [head + comma + offer for offer in offers if offer.startswith(last)]


def _known_layers(parameters: dict[str, Any]) -> tuple[int, ...]:
    from kscli.errors import KscliError
    from kscli.models.aliases import find_alias, slug

    model = parameters.get("model") or "tiny"
    model = model[0] if isinstance(model, (list, tuple)) else model
    root = _directory(parameters)
    for kind in ARTIFACTS:
        path = root / slug(model) / f"{kind}.h5"
        if path.is_file():
            from kscli.artifacts import Artifact

            try:
                with Artifact(path) as artifact:
                    return artifact.layers
            except KscliError:
                continue
    alias = find_alias(model)
    return tuple(range(alias.layers)) if alias else ()


def _directory(parameters: dict[str, Any]) -> Path:
    return Path(parameters.get("directory") or os.environ.get("KSCLI_DIR", "artifacts"))
