"""Kurtosis and interference against size, and of dense and expert models of one active size.

The paper's scaling law as numbers: within a family, the larger model has the larger kurtosis. The
paper asks, too, whether sparser architectures have less superposition: a mixture of experts is
compared with the dense models whose tokens use as many parameters.

Both models are measured on the same facts, so their difference is resampled on the same facts too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import common_experts, different_last_token
from kscli.analysis.pairs import FactMatrices
from kscli.analysis.resampling import (
    Array,
    Counts,
    PairMask,
    PairSample,
    Resampling,
    bootstrap_moments,
    interval,
    off_diagonal_pairs,
)
from kscli.analysis.statistics import DISTINCT, STATISTICS, TAILS
from kscli.analysis.tails import share_within
from kscli.models.families import Member, member_of, of_one_active_size, of_one_size

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile

DEPTHS = np.linspace(0, 1, 101)  # where two models' layers are compared, 0 the first, 1 the last
BY_SIZE = "parameters"
# How a mixture of experts and a dense model are of one size.
ONE_SIZE = {"active parameters": of_one_active_size, "all parameters": of_one_size}


@dataclass(frozen=True)
class Measured:
    """A model's open matrices, the layers of it to compare, and how many layers it has.

    `sizes` are its parameters and its active parameters where a file says them. `experts_of` gives
    the experts that each fact is routed to at a layer, (m, slot), of a mixture.
    """

    matrices: FactMatrices
    model_id: str
    n_layers: int
    layers: tuple[int, ...]
    sizes: tuple[int, int] | None = None
    experts_of: Callable[[int], NDArray[np.int64] | None] = lambda layer: None

    @classmethod
    def of_file(cls, file: PMatrixFile, layers: tuple[int, ...]) -> Measured:
        """What an open pmatrix file holds at some layers."""
        about = file.about
        return cls(file, about.model_id, about.n_layers, layers, about.sizes, file.experts_of)

    @property
    def depths(self) -> Array:
        """Where `layers` lie between the model's first layer (0) and its last (1)."""
        return np.array(self.layers) / max(self.n_layers - 1, 1)

    @property
    def member(self) -> Member | None:
        """Its family and sizes, as `member_of` knows them."""
        return member_of(self.matrices.model, self.model_id, self.sizes)


def scaling_rows(
    models: Sequence[Measured], resampling: Resampling | None = None
) -> list[dict[str, Any]]:
    """A flat record for each pair of models that are compared, the smaller or dense one first.

    `compared` says by what: `BY_SIZE` of two sizes in a family, both dense or both mixtures; of a
    dense model and a mixture of experts, what they have as many of (`ONE_SIZE`).

    `kurtosis_smaller` and `kurtosis_larger` are means over layers; `difference`, larger less
    smaller, has a 95 % interval from the same resampled facts for both; `share_higher` is the
    share of relative depths (0 the first layer, 1 the last, kurtosis interpolated) where the
    larger model's kurtosis is higher. All of it again, as `NAME_distinct`, without pairs that
    share the last token. The interval is NaN where the facts differ; layers where kurtosis is
    undefined are left out. `mean_abs` is the mean |p| off the diagonal and `tail_0_25` the share of
    pairs of |p| > 0.25, in the same way. `no_common_expert` is the larger model's share of pairs
    that have no expert in common, whose p is 0; NaN where it is dense.
    """
    resampling = resampling or Resampling()
    sized = [_Sized(member, model) for model in models if (member := model.member)]
    found: dict[int, _Profiles] = {}

    def profiles(one: _Sized) -> _Profiles:
        if id(one) not in found:
            found[id(one)] = _profiles(one.model, resampling)
        return found[id(one)]

    rows = []
    for compared, a, b in [*_by_size(sized), *_of_one_size(sized)]:
        names = _names(compared, a, b)
        rows.append(names | _compared(profiles(a), profiles(b), names["same_facts"]))
    return rows


def _by_size(sized: Sequence[_Sized]) -> Iterator[_Pair]:
    """The pairs of two sizes of a family, of one kind."""
    families: dict[tuple[str, bool], list[_Sized]] = {}
    for one in sized:
        if one.member.family:
            families.setdefault((one.member.family, one.member.sparse), []).append(one)
    for members in families.values():
        members.sort(key=lambda one: one.member.size)
        for a, b in combinations(members, 2):
            if a.member.size < b.member.size:
                yield _Pair(BY_SIZE, a, b)


def _of_one_size(sized: Sequence[_Sized]) -> Iterator[_Pair]:
    """The pairs of a dense model and a mixture of experts of one size."""
    for compared, alike in ONE_SIZE.items():
        for b in sized:
            yield from (_Pair(compared, a, b) for a in sized if alike(a.member, b.member))


class _Sized(NamedTuple):
    member: Member
    model: Measured


class _Pair(NamedTuple):
    compared: str
    smaller: _Sized
    larger: _Sized


def _names(compared: str, smaller: _Sized, larger: _Sized) -> dict[str, Any]:
    facts = [one.model.matrices.facts for one in (smaller, larger)]
    families = dict.fromkeys(one.member.family for one in (smaller, larger))
    return {
        "family": ", ".join(filter(None, families)),
        "compared": compared,
        "smaller": smaller.model.matrices.model,
        "larger": larger.model.matrices.model,
        "parameters_smaller": smaller.member.size,
        "parameters_larger": larger.member.size,
        "active_smaller": smaller.member.active,
        "active_larger": larger.member.active,
        "m_smaller": len(facts[0]),
        "m_larger": len(facts[1]),
        "same_facts": facts[0] == facts[1],
    }


@dataclass(frozen=True)
class _Profile:
    """A value at each relative depth where it is defined, (n,), and its mean in every repeat."""

    depths: Array
    values: Array
    repeated: Array

    @property
    def mean(self) -> float:
        """The mean over layers."""
        return float(self.values.mean()) if self.values.size else float("nan")


@dataclass(frozen=True)
class _Profiles:
    """A model's profiles of kurtosis by the suffix of the fields, and of interference by name."""

    kurtosis: dict[str, _Profile]
    interference: dict[str, _Profile]
    no_common_expert: float


def _profiles(model: Measured, resampling: Resampling) -> _Profiles:
    """Kurtosis with all pairs, and without those that share a token; the other with all pairs."""
    m = len(model.matrices.facts)
    counts = resampling.counts(m)
    every = off_diagonal_pairs(m)
    distinct = every & different_last_token(model.matrices.token_id)
    apart = [
        share_within(every, common_experts(experts) == 0)
        for layer in model.layers
        if (experts := model.experts_of(layer)) is not None
    ]
    return _Profiles(
        {"": _profile(model, counts, every), DISTINCT: _profile(model, counts, distinct)},
        {name: _mean_profile(model, counts, of) for name, of in INTERFERENCE.items()},
        float(np.mean(apart)) if apart else float("nan"),
    )


# What interference amounts to: means over pairs of what these give for |P|.
INTERFERENCE: dict[str, Callable[[Array], Array]] = {
    "mean_abs": lambda size: size,
    "tail_0_25": lambda size: (size > TAILS["tail_0_25"]).astype(np.float64),
}


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


def _mean_profile(model: Measured, counts: Counts, of: Callable[[Array], Array]) -> _Profile:
    """As `_profile`, of a mean over all pairs."""
    sample = PairSample(counts)
    matrices = [of(np.abs(model.matrices.matrix("P", layer))) for layer in model.layers]
    means = np.array([A[sample.pairs].mean() if sample.pairs.any() else np.nan for A in matrices])
    repeated = np.mean([sample.mean(A) for A in matrices], axis=0)
    return _Profile(model.depths, means, np.asarray(repeated))


def _compared(smaller: _Profiles, larger: _Profiles, paired: bool) -> dict[str, float]:
    fields: dict[str, float] = {}
    for suffix in smaller.kurtosis:
        low, high = smaller.kurtosis[suffix], larger.kurtosis[suffix]
        fields |= {
            f"kurtosis_smaller{suffix}": low.mean,
            f"kurtosis_larger{suffix}": high.mean,
            **_difference(low, high, paired, f"difference{suffix}"),
            f"share_higher{suffix}": _share_higher(low, high),
        }
    for name in INTERFERENCE:
        low, high = smaller.interference[name], larger.interference[name]
        fields |= {
            f"{name}_smaller": low.mean,
            f"{name}_larger": high.mean,
            **_difference(low, high, paired, f"{name}_difference"),
        }
    return fields | {"no_common_expert": larger.no_common_expert}


def _difference(low: _Profile, high: _Profile, paired: bool, name: str) -> dict[str, float]:
    apart = high.repeated - low.repeated if paired else np.array([np.nan])
    bounds = interval(apart)
    return {name: high.mean - low.mean, f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def _share_higher(smaller: _Profile, larger: _Profile) -> float:
    """The share of the depths that both have where the larger model's kurtosis is higher."""
    if not (smaller.depths.size and larger.depths.size):
        return float("nan")
    first = max(smaller.depths[0], larger.depths[0])
    last = min(smaller.depths[-1], larger.depths[-1])
    if first > last:
        return float("nan")
    depths = first + (last - first) * DEPTHS
    low, high = (np.interp(depths, side.depths, side.values) for side in (smaller, larger))
    return float(np.mean(high > low))
