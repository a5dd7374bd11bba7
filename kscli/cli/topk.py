"""`kscli topk`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.tables import PAIRS, PAIRS_OF_LAYERS, Column, Row, sentence

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile
    from kscli.reporter import Reporter

BOUND = 0.25
"""From which |p| on a pair is counted as bound, as in `stats`."""


def topk(
    context: typer.Context,
    model: options.Models = None,
    layer: options.LayerOfPairs = None,
    k: options.TopPairs = 20,
    absolute: Annotated[bool, typer.Option("--abs", help="Order by |p| instead of p.")] = False,
    strongest: Annotated[
        bool,
        typer.Option(
            "--strongest", help="List each pair once, at the layer where it is strongest."
        ),
    ] = False,
    distinct_token: Annotated[
        bool,
        typer.Option("--distinct-token", help="List only pairs of a different last token."),
    ] = False,
    editor: options.EditorOfP = None,
    pmatrix: options.PMatrices = None,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """List the pairs of facts that are bound most tightly: i is edited, j is moved.

    These are the pairs of the largest p. Two subjects that end in the same token have similar
    keys, whatever the facts say; such pairs are marked. Reads pmatrix.h5 and loads no model.

    Examples:
      kscli topk -m gpt-j --layer 0
      kscli topk -m gpt2-small --layer -1 -k 5 --abs
      kscli topk -m gpt2-small --strongest --distinct-token -f latex > table.tex
    """
    from kscli.analysis.few_facts import few_facts
    from kscli.analysis.pairs import pair_rows, strongest_rows
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.explaining import (
        EDIT,
        REPORT,
        RISK,
        explain_columns,
        explainer,
        fact_to_edit,
        suggest,
    )
    from kscli.cli.requests import models_of, open_pmatrices, pmatrix_paths
    from kscli.layers import default_layers, layers_text, select_layers

    reporter = ConsoleReporter(quiet=quiet)
    found: list[Sequence[Row]] = []
    with ExitStack() as stack:
        files = open_pmatrices(pmatrix_paths(model, pmatrix, directory, editor), stack)
        for file in files:
            layers = (
                select_layers(layer, file.layers, str(file.path))
                if layer
                else default_layers("all" if strongest else "0", file.layers)
            )
            of_file = (
                [strongest_rows(file, layers, k, absolute, distinct_token)]
                if strongest
                else [pair_rows(file, number, k, absolute, distinct_token) for number in layers]
            )
            if len(file.facts) == 1:
                reporter.warn(f"{file.path}: {few_facts(1)}")
            if distinct_token and not any(of_file) and len(file.facts) > 1:
                reporter.warn(
                    f"{file.path}: all subjects end in the same token, so --distinct-token leaves "
                    "no pair."
                )
            found += of_file
            explain_routing(file, layers, reporter)
        where = "its strongest layer" if strongest else layers_text(layers)
        title = pairs_title(files, where)
        if any(found) or output_format is not Format.table:
            print_pairs(chain.from_iterable(found), output_format, title, show_layer=strongest)
        told = explainer(reporter, output_format)
        if any(found):
            explain_columns(PAIRS, found[0], told)
        if found[0] and len(files) == 1 and not pmatrix:
            explain_size(files[0], found[0][0], told)
            (name,) = models_of(context)
            subjects = [fact.subject for fact in files[0].facts]
            fact = fact_to_edit(name, subjects, found[0][0]["subject_i"])
            suggest((RISK, EDIT, REPORT), name, directory, told, fact)


def pairs_title(files: Sequence[PMatrixFile], where: str) -> str:
    """What the pairs are of: the layer, and the models, whose names say whose p it is."""
    models = ", ".join(dict.fromkeys(file.model for file in files))
    return f"The largest p at {where}: {models}"


def explain_routing(file: PMatrixFile, layers: Sequence[int], reporter: Reporter) -> None:
    """Say, of a mixture of experts, how many pairs of facts have no expert in common."""
    import numpy as np

    from kscli.analysis.matrices import common_experts

    for layer in layers:
        experts = file.experts_of(layer)
        if experts is not None and len(experts) > 1:
            common = common_experts(experts)[~np.eye(len(experts), dtype=bool)]
            reporter.note(
                f"{file.model}, layer {layer}: {np.mean(common == 0):.1%} of the pairs of facts "
                "have no expert in common."
            )


def explain_size(file: PMatrixFile, row: Row, reporter: Reporter) -> None:
    """Say how rare a large p is at the layer of a pair."""
    import numpy as np

    P = np.abs(file.matrix("P", row["layer"]))
    m = len(P)
    share = (np.count_nonzero(P > BOUND) - np.count_nonzero(P.diagonal() > BOUND)) / (m * (m - 1))
    reporter.note(
        f"Of all pairs at layer {row['layer']}, {share:.1%} have |p| above {BOUND}; in "
        "SmolLM2-135M it is 2.0% at the first layer and 15.3% at the last."
    )


def print_pairs(
    rows: Iterable[Row], output_format: Format, title: str = "", *, show_layer: bool = False
) -> None:
    """Print a list of pairs; in LaTeX in two lines a pair, as the paper's Tables 1 to 4."""
    columns = PAIRS_OF_LAYERS if show_layer else PAIRS
    if output_format is not Format.latex:
        print_rows(rows, columns, output_format, title)
        return
    lines = [{**row, "line": line} for row in rows for line in ("i", "j")]
    of_pair = [*columns[:2], Column("p", "p(i, j)", ".2f")]
    same_token = Column("same_last_token", "same token")
    first_line = [
        replace(column, value=partial(_on_first_line, column.key))
        for column in (*of_pair, same_token)
    ]
    first_line.insert(
        -1, Column("item", "item i & j", value=lambda row: sentence(row, row["line"]))
    )
    print_rows(lines, first_line, output_format, title)


def _on_first_line(key: str, row: Row) -> Any:
    return row[key] if row["line"] == "i" else ""
