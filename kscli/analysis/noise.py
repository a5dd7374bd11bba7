"""The part of p that is noise of the corpus: one P against another with C of disjoint text.

The keys are the same, so P and P' differ by what their second moments differ by. Where both
corpora are of one length their errors have one size, and the error of P alone is that of the
difference over sqrt(2). What both share is not seen: the bias of a short corpus, and what sets
any text of this kind apart from all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.pairs import FactMatrices, Pair, pair_facts, top_pairs
from kscli.analysis.statistics import off_diagonal
from kscli.artifacts import PMatrixFile, require_same_identity
from kscli.corpus import same_text
from kscli.errors import ArtifactError
from kscli.second_moment.options import parse_shard

# Beyond three times the rms difference, with one sign, in both: were P Gaussian noise alone,
# one pair in 10^9 would be.
ABOVE = 3.0


@dataclass(frozen=True)
class Noise:
    """How far two P of one layer are apart, off the diagonal, in the fields that are printed.

    `rms_difference` and `worst_difference` are of P - P', the worst at (`worst_i`, `worst_j`);
    `correlation` is Pearson's of P and P'; `noise_share` is the part of P's variance that is
    noise, half of that of P - P' over the mean of both variances; `top_overlap` is the share of
    the `k` pairs of largest P that are so in P' too; `above_noise` is the share of pairs that
    `pairs_above` gives. NaN where there is no pair, or P does not vary.
    """

    rms_difference: float
    worst_difference: float
    worst_i: int | None
    worst_j: int | None
    correlation: float
    noise_share: float
    k: int
    top_overlap: float
    above_noise: float


def layer_noise(P: NDArray[np.float64], other: NDArray[np.float64], k: int) -> Noise:
    """Compare P (m, m) with `other`, its top `k` pairs with the other's."""
    a, b = off_diagonal(P), off_diagonal(other)
    if not a.size:
        nan = math.nan
        return Noise(nan, nan, None, None, nan, nan, 0, nan, nan)
    apart = np.abs(P - other)
    np.fill_diagonal(apart, -1.0)
    worst_i, worst_j = divmod(int(apart.argmax()), len(P))
    squared = float(np.mean((a - b) ** 2))
    variance = float(a.var() + b.var()) / 2
    covariance = float(np.mean((a - a.mean()) * (b - b.mean())))
    spread = float(a.std() * b.std())
    top, also = ({(pair.i, pair.j) for pair in top_pairs(M, k)} for M in (P, other))
    return Noise(
        rms_difference=math.sqrt(squared),
        worst_difference=float(apart[worst_i, worst_j]),
        worst_i=worst_i,
        worst_j=worst_j,
        correlation=covariance / spread if spread > 0 else math.nan,
        noise_share=float((a - b).var()) / 2 / variance if variance > 0 else math.nan,
        k=len(top),
        top_overlap=len(top & also) / len(top),
        above_noise=float(np.count_nonzero(_above(P, other)) / a.size),
    )


def pairs_above(P: NDArray[np.float64], other: NDArray[np.float64]) -> list[Pair]:
    """The ordered pairs that stand above the noise, by descending |P|.

    Both |P_ij| and |P'_ij| are over three times the rms difference of all pairs, with one sign.
    """
    above = _above(P, other)
    count = int(np.count_nonzero(above))
    return top_pairs(P, count, absolute=True, among=above) if count else []


def _above(P: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    threshold = ABOVE * math.sqrt(np.mean((off_diagonal(P) - off_diagonal(other)) ** 2))
    both = np.minimum(np.abs(P), np.abs(other)) > threshold
    return np.asarray(both & (np.sign(P) == np.sign(other)) & ~np.eye(len(P), dtype=bool))


def noise_rows(
    pm: FactMatrices, other: FactMatrices, layers: Sequence[int], k: int
) -> list[dict[str, Any]]:
    """`layer_noise` of each of `layers` as flat records."""
    return [
        {"model": pm.model, "layer": layer, "m": len(pm.facts)}
        | asdict(layer_noise(pm.matrix("P", layer), other.matrix("P", layer), k))
        for layer in layers
    ]


def above_rows(
    pm: FactMatrices, other: FactMatrices, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """`pairs_above` of each of `layers` as flat records, rank 1 of a layer first."""
    rows = []
    for layer in layers:
        P, P_other = pm.matrix("P", layer), other.matrix("P", layer)
        for rank, pair in enumerate(pairs_above(P, P_other), start=1):
            at = pair.i, pair.j
            rows.append(
                {"model": pm.model, "layer": layer, "rank": rank, "p": pair.p}
                | {"p_other": float(P_other[at]), "i": pair.i, "j": pair.j}
                | pair_facts(pm.facts, *at)
                | {"same_last_token": bool(pm.token_id[pair.i] == pm.token_id[pair.j])}
            )
    return rows


def require_disjoint(pm: PMatrixFile, other: PMatrixFile, layers: Sequence[int]) -> list[str]:
    """Raise ArtifactError unless both hold `layers` for the same keys, with C of disjoint text.

    Returns sentences for a warning, about what the files do not tell. Text is known to be the same
    by the corpus's identity, and to be another by the shards of `cache-cov --shard`; whether two
    corpora overlap, as two dumps of Wikipedia do, is not known from them.
    """
    warnings = require_same_identity(pm, other)
    mine, others = pm.about.inputs, other.about.inputs
    if mine.get("keys") is None or mine.get("keys") != others.get("keys"):
        raise ArtifactError(
            f"{pm.path} and {other.path} were made from different keys. Make both from one "
            "keys.h5, with `kscli pmatrix --keys KEYS --cov COV --output FILE`."
        )
    other.require_layers(layers)
    if pm.about.ridge != other.about.ridge:
        raise ArtifactError(
            f"{pm.path} and {other.path} were made with different ridges ({pm.about.ridge} and "
            f"{other.about.ridge}); their difference would not be the corpus's. Make both with one."
        )
    corpora = [file.about.corpus_identity for file in (pm, other)]
    same_corpus = None not in corpora and same_text(*map(str, corpora))
    if mine.get("cov") == others.get("cov") or (same_corpus and not _different_shards(pm, other)):
        raise ArtifactError(
            f"{pm.path} and {other.path} have C of the same corpus ({pm.about.corpus}), so "
            "their text overlaps. Measure C on other text, or on `cache-cov --shard 0/2` and 1/2."
        )
    if all(np.array_equal(pm.leverage(layer), other.leverage(layer)) for layer in layers):
        raise ArtifactError(
            f"{pm.path} and {other.path} were made with one and the same C, so their text is the "
            "same under two names. Measure C on other text."
        )
    if None in corpora:
        warnings.append(
            f"that {pm.path} and {other.path} are about disjoint text could not be checked: an "
            "imported file does not say."
        )
    elif not same_corpus:
        named = " and ".join(str(file.about.corpus) for file in (pm, other))
        warnings.append(
            f"{pm.path} and {other.path} are of two corpora ({named}); that these have no document "
            "in common was not checked."
        )
    return warnings


def _different_shards(pm: PMatrixFile, other: PMatrixFile) -> bool:
    """Whether both are of one partition of a corpus, and of different parts of it."""
    named = [file.about.shard for file in (pm, other)]
    if not all(named):
        return False
    a, b = (parse_shard(name) for name in named)
    return a.count == b.count and a.index != b.index
