"""P as an image: row i is the edited fact, column j the fact that is moved (Figures 3, 18-24)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kscli.analysis.matrices import different_last_token
from kscli.analysis.resampling import ROUNDING
from kscli.analysis.statistics import off_diagonal
from kscli.figures import FigureOptions, Source
from kscli.figures.style import (
    COLOURS,
    COLUMN,
    PAGE,
    SMALL,
    TEXT,
    fitted,
    fitting,
    grid_columns,
    names,
    new_figure,
    text_width,
    title,
)
from kscli.layers import layers_text
from kscli.numbers import number

_MAX_COLUMNS = 6
# Inches: beside the panels, for the labels of the rows and for the bar; between columns; between
# rows, beside the panel's title; more between both where each panel has labels of its own; more
# above a last row that is not full; below, for the columns' labels; above, for the title.
_LEFT, _RIGHT = 0.45, 0.65
_COLUMN_GAP, _ROW_GAP = 0.1, 0.09
_OWN_LABELS = (0.2, 0.13)
_SHORT_ROW = 0.07
_LEAST_COLUMN = 0.95
_BELOW, _HEADING = 0.33, 0.39
_DPI = (300, 600)
_FRAME = COLOURS[2]
# Frames that a vector file has room for.
_MOST_FRAMES = 20_000
_LEAST_FRAMED = 0.25  # points that a cell takes: a smaller one would vanish between frames


@dataclass(frozen=True)
class _Panel:
    names: tuple[str, ...]
    P: NDArray[np.float64]
    extremes: tuple[float, float] | None
    marked: NDArray[np.bool_] | None

    @property
    def m(self) -> int:
        return len(self.P)


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One panel a model and layer, all on one scale from -1 to 1.

    Where P goes beyond the scale the shared bar has an arrow, and the cells the arrow's
    colour; each panel's title has the least and the greatest off-diagonal entry. Marked pairs
    of the same token have a green frame.
    """
    panels = [_panel(source, layer, options) for source in sources for layer in source.layers]
    grid = _grid(panels, sources, options)
    named = names([panel.names for panel in panels])
    heads = _heads(named.own, grid)
    head = (grid.text * 1.2 * (1 + len(heads[0])) + 3) / 72
    height = grid.rows * (grid.side + head) + grid.row_gaps + _BELOW + _HEADING
    fig = new_figure(grid.width, height, layout="compressed")
    fig.set_dpi(_dpi(max(panel.m for panel in panels), grid.side))
    axes = fig.subplots(grid.rows, grid.columns, squeeze=False)
    for at, (ax, panel, lines) in enumerate(zip(axes.flat, panels, heads, strict=False)):
        _draw_panel(ax, panel, lines, grid)
        lowest = at + grid.columns >= len(panels)
        ax.tick_params(
            labelleft=grid.own_labels or at % grid.columns == 0,
            labelbottom=grid.own_labels or lowest,
        )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    length = height - _HEADING - _BELOW
    bar = fig.colorbar(
        axes[0, 0].images[0],
        ax=axes,
        extend=_extend(panels),
        extendfrac=0.1 / length,
        aspect=length / 0.09,
        pad=0.1 / grid.width,
    )
    bar.set_label("$p(k_i, k_j)$")
    what = "Superposition matrix P"
    if options.mark_same_token:
        framed = any(_cell(panel, grid) >= grid.least_framed for panel in panels)
        what = (
            "P; green frames: pairs with the same last token"
            if framed
            else "P; its facts are too many for frames"
        )
    shared = named.shared
    if options.grid and named.own[0]:
        shared = (shared[0], layers_text(sources[0].layers), *shared[1:])
    title(fig, what, shared)
    fig.supxlabel("fact $j$, which is moved")
    fig.supylabel("fact $i$, which is edited")
    return fig


def _panel(source: Source, layer: int, options: FigureOptions) -> _Panel:
    P = source.matrices.matrix("P", layer)
    marked = None
    if options.mark_same_token:
        marked = ~different_last_token(source.matrices.token_id) & ~np.eye(len(P), dtype=bool)
    entries = off_diagonal(P)
    extremes = (float(entries.min()), float(entries.max())) if entries.size else None
    return _Panel((source.model, f"layer {layer}", f"m = {P.shape[0]}"), P, extremes, marked)


@dataclass(frozen=True)
class _Grid:
    """Panels in rows and columns; with `own_labels` where they differ in the number of facts.

    `short`: the last row has fewer panels, so that some of the row above have labels. Cells of
    fewer points than `least_framed` have no room for frames.
    """

    rows: int
    columns: int
    width: float
    own_labels: bool
    short: bool
    least_framed: float

    @property
    def side(self) -> float:
        """Of a panel, in inches."""
        return (self.width - _LEFT - _RIGHT) / self.columns - self.column_gap

    @property
    def column_gap(self) -> float:
        """Inches between columns."""
        return _COLUMN_GAP + self.own_labels * _OWN_LABELS[0]

    @property
    def row_gaps(self) -> float:
        """Inches between all rows, beside the panels' titles; a short last row leaves labels."""
        between = (self.rows - 1) * (_ROW_GAP + self.own_labels * _OWN_LABELS[1])
        return between + (self.short and not self.own_labels) * _SHORT_ROW

    @property
    def text(self) -> float:
        """Size of a panel's title, in points."""
        return TEXT if self.side > 1.2 else SMALL - 0.5


def _columns(panels: int, models: int) -> int:
    """A row a model where it fits the page, else about as many columns as rows."""
    a_model, rest = divmod(panels, models)
    if models > 1 and 1 < a_model <= _MAX_COLUMNS and not rest:
        return a_model
    return panels if panels <= 4 else min(_MAX_COLUMNS, math.ceil(math.sqrt(panels)))


def _grid(panels: Sequence[_Panel], sources: Sequence[Source], options: FigureOptions) -> _Grid:
    layers = len(sources[0].matrices.layers)
    wanted = layers if options.grid else len(panels)
    width = options.look.width or (COLUMN if wanted == 1 else PAGE)
    columns = (
        grid_columns(layers, width)
        if options.grid
        else fitting(width - _LEFT - _RIGHT, _columns(len(panels), len(sources)), _LEAST_COLUMN)
    )
    own_labels = len({panel.m for panel in panels}) > 1
    rows, over = math.ceil(len(panels) / columns), len(panels) % columns
    dot = 72 / options.look.dpi if options.look.dpi else 0.0
    return _Grid(
        rows,
        columns,
        width,
        own_labels,
        short=rows > 1 and over > 0,
        least_framed=max(_LEAST_FRAMED, dot),
    )


def _dpi(m: int, side: float) -> int:
    """Enough dots that no fact falls between two of them, within reason."""
    return int(min(max(_DPI[0], math.ceil(1.1 * m / side)), _DPI[1]))


def _heads(own: Sequence[tuple[str, ...]], grid: _Grid) -> list[list[str]]:
    """What names each panel, in lines: one, or two where one would cut a model's name."""
    room = grid.side + grid.column_gap / 2
    if all(text_width(", ".join(parts), grid.text) <= room for parts in own):
        return [[", ".join(parts)] if parts else [] for parts in own]
    lines = [(parts[:1], parts[1:]) for parts in own]
    return [[fitted(part, room, grid.text) for part in both if part] for both in lines]


def _draw_panel(ax: Axes, panel: _Panel, head: list[str], grid: _Grid) -> None:
    ax.imshow(
        panel.P, cmap=_colours(), norm=Normalize(-1 - ROUNDING, 1 + ROUNDING), interpolation="none"
    )
    if panel.marked is not None and _cell(panel, grid) >= grid.least_framed:
        _frame(ax, panel.marked, _cell(panel, grid))
    extremes = _extremes(panel)
    if grid.side > 2 and not head:
        extremes = f"off the diagonal: {extremes}"
    ax.set_title("\n".join([*head, extremes]), fontsize=grid.text, pad=3, parse_math=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(
            MaxNLocator(3 if grid.side < 1.2 else 5, integer=True, min_n_ticks=1)
        )


def _cell(panel: _Panel, grid: _Grid) -> float:
    """The side of a panel's cells, in points."""
    return 72 * grid.side / panel.m


def _frame(ax: Axes, cells: NDArray[np.bool_], size: float) -> None:
    """Frame the cells, which are of `size` points, from outside, so that none is hidden."""
    width = min(max(0.25 * size, 0.25), 0.8)
    half = 0.5 + 0.5 * width / size
    rows, columns = np.nonzero(cells)
    square = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    centres = np.stack([columns, rows], axis=1)[:, None, :]
    ax.add_collection(
        PolyCollection(
            list(centres + square),
            facecolors="none",
            edgecolors=_FRAME,
            linewidths=width,
            rasterized=len(rows) > _MOST_FRAMES,
        ),
        autolim=False,
    )


def _extremes(panel: _Panel) -> str:
    if panel.extremes is None:
        return "no pairs"
    low, high = (number(value, 2) for value in panel.extremes)
    return f"min {low}, max {high}"


def _colours() -> Colormap:
    """Blue over white to red, which all kinds of colour vision tell apart, darker beyond."""
    ends = colormaps["RdBu_r"](np.linspace(0.06, 0.94, 255))
    cmap = LinearSegmentedColormap.from_list("superposition", list(ends), N=255)
    return cmap.with_extremes(under="#04142e", over="#2e0410", bad="#767676")


def _extend(panels: Sequence[_Panel]) -> str:
    extremes = [panel.extremes for panel in panels if panel.extremes is not None]
    below = any(low < -1 - ROUNDING for low, _ in extremes)
    beyond = any(high > 1 + ROUNDING for _, high in extremes)
    return {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
        (below, beyond), "both"
    )
