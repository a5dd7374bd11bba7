"""The paper's fixed interference points: pairs that are bound most tightly in every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import different_last_token
from kscli.analysis.pairs import FactMatrices, pair_facts, top_pairs
from kscli.errors import UsageError

if TYPE_CHECKING:
    from kscli.facts import Fact


@dataclass(frozen=True)
class FixedPoints:
    """The ordered pairs that are in every model's top `k` at one layer.

    `pairs` (n, 2) in the order of their least p over the models, `p` (n, models), and
    `same_last_token` (n,): whether both facts end in one token in every model. `expected` is how
    many there would be if every model's top `k` were drawn at random among all m(m-1) pairs.
    """

    models: tuple[str, ...]
    layer: int
    k: int
    expected: float
    pairs: NDArray[np.int64]
    p: NDArray[np.float64]
    same_last_token: NDArray[np.bool_]

    def rows(self, facts: Sequence[Fact]) -> list[dict[str, Any]]:
        """Flat records, the pair that is bound most tightly in all models first."""
        return [
            {
                "layer": self.layer,
                "rank": rank,
                "models": len(self.models),
                "k": self.k,
                "expected": self.expected,
                "p_least": float(p.min()),
                "p_mean": float(p.mean()),
                "i": int(i),
                "j": int(j),
                **pair_facts(facts, i, j),
                "same_last_token": bool(same),
            }
            for rank, ((i, j), p, same) in enumerate(
                zip(self.pairs, self.p, self.same_last_token, strict=True), start=1
            )
        ]

    def sentence(self) -> str:
        """How many there are, beside chance, and how many share a last token."""
        found, shared = len(self.pairs), int(self.same_last_token.sum())
        chance = format(self.expected, ".2g" if self.expected < 99.5 else ",.0f")
        return (
            f"{found} pair{'s are' if found != 1 else ' is'} in the top {self.k} of all "
            f"{len(self.models)} models at layer {self.layer}, where chance gives "
            f"{chance}; {shared} of {found} share the last token in every model."
        )


def comparable(models: Sequence[FactMatrices]) -> bool:
    """Whether the models share what fixed points are made of: the facts, and layer 0."""
    return all(model.facts == models[0].facts and 0 in model.layers for model in models)


def fixed_points(models: Sequence[FactMatrices], k: int, layer: int = 0) -> FixedPoints:
    """The pairs in every model's top `k`, by signed P, at `layer`: 'fixed interference points'.

    Raises UsageError for fewer than two models or different facts.
    """
    if len(models) < 2:
        raise UsageError("fixed interference points are of several models; name two or more.")
    first, *others = models
    if any(other.facts != first.facts for other in others):
        raise UsageError(
            "the models were not measured on the same facts, so they have no pairs in common; "
            "extract the keys of one facts file from all."
        )
    of_model = []
    for model in models:
        P = model.matrix("P", layer)
        of_model.append({(pair.i, pair.j): pair.p for pair in top_pairs(P, k)})
    common = set.intersection(*map(set, of_model))
    ordered = sorted(common, key=lambda pair: (-min(top[pair] for top in of_model), pair))
    m = len(first.facts)
    size, top = m * (m - 1), min(k, m * (m - 1))
    distinct = np.any([different_last_token(model.token_id) for model in models], axis=0)
    return FixedPoints(
        models=tuple(model.model for model in models),
        layer=layer,
        k=k,
        expected=size * (top / size) ** len(models) if size else 0.0,
        pairs=np.array(ordered, dtype=np.int64).reshape(-1, 2),
        p=np.array([[top[pair] for top in of_model] for pair in ordered]).reshape(-1, len(models)),
        same_last_token=np.array([not distinct[pair] for pair in ordered], dtype=bool),
    )
