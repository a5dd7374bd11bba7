"""What all figures share: sizes, fonts, colours, and how their parts are named.

Nothing here or in the figures uses pyplot: a figure is an object that belongs to its caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from kscli.figures import PER_PAGE

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

COLUMN = 3.3
"""Width of one column of a two-column page, in inches."""
PAGE = 6.9
"""Width of both columns."""

TEXT = 7.0
SMALL = 6.0
NOTE = 5.5

# Okabe and Ito's palette, told apart with every kind of colour vision; less its yellow,
# which is lost on white, and its black, which is for axes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY = "#767676"
_DASHES = ("-", "--", ":")
LINE_STYLES = len(COLOURS) * len(_DASHES)
"""How many lines `line_style` tells apart."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#333333",
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.titlesize": TEXT,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.hspace": 0.0,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.wspace": 0.0,
    "figure.dpi": 300,
    "figure.labelsize": TEXT,
    "figure.titlesize": TEXT + 1,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": TEXT,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "path.simplify_threshold": 0.03,
    "pdf.fonttype": 42,
    "savefig.dpi": "figure",
    "svg.fonttype": "none",
    "svg.hashsalt": "kscli",
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user's own settings are, until the end."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]


def grid_columns(layers: int) -> int:
    """Columns of a grid of a model of `layers` layers: those of five rows of `PER_PAGE` panels."""
    return min(PER_PAGE // 5, layers)


def open_axes(ax: Axes) -> None:
    """Leave out the axes' upper and right edge, and rule it lightly across."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y")


def layer_colours(count: int) -> list[Any]:
    """Colours for `count` layers in order, dark to light; viridis short of its pale end."""
    if count == 1:
        return [COLOURS[0]]
    return [colormaps["viridis"](at) for at in np.linspace(0.0, 0.8, count)]


def line_style(at: int) -> dict[str, Any]:
    """Colour and dashes of the `at`-th of several models; no two alike within `LINE_STYLES`."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "linestyle": _DASHES[at // len(COLOURS) % len(_DASHES)],
    }


def shades(colour: str, count: int) -> list[Any]:
    """`count` shades of a colour, light to dark; the colour itself where it is one."""
    if count == 1:
        return [colour]
    base = np.array(to_rgb(colour))
    # Towards white, and less far towards black, where hues are lost.
    mixed = [
        base + (1 - base) * -at if at < 0 else base * (1 - at)
        for at in np.linspace(-0.5, 0.5, count)
    ]
    return [tuple(map(float, rgb)) for rgb in mixed]


def text_width(text: str, size: float) -> float:
    """Width in inches of one line of text of a size in points."""
    return _width_per_point(text) * size


@lru_cache(maxsize=4096)
def _width_per_point(text: str) -> float:
    # Measured large, where hinting changes nothing, at one pixel a point; FreeType counts
    # in 64ths of a pixel.
    large = 100.0
    font = get_font(findfont("DejaVu Sans"))
    font.set_size(large, 72)
    font.set_text(text)
    width: int = font.get_width_height()[0]
    return width / 64 / 72 / large


def fitted(parts: Sequence[str], width: float, size: float) -> str:
    """Parts of a name, joined; the middle of the first is left out where they are too wide.

    `width` in inches, `size` in points.
    """
    first, rest = (parts[0], "".join(f", {part}" for part in parts[1:])) if parts else ("", "")
    keep = len(first)
    text = first + rest
    while text_width(text, size) > width and keep > 4:
        keep -= 1
        head = keep // 2
        text = f"{first[:head]}\N{HORIZONTAL ELLIPSIS}{first[len(first) - keep + head :]}{rest}"
    return text


def wrapped(text: str, width: float, size: float) -> list[str]:
    """A text in lines of at most `width` inches, where its words allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class Names:
    """What all parts of a figure have in common, for its title, and what tells each apart."""

    shared: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]


def names(parts: Sequence[tuple[str, ...]]) -> Names:
    """Split the names of a figure's parts, such as ("gpt2", "layer 0", "m = 128"), by position."""
    shared = [len(set(values)) == 1 for values in zip(*parts, strict=True)]
    return Names(
        tuple(text for text, same in zip(parts[0], shared, strict=True) if same),
        tuple(
            tuple(text for text, same in zip(part, shared, strict=True) if not same)
            for part in parts
        ),
    )


def title(fig: Figure, what: str, shared: Sequence[str]) -> None:
    """Head a figure with what it shows and, in a line of its own, of what."""
    width = fig.get_figwidth() - 0.1
    lines = [what, *([fitted(shared, width, TEXT + 1)] if shared else [])]
    fig.suptitle("\n".join(lines), parse_math=False)


@dataclass(frozen=True)
class Legend:
    """What each line of some axes is, for `legend_below` to list under `head`."""

    labels: tuple[str, ...]
    head: str = ""

    def columns(self, width: float) -> int:
        """How many entries stand side by side: those that fit `width` inches, in even rows."""
        handle_and_gaps = 0.3
        widest = max(text_width(label, SMALL) for label in self.labels) + handle_and_gaps
        fit = max(1, min(len(self.labels), int((width - 0.4) / widest)))
        rows = math.ceil(len(self.labels) / fit)
        return math.ceil(len(self.labels) / rows)

    def by_column(self, width: float) -> list[int]:
        """The entries' indices column by column, as matplotlib lists them, to be read by row."""
        columns = self.columns(width)
        return [at for first in range(columns) for at in range(first, len(self.labels), columns)]

    def height(self, width: float) -> float:
        """The inches that it takes below axes of `width` inches."""
        if not self.labels:
            return 0.02
        rows = math.ceil(len(self.labels) / self.columns(width)) + bool(self.head)
        return (rows * 1.55 + 0.8) * SMALL / 72


@dataclass(frozen=True)
class Caption:
    """A sentence, for `caption_below` to write below some axes."""

    text: str

    def lines(self, width: float) -> list[str]:
        """The sentence in lines that fit below axes of `width` inches and their labels."""
        return wrapped(self.text, width - 0.6, SMALL)

    def height(self, width: float) -> float:
        """The inches that it takes below axes of `width` inches."""
        return (len(self.lines(width)) * 1.3 + 0.8) * SMALL / 72


def axes_with_legends(
    width: float, height: float, columns: int, legends: Sequence[Legend | Caption]
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure of `width` inches with axes of `height`, each over a place for legend or caption.

    Axes and places are as many as `legends`; axes side by side are equally high.
    """
    rows = math.ceil(len(legends) / columns)
    a_column = width / columns
    places = [
        max(legend.height(a_column) for legend in legends[row * columns : (row + 1) * columns])
        for row in range(rows)
    ]
    labels = 0.42
    fig = new_figure(width, 0.4 + sum(height + labels + place for place in places))
    cells = fig.subplots(
        2 * rows,
        columns,
        squeeze=False,
        height_ratios=[part for place in places for part in (height, place)],
    )
    pairs = list(zip(cells[::2].flat, cells[1::2].flat, strict=True))
    for at, (ax, place) in enumerate(pairs):
        place.set_axis_off()
        if at >= len(legends):
            ax.set_axis_off()
    return fig, pairs[: len(legends)]


def legend_below(place: Axes, handles: Sequence[Artist], legend: Legend, width: float) -> None:
    """List the lines in the place under their axes, row by row, where the list hides no data."""
    order = legend.by_column(width)
    drawn = place.legend(
        [handles[at] for at in order],
        [legend.labels[at] for at in order],
        title=legend.head or None,
        title_fontsize=SMALL,
        loc="upper center",
        ncols=legend.columns(width),
        handlelength=1.6,
        columnspacing=1.0,
        handletextpad=0.5,
        borderaxespad=0,
        borderpad=0,
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)


def caption_below(place: Axes, caption: Caption, width: float) -> None:
    """Write the sentence in the place under its axes."""
    written = place.text(
        0,
        1,
        "\n".join(caption.lines(width)),
        transform=place.transAxes,
        va="top",
        fontsize=SMALL,
        linespacing=1.3,
        parse_math=False,
    )
    # The axes above are not to yield to it.
    written.set_in_layout(False)
