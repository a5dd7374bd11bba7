"""Densities as lines in axes that show their bulk and say what lies beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kscli.analysis.density import Curve
from kscli.figures.style import GREY, NOTE
from kscli.numbers import number, percent

# The share of a line's values that may lie outside the axes, at either end.
_OUTSIDE = 0.005


@dataclass(frozen=True)
class Window:
    """What part of the values and of their density the axes show."""

    low: float
    high: float
    top: float


def common_window(curves: Sequence[Curve], default: Window) -> Window:
    """The bulk of every curve, and the highest peak; `default` where no curve has values."""
    bulks = [
        np.quantile(curve.values, [_OUTSIDE, 1 - _OUTSIDE]) for curve in curves if curve.values.size
    ]
    if not bulks:
        return default
    low, high = min(bulk[0] for bulk in bulks), max(bulk[1] for bulk in bulks)
    densities = [curve.density for curve in curves if curve.density is not None]
    space = (default.high - default.low) / 20
    margin = max((3 * density.bandwidth for density in densities), default=space)
    top = max((float(density.y.max()) for density in densities), default=1.0)
    return Window(float(low) - margin, float(high) + margin, 1.05 * top)


def draw_curve(ax: Axes, curve: Curve, window: Window, style: dict[str, Any]) -> Line2D:
    """The density as a line; a vertical one where all values are equal."""
    if curve.density is not None:
        x, y = curve.density.x, curve.density.y
        shown = (x >= window.low) & (x <= window.high)
        return ax.plot(x[shown], y[shown], **style)[0]
    if curve.values.size:
        # Above the axes' edge and beyond it, or half of a line at 0 degrees would be hidden.
        return ax.axvline(float(curve.values[0]), zorder=3, clip_on=False, **style)
    return ax.plot([], [], **style)[0]


def note_outside(
    ax: Axes, curves: Sequence[Curve], window: Window, digits: int, unit: str = ""
) -> None:
    """Say, above either end of the axes, what share of the values lies beyond, and how far."""
    drawn = [curve.values for curve in curves if curve.values.size]
    at_most = "up to " if len(drawn) > 1 else ""
    below = max((float(np.mean(values < window.low)) for values in drawn), default=0.0)
    beyond = max((float(np.mean(values > window.high)) for values in drawn), default=0.0)
    if below:
        far = number(min(float(values.min()) for values in drawn), digits) + unit
        note(ax, f"\N{LEFTWARDS ARROW} {at_most}{percent(below)} beyond, to {far}", "left")
    if beyond:
        far = number(max(float(values.max()) for values in drawn), digits) + unit
        note(ax, f"{at_most}{percent(beyond)} beyond, to {far} \N{RIGHTWARDS ARROW}", "right")


def note(ax: Axes, text: str, side: str) -> None:
    """A grey remark above the left or right end of the axes."""
    ax.annotate(
        text,
        (0 if side == "left" else 1, 1),
        xycoords="axes fraction",
        xytext=(0, 2),
        textcoords="offset points",
        ha=side,
        color=GREY,
        fontsize=NOTE,
    )


def no_pairs(ax: Axes, text: str = "no pairs of facts") -> None:
    """Say in empty axes why they are."""
    ax.text(
        0.5,
        0.5,
        text,
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none"},
    )
