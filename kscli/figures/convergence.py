"""Density and kurtosis of P of more and more facts (Figures 7-17, Appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from kscli.analysis.convergence import Convergence, convergence_at
from kscli.analysis.density import Curve, make_curve
from kscli.analysis.resampling import Resampling
from kscli.analysis.statistics import off_diagonal
from kscli.errors import UsageError
from kscli.figures import FigureOptions, Source
from kscli.figures.curves import (
    Window,
    common_window,
    draw_curve,
    no_pairs,
    note,
    note_outside,
)
from kscli.figures.style import (
    GREY,
    PAGE,
    TEXT,
    axes_over_lists,
    fitted,
    fitting,
    layer_colours,
    list_below,
    make_room,
    names,
    open_axes,
    title,
    write_below,
)

_AXES_HEIGHT = 1.75
_MOST_ROWS = 6
_MOST_TICKS = 10


@dataclass(frozen=True)
class _Row:
    """One model and layer."""

    names: tuple[str, ...]
    convergence: Convergence
    curves: tuple[Curve, ...]


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """A row a model and layer: the densities, then the kurtosis of the first so many facts.

    A count has one colour in both; bars are 95 % intervals of resampled facts. Below the
    kurtosis a sentence says whether it has converged, if it is wanted. Raises UsageError for more
    rows than a page holds, and for counts that the facts do not allow.
    """
    wanted = sum(len(source.layers) for source in sources)
    if wanted > _MOST_ROWS:
        raise UsageError(
            f"convergence has a row a model and layer, and a page holds {_MOST_ROWS} of them, "
            f"not {wanted}; name fewer with --layers."
        )
    rows = [_row(source, layer, options) for source in sources for layer in source.layers]
    named = names([row.names for row in rows])
    width = options.look.width or PAGE
    columns = fitting(width, 2, 2.5)
    fig = axes_over_lists(width, _AXES_HEIGHT, columns, 2 * len(rows))
    heights = []
    for row, own, left, right in zip(rows, named.own, fig.axes[::2], fig.axes[1::2], strict=True):
        colours = layer_colours(len(row.curves))
        head = fitted(own, width / columns - 0.6, TEXT) if own else ""
        handles = _draw_densities(left, row, colours)
        _draw_kurtosis(right, row.convergence, colours)
        for ax in (left, right):
            ax.set_title(head, pad=11.5 if head else 6, parse_math=False)
            open_axes(ax)
        labels = [f"m = {n}" for n in row.convergence.counts]
        said = 0.0 if options.no_sentence else write_below(right, row.convergence.sentence)
        heights += [list_below(left, handles, labels), said]
    make_room(fig, heights, columns)
    title(fig, "P of the first m facts, off the diagonal", named.shared)
    return fig


def _row(source: Source, layer: int, options: FigureOptions) -> _Row:
    P = source.matrices.matrix("P", layer)
    convergence = convergence_at(
        source.matrices, layer, options.facts_counts, Resampling(seed=options.seed)
    )
    curves = tuple(make_curve(off_diagonal(P[:count, :count])) for count in convergence.counts)
    named = (source.model, f"layer {layer}", f"m = {convergence.counts[-1]}")
    return _Row(named, convergence, curves)


def _draw_densities(ax: Axes, row: _Row, colours: Sequence[Any]) -> list[Line2D]:
    window = common_window(row.curves, Window(-1.0, 1.0, 1.0))
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=1)
    handles = [
        draw_curve(ax, curve, window, {"color": colour})
        for curve, colour in zip(row.curves, colours, strict=True)
    ]
    if not any(curve.values.size for curve in row.curves):
        no_pairs(ax)
    ax.set(xlim=(window.low, window.high), ylim=(0, window.top))
    ax.set_xlabel("$p(k_i, k_j)$, $i \\neq j$")
    ax.set_ylabel("density")
    note_outside(ax, row.curves, window, digits=2)
    return handles


def _draw_kurtosis(ax: Axes, convergence: Convergence, colours: Sequence[Any]) -> None:
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=1)
    ax.plot(convergence.counts, convergence.kurtosis, color=GREY, linewidth=0.6, zorder=2)
    for count, value, of, colour in zip(
        convergence.counts, convergence.kurtosis, convergence.intervals, colours, strict=True
    ):
        ax.vlines(count, of.low, of.high, color=colour, linewidth=1.1, zorder=2.5)
        ax.plot([count], [value], "o", color=colour, markersize=3.6, markeredgewidth=0, zorder=3)
    if all(map(math.isnan, convergence.kurtosis)):
        no_pairs(
            ax, "no pairs of facts" if convergence.counts[-1] < 2 else "the kurtosis is undefined"
        )
    elif not all(math.isnan(of.low) for of in convergence.intervals):
        note(ax, "bar: 95 % interval, facts resampled", "right")
    room = max(0.5, 0.04 * convergence.counts[-1])
    ax.set_xlim(max(0, convergence.counts[0] - room), convergence.counts[-1] + room)
    step = math.ceil(len(convergence.counts) / _MOST_TICKS)
    ax.xaxis.set_major_locator(FixedLocator(list(convergence.counts[::-step])))
    ax.set_xlabel("number of facts m")
    ax.set_ylabel("excess kurtosis")
