"""`kscli report`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.cli import options
from kscli.cli.output import Format, print_paths

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile
    from kscli.editing.edits_file import EditsFile
    from kscli.reporter import Reporter


def report(
    model: options.Models = None,
    editor: options.EditorOfP = None,
    pmatrix: options.PMatrices = None,
    directory: options.Dir = Path("artifacts"),
    output: options.PageOutput = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Write one HTML page about a model's P, and print the path of the page.

    The page has findings in sentences, every figure, tables that can be sorted, and where the
    numbers come from. It is one file and loads nothing from elsewhere. Several models are compared
    at its beginning. The command reads pmatrix.h5 and, from the same folder, stats.h5, cov.h5 and
    the runs of edits if they belong to it. It loads no model. A page that is up to date is kept,
    and one whose inputs have changed is made again; --force replaces any other file.

    Examples:
      kscli report -m gpt2-small
      kscli report -m gpt2-small -m gpt2-medium -m gpt2-large -o scaling.html
      kscli report --pmatrix other-text/pmatrix.h5 -o other-text.html
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import open_pmatrices, pmatrix_paths
    from kscli.cli.stderr import say_at_once

    if not quiet:
        say_at_once("kscli report begins: Matplotlib and SciPy are loaded.")
    from kscli.report.page import ModelFiles, write_report
    from kscli.secrets import command_line

    reporter = ConsoleReporter(quiet=quiet)
    with ExitStack() as stack:
        opened = open_pmatrices(pmatrix_paths(model, pmatrix, directory, editor), stack)
        files = [ModelFiles(file, open_runs_of(file, stack, reporter)) for file in opened]
        folder = opened[0].path.parent if len(opened) == 1 else directory
        path = output or folder / (f"report-{editor}.html" if editor else "report.html")
        write_report(
            files,
            path,
            seed=seed,
            command=command_line(),
            force=force,
            reporter=reporter,
        )
    print_paths([path], output_format)


def open_runs_of(file: PMatrixFile, stack: ExitStack, reporter: Reporter) -> list[EditsFile]:
    """Open the runs of edits beside a pmatrix file that were predicted from it."""
    from kscli.cli.remedies import listed
    from kscli.cli.requests import open_runs, runs_in
    from kscli.errors import ArtifactError

    if file.about.editor:
        return []  # runs are predicted from the paper's P and from their own directions
    made_with, others = [], []
    for path in runs_in(file.path.parent):
        try:
            (run,) = open_runs([path], stack)
        except ArtifactError as error:
            reporter.warn(f"left out: {error}")
            continue
        if run.about.inputs.get("pmatrix") == file.fingerprint:
            made_with.append(run)
        else:
            others.append(path.name)
    if others:
        reporter.warn(
            f"left out: {listed(others)}, predicted from another {file.path.name}, as every run of "
            "--prompt is; `kscli verify` tests them."
        )
    return made_with
