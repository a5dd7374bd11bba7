"""`kscli stats`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.output import Column, Format, Row, field, print_rows


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("stats")(stats)


def statistic_columns(rows: Sequence[Row]) -> list[Column]:
    """A column for every statistic there is, after the layer; the model only where it varies."""
    from kscli.statistics import STATISTICS

    return [
        *([field("model")] if len({row["model"] for row in rows}) > 1 else []),
        field("layer", spec="d"),
        field("m", spec="d"),
        *(field(kind.name, kind.heading, kind.spec) for kind in STATISTICS.values()),
    ]


def stats(
    model: options.Models = None,
    pmatrix: Annotated[
        list[Path] | None,
        typer.Option("--pmatrix", metavar="FILE", help="A pmatrix.h5 to read, instead of -m."),
    ] = None,
    layers: options.Layers = "all",
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Describe the distribution of P's off-diagonal entries, layer by layer.

    Reads pmatrix.h5, loads no model; writes the statistics of all layers to stats.h5 beside each
    model's pmatrix.h5 (of chosen layers, or of a file named with --pmatrix, only where --output
    says).

    [bold]Examples[/bold]

      kscli stats -m gpt2-small

      kscli stats -m gpt2-small -m gpt2-medium -m gpt2-large -f csv > kurtosis.csv

      kscli stats -m gpt-j --layers 0,-1 -f json | jq '.\\[].kurtosis'
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.errors import UsageError
    from kscli.layers import select_layers
    from kscli.pipeline import Existing, make_statistics
    from kscli.statistics import compute_statistics

    reporter = ConsoleReporter(quiet=quiet)
    paths = pmatrix_paths(model, pmatrix, directory)
    if output is not None and len(paths) > 1:
        raise UsageError("--output names one file, but several models were given.")
    rows = []
    with ExitStack() as stack:
        files = open_pmatrices(paths, stack)
        chosen = [select_layers(layers, file.layers, str(file.path)) for file in files]
        in_the_way = Existing.KEEP if output is None else Existing.REFUSE
        existing = Existing.FORCE if force else in_the_way
        for file, of_file in zip(files, chosen, strict=True):
            path = output
            if path is None and of_file == file.layers and file.path not in (pmatrix or []):
                path = file.path.with_name("stats.h5")
            if path is not None:
                make_statistics(file, of_file, path, existing, reporter)
            rows += compute_statistics(file, of_file).rows()
    print_rows(rows, statistic_columns(rows), output_format)
