"""What the page begins with: what p and C are, and three sentences on what was found."""

from __future__ import annotations

import math

from kscli.report.examined import Examined, ExaminedRun
from kscli.report.html import Html, join, tag
from kscli.report.words import counted, number, quoted, share

PAPER = "https://arxiv.org/abs/2408.07413"


def preface() -> Html:
    """What p, P and C are, and whose they are."""
    paper = join(
        [
            "Where this comes from: Hu et al., ",
            tag("a", "Knowledge in Superposition", href=PAPER, rel="noreferrer"),
            ": Unveiling the Failures of Lifelong Knowledge Editing for Large Language Models "
            "(AAAI 2025).",
        ]
    )
    of_p = join(
        [
            tag("strong", "p"),
            " says how far an edit of one fact moves another. A layer of the model keeps facts in "
            "the matrix W of its MLP's down-projection: the input of W is a fact's key k, read at "
            "its subject, and the output its value. Editors of the ROME family change W so that "
            "the key of fact i has a new value. Then the value of fact j moves too, by ",
            tag("strong", "p(kᵢ, kⱼ) = kᵢᵀC⁻¹kⱼ / kᵢᵀC⁻¹kᵢ"),
            " times as far: 0 is not at all, 1 as far as fact i itself. P has this number for "
            "every pair; row i is the fact that is edited, column j the one that is moved.",
        ]
    )
    of_c = join(
        [
            tag("strong", "C"),
            " is the mean of kkᵀ over all tokens of a text: which keys the model uses, and how "
            "much. In the space that C⁻¹ whitens, p is large for keys in like directions. Two "
            "facts whose keys share directions are in superposition.",
        ]
    )
    return tag("section", tag("p", of_p), tag("p", of_c), tag("p", paper), class_="preface")


def in_short(examined: Examined) -> tuple[str, ...]:
    """Three sentences: how far edits reach, how that is distributed, and what it comes to."""
    if examined.m < 2:
        return ("One fact makes no pair, so there is nothing to say of p.",)
    return (_reach(examined), _distribution(examined), _consequence(examined))


def _reach(examined: Examined) -> str:
    rows = [row for row in examined.risk_rows if not math.isnan(row["rms"])]
    if not rows:
        return "All facts are copies of one, so an edit has no other to move."
    least, most = (end(rows, key=lambda row: row["rms"]) for end in (min, max))
    between = (
        f"{share(least['rms'])} (layer {least['layer']})"
        if least is most
        else f"{share(least['rms'])} (layer {least['layer']}) to {share(most['rms'])} "
        f"(layer {most['layer']})"
    )
    return (
        f"An edit of one of these {examined.m:,} facts moves the value of another by {between} of "
        "what it moves its own, in the root mean square over all pairs; if the model kept facts "
        "apart it would be 0."
    )


def _distribution(examined: Examined) -> str:
    first, last = examined.ends[0], examined.ends[-1]
    then, now = examined.at("kurtosis", first), examined.at("kurtosis", last)
    if math.isnan(then) or math.isnan(now):
        return "How p is distributed is undefined at some layer: its values do not vary there."
    ends = f"{number(then, 1)} at layer {first}"
    if last != first:
        ends += f" and {number(now, 1)} at layer {last}"
    low = (examined.at("kurtosis_low", layer) for layer in (first, last))
    few = all(value > 0 for value in low)
    so = ": a few pairs are bound far more than the others" if few else ""
    return (
        f"The excess kurtosis of p, which is 0 for a Gaussian, is {ends}{so}; the largest p of two "
        f"facts is {number(float(examined.values('max').max()), 2)}."
    )


def _consequence(examined: Examined) -> str:
    runs = [run for run in examined.runs if run.verification.outcomes.kept is not None]
    if runs:
        return _of_runs(runs)
    able = [row for row in examined.risk_rows if row["reaches"] and not math.isnan(row["rms"])]
    if not able:
        return "This page has no run of edits, and no layer that there is can change the answers."
    chosen = next((row for row in able if row["chosen"]), None)
    if chosen:
        return (
            f"To edit one of them, p would choose layer {chosen['layer']}: there an edit moves "
            "other facts least by how far it moves its own paraphrases. This page has no run of "
            "edits that tests it."
        )
    least = min(able, key=lambda row: row["rms"])
    return (
        f"Of the layers that reach the answer an edit moves others least at layer "
        f"{least['layer']}. This page has no run of edits that tests it."
    )


def _of_runs(runs: list[ExaminedRun]) -> str:
    def kept(run: ExaminedRun) -> float:
        return float(run.verification.outcomes.kept or 0.0)

    if len(runs) == 1:
        (run,) = runs
        edits = counted(run.verification.outcomes.edits, "edit")
        after = f"each of {edits} by itself" if run.is_single else edits
        return f"After {after} ({quoted(run.name)}) {share(kept(run))} of {_KEEPING}."
    took = [run for run in runs if (run.verification.outcomes.efficacy or 0.0) > 0.5]
    if not took:
        return (
            f"In none of {len(runs)} runs of edits did most edits take, so none can be called "
            f"gentle: {share(min(map(kept, runs)))} to {share(max(map(kept, runs)))} of {_KEEPING}."
        )
    best, worst = max(took, key=kept), min(took, key=kept)
    ties = sum(kept(run) == kept(best) for run in took) - 1
    others = f" (like {ties} other{'s' if ties > 1 else ''})" if ties else ""
    among = "" if len(took) == len(runs) else f", of the {len(took)} most of whose edits took,"
    gentlest = (
        f"Of {len(runs)} runs of edits{among} the gentlest is {quoted(best.name)}{others}, after "
        f"which {share(kept(best))} of {_KEEPING}"
    )
    if kept(worst) == kept(best):
        return f"{gentlest}."
    return f"{gentlest}; after the harshest, {quoted(worst.name)}, it is {share(kept(worst))}."


_KEEPING = "the known facts that were not edited keep their answer"
