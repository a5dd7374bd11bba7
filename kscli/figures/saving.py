"""Figures as files: PNG, SVG or PDF by the path's extension, the same bytes for the same figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
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


def page_paths(path: Path, pages: int) -> list[Path]:
    """The files that hold a figure's pages: a PDF all of them, else `NAME-1.png`, `NAME-2.png`."""
    if pages == 1 or path.suffix.lower() == ".pdf":
        return [path]
    return [path.with_name(f"{path.stem}-{page + 1}{path.suffix}") for page in range(pages)]


def render(fig: Figure, extension: str, source: str = "") -> bytes:
    """The figure as the bytes of a file of one of `FORMATS`, which says that it shows `source`."""
    from kscli.figures.dots import largest_shown
    from kscli.figures.style import house_style

    buffer = io.BytesIO()
    # Other formats hold an image's entries, and not its dots.
    with house_style(), largest_shown(fig) if extension == "png" else nullcontext():
        # Matplotlib's "figure" is the resolution that the figure was begun with.
        fig.savefig(buffer, dpi=fig.dpi, format=extension, metadata=_metadata(extension, source))
    return buffer.getvalue()


def render_pdf(pages: Sequence[Figure], source: str = "") -> bytes:
    """Figures as the bytes of one PDF, a page each."""
    from matplotlib.backends.backend_pdf import PdfPages

    from kscli.figures.style import house_style

    buffer = io.BytesIO()
    with house_style(), PdfPages(buffer, metadata=_metadata("pdf", source)) as pdf:
        for fig in pages:
            pdf.savefig(fig, dpi=fig.dpi)
    return buffer.getvalue()


def _metadata(extension: str, source: str) -> dict[str, str | None]:
    return _METADATA[extension] | ({_SOURCE[extension]: source} if source else {})


def save_figure(fig: Figure, path: Path, force: bool = False, source: str = "") -> None:
    """Write the figure to `path`, renamed into place; raises as `check_target` does."""
    content = render(fig, check_target(path, force), source)
    with replace_file(path, force=force) as beside:
        beside.write_bytes(content)


def save_pages(
    pages: Sequence[Figure], path: Path, force: bool = False, source: str = ""
) -> list[Path]:
    """Write the pages of a figure as `page_paths` says, and return these; raises as `check_target`.

    Nothing is written where one of the files may not be. Each says that it shows `source`.
    """
    paths = page_paths(path, len(pages))
    extensions = [check_target(one, force) for one in paths]
    contents = (
        [render_pdf(pages, source)]
        if len(pages) > 1 and len(paths) == 1
        else [render(fig, each, source) for fig, each in zip(pages, extensions, strict=True)]
    )
    for one, content in zip(paths, contents, strict=True):
        with replace_file(one, force=force) as beside:
            beside.write_bytes(content)
    return paths
