"""What edits would damage, against loops over all pairs."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_kit import FACTS, about_pmatrix, located, write_toy
from cli_kit import ROOT, kscli, one_sentence

from kscli.artifacts import PMatrixFile, write_artifact
from kscli.editing.choice import choose_facts, edit_order
from kscli.editing.predicted_damage import (
    chosen_layer,
    layer_rows,
    least_layer,
    moved_rows,
    price_rows,
    protection_prices,
    sequence_risk,
    sequence_rows,
)
from kscli.facts import Fact

M, LAYERS = 9, (0, 1, 2)
# 0 and 5 are one text, and so are 2 and 7; 1, 2, 7 are about one subject.
TEXTS = (
    ("The {} is", "tower"),
    ("{} speaks", "Ann"),
    ("{} lives in", "Ann"),
    ("{} lives in", "Bo"),
    ("In {}", "Oslo"),
    ("The {} is", "tower"),
    ("{} wrote", "Cy, the second"),
    ("{} lives in", "Ann"),
    ("{} wrote", "7"),
)


def write_pmatrix(
    path: Path, facts: Sequence[Fact], layers: Sequence[int] = LAYERS, **details: str
) -> Path:
    """P of random keys, of very different length, by its definition; copies have one key."""
    m = len(facts)
    first = [next(at for at in range(m) if facts[at].text == fact.text) for fact in facts]
    with write_artifact(path, "pmatrix", about_pmatrix(**details)) as writer:
        writer.layers(layers)
        writer.facts(located(facts, [at // 2 for at in range(m)]))
        for index, layer in enumerate(layers):
            rng = np.random.default_rng(layer)
            keys = (rng.standard_normal((m, 20)) + 1) * rng.lognormal(0, 0.5, (m, 1))
            s = keys[first] @ keys[first].T
            for name in ("P", "Q"):
                writer.put(name, index, s / np.diag(s)[:, None])
            writer.put("leverage", index, np.diag(s))
            # Every third fact has no paraphrase.
            own = np.where(np.arange(m) % 3 == 2, np.nan, rng.uniform(0.2, 1, m))
            writer.put("paraphrase_p", index, own)
    return path


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, Path]:
    facts = [Fact(prompt, subject, f"t{at}") for at, (prompt, subject) in enumerate(TEXTS)]
    return "--pmatrix", write_pmatrix(tmp_path / "pmatrix.h5", facts)


@pytest.fixture
def pm(place: tuple[str, Path]) -> Iterator[PMatrixFile]:
    with PMatrixFile(place[1]) as file:
        yield file


def others(pm: PMatrixFile, i: int) -> list[int]:
    return [j for j in range(len(pm.facts)) if pm.facts[j].text != pm.facts[i].text]


def test_moved_facts_are_the_others_by_damage(pm: PMatrixFile) -> None:
    P = pm.matrix("P", 1)
    rows = moved_rows(pm, 1, [3, 0], k=5)
    for i, own in ((3, rows[:5]), (0, rows[5:])):
        expected = sorted(others(pm, i), key=lambda j, i=i: -abs(P[i, j]))[:5]
        assert [row["j"] for row in own] == expected
        assert [row["rank"] for row in own] == [1, 2, 3, 4, 5]
        for row in own:
            assert row["i"] == i
            assert row["p"] == P[i, row["j"]]
            assert row["damage"] == abs(P[i, row["j"]])
            assert row["subject_j"] == pm.facts[row["j"]].subject
            assert row["same_last_token"] == (pm.token_id[i] == pm.token_id[row["j"]])
    # A copy of the edited fact is the edited fact.
    assert [row["j"] for row in moved_rows(pm, 1, [0])].count(5) == 0
    assert len(moved_rows(pm, 1, [0])) == M - 2
    # Another fact about the same subject is another fact.
    assert 1 in [row["j"] for row in moved_rows(pm, 1, [2])]


@pytest.mark.parametrize("edited", [[4], [3, 0, 5], list(range(M))])
def test_layers_against_loops(pm: PMatrixFile, edited: list[int]) -> None:
    rows = layer_rows(pm, LAYERS, edited)
    for row, layer in zip(rows, LAYERS, strict=True):
        P = pm.matrix("P", layer)
        pairs = [(abs(P[i, j]), i, j) for i in edited for j in others(pm, i)]
        sizes = [size for size, _, _ in pairs]
        assert row["rms"] == pytest.approx(math.sqrt(sum(s * s for s in sizes) / len(sizes)))
        assert row["harmful"] == pytest.approx(sum(s > 0.25 for s in sizes) / len(sizes))
        assert (row["largest"], row["i"], row["j"]) == max(pairs, key=lambda pair: pair[0])
        assert row["subject_j"] == pm.facts[row["j"]].subject
        assert row["edits"] == len(edited)
    # Of the last layer nothing that comes after the subject reads.
    ends = [pm.facts[i].text.endswith(pm.facts[i].subject) for i in edited]
    assert [row["reaches"] for row in rows] == [True, True, all(ends)]
    able = [row for row in rows if row["reaches"]]
    assert least_layer(rows) == min(able, key=lambda row: row["rms"])["layer"]
    assert [row["layer"] for row in rows if row["least"]] == [least_layer(rows)]


@pytest.mark.parametrize("edited", [[4], [3, 0, 5, 2], list(range(M))])
def test_the_layer_that_is_chosen(pm: PMatrixFile, edited: list[int]) -> None:
    rows = layer_rows(pm, LAYERS, edited)
    ratios = {}
    for row, layer in zip(rows, LAYERS, strict=True):
        own = sorted(p for i, p in enumerate(pm.paraphrase_p(layer)) if i in edited and p == p)
        middle = (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2
        assert row["paraphrase_p"] == pytest.approx(middle)
        assert row["ratio"] == pytest.approx(row["rms"] / middle)
        leverage = pm.leverage(layer)
        assert row["text_rms"] == pytest.approx(
            math.sqrt(sum(1 / leverage[i] for i in edited) / len(edited))
        )
        if row["reaches"]:
            ratios[layer] = row["ratio"]
    assert chosen_layer(rows) == min(ratios, key=lambda layer: ratios[layer])
    assert [row["layer"] for row in rows if row["chosen"]] == [chosen_layer(rows)]


def test_rms_p_to_all_text_is_what_an_edit_moves_of_it() -> None:
    """E (d^T k)^2 over the corpus, d = C^-1 k_i / k_i^T C^-1 k_i, is 1 / k_i^T C^-1 k_i."""
    rng = np.random.default_rng(0)
    text, key = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal(8)
    solved = np.linalg.solve(text.T @ text / 500, key)
    p = text @ solved / (key @ solved)
    assert (p**2).mean() == pytest.approx(1 / (key @ solved))


def test_no_layer_is_chosen_without_paraphrases(tmp_path: Path) -> None:
    path = write_pmatrix(tmp_path / "p.h5", [Fact("{} is", "A", "x"), Fact("{} is", "B", "x")])
    with PMatrixFile(path) as file:
        rows = [row | {"ratio": None} for row in layer_rows(file, LAYERS, [0])]
    assert chosen_layer(rows) is None


def test_prices_of_edits(pm: PMatrixFile, place: tuple[str, Path]) -> None:
    prices = protection_prices(pm, 1, range(M))
    rows = price_rows(pm, 1, range(M), 4)
    assert [row["price"] for row in rows] == sorted(prices, reverse=True)[:4]
    for row in rows:
        i = row["fact"]
        assert row["price"] == prices[i]
        moved = [pm.matrix("P", 1)[i, j] for j in others(pm, i)]
        assert row["rms"] == pytest.approx(math.sqrt(sum(p * p for p in moved) / len(moved)))
        assert row["text_rms"] == pytest.approx(pm.leverage(1)[i] ** -0.5)
        own = pm.paraphrase_p(1)[i]
        assert row["paraphrase_p"] == (None if math.isnan(own) else own)
    assert objects(*place, "--layer", "1", "--price", "-k", "4") == rows
    assert objects(*place, "--fact", "Bo", "--layer", "1", "--price")[0]["fact"] == 3
    passed = kscli("risk", *place, "--layer", "1", "--price", "--fail-above", "1.0001")
    assert passed.exit_code == 3
    assert "to protect all other facts, by edit" in passed.stdout


def test_all_layers_are_compared(place: tuple[str, Path]) -> None:
    assert objects(*place, "--layers", "all") == objects(*place, "--by-layer")
    said = kscli("risk", *place, "--layers", "all").stdout
    assert "Edit layer " in said
    assert "chosen" in said


@pytest.mark.parametrize(("token", "reaches"), [("last", True), ("subject-first", False)])
def test_whether_the_last_layer_reaches_depends_on_the_keys(
    tmp_path: Path, token: str, reaches: bool
) -> None:
    path = write_pmatrix(tmp_path / "p.h5", [*FACTS, Fact("In {}", "Oslo", "x")], token=token)
    with PMatrixFile(path) as file:
        assert layer_rows(file, (2,), [6])[0]["reaches"] is reaches
        assert layer_rows(file, (1,), [6])[0]["reaches"]


@pytest.mark.parametrize("order", ["given", "random", "norm"])
@pytest.mark.parametrize("edited", [[3], [6, 0, 2, 5], list(range(M))])
def test_a_sequence_against_loops(pm: PMatrixFile, edited: list[int], order: Any) -> None:
    P, leverage = pm.matrix("P", 2), pm.leverage(2)
    risk = sequence_risk(pm, 2, edited, order, seed=3)
    rows = {row["fact"]: row for row in sequence_rows(pm, risk)}
    assert sorted(rows) == list(range(M))
    totals = {}
    for which in (order, "norm"):
        sequence = edit_order(which, leverage, edited, 3)
        end = "_norm" if which == "norm" else ""
        totals[end] = 0.0
        for j in range(M):
            own = sequence.index(j) + 1 if j in sequence else 0
            moves = [P[i, j] for i in sequence[own:] if j in others(pm, i)]
            for name, expected in (
                (f"expected{end}", math.sqrt(sum(p * p for p in moves))),
                (f"worst{end}", sum(abs(p) for p in moves)),
            ):
                assert rows[j][name] == pytest.approx(expected)
            assert rows[j][f"edit{end}"] == (own or None)
            assert rows[j]["state"] == ("edited" if own else "original")
            totals[end] += sum(p * p for p in moves) if own else 0.0
            if which == order and moves:
                most = max(
                    (i for i in sequence[own:] if j in others(pm, i)), key=lambda i: abs(P[i, j])
                )
                assert rows[j]["p_i"] == pytest.approx(P[most, j])
                assert rows[j]["subject_i"] == pm.facts[most].subject
            elif which == order:
                assert rows[j]["i"] is None
        if which != "norm":
            assert risk.sequence == tuple(sequence)
    assert risk.interference_norm == pytest.approx(totals["_norm"])
    assert risk.interference == pytest.approx(totals["" if order != "norm" else "_norm"])
    assert risk.saved == pytest.approx(
        1 - risk.interference_norm / risk.interference if risk.interference else 0
    )
    assert risk.saved >= 0
    assert risk.largest == max(row["expected"] for row in rows.values())


def test_a_sequence_lists_originals_first_and_the_most_damaged(pm: PMatrixFile) -> None:
    risk = sequence_risk(pm, 0, [8, 3, 1, 4])
    rows = sequence_rows(pm, risk, k=3)
    assert [(row["state"], row["rank"]) for row in rows] == [
        *(("original", rank) for rank in (1, 2, 3)),
        *(("edited", rank) for rank in (1, 2, 3)),
    ]
    every = sequence_rows(pm, risk)
    for state in ("original", "edited"):
        all_of_state = [row["expected"] for row in every if row["state"] == state]
        assert all_of_state == sorted(all_of_state, reverse=True)
        assert [row["expected"] for row in rows if row["state"] == state] == all_of_state[:3]


def test_the_shifts_are_what_random_deltas_give(pm: PMatrixFile) -> None:
    """`expected` is the root mean square of |sum p delta| over independent delta of length 1."""
    P = pm.matrix("P", 0)
    risk = sequence_risk(pm, 0, [8, 3, 1])
    deltas = np.random.default_rng(0).standard_normal((4000, 3, 30))
    deltas /= np.linalg.norm(deltas, axis=-1, keepdims=True)
    Delta = np.einsum("ij,nid->njd", P[[8, 3, 1]], deltas)
    rms = np.sqrt(np.square(np.linalg.norm(Delta, axis=-1)).mean(axis=0))
    for j in (0, 2, 4, 6):
        assert rms[j] == pytest.approx(risk.shifts.expected[j], rel=0.03)
        assert np.linalg.norm(Delta, axis=-1).max(axis=0)[j] <= risk.shifts.worst[j]


# The command


def objects(*arguments: str | Path) -> list[dict[str, Any]]:
    done = kscli("risk", *arguments, "-f", "json", "-q")
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_one_fact_as_objects(place: tuple[str, Path], pm: PMatrixFile) -> None:
    rows = objects(*place, "--fact", "Bo", "--layer", "-1", "-k", "4")
    expected = moved_rows(pm, 2, [3], 4)
    least = least_layer(layer_rows(pm, LAYERS, [3]))
    assert rows == [{**row, "least_layer": least} for row in expected]
    assert len(objects(*place, "--fact", "3", "-k", "all")) == M - 1


def test_a_subject_stands_for_all_its_facts_and_goes_before_an_index(
    place: tuple[str, Path],
) -> None:
    rows = objects(*place, "--fact", "Ann", "-k", "2")
    assert [row["i"] for row in rows] == [1, 1, 2, 2, 7, 7]
    assert {row["i"] for row in objects(*place, "--fact", "7")} == {8}
    both = objects(*place, "--fact", "Bo", "--fact", "4", "--layers", "0,2", "-k", "1")
    assert [(row["layer"], row["i"]) for row in both] == [(0, 3), (0, 4), (2, 3), (2, 4)]


def test_a_subject_that_is_not_there_names_near_ones(place: tuple[str, Path]) -> None:
    failed = kscli("risk", *place, "--fact", "Cy, the third")
    assert failed.exit_code == 2
    assert "'Cy, the second'" in one_sentence(failed.stderr)
    failed = kscli("risk", *place, "--fact", "99")
    assert failed.exit_code == 2
    assert "0 to 8" in one_sentence(failed.stderr)


def test_layers_as_objects(place: tuple[str, Path], pm: PMatrixFile) -> None:
    for edited, layers, options in (
        ([3], LAYERS, ("--fact", "Bo")),
        (list(range(M)), (1,), ("--layers", "1")),
    ):
        rows = objects(*place, *options, "--by-layer")
        prices = [[row.pop(name) for name in ("price", "price_largest")] for row in rows]
        assert rows == layer_rows(pm, layers, edited)
        for found, layer in zip(prices, layers, strict=True):
            of_edits = protection_prices(pm, layer, edited)
            assert found == [np.median(of_edits), of_edits.max()]


def test_the_price_of_protecting_all_others_at_their_subjects(pm: PMatrixFile) -> None:
    """G_ee (G^-1)_ee, which is 1 / (1 - R^2) of the regression of a key on all others."""
    once = [0, 1, 2, 3, 4, 6, 8]  # 0 and 5 are one text, and so are 2 and 7
    for layer in LAYERS:
        G = (pm.matrix("P", layer) * pm.leverage(layer)[:, None])[np.ix_(once, once)]
        expected = np.diagonal(G) * np.diagonal(np.linalg.inv(G))
        assert (expected >= 1).all()
        assert expected.max() > 1.01
        found = protection_prices(pm, layer, [*once, 5, 7])
        np.testing.assert_allclose(found[:7], expected, rtol=1e-4)
        np.testing.assert_allclose(found[7:], expected[[0, 2]], rtol=1e-4)


def test_a_sequence_as_objects(place: tuple[str, Path], pm: PMatrixFile) -> None:
    everything = objects(*place, "-k", "all")
    assert everything == sequence_rows(pm, sequence_risk(pm, 0, list(range(M))))
    assert {row["state"] for row in everything} == {"edited"}
    named = objects(
        *place, "--fact", "Bo", "--fact", "4", "--sequence", "--order", "norm", "-k", "3"
    )
    assert named == sequence_rows(pm, sequence_risk(pm, 0, [3, 4], "norm"), 3)
    drawn = objects(*place, "--edits", "4", "--seed", "5", "-k", "all")
    edited = sorted(row["fact"] for row in drawn if row["state"] == "edited")
    assert edited == choose_facts(pm.facts, 4, 5, pm.path)
    two = kscli("risk", *place, "--edits", "4", "--layers", "0,1", "-k", "1", "-f", "csv", "-q")
    read = list(csv.DictReader(io.StringIO(two.stdout)))
    assert [(row["layer"], row["state"]) for row in read] == [
        *(("0", state) for state in ("original", "edited")),
        *(("1", state) for state in ("original", "edited")),
    ]


def test_the_layer_that_does_least_is_said_once(place: tuple[str, Path]) -> None:
    rows = [row for row in objects(*place, "--fact", "2", "--by-layer") if row["reaches"]]
    by_rms = sorted(rows, key=lambda row: row["rms"])
    least, most = by_rms[0]["layer"], by_rms[-1]["layer"]
    said = f"Of the layers, {least} would do the least to the others: rms p"
    here = kscli("risk", *place, "--fact", "2", "--layer", str(least)).stdout
    assert said in " ".join(here.split())
    assert "it is" not in here
    there = " ".join(kscli("risk", *place, "--fact", "2", "--layer", str(most)).stdout.split())
    assert f"it is {by_rms[-1]['rms']:.3f} at layer {most}." in there


def test_tables_for_people(place: tuple[str, Path]) -> None:
    one = kscli("risk", *place, "--fact", "Bo")
    assert "[Bo] lives in [t3]." in one.stdout
    assert "would do the least" in one.stdout
    assert "2 of the 9 facts" in one.stderr
    layers = kscli("risk", *place, "--fact", "Bo", "--by-layer").stdout
    assert "cannot reach the answer" in layers
    assert "least" in layers
    without_paraphrases = ("--fact", "2", "--by-layer")
    rows = [row for row in objects(*place, *without_paraphrases) if row["reaches"]]
    least = min(rows, key=lambda row: row["rms"])["layer"]
    layers = kscli("risk", *place, *without_paraphrases).stdout
    assert f"An edit of layer {least} moves other facts least." in " ".join(layers.split())
    some = kscli("risk", *place, "--edits", "4").stdout
    assert "What 4 edits do to facts that are not edited" in some
    assert "What the later of 4 edits do to the earlier" in some
    assert "% less, the least there is." in some
    norm = kscli("risk", *place, "--edits", "4", "--order", "norm").stdout
    assert "edit, by norm" in some
    assert "edit, by norm" not in norm
    assert "the least there is" in norm
    single = kscli("risk", *place, "--fact", "Bo", "--sequence").stdout
    assert "What one edit does" in single
    assert "less" not in single
    for output_format in ("markdown", "latex"):
        for arguments in ((), ("--fact", "Bo"), ("--by-layer",)):
            done = kscli("risk", *place, *arguments, "-f", output_format)
            assert done.exit_code == 0
            assert "would do the least" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        (("--fact", "Bo", "-k", "1", "--layers", "0,1"), "p"),
        (("--fact", "Bo", "--by-layer"), "layers"),
        (("--edits", "4", "-k", "1", "--layer", "1"), "sequence"),
    ],
)
def test_fail_above_says_so_with_3(
    place: tuple[str, Path], pm: PMatrixFile, arguments: tuple[str, ...], largest: str
) -> None:
    four = choose_facts(pm.facts, 4, 0, pm.path)
    value = {
        "p": max(abs(pm.matrix("P", layer)[3, j]) for layer in (0, 1) for j in others(pm, 3)),
        "layers": max(abs(pm.matrix("P", layer)[3, j]) for layer in LAYERS for j in others(pm, 3)),
        "sequence": max(sequence_risk(pm, 1, four).shifts.expected),
    }[largest]
    below = kscli("risk", *place, *arguments, "--fail-above", f"{value - 1e-6}", "-f", "json")
    assert below.exit_code == 3
    assert json.loads(below.stdout)
    assert "passes --fail-above" in below.stderr
    above = kscli("risk", *place, *arguments, "--fail-above", f"{value + 1e-6}", "-f", "json")
    assert above.exit_code == 0


def test_one_fact_alone(tmp_path: Path) -> None:
    path = write_pmatrix(tmp_path / "one.h5", [Fact("{} is", "Bo", "x")])
    assert objects("--pmatrix", path, "--fact", "Bo") == []
    [row] = objects("--pmatrix", path)
    assert (row["state"], row["expected"], row["worst"], row["i"]) == ("edited", 0, 0, None)
    layers = objects("--pmatrix", path, "--by-layer")
    assert [(row["rms"], row["largest"], row["j"], row["least"]) for row in layers] == [
        (None, None, None, False)
    ] * 3
    for arguments in ((), ("--fact", "0"), ("--by-layer",)):
        done = kscli("risk", "--pmatrix", path, *arguments, "--fail-above", "0")
        assert done.exit_code == 0
        assert "no other fact" in done.stderr
    copies = [Fact("{} is", "Bo", "x")] * 3
    path = write_pmatrix(tmp_path / "copies.h5", copies)
    assert objects("--pmatrix", path, "--fact", "Bo") == []
    assert [row["expected"] for row in objects("--pmatrix", path)] == [0, 0, 0]


def test_wrong_requests(place: tuple[str, Path], tmp_path: Path) -> None:
    for arguments, code, said in (
        (("--by-layer", "--sequence"), 2, "ask for one"),
        (("--price", "--sequence"), 2, "ask for one"),
        (("--edits", "10"), 2, "holds 9 facts"),
        (("--edits", "0"), 2, "positive number"),
        (("-k", "some"), 2, "positive number"),
        (("--layer", "7"), 2, "7"),
    ):
        failed = kscli("risk", *place, *arguments)
        assert failed.exit_code == code, failed.stderr
        assert said in one_sentence(failed.stderr)
    missing = kscli("risk", "-m", "none", "--dir", tmp_path)
    assert missing.exit_code == 1
    assert "kscli run --model" in one_sentence(missing.stderr)


def test_the_models_own_artifacts_are_read_without_torch(tmp_path: Path) -> None:
    write_toy(tmp_path)
    script = (
        "import sys; from kscli.cli.app import app; from typer.testing import CliRunner;"
        f"arguments = ['risk', '-m', 'toy', '--dir', {str(tmp_path)!r}, '-k', '2'];"
        "done = CliRunner().invoke(app, arguments);"
        "assert done.exit_code == 0, done.output; print(done.stdout);"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Größe" in done.stdout


def test_relations_of_facts_do_not_matter(tmp_path: Path) -> None:
    """Facts are one where their texts are: targets and relations may differ."""
    facts = [replace(fact, target=f"other {at}") for at, fact in enumerate([FACTS[0]] * 2)]
    path = write_pmatrix(tmp_path / "p.h5", [*facts, FACTS[1]])
    assert [row["j"] for row in objects("--pmatrix", path, "--fact", "0")] == [2]


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (("--fact", "Bo", "--order", "norm"), "--order"),
        (("--fact", "Bo", "--seed", "4"), "--seed"),
        (("--fact", "Bo", "--edits", "4"), "--edits"),
        (("--by-layer", "--order", "norm"), "--order"),
    ],
)
def test_options_without_effect(
    place: tuple[str, Path], options: tuple[str, ...], idle: str
) -> None:
    found = kscli("risk", *place, *options)
    assert found.exit_code == 2
    assert f"{idle} has no effect" in one_sentence(found.stderr)
