"""Runs of edits with known answers: exponents, rank correlations and AUC by their definitions."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from cli_kit import kscli, one_sentence
from edit_kit import Run
from numpy.typing import NDArray

from kscli.analysis.resampling import Resampling
from kscli.analysis.weighted_ranks import roc_auc, spearman
from kscli.cli.verify import short_names
from kscli.editing.edit_arrays import EditArrays, read_arrays
from kscli.editing.estimates import FEWEST_POINTS, Estimate
from kscli.editing.predictors import (
    FEWEST_FLIPS,
    NULL,
    SIMILARITIES,
    Prediction,
    predict_behaviour,
)
from kscli.editing.verification import measure_growth, measure_outcomes, verify
from kscli.editing.where import points_of, together
from kscli.facts import Fact
from kscli.scores import SCORES

FEW = Resampling(100, 0)
UNDEFINED = Estimate(None)
Real = NDArray[np.float64]


def run_of(
    n: int, m: int, *, aligned: bool = False, single: bool = False, seed: int = 0
) -> EditArrays:
    """Edits 0 .. n - 1 of m facts that follow equations 11 and 15, and behaviour that follows them.

    Deltas are all one, or independent; every edit is followed by a pass.
    """
    rng = np.random.default_rng(seed)
    p = np.abs(rng.standard_normal((n, m)))
    delta = np.ones((n, 40)) if aligned else rng.standard_normal((n, 40))
    measured = np.zeros((n, m))
    for made in range(1, n + 1):
        for j in range(m):
            edits = [made - 1] if single else [i for i in range(made) if made <= j or i > j]
            shift = sum((p[i, j] * delta[i] for i in edits if i != j), np.zeros(40))
            measured[made - 1, j] = np.linalg.norm(shift)
    return EditArrays(
        single=single,
        edited=np.arange(n),
        about=np.eye(n, m, dtype=bool),
        same_last_token=np.eye(n, m, dtype=bool),
        delta=delta,
        p=p,
        whitened_cosine=p * 0.5,
        cosine=rng.standard_normal((n, m)),
        gradient_cosine=np.full((n, m), np.nan),
        hidden_cosine=np.full((n, m), np.nan),
        editor_p=p,
        paraphrase_p=np.full(n, np.nan),
        measured=measured,
        linear_error=np.full(n, 1e-12),
        live_error=np.array([*[np.nan] * (n - 1), 1e-6]),
        batch=np.arange(n),
        weight_change=np.arange(1.0, n + 1),
        logprob_true_after=np.full(n, -1.0),
        logprob_new_after=np.zeros(n),
        rank_new_after=np.ones(n, dtype=np.int64),
        step=np.arange(n + 1),
        known=np.ones(m, dtype=bool),
        protected=np.zeros(m, dtype=bool),
        logprob_true=np.vstack([np.zeros(m), -measured]),
        answer_changed=np.vstack([np.zeros(m), measured > np.median(measured)]).astype(bool),
        logprob_new=np.zeros((n + 1, n)),
        rank_new=np.ones((n + 1, n), dtype=np.int64),
        perplexity=np.full(n + 1, np.nan),
        kl=np.full(n + 1, np.nan),
        text_change=np.linspace(0, 0.1, n + 1),
        paraphrase_fact=np.arange(m),
        paraphrase_known=np.arange(m) % 2 == 0,
        paraphrase_changed=np.zeros((n + 1, m), dtype=bool),
        scores={name: np.full((n + 1, n), np.nan) for name in SCORES},
    )


def value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def by_name(run: EditArrays, resampling: Resampling = FEW) -> dict[str, Prediction]:
    return {each.predictor: each for each in predict_behaviour(run, resampling)}


def test_rank_statistics_are_scipys_of_the_repeated_sample() -> None:
    rng = np.random.default_rng(0)
    for size in (3, 12, 200):
        x = rng.integers(0, 8, size).astype(float)
        y, positive = rng.standard_normal(size), np.arange(size) % 3 == 0
        weights = np.vstack([np.ones(size), rng.integers(1, 4, (3, size))])
        ranks, areas = spearman(x, y, weights), roc_auc(x, positive, weights)
        for row, rank, area in zip(weights.astype(int), ranks, areas, strict=True):
            again = np.repeat(np.arange(size), row)
            expected = scipy.stats.spearmanr(x[again], y[again]).statistic
            assert rank == pytest.approx(expected, abs=1e-12)
            first, second = x[again][positive[again]], x[again][~positive[again]]
            u = scipy.stats.mannwhitneyu(first, second).statistic
            assert area == pytest.approx(u / (len(first) * len(second)), abs=1e-12)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    x, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.3
    pairs = [
        (x[i] > x[j]) + 0.5 * (x[i] == x[j])
        for i in np.flatnonzero(positive)
        for j in np.flatnonzero(~positive)
    ]
    assert roc_auc(x, positive, np.ones((1, 60)))[0] == pytest.approx(np.mean(pairs))


def test_statistics_of_what_does_not_vary_are_undefined() -> None:
    once, ramp, constant = np.ones((1, 5)), np.arange(5.0), np.full(5, 0.1)
    assert np.isnan(spearman(constant, ramp, once))
    assert np.isnan(spearman(ramp, constant, once))
    assert np.isnan(spearman(ramp, ramp, np.eye(1, 5)))
    for positive in (np.zeros(5, dtype=bool), np.ones(5, dtype=bool)):
        assert np.isnan(roc_auc(ramp, positive, once))
    assert roc_auc(constant, ramp > 2, once) == 0.5


def test_aligned_edits_accumulate_linearly_and_independent_ones_as_a_random_walk() -> None:
    for aligned, exponent in ((True, 1.0), (False, 0.5)):
        growth = measure_growth(run_of(60, 300, aligned=aligned), FEW)
        for estimate, walk in (
            (growth.original, growth.original_walk),
            (growth.edited, growth.edited_walk),
        ):
            low, high = ends(estimate)
            assert value(estimate) == pytest.approx(exponent, abs=0.06)
            assert low <= exponent <= high
            assert value(walk) == pytest.approx(0.5, abs=0.06)
            if not aligned:
                low, high = ends(walk)
                assert low <= value(estimate) <= high
        assert value(growth.by_age) < -0.9
        assert ends(growth.by_age)[1] < 0


def test_growth_by_a_loop() -> None:
    run = run_of(10, 16)
    growth = measure_growth(run, FEW)
    n = np.arange(1, 11)
    original = run.measured[:, 10:].mean(axis=1)
    slope = np.polyfit(np.log(n), np.log(original), 1)[0]
    assert value(growth.original) == pytest.approx(slope)
    # Of n edits, n - 1 facts were edited before; a mean counts by how many facts it is over.
    means = [np.mean([run.measured[made - 1, j] for j in range(made - 1)]) for made in n[1:]]
    slope = np.polyfit(np.log(n[1:]), np.log(means), 1, w=np.sqrt(n[1:] - 1))[0]
    assert value(growth.edited) == pytest.approx(slope)
    expected = scipy.stats.spearmanr(n, run.measured[-1, :10]).statistic
    assert value(growth.by_age) == pytest.approx(expected)


def test_edits_of_one_batch_are_one_point() -> None:
    run = run_of(18, 30)
    # Two at once: both rows are of the state after the second, and both facts begin anew there.
    measured = run.measured[np.repeat(np.arange(1, 18, 2), 2)]
    for start in range(0, 18, 2):
        measured[start : start + 2, start : start + 2] = 0
    run = replace(run, measured=measured, batch=np.repeat(np.arange(9), 2))
    growth = measure_growth(run, FEW)
    n = np.arange(2, 19, 2)
    slope = np.polyfit(np.log(n), np.log(measured[1::2, 18:].mean(axis=1)), 1)[0]
    assert value(growth.original) == pytest.approx(slope)
    means = [measured[made - 1, : made - 2].mean() for made in n[1:]]
    slope = np.polyfit(np.log(n[1:]), np.log(means), 1, w=np.sqrt(n[1:] - 2))[0]
    assert value(growth.edited) == pytest.approx(slope)


def test_the_walk_holds_random_walks_about_as_often_as_it_says() -> None:
    rounds, held = 50, 0
    base = run_of(30, 50)
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        # A few large p, as SmolLM2 has them: mean |Delta| outgrows the root of n.
        p, delta = rng.standard_t(2.5, (30, 50)), rng.standard_normal((30, 40))
        measured = np.array([np.linalg.norm(p[:n].T @ delta[:n], axis=1) for n in range(1, 31)])
        growth = measure_growth(replace(base, p=p, delta=delta, measured=measured), FEW)
        low, high = ends(growth.original_walk)
        held += low <= value(growth.original) <= high
    assert 0.84 <= held / rounds <= 1


def test_a_walk_is_the_run_with_other_signs() -> None:
    run = run_of(12, 18, seed=4)
    # With one delta in twelve that is not 0 no sign matters, and the run is its own walk.
    delta = run.delta * (np.arange(12) == 3)[:, None]
    shifts = np.array([np.linalg.norm(run.p[:n].T @ delta[:n], axis=1) for n in range(1, 13)])
    shifts[:, 4:12] *= np.arange(12)[:, None] < np.zeros(8)  # edited later: counted from then on
    shifts[:, 3] = 0
    growth = measure_growth(replace(run, delta=delta, measured=shifts), FEW)
    assert value(growth.original_walk) == pytest.approx(value(growth.original), abs=1e-12)
    assert value(growth.edited_walk) == pytest.approx(value(growth.edited), abs=1e-12)
    memit = replace(run, linear_error=np.full(9, np.nan))
    assert measure_growth(memit, FEW).original_walk == UNDEFINED


def test_growth_is_undefined_where_there_is_none() -> None:
    for run in (run_of(6, 9, single=True), run_of(1, 1), run_of(2, 4)):
        growth = measure_growth(run, FEW)
        assert set(vars(growth).values()) == {UNDEFINED}
    still = run_of(6, 9)
    still = replace(still, measured=np.zeros((6, 9)))
    growth = measure_growth(still, FEW)
    assert (growth.original, growth.edited, growth.by_age) == (UNDEFINED,) * 3
    # Of so few facts there is an exponent, and no interval.
    assert measure_growth(run_of(6, 9), FEW).original.low is None


@pytest.mark.parametrize("single", [True, False])
def test_predictors_by_the_definition(single: bool) -> None:
    run = run_of(5, 24, single=single, seed=3)
    rng = np.random.default_rng(1)
    run = replace(
        run,
        known=rng.random(24) < 0.8,
        same_last_token=rng.random((5, 24)) < 0.2,
        logprob_true=-rng.random((6, 24)),
        gradient_cosine=rng.standard_normal((5, 24)),
        hidden_cosine=rng.standard_normal((5, 24)),
        # The copy of a fact that is edited is no other fact.
        about=run.about | (np.arange(24) == 20) & (np.arange(5) == 2)[:, None],
    )
    found = by_name(run)
    for name in SIMILARITIES:
        S = getattr(run, name)
        predicted, fall, flipped, distinct = [], [], [], []
        for made in range(1, 6):
            edits = [made - 1] if single else list(range(made))
            barred = {made - 1} if single else set(range(5))
            barred |= {20} if 2 in barred else set()
            for j in np.flatnonzero(run.known):
                if int(j) in barred:
                    continue
                predicted.append(np.linalg.norm(sum(S[i, j] * run.delta[i] for i in edits)))
                fall.append(run.logprob_true[0, j] - run.logprob_true[made, j])
                flipped.append(run.answer_changed[made, j])
                distinct.append(not any(run.same_last_token[i, j] for i in edits))
        for which, kept in (
            (found[name].every, [True] * len(fall)),
            (found[name].distinct, distinct),
        ):
            x, y, z = (np.array(of)[np.array(kept)] for of in (predicted, fall, flipped))
            assert (which.pairs, which.flips) == (len(x), z.sum())
            assert value(which.spearman) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
            u = scipy.stats.mannwhitneyu(x[z], x[~z]).statistic
            assert value(which.auc) == pytest.approx(u / (z.sum() * (~z).sum()))


@pytest.mark.parametrize("single", [True, False])
def test_the_theory_is_perfect_where_behaviour_follows_it(single: bool) -> None:
    run = run_of(8, 60, single=single)
    found = by_name(run)
    theory, null = found["p"].every, found[NULL].every
    assert theory.pairs == (8 * 59 if single else 8 * 52)
    assert theory.spearman == Estimate(*[pytest.approx(1)] * 3)
    assert theory.auc == Estimate(*[pytest.approx(1)] * 3)
    # In a sequence even a permuted p grows from pass to pass, as behaviour does.
    assert value(null.auc) < (0.6 if single else 0.95)
    low, high = ends(null.auc)
    assert low < value(null.auc) < high
    assert value(found["whitened_cosine"].every.auc) == pytest.approx(1)
    assert found["gradient_cosine"].every.auc == UNDEFINED
    assert found["gradient_cosine"].every.spearman == UNDEFINED
    # An edited fact alone shares a token with an edit here.
    assert found["p"].distinct == theory


def test_permuted_facts_tell_nothing_where_edits_are_alike() -> None:
    run = run_of(20, 60, single=True)
    delta = run.delta / np.linalg.norm(run.delta, axis=1, keepdims=True)
    found = by_name(replace(run, delta=delta))[NULL].every
    assert value(found.auc) == pytest.approx(0.5, abs=0.03)
    assert value(found.spearman) == pytest.approx(0, abs=0.03)
    assert ends(found.auc)[0] < 0.5 < ends(found.auc)[1]


def test_permuted_facts_are_exchanged_in_the_same_way_for_every_edit() -> None:
    run = run_of(30, 40, single=True)
    # p is a matter of the fact alone, and so is behaviour: a permutation keeps it so.
    of_fact = np.random.default_rng(2).random(40)
    run = replace(run, p=np.tile(of_fact, (30, 1)), delta=np.ones((30, 1)))
    fall = np.vstack([np.zeros(40), np.tile(-of_fact, (30, 1))])
    found = by_name(replace(run, logprob_true=fall))[NULL].every
    low, high = ends(found.spearman)
    # 95 % of correlations of 40 independent facts, not of 30 * 39 pairs.
    assert high - low == pytest.approx(4 / np.sqrt(39), rel=0.35)


def test_few_flips_give_no_auc() -> None:
    run = run_of(3, 20)
    changed = np.zeros((4, 20), dtype=bool)
    changed[3, 10 : 10 + FEWEST_FLIPS - 1] = True
    changed[:, :3] = True  # edited facts do not count
    for each in predict_behaviour(replace(run, answer_changed=changed), FEW):
        assert each.every.flips == FEWEST_FLIPS - 1
        assert each.every.auc == UNDEFINED
    changed[2, 19] = True
    enough = by_name(replace(run, answer_changed=changed))
    assert enough["p"].every.flips == FEWEST_FLIPS
    assert enough["p"].every.auc.value is not None
    # Three passes are too few to draw again.
    assert enough["p"].every.auc.low is None
    assert by_name(replace(run, answer_changed=np.ones((4, 20), dtype=bool)))["p"].every.auc == (
        UNDEFINED
    )


def test_a_model_that_knew_nothing_has_nothing_to_predict() -> None:
    run = replace(run_of(3, 20), known=np.zeros(20, dtype=bool))
    for each in predict_behaviour(run, FEW):
        assert (each.every.pairs, each.every.flips) == (0, 0)
        assert each.every.spearman == each.distinct.auc == UNDEFINED
    row = verify(run, FEW).row()
    assert (row["known"], row["kept"]) == (0, None)


def test_intervals_hold_the_population_s_value_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    m, n, rounds = 30, 25, 50

    def sample(edits: int) -> tuple[Real, Real]:
        # Facts of one edit share how much it does: pairs are not independent, edits are.
        strength = rng.lognormal(0, 0.7, (edits, 1))
        p = rng.lognormal(0, 1, (edits, m)) * strength
        return p, p * rng.lognormal(0, 1.5, (edits, m)) * strength

    p, fall = sample(20_000)
    population = scipy.stats.spearmanr(p.ravel(), fall.ravel()).statistic
    base = run_of(n, m, single=True)
    held = 0
    for _ in range(rounds):
        p, fall = sample(n)
        run = replace(
            base, p=p, delta=np.ones((n, 1)), logprob_true=np.vstack([np.zeros(m), -fall])
        )
        low, high = ends(predict_behaviour(run, Resampling(200, 1), 1)[0].every.spearman)
        held += low <= population <= high
    assert 0.83 <= held / rounds <= 1


def test_what_a_sequence_came_to() -> None:
    changed = np.zeros((5, 10), dtype=bool)
    changed[3, 5] = changed[4, [4, 9]] = True
    changed[:, :4] = True
    run = replace(
        run_of(4, 10),
        rank_new_after=np.array([1, 1, 2, 1]),
        logprob_new_after=np.array([0.0, 0, -2, -2]),
        rank_new=np.array([[5] * 4] * 4 + [[1, 2, 1, 9]]),
        logprob_new=np.full((5, 4), -3.0),
        logprob_true=np.full((5, 10), -2.0) - 2 * np.eye(5, 10, k=-3),
        known=np.array([True] * 8 + [False] * 2),
        protected=np.isin(np.arange(10), [4, 6, 8]),
        answer_changed=changed,
        perplexity=np.array([20.0, 1, 1, 1, 30.0]),
        kl=np.array([0.0, 1, 1, 1, 0.5]),
        # Of facts 0 (edited), 4 (protected), 5 and 9 (not known).
        paraphrase_fact=np.array([0, 4, 4, 5, 9]),
        paraphrase_known=np.array([True, True, True, True, True]),
        paraphrase_changed=np.array([[False] * 5] * 4 + [[True, False, True, False, True]]),
    )
    found = measure_outcomes(run)
    assert (found.edits, found.efficacy, found.efficacy_likelier) == (4, 0.75, 0.5)
    assert (found.retention, found.retention_likelier) == (0.5, 0.25)
    assert (found.known, found.kept) == (4, 0.75)
    assert (found.known_protected, found.kept_protected) == (2, 0.5)
    assert found.kept_paraphrased == pytest.approx(2 / 3)
    assert found.kept_protected_paraphrased == 0.5
    assert (found.kl, found.text_change) == (0.5, pytest.approx(0.1))
    assert found.kept_by_pass == (1, 1, 1, 0.75, 0.75)
    assert (found.perplexity_before, found.perplexity_after) == (20, 30)
    assert found.weight_change == 4
    row = verify(run, FEW).row()
    assert (row["linear_error"], row["live_error"]) == (1e-12, 1e-6)
    assert verify(replace(run, linear_error=np.full(4, np.nan)), FEW).linear_error is None


def test_what_single_edits_came_to() -> None:
    changed = np.zeros((3, 6), dtype=bool)
    changed[1, [0, 1, 5]] = True
    run = replace(
        run_of(2, 6, single=True),
        known=np.array([True] * 5 + [False]),
        answer_changed=changed,
        perplexity=np.array([20.0, 30, 40]),
    )
    found = measure_outcomes(run)
    # Fact 1 counts when fact 0 is edited, and is kept when it is edited itself.
    assert (found.known, found.kept) == (5, pytest.approx((3 / 4 + 1) / 2))
    assert (found.retention, found.perplexity_after, found.weight_change) == (None, 35, 1.5)


def test_arrays_of_a_file_leave_out_edits_that_were_not_made() -> None:
    run = run_of(3, 5)
    values: dict[str, Any] = {name: getattr(run, name) for name in run.__dataclass_fields__}
    values |= {
        "delta": np.arange(24.0).reshape(3, 2, 4),
        "edited": np.array([4, 0, 2]),
        "rank_new": np.arange(20).reshape(4, 5),
        "logprob_new": -np.arange(20.0).reshape(4, 5),
        "kept_out/number": np.array([1]),
        **{f"scores/{name}": np.arange(20.0).reshape(4, 5) for name in SCORES},
        "paraphrase/known": np.array([True, False]),
        "paraphrase/changed": np.zeros((4, 2), dtype=bool),
    }
    file: Any = SimpleNamespace(
        values=values.__getitem__,
        about=SimpleNamespace(protocol="single", batch=2),
        facts=[Fact("{} is in", subject, "x") for subject in ("A", "B", "C", "D", "A")],
        token_id=np.array([7, 8, 8, 7, 7]),
        paraphrase_fact=np.array([0, 3]),
    )
    found = read_arrays(file)
    assert found.single
    assert found.delta.shape == (3, 8)
    assert found.batch.tolist() == [0, 1, 1]
    # Planned were five, of which the second was kept out and the last was not come to.
    assert found.rank_new[1].tolist() == [5, 7, 8]
    assert found.logprob_new[0].tolist() == [0, -2, -3]
    assert found.scores["ES"][1].tolist() == [5, 7, 8]
    assert found.about.astype(int).tolist() == [[1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert found.same_last_token.astype(int).tolist() == [
        *([[1, 0, 0, 1, 1]] * 2),
        [0, 1, 1, 0, 0],
    ]


def foretold(n: int, seed: int) -> EditArrays:
    """Single edits whose PS follows p to paraphrases, and whose flips follow the rms of p."""
    run = run_of(n, 40, single=True, seed=seed)
    own = np.linspace(0, 1, n)
    own[1] = np.nan  # it has no paraphrase
    scale = np.arange(1.0, n + 1)
    p = np.where(run.about, 1.0, scale[:, None] * 0.01)
    scores = {name: values.copy() for name, values in run.scores.items()}
    for edit in range(n):
        scores["PS"][edit + 1, edit] = own[edit] ** 2
        scores["NS"][edit + 1, edit] = 1 - scale[edit] / 100
    changed = np.zeros((n + 1, 40), dtype=bool)
    for edit in range(n):
        changed[edit + 1, n : n + edit + 1] = True
        changed[edit + 1, edit] = True  # its own answer is not another fact's
    return replace(run, p=p, paraphrase_p=own, scores=scores, answer_changed=changed)


def test_what_p_foretells_of_where_to_edit() -> None:
    n = 12
    run = foretold(n, 0)
    row = points_of(run).row(FEW)
    assert row["edits"] == n
    assert row["paraphrase_p"] == pytest.approx(np.nanmedian(run.paraphrase_p))
    assert row["rms_p"] == pytest.approx(0.01 * np.median(np.arange(1, n + 1)))
    assert row["PS"] == pytest.approx(np.nanmean(run.paraphrase_p**2))
    assert row["spearman_PS"] == row["spearman_flipped"] == pytest.approx(1)
    assert row["spearman_NS"] == pytest.approx(-1)
    assert row["flipped"] == pytest.approx(np.mean(np.arange(1, n + 1) / 39))
    both = together([points_of(run), points_of(replace(run, paraphrase_p=-run.paraphrase_p))])
    assert both.row(FEW)["edits"] == 2 * n
    expected = scipy.stats.spearmanr(
        np.concatenate([run.paraphrase_p, -run.paraphrase_p]),
        np.tile(run.paraphrase_p**2, 2),
        nan_policy="omit",
    )
    assert both.row(FEW)["spearman_PS"] == pytest.approx(expected.statistic)


def test_a_sequence_flips_nothing_by_one_edit() -> None:
    row = points_of(run_of(6, 12)).row(FEW)
    assert row["flipped"] is None
    assert row["spearman_flipped"] is None
    assert row["spearman_PS"] is None


def test_the_command_where(measured_tiny: Path, tmp_path: Path) -> None:
    files = []
    for layer in (0, 1):
        files.append(tmp_path / f"{layer}.h5")
        made = kscli(
            *("edit", "--dir", measured_tiny.parent, "--edits", 5, "--protocol", "single"),
            *("--value", "random", "--layer", layer, "-o", files[-1], "-q", "--contexts", 0),
        )
        assert made.exit_code == 0, made.stderr
    rows = json.loads(kscli("verify", *files, "--where", "-f", "json").stdout)
    assert [row["layers"] for row in rows] == [[0], [1], [0, 1]]
    assert [row["edits"] for row in rows] == [5, 5, 10]
    assert all(row["paraphrase_p"] is None for row in rows)  # tiny's facts have no paraphrases
    assert "Where to edit" in kscli("verify", *files, "--where").stdout
    refused = kscli("verify", *files, "--where", "--predictors")
    assert refused.exit_code == 2
    assert "ask for one" in one_sentence(refused.stderr)


def test_files_are_named_by_as_few_of_their_last_parts_as_tell_them_apart() -> None:
    assert short_names(["a/x/one.h5", "b/two.h5"]) == {"a/x/one.h5": "one.h5", "b/two.h5": "two.h5"}
    assert short_names(["a/x/one.h5", "b/x/one.h5", "c/two.h5"]) == {
        "a/x/one.h5": "a/x/one.h5",
        "b/x/one.h5": "b/x/one.h5",
        "c/two.h5": "c/two.h5",
    }
    assert short_names(["one.h5", "one.h5"]) == {"one.h5": "one.h5"}


def test_of_one_edit_no_interval_is_spoken_of_and_columns_are_explained(
    measured_tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    request = ("edit", "--dir", measured_tiny.parent, "--fact", 1, "--value", "random", "-o", path)
    assert kscli(*request).exit_code == 0
    done = kscli("verify", path)
    assert done.exit_code == 0
    assert "interval" not in done.stdout
    told = " ".join(done.stderr.split())
    assert "|W_n - W_0|: The length (Frobenius norm)" in told
    assert f"exponents and rank correlations need {FEWEST_POINTS} points" in told
    row = json.loads(kscli("verify", path, "-f", "json").stdout)[0]
    assert row["exponent_original"] is row["by_age"] is None
    assert kscli("verify", path, "-q").stderr == ""


def test_three_edits_have_no_exponent(tmp_path: Path) -> None:
    for n, defined in ((3, False), (FEWEST_POINTS - 1, False), (FEWEST_POINTS, True)):
        path = Run(n, 30).write(tmp_path / f"{n}.h5")
        (row,) = json.loads(kscli("verify", path, "-f", "json").stdout)
        assert (row["exponent_original"] is not None) == defined
        assert (row["by_age"] is not None) == defined


def test_the_command_on_real_runs(measured_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(measured_tiny, tmp_path / "tiny")
    none = kscli("verify", "--dir", tmp_path)
    assert none.exit_code == 1
    assert f"`kscli edit --model tiny --dir {tmp_path}` makes one" in one_sentence(none.stderr)
    for more in (("--measure-every", 2), ("--protocol", "single", "--seed", 1)):
        made = kscli(
            *("edit", "--dir", tmp_path, "--edits", 10, "--value", "random", "--value-norm", 5),
            *("--layer", 0, "-q", *more),
        )
        assert made.exit_code == 0, made.stderr
    row, single = json.loads(kscli("verify", "--dir", tmp_path, "-f", "json").stdout)
    assert (row["layers"], row["protocol"], row["edits"]) == ([0], "sequential", 10)
    assert row["linear_error"] < 1e-9
    assert row["live_error"] < 1e-4
    assert row["perplexity_before"] is None
    assert row["exponent_original_low"] < row["exponent_original"] < row["exponent_original_high"]
    assert row["by_age"] < 0
    assert (single["protocol"], single["retention"], single["by_age"]) == ("single", None, None)

    rows = json.loads(kscli("verify", "--dir", tmp_path, "--predictors", "-f", "json").stdout)
    assert [r["predictor"] for r in rows] == [*SIMILARITIES, NULL] * 2
    assert all(isinstance(r["spearman"], float) for r in rows)
    assert all((r["auc"] is None) == (r["flips"] < FEWEST_FLIPS) for r in rows)
    assert all(
        r["spearman_low"] < r["spearman"] < r["spearman_high"]
        for r in rows[len(SIMILARITIES) + 1 :]
    )
    for output in ("table", "csv", "tsv", "markdown", "latex"):
        for more in ((), ("--predictors", "--repeats", 100)):
            found = kscli("verify", "--dir", tmp_path, "-f", output, *more)
            assert found.exit_code == 0
            assert "rome" in found.stdout
            assert "nan" not in found.stdout.lower()
    header, *lines = kscli("verify", "--dir", tmp_path, "-f", "csv").stdout.splitlines()
    assert len(lines) == 2
    assert all(len(line.split(",")) == len(header.split(",")) for line in lines)

    edits = tmp_path / "tiny" / "edits"
    shutil.copy(edits / "rome-0-0.h5", edits / "copy.h5")
    named = kscli("verify", edits / "copy.h5", edits / "rome-0-0.h5").stdout
    assert re.findall(r"^copy.h5|^rome-0-0.h5", named, flags=re.MULTILINE) == [
        *("copy.h5", "rome-0-0.h5"),  # what became of the edits
        *("copy.h5", "copy.h5", "rome-0-0.h5", "rome-0-0.h5"),  # their scores, before and after
        *("copy.h5", "rome-0-0.h5"),  # the theory
    ]
    wrong = kscli("verify", tmp_path / "tiny" / "pmatrix.h5")
    assert wrong.exit_code == 1
    assert "a run of edits" in one_sentence(wrong.stderr)
    absent = kscli("verify", tmp_path / "absent.h5")
    assert "does not exist" in one_sentence(absent.stderr)
