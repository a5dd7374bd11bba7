"""Runs of edits with known answers: exponents, rank correlations and AUC by their definitions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray

from kscli.editing.verification import (
    NULL,
    behaviour,
    growth,
    growth_exponent,
    outcome,
    predicted_shifts,
    rank_correlation,
    roc_auc,
    scores,
)
from kscli.resampling import Resampling

FEW = Resampling(50, 0)
Array = NDArray[np.float64]


class Run:
    """What an EditsFile gives, of edits that follow equations 11 and 15 exactly."""

    def __init__(self, delta: Array, p: Array, *, single: bool = False, **values: Any) -> None:
        n, m = p.shape
        self.edits = n
        self.path, self.model, self.layers = Path("run.h5"), "toy", (3,)
        self.attributes = {
            "protocol": "single" if single else "sequential",
            "method": "rome",
            "order": "given",
        }
        edited = np.arange(n)
        self.token_id = np.arange(m)
        steps = np.arange(n + 1)
        shifts = np.einsum("im,id->imd", p, delta)
        if not single:
            for i in range(n):
                shifts[i, i] = 0
            total = np.cumsum(shifts, axis=0)
            for j in range(n):
                total[:, j] -= total[j, j]
                total[: j + 1, j] = 0
            shifts = total
        measured = np.linalg.norm(shifts, axis=2)
        self._values = {
            "edited": edited,
            "delta": delta[:, None, :],
            "delta_norm": np.linalg.norm(delta, axis=1),
            "p": p,
            "cosine": np.random.default_rng(1).standard_normal((n, m)),
            "whitened_cosine": p * 0.5,
            "gradient_cosine": np.full((n, m), np.nan),
            "measured": measured,
            "step": steps,
            "known": np.ones(m, dtype=bool),
            "logprob_true": np.vstack([np.zeros(m), -measured]),
            "answer_changed": np.vstack([np.zeros(m), measured > np.median(measured)]).astype(bool),
            "rank_new": np.ones((n + 1, n), dtype=np.int64),
            "rank_new_after": np.ones(n, dtype=np.int64),
            "logprob_new_after": np.zeros(n),
            "logprob_true_after": np.full(n, -1.0),
            "perplexity": np.full(n + 1, np.nan),
            "weight_change": np.ones(n),
            "linear_error": np.full(n, 1e-12),
            "live_error": np.array([np.nan] * (n - 1) + [1e-6]),
            "kept_out/number": np.array([], dtype=np.int64),
            **values,
        }

    def values(self, name: str) -> Any:
        return self._values[name]


def run_of(n: int, m: int, *, aligned: bool = False, single: bool = False, **values: Any) -> Any:
    """Independent p; deltas that are all one, or independent."""
    generator = np.random.default_rng(0)
    p = np.abs(generator.standard_normal((n, m)))
    delta = np.ones((n, 40)) if aligned else generator.standard_normal((n, 40))
    return Run(delta, p, single=single, **values)


def test_rank_correlation_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for size in (3, 10, 200):
        x, y = generator.integers(0, 8, size).astype(float), generator.standard_normal(size)
        expected = scipy.stats.spearmanr(x, y).statistic
        assert rank_correlation(x, y) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
    assert math.isnan(rank_correlation(np.arange(2.0), np.arange(2.0)))


def test_auc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    x, positive = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.3
    pairs = [
        (x[i] > x[j]) + 0.5 * (x[i] == x[j])
        for i in range(60)
        for j in range(60)
        if positive[i] and not positive[j]
    ]
    assert roc_auc(x, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(roc_auc(x, np.zeros(60, dtype=bool)))
    assert math.isnan(roc_auc(x, np.ones(60, dtype=bool)))


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    n = np.arange(1, 51)
    for exponent in (0.5, 1.0, 1.7):
        sizes = 3 * n[:, None] ** exponent * np.ones(4)
        assert growth_exponent(sizes) == pytest.approx(exponent)
    assert math.isnan(growth_exponent(np.zeros((9, 2))))
    assert math.isnan(growth_exponent(np.ones((2, 2))))


def test_aligned_edits_accumulate_linearly_and_independent_ones_as_a_random_walk() -> None:
    for aligned, exponent in ((True, 1.0), (False, 0.5)):
        found = growth(run_of(60, 400, aligned=aligned), FEW)
        assert found is not None
        for estimate in (found.original, found.edited):
            assert estimate.value == pytest.approx(exponent, abs=0.12)
            assert estimate.interval.low <= estimate.value <= estimate.interval.high
        assert found.by_age.value < -0.9
        assert found.by_age.interval.high < 0
    assert growth(run_of(5, 9, single=True), FEW) is None


def test_mean_size_of_earlier_edits_by_a_loop() -> None:
    run = run_of(7, 9)
    measured = run.values("measured")
    means = [np.mean([measured[n, j] for j in range(n)]) for n in range(1, 7)]
    slope = np.polyfit(np.log(np.arange(1, 7)), np.log(means), 1)[0]
    found = growth(run, FEW)
    assert found is not None
    assert found.edited.value == pytest.approx(slope)


@pytest.mark.parametrize("single", [True, False])
def test_shifts_are_the_sums_of_the_equations(single: bool) -> None:
    run = run_of(6, 20, single=single)
    delta, p = run.values("delta")[:, 0], run.values("p")
    found = predicted_shifts(run, p)
    for row, step in enumerate(range(1, 7)):
        edits = [step - 1] if single else range(step)
        for j in range(6, 20):
            naive = np.linalg.norm(sum(p[i, j] * delta[i] for i in edits))
            assert found[row, j] == pytest.approx(naive)


@pytest.mark.parametrize("single", [True, False])
def test_the_theory_scores_perfectly_where_behaviour_follows_it(single: bool) -> None:
    run = run_of(8, 60, single=single)
    by_name = {(s.predictor, s.distinct_token): s for s in scores(run, FEW)}
    theory, null = by_name["p", False], by_name[NULL, False]
    assert theory.spearman.value == pytest.approx(1)
    assert theory.auc.value == pytest.approx(1)
    assert theory.observations == 8 * 52 if not single else 8 * 59
    # In a sequence even a permuted p grows with the passes, as behaviour does.
    assert null.auc.value < (0.6 if single else 0.95)
    assert by_name["whitened_cosine", False].spearman.value == pytest.approx(1)
    unknown = by_name["gradient_cosine", False]
    assert math.isnan(unknown.spearman.value)
    assert math.isnan(unknown.auc.value)
    # No fact shares a token with another's here.
    assert by_name["p", True] == replace(theory, distinct_token=True)


def test_few_flips_give_no_auc() -> None:
    run = run_of(3, 20)
    changed = np.zeros((4, 20), dtype=bool)
    changed[3, 10:19] = True
    run._values["answer_changed"] = changed
    for score in scores(run, FEW):
        assert score.flips == 9
        assert math.isnan(score.auc.value)
    changed[2, 19] = True
    assert all(
        s.flips == 10 and not math.isnan(s.auc.value)
        for s in scores(run, FEW)
        if s.predictor == "p"
    )


def test_facts_that_share_a_token_are_left_out() -> None:
    run = run_of(3, 10)
    run.token_id[5] = run.token_id[1]  # edited second
    seen = behaviour(run)
    assert seen.same_token[:, 5].tolist() == [False, True, True]
    assert seen.counts[:, :3].sum() == 0
    run = run_of(3, 10, single=True)
    run.token_id[5] = run.token_id[1]
    seen = behaviour(run)
    assert seen.same_token[:, 5].tolist() == [False, True, False]
    assert (~seen.counts).sum() == 3


def test_what_a_run_came_to() -> None:
    run = run_of(4, 10)
    run._values["rank_new_after"] = np.array([1, 1, 2, 1])
    run._values["rank_new"] = np.array([[5] * 5] * 4 + [[1, 2, 1, 9, 1]])
    run._values["kept_out/number"] = np.array([2])
    run._values["known"] = np.array([True] * 8 + [False] * 2)
    changed = np.zeros((5, 10), dtype=bool)
    changed[4, [4, 9]] = True
    run._values["answer_changed"] = changed
    run._values["perplexity"] = np.array([20.0, 1, 1, 1, 30.0])
    found = outcome(run)
    assert found["efficacy"] == 0.75
    assert found["retention"] == 0.5
    assert (found["known"], found["kept"]) == (4, 0.75)
    assert (found["perplexity_before"], found["perplexity_after"]) == (20, 30)
    assert (found["linear_error"], found["live_error"]) == (1e-12, 1e-6)


def test_the_command_on_a_real_run(tmp_path: Path) -> None:
    assert kscli("run", "--dir", tmp_path, "--dtype", "float32", "--count", 40, "-q").exit_code == 0
    none = kscli("verify", "--dir", tmp_path)
    assert none.exit_code == 1
    assert "`kscli edit --model tiny --layer 0` makes one" in one_sentence(none.stderr)
    made = kscli(
        *("edit", "--dir", tmp_path, "--edits", 6, "--value", "random", "--measure-every", 2, "-q")
    )
    assert made.exit_code == 0, made.stderr
    (row,) = json.loads(kscli("verify", "--dir", tmp_path, "-f", "json").stdout)
    assert row["edits"] == 6
    assert row["linear_error"] < 1e-9
    assert row["live_error"] < 1e-4
    assert row["perplexity_before"] is None
    assert row["by_age"] is not None
    rows = json.loads(kscli("verify", "--dir", tmp_path, "--predictors", "-f", "json").stdout)
    assert [r["predictor"] for r in rows[:5]] == [
        *("p", "cosine", "whitened_cosine", "gradient_cosine", NULL)
    ]
    assert all(r["spearman"] is not None for r in rows if not r["distinct_token"])
    for output in ("table", "csv", "tsv", "markdown", "latex"):
        for more in ((), ("--predictors",)):
            found = kscli("verify", "--dir", tmp_path, "-f", output, *more)
            assert found.exit_code == 0
            assert "rome" in found.stdout
    assert kscli("verify", tmp_path / "tiny" / "pmatrix.h5").exit_code == 1
