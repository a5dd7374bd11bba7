"""How few facts are too few to speak of the distribution of their p."""

from __future__ import annotations

FEWEST_FACTS = 10
"""Below this many facts their p has no distribution worth a statistic."""


def few_facts(m: int) -> str | None:
    """A sentence where m facts are too few for a distribution of p, else None."""
    if m == 1:
        return (
            "p is of pairs of facts, and this is one fact, so there is no pair and no statistic; "
            "take more (--count, or a longer --facts file of `kscli extract` or `run`)."
        )
    if m < FEWEST_FACTS:
        return (
            f"{m} facts make {m * (m - 1)} pairs, which are too few for a distribution: read the "
            f"pairs one by one, or take {FEWEST_FACTS} facts or more (--count, or a longer --facts "
            "file of `kscli extract` or `run`)."
        )
    return None
