"""Whether p foretells what the edited model no longer says, better than other similarities do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling
from kscli.analysis.statistics import DISTINCT
from kscli.analysis.weighted_ranks import roc_auc, spearman
from kscli.editing.edit_arrays import EditArrays, passes
from kscli.editing.estimates import FEWEST_POINTS, Estimate, over_permutations, over_units
from kscli.reporter import SILENT, Reporter

FEWEST_FLIPS = 10
"""Below this many changed answers there is no ROC-AUC."""
PERMUTATIONS = 100
SIMILARITIES = (
    "p",
    "editor_p",
    "whitened_cosine",
    "cosine",
    "gradient_cosine",
    "hidden_cosine",
)
NULL = "permuted_p"

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """How well a predictor orders `pairs` of an edit, or a pass, and a known fact.

    `spearman` is with the fall of the true target's log-probability, `auc` the ROC-AUC for the
    `flips`: the greedy answers that are no longer the true target.
    """

    pairs: int
    flips: int
    spearman: Estimate
    auc: Estimate

    def row(self, suffix: str = "") -> dict[str, Any]:
        """As fields whose names end in `suffix`."""
        return {
            f"pairs{suffix}": self.pairs,
            f"flips{suffix}": self.flips,
            **self.spearman.row(f"spearman{suffix}"),
            **self.auc.row(f"auc{suffix}"),
        }


@dataclass(frozen=True)
class Prediction:
    """A predictor's agreement with behaviour: over all pairs, and without same-token ones."""

    predictor: str
    every: Agreement
    distinct: Agreement

    def row(self) -> dict[str, Any]:
        """One flat record; undefined is None."""
        return {"predictor": self.predictor, **self.every.row(), **self.distinct.row(DISTINCT)}


def predict_behaviour(
    run: EditArrays,
    resampling: Resampling | None = None,
    permutations: int = PERMUTATIONS,
    reporter: Reporter = SILENT,
) -> tuple[Prediction, ...]:
    """How well similarities of facts foretell what edits do to what the model says.

    The predictor of a similarity S is |sum_i S[i, j] delta_i| over the edits in force: all made so
    far, or the single one. It is asked of the facts j that the clean model knew and that no edit of
    the run is about (single: this edit), at every pass but the first, and pooled. For memit of
    several layers delta is over all of them, and S of the first; that a weight lambda shrinks what
    is written is left out.

    What is drawn again for the intervals are edits where these are single, and else passes, since
    the facts of one share its edits. Passes share the edits made before them too, so a sequence's
    intervals are still too narrow.

    `permuted_p` is the null: p with the facts asked for exchanged, in the same way for all edits.
    Its value is the mean over `permutations`, its interval holds 95 % of them. Where more edits or
    longer ones break more, it too is above 0 (Spearman) and 0.5 (AUC): p has to do better than it.
    A same-token pair's fact shares the last token with an edit in force.
    """
    resampling = resampling or Resampling()
    pairs = _pooled(run, permutations, resampling.seed)
    distinct = {name: values[~pairs["same"]] for name, values in pairs.items()}
    found = []
    with reporter.task("predictors", len(SIMILARITIES) + 1) as task:
        for name in (*SIMILARITIES, NULL):
            found.append(
                Prediction(
                    name,
                    _agreement(name, pairs, resampling),
                    _agreement(name, distinct, resampling),
                )
            )
            task.advance()
    return tuple(found)


Pairs = dict[str, NDArray[Any]]
"""Facts that were asked for in passes, by column, first axis `pairs`: the number of the pass, the
fall of the true target's log-probability, whether the answer flipped, whether the pair is a
same-token one, and every predictor, of which the null is (pairs, permutations)."""


def _pooled(run: EditArrays, permutations: int, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)
    shuffles = rng.permuted(np.tile(np.arange(len(run.known)), (permutations, 1)), axis=1)
    nothing = _of_pass(run, 0, slice(0), np.zeros_like(run.known), shuffles)
    parts = [nothing, *(_of_pass(run, *each, shuffles) for each in passes(run))]
    return {name: np.concatenate([part[name] for part in parts]) for name in nothing}


def _of_pass(run: EditArrays, number: int, edits: slice, tested: Mask, shuffles: Whole) -> Pairs:
    predicted = {
        name: np.linalg.norm(getattr(run, name)[edits].T @ run.delta[edits], axis=1)
        for name in SIMILARITIES
    }
    same = np.asarray(run.same_last_token[edits].any(axis=0))
    null = [predicted["p"][_exchanged(order, tested)] for order in shuffles]
    return {
        "unit": np.full(int(tested.sum()), number),
        "fall": (run.logprob_true[0] - run.logprob_true[number])[tested],
        "flipped": run.answer_changed[number][tested],
        "same": same[tested],
        **{name: values[tested] for name, values in predicted.items()},
        NULL: np.reshape(null, (len(shuffles), int(tested.sum()))).T,
    }


def _exchanged(order: Whole, tested: Mask) -> Whole:
    """The tested facts, as a permutation of all facts exchanges them, its others left out."""
    facts = order[tested]
    while not tested[facts].all():
        facts = np.where(tested[facts], facts, order[facts])
    return facts


def _agreement(name: str, pairs: Pairs, resampling: Resampling) -> Agreement:
    """How well a predictor orders the pairs."""
    predicted, fall, flipped = pairs[name], pairs["fall"], pairs["flipped"]
    flips = int(flipped.sum())
    defined = len(fall) >= FEWEST_POINTS and bool(np.isfinite(predicted).all())
    several = FEWEST_FLIPS <= flips < len(fall)

    def estimate(statistic: Callable[[Real, Real], Real]) -> Estimate:
        if name == NULL:
            return over_permutations(statistic, predicted.T)
        return over_units(lambda w: statistic(predicted, w), pairs["unit"], resampling)

    return Agreement(
        len(fall),
        flips,
        estimate(lambda x, w: spearman(x, fall, w)) if defined else Estimate(None),
        estimate(lambda x, w: roc_auc(x, flipped, w)) if defined and several else Estimate(None),
    )
