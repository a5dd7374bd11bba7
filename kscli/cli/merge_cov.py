"""`kscli merge-cov`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options


def merge_cov(
    parts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PART",
            help="The files that cache-cov --shard wrote.",
            show_default="those in DIR/MODEL/",
        ),
    ] = None,
    model: options.ModelOrNone = None,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Add up the parts that `cache-cov --shard` wrote, and write cov.h5.

    The result is what one cache-cov over the whole corpus would have written. Parts are refused
    if two overlap, if one is missing, or if they differ in anything but their documents.

    Examples:
      kscli merge-cov -m gpt2-xl
      kscli merge-cov node*/cov.shard-*-of-4.h5 -o cov.h5
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.layers import format_layers
    from kscli.places import Places
    from kscli.second_moment.merging import find_parts, merge_covariances, model_of

    reporter = ConsoleReporter(quiet=quiet)
    if parts:
        name = model or model_of(parts[0])
    else:
        name = model or options.DEFAULT_MODEL
        parts = find_parts(Places(directory, name).folder)
    path = output or Places(directory, name).path("cov")
    merged = merge_covariances(parts, path, force=force, reporter=reporter)
    reporter.note(
        f"wrote {path}: layers {format_layers(merged.layers)} over {merged.tokens:,} tokens of "
        f"{merged.documents:,} documents, from {len(merged.parts)} parts, which can be removed."
    )
