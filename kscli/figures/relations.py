"""Mean |p| from relation to relation: rows are edited, columns are moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from kscli.analysis.relations import find_relations, relation_matrix
from kscli.errors import UsageError
from kscli.figures import FigureOptions, Source
from kscli.figures.style import (
    COLUMN,
    PAGE,
    SMALL,
    TEXT,
    fitted,
    fitting,
    names,
    new_figure,
    size_colours,
    text_width,
    title,
)
from kscli.numbers import number

_MAX_COLUMNS = 3
_MOST_PANELS = 12
_PAIRS = "pairs with other text before the subject"
# Relations that one column of a page has room for.
_FEW = 16
# Inches: for the bar and its label; left of, below and above all panels; between panels.
_BAR, _LEFT, _BELOW, _HEADING, _GAP = 0.6, 0.18, 0.3, 0.5, 0.12
_LABEL, _SHORT_LABEL = 1.35, 0.75  # inches that the name of a relation may take
_DIGITS = 5.0  # points


@dataclass(frozen=True)
class _Panel:
    names: tuple[str, ...]
    relations: tuple[str, ...]
    means: NDArray[np.float64]


@dataclass(frozen=True)
class _Grid:
    """Panels of `side` inches in rows and columns; their labels take `label`, titles `head`.

    Labels are `shared` where all panels have the same: the outer ones alone have them.
    """

    rows: int
    columns: int
    width: float
    head: float
    label: float
    side: float
    text: float
    shared: bool

    @property
    def height(self) -> float:
        """Of the figure, in inches."""
        row = self.head + self.side + _GAP
        labels = self.label * (1 if self.shared else self.rows)
        return self.rows * row + labels - _GAP + _BELOW + _HEADING


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One panel a model and layer, all on one scale from 0; relations by name.

    The mean is over the pairs of `kscli.analysis.relations.relation_matrix`; where there is none
    the cell is grey. The cells within a relation are framed. The sources' matrices must have facts.
    Raises UsageError for more panels than a page holds, and FactsError as
    `kscli.analysis.relations.find_relations` does.
    """
    wanted = sum(len(source.layers) for source in sources)
    if wanted > _MOST_PANELS:
        raise UsageError(
            f"relations has a panel a model and layer, and a page holds {_MOST_PANELS} of them, "
            f"not {wanted}; name fewer with --layers."
        )
    panels = [_panel(source, layer) for source in sources for layer in source.layers]
    named = names([panel.names for panel in panels])
    grid = _grid(panels, options.look.width, headed=bool(named.own[0]))
    largest = max(float(np.nan_to_num(panel.means).max()) for panel in panels)
    scale = Normalize(0, largest or 1.0)
    fig = new_figure(grid.width, grid.height, layout="compressed")
    axes = fig.subplots(grid.rows, grid.columns, squeeze=False)
    for at, (ax, panel, own) in enumerate(zip(axes.flat, panels, named.own, strict=False)):
        _draw_panel(ax, panel, scale, grid)
        if grid.shared:
            lowest = at + grid.columns >= len(panels)
            ax.tick_params(labelleft=at % grid.columns == 0, labelbottom=lowest)
        if own:
            ax.set_title(
                fitted(own, grid.side + _GAP / 2, TEXT), fontsize=TEXT, pad=3, parse_math=False
            )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    length = grid.height - _HEADING - _BELOW - grid.label
    bar = fig.colorbar(axes[0, 0].images[0], ax=axes, aspect=length / 0.09, pad=0.1 / grid.width)
    bar.set_label("mean $|p(k_i, k_j)|$")
    title(fig, f"Mean |p| between relations\n{_PAIRS}", named.shared)
    fig.supxlabel("relation of fact $j$, which is moved")
    fig.supylabel("relation of fact $i$, which is edited")
    return fig


def _panel(source: Source, layer: int) -> _Panel:
    matrices = source.matrices
    relations = tuple(relation.title for relation in find_relations(matrices))
    names_ = (source.model, f"layer {layer}", f"m = {len(matrices.facts)}")
    return _Panel(names_, relations, relation_matrix(matrices, layer))


def _grid(panels: Sequence[_Panel], width: float, *, headed: bool) -> _Grid:
    """One column of the page where few relations fit, else both; up to three panels a row."""
    most = max(len(panel.relations) for panel in panels)
    width = width or (COLUMN if len(panels) == 1 and most <= _FEW else PAGE)
    columns = fitting(width, 2 if len(panels) == 4 else min(len(panels), _MAX_COLUMNS), 2.2)
    text = SMALL
    shared = len({panel.relations for panel in panels}) == 1
    longest = max(text_width(n, text) for panel in panels for n in panel.relations)
    room = _SHORT_LABEL if (width if shared else width / columns) < COLUMN else _LABEL
    label = min(room, longest) + 0.06
    beside = label / columns if shared else label
    side = (width - _BAR - _LEFT) / columns - beside - _GAP
    text = min(text, 0.9 * 72 * side / most)
    head = (TEXT * 1.2 + 3) / 72 if headed else 0.0
    rows = math.ceil(len(panels) / columns)
    return _Grid(rows, columns, width, head, label, side, text, shared)


def _draw_panel(ax: Axes, panel: _Panel, scale: Normalize, grid: _Grid) -> None:
    ax.imshow(panel.means, cmap=size_colours(), norm=scale, interpolation="none")
    n = len(panel.relations)
    labels = [fitted((name,), grid.label, grid.text) for name in panel.relations]
    ax.set_xticks(range(n), labels, fontsize=grid.text, rotation=90, parse_math=False)
    ax.set_yticks(range(n), labels, fontsize=grid.text, parse_math=False)
    ax.tick_params(length=0, pad=2)
    for at in range(n):
        ax.add_patch(
            Rectangle((at - 0.5, at - 0.5), 1, 1, fill=False, edgecolor="#333333", linewidth=0.6)
        )
    if grid.side / n > text_width("0.00", _DIGITS) * 1.15:
        _write_numbers(ax, panel.means, scale)


def _write_numbers(ax: Axes, means: NDArray[np.float64], scale: Normalize) -> None:
    for (row, column), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            ax.text(
                column,
                row,
                number(mean, 2),
                fontsize=_DIGITS,
                ha="center",
                va="center",
                color="white" if scale(mean) > 0.7 else "black",
            )
