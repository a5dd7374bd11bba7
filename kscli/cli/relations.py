"""`kscli relations`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.output import Column, Format, Row, field, print_rows
from kscli.cli.stats import head_table

SHOWN_LAYERS = 8
SHOWN_RELATIONS = 3


def relations(
    model: options.Models = None,
    layers: options.Layers = "all",
    permutations: Annotated[
        int,
        typer.Option(
            "--permutations", metavar="N", min=1, help="How often relations are dealt out anew."
        ),
    ] = 1000,
    seed: options.Seed = 0,
    pmatrix: options.PMatrices = None,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Compare mean |p| within relations of facts and across them, layer by layer.

    Pairs whose subjects end in the same token are left out. Those with the same text before the
    subject have a column of their own, since a shared template passes for a relation; all else is
    about the other ones. The null is the same mean with relations dealt out to the facts at
    random. Reads pmatrix.h5; loads no model.

    Examples:
      kscli relations -m gpt2-small
      kscli relations -m gpt-j --layers 0,14,27 -f markdown
      kscli relations -m gpt-j -f json | jq '.[] | select(.relation == "P103") | .within'
    """
    from kscli.analysis.relations import Permutations, relation_statistics
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.layers import select_layers

    reporter = ConsoleReporter(quiet=quiet)
    with ExitStack() as stack:
        of_files = [
            relation_statistics(
                file,
                select_layers(layers, file.layers, str(file.path)),
                Permutations(permutations, seed),
                reporter,
            ).rows()
            for file in open_pmatrices(pmatrix_paths(model, pmatrix, directory), stack)
        ]
    rows = [row for of_file in of_files for row in of_file]
    if output_format in (Format.json, Format.csv, Format.tsv):
        print_rows(rows, [], output_format)
        return
    by_layer = [row for of_file in of_files for row in layer_rows(of_file)]
    title = "Mean |p| within relations, by the text before the subject, and across relations"
    print_rows(by_layer, layer_columns(by_layer), output_format, title)
    for of_file in of_files:
        by_relation = relation_rows(of_file)
        title = (
            f"Mean |p| within each relation of {by_relation[0]['model']}, without the pairs that "
            "have the same text before the subject"
        )
        head_table(title, output_format)
        print_rows(by_relation, relation_columns(by_relation), output_format, title)


def layer_rows(rows: Sequence[Row]) -> list[Row]:
    """One model's records of all relations together, with those that bind hardest at the layer.

    Of relations that are above 95 % of the permuted ones only.
    """
    found: list[Row] = []
    for together in (row for row in rows if row["relation"] is None):
        here = [
            row
            for row in rows
            if row["layer"] == together["layer"] and row["relation"] and _above_null(row)
        ]
        here.sort(key=lambda row: -row["within_other_text"])
        hardest = ", ".join(
            f"{row['relation']} {row['within_other_text']:.2f}" for row in here[:SHOWN_RELATIONS]
        )
        found.append({**together, "hardest": hardest or None})
    return found


def layer_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of `layer_rows`; the model only where it varies."""
    return [
        *([field("model")] if len({row["model"] for row in rows}) > 1 else []),
        field("layer", spec="d"),
        field("within_same_text", "within, same text", spec=".3f"),
        field("within_other_text", "within, other text", spec=".3f"),
        field("null_95_within_other_text", "null 95 %", spec=".3f"),
        field("p_value_within_other_text", "p-value", spec=".3f"),
        field("across", spec=".3f"),
        field("hardest", "hardest"),
    ]


def relation_rows(rows: Sequence[Row]) -> list[Row]:
    """One model's relations, the hardest bound first, each with its records by layer.

    `hardest_at` is the layer of the largest mean, `above_at` the layers where it is above 95 % of
    the permuted ones.
    """
    from kscli.layers import format_layers

    found = []
    for name in dict.fromkeys(row["relation"] for row in rows if row["relation"] is not None):
        own = [row for row in rows if row["relation"] == name]
        defined = [row for row in own if not math.isnan(row["within_other_text"])]
        hardest = max(defined, key=lambda row: row["within_other_text"], default=None)
        found.append(
            {
                **own[0],
                "pairs": own[0]["pairs_within_other_text"],
                "by_layer": {row["layer"]: row["within_other_text"] for row in own},
                "hardest_at": hardest["layer"] if hardest else None,
                "largest": hardest["within_other_text"] if hardest else -math.inf,
                "above_at": format_layers([r["layer"] for r in own if _above_null(r)]) or None,
            }
        )
    return sorted(found, key=lambda row: -row["largest"])


def relation_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of `relation_rows`, with layers from over the depth where there are many."""
    layers = list(rows[0]["by_layer"])
    if len(layers) > SHOWN_LAYERS:
        step = (len(layers) - 1) / (SHOWN_LAYERS - 1)
        layers = [layers[round(step * at)] for at in range(SHOWN_LAYERS)]
    return [
        field("relation"),
        field("example", "for example"),
        field("facts", spec="d"),
        field("pairs", spec="d"),
        *(
            Column(f"layer {layer}" if at == 0 else str(layer), partial(_at_layer, layer), True)
            for at, layer in enumerate(layers)
        ),
        field("hardest_at", "hardest at", spec="d"),
        field("above_at", "above null at"),
    ]


def _at_layer(layer: int, row: Row) -> str:
    value = row["by_layer"][layer]
    return "-" if math.isnan(value) else f"{value:.2f}"


def _above_null(row: Row) -> bool:
    """Whether the relation binds harder than 95 % of permuted ones; not where undefined."""
    return bool(row["within_other_text"] > row["null_95_within_other_text"])
