"""The report: its HTML as a parser reads it, its numbers by definition, its sentences by data."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from artifact_kit import about_pmatrix, located, write_cov, write_toy
from cli_kit import kscli, one_sentence
from edit_kit import Run
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, PMatrixFile, write_artifact
from kscli.editing.edits_file import EditsFile
from kscli.facts import Fact
from kscli.figures import Source
from kscli.layers import spread
from kscli.report.comparison import scaling
from kscli.report.examined import Examined, examine
from kscli.report.findings import findings
from kscli.report.html import Html, join, tag, void
from kscli.report.opening import PAPER, in_short
from kscli.report.page import ModelFiles, write_report
from kscli.report.pictures import Drawing, picture
from kscli.report.sections import PAIRS
from kscli.report.words import at_layers, listed, number, share

Real = NDArray[np.float64]

EVIL = "<script>alert(1)</script>"
EVIL_MODEL = """a"b' onload="x" <i>&amp;"""
VOID = ("meta", "img")


# What a browser reads


@dataclass
class Table:
    """A table's header texts, and its rows: a cell's text and the number it is sorted by."""

    head: list[str] = field(default_factory=list)
    rows: list[list[tuple[str, str | None]]] = field(default_factory=list)

    def column(self, title: str) -> list[str]:
        return [row[self.head.index(title)][0] for row in self.rows]

    def sorted_by(self, title: str) -> list[float]:
        at = self.head.index(title)
        return [float(row[at][1] or "nan") for row in self.rows]


class Page(HTMLParser):
    """Parses a page; an end tag without its start tag, or the reverse, is an error."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.content = content
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tables: dict[str, Table] = {}
        self.texts: list[str] = []
        self.findings: dict[str, list[str]] = {}
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._table = Table()
        self._topic = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, key, value) for key, value in attrs]
        given = dict(attrs)
        if name in VOID:
            return
        self.open.append(name)
        if name == "table":
            self._table = self.tables[str(given["aria-label"])] = Table()
        elif name == "tr" and "tbody" in self.open:
            self._table.rows.append([])
        elif name in ("td", "th") and "tbody" in self.open:
            self._table.rows[-1].append(("", given.get("data-sort")))

    def handle_endtag(self, name: str) -> None:
        assert self.open, f"</{name}> ends nothing"
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        here = self.open[-1] if self.open else ""
        if here in self.raw:
            self.raw[here].append(data)
            return
        if "svg" in self.open:
            return
        self.texts.append(data)
        if "thead" in self.open and here == "button":
            self._table.head.append(data)
        elif "tbody" in self.open and here in ("td", "th"):
            text, sort = self._table.rows[-1][-1]
            self._table.rows[-1][-1] = (text + data, sort)
        elif here == "dt":
            self._topic = data
        elif here == "p" and "dd" in self.open:
            self.findings.setdefault(self._topic, []).append(data)

    def values(self, attribute: str) -> list[str]:
        return [str(value) for _, name, value in self.attributes if name == attribute]

    def count(self, element: str) -> int:
        return len(re.findall(rf"<{element}\b", self.content))

    def table(self, beginning: str) -> Table:
        (found,) = [one for name, one in self.tables.items() if name.startswith(beginning)]
        return found


# What pages are made of


def some_facts(m: int, relations: Sequence[str] = ("P1", "P2"), subject: str = "") -> list[Fact]:
    return [
        Fact(
            f"{('', 'In ')[i // len(relations) % 2]}{{}} is the place {i % 3} of",
            f"{subject} subject {i}".strip(),
            f"target {i}",
            relations[i % len(relations)],
            i,
        )
        for i in range(m)
    ]


def a_matrix(m: int, seed: int = 0, tail: float = 3.0, shift: float = 0.0) -> Real:
    """A P whose kurtosis is larger for a smaller `tail`, about a mean of `shift`.

    It is symmetric, as P of keys of one leverage is. Its numbers are float32's, as those in a
    file are.
    """
    draw = np.triu(np.random.default_rng(seed).standard_t(tail, (m, m)), 1)
    draw += draw.T
    P = shift + (0.3 + 0.01 * seed) * draw / np.abs(draw).max()
    np.fill_diagonal(P, 1)
    return P.astype(np.float32).astype(np.float64)


def write_p(
    path: Path,
    matrices: Sequence[Real],
    facts: Sequence[Fact] | None = None,
    tokens: Sequence[int] | None = None,
    inputs: dict[str, str] | None = None,
    leverage: Real | None = None,
    details: dict[str, str] | None = None,
    **changes: object,
) -> Path:
    """A pmatrix file of these P, a matrix a layer."""
    m = len(matrices[0])
    known = {"n_layers": len(matrices), "inputs": inputs or {}, "facts_identity": "f"}
    about = about_pmatrix(**(known | (details or {}) | changes))
    with write_artifact(path, "pmatrix", about, force=True) as writer:
        writer.layers(range(len(matrices)))
        writer.facts(located(facts or some_facts(m), tokens))
        for name in ("P", "Q"):
            for at, P in enumerate(matrices):
                held = np.clip(P, -1, 1) if name == "Q" else np.array(P)
                np.fill_diagonal(held, 1.0)
                writer.put(name, at, held)
        for at in range(len(matrices)):
            writer.put("leverage", at, np.ones(m) if leverage is None else leverage)
    return path


def page_of(*files: Path, to: Path, runs: Sequence[Path] = ()) -> Page:
    """A page on files, all of which have the same runs of edits."""
    edits = [EditsFile(run) for run in runs]
    opened = [ModelFiles(PMatrixFile(file), edits) for file in files]
    write_report(opened, to, command="kscli report <again>", force=True)
    return Page(to.read_text(encoding="utf-8"))


def examined(path: Path, seed: int = 0, runs: Sequence[Path] = ()) -> Examined:
    edits = [EditsFile(run) for run in runs]
    return examine(PMatrixFile(path), "model-1", seed, runs=edits)


def said(path: Path, *runs: Path) -> dict[str, str]:
    """The findings on one file, by topic."""
    return {one.topic: " ".join(one.sentences) for one in findings(examined(path, runs=runs))}


M = 24
TOKENS = [0, 0, 0, 1, 1, *range(2, M - 3)]


@pytest.fixture(scope="module")
def matrices() -> list[Real]:
    return [a_matrix(M, seed, tail) for seed, tail in enumerate((2.2, 2.6, 4.0, 8.0, 90.0))]


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory, matrices: list[Real]) -> Page:
    """A page of five layers whose data all try to be markup."""
    folder = tmp_path_factory.mktemp("evil")
    facts = some_facts(M, (f"P1{EVIL}", "P&2"), EVIL)
    file = write_p(
        folder / "pmatrix.h5",
        matrices,
        facts,
        TOKENS,
        model=EVIL_MODEL,
        model_id=EVIL,
        revision='"></td>',
        details={"corpus": f"https://example.org/{EVIL}", "facts_name": "</title>"},
    )
    runs = [
        Run(12, M, layer, model=EVIL_MODEL, target_new=EVIL, facts=tuple(facts)).write(
            folder / "edits" / f"closed-form-{layer}-0.h5"
        )
        for layer in (0, 3)
    ]
    return page_of(file, to=folder / "report.html", runs=runs)


# The page as HTML


def test_elements_are_closed_and_ids_are_unique(evil_page: Page) -> None:
    ids = evil_page.values("id")
    assert len(ids) == len(set(ids)) > 10
    assert {value[1:] for value in evil_page.values("href") if value[0] == "#"} <= set(ids)


def test_nothing_is_loaded_from_elsewhere(evil_page: Page) -> None:
    loaded = evil_page.values("href") + evil_page.values("src")
    # A link to the paper loads nothing by itself.
    assert [name for name, _, value in evil_page.attributes if value == PAPER] == ["a"]
    loaded.remove(PAPER)
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert evil_page.count("link") == evil_page.count("iframe") == evil_page.count("object") == 0
    (style,) = evil_page.raw["style"]
    assert "url(" not in style
    assert "@import" not in style
    in_attributes = [value for _, _, value in evil_page.attributes if value and "//" in value]
    assert [value for value in in_attributes if not value.startswith("data:")] == [PAPER]


def test_the_policy_allows_the_page_its_own_script_only(evil_page: Page) -> None:
    (script,) = evil_page.raw["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for value in evil_page.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "alert" not in script


def test_what_the_data_say_is_text(evil_page: Page) -> None:
    assert evil_page.count("script") == 1
    assert evil_page.count("i") == 0
    assert [name for _, name, _ in evil_page.attributes if name.startswith("on")] == []
    text = "".join(evil_page.texts)
    for shown in (EVIL, EVIL_MODEL, '"></td>', "</title>", f"[{EVIL} subject 0]", "<again>"):
        assert shown in text
    assert f"Knowledge superposition in {EVIL_MODEL}" in evil_page.texts


def test_every_kind_of_figure_is_there(evil_page: Page) -> None:
    drawn = evil_page.count("svg") + evil_page.count("img")
    # Kurtosis, angles, convergence, relations; heatmap and kde of few layers, all, and marked;
    # risk, forgetting, interference. Each but the two marked ones is there in two widths.
    assert drawn == 2 * 11 + 2
    assert evil_page.count("figure") == drawn
    labels = " ".join(evil_page.values("aria-label") + evil_page.values("alt"))
    for kind in (
        "kurtosis",
        "Density",
        "row i is",
        "Angles",
        "more and more facts",
        "Mean |p| from",
        "side by side",
        "keeps of",
        "How far",
    ):
        assert kind in labels


def test_tables_can_be_sorted_with_buttons(evil_page: Page) -> None:
    sortable = [one for one in evil_page.tables.values() if one.head]
    assert len(sortable) >= 7
    for one in sortable:
        assert all(len(row) == len(one.head) for row in one.rows)
    (script,) = evil_page.raw["script"]
    assert "aria-sort" in script


# Its numbers


def off_diagonal(P: Real) -> Real:
    return P[~np.eye(len(P), dtype=bool)]


def test_statistics_are_the_definitions(evil_page: Page, matrices: list[Real]) -> None:
    shown = evil_page.table("Statistics of P")
    assert shown.column("layer") == ["0", "1", "2", "3", "4"]
    entries = [off_diagonal(P) for P in matrices]
    by_definition = {
        "mean": [values.mean() for values in entries],
        "kurtosis": [scipy.stats.kurtosis(values) for values in entries],
        "skewness": [scipy.stats.skew(values) for values in entries],
        "|p|>0.1": [np.mean(np.abs(values) > 0.1) for values in entries],
        "largest p": [values.max() for values in entries],
    }
    for title, values in by_definition.items():
        assert shown.sorted_by(title) == pytest.approx(values, rel=1e-9)
    first = shown.column("kurtosis")[0]
    assert first.startswith(f"{scipy.stats.kurtosis(entries[0]):.1f} [")


def test_same_token_shares_are_counted(evil_page: Page, matrices: list[Real]) -> None:
    pairs = list(itertools.permutations(range(M), 2))
    same = [(i, j) for i, j in pairs if TOKENS[i] == TOKENS[j]]
    shown = evil_page.table("What share of P's entries")
    assert shown.sorted_by("of all pairs") == pytest.approx([len(same) / len(pairs)] * 5)
    tail = [pair for pair in pairs if abs(matrices[0][pair]) > 0.1]
    assert shown.sorted_by("of |p|>0.1")[0] == pytest.approx(
        sum(pair in same for pair in tail) / len(tail)
    )
    others = [matrices[2][pair] for pair in pairs if pair not in same]
    assert shown.sorted_by("different last token")[2] == pytest.approx(scipy.stats.kurtosis(others))


def test_pairs_are_the_largest_entries(evil_page: Page, matrices: list[Real]) -> None:
    P = matrices[0]
    ordered = sorted(itertools.permutations(range(M), 2), key=lambda pair: -P[pair])
    shown = evil_page.table("The pairs of largest p at layer 0")
    assert len(shown.rows) == PAIRS
    assert shown.sorted_by("p") == [P[pair] for pair in ordered[:PAIRS]]
    assert f"[{EVIL} subject {ordered[0][0]}]" in shown.column("edited (i)")[0]
    assert f"[{EVIL} subject {ordered[0][1]}]" in shown.column("moved (j)")[0]
    distinct = evil_page.table("The pairs of largest p, each at the layer")
    best = max(
        (matrices[layer][i, j], layer)
        for layer in range(5)
        for i, j in ordered
        if TOKENS[i] != TOKENS[j]
    )
    assert (distinct.sorted_by("p")[0], distinct.sorted_by("layer")[0]) == best


def test_relations_are_means_over_their_pairs(evil_page: Page, matrices: list[Real]) -> None:
    facts = some_facts(M, ("a", "b"), EVIL)
    before = [fact.prompt.partition("{}")[0].strip() for fact in facts]
    within = [
        abs(matrices[1][i, j])
        for i, j in itertools.permutations(range(M), 2)
        if TOKENS[i] != TOKENS[j]
        and facts[i].relation == facts[j].relation
        and not (before[i] == before[j] != "")
    ]
    shown = evil_page.table("Mean |p| by layer")
    assert shown.sorted_by("within, other text")[1] == pytest.approx(np.mean(within))
    assert len(evil_page.table("Relations, each at the layer").rows) == 2


def test_angles_are_those_of_the_cosines(tmp_path: Path) -> None:
    cosine = np.full((5, 5), 0.5) + 0.5 * np.eye(5)
    file = write_p(tmp_path / "pmatrix.h5", [cosine])
    assert examined(file).modes == (pytest.approx((60.0, 60.0)),)
    assert "60.0° (30.0° from a right angle) in the whitening space" in said(file)["Angles"]


def test_overlaps_are_mean_squared_cosines(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((2, 5, 4))
    keys /= np.linalg.norm(keys, axis=2, keepdims=True)
    file = write_p(tmp_path / "pmatrix.h5", [of_layer @ of_layer.T for of_layer in keys])
    rows = examined(file).overlaps
    assert [row["layer"] for row in rows] == [0, 1]
    sentences = said(file)["Angles"]
    for row, of_layer in zip(rows, keys, strict=True):
        squares = [(a @ b) ** 2 for a, b in itertools.combinations(of_layer, 2)]
        assert row["overlap_whitened"] == pytest.approx(np.mean(squares), rel=1e-5)
        assert row["overlap"] == pytest.approx(np.mean(squares), rel=1e-5)
        assert (row["one_over_d_m"], row["one_over_m"]) == (1 / 12, 1 / 5)
        assert f"layer {row['layer']} is {row['overlap_whitened']:.4f} in the" in sentences


# Its sentences


def test_depth_follows_the_order_of_the_layers(tmp_path: Path, matrices: list[Real]) -> None:
    falling = said(write_p(tmp_path / "a.h5", matrices, tokens=TOKENS))
    rising = said(write_p(tmp_path / "b.h5", matrices[::-1], tokens=TOKENS))
    assert "kurtosis falls with depth: Spearman's correlation of layer" in falling["Depth"]
    assert "kurtosis is −1.00 over 5 layers" in falling["Depth"]
    assert "kurtosis rises with depth" in rising["Depth"]
    assert "1.00 over 5 layers" in rising["Depth"]
    assert "Without the pairs that share the subject's last token it" in rising["Depth"]


def test_depth_without_a_trend(tmp_path: Path, matrices: list[Real]) -> None:
    mixed = [matrices[at] for at in (2, 0, 4, 1, 3)]
    assert "neither falls nor rises" in said(write_p(tmp_path / "a.h5", mixed))["Depth"]
    few = said(write_p(tmp_path / "b.h5", matrices[:4]))
    assert "defined at 4 layers, too few for a trend" in few["Depth"]
    same = said(write_p(tmp_path / "c.h5", [matrices[0]] * 5))
    assert "is the same at all layers" in same["Depth"]


def test_whether_the_mean_is_0_follows_its_interval(tmp_path: Path) -> None:
    around_0 = [a_matrix(M, seed, 30.0) for seed in (1, 2)]
    shifted = [a_matrix(M, seed, 30.0, shift) for seed, shift in ((1, 0.3), (2, -0.3))]
    holds = said(write_p(tmp_path / "a.h5", around_0))["Mean"]
    assert "contains 0 at each of the 2 layers." in holds
    assert "lies" not in holds
    misses = said(write_p(tmp_path / "b.h5", shifted))["Mean"]
    assert "contains 0 at no layer." in misses
    assert "above 0 at layer 0. The interval lies below 0 at layer 1." in misses
    value = off_diagonal(shifted[0]).mean()
    assert f"The mean of p is {value:.3f} (" in misses


def test_what_a_token_does_follows_the_tokens(tmp_path: Path) -> None:
    P = [a_matrix(6)]
    none = said(write_p(tmp_path / "a.h5", P))["Same token"]
    assert none.startswith("No two facts share the subject's last token")
    every = said(write_p(tmp_path / "b.h5", P, tokens=[7] * 6, details={"token": "last"}))
    assert every["Same token"].startswith("All facts share the prompt's last token")
    some = said(write_p(tmp_path / "c.h5", P, tokens=[1, 1, 2, 3, 4, 5]))["Same token"]
    assert "are 6.7 % of all pairs." in some
    assert "undefined for |p| > 0.5, which no entry has" in some


def test_the_largest_p_and_whether_p_goes_beyond_1(tmp_path: Path) -> None:
    P = np.clip(a_matrix(6), -0.2, 0.2)
    P[2, 3] = P[3, 2] = 0.9
    P[4, 1] = P[1, 4] = 0.8
    first = said(write_p(tmp_path / "a.h5", [P], tokens=[0, 1, 2, 2, 4, 5]))
    bond = first["Largest p"]
    assert "The largest p is 0.90 at layer 0" in bond
    assert bond.index("[subject 2]") < bond.index("[subject 3]") < bond.index("both share")
    assert "Among other pairs it is 0.80" in bond
    assert "No edit moves another fact further than its own" in first["Beyond 1"]
    P[2, 3] = P[3, 2] = 1.25  # which takes a key that is longer than that of the edited fact
    leverage = np.array([1.0, 1, 1, 4, 1, 1])
    P /= leverage[:, None]
    second = said(write_p(tmp_path / "b.h5", [P], leverage=leverage))
    assert "the two do not share" in second["Largest p"]
    assert "p is above 1 at layer 0, up to 1.25" in second["Beyond 1"]


def test_relations_that_bind_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    facts = some_facts(M)
    one = np.array([[a.relation == b.relation for b in facts] for a in facts])
    flat = a_matrix(M, tail=30.0)
    bound = np.where(one, 0.5, flat)
    binds = said(write_p(tmp_path / "a.h5", [flat, bound], facts))["Relations"]
    assert "at layer 1." in binds
    assert "Mean |p| is largest within" in binds
    assert "at layer 1: 0.50." in binds
    without = said(write_p(tmp_path / "b.h5", [flat], some_facts(M, ("",))))["Relations"]
    assert "is undefined: the facts of toy have no relation" in without


def test_few_pairs_are_named_where_they_carry_kurtosis(tmp_path: Path) -> None:
    P = np.full((M, M), 0.01)
    P[0, 1], P[1, 0] = 0.9, 0.9
    few = said(write_p(tmp_path / "a.h5", [P]))["Few pairs"]
    assert "'subject 0' with 'subject 1'" in few
    assert few.startswith("At layer 0, ")


def test_tokens_are_known_where_the_covariance_is_beside(tmp_path: Path) -> None:
    write_cov(tmp_path / "cov.h5", count=2400)
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        inputs = {"cov": cov.fingerprint}
    P = [a_matrix(5)]
    assert (
        "2,400 tokens, 200.0 for each of 12"
        in said(write_p(tmp_path / "pmatrix.h5", P, inputs=inputs))["Corpus"]
    )
    assert "Corpus" not in said(write_p(tmp_path / "other.h5", P, inputs={"cov": "another"}))
    write_cov(tmp_path / "cov.h5", count=100)
    with CovarianceFile(tmp_path / "cov.h5") as cov:
        inputs = {"cov": cov.fingerprint}
    few = said(write_p(tmp_path / "pmatrix.h5", P, inputs=inputs))
    assert "a dimension p is noisy" in few["Corpus"]


def test_convergence_is_the_sentence_of_the_figure(tmp_path: Path, matrices: list[Real]) -> None:
    file = write_p(tmp_path / "a.h5", matrices)
    one = examined(file)
    assert said(file)["Number of facts"] == (
        f"Layer 0: {one.convergences[0].sentence} Layer 4: {one.convergences[1].sentence}"
    )


def test_the_page_begins_with_what_p_and_c_are(evil_page: Page) -> None:
    text = " ".join(evil_page.texts)
    p, c, paper, found = (
        text.index(words)
        for words in (
            "p(kᵢ, kⱼ) = kᵢᵀC⁻¹kⱼ / kᵢᵀC⁻¹kᵢ",
            "is the mean of kkᵀ over all tokens",
            "Knowledge in Superposition",
            "The mean of p is",
        )
    )
    assert p < c < paper < found


def test_three_sentences_say_what_was_found(tmp_path: Path, matrices: list[Real]) -> None:
    file = write_p(tmp_path / "a.h5", matrices)
    reach, distribution, consequence = in_short(examined(file))
    rms = [np.sqrt(np.mean(off_diagonal(P) ** 2)) for P in matrices]
    least, most = int(np.argmin(rms)), int(np.argmax(rms))
    assert f"by {share(rms[least])} (layer {least}) to {share(rms[most])} (layer {most})" in reach
    ends = [number(scipy.stats.kurtosis(off_diagonal(matrices[at])), 1) for at in (0, -1)]
    assert f"is {ends[0]} at layer 0 and {ends[1]} at layer 4" in distribution
    largest = max(off_diagonal(P).max() for P in matrices)
    assert f"the largest p of two facts is {largest:.2f}" in distribution
    assert "no run of edits" in consequence
    (alone,) = in_short(examined(write_p(tmp_path / "b.h5", [np.ones((1, 1))])))
    assert alone.startswith("One fact makes no pair")


@pytest.mark.usefixtures("no_pictures")
def test_the_third_sentence_is_of_the_runs(tmp_path: Path, matrices: list[Real]) -> None:
    file = write_p(tmp_path / "a.h5", matrices)
    runs = [Run(12, M, layer) for layer in (0, 1, 2, 3)]
    for changed, run in enumerate(runs):
        run.log.known[:] = True
        run.log.of_pass["answer_changed"][-1][:] = np.arange(M) < 6 * changed
    paths = [run.write(tmp_path / f"{run.layer}.h5") for run in runs]
    one = examined(file, runs=paths)
    kept = [float(run.verification.outcomes.kept or 0) for run in one.runs]
    assert kept[0] == 1 > kept[3]
    sentence = in_short(one)[2]
    assert sentence.startswith("Of 4 runs of edits the gentlest is “layer 0”, after which 100 %")
    assert f"the harshest, “layer 3”, it is {share(kept[3])}." in sentence

    # Only a run most of whose edits took can be called gentle, and ties are said.
    def third(*took: bool) -> str:
        for run, did in zip(runs, took, strict=True):
            for edit in range(12):
                run.log.of_edit["rank_new_after"][edit] = 1 if did else 7
        again = [run.write(tmp_path / f"{run.layer}.h5") for run in runs]
        return in_short(examined(file, runs=again))[2]

    sentence = third(False, True, True, True)
    assert "Of 4 runs of edits, of the 3 most of whose edits took, the gentlest is “layer 1”" in (
        sentence
    )
    assert "In none of 4 runs of edits did most edits take" in third(*[False] * 4)
    runs[1].log.of_pass["answer_changed"][-1][:] = False
    assert "the gentlest is “layer 0” (like 1 other), after which 100 %" in third(*[True] * 4)
    for run in runs:
        run.log.of_pass["answer_changed"][-1][:] = False
    assert third(*[True] * 4).endswith("the known facts that were not edited keep their answer.")
    for changed, run in enumerate(runs):
        run.log.of_pass["answer_changed"][-1][:] = np.arange(M) < 6 * changed
        run.write(tmp_path / f"{run.layer}.h5")
    # Of so many runs the findings say the range, and each run's own sentences stand with it.
    found = said(file, *paths)["Edits"]
    assert found.startswith("4 runs of edits were made;")
    assert "predicted from P" not in found
    page = page_of(file, to=tmp_path / "a.html", runs=paths)
    assert sum("12 edits; the new target" in text for text in page.texts) == 4


@pytest.mark.usefixtures("no_pictures")
def test_the_spectrum_is_that_of_the_files_beside(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    one = examined(place / "pmatrix.h5")
    with CovarianceFile(place / "cov.h5") as cov:
        values = [np.linalg.eigvalsh(cov.second_moment(layer)) for layer in one.layers]
    ratios = [s.sum() ** 2 / (s**2).sum() for s in values]
    assert [row["participation_ratio"] for row in one.spectra] == pytest.approx(ratios, rel=1e-6)
    sentences = said(place / "pmatrix.h5")["Dimensions of C"]
    assert f"participation ratio of {ratios[0]:.1f}" in sentences
    shown = page_of(place / "pmatrix.h5", to=tmp_path / "a.html").table("The dimensions of C")
    assert shown.sorted_by("participation ratio") == pytest.approx(ratios, rel=1e-6)
    (place / "cov.h5").unlink()
    page = page_of(place / "pmatrix.h5", to=tmp_path / "b.html")
    assert "The spectrum of C is not shown: " in " ".join(page.texts)
    assert page.table("The overlap of keys")
    assert "Dimensions of C" not in said(place / "pmatrix.h5")


@pytest.mark.parametrize("affordable", [5, 2, 0])
def test_the_spectrum_of_wide_layers_is_of_some(
    affordable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_toy(tmp_path)
    with PMatrixFile(place / "pmatrix.h5") as file:
        there, d_m = len(file.layers), file.about.d_m
    monkeypatch.setattr("kscli.report.examined._SPECTRUM_WORK", affordable * d_m**3)
    one = examined(place / "pmatrix.h5")
    assert len(one.spectra) == min(affordable, there)
    assert ("`kscli stats --spectrum`" in one.no_spectra) == (affordable < there)


# Edits


@pytest.mark.usefixtures("no_pictures")
def test_risk_is_the_definition(tmp_path: Path, matrices: list[Real]) -> None:
    leverage = np.random.default_rng(0).random(M) + 1
    lengths = np.sqrt(leverage)
    matrices = [P * lengths / lengths[:, None] for P in matrices]
    matrices = [P.astype(np.float32).astype(np.float64) for P in matrices]
    file = write_p(tmp_path / "a.h5", matrices, leverage=leverage)
    shown = page_of(file, to=tmp_path / "a.html").table("What edits of all facts would do")
    entries = [off_diagonal(P) for P in matrices]
    rms = [np.sqrt(np.mean(values**2)) for values in entries]
    assert shown.sorted_by("rms p") == pytest.approx(rms, rel=1e-9)
    # The last layer reads nothing behind the subject, which here ends the prompt before it.
    note = shown.column("note")
    assert note[int(np.argmin(rms[:-1]))] == "least"
    assert note[-1] == "cannot reach the answer"
    order = np.argsort(leverage)
    for P, saved in zip(matrices, shown.sorted_by("the order saves"), strict=True):
        # Later edits against earlier ones, in the order of the file and by leverage.
        given, norm = (np.sum(np.tril(Q, -1) ** 2) for Q in (P, P[np.ix_(order, order)]))
        assert saved == pytest.approx(1 - norm / given, rel=1e-9)
    assert f"{min(rms[:-1]):.3f} in root mean square" in said(file)["Risk"]


@pytest.mark.usefixtures("no_pictures")
def test_outcomes_of_edits_are_the_definitions(tmp_path: Path, matrices: list[Real]) -> None:
    file = write_p(tmp_path / "a.h5", matrices)
    runs = [Run(12, M, layer) for layer in (0, 3)]
    paths = [run.write(tmp_path / f"closed-form-{run.layer}-0.h5") for run in runs]
    page = page_of(file, to=tmp_path / "a.html", runs=paths)
    shown = page.table("What became of the edits")
    assert shown.column("run") == ["layer 0", "layer 3"]
    for at, run in enumerate(runs):
        last = {name: values[-1] for name, values in run.log.of_pass.items()}
        tested = run.log.known.copy()
        tested[[int(fact) for fact in run.log.of_edit["edited"]]] = False
        assert shown.sorted_by("at the end")[at] == pytest.approx(np.mean(last["rank_new"] == 1))
        assert shown.column("known facts kept")[at].endswith(f" of {tested.sum()}")
        assert shown.sorted_by("known facts kept")[at] == pytest.approx(
            np.mean(~last["answer_changed"][tested])
        )
        assert shown.sorted_by("perplexity")[at] == pytest.approx(last["perplexity"])
        edits = page.table(f"The probability of each edit's new target, layer {run.layer}")
        assert edits.sorted_by("at the end") == pytest.approx(np.exp(last["logprob_new"]).tolist())
    sentences = said(file, *paths)["Edits"]
    assert "“layer 0”: 12 edits;" in sentences
    assert "“layer 3”: 12 edits;" in sentences
    assert "grows as n to the power" in sentences


def test_what_foretold_the_damage_follows_the_runs(tmp_path: Path, matrices: list[Real]) -> None:
    file = write_p(tmp_path / "a.h5", matrices)

    def sentences(name: str, run: Run) -> str:
        return said(file, run.write(tmp_path / f"{name}.h5"))["Edits"]

    run = Run(12, 200, every=1)
    predicted = run.log.of_edit["predicted"]
    for moved, changed in zip(predicted, run.log.of_pass["answer_changed"][1:], strict=True):
        # What is moved further than that flips, and nothing else.
        changed[:] = moved > np.median(predicted[-1])
    foretold = sentences("foretold", run)
    assert "with a ROC-AUC of 1.00 (1.00 to 1.00) by p" in foretold
    # In this run all similarities are p.
    assert "The largest is that of" not in foretold
    few = sentences("few", Run(3, M))
    assert "fewer than 10, so nothing is said of what foretold which" in few
    assert few.startswith("“closed-form, layer 0”: 3 edits;")
    memit = sentences("memit", Run(5, M, method="memit"))
    assert "predicted from P" not in memit
    single = sentences("single", Run(12, M, protocol="single"))
    assert "each made in the clean model" in single
    assert "grows as" not in single


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_another_p_predicted_are_left_out(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    with PMatrixFile(place / "pmatrix.h5") as pm:
        fingerprint, facts = pm.fingerprint, pm.facts
    for layer, source in ((0, fingerprint), (1, "another"), (2, "another")):
        inputs = {"pmatrix": source}
        run = Run(3, 6, layer, facts=facts, inputs=inputs)
        run.write(place / "edits" / f"closed-form-{layer}-0.h5")
    result = kscli("report", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 0
    said = " ".join(result.stderr.split())
    assert "left out: closed-form-1-0.h5 and closed-form-2-0.h5, predicted from another" in said
    assert said.count("warning: ") == 1
    page = Page((place / "report.html").read_text())
    assert page.table("What became of the edits").column("run") == ["closed-form, layer 0"]


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_run_is_left_out(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    (place / "edits").mkdir()
    (place / "edits" / "closed-form-0-0.h5").write_bytes(b"not HDF5")
    result = kscli("report", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 0
    assert "warning: left out:" in result.stderr
    assert "Edits that were made" not in (place / "report.html").read_text()


def test_risk_of_copies_is_not_a_number(tmp_path: Path) -> None:
    facts = [Fact("{} is in", "Rome", "Italy")] * 4
    file = write_p(tmp_path / "a.h5", [np.ones((4, 4))] * 2, facts)
    assert said(file)["Risk"] == "All facts are copies of one, so an edit has no other to move."


# Few facts, and several models


def test_few_facts_and_constant_keys_make_a_page(tmp_path: Path) -> None:
    """Sizes at which next to nothing is defined, one layer, no relation, one token."""
    files = [
        write_p(tmp_path / "m1.h5", [np.ones((1, 1))], model="one"),
        write_p(tmp_path / "m2.h5", [a_matrix(2)], some_facts(2, ("",)), model="two"),
        write_p(tmp_path / "m3.h5", [a_matrix(3)], tokens=[4, 4, 4], model="three"),
        write_p(tmp_path / "m8.h5", [np.ones((8, 8))], model="constant"),
    ]
    page = page_of(*files, to=tmp_path / "page.html")
    text = "\n".join(page.texts)
    assert re.search(r"\bnan\b|\binf\b", text, re.IGNORECASE) is None
    assert "One fact makes no pair" in text
    assert "So few facts give it no interval." in text
    assert "All facts share the subject's last token" in text
    assert "The excess kurtosis is undefined at every layer" in text
    assert "they were not measured on the same facts" in text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert all(f"model-{at}" in ids for at in (1, 2, 3, 4))


def test_size_and_kurtosis_follow_the_matrices(tmp_path: Path, matrices: list[Real]) -> None:
    small, large = ([matrices[at]] * 2 for at in (4, 0))

    def sentence(first: list[Real], second: list[Real]) -> str:
        files = [
            write_p(tmp_path / f"{name}.h5", of, model=name, model_id=name)
            for name, of in (("gpt2-small", first), ("gpt2-medium", second))
        ]
        return Page(scaling([examined(file) for file in files]).body).findings["Size"][0]

    grows, shrinks = sentence(small, large), sentence(large, small)
    assert "the larger model has the larger kurtosis" in grows
    assert "higher at 100 % of relative depths" in grows
    assert "the larger model has the smaller kurtosis" in shrinks
    assert "higher at 0 % of relative depths" in shrinks
    means = [scipy.stats.kurtosis(off_diagonal(of[0])) for of in (small, large)]
    assert f"{means[0]:.1f} to {means[1]:.1f}".replace("-", "−") in grows


# The command


@pytest.mark.usefixtures("no_pictures")
def test_the_command_writes_its_default_path_once(tmp_path: Path) -> None:
    place = write_toy(tmp_path)
    first = kscli("report", "-m", "toy", "--dir", tmp_path, "-q")
    assert (first.exit_code, first.stdout.strip()) == (0, str(place / "report.html"))
    content = (place / "report.html").read_bytes()
    provenance = Page(content.decode()).table("Where the numbers").rows
    said_of = {name: value for (name, _), (value, _) in provenance}
    assert said_of["tokens"] == "2,000"
    assert said_of["model id"] == "someone/toy"
    assert said_of["facts"] == "6 of toy"
    again = kscli("report", "-m", "toy", "--dir", tmp_path, "--seed", "1", "-q")
    assert again.exit_code == 1
    assert "add --force" in one_sentence(again.stderr)
    assert (place / "report.html").read_bytes() == content
    assert [path.name for path in place.iterdir() if ".part" in path.name] == []
    forced = kscli("report", "-m", "toy", "--dir", tmp_path, "-q", "--force")
    assert forced.exit_code == 0
    assert (place / "report.html").read_bytes() == content


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    result = kscli("report", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 1
    assert "`kscli run --model toy --dir" in one_sentence(result.stderr)


def test_several_models_are_written_to_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kscli.report.page._builders", lambda one: ())
    write_toy(tmp_path)
    result = kscli(
        *("report", "-m", "toy", "--pmatrix", tmp_path / "toy" / "pmatrix.h5"),
        *("--dir", tmp_path, "-q"),
    )
    assert (result.exit_code, result.stdout.strip()) == (0, str(tmp_path / "report.html"))
    page = Page((tmp_path / "report.html").read_text())
    # Both have one name, so their files tell them apart.
    assert f"toy ({tmp_path / 'toy' / 'pmatrix.h5'})" in page.texts
    assert "toy (1)" in page.content  # in the figures' legends
    assert "toy (2)" in page.content
    assert page.findings["Pairs"][0].startswith("20 pairs are in the top 20 of all 2 models")


# Its parts


class Stored:
    """A pmatrix file in memory, of one layer."""

    model = "a\x01b"
    layers = (0,)
    token_id = np.arange(60)
    facts = tuple(some_facts(60))

    def matrix(self, name: str, layer: int) -> Real:
        return a_matrix(60, tail=30.0)


def drawn(kind: str, most: int = 0) -> Page:
    drawing = Drawing("a", kind, "caption", most_bytes=most)
    return Page(picture(drawing, [Source(Stored(), (0,))], "x"))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_an_image_keeps_to_its_bytes() -> None:
    def size(most: int) -> tuple[int, int]:
        page = drawn("heatmap", most)
        source, narrow = page.values("src")
        assert len(narrow) < len(source)  # for a telephone
        return len(base64.b64decode(source.partition(",")[2])), int(page.values("width")[0])

    (large, wide), (small, narrow) = size(10**7), size(24_000)
    assert small <= 24_000 < large
    assert narrow < wide


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_vector_figure_refers_to_its_own_ids() -> None:
    page = drawn("kde")
    ids = page.values("id")
    assert ids
    assert all(name.startswith(("x-a-0-", "x-n-a-0-")) for name in ids)
    assert len(ids) == len(set(ids))
    referred = [value.removeprefix("#") for value in page.values("href")]
    referred += re.findall(r"url\(#([^)]+)\)", page.content)
    assert referred
    assert set(referred) <= set(ids)


def test_only_tags_are_markup() -> None:
    made = tag("p", "a < b & ", tag("b", '"c"'), None, class_='x"y', hidden=True, lang=None)
    assert made == '<p class="x&quot;y" hidden>a &lt; b &amp; <b>&quot;c&quot;</b></p>'
    assert join([made, "<"]) == f"{made}&lt;"
    assert void("meta", http_equiv="a", name="b") == '<meta http-equiv="a" name="b">'
    assert isinstance(join(["a"]), Html)


def test_layers_in_words() -> None:
    assert at_layers([], [0, 1]) == "at no layer"
    assert at_layers([1], [0, 1]) == "at layer 1"
    assert at_layers([0, 1], [0, 1]) == "at each of the 2 layers"
    assert at_layers([0], [0]) == "at layer 0"
    assert spread(range(30), 4) == (0, 10, 19, 29)
    assert spread((3,), 2) == (3,)
    assert (listed(["a"]), listed(["a", "b", "c"])) == ("a", "a, b and c")
