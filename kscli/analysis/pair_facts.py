"""The two facts of a pair as the fields of a flat record."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kscli.facts import Fact


def pair_facts(facts: Sequence[Fact], i: int, j: int) -> dict[str, str]:
    """Subject, prompt (with `{}` where the subject goes) and target of facts `i` and `j`."""
    return {
        f"{name}_{which}": getattr(facts[at], name)
        for which, at in (("i", i), ("j", j))
        for name in ("subject", "prompt", "target")
    }
