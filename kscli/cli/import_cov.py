"""`kscli import-cov`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options


def import_cov(
    stats_dir: Annotated[
        Path,
        typer.Argument(
            metavar="STATS_DIR", help="A folder of .npz statistics, of any depth, or one file."
        ),
    ],
    model: options.Model,
    note: options.Note = None,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Read the .npz statistics of ROME, MEMIT, EasyEdit or AlphaEdit into cov.h5.

    After it, extract and pmatrix work without cache-cov. The files do not say which model they
    are of, so name it with --model.

    Examples:
      kscli import-cov rome/data/stats -m gpt2-xl
      kscli import-cov data/stats/llama-3-8b -m llama3-8b --note "Wikipedia 20220301, 8192 tokens"
      kscli import-cov transformer.h.17.mlp.c_proj_float32_mom2_100000.npz -m gpt2-xl -o cov.h5
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.layers import format_layers
    from kscli.places import Places
    from kscli.second_moment.interchange import import_covariance

    reporter = ConsoleReporter(quiet=quiet)
    path = output or Places(directory, model).path("cov")
    files = import_covariance(stats_dir, model, path, note=note, force=force, reporter=reporter)
    layers = format_layers([file.layer for file in files])
    reporter.note(f"wrote {path}: layers {layers} over {files[0].count:,} tokens")
