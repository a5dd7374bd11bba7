"""Excess kurtosis of P over the layers of one or several models (Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kscli.figures import Source
from kscli.figures.style import (
    COLUMN,
    GREY,
    MARKERS,
    PAGE,
    SMALL,
    Legend,
    axes_with_legends,
    fitted,
    legend_below,
    line_style,
    names,
    open_axes,
    title,
)
from kscli.layers import format_layers
from kscli.statistics import STATISTICS, off_diagonal

_AXES_HEIGHT = 2.2


def draw(sources: Sequence[Source]) -> Figure:
    """One line a model, over its layers; a layer whose kurtosis is undefined is a gap.

    The legend names such layers; without them one model needs no legend.
    """
    named = names([_names(source) for source in sources])
    values = [_kurtosis(source) for source in sources]
    first = min(source.layers[0] for source in sources)
    last = max(source.layers[-1] for source in sources)
    width = COLUMN if last - first <= 32 else PAGE
    labels = tuple(
        _label(source, kurtosis, own, width)
        for source, kurtosis, own in zip(sources, values, named.own, strict=True)
    )
    legend = Legend(labels if any(labels) else ())
    fig, [(ax, place)] = axes_with_legends(width, _AXES_HEIGHT, 1, [legend])
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=1)
    handles = [
        ax.plot(
            source.layers,
            kurtosis,
            marker=MARKERS[at % len(MARKERS)],
            markersize=3.2 if last - first <= 32 else 2.6,
            markeredgewidth=0,
            **line_style(at),
        )[0]
        for at, (source, kurtosis) in enumerate(zip(sources, values, strict=True))
    ]
    room = max(0.5, 0.02 * (last - first))
    ax.set_xlim(first - room, last + room)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    ax.set_xlabel("layer")
    ax.set_ylabel("excess kurtosis (Gaussian: 0)")
    open_axes(ax)
    if legend.labels:
        legend_below(place, handles, legend, width)
    title(fig, "Excess kurtosis of P off the diagonal", named.shared)
    return fig


def _names(source: Source) -> tuple[str, ...]:
    m = source.matrices.matrix("P", source.layers[0]).shape[0]
    return source.matrices.model, f"m = {m}"


def _kurtosis(source: Source) -> list[float]:
    kurtosis = STATISTICS["kurtosis"]
    return [kurtosis(off_diagonal(source.matrices.matrix("P", at))) for at in source.layers]


def _label(source: Source, kurtosis: Sequence[float], own: Sequence[str], width: float) -> str:
    undefined = [
        layer for layer, value in zip(source.layers, kurtosis, strict=True) if math.isnan(value)
    ]
    gaps = f"undefined at layer {format_layers(undefined)}" if undefined else ""
    name = fitted(own, width - 0.95 - (1.2 if gaps else 0), SMALL)
    return ": ".join(text for text in (name, gaps) if text)
