"""Several models: families and sizes, paired differences of kurtosis, fixed interference points."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from artifact_kit import FACTS, changed, write_toy
from cli_kit import kscli, one_sentence
from numpy.typing import NDArray

from kscli.analysis.fixed_points import fixed_points
from kscli.analysis.resampling import Resampling, resample_counts
from kscli.analysis.scaling import Measured, scaling_rows
from kscli.artifacts import MatrixName
from kscli.errors import UsageError
from kscli.facts import Fact
from kscli.models.families import family_of

Array = NDArray[np.float64]
M = 24


@dataclass
class Stored:
    """A pmatrix file in memory."""

    model: str
    matrices: dict[int, Array]
    facts: tuple[Fact, ...] = field(
        default_factory=lambda: tuple(Fact("{} is", f"s{i}", "t") for i in range(M))
    )
    token_id: NDArray[np.int64] = field(default_factory=lambda: np.arange(M) // 2)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.matrices)

    def matrix(self, name: MatrixName, layer: int) -> Array:
        assert name == "P"
        return self.matrices[layer]


def heavy_tailed(degrees: float, seed: int) -> Array:
    P = np.random.default_rng(seed).standard_t(degrees, (M, M))
    np.fill_diagonal(P, 1)
    return P


def measured(model: str, *degrees: float, n_layers: int = 0, seed: int = 0) -> Measured:
    """A model whose layers have tails of so many degrees of freedom."""
    matrices = {at: heavy_tailed(value, seed + at) for at, value in enumerate(degrees)}
    return Measured(Stored(model, matrices), "", n_layers or len(degrees), tuple(matrices))


@pytest.mark.parametrize(
    ("names", "family", "size"),
    [
        (("gpt2-large", "openai-community/gpt2-large"), "GPT2", 774_030_080),
        (("EleutherAI--pythia-1b", "EleutherAI/pythia-1b"), "Pythia", 1_011_781_632),
        (("SmolLM2-135M", ""), "SmolLM2", 135e6),
        (("x", "Qwen/Qwen2.5-0.5B-Instruct"), "Qwen2.5-Instruct", 0.5e9),
        (("my-350m.gguf", "elsewhere/my-350m.gguf"), "my", 350e6),
        (("v1.7-2T", ""), "v1.7", 2e12),
        (("x", "openai-community/gpt2-large"), "GPT2", 774_030_080),
    ],
)
def test_family_and_size_are_of_the_alias_or_in_the_name(
    names: tuple[str, str], family: str, size: float
) -> None:
    found = family_of(*names)
    assert found is not None
    assert (found.family, found.size, found.active) == (family, size, size)
    assert not found.sparse


@pytest.mark.parametrize(
    ("name", "family", "size", "active"),
    [
        ("qwen3-30b-a3b", "Qwen3", 30_532_122_624, 3_353_032_704),
        ("openai/gpt-oss-20b", "gpt-oss", 20_914_757_184, 4_187_440_704),
        ("Qwen--Qwen3-235B-A22B", "Qwen3", 235e9, 22e9),
        ("Qwen3-30B-A3B-Instruct-2507", "Qwen3-Instruct-2507", 30e9, 3e9),
        ("my-mixture-4m-a1.5m", "my-mixture", 4e6, 1.5e6),
    ],
)
def test_of_a_mixture_of_experts_two_sizes_are_known(
    name: str, family: str, size: float, active: float
) -> None:
    found = family_of(name)
    assert found is not None
    assert (found.family, found.size, found.active) == (family, size, active)
    assert found.sparse


@pytest.mark.parametrize(
    "name", ["phi-2", "mymodel", "llama-8bit", "mixtral-8x7B", "gpt2", "v1.7B", "mixture-a3b"]
)
def test_a_name_without_a_size_has_no_family(name: str) -> None:
    assert family_of(name) is None


def test_every_pair_of_sizes_in_a_family_is_a_row_the_smaller_first() -> None:
    models = [
        measured("gpt2-large", 4),
        measured("pythia-1b", 4),
        measured("phi", 4),
        measured("gpt2-small", 4),
        measured("gpt2-medium", 4),
        measured("gpt2-small", 4),
    ]
    rows = scaling_rows(models, Resampling(100))
    assert [(row["smaller"], row["larger"]) for row in rows] == [
        ("gpt2-small", "gpt2-medium"),
        ("gpt2-small", "gpt2-large"),
        ("gpt2-small", "gpt2-medium"),
        ("gpt2-small", "gpt2-large"),
        ("gpt2-medium", "gpt2-large"),
    ]
    assert {row["family"] for row in rows} == {"GPT2"}


@pytest.mark.parametrize("suffix", ["", "_distinct"])
def test_the_difference_is_of_layer_means_on_the_same_resampled_facts(suffix: str) -> None:
    small, large = measured("gpt2-small", 5, 8, 8), measured("gpt2-large", 3, 6, seed=40)
    (row,) = scaling_rows([small, large], Resampling(200, seed=3))
    token = small.matrices.token_id
    pairs = token[:, None] != token if suffix else ~np.eye(M, dtype=bool)

    def layer_mean(model: Measured, facts: NDArray[np.int64]) -> float:
        at = np.ix_(facts, facts)
        of = [scipy.stats.kurtosis(P[at][pairs[at]]) for P in model.matrices.matrices.values()]
        return float(np.mean(of))

    once = np.arange(M)
    assert row[f"kurtosis_smaller{suffix}"] == pytest.approx(layer_mean(small, once))
    assert row[f"kurtosis_larger{suffix}"] == pytest.approx(layer_mean(large, once))
    draws = [np.repeat(once, w) for w in resample_counts(M, 200, seed=3)]
    apart = [layer_mean(large, facts) - layer_mean(small, facts) for facts in draws]
    ends = row[f"difference{suffix}_low"], row[f"difference{suffix}_high"]
    assert ends == pytest.approx(np.quantile(apart, [0.025, 0.975]))
    assert row[f"difference{suffix}"] == pytest.approx(
        row[f"kurtosis_larger{suffix}"] - row[f"kurtosis_smaller{suffix}"]
    )


def test_a_mixture_is_compared_with_dense_models_of_its_active_size() -> None:
    dense, mixture = measured("qwen3-4b", 5), measured("qwen3-30b-a3b", 5, seed=1)
    others = [measured(name, 4) for name in ("qwen3-32b", "llama3.2-3b", "qwen3-1.7b", "gpt2-xl")]
    rows = scaling_rows([mixture, dense, *others], Resampling(20))
    by = {
        compared: [(row["smaller"], row["larger"]) for row in rows if row["compared"] == compared]
        for compared in ("parameters", "active parameters", "all parameters")
    }
    assert by["parameters"] == [
        ("qwen3-1.7b", "qwen3-4b"),
        ("qwen3-1.7b", "qwen3-32b"),
        ("qwen3-4b", "qwen3-32b"),
    ]
    assert by["active parameters"] == [
        ("qwen3-4b", "qwen3-30b-a3b"),
        ("llama3.2-3b", "qwen3-30b-a3b"),
    ]
    assert by["all parameters"] == [("qwen3-32b", "qwen3-30b-a3b")]
    assert [row["family"] for row in rows[-3:]] == ["Qwen3", "Llama3.2, Qwen3", "Qwen3"]
    assert rows[-1]["parameters_larger"] == 30_532_122_624
    assert rows[-1]["active_larger"] == 3_353_032_704


def test_sizes_are_those_of_the_file_where_it_says_them() -> None:
    experts = np.random.default_rng(0).integers(0, 6, (M, 2))
    dense = replace(measured("plain", 5, 6), sizes=(1_000_000, 1_000_000))
    mixture = replace(
        measured("mixture", 5, 6, seed=7),
        sizes=(4_000_000, 1_100_000),
        experts_of=lambda layer: experts,
    )
    (row,) = scaling_rows([mixture, dense], Resampling(20))
    assert (row["smaller"], row["larger"], row["family"]) == ("plain", "mixture", "")
    apart = [not {*experts[i]} & {*experts[j]} for i in range(M) for j in range(M) if i != j]
    assert 0 < np.mean(apart) < 1
    assert row["no_common_expert"] == pytest.approx(np.mean(apart))
    assert scaling_rows([replace(mixture, sizes=(4_000_000, 1_300_000)), dense]) == []
    (row,) = scaling_rows([replace(mixture, sizes=(900_000, 800_000)), dense], Resampling(20))
    assert row["compared"] == "all parameters"


@pytest.mark.parametrize(("name", "least"), [("mean_abs", None), ("tail_0_25", 0.25)])
def test_interference_is_a_mean_over_pairs_with_a_paired_interval(
    name: str, least: float | None
) -> None:
    dense, mixture = measured("qwen3-4b", 5, 8), measured("qwen3-30b-a3b", 3, 6, seed=40)
    (row,) = scaling_rows([dense, mixture], Resampling(100, seed=3))

    def interference(model: Measured, facts: NDArray[np.int64]) -> float:
        sizes = [
            abs(P[i, j])
            for P in model.matrices.matrices.values()
            for i in facts
            for j in facts
            if i != j
        ]
        return float(np.mean(sizes if least is None else np.array(sizes) > least))

    once = np.arange(M)
    assert row[f"{name}_smaller"] == pytest.approx(interference(dense, once))
    assert row[f"{name}_larger"] == pytest.approx(interference(mixture, once))
    draws = [np.repeat(once, w) for w in resample_counts(M, 100, seed=3)]
    apart = [interference(mixture, facts) - interference(dense, facts) for facts in draws]
    ends = row[f"{name}_difference_low"], row[f"{name}_difference_high"]
    assert ends == pytest.approx(np.quantile(apart, [0.025, 0.975]))


def test_pairing_takes_out_what_both_models_share() -> None:
    small = measured("gpt2-small", 3)
    P = small.matrices.matrix("P", 0)
    large = Measured(Stored("gpt2-large", {0: P + 1e-3 * heavy_tailed(30, 9)}), "", 1, (0,))
    (row,) = scaling_rows([small, large])
    width = row["difference_high"] - row["difference_low"]
    assert 0 < width < 0.05 * row["kurtosis_smaller"]


def test_depths_are_compared_between_the_first_and_the_last_layer_of_each() -> None:
    broad, heavy = heavy_tailed(50, 0), heavy_tailed(2.2, 0)
    middling = heavy_tailed(4, 0)
    small = Measured(
        Stored("gpt2-small", dict.fromkeys(range(5), middling)), "", 5, (0, 1, 2, 3, 4)
    )
    large = Measured(Stored("gpt2-large", {0: heavy, 1: broad, 2: broad}), "", 3, (0, 1, 2))
    (row,) = scaling_rows([small, large], Resampling(100))
    k = [float(scipy.stats.kurtosis(P[~np.eye(M, dtype=bool)])) for P in (heavy, middling, broad)]
    crossing = 0.5 * (k[0] - k[1]) / (k[0] - k[2])
    assert 0 < crossing < 0.5
    assert row["share_higher"] == pytest.approx(crossing, abs=0.01)


def test_chosen_layers_are_compared_where_both_models_have_them() -> None:
    small, large = measured("gpt2-small", 9, 9, n_layers=2), measured("gpt2-large", 2.2, 2.2, 2.2)
    last = Measured(large.matrices, "", 3, (2,))
    (row,) = scaling_rows([small, last], Resampling(100))
    assert row["share_higher"] == 1.0
    first = Measured(small.matrices, "", 2, (0,))
    (row,) = scaling_rows([first, last], Resampling(100))
    assert math.isnan(row["share_higher"])
    assert row["difference"] > 0


def test_other_facts_leave_the_difference_without_an_interval() -> None:
    small, large = measured("gpt2-small", 5), measured("gpt2-large", 3)
    large.matrices.facts = large.matrices.facts[::-1]
    (row,) = scaling_rows([small, large], Resampling(100))
    assert row["same_facts"] is False
    assert math.isfinite(row["difference"])
    assert math.isnan(row["difference_low"])
    assert math.isnan(row["difference_distinct_high"])


def test_layers_without_a_kurtosis_are_left_out() -> None:
    small, large = measured("gpt2-small", 5, 5), measured("gpt2-large", 3)
    small.matrices.matrices[1] = np.ones((M, M))
    (row,) = scaling_rows([small, large], Resampling(100))
    alone = scipy.stats.kurtosis(small.matrices.matrices[0][~np.eye(M, dtype=bool)])
    assert row["kurtosis_smaller"] == pytest.approx(alone)
    large.matrices.matrices[0] = np.ones((M, M))
    (row,) = scaling_rows([small, large], Resampling(100))
    assert math.isnan(row["difference"])
    assert math.isnan(row["share_higher"])


def test_fixed_points_are_the_pairs_in_every_models_top_k() -> None:
    P = [np.eye(M), np.eye(M), np.eye(M)]
    for at, M_at in enumerate(P):
        M_at += 0.01 * np.random.default_rng(at).random((M, M))
        M_at[0, 1], M_at[5, 9], M_at[9, 5] = 0.5 + at, 0.9, 0.3 + at / 10
    P[2][0, 1] = -5
    models = [Stored(f"m{at}", {0: M_at}) for at, M_at in enumerate(P)]
    found = fixed_points(models, 3)
    assert found.pairs.tolist() == [[5, 9], [9, 5]]
    np.testing.assert_allclose(found.p, [[0.9, 0.9, 0.9], [0.3, 0.4, 0.5]])
    assert found.same_last_token.tolist() == [False, False]
    assert found.expected == pytest.approx(M * (M - 1) * (3 / (M * (M - 1))) ** 3)
    rows = found.rows(models[0].facts)
    assert rows[1] == {
        "layer": 0,
        "rank": 2,
        "models": 3,
        "k": 3,
        "expected": found.expected,
        "p_least": pytest.approx(0.3),
        "p_mean": pytest.approx(0.4),
        "i": 9,
        "j": 5,
        "subject_i": "s9",
        "prompt_i": "{} is",
        "target_i": "t",
        "subject_j": "s5",
        "prompt_j": "{} is",
        "target_j": "t",
        "same_last_token": False,
    }
    assert found.sentence().startswith("2 pairs are in the top 3 of all 3 models at layer 0")
    two = fixed_points(models[:2], 3)
    assert two.pairs.tolist() == [[5, 9], [0, 1], [9, 5]]
    assert two.same_last_token.tolist() == [False, True, False]
    models[1].token_id = np.arange(M)
    assert not fixed_points(models[:2], 3).same_last_token.any()


def test_the_expected_number_is_what_random_models_have() -> None:
    found = []
    for seed in range(60):
        models = [
            Stored("m", {0: np.random.default_rng(2 * seed + at).random((M, M))}) for at in (0, 1)
        ]
        points = fixed_points(models, 60)
        found.append(len(points.pairs))
    assert np.mean(found) == pytest.approx(points.expected, rel=0.15)


def test_no_fixed_points_and_no_pairs_are_no_rows() -> None:
    far = [Stored("a", {0: np.eye(M)}), Stored("b", {0: np.eye(M)})]
    far[0].matrices[0][0, 1] = far[1].matrices[0][2, 3] = 0.5
    assert fixed_points(far, 1).rows(far[0].facts) == []
    one = [Stored("a", {0: np.ones((1, 1))}, (FACTS[0],), np.array([1])) for _ in range(2)]
    assert fixed_points(one, 5).rows(one[0].facts) == []


def test_one_model_or_other_facts_have_no_fixed_points() -> None:
    model = Stored("a", {0: np.eye(M)})
    with pytest.raises(UsageError, match="two or more"):
        fixed_points([model], 3)
    other = Stored("b", {0: np.eye(M)}, facts=model.facts[::-1])
    with pytest.raises(UsageError, match="not measured on the same facts"):
        fixed_points([model, other], 3)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Two sizes of one family: the toy, and the toy with noise on P."""
    for at, name in enumerate(("toy-1M", "toy-2M")):
        place = write_toy(tmp_path).rename(tmp_path / name)
        with changed(place / "pmatrix.h5") as file:
            file.attrs["model"] = name
            file.attrs["model_id"] = f"someone/{name}"
            # Shorter inner products of the same keys, but for those of a key with itself.
            kept = 1 - at * 0.1 * np.random.default_rng(0).random(len(file["token_id"]))
            kept = np.outer(kept, kept)
            np.fill_diagonal(kept, 1)
            file["P"][...] *= kept
    return tmp_path


def test_several_models_are_compared_below_their_statistics(family: Path) -> None:
    arguments = ("stats", "-m", "toy-1M", "-m", "toy-2M", "--dir", family, "--repeats", "200")
    printed = kscli(*arguments).stdout
    (row,) = json.loads(kscli(*arguments, "--scaling", "-f", "json").stdout)
    points = json.loads(kscli(*arguments, "--fixed-points", "-f", "json").stdout)
    assert (row["family"], row["smaller"], row["larger"]) == (
        "toy",
        "toy-1M",
        "toy-2M",
    )
    assert f"{row['difference']:z.1f} [{row['difference_low']:z.1f}" in printed
    assert f"{len(points)} pairs are in the top 20 of all 2 models" in printed
    rows = json.loads(kscli(*arguments, "-f", "json").stdout)
    assert [(row["model"], row["layer"]) for row in rows] == [
        (name, layer) for name in ("toy-1M", "toy-2M") for layer in (0, 1, 2)
    ]
    means = [np.mean([row["kurtosis"] for row in rows[at : at + 3]]) for at in (0, 3)]
    assert row["difference"] == pytest.approx(means[1] - means[0])


@pytest.mark.parametrize("output", ["markdown", "latex"])
def test_a_table_after_another_is_parted_from_it(family: Path, output: str) -> None:
    arguments = ("stats", "-m", "toy-1M", "-m", "toy-2M", "--dir", family, "-f", output)
    blocks = kscli(*arguments).stdout.strip().split("\n\n")
    table = "| " if output == "markdown" else "\\begin{tabular}"
    assert [sum(line.startswith(table) for line in block.splitlines()) > 0 for block in blocks] == (
        [True, False, True, False, False, True]
        if output == "markdown"
        else [True, True, False, True]
    )
    assert blocks[1].removeprefix("% ").startswith("Kurtosis against size: ")
    assert blocks[-2].splitlines()[-1].startswith("20 pairs are in the top 20 of all 2 models")


@pytest.mark.parametrize(("k", "chance"), [(20, "0.72"), (100, "18"), (500, "453")])
def test_chance_is_said_in_plain_digits(k: int, chance: str) -> None:
    models = [measured(name, 4, seed=at).matrices for at, name in enumerate("ab")]
    assert f"where chance gives {chance};" in fixed_points(models, k).sentence()


def test_a_mixture_has_a_table_of_its_own_beside_the_sizes(family: Path) -> None:
    """The sizes are attributes of the file, where its model was run."""
    with changed(family / "toy-2M" / "pmatrix.h5") as file:
        file.attrs["model"] = "toy-experts"
        file.attrs["parameters"], file.attrs["active_parameters"] = 3_000_000, 1_100_000
    arguments = ("stats", "-m", "toy-1M", "-m", "toy-2M", "--dir", family, "--repeats", "100")
    (row,) = json.loads(kscli(*arguments, "--scaling", "-f", "json").stdout)
    assert row["compared"] == "active parameters"
    assert (row["smaller"], row["larger"]) == ("toy-1M", "toy-experts")
    assert row["no_common_expert"] is None
    printed = kscli(*arguments, "--scaling").stdout
    assert printed.startswith("Dense models and mixtures of experts of one size")
    assert f"{row['mean_abs_difference']:z.4f} [{row['mean_abs_difference_low']:z.4f}" in printed


def test_facts_that_differ_are_said(family: Path) -> None:
    with changed(family / "toy-2M" / "pmatrix.h5") as file:
        file["facts/subject"][0] = "another"
    arguments = ("stats", "-m", "toy-1M", "-m", "toy-2M", "--dir", family)
    result = kscli(*arguments, "--scaling", "-f", "json")
    assert result.exit_code == 0
    assert "warning: toy-1M and toy-2M were measured on different facts" in result.stderr
    assert json.loads(result.stdout)[0]["difference_low"] is None
    result = kscli(*arguments, "--fixed-points")
    assert result.exit_code == 2
    assert "same facts" in one_sentence(result.stderr)
    assert kscli(*arguments).exit_code == 0


def test_models_of_no_family_are_said_to_be_so(tmp_path: Path) -> None:
    write_toy(tmp_path)
    result = kscli("stats", "-m", "toy", "--dir", tmp_path, "--scaling", "-f", "json")
    assert json.loads(result.stdout) == []
    assert "no two of the models" in result.stderr
