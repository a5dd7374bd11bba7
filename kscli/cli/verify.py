"""`kscli verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import Column, Format, Row, field, print_rows

if TYPE_CHECKING:
    from kscli.editing.edits_file import EditsFile


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("verify")(verify)


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Runs of edits, instead of all of -m."),
    ] = None,
    model: options.ModelOrNone = None,
    predictors: Annotated[
        bool,
        typer.Option(
            "--predictors", help="How well p tells what becomes of facts, and what else does."
        ),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what intervals resample.")] = 0,
    directory: options.Dir = Path("artifacts"),
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Say what runs of edits came to, and how far what was predicted of them held.

    A row a run: the share of edits that were said right after they were made (efficacy) and at
    the end (retention), of known facts that were not edited and are still answered (kept),
    perplexity, the largest error of the linear prediction, and the exponents in n of the mean
    shift of original and edited facts: 1 accumulates linearly, 1/2 is a random walk. age: the rank
    correlation of an edit's number and its fact's shift by later edits.

    With --predictors a row a run and predictor: the rank correlation of the predicted shift and
    the fall of the fact's log-probability, and the ROC-AUC for a known fact's answer flipping
    (undefined below 10 flips); for p, cosines of keys, of whitened keys and of gradients, and p of
    permuted facts. distinct: without facts whose subject ends in an edited one's last token.

    [bold]Examples[/bold]

      kscli verify -m gpt2-small

      kscli verify -m gpt2-small --predictors -f json | jq '.[] | {layers, predictor, auc}'

      kscli verify artifacts/gpt-j/edits/rome-5-*.h5 -f markdown
    """
    from contextlib import ExitStack

    from kscli.editing.edits_file import EditsFile

    paths = files or edit_runs(model or options.DEFAULT_MODEL, directory)
    with ExitStack() as stack:
        opened = [stack.enter_context(EditsFile(path)) for path in paths]
        if predictors:
            rows = [row for file in opened for row in predictor_rows(file, seed)]
            print_rows(rows, predictor_columns(rows), output_format)
        else:
            rows = [run_row(file, seed) for file in opened]
            print_rows(rows, run_columns(rows), output_format)


def edit_runs(model: str, directory: Path) -> list[Path]:
    """A model's runs of edits; raises ArtifactError where there is none."""
    from kscli.errors import ArtifactError
    from kscli.pipeline import Places

    folder = Places(directory, model).folder / "edits"
    found = sorted(folder.glob("*.h5"))
    if not found:
        raise ArtifactError(
            f"{folder} holds no run of edits; `kscli edit --model {model} --layer 0` makes one."
        )
    return found


def run_row(file: EditsFile, seed: int) -> dict[str, Any]:
    """A run as a flat record."""
    from kscli.editing.verification import REPEATS, Estimate, growth, outcome
    from kscli.resampling import Resampling

    grown = growth(file, Resampling(REPEATS, seed))
    undefined = Estimate(float("nan"))
    return {
        "path": str(file.path),
        **outcome(file),
        **(grown.original if grown else undefined).fields("exponent_original"),
        **(grown.edited if grown else undefined).fields("exponent_edited"),
        **(grown.by_age if grown else undefined).fields("by_age"),
    }


def run_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """The columns for people."""
    return [
        *_names(rows),
        field("edits", spec="d"),
        field("efficacy", spec=".0%"),
        field("retention", spec=".0%"),
        Column("kept of known", _kept, right=True),
        Column("perplexity", _perplexity, right=True),
        field("linear_error", "error", spec=".0e"),
        field("live_error", "live", spec=".0e"),
        Column("exponent original", lambda row: _interval(row, "exponent_original")),
        Column("edited", lambda row: _interval(row, "exponent_edited")),
        Column("age", lambda row: _interval(row, "by_age")),
    ]


def predictor_rows(file: EditsFile, seed: int) -> Iterator[dict[str, Any]]:
    """A flat record for every predictor, with all pairs and with those of distinct tokens."""
    from kscli.editing.verification import REPEATS, scores
    from kscli.resampling import Resampling

    for score in scores(file, Resampling(REPEATS, seed)):
        yield {
            "path": str(file.path),
            "model": file.model,
            "method": file.attributes["method"],
            "layers": list(file.layers),
            "protocol": file.attributes["protocol"],
            "predictor": score.predictor,
            "distinct_token": score.distinct_token,
            "observations": score.observations,
            **score.spearman.fields("spearman"),
            "flips": score.flips,
            **score.auc.fields("auc"),
        }


def predictor_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """The columns for people."""
    return [
        *_names(rows),
        field("predictor"),
        Column("pairs", lambda row: "distinct" if row["distinct_token"] else "all"),
        field("observations", "n", spec=",d"),
        Column("Spearman", lambda row: _interval(row, "spearman")),
        field("flips", spec="d"),
        Column("AUC", lambda row: _interval(row, "auc")),
    ]


def _names(rows: list[dict[str, Any]]) -> list[Column]:
    from kscli.layers import format_layers

    models = len({row["model"] for row in rows}) > 1
    return [
        *([field("model")] if models else []),
        field("method"),
        Column("layer", lambda row: format_layers(row["layers"]), right=True),
        field("protocol"),
    ]


def _kept(row: Row) -> str:
    return "-" if row["kept"] != row["kept"] else f"{row['kept']:.0%} of {row['known']}"


def _perplexity(row: Row) -> str:
    before, after = row["perplexity_before"], row["perplexity_after"]
    return "-" if before != before else f"{before:.1f} → {after:.1f}"


def _interval(row: Row, name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if value != value:
        return "-"
    return f"{value:.2f}" if low != low else f"{value:.2f} [{low:.2f}, {high:.2f}]"
