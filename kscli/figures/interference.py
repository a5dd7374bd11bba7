"""How far edits were predicted to move every fact's value, and how far the live model moved it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kscli.analysis.edit_runs import Points, is_sequence, points_of
from kscli.editing.edits_file import EditsFile
from kscli.errors import UsageError
from kscli.figures import FigureOptions
from kscli.figures.edit_runs import run_names
from kscli.figures.style import (
    COLOURS,
    COLUMN,
    GREY,
    PAGE,
    SMALL,
    TEXT,
    fitted,
    fitting,
    new_figure,
    open_axes,
    title,
)

_MAX_COLUMNS = 3
# Beyond this many points, an image of them is smaller than they are.
_RASTERIZED = 2000


def draw(runs: Sequence[EditsFile], options: FigureOptions) -> Figure:
    """One panel a run, all on one pair of logarithmic scales with the line of slope 1.

    Raises UsageError where no run predicts anything: memit's do not, nor does one edit of the only
    fact.
    """
    points = [points_of(run) for run in runs]
    lengths = np.concatenate([part for each in points for part in (each.predicted, each.live)])
    if not lengths.size:
        raise UsageError(
            f"{runs[0].path} has no predicted interference to draw: equations 11 and 15 are about "
            "what closed-form's edits do to other facts. Name another run with --edits."
        )
    width = options.look.width or (COLUMN if len(runs) == 1 else PAGE)
    columns = fitting(width, 2 if len(runs) == 4 else min(len(runs), _MAX_COLUMNS), 1.7)
    rows = math.ceil(len(runs) / columns)
    side = (width - 0.5) / columns - 0.1
    fig = new_figure(width, rows * (side + 0.2) + 0.65)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    named = run_names(runs, options.look.names)
    limits = (float(lengths.min()) / 1.6, float(lengths.max()) * 1.6)
    for at, (ax, run, own) in enumerate(zip(axes.flat, runs, named.own, strict=False)):
        _draw_panel(ax, run, points[at], COLOURS[at % len(COLOURS)], limits)
        if own:
            ax.set_title(fitted(own, side, TEXT), pad=3, parse_math=False)
        ax.tick_params(labelbottom=at + columns >= len(runs))
    for ax in axes.flat[len(runs) :]:
        ax.set_axis_off()
    title(fig, "How far edits move the values of facts", named.shared)
    fig.supxlabel("predicted $|\\Delta_j|$")
    fig.supylabel("$|\\Delta_j|$ in the live model")
    return fig


def _draw_panel(
    ax: Axes, run: EditsFile, points: Points, colour: str, limits: tuple[float, float]
) -> None:
    ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    ax.set_box_aspect(1)
    open_axes(ax)
    ax.plot(limits, limits, color=GREY, linewidth=0.6, zorder=1, label="slope 1")
    if not points.predicted.size:
        _write(ax, ["not predicted"])
        return
    for edited, label, style in _groups(run, colour):
        chosen = points.edited == edited
        if chosen.any():
            ax.plot(
                points.predicted[chosen],
                points.live[chosen],
                linestyle="none",
                label=f"{int(chosen.sum()):,} {label}",
                rasterized=points.predicted.size > _RASTERIZED,
                **style,
            )
    ax.legend(loc="lower right", handletextpad=0.3, borderaxespad=0.2)
    _write(ax, _findings(run, points))


def _write(ax: Axes, lines: Sequence[str]) -> None:
    """Lines of text above the line of slope 1."""
    ax.text(
        *(0.03, 0.97, "\n".join(lines)),
        transform=ax.transAxes,
        fontsize=SMALL,
        va="top",
        linespacing=1.3,
    )


def _groups(run: EditsFile, colour: str) -> list[tuple[bool, str, dict[str, Any]]]:
    """Edited facts and the others; on one line, the larger marks go beneath the smaller."""
    original = "original facts" if is_sequence(run) else "facts, each by one edit"
    hollow = {"marker": "^", "markersize": 4.0, "mfc": "none", "mec": "#333333", "mew": 0.4}
    dots = {"marker": "o", "markersize": 2.0, "color": colour, "mew": 0}
    return [(True, "edited facts", hollow), (False, original, dots)]


def _findings(run: EditsFile, points: Points) -> list[str]:
    """The correlation, the worst error by the largest prediction, and how many do not move.

    Facts that are predicted not to move have no place on the scale, so their number is written.
    """
    found = []
    if not math.isnan(points.correlation):
        found.append(f"r = {points.correlation:.3f}")
    errors = run.values("live_error")
    errors = errors[~np.isnan(errors)]
    if errors.size:
        found.append(f"worst error: {_power(errors.max())}")
    if points.nought:
        found += [
            f"{points.nought:,} predicted not to move,",
            f"moved {_power(points.nought_live)} at most",
        ]
    return found


def _power(value: float) -> str:
    """A small number to its order of magnitude."""
    return f"{value:.0e}".replace("-", "\N{MINUS SIGN}")
