"""`kscli verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_rows
from kscli.tables import OUTCOMES, PREDICTORS, RUN, THEORY, Column, Row

if TYPE_CHECKING:
    from kscli.editing.edits_file import EditsFile


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Files of `kscli edit`.",
            show_default="DIR/MODEL/edits/*.h5",
        ),
    ] = None,
    model: options.Models = None,
    predictors: Annotated[
        bool,
        typer.Option(
            "--predictors", help="What foretells the answers that edits break: p, or another?"
        ),
    ] = False,
    repeats: options.Repeats = 1000,
    seed: options.Seed = 0,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Test the theory on the edits that were made: what was predicted against what came of it.

    What became of the edits: the share whose new target's first token was the model's first choice
    at once, and still is after the last edit; the share of the facts that the model knew, and that
    were not edited, with the same answer; perplexity. Of the theory: the worst error of the
    predicted shifts of values, by the largest one, in float64 and in the live model; the exponents
    with which the mean shifts of original and of edited facts grow with the number of edits (1:
    they accumulate linearly; a random walk is near 0.5, and what it would be with these very p is
    beside it); and the rank correlation of an edit's number and the shift of its fact (below 0:
    earlier edits are changed more).

    With --predictors: how the predicted damage orders the known facts, against other similarities
    of the same facts, by Spearman's correlation with the fall of the true target's log-probability,
    and by ROC-AUC for the answers that flipped (none below 10). 95 % intervals draw facts again, or
    with --predictors edits (of a sequence: measured passes). Reads edits/*.h5; loads no model.

    Examples:
      kscli verify -m gpt2-small
      kscli verify -m gpt2-small --predictors
      kscli verify artifacts/gpt-j/edits/rome-5-0.h5 artifacts/gpt-j/edits/memit-3-8-0.h5 -f csv
      kscli verify -m gpt-j --predictors -f json | jq '.[] | {layers, predictor, auc, flips}'
    """
    from kscli.analysis.resampling import Resampling
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import run_paths
    from kscli.editing.edit_arrays import read_arrays
    from kscli.editing.edits_file import EditsFile
    from kscli.editing.predictors import predict_behaviour
    from kscli.editing.verification import verify as verify_run

    reporter = ConsoleReporter(quiet=quiet)
    resampling = Resampling(repeats, seed)
    rows: list[dict[str, Any]] = []
    for path in run_paths(model, files, directory):
        with EditsFile(path) as file:
            named, run = run_row(file), read_arrays(file)
        if predictors:
            found = predict_behaviour(run, resampling, reporter=reporter)
            rows += [named | prediction.row() for prediction in found]
        else:
            rows.append(named | verify_run(run, resampling).row())
    print_runs(rows, output_format, predictors=predictors)


def run_row(file: EditsFile) -> dict[str, Any]:
    """What a run is called, as fields."""
    return {
        "path": str(file.path),
        "model": file.model,
        "layers": list(file.layers),
        "method": file.about.method,
        "protocol": file.about.protocol,
        "value": file.about.value,
        "order": file.about.order,
        "seed": file.about.seed,
    }


def print_runs(rows: Sequence[Row], output_format: Format, *, predictors: bool) -> None:
    """Print runs, or with `predictors` what was predicted of each."""
    from kscli.layers import format_layers

    if output_format is not Format.json:
        rows = [{**row, "layers": format_layers(row["layers"])} for row in rows]
    if output_format in FOR_MACHINES:
        print_rows(rows, [], output_format)
        return
    names = [*RUN]
    told_apart = {tuple(row[column.key] for column in RUN) for row in rows}
    if len(told_apart) < len({row["path"] for row in rows}):
        names.append(Column("path"))
    if predictors:
        title = "What foretells the damage to known facts; 95 % intervals"
        print_rows(rows, [*names, *PREDICTORS], output_format, title)
        return
    title = "What became of the edits"
    print_rows(rows, [*names, *OUTCOMES], output_format, title)
    title = "The theory: errors of predicted shifts, and how they grow; 95 % intervals"
    print_rows(rows, [*names, *THEORY], output_format, title, further=True)
