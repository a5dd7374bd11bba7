"""The sections on edits: what they would do, and what those that were made did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kscli.report.edit_findings import LEVERAGE, SIMILARITY_NAMES
from kscli.report.examined import Examined, ExaminedRun
from kscli.report.html import Html, join, tag
from kscli.report.pictures import Drawing, picture
from kscli.report.sections import Section
from kscli.report.tables import Row, exponents, intervals, numbers, shares, table, words
from kscli.report.words import fact_sentence, layers_text


def risk(examined: Examined) -> Section:
    """What editing the facts would do to the others, before any edit."""
    drawing = Drawing(
        "risk",
        "risk",
        "|P| with facts that are bound side by side, and beside it those whose edit would do most, "
        f"at {layers_text(examined.layers[:1])}.",
        most_bytes=400_000,
    )
    rows = [
        {
            **row,
            "pair": None if row["i"] is None else f"{row['subject_i']} → {row['subject_j']}",
            "verdict": _verdict(row),
        }
        for row in examined.risk_rows
    ]
    columns = [
        numbers("layer", digits=0),
        numbers("rms", "rms p", 3),
        numbers("largest", "largest |p|"),
        words("pair", "from → to", long=True),
        shares("harmful", "|p| > 0.25", 2),
        shares("saved", "the order saves"),
        words("verdict", "note"),
    ]
    caption = (
        "What edits of all facts would do to the others, by layer, per unit of |δ|. The order: "
        f"what that of ascending {LEVERAGE} saves of the sum of p² over later and earlier edits, "
        "against the order in the file"
    )
    body = [
        picture(drawing, [examined.source(examined.layers[:1])], examined.key),
        table(rows, columns, caption),
    ]
    return Section("risk", "Risk of edits", join(body))


def _verdict(row: Row) -> str | None:
    if not row["reaches"]:
        return "cannot reach the answer"
    return "least" if row["least"] else None


def edits(examined: Examined) -> Section | None:
    """What the runs of edits that were made came to; None where there is none."""
    runs = examined.runs
    if not runs:
        return None
    body = [*_figures(examined), *_run_tables(runs), *map(_edits_of, runs)]
    return Section("edits", "Edits that were made", join(body))


def _figures(examined: Examined) -> list[Html]:
    """The figures that the runs allow: single edits forget nothing, memit's predict nothing."""
    runs = examined.runs
    drawn = []
    if not all(run.is_single for run in runs):
        caption = "What the model keeps of the edits, and of what it knew, over the edits made."
        drawn.append(Drawing("forgetting", "forgetting", caption))
    if any(run.predicts for run in runs):
        caption = (
            "How far edits were predicted to move every fact's value, and moved it; after the last "
            "edit of a sequence."
        )
        drawn.append(Drawing("interference", "interference", caption, most_bytes=300_000))
    files = [run.file for run in runs]
    return [picture(drawing, files, examined.key) for drawing in drawn]


def _run_tables(runs: Sequence[ExaminedRun]) -> list[Html]:
    rows = [{"run": run.name} | _defined(run.verification.row()) for run in runs]
    predictions = [
        {"run": run.name, "by": SIMILARITY_NAMES[each.predictor]} | _defined(each.row())
        for run in runs
        for each in run.predictions
    ]
    return [
        table(rows, _OUTCOMES, "What became of the edits"),
        table(
            rows,
            _THEORY,
            "The theory: the worst errors of the predicted shifts, by the largest shift, and the "
            "exponents with which mean shifts grow with the number of edits",
        ),
        table(
            predictions,
            _PREDICTORS,
            "What foretells the damage to known facts: Spearman's correlation with the fall of the "
            "true target's log-probability, and ROC-AUC for answers that flipped",
        ),
    ]


_OUTCOMES = (
    words("run"),
    numbers("edits", digits=0),
    shares("efficacy", "at once", 0),
    shares("retention", "at the end", 0),
    numbers("known", "known facts", 0),
    shares("kept", "of them kept", 0),
    numbers("perplexity_before", "perplexity before"),
    numbers("perplexity_after", "after"),
    numbers("weight_change", "|Wₙ \N{MINUS SIGN} W₀|", 1),
)
_THEORY = (
    words("run"),
    exponents("linear_error", "error"),
    exponents("live_error", "in the live model"),
    intervals("exponent_original", "exponent, original facts", 2),
    intervals("walk_original", "of a random walk", 2),
    intervals("exponent_edited", "edited facts", 2),
    intervals("walk_edited", "of a random walk", 2),
    intervals("by_age", "edit number and shift", 2),
)
_PREDICTORS = (
    words("run"),
    words("by"),
    intervals("spearman", "Spearman", 2),
    intervals("auc", "AUC", 2),
    numbers("flips", digits=0),
    intervals("spearman_distinct", "other tokens: Spearman", 2),
    intervals("auc_distinct", "AUC", 2),
    numbers("flips_distinct", "flips", 0),
)
_EDITS = (
    numbers("edit", digits=0),
    words("fact", long=True),
    words("target_new", "new target"),
    shares("prob_new_before", "before"),
    shares("prob_new_after", "right after"),
    shares("prob_new_end", "at the end"),
    numbers("delta_norm", "|δ|", 1),
    numbers("p_max_other", "largest p to another"),
)


def _edits_of(run: ExaminedRun) -> Html:
    """A run's edits, to unfold."""
    unfold = tag("summary", f"The edits of {run.name}")
    caption = f"The probability of each edit's new target, {run.name}"
    return tag("details", unfold, table(_edit_rows(run), _EDITS, caption))


def _edit_rows(run: ExaminedRun) -> list[Row]:
    facts = run.file.facts
    return [
        _defined({**edit, "fact": fact_sentence(facts[edit["fact"]]), "prob_new_end": at_end})
        for edit, at_end in zip(run.file.objects(), run.probability_at_end(), strict=True)
    ]


def _defined(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose numbers are NaN where they were None."""
    return {name: float("nan") if value is None else value for name, value in row.items()}
