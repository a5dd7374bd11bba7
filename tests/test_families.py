"""Every family: C and P of the tool against the definition, in float64, with hooks by name."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
import torch
from families import FAMILIES, HIDDEN, LAYERS, save_family, save_model
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kscli.batching import TokenBatch, TokenSequence, make_batches
from kscli.completion import Cloze, score_targets
from kscli.corpus import CorpusSpec, open_corpus
from kscli.errors import ModelError
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.pmatrix import superposition
from kscli.second_moment.covariance import CovarianceOptions, second_moments

DOCUMENTS = 200
MAX_LENGTH = 60
FACTS = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_c_and_p_equal_the_definition(family: str, tmp_path: Path) -> None:
    hook = save_family(family, tmp_path)
    corpus = open_corpus(CorpusSpec("tiny"))
    facts = read_facts("tiny", FACTS)

    loaded = load_model(ModelOptions(str(tmp_path), dtype="float32"))
    assert loaded.decoder.hook == hook
    moments = second_moments(loaded, corpus, CovarianceOptions(DOCUMENTS, None, MAX_LENGTH))
    keys = extract_keys(loaded, facts)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text, _ in zip(corpus.documents(), range(DOCUMENTS), strict=False)]
    names = [hook.format(layer) for layer in range(LAYERS)]
    true_C, count = naive.second_moments(model, tokenizer, texts, MAX_LENGTH, names)
    assert moments.tokens == count
    assert count > 10 * loaded.decoder.d_m

    located = [naive.subject_last(tokenizer, f.text, *f.subject_span) for f in facts.facts]
    assert [position for _, position in located] == keys.position.tolist()
    all_keys = [naive.keys_of_text(model, ids, names) for ids, _ in located]
    for layer, name in enumerate(names):
        C = moments.moments[layer].matrix().astype(np.float64)
        error = np.linalg.norm(C - true_C[name]) / np.linalg.norm(true_C[name])
        assert error < 1e-6
        true_keys = np.stack([k[name][at] for k, (_, at) in zip(all_keys, located, strict=True)])
        live = np.flatnonzero(np.diagonal(true_C[name]))
        true_P = naive.superposition(true_C[name][np.ix_(live, live)], true_keys[:, live])
        result = superposition(C, count, keys.keys[layer].astype(np.float64))
        assert np.abs(result.P - true_P).max() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_depends_on_what_else_is_in_the_batch(family: str, tmp_path: Path) -> None:
    """Keys, and log-probabilities of targets: of each sequence alone, and of all in company."""
    save_family(family, tmp_path)
    model = load_model(ModelOptions(str(tmp_path), dtype="float32"))
    random = np.random.default_rng(0)
    lengths = (3, 15, 16, 17, 18, 40)
    sequences = [tuple(random.integers(5, 2900, length).tolist()) for length in lengths]

    def keys(of: list[int]) -> dict[tuple[int, int], NDArray[np.float32]]:
        numbered = [TokenSequence(at, sequences[at]) for at in of]
        found: dict[tuple[int, int], NDArray[np.float32]] = {}
        for batch in make_batches(numbered, 4096, model.boundary):

            def take(layer: int, hidden: torch.Tensor, batch: TokenBatch = batch) -> None:
                for row, sequence in zip(hidden.float().numpy(), batch.sequences, strict=True):
                    found[layer, sequence.index] = row[: len(sequence.token_ids)].copy()

            model.decoder.run(batch.input_ids, range(LAYERS), take)
        return found

    together = keys(list(range(len(sequences))))
    for at in range(len(sequences)):
        for place, alone in keys([at]).items():
            difference = np.abs(together[place] - alone).max()
            assert difference <= 1e-5 * np.abs(alone).max(), (place, difference)

    clozes = [Cloze(ids[:-2], ids[-2:]) for ids in sequences]
    scores = score_targets(model, clozes)
    one_by_one = [score_targets(model, [cloze]).logprob[0] for cloze in clozes]
    np.testing.assert_allclose(scores.logprob, one_by_one, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_encoder_is_refused_even_under_a_causal_head(model_type: str, tmp_path: Path) -> None:
    save_model(
        model_type,
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        tmp_path,
    )
    with pytest.raises(ModelError, match="tokens that follow"):
        load_model(ModelOptions(str(tmp_path)))


def test_of_a_model_that_sees_the_language_model_is_measured(tmp_path: Path) -> None:
    """The tower has as many layers, of the same hidden size and a wider MLP."""
    transformers = pytest.importorskip("transformers")
    save_family("llama", tmp_path)  # for its tokenizer
    text = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "vocab_size": 3000,
    }
    vision = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    decoder = load_model(ModelOptions(str(tmp_path), dtype="float32")).decoder
    assert decoder.d_m == 48
    assert "vision" not in decoder.hook
    assert decoder.hook.endswith("layers.{}.mlp.down_proj")
