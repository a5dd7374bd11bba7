"""The model is asked what the scores of its edits are computed from (`kscli.scores`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kscli.completion import (
    Cloze,
    TargetScores,
    continue_greedily,
    decode_continuation,
    score_targets,
    tokenize_clozes,
)
from kscli.facts import Fact
from kscli.knowledge import EXTRA_TOKENS, begins_with
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter
from kscli.sampling import sample_texts
from kscli.scores import SCORES, TfIdf, likelier_share, n_gram_entropy, token_accuracy

Real = NDArray[np.float64]

GENERATED_TOKENS = 100


class Scoring:
    """The scores of edits of facts to new targets, each measured anew by `measure`.

    The first `measure` is of the clean model: locality compares with it. `generations` is the
    number of texts that are made up for each edit, drawn with `seed`.
    """

    def __init__(
        self,
        model: LoadedModel,
        edits: Sequence[tuple[Fact, str]],
        *,
        generations: int,
        seed: int,
    ) -> None:
        self._model, self._edits, self._seed = model, edits, seed
        self._asked: list[tuple[str, str]] = []
        self._places = [self._ask(fact, target) for fact, target in edits]
        texts, targets = zip(*self._asked, strict=True) if self._asked else ((), ())
        self._clozes = tokenize_clozes(model.tokenizer, texts, targets)
        self._clean: _Answers | None = None
        self._prompts = [_prompts(fact, "generation")[:generations] for fact, _ in edits]
        references = [_prompts(fact, "reference") for fact, _ in edits]
        self._references = [" ".join(of_one) for of_one in references]
        self._tf_idf = TfIdf([text for of_one in references for text in of_one])

    def measure(
        self, edits: Sequence[int] | None = None, reporter: Reporter = SILENT
    ) -> dict[str, Real]:
        """Every score of the `edits` (None: all) in the model as it is; NaN where it is absent.

        The arrays are over all edits; those that are not asked for are NaN.
        """
        chosen = range(len(self._edits)) if edits is None else edits
        wanted = [
            at for edit in chosen for of_kind in self._places[edit].values() for at in of_kind
        ]
        scores = score_targets(self._model, [self._clozes[at] for at in wanted], reporter)
        answers = _Answers(self._clozes, dict(zip(wanted, range(len(wanted)), strict=True)), scores)
        self._clean = self._clean or answers
        found = {name: np.full(len(self._edits), np.nan) for name in SCORES}
        texts = self._generated(chosen)
        for edit, says, made_up in zip(chosen, self._says(chosen, reporter), texts, strict=True):
            of_edit = self._of_edit(self._places[edit], answers) | {"says": float(says)}
            if made_up:
                of_edit["GE"] = math.fsum(map(n_gram_entropy, made_up)) / len(made_up)
                of_edit["RS"] = self._tf_idf.cosine(" ".join(made_up), self._references[edit])
            for name, value in of_edit.items():
                found[name][edit] = value
        return found

    def _ask(self, fact: Fact, target: str) -> dict[str, list[int]]:
        """Add an edit's questions to those asked; where each kind's answers will be."""
        kinds: dict[str, list[tuple[str, str]]] = {
            "new": [(fact.text, target)],
            "true": [(fact.text, fact.target)],
        }
        for kind in ("paraphrase", "neighbourhood"):
            kinds[f"{kind} new"] = [(prompt, target) for prompt in _prompts(fact, kind)]
            kinds[f"{kind} true"] = [(prompt, fact.target) for prompt in _prompts(fact, kind)]
        for kind in ("portability", "locality"):
            asked = (question for question in fact.questions if question.kind == kind)
            kinds[kind] = [(each.prompt, each.target) for each in asked if each.target.strip()]
        places = {}
        for kind, pairs in kinds.items():
            places[kind] = list(range(len(self._asked), len(self._asked) + len(pairs)))
            self._asked += pairs
        return places

    def _of_edit(self, places: dict[str, list[int]], answers: _Answers) -> dict[str, float]:
        """The scores of one edit that follow from targets' probabilities."""
        clean = self._clean or answers

        def likelier(kind: str, than: str) -> float:
            first, second = (map(answers.a_token, places[each]) for each in (kind, than))
            return likelier_share([*first], [*second])

        def accuracy(kind: str, wanted: Callable[[int], tuple[int, ...]]) -> float:
            return token_accuracy(
                [answers.said(at) for at in places[kind]], [wanted(at) for at in places[kind]]
            )

        def target(at: int) -> tuple[int, ...]:
            return self._clozes[at].target_ids

        return {
            "ES": likelier("new", "true"),
            "PS": likelier("paraphrase new", "paraphrase true"),
            "NS": likelier("neighbourhood true", "neighbourhood new"),
            "reliability": accuracy("new", target),
            "generalisation": accuracy("paraphrase new", target),
            "portability": accuracy("portability", target),
            "locality": accuracy("locality", clean.said),
        }

    def _says(self, edits: Sequence[int], reporter: Reporter) -> list[bool]:
        """Whether the greedy continuation of each edit's prompt begins with its new target."""
        clozes = [self._clozes[self._places[edit]["new"][0]] for edit in edits]
        prompts = [cloze.prompt_ids for cloze in clozes]
        lengths = [len(cloze.target_ids) + EXTRA_TOKENS for cloze in clozes]
        said = continue_greedily(self._model, prompts, lengths, reporter)
        decoded = map(partial(decode_continuation, self._model.tokenizer), prompts, said)
        targets = (self._edits[edit][1] for edit in edits)
        return list(map(begins_with, decoded, targets))

    def _generated(self, edits: Sequence[int]) -> list[list[str]]:
        """The texts that the model makes up for each edit."""
        flat = [prompt for edit in edits for prompt in self._prompts[edit]]
        texts = iter(sample_texts(self._model, flat, GENERATED_TOKENS, self._seed))
        return [[next(texts) for _ in self._prompts[edit]] for edit in edits]


@dataclass(frozen=True)
class _Answers:
    """What the model says of some of the targets; `row` is where a target is in `scores`."""

    clozes: Sequence[Cloze]
    row: dict[int, int]
    scores: TargetScores

    def a_token(self, at: int) -> float:
        """The mean log-probability of a target's token."""
        return float(self.scores.logprob[self.row[at]]) / len(self.clozes[at].target_ids)

    def said(self, at: int) -> tuple[int, ...]:
        """The likeliest tokens at the places of a target's."""
        return self.scores.likeliest[self.row[at]]


def absent_scores(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """The kinds of questions that none of some facts has, and the scores that each leaves out."""
    there = {question.kind for fact in facts for question in fact.questions}
    found: dict[str, list[str]] = {}
    for name, score in SCORES.items():
        if score.needs and score.needs not in there:
            found.setdefault(score.needs, []).append(name)
    return found


def _prompts(fact: Fact, kind: str) -> list[str]:
    return [question.prompt for question in fact.questions if question.kind == kind]
