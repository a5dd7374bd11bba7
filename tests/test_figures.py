"""Figures: the data they draw, what they say about it, that it fits, and how it is saved."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from kscli.errors import KscliError, UsageError
from kscli.figures import KINDS, Source
from kscli.figures.density import kernel_density, robust_bandwidth
from kscli.figures.saving import FORMATS, check_target, render, save_figure
from kscli.figures.style import fitted, house_style, names, number, text_width
from kscli.statistics import MatrixName

LONG = "HuggingFaceTB/SmolLM2-135M-Instruct_with-a$name$-that-goes-on-and-on-Q4_1-revision-2f"


@dataclass
class Stored:
    """A pmatrix file in memory."""

    model: str
    matrices: dict[int, NDArray[np.float64]]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.matrices)

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        assert name == "P"
        return self.matrices[layer]


def heavy_tailed(m: int, seed: int = 0, largest: float = 0.9) -> NDArray[np.float64]:
    """A P whose off-diagonal entries lie within `largest`, which one of them is."""
    rng = np.random.default_rng(seed)
    P = np.clip(0.02 * rng.standard_t(2.5, (m, m)) + 0.01, -0.8, 0.8)
    if m > 1:
        P[0, 1] = largest
    np.fill_diagonal(P, 1)
    return P


def source(model: str = "gpt2", layers: int = 1, m: int = 24, largest: float = 0.9) -> Source:
    stored = Stored(model, {at: heavy_tailed(m, at, largest) for at in range(layers)})
    return Source(stored, stored.layers)


def of(*matrices: NDArray[np.float64], model: str = "gpt2") -> Source:
    stored = Stored(model, dict(enumerate(matrices)))
    return Source(stored, stored.layers)


def texts(fig: Figure) -> str:
    found = fig.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return "\n".join(artist.get_text() for artist in found)  # type: ignore[attr-defined]


def off_diagonal(P: NDArray[np.float64]) -> NDArray[np.float64]:
    return P[~np.eye(len(P), dtype=bool)]


# Every kind


SITUATIONS = {
    "forty-eight layers": [source(layers=48, m=4)],
    "four models": [source(model) for model in ("gpt2", "b", "c", LONG)],
    "models and layers": [source("gpt2", 2), source(LONG, 2)],
    "models of different depth": [source("gpt2", 3), source(LONG, 2)],
    "a long name": [source(LONG)],
    "names that matplotlib reads otherwise": [source("_hidden"), source("$x_{"), source("a^b")],
    "one fact": [source(m=1)],
    "two facts": [source(m=2)],
    "constant": [of(np.ones((4, 4)), heavy_tailed(4))],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_nothing_is_drawn_off_the_page(kind: str, situation: str) -> None:
    fig = KINDS[kind].draw(SITUATIONS[situation])
    with house_style():
        fig.set_dpi(72)
        fig.draw_without_rendering()
        box = fig.get_tightbbox()
    width, height = fig.get_size_inches()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_model_layer_and_m(kind: str) -> None:
    text = texts(KINDS[kind].draw([source("gpt2-xl", m=24)]))
    assert "gpt2-xl" in text
    assert "m = 24" in text
    assert "layer" in text


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_layer_there_is_nothing_to_draw(kind: str) -> None:
    with pytest.raises(UsageError, match="no layer"):
        KINDS[kind].draw([Source(Stored("gpt2", {}), ())])


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_leaves_matplotlibs_settings_as_they_were(kind: str) -> None:
    before = dict(matplotlib.rcParams)
    render(KINDS[kind].draw([source()]), "svg")
    assert dict(matplotlib.rcParams) == before


def test_a_users_settings_change_no_figure() -> None:
    plain = render(KINDS["kurtosis"].draw([source(layers=3)]), "svg")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.family": "serif", "svg.hashsalt": "x"}):
        assert render(KINDS["kurtosis"].draw([source(layers=3)]), "svg") == plain


def test_kinds_are_listed_without_matplotlib_or_numpy() -> None:
    code = (
        "import sys, kscli.figures; assert kscli.figures.KINDS;"
        "print(sorted({'matplotlib', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_drawing_does_not_touch_pyplot() -> None:
    code = (
        "import sys, numpy as np, kscli.figures as f\n"
        "class Pm:\n model = 'a'\n layers = (0,)\n"
        " def matrix(self, name, layer): return np.eye(3) + np.tri(3) / 9\n"
        "for kind in f.KINDS.values(): kind.draw([f.Source(Pm(), (0,))])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert run(code) == "False"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Heatmap


def test_heatmap_panels_hold_p_itself_on_one_scale() -> None:
    first, second = heavy_tailed(16, 1), heavy_tailed(16, 2)
    fig = KINDS["heatmap"].draw([of(first, second)])
    images = [ax.images[0] for ax in fig.axes if ax.images]
    for image, P in zip(images, (first, second), strict=True):
        np.testing.assert_array_equal(image.get_array(), P)
        assert image.get_clim() == (-1, 1)
        assert image.get_interpolation() == "none"


@pytest.mark.parametrize(
    ("least", "largest", "extend"),
    [
        (-0.8, 0.9, "neither"),
        (-0.8, 1.0 + 1e-13, "neither"),
        (-0.8, 1.4, "max"),
        (-1.2, 0.9, "min"),
        (-1.2, 1.4, "both"),
    ],
)
def test_heatmap_bar_has_arrows_where_p_goes_beyond(
    least: float, largest: float, extend: str
) -> None:
    inside, beyond = heavy_tailed(8), heavy_tailed(8, largest=largest)
    beyond[1, 0] = least
    fig = KINDS["heatmap"].draw([of(inside, beyond)])
    bar = next(ax.images[0].colorbar for ax in fig.axes if ax.images)
    assert bar is not None
    assert bar.extend == extend


def test_heatmap_cells_beyond_the_scale_are_seen_to_be() -> None:
    image = KINDS["heatmap"].draw([source(largest=1.4)]).axes[0].images[0]
    shades = {tuple(image.to_rgba(np.array(value))) for value in (-1.2, -1.0, 0.0, 1.0, 1.2)}
    assert len(shades) == 5
    np.testing.assert_allclose(image.to_rgba(np.array(0.0))[:3], 0.97, atol=0.01)


def test_heatmap_titles_say_the_off_diagonal_extremes() -> None:
    P = heavy_tailed(8, largest=1.4)
    P[1, 0] = -0.9149
    fig = KINDS["heatmap"].draw([of(P, heavy_tailed(8))])
    assert fig.axes[0].get_title() == "layer 0\nmin −0.91, max 1.40"
    assert fig.axes[1].get_title().startswith("layer 1\nmin −")
    assert "max 0.90" in fig.axes[1].get_title()


def test_heatmap_titles_name_what_tells_panels_apart() -> None:
    fig = KINDS["heatmap"].draw([source("a"), source("b")])
    assert [ax.get_title().splitlines()[0] for ax in fig.axes[:2]] == ["a", "b"]
    assert fig.get_suptitle().splitlines()[1] == "layer 0, m = 24"


@pytest.mark.parametrize("layers", [2, 4])
def test_heatmap_titles_of_long_names_keep_apart(layers: int) -> None:
    fig = KINDS["heatmap"].draw([source(LONG, layers), source(LONG[::-1], layers)])
    with house_style():
        fig.draw_without_rendering()
        boxes = [ax.title.get_window_extent() for ax in fig.axes if ax.images]
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])


def test_heatmap_of_models_with_a_few_layers_has_a_row_for_each() -> None:
    fig = KINDS["heatmap"].draw([source("a", 3), source("b", 3)])
    panels = [ax for ax in fig.axes if ax.images]
    places = [ax.get_subplotspec() for ax in panels]
    assert [(place.rowspan.start, place.colspan.start) for place in places if place] == [
        (row, column) for row in (0, 1) for column in (0, 1, 2)
    ]


def test_heatmap_of_one_fact_says_that_there_are_no_pairs() -> None:
    fig = KINDS["heatmap"].draw([source(m=1)])
    assert "no pairs" in fig.axes[0].get_title()


def test_heatmap_has_a_dot_for_every_fact() -> None:
    fig = KINDS["heatmap"].draw([source(layers=12, m=512)])
    with house_style():
        fig.draw_without_rendering()
    assert fig.axes[0].get_window_extent().width >= 512


# Density


def test_density_is_the_sum_of_kernels() -> None:
    values = off_diagonal(heavy_tailed(64))
    density = kernel_density(values)
    exact = scipy.stats.gaussian_kde(values, density.bandwidth / values.std(ddof=1))
    at = density.x[::50]
    np.testing.assert_allclose(density.y[::50], exact(at), atol=2e-3 * density.y.max())


@pytest.mark.parametrize("m", [2, 3, 64, 200])
def test_density_integrates_to_one(m: int) -> None:
    density = kernel_density(off_diagonal(heavy_tailed(m)))
    assert np.trapezoid(density.y, density.x) == pytest.approx(1, abs=1e-4)


def test_density_of_a_gaussian_is_close_to_it() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.05, 200_000)
    density = kernel_density(values)
    truth = scipy.stats.norm(0.3, 0.05).pdf(density.x)
    np.testing.assert_allclose(density.y, truth, atol=0.03 * truth.max())


def test_a_heavy_tail_does_not_flatten_the_peak() -> None:
    bulk = np.random.default_rng(0).normal(0, 0.01, 16_000)
    with_tail = np.concatenate([bulk, np.linspace(0.5, 1.4, 160)])
    assert robust_bandwidth(with_tail) < 1.1 * robust_bandwidth(bulk)
    assert kernel_density(with_tail).y.max() > 0.95 * kernel_density(bulk).y.max()
    # What the standard deviation would have done, and SciPy's rule does by itself.
    assert scipy.stats.gaussian_kde(with_tail, "silverman")(0)[0] < 0.8 * scipy.stats.norm(
        0, 0.01
    ).pdf(0)


def test_bandwidth_is_silvermans_for_a_gaussian_sample() -> None:
    values = np.random.default_rng(0).normal(0, 2, 50_000)
    assert robust_bandwidth(values) == pytest.approx(1.06 * 2 * 50_000**-0.2, rel=0.02)


def test_density_of_values_most_of_which_are_equal_stays_small() -> None:
    values = np.zeros(10_000)
    values[:10] = 1.0
    values[10:3000] = 1e-14
    density = kernel_density(values)
    assert density.x.size < 200_000
    assert np.trapezoid(density.y, density.x) == pytest.approx(1, abs=1e-4)


def test_kde_draws_each_layers_density_and_says_its_kurtosis() -> None:
    matrices = [heavy_tailed(32, seed) for seed in range(3)]
    fig = KINDS["kde"].draw([of(*matrices)])
    lines = fig.axes[0].lines[1:]  # the first marks zero
    labels = [text.get_text() for text in fig.axes[1].get_legend().get_texts()]  # type: ignore[union-attr]
    for layer, (P, line, label) in enumerate(zip(matrices, lines, labels, strict=True)):
        entries = off_diagonal(P)
        density = kernel_density(entries)
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_array_equal(y, density.y[np.isin(density.x, x)])
        assert np.trapezoid(y, x) > 0.98
        assert label == f"layer {layer}: {number(float(scipy.stats.kurtosis(entries)), 1)}"


def test_kde_shows_the_bulk_and_says_what_lies_beyond() -> None:
    P = np.clip(np.random.default_rng(0).normal(0, 0.02, (64, 64)), -0.06, 0.06)
    P[0, 1:9] = 1.4
    fig = KINDS["kde"].draw([of(P)])
    ax = fig.axes[0]
    low, high = ax.get_xlim()
    assert -0.1 < low < -0.04
    assert 0.04 < high < 0.1
    notes = [text.get_text() for text in ax.texts]
    assert notes == [f"{100 * 8 / (64 * 63):.1f} % beyond, to 1.40 →"]


def test_kde_of_several_models_at_several_layers_has_axes_for_each_on_one_scale() -> None:
    fig = KINDS["kde"].draw([source("a", 2), source("b", 2, m=12)])
    drawn = [ax for ax in fig.axes if ax.lines]
    assert [ax.get_title() for ax in drawn] == ["a, m = 24", "b, m = 12"]
    assert len({ax.get_xlim() for ax in drawn}) == 1
    assert len({ax.get_ylim() for ax in drawn}) == 1


def test_kde_of_entries_that_are_all_equal_is_a_line_where_they_are() -> None:
    fig = KINDS["kde"].draw([of(np.full((4, 4), 0.3))])
    line = fig.axes[0].lines[1]
    np.testing.assert_array_equal(line.get_xdata(), [0.3, 0.3])
    assert "undefined" in texts(fig)
    low, high = fig.axes[0].get_xlim()
    assert low < 0.3 < high


# Kurtosis


def test_kurtosis_lines_are_scipys_values_over_the_layers() -> None:
    shallow, deep = source("a", 3), source("b", 5)
    fig = KINDS["kurtosis"].draw([shallow, deep])
    lines = fig.axes[0].lines[1:]  # the first marks zero
    for line, one in zip(lines, (shallow, deep), strict=True):
        expected = [
            scipy.stats.kurtosis(off_diagonal(one.matrices.matrix("P", layer)))
            for layer in one.layers
        ]
        np.testing.assert_array_equal(line.get_xdata(), one.layers)
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, atol=1e-9)
    assert {line.get_color() for line in lines} == {"#0072B2", "#D55E00"}


def test_kurtosis_legend_names_the_models_where_there_are_several() -> None:
    fig = KINDS["kurtosis"].draw([source("a"), source("b")])
    assert [text.get_text() for text in fig.axes[1].get_legend().get_texts()] == ["a", "b"]  # type: ignore[union-attr]
    assert KINDS["kurtosis"].draw([source("a")]).axes[1].get_legend() is None


def test_kurtosis_undefined_is_a_gap_that_is_named() -> None:
    fig = KINDS["kurtosis"].draw([of(heavy_tailed(8), np.ones((8, 8)), np.ones((8, 8)))])
    values = np.asarray(fig.axes[0].lines[1].get_ydata())
    np.testing.assert_array_equal(np.isnan(values), [False, True, True])
    assert "undefined at layer 1-2" in texts(fig)


@pytest.mark.parametrize("layers", [1, 2, 12, 48])
def test_kurtosis_ticks_are_layers(layers: int) -> None:
    ax = KINDS["kurtosis"].draw([source(layers=layers, m=4)]).axes[0]
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) and 0 <= tick < layers for tick in ticks)


# Names


def test_names_split_what_is_shared_from_what_tells_apart() -> None:
    split = names([("a", "layer 0", "m = 8"), ("a", "layer 1", "m = 8")])
    assert split.shared == ("a", "m = 8")
    assert split.own == (("layer 0",), ("layer 1",))


def test_a_name_that_is_too_wide_loses_its_middle() -> None:
    text = fitted([LONG, "layer 0"], 1.5, 7)
    assert text.startswith("Hugg")
    assert text.endswith("2f, layer 0")
    assert "…" in text
    assert text_width(text, 7) <= 1.5
    assert fitted(["gpt2", "layer 0"], 1.5, 7) == "gpt2, layer 0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (-0.5, "−0.50"), (-0.001, "0.00"), (float("nan"), "undefined")],
)
def test_numbers_as_figures_show_them(value: float, text: str) -> None:
    assert number(value, 2) == text


# Saving


MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture(scope="module")
def figure() -> Figure:
    return KINDS["kurtosis"].draw([source(layers=2, m=8)])


@pytest.mark.parametrize("extension", [*FORMATS, "PNG"])
def test_the_extension_is_the_format(tmp_path: Path, figure: Figure, extension: str) -> None:
    path = tmp_path / "made" / f"figure.{extension}"
    save_figure(figure, path)
    assert path.read_bytes().startswith(MAGIC[extension.lower()])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["figure.gif", "figure", "figure.png.txt"])
def test_an_unknown_extension_is_refused_naming_the_known(
    tmp_path: Path, figure: Figure, name: str
) -> None:
    with pytest.raises(UsageError, match=r"\.pdf, \.png, \.svg"):
        save_figure(figure, tmp_path / name, force=True)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, figure: Figure) -> None:
    path = tmp_path / "figure.svg"
    path.write_text("mine")
    with pytest.raises(KscliError, match="--force"):
        save_figure(figure, path)
    assert path.read_text() == "mine"
    save_figure(figure, path, force=True)
    assert path.read_bytes().startswith(MAGIC["svg"])
    assert check_target(path, force=True) == "svg"


@pytest.mark.parametrize("where", ["file/figure.png", "folder.png", f"{300 * 'n'}.png"])
def test_where_it_cannot_be_written_nothing_is_left(
    tmp_path: Path, figure: Figure, where: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KscliError, match=r"was not written|is a folder"):
        save_figure(figure, tmp_path / where, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "figure.png"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KscliError, match="the disk is full"):
        save_figure(figure, path, force=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_bytes(kind: str, extension: str) -> None:
    first, second = (
        render(KINDS[kind].draw([source("a", m=8), source("b", m=8)]), extension) for _ in range(2)
    )
    assert first == second


def test_another_process_gives_the_same_bytes() -> None:
    code = (
        "import hashlib, numpy as np, kscli.figures as f\n"
        "from kscli.figures.saving import render\n"
        "class Pm:\n model = 'a'\n layers = (0,)\n"
        " def matrix(self, name, layer): return np.eye(3) + np.tri(3) / 9\n"
        "digest = hashlib.sha256()\n"
        "for kind in f.KINDS.values():\n"
        " digest.update(render(kind.draw([f.Source(Pm(), (0,))]), 'svg'))\n"
        "print(digest.hexdigest())"
    )
    digest = hashlib.sha256()
    for kind in KINDS.values():
        digest.update(render(kind.draw([of(np.eye(3) + np.tri(3) / 9, model="a")]), "svg"))
    assert run(code) == digest.hexdigest()


def test_vector_formats_keep_text_as_text() -> None:
    fig = KINDS["kurtosis"].draw([source("gpt2-xl")])
    assert b"gpt2-xl, m = 24</text>" in render(fig, "svg")
    assert b"/FontFile2" in render(fig, "pdf")
