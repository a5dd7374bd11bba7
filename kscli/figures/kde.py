"""The density of P's off-diagonal entries (Figures 4, 25-31)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kscli.figures import Source
from kscli.figures.density import Density, kernel_density
from kscli.figures.style import (
    COLUMN,
    GREY,
    PAGE,
    SMALL,
    TEXT,
    Legend,
    axes_with_legends,
    fitted,
    layer_colours,
    legend_below,
    line_style,
    names,
    number,
    open_axes,
    title,
)
from kscli.statistics import STATISTICS, Entries, off_diagonal

# The share of a line's entries that may lie outside the axes, at either end.
_OUTSIDE = 0.005
_AXES_HEIGHT = 2.1
_NOTE = SMALL - 0.5


@dataclass(frozen=True)
class _Curve:
    """One layer's entries; no density where they are all equal or there are none."""

    names: tuple[str, ...]
    entries: Entries
    kurtosis: float
    density: Density | None


@dataclass(frozen=True)
class _Group:
    """The curves that share axes."""

    title: str
    curves: tuple[_Curve, ...]
    legend: Legend
    styles: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Window:
    """What part of p and of its density the axes show."""

    low: float
    high: float
    top: float


def draw(sources: Sequence[Source]) -> Figure:
    """One line a model and layer; models of several layers each have axes, on one scale.

    The axes show the bulk; a note at either end says what share of the entries lies
    beyond, and how far they go. The legend has the excess kurtosis.
    """
    models = [[_curve(source, layer) for layer in source.layers] for source in sources]
    curves = [curve for model in models for curve in model]
    apart = len(models) > 1 and len(curves) > len(models)
    columns = 2 if apart else 1
    width = PAGE if apart or len(curves) > 12 else COLUMN
    shared = names([curve.names for curve in curves]).shared
    groups = [
        _group(group, shared, by_layer=apart or len(models) == 1, width=width / columns)
        for group in (models if apart else [curves])
    ]
    legends = [group.legend for group in groups]
    fig, places = axes_with_legends(width, _AXES_HEIGHT, columns, legends)
    window = _window(curves)
    for (ax, place), group in zip(places, groups, strict=True):
        handles = _draw_group(ax, group, window)
        legend_below(place, handles, group.legend, width / columns)
    title(fig, "Density of P off the diagonal", shared)
    return fig


def _curve(source: Source, layer: int) -> _Curve:
    P = source.matrices.matrix("P", layer)
    entries = off_diagonal(P)
    kurtosis = STATISTICS["kurtosis"](entries)
    return _Curve(
        (source.matrices.model, f"layer {layer}", f"m = {P.shape[0]}"),
        entries,
        kurtosis,
        None if math.isnan(kurtosis) else kernel_density(entries),
    )


def _group(curves: list[_Curve], shared: tuple[str, ...], by_layer: bool, width: float) -> _Group:
    named = names([curve.names for curve in curves])
    styles = (
        [{"color": colour} for colour in layer_colours(len(curves))]
        if by_layer
        else [line_style(at) for at in range(len(curves))]
    )
    labels = []
    for curve, own in zip(curves, named.own, strict=True):
        value = number(curve.kurtosis, 1)
        labels.append(f"{fitted(own, width - 1.35, SMALL)}: {value}" if own else value)
    return _Group(
        fitted([text for text in named.shared if text not in shared], width - 0.6, TEXT),
        tuple(curves),
        Legend(tuple(labels), head="excess kurtosis"),
        tuple(styles),
    )


def _window(curves: Sequence[_Curve]) -> _Window:
    """The bulk of every curve, and the highest peak."""
    bulks = [
        np.quantile(curve.entries, [_OUTSIDE, 1 - _OUTSIDE])
        for curve in curves
        if curve.entries.size
    ]
    if not bulks:
        return _Window(-1.0, 1.0, 1.0)
    low, high = min(bulk[0] for bulk in bulks), max(bulk[1] for bulk in bulks)
    densities = [curve.density for curve in curves if curve.density is not None]
    margin = max((3 * density.bandwidth for density in densities), default=0.1)
    top = max((float(density.y.max()) for density in densities), default=1.0)
    return _Window(float(low) - margin, float(high) + margin, 1.05 * top)


def _draw_group(ax: Axes, group: _Group, window: _Window) -> list[Line2D]:
    ax.axvline(0, color=GREY, linewidth=0.5, zorder=1)
    handles = [
        _draw_curve(ax, curve, window, style)
        for curve, style in zip(group.curves, group.styles, strict=True)
    ]
    ax.set(xlim=(window.low, window.high), ylim=(0, window.top))
    ax.set_xlabel("$p(k_i, k_j)$, $i \\neq j$")
    ax.set_ylabel("density")
    ax.set_title(group.title, pad=_NOTE + 6, parse_math=False)
    open_axes(ax)
    _note_outside(ax, [curve.entries for curve in group.curves if curve.entries.size], window)
    return handles


def _draw_curve(ax: Axes, curve: _Curve, window: _Window, style: dict[str, Any]) -> Line2D:
    if curve.density is not None:
        x, y = curve.density.x, curve.density.y
        shown = (x >= window.low) & (x <= window.high)
        return ax.plot(x[shown], y[shown], **style)[0]
    if curve.entries.size:
        return ax.axvline(float(curve.entries[0]), **style)
    return ax.plot([], [], **style)[0]


def _note_outside(ax: Axes, curves: Sequence[Entries], window: _Window) -> None:
    """Say, above either end of the axes, what share of the entries lies beyond, and how far."""
    at_most = "up to " if len(curves) > 1 else ""
    below = max((float(np.mean(curve < window.low)) for curve in curves), default=0.0)
    beyond = max((float(np.mean(curve > window.high)) for curve in curves), default=0.0)
    style: dict[str, Any] = {
        "xycoords": "axes fraction",
        "xytext": (0, 2),
        "textcoords": "offset points",
        "color": GREY,
        "fontsize": _NOTE,
    }
    if below:
        far = number(min(float(curve.min()) for curve in curves), 2)
        text = f"\N{LEFTWARDS ARROW} {at_most}{_percent(below)} beyond, to {far}"
        ax.annotate(text, (0, 1), ha="left", **style)
    if beyond:
        far = number(max(float(curve.max()) for curve in curves), 2)
        text = f"{at_most}{_percent(beyond)} beyond, to {far} \N{RIGHTWARDS ARROW}"
        ax.annotate(text, (1, 1), ha="right", **style)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"
