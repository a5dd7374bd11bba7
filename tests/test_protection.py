"""Protected and joint edits, against their definitions in float64 and in the live model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray

from kscli.artifacts import KeysFile
from kscli.editing.directions import edit_directions
from kscli.editing.edits_file import EditsFile
from kscli.editing.metrics import Identity, Metric, NullSpace
from kscli.editing.protection import (
    NoRoomError,
    Protected,
    Sparing,
    prices,
    protect,
    require_room,
)
from kscli.errors import NumericsError
from kscli.whitening import whitening

Array = NDArray[np.float64]
D_M = 24


@pytest.fixture
def C() -> Array:  # noqa: N802
    root = np.random.default_rng(0).standard_normal((60, D_M)) * np.logspace(0, -2, D_M)
    return root.T @ root / 60


@pytest.fixture
def white(C: Array) -> Metric:
    return whitening(C.copy(), 60)


@pytest.fixture
def keys() -> Array:
    """The key of an edit, and fifteen others like it."""
    drawn = np.random.default_rng(1)
    return drawn.standard_normal((16, D_M)) + 2 * drawn.standard_normal(D_M)


def metrics(C: Array) -> Iterator[tuple[Metric, Array, Array]]:
    """Each metric, a basis (d_m, r) of where it writes, and M^-1 in that basis."""
    yield whitening(C.copy(), 60), np.eye(D_M), C
    yield Identity(), np.eye(D_M), np.eye(D_M)
    basis = np.linalg.qr(np.random.default_rng(2).standard_normal((D_M, 20)))[0]
    yield NullSpace(basis), basis, np.eye(20)


def test_a_protected_key_does_not_move(C: Array, keys: Array) -> None:
    for metric, *_ in metrics(C):
        protected = protect(metric, keys[1:])
        (direction,) = edit_directions(protected, keys[:1])
        assert direction @ keys[0] == pytest.approx(1, abs=1e-12)
        lengths = np.linalg.norm(keys[1:], axis=1)
        assert (np.abs(keys[1:] @ direction) <= 1e-12 * lengths).all()


def test_no_other_direction_that_spares_them_changes_text_less(
    C: Array, white: Metric, keys: Array
) -> None:
    (direction,) = edit_directions(protect(white, keys[1:]), keys[:1])
    least = direction @ C @ direction
    # All directions that are feasible: this one, and anything orthogonal to all keys beside it.
    free = np.linalg.svd(keys)[2][len(keys) :]
    drawn = np.random.default_rng(3).standard_normal((1000, len(free)))
    for size in (1e-6, 1e-3, 1.0):
        others = direction + size * drawn @ free
        np.testing.assert_allclose(others @ keys.T, np.eye(16)[[0] * 1000], atol=1e-9)
        assert (np.einsum("ij,jk,ik->i", others, C, others) > least * (1 - 1e-12)).all()


def test_the_price_is_the_variance_inflation_factor(C: Array, white: Metric, keys: Array) -> None:
    G = keys @ np.linalg.inv(C) @ keys.T
    expected = np.diagonal(G) * np.diagonal(np.linalg.inv(G))
    assert (expected > 1.5).all()
    for number in range(len(keys)):
        one, others = keys[[number]], np.delete(keys, number, axis=0)
        (found,) = prices(white, protect(white, others), one, one)
        assert found == pytest.approx(expected[number], rel=1e-9)
        direction = edit_directions(protect(white, others), one)
        plain = edit_directions(white, one)
        ratio = (direction @ C @ direction.T) / (plain @ C @ plain.T)
        assert ratio.item() == pytest.approx(expected[number], rel=1e-9)


@pytest.mark.parametrize("n", [15, 200])
def test_a_ridge_counts_the_protected_keys_as_text(C: Array, n: int) -> None:
    """M' = (M^-1 + P P^T / rho)^-1, fewer protected keys than dimensions or more."""
    drawn = np.random.default_rng(4).standard_normal((n + 3, D_M))
    P, asked = drawn[:n], drawn[n:]
    for metric, basis, inverse in metrics(C):
        within = P @ basis
        leverage = np.einsum("ij,jk,ik->i", within, np.linalg.inv(inverse), within)
        rho = 0.3 * np.median(leverage)
        protected = protect(metric, P, 0.3)
        found = protected.solve(protected.whiten(asked))
        counted = inverse + within.T @ within / rho
        expected = asked @ basis @ np.linalg.inv(counted) @ basis.T
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_a_price_with_a_ridge_is_that_of_the_direction(
    C: Array, white: Metric, keys: Array
) -> None:
    protected = protect(white, keys[4:], 0.1)
    found = prices(white, protected, keys[:2], keys[2:4])
    for number in range(2):
        of_both = []
        for metric in (protected, white):
            # A weight shortens the direction; the price is that of moving the own value by 1.
            (d,) = edit_directions(metric, keys[[number]], 3.0, at=keys[[number + 2]])
            of_both.append((d @ C @ d) / (d @ keys[number + 2]) ** 2)
        assert found[number] == pytest.approx(of_both[0] / of_both[1], rel=1e-9)


def test_joint_edits_are_the_sequential_ones(white: Metric, keys: Array) -> None:
    deltas = np.random.default_rng(5).standard_normal((16, 7))
    joint = deltas.T @ edit_directions(white, keys)
    for order in (range(16), np.random.default_rng(6).permutation(16)):
        sparing, change = Sparing(white), np.zeros((7, D_M))
        for number in order:
            (direction,) = edit_directions(sparing, keys[[number]])
            # What its value lacks now; those before it moved it.
            change += np.outer(deltas[number] - change @ keys[number], direction)
            sparing.add(keys[[number]])
        np.testing.assert_allclose(change, joint, rtol=0, atol=1e-9 * np.abs(joint).max())
    np.testing.assert_allclose(joint @ keys.T, deltas.T, atol=1e-10)


def test_later_edits_spare_earlier_ones_and_what_is_protected(white: Metric, keys: Array) -> None:
    sparing = Sparing(protect(white, keys[8:], 0.1))
    sparing.add(keys[:3])
    sparing.add(keys[3:4])
    (direction,) = edit_directions(sparing, keys[4:5])
    assert np.abs(keys[:4] @ direction).max() < 1e-12
    assert direction @ keys[4] == pytest.approx(1)
    exact = Sparing(protect(white, keys[8:]))
    exact.add(keys[:4])
    (direction,) = edit_directions(exact, keys[4:5])
    spared = np.delete(keys, [4, 5, 6, 7], axis=0)
    assert np.abs(spared @ direction).max() < 1e-12


def test_keys_that_are_the_same_cannot_be_parted(white: Metric, keys: Array) -> None:
    for protected in (protect(white, keys), Sparing(white)):
        if isinstance(protected, Sparing):
            protected.add(keys)
        assert prices(white, protected, keys[3:4], keys[3:4]) == [np.inf]
        with pytest.raises(NumericsError, match="an earlier edit was written at, or that is prot"):
            require_room(white, protected, keys[3:4])
    twice = protect(white, keys[[1, 1, 2]])
    once = protect(white, keys[[1, 2]])
    np.testing.assert_allclose(
        edit_directions(twice, keys[:1]), edit_directions(once, keys[:1]), atol=1e-12
    )


def test_more_keys_than_dimensions_leave_no_room(white: Metric) -> None:
    many = np.random.default_rng(7).standard_normal((D_M + 1, D_M))
    with pytest.raises(NoRoomError, match="the 25 protected keys span all 24 dimensions"):
        protect(white, many)
    assert isinstance(protect(white, many, 1e-3), Protected)


def test_a_massive_key_hides_no_other(white: Metric, keys: Array) -> None:
    """As the key of a first token, thousands of times as long."""
    long = keys[1:] * np.r_[1e8, np.ones(14)][:, None]
    (direction,) = edit_directions(protect(white, long), keys[:1])
    assert np.abs(keys[1:] @ direction).max() < 1e-11


# In the live model


@pytest.fixture
def folder(measured_tiny: Path) -> Path:
    return measured_tiny


def edited(folder: Path, path: Path, *options: Any) -> dict[str, Any]:
    """A run of four edits of `tiny`, and what stderr said."""
    request = ("edit", "--dir", folder.parent, "--fact", 3, "--fact", 5, "--fact", 9, "--fact", 11)
    values = ("--layer", 1, "--value", "random", "--value-norm", 20, "--generations", 0)
    found = kscli(*request, *values, "-o", path, "-f", "json", *options)
    assert found.exit_code == 0, found.stderr
    with EditsFile(path) as file:
        return {name: file.values(name) for name in file.datasets() if "/" not in name} | {
            "stderr": " ".join(found.stderr.split())
        }


def facts_file(folder: Path, path: Path, numbers: range) -> Path:
    with KeysFile(folder / "keys.h5") as file:
        facts = [file.facts[number] for number in numbers]
    fields = ("prompt", "subject", "target")
    path.write_text(json.dumps([{name: getattr(each, name) for name in fields} for each in facts]))
    return path


def test_what_is_protected_stays_as_it_was_said(folder: Path, tmp_path: Path) -> None:
    facts = facts_file(folder, tmp_path / "facts.json", range(12, 30))
    plain = edited(folder, tmp_path / "plain.h5", "--method", "closed-form")
    for method in ("joint", "closed-form", "memit"):
        exactly = ("--protect", facts, "--protect-ridge", 0)
        run = edited(folder, tmp_path / f"{method}.h5", "--method", method, *exactly)
        np.testing.assert_array_equal(np.flatnonzero(run["protected"]), np.arange(12, 30))
        before, after = run["logprob_true"][[0, -1]][:, 12:30]
        np.testing.assert_allclose(after, before, atol=2e-5)
        assert (run["price"] > 1).all()
        assert run["linear_error"].max() < 1e-9
        assert "protected at all tokens: 18 of 18 facts, by " in run["stderr"]
    before, after = plain["logprob_true"][[0, -1]][:, 12:30]
    assert np.abs(after - before).max() > 0.01
    assert not plain["protected"].any()
    np.testing.assert_allclose(plain["price"], 1)


def test_the_default_ridge_is_nearly_exact_and_cheaper(folder: Path, tmp_path: Path) -> None:
    facts = facts_file(folder, tmp_path / "facts.json", range(12, 30))
    changes, paid = [], []
    for name, options in (
        ("plain", ()),
        ("default", ("--protect", facts)),
        ("said", ("--protect", facts, "--protect-ridge", 0.1)),
        ("exact", ("--protect", facts, "--protect-ridge", 0)),
    ):
        run = edited(folder, tmp_path / f"{name}.h5", "--method", "joint", *options)
        before, after = run["logprob_true"][[0, -1]][:, 12:30]
        changes.append(np.abs(after - before).max())
        paid.append(np.median(run["price"]))
    assert changes[0] > 3 * changes[1] > 10 * changes[3]
    assert paid[3] > paid[1] > paid[0]
    assert (changes[1], paid[1]) == (changes[2], paid[2])


def test_at_the_subject_alone_p_is_taken_away_and_no_more(folder: Path, tmp_path: Path) -> None:
    run = edited(
        folder,
        tmp_path / "a.h5",
        *("--method", "joint", "--protect", "all", "--protect-at", "subject"),
    )
    # All others are protected; so are the edits before, and nothing is left to move.
    assert np.abs(run["editor_p"][-1][run["protected"]]).max() < 1e-6
    np.testing.assert_allclose(
        run["editor_p"][:, [3, 5, 9, 11]][[3, 3, 3], [0, 1, 2]], 0, atol=1e-9
    )
    before, after = run["logprob_true"][[0, -1]][:, run["protected"]]
    assert np.abs(after - before).max() > 1e-3


def test_the_price_can_be_limited(folder: Path, tmp_path: Path) -> None:
    request = ("--method", "closed-form", "--protect", "all", "--protect-at", "subject")
    dear = edited(folder, tmp_path / "a.h5", *request)
    limit = 1 + (dear["price"].max() - 1) / 2
    run = edited(folder, tmp_path / "b.h5", *request, "--max-price", limit)
    assert 1 < run["price"].max() <= limit
    assert 0 < run["protected"].sum() < dear["protected"].sum()
    assert "left unprotected, since to protect them costs more than --max-price" in run["stderr"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--protect-ridge", 0.1), "--protect-ridge has no effect without --protect"),
        (("--max-price", 3), "--max-price has no effect without --protect"),
        (("--protect", "all", "--max-price", 0.5), "--max-price 0.5 is below 1"),
        (("--protect", "tiny", "--protect-ridge", 0), "protected keys span all 512 dimensions"),
        (("--protect", "nowhere.json"), "nowhere.json"),
        (("--protect", "all", "--protect-ridge", "inf"), "--protect-ridge inf must be a finite"),
    ],
)
def test_what_cannot_be_protected(
    folder: Path, tmp_path: Path, options: tuple[Any, ...], said: str
) -> None:
    path = tmp_path / "a.h5"
    found = kscli("edit", "--dir", folder.parent, "--layer", 0, "--edits", 2, "-o", path, *options)
    assert found.exit_code in (1, 2)
    assert said in one_sentence(found.stderr)
    assert not path.exists()


def test_an_edited_fact_and_its_copy_are_not_protected(folder: Path, tmp_path: Path) -> None:
    facts = facts_file(folder, tmp_path / "facts.json", range(3, 8))
    run = edited(folder, tmp_path / "a.h5", "--method", "joint", "--protect", facts)
    assert np.flatnonzero(run["protected"]).tolist() == [4, 6, 7]
    assert "protected at all tokens: 3 of 3 facts" in run["stderr"]


def test_verify_and_the_report_tell_what_protection_kept(folder: Path, tmp_path: Path) -> None:
    facts = facts_file(folder, tmp_path / "facts.json", range(12, 40))
    path = tmp_path / "a.h5"
    run = edited(folder, path, "--method", "joint", "--protect", facts, "--protect-ridge", 0)
    found = kscli("verify", path, "-f", "json")
    assert found.exit_code == 0, found.stderr
    (row,) = json.loads(found.stdout)
    protected = run["known"] & run["protected"]
    kept = ~run["answer_changed"][-1][protected]
    assert row["known_protected"] == protected.sum() > 0
    assert row["kept_protected"] == kept.mean() == 1
    table = kscli("verify", path).stdout
    assert f"100% of {protected.sum()}" in table
