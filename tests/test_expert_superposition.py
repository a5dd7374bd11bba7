"""P of layers of experts against the definition: the whole stacked key, solved in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import naive
import numpy as np
import pytest
from cli_kit import kscli, one_sentence
from experts_kit import FAMILIES, in_float64, save_experts, stacked_keys
from families import LAYERS
from scipy.linalg import block_diag
from transformers import AutoTokenizer

from kscli.corpus import CorpusSpec, open_corpus
from kscli.facts import read_facts
from kscli.numbers import percent

DOCUMENTS, MAX_LENGTH, FACTS = 100, 40, 24


def run(folder: Path, *arguments: Any) -> Any:
    done = kscli(*arguments, "--dir", folder / "artifacts")
    assert done.exit_code == 0, done.stderr
    return done


def measure(folder: Path, *options: str) -> Path:
    """pmatrix.h5 of the model in `folder`/moe, by the commands that a user gives."""
    model = ("-m", folder / "moe")
    run(
        folder,
        *("cache-cov", *model, "--corpus", "tiny", "--samples", DOCUMENTS, "--dtype", "float32"),
        *("--max-length", MAX_LENGTH, *options),
    )
    run(
        folder,
        *("extract", *model, "--facts", "tiny", "--count", FACTS, "--dtype", "float32", *options),
    )
    run(folder, "pmatrix", *model)
    return folder / "artifacts" / "moe" / "pmatrix.h5"


def parts_of(family: str, folder: Path, layer: int) -> tuple[list[Any], list[Any]]:
    """By expert, shared ones last, the keys (tokens, d_m) of the text and (m, d_m) of the facts."""
    model, tokenizer = in_float64(folder), AutoTokenizer.from_pretrained(folder)
    texts = open_corpus(CorpusSpec("tiny")).documents()
    documents = [
        stacked_keys(family, model, tokenizer(text)["input_ids"][:MAX_LENGTH], layer)
        for text, _ in zip(texts, range(DOCUMENTS), strict=False)
    ]
    tokens = [np.concatenate(parts) for parts in zip(*documents, strict=True)]
    of_facts = []
    for fact in read_facts("tiny", FACTS).facts:
        ids, at = naive.subject_last(tokenizer, fact.text, *fact.subject_span)
        of_facts.append([part[at] for part in stacked_keys(family, model, ids, layer)])
    return tokens, [np.array(part) for part in zip(*of_facts, strict=True)]


def moment(keys: Any) -> Any:
    """E[k k^T] over all tokens."""
    return keys.T @ keys / len(keys)


def diagonal(C: Any, keys: Any) -> Any:
    """k^T C^-1 k of every key."""
    return np.einsum("ia,ia->i", keys, np.linalg.solve(C, keys.T).T)


def true_matrices(family: str, folder: Path, layer: int) -> tuple[Any, Any]:
    """P, and how many experts each pair of facts has in common, by the definition."""
    tokens, keys = parts_of(family, folder, layer)
    C = block_diag(*map(moment, tokens))
    stacked = np.concatenate(keys, axis=1)
    live = np.flatnonzero(np.diagonal(C))
    P = naive.superposition(C[np.ix_(live, live)], stacked[:, live])
    routed = keys[: len(keys) - (family in SHARED)]
    reached = np.array([(part != 0).any(axis=1) for part in routed], dtype=float).T
    return P, reached @ reached.T


SHARED = (
    *("deepseek-v3", "glm4-moe", "qwen2-moe", "llama4"),
    *("granite-moe-shared", "granite-moe-hybrid"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_p_is_the_definitions(family: str, tmp_path: Path) -> None:
    save_experts(family, tmp_path / "moe")
    path = measure(tmp_path)
    with h5py.File(path) as file:
        for layer in range(LAYERS):
            P, common = true_matrices(family, tmp_path / "moe", layer)
            found = file["P"][layer]
            assert np.abs(found - P).max() < 2e-5
            experts = file["experts"][layer]
            of_pairs = (experts[:, None, :, None] == experts[None, :, None, :]).sum((2, 3))
            np.testing.assert_array_equal(of_pairs, common)
            if family not in SHARED:
                assert (found[common == 0] == 0).all()
                assert (common == 0).any()


SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "intermediate_size", "max_position_embeddings", "rope_parameters"),
)


def test_a_dense_model_written_as_one_expert_gives_the_dense_p(tmp_path: Path) -> None:
    """Mixtral of one expert, whose gate is 1, and Mistral of the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    save_experts("mixtral", tmp_path / "moe", num_local_experts=1, num_experts_per_tok=1)
    experts = in_float64(tmp_path / "moe").float()
    config = AutoConfig.for_model(
        "mistral",
        **{name: getattr(experts.config, name) for name in SAME},
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    dense = AutoModelForCausalLM.from_config(config)
    state = {k: v for k, v in experts.state_dict().items() if ".mlp." not in k}
    for number, layer in enumerate(experts.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj[0].chunk(2)
        names = f"model.layers.{number}.mlp."
        down = layer.mlp.experts.down_proj[0]
        state |= {f"{names}gate_proj.weight": gate, f"{names}up_proj.weight": up}
        state[f"{names}down_proj.weight"] = down
    dense.load_state_dict(state)
    (tmp_path / "dense").mkdir()
    dense.save_pretrained(tmp_path / "dense" / "moe")
    for path in (tmp_path / "moe").glob("*token*"):
        (tmp_path / "dense" / "moe" / path.name).write_bytes(path.read_bytes())

    with h5py.File(measure(tmp_path)) as one, h5py.File(measure(tmp_path / "dense")) as other:
        assert np.abs(one["P"][()] - other["P"][()]).max() < 2e-5
        np.testing.assert_allclose(one["leverage"][()], other["leverage"][()], rtol=1e-4)


def test_an_expert_that_saw_too_little_is_named(tmp_path: Path) -> None:
    """Three documents, of which some experts of a layer get fewer tokens than dimensions."""
    save_experts("mixtral", tmp_path / "moe")
    model = ("-m", tmp_path / "moe")
    done = run(
        tmp_path,
        *("cache-cov", *model, "--corpus", "tiny", "--samples", 6, "--max-length", 12),
    )
    assert "saw fewer tokens than their 24 dimensions" in done.stderr
    run(tmp_path, "extract", *model, "--facts", "tiny", "--count", FACTS)
    refused = kscli("pmatrix", *model, "--dir", tmp_path / "artifacts")
    assert refused.exit_code == 1
    said = one_sentence(refused.stderr)
    assert ": expert " in said
    assert "is routed: C was measured on" in said
    assert "--ridge" in said
    run(tmp_path, "pmatrix", *model, "--ridge", "1e-3")


def test_stats_and_topk_say_how_facts_are_routed(tmp_path: Path) -> None:
    save_experts("olmoe", tmp_path / "moe")
    path = measure(tmp_path)
    rows = json.loads(run(tmp_path, "stats", "--pmatrix", path, "-f", "json").stdout)
    top = run(tmp_path, "topk", "--pmatrix", path, "--layer", "0", "-f", "json")
    off_diagonal = ~np.eye(FACTS, dtype=bool)
    for row in rows:
        P, common = true_matrices("olmoe", tmp_path / "moe", row["layer"])
        alone = (common == 0)[off_diagonal].mean()
        assert row["no_common_expert"] == pytest.approx(alone)
        assert row["common_experts"] == pytest.approx(common[off_diagonal].mean())
        of_others = P[off_diagonal & (common > 0)]
        assert row["std_common"] == pytest.approx(of_others.std(), abs=2e-5)
        assert row["std"] == pytest.approx(P[off_diagonal].std(), abs=2e-5)
        if row["layer"] == 0:
            assert f"{alone:.1%} of the pairs of facts have no expert in common" in top.stderr
            largest = P[off_diagonal].max()
            assert json.loads(top.stdout)[0]["p"] == pytest.approx(largest, abs=2e-5)
    page = tmp_path / "report.html"
    run(tmp_path, "report", "-m", tmp_path / "moe", "-o", page)
    text = page.read_text("utf-8")
    alone, of_common = rows[0]["no_common_expert"], rows[0]["std_common"]
    assert f"At layer 0 {percent(alone)} of the pairs of facts have no expert in common" in text
    assert f"Between the others the standard deviation of p is {of_common:.3f}" in text
    assert "random directions have" not in text
    with h5py.File(path.with_name("cov.h5")) as cov:
        least = cov["routed"][()].min()
    assert f"of which the least-used expert saw {least:,}, " in text
    spectra = run(tmp_path, "stats", "--pmatrix", path, "--spectrum", "-f", "json")
    ratio = json.loads(spectra.stdout)[0]["participation_ratio"]
    assert f"24 dimensions, has a participation ratio of {ratio:.1f} and" in text
    assert "shown is the median over a layer" in text


def test_p_of_every_expert_alone_is_the_definitions(tmp_path: Path) -> None:
    """Of shared experts too; weighted by their shares of leverage they add up to the layer's P."""
    family = "deepseek-v3"
    save_experts(family, tmp_path / "moe")
    path = measure(tmp_path)
    done = run(tmp_path, "stats", "--pmatrix", path, "--experts", "--layers", "0", "-f", "json")
    rows = json.loads(done.stdout)
    assert [row["expert"] for row in rows] == [*range(8), "shared"]
    tokens, keys = parts_of(family, tmp_path / "moe", 0)
    whole = sum(diagonal(moment(text), k) for text, k in zip(tokens, keys, strict=True))
    total = np.zeros((FACTS, FACTS))
    for row, of_tokens, k in zip(rows, tokens, keys, strict=True):
        C = moment(of_tokens)
        reached = np.flatnonzero((k != 0).any(axis=1))
        assert row["tokens"] == (of_tokens != 0).any(axis=1).sum()
        assert row["token_share"] == pytest.approx(row["tokens"] / len(of_tokens))
        assert row["facts"] == len(reached) > 1
        P = naive.superposition(C, k[reached])
        off_diagonal = P[~np.eye(len(reached), dtype=bool)]
        share = diagonal(C, k)[reached] / whole[reached]
        assert row["leverage_share"] == pytest.approx(share.mean(), abs=1e-4)
        assert row["std"] == pytest.approx(off_diagonal.std(), abs=1e-4)
        assert row["max"] == pytest.approx(off_diagonal.max(), abs=1e-4)
        total[np.ix_(reached, reached)] += share[:, None] * P
    np.testing.assert_allclose(total, true_matrices(family, tmp_path / "moe", 0)[0], atol=1e-10)


def test_spectra_of_experts_are_the_median_and_the_range(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path / "moe")
    path = measure(tmp_path)
    how = ("stats", "--pmatrix", path, "--spectrum", "--layers", "1", "-f", "json")
    (row,) = json.loads(run(tmp_path, *how, "--null-space", "0.05").stdout)
    tokens, keys = parts_of("mixtral", tmp_path / "moe", 1)
    ratios, null = [], []
    for of_tokens, k in zip(tokens, keys, strict=True):
        values, vectors = np.linalg.eigh(moment(of_tokens))
        ratios.append(values.sum() ** 2 / (values**2).sum())
        null.append(((k @ vectors[:, values < 0.05]) ** 2).sum() / (k**2).sum())
    for name, wanted in (("participation_ratio", ratios), ("keys_in_null", null)):
        ends = (row[name], row[f"{name}_low"], row[f"{name}_high"])
        assert ends == pytest.approx((np.median(wanted), min(wanted), max(wanted)), rel=1e-3)
    assert row["one_over_d_m"] is None


def test_a_dense_model_has_no_experts_to_show(measured_tiny: Path) -> None:
    done = kscli("stats", "--pmatrix", measured_tiny / "pmatrix.h5", "--experts")
    assert done.exit_code == 2
    assert "is of a dense model" in one_sentence(done.stderr)
