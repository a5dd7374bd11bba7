"""The sections on several models beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kscli.analysis.fixed_points import comparable, fixed_points
from kscli.analysis.resampling import Resampling
from kscli.analysis.scaling import BY_SIZE, Measured, scaling_rows
from kscli.figures import FigureOptions, Source
from kscli.report.examined import Examined
from kscli.report.findings import Finding
from kscli.report.html import Html, join
from kscli.report.pictures import Drawing, picture
from kscli.report.sections import PAIRS, Section, finding_list
from kscli.report.tables import table
from kscli.report.words import number, share, with_interval
from kscli.tables import FIXED_POINTS, SCALING, SPARSITY, Row

KEY = "models"
_IMAGE = 600_000


def scaling(models: Sequence[Examined]) -> Section:
    """Kurtosis against size, by family, and dense models beside mixtures of experts."""
    every = scaling_rows(
        [Measured.of_file(one.file, one.layers) for one in models],
        Resampling(seed=models[0].seed),
    )
    rows = [row for row in every if row["compared"] == BY_SIZE]
    sparse = [row for row in every if row["compared"] != BY_SIZE]
    body = [finding_list([Finding("Size", tuple(map(size_sentence, rows)) or (_NO_FAMILY,))])]
    if rows:
        body.append(table(rows, SCALING, "Mean kurtosis over layers against size, by family"))
    if sparse:
        body.append(table(sparse, SPARSITY, "Dense models and mixtures of experts of one size"))
    drawing = Drawing(
        "kurtosis",
        "kurtosis",
        "Excess kurtosis of P off the diagonal over depth.",
        FigureOptions(seed=models[0].seed),
    )
    body.append(_picture(drawing, _sources(models, lambda one: one.layers)))
    return Section("scaling", "Kurtosis and size", join(body))


_NO_FAMILY = (
    "No two of the models are known to be sizes of one family, so nothing is said of kurtosis "
    "and size."
)


def size_sentence(row: Row) -> str:
    """Whether the larger model has the larger kurtosis."""
    difference, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
    if difference != difference:
        return (
            f"Whether kurtosis grows from {row['smaller']} to {row['larger']} is undefined: one "
            "of them has none at any layer."
        )
    if low > 0:
        verdict = "the larger model has the larger kurtosis"
    elif high < 0:
        verdict = "the larger model has the smaller kurtosis"
    elif low == low:
        verdict = "the interval contains 0, so it is not known which is larger"
    elif row["same_facts"]:
        verdict = "the difference has no interval"
    else:
        verdict = "they were measured on different facts, so the difference has no interval"
    return (
        f"From {row['smaller']} to {row['larger']} mean kurtosis over layers goes from "
        f"{number(row['kurtosis_smaller'], 1)} to {number(row['kurtosis_larger'], 1)}, a "
        f"difference of {with_interval(difference, low, high, 1)}: {verdict}. The larger model's "
        f"is higher at {share(row['share_higher'])} of relative depths."
    )


def points(models: Sequence[Examined]) -> Section:
    """The pairs that are bound most tightly in every model."""
    files = [one.file for one in models]
    if not comparable(files):
        reason = (
            "The models have no pairs to compare: they were not measured on the same facts, or one "
            "of them not at layer 0."
        )
        return Section("pairs", "Fixed points", finding_list([Finding("Pairs", (reason,))]))
    found = fixed_points(files, PAIRS)
    sentence = found.sentence()
    if not len(found.pairs):
        # How many of none share a token is nothing to say.
        sentence = sentence.partition(";")[0] + "."
    body = [finding_list([Finding("Pairs", (sentence,))])]
    if len(found.pairs):
        caption = f"Pairs in the top {PAIRS} of every model at layer 0"
        body.append(table(found.rows(files[0].facts), FIXED_POINTS, caption))
    return Section("pairs", "Fixed points", join(body))


def side_by_side(models: Sequence[Examined]) -> Section:
    """First and last layers in one figure each."""
    first = _sources(models, lambda one: one.layers[:1])
    last = _sources(models, lambda one: one.layers[-1:])
    body = [
        _picture(Drawing("heatmap", "heatmap", "P at the first layer.", most_bytes=_IMAGE), first),
        _picture(Drawing("kde", "kde", "Density of P off the diagonal, first layer."), first),
        _picture(
            Drawing("angles", "angles", "Angles between the keys of two facts, last layer."), last
        ),
    ]
    return Section("side-by-side", "Side by side", join(body))


def _sources(
    models: Sequence[Examined], layers_of: Callable[[Examined], tuple[int, ...]]
) -> list[Source]:
    """What figures of all models are drawn from; models of one name are numbered."""
    names = [one.model for one in models]
    return [
        replace(
            one.source(layers_of(one)),
            name=f"{name} ({names[: at + 1].count(name)})" if names.count(name) > 1 else "",
        )
        for at, (one, name) in enumerate(zip(models, names, strict=True))
    ]


def _picture(drawing: Drawing, sources: list[Source]) -> Html:
    return picture(drawing, sources, KEY)


Builder = Callable[[Sequence[Examined]], Section]

SECTIONS: tuple[Builder, ...] = (scaling, points, side_by_side)
