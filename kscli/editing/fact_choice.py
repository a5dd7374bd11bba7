"""Facts of a file, named by their subject or by their index."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from kscli.artifacts import FactsFile
from kscli.errors import FactsError


def find_facts(file: FactsFile, wanted: Sequence[str]) -> list[int]:
    """The indexes of the facts that each of `wanted` names, in that order, each once.

    A subject names every fact about it; a number, where no subject is so called, the fact of that
    index. Raises FactsError, with near names, where there is none.
    """
    found: dict[int, None] = {}
    for name in wanted:
        found.update(dict.fromkeys(_indexes(file, name)))
    return list(found)


def _indexes(file: FactsFile, name: str) -> list[int]:
    subjects = [fact.subject for fact in file.facts]
    same = [index for index, subject in enumerate(subjects) if subject == name]
    if same:
        return same
    if name.isascii() and name.isdecimal() and int(name) < len(subjects):
        return [int(name)]
    near = ", ".join(map(repr, get_close_matches(name, dict.fromkeys(subjects), n=3)))
    remedy = f"there is {near}" if near else f"its facts have the indexes 0 to {len(subjects) - 1}"
    raise FactsError(f"{file.path} has no fact about {name!r}; {remedy}.")
