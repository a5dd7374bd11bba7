"""What was found, in sentences that follow from the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.pairs import strongest_rows
from kscli.analysis.relations import RelationStatistics
from kscli.analysis.resampling import ROUNDING
from kscli.analysis.statistics import COMMON, DISTINCT, TAILS, caution
from kscli.report.edit_findings import edits, risk
from kscli.report.examined import Examined
from kscli.report.words import (
    at_layers,
    counted,
    layers_text,
    listed,
    number,
    quoted,
    share,
    with_interval,
)
from kscli.tables import Row, sentence
from kscli.whitening import FEWEST_TOKENS_PER_DIMENSION

# A correlation of layer and kurtosis is called a trend where it is of at least this size and
# layers in random order would have as large a one less often than this. Of four layers, one
# order in twelve has a correlation of 1 or -1.
TREND = 0.5
CHANCE = 0.05
FEWEST_LAYERS = 5
_ONE_DIRECTION = 2.0  # a participation ratio: one direction has over 70 % of it
RIGHT_ANGLE = 5.0  # degrees from 90 that count as a right angle, as the paper's claim is read


@dataclass(frozen=True)
class Finding:
    """What the data say on one topic."""

    topic: str
    sentences: tuple[str, ...]


def findings(examined: Examined) -> list[Finding]:
    """All findings on one model, those that do not apply left out."""
    if examined.m < 2:
        return [Finding("Pairs", ("One fact makes no pair, so there is nothing to say of p.",))]
    found = [
        Finding(topic, tuple(sentence for sentence in say(examined) if sentence))
        for topic, say in _TOPICS
    ]
    return [finding for finding in found if finding.sentences]


def mean(examined: Examined) -> list[str]:
    """How far the mean is from 0, and where its interval contains 0."""
    low, high = examined.values("mean_low"), examined.values("mean_high")
    sentences = [f"The mean of p is {_at_ends(examined, 'mean', 3)}."]
    if np.isnan(low).all():
        return [*sentences, "So few facts give it no interval."]
    holds = examined.where((low <= 0) & (high >= 0))
    sentences.append(f"Its 95 % interval contains 0 {at_layers(holds, examined.layers)}.")
    for where, word in ((low > 0, "above"), (high < 0, "below")):
        if where.any():
            there = at_layers(examined.where(where), examined.layers)
            sentences.append(f"The interval lies {word} 0 {there}.")
    return sentences


def kurtosis(examined: Examined) -> list[str]:
    """Its size, where it is above 0, and where it is undefined."""
    values = examined.values("kurtosis")
    undefined = examined.where(np.isnan(values))
    if len(undefined) == len(examined.layers):
        return ["The excess kurtosis is undefined at every layer: the entries of P do not vary."]
    sentences = [
        f"The excess kurtosis, which is 0 for a Gaussian, is {_at_ends(examined, 'kurtosis', 1)}."
    ]
    if len(examined.layers) > 2:
        top = examined.layers[int(np.nanargmax(values))]
        sentences.append(
            f"It is largest at layer {top}, {number(examined.at('kurtosis', top), 1)}."
        )
    if undefined:
        sentences.append(
            f"It is undefined at {layers_text(undefined)}, where the entries of P do not vary."
        )
    low = examined.values("kurtosis_low")
    if not np.isnan(low).all():
        above = examined.where(low > 0)
        sentences.append(f"Its 95 % interval lies above 0 {at_layers(above, examined.layers)}.")
    return sentences


def depth(examined: Examined) -> list[str]:
    """Whether kurtosis falls or rises with depth, with all pairs and without those of one token."""
    sentences = [_trend(examined.layers, examined.values("kurtosis"), "The excess kurtosis")]
    if 0 < examined.at("same_token", examined.layers[0]) < 1:
        sentences.append(
            _trend(
                examined.layers,
                examined.values(f"kurtosis{DISTINCT}"),
                f"Without the pairs that share {examined.token} it",
            )
        )
    return sentences


def experts(examined: Examined) -> list[str]:
    """How many pairs have no expert in common, and p of those that have one."""
    if not _of_experts(examined):
        return []
    sentences = []
    for layer in examined.ends:
        alone = share(examined.at("no_common_expert", layer))
        std, kurt = (
            [number(examined.at(f"{name}{of}", layer), digits) for of in ("", COMMON)]
            for name, digits in (("std", 3), ("kurtosis", 1))
        )
        sentences.append(
            f"At layer {layer} {alone} of the pairs of facts have no expert in common, so that p "
            "between them is 0, or what shared experts make it. Between the others the standard "
            f"deviation of p is {std[1]} (of all pairs {std[0]}), and its kurtosis {kurt[1]} (of "
            f"all pairs {kurt[0]})."
        )
    return sentences


def _of_experts(examined: Examined) -> bool:
    return "no_common_expert" in examined.statistics.values


def _trend(layers: Sequence[int], values: NDArray[np.float64], what: str) -> str:
    from scipy.stats import spearmanr

    there = ~np.isnan(values)
    if np.count_nonzero(there) < FEWEST_LAYERS:
        return (
            f"{what} is defined at {counted(int(np.count_nonzero(there)), 'layer')}, too few "
            "for a trend."
        )
    if np.ptp(values[there]) == 0:
        return f"{what} is the same at all layers."
    found = spearmanr(np.array(layers)[there], values[there])
    correlation = float(found.statistic)
    if abs(correlation) < TREND or found.pvalue > CHANCE:
        verdict = "neither falls nor rises steadily with depth"
    else:
        verdict = f"{'falls' if correlation < 0 else 'rises'} with depth"
    return (
        f"{what} {verdict}: Spearman's correlation of layer and kurtosis is "
        f"{number(correlation, 2)} over {np.count_nonzero(there)} layers."
    )


def carriers(examined: Examined) -> list[str]:
    """How few pairs hold half of the fourth moment."""
    said = caution(examined.statistics, examined.file.facts)
    if said:
        sentence = said.removeprefix(f"{examined.model}: ")
        return [sentence[:1].upper() + sentence[1:]]
    pairs = examined.values("fourth_moment_pairs")
    if np.isnan(pairs).all():
        return []
    at = int(np.nanargmin(pairs))
    total = examined.m * (examined.m - 1) // 2
    fewer = "; at no layer is it in fewer" if len(examined.layers) > 1 else ""
    return [
        f"At layer {examined.layers[at]} half of the fourth moment of P is in {int(pairs[at]):,} "
        f"of {counted(total, 'pair')} of facts{fewer}."
    ]


def same_token(examined: Examined) -> list[str]:
    """What share of all pairs and of the tails have their keys at one token."""
    first = examined.layers[0]
    of_all = examined.at("same_token", first)
    if of_all == 0:
        return [f"No two facts share {examined.token}, so no p here is that token's doing."]
    if of_all == 1:
        return [
            f"All facts share {examined.token}: two such keys are alike whatever the facts say, "
            "and nothing here can be told apart from that."
        ]
    sentences = [f"Pairs of facts that share {examined.token} are {share(of_all)} of all pairs."]
    for layer in examined.ends:
        parts = [
            _of_tail(examined.at(f"same_token_{name}", layer), threshold)
            for name, threshold in TAILS.items()
        ]
        sentences.append(f"At layer {layer} they are {listed(parts)}.")
    for layer in examined.ends:
        with_, without = (examined.at(f"kurtosis{end}", layer) for end in ("", DISTINCT))
        sentences.append(
            f"At layer {layer} the excess kurtosis is {number(with_, 1)} with them and "
            f"{number(without, 1)} without."
        )
    return sentences


def _of_tail(part: float, threshold: float) -> str:
    if math.isnan(part):
        return f"undefined for |p| > {threshold}, which no entry has"
    return f"{share(part)} of the entries with |p| > {threshold}"


def strongest(examined: Examined) -> list[str]:
    """The pair of largest p, and that of facts which do not share a token."""
    (row,) = strongest_rows(examined.file, examined.layers, 1)
    bond = f"The largest p is {_bond(examined, row)}"
    if not row["same_last_token"]:
        return [f"{bond}; the two do not share {examined.token}."]
    others = strongest_rows(examined.file, examined.layers, 1, distinct_token=True)
    return [
        f"{bond}; both share {examined.token}.",
        *(f"Among other pairs it is {_bond(examined, other)}." for other in others),
    ]


def _bond(examined: Examined, row: Mapping[str, Any]) -> str:
    i, j = (quoted(sentence(row, end)) for end in ("i", "j"))
    return f"{number(row['p'], 2)} at layer {row['layer']}, from {i} to {j}"


def beyond(examined: Examined) -> list[str]:
    """Where p off the diagonal is larger than on it."""
    largest = examined.values("max")
    where = examined.where(largest > 1 + ROUNDING)
    if not where:
        return [
            f"No edit moves another fact further than its own: off the diagonal p is "
            f"{number(float(np.nanmax(largest)), 2)} at most."
        ]
    return [
        f"Off the diagonal p is above 1 {at_layers(where, examined.layers)}, up to "
        f"{number(float(np.nanmax(largest)), 2)}. An edit there moves some other fact further than "
        "its own."
    ]


def right_angles(examined: Examined) -> list[str]:
    """The most frequent angle in both spaces, and how far it is from a right angle."""
    modes = dict(zip(examined.layers, examined.modes, strict=True))
    sentences = []
    for layer in examined.ends:
        white, raw = (_angle(value) for value in modes[layer])
        sentences.append(
            f"At layer {layer} the most frequent angle between two keys is {white} in the "
            f"whitening space and {raw} in the activation space."
        )
    near = [layer for layer, (white, _) in modes.items() if abs(white - 90) <= RIGHT_ANGLE]
    raw_near = [layer for layer, (_, raw) in modes.items() if abs(raw - 90) <= RIGHT_ANGLE]
    if len(modes) > 1:
        sentences.append(
            f"It lies within {RIGHT_ANGLE:.0f}\N{DEGREE SIGN} of a right angle "
            f"{at_layers(near, examined.layers)} in the whitening space, "
            f"{at_layers(raw_near, examined.layers)} in the activation space."
        )
    if _of_experts(examined):
        sentences.append(
            "Keys that have no expert in common, shared ones included, are at a right angle in "
            "both spaces."
        )
    of_ends = [row for row in examined.overlaps if row["layer"] in examined.ends]
    return [*sentences, *map(_overlap, of_ends)]


def _overlap(row: Row) -> str:
    """The overlap at one layer, against that of random directions."""
    white, raw, of_random = row["overlap_whitened"], row["overlap"], row["one_over_d_m"]
    found = (
        f"The mean squared overlap of two keys at layer {row['layer']} is {number(white, 4)} in "
        f"the whitening space and {number(raw, 4)} in the activation space"
    )
    if math.isnan(of_random):
        return f"{found}."
    return f"{found}; random directions have {number(of_random, 4)}."


def _angle(mode: float) -> str:
    if math.isnan(mode):
        return "undefined"
    degree = "\N{DEGREE SIGN}"
    return f"{number(mode, 1)}{degree} ({number(abs(mode - 90), 1)}{degree} from a right angle)"


def dimensions(examined: Examined) -> list[str]:
    """How many dimensions C has, by both measures, and what AlphaEdit's cut leaves."""
    rows = [row for row in examined.spectra if row["layer"] in examined.ends]
    if not rows:
        return []
    whose = "C of an expert, in the median," if _of_experts(examined) else "C,"
    sentences = [
        f"At layer {row['layer']} {whose} of {row['d_m']:,} dimensions, has a participation ratio "
        f"of {number(row['participation_ratio'], 1)} and an effective rank of "
        f"{number(row['effective_rank'], 1)}."
        for row in rows
    ]
    least = min(examined.spectra, key=lambda row: row["participation_ratio"])
    ratio = least["participation_ratio"]
    if len(examined.spectra) > 2:
        sentences.append(
            f"The participation ratio is least at layer {least['layer']}, {number(ratio, 1)}"
            + (", where one direction has most of C." if ratio < _ONE_DIRECTION else ".")
        )
    null = [f"{share(row['null_share'])} at layer {row['layer']}" for row in rows]
    keys = [share(row["keys_in_null"]) for row in rows]
    sentences.append(
        f"AlphaEdit's cut as published calls {listed(null)} of the directions null; "
        f"{listed(keys)} of the energy of the facts' keys {'is' if len(keys) == 1 else 'are'} "
        "in them."
    )
    return sentences


def convergence(examined: Examined) -> list[str]:
    """Whether kurtosis has converged in the number of facts."""
    return [
        f"Layer {layer}: {settling.sentence}"
        for layer, settling in zip(examined.ends, examined.convergences, strict=True)
    ]


def relations(examined: Examined) -> list[str]:
    """p within relations, beside p across them and beside permuted relations."""
    found = examined.relations
    if found is None:
        reason = examined.no_relations
        return [f"p within relations and across them is undefined: {reason}"]
    within, null = found.means["within_other_text"][:, -1], found.null_95["within_other_text"]
    sentences = [_within(found, layer) for layer in examined.ends]
    if np.isnan(within).all():
        return sentences
    above = examined.where(within > null[:, -1])
    sentences.append(
        "Within relations, where the text before the subject differs, mean |p| is larger than in "
        f"95 % of random relations {at_layers(above, examined.layers)}."
    )
    each = np.where(
        found.means["within_other_text"][:, :-1] > null[:, :-1],
        found.means["within_other_text"][:, :-1],
        -np.inf,
    )
    if np.isfinite(each).any():
        row, column = np.unravel_index(int(each.argmax()), each.shape)
        relation = found.relations[int(column)]
        sentences.append(
            f"Mean |p| is largest within {relation.title}, {quoted(relation.example)}, at layer "
            f"{examined.layers[int(row)]}: {number(float(each[row, column]), 2)}."
        )
    return sentences


def _within(found: RelationStatistics, layer: int) -> str:
    at = found.layers.index(layer)
    parts = [
        f"{number(float(found.means[kind][at, -1]), 2)} {where}"
        for kind, where in (
            ("within_same_text", "within a relation where the text before the subject is the same"),
            ("within_other_text", "within one where it is not"),
            ("across", "across relations"),
        )
    ]
    return f"At layer {layer} mean |p| is {listed(parts)}."


def corpus(examined: Examined) -> list[str]:
    """Whether C saw enough tokens."""
    if examined.corpus is None:
        return []
    d_m = examined.file.about.d_m
    tokens, least = examined.corpus.tokens, examined.corpus.least_routed
    a_dimension = (tokens if least is None else least) / d_m
    few = a_dimension < FEWEST_TOKENS_PER_DIMENSION
    seen = f"C is a mean over {counted(tokens, 'token')}, "
    if least is not None:
        seen += f"of which the least-used expert saw {least:,}, "
    return [
        f"{seen}{number(a_dimension, 1)} for each of {d_m:,} dimensions"
        + (
            f"; under {FEWEST_TOKENS_PER_DIMENSION} a dimension p is noisy, and more text "
            "settles it."
            if few
            else "."
        )
    ]


def _at_ends(examined: Examined, name: str, digits: int) -> str:
    """A statistic with its interval at the first and at the last layer."""
    parts = []
    for layer in examined.ends:
        value, low, high = (examined.at(name + end, layer) for end in ("", "_low", "_high"))
        parts.append(f"{with_interval(value, low, high, digits)} at layer {layer}")
    return listed(parts)


_TOPICS: tuple[tuple[str, Callable[[Examined], list[str]]], ...] = (
    ("Mean", mean),
    ("Kurtosis", kurtosis),
    ("Depth", depth),
    ("Experts", experts),
    ("Few pairs", carriers),
    ("Same token", same_token),
    ("Largest p", strongest),
    ("Beyond 1", beyond),
    ("Angles", right_angles),
    ("Dimensions of C", dimensions),
    ("Number of facts", convergence),
    ("Relations", relations),
    ("Corpus", corpus),
    ("Risk", risk),
    ("Edits", edits),
)
