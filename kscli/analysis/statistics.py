"""Statistics of P: what the distribution of its off-diagonal entries looks like, layer by layer.

A new statistic is one function under `@statistic(name)`; the stats file and the printed
fields follow from the registry. Each is given for all pairs and, as `NAME_distinct`, without the
pairs whose facts share the last token: these are bound by that token before they are by what
they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.few_facts import FEWEST_FACTS
from kscli.analysis.matrices import TokenMatrices, common_experts, different_last_token
from kscli.analysis.resampling import (
    ROUNDING,
    Counts,
    PairMask,
    PairSample,
    Resampling,
    interval,
    off_diagonal_pairs,
    resample_counts,
)
from kscli.analysis.tails import FEW_PAIRS, carriers, hill, share_within
from kscli.facts import DEFAULT_COUNT
from kscli.layers import format_layers
from kscli.models.aliases import classify
from kscli.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from kscli.facts import Fact

Entries = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """The off-diagonal entries of P, 1-D float64, and what several statistics make of them."""

    entries: Entries

    @cached_property
    def quantiles(self) -> dict[float, float]:
        """The entries' quantiles at every one of `LEVELS`."""
        found = np.quantile(self.entries, LEVELS)
        return dict(zip(LEVELS, found.tolist(), strict=True))

    @cached_property
    def standardised(self) -> Entries:
        """The entries less their mean, over their standard deviation; NaN where none varies."""
        deviations: Entries = self.entries - self.entries.mean()
        # Once more, for the rounding of the first mean: the corrected two-pass algorithm.
        deviations -= deviations.mean()
        scale = np.abs(deviations).max()
        if not scale > ROUNDING * np.abs(self.entries).max():
            return np.full_like(self.entries, np.nan)
        deviations /= scale
        deviations /= deviations.std()
        return deviations


DISTINCT, COMMON = "_distinct", "_common"
LAYERS_AT_ONCE = 2  # NumPy's work on one leaves the interpreter to another
LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
TAILS = {"tail_0_10": 0.1, "tail_0_25": 0.25, "tail_0_50": 0.5}
WHOLE_NUMBERS = ("top_pair_i", "top_pair_j", "top_fact", "fourth_moment_pairs")


@dataclass(frozen=True)
class StatisticKind:
    """A named statistic; `compute` takes a `Sample` of P.

    `compute` is never called without entries: every statistic of m < 2 facts is NaN.
    """

    name: str
    compute: Callable[[Sample], float]

    def __call__(self, of: Entries | Sample) -> float:
        """The statistic of entries; NaN where it is not defined."""
        sample = of if isinstance(of, Sample) else Sample(of)
        return float(self.compute(sample)) if sample.entries.size else float("nan")


STATISTICS: dict[str, StatisticKind] = {}


def statistic(
    name: str,
) -> Callable[[Callable[[Sample], float]], Callable[[Sample], float]]:
    """Register a function of the off-diagonal entries under `name`, the field that is printed."""

    def register(compute: Callable[[Sample], float]) -> Callable[[Sample], float]:
        STATISTICS[name] = StatisticKind(name, compute)
        return compute

    return register


def off_diagonal(P: NDArray[np.float64]) -> Entries:
    """The m(m-1) entries of P (m, m) off its diagonal, row by row, as a new 1-D float64 array."""
    return np.asarray(P, dtype=np.float64)[off_diagonal_pairs(P.shape[0])]


def layer_statistics(P: NDArray[np.float64]) -> dict[str, float]:
    """Every registered statistic of one layer's P (m, m), by name; NaN where undefined."""
    sample = Sample(off_diagonal(P))
    return {name: kind(sample) for name, kind in STATISTICS.items()}


def describe(
    P: NDArray[np.float64],
    token_id: NDArray[np.int64],
    counts: Counts,
    experts: NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """All that is said of one layer's P (m, m), by field; NaN where undefined.

    Every registered statistic, the ends of 95 % intervals for mean, kurtosis and tails, the Hill
    index with its error, and who carries the variance; all of it again without the pairs that
    share a token of `token_id` (m,); and what share of all pairs and of the tails those are.
    `counts` (repeats, m) are the facts' multiplicities for the intervals. Where facts are routed to
    `experts` (m, slot), all is said of the pairs that have one in common (`_COMMON`), too.
    """
    every = off_diagonal_pairs(len(P))
    distinct = every & different_last_token(token_id)
    same = {
        f"same_token_{name}": share_within(every & (np.abs(P) > at), ~distinct)
        for name, at in TAILS.items()
    }
    return {
        **_described(P, every, counts, ""),
        **_described(P, distinct, counts, DISTINCT),
        "same_token": share_within(every, ~distinct),
        **same,
        **({} if experts is None else _of_routing(P, every, counts, experts)),
    }


def _of_routing(
    P: NDArray[np.float64], every: PairMask, counts: Counts, experts: NDArray[np.int64]
) -> dict[str, float]:
    """What share of pairs have no expert in common, how many a pair has, and p of the others."""
    common = common_experts(experts)
    return {
        "no_common_expert": share_within(every, common == 0),
        "common_experts": float(common[every].mean()) if every.any() else float("nan"),
        **_described(P, every & (common > 0), counts, COMMON),
    }


def field_names(*, routed: bool = False) -> list[str]:
    """The fields of `describe`, in its order; `routed`: of a mixture of experts."""
    experts = np.zeros((1, 1), np.int64) if routed else None
    return list(describe(np.ones((1, 1)), np.zeros(1, np.int64), resample_counts(1, 1), experts))


def _described(
    P: NDArray[np.float64], pairs: PairMask, counts: Counts, suffix: str
) -> dict[str, float]:
    intervals = _intervals(P, PairSample(counts, pairs))
    sample = Sample(P[pairs])
    described: dict[str, float] = {}
    for name, kind in STATISTICS.items():
        described[name + suffix] = kind(sample)
        if name in intervals:
            bounds = interval(intervals[name])
            described[f"{name}{suffix}_low"] = bounds.low
            described[f"{name}{suffix}_high"] = bounds.high
    tail = hill(P, pairs)
    described[f"hill{suffix}"], described[f"hill{suffix}_error"] = tail.index, tail.error
    return described | {name + suffix: value for name, value in asdict(carriers(P, pairs)).items()}


def _intervals(P: NDArray[np.float64], sample: PairSample) -> dict[str, NDArray[np.float64]]:
    """The values over the repeats, (repeats,), of the statistics that have an interval."""
    moments = sample.moments(P)
    size = np.abs(P)
    return {
        "mean": moments.mean,
        "kurtosis": moments.kurtosis,
        **{name: sample.share(size > at) for name, at in TAILS.items()},
    }


@dataclass(frozen=True)
class Statistics:
    """The statistics of one model: `values[name]` is 1-D float64 over `layers`."""

    model: str
    layers: tuple[int, ...]
    m: int
    values: dict[str, NDArray[np.float64]]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a layer: model, layer, m and every field; undefined is NaN."""
        return [
            {
                "model": self.model,
                "layer": layer,
                "m": self.m,
                **{name: _plain(name, float(value[at])) for name, value in self.values.items()},
            }
            for at, layer in enumerate(self.layers)
        ]


def _plain(name: str, value: float) -> float | int:
    whole = name.removesuffix(DISTINCT).removesuffix(COMMON) in WHOLE_NUMBERS and not math.isnan(
        value
    )
    return int(value) if whole else value


def compute_statistics(
    pm: TokenMatrices,
    layers: Sequence[int] | None = None,
    resampling: Resampling | None = None,
    reporter: Reporter = SILENT,
    experts_of: Callable[[int], NDArray[np.int64] | None] = lambda layer: None,
) -> Statistics:
    """`describe` P at `layers` (default: all there are), two layers in memory at a time.

    `experts_of` gives the experts that each fact is routed to at a layer, (m, slot), of a mixture.
    """
    chosen = tuple(pm.layers if layers is None else layers)
    m = len(pm.token_id)
    counts = (resampling or Resampling()).counts(m)
    token_id = pm.token_id
    per_layer: list[dict[str, float]] = []
    with (
        reporter.task("statistics", len(chosen), unit="layers") as task,
        ThreadPoolExecutor(LAYERS_AT_ONCE) as threads,
    ):
        for found in threads.map(
            lambda layer: describe(pm.matrix("P", layer), token_id, counts, experts_of(layer)),
            chosen,
        ):
            per_layer.append(found)
            task.advance()
    names = per_layer[0] if per_layer else field_names()
    return Statistics(
        pm.model, chosen, m, {name: np.array([row[name] for row in per_layer]) for name in names}
    )


def caution(statistics: Statistics, facts: Sequence[Fact]) -> str | None:
    """A sentence where a few pairs carry the fourth moment of a heavy-tailed layer, else None."""
    if statistics.m < FEWEST_FACTS:
        return None
    half = statistics.values["fourth_moment_pairs"]
    heavy = statistics.values["kurtosis"] > 0
    pairs = np.array([statistics.values[name] for name in ("top_pair_i", "top_pair_j")])
    told = ~np.isnan(pairs).any(axis=0)
    few = [int(at) for at in np.flatnonzero(heavy & (half <= FEW_PAIRS) & told)]
    if not few:
        return None
    worst = min(few, key=lambda at: half[at])
    strongest = _told_apart(*(facts[int(fact)] for fact in pairs[:, worst]))
    layers = [statistics.layers[at] for at in few]
    carried = int(half[worst])
    if len(few) == 1:
        half_of = f"{carried} pair{'' if carried == 1 else 's'} of facts"
        verb, which = "carries" if carried == 1 else "carry", f"the strongest {strongest}"
    else:
        half_of, verb = "few pairs of facts", "carry"
        which = f"{carried} at layer {statistics.layers[worst]}, the strongest {strongest}"
    remedy = "" if _has_no_more(statistics, facts) else "take more facts (--count), or "
    return (
        f"{statistics.model}: at layer{'s' if len(layers) > 1 else ''} {format_layers(layers)}, "
        f"{half_of} {verb} half of the fourth moment ({which}). The kurtosis there comes from "
        f"these pairs, so that other facts may give another one: {remedy}read the "
        "kurtosis of the pairs of a different last token."
    )


def say_caution(statistics: Statistics, facts: Sequence[Fact], reporter: Reporter) -> None:
    """Say what `caution` does: a warning where there are more facts to take, else a note."""
    if said := caution(statistics, facts):
        (reporter.note if _has_no_more(statistics, facts) else reporter.warn)(said)


def _has_no_more(statistics: Statistics, facts: Sequence[Fact]) -> bool:
    """Whether these are the embedded model's own facts, of which there are few more to take."""
    return classify(statistics.model) == "embedded" and len(facts) >= DEFAULT_COUNT


def _told_apart(first: Fact, second: Fact) -> str:
    """Two facts by their subjects, or by what they say where these are equal."""
    if first.subject != second.subject:
        return f"{first.subject!r} with {second.subject!r}"
    if first.text != second.text:
        return f"{first.text!r} with {second.text!r}"
    return f"{first.text!r}, which is there twice"


@statistic("mean")
def _mean(sample: Sample) -> float:
    """Mean."""
    return float(sample.entries.mean())


@statistic("std")
def _std(sample: Sample) -> float:
    """Standard deviation (biased)."""
    return float(sample.entries.std())


@statistic("skewness")
def _skewness(sample: Sample) -> float:
    """Skewness (biased)."""
    return float(np.mean(np.square(sample.standardised) * sample.standardised))


@statistic("kurtosis")
def _kurtosis(sample: Sample) -> float:
    """Excess kurtosis (Fisher, biased): 0 for a Gaussian."""
    return float(np.mean(np.square(np.square(sample.standardised))) - 3.0)


@statistic("min")
def _min(sample: Sample) -> float:
    """Smallest entry."""
    return float(sample.entries.min())


@statistic("max")
def _max(sample: Sample) -> float:
    """Largest entry."""
    return float(sample.entries.max())


@statistic("largest")
def _largest(sample: Sample) -> float:
    """Largest |p|."""
    return max(float(sample.entries.max()), -float(sample.entries.min()))


def _register_tail(name: str, threshold: float) -> None:
    @statistic(name)
    def _(sample: Sample) -> float:
        return float(np.mean(np.abs(sample.entries) > threshold))


def _register_quantile(level: float) -> None:
    name = f"quantile_{f'{level:.2f}'.replace('.', '_')}"

    @statistic(name)
    def _(sample: Sample) -> float:
        return sample.quantiles[level]


for _name, _threshold in TAILS.items():
    _register_tail(_name, _threshold)
for _level in LEVELS:
    _register_quantile(_level)
