"""What the values of datasets and attributes must be, so that a file makes sense.

A rule is declared for a dataset by its name, and holds for every entry that is read of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts.schema import HOOK, About, SchemaError
from kscli.artifacts.threads import in_threads
from kscli.fact_forms import QUESTION_FIELDS
from kscli.scores import SCORES

Lengths = Mapping[str, int]
Mask = NDArray[np.bool_]

ROUNDING = 1e-6
TILE = 256  # rows and columns that are compared at once: they fit in a cache
BAND = 1 << 22  # entries that a thread sums


@dataclass(frozen=True)
class Rule:
    """What is `needed`, in words, and at which entries of an array it is not so.

    `wrong` is given the array and the length of every axis of the file.
    """

    needed: str
    wrong: Callable[[NDArray[Any], Lengths], Mask]


# C of a large model has 10^8 entries: masks of all of them are made only where one is wrong.
NONE = np.zeros(1, dtype=np.bool_)


def _not_finite(values: NDArray[Any], _: Lengths) -> Mask:
    def is_finite(part: NDArray[Any]) -> bool:
        with np.errstate(all="ignore"):
            # A sum of finite numbers is finite, or they are to be looked at one by one.
            return bool(np.isfinite(part.sum(dtype=np.float64)))

    finite = in_threads(is_finite, np.array_split(values, max(1, values.size // BAND)))
    return NONE if all(finite) else ~np.isfinite(values)


def _on_diagonal(wrong: Callable[[NDArray[Any]], Mask]) -> Callable[[NDArray[Any], Lengths], Mask]:
    """A rule of the diagonal of a matrix, as one of all its entries."""

    def of_matrix(values: NDArray[Any], _: Lengths) -> Mask:
        on_diagonal = wrong(np.diagonal(values))
        if not on_diagonal.any():
            return NONE
        found = np.zeros(values.shape, dtype=np.bool_)
        np.fill_diagonal(found, on_diagonal)
        return found

    return of_matrix


def _apart(values: NDArray[Any], _: Lengths) -> Mask:
    """The entries that differ from those on the other side of the diagonal."""

    def differs(start: int) -> bool:
        rows = slice(start, start + TILE)
        columns = (slice(other, other + TILE) for other in range(start, len(values), TILE))
        return any((values[rows, each] != values[each, rows].T).any() for each in columns)

    found = any(in_threads(differs, range(0, len(values), TILE)))
    return np.asarray(values != values.T) if found else NONE


def _at_least(least: float) -> Rule:
    return Rule(f"{least} or more", lambda values, _: ~(values >= least))


def _index(axis: str, beyond: int = 0) -> Rule:
    """An index into an axis; with `beyond` 1, a count of its entries."""
    return Rule(
        f"0 to less than {{{axis}}}" if not beyond else f"0 to {{{axis}}}",
        lambda values, lengths: (values < 0) | (values >= lengths[axis] + beyond),
    )


FINITE = Rule("a finite number", _not_finite)
NOT_INFINITE = Rule("a finite number, or NaN", lambda values, _: np.isinf(values))
POSITIVE = Rule("more than 0", lambda values, _: ~((values > 0) & (values < np.inf)))
SYMMETRIC = Rule("the entry on the other side of the diagonal", _apart)
DIAGONAL_1 = Rule("1", _on_diagonal(lambda values: ~(np.abs(values - 1) <= ROUNDING)))
DIAGONAL_NOT_NEGATIVE = Rule("0 or more", _on_diagonal(lambda values: ~(values >= 0)))
ASCENDING = Rule(
    "more than the one before",
    lambda values, _: np.concatenate([values[:1] < 0, values[1:] <= values[:-1]]),
)
NOT_DESCENDING = Rule(
    "the one before or more",
    lambda values, _: np.concatenate([values[:1] < 0, values[1:] < values[:-1]]),
)
# What was measured of a model that edits have broken may be infinite or NaN.
NOT_NEGATIVE = Rule("0 or more", lambda values, _: values < 0)
NOT_BEYOND_1 = Rule("from -1 to 1", lambda values, _: np.abs(values) > 1 + ROUNDING)
LOG_PROBABILITY = Rule("0 or less", lambda values, _: values > ROUNDING)
SHARE = Rule("0 to 1", lambda values, _: (values < 0) | (values > 1 + ROUNDING))
FINITE_COUNT = Rule("0 or more", lambda values, _: (values < 0) | np.isinf(values))

_EXPERT = Rule(
    "-1 to less than {expert}",
    lambda values, lengths: (values < -1) | (values >= lengths["expert"]),
)

_Rules = dict[str, tuple[Rule, ...]]
_LAYER: _Rules = {"layer": (ASCENDING,)}
_FACTS: _Rules = {
    "token_id": (_at_least(0),),
    "position": (_at_least(0),),
    **{f"{kind}/fact": (_index("m"), NOT_DESCENDING) for kind in QUESTION_FIELDS},
}
VALUES: dict[str, _Rules] = {
    "cov": _LAYER
    | {
        "count": (_at_least(1),),
        **dict.fromkeys(
            ("second_moment", "shared_second_moment"), (FINITE, DIAGONAL_NOT_NEGATIVE, SYMMETRIC)
        ),
        "routed": (_at_least(0),),
        "settling/layer": (ASCENDING,),
        "settling/tokens": (_at_least(0),),
        "settling/rms": (NOT_NEGATIVE,),
    },
    "keys": _LAYER
    | _FACTS
    | dict.fromkeys(("keys", "context_keys", "shared_keys", "shared_context_keys"), (FINITE,))
    | dict.fromkeys(("paraphrase_keys", "shared_paraphrase_keys"), (NOT_INFINITE,))
    | dict.fromkeys(("experts", "context_experts", "paraphrase_experts"), (_EXPERT,)),
    "pmatrix": _LAYER
    | _FACTS
    | {
        "P": (FINITE,),
        "whitened_cosine": (FINITE, NOT_BEYOND_1),
        "Q": (FINITE, DIAGONAL_NOT_NEGATIVE),
        "leverage": (POSITIVE,),
        "paraphrase_p": (NOT_INFINITE,),
        "experts": (_EXPERT,),
        "dead_coordinates": (_at_least(0),),
        **dict.fromkeys(
            ("condition", "whitening_residual", "solve_residual", "storage_error"), (NOT_NEGATIVE,)
        ),
    },
    "stats": _LAYER,
    "edits": _LAYER
    | _FACTS
    | {
        "edited": (_index("m"),),
        "moved_index": (_index("m"),),
        "kept_out/fact": (_index("m"),),
        "kept_out/number": (_index("planned"), ASCENDING),
        "step": (_index("edit", beyond=1), ASCENDING),
        **dict.fromkeys(("delta", "direction", "p", "editor_p"), (FINITE,)),
        "paraphrase_p": (NOT_INFINITE,),
        **{f"scores/{name}": (NOT_NEGATIVE,) for name in SCORES},
        **dict.fromkeys(
            ("whitened_cosine", "cosine", "gradient_cosine", "hidden_cosine"), (NOT_BEYOND_1,)
        ),
        **dict.fromkeys(
            (
                *(
                    "delta_norm",
                    "price",
                    "linear_error",
                    "live_error",
                    "weight_change",
                    "perplexity",
                    "kl",
                    "text_change",
                    "own_text_change",
                ),
                *("predicted", "measured", "measured_live", "difference"),
            ),
            (NOT_NEGATIVE,),
        ),
        **{
            f"{what}_{target}{when}": (rule,)
            for what, rule in (
                ("logprob", LOG_PROBABILITY),
                ("moved_logprob", LOG_PROBABILITY),
                ("rank", _at_least(1)),
            )
            for target in ("true", "new")
            for when in ("", "_before", "_previous", "_after")
        },
    },
}

# Statistics by how their names begin; NaN is one that is not defined.
STATISTICS: _Rules = {
    "top_": (_index("m"),),
    "fourth_moment_pairs": (FINITE_COUNT,),
    "std": (NOT_NEGATIVE,),
    **dict.fromkeys(("tail_", "same_token", "variance_"), (SHARE,)),
}


def rules_of(about: About, kind: str, name: str) -> tuple[Rule, ...]:
    """What holds for the entries of a dataset of a file that says this `about` itself."""
    rules = VALUES[kind].get(name, ())
    # The ends of an interval may lie where no statistic can.
    if kind == "stats" and not name.endswith(("_low", "_high")):
        rules += next((STATISTICS[begin] for begin in STATISTICS if name.startswith(begin)), ())
    # By equation 3 the edited fact's own value moves by delta; by other editors' not quite.
    papers = name == "P" and not getattr(about, "editor", "")
    return (*rules, DIAGONAL_1) if papers else rules


def wrong_values(rules: Sequence[Rule], values: NDArray[Any], lengths: Lengths) -> str | None:
    """What makes no sense in a dataset, or in one layer of it, with its place; None: nothing."""
    # A byte that is neither 0 nor 1 is a bool to NumPy, too.
    if values.dtype == np.bool_ and (values.view(np.uint8) > 1).any():
        return "holds what is neither true nor false"
    for rule in rules:
        wrong = rule.wrong(values, lengths)
        if wrong.any():
            place = np.unravel_index(int(wrong.argmax()), wrong.shape)
            where = f" at {tuple(map(int, place))}" if place else ""
            return f"is {values[place]!s}{where}, where {rule.needed.format(**lengths)} is needed"
    return None


# Attributes

# The least that a number may be; the settings of a file that has no such attribute are passed over.
LEAST = {
    "d_m": 1,
    "n_layers": 1,
    "n_experts": 1,
    "parameters": 1,
    "active_parameters": 1,
    "documents": 0,
    "max_length": 1,
    "padding": 0,
    "ridge": 0,
    "contexts": 0,
    "m": 1,
    "weight": 0,
    "batch": 1,
    "planned": 0,
}
CHOICES = {"protocol": ("sequential", "single")}


def check_about(about: About) -> None:
    """Raise SchemaError, naming the attribute, where an attribute makes no sense."""
    for each in fields(about):
        value = getattr(about, each.name)
        needed = _needed(each.name, value)
        if needed:
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise SchemaError(f"its attribute {each.name} is {shown}, where {needed} is needed")


def _needed(name: str, value: Any) -> str | None:
    """What an attribute must be and is not."""
    if isinstance(value, str) and "\0" in value:
        return "text without null characters"
    if name == "hook" and not HOOK.fullmatch(value):
        return "a module's dotted path with {} for the layer"
    # It becomes the name of a folder.
    if name == "model" and (value in ("", ".", "..") or "/" in value):
        return "a name without /"
    if name in CHOICES and value not in CHOICES[name]:
        return " or ".join(CHOICES[name])
    if name in LEAST and value is not None and not LEAST[name] <= value < math.inf:
        return f"{LEAST[name]} or more"
    return None
