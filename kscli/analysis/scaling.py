"""The paper's scaling law as numbers: within a family, the larger model has the larger kurtosis.

Both models are measured on the same facts, so their difference is resampled on the same facts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from kscli.analysis.matrices import different_last_token
from kscli.analysis.pairs import FactMatrices
from kscli.analysis.resampling import (
    Array,
    Counts,
    PairMask,
    Resampling,
    bootstrap_moments,
    interval,
    off_diagonal_pairs,
)
from kscli.analysis.statistics import DISTINCT, STATISTICS
from kscli.models.families import family_of

DEPTHS = np.linspace(0, 1, 101)  # where two models' layers are compared, 0 the first, 1 the last


@dataclass(frozen=True)
class Measured:
    """A model's open matrices, the layers of it to compare, and how many layers it has."""

    matrices: FactMatrices
    model_id: str
    n_layers: int
    layers: tuple[int, ...]

    @property
    def depths(self) -> Array:
        """Where `layers` lie between the model's first layer (0) and its last (1)."""
        return np.array(self.layers) / max(self.n_layers - 1, 1)


def scaling_rows(
    models: Sequence[Measured], resampling: Resampling | None = None
) -> list[dict[str, Any]]:
    """A flat record for each pair of sizes in a family, the smaller model first.

    `kurtosis_smaller` and `kurtosis_larger` are means over layers; `difference`, larger less
    smaller, has a 95 % interval from the same resampled facts for both; `share_higher` is the
    share of relative depths (0 the first layer, 1 the last, kurtosis interpolated) where the
    larger model's kurtosis is higher. All of it again, as `NAME_distinct`, without pairs that
    share the last token. The interval is NaN where the facts differ; layers where kurtosis is
    undefined are left out.
    """
    resampling = resampling or Resampling()
    families: dict[str, list[_Sized]] = {}
    for model in models:
        member = family_of(model.matrices.model, model.model_id)
        if member is not None:
            families.setdefault(member.family, []).append(_Sized(member.size, model))
    rows = []
    for family, members in families.items():
        if len({member.size for member in members}) < 2:
            continue
        members.sort(key=lambda member: member.size)
        profiles = [_profiles(member.model, resampling) for member in members]
        for a, b in combinations(range(len(members)), 2):
            if members[a].size < members[b].size:
                names = {"family": family} | _names(members[a].model, members[b].model)
                rows.append(names | _compared(profiles[a], profiles[b], names["same_facts"]))
    return rows


class _Sized(NamedTuple):
    size: float
    model: Measured


def _names(smaller: Measured, larger: Measured) -> dict[str, Any]:
    facts = [model.matrices.facts for model in (smaller, larger)]
    return {
        "smaller": smaller.matrices.model,
        "larger": larger.matrices.model,
        "m_smaller": len(facts[0]),
        "m_larger": len(facts[1]),
        "same_facts": facts[0] == facts[1],
    }


@dataclass(frozen=True)
class _Profile:
    """Kurtosis at each relative depth where it is defined, (n,), and its mean in every repeat."""

    depths: Array
    kurtosis: Array
    repeated: Array

    @property
    def mean(self) -> float:
        """The mean over layers."""
        return float(self.kurtosis.mean()) if self.kurtosis.size else float("nan")


_Profiles = dict[str, _Profile]  # by the suffix of the fields


def _profiles(model: Measured, resampling: Resampling) -> _Profiles:
    """With all pairs, and without those that share a token."""
    m = len(model.matrices.facts)
    counts = resampling.counts(m)
    every = off_diagonal_pairs(m)
    distinct = every & different_last_token(model.matrices.token_id)
    return {"": _profile(model, counts, every), DISTINCT: _profile(model, counts, distinct)}


def _profile(model: Measured, counts: Counts, pairs: PairMask) -> _Profile:
    matrices = [model.matrices.matrix("P", layer) for layer in model.layers]
    kurtosis = np.array([STATISTICS["kurtosis"](P[pairs]) for P in matrices])
    defined = ~np.isnan(kurtosis)
    repeats = [
        bootstrap_moments(P, counts, pairs).kurtosis
        for P, there in zip(matrices, defined, strict=True)
        if there
    ]
    repeated = np.mean(repeats, axis=0) if repeats else np.full(len(counts), np.nan)
    return _Profile(model.depths[defined], kurtosis[defined], np.asarray(repeated))


def _compared(smaller: _Profiles, larger: _Profiles, paired: bool) -> dict[str, float]:
    fields: dict[str, float] = {}
    for suffix in smaller:
        low, high = smaller[suffix], larger[suffix]
        apart = high.repeated - low.repeated if paired else np.array([np.nan])
        bounds = interval(apart)
        fields |= {
            f"kurtosis_smaller{suffix}": low.mean,
            f"kurtosis_larger{suffix}": high.mean,
            f"difference{suffix}": high.mean - low.mean,
            f"difference{suffix}_low": bounds.low,
            f"difference{suffix}_high": bounds.high,
            f"share_higher{suffix}": _share_higher(low, high),
        }
    return fields


def _share_higher(smaller: _Profile, larger: _Profile) -> float:
    """The share of the depths that both have where the larger model's kurtosis is higher."""
    if not (smaller.depths.size and larger.depths.size):
        return float("nan")
    first = max(smaller.depths[0], larger.depths[0])
    last = min(smaller.depths[-1], larger.depths[-1])
    if first > last:
        return float("nan")
    depths = first + (last - first) * DEPTHS
    low, high = (np.interp(depths, side.depths, side.kurtosis) for side in (smaller, larger))
    return float(np.mean(high > low))
