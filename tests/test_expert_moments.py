"""C of every expert against the definition, and all the ways in which it comes to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from experts_kit import FAMILIES, in_float64, save_experts, stacked_keys
from families import LAYERS
from numpy.typing import NDArray
from test_corpus_run import Watcher, assert_same, interrupt_at, run

from kscli.artifacts import CovarianceFile
from kscli.corpus import CorpusSpec, open_corpus
from kscli.errors import ModelError
from kscli.interrupts import InterruptedRunError
from kscli.models.experts import RoutedKeys
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.reporter import Task
from kscli.second_moment.covariance import CovarianceOptions, one_pass, second_moments
from kscli.second_moment.expert_moments import ExpertMoments, new_moment
from kscli.second_moment.single_layers import join_layers, write_layer

DOCUMENTS, MAX_LENGTH = 100, 40


def by_definition(
    family: str, model: Any, tokenizer: Any, layer: int
) -> tuple[list[NDArray[np.float64]], list[int], int]:
    """C of every block, the tokens that it has a key of, and the number of all tokens."""
    texts = open_corpus(CorpusSpec("tiny")).documents()
    documents = [
        stacked_keys(family, model, tokenizer(text)["input_ids"][:MAX_LENGTH], layer)
        for text, _ in zip(texts, range(DOCUMENTS), strict=False)
    ]
    blocks = [np.concatenate(parts) for parts in zip(*documents, strict=True)]
    tokens = len(blocks[0])
    counts = [int((keys != 0).any(1).sum()) for keys in blocks]
    return [keys.T @ keys / tokens for keys in blocks], counts, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_c_of_every_expert_is_the_definitions(family: str, tmp_path: Path) -> None:
    save_experts(family, tmp_path)
    loaded = load_model(ModelOptions(str(tmp_path), dtype="float32"))
    corpus = open_corpus(CorpusSpec("tiny"))
    measured = second_moments(loaded, corpus, CovarianceOptions(DOCUMENTS, None, MAX_LENGTH))
    model = in_float64(tmp_path)
    for layer in range(LAYERS):
        true, counts, tokens = by_definition(family, model, loaded.tokenizer, layer)
        found = measured.moments[layer].arrays()
        assert measured.tokens == tokens
        n_experts = len(found["routed"])
        assert found["routed"].tolist() == counts[:n_experts]
        assert found["routed"].sum() == 2 * tokens  # experts a token
        blocks = [*found["second_moment"]]
        if "shared_second_moment" in found:
            blocks.append(found["shared_second_moment"])
        for C, of_definition in zip(blocks, true, strict=True):
            error = np.linalg.norm(C - of_definition) / np.linalg.norm(of_definition)
            assert error < 1e-6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with shared experts, and its cov.h5 of one pass."""
    folder = tmp_path_factory.mktemp("experts")
    save_experts("deepseek-v3", folder / "moe")
    assert cache_cov(folder, "whole.h5").exit_code == 0
    return folder


def cache_cov(folder: Path, output: str, *options: str) -> Any:
    return kscli(
        *("cache-cov", "-m", str(folder / "moe"), "--corpus", "tiny", "--samples", str(DOCUMENTS)),
        *("--max-length", str(MAX_LENGTH), "--dtype", "float32", "-o", str(folder / output)),
        *options,
    )


def arrays_of(path: Path, layer: int) -> list[NDArray[Any]]:
    with CovarianceFile(path) as cov:
        assert cov.about.n_experts == 8
        blocks = [cov.second_moment_of(layer, expert) for expert in range(8)]
        shared = cov.shared_second_moment(layer)
        assert shared is not None
        return [np.array(cov.count), cov.routed(layer), *blocks, shared]


def test_shards_merge_to_the_whole(whole: Path) -> None:
    for index in range(2):
        assert cache_cov(whole, f"part{index}.h5", "--shard", f"{index}/2").exit_code == 0
    parts = [str(whole / f"part{index}.h5") for index in range(2)]
    merged = kscli("merge-cov", *parts, "-o", str(whole / "merged.h5"))
    assert merged.exit_code == 0, merged.output
    for layer in range(LAYERS):
        for a, b in zip(
            arrays_of(whole / "whole.h5", layer), arrays_of(whole / "merged.h5", layer), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def test_passed_on_layer_by_layer_it_is_the_same_file(whole: Path, tmp_path: Path) -> None:
    with CovarianceFile(whole / "whole.h5") as cov:
        for layer in range(LAYERS):
            write_layer(cov, layer, tmp_path / f"{layer}.h5")
        parts = [tmp_path / f"{layer}.h5" for layer in range(LAYERS)]
        join_layers(tmp_path / "all.h5", range(LAYERS), parts.__getitem__, {}, "all", Task())
        with CovarianceFile(tmp_path / "all.h5") as joined:
            assert joined.fingerprint == cov.fingerprint


@pytest.mark.parametrize("groups", [((0, 1),), ((0,), (1,))])
def test_interrupted_it_goes_on_to_the_same_file(
    whole: Path, groups: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    """In one pass over both layers, and in one for each, whose sums the first checkpoint holds."""
    model = load_model(ModelOptions(str(whole / "moe"), dtype="float32"))
    options = CovarianceOptions(DOCUMENTS, None, MAX_LENGTH)
    plan = replace(one_pass(model, batch_tokens=512), groups=groups)
    straight, resumed = tmp_path / "straight.h5", tmp_path / "resumed.h5"
    run(model, plan, straight, options=options)
    with pytest.raises(InterruptedRunError, match="the same command goes on"):
        run(model, plan, resumed, Watcher(interrupt_at(3)), options)
    run(model, plan, resumed, options=options)
    assert_same(straight, resumed)


@pytest.mark.parametrize("placement", ["device", "split"])
def test_wherever_the_sums_lie_they_are_the_same(whole: Path, placement: str) -> None:
    model = load_model(ModelOptions(str(whole / "moe"), dtype="float32"))
    plan = replace(one_pass(model, batch_tokens=512), placement=placement)  # type: ignore[arg-type]
    corpus, options = (
        open_corpus(CorpusSpec("tiny")),
        CovarianceOptions(DOCUMENTS, None, MAX_LENGTH),
    )
    found = second_moments(model, corpus, options, plan=plan).moments[1].arrays()
    _, routed, *blocks = arrays_of(whole / "whole.h5", 1)
    np.testing.assert_array_equal(found["routed"], routed)
    for C, expected in zip(found["second_moment"], blocks, strict=False):
        np.testing.assert_allclose(C, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_memory_used_up_amid_a_layer_is_an_error_and_no_wrong_sum(whole: Path) -> None:
    model = load_model(ModelOptions(str(whole / "moe"), dtype="float32"))
    moments = new_moment(model.decoder.projections[0])
    found: dict[int, RoutedKeys] = {}
    model.decoder.run(torch.arange(100, 1300, 30)[None], [0], found.__setitem__)
    assert isinstance(moments, ExpertMoments)

    def used_up(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    moments._blocks[-1].add = used_up  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match="smaller --batch-tokens"):
        moments.add(found[0], 40)


def test_what_takes_no_experts_says_so(whole: Path) -> None:
    exported = kscli(
        "export-cov", "--cov", whole / "whole.h5", "-o", whole / "npz", "--for", "rome"
    )
    assert exported.exit_code != 0
    said = one_sentence(exported.stderr)
    assert "a C for each of 8 experts a layer; what rome reads is one C a layer" in said
