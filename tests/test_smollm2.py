"""A real model, SmolLM2-135M, on a corpus that is small enough for CI."""

from __future__ import annotations

import json
from pathlib import Path

import naive
import numpy as np
import pytest
import torch

from kscli.corpus import CorpusSpec, open_corpus
from kscli.covariance import CovarianceOptions, second_moments
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import LoadedModel, ModelOptions, load_model
from kscli.superposition import superposition

LAYERS = (0, 12, 29)
DOCUMENTS = 6
MAX_LENGTH = 128
FACTS = 16
RIDGE = 1.0


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return load_model(ModelOptions(str(smollm2), dtype="float32"))


def test_c_and_p_equal_the_definition(loaded: LoadedModel, shared_data: Path) -> None:
    """Under a ridge, since a corpus that CI can afford is shorter than d_m."""
    text = shared_data / "wikitext2_valid.jsonl"
    layers = ",".join(map(str, LAYERS))
    options = CovarianceOptions(DOCUMENTS, None, MAX_LENGTH, layers)
    moments = second_moments(loaded, open_corpus(CorpusSpec(str(text))), options)
    facts = read_facts(shared_data / "counterfact_known_256.json", FACTS)
    keys = extract_keys(loaded, facts, layers=layers)

    hooks = [f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS]
    model = loaded.decoder.model.double()
    try:
        with text.open(encoding="utf-8") as lines:
            texts = [
                json.loads(line)["text"] for line, _ in zip(lines, range(DOCUMENTS), strict=False)
            ]
        true_C, count = naive.second_moments(model, loaded.tokenizer, texts, MAX_LENGTH, hooks)
        located = [
            naive.subject_last(loaded.tokenizer, f.text, *f.subject_span) for f in facts.facts
        ]
        all_keys = [naive.keys_of_text(model, ids, hooks) for ids, _ in located]
    finally:
        torch.nn.Module.float(model)  # a GGUF model refuses its own float()

    assert moments.tokens == count == DOCUMENTS * MAX_LENGTH
    assert [position for _, position in located] == keys.position.tolist()
    for row, (layer, hook) in enumerate(zip(LAYERS, hooks, strict=True)):
        C = moments.moments[layer].matrix().astype(np.float64)
        assert np.linalg.norm(C - true_C[hook]) < 1e-6 * np.linalg.norm(true_C[hook])
        true_keys = np.stack([k[hook][at] for k, (_, at) in zip(all_keys, located, strict=True)])
        ridged = true_C[hook] + RIDGE * np.trace(true_C[hook]) / len(C) * np.eye(len(C))
        result = superposition(C, count, keys.keys[row].astype(np.float64), RIDGE)
        assert np.abs(result.P - naive.superposition(ridged, true_keys)).max() < 2e-5


def test_the_key_is_read_at_the_subjects_last_token(loaded: LoadedModel, shared_data: Path) -> None:
    """By hand: what the token at the position says."""
    facts = read_facts(shared_data / "counterfact_known_256.json", 128)
    keys = extract_keys(loaded, facts, layers="0")
    tokens = [loaded.tokenizer.decode([token]) for token in keys.token_id]
    subjects = [fact.subject for fact in facts.facts]
    for subject, token in zip(subjects, tokens, strict=True):
        assert subject.endswith(token.strip()), (subject, token)
    assert tokens[subjects.index("Patrick Rambaud")] == tokens[subjects.index("Pierre Trabaud")]
