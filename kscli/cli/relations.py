"""`kscli relations`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_rows
from kscli.tables import RELATIONS_BY_LAYER, relation_columns

SHOWN_LAYERS = 8


def relations(
    model: options.Models = None,
    layers: options.Layers = "all",
    permutations: Annotated[
        int,
        typer.Option(
            "--permutations",
            metavar="N",
            min=1,
            help="How often relations are given to the facts at random.",
        ),
    ] = 1000,
    seed: options.Seed = 0,
    editor: options.EditorOfP = None,
    pmatrix: options.PMatrices = None,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Compare mean |p| within relations of facts and across them, layer by layer.

    Only pairs of a different last token are counted. Pairs with the same text before the subject
    have a column of their own, because a shared template looks like a relation; the other columns
    are about the other pairs. The null is the same mean when relations are given to the facts at
    random. Reads pmatrix.h5 and loads no model.

    Examples:
      kscli relations -m gpt2-small
      kscli relations -m gpt-j --layers 0,14,27 -f markdown
      kscli relations -m gpt-j -f json | jq '.[] | select(.relation == "P103") | .within'
    """
    from kscli.analysis.relations import Permutations, relation_statistics
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import editor_of, open_pmatrices, pmatrix_paths
    from kscli.layers import select_layers, spread

    reporter = ConsoleReporter(quiet=quiet)
    with ExitStack() as stack:
        files = open_pmatrices(pmatrix_paths(model, pmatrix, directory, editor), stack)
        whose = editor_of(files)
        of_files = [
            relation_statistics(
                file,
                select_layers(layers, file.layers, str(file.path)),
                Permutations(permutations, seed),
                reporter,
            )
            for file in files
        ]
    if output_format in FOR_MACHINES:
        print_rows([row for found in of_files for row in found.rows()], [], output_format)
        return
    by_layer = [row for found in of_files for row in found.by_layer()]
    mean = f"Mean |p| of {whose}" if whose else "Mean |p|"
    title = f"{mean} within relations, by the text before the subject, and across relations"
    print_rows(by_layer, RELATIONS_BY_LAYER, output_format, title)
    for found in of_files:
        title = (
            f"{mean} within each relation of {found.model}, without the pairs that have the same "
            "text before the subject"
        )
        columns = relation_columns(spread(found.layers, SHOWN_LAYERS))
        print_rows(found.by_relation(), columns, output_format, title, further=True)
