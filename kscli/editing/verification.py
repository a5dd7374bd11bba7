"""The test of the theory on a run of edits, and what became of them.

The linear level (equations 11 and 15 against the edited matrix and the live model), and how
interference grows with the number of edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling
from kscli.analysis.weighted_ranks import spearman
from kscli.editing.edit_arrays import EditArrays, tested_facts
from kscli.editing.estimates import FEWEST_POINTS, FEWEST_UNITS, Estimate, over_units, plain
from kscli.editing.scored import Scored, measure_scores

WALKS = 100

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Growth:
    """How the shifts of values grow in a sequence of n edits.

    `original` and `edited` are exponents a of mean |Delta| ~ n^a: over the facts that no edit of
    the run is about (equation 11), and over those edited before (equation 15). 1 is the paper's
    "accumulates linearly", 1/2 a random walk. `by_age` is Spearman's correlation of a fact's edit
    number with its |Delta| at the end: equation 13 has earlier edits changed more, so it is < 0.

    Their intervals draw facts again, with the edits as they were. Along one path |Delta| after n
    edits holds the sum after n - 1, so residuals from a line are not independent, and a
    regression's own error would be far too small. Nor do such intervals say what other edits would
    give: for random walks of 100 steps they hold 1/2 in one run of five only, and where a few
    entries of P are large, mean |Delta| of a walk grows as n^0.6 at first. `original_walk` and
    `edited_walk` are therefore the exponents of this very run with the signs of delta drawn at
    random, the mean and where 95 % lie: what a random walk gives with these p and |delta|. They
    follow from equations 11 and 15, and are undefined for memit.
    """

    original: Estimate
    original_walk: Estimate
    edited: Estimate
    edited_walk: Estimate
    by_age: Estimate


@dataclass(frozen=True)
class Outcomes:
    """What became of the edits and of what the model knew; shares, None of nothing.

    `efficacy`: edits whose new target's first token was the first choice right after the edit;
    `efficacy_likelier`: whose new target was more probable than the true one. `retention...`: the
    same of all edits at the last pass, None for single edits. `kept`: known facts that no edit is
    about which still have their answer, of `known`, at each pass of `kept_by_pass`, and
    after the last (single: on average over the edits, of the facts that each is not about);
    `kept_protected`: the same of those that were protected, `known_protected` of them;
    `kept_paraphrased` and `kept_protected_paraphrased` the same of their paraphrases that the clean
    model completes. So with `perplexity_after`, `kl`, `text_change`, which is that of
    `kscli.editing.text_change`, and `weight_change`, the Frobenius norm of W_n - W_0.
    """

    edits: int
    efficacy: float | None
    efficacy_likelier: float | None
    retention: float | None
    retention_likelier: float | None
    known: int
    kept: float | None
    kept_by_pass: tuple[float | None, ...]
    known_protected: int
    kept_protected: float | None
    kept_paraphrased: float | None
    kept_protected_paraphrased: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    kl: float | None
    text_change: float | None
    weight_change: float | None


@dataclass(frozen=True)
class Verification:
    """The linear theory's worst errors over all edits, the growth of shifts, and the outcomes.

    `linear_error` is of (W_n - W_0) k in float64, `live_error` of the live model's MLP output, each
    max_j |predicted_j - measured_j| / max_j |predicted_j|; None for memit. `scores` are those that
    papers report (`kscli.scores`).
    """

    linear_error: float | None
    live_error: float | None
    growth: Growth
    outcomes: Outcomes
    scores: tuple[Scored, ...]

    def row(self) -> dict[str, Any]:
        """One flat record; undefined is None."""
        outcomes = {
            each.name: getattr(self.outcomes, each.name)
            for each in fields(Outcomes)
            if each.name != "kept_by_pass"
        }
        return {
            **outcomes,
            "linear_error": self.linear_error,
            "live_error": self.live_error,
            **self.growth.original.row("exponent_original"),
            **self.growth.original_walk.row("walk_original"),
            **self.growth.edited.row("exponent_edited"),
            **self.growth.edited_walk.row("walk_edited"),
            **self.growth.by_age.row("by_age"),
            **{name: value for each in self.scores for name, value in each.row().items()},
        }


def verify(run: EditArrays, resampling: Resampling | None = None) -> Verification:
    """The linear theory, growth and outcomes of a run."""
    resampling = resampling or Resampling()
    return Verification(
        _worst(run.linear_error),
        _worst(run.live_error),
        measure_growth(run, resampling),
        measure_outcomes(run),
        measure_scores(run, resampling),
    )


def measure_outcomes(run: EditArrays) -> Outcomes:
    """What became of the edits and of what the model knew."""
    about_none = tested_facts(run)
    by_pass, of_protected = (
        _kept(run.answer_changed, about_none & among) for among in (True, run.protected)
    )
    asked = about_none[:, run.paraphrase_fact] & run.paraphrase_known
    paraphrased, protected_paraphrased = (
        _kept(run.paraphrase_changed, asked & among)
        for among in (True, run.protected[run.paraphrase_fact])
    )
    made = slice(0, int(run.step[-1]))
    retained, likelier = run.rank_new[-1, made] == 1, run.logprob_new[-1, made]
    still = likelier > run.logprob_true[-1, run.edited[made]]
    after = slice(1, None) if run.single else slice(-1, None)
    return Outcomes(
        edits=len(run.edited),
        efficacy=_share(run.rank_new_after == 1),
        efficacy_likelier=_share(run.logprob_new_after > run.logprob_true_after),
        retention=None if run.single else _share(retained),
        retention_likelier=None if run.single else _share(still),
        known=int((run.known if run.single else tested_facts(run)[0]).sum()),
        kept=_mean_of_shares(by_pass[after]),
        kept_by_pass=by_pass,
        known_protected=int((run.known & run.protected).sum()),
        kept_protected=_mean_of_shares(of_protected[after]),
        kept_paraphrased=_mean_of_shares(paraphrased[after]),
        kept_protected_paraphrased=_mean_of_shares(protected_paraphrased[after]),
        perplexity_before=plain(float(run.perplexity[0])),
        perplexity_after=_mean(run.perplexity[after]),
        kl=_mean(run.kl[after]),
        text_change=_mean(run.text_change[after]),
        weight_change=_mean(run.weight_change if run.single else run.weight_change[-1:]),
    )


def measure_growth(run: EditArrays, resampling: Resampling) -> Growth:
    """How the shifts of values grow with the number of edits; nothing of single edits."""
    if run.single:
        return Growth(*[Estimate(None)] * 5)
    # Edits that are made at once share what is measured after them.
    ends = np.flatnonzero(np.append(np.diff(run.batch) != 0, True))
    starts = np.append(0, ends[:-1] + 1)
    lengths, number = run.measured[ends], np.arange(len(run.edited))
    original = ~run.about.any(axis=0)
    everywhere = np.ones((len(ends), int(original.sum())), dtype=bool)
    # A fact's shift is counted from its own edit on.
    before = number < starts[:, None]
    walk_original = walk_edited = Estimate(None)
    if len(ends) == len(number) and not np.isnan(run.linear_error).all():
        walk_original = _walk(run.delta, run.p[:, original], everywhere, resampling.seed)
        later = np.where(before, run.p[:, run.edited], 0.0)
        walk_edited = _walk(run.delta, later, before, resampling.seed)
    return Growth(
        _exponent(ends + 1, lengths[:, original], everywhere, resampling),
        walk_original,
        _exponent(ends + 1, lengths[:, run.edited], before, resampling),
        walk_edited,
        _by_age(np.repeat(ends + 1.0, ends - starts + 1), run.measured[-1, run.edited], resampling),
    )


def _walk(delta: Real, p: Real, among: Mask, seed: int) -> Estimate:
    """The exponent of mean |sum_i s_i p_ij delta_i| over random signs s, of facts `among`.

    `p` and `among` are (n, facts). |Delta_j|^2 grows by p_nj^2 |delta_n|^2 + 2 p_nj s_n delta_n .
    sum_{i<n} s_i p_ij delta_i, so that products of the deltas are all that it takes.
    """
    products = delta @ delta.T
    earlier, own = np.tril(products, -1), products.diagonal()[:, None]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (WALKS, len(delta), 1))
    weights = among.sum(axis=1, dtype=np.float64)[None]
    sums = np.empty((WALKS, len(delta)))
    for at, sign in enumerate(signs):
        steps = sign * p
        squares = np.cumsum(steps * (steps * own + 2 * earlier @ steps), axis=0)
        sums[at] = np.where(among, np.sqrt(np.maximum(squares, 0.0)), 0.0).sum(axis=1)
    slopes = _slopes(np.log(np.arange(1, len(delta) + 1)), sums, np.tile(weights, (WALKS, 1)))
    return Estimate.of(float(slopes.mean()), slopes)


def _by_age(numbers: Real, lengths: Real, resampling: Resampling) -> Estimate:
    if len(numbers) < FEWEST_POINTS:
        return Estimate(None)
    return over_units(
        lambda weights: spearman(numbers, lengths, weights), np.arange(len(numbers)), resampling
    )


def _exponent(edits: Whole, lengths: Real, among: Mask, resampling: Resampling) -> Estimate:
    """The exponent in `edits` (points,) of the mean of `lengths` (points, facts) that are `among`.

    By least squares in log-log, a point weighted by how many facts its mean is over.
    """
    m = lengths.shape[1]
    if not m:
        return Estimate(None)
    once = np.ones((1, m))
    draws = np.vstack([once, resampling.counts(m)]) if m >= FEWEST_UNITS else once
    weights = draws @ among.T.astype(np.float64)
    slopes = _slopes(np.log(edits), draws @ np.where(among, lengths, 0.0).T, weights)
    return Estimate.of(float(slopes[0]), slopes[1:] if len(draws) > 1 else None)


def _slopes(x: Real, sums: Real, weights: Real) -> Real:
    """The slope of log(sums / weights) (repeats, points) over `x` in every repeat."""
    used = (sums > 0) & (weights > 0)
    w = np.where(used, weights, 0.0)
    ones = np.ones_like(sums)
    y = np.log(np.divide(sums, weights, out=ones, where=used))
    total = np.maximum(w.sum(axis=1, keepdims=True), 1.0)
    from_mean = x - w @ x[:, None] / total
    variance = (w * from_mean**2).sum(axis=1)
    covariance = (w * from_mean * (y - (w * y).sum(axis=1, keepdims=True) / total)).sum(axis=1)
    undefined = np.full(len(w), np.nan)
    enough = used.sum(axis=1) >= FEWEST_POINTS
    return np.asarray(np.divide(covariance, variance, out=undefined, where=enough))


def _worst(errors: Real) -> float | None:
    defined = errors[~np.isnan(errors)]
    return float(defined.max()) if defined.size else None


def _kept(changed: Mask, tested: Mask) -> tuple[float | None, ...]:
    """Of what is tested at each pass, (s, n), the share of answers that are as they were."""
    return tuple(_share(~now[asked]) for now, asked in zip(changed, tested, strict=True))


def _share(held: Mask) -> float | None:
    return float(held.mean()) if held.size else None


def _mean_of_shares(shares: Sequence[float | None]) -> float | None:
    return _mean([share for share in shares if share is not None])


def _mean(values: Any) -> float | None:
    return plain(float(np.mean(values))) if len(values) else None
