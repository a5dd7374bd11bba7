"""`kscli export-cov`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kscli.cli import options

if TYPE_CHECKING:
    from kscli.editing.metrics import Cut
    from kscli.reporter import Reporter


def export_cov(
    context: typer.Context,
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
    projection: Annotated[
        bool,
        typer.Option(
            "--projection",
            help="(alphaedit, easyedit) Write null_space_project.pt instead: AlphaEdit's "
            "projections of the layers of --layers, in the order of their numbers.",
        ),
    ] = False,
    null_space: options.NullSpace = None,
    relative_null_space: options.RelativeNullSpace = None,
    note: options.Note = None,
    directory: options.Dir = Path("artifacts"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write cov.h5 as the .npz files that ROME, MEMIT, EasyEdit or AlphaEdit looks for.

    There is one file for each layer. Its name is the one that the editor looks for with its
    default hyper-parameters. `kscli guide covariances` says which editors read C at all:
    EasyEdit's ROME and R-ROME do so only with mom2_adjustment: true.

    With --projection there is one file for all layers: a float32 tensor (layers, d_m, d_m). Its
    matrices project on the null space of C, as --null-space or --relative-null-space cuts it.
    AlphaEdit's code takes the i-th matrix for the i-th of its layers, so --layers names these.

    Examples:
      kscli export-cov -m gpt-j --for memit -o memit/data/stats
      kscli export-cov -m llama3-8b --for easyedit --as ./hugging_cache/llama-3-8b -o data/stats
      kscli export-cov --cov other/cov.h5 --for rome --layers 17 -o rome/data/stats
      kscli export-cov -m gpt-j --for alphaedit --projection --layers 3-8 -o AlphaEdit
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import refuse_given
    from kscli.editing.null_space import null_space_cut
    from kscli.places import Places
    from kscli.second_moment.interchange import SAMPLE_SIZE, ExportOptions, export_covariance

    reporter = ConsoleReporter(quiet=quiet)
    cov_path = cov or Places(directory, model or options.DEFAULT_MODEL).path("cov")
    if projection:
        refuse_given(context, ("known_as", "note"), "with --projection")
        cut = null_space_cut(null_space, relative_null_space)
        _write_projection(editor, cov_path, stats_dir, layers, cut, force, reporter)
        return
    refuse_given(context, ("null_space", "relative_null_space"), "without --projection")
    paths = export_covariance(
        cov_path,
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


def _write_projection(
    editor: str,
    cov_path: Path,
    folder: Path,
    layers: str,
    cut: Cut,
    force: bool,
    reporter: Reporter,
) -> None:
    from kscli.editing.projection import export_projection
    from kscli.errors import UsageError

    if editor not in ("alphaedit", "easyedit"):
        raise UsageError(f"--projection is of AlphaEdit, not of {editor}; give --for alphaedit.")
    if layers == "all":
        raise UsageError(
            "--projection needs --layers with the layers that AlphaEdit edits, as in --layers 4-8: "
            "its code takes the i-th matrix for the i-th of them."
        )
    path, written = export_projection(cov_path, folder, layers, cut, force=force, reporter=reporter)
    reporter.note(f"wrote {path} of layers {', '.join(map(str, written))}, in this order.")
