"""What the model says before and after edits: of every fact, of new targets, of other text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.batching import encode
from kscli.completion import (
    Cloze,
    TargetScores,
    decode_continuation,
    greedy_answers,
    score_targets,
    tokenize_clozes,
)
from kscli.corpus import Corpus
from kscli.errors import CorpusError
from kscli.facts import Fact
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter

Clean = Callable[[], AbstractContextManager[None]]

LOGITS_AT_ONCE = 512


@dataclass(frozen=True)
class FactsPass:
    """Of all m facts: the scores of their true targets, and the greedy answers as long."""

    scores: TargetScores
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Asked:
    """Of some facts: how the model takes each one's true target, and one new target."""

    true: TargetScores
    new: TargetScores


class Examination:
    """The questions of a run: m facts' true targets, and new targets after facts' prompts."""

    def __init__(self, model: LoadedModel, facts: Sequence[Fact]) -> None:
        self._model = model
        self._facts = facts
        self.true = self._clozes([(index, fact.target) for index, fact in enumerate(facts)])
        self._new: dict[tuple[int, str], Cloze] = {}

    def new(self, asked: Sequence[tuple[int, str]]) -> list[Cloze]:
        """Targets after facts' prompts, for (fact, target) pairs."""
        missing = [pair for pair in dict.fromkeys(asked) if pair not in self._new]
        self._new.update(zip(missing, self._clozes(missing), strict=True))
        return [self._new[pair] for pair in asked]

    def all_facts(self, reporter: Reporter = SILENT) -> FactsPass:
        """Ask for every fact."""
        scores = score_targets(self._model, self.true, reporter)
        return FactsPass(scores, greedy_answers(self._model, self.true, scores, reporter))

    def new_targets(
        self, asked: Sequence[tuple[int, str]], reporter: Reporter = SILENT
    ) -> TargetScores:
        """Ask how the model takes targets after facts' prompts, for (fact, target) pairs."""
        return score_targets(self._model, self.new(asked), reporter)

    def ask(self, facts: Sequence[int], target: str) -> Asked:
        """Ask some facts, by their indexes, for their true targets and for one new target."""
        true = [self.true[fact] for fact in facts]
        # Both at once: one-token targets of a prompt take one forward pass.
        scores = score_targets(self._model, true + self.new([(fact, target) for fact in facts]))
        n = len(facts)
        return Asked(scores.some(range(n)), scores.some(range(n, 2 * n)))

    def answers(self, facts: Sequence[int], asked: Asked) -> tuple[tuple[int, ...], ...]:
        """The greedy answers of facts that were asked, as long as their true targets."""
        return greedy_answers(self._model, [self.true[fact] for fact in facts], asked.true)

    def text(self, fact: int, answer: tuple[int, ...]) -> str:
        """An answer to a fact's prompt as text, without the space before it."""
        prompt = self.true[fact].prompt_ids
        return decode_continuation(self._model.tokenizer, prompt, answer).strip()

    def _clozes(self, pairs: Sequence[tuple[int, str]]) -> tuple[Cloze, ...]:
        texts = [self._facts[index].text for index, _ in pairs]
        return tokenize_clozes(self._model.tokenizer, texts, [target for _, target in pairs])


class HeldOutText:
    """Text that C did not see, to measure perplexity on: its first `tokens` tokens."""

    def __init__(self, model: LoadedModel, corpus: Corpus, tokens: int, max_length: int) -> None:
        self._model = model
        self._sequences: list[tuple[int, ...]] = []
        left = tokens
        for sequence in encode(model.tokenizer, enumerate(corpus.documents()), max_length):
            # Of one token nothing is predicted.
            if len(sequence.token_ids[:left]) > 1:
                self._sequences.append(sequence.token_ids[:left])
                left -= len(self._sequences[-1])
            if left <= 1:
                break
        if not self._sequences:
            raise CorpusError(f"the held-out text {corpus.name} gave no two tokens in a row.")

    def measure(
        self, clean: Clean | None = None, reporter: Reporter = SILENT
    ) -> tuple[float, float]:
        """The perplexity, and the KL divergence of the clean model's next token from this one's.

        Perplexity is exp of the mean negative log-probability of a token given those before it. The
        divergence is KL(clean || now), the mean over the same tokens, in nats; 0 without `clean`,
        in whose block the model is the clean one.
        """
        total, divergence, count = 0.0, 0.0, 0
        with torch.no_grad(), reporter.task("held-out text", len(self._sequences)) as task:
            for sequence in self._sequences:
                logits = self._logits(sequence)
                before = logits
                if clean:
                    with clean():
                        before = self._logits(sequence)
                targets = torch.tensor(sequence[1:], device=logits.device)
                for start in range(0, len(targets), LOGITS_AT_ONCE):
                    piece = slice(start, start + LOGITS_AT_ONCE)
                    now = logits[piece].float().log_softmax(-1)
                    total -= float(now.gather(1, targets[piece, None]).double().sum())
                    if clean:
                        then = before[piece].float().log_softmax(-1)
                        divergence += float((then.exp() * (then - now)).sum(-1).double().sum())
                count += len(targets)
                task.advance()
        mean = total / count
        return math.exp(mean) if mean < 700 else math.inf, max(divergence / count, 0.0)

    def _logits(self, sequence: Sequence[int]) -> Tensor:
        """The logits of what follows each token but the last, (tokens, vocabulary)."""
        ids = torch.tensor([sequence])
        return self._model.decoder.logits(ids, len(sequence))[0, :-1]


def changed(
    answers: Sequence[tuple[int, ...]], before: Sequence[tuple[int, ...]]
) -> NDArray[np.bool_]:
    """Which answers differ."""
    return np.array([now != then for now, then in zip(answers, before, strict=True)], dtype=bool)
