"""The density of P's off-diagonal entries (Figures 4, 25-31)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kscli.analysis.density import Curve, make_curve, marked_densities
from kscli.analysis.matrices import different_last_token
from kscli.analysis.statistics import STATISTICS, Entries, off_diagonal
from kscli.errors import UsageError
from kscli.figures import FigureOptions, Source
from kscli.figures.curves import (
    Window,
    common_window,
    draw_curve,
    no_pairs,
    note_outside,
)
from kscli.figures.style import (
    COLOURS,
    COLUMN,
    GREY,
    MOST_NAMED,
    PAGE,
    SMALL,
    TEXT,
    axes_over_lists,
    fitted,
    fitting,
    grid_columns,
    layer_bar,
    layer_colours,
    line_style,
    list_below,
    make_room,
    names,
    new_figure,
    open_axes,
    range_below,
    title,
)
from kscli.layers import layers_text
from kscli.numbers import number

_AXES_HEIGHT = 2.1
_PANEL_HEIGHT = 1.05
_DEFAULT = Window(-1.0, 1.0, 1.0)
# Lines that some axes hold while each has a dashed one beside it.
_MOST_MARKED = 6
# Where single pairs are to be seen, a kernel of this share of the range.
_MARKED_BANDWIDTH = 1 / 80
_TITLE = "Density of P off the diagonal"


@dataclass(frozen=True)
class _Line:
    """One layer's entries; `distinct`, where marked, are of pairs with different last tokens."""

    names: tuple[str, ...]
    layer: int
    curve: Curve
    distinct: Entries | None

    @property
    def label(self) -> str:
        """Its excess kurtosis, and that of the pairs with different last tokens."""
        kurtosis = STATISTICS["kurtosis"]
        values = [self.curve.values, *([] if self.distinct is None else [self.distinct])]
        return " / ".join(number(kurtosis(entries), 1) for entries in values)


@dataclass(frozen=True)
class _Group:
    """The lines that share axes."""

    title: str
    lines: tuple[_Line, ...]
    labels: tuple[str, ...]
    head: str
    styles: tuple[dict[str, Any], ...]
    by_layer: bool


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One line a model and layer; models of several layers each have axes, on one scale.

    The axes show the bulk; a note at either end says what share of the entries lies beyond,
    and how far they go. The legend has the excess kurtosis; many layers of a model have a colour
    bar instead, and the range of their kurtosis. In a grid every line has a panel.
    Where pairs of the same token are marked, the axes show everything on a logarithmic scale,
    with a dashed line for the other pairs: its distance from the first is those pairs' share.
    Raises UsageError for more lines than can then be told apart.
    """
    models = [[_line(source, layer, options) for layer in source.layers] for source in sources]
    lines = [line for model in models for line in model]
    if options.grid:
        return _draw_grid(sources[0], lines, options)
    apart = len(models) > 1 and len(lines) > len(models)
    if options.mark_same_token and max(map(len, models if apart else [lines])) > _MOST_MARKED:
        raise UsageError(
            f"kde marks pairs of the same token in at most {_MOST_MARKED} lines; name fewer "
            "layers, or add --grid."
        )
    width = options.look.width or (PAGE if apart else COLUMN)
    columns = fitting(width, 2 if apart else 1, 2.5)
    shared = names([line.names for line in lines]).shared
    groups = [
        _group(group, shared, by_layer=apart or len(models) == 1, width=width / columns)
        for group in (models if apart else [lines])
    ]
    fig = axes_over_lists(width, _AXES_HEIGHT, columns, len(groups))
    scale = _scale(lines)
    heights = [
        _list(ax, _draw_group(ax, group, scale), group)
        for ax, group in zip(tuple(fig.axes), groups, strict=True)
    ]
    make_room(fig, heights, columns)
    title(fig, _TITLE, shared)
    return fig


def _line(source: Source, layer: int, options: FigureOptions) -> _Line:
    P = source.matrices.matrix("P", layer)
    distinct = None
    if options.mark_same_token:
        distinct = P[different_last_token(source.matrices.token_id)]
    named = (source.model, f"layer {layer}", f"m = {P.shape[0]}")
    return _Line(named, layer, make_curve(off_diagonal(P)), distinct)


def _group(lines: list[_Line], shared: tuple[str, ...], by_layer: bool, width: float) -> _Group:
    named = names([line.names for line in lines])
    styles = (
        [{"color": colour} for colour in layer_colours(len(lines))]
        if by_layer
        else [line_style(at) for at in range(len(lines))]
    )
    labels = []
    for line, own in zip(lines, named.own, strict=True):
        room = width - 0.8 - 0.55 * (1 + (line.distinct is not None))
        labels.append(f"{fitted(own, room, SMALL)}: {line.label}" if own else line.label)
    marked = lines[0].distinct is not None
    return _Group(
        fitted([text for text in named.shared if text not in shared], width - 0.6, TEXT),
        tuple(lines),
        tuple(labels),
        _MARKED_HEAD if marked else "excess kurtosis",
        tuple(styles),
        by_layer,
    )


_MARKED_HEAD = "excess kurtosis of all pairs / of those with different last tokens (dashed)"


@dataclass(frozen=True)
class _Scale:
    """The common axes of a figure's lines; `bandwidth` and `floor` where tokens are marked."""

    window: Window
    bandwidth: float = 0.0
    floor: float = 0.0


def _scale(lines: Sequence[_Line]) -> _Scale:
    curves = [line.curve for line in lines]
    if lines[0].distinct is None:
        return _Scale(common_window(curves, _DEFAULT))
    values = [curve.values for curve in curves if curve.density is not None]
    if not values:
        return _Scale(common_window(curves, _DEFAULT), 0.1, 0.01)
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    bandwidth = (high - low) * _MARKED_BANDWIDTH
    top = max(float(curve.density.y.max()) for curve in curves if curve.density is not None)
    # Half of what a single pair makes.
    floor = 0.5 / max(v.size for v in values) / (bandwidth * math.sqrt(2 * math.pi))
    return _Scale(Window(low - 3 * bandwidth, high + 3 * bandwidth, 2 * top), bandwidth, floor)


def _draw_group(ax: Axes, group: _Group, scale: _Scale) -> list[Line2D]:
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=1)
    handles = [
        _draw_line(ax, line, scale, style)
        for line, style in zip(group.lines, group.styles, strict=True)
    ]
    _finish(ax, [line.curve for line in group.lines], scale)
    ax.set_xlabel("$p(k_i, k_j)$, $i \\neq j$")
    ax.set_ylabel("density")
    ax.set_title(group.title, pad=11.5, parse_math=False)
    note_outside(ax, [line.curve for line in group.lines], scale.window, digits=2)
    return handles


def _list(ax: Axes, handles: Sequence[Line2D], group: _Group) -> float:
    """Tell the lines of a group apart: name each, or show the layers as colours."""
    if not group.by_layer or len(group.lines) <= MOST_NAMED:
        return list_below(ax, handles, group.labels, group.head)
    layer_bar(ax, [line.layer for line in group.lines])
    kurtosis = STATISTICS["kurtosis"]
    values = [(line.layer, kurtosis(line.curve.values)) for line in group.lines]
    return range_below(ax, group.head, values)


def _draw_line(ax: Axes, line: _Line, scale: _Scale, style: dict[str, Any]) -> Line2D:
    if line.distinct is None or line.curve.density is None:
        return draw_curve(ax, line.curve, scale.window, style)
    window = scale.window.low, scale.window.high
    x, every, others = marked_densities(line.curve, line.distinct, window, scale.bandwidth)
    drawn = ax.plot(x, every, **style)[0]
    ax.plot(x, others, **(style | {"linestyle": (0, (2.5, 1.2)), "linewidth": 0.8}))
    return drawn


def _finish(ax: Axes, curves: Sequence[Curve], scale: _Scale) -> None:
    ax.set(xlim=(scale.window.low, scale.window.high))
    if scale.floor:
        ax.set_yscale("log")
    ax.set(ylim=(scale.floor, scale.window.top))
    open_axes(ax)
    if not any(curve.values.size for curve in curves):
        no_pairs(ax)


def _draw_grid(source: Source, lines: Sequence[_Line], options: FigureOptions) -> Figure:
    """A panel a layer on one scale, its kurtosis and the range of its entries above it."""
    width = options.look.width or (COLUMN if len(source.matrices.layers) == 1 else PAGE)
    columns = grid_columns(len(source.matrices.layers), width)
    rows = math.ceil(len(lines) / columns)
    head = _MARKED_HEAD if options.mark_same_token else "excess kurtosis"
    scale = _scale(lines)
    said = f"above each panel: {head}, and the range of p"
    if source.layers != source.matrices.layers:
        top = number(scale.window.top, 0 if scale.window.top >= 10 else 1)
        said += f"; this page has one scale, to a density of {top}, and other pages their own"
    below = textwrap.wrap(said, int((width - 0.3) / (0.6 * TEXT / 72)))
    height = 0.55 + rows * (_PANEL_HEIGHT + 0.32) + 0.13 * len(below)
    fig = new_figure(width, height)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for at, (ax, line) in enumerate(zip(axes.flat, lines, strict=False)):
        ax.axvline(0, color=GREY, linewidth=0.5, zorder=1)
        _draw_line(ax, line, scale, {"color": COLOURS[0]})
        _finish(ax, [line.curve], scale)
        ax.set_title(f"{line.names[1]}: {line.label}\n{_range(line)}", fontsize=SMALL, pad=3)
        ax.tick_params(labelbottom=at + columns >= len(lines))
    for ax in axes.flat[len(lines) :]:
        ax.set_axis_off()
    model, _, m = lines[0].names
    title(fig, _TITLE, (model, layers_text(source.layers), m))
    fig.supxlabel("\n".join(["$p(k_i, k_j)$, $i \\neq j$", *below]))
    fig.supylabel("density")
    return fig


def _range(line: _Line) -> str:
    values = line.curve.values
    if not values.size:
        return "no pairs"
    return f"{number(float(values.min()), 2)} to {number(float(values.max()), 2)}"
