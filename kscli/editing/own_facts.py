"""Facts of the user's own, to be edited: their keys and P are made on the way.

The facts of the model's keys.h5, where there is one, stand beside them: the damage to them is
measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.completion import (
    continue_greedily,
    decode_continuation,
    space_before,
    tokenize_clozes,
)
from kscli.contexts import ContextChoice
from kscli.editing.choice import choose_facts, find_facts
from kscli.facts import Fact, FactSet, field_text, read_records
from kscli.layers import format_layers
from kscli.places import Places
from kscli.pmatrix import write_pmatrix
from kscli.records import quote

if TYPE_CHECKING:
    from kscli.models.loading import LoadedModel
    from kscli.pipeline import Session

_ANSWER_TOKENS = 8
_END_OF_ANSWER = re.compile(r"[\n.,;:!?()\"]")


@dataclass(frozen=True)
class OwnFacts:
    """Facts with their new targets, and where they are said to come from.

    Without `has_targets` the target of each stands for what the model says now.
    """

    facts: tuple[Fact, ...]
    source: str
    has_targets: bool = True

    @classmethod
    def of_prompt(
        cls, prompt: str, subject: str, target_new: str, target: str | None = None
    ) -> OwnFacts:
        """One fact, whose target is what the model says unless given. Raises FactsError."""
        fact = Fact(prompt, subject, target or target_new, target_new=target_new)
        return cls((fact,), "--prompt", has_targets=bool(target))

    @classmethod
    def of_file(cls, source: str, keys: Path, field: str) -> OwnFacts | None:
        """The facts of `source`; None where they hold all of the facts of keys.h5, if it exists.

        The new target is in the records' `field`. Raises FactsError.
        """
        found: dict[str, Fact] = {}
        for _, fact, record in read_records(source):
            new = fact.target_new if field == "target_new" else field_text(record, field)
            found.setdefault(fact.text, replace(fact, target_new=new or ""))
        if keys.exists():
            with KeysFile(keys) as file:
                if all(fact.text in found for fact in file.facts):
                    return None
        return cls(tuple(found.values()), source)

    def choose(
        self, wanted: Sequence[str], count: int | None, seed: int, *, at_most: bool
    ) -> OwnFacts:
        """Those that `wanted` names or, without any, those that `choose_facts` draws."""
        if wanted:
            chosen = find_facts(self.facts, wanted, self.source)
        else:
            chosen = choose_facts(self.facts, count, seed, self.source, at_most=at_most)
        return replace(self, facts=tuple(self.facts[index] for index in chosen))

    def complete(self, session: Session) -> tuple[Fact, ...]:
        """The whole facts. Raises FactsError as `Fact` does."""
        if self.has_targets:
            return self.facts
        return tuple(_with_answer(session, fact) for fact in self.facts)


@contextmanager
def own_files(
    session: Session, own: OwnFacts, cov: CovarianceFile, places: Places, layers: tuple[int, ...]
) -> Iterator[tuple[Path, Path]]:
    """The paths of a keys.h5 and a pmatrix.h5 of own facts, the first, at `layers`.

    After them come the facts of the model's keys.h5, if there is one, and C is inverted with the
    ridge of its pmatrix.h5. Both files are gone afterwards.
    """
    mine = own.complete(session)
    texts = {fact.text for fact in mine}
    others: tuple[Fact, ...] = ()
    keys, pmatrix = places.path("keys"), places.path("pmatrix")
    ridge = 0.0
    if pmatrix.exists():
        with PMatrixFile(pmatrix) as held:
            ridge = held.about.ridge
    if keys.exists():
        with KeysFile(keys) as file:
            others = tuple(other for other in file.facts if other.text not in texts)
    else:
        session.reporter.note(
            f"{keys} does not exist, so no other fact is watched; `kscli extract` makes it."
        )
    with TemporaryDirectory(prefix="kscli-") as folder:
        made, matrices = Path(folder, "keys.h5"), Path(folder, "pmatrix.h5")
        facts, spec = FactSet((*mine, *others), own.source), format_layers(layers)
        session.extract(facts, "subject-last", spec, made, ContextChoice())
        with KeysFile(made) as of_facts:
            # What there is to say of C and these keys, `EditSources.check` says.
            write_pmatrix(cov, of_facts, matrices, layers=layers, ridge=ridge)
        yield made, matrices


def _with_answer(session: Session, fact: Fact) -> Fact:
    """The fact with what the model says now for its target."""
    added = _continuation(session.model, fact)
    text = added.strip()
    said = _END_OF_ANSWER.split(text)[0].strip() or text or "(nothing)"
    how = ","
    # A target follows its prompt as a word of its own.
    if text and not added.startswith(space_before(fact.text, said) + said):
        how = ", without the space that would make it a word of its own,"
    session.reporter.note(
        f"the model now says {quote(said)} after {quote(fact.text)}{how} which is taken "
        "for the fact's target; --target names another."
    )
    return replace(fact, target=said)


def _continuation(model: LoadedModel, fact: Fact) -> str:
    """What the model says after a fact's prompt, with the space between them."""
    (cloze,) = tokenize_clozes(model.tokenizer, [fact.text], [fact.target])
    (tokens,) = continue_greedily(model, [cloze.prompt_ids], [_ANSWER_TOKENS])
    return decode_continuation(model.tokenizer, cloze.prompt_ids, tokens)
