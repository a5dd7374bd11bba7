"""What is left of edits, and of what the model knew, as edits are made one upon the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from kscli.analysis.edit_runs import Course, course_of, is_sequence
from kscli.editing.edits_file import EditsFile
from kscli.errors import UsageError
from kscli.figures import FigureOptions
from kscli.figures.edit_runs import run_names
from kscli.figures.style import (
    COLUMN,
    MARKERS,
    SMALL,
    fitted,
    fitting,
    line_style,
    list_at_foot,
    new_figure,
    open_axes,
    title,
)
from kscli.scores import HARMONIC

_SHARE, _PERPLEXITY = 1.15, 0.8  # heights of the panels, inches
_SCORES = (*HARMONIC, "GE")
# What is measured on held-out text.
_OF_TEXT = (("perplexity", "perplexity"), ("kl", "KL to clean\nmodel"))
_MOST_COLUMNS = 4
# Passes that are shown as points, too.
_FEW = 15
# Perplexities of which one is so many times another are drawn on a logarithmic scale.
_WIDE = 10


def draw(runs: Sequence[EditsFile], options: FigureOptions) -> Figure:
    """Edits retained, known facts kept, scores, perplexity and KL divergence over the edits made.

    One line a run, with where it ends; single edits are no sequence and have none. Raises
    UsageError where no run is a sequence.
    """
    if not any(map(is_sequence, runs)):
        raise UsageError(
            f"{runs[0].path} has single edits, each in the clean model, and nothing to forget; "
            "name a run of --protocol sequential with --edits."
        )
    courses = [course_of(run) if is_sequence(run) else None for run in runs]
    named = run_names(runs, options.look.names)
    last = max(int(course.step[-1]) for course in courses if course)
    panels = [("retained", "edits\nretained"), ("kept", "known facts\nkept")]
    heights = [_SHARE, _SHARE]
    there = [course for course in courses if course]
    for name in _SCORES:
        if any(np.isfinite(course.scores[name]).any() for course in there):
            panels.append((name, name))
            heights.append(_PERPLEXITY)
    for name, label in _OF_TEXT:
        if any(np.isfinite(getattr(course, name)).any() for course in there):
            panels.append((name, label))
            heights.append(_PERPLEXITY)
    width = options.look.width or COLUMN
    columns = fitting(width, _MOST_COLUMNS, 1.7)
    rows = math.ceil(len(panels) / columns)
    if columns > 1:
        heights = [_SHARE] * rows
    fig = new_figure(width, sum(heights) + 0.75)
    axes = fig.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for at, (ax, (name, label)) in enumerate(zip(axes.flat, panels, strict=False)):
        handles = [
            ax.plot(course.step, _values(course, name), **_line(at, course))[0]
            if course
            else ax.plot([], [], **line_style(at))[0]
            for at, course in enumerate(courses)
        ]
        _finish(ax, label, share=name not in ("perplexity", "kl", "GE"))
        ax.set_xlim(-0.03 * last, 1.03 * last)
        lowest = at + columns >= len(panels)
        ax.tick_params(labelbottom=lowest)
        if lowest:
            ax.set_xlabel("edits made")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    labels = [_label(own, course, width) for own, course in zip(named.own, courses, strict=True)]
    head = "edits retained / known facts kept at the end"
    fig.set_figheight(fig.get_figheight() + list_at_foot(fig, handles, labels, head))
    title(fig, "What edits leave", named.shared)
    return fig


def _values(course: Course, name: str) -> NDArray[np.float64]:
    of_score = course.scores.get(name)
    return np.asarray(getattr(course, name) if of_score is None else of_score)


def _label(own: tuple[str, ...], course: Course | None, width: float) -> str:
    if course is None:
        end = "no sequence"
    else:
        end = " / ".join(
            "-" if math.isnan(of[-1]) else f"{100 * of[-1]:.0f} %"
            for of in (course.retained, course.kept)
        )
    return f"{fitted(own, width - 1.6, SMALL)}: {end}" if own else end


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
        # The divergence begins at 0, which no logarithmic scale has.
        if np.nanmax(drawn) > _WIDE * np.nanmin(drawn) > 0:
            ax.set_yscale("log")
