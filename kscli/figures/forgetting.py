"""What is left of edits, and of what the model knew, as edits are made one upon the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kscli.editing.edits_file import EditsFile
from kscli.errors import UsageError
from kscli.figures.edit_runs import is_about, is_sequence, run_names
from kscli.figures.style import (
    COLUMN,
    MARKERS,
    SMALL,
    Legend,
    fitted,
    legend_below,
    line_style,
    new_figure,
    open_axes,
    title,
)

_SHARE, _PERPLEXITY = 1.15, 0.8  # heights of the panels, inches
# Passes that are shown as points, too.
_FEW = 15
# Perplexities of which one is so many times another are drawn on a logarithmic scale.
_WIDE = 10

Real = NDArray[np.float64]


@dataclass(frozen=True)
class Course:
    """What a run's passes found after `step` (s,) edits, each (s,).

    `retained` is the share of the edits made so far whose new target the model still puts first
    (the rank of the target's first token is 1), NaN before the first edit. `kept` is the share of
    the facts that the clean model answered rightly, and that no edit of the run is about, which it
    still answers as it did; NaN where there is none. `perplexity` is NaN where it was not measured.
    """

    step: NDArray[np.int64]
    retained: Real
    kept: Real
    perplexity: Real


def course_of(run: EditsFile) -> Course:
    """The course of a sequence of edits."""
    step = run.values("step").astype(np.int64)
    first = run.values("rank_new")[:, _made(run)] == 1
    known = run.values("known") & ~is_about(run)
    return Course(
        step,
        np.array([_share(row[:n]) for row, n in zip(first, step.tolist(), strict=True)]),
        np.array([_share(~changed[known]) for changed in run.values("answer_changed")]),
        run.values("perplexity").astype(np.float64),
    )


def draw(runs: Sequence[EditsFile]) -> Figure:
    """Edits retained and known facts kept over the edits made, and perplexity where measured.

    One line a run, with where it ends; single edits are no sequence and have none. Raises
    UsageError where no run is a sequence.
    """
    if not any(map(is_sequence, runs)):
        raise UsageError(
            f"{runs[0].path} has single edits, each in the clean model, and nothing to forget; "
            "name a run of --protocol sequential with --edits."
        )
    courses = [course_of(run) if is_sequence(run) else None for run in runs]
    named = run_names(runs)
    last = max(int(course.step[-1]) for course in courses if course)
    perplexity = any(
        course is not None and np.isfinite(course.perplexity).any() for course in courses
    )
    panels = [("retained", "edits\nretained"), ("kept", "known facts\nkept")]
    heights = [_SHARE, _SHARE]
    if perplexity:
        panels.append(("perplexity", "perplexity"))
        heights.append(_PERPLEXITY)
    legend = Legend(
        tuple(map(_label, named.own, courses)), head="edits retained / known facts kept at the end"
    )
    below = legend.height(COLUMN)
    fig = new_figure(COLUMN, sum(heights) + below + 0.75)
    axes = fig.subplots(len(panels) + 1, 1, height_ratios=[*heights, below])
    for ax, (name, label) in zip(axes, panels, strict=False):
        handles = [
            ax.plot(course.step, getattr(course, name), **_line(at, course))[0]
            if course
            else ax.plot([], [], **line_style(at))[0]
            for at, course in enumerate(courses)
        ]
        _finish(ax, label, share=name != "perplexity")
        ax.set_xlim(-0.03 * last, 1.03 * last)
        ax.tick_params(labelbottom=name == panels[-1][0])
    axes[len(panels) - 1].set_xlabel("edits made")
    axes[-1].set_axis_off()
    legend_below(axes[-1], handles, legend, COLUMN)
    title(fig, "What edits leave", named.shared)
    return fig


def _made(run: EditsFile) -> NDArray[np.intp]:
    """Which of the planned edits were made, as columns of `rank_new`."""
    planned = np.arange(run.values("rank_new").shape[1])
    return np.delete(planned, run.values("kept_out/number"))


def _share(held: NDArray[np.bool_]) -> float:
    return float(held.mean()) if held.size else math.nan


def _label(own: tuple[str, ...], course: Course | None) -> str:
    if course is None:
        end = "no sequence"
    else:
        end = " / ".join(
            "-" if math.isnan(of[-1]) else f"{100 * of[-1]:.0f} %"
            for of in (course.retained, course.kept)
        )
    return f"{fitted(own, COLUMN - 1.6, SMALL)}: {end}" if own else end


def _line(at: int, course: Course) -> dict[str, Any]:
    few = {"marker": MARKERS[at % len(MARKERS)], "markersize": 2.5}
    return line_style(at) | (few if len(course.step) <= _FEW else {})


def _finish(ax: Axes, label: str, *, share: bool) -> None:
    open_axes(ax)
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if share:
        ax.set_ylim(-0.04, 1.04)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    else:
        drawn = np.concatenate([np.asarray(line.get_ydata()) for line in ax.lines])
        if np.nanmax(drawn) > _WIDE * np.nanmin(drawn):
            ax.set_yscale("log")
