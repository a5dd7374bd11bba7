"""The keys that can stand for an edited fact: the choice `key` of an editor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kscli.editing.editors import FactKeys, KeySource

if TYPE_CHECKING:
    from kscli.editing.editors import Array


def clean(keys: KeySource) -> FactKeys:
    """The bare prompt's key in the clean model (equation 2)."""
    stored = keys.stored()
    return FactKeys(stored, stored, stored)


def mean_to_bare(keys: KeySource) -> FactKeys:
    """Along the mean key over all contexts, at the bare prompt's key (ROME)."""
    bare = keys.bare()
    return FactKeys(_mean(bare, *keys.in_contexts()), bare, bare)


def mean(keys: KeySource) -> FactKeys:
    """Along and at the mean key over all contexts (R-ROME)."""
    bare = keys.bare()
    found = _mean(bare, *keys.in_contexts())
    return FactKeys(found, found, bare)


def half_bare(keys: KeySource) -> FactKeys:
    """Along and at the mean of the bare prompt's key and the mean key over the others (MEMIT)."""
    bare = keys.bare()
    others, n = keys.in_contexts()
    found = (bare + others) / 2 if n else bare
    return FactKeys(found, found, bare)


def _mean(bare: Array, others: Array, n: int) -> Array:
    """The mean key over all contexts, the bare prompt among them: (b, d_m)."""
    return (bare + n * others) / (1 + n) if n else bare
