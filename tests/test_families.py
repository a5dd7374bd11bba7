"""Every family: C and P of the tool against the definition, in float64, with hooks by name."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
from families import FAMILIES, HIDDEN, LAYERS, save_family, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.corpus import CorpusSpec, open_corpus
from kscli.errors import ModelError
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import ModelOptions, load_model
from kscli.second_moment.covariance import CovarianceOptions, second_moments
from kscli.superposition import superposition

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


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_mixture_of_experts_is_refused(model_type: str, tmp_path: Path) -> None:
    save_model(
        model_type,
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
        },
        tmp_path,
    )
    with pytest.raises(ModelError, match="mixture of experts"):
        load_model(ModelOptions(str(tmp_path)))


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
