"""`kscli verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_rows
from kscli.tables import (
    OUTCOMES,
    PREDICTORS,
    RUN,
    THEORY,
    WHERE,
    Column,
    Row,
    has_intervals,
    score_columns,
    score_rows,
)

if TYPE_CHECKING:
    from kscli.analysis.resampling import Resampling
    from kscli.editing.edits_file import EditsFile
    from kscli.editing.where import Points
    from kscli.reporter import Reporter


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
            "--predictors", help="Compare p with other predictors of the answers that edits break."
        ),
    ] = False,
    where: Annotated[
        bool,
        typer.Option(
            "--where", help="Compare what p foretold of layers and facts with what edits did."
        ),
    ] = False,
    repeats: options.Repeats = 1000,
    seed: options.Seed = 0,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Compare what was predicted of edits with what happened.

    Reads edits/*.h5 and loads no model. The columns, from left to right:

    "at once": the share of edits right after which the first token of the new target was the
    model's first choice. "at the end": the same share after the last edit. "known facts kept": of
    the facts that the model knew and that were not edited, the share with the same answer as
    before. "protected": the same of those that --protect names. "paraphrased": the same of the
    paraphrases of such facts that the model completed before. "KL": the divergence of the next
    token of held-out text from what the clean model says, in nats. "all text": the mean square of
    what the edits add to the values of the corpus, as a share of that of the values themselves.

    ES, PS, NS, S, GE, RS, "reliability", "generalisation", "locality" and "portability" are the
    scores of the field (`kscli guide edits` defines them). "says it": the share of edits whose new
    target the model says first when it generates freely.

    "error": the largest error of a predicted shift, divided by the largest predicted shift, in
    float64. "live": the same in the live model. "exponent": the mean shift grows as (number of
    edits) to this power. 1 is linear growth, and a random walk is near 0.5. "of a random walk" is
    the exponent of a random walk with the same p. "edit number and shift" is a rank correlation.
    Below 0, facts that were edited early have moved further.

    With --predictors: how well p, and other similarities of facts, predict the damage to the facts
    that the model knew. "Spearman" is the rank correlation with the fall of the true target's
    log-probability. "AUC" is the area under the ROC curve for answers that flipped. It needs at
    least 10 flips.

    With --where: is p right about where to edit? At each layer, and over all of them, the rank
    correlation of p to a fact's own paraphrases with PS, and of the rms of p to the other facts
    with NS and with the share of known facts whose answer flips (--protocol single).

    The 95 % intervals draw facts again. With --predictors they draw edits again, or the measured
    passes of a sequence.

    Examples:
      kscli verify -m gpt2-small
      kscli verify -m gpt2-small --predictors
      kscli verify -m gpt2-small --where
      kscli verify artifacts/gpt-j/edits/rome-5-0.h5 artifacts/gpt-j/edits/memit-3-8-0.h5 -f csv
      kscli verify -m gpt-j --predictors -f json | jq '.[] | {layers, predictor, auc, flips}'
    """
    from kscli.analysis.resampling import Resampling
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.explaining import explainer
    from kscli.cli.requests import run_paths
    from kscli.editing.edit_arrays import read_arrays
    from kscli.editing.edits_file import EditsFile
    from kscli.editing.predictors import predict_behaviour
    from kscli.editing.verification import verify as verify_run
    from kscli.editing.where import points_of
    from kscli.errors import UsageError

    if where and predictors:
        raise UsageError("--predictors and --where are two tables; ask for one.")
    reporter = ConsoleReporter(quiet=quiet)
    resampling = Resampling(repeats, seed)
    points: list[tuple[dict[str, Any], Points]] = []
    rows: list[dict[str, Any]] = []
    for path in run_paths(model, files, directory):
        with EditsFile(path) as file:
            named, run = run_row(file), read_arrays(file)
        if where:
            points.append((named, points_of(run)))
        elif predictors:
            found = predict_behaviour(run, resampling, reporter=reporter)
            rows += [named | prediction.row() for prediction in found]
        else:
            rows.append(named | verify_run(run, resampling).row())
    if where:
        print_where(points, resampling, output_format)
        return
    print_runs(rows, output_format, explainer(reporter, output_format), predictors=predictors)


MOST_SPARE = 9  # such a column is left out before others
ALIKE = ("model", "method", "protocol", "value", "order", "seed")


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


def print_where(
    points: Sequence[tuple[dict[str, Any], Points]],
    resampling: Resampling,
    output_format: Format,
) -> None:
    """Print what was foretold of each layer, and of all layers of runs that are else alike."""
    from kscli.editing.where import together
    from kscli.layers import format_layers

    alike: dict[tuple[Any, ...], list[tuple[dict[str, Any], Points]]] = {}
    for named, found in points:
        alike.setdefault(tuple(named[name] for name in ALIKE), []).append((named, found))
    rows = []
    for group in alike.values():
        group.sort(key=lambda each: each[0]["layers"])
        rows += [named | found.row(resampling) for named, found in group]
        if len({tuple(named["layers"]) for named, _ in group}) > 1:
            layers = sorted({layer for named, _ in group for layer in named["layers"]})
            pooled = together([found for _, found in group])
            rows.append(group[0][0] | {"path": None, "layers": layers} | pooled.row(resampling))
    if output_format is not Format.json:
        rows = [{**row, "layers": format_layers(row["layers"])} for row in rows]
    title = "Where to edit: what p foretold and what came of it; 95 % intervals"
    print_rows(rows, [*RUN, *WHERE], output_format, title)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path its last parts, as few as tell all paths apart."""
    parts = {path: Path(path).parts for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: str(Path(*own[-count:])) for path, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def print_runs(
    rows: Sequence[Row], output_format: Format, told: Reporter, *, predictors: bool
) -> None:
    """Print runs, or with `predictors` what was predicted of each; `told` is what columns are."""
    from kscli.cli.explaining import name_columns
    from kscli.editing.estimates import FEWEST_POINTS
    from kscli.layers import format_layers

    if output_format is not Format.json:
        rows = [{**row, "layers": format_layers(row["layers"])} for row in rows]
    if output_format in FOR_MACHINES:
        print_rows(rows, [], output_format)
        return
    names = [*RUN]
    told_apart = {tuple(row[column.key] for column in RUN) for row in rows}
    if len(told_apart) < len({row["path"] for row in rows}):
        file_of = short_names([row["path"] for row in rows])
        rows = [{**row, "file": file_of[row["path"]]} for row in rows]
        # The file's name tells what the other names do.
        names = [Column("file"), *(replace(column, spare=MOST_SPARE) for column in RUN)]
    if predictors:
        title = "What predicts the damage to known facts; 95 % intervals"
        print_rows(rows, [*names, *PREDICTORS], output_format, title)
        name_columns(PREDICTORS, rows, told)
        return
    title = "What became of the edits"
    print_rows(rows, [*names, *OUTCOMES], output_format, title)
    scored = score_rows(rows)
    if len(columns := score_columns(scored)) > 1:
        title = "The scores of the edits"
        if has_intervals(columns, scored):
            title += "; 95 % intervals from resampled edits"
        print_rows(scored, [*names, *columns], output_format, title, further=True)
    title = "The theory: errors of predicted shifts, and how they grow"
    if has_intervals(THEORY, rows):
        title += "; 95 % intervals"
    print_rows(rows, [*names, *THEORY], output_format, title, further=True)
    name_columns(OUTCOMES, rows, told)
    if len(columns) > 1:
        told.note("The scores are those of the field; `kscli guide edits` defines them.")
    name_columns(THEORY, rows, told)
    told.note(
        f"-: not measured, or not defined; exponents and rank correlations need {FEWEST_POINTS} "
        "points: edits, or batches of them."
    )
