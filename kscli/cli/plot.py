"""`kscli plot`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.complete import complete_layers
from kscli.figures import KINDS, FigureKind

KIND_HELP = "  ".join(f"[bold]{kind.name}[/bold]: {kind.help}" for kind in KINDS.values())


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("plot")(plot)


def complete_kind(incomplete: str) -> list[str]:
    """The kinds of figure."""
    return [name for name in KINDS if name.startswith(incomplete)]


def plot(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help=KIND_HELP, autocompletion=complete_kind)
    ],
    model: options.Models = None,
    pmatrix: Annotated[
        list[Path] | None,
        typer.Option("--pmatrix", metavar="FILE", help="A pmatrix.h5 to draw, instead of -m."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "--layers",
            metavar="LAYERS",
            help="0, -1 (the last), 0,3,5-8 or all.",
            show_default="what shows the kind best",
            autocompletion=complete_layers,
        ),
    ] = None,
    directory: options.Dir = Path("artifacts"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .png, .svg or .pdf.",
            show_default="DIR/MODEL/figures/KIND.png",
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Draw a figure of P; prints the path of the file that it writes.

    [bold]Examples[/bold]

      kscli plot heatmap -m gpt2-small --layer 0 -o heatmap.pdf

      kscli plot kde -m gpt2-small --layers 0,5,11

      kscli plot kurtosis -m gpt2-small -m gpt2-medium -m gpt2-large -o scaling.svg
    """
    from kscli.cli.output import print_line
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.figures import Source
    from kscli.figures.saving import check_target, save_figure
    from kscli.layers import select_layers

    figure_kind = find_kind(kind)
    with ExitStack() as stack:
        files = open_pmatrices(pmatrix_paths(model, pmatrix, directory), stack)
        folders = [file.path.parent / "figures" for file in files]
        folder = folders[0] if len(files) == 1 else directory / "figures"
        path = output or folder / default_name(kind, [file.model for file in files], layers)
        check_target(path, force)
        sources = [
            Source(file, select_layers(layers or figure_kind.layers, file.layers, str(file.path)))
            for file in files
        ]
        save_figure(figure_kind.draw(sources), path, force)
    print_line(str(path))


def find_kind(name: str) -> FigureKind:
    """The kind of figure of that name. Raises UsageError naming the kinds there are."""
    from kscli.errors import UsageError

    if name not in KINDS:
        raise UsageError(f"there is no figure {name!r}; there are {', '.join(KINDS)}.")
    return KINDS[name]


def default_name(kind: str, models: list[str], layers: str | None) -> str:
    """KIND.png of one model's default layers; further models and chosen layers are named."""
    suffix = "" if layers is None else f"-layer{layers.replace(',', '_')}"
    return f"{'-'.join([kind, *(models if len(models) > 1 else [])])}{suffix}.png"
