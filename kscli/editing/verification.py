"""The test of the theory on a run of edits: how far what was predicted came to be.

On three levels: the linear one (equations 11 and 15 against the edited matrix and the live model),
how interference grows with the number of edits, and behaviour: whether p foretells what the model
no longer says better than other similarities of the same facts do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.reporter import SILENT, Reporter
from kscli.resampling import Resampling, interval
from kscli.statistics import DISTINCT, distinct_tokens

if TYPE_CHECKING:
    from kscli.editing.edits_file import EditsFile

FEWEST_FLIPS = 10
"""Below this many changed answers there is no ROC-AUC."""
FEWEST_UNITS = 5
"""Below this many things to draw again there is no interval."""
FEWEST_POINTS = 3
"""Below this many points there is no exponent and no rank correlation."""
PERMUTATIONS = 100
WALKS = 100
SIMILARITIES = ("p", "whitened_cosine", "cosine", "gradient_cosine")
NULL = "permuted_p"

# Repeats and pairs are worked on together, so many at once.
_AT_ONCE = 2_000_000

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class EditArrays:
    """A run of n edits of m facts, measured in s passes; what `EditsFile` says of a name holds.

    `single`: every edit was made in the clean model and taken back. `about` and `same_last_token`
    (n, m): which facts an edit is about, its own and those of the same text, and which have their
    keys at the token of its own. Edits of one number in `batch` (n,), ascending, were made at
    once. `delta` (n, D) is over all edited layers; `logprob_new` and `rank_new` (s, n) are without
    the edits that were kept out.
    """

    single: bool
    edited: Whole
    batch: Whole
    about: Mask
    same_last_token: Mask
    delta: Real
    p: Real
    whitened_cosine: Real
    cosine: Real
    gradient_cosine: Real
    measured: Real
    linear_error: Real
    live_error: Real
    weight_change: Real
    logprob_true_after: Real
    logprob_new_after: Real
    rank_new_after: Whole
    step: Whole
    known: Mask
    logprob_true: Real
    answer_changed: Mask
    logprob_new: Real
    rank_new: Whole
    perplexity: Real


def read_arrays(file: EditsFile) -> EditArrays:
    """The arrays of a run, from its file."""
    edited = file.values("edited")
    n = len(edited)
    planned = np.arange(file.values("rank_new").shape[1])
    # The targets of edits that were never made are asked for, too.
    made = np.delete(planned, file.values("kept_out/number"))[:n]
    texts = np.array([fact.text for fact in file.facts], dtype=object)
    given: dict[str, Any] = {
        "single": file.attributes["protocol"] == "single",
        "edited": edited,
        "batch": made // int(file.attributes["batch"]),
        "about": texts[edited][:, None] == texts,
        "same_last_token": ~distinct_tokens(file.token_id)[edited],
        "delta": file.values("delta").reshape(n, -1),
        **{name: file.values(name)[:, made] for name in ("logprob_new", "rank_new")},
    }
    names = [each.name for each in fields(EditArrays)]
    return EditArrays(**{name: file.values(name) for name in names if name not in given} | given)


@dataclass(frozen=True)
class Estimate:
    """A statistic and the ends of its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, repeats: Real | None) -> Estimate:
        """A statistic, and its percentile interval over the repeats."""
        if math.isnan(value) or repeats is None:
            return cls(_plain(value))
        ends = interval(repeats)
        return cls(value, _plain(ends.low), _plain(ends.high))

    def row(self, name: str) -> dict[str, float | None]:
        """As fields `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


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
    after the last (single: on average over the edits, of the facts that each is not about). So
    with `perplexity_after` and `weight_change`, the Frobenius norm of W_n - W_0.
    """

    edits: int
    efficacy: float | None
    efficacy_likelier: float | None
    retention: float | None
    retention_likelier: float | None
    known: int
    kept: float | None
    kept_by_pass: tuple[float | None, ...]
    perplexity_before: float | None
    perplexity_after: float | None
    weight_change: float | None


@dataclass(frozen=True)
class Verification:
    """The linear theory's worst errors over all edits, the growth of shifts, and the outcomes.

    `linear_error` is of (W_n - W_0) k in float64, `live_error` of the live model's MLP output, each
    max_j |predicted_j - measured_j| / max_j |predicted_j|; None for memit.
    """

    linear_error: float | None
    live_error: float | None
    growth: Growth
    outcomes: Outcomes

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
        }


def verify(run: EditArrays, resampling: Resampling | None = None) -> Verification:
    """The linear theory, growth and outcomes of a run."""
    return Verification(
        _worst(run.linear_error),
        _worst(run.live_error),
        measure_growth(run, resampling or Resampling()),
        measure_outcomes(run),
    )


def measure_outcomes(run: EditArrays) -> Outcomes:
    """What became of the edits and of what the model knew."""
    by_pass = tuple(
        _share(~changed[tested])
        for changed, tested in zip(run.answer_changed, _tested(run), strict=True)
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
        known=int((run.known if run.single else _tested(run)[0]).sum()),
        kept=_mean([share for share in by_pass[after] if share is not None]),
        kept_by_pass=by_pass,
        perplexity_before=_plain(float(run.perplexity[0])),
        perplexity_after=_mean(run.perplexity[after]),
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
    return _over_units(
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
    parts = [nothing, *(_of_pass(run, *each, shuffles) for each in _passes(run))]
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
            return _over_permutations(statistic, predicted.T)
        return _over_units(lambda w: statistic(predicted, w), pairs["unit"], resampling)

    return Agreement(
        len(fall),
        flips,
        estimate(lambda x, w: spearman(x, fall, w)) if defined else Estimate(None),
        estimate(lambda x, w: roc_auc(x, flipped, w)) if defined and several else Estimate(None),
    )


def _passes(run: EditArrays) -> Iterator[tuple[int, slice, Mask]]:
    """Every pass but the first: its number, the edits in force, and the facts it tests."""
    tested = _tested(run)
    for number in range(1, len(run.step)):
        made = int(run.step[number])
        yield number, slice(made - 1 if run.single else 0, made), tested[number]


def _tested(run: EditArrays) -> Mask:
    """The known facts that no edit is about, (s, m); of a single edit's pass, not this one."""
    about = np.tile(run.about.any(axis=0), (len(run.step), 1))
    if run.single:
        about[1:] = run.about[run.step[1:] - 1]
    return np.asarray(run.known & ~about)


def spearman(x: Real, y: Real, weights: Real) -> Real:
    """Spearman's correlation of x and y (pairs,), each there `weights` (repeats, pairs) times.

    Whole weights give that of a sample in which pairs are repeated; NaN where either is constant.
    """
    a, b = (_centred_ranks(values, weights) for values in (x, y))
    weighted = weights * a
    scale = np.sqrt((weighted * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide((weighted * b).sum(axis=1), scale, out=undefined, where=scale > 0))


def roc_auc(x: Real, positive: Mask, weights: Real) -> Real:
    """The share of positive and negative pairs that x orders rightly, a tie counting half.

    Mann and Whitney's U by the number of such pairs, with `weights` as in `spearman`; NaN where
    either kind is missing.
    """
    of_positive = np.where(positive, weights, 0.0)
    n_positive, n = of_positive.sum(axis=1), weights.sum(axis=1)
    rank_sum = (of_positive * _centred_ranks(x, weights)).sum(axis=1)
    both = n_positive * (n - n_positive)
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(rank_sum, both, out=undefined, where=both > 0) + 0.5)


def _centred_ranks(values: Real, weights: Real) -> Real:
    """The ranks, less their mean, of values that are there `weights` (repeats, pairs) times.

    Equal values share the mean of their ranks.
    """
    order = np.argsort(values, kind="stable")
    new = np.append(True, np.diff(values[order]) != 0)
    of_value = np.add.reduceat(weights[:, order], np.flatnonzero(new), axis=1)
    ranks = np.cumsum(of_value, axis=1) - (of_value - 1) / 2
    ranks -= (of_value.sum(axis=1, keepdims=True) + 1) / 2
    back = np.empty(len(values), dtype=np.intp)
    back[order] = np.cumsum(new) - 1
    return np.asarray(ranks[:, back])


def _over_units(
    statistic: Callable[[Real], Real], units: Whole, resampling: Resampling
) -> Estimate:
    """A statistic of weights (repeats, pairs), with an interval that draws whole units again."""
    value = float(statistic(np.ones((1, len(units))))[0])
    names, own = np.unique(units, return_inverse=True)
    if math.isnan(value) or len(names) < FEWEST_UNITS:
        return Estimate(_plain(value))
    counts = resampling.counts(len(names)).astype(np.float64)
    size = max(1, _AT_ONCE // len(units))
    blocks = [counts[at : at + size] for at in range(0, len(counts), size)]
    return Estimate.of(value, np.concatenate([statistic(block[:, own]) for block in blocks]))


def _over_permutations(statistic: Callable[[Real, Real], Real], predicted: Real) -> Estimate:
    """The mean of a statistic over permuted predictors (permutations, pairs), and its spread."""
    once = np.ones((1, predicted.shape[1]))
    values = np.array([statistic(row, once)[0] for row in predicted])
    return Estimate.of(float(values.mean()), values) if len(values) else Estimate(None)


def _worst(errors: Real) -> float | None:
    defined = errors[~np.isnan(errors)]
    return float(defined.max()) if defined.size else None


def _share(held: Mask) -> float | None:
    return float(held.mean()) if held.size else None


def _mean(values: Any) -> float | None:
    return _plain(float(np.mean(values))) if len(values) else None


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
