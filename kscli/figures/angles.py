"""The angles between keys in the whitening and in the activation space (Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from kscli.analysis.angles import BOUNDS, angle_curve, mode
from kscli.analysis.density import Curve
from kscli.artifacts import MatrixName
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
    GREY,
    LINE_STYLES,
    MOST_NAMED,
    PAGE,
    SMALL,
    axes_over_lists,
    fitted,
    fitting,
    layer_bar,
    layer_colours,
    line_style,
    list_below,
    make_room,
    names,
    open_axes,
    range_below,
    title,
)
from kscli.numbers import number

_AXES_HEIGHT = 1.9
_MODE = "most frequent angle"
_SPACES: tuple[tuple[MatrixName, str], ...] = (
    ("whitened_cosine", "whitening space"),
    ("cosine", "activation space"),
)


@dataclass(frozen=True)
class _Line:
    """One layer's angles in every space of `_SPACES`."""

    names: tuple[str, ...]
    layer: int
    curves: tuple[Curve, ...]


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One line a model and layer, in each space; the legends have the angle of each mode.

    Many layers of a model have a colour bar instead of names.
    Both axes have one scale; a note at either end says what share of the angles lies beyond.
    Raises UsageError for more lines of several models than can be told apart.
    """
    wanted = sum(len(source.layers) for source in sources)
    if len(sources) > 1 and wanted > LINE_STYLES:
        raise UsageError(
            f"angles can tell {LINE_STYLES} lines of several models apart, not {wanted}; name "
            "fewer with --layers."
        )
    lines = [_line(source, layer) for source in sources for layer in source.layers]
    named = names([line.names for line in lines])
    width = options.look.width or PAGE
    columns = fitting(width, len(_SPACES), 2.5)
    fig = axes_over_lists(width, _AXES_HEIGHT, columns, len(_SPACES))
    window = _window([curve for line in lines for curve in line.curves])
    if len(sources) == 1:
        styles = [{"color": colour} for colour in layer_colours(len(lines))]
    else:
        styles = [line_style(at) for at in range(len(lines))]
    heights = []
    many = len(sources) == 1 and len(lines) > MOST_NAMED
    axes = tuple(fig.axes)
    for at, ax in enumerate(axes):
        curves = [line.curves[at] for line in lines]
        ax.axvline(90, color=GREY, linewidth=0.5, zorder=1)
        handles = [
            draw_curve(ax, curve, window, style)
            for curve, style in zip(curves, styles, strict=True)
        ]
        if not any(curve.values.size for curve in curves):
            no_pairs(ax)
        ax.set(xlim=(window.low, window.high), ylim=(0, window.top))
        ax.set_xlabel("angle between two keys (degrees)")
        ax.set_title(_SPACES[at][1], pad=11.5)
        open_axes(ax)
        note_outside(ax, curves, window, digits=0, unit="\N{DEGREE SIGN}")
        if many:
            of = [(line.layer, mode(curve)) for line, curve in zip(lines, curves, strict=True)]
            heights.append(range_below(ax, _MODE, of, "\N{DEGREE SIGN}"))
            if ax is axes[-1] or columns == 1:
                layer_bar(ax, [line.layer for line in lines])
        else:
            labels = [
                _label(curve, own, width / columns)
                for curve, own in zip(curves, named.own, strict=True)
            ]
            heights.append(list_below(ax, handles, labels, _MODE))
        if at % columns == 0:
            ax.set_ylabel("density (per degree)")
        else:
            ax.tick_params(labelleft=False)
    make_room(fig, heights, columns)
    title(fig, "Angles between the keys of two facts", named.shared)
    return fig


def _line(source: Source, layer: int) -> _Line:
    cosines = [source.matrices.matrix(name, layer) for name, _ in _SPACES]
    named = (source.model, f"layer {layer}", f"m = {len(cosines[0])}")
    return _Line(named, layer, tuple(angle_curve(cosine) for cosine in cosines))


def _label(curve: Curve, own: tuple[str, ...], width: float) -> str:
    at = mode(curve)
    value = number(at, 1) + ("" if np.isnan(at) else "\N{DEGREE SIGN}")
    return f"{fitted(own, width - 1.35, SMALL)}: {value}" if own else value


def _window(curves: Sequence[Curve]) -> Window:
    """The bulk, and 90 degrees in any case."""
    window = common_window(curves, Window(*BOUNDS, 1.0))
    return Window(
        max(BOUNDS[0], min(window.low, 85.0)), min(BOUNDS[1], max(window.high, 95.0)), window.top
    )
