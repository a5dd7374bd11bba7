"""What runs of edits did, as their figures show it: the values moved, and what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.editing.edits_file import EditsFile
from kscli.scores import SCORES

Real = NDArray[np.float64]

# A shift of less than this share of the largest is a prediction of 0, to rounding.
_NOUGHT = 1e-10


def is_sequence(run: EditsFile) -> bool:
    """Whether the edits were made one upon the other, and not each in the clean model."""
    return run.about.protocol == "sequential"


def is_edited(run: EditsFile) -> NDArray[np.bool_]:
    """Which facts were edited, (m,)."""
    edited = np.zeros(len(run.facts), dtype=bool)
    edited[run.values("edited")] = True
    return edited


def is_about(run: EditsFile) -> NDArray[np.bool_]:
    """Which facts an edit is about, (m,): those edited and their copies, facts of the same text."""
    edited = {run.facts[int(fact)].text for fact in run.values("edited")}
    return np.array([fact.text in edited for fact in run.facts], dtype=bool)


@dataclass(frozen=True)
class Points:
    """|Delta| of facts, predicted and of the live model, each (points,); which were edited.

    `nought` facts are predicted not to move, and `nought_live` is the furthest that the live
    model moved one of them: its rounding. They have no point.
    """

    predicted: Real
    live: Real
    edited: NDArray[np.bool_]
    nought: int
    nought_live: float

    @property
    def correlation(self) -> float:
        """Pearson's r of predicted and live; NaN where either does not vary."""
        if len(self.predicted) < 2 or not np.ptp(self.predicted) or not np.ptp(self.live):
            return math.nan
        return float(np.corrcoef(self.predicted, self.live)[0, 1])


def points_of(run: EditsFile) -> Points:
    """What a log-log figure of a run shows: the facts moved, after the last edit of a sequence.

    The live shift is of the model's own MLP output, so that the prediction is put to a test; the
    shift that W's change gives (`measured`) equals it by algebra. Of single edits, the facts that
    each of them moves. What is not predicted has no point.
    """
    rows = slice(-1, None) if is_sequence(run) else slice(None)
    predicted, live = run.values("predicted")[rows], run.values("measured_live")[rows]
    edited = np.broadcast_to(is_edited(run) & is_sequence(run), predicted.shape)
    known = np.isfinite(predicted) & np.isfinite(live)
    largest = float(predicted[known].max(initial=0.0))
    shown = known & (predicted > _NOUGHT * largest) & (live > 0)
    nought = known & (predicted <= _NOUGHT * largest) & ~_own_facts(run)[rows]
    return Points(
        predicted[shown],
        live[shown],
        edited[shown],
        int(nought.sum()),
        float(live[nought].max(initial=0.0)),
    )


def _own_facts(run: EditsFile) -> NDArray[np.bool_]:
    """Which fact each edit is of, (n, m): its shift is counted from that edit on, and is 0."""
    own = np.zeros((len(run.values("edited")), len(run.facts)), dtype=bool)
    own[np.arange(len(own)), run.values("edited")] = True
    return own


@dataclass(frozen=True)
class Course:
    """What a run's passes found after `step` (s,) edits, each (s,).

    `retained` is the share of the edits made so far whose new target the model still puts first
    (the rank of the target's first token is 1). `kept` is the share of the facts that the clean
    model answered rightly, and that no edit of the run is about, which it still answers as it did;
    NaN where there is none. `perplexity` and `kl`, the KL divergence from the clean model on
    held-out text, are NaN where they were not measured. `scores` are means over the edits made so
    far, by name. Before the first edit, `retained` and `scores` are of all that will be made.
    """

    step: NDArray[np.int64]
    retained: Real
    kept: Real
    perplexity: Real
    kl: Real
    scores: Mapping[str, Real]


def course_of(run: EditsFile) -> Course:
    """The course of a sequence of edits."""
    step = run.values("step").astype(np.int64)
    first = run.values("rank_new")[:, _made(run)] == 1
    known = run.values("known") & ~is_about(run)
    return Course(
        step,
        _course(first.astype(np.float64), step),
        np.array([_share(~changed[known]) for changed in run.values("answer_changed")]),
        run.values("perplexity").astype(np.float64),
        run.values("kl").astype(np.float64),
        {name: _course(run.values(f"scores/{name}")[:, _made(run)], step) for name in SCORES},
    )


def _course(scores: Real, step: NDArray[np.int64]) -> Real:
    """The mean of a score (s, n) over the edits made by then, before the first one over all."""
    made = [scores.shape[1], *step[1:].tolist()]
    rows = [row[:n] for row, n in zip(scores, made, strict=True)]
    return np.array([_mean(row[~np.isnan(row)]) for row in rows])


def _mean(values: Real) -> float:
    return float(values.mean()) if len(values) else math.nan


def _made(run: EditsFile) -> NDArray[np.intp]:
    """Which of the planned edits were made, as columns of `rank_new`."""
    planned = np.arange(run.values("rank_new").shape[1])
    return np.delete(planned, run.values("kept_out/number"))


def _share(held: NDArray[np.bool_]) -> float:
    return float(held.mean()) if held.size else math.nan
