"""What edits would do, and what those that were made did, in sentences made from the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kscli.editing.estimates import Estimate
from kscli.editing.predictors import FEWEST_FLIPS, NULL
from kscli.report.examined import Examined, ExaminedRun
from kscli.report.words import (
    counted,
    listed,
    magnitude,
    number,
    quoted,
    share,
    with_interval,
)
from kscli.scores import HARMONIC

SIMILARITY_NAMES = {
    "p": "p",
    "editor_p": "p of the editor",
    "whitened_cosine": "the whitened cosine",
    "cosine": "the cosine of the keys",
    "gradient_cosine": "the cosine of the gradients",
    "hidden_cosine": "the cosine of the hidden states",
    NULL: "p of facts exchanged at random",
}
LEVERAGE = "kᵀC⁻¹k"
MOST_TOLD = 3  # runs of which the findings tell everything


def risk(examined: Examined) -> list[str]:
    """At which layer editing the facts would do the least and the most, and what an order saves."""
    able = [row for row in examined.risk_rows if row["reaches"]]
    if not able:
        return ["No layer that there is can change these facts' answers."]
    if any(math.isnan(row["rms"]) for row in able):
        return ["All facts are copies of one, so an edit has no other to move."]
    least = min(able, key=lambda row: row["rms"])
    most = max(able, key=lambda row: row["rms"])
    sentences = [
        "An edit that writes a shift of length 1 for one of these facts moves another by "
        f"{number(least['rms'], 3)} in root mean square at layer {least['layer']}"
        + (
            f", where it does the least, and by {number(most['rms'], 3)} at layer {most['layer']}, "
            "where it does the most of the layers that reach the answer."
            if least is not most
            else "."
        )
    ]
    chosen = next((row for row in able if row["chosen"]), None)
    if chosen:
        sentences.append(
            f"p to a fact's own paraphrases, {number(chosen['paraphrase_p'], 2)} in the median at "
            f"layer {chosen['layer']}, says how far an edit generalises. There an edit that moves "
            f"the paraphrases by 1 moves other facts by {number(chosen['ratio'], 3)}, the least of "
            "the layers that reach the answer: by this rule it is the layer to edit."
        )
    if examined.file.about.editor:
        return sentences  # that no order saves more is proved of the paper's P
    saved = [share(end(row["saved"] for row in able)) for end in (min, max)]
    between = saved[0] if saved[0] == saved[1] else f"{saved[0]} to {saved[1]}, by layer,"
    sentences.append(
        f"Of edits of all of them, one upon the other, the order of ascending {LEVERAGE} saves "
        f"{between} of the sum of p² over later and earlier edits; no order saves more."
    )
    return sentences


def edits(examined: Examined) -> list[str]:
    """What came of each run; of many, between what all of them are."""
    runs = examined.runs
    if len(runs) > MOST_TOLD:
        return [
            f"{len(runs)} runs of edits were made; what came of each stands with its edits below.",
            *_ranges(runs),
        ]
    return [sentence for run in runs for sentence in of_run(run)]


def of_run(run: ExaminedRun) -> list[str]:
    """What became of the edits, how far the theory held, what foretold the damage."""
    return [
        sentence
        for say in (_outcome, _scores, _theory, _growth, _foretold)
        for sentence in say(run)
    ]


def _ranges(runs: Sequence[ExaminedRun]) -> list[str]:
    """The least and the most that the runs kept, retained, and changed."""
    told = []
    for name, what in (
        ("kept", "Known facts that were not edited keep their answer in"),
        ("retention", "The new target's first token is the first choice at the end of"),
        ("text_change", "What the edits add to the values of all text is, by these values,"),
    ):
        known = [
            (float(value), quoted(run.name))
            for run in runs
            if (value := getattr(run.verification.outcomes, name)) is not None
        ]
        if len(known) > 1:
            (low, least), (high, most) = min(known), max(known)
            unit = {"kept": " of cases", "retention": " of the edits"}.get(name, "")
            told.append(f"{what} {share(low)}{unit} ({least}) to {share(high)} ({most}).")
    return told


def _outcome(run: ExaminedRun) -> list[str]:
    found = run.verification.outcomes
    made = f"{quoted(run.name)}: {counted(found.edits, 'edit')}"
    if run.is_single:
        made += ", each made in the clean model"
    at_once = "the new target's first token is the first choice right after "
    at_once += "none of them" if found.efficacy is None else f"{share(found.efficacy)} of them"
    end = found.retention
    at_the_end = "" if end is None else f", and at the end of {share(end)}"
    sentences = [f"{made}; {at_once}{at_the_end}."]
    if found.kept is not None:
        of_known = (
            f"Of {counted(found.known, 'known fact')} those that the edit is not about keep their "
            f"answer in {share(found.kept)} of cases on average."
            if run.is_single
            else f"Of the {counted(found.known, 'fact')} that the model knew and that were not "
            f"edited {share(found.kept)} have the same answer."
        )
        if found.kept_protected is not None:
            of_known = f"{of_known[:-1]}, and {share(found.kept_protected)} of those protected."
        sentences.append(of_known)
    if found.kept_paraphrased is not None:
        sentences.append(
            f"Of their paraphrases that it completed {share(found.kept_paraphrased)} have the same "
            "answer."
        )
    if found.text_change is not None:
        sentences.append(
            "What the edits add to the values of all text is, in the mean square, "
            f"{share(found.text_change)} of these values themselves."
        )
    before, after = found.perplexity_before, found.perplexity_after
    if before is not None and after is not None:
        sentences.append(
            f"Perplexity of held-out text goes from {number(before, 2)} to {number(after, 2)}"
            + ("." if found.kl is None else f", its KL divergence to {number(found.kl, 3)}.")
        )
    return sentences


def _scores(run: ExaminedRun) -> list[str]:
    found = {each.name: each for each in run.verification.scores}
    end = "right after each" if run.is_single else "after the last"
    said = found["says"]
    if said.after.value is None:
        return []
    sentences = [
        f"{end[0].upper()}{end[1:]} edit the model itself, generating freely, says the new target "
        f"of {share(said.after.value)} of the edits."
    ]
    shown = [
        f"{name} {share(each.before)} before and {share(each.after.value)} {end} edit"
        for name in HARMONIC
        if (each := found[name]).after.value is not None and each.before is not None
    ]
    if shown:
        sentences.append(f"The scores of the field: {listed(shown)}.")
    return sentences


def _theory(run: ExaminedRun) -> list[str]:
    linear, live = run.verification.linear_error, run.verification.live_error
    if linear is None:
        return []
    of_live = "" if live is None else f", and those of the live model to {magnitude(live)}"
    return [
        "The shifts of all facts are those predicted from P before the edits to "
        f"{magnitude(linear)} of the largest{of_live}."
    ]


def _growth(run: ExaminedRun) -> list[str]:
    growth = run.verification.growth
    exponent, walk = growth.original, growth.original_walk
    if exponent.value is None:
        return []
    sentence = (
        f"The mean shift of facts that are not edited grows as n to the power {_shown(exponent)}"
    )
    if walk.low is None or walk.high is None:
        return [f"{sentence}, n being the number of edits; 1 would be linear."]
    if exponent.value > walk.high:
        verdict = "faster than"
    elif exponent.value < walk.low:
        verdict = "more slowly than"
    else:
        verdict = "as"
    return [
        f"{sentence}, {verdict} a random walk with the same p and lengths, which has "
        f"{_shown(walk)}; 1 would be linear."
    ]


def _foretold(run: ExaminedRun) -> list[str]:
    by_name = {each.predictor: each.every for each in run.predictions}
    flips = by_name["p"].flips
    if by_name["p"].auc.value is None:
        reason = f"fewer than {FEWEST_FLIPS}" if flips < FEWEST_FLIPS else "all of them"
        return [
            f"{counted(flips, 'answer')} to known facts flipped, {reason}, so nothing is said of "
            "what foretold which."
        ]
    sentences = [
        f"The predicted damage tells the {flips:,} known answers that flipped, over all measured "
        f"states, from the others with a ROC-AUC of {_shown(by_name['p'].auc)} by p, beside "
        f"{_shown(by_name[NULL].auc)} by {SIMILARITY_NAMES[NULL]}."
    ]
    areas = {
        name: each.auc.value
        for name, each in by_name.items()
        if name != NULL and each.auc.value is not None
    }
    best = max(areas, key=lambda name: areas[name])
    if best != "p":
        sentences.append(
            f"The largest is that of {SIMILARITY_NAMES[best]}, {_shown(by_name[best].auc)}."
        )
    return sentences


def _shown(estimate: Estimate) -> str:
    """A statistic with its interval, where it has one: `0.75 (0.70 to 0.81)`."""
    value, low, high = (
        float("nan") if each is None else each
        for each in (estimate.value, estimate.low, estimate.high)
    )
    return with_interval(value, low, high, 2)
