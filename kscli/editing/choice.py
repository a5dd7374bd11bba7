"""Which facts are edited, and in which order; and what the order costs.

Edit i moves the value of fact j by P[i, j] delta_i. Only the later edits move a fact that is edited
itself (equation 15). So for independent delta of one length the edited facts' squared shifts add
up to |delta|^2 times the sum of P[i, j]^2 over later i and earlier j.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kscli.errors import UsageError, nearest
from kscli.facts import Fact

Order = Literal["given", "random", "norm"]


def find_facts(facts: Sequence[Fact], wanted: Sequence[str], source: str | Path) -> list[int]:
    """The indexes of the facts that each of `wanted` names, in that order, each once.

    A subject names every fact about it; a number, where no subject is so called, the fact of that
    index. Raises UsageError, naming the facts' `source` and near names, where there is none.
    """
    found: dict[int, None] = {}
    for name in wanted:
        found.update(dict.fromkeys(_indexes(facts, name, source)))
    return list(found)


def choose_facts(
    facts: Sequence[Fact],
    count: int | None,
    seed: int,
    source: str | Path,
    *,
    at_most: bool = False,
) -> list[int]:
    """The indexes of `count` (None: all) of the facts of `source`, drawn with `seed`, ascending.

    Where there are fewer, they are all chosen with `at_most`, and UsageError is raised without.
    """
    m = len(facts)
    count = min(count, m) if at_most and count else count
    if (count or 0) > m:
        raise UsageError(
            f"{count} edits were asked for, but {source} holds {m} facts; ask for at most {m}, or "
            "all."
        )
    return draw_edits(m, m if count is None else count, seed)


def draw_edits(m: int, count: int, seed: int) -> list[int]:
    """`count` of the indexes of m facts, drawn with `seed`, ascending."""
    return sorted(random.Random(seed).sample(range(m), count))


def edit_order(
    order: Order, leverage: NDArray[np.float64], edits: Sequence[int], seed: int
) -> list[int]:
    """The edits in the order asked for.

    `leverage` (m,) is k^T C^-1 k of every fact, `edits` (n) are indexes into it. `random` is drawn
    with `seed`; `norm` is by ascending leverage, where equals stay in the given order.

    No order of `edits` has a smaller `sequence_interference` than `norm`. With n_i^2 = leverage[i]
    and s[i, j] = k_i^T C^-1 k_j, which is symmetric, P[i, j] = s[i, j] / n_i^2: whichever of a pair
    is edited later divides by its own n^2, P[i, j] / P[j, i] = n_j^2 / n_i^2. So a pair costs least
    when the one of larger leverage is the later one. Ascending leverage gives every pair its least
    cost at once; their sum cannot be less.
    """
    edits = list(edits)
    if order == "random":
        random.Random(seed).shuffle(edits)
    elif order == "norm":
        edits.sort(key=lambda fact: float(leverage[fact]))
    return edits


def sequence_interference(P: NDArray[np.float64], sequence: Sequence[int]) -> float:
    """The sum of P[i, j]^2 over later i and earlier j of `sequence`, indexes into P (m, m)."""
    chosen = P[np.ix_(sequence, sequence)]
    return float(np.square(np.tril(chosen, -1)).sum())


def _indexes(facts: Sequence[Fact], name: str, source: str | Path) -> list[int]:
    subjects = [fact.subject for fact in facts]
    same = [index for index, subject in enumerate(subjects) if subject == name]
    if same:
        return same
    if name.isascii() and name.isdecimal() and int(name) < len(subjects):
        return [int(name)]
    near = ", ".join(map(repr, nearest(name, subjects, n=3)))
    remedy = f"there is {near}" if near else f"its facts have the indexes 0 to {len(subjects) - 1}"
    raise UsageError(f"{source} has no fact about {name!r}; {remedy}.")
