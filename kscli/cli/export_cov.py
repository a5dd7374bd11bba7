"""`kscli export-cov`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kscli.cli import options


def export_cov(
    editor: Annotated[
        Literal["rome", "memit", "easyedit", "alphaedit"],
        typer.Option("--for", metavar="EDITOR", help="rome, memit, easyedit or alphaedit."),
    ],
    stats_dir: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="STATS_DIR", help="The editor's folder of statistics."
        ),
    ],
    model: options.ModelOrNone = None,
    cov: options.Cov = None,
    layers: options.Layers = "all",
    known_as: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            help="The name or path with which the editor loads the model. The folder of the files "
            "gets this name.",
            show_default="the model's Hub id",
        ),
    ] = None,
    note: options.Note = None,
    directory: options.Dir = Path("artifacts"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write cov.h5 as the .npz files that ROME, MEMIT, EasyEdit or AlphaEdit looks for.

    There is one file for each layer. Its name is the one that the editor looks for with its
    default hyper-parameters.

    Examples:
      kscli export-cov -m gpt-j --for memit -o memit/data/stats
      kscli export-cov -m llama3-8b --for easyedit --as ./hugging_cache/llama-3-8b -o data/stats
      kscli export-cov --cov other/cov.h5 --for rome --layers 17 -o rome/data/stats
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.places import Places
    from kscli.second_moment.interchange import SAMPLE_SIZE, ExportOptions, export_covariance

    reporter = ConsoleReporter(quiet=quiet)
    paths = export_covariance(
        cov or Places(directory, model or options.DEFAULT_MODEL).path("cov"),
        stats_dir,
        ExportOptions(editor, known_as, layers, note),
        force=force,
        reporter=reporter,
    )
    reporter.note(f"wrote {len(paths)} files to {paths[0].parent}")
    reporter.note(
        f"The file names and sample_size say {SAMPLE_SIZE:,} documents of Wikipedia, whatever was "
        "measured, because the editors look for no others."
    )
