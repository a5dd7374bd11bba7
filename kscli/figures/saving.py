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
# Where each format says what a figure was drawn from.
_SOURCE = {"pdf": "Keywords", "png": "Source", "svg": "Source"}


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


def render(fig: Figure, extension: str, source: str = "") -> bytes:
    """The figure as the bytes of a file of one of `FORMATS`, which says that it shows `source`."""
    from kscli.figures.style import house_style

    buffer = io.BytesIO()
    with house_style():
        metadata = _METADATA[extension] | ({_SOURCE[extension]: source} if source else {})
        fig.savefig(buffer, format=extension, metadata=metadata)
    return buffer.getvalue()


def source_of_png(path: Path) -> str:
    """What the PNG figure at `path` says that it shows; empty where it says nothing."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return str(image.info.get("Source", ""))
    except (OSError, UnidentifiedImageError):
        return ""


def save_figure(fig: Figure, path: Path, force: bool = False, source: str = "") -> None:
    """Write the figure to `path`, renamed into place; raises as `check_target` does."""
    content = render(fig, check_target(path, force), source)
    with replace_file(path, force=force) as beside:
        beside.write_bytes(content)
