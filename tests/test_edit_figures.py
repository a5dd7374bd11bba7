"""Figures of runs of edits, and of what edits would do: that they draw the arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from artifact_kit import write_toy
from cli_kit import kscli, one_sentence
from edit_kit import Run
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from kscli.analysis.binding import cluster_order
from kscli.analysis.edit_runs import course_of, points_of
from kscli.editing.edit_arrays import read_arrays
from kscli.editing.edits_file import EditsFile
from kscli.editing.verification import measure_outcomes
from kscli.errors import UsageError
from kscli.facts import Fact
from kscli.figures import KINDS, FigureOptions, Look, Source
from kscli.figures.edit_runs import run_names
from kscli.figures.risk import panel_of, spread
from kscli.figures.saving import render
from kscli.figures.style import house_style
from kscli.scores import SCORES

Real = NDArray[np.float64]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Writes runs and opens them."""
    with ExitStack() as stack:

        def write(*runs: Run) -> list[EditsFile]:
            return [
                stack.enter_context(EditsFile(run.write(tmp_path / f"run-{at}.h5")))
                for at, run in enumerate(runs)
            ]

        yield write


def texts(fig: Figure) -> str:
    found = fig.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return "\n".join(artist.get_text() for artist in found)  # type: ignore[attr-defined]


def assert_on_the_page(fig: Figure) -> None:
    with house_style():
        fig.set_dpi(72)
        fig.draw_without_rendering()
        box = fig.get_tightbbox()
    width, height = fig.get_size_inches()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


LONG = "HuggingFaceTB--SmolLM2-135M-Instruct_with-a$name$-that-goes-on-and-on-Q4_1"
SITUATIONS = {
    "one edit": [Run(1, 30)],
    "one edit of two facts": [Run(1, 2)],
    "ten edits": [Run(10, 30, perplexity=False)],
    "all facts": [Run(5, 5)],
    "a hundred edits": [Run(100, 256)],
    "three layers": [Run(layer=layer) for layer in (0, 15, 25)],
    "four": [Run(seed=seed) for seed in range(4)],
    "all kinds": [Run(), Run(protocol="single"), Run(method="memit"), Run(layer=3, n=4)],
    "a long name": [Run(model=LONG), Run(model=LONG[::-1])],
}


@pytest.mark.parametrize("kind", ["interference", "forgetting"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_nothing_is_drawn_off_the_page(kind: str, situation: str, opened: Any) -> None:
    runs = opened(*SITUATIONS[situation])
    fig = KINDS[kind].draw(runs)
    assert_on_the_page(fig)
    assert len(runs) > 1 or runs[0].model in texts(fig)


def test_interference_draws_what_the_last_edit_left(opened: Any) -> None:
    [run] = opened(Run(10, 30))
    ax = KINDS["interference"].draw([run]).axes[0]
    predicted, live = run.values("predicted")[-1], run.values("measured_live")[-1]
    edited = run.values("edited").tolist()
    slope, marks, dots = ax.lines
    # The last edited fact has not been moved since its own edit, and has no place on the scale.
    assert predicted[edited[-1]] == 0
    for line, facts in (
        (marks, [fact for fact in range(30) if fact in edited[:-1]]),
        (dots, [fact for fact in range(30) if fact not in edited]),
    ):
        assert np.array_equal(line.get_xdata(), predicted[facts])
        assert np.array_equal(line.get_ydata(), live[facts])
    assert np.array_equal(slope.get_xdata(), slope.get_ydata())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] < predicted[predicted > 0].min()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["slope 1", "9 edited facts", "20 original facts"]
    assert "worst error: 3e\N{MINUS SIGN}06" in texts(ax.figure)
    assert "not to move" not in texts(ax.figure)


def test_interference_counts_the_facts_that_are_predicted_not_to_move(opened: Any) -> None:
    run = Run(10, 30)
    still = [fact for fact in range(30) if fact not in run.log.of_edit["edited"]][:3]
    for fact, moved in zip(still, (1e-7, 4e-6, 2e-6), strict=True):
        run.log.of_edit["predicted"][-1][fact] = 1e-14
        run.log.of_edit["measured_live"][-1][fact] = moved
    [file] = opened(run)
    points = points_of(file)
    assert (points.nought, points.nought_live) == (3, 4e-6)
    assert len(points.predicted) == len(points.live) == 26  # less the fact that was edited last
    drawn = texts(KINDS["interference"].draw([file]))
    assert "3 predicted not to move,\nmoved 4e\N{MINUS SIGN}06 at most" in drawn


def test_interference_of_single_edits_is_that_of_each(opened: Any) -> None:
    [run] = opened(Run(4, 12, protocol="single"))
    points = points_of(run)
    expected = [
        run.values("predicted")[edit, fact]
        for edit in range(4)
        for fact in range(12)
        if fact != run.values("edited")[edit]
    ]
    assert points.predicted.tolist() == expected
    assert not points.edited.any()
    assert points.correlation == pytest.approx(1)
    ax = KINDS["interference"].draw([run]).axes[0]
    assert np.array_equal(ax.lines[1].get_xdata(), expected)


def test_interference_has_a_panel_a_run_on_one_scale(opened: Any) -> None:
    runs = opened(Run(layer=0), Run(method="memit"), Run(layer=25))
    fig = KINDS["interference"].draw(runs)
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["closed-form, layer 0", "memit, layer 0", "closed-form, layer 25"]
    assert len({ax.get_xlim() for ax in fig.axes}) == 1
    colours = [ax.lines[-1].get_color() for ax in fig.axes]
    assert len(set(colours)) == 3
    # MEMIT's edits are measured and not predicted.
    assert len(fig.axes[1].lines) == 1
    assert "not predicted" in texts(fig)
    with pytest.raises(UsageError, match=r"no predicted interference.*--edits"):
        KINDS["interference"].draw([runs[1]])
    with pytest.raises(UsageError, match="no predicted interference"):
        KINDS["interference"].draw(opened(Run(1, 1)))


def test_forgetting_draws_retention_and_kept_facts(opened: Any) -> None:
    runs = opened(Run(25, 60, layer=15), Run(25, 60, layer=25, perplexity=False))
    fig = KINDS["forgetting"].draw(runs)
    retained, kept, *scores, perplexity, kl = fig.axes
    assert [ax.get_ylabel() for ax in scores] == ["ES", "PS", "NS", "GE"]
    for at, run in enumerate(runs):
        step = run.values("step")
        assert step.tolist() == [0, 1, 10, 20, 25]
        edited = set(run.values("edited").tolist())
        known = [fact for fact in range(60) if run.values("known")[fact] and fact not in edited]
        assert known
        for line in (retained.lines[at], kept.lines[at], perplexity.lines[at]):
            assert np.array_equal(line.get_xdata(), step)
        for place, n in enumerate(step.tolist()):
            first = [rank == 1 for rank in run.values("rank_new")[place, :n].tolist()]
            every = [rank == 1 for rank in run.values("rank_new")[0].tolist()]
            expected = sum(first) / n if n else sum(every) / len(every)
            assert retained.lines[at].get_ydata()[place] == pytest.approx(expected)
            same = [not run.values("answer_changed")[place, fact] for fact in known]
            assert kept.lines[at].get_ydata()[place] == pytest.approx(sum(same) / len(known))
        assert np.array_equal(
            perplexity.lines[at].get_ydata(), run.values("perplexity"), equal_nan=True
        )
        assert np.array_equal(kl.lines[at].get_ydata(), run.values("kl"), equal_nan=True)
        of_edits = run.values("scores/PS")
        means = [of_edits[0].mean(), *(of_edits[i, : step[i]].mean() for i in range(1, 5))]
        assert scores[1].lines[at].get_ydata() == pytest.approx(means)
    assert len({line.get_color() for line in retained.lines}) == 2
    assert kl.get_yscale() == "linear"
    entries = [text.get_text() for text in fig.legends[0].get_texts()]
    ends = [line.get_ydata()[-1] for line in (retained.lines[0], kept.lines[0])]
    assert entries[0] == f"layer 15: {100 * ends[0]:.0f} % / {100 * ends[1]:.0f} %"


def test_forgetting_without_held_out_text_or_known_facts(opened: Any) -> None:
    run = Run(3, 5, perplexity=False)
    run.log.known[:] = False
    fig = KINDS["forgetting"].draw(opened(run))
    assert "perplexity" not in [ax.get_ylabel() for ax in fig.axes]
    assert np.isnan(np.asarray(fig.axes[1].lines[0].get_ydata())).all()
    assert "% / -" in texts(fig)
    assert_on_the_page(fig)


def test_forgetting_draws_one_edit_as_a_line(opened: Any) -> None:
    """From the clean model to after the edit, in every panel."""
    fig = KINDS["forgetting"].draw(opened(Run(1, 30)))
    for ax in fig.axes:
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [0, 1]
        assert np.isfinite(np.asarray(line.get_ydata())).all(), ax.get_ylabel()


def test_forgetting_is_of_sequences(opened: Any) -> None:
    single, sequence = opened(Run(protocol="single"), Run())
    with pytest.raises(UsageError, match=r"single edits.*sequential"):
        KINDS["forgetting"].draw([single])
    fig = KINDS["forgetting"].draw([single, sequence])
    assert fig.axes[0].lines[0].get_xdata().size == 0
    assert "no sequence" in texts(fig)


def test_copies_of_edited_facts_are_not_kept_facts(opened: Any) -> None:
    """As for `kscli verify`: facts of the same text are one fact."""
    run = Run(3, 8)
    edited = int(run.log.of_edit["edited"][0])
    copy = next(j for j in range(8) if j not in run.log.of_edit["edited"])
    facts = [Fact("{} is in", f"Subject {at}", f"target {at}") for at in range(8)]
    facts[copy] = facts[edited]
    run.facts = tuple(facts)
    run.log.known[:] = True
    run.log.of_pass["answer_changed"][-1][:] = False
    run.log.of_pass["answer_changed"][-1][copy] = True
    (file,) = opened(run)
    assert course_of(file).kept[-1] == 1
    assert measure_outcomes(read_arrays(file)).kept == 1


def test_runs_that_look_alike_are_told_apart_by_model_and_file(tmp_path: Path) -> None:
    runs = [Run(model="a"), Run(model="a"), Run(model="b")]
    paths = [run.write(tmp_path / f"closed-form-0-{at}.h5") for at, run in enumerate(runs)]
    found = run_names([EditsFile(path) for path in paths])
    assert found.own == (
        ("a", "closed-form-0-0"),
        ("a", "closed-form-0-1"),
        ("b", "closed-form-0-2"),
    )
    assert "closed-form" in found.shared


def test_edits_that_were_kept_out_are_not_forgotten() -> None:
    # Of four planned edits the second was not made.
    values = {
        "step": np.array([0, 1, 3]),
        "rank_new": np.array([[9, 1, 9, 9], [1, 1, 9, 9], [1, 1, 1, 7]]),
        "kept_out/number": np.array([1]),
        "known": np.array([True, True, True]),
        "edited": np.array([0, 2]),
        "answer_changed": np.array([[False] * 3, [True, False, True], [False, True, False]]),
        "perplexity": np.full(3, np.nan),
        "kl": np.full(3, np.nan),
        **{f"scores/{name}": np.array([[0, 1, 2, 3.0]] * 3) for name in SCORES},
    }
    facts = [Fact("{} is in", f"Subject {at}", "x") for at in range(3)]
    run: Any = SimpleNamespace(values=values.__getitem__, facts=facts, edits=3)
    course = course_of(run)
    assert course.retained.tolist() == pytest.approx([0, 1, 2 / 3])
    assert course.kept.tolist() == [1, 1, 0]
    assert course.scores["ES"].tolist() == pytest.approx([5 / 3, 0, 5 / 3])


@dataclass
class Stored:
    """A pmatrix file in memory."""

    P: Real
    subjects: tuple[str, ...] = ()
    model: str = "toy"
    layers: tuple[int, ...] = (0,)

    @property
    def facts(self) -> tuple[Fact, ...]:
        subjects = self.subjects or tuple(f"Subject {at}" for at in range(len(self.P)))
        return tuple(Fact("{} is in", subject, "x") for subject in subjects)

    @property
    def token_id(self) -> NDArray[np.int64]:
        return np.arange(len(self.P))

    def matrix(self, name: str, layer: int) -> Real:
        assert name == "P"
        return self.P


def blocks(m: int, seed: int = 0) -> tuple[Real, list[int]]:
    """A P of facts in three blocks that are bound within, shuffled, and each fact's block."""
    rng = np.random.default_rng(seed)
    block = rng.permutation(np.arange(m) % 3)
    keys = 0.3 * rng.standard_normal((m, 60)) + 3 * np.eye(60)[block]
    s = keys @ keys.T
    return s / np.diag(s)[:, None], block.tolist()


@pytest.mark.parametrize("m", [3, 12, 40])
def test_bound_facts_are_neighbours(m: int) -> None:
    P, block = blocks(m)
    order = cluster_order(np.abs(P)).tolist()
    assert sorted(order) == list(range(m))
    changes = sum(block[a] != block[b] for a, b in pairwise(order))
    assert changes == len(set(block)) - 1


def test_risk_draws_p_in_its_order_and_names_the_worst() -> None:
    P, _ = blocks(80)
    P[:, 7] *= -1
    P[33] *= 1.5
    P[33, 33] = 1
    source = Source(Stored(P), (0,))
    panel = panel_of(source, 0)
    for row, i in enumerate(panel.order):
        others = [P[i, j] ** 2 for j in range(80) if j != i]
        assert panel.damage[row] == pytest.approx(np.sqrt(np.mean(others)))
        assert [panel.size[row, column] for column in range(80)] == [
            abs(P[i, j]) for j in panel.order
        ]
    fig = KINDS["risk"].draw([source])
    assert np.array_equal(np.asarray(fig.axes[0].images[0].get_array()), panel.size)
    worst = int(np.argmax(panel.damage))
    assert panel.order[worst] == 33
    named = [text.get_text() for text in fig.axes[0].texts]
    assert f"Subject 33 {panel.damage[worst]:.2f}" in named
    assert 10 < len(named) < 80
    # Each name's leader ends at its fact.
    ends = [int(line.get_ydata()[-1]) for line in fig.axes[0].lines]
    assert [f"{panel.labels[at][0]}{panel.labels[at][1]}" for at in ends] == named
    least = min(panel.damage[at] for at in ends)
    assert all(panel.damage[at] <= least for at in range(80) if at not in ends)


@pytest.mark.parametrize("m", [1, 2, 3, 30, 256])
def test_risk_of_few_and_many_facts(m: int) -> None:
    P, _ = blocks(m)
    names = ("$x_{a}$ b", "A University of somewhere, far away and with a long name", "Oslo")
    fig = KINDS["risk"].draw([Source(Stored(P, tuple(names[at % 3] for at in range(m))), (0,))])
    assert_on_the_page(fig)
    named = [text.get_text() for text in fig.axes[0].texts]
    assert len(named) == (m if m <= 30 else 24)
    places = sorted(text.get_position()[1] for text in fig.axes[0].texts)
    inch = fig.axes[0].get_position().height * fig.get_figheight() / m
    assert all(np.diff(places) * inch > 6 / 72)
    assert render(fig, "svg").startswith(b"<?xml")


def test_risk_has_a_panel_a_layer_and_model() -> None:
    sources = [
        Source(Stored(blocks(m)[0], model=model), (0,)) for m, model in ((12, "a"), (40, "b"))
    ]
    fig = KINDS["risk"].draw(sources)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["a, m = 12", "b, m = 40"]
    assert_on_the_page(fig)


def test_names_are_spread_and_stay_near() -> None:
    def naive(wanted: list[float], gap: float) -> list[float]:
        # Least squares under the order, by looking at every split into blocks of equal shift.
        places = np.array(wanted)
        for _ in range(20000):
            for at in range(len(places) - 1):
                short = gap - (places[at + 1] - places[at])
                if short > 0:
                    places[at] -= short / 2
                    places[at + 1] += short / 2
        return places.tolist()

    wanted = [1.0, 1.2, 5.0, 9.0, 9.0]
    found = spread(np.array(wanted), 1.0, -10, 20)
    assert found.tolist() == pytest.approx(naive(wanted, 1.0), abs=1e-6)
    assert spread(np.array([0.0, 0.0, 0.0]), 1.0, 0, 10).tolist() == [0, 1, 2]
    assert spread(np.array([9.0, 10.0]), 2.0, 0, 10).tolist() == [8, 10]


def test_plot_reads_all_runs_of_the_model_or_those_named(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    for name, layer in (("closed-form-0-0", 0), ("closed-form-10-0", 10), ("closed-form-2-0", 2)):
        Run(3, 6, layer).write(folder / "edits" / f"{name}.h5")
    for kind in ("interference", "forgetting"):
        made = kscli("plot", kind, "-m", "toy", "--dir", tmp_path)
        assert made.exit_code == 0, made.stderr
        assert made.stdout.strip() == str(folder / "figures" / f"{kind}.png")
        assert (folder / "figures" / f"{kind}.png").stat().st_size > 5000
    one = kscli("plot", "forgetting", "--edits", folder / "edits" / "closed-form-2-0.h5")
    assert one.stdout.strip() == str(folder / "figures" / "forgetting-closed-form-2-0.png")
    path = tmp_path / "runs.svg"
    drawn = kscli("plot", "forgetting", "-m", "toy", "--dir", tmp_path, "-o", path)
    assert drawn.exit_code == 0
    text = path.read_text()
    # Runs come in the order of their layers' numbers, read row by row; the file lists by column.
    assert text.index("layer 0:") < text.index("layer 10:") < text.index("layer 2:")
    assert kscli("plot", "risk", "-m", "toy", "--dir", tmp_path, "--layer", "1").exit_code == 0


def test_plot_refuses_what_a_kind_is_not_drawn_from(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    run = Run(3, 6).write(folder / "edits" / "closed-form-0-0.h5")
    for arguments, said in (
        (("forgetting", "--edits", run, "--layer", "0"), "takes no --layer"),
        (("interference", "--pmatrix", folder / "pmatrix.h5"), "takes no --pmatrix"),
        (("heatmap", "--edits", run), "takes no --edits"),
        (("forgetting", "--edits", run, "--grid"), "takes no --grid"),
    ):
        refused = kscli("plot", *arguments)
        assert refused.exit_code == 2
        assert said in one_sentence(refused.stderr)
    nothing = kscli("plot", "forgetting", "-m", "other", "--dir", tmp_path)
    assert nothing.exit_code == 1
    assert "kscli edit --model other" in one_sentence(nothing.stderr)
    wrong = kscli("plot", "forgetting", "--edits", folder / "pmatrix.h5")
    assert wrong.exit_code == 1
    assert "a run of edits" in one_sentence(wrong.stderr)


@pytest.mark.parametrize("size", [(10.0, 4.0), (10.0, 0.0), (6.5, 3.0), (3.3, 2.5)])
def test_a_map_of_risk_has_its_size_and_stays_below_its_title(size: tuple[float, float]) -> None:
    width, height = size
    fig = KINDS["risk"].draw(
        [Source(Stored(blocks(30)[0]), (0,))], FigureOptions(look=Look(width=width, height=height))
    )
    assert fig.get_figwidth() == width
    assert height in (0, fig.get_figheight())
    assert_on_the_page(fig)
    fig.draw_without_rendering()
    heading = next(text for text in fig.texts if "would move" in text.get_text())
    assert fig.axes[0].get_window_extent().y1 <= heading.get_window_extent().y0
