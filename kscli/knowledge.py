"""Which facts a model knows, and which facts several models know together (Appendix G).

A model knows a fact when its greedy continuation of the prompt begins with the target. What one
model was found to know is a facts file whose records say more (`Checked`), so `extract` reads it
like any other.
"""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.errors import FactsError
from kscli.facts import Fact, fact_record, read_records, write_records
from kscli.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from kscli.models.loading import LoadedModel

# How many tokens are read beyond as many as the target has: the target may be spelt with other
# tokens than the tokenizer's, and what follows tells whether its last word ends there.
EXTRA_TOKENS = 5


@dataclass(frozen=True)
class Checked:
    """A fact, and how a model completes its prompt.

    `logprob` is the natural logarithm of the probability of the whole target, `rank` that of its
    first token from 1, `continuation` the greedy one, as many tokens as the target's and
    `EXTRA_TOKENS`.
    """

    fact: Fact
    known: bool
    logprob: float
    rank: int
    continuation: str


@dataclass(frozen=True)
class Knowledge:
    """Which of its facts a model knows, as a file says it; facts that are equal are one."""

    path: Path
    model: str
    known: dict[Fact, bool]


@dataclass(frozen=True)
class Selection:
    """The facts that were drawn, and how many there were to draw from."""

    facts: tuple[Fact, ...]
    candidates: int


def check_facts(
    model: LoadedModel, facts: Sequence[Fact], reporter: Reporter = SILENT
) -> tuple[Checked, ...]:
    """Complete every fact's prompt with the model; raises as `score_targets` does."""
    from kscli import completion

    tokenizer = model.tokenizer
    clozes = completion.tokenize_clozes(
        tokenizer, [fact.text for fact in facts], [fact.target for fact in facts]
    )
    lengths = [len(cloze.target_ids) + EXTRA_TOKENS for cloze in clozes]
    prompts = [cloze.prompt_ids for cloze in clozes]
    scores = completion.score_targets(model, clozes, reporter)
    continuations = completion.continue_greedily(model, prompts, lengths, reporter)
    texts = map(completion.decode_continuation, [tokenizer] * len(facts), prompts, continuations)
    return tuple(
        Checked(fact, begins_with(text, fact.target), float(logprob), int(rank), text)
        for fact, text, logprob, rank in zip(facts, texts, scores.logprob, scores.rank, strict=True)
    )


def begins_with(continuation: str, target: str) -> bool:
    """Whether the continuation, after white space, begins with the target in whole words.

    `France` does not begin with `Fran`. Characters of East Asian width, of scripts that do not
    part words with spaces, never go on a word. Both texts are compared in Unicode's form NFC.
    """
    said = unicodedata.normalize("NFC", continuation).lstrip()
    wanted = unicodedata.normalize("NFC", target).strip()
    if not said.startswith(wanted):
        return False
    following = said[len(wanted) :][:1]
    return not (wanted[-1].isalnum() and _goes_on(following))


def _goes_on(character: str) -> bool:
    """Whether a character after a word belongs to it; the text's end does not."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def write_knowledge(
    model: LoadedModel, checked: Sequence[Checked], path: Path, *, force: bool = False
) -> None:
    """Write what a model knows as a facts file, every record naming the model.

    Raises as `kscli.facts.require_facts_path` does.
    """
    identity = model.identity
    made_by = {"model": identity.model, "weights": identity.weights, "dtype": model.dtype}
    records = (
        {
            **fact_record(each.fact),
            "known": each.known,
            "probability": math.exp(each.logprob),
            "logprob": each.logprob,
            "rank": each.rank,
            "continuation": each.continuation,
            **made_by,
        }
        for each in checked
    )
    write_records(path, records, force=force)


def read_knowledge(path: Path) -> Knowledge:
    """Read what `write_knowledge` wrote.

    Raises FactsError for a file that is not one, or that holds what several models know.
    """
    known: dict[Fact, bool] = {}
    models: set[str] = set()
    for where, fact, fields in read_records(path):
        verdict, model = fields.get("known"), fields.get("model")
        if not isinstance(verdict, bool) or not isinstance(model, str):
            raise FactsError(
                f"{where}: it does not say which model knows the fact; give a file that "
                "`kscli facts check` wrote."
            )
        known[fact] = verdict
        models.add(model)
    if len(models) != 1:
        found = f"what {len(models)} models know" if models else "no facts"
        raise FactsError(f"{path} holds {found}; give a file that `kscli facts check` wrote.")
    return Knowledge(path, models.pop(), known)


def select_facts(
    results: Sequence[Knowledge], count: int | None, seed: int = 0, *, unknown: bool = False
) -> Selection:
    """Draw `count` (None: all) of the facts that every model knows, or, `unknown`, that none does.

    Facts that some of the models know and others do not are in neither. They are drawn without
    replacement and stay in the first result's order. Raises FactsError when the models were not
    asked the same facts, naming the difference, and when there are fewer than `count`.
    """
    first = results[0]
    for other in results[1:]:
        _require_same_facts(first, other)
    candidates = [
        fact for fact in first.known if all(each.known[fact] != unknown for each in results)
    ]
    if not candidates or (count or 0) > len(candidates):
        names = ", ".join(each.model for each in results)
        of_many = "no model" if unknown else "every model"
        of_one = "it does not know" if unknown else "it knows"
        which = of_one if len(results) == 1 else f"{of_many} knows"
        raise FactsError(
            f"{count or 'All'} facts were asked for, but of the {len(first.known)} that {names} "
            f"completed there are {len(candidates)} that {which}; ask for fewer, or check more."
        )
    if count is not None:
        drawn = random.Random(seed).sample(range(len(candidates)), count)
        return Selection(tuple(candidates[index] for index in sorted(drawn)), len(candidates))
    return Selection(tuple(candidates), len(candidates))


def _require_same_facts(first: Knowledge, other: Knowledge) -> None:
    for lacking, having in ((other, first), (first, other)):
        absent = [fact for fact in having.known if fact not in lacking.known]
        if absent:
            raise FactsError(
                f"{lacking.path} lacks {len(absent)} of the {len(having.known)} facts of "
                f"{having.path} (the first: {absent[0].text[:60]!r}); check both models on the "
                "same --facts and --count."
            )
