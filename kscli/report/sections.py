"""The sections on one model: figures, tables and where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kscli.analysis.pairs import strongest_rows
from kscli.analysis.relations import RelationStatistics
from kscli.analysis.statistics import DISTINCT
from kscli.figures import FigureOptions
from kscli.layers import format_layers
from kscli.report.examined import Examined
from kscli.report.findings import Finding, findings
from kscli.report.html import Html, join, tag
from kscli.report.pictures import Drawing, picture
from kscli.report.tables import (
    Row,
    intervals,
    numbers,
    plain_table,
    shares,
    table,
    words,
)
from kscli.report.words import fact_sentence, layers_text

PAIRS = 20
_MARKED = FigureOptions(mark_same_token=True)
_GRID = FigureOptions(grid=True)
# What the images of one figure may take; those of all layers are the page's largest part.
_IMAGE, _GRID_IMAGES = 400_000, 1_800_000


@dataclass(frozen=True)
class Section:
    """A section of a part of the page; `name` is its own among the part's."""

    name: str
    title: str
    body: Html


def summary(examined: Examined) -> Section:
    """The findings in sentences."""
    return Section("findings", "Findings", finding_list(findings(examined)))


def finding_list(found: Sequence[Finding]) -> Html:
    """Findings, each under its topic."""
    parts = []
    for finding in found:
        said = [tag("p", sentence) for sentence in finding.sentences]
        parts += [tag("dt", finding.topic), tag("dd", *said)]
    return tag("dl", *parts, class_="findings")


def depth(examined: Examined) -> Section:
    """Kurtosis over the layers, and every layer's statistics."""
    figure = _picture(
        examined,
        Drawing(
            "kurtosis",
            "kurtosis",
            "Excess kurtosis of P off the diagonal at every layer, with the 95 % interval of "
            "resampled facts.",
            FigureOptions(seed=examined.seed),
        ),
        examined.layers,
    )
    columns = [
        numbers("layer", digits=0),
        intervals("mean", digits=3),
        numbers("std", digits=3),
        numbers("skewness", digits=1),
        intervals("kurtosis"),
        intervals(f"kurtosis{DISTINCT}", "kurtosis, other tokens"),
        shares("tail_0_10", "|p| > 0.1"),
        shares("tail_0_25", "|p| > 0.25"),
        shares("tail_0_50", "|p| > 0.5", 2),
        numbers("min", "least p"),
        numbers("max", "largest p"),
        numbers("hill", "Hill index", 1),
        numbers("fourth_moment_pairs", "half in", 0),
    ]
    caption = (
        "Statistics of P off the diagonal by layer, with 95 % intervals of resampled facts. Half "
        "in: the least number of pairs of facts that hold half of the fourth moment. "
        f"Other tokens: without the "
        f"pairs that share {examined.token}"
    )
    rows = examined.statistics.rows()
    return Section("depth", "Kurtosis over depth", join([figure, table(rows, columns, caption)]))


def distribution(examined: Examined) -> Section:
    """The density of p."""
    what = "Density of P off the diagonal"
    few = Drawing("kde", "kde", f"{what} at {layers_text(examined.shown)}.")
    every = Drawing("kde-grid", "kde", f"{what}, a panel a layer.", _GRID)
    return Section("distribution", "Distribution of p", _few_and_all(examined, few, every))


def matrices(examined: Examined) -> Section:
    """P as images."""
    what = "P: row i is the fact that is edited, column j the fact that is moved"
    few = Drawing(
        "heatmap", "heatmap", f"{what}; {layers_text(examined.shown)}.", most_bytes=_IMAGE
    )
    every = Drawing(
        "heatmap-grid",
        "heatmap",
        f"{what}; a panel a layer, drawn small.",
        _GRID,
        most_bytes=_GRID_IMAGES,
    )
    return Section("matrices", "Superposition matrices", _few_and_all(examined, few, every))


def same_token(examined: Examined) -> Section:
    """The pairs that have their keys at one token, and how much of the tails they are."""
    first = examined.layers[:1]
    density = Drawing(
        "kde-marked",
        "kde",
        "Density of P off the diagonal on a logarithmic scale; dashed: without the pairs that "
        f"share {examined.token}.",
        _MARKED,
    )
    image = Drawing(
        "heatmap-marked",
        "heatmap",
        f"P at {layers_text(first)}; framed in green: pairs that share {examined.token}.",
        _MARKED,
        _IMAGE,
    )
    columns = [
        numbers("layer", digits=0),
        shares("same_token", "of all pairs", 2),
        shares("same_token_tail_0_10", "of |p| > 0.1"),
        shares("same_token_tail_0_25", "of |p| > 0.25"),
        shares("same_token_tail_0_50", "of |p| > 0.5"),
        numbers("kurtosis", "kurtosis", 1),
        numbers(f"kurtosis{DISTINCT}", "kurtosis without them", 1),
    ]
    caption = f"What share of P's entries are pairs that share {examined.token}, by layer"
    body = [
        tag(
            "div",
            _picture(examined, density, examined.ends),
            _picture(examined, image, first),
            class_="beside",
        ),
        table(examined.statistics.rows(), columns, caption),
    ]
    return Section("same-token", "Pairs of the same token", join(body))


def pairs(examined: Examined) -> Section:
    """The pairs that are bound most tightly."""
    first = examined.layers[:1]
    file = examined.file
    lists = [
        (strongest_rows(file, first, PAIRS), f"The pairs of largest p at {layers_text(first)}"),
        (
            strongest_rows(file, examined.layers, PAIRS, distinct_token=True),
            "The pairs of largest p, each at the layer where it is strongest, of those that do "
            f"not share {examined.token}",
        ),
    ]
    shown = [table(_pair_rows(examined, rows), _PAIR_COLUMNS, text) for rows, text in lists if rows]
    return Section("pairs", "Tightest bonds", join(shown))


_PAIR_COLUMNS = (
    numbers("rank", digits=0),
    numbers("layer", digits=0),
    numbers("p"),
    words("edited", "edited (i)", long=True),
    words("moved", "moved (j)", long=True),
    words("same", "same token"),
)


def _pair_rows(examined: Examined, rows: Sequence[dict[str, Any]]) -> list[Row]:
    facts = examined.file.facts
    return [
        {
            **row,
            "edited": fact_sentence(facts[row["i"]]),
            "moved": fact_sentence(facts[row["j"]]),
            "same": "yes" if row["same_last_token"] else "no",
        }
        for row in rows
    ]


def right_angles(examined: Examined) -> Section:
    """The angles between keys in both spaces."""
    figure = _picture(
        examined,
        Drawing(
            "angles",
            "angles",
            f"Angles between the keys of two facts at {layers_text(examined.ends)}.",
        ),
        examined.ends,
    )
    rows = [
        {
            "layer": layer,
            "white": white,
            "white_off": abs(white - 90),
            "raw": raw,
            "raw_off": abs(raw - 90),
        }
        for layer, (white, raw) in zip(examined.layers, examined.modes, strict=True)
    ]
    columns = [
        numbers("layer", digits=0),
        numbers("white", "whitening space", 1),
        numbers("white_off", "from 90\N{DEGREE SIGN}", 1),
        numbers("raw", "activation space", 1),
        numbers("raw_off", "from 90\N{DEGREE SIGN}", 1),
    ]
    caption = "The most frequent angle between two keys by layer, in degrees"
    return Section("angles", "Angles between keys", join([figure, table(rows, columns, caption)]))


def convergence(examined: Examined) -> Section:
    """P of more and more facts."""
    drawing = Drawing(
        "convergence",
        "convergence",
        f"P of the first so many facts at {layers_text(examined.ends)}.",
        FigureOptions(seed=examined.seed),
    )
    body = _picture(examined, drawing, examined.ends)
    return Section("convergence", "Number of facts", body)


def relations(examined: Examined) -> Section | None:
    """p within relations and across; None where the facts do not allow it."""
    found = examined.relations
    if found is None:
        return None
    drawing = Drawing(
        "relations",
        "relations",
        "Mean |p| from relation to relation, of pairs with different tokens and other text before "
        f"the subject, at {layers_text(examined.ends)}.",
    )
    rows = found.rows()
    body = [
        _picture(examined, drawing, examined.ends),
        table(
            [row for row in rows if row["relation"] is None],
            _BY_LAYER,
            "Mean |p| by layer, within relations by the text before the subject, and across; the "
            "null is of relations dealt out at random",
        ),
        table(
            _by_relation(found), _BY_RELATION, "Relations, at the layer where each binds hardest"
        ),
    ]
    return Section("relations", "Relations", join(body))


_BY_LAYER = (
    numbers("layer", digits=0),
    numbers("within_same_text", "within, same text", 3),
    numbers("within_other_text", "within, other text", 3),
    numbers("null_95_within_other_text", "95 % of the null", 3),
    numbers("p_value_within_other_text", "p-value", 3),
    numbers("across", "across", 3),
)
_BY_RELATION = (
    words("relation"),
    words("example", "for example", long=True),
    numbers("facts", digits=0),
    numbers("pairs", digits=0),
    numbers("largest", "mean |p|", 3),
    numbers("null", "95 % of the null", 3),
    numbers("hardest_at", "at layer", 0),
    words("above_at", "above the null at layers"),
)


def _by_relation(found: RelationStatistics) -> list[Row]:
    """The relations, those that bind hardest first."""
    rows = []
    for column, relation in enumerate(found.relations):
        means = found.means["within_other_text"][:, column]
        null = found.null_95["within_other_text"][:, column]
        defined = not np.isnan(means).all()
        at = int(np.nanargmax(means)) if defined else 0
        above = [layer for layer, holds in zip(found.layers, means > null, strict=True) if holds]
        rows.append(
            {
                "relation": relation.name,
                "example": relation.example,
                "facts": len(relation.facts),
                "pairs": int(found.pairs["within_other_text"][column]),
                "largest": float(means[at]),
                "null": float(null[at]),
                "hardest_at": float(found.layers[at]) if defined else math.nan,
                "above_at": format_layers(above) or None,
            }
        )
    return sorted(rows, key=lambda row: -np.nan_to_num(row["largest"], nan=-1.0))


def provenance(examined: Examined) -> Section:
    """Where the numbers come from."""
    file, corpus = examined.file, examined.corpus
    known = file.attributes
    unknown = "unknown: the cov.h5 that P was made with is not beside it"
    entries = {
        "model": known["model"],
        "model id": known["model_id"],
        "revision": known["revision"],
        "fingerprint of the weights": known["weights"],
        "fingerprint of the tokenizer": known["tokenizer"],
        "keys are the input of": known["hook"],
        "layers": f"{format_layers(examined.layers)} of {known['n_layers']}",
        "dimensions of a key": f"{known['d_m']:,}",
        "corpus": known["corpus"],
        "identity of the corpus": known.get("corpus_identity", ""),
        "part of the corpus": known.get("shard", ""),
        "tokens": f"{corpus.tokens:,}" if corpus else unknown,
        "documents": f"{corpus.documents:,}" if corpus and corpus.documents else "",
        "documents are cut at": f"{corpus.max_length:,} tokens"
        if corpus and corpus.max_length
        else "",
        "facts": f"{examined.m:,} of {known['facts_name']}",
        "identity of the facts": known["facts_identity"],
        "keys were read at": examined.token,
        "dtype": known["dtype"],
        "device": known["device"],
        "special tokens": known["special_tokens"],
        "ridge": str(known.get("ridge", "")),
        "file": str(file.path),
        "fingerprint of the file": file.fingerprint,
        "made by": f"kscli {known.get('kscli_version', '')}",
        "made on": known.get("created", ""),
        "command": known.get("command", ""),
        "seed of the intervals": str(examined.seed),
    }
    pairs_ = [(name, str(value)) for name, value in entries.items() if str(value)]
    return Section("provenance", "Provenance", plain_table(pairs_, "Where the numbers come from"))


def _picture(examined: Examined, drawing: Drawing, layers: tuple[int, ...]) -> Html:
    return picture(drawing, [examined.source(layers)], examined.key)


def _few_and_all(examined: Examined, few: Drawing, every: Drawing) -> Html:
    """A figure of a few layers, and one of all of them to unfold where there are more."""
    shown = _picture(examined, few, examined.shown)
    if examined.shown == examined.layers:
        return shown
    unfold = tag("summary", f"All {len(examined.layers)} layers")
    return join([shown, tag("details", unfold, _picture(examined, every, examined.layers))])
