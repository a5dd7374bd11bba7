"""Figures as files: PNG, SVG or PDF by the path's extension, the same bytes for the same figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.errors import UsageError
from kscli.files import replace_file, require_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What matplotlib writes into each format beside the drawing. Left out is what changes
# from one run to the next: the date.
_METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None},
    "png": {},
    "svg": {"Date": None},
}
FORMATS = tuple(_METADATA)


def check_target(path: Path, force: bool = False) -> str:
    """The format that `path` names, if a figure may be written there.

    Raises UsageError for an extension that is not one of `FORMATS`, and ArtifactError for a
    file that exists, unless `force`, and for a folder that cannot be written.
    """
    extension = path.suffix.lower().removeprefix(".")
    if extension not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise UsageError(
            f"{path}: a figure's format follows from its extension; give one of {known}."
        )
    require_writable(path, force=force)
    return extension


def render(fig: Figure, extension: str) -> bytes:
    """The figure as the bytes of a file of one of `FORMATS`."""
    from kscli.figures.style import house_style

    buffer = io.BytesIO()
    with house_style():
        fig.savefig(buffer, format=extension, metadata=_METADATA[extension])
    return buffer.getvalue()


def save_figure(fig: Figure, path: Path, force: bool = False) -> None:
    """Write the figure to `path`, renamed into place; raises as `check_target` does."""
    content = render(fig, check_target(path, force))
    with replace_file(path, force=force) as beside:
        beside.write_bytes(content)
