"""What is left of facts by their paraphrases, against greedy decoding of one text at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from kscli.editing.paraphrased import Paraphrases
from kscli.facts import Fact, Question, read_facts
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions


@pytest.fixture
def tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


def paraphrased() -> list[Fact]:
    """Facts whose first paraphrase is their own text, and whose second is another fact's."""
    facts = list(islice(read_facts("tiny", 12).facts, 12))
    texts = [fact.text for fact in facts]
    return [
        replace(
            fact,
            questions=(
                Question("neighbourhood", "The capital of Norway is"),
                Question("paraphrase", fact.text),
                Question("paraphrase", texts[(at + 3) % 12]),
            ),
        )
        for at, fact in enumerate(facts)
    ]


def answer(model: LoadedModel, text: str, target: str) -> list[int]:
    """The greedy tokens after a text, as many as the target has."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer(text)["input_ids"]
    length = len(tokenizer(f"{text} {target}")["input_ids"]) - len(ids)
    network: Any = model.decoder.model
    for _ in range(length):
        with torch.no_grad():
            ids = [*ids, int(network(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-length:]


def test_known_and_changed_are_what_greedy_decoding_says(tiny: LoadedModel) -> None:
    facts = paraphrased()
    asked = np.arange(12) % 4 != 1
    pairs = [
        (at, text, facts[at].target)
        for at, fact in enumerate(facts)
        for text in (question.prompt for question in fact.questions[1:])
    ]
    found = Paraphrases(tiny, facts, asked)
    tokenizer: Any = tiny.tokenizer
    before = [answer(tiny, text, target) for _, text, target in pairs]
    known = [
        bool(asked[at]) and said == tokenizer(f"{text} {target}")["input_ids"][-len(said) :]
        for (at, text, target), said in zip(pairs, before, strict=True)
    ]
    assert found.known.tolist() == known
    assert 3 < sum(known) < 20
    assert not found.changed().any()

    torch.manual_seed(0)
    with torch.no_grad():
        for projection in tiny.decoder.projections.values():
            weight = projection.module.weight
            weight += 2 * weight.std() * torch.randn_like(weight)
    changed = [
        one and answer(tiny, text, target) != said
        for one, (_, text, target), said in zip(known, pairs, before, strict=True)
    ]
    assert found.changed().tolist() == changed
    assert 0 < sum(changed) < sum(known)


@pytest.mark.parametrize("facts", [(), (Fact("{} is in", "Oslo", "Norway"),)])
def test_facts_without_paraphrases(facts: tuple[Fact, ...], tiny: LoadedModel) -> None:
    found = Paraphrases(tiny, facts, np.ones(len(facts), dtype=bool))
    assert found.known.shape == found.changed().shape == (0,)
