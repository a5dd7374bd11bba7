"""`kscli verify`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import Column, Format, Row, field, print_rows
from kscli.cli.stats import FOR_MACHINES, head_table

if TYPE_CHECKING:
    from kscli.editing.edits_file import EditsFile

NAMES = {
    "p": "p",
    "whitened_cosine": "whitened cosine",
    "cosine": "cosine of keys",
    "gradient_cosine": "cosine of gradients",
    "permuted_p": "p of permuted facts",
}
# What tells runs apart beside method and layers, shown where it varies.
_TELLING = ("model", "protocol", "value", "order", "seed")


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
    from kscli.editing.edits_file import EditsFile
    from kscli.editing.predictors import predict_behaviour
    from kscli.editing.run_arrays import read_arrays
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
    attributes = file.attributes
    return {
        "path": str(file.path),
        "model": file.model,
        "layers": list(file.layers),
        **{name: attributes[name] for name in ("method", "protocol", "value", "order", "seed")},
    }


def print_runs(rows: Sequence[Row], output_format: Format, *, predictors: bool) -> None:
    """Print runs, or with `predictors` what was predicted of each."""
    from kscli.layers import format_layers

    if output_format is not Format.json:
        rows = [{**row, "layers": format_layers(row["layers"])} for row in rows]
    if output_format in FOR_MACHINES:
        print_rows(rows, [], output_format)
        return
    names = name_columns(rows)
    if predictors:
        title = "What foretells the damage to known facts; 95 % intervals"
        print_rows(rows, [*names, *predictor_columns()], output_format, title)
        return
    title = "What became of the edits"
    print_rows(rows, [*names, *outcome_columns()], output_format, title)
    title = "The theory: errors of predicted shifts, and how they grow; 95 % intervals"
    head_table(title, output_format)
    print_rows(rows, [*names, *theory_columns()], output_format, title)


def name_columns(rows: Sequence[Row]) -> list[Column]:
    """What runs are called: method and layers, and what else varies."""
    telling = [name for name in _TELLING if len({row[name] for row in rows}) > 1]
    shown = ["method", "layers", *telling]
    files = {row["path"] for row in rows}
    if len({tuple(row[name] for name in shown) for row in rows}) < len(files):
        shown.append("path")
    return [field(name) for name in sorted(shown, key=["model", *shown].index)]


def outcome_columns() -> list[Column]:
    """What became of the edits."""
    return [
        field("edits", spec="d"),
        Column("at once", lambda row: _percent(row["efficacy"]), right=True),
        Column("at the end", lambda row: _percent(row["retention"]), right=True),
        Column("known facts kept", _kept, right=True),
        Column("perplexity", _perplexity, right=True),
        field("weight_change", "|W_n - W_0|", spec=".3g"),
    ]


def theory_columns() -> list[Column]:
    """How the linear theory fared."""
    return [
        field("linear_error", "error", spec=".0e"),
        field("live_error", "live", spec=".0e"),
        estimate_column("exponent_original", "exponent, original facts"),
        estimate_column("walk_original", "of a random walk"),
        estimate_column("exponent_edited", "edited facts"),
        estimate_column("walk_edited", "of a random walk"),
        estimate_column("by_age", "edit number and shift"),
    ]


def predictor_columns() -> list[Column]:
    """How predictors fared on behaviour."""
    return [
        Column("predictor", lambda row: NAMES[row["predictor"]]),
        estimate_column("spearman", "Spearman"),
        estimate_column("auc", "AUC"),
        field("flips", spec="d"),
        estimate_column("spearman_distinct", "distinct tokens: Spearman"),
        estimate_column("auc_distinct", "AUC"),
        field("flips_distinct", "flips", spec="d"),
    ]


def estimate_column(name: str, title: str) -> Column:
    """A column of a statistic with its interval: `0.61 [0.48, 0.70]`; `-` where undefined."""

    def cell(row: Row) -> str:
        value, low, high = (row[name + end] for end in ("", "_low", "_high"))
        if value is None:
            return "-"
        return f"{value:z.2f}" + ("" if low is None else f" [{low:z.2f}, {high:z.2f}]")

    return Column(title, cell, right=True)


def _kept(row: Row) -> str:
    kept = row["kept"]
    return "-" if kept is None else f"{_percent(kept)} of {row['known']}"


def _percent(value: float | None) -> str:
    """A share; only all of it is 100 %."""
    if value is None:
        return "-"
    return f"{value:.0%}" if value == 1 or value < 0.995 else f"{math.floor(1000 * value) / 10}%"


def _perplexity(row: Row) -> str:
    before, after = row["perplexity_before"], row["perplexity_after"]
    return "-" if None in (before, after) else f"{before:.4g} → {after:.4g}"
