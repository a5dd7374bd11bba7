"""What all figures share: sizes, fonts, colours, and how their parts are named.

Nothing here or in the figures uses pyplot: a figure is an object that belongs to its caller.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import (
    BoundaryNorm,
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    to_rgb,
)
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import ScaledTranslation

from kscli.errors import UsageError
from kscli.escaping import escaped
from kscli.figures import PER_PAGE, Look
from kscli.numbers import number

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from matplotlib.transforms import Bbox, Transform

COLUMN = 3.3
"""Width of one column of a two-column page, in inches."""
PAGE = 6.9
"""Width of both columns."""

_LEAST_HEIGHT = 0.7
"""The least height of a figure, by what it has by itself."""

TEXT = 7.0
SMALL = 6.0
NOTE = 5.5

# Okabe and Ito's palette, told apart with every kind of colour vision; less its yellow,
# which is lost on white, and its black, which is for axes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MOST_NAMED = 8
"""Layers of a figure that are named; of more there is a bar of their colours."""
_BAR_TICKS = 10
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


def looking(fig: Figure, look: Look, kind: str) -> Figure:
    """The figure with the title, height and resolution that were asked for.

    Its module saw to the width and the names. Raises UsageError for a height that has no room for
    what is in the figure.
    """
    if look.title is not None:
        fig.suptitle(escaped(look.title), parse_math=False)
    if look.height:
        natural = fig.get_figheight()
        if look.height < _LEAST_HEIGHT * natural:
            raise UsageError(
                f"{kind} of {fig.get_figwidth():g} inches is {natural:.1f} inches high, and at "
                f"least {_LEAST_HEIGHT * natural:.1f}; give a larger --size, or leave the height "
                "out."
            )
        fig.set_figheight(look.height)
    if look.dpi:
        fig.set_dpi(look.dpi)
    return fig


def fitting(width: float, most: int, least: float) -> int:
    """How many columns of `least` inches a figure of `width` inches has; `most` at most."""
    return max(1, min(most, int(width / least)))


def grid_columns(layers: int, width: float) -> int:
    """Columns of a grid of a model of `layers` layers: those of five rows of `PER_PAGE` panels."""
    return fitting(width, min(PER_PAGE // 5, layers), 1.5)


def open_axes(ax: Axes) -> None:
    """Leave out the axes' upper and right edge, and rule it lightly across."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y")


def layer_colours(count: int) -> list[Any]:
    """Colours for `count` layers in order, dark to light; viridis short of its pale end."""
    if count == 1:
        return [COLOURS[0]]
    return [colormaps["viridis"](at) for at in np.linspace(0.0, 0.8, count)]


def layer_bar(ax: Axes, layers: Sequence[int]) -> None:
    """A bar of the colours of `layer_colours` beside the axes, where names would be too many."""
    colours = ListedColormap(layer_colours(len(layers)))
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, aspect=30, pad=0.01)
    step = math.ceil(len(layers) / _BAR_TICKS)
    bar.set_ticks(range(0, len(layers), step), labels=[str(one) for one in layers[::step]])
    bar.ax.minorticks_off()
    # Below the bar and not beside it, where it would take from the axes.
    bar.ax.set_xlabel("layer")


def line_style(at: int) -> dict[str, Any]:
    """Colour and dashes of the `at`-th of several models; no two alike within `LINE_STYLES`."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "linestyle": _DASHES[at // len(COLOURS) % len(_DASHES)],
    }


def size_colours() -> Colormap:
    """White to red for |p|, as the heatmap of P has it; darker beyond 1, grey where there is none.

    The heatmap's own colours go on to blue below 0.
    """
    half = colormaps["RdBu_r"](np.linspace(0.5, 0.94, 255))
    colours = LinearSegmentedColormap.from_list("size", list(half), N=255)
    return colours.with_extremes(over="#2e0410", bad="#BDBDBD")


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
    return _width_per_point(escaped(text)) * size


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
    parts = [escaped(part) for part in parts]
    first, rest = (parts[0], "".join(f", {part}" for part in parts[1:])) if parts else ("", "")
    keep = len(first)
    text = first + rest
    while text_width(text, size) > width and keep > 4:
        keep -= 1
        head = keep // 2
        text = f"{first[:head]}\N{HORIZONTAL ELLIPSIS}{first[len(first) - keep + head :]}{rest}"
    return text


@dataclass(frozen=True)
class Names:
    """What all parts of a figure have in common, for its title, and what tells each apart."""

    shared: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]


def names(parts: Sequence[tuple[str, ...]]) -> Names:
    """Split the names of a figure's parts, such as ("gpt2", "layer 0", "m = 128"), by position."""
    parts = [tuple(map(escaped, part)) for part in parts]
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


def axes_over_lists(width: float, height: float, columns: int, count: int) -> Figure:
    """A figure of `width` inches with `count` axes of `height`, below which is room for labels.

    `list_below` and `write_below` say how much more each takes, and `make_room` gives it.
    """
    rows = math.ceil(count / columns)
    fig = new_figure(width, 0.4 + rows * (height + 0.42))
    for ax in fig.subplots(rows, columns, squeeze=False).flat[count:]:
        ax.remove()
    return fig


def list_below(ax: Axes, handles: Sequence[Artist], labels: Sequence[str], head: str = "") -> float:
    """List what each line of the axes is below them, where the list hides no data.

    The list is read row by row, in as many columns as fit. Returns the inches that it takes.
    """
    place = partial(
        ax.legend, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=_below(ax)
    )
    return _list(place, column_width(ax), handles, labels, head)


def list_at_foot(
    fig: Figure, handles: Sequence[Artist], labels: Sequence[str], head: str = ""
) -> float:
    """The same below all axes of a figure."""

    def place(*entries: Sequence[Any], **style: Any) -> Legend:
        fig.legends.clear()
        return fig.legend(*entries, loc="outside lower center", **style)

    return _list(place, fig.get_figwidth(), handles, labels, head)


def _list(
    place: Callable[..., Legend],
    width: float,
    handles: Sequence[Artist],
    labels: Sequence[str],
    head: str,
) -> float:
    def listed(columns: int) -> Legend:
        # Matplotlib lists column by column.
        order = [at for first in range(columns) for at in range(first, len(labels), columns)]
        legend = place(
            [handles[at] for at in order],
            [labels[at] for at in order],
            title=head or None,
            title_fontsize=SMALL,
            ncols=columns,
            handlelength=1.6,
            columnspacing=1.0,
            handletextpad=0.5,
            borderaxespad=0,
            borderpad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        return legend

    widest = max(_inches(text).width for text in listed(1).get_texts())
    columns = max(1, min(len(labels), int((width - 0.4) / (widest + 0.3))))
    rows = math.ceil(len(labels) / columns)
    return _inches(listed(math.ceil(len(labels) / rows))).height + 0.06


def write_below(ax: Axes, sentence: str) -> float:
    """Write a sentence below the axes; returns the inches that it takes."""
    fit = int((column_width(ax) - 0.6) / (0.55 * SMALL / 72))
    written = ax.text(
        0,
        0,
        textwrap.fill(sentence, fit),
        transform=_below(ax),
        va="top",
        fontsize=SMALL,
        linespacing=1.3,
        parse_math=False,
    )
    return _inches(written).height + 0.06


def range_below(ax: Axes, what: str, of: Sequence[tuple[int, float]], unit: str = "") -> float:
    """Write the least and the largest of a number `of` each layer; returns the inches it takes."""
    known = sorted((value, layer) for layer, value in of if not math.isnan(value))
    if not known:
        return write_below(ax, f"{what}: undefined")
    (low, at_low), (high, at_high) = known[0], known[-1]
    low_, high_ = (number(value, 1) + unit for value in (low, high))
    return write_below(ax, f"{what}: from {low_} (layer {at_low}) to {high_} (layer {at_high})")


def make_room(fig: Figure, heights: Sequence[float], columns: int) -> None:
    """Make a figure higher by what stands below its axes, which are in rows of `columns`."""
    rows = [max(heights[at : at + columns]) for at in range(0, len(heights), columns)]
    fig.set_figheight(fig.get_figheight() + sum(rows))


def column_width(ax: Axes) -> float:
    """The inches of the figure's width that one column of its axes has."""
    return float(ax.figure.get_figwidth()) / ax.get_gridspec().ncols  # type: ignore[union-attr]


def _below(ax: Axes) -> Transform:
    """From fractions of the axes, below their labels."""
    labels = ScaledTranslation(0, -0.4, ax.figure.dpi_scale_trans)
    return ax.transAxes + labels


def _inches(artist: Artist) -> Bbox:
    extent = artist.get_window_extent()
    return extent.transformed(artist.figure.dpi_scale_trans.inverted())
