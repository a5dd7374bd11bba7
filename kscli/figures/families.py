"""The family and the size that a model's name tells, for figures that compare sizes."""

from __future__ import annotations

import re

from kscli.models.aliases import ALIASES, Alias

# "135M" in "SmolLM2-135M-Instruct", "0.5B" in "Qwen2.5-0.5B"; not the "7B" of "8x7B".
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", re.IGNORECASE)
_UNIT = {"m": 1e6, "b": 1e9}


def parameters(model: str) -> float | None:
    """How many parameters a model of this name has: an alias's, or what the name says."""
    alias = _alias(model)
    if alias is not None:
        return alias.parameters
    size = _SIZE.search(_base(model))
    return float(size[1]) * _UNIT[size[2].lower()] if size else None


def family(model: str) -> str:
    """What a model's name shares with other sizes: an alias's family, or the name less its size."""
    alias = _alias(model)
    if alias is not None:
        return alias.family
    base = _base(model)
    return re.sub(r"([-_.])[-_.]+", r"\1", _SIZE.sub("", base)).strip("-_.") or base


def _alias(model: str) -> Alias | None:
    """The alias that a display name stands for: its own, or that of its Hub id."""
    names = (model, model.replace("--", "/"))
    return next((a for a in ALIASES if a.name in names or a.hub_id in names), None)


def _base(model: str) -> str:
    """The name less its owner and its extension."""
    return model.replace("--", "/").rpartition("/")[2].removesuffix(".gguf")
