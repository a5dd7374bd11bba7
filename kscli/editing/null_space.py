"""Where the null space of C is asked to begin."""

from __future__ import annotations

from kscli.editing.metrics import Cut
from kscli.errors import UsageError
from kscli.numbers import require_finite


def null_space_cut(absolute: float | None, relative: float | None) -> Cut:
    """Where --null-space or --relative-null-space cuts C's spectrum; the published cut without."""
    require_finite({"--null-space": absolute, "--relative-null-space": relative})
    if absolute is not None and relative is not None:
        raise UsageError("--null-space and --relative-null-space are two cuts; give one.")
    if relative is not None:
        return Cut(relative, relative=True)
    return Cut() if absolute is None else Cut(absolute)
