"""The look of a figure: title, size, resolution and names, and the bar of many layers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from artifact_kit import write_toy
from cli_kit import kscli, one_sentence
from edit_kit import Run
from matplotlib.figure import Figure
from PIL import Image
from test_figures import STANDARD, assert_on_the_page, heavy_tailed, of, off_diagonal, source, texts

from kscli.analysis.statistics import STATISTICS
from kscli.cli.plot import size_of
from kscli.editing.edits_file import EditsFile
from kscli.errors import UsageError
from kscli.figures import KINDS, FigureOptions, Look
from kscli.figures.saving import render
from kscli.numbers import number


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def looking(**look: object) -> FigureOptions:
    return FigureOptions(look=Look(**look))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("width", [2.5, 3.3, 6.9, 12.0])
def test_a_figure_of_any_width_keeps_to_its_page(kind: str, width: float) -> None:
    layers = 3 if kind == "convergence" else 10
    fig = KINDS[kind].draw([source("gpt2", layers)], looking(width=width))
    assert fig.get_figwidth() == width
    assert_on_the_page(fig)


@pytest.mark.parametrize("kind", ["heatmap", "kde"])
def test_a_grid_has_as_many_columns_as_its_width_has_room_for(kind: str) -> None:
    for width, columns in ((3.3, 2), (6.9, 4)):
        options = FigureOptions(grid=True, look=Look(width=width))
        (fig,) = KINDS[kind].pages([source(layers=8, m=8)], options)
        assert fig.axes[0].get_gridspec().ncols == columns  # type: ignore[union-attr]
        assert_on_the_page(fig)


@pytest.mark.parametrize("kind", STANDARD)
def test_title_height_and_resolution(kind: str) -> None:
    plain = KINDS[kind].draw([source(layers=2)])
    height = plain.get_figheight() * 1.2
    fig = KINDS[kind].draw(
        [source(layers=2)], looking(title="Mine, $x", width=6.0, height=height, dpi=50)
    )
    assert fig.get_suptitle() == "Mine, $x"
    with Image.open(io.BytesIO(render(fig, "png"))) as image:
        assert image.size == pytest.approx((6.0 * 50, height * 50), abs=1)
    untitled = KINDS[kind].draw([source()], looking(title=""))
    assert untitled.get_suptitle() == ""
    with pytest.raises(UsageError, match=rf"{kind} of 6 inches is .* at least .*--size"):
        KINDS[kind].draw([source(layers=2)], looking(width=6.0, height=0.5))


@pytest.mark.parametrize(("dpi", "framed"), [(0, True), (300, True), (60, True), (40, False)])
def test_frames_are_drawn_where_a_cell_has_a_dot(dpi: int, framed: bool) -> None:
    asked = FigureOptions(mark_same_token=True, look=Look(width=3.3, dpi=dpi))
    fig = KINDS["heatmap"].draw([source(m=100)], asked)  # a panel of 2.08 inches
    assert bool(fig.axes[0].collections) == framed
    assert ("too many for frames" in texts(fig)) != framed
    assert_on_the_page(fig)


def test_a_heatmap_of_many_facts_has_a_dot_for_each() -> None:
    fig = KINDS["heatmap"].draw([source(m=900)])
    with Image.open(io.BytesIO(render(fig, "png"))) as image:
        assert image.width > 1.6 * 900


@pytest.mark.parametrize("kind", STANDARD)
def test_models_are_called_what_was_asked_for(kind: str) -> None:
    """The larger model was given first; families and the order are by the models' own names."""
    sources = [source("gpt2-xl", m=8), source("gpt2", m=8)]
    drawn = texts(KINDS[kind].draw(sources, looking(names=("Large", "Small"))))
    assert "Large" in drawn
    assert "Small" in drawn
    assert "gpt2" not in drawn
    alone = KINDS[kind].draw(sources)
    assert len(alone.axes) == len(KINDS[kind].draw(sources, looking(names=("A", "B"))).axes)


def test_runs_are_called_what_was_asked_for(tmp_path: Path) -> None:
    with (
        EditsFile(Run(layer=0).write(tmp_path / "a.h5")) as first,
        EditsFile(Run(layer=3).write(tmp_path / "b.h5")) as second,
    ):
        for kind in ("forgetting", "interference"):
            fig = KINDS[kind].draw([first, second], looking(names=("early", "late")))
            assert "early" in texts(fig)
            assert "late" in texts(fig)
            assert "layer 3" not in texts(fig)


@pytest.mark.parametrize(("kind", "bars"), [("kde", 1), ("angles", 1)])
def test_many_layers_have_a_bar_of_colours(kind: str, bars: int) -> None:
    few, many = (KINDS[kind].draw([source(layers=layers)]) for layers in (8, 9))
    assert few.axes[0].get_legend() is not None
    assert bars_of(few) == []
    assert all(ax.get_legend() is None for ax in many.axes)
    (bar,) = bars_of(many)
    assert [text.get_text() for text in bar.get_yticklabels()] == [str(at) for at in range(9)]
    colours = [line.get_color() for line in many.axes[0].lines[1:]]
    (mesh,) = (image for image in bar.collections if image.get_array() is not None)
    np.testing.assert_allclose(mesh.cmap(np.arange(9)), colours)
    assert_on_the_page(many)


def bars_of(fig: Figure) -> list:  # type: ignore[type-arg]
    return [ax for ax in fig.axes if ax.get_xlabel() == "layer"]


def test_the_range_of_kurtosis_stands_below_many_layers() -> None:
    matrices = [heavy_tailed(16, at) for at in range(12)]
    found = [STATISTICS["kurtosis"](off_diagonal(P)) for P in matrices]
    low, high = int(np.argmin(found)), int(np.argmax(found))
    said = (
        f"excess kurtosis: from {number(found[low], 1)} (layer {low}) to "
        f"{number(found[high], 1)} (layer {high})"
    )
    drawn = texts(KINDS["kde"].draw([of(*matrices)]))
    assert said in drawn.replace("\n", " ")
    equal = KINDS["kde"].draw([of(*[np.ones((4, 4))] * 9)])
    assert "excess kurtosis: undefined" in texts(equal)


def test_the_sentence_on_convergence_can_be_left_out() -> None:
    said = texts(KINDS["convergence"].draw([source(m=32)])).replace("\n", " ")
    assert "The two distributions differ" in said
    fig = KINDS["convergence"].draw([source(m=32)], FigureOptions(no_sentence=True))
    assert "distributions" not in texts(fig)
    with pytest.raises(UsageError, match="kde takes no --no-sentence; convergence does"):
        KINDS["kde"].draw([source()], FigureOptions(no_sentence=True))


def test_the_size_of_a_command_line() -> None:
    assert size_of(None) == (0, 0)
    assert size_of("6.5x4") == (6.5, 4)
    assert size_of("5") == (5, 0)
    for text in ("", "x", "6x", "1x1", "6x4x2", "1e9", "nan", "6x-1", "6;4"):
        with pytest.raises(UsageError, match=r"6\.5x4"):
            size_of(text)


def test_plot_takes_them_and_draws_again_where_they_change(tmp_path: Path) -> None:
    folder = write_toy(tmp_path)
    asked = ("plot", "kurtosis", "-m", "toy", "--dir", tmp_path)
    look = ("--title", "", "--size", "5x3.5", "--dpi", "60", "--name", "Toy")
    for arguments, size in ((asked, None), ((*asked, *look), (300, 210))):
        made = kscli(*arguments)
        assert made.exit_code == 0, made.stderr
        with Image.open(folder / "figures" / "kurtosis.png") as image:
            assert size in (None, image.size)
    assert "up to date" in kscli(*asked, *look).stderr
    two = kscli(*asked, "--name", "a", "--name", "b")
    assert two.exit_code == 2
    assert "--name is given 2 times, and the figure is of 1" in one_sentence(two.stderr)
