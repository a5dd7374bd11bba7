"""Figures inside the page: SVG where it is small, else PNG that keeps to a number of bytes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from kscli.figures import KINDS, FigureOptions, Look, Shown
from kscli.figures.saving import render
from kscli.report.html import Html, tag, void

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

# The elements of matplotlib's SVG that are not part of the drawing; the page has its own style.
_NOT_DRAWN = ("metadata", "style")
# Characters that a name may have, which matplotlib writes and no XML may.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Widths in pixels at which an image is tried, until its pages keep to the drawing's bytes.
_WIDTHS = (1600, 1300, 1000, 800, 600)
# Inches that a figure is drawn at for a page of full width, and for that of a telephone, so that
# its text is of about the size of the page's.
_WIDE, _NARROW = 7.6, 3.6
_COLOURS = 256
_PLAIN = FigureOptions()


@dataclass(frozen=True)
class Drawing:
    """A figure of the registry on the page; `name` is its own among a part's drawings.

    With `most_bytes` it is drawn as PNG, and all its pages together have no more bytes than
    that where the narrowest width allows; 0: as SVG. A drawing that takes `half` of a full page
    stands beside another.
    """

    name: str
    kind: str
    caption: str
    options: FigureOptions = _PLAIN
    most_bytes: int = 0
    half: bool = False


def picture(drawing: Drawing, sources: Sequence[Shown], prefix: str) -> Html:
    """The drawing of `sources`, a `figure` a page, and its caption; `prefix` begins all its ids.

    It is drawn for a wide page and for a narrow one; the style shows that which fits.
    """
    if drawing.half:
        drawn = [tag("div", *_figures(drawing, sources, prefix, _NARROW))]
    else:
        drawn = [
            tag("div", *_figures(drawing, sources, prefix, _WIDE), class_="for-wide"),
            tag("div", *_figures(drawing, sources, f"{prefix}-n", _NARROW), class_="for-narrow"),
        ]
    return tag("div", *drawn, tag("p", drawing.caption, class_="caption"), class_="picture")


def _figures(drawing: Drawing, sources: Sequence[Shown], prefix: str, width: float) -> list[Html]:
    options = replace(drawing.options, look=Look(width=width))
    pages = KINDS[drawing.kind].pages(sources, options)
    if drawing.most_bytes:
        share = width / _WIDE
        most = drawing.most_bytes * (1 if drawing.half else share)
        drawn = _images(pages, drawing.caption, int(most), int(_WIDTHS[0] * share))
    else:
        drawn = [
            _svg(page, f"{prefix}-{drawing.name}-{at}-", drawing.caption)
            for at, page in enumerate(pages)
        ]
    return [tag("figure", inner, aria_label=drawing.caption) for inner in drawn]


def _svg(page: Figure, prefix: str, label: str) -> Html:
    """The figure as an `svg` element whose ids begin with `prefix`."""
    root = ElementTree.fromstring(_NOT_XML.sub("", render(page, "svg").decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _NOT_DRAWN:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(name): _own(value, _local(name), prefix)
            for name, value in element.attrib.items()
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Html(ElementTree.tostring(root, encoding="unicode", method="html"))


def _local(name: str) -> str:
    """A name without its namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]


def _own(value: str, name: str, prefix: str) -> str:
    """An attribute's value, where it is an id or refers to one, with the prefix."""
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")


def _images(pages: Sequence[Figure], caption: str, most_bytes: int, widest: int) -> list[Html]:
    """The pages as PNG, as wide as their bytes allow, and `widest` pixels at most."""
    from PIL import Image

    originals = [Image.open(io.BytesIO(render(page, "png"))).convert("RGB") for page in pages]
    encoded: list[bytes] = []
    for width in (widest, *(width for width in _WIDTHS if width < widest)):
        encoded = [_encoded(image, width) for image in originals]
        if sum(map(len, encoded)) <= most_bytes:
            break
    return [
        void(
            "img",
            src=f"data:image/png;base64,{base64.b64encode(data).decode()}",
            alt=caption,
            width=str(size[0]),
            height=str(size[1]),
        )
        for data, size in ((data, _size(data)) for data in encoded)
    ]


def _encoded(image: Image, width: int) -> bytes:
    """A PNG of at most that width, each of its pixels the mean of those it stands for."""
    from PIL import Image

    if image.width > width:
        height = round(image.height * width / image.width)
        image = image.resize((width, height), Image.Resampling.BOX)
    few = image.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _size(png: bytes) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(png)).size
