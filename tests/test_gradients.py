"""Cosines of gradients against autograd's own gradient of the matrix, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import save_family

from kscli.completion import tokenize_clozes
from kscli.editing import gradients
from kscli.editing.gradients import gradient_cosines
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions

FACTS = read_facts("tiny", 12).facts


@pytest.mark.parametrize("family", ["tiny", "gpt2", "llama", "gpt-j"])
def test_the_cosines_are_those_of_the_full_gradients(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "tiny":
        save_family(family, tmp_path)
    name = "tiny" if family == "tiny" else str(tmp_path)
    model = load_model(ModelOptions(name, device="cpu", dtype="float32"))
    monkeypatch.setattr(gradients, "TOKENS_AT_ONCE", 30)
    layer, rows = 1, [0, 5, 11]
    found = gradient_cosines(model, layer, FACTS, rows)

    network = model.decoder.model.double()
    found_in_64 = gradient_cosines(model, layer, FACTS, rows)
    weight = model.decoder.projections[layer].module.weight
    weight.requires_grad_(True)
    full = []
    texts, targets = [fact.text for fact in FACTS], [fact.target for fact in FACTS]
    for cloze in tokenize_clozes(model.tokenizer, texts, targets):
        ids = [*cloze.prompt_ids, *cloze.target_ids]
        logits = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(cloze.prompt_ids)
        loss = -sum(logits[at - 1, ids[at]] for at in range(first, len(ids)))
        (gradient,) = torch.autograd.grad(loss, weight)
        full.append(gradient.reshape(-1).numpy())
    G = np.stack(full) / np.linalg.norm(full, axis=1, keepdims=True)
    np.testing.assert_allclose(found_in_64, (G @ G.T)[rows], atol=1e-5)
    # In a float32 model the gradient of what it is sure of, in proportion to 1 - P, has few digits.
    np.testing.assert_allclose(found, (G @ G.T)[rows], atol=1e-4)
    np.testing.assert_allclose(found[range(3), rows], 1, atol=1e-6)
    assert weight.grad is None
