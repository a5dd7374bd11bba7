"""What a person is told beside a table: what p and its columns mean, what is high, what is next.

All of it are notes on stderr: `--quiet` leaves them out, and so does a format for machines.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kscli.cli.output import Format
from kscli.cli.remedies import command_for, listed
from kscli.models.aliases import classify
from kscli.reporter import SILENT, Reporter
from kscli.tables import Column, Row, has_intervals, shown

P_MEANS = (
    "p(i, j): how much of what an edit writes into fact i reaches fact j; 0 is nothing, 1 is all, "
    "below 0 the opposite. What p moves is the value that the layer adds; the answer may survive "
    "it, even where p is 1."
)
# The first and the last layer; the authors' run of 100,000 articles, and `kscli guide reproduce`.
KURTOSIS_ELSEWHERE = (
    "GPT-2 small has 72.7 at its first layer and 7.8 at its last (the paper's authors), "
    "SmolLM2-135M 47.5 and 5.1, a Gaussian 0."
)


def explainer(reporter: Reporter, output_format: Format) -> Reporter:
    """The reporter of explanations: nobody reads them beside a format for machines."""
    return reporter if output_format is Format.table else SILENT


def explain_columns(columns: Sequence[Column], rows: Sequence[Row], reporter: Reporter) -> None:
    """Say what p is, and what the columns of a table are whose headings do not say it."""
    reporter.note(P_MEANS)
    name_columns(columns, rows, reporter)
    if has_intervals(shown(columns, rows), rows):
        reporter.note("In brackets: 95 % intervals from resampled facts.")


def name_columns(columns: Sequence[Column], rows: Sequence[Row], reporter: Reporter) -> None:
    """Say what the columns of a table are whose headings do not say it."""
    for column in shown(columns, rows):
        if column.meaning:
            reporter.note(f"{column.title}: {column.meaning}")


def compare_kurtosis(rows: Sequence[Row], reporter: Reporter) -> None:
    """Say where the kurtosis is largest and least, and what it is in models that were measured.

    Nothing of it is said of so few facts that there is no distribution.
    """
    from kscli.analysis.few_facts import FEWEST_FACTS

    if any(row["m"] < FEWEST_FACTS for row in rows):
        return
    by_kurtosis = sorted(
        (row for row in rows if row["kurtosis"] == row["kurtosis"]), key=lambda row: row["kurtosis"]
    )
    if by_kurtosis:
        least, most = by_kurtosis[0], by_kurtosis[-1]
        here = f"The kurtosis here is {most['kurtosis']:.1f} at layer {most['layer']}"
        if least is not most:
            here += f" and {least['kurtosis']:.1f} at layer {least['layer']}"
        reporter.note(f"{here}; {KURTOSIS_ELSEWHERE}")


def suggest_verify(run: Path, reporter: Reporter) -> None:
    """Say how to test a run of edits."""
    command = shlex.join(["kscli", "verify", str(run)])
    reporter.note(f"Next: `{command}` (whether what was predicted of the edits came true).")


def fact_to_edit(model: str, subjects: Sequence[str], strongest: str) -> str:
    """The subject that is proposed for an edit: that of the strongest pair.

    The embedded model takes no edit of its strongest pair, but one of `TAKEN_BY_TINY`.
    """
    embedded = classify(model) == "embedded"
    return TAKEN_BY_TINY if embedded and TAKEN_BY_TINY in subjects else strongest


def suggest_check(model: str, edited: Path, directory: Path, reporter: Reporter) -> None:
    """Say what can be asked of an edited model that was saved."""
    check = command_for("facts check", str(edited), directory)
    trace = command_for("trace", model, directory, str(edited), named=False)
    reporter.note(
        f"Of the saved model: {listed([f'{check} (what it knows now)', f'{trace} (its edits)'])}."
    )


class Step(NamedTuple):
    """A command that may come next, `what` it shows, and what stands behind its --model."""

    verb: str
    what: str
    more: tuple[str, ...] = ()


def suggest(
    steps: Sequence[Step],
    model: str,
    directory: Path,
    reporter: Reporter,
    fact: str | None = None,
) -> None:
    """Say which commands come next, each with what it shows; of a fact where one is named."""
    words = []
    for verb, what, more in steps:
        of_fact = ("--fact", fact) if fact and not more and verb in ("risk", "edit") else ()
        words.append(f"{command_for(verb, model, directory, *of_fact, *more)} {what}")
    reporter.note(f"Next: {listed(words)}.")


# The embedded model takes an edit of its capital, and North Korea's moves with it.
TAKEN_BY_TINY = "South Korea"
REPORT = Step("report", "(all figures and findings on one page)")
RISK = Step("risk", "(what an edit of it would move)")
EDIT = Step("edit", "(edit it in a copy of the model, and see what it moved)")
EDIT_OWN = Step(
    "edit",
    "(edit a fact of your own in a copy of the model, and see what it moved)",
    ("--prompt", "The capital of {} is", "--subject", TAKEN_BY_TINY, "--target-new", "Rome"),
)
TOPK = Step("topk", "(the pairs of facts that are bound)")
