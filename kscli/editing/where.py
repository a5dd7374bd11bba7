"""Where to edit: does p foretell, layer by layer and fact by fact, what an edit reaches and breaks?

p from a fact to its own paraphrases is to foretell PS, how far the edit generalises; the rms of p
from it to the other facts is to foretell the neighbours that stay (NS) and the answers that flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling
from kscli.analysis.weighted_ranks import spearman
from kscli.editing.edit_arrays import EditArrays, passes
from kscli.editing.estimates import FEWEST_POINTS, Estimate, over_units, plain

Real = NDArray[np.float64]
Whole = NDArray[np.int64]

OUTCOMES = {"PS": "paraphrase_p", "NS": "rms_p", "flipped": "rms_p"}
"""What became of an edit, and what was to foretell it."""


@dataclass(frozen=True)
class Points:
    """Edits, each at one layer: what was foretold, and what became of them; NaN where it is absent.

    `fact` (n,) is what is drawn again: the same fact at several layers is one.
    """

    fact: Whole
    values: dict[str, Real]

    def row(self, resampling: Resampling) -> dict[str, Any]:
        """Medians of what was foretold, means of what became of it, and their rank correlations."""
        foretold = dict.fromkeys(OUTCOMES.values())
        found: dict[str, Any] = {name: plain(_median(self.values[name])) for name in foretold}
        for outcome, predictor in OUTCOMES.items():
            found[outcome] = plain(_mean(self.values[outcome]))
            agreement = self._agreement(predictor, outcome, resampling)
            found |= agreement.row(f"spearman_{outcome}")
        return {"edits": len(self.fact)} | found

    def _agreement(self, predictor: str, outcome: str, resampling: Resampling) -> Estimate:
        x, y = self.values[predictor], self.values[outcome]
        there = np.isfinite(x) & np.isfinite(y)
        if there.sum() < FEWEST_POINTS:
            return Estimate(None)
        x, y = x[there], y[there]
        return over_units(lambda weights: spearman(x, y, weights), self.fact[there], resampling)


def points_of(run: EditArrays) -> Points:
    """The edits of a run of one layer; scores are those after the last edit, or after each alone.

    `flipped`, the share of known facts whose answer an edit changes, is of single edits only.
    """
    n = len(run.edited)
    others = ~run.about
    squares = np.where(others, run.p, 0.0) ** 2
    flipped = np.full(n, np.nan)
    if run.single:
        for number, edits, tested in passes(run):
            if tested.any():
                flipped[edits.start] = run.answer_changed[number][tested].mean()
    return Points(
        run.edited,
        {
            "paraphrase_p": run.paraphrase_p,
            "rms_p": np.sqrt(squares.sum(axis=1) / np.maximum(others.sum(axis=1), 1)),
            "PS": _after(run, "PS"),
            "NS": _after(run, "NS"),
            "flipped": flipped,
        },
    )


def together(parts: Sequence[Points]) -> Points:
    """The edits of several runs, at one layer each."""
    return Points(
        np.concatenate([part.fact for part in parts]),
        {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values},
    )


def _after(run: EditArrays, score: str) -> Real:
    values = run.scores[score]
    return values[1:].diagonal() if run.single else values[-1]


def _median(values: Real) -> float:
    defined = values[~np.isnan(values)]
    return float(np.median(defined)) if len(defined) else np.nan


def _mean(values: Real) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan
