"""A fact of the user's own, to be edited: its keys and P are made on the way.

The facts of the model's keys.h5, where there is one, stand beside it: the damage to them is
measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.completion import continue_greedily, decode_continuation, tokenize_clozes
from kscli.contexts import ContextChoice
from kscli.facts import Fact, FactSet
from kscli.layers import format_layers
from kscli.places import Places
from kscli.pmatrix import write_pmatrix
from kscli.records import quote

if TYPE_CHECKING:
    from kscli.pipeline import Session

SOURCE = "--prompt"
"""Where such a fact is said to come from."""

_ANSWER_TOKENS = 8
_END_OF_ANSWER = re.compile(r"[\n.,;:!?()\"]")


@dataclass(frozen=True)
class OwnFact:
    """A fact and its new target; with no `target`, what the model says now is its target."""

    prompt: str
    subject: str
    target_new: str
    target: str = ""

    def complete(self, session: Session) -> Fact:
        """The whole fact. Raises FactsError as `Fact` does."""
        # A stand-in, so that the rest is checked before the model is asked.
        fact = Fact(self.prompt, self.subject, self.target or self.target_new)
        if self.target:
            return fact
        said = _answer(session, fact)
        session.reporter.note(
            f"the model now says {quote(said)} after {quote(fact.text)}, which is taken for the "
            "fact's target; --target names another."
        )
        return replace(fact, target=said)


@contextmanager
def own_files(
    session: Session, own: OwnFact, cov: CovarianceFile, places: Places, layers: tuple[int, ...]
) -> Iterator[tuple[Path, Path]]:
    """The paths of a keys.h5 and a pmatrix.h5 of an own fact, the first, at `layers`.

    After it come the facts of the model's keys.h5, if there is one, and C is inverted with the
    ridge of its pmatrix.h5. Both files are gone afterwards.
    """
    fact = own.complete(session)
    others: tuple[Fact, ...] = ()
    keys, pmatrix = places.path("keys"), places.path("pmatrix")
    ridge = 0.0
    if pmatrix.exists():
        with PMatrixFile(pmatrix) as held:
            ridge = held.about.ridge
    if keys.exists():
        with KeysFile(keys) as file:
            others = tuple(other for other in file.facts if other.text != fact.text)
    else:
        session.reporter.note(
            f"{keys} does not exist, so no other fact is watched; `kscli extract` makes it."
        )
    with TemporaryDirectory(prefix="kscli-") as folder:
        made, matrices = Path(folder, "keys.h5"), Path(folder, "pmatrix.h5")
        facts, spec = FactSet((fact, *others), SOURCE), format_layers(layers)
        session.extract(facts, "subject-last", spec, made, ContextChoice())
        with KeysFile(made) as of_facts:
            # What there is to say of C and these keys, `EditSources.check` says.
            write_pmatrix(cov, of_facts, matrices, layers=layers, ridge=ridge)
        yield made, matrices


def _answer(session: Session, fact: Fact) -> str:
    """What the model says after a fact's prompt, up to the first mark, and a word at least."""
    model = session.model
    (cloze,) = tokenize_clozes(model.tokenizer, [fact.text], [fact.target])
    (tokens,) = continue_greedily(model, [cloze.prompt_ids], [_ANSWER_TOKENS])
    text = decode_continuation(model.tokenizer, cloze.prompt_ids, tokens).strip()
    return _END_OF_ANSWER.split(text)[0].strip() or text or "(nothing)"
