"""`kscli topk`."""

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
    app.command("topk")(topk)


def topk(
    model: options.Models = None,
    layer: options.Layer = "0",
    k: Annotated[int, typer.Option("-k", metavar="K", min=1, help="How many pairs a layer.")] = 20,
    absolute: Annotated[bool, typer.Option("--abs", help="Order by |p| instead of p.")] = False,
    pmatrix: Annotated[
        list[Path] | None,
        typer.Option("--pmatrix", metavar="FILE", help="A pmatrix.h5 to read, instead of -m."),
    ] = None,
    directory: options.Dir = Path("artifacts"),
    output_format: options.OutputFormat = Format.table,
) -> None:
    """List the pairs of facts that are bound most tightly: i is edited, j is moved.

    Reads pmatrix.h5; loads no model.

    [bold]Examples[/bold]

      kscli topk -m gpt-j --layer 0

      kscli topk -m gpt2-small --layer -1 -k 5 --abs

      kscli topk -m gpt-j -f json | jq -r '.\\[] | select(.same_last_token | not) | .subject_i'
    """
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.layers import select_layers
    from kscli.pairs import pair_rows

    with ExitStack() as stack:
        files = open_pmatrices(pmatrix_paths(model, pmatrix, directory), stack)
        rows = [
            row
            for file in files
            for number in select_layers(layer, file.layers, str(file.path))
            for row in pair_rows(file, number, k, absolute)
        ]
    print_rows(rows, pair_columns(rows), output_format)


def pair_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of a list of pairs; model and layer only where they vary."""
    varying = [name for name in ("model", "layer") if len({row[name] for row in rows}) > 1]
    return [
        *(field(name) for name in varying),
        field("rank", spec="d"),
        field("p", spec=".2f"),
        Column("edited (i)", lambda row: sentence(row, "i")),
        Column("moved (j)", lambda row: sentence(row, "j")),
        Column("same last token", lambda row: "yes" if row["same_last_token"] else ""),
    ]


def sentence(row: Row, which: str) -> str:
    """A fact as the paper writes it: `The capital of [France] is [Paris].`"""
    filled = str(row[f"prompt_{which}"]).replace("{}", f"[{row[f'subject_{which}']}]")
    return f"{filled} [{row[f'target_{which}']}]."
