"""The tables of results: a column is declared once, and so is what is written in its cells.

`kscli.cli.output` prints these tables in every format, `kscli.report.tables` sets them on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table for people.

    `key` names the field of a row that it shows, `heading` what stands above it (default: `key`),
    `meaning` what the heading does not say. `spec` formats a number as Python's `format` does; a
    column without it is text. With `interval`, the fields `KEY_low` and `KEY_high` are shown too.
    `value` gives the cell where the field itself is not what is shown. A `wide` column is on the
    page and on wide terminals only; of the `spare` ones the largest go first where a terminal is
    narrow. A `varying` one is there only where not all rows have the same value, an `optional` one
    only where a row has a value; a `long` text keeps some width on a narrow screen.
    """

    key: str
    heading: str = ""
    spec: str = ""
    meaning: str = ""
    interval: bool = False
    value: Callable[[Row], Any] | None = None
    wide: bool = False
    varying: bool = False
    optional: bool = False
    long: bool = False
    spare: int = 0

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.heading or self.key

    @property
    def right(self) -> bool:
        """Whether the column is of numbers, which stand at its right edge."""
        return bool(self.spec)


def number(value: Any, spec: str) -> str:
    """A number in a table: zero has no sign, and only all of something is 100 %."""
    text = format(value, spec if spec.endswith("d") else f"z{spec}")
    if spec.endswith("%") and value < 1 and text.startswith("100"):
        return f"{math.floor(1000 * value) / 10}%"
    return text


def cell(column: Column, row: Row, undefined: str = "-") -> str:
    """What a row has in a column."""
    value = column.value(row) if column.value else row[column.key]
    if value is None or value != value:
        return undefined
    if isinstance(value, bool):
        return "yes" if value else ""
    if not column.spec or isinstance(value, str):
        return str(value)
    text = number(value, column.spec)
    if column.interval:
        low, high = (row.get(f"{column.key}_{end}") for end in ("low", "high"))
        if low is not None and low == low:
            return f"{text} [{number(low, column.spec)}, {number(high, column.spec)}]"
    return text


def has_intervals(columns: Sequence[Column], rows: Sequence[Row]) -> bool:
    """Whether a cell of these columns has an interval."""
    lows = (row.get(f"{column.key}_low") for column in columns if column.interval for row in rows)
    return any(low is not None and low == low for low in lows)


def shown(columns: Sequence[Column], rows: Sequence[Row], *, wide: bool = False) -> list[Column]:
    """The columns that are shown of these rows; `wide` ones where there is room for them."""
    return [
        column
        for column in columns
        if (not column.wide or (wide and all(column.value or column.key in row for row in rows)))
        and not (column.varying and len({row[column.key] for row in rows}) < 2)
        and not (column.optional and all(row.get(column.key) is None for row in rows))
    ]


def written(prompt: str, subject: str, target: str) -> str:
    """A fact as the paper writes it: `The capital of [France] is [Paris].`"""
    return f"{prompt.replace('{}', f'[{subject}]')} [{target}]."


def sentence(row: Row, which: str) -> str:
    """Fact `i` or `j` of a pair, as `written`."""
    prompt, subject, target = (row[f"{of}_{which}"] for of in ("prompt", "subject", "target"))
    return written(prompt, subject, target)


MODEL = Column("model", varying=True)
LAYER = Column("layer", spec="d")
RANK = Column("rank", spec="d")
PEEKED = (
    Column("document", spec=",d"),
    Column("characters", spec=",d"),
    Column("tokens", spec=",d"),
    Column("cut"),
    Column("begin", "begins with", long=True),
)
_DIFFERENT = "different last token"
_PAIRS_LEFT_OUT = "Without the pairs of facts whose keys were read at the same token."

FACTS_OF_PAIR = (
    Column("edited", "edited (i)", value=partial(sentence, which="i"), long=True),
    Column("moved", "moved (j)", value=partial(sentence, which="j"), long=True),
    Column(
        "same_last_token",
        "same last token",
        meaning="Whether the two subjects end in the same token, which alone makes keys similar.",
    ),
)
PAIRS = (MODEL, replace(LAYER, varying=True), RANK, Column("p", spec=".2f"), *FACTS_OF_PAIR)
PAIRS_OF_LAYERS = (MODEL, LAYER, *PAIRS[2:])
PAIRS_ABOVE_NOISE = (
    LAYER,
    RANK,
    Column("p", spec=".2f"),
    Column("p_other", "other p", ".2f", "p with C of the other text."),
    *FACTS_OF_PAIR,
)
FIXED_POINTS = (
    RANK,
    Column("p_least", "least p", ".2f", "The smallest p of the pair in any of the models."),
    Column("p_mean", "mean p", ".2f", wide=True),
    *FACTS_OF_PAIR,
)

STATISTICS = (
    MODEL,
    Column("m", spec="d", varying=True),
    LAYER,
    Column(
        "mean",
        spec=".3f",
        meaning="Of p over all pairs of facts.",
        interval=True,
    ),
    Column("std", spec=".3f", meaning="The standard deviation of p.", spare=3),
    Column("skewness", spec=".1f", wide=True),
    Column(
        "kurtosis",
        spec=".1f",
        meaning="Excess kurtosis of p: high where most pairs are free and a few are bound.",
        interval=True,
    ),
    Column("kurtosis_distinct", _DIFFERENT, ".1f", f"Kurtosis. {_PAIRS_LEFT_OUT}", interval=True),
    Column("tail_0_10", "|p|>0.1", ".1%", wide=True),
    Column("tail_0_25", "|p|>0.25", ".1%", "The share of pairs that are bound so much.", spare=1),
    Column("tail_0_50", "|p|>0.5", ".2%", wide=True),
    Column("min", "least p", ".2f", wide=True),
    Column("max", "largest p", ".2f", wide=True),
    Column("hill", "Hill index", ".1f", wide=True),
    Column(
        "fourth_moment_pairs",
        "carry half",
        ".0f",
        "The least number of pairs of facts that carry half of the fourth moment of P.",
        spare=2,
    ),
)
# Of a mixture of experts.
ROUTING = (
    MODEL,
    LAYER,
    Column("no_common_expert", "no common expert", ".1%", "Of all pairs of facts."),
    Column("common_experts", "in common", ".2f", "Mean number of experts of both facts of a pair."),
    Column("std", "std of p", ".3f"),
    Column("std_common", "with a common expert", ".3f", "The standard deviation of p, such pairs."),
    Column("kurtosis", spec=".1f"),
    Column("kurtosis_common", "with a common expert", ".1f", "Kurtosis of p, such pairs."),
)
BY_EXPERT = (
    MODEL,
    LAYER,
    Column("expert"),
    Column("tokens", spec=",d", meaning="Tokens of the corpus that are routed to the expert."),
    Column("token_share", "of all", ".1%"),
    Column("facts", spec="d", meaning="Facts that are routed to the expert."),
    Column("leverage_share", "of leverage", ".1%", "Its mean share of these facts' k'C^-1k."),
    Column("std", "std of p", ".3f", "Of p of the expert alone, between these facts."),
    Column("kurtosis", spec=".1f"),
    Column("max", "largest p", ".2f"),
)
SAME_TOKEN = (
    LAYER,
    Column("same_token", "of all pairs", ".2%"),
    Column("same_token_tail_0_10", "of |p|>0.1", ".1%"),
    Column("same_token_tail_0_25", "of |p|>0.25", ".1%"),
    Column("same_token_tail_0_50", "of |p|>0.5", ".1%"),
    Column("kurtosis", spec=".1f"),
    Column("kurtosis_distinct", _DIFFERENT, ".1f", f"Kurtosis. {_PAIRS_LEFT_OUT}"),
)
ANGLES = (
    LAYER,
    Column("white", "whitening space", ".1f"),
    Column("white_off", "from 90\N{DEGREE SIGN}", ".1f"),
    Column("raw", "activation space", ".1f"),
    Column("raw_off", "from 90\N{DEGREE SIGN}", ".1f"),
)
OVERLAPS = (
    LAYER,
    Column("overlap", spec=".4f", meaning="Mean squared cosine of two keys, activation space."),
    Column("overlap_whitened", "whitened", ".4f", "The same in the whitening space."),
    Column("one_over_d_m", "1/d_m", ".4f", "The overlap of keys in random directions."),
    Column("one_over_m", "1/m", ".4f", wide=True),
)
SPECTRUM = (
    MODEL,
    Column("m", spec="d", varying=True),
    LAYER,
    Column("d_m", spec="d", varying=True),
    Column(
        "participation_ratio",
        "participation ratio",
        ".1f",
        "Of C: (tr C)^2 / tr C^2. Of experts: the median of theirs, in brackets the range.",
        interval=True,
    ),
    Column(
        "effective_rank",
        "effective rank",
        ".1f",
        "Of C: exp of its spectrum's entropy.",
        interval=True,
    ),
    *OVERLAPS[1:],
    Column("null_share", "null", ".0%", "Directions that the absolute cut calls null."),
    Column("keys_in_null", "keys there", ".1%", "The share of the keys' energy in them."),
    Column("relative_null_share", "relative null", ".0%", "The same of the relative cut."),
    Column("keys_in_relative_null", "keys there", ".1%"),
)
SCALING = (
    Column("smaller"),
    Column("larger"),
    Column("kurtosis_smaller", "kurtosis", ".1f", "Mean kurtosis over layers, smaller model."),
    Column("kurtosis_larger", "of larger", ".1f"),
    Column("difference", spec=".1f", interval=True),
    Column(
        "share_higher",
        "higher at",
        ".0%",
        "The share of relative depths where the larger model has the larger kurtosis.",
    ),
    Column(
        "difference_distinct", _DIFFERENT, ".1f", f"Difference. {_PAIRS_LEFT_OUT}", interval=True
    ),
)
# Rows of which the smaller model is dense, and the larger one a mixture of experts.
SPARSITY = (
    Column("compared", "as many", varying=True),
    Column("smaller", "dense"),
    Column("larger", "experts"),
    Column("mean_abs_smaller", "mean |p|", ".4f", "Of the dense model, over layers and pairs."),
    Column("mean_abs_larger", "of experts", ".4f"),
    Column("mean_abs_difference", "difference of mean |p|", ".4f", interval=True),
    Column("tail_0_25_smaller", "|p|>0.25", ".2%", spare=2),
    Column("tail_0_25_larger", "of experts", ".2%", spare=2),
    Column("tail_0_25_difference", "of |p|>0.25", ".2%", interval=True),
    Column("kurtosis_smaller", "kurtosis", ".1f", spare=4),
    Column("kurtosis_larger", "of experts", ".1f", spare=4),
    Column("difference", "of kurtosis", ".1f", interval=True, spare=3),
    Column(
        "no_common_expert",
        "no common expert",
        ".1%",
        "The pairs of facts whose p is 0, for they have no expert in common.",
        spare=1,
    ),
)


def noise_columns(k: int) -> list[Column]:
    """The columns of P against P on other text, whose `k` largest pairs are compared."""
    return [
        LAYER,
        Column("rms_difference", "rms", ".4f"),
        Column("worst_difference", "worst", ".3f"),
        Column("correlation", spec=".3f"),
        Column("noise_share", "noise", ".1%"),
        Column("top_overlap", f"top {k} in both", ".0%"),
        Column("above_noise", "pairs above it", ".1%"),
    ]


_NULL = Column(
    "null_95_within_other_text",
    "null 95 %",
    ".3f",
    "95 % of relations given at random have a smaller mean.",
)
RELATIONS_BY_LAYER = (
    MODEL,
    LAYER,
    Column("within_same_text", "within, same text", ".3f"),
    Column("within_other_text", "within, other text", ".3f"),
    _NULL,
    Column("p_value_within_other_text", "p-value", ".3f"),
    Column("across", spec=".3f"),
    Column("hardest", meaning="The relations above the null with the largest mean |p|."),
)
RELATIONS_BY_LAYER_TITLED = (
    *RELATIONS_BY_LAYER[:-1],
    replace(RELATIONS_BY_LAYER[-1], key="hardest_titles", heading="hardest", long=True),
)


def relation_columns(layers: Sequence[int]) -> list[Column]:
    """The columns of relations, with mean |p| at each of `layers`."""
    return [
        Column("title", "relation"),
        Column("example", "for example", long=True),
        Column("facts", spec="d"),
        Column("pairs", spec="d"),
        *(
            Column(
                f"layer_{layer}",
                str(layer) if at else f"layer {layer}",
                ".2f",
                value=partial(_at_layer, layer=layer),
            )
            for at, layer in enumerate(layers)
        ),
        Column("largest", "mean |p|", ".3f", "At the layer where it is largest.", wide=True),
        replace(_NULL, key="null", wide=True),
        Column("hardest_at", "hardest at", "d", "The layer where mean |p| is largest."),
        Column("above_at", "above null at", meaning="Layers where mean |p| is above the null."),
    ]


def _at_layer(row: Row, layer: int) -> Any:
    return row["by_layer"][layer]


# Edits, before they are made and after


def _largest_pair(row: Row) -> str | None:
    if row["i"] is None:
        return None
    return row["subject_j"] if row["edits"] == 1 else f"{row['subject_i']} → {row['subject_j']}"


def _verdict(row: Row) -> str:
    if not row["reaches"]:
        return "cannot reach the answer"
    if row["chosen"]:
        return "least of all, chosen" if row["least"] else "chosen"
    return "least" if row["least"] else ""


def _edited_fact(row: Row) -> str:
    return written(row["prompt"], row["subject"], row["target_true"])


def _moved_fact(row: Row) -> str:
    return written(row["prompt"], row["subject"], row["target"])


def _moved_most(row: Row) -> str | None:
    """The first fact that answers otherwise than before, of those predicted to be moved most."""
    for moved in row["moved"]:
        if moved["answer_changed"]:
            return f"{moved['subject']}: {moved['answer_before']} → {moved['answer_after']}"
    return "none" if row["moved"] else None


def _kept(row: Row) -> str | None:
    kept = row["kept"]
    return None if kept is None else f"{number(kept, '.0%')} of {row['known']}"


def _kept_protected(row: Row) -> str | None:
    kept = row["kept_protected"]
    return None if kept is None else f"{number(kept, '.0%')} of {row['known_protected']}"


def _perplexity(row: Row) -> str | None:
    before, after = row["perplexity_before"], row["perplexity_after"]
    return None if None in (before, after) else f"{before:.4g} → {after:.4g}"


PRICES = (
    replace(LAYER, varying=True),
    RANK,
    Column(
        "price",
        spec=".3g",
        meaning="To move no other fact at its subject, a plain edit being 1; at all its tokens, as "
        "edit --protect does by default, it costs more.",
    ),
    Column("text_rms", "of all text", ".3f", "rms p to the tokens of the corpus: 1 / √kᵀC⁻¹k."),
    Column("rms", "rms p", ".3f"),
    Column("paraphrase_p", "p to paraphrases", ".2f", optional=True),
    Column("fact", spec="d"),
    Column("subject", "edited", value=_moved_fact, long=True),
)
RISK_BY_LAYER = (
    LAYER,
    Column("rms", "rms p", ".4f"),
    Column("largest", "largest |p|", ".3f"),
    Column("pair", "moved most", value=_largest_pair, long=True, spare=3),
    Column("harmful", "|p|>0.25", ".1%", spare=1),
    Column("paraphrase_p", "p to paraphrases", ".2f", "The median.", optional=True),
    Column("ratio", "by that", ".3f", "rms p by p to paraphrases.", optional=True),
    Column(
        "text_rms", "of all text", ".3f", "rms p to all tokens of text.", optional=True, spare=2
    ),
    Column("price", spec=".1f", meaning="To move no other fact at its subject.", optional=True),
    Column("saved", "the order saves", ".1%", wide=True),
    Column("verdict", "note", value=_verdict),
)
FACTS_MOVED = (
    replace(LAYER, varying=True),
    Column("i", "edited", value=partial(sentence, which="i"), varying=True),
    RANK,
    Column("p", spec=".3f"),
    Column("j", "fact", "d"),
    *FACTS_OF_PAIR[1:],
)


def sequence_columns(*, edited: bool, by_norm: bool) -> list[Column]:
    """The columns of facts that a sequence of edits moves: `edited` facts, or original ones.

    `by_norm`: the sequence is in the order norm already, to which others are compared.
    """
    return [
        replace(LAYER, varying=True),
        RANK,
        Column("expected", spec=".3f"),
        Column("worst", spec=".3f"),
        Column("fact", spec="d"),
        Column("subject", "moved", value=_moved_fact),
        *([Column("edit", spec="d")] if edited else []),
        Column("subject_i", "most by the edit of"),
        Column("p_i", "p", spec=".2f"),
        *(
            [
                Column("edit_norm", "edit, by norm", spec="d", spare=1),
                Column("expected_norm", "expected by norm", spec=".3f", spare=1),
            ]
            if edited and not by_norm
            else []
        ),
    ]


def _cost_of_a_search(row: Row) -> str:
    """Passes of the model and the texts in each, of a search at one layer or at each of several."""
    cost = f"{row['passes']} × {row['texts']}".replace(" ", "\N{NO-BREAK SPACE}")
    return cost + (", each layer" if row["each_layer"] else "")


EDITS = (
    Column("edit", spec="d"),
    Column("subject"),
    Column("fact", value=_edited_fact, wide=True, long=True),
    Column("target_true", "true"),
    Column("target_new", "new"),
    Column("p_max_other", "largest p", ".2f", "The largest p from the edited fact to another one."),
    Column("delta_norm", "|δ|", ".2f", "The length of what the edit adds to the fact's value."),
    Column("prob_new_before", "P(new) before", ".3f", "The probability of the new target."),
    Column("prob_new_after", "after", ".3f", "P(new) after the edit."),
    Column(
        "took",
        meaning="Whether the new target's first token is the model's first choice after the edit.",
        value=lambda row: "yes" if row["took"] else "no",
    ),
    Column("prob_new_end", "at the end", ".3f", "P(new) after the last edit.", wide=True),
    Column(
        "moved",
        "moved most",
        meaning="The first fact whose answer changed, of those that p says the edit moves most.",
        value=_moved_most,
    ),
    Column("linear_error", "error", ".0e", "Of the predicted shifts, by the largest one."),
)


def _traced(row: Row) -> str:
    if row["edited"]:
        return "edited"
    return "" if row["bound_to"] is None else f"bound to {row['subject_bound_to']}"


TRACED = (
    LAYER,
    RANK,
    Column("share", spec=".3f"),
    Column("p_value", "p-value", ".1e"),
    Column("fact", value=_moved_fact, long=True),
    Column("edited", "verdict", value=_traced),
)
EDITORS = (
    Column("method"),
    Column("title", "what it is", long=True),
    Column("layers", "default layers"),
    Column("facts_at_once", "facts at once"),
    Column("needs"),
    Column("cost", value=_cost_of_a_search),
    Column("presets", value=lambda row: " ".join(row["presets"]) or None, long=True, spare=1),
)
SETTINGS = (
    Column("model", value=lambda row: row["model"] or "(others)"),
    Column("layers"),
    Column("steps", spec="d"),
    Column("learning_rate", "learning rate", "g"),
    Column("weight_decay", "weight decay", "g"),
    Column("kl_weight", "KL weight", "g"),
    Column("norm_limit", "norm limit", "g"),
    Column("weight", "λ", "g"),
    Column("source", long=True, spare=1),
)
RUN = (
    MODEL,
    Column("method"),
    Column("layers"),
    *(Column(name, varying=True) for name in ("protocol", "value", "order", "seed")),
)
OUTCOMES = (
    Column("edits", spec="d"),
    Column(
        "efficacy",
        "at once",
        ".0%",
        "The share of edits right after which the new target's first token is the first choice.",
    ),
    Column("retention", "at the end", ".0%", "The same share after the last edit."),
    Column(
        "kept",
        "known facts kept",
        ".0%",
        "Of the facts that the model knew and that were not edited, those with the same answer.",
        value=_kept,
    ),
    Column(
        "kept_protected",
        "protected",
        ".0%",
        "The same of the facts of --protect.",
        value=_kept_protected,
        optional=True,
    ),
    Column(
        "kept_paraphrased",
        "paraphrased",
        ".0%",
        "The same after paraphrases.",
        optional=True,
        spare=1,
    ),
    Column(
        "kept_protected_paraphrased",
        "protected, paraphrased",
        ".0%",
        "The same of protected facts after paraphrases.",
        optional=True,
        spare=3,
    ),
    Column(
        "perplexity_after",
        "perplexity",
        ".4g",
        "Of the text of --held-out, before and after.",
        value=_perplexity,
        spare=1,
    ),
    Column(
        "kl",
        "KL",
        ".3g",
        "Of the next token of held-out text, from the clean model.",
        optional=True,
        spare=2,
    ),
    Column(
        "text_change",
        "all text",
        ".1%",
        "What the edits add to the values of all text, by these values, in the mean square: "
        "tr(ΔW C ΔWᵀ) by tr(W C Wᵀ).",
        spare=1,
    ),
    Column(
        "weight_change",
        "|W_n - W_0|",
        ".3g",
        "The length (Frobenius norm) of all that the n edits add to W.",
        spare=2,
    ),
)
SCORED = (
    *(Column(name, spec=".1%", interval=True) for name in ("S", "ES", "PS", "NS")),
    Column("GE", spec=".2f", interval=True, spare=3),
    *(
        Column(name, title, ".1%", interval=True, spare=spare)
        for name, title, spare in (
            ("RS", "RS", 3),
            ("reliability", "reliability", 0),
            ("generalisation", "generalisation", 1),
            ("locality", "locality", 1),
            ("portability", "portability", 2),
            ("says", "says it", 2),
        )
    ),
)


def score_rows(rows: Sequence[Row]) -> list[Row]:
    """Runs with their scores, two rows each: before the edits, without intervals, and after."""
    found: list[Row] = []
    for row in rows:
        before = {column.key: row[f"{column.key}_before"] for column in SCORED}
        ends = {f"{key}_{end}": None for key in before for end in ("low", "high")}
        found += [{**row, **before, **ends, "when": "before"}, {**row, "when": "after"}]
    return found


def score_columns(rows: Sequence[Row]) -> list[Column]:
    """The scores that one of the runs has, after when they were measured."""
    there = [column for column in SCORED if any(row[column.key] is not None for row in rows)]
    return [Column("when", "edits"), *there]


THEORY = (
    Column("linear_error", "error", ".0e", "Of the worst predicted shift, by the largest."),
    Column("live_error", "live", ".0e", "The error in the live model."),
    Column(
        "exponent_original",
        "exponent, original facts",
        ".2f",
        "The mean shift of facts that are not edited grows as the number of edits to this power; "
        "1 is linear.",
        interval=True,
    ),
    Column(
        "walk_original",
        "of a random walk",
        ".2f",
        "The exponent of a random walk with the same p. In brackets: of 95 % of such walks.",
        interval=True,
        spare=1,
    ),
    Column(
        "exponent_edited",
        "edited facts",
        ".2f",
        "The exponent of facts that were edited before.",
        interval=True,
    ),
    Column("walk_edited", "of a random walk", ".2f", interval=True, spare=1),
    Column(
        "by_age",
        "edit number and shift",
        ".2f",
        "Their rank correlation: below 0, facts that were edited early moved further.",
        interval=True,
    ),
)
PREDICTOR_NAMES = {
    "p": "p",
    "editor_p": "p of the editor",
    "whitened_cosine": "whitened cosine",
    "cosine": "cosine of keys",
    "gradient_cosine": "cosine of gradients",
    "hidden_cosine": "cosine of hidden states",
    "permuted_p": "p of permuted facts",
}
WHERE = (
    Column("edits", spec="d"),
    Column("paraphrase_p", "p to paraphrases", ".2f", "The median over the edited facts."),
    Column("PS", spec=".0%"),
    Column("spearman_PS", "foretells PS", ".2f", "Rank correlation.", interval=True),
    Column("rms_p", "rms p", ".3f", "To the other facts, the median over them.", spare=1),
    Column("NS", spec=".0%", spare=3),
    Column("spearman_NS", "foretells NS", ".2f", interval=True, spare=3),
    Column("flipped", spec=".1%", meaning="Known facts whose answer an edit changes."),
    Column("spearman_flipped", "foretells flips", ".2f", interval=True),
)
PREDICTORS = (
    Column("predictor", value=lambda row: PREDICTOR_NAMES[row["predictor"]]),
    Column("spearman", "Spearman", ".2f", interval=True),
    Column("auc", "AUC", ".2f", interval=True),
    Column("flips", spec="d"),
    Column("spearman_distinct", f"{_DIFFERENT}: Spearman", ".2f", interval=True, spare=1),
    Column("auc_distinct", "AUC", ".2f", interval=True, spare=2),
    Column("flips_distinct", "flips", "d", spare=2),
)
