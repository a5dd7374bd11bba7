"""The sections on edits: what they would do, and what those that were made did."""

from __future__ import annotations

from collections.abc import Sequence

from kscli.editing.estimates import FEWEST_POINTS
from kscli.report.edit_findings import LEVERAGE, MOST_TOLD, of_run
from kscli.report.examined import Examined, ExaminedRun
from kscli.report.html import Html, join, tag
from kscli.report.pictures import Drawing, picture
from kscli.report.sections import Section
from kscli.report.tables import table
from kscli.report.words import layers_text
from kscli.tables import (
    EDITS,
    OUTCOMES,
    PREDICTORS,
    RISK_BY_LAYER,
    THEORY,
    WHERE,
    Column,
    Row,
    score_columns,
    score_rows,
)


def risk(examined: Examined) -> Section:
    """What editing the facts would do to the others, before any edit."""
    drawing = Drawing(
        "risk",
        "risk",
        "|P| with facts that are bound side by side, and beside it those whose edit would do most, "
        f"at {layers_text(examined.layers[:1])}.",
        most_bytes=400_000,
    )
    caption = (
        "What edits of all facts would do to the others, by layer, per unit of |δ|. The order: "
        f"what that of ascending {LEVERAGE} saves of the sum of p² over later and earlier edits, "
        "against the order in the file"
    )
    body = [
        picture(drawing, [examined.source(examined.layers[:1])], examined.key),
        table(examined.risk_rows, RISK_BY_LAYER, caption),
    ]
    return Section("risk", "Risk of edits", join(body))


def edits(examined: Examined) -> Section | None:
    """What the runs of edits that were made came to; None where there is none."""
    runs = examined.runs
    if not runs:
        return None
    told = len(runs) > MOST_TOLD
    of_each = [_edits_of(run, told=told) for run in runs]
    body = [*_figures(examined), *_run_tables(runs), *of_each]
    return Section("edits", "Edits that were made", join(body))


def _figures(examined: Examined) -> list[Html]:
    """The figures that the runs allow: single edits forget nothing, memit's predict nothing."""
    runs = examined.runs
    drawn = []
    if not all(run.is_single for run in runs):
        caption = (
            "What the model keeps of the edits and of what it knew, and how held-out text fares, "
            "over the edits made."
        )
        drawn.append(Drawing("forgetting", "forgetting", caption))
    if any(run.predicts for run in runs):
        caption = (
            "How far edits were predicted to move every fact's value, and how far the live model's "
            "moved; after the last edit of a sequence."
        )
        drawn.append(Drawing("interference", "interference", caption, most_bytes=300_000))
    files = [run.file for run in runs]
    return [picture(drawing, files, examined.key) for drawing in drawn]


def _run_tables(runs: Sequence[ExaminedRun]) -> list[Html]:
    rows = [{"run": run.name} | run.verification.row() for run in runs]
    predictions = [{"run": run.name} | each.row() for run in runs for each in run.predictions]
    scored = score_rows(rows)
    reached = [{"run": run.name} | run.where for run in runs if run.where["PS"] is not None]
    return [
        table(rows, (_RUN, *OUTCOMES), "What became of the edits"),
        table(scored, (_RUN, *score_columns(scored)), "The scores of the edits, before and after"),
        table(
            rows,
            (_RUN, *THEORY),
            "The theory: the worst errors of the predicted shifts, by the largest shift, and the "
            "exponents with which mean shifts grow with the number of edits. Exponents and rank "
            f"correlations are left out (–) below {FEWEST_POINTS} edits or batches",
        ),
        table(
            predictions,
            (_RUN, *PREDICTORS),
            "What predicts the damage to known facts: Spearman's correlation with the fall of the "
            "true target's log-probability, and ROC-AUC for answers that flipped",
        ),
        *(
            [table(reached, (_RUN, *WHERE), "Where to edit: what p foretold, and what came of it")]
            if reached
            else []
        ),
    ]


_RUN = Column("run")


def _edits_of(run: ExaminedRun, *, told: bool) -> Html:
    """A run's edits, to unfold, under what came of them where that is `told` here."""
    unfold = tag("summary", f"The edits of {run.name}")
    caption = f"The probability of each edit's new target, {run.name}"
    said = [tag("p", sentence) for sentence in of_run(run)] if told else []
    return tag("details", unfold, *said, table(_edit_rows(run), EDITS, caption))


def _edit_rows(run: ExaminedRun) -> list[Row]:
    return [
        {**edit, "prob_new_end": at_end}
        for edit, at_end in zip(run.file.objects(), run.probability_at_end(), strict=True)
    ]
