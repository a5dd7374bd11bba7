"""A second real model, Gemma 3 270M: 4 attention heads, sliding windows, 262,144 tokens.

Its packages are not installed in CI: `kscli guide contributing` says how to get them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kscli.analysis.pairs import top_pairs
from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import Keys, extract_keys
from kscli.facts import FactSet, read_facts
from kscli.knowledge import check_facts
from kscli.models.loading import LoadedModel
from kscli.pmatrix import Superposition, superposition
from kscli.second_moment.covariance import CovarianceOptions, SecondMoments, second_moments

LAYERS = (0, 3, 9, 17)
SELECTED = ",".join(map(str, LAYERS))
CHECKED_FACTS = 16
DOCUMENTS = 6
MAX_LENGTH = 128
RIDGE = 0.1  # since a corpus that a test can afford is shorter than d_m
FACTS = 128


@pytest.fixture(scope="module")
def facts(shared_data: Path) -> FactSet:
    return read_facts(shared_data / "counterfact_known_256.json", FACTS)


@pytest.fixture(scope="module")
def moments(gemma3_model: LoadedModel, shared_data: Path) -> SecondMoments:
    corpus = open_corpus(CorpusSpec(str(shared_data / "wikitext2_valid.jsonl")))
    return second_moments(
        gemma3_model, corpus, CovarianceOptions(DOCUMENTS, None, MAX_LENGTH, SELECTED)
    )


@pytest.fixture(scope="module")
def keys(gemma3_model: LoadedModel, facts: FactSet) -> Keys:
    return extract_keys(gemma3_model, facts, layers=SELECTED)


def second_moment(moments: SecondMoments, layer: int) -> NDArray[np.float64]:
    return np.asarray(moments.moments[layer].matrix(), dtype=np.float64)


def result(moments: SecondMoments, keys: Keys, layer: int) -> Superposition:
    of_layer = keys.keys[LAYERS.index(layer)].astype(np.float64)
    return superposition(second_moment(moments, layer), moments.tokens, of_layer, RIDGE)


def test_its_layers_are_found(gemma3_model: LoadedModel) -> None:
    decoder = gemma3_model.decoder
    assert decoder.hook == "model.layers.{}.mlp.down_proj"
    assert (decoder.n_layers, decoder.d_m, decoder.vocabulary) == (18, 2048, 262_144)
    assert gemma3_model.has_head
    assert gemma3_model.special_tokens == "<bos>"


def test_c_and_p_equal_the_definition(
    gemma3_model: LoadedModel,
    moments: SecondMoments,
    facts: FactSet,
    keys: Keys,
    shared_data: Path,
) -> None:
    tokenizer = gemma3_model.tokenizer
    with (shared_data / "wikitext2_valid.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(DOCUMENTS), strict=False)]
    located = [
        naive.subject_last(tokenizer, f.text, *f.subject_span) for f in facts.facts[:CHECKED_FACTS]
    ]
    hooks = {layer: f"layers.{layer}.mlp.down_proj" for layer in LAYERS}
    network: Any = gemma3_model.decoder.model
    decoder = network.model.double()  # keys need no logits, and its head is the larger part
    try:
        true_C, count = naive.second_moments(
            decoder, tokenizer, texts, MAX_LENGTH, list(hooks.values())
        )
        all_keys = [naive.keys_of_text(decoder, ids, list(hooks.values())) for ids, _ in located]
    finally:
        torch.nn.Module.float(network)  # a GGUF model refuses its own float()

    assert moments.tokens == count == DOCUMENTS * MAX_LENGTH
    assert [position for _, position in located] == keys.position[:CHECKED_FACTS].tolist()
    for layer, hook in hooks.items():
        C = true_C[hook]
        assert np.linalg.norm(second_moment(moments, layer) - C) < 1e-6 * np.linalg.norm(C)
        true_keys = np.stack([k[hook][at] for k, (_, at) in zip(all_keys, located, strict=True)])
        ridged = C + RIDGE * np.trace(C) / len(C) * np.eye(len(C))
        P = result(moments, keys, layer).P[:CHECKED_FACTS, :CHECKED_FACTS]
        assert np.abs(P - naive.superposition(ridged, true_keys)).max() < 2e-5


def test_keys_beyond_the_sliding_window_do_not_depend_on_the_batch(
    gemma3_model: LoadedModel, shared_data: Path
) -> None:
    """600 tokens, of which the last see 512, alone and beside a text that is padded."""
    with (shared_data / "wikitext2_valid.jsonl").open(encoding="utf-8") as lines:
        ids = torch.tensor(gemma3_model.tokenizer(json.loads(next(lines))["text"])["input_ids"])
    batch = torch.zeros(2, 600, dtype=torch.int64)
    batch[0], batch[1, :90] = ids[:600], ids[600:690]

    def last_keys(input_ids: torch.Tensor) -> NDArray[np.float32]:
        found: dict[int, NDArray[np.float32]] = {}
        gemma3_model.decoder.run(
            input_ids, LAYERS, lambda layer, key: found.update({layer: key[0, 590:].numpy().copy()})
        )
        return np.stack([found[layer] for layer in LAYERS])

    for of_layer, other in zip(last_keys(batch[:1]), last_keys(batch), strict=True):
        assert of_layer.shape == (10, 2048)
        np.testing.assert_allclose(other, of_layer, atol=1e-5 * np.abs(of_layer).max())


def test_the_key_is_read_at_the_subjects_last_token(
    gemma3_model: LoadedModel, facts: FactSet, keys: Keys
) -> None:
    """By hand: what the token at the position says."""
    tokens = [gemma3_model.tokenizer.decode([token]) for token in keys.token_id]
    for fact, token in zip(facts.facts, tokens, strict=True):
        assert fact.subject.endswith(token.strip()), (fact.subject, token)


def test_it_knows_facts(gemma3_model: LoadedModel, facts: FactSet) -> None:
    """Of all 256 it knows 224; a wrong norm, rope or tokenizer would leave it none."""
    checked = check_facts(gemma3_model, facts.facts[:12])
    assert sum(each.known for each in checked) >= 8


def test_the_strongest_pairs_of_layer_0_share_their_last_token(
    moments: SecondMoments, keys: Keys
) -> None:
    pairs = top_pairs(result(moments, keys, 0).P, 10)
    shared = [keys.token_id[pair.i] == keys.token_id[pair.j] for pair in pairs]
    assert sum(map(bool, shared)) >= 8
