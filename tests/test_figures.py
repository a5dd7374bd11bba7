"""Figures: the data they draw, what they say about it, that it fits, and how it is saved."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

from kscli.analysis.angles import angles, mode
from kscli.analysis.convergence import (
    Convergence,
    convergence_of,
    default_counts,
    largest_difference,
)
from kscli.analysis.density import kernel_density, make_curve, robust_bandwidth
from kscli.analysis.resampling import (
    Interval,
    Resampling,
    bootstrap_moments,
    interval,
    resample_counts,
)
from kscli.artifacts import MatrixName
from kscli.cli.plot import counts_of, default_name
from kscli.errors import KscliError, UsageError
from kscli.figures import KINDS, FigureOptions, Source, paged
from kscli.figures.saving import (
    FORMATS,
    check_target,
    page_paths,
    render,
    save_figure,
    save_pages,
)
from kscli.figures.style import (
    axes_over_lists,
    fitted,
    house_style,
    list_below,
    make_room,
    names,
    shades,
    text_width,
    write_below,
)
from kscli.models.families import family, parameters
from kscli.numbers import number

SMALL = np.array([[0, 0.1, 0.2], [0.1, 0, -0.3], [0.2, -0.3, 0]])
LONG = "HuggingFaceTB/SmolLM2-135M-Instruct_with-a$name$-that-goes-on-and-on-Q4_1-revision-2f"


@dataclass(eq=False)
class Stored:
    """A pmatrix file in memory; its cosines are P without its asymmetry and beyond 1."""

    model: str
    matrices: dict[int, NDArray[np.float64]]
    tokens: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.matrices)

    @property
    def token_id(self) -> NDArray[np.int64]:
        m = len(next(iter(self.matrices.values())))
        return np.array(self.tokens or [at // 3 for at in range(m)])

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        P = self.matrices[layer]
        if name == "P":
            return P
        cosine = np.clip((P + P.T) / 2, -1, 1)
        return cosine if name == "whitened_cosine" else np.sqrt(np.abs(cosine))


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


def place_of(fig: Figure, words: str) -> tuple[float, float]:
    """Left and upper edge, in points, of the first text from the left with these words."""
    found = [artist for artist in fig.findobj(Text) if words in artist.get_text()]  # type: ignore[attr-defined]
    boxes = [artist.get_window_extent() for artist in found]
    return min((box.x0, box.y1) for box in boxes)


def off_diagonal(P: NDArray[np.float64]) -> NDArray[np.float64]:
    return P[~np.eye(len(P), dtype=bool)]


# Kinds that can be drawn of any facts.
STANDARD = [name for name, kind in KINDS.items() if kind.standard]


# Every kind


SITUATIONS = {
    "forty-eight layers": [source(layers=48, m=4)],
    "four models": [source(model) for model in ("_hidden", "$x_{", "a^b", LONG)],
    "models and layers": [source("gpt2", 2), source(LONG, 2)],
    "models of different depth and m": [source("gpt2", 3), source(LONG, 2, m=8)],
    "one model of a long name": [source(LONG, m=8)],
    "one fact, and two": [source(m=1), source("b", m=2)],
    "constant": [of(np.ones((4, 4)), heavy_tailed(4))],
}


@pytest.mark.parametrize("kind", STANDARD)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_nothing_is_drawn_off_the_page(kind: str, situation: str) -> None:
    sources = SITUATIONS[situation]
    if kind == "convergence":
        most = 2 if situation == "models and layers" else 1
        sources = [Source(one.matrices, one.layers[:most]) for one in sources]
    assert_on_the_page(KINDS[kind].draw(sources))


@pytest.mark.parametrize("kind", ["heatmap", "kde"])
@pytest.mark.parametrize(
    "situation", ["models and layers", "one model of a long name", "one fact, and two"]
)
def test_no_grid_and_no_mark_is_drawn_off_the_page(kind: str, situation: str) -> None:
    sources = [Source(one.matrices, one.layers[-5:]) for one in SITUATIONS[situation]]
    for options in (FigureOptions(mark_same_token=True), FigureOptions(True, True)):
        for fig in KINDS[kind].pages(sources, options):
            assert_on_the_page(fig)


def lay_out(fig: Figure) -> None:
    """Put everything in its place, without drawing it."""
    with house_style():
        engine = fig.get_layout_engine()
        assert engine is not None
        engine.execute(fig)


def assert_on_the_page(fig: Figure) -> None:
    fig.set_dpi(72)
    lay_out(fig)
    with house_style():
        box = fig.get_tightbbox()
    width, height = fig.get_size_inches()
    assert box.x0 > -0.02
    assert box.y0 > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02


@pytest.mark.parametrize("kind", STANDARD)
def test_every_kind_names_model_layer_and_m(kind: str) -> None:
    text = texts(KINDS[kind].draw([source("gpt2-xl", m=24)]))
    assert "gpt2-xl" in text
    assert "m = 24" in text
    assert "layer" in text


@pytest.mark.parametrize("kind", STANDARD)
def test_without_a_layer_there_is_nothing_to_draw(kind: str) -> None:
    for draw in (KINDS[kind].draw, KINDS[kind].pages):
        with pytest.raises(UsageError, match="no layer"):
            draw([Source(Stored("gpt2", {}), ())])


def test_an_option_that_a_kind_does_not_take_is_refused_naming_those_that_do() -> None:
    with pytest.raises(UsageError, match="angles takes no --grid; heatmap and kde do"):
        KINDS["angles"].draw([source()], FigureOptions(grid=True))
    with pytest.raises(UsageError, match="kurtosis takes no --facts-counts; convergence does"):
        KINDS["kurtosis"].pages([source()], FigureOptions(facts_counts=(2,)))


@pytest.mark.parametrize("kind", STANDARD)
def test_the_smallest_model_comes_first(kind: str) -> None:
    models = ("someone/unknown", "pythia-1b", "gpt-j", "openai-community--gpt2", "SmolLM2-135M")
    fig = KINDS[kind].draw([source(model, m=8) for model in models])
    fig.set_dpi(72)
    with house_style():
        fig.draw_without_rendering()
        places = [place_of(fig, models[at]) for at in (3, 4, 1, 2, 0)]
    for (left, top), (next_left, next_top) in pairwise(places):
        assert next_top < top - 3 or (next_left > left and next_top < top + 3)


@pytest.mark.parametrize(
    ("model", "size", "of"),
    [
        ("gpt2-large", 774_030_080, "GPT2"),
        ("EleutherAI--pythia-1b", 1_011_781_632, "Pythia"),
        ("SmolLM2-135M-Instruct.gguf", 135e6, "SmolLM2-Instruct"),
        ("Qwen/Qwen1.5-0.5B", 0.5e9, "Qwen1.5"),
        ("Llama-3.2-1b", 1e9, "Llama-3.2"),
        ("Mixtral-8x7B", None, "Mixtral-8x7B"),
        ("7B", 7e9, "7B"),
    ],
)
def test_a_name_tells_size_and_family(model: str, size: float | None, of: str) -> None:
    assert parameters(model) == size
    assert family(model) == of


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
        assert image.get_clim() == pytest.approx((-1, 1), abs=1e-5)
        assert image.get_interpolation() == "none"


@pytest.mark.parametrize(
    ("least", "largest", "extend"),
    [
        (-0.8, 0.9, "neither"),
        (-0.8, float(np.nextafter(np.float32(1), np.float32(2))), "neither"),
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


def test_heatmap_frames_no_cells_that_would_vanish_between_frames() -> None:
    marked = FigureOptions(mark_same_token=True)
    for m, framed in ((300, True), (1200, False)):
        fig = KINDS["heatmap"].draw([source(m=m)], marked)
        assert bool(fig.axes[0].collections) == framed
        assert ("green frames" in texts(fig)) == framed
        assert ("too many for frames" in texts(fig)) != framed


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


@pytest.mark.parametrize("layers", [2, 6])
def test_heatmap_titles_of_long_names_keep_apart(layers: int) -> None:
    fig = KINDS["heatmap"].draw([source(LONG, layers), source(LONG[::-1], layers, m=20)])
    fig.set_dpi(72)
    lay_out(fig)
    with house_style():
        boxes = [ax.title.get_window_extent() for ax in fig.axes if ax.images]
    assert len(boxes) == 2 * layers
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[at + 1 :])


def test_heatmap_titles_name_a_model_in_a_line_of_its_own_where_one_line_would_cut_it() -> None:
    fig = KINDS["heatmap"].draw([source("someones-own-1b", 6, m=4), source("gpt2-small", 6, m=4)])
    heads = [ax.get_title().splitlines()[:-1] for ax in fig.axes if ax.images]
    assert heads[0] == ["gpt2-small", "layer 0"]
    assert heads[-1] == ["someones-own-1b", "layer 5"]


def test_heatmap_panels_of_different_m_have_labels_of_their_own() -> None:
    def labelled(*m: int) -> list[tuple[bool, bool]]:
        fig = KINDS["heatmap"].draw([source(f"{at}-1b", 2, m=n) for at, n in enumerate(m)])
        parameters = [
            [axis.get_tick_params() for axis in (ax.xaxis, ax.yaxis)]
            for ax in fig.axes
            if ax.images
        ]
        return [(x["labelbottom"], y["labelleft"]) for x, y in parameters]

    assert labelled(8, 5) == 4 * [(True, True)]
    assert labelled(8, 8) == [(False, True), (False, False), (True, True), (True, False)]


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


@pytest.mark.parametrize("layers", [1, 4, 5, 12, 20])
def test_heatmap_labels_stand_at_their_ticks(layers: int) -> None:
    fig = KINDS["heatmap"].draw([source(layers=layers, m=16)])
    fig.set_dpi(72)
    with house_style():
        fig.draw_without_rendering()
        label = next(text for text in fig.texts if "is moved" in text.get_text())
        ticks = [text for ax in fig.axes if ax.images for text in ax.get_xticklabels()]
        lowest = min(text.get_window_extent().y0 for text in ticks if text.get_text())
        gap = lowest - label.get_window_extent().y1
    assert 1 < gap < 10  # text is a point higher in Matplotlib 3.10


def test_heatmap_has_a_dot_for_every_fact() -> None:
    fig = KINDS["heatmap"].draw([of(*12 * [np.eye(512)])])
    lay_out(fig)
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
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
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
    first, second = source("a", 4), source("b", 4, largest=1.4)
    fig = KINDS["kurtosis"].draw([first, second])
    lines = fig.axes[0].lines[1:]  # the first marks zero
    for line, one in zip(lines, (first, second), strict=True):
        expected = [
            scipy.stats.kurtosis(off_diagonal(one.matrices.matrix("P", layer)))
            for layer in one.layers
        ]
        np.testing.assert_array_equal(line.get_xdata(), one.layers)
        np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, atol=1e-9)
    assert {line.get_color() for line in lines} == {"#0072B2", "#D55E00"}


def test_kurtosis_of_models_of_different_depth_is_over_the_relative_depth() -> None:
    shallow, deep, part = source("a", 3), source("b", 5), source("c", 5)
    fig = KINDS["kurtosis"].draw([shallow, deep, Source(part.matrices, (0, 2, 4), depth=9)])
    lines = fig.axes[0].lines[1:]
    np.testing.assert_allclose(lines[0].get_xdata(), [0, 0.5, 1])
    np.testing.assert_allclose(lines[1].get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(lines[2].get_xdata(), [0, 0.25, 0.5])
    assert "relative depth" in fig.axes[0].get_xlabel()


def test_kurtosis_families_are_side_by_side_in_shades_by_size() -> None:
    models = ("pythia-2.8b", "gpt2-medium", "gpt-j", "gpt2-small", "pythia-1b", "gpt2-large")
    fig = KINDS["kurtosis"].draw([source(model, 2, m=8) for model in models])
    drawn = [ax for ax in fig.axes if ax.lines]
    assert [ax.get_title() for ax in drawn] == ["GPT2", "Pythia", "GPT-J"]
    legends = [ax.get_legend() for ax in fig.axes if ax.get_legend()]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends if legend] == [
        ["gpt2-small", "gpt2-large", "gpt2-medium"],  # by column: the second row is gpt2-large
        ["pythia-1b", "pythia-2.8b"],
        ["gpt-j"],
    ]
    colours = [line.get_color() for line in drawn[0].lines[1:]]
    assert colours == shades("#0072B2", 3)
    lightness = [sum(colour) for colour in colours]
    assert lightness == sorted(lightness, reverse=True)
    assert len({ax.get_ylim() for ax in drawn}) == 1


def test_kurtosis_of_a_mixture_is_beside_the_dense_models_of_its_active_size() -> None:
    models = ("qwen3-0.6b", "qwen3-4b", "qwen3-30b-a3b", "llama3.2-3b", "gpt-j", "gpt2-small")
    fig = KINDS["kurtosis"].draw([source(model, 2, m=8) for model in models])
    legends = {
        ax.get_title(): [text.get_text() for text in ax.get_legend().get_texts()] for ax in fig.axes
    }
    assert legends == {
        "Qwen3": ["qwen3-0.6b", "qwen3-4b"],
        "about 4 B active parameters": ["llama3.2-3b", "qwen3-4b", "qwen3-30b-a3b"],
        "other models": ["gpt2-small", "gpt-j"],
    }
    lines = fig.axes[1].lines[1:]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
    alone = KINDS["kurtosis"].draw([source("qwen3-30b-a3b", 2, m=8), source("gpt-j", 2, m=8)])
    assert [ax.get_title() for ax in alone.axes] == [""]


def test_kurtosis_band_is_the_interval_of_resampled_facts() -> None:
    one = source(layers=3, m=16)
    fig = KINDS["kurtosis"].draw([one], FigureOptions(seed=3))
    [band] = [artist for artist in fig.axes[0].collections if artist.get_alpha()]
    drawn = band.get_paths()[0].vertices
    for layer in one.layers:
        counts = resample_counts(16, seed=3)
        of = interval(bootstrap_moments(one.matrices.matrix("P", layer), counts).kurtosis)
        there = drawn[drawn[:, 0] == layer, 1]
        assert (there.min(), there.max()) == pytest.approx((of.low, of.high))
    assert "band: 95 % interval" in texts(fig)


def test_kurtosis_of_three_sizes_has_a_bar_at_every_layer_beside_those_of_the_other_sizes() -> None:
    sizes = [source(name, 3, m=16) for name in ("gpt2-small", "gpt2-medium", "gpt2-large")]
    fig = KINDS["kurtosis"].draw([*sizes, source("pythia-1b", 2), source("pythia-2.8b", 2)])
    assert texts(fig).count("bar: 95 % interval") == 2
    first, second = (ax for ax in fig.axes if ax.lines)
    assert [len(ax.collections) for ax in (first, second)] == [3, 2]
    for bars, one in zip(first.collections, sizes, strict=True):
        for layer, bar in zip(one.layers, bars.get_segments(), strict=True):  # type: ignore[attr-defined]
            counts = resample_counts(16)
            of = interval(bootstrap_moments(one.matrices.matrix("P", layer), counts).kurtosis)
            np.testing.assert_allclose(bar, [(layer / 2, of.low), (layer / 2, of.high)])
    aside = [bars.get_transform().transform((0, 0))[0] for bars in first.collections]
    np.testing.assert_allclose(np.diff(aside), 1.2 * fig.dpi / 72)


def test_kurtosis_of_more_lines_than_have_room_for_intervals_says_so() -> None:
    fig = KINDS["kurtosis"].draw([source(name, 3, m=8) for name in "abcde"])
    assert not fig.axes[0].collections
    assert "too many lines" in texts(fig)


def test_kurtosis_legend_names_the_models_where_there_are_several() -> None:
    fig = KINDS["kurtosis"].draw([source("a"), source("b")])
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["a", "b"]  # type: ignore[union-attr]
    assert KINDS["kurtosis"].draw([source("a")]).axes[0].get_legend() is None


def test_kurtosis_undefined_is_a_gap_that_is_named() -> None:
    fig = KINDS["kurtosis"].draw([of(heavy_tailed(8), np.ones((8, 8)), np.ones((8, 8)))])
    values = np.asarray(fig.axes[0].lines[1].get_ydata())
    np.testing.assert_array_equal(np.isnan(values), [False, True, True])
    assert "undefined at layers 1-2" in texts(fig)
    assert "the kurtosis is undefined" not in texts(fig)
    nowhere = texts(KINDS["kurtosis"].draw([of(np.ones((8, 8)))]))
    assert "the kurtosis is undefined" in nowhere
    assert "undefined at layer 0" in nowhere


@pytest.mark.parametrize("layers", [1, 2, 12, 48])
def test_kurtosis_ticks_are_layers(layers: int) -> None:
    ax = KINDS["kurtosis"].draw([source(layers=layers, m=4)]).axes[0]
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) and 0 <= tick < layers for tick in ticks)


# Angles


def test_angles_are_the_arccos_of_every_pair_once() -> None:
    K = np.random.default_rng(0).standard_normal((5, 3))
    K[4] = 2 * K[0]
    unit = K / np.linalg.norm(K, axis=1, keepdims=True)
    found = angles(unit @ unit.T * (1 + 1e-15))
    expected = [
        np.degrees(np.arctan2(np.linalg.norm(np.cross(K[i], K[j])), K[i] @ K[j]))
        for i in range(5)
        for j in range(i + 1, 5)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_angles_of_both_spaces_are_side_by_side_on_one_scale() -> None:
    one = source(layers=2, m=32)
    fig = KINDS["angles"].draw([Source(one.matrices, (1,))])
    assert [ax.get_title() for ax in fig.axes] == ["whitening space", "activation space"]
    for ax, name in zip(fig.axes, ("whitened_cosine", "cosine"), strict=True):
        values = angles(one.matrices.matrix(name, 1))  # type: ignore[arg-type]
        density = kernel_density(values, bounds=(0, 180))
        x, y = np.asarray(ax.lines[1].get_xdata()), np.asarray(ax.lines[1].get_ydata())
        np.testing.assert_array_equal(y, density.y[np.isin(density.x, x)])
        at = density.x[np.argmax(density.y)]
        [label] = ax.get_legend().get_texts()  # type: ignore[union-attr]
        assert label.get_text() == f"{at:.1f}°"
    assert fig.axes[0].get_xlim() == fig.axes[1].get_xlim()
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim()


def test_angles_of_more_lines_of_several_models_than_can_be_told_apart_are_refused() -> None:
    two = [source("a", 9, m=4), source("b", 10, m=4)]
    with pytest.raises(UsageError, match="can tell 18 lines of several models apart, not 19"):
        KINDS["angles"].draw(two)
    assert KINDS["angles"].draw([two[0], Source(two[1].matrices, tuple(range(9)))])


def test_angles_that_are_all_0_are_a_line_that_the_axes_edge_does_not_hide() -> None:
    ax = KINDS["angles"].draw([of(np.ones((4, 4)))]).axes[0]
    [line] = [line for line in ax.lines if set(np.asarray(line.get_xdata())) == {0.0}]
    assert line.get_zorder() > ax.spines["left"].get_zorder()
    assert not line.get_clip_on()


def test_the_mode_is_where_most_angles_are() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(88, 3, 20_000), rng.uniform(10, 80, 2_000)])
    assert mode(make_curve(values, (0, 180))) == pytest.approx(88, abs=0.5)
    assert mode(make_curve(np.full(3, 60.0))) == 60
    assert np.isnan(mode(make_curve(np.array([]))))


def test_density_within_bounds_loses_nothing_beyond_them() -> None:
    values = np.abs(np.random.default_rng(0).normal(0, 1, 5_000))
    density = kernel_density(values, bounds=(0.0, 10.0))
    assert density.x[0] > 0
    assert np.trapezoid(density.y, density.x) == pytest.approx(1, abs=0.02)
    assert density.y[0] == pytest.approx(2 * scipy.stats.norm.pdf(0), rel=0.1)


# Convergence


def test_settling_is_the_kurtosis_of_the_first_facts() -> None:
    P = heavy_tailed(32)
    found = convergence_of(P, (16, 8, 32, 8), Resampling(seed=1))
    assert found.counts == (8, 16, 32)
    for count, value, of in zip(found.counts, found.kurtosis, found.intervals, strict=True):
        part = P[:count, :count]
        assert value == pytest.approx(scipy.stats.kurtosis(off_diagonal(part)), abs=1e-9)
        assert of == interval(bootstrap_moments(part, resample_counts(count, seed=1)).kurtosis)
    assert found.before == 1
    assert found.moved == pytest.approx(
        scipy.stats.ks_2samp(off_diagonal(P[:16, :16]), off_diagonal(P)).statistic
    )
    last = found.intervals[2]
    assert last.low <= found.kurtosis[1] <= last.high
    assert last.high - last.low > 0.2 * found.kurtosis[2]
    assert found.converged is None


def test_the_sentence_says_whether_the_kurtosis_has_converged() -> None:
    rng = np.random.default_rng(0)
    alike = rng.normal(0, 0.1, (64, 64))
    found = convergence_of(alike, (), Resampling())
    assert found.converged
    assert "has converged at m = 64 to within its error, ± 0.2: it was" in found.sentence
    assert f"was {found.kurtosis[3]:.1f} with 32 facts" in found.sentence
    then_bound = alike.copy()
    then_bound[40:46, 40:46] = 1.0
    found = convergence_of(then_bound, (), Resampling())
    assert found.converged is False
    assert "has not converged at m = 64" in found.sentence


@pytest.mark.parametrize(
    ("now", "ends", "said"),
    [
        (47.5, (29.3, 73.0), "converged at m = 128 cannot be told: it was 29.3"),
        (47.5, (29.3, 73.0), "95 % interval, 29.3 to 73.0, which is wide (± 46 %)."),
        (47.5, (40.0, 60.0), "which is wide (± 21 %)."),
        (47.5, (43.5, 52.5), "has converged at m = 128 to within its error, ± 9 %: it was 43.5"),
        (0.1, (-0.2, 0.2), "has converged at m = 128 to within its error, ± 0.2: it was"),
        (0.1, (-0.9, 1.1), "which is wide (± 1.0)."),
        (-0.9, (-1.9, 0.1), "which is wide (± 1.0)."),
    ],
)
def test_the_sentence_says_no_more_than_its_error_allows(
    now: float, ends: tuple[float, float], said: str
) -> None:
    none = Interval(float("nan"), float("nan"))
    found = Convergence((64, 128), (ends[0], now), (none, Interval(*ends)), 0.01)
    assert said in found.sentence
    assert found.converged is (None if "wide" in found.sentence else True)
    far = Convergence((64, 128), (99.0, now), found.intervals, 0.01)
    assert far.converged is False
    assert "has not converged at m = 128: it was 99.0" in far.sentence
    assert "wide" not in far.sentence


@pytest.mark.parametrize(
    ("P", "counts", "said"),
    [
        (np.eye(1), (), "One fact makes no pair"),
        (np.array([[1, 0.2], [0.1, 1]]), (), "it has no interval"),
        (heavy_tailed(3), (), "it has no interval"),
        (np.ones((16, 16)), (), "it is undefined"),
        (heavy_tailed(16), (16,), "no count of at most half"),
        (heavy_tailed(16), (9, 16), "no count of at most half"),
    ],
)
def test_the_sentence_where_convergence_cannot_be_told(
    P: NDArray[np.float64], counts: tuple[int, ...], said: str
) -> None:
    found = convergence_of(P, counts, Resampling(repeats=100))
    assert found.converged is None
    assert said in found.sentence


@pytest.mark.parametrize(("counts", "said"), [((8, 17), "17 facts among 16"), ((1, 8), "no pair")])
def test_counts_that_the_facts_do_not_allow_are_refused(counts: tuple[int, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        KINDS["convergence"].draw([source(m=16)], FigureOptions(facts_counts=counts))


def test_the_default_counts() -> None:
    assert default_counts(128) == (16, 32, 48, 64, 80, 96, 112, 128)
    assert default_counts(1000) == tuple(range(125, 1001, 125))
    assert [default_counts(m) for m in (1, 2, 3, 5)] == [(1,), (2,), (3,), (4, 5)]


def test_the_largest_difference_of_two_distributions_is_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 50), np.round(rng.normal(0.3, 1, 70), 1)
    expected = scipy.stats.ks_2samp(first, second).statistic
    assert largest_difference(first, second) == pytest.approx(expected)
    assert np.isnan(largest_difference(first, np.array([])))


def test_convergence_draws_density_and_kurtosis_of_the_first_facts() -> None:
    P = heavy_tailed(32)
    fig = KINDS["convergence"].draw([of(P)], FigureOptions(facts_counts=(8, 16, 32)))
    left, right = fig.axes[:2]
    for count, line in zip((8, 16, 32), left.lines[1:], strict=True):
        density = kernel_density(off_diagonal(P[:count, :count]))
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_array_equal(y, density.y[np.isin(density.x, x)])
    found = convergence_of(P, (8, 16, 32), Resampling())
    np.testing.assert_array_equal(right.lines[1].get_xdata(), [8, 16, 32])
    np.testing.assert_allclose(right.lines[1].get_ydata(), found.kurtosis)
    bars = [bar.get_segments()[0][:, 1] for bar in right.collections]  # type: ignore[attr-defined]
    np.testing.assert_allclose(bars, [(of.low, of.high) for of in found.intervals])
    assert found.sentence in texts(fig).replace("\n", " ")


def test_a_sentence_has_the_minus_signs_of_the_figures() -> None:
    P = np.random.default_rng(0).uniform(-0.1, 0.1, (32, 32))
    found = convergence_of(P, (), Resampling(repeats=100))
    then, now = number(found.kurtosis[3], 1), number(found.kurtosis[-1], 1)
    assert now.startswith("\N{MINUS SIGN}")
    assert f"was {then} with 16 facts and is {now} now" in found.sentence
    assert "-" not in found.sentence


def test_convergence_of_more_rows_than_a_page_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="not 7; name fewer"):
        KINDS["convergence"].draw([source(layers=7)])


# Grids and marks


def test_a_grid_has_twenty_layers_of_one_model_on_a_page() -> None:
    sources = [source("gpt2-large", 23, m=4), source("gpt2-small", 2, m=4)]
    grid = FigureOptions(grid=True)
    pages = paged(sources, grid)
    assert [[one.matrices.model for one in page] for page in pages] == [
        ["gpt2-small"],
        ["gpt2-large"],
        ["gpt2-large"],
    ]
    assert [page[0].layers for page in pages] == [(0, 1), tuple(range(20)), (20, 21, 22)]
    assert paged(sources, FigureOptions()) == [tuple(sources)]
    for kind in ("heatmap", "kde"):
        drawn = KINDS[kind].pages(sources, grid)
        heads = [fig.get_suptitle().splitlines()[1] for fig in drawn]
        assert heads == [
            "gpt2-small, layers 0-1, m = 4",
            "gpt2-large, layers 0-19, m = 4",
            "gpt2-large, layers 20-22, m = 4",
        ]


def test_kde_grid_has_a_panel_a_layer_on_one_scale() -> None:
    one = source(layers=5)
    [fig] = KINDS["kde"].pages([one], FigureOptions(grid=True))
    panels = [ax for ax in fig.axes if ax.lines]
    assert len({(*ax.get_xlim(), *ax.get_ylim()) for ax in panels}) == 1
    for layer, ax in enumerate(panels):
        entries = off_diagonal(one.matrices.matrix("P", layer))
        density = kernel_density(entries)
        x, y = np.asarray(ax.lines[1].get_xdata()), np.asarray(ax.lines[1].get_ydata())
        np.testing.assert_array_equal(y, density.y[np.isin(density.x, x)])
        kurtosis = number(float(scipy.stats.kurtosis(entries)), 1)
        low, high = number(entries.min(), 2), number(entries.max(), 2)
        assert ax.get_title() == f"layer {layer}: {kurtosis}\n{low} to {high}"


def test_a_kde_grid_of_some_layers_says_that_its_scale_is_its_own() -> None:
    one = source("gpt2-large", 23, m=8)
    first, second = KINDS["kde"].pages([one], FigureOptions(grid=True))
    for fig in (first, second):
        top = number(fig.axes[0].get_ylim()[1], 0)
        assert len(top) > 1
        said = f"this page has one scale, to a density of {top}, and other pages their own"
        assert said in texts(fig).replace("\n", " ")
    [whole] = KINDS["kde"].pages([source(layers=3, m=8)], FigureOptions(grid=True))
    assert "scale" not in texts(whole)


def test_heatmap_frames_the_pairs_of_the_same_token() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(5)}, tokens=(7, 8, 7, 7, 9))
    fig = KINDS["heatmap"].draw([Source(stored, (0,))], FigureOptions(mark_same_token=True))
    [frames] = fig.axes[0].collections
    centres = {
        tuple(np.round(path.vertices[:4].mean(axis=0)).astype(int)) for path in frames.get_paths()
    }
    # x is the column j, y the row i.
    assert centres == {(i, j) for i in (0, 2, 3) for j in (0, 2, 3) if i != j}
    assert all(np.ptp(path.vertices[:, 0]) > 1 for path in frames.get_paths())
    assert "same last token" in fig.get_suptitle()
    assert not KINDS["heatmap"].draw([Source(stored, (0,))]).axes[0].collections


def test_more_frames_than_a_vector_file_has_room_for_are_an_image() -> None:
    def of_one_token(m: int) -> bool:
        stored = Stored("gpt2", {0: heavy_tailed(m)}, tokens=m * (1,))
        fig = KINDS["heatmap"].draw([Source(stored, (0,))], FigureOptions(mark_same_token=True))
        [frames] = fig.axes[0].collections
        return bool(frames.get_rasterized())

    assert not of_one_token(12)
    assert of_one_token(150)


def test_kde_marked_has_a_line_of_all_pairs_and_one_of_pairs_at_different_tokens() -> None:
    P = heavy_tailed(30)
    tokens = tuple(at // 2 for at in range(30))
    stored = Stored("gpt2", {0: P}, tokens)
    fig = KINDS["kde"].draw([Source(stored, (0,))], FigureOptions(mark_same_token=True))
    ax = fig.axes[0]
    every, others = ax.lines[1:]
    assert ax.get_yscale() == "log"
    distinct = [P[i, j] for i in range(30) for j in range(30) if tokens[i] != tokens[j]]
    entries = off_diagonal(P)
    for line, share in ((every, 1.0), (others, len(distinct) / (30 * 29))):
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert x[0] < entries.min()
        assert x[-1] > entries.max()
        assert np.trapezoid(y, x) == pytest.approx(share, abs=2e-3)
    [label] = fig.axes[0].get_legend().get_texts()  # type: ignore[union-attr]
    both = (scipy.stats.kurtosis(entries), scipy.stats.kurtosis(distinct))
    assert label.get_text() == " / ".join(number(float(value), 1) for value in both)


def test_kde_marked_peaks_where_the_unmarked_does_and_no_pair_is_on_the_dashed_line_alone() -> None:
    P = np.random.default_rng(0).normal(0, 0.01, (100, 100))
    P[:8, :8], P[20, 30] = 1.0, -1.0
    one = Source(Stored("gpt2", {0: P}, tokens=(*8 * (1,), *range(2, 94))), (0,))
    [plain, (every, others)] = [
        KINDS["kde"].draw([one], options).axes[0].lines[1:]
        for options in (FigureOptions(), FigureOptions(mark_same_token=True))
    ]
    peaks = [np.asarray(line.get_ydata()).max() for line in (plain[0], every)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
    every_y, others_y = (np.asarray(line.get_ydata()) for line in (every, others))
    assert (others_y <= every_y + 1e-9).all()
    # One pair is a hump of the wide kernel, not a spike of the bulk's.
    x = np.asarray(every.get_xdata())
    alone = every_y[np.abs(x + 1) < 0.5]
    assert alone.max() == pytest.approx(1 / 9900 / (2 / 80 * np.sqrt(2 * np.pi)), rel=0.01)


def test_kde_marked_beside_a_far_wider_range_stays_small() -> None:
    narrow = 1e-9 * heavy_tailed(8)
    fig = KINDS["kde"].draw([of(heavy_tailed(8), narrow)], FigureOptions(mark_same_token=True))
    assert all(np.asarray(line.get_xdata()).size < 100_000 for line in fig.axes[0].lines)


def test_kde_marks_only_as_many_lines_as_can_be_told_apart() -> None:
    marked = FigureOptions(mark_same_token=True)
    with pytest.raises(UsageError, match="at most 6 lines; name fewer layers, or add --grid"):
        KINDS["kde"].draw([source(layers=7)], marked)
    assert KINDS["kde"].draw([source("a", 4), source("b", 4)], marked)


def test_kde_marked_where_all_pairs_share_a_token() -> None:
    stored = Stored("gpt2", {0: heavy_tailed(4)}, tokens=(1, 1, 1, 1))
    fig = KINDS["kde"].draw([Source(stored, (0,))], FigureOptions(mark_same_token=True))
    assert not np.asarray(fig.axes[0].lines[2].get_ydata()).any()
    assert "undefined" in texts(fig)


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


@pytest.mark.parametrize(("width", "in_a_row"), [(9.0, 5), (2.4, 3), (1.5, 1)])
def test_a_legend_is_read_row_by_row_in_even_rows(width: float, in_a_row: int) -> None:
    labels = [f"layer {at}" for at in range(5)]
    with house_style():
        fig = axes_over_lists(width, 1.0, 1, 1)
        ax = fig.axes[0]
        ax.set(title="P", xlabel="facts", ylabel="p")
        before = fig.get_figheight()
        make_room(fig, [list_below(ax, [ax.plot([], [])[0] for _ in labels], labels)], 1)
        fig.draw_without_rendering()
        texts = ax.get_legend().get_texts()  # type: ignore[union-attr]
        places = {text.get_text(): text.get_window_extent().get_points()[0] for text in texts}
        edge = ax.xaxis.label.get_window_extent().y0
        assert max(text.get_window_extent().y1 for text in texts) < edge
        assert ax.get_window_extent().height / fig.dpi > 1.0
    assert fig.get_figheight() > before
    rows = {round(y) for _, y in places.values()}
    assert len(rows) == -(-5 // in_a_row)
    read = sorted(places, key=lambda text: (-round(places[text][1]), places[text][0]))
    assert read == labels


def test_a_sentence_is_wrapped_to_its_axes_and_stands_below_their_labels() -> None:
    words = "Whether this has converged cannot be told: there is nothing to compare it with."
    with house_style():
        fig = axes_over_lists(2.5, 1.0, 1, 1)
        ax = fig.axes[0]
        ax.set_xlabel("facts")
        make_room(fig, [write_below(ax, words)], 1)
        fig.draw_without_rendering()
        [written] = ax.texts
        extent = written.get_window_extent()
        assert extent.y1 < ax.xaxis.label.get_window_extent().y0
        assert extent.x1 < 2.5 * fig.dpi
        assert extent.y0 > 0
    assert written.get_text().replace("\n", " ") == words
    assert "\n" in written.get_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (-0.5, "−0.50"), (-0.001, "0.00"), (float("nan"), "undefined")],
)
def test_numbers_as_figures_show_them(value: float, text: str) -> None:
    assert number(value, 2) == text


# Saving


MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def figure_of(words: str) -> Figure:
    fig = Figure(figsize=(1, 1))
    fig.text(0, 0.5, words)
    return fig


@pytest.fixture(scope="module")
def figure() -> Figure:
    return figure_of("one")


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


def test_pages_are_one_pdf_or_numbered_files(tmp_path: Path, figure: Figure) -> None:
    two = [figure, figure_of("two")]
    assert save_pages(two, tmp_path / "a.pdf") == [tmp_path / "a.pdf"]
    assert (tmp_path / "a.pdf").read_bytes().count(b"/Type /Page ") == 2
    paths = [tmp_path / "a-1.svg", tmp_path / "a-2.svg"]
    assert page_paths(tmp_path / "a.svg", 2) == paths
    assert save_pages(two, tmp_path / "a.svg") == paths
    assert b">one</text>" in paths[0].read_bytes()
    assert b">two</text>" in paths[1].read_bytes()
    assert save_pages([figure], tmp_path / "b.svg") == [tmp_path / "b.svg"]
    first = (tmp_path / "a.pdf").read_bytes()
    save_pages(two, tmp_path / "a.pdf", force=True)
    assert (tmp_path / "a.pdf").read_bytes() == first


def test_no_page_is_written_where_one_may_not_be(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "a-2.svg").write_text("mine")
    with pytest.raises(KscliError, match="--force"):
        save_pages([figure, figure], tmp_path / "a.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["a-2.svg"]


def test_the_counts_of_a_command_line() -> None:
    assert counts_of(None) == ()
    assert counts_of("64, 16,16") == (16, 64)
    for text in ("", "16,", "-4", "a", "1e2"):
        with pytest.raises(UsageError, match="16,32,64,128"):
            counts_of(text)


def test_files_are_named_by_what_was_asked_for() -> None:
    assert default_name("kde", ["a"], None) == "kde.png"
    asked = FigureOptions(True, True, (16, 32))
    assert default_name("kde", ["a", "b"], "0,3", asked) == (
        "kde-a-b-layer0_3-grid-same-token-m16_32.png"
    )


@pytest.mark.parametrize(("kind", "extension"), [("heatmap", "pdf"), ("kurtosis", "png")])
def test_the_same_input_gives_the_same_bytes(kind: str, extension: str) -> None:
    first, second = (render(KINDS[kind].draw([source("a", m=5)]), extension) for _ in range(2))
    assert first == second


def test_another_process_gives_the_same_bytes_and_no_kind_touches_pyplot_or_settings() -> None:
    code = (
        "import hashlib, sys, numpy as np, kscli.figures as f\n"
        f"P = np.array({SMALL.tolist()})\n"
        "from kscli.figures.saving import render\n"
        "class Pm:\n model = 'a'\n layers = (0,)\n"
        " def matrix(self, name, layer): return np.eye(3) + P\n"
        "digest = hashlib.sha256()\n"
        "for kind in f.KINDS.values():\n"
        " if kind.standard: digest.update(render(kind.draw([f.Source(Pm(), (0,))]), 'svg'))\n"
        "print(digest.hexdigest(), 'matplotlib.pyplot' in sys.modules)"
    )
    digest = hashlib.sha256()

    class Same:
        model, layers = "a", (0,)

        def matrix(self, name: str, layer: int) -> NDArray[np.float64]:
            return np.eye(3) + SMALL

    before = dict(matplotlib.rcParams)
    for kind in map(KINDS.__getitem__, STANDARD):
        digest.update(render(kind.draw([Source(Same(), (0,))]), "svg"))
        assert dict(matplotlib.rcParams) == before
    assert run(code) == f"{digest.hexdigest()} False"


def test_vector_formats_keep_text_as_text() -> None:
    fig = KINDS["kurtosis"].draw([source("gpt2-xl")])
    assert b"gpt2-xl, m = 24</text>" in render(fig, "svg")
    assert b"/FontFile2" in render(fig, "pdf")
