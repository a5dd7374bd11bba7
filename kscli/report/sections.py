"""The sections on one model: figures, tables and where the numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kscli.analysis.pairs import strongest_rows
from kscli.analysis.spectrum import PUBLISHED, RELATIVE
from kscli.artifacts import UNKNOWN
from kscli.figures import FigureOptions
from kscli.layers import format_layers
from kscli.report.examined import Examined
from kscli.report.findings import Finding, findings
from kscli.report.html import Html, join, tag
from kscli.report.opening import in_short
from kscli.report.pictures import Drawing, picture
from kscli.report.tables import plain_table, table
from kscli.report.words import layers_text
from kscli.tables import (
    ANGLES,
    OVERLAPS,
    PAIRS_OF_LAYERS,
    RELATIONS_BY_LAYER_TITLED,
    ROUTING,
    SAME_TOKEN,
    SPECTRUM,
    STATISTICS,
    relation_columns,
)

PAIRS = 20
_MARKED = FigureOptions(mark_same_token=True)
_GRID = FigureOptions(grid=True)
# What the images of one figure may take; those of all layers are the page's largest part.
_IMAGE, _GRID_IMAGES = 400_000, 1_200_000


@dataclass(frozen=True)
class Section:
    """A section of a part of the page; `name` is its own among the part's."""

    name: str
    title: str
    body: Html


def short(examined: Examined) -> Section:
    """Three sentences for who reads no further."""
    said = tag("p", " ".join(in_short(examined)), class_="in-short")
    return Section("in-short", "In short", said)


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
    caption = (
        "Statistics of P off the diagonal by layer, with 95 % intervals of resampled facts. "
        f"Different last token: kurtosis without the pairs that share {examined.token}. Carry "
        "half: the least number of pairs of facts that carry half of the fourth moment"
    )
    rows = examined.statistics.rows()
    parts = [figure, table(rows, STATISTICS, caption)]
    if "no_common_expert" in examined.statistics.values:
        routed = (
            "Experts that facts are routed to: the share of pairs without a common one, the mean "
            "number in common, and p of all pairs beside that of the pairs with a common one"
        )
        parts.append(table(rows, ROUTING, routed))
    return Section("depth", "Kurtosis over depth", join(parts))


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
        half=True,
    )
    image = Drawing(
        "heatmap-marked",
        "heatmap",
        f"P at {layers_text(first)}; framed in green: pairs that share {examined.token}.",
        _MARKED,
        _IMAGE,
        half=True,
    )
    caption = f"What share of P's entries are pairs that share {examined.token}, by layer"
    body = [
        tag(
            "div",
            _picture(examined, density, examined.ends),
            _picture(examined, image, first),
            class_="beside",
        ),
        table(examined.statistics.rows(), SAME_TOKEN, caption),
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
    tables = [table(rows, PAIRS_OF_LAYERS, text) for rows, text in lists if rows]
    return Section("pairs", "Largest p", join(tables))


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
    caption = "The most frequent angle between two keys by layer, in degrees"
    return Section("angles", "Angles between keys", join([figure, table(rows, ANGLES, caption)]))


def spectrum(examined: Examined) -> Section:
    """The dimensions of C, the overlap of keys, and what AlphaEdit's cuts call null."""
    overlap = (
        "the overlap of keys, which is the mean squared cosine of two facts' keys, in the "
        "activation and in the whitening space; keys in random directions overlap by 1/d_m"
    )
    if not examined.spectra:
        said = f"{overlap[0].upper()}{overlap[1:]}"
        body = [tag("p", examined.no_spectra), table(examined.overlaps, OVERLAPS, said)]
        return Section("spectrum", "Overlap of keys", join(body))
    drawing = Drawing(
        "spectrum",
        "spectrum",
        "Dimensions of C, the overlap of keys, and the directions of C that AlphaEdit's cuts call "
        "null with the share of the keys' energy in them, at every layer.",
    )
    caption = (
        f"The dimensions of C by layer, and {overlap}. Null: directions whose singular value is "
        f"below {PUBLISHED.size:g}; relative null: below {RELATIVE.size:g} times the mean"
    )
    measured = tuple(row["layer"] for row in examined.spectra)
    source = replace(examined.source(measured), spectra=examined.spectra)
    body = [
        picture(drawing, [source], examined.key),
        *([tag("p", examined.no_spectra)] if examined.no_spectra else []),
        table(examined.spectra, SPECTRUM, caption),
    ]
    return Section("spectrum", "Spectrum of C and overlap of keys", join(body))


def convergence(examined: Examined) -> Section:
    """P of more and more facts."""
    drawing = Drawing(
        "convergence",
        "convergence",
        f"P of more and more facts, from the first on, at {layers_text(examined.ends)}.",
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
        "Mean |p| from relation to relation, of pairs of a different last token and with other "
        f"text before the subject, at {layers_text(examined.ends)}.",
    )
    body = [
        _picture(examined, drawing, examined.ends),
        table(
            found.by_layer(),
            RELATIONS_BY_LAYER_TITLED,
            "Mean |p| by layer, within relations by the text before the subject, and across; the "
            "null is of relations given at random. Hardest: the relations above the null with "
            "the largest mean",
        ),
        table(
            found.by_relation(),
            relation_columns(()),
            "Relations, each at the layer where its mean |p| is largest",
        ),
    ]
    return Section("relations", "Relations", join(body))


def provenance(examined: Examined) -> Section:
    """Where the numbers come from."""
    file, corpus = examined.file, examined.corpus
    about, stamp = file.about, file.stamp
    unknown = "unknown: the cov.h5 that P was made with is not beside it"
    entries = {
        "model": about.model,
        "model id": about.model_id,
        "revision": about.revision,
        "fingerprint of the weights": about.weights,
        "fingerprint of the tokenizer": about.tokenizer,
        "keys are the input of": about.hook,
        "layers": f"{format_layers(examined.layers)} of {about.n_layers}",
        "dimensions of a key": f"{about.d_m:,}",
        "corpus": about.corpus,
        "identity of the corpus": about.corpus_identity,
        "part of the corpus": about.shard,
        "tokens": f"{corpus.tokens:,}" if corpus else unknown,
        "documents": f"{corpus.documents:,}" if corpus and corpus.documents else "",
        "documents are cut at": f"{corpus.max_length:,} tokens"
        if corpus and corpus.max_length
        else "",
        "facts": f"{examined.m:,} of {about.facts_name}",
        "identity of the facts": about.facts_identity,
        "keys were read at": examined.token,
        "dtype": about.dtype,
        "device": about.device,
        "special tokens": about.special_tokens,
        "ridge": about.ridge,
        "file": str(file.path),
        "fingerprint of the file": file.fingerprint,
        "made by": f"kscli {stamp.kscli_version}",
        "made on": stamp.created,
        "command": stamp.command,
        "seed of the intervals": str(examined.seed),
    }
    pairs_ = [
        (name, UNKNOWN if value is None else str(value))
        for name, value in entries.items()
        if value != ""
    ]
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
