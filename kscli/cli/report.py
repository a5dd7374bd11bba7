"""`kscli report`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("report")(report)


def report(
    model: options.Models = None,
    pmatrix: Annotated[
        list[Path] | None,
        typer.Option("--pmatrix", metavar="FILE", help="A pmatrix.h5 to read, instead of -m."),
    ] = None,
    directory: options.Dir = Path("artifacts"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The page to write.",
            show_default="DIR/MODEL/report.html, or DIR/report.html of several models",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the facts and relations drawn for intervals.")
    ] = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write all there is to say of a model's P as one HTML page; prints the page's path.

    Findings in sentences, every figure, tables that sort, and where the numbers come from. The
    page is one file that loads nothing from elsewhere. Reads pmatrix.h5, and stats.h5 and cov.h5
    beside it where they belong to it; loads no model. Several models are compared first.

    [bold]Examples[/bold]

      kscli report -m gpt2-small

      kscli report -m gpt2-small -m gpt2-medium -m gpt2-large -o scaling.html

      kscli report --pmatrix other-text/pmatrix.h5 -o other-text.html
    """
    import shlex
    import sys

    from kscli.cli.console import ConsoleReporter
    from kscli.cli.output import print_line
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.report.page import write_report

    with ExitStack() as stack:
        files = open_pmatrices(pmatrix_paths(model, pmatrix, directory), stack)
        folder = files[0].path.parent if len(files) == 1 else directory
        path = output or folder / "report.html"
        write_report(
            files,
            path,
            seed=seed,
            command=shlex.join(["kscli", *sys.argv[1:]]),
            force=force,
            reporter=ConsoleReporter(quiet=quiet),
        )
    print_line(str(path))
