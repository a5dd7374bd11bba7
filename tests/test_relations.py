"""p by relation against loops over all pairs, and its null against all permutations there are."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from artifact_kit import LAYERS, Contents, changed, write_toy
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray
from typer.testing import Result

from kscli.analysis.relations import (
    ACROSS,
    TESTED,
    WITHIN,
    Permutations,
    RelationStatistics,
    find_relations,
    relation_matrix,
    relation_statistics,
    text_before,
)
from kscli.artifacts import MatrixName
from kscli.cli.relations import SHOWN_LAYERS
from kscli.errors import FactsError, UsageError
from kscli.facts import Fact
from kscli.layers import spread
from kscli.tables import relation_columns
from kscli.wikidata import titled

FEW = Permutations(20)


@dataclass
class Stored:
    """A pmatrix file in memory."""

    facts: tuple[Fact, ...]
    token_id: NDArray[np.int64]
    matrices: dict[int, NDArray[np.float64]]
    model: str = "toy"
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = tuple(sorted(self.matrices))

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        assert name == "P"
        return self.matrices[layer]


TEXTS = ("", "  ", "The ", "The capital of ", "In ")
RELATIONS = ("P17", "P103", "P9", "mother tongue", "", " ", "P1", "P1")


def random_store(m: int = 40, seed: int = 0, layers: tuple[int, ...] = (0, 3)) -> Stored:
    """Random facts and P, signed, beyond 1, not symmetric; some facts have no relation."""
    rng = np.random.default_rng(seed)
    facts = tuple(
        Fact(
            f"{TEXTS[rng.integers(len(TEXTS))]}{{}} is",
            f"subject {i}",
            "x",
            "lonely" if i < 2 else RELATIONS[rng.integers(len(RELATIONS))],
        )
        for i in range(m)
    )
    matrices = {layer: 2 * rng.standard_normal((m, m)) for layer in layers}
    for P in matrices.values():
        np.fill_diagonal(P, 1)
    return Stored(facts, rng.integers(0, 8, m), matrices)


def store(relations: list[str], P: NDArray[np.float64], prompts: list[str] | None = None) -> Stored:
    prompts = prompts or ["{} is"] * len(relations)
    facts = tuple(
        Fact(prompt, f"s{i}", "t", relation)
        for i, (prompt, relation) in enumerate(zip(prompts, relations, strict=True))
    )
    return Stored(facts, np.arange(len(facts)), {0: P})


def is_of(pm: Stored, kind: str, i: int, j: int) -> bool:
    """Whether an ordered pair of facts counts for a kind of mean."""
    a, b = pm.facts[i], pm.facts[j]
    if i == j or pm.token_id[i] == pm.token_id[j]:
        return False
    if not a.relation.strip() or not b.relation.strip():
        return False
    before_a, before_b = a.prompt.split("{}")[0].strip(), b.prompt.split("{}")[0].strip()
    same_text = before_a == before_b != ""
    if kind.endswith("same_text") and not same_text:
        return False
    if kind.endswith("other_text") and same_text:
        return False
    return (a.relation == b.relation) is kind.startswith("within")


def naive(pm: Stored, kind: str, layer: int, names: list[str]) -> tuple[list[float], list[int]]:
    """The mean |p| and the pairs of each relation, and of all together."""
    m = len(pm.facts)
    means, counts = [], []
    for name in [*names, None]:
        values = []
        for i in range(m):
            for j in range(m):
                pair = {pm.facts[i].relation, pm.facts[j].relation}
                if name is None:
                    wanted = pair <= set(names) if kind.startswith("within") else True
                else:
                    wanted = name in pair
                if wanted and is_of(pm, kind, i, j):
                    values.append(abs(pm.matrices[layer][i, j]))
        means.append(sum(values) / len(values) if values else math.nan)
        counts.append(len(values))
    return means, counts


@pytest.mark.parametrize("m", [40, 90])
@pytest.mark.parametrize("kind", WITHIN + ACROSS)
def test_every_mean_is_over_its_pairs(kind: str, m: int) -> None:
    pm = random_store(m, seed=m)
    result = relation_statistics(pm, pm.layers, FEW)
    names = [relation.name for relation in result.relations]
    assert "P1" in names
    assert not {"lonely", "", " "} & set(names)
    for at, layer in enumerate(pm.layers):
        means, counts = naive(pm, kind, layer, names)
        np.testing.assert_allclose(result.means[kind][at], means, rtol=1e-12)
        assert result.pairs[kind].tolist() == counts


def test_relations_are_those_of_three_facts_in_the_order_of_their_numbers() -> None:
    relations = ["P103"] * 3 + ["P9"] * 4 + ["P17"] * 3 + ["P2"] * 2 + ["a"] * 3 + [""] * 5
    pm = store(relations, np.eye(20))
    found = find_relations(pm)
    assert [relation.name for relation in found] == ["P9", "P17", "P103", "a"]
    assert found[0].facts == (3, 4, 5, 6)


def test_the_example_is_the_commonest_prompt() -> None:
    prompts = ["{} speaks", "The tongue of {} is", "The tongue of {} is"]
    (relation,) = find_relations(store(["P103"] * 3, np.eye(3), prompts))
    assert relation.example == "The tongue of {} is"


def test_text_before_is_what_stands_before_the_slot() -> None:
    assert text_before(Fact("In {}, they speak", "Rome", "x")) == "In "
    assert text_before(Fact("{}, they speak", "Rome", "x")) == ""


@pytest.mark.parametrize("layer", [0, 3])
def test_the_matrix_of_relations_is_over_its_pairs(layer: int) -> None:
    pm = random_store(60)
    relations = find_relations(pm)
    expected = np.full((len(relations), len(relations)), np.nan)
    for a, one in enumerate(relations):
        for b, other in enumerate(relations):
            values = [
                abs(pm.matrices[layer][i, j])
                for i in one.facts
                for j in other.facts
                if is_of(pm, "within_other_text" if a == b else "across_other_text", i, j)
            ]
            if values:
                expected[a, b] = sum(values) / len(values)
    np.testing.assert_allclose(relation_matrix(pm, layer), expected, rtol=1e-12)
    assert not np.allclose(expected, expected.T)


def test_pairs_at_one_token_change_nothing() -> None:
    pm = random_store()
    before = relation_statistics(pm, pm.layers, FEW)
    matrix = relation_matrix(pm, 0)
    same = pm.token_id[:, None] == pm.token_id
    for P in pm.matrices.values():
        P[same] = 1e9
    after = relation_statistics(pm, pm.layers, FEW)
    for kind in WITHIN + ACROSS:
        np.testing.assert_array_equal(after.means[kind], before.means[kind])
    for kind in TESTED:
        np.testing.assert_array_equal(after.null_95[kind], before.null_95[kind])
        np.testing.assert_array_equal(after.p_value[kind], before.p_value[kind])
    np.testing.assert_array_equal(relation_matrix(pm, 0), matrix)


def every_null(pm: Stored, kind: str, names: list[str]) -> NDArray[np.float64]:
    """The mean of each relation, and of all, for every way of dealing out the relations."""
    related = [i for i, fact in enumerate(pm.facts) if fact.relation.strip()]
    dealt = set(itertools.permutations([pm.facts[i].relation for i in related]))
    found = []
    for labels in dealt:
        facts = list(pm.facts)
        for i, label in zip(related, labels, strict=True):
            facts[i] = Fact(facts[i].prompt, facts[i].subject, "x", label)
        found.append(naive(Stored(tuple(facts), pm.token_id, pm.matrices), kind, 0, names)[0])
    return np.array(found)


@pytest.mark.parametrize("kind", TESTED)
def test_the_null_is_all_ways_of_dealing_out_the_relations(kind: str) -> None:
    """4,000 random permutations against all 280 assignments of 3, 4 and 1 labels to 8 facts."""
    rng = np.random.default_rng(5)
    relations = ["A", "A", "A", "B", "B", "B", "B", "lonely", ""]
    prompts = ["{} is", "The {} is", "The {} is"] * 3
    pm = store(relations, rng.exponential(size=(9, 9)), prompts)
    pm.token_id[4] = pm.token_id[0]
    pm.matrices[0][:3, :3] += 0.6
    names = ["A", "B"]
    observed = naive(pm, kind, 0, names)[0]
    result = relation_statistics(pm, (0,), Permutations(4000, seed=1))
    null = every_null(pm, kind, names)
    assert len(null) == 280
    for column in range(3):
        values = null[:, column]
        values = values[np.isfinite(values)]
        exact = float(np.mean(values >= observed[column] * (1 - 1e-12)))
        error = 4 * math.sqrt(exact * (1 - exact) / 4000) + 1e-3
        assert result.p_value[kind][0, column] == pytest.approx(exact, abs=error)
        low, high = np.quantile(values, [0.93, 0.97])
        assert low <= result.null_95[kind][0, column] <= high


def test_p_values_are_uniform_where_relations_mean_nothing() -> None:
    rng = np.random.default_rng(11)
    relations = ["A"] * 5 + ["B"] * 6 + ["C"] * 7
    values = []
    for _ in range(200):
        pm = store(relations, rng.standard_normal((18, 18)))
        result = relation_statistics(pm, (0,), Permutations(99))
        values += result.p_value["within"][0].tolist()
    assert 0.02 < np.mean(np.array(values) <= 0.05) < 0.09
    assert 0.45 < np.mean(values) < 0.55


def test_a_relation_that_binds_is_found_and_named() -> None:
    rng = np.random.default_rng(2)
    relations = ["A"] * 6 + ["B"] * 6 + ["C"] * 6
    P = 0.1 * rng.standard_normal((18, 18))
    P[6:12, 6:12] -= 0.7
    result = relation_statistics(store(relations, P), (0,), Permutations(999))
    assert result.p_value["within"][0, 1] == pytest.approx(0.001)
    assert result.means["within"][0, 1] > 2 * result.null_95["within"][0, 1]
    assert result.p_value["within"][0, 0] > 0.05


def test_a_template_does_not_pass_for_a_relation() -> None:
    """p is large where the text before is the same; A's facts all have it, B's do not."""
    rng = np.random.default_rng(3)
    relations = ["A"] * 8 + ["B"] * 8
    prompts = ["The tongue of {} is"] * 6 + ["{} speaks"] * 10
    P = 0.1 * rng.standard_normal((16, 16))
    P[:6, :6] += 0.8
    result = relation_statistics(store(relations, P, prompts), (0,))
    assert result.p_value["within"][0, 0] < 0.01
    assert result.p_value["within_other_text"][0, 0] > 0.05
    assert result.means["within_same_text"][0, 0] > 0.6
    assert result.means["within_other_text"][0, 0] < 0.2


def same(a: RelationStatistics, b: RelationStatistics) -> bool:
    return all(
        np.array_equal(getattr(a, name)[kind], getattr(b, name)[kind], equal_nan=True)
        for name in ("null_95", "p_value")
        for kind in TESTED
    )


def test_the_seed_decides_and_layers_share_the_permutations() -> None:
    pm = random_store()
    one = relation_statistics(pm, (0,), Permutations(50, seed=4))
    assert same(one, relation_statistics(pm, (0,), Permutations(50, seed=4)))
    assert not same(one, relation_statistics(pm, (0,), Permutations(50, seed=5)))
    twice = relation_statistics(pm, (3, 0), Permutations(50, seed=4))
    np.testing.assert_array_equal(twice.p_value["within"][1], one.p_value["within"][0])


@pytest.mark.parametrize("m", [1, 2, 3])
def test_facts_without_a_relation_are_refused_in_a_sentence(m: int) -> None:
    with pytest.raises(FactsError, match="facts of toy have no relation; give"):
        relation_statistics(store([" "] * m, np.eye(m)), (0,))


@pytest.mark.parametrize("m", [1, 2])
def test_too_few_facts_of_a_relation_are_refused(m: int) -> None:
    with pytest.raises(FactsError, match=rf"largest, P1, has {m}\); extract more facts"):
        relation_statistics(store(["P1"] * m, np.eye(m)), (0,))


def test_three_facts_of_one_relation_have_no_across_and_no_surprise() -> None:
    P = np.random.default_rng(0).standard_normal((3, 3))
    result = relation_statistics(store(["P1"] * 3, P), (0,), FEW)
    off = np.abs(P[~np.eye(3, dtype=bool)])
    np.testing.assert_allclose(result.means["within"][0], off.mean())
    assert np.isnan(result.means["across"]).all()
    np.testing.assert_array_equal(result.p_value["within"], 1.0)
    assert relation_matrix(store(["P1"] * 3, P), 0) == pytest.approx(off.mean())


def test_relations_whose_facts_share_a_token_are_refused() -> None:
    pm = store(["P1"] * 3 + ["P2"] * 3, np.eye(6))
    pm.token_id[:] = [4, 4, 4, 5, 5, 5]
    with pytest.raises(FactsError, match="end in the same token"):
        relation_statistics(pm, (0,))
    pm.token_id[5] = 6
    assert relation_statistics(pm, (0,), FEW).pairs["within"].tolist() == [0, 4, 4]


def test_a_fact_word_for_word_repeated_is_no_pair() -> None:
    rng = np.random.default_rng(0)
    P = rng.standard_normal((5, 5))
    P[0, 1] = P[1, 0] = 1
    pm = store(["P1"] * 5, P)
    pm.facts = (pm.facts[1], *pm.facts[1:])
    pm.token_id[0] = pm.token_id[1]
    result = relation_statistics(pm, (0,), FEW)
    assert result.pairs["within"][0] == 18


@pytest.mark.filterwarnings("error")
def test_what_is_undefined_is_nan_without_a_warning() -> None:
    """One text before every subject: nothing is left of pairs with other text."""
    rng = np.random.default_rng(0)
    pm = store(["P1"] * 3 + ["P2"] * 4, rng.standard_normal((7, 7)), ["The {} is"] * 7)
    result = relation_statistics(pm, (0,), FEW)
    assert np.isfinite(result.means["within_same_text"]).all()
    for values in (result.means, result.null_95, result.p_value):
        assert np.isnan(values["within_other_text"]).all()
    assert np.isnan(relation_matrix(pm, 0)).all()


def test_no_permutation_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="0 permutations"):
        relation_statistics(random_store(), (0,), Permutations(0))


def test_rows_are_flat_and_plain() -> None:
    pm = random_store()
    result = relation_statistics(pm, pm.layers, FEW)
    rows = result.rows()
    width = len(result.relations) + 1
    assert len(rows) == 2 * width
    assert [row["layer"] for row in rows] == [0] * width + [3] * width
    assert rows[width - 1]["relation"] is None
    assert rows[width - 1]["facts"] == sum(len(r.facts) for r in result.relations)
    assert rows[0]["within"] == result.means["within"][0, 0]
    assert rows[width]["null_95_within"] == result.null_95["within"][1, 0]
    plain = {int, float, str, type(None)}
    assert all(type(value) in plain for row in rows for value in row.values())


# The command line.


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Artifacts of the model `toy`: six facts of two relations, each of a text of its own."""
    write_toy(tmp_path)
    change(tmp_path, lambda file: rename(file, ["P1"] * 3 + ["P2"] * 3))
    return tmp_path


def change(folder: Path, how: Callable[[Contents], None]) -> None:
    with changed(folder / "toy" / "pmatrix.h5") as file:
        how(file)


def rename(file: Contents, relations: list[str]) -> None:
    file["facts/relation"][...] = relations
    file["facts/prompt"][...] = [f"{i} {{}} is" for i in range(len(relations))]


def run(folder: Path, *arguments: str) -> Result:
    return kscli("relations", "-m", "toy", "--dir", folder, "--permutations", "50", *arguments)


def test_the_command_gives_machines_every_record(toy: Path) -> None:
    result = run(toy, "-f", "json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert [(row["layer"], row["relation"]) for row in rows] == [
        (layer, name) for layer in LAYERS for name in ("P1", "P2", None)
    ]
    assert rows[0]["within_same_text"] is None
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        P = np.abs(file["P"][0])
    # Facts 0 and 1 end in one token.
    assert rows[0]["within"] == pytest.approx((P[:2, 2].sum() + P[2, :2].sum()) / 4)
    read = list(csv.DictReader(io.StringIO(run(toy, "-f", "csv").stdout)))
    assert [row["relation"] for row in read] == ["P1", "P2", ""] * 3
    assert float(read[1]["within"]) == rows[1]["within"]
    assert {row["layer"] for row in json.loads(run(toy, "-f", "json", "--layers", "1").stdout)} == {
        1
    }


@pytest.mark.parametrize("output", ["table", "markdown", "latex"])
def test_the_command_gives_people_two_tables(toy: Path, output: str) -> None:
    result = run(toy, "-f", output)
    assert result.exit_code == 0, result.stderr
    mean = json.loads(run(toy, "-f", "json").stdout)[2]["across"]
    assert f"{mean:.3f}" in result.stdout
    assert "hardest at" in result.stdout
    assert "P2" in result.stdout


def test_several_models_are_told_apart(toy: Path) -> None:
    path = toy / "toy" / "pmatrix.h5"
    result = kscli(
        "relations", "--pmatrix", path, "--pmatrix", path, "--permutations", "9", "--layers", "0"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("hardest at") == 2


def test_many_layers_are_shown_from_over_the_depth() -> None:
    pm = random_store(60, layers=tuple(range(30)))
    found = relation_statistics(pm, pm.layers, FEW)
    rows = found.rows()
    columns = relation_columns(spread(found.layers, SHOWN_LAYERS))
    shown = [c.title.removeprefix("layer ") for c in columns if c.title[-1].isdigit()]
    assert shown == ["0", "4", "8", "12", "17", "21", "25", "29"]
    first = found.by_relation()[0]
    own = [row for row in rows if row["relation"] == first["relation"]]
    assert first["largest"] == max(row["within_other_text"] for row in own)
    assert own[first["hardest_at"]]["within_other_text"] == first["largest"]


def test_the_hardest_of_a_layer_are_above_the_null() -> None:
    rng = np.random.default_rng(2)
    P = 0.1 * rng.standard_normal((12, 12))
    P[4:8, 4:8] += 0.5
    pm = store(["A"] * 4 + ["B"] * 4 + ["C"] * 4, P)
    (row,) = relation_statistics(pm, (0,)).by_layer()
    assert row["hardest"].startswith("B 0.")
    assert "," not in row["hardest"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda file: rename(file, [""] * 6), "have no relation"),
        (lambda file: rename(file, list("abcdef")), "has 3 facts"),
        (lambda file: file["token_id"].__setitem__(..., 3), "end in the same token"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(
    toy: Path, how: Callable[[Contents], None], said: str
) -> None:
    change(toy, how)
    result = run(toy)
    assert result.exit_code == 1
    assert said in " ".join(one_sentence(result.stderr).split())
    assert result.stdout == ""


def test_in_markdown_a_head_parts_the_tables(toy: Path) -> None:
    lines = run(toy, "-f", "markdown").stdout.splitlines()
    rules = [at for at, line in enumerate(lines) if line.startswith("|---")]
    assert len(rules) == 2
    blank, head, also_blank = lines[rules[1] - 4 : rules[1] - 1]
    assert blank == also_blank == ""
    assert head.startswith(r"Mean \|p\| within each relation of toy")


# The figure.


def drawn(*stored: Stored) -> object:
    pytest.importorskip("matplotlib")
    from kscli.figures import KINDS, Source
    from kscli.figures.saving import render

    fig = KINDS["relations"].draw([Source(pm, pm.layers) for pm in stored])
    assert render(fig, "pdf").startswith(b"%PDF")
    return fig


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [(0,), (0, 3), (0, 1, 2, 3), tuple(range(7))])
def test_the_figure_has_a_panel_a_layer_and_names_the_relations(layers: tuple[int, ...]) -> None:
    pm = random_store(60, layers=layers)
    fig = drawn(pm)
    panels = [ax for ax in fig.axes if ax.images]  # type: ignore[attr-defined]
    assert len(panels) == len(layers)
    names = [relation.title for relation in find_relations(pm)]
    columns = 2 if len(layers) == 4 else min(len(layers), 3)
    for at, (ax, layer) in enumerate(zip(panels, layers, strict=True)):
        np.testing.assert_array_equal(ax.images[0].get_array(), relation_matrix(pm, layer))
        # All panels have the same relations, so the outer ones alone name them.
        lowest = at + columns >= len(layers)
        assert shown(ax.xaxis) == (names if lowest else [])
        assert shown(ax.yaxis) == ([] if at % columns else names)
        assert ax.images[0].norm.vmin == 0


def shown(axis: Any) -> list[str]:
    labels = [tick.label1 for tick in axis.get_major_ticks()]
    return [label.get_text() for label in labels if label.get_visible()]


def test_the_figure_of_more_panels_than_a_page_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="a page holds 12 of them, not 13; name fewer"):
        drawn(random_store(60, layers=tuple(range(13))))


@pytest.mark.filterwarnings("error")
def test_the_figure_of_nothing_but_one_text_is_grey() -> None:
    pm = store(["P1"] * 3, np.eye(3), ["The {} is"] * 3)
    fig = drawn(pm, store(["P1"] * 3, np.eye(3)))
    first = next(ax for ax in fig.axes if ax.images)  # type: ignore[attr-defined]
    assert np.ma.getmaskarray(first.images[0].get_array()).all()


def test_wikidatas_relations_have_their_names_beside_their_ids() -> None:
    assert titled("P140") == "religion (P140)"
    assert titled("P1412") == "languages spoken (P1412)"
    assert (titled("P0"), titled("mother tongue"), titled("")) == ("P0", "mother tongue", "")
