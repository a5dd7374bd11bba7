"""Facts whose values an edit is to leave: their tokens, their keys, and which of them it can spare.

The key of a token depends on the tokens up to it alone, so texts that begin alike share keys, and
what an edited fact shares with a protected one, up to its subject's end, nothing can part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kscli.batching import padded_batches
from kscli.completion import tokenize_clozes
from kscli.editing.metrics import Metric
from kscli.editing.protection import NoRoomError, Protected, prices, protect
from kscli.facts import Fact
from kscli.models.loading import LoadedModel
from kscli.positions import locate_keys
from kscli.reporter import Reporter

Array = NDArray[np.float64]
Tokens = tuple[int, ...]

DROPPED_AT_ONCE = 20
DEFAULT_RIDGE = {"tokens": 0.1, "subject": 0.0}
"""By what is protected: at all tokens 0.1 keeps nearly as much, at a third of the price."""
NAMED = 10


@dataclass(frozen=True)
class Protection:
    """What is protected: the facts `known` to the model, `all` of keys.h5, or a file's, by a hash.

    `at`: the keys of all tokens of each prompt and its target, or of the subject's last token.
    `ridge` is that of `protect`. Facts are left unprotected until no edit's price passes
    `max_price` (None: any price is paid).
    """

    what: str
    at: Literal["tokens", "subject"] = "tokens"
    ridge: float = 0.0
    max_price: float | None = None


class Affordable(NamedTuple):
    """Which facts (m,) are protected, the price of each edit, and the metric in which they are."""

    kept: NDArray[np.bool_]
    prices: Array
    metric: Metric


class ProtectedFacts:
    """The `facts` and the tokens whose keys stand for them, each key once.

    `apart` are the tokens up to the keys of edited facts, which are left out. Raises FactsError for
    a text that does not fit.
    """

    def __init__(
        self,
        model: LoadedModel,
        facts: Sequence[Fact],
        at: Literal["tokens", "subject"],
        apart: Collection[Tokens],
    ) -> None:
        self.facts = tuple(facts)
        self._model = model
        self._texts: list[Tokens] = []
        self._of_fact: list[list[int]] = []
        seen: dict[Tokens, int] = {}
        self._places: list[tuple[int, int]] = []
        for fact, (tokens, positions) in zip(facts, _tokens_of(model, facts, at), strict=True):
            model.require_positions(fact.text, len(tokens))
            keys = []
            for position in positions:
                before = tokens[: position + 1]
                if before in apart:
                    continue
                if before not in seen:
                    seen[before] = len(self._places)
                    self._places.append((len(self._texts), position))
                keys.append(seen[before])
            self._texts.append(tokens)
            self._of_fact.append(keys)

    def chosen(self, facts: NDArray[np.bool_]) -> list[int]:
        """The numbers of the keys that stand for some of the facts, ascending."""
        kept = (keys for keys, one in zip(self._of_fact, facts, strict=True) if one)
        return sorted(set().union(*kept))

    def keys_at(self, layer: int) -> Array:
        """All their keys in the model as it is now, (n, d_m)."""
        decoder = self._model.decoder
        keys: Array = np.empty((len(self._places), decoder.projections[layer].width))
        of_text: dict[int, list[tuple[int, int]]] = {}
        for number, (text, position) in enumerate(self._places):
            of_text.setdefault(text, []).append((number, position))
        read = sorted(of_text)
        batches = padded_batches([self._texts[text] for text in read], self._model.boundary)
        for rows, input_ids in batches:
            for row, values in zip(rows, decoder.keys_of(layer, input_ids), strict=True):
                numbers, positions = zip(*of_text[read[row]], strict=True)
                keys[list(numbers)] = values[list(positions)].double().cpu().numpy()
        return keys

    def affordable(
        self,
        metric: Metric,
        keys: Array,
        edited: tuple[Array, Array],
        protection: Protection,
    ) -> Affordable:
        """Which facts can be protected at the price asked for, in `metric` and its `keys`.

        `edited` are the keys along and at which each edit is written. As long as an edit costs
        more, those facts go that share most with the dearest one's key: a part of those left.
        """
        kept = np.array([bool(own) for own in self._of_fact], dtype=bool)
        limit = protection.max_price
        shared = self._shares(metric, keys, edited[0]) if limit else None
        while True:
            try:
                protected = self.metric(metric, keys, kept, protection.ridge)
                of_edits = prices(metric, protected, *edited)
            except NoRoomError:
                if limit is None:
                    raise
                of_edits = np.full(len(edited[0]), np.inf)
            if limit is None or shared is None or of_edits.max() <= limit:
                return Affordable(kept, of_edits, protected)
            share = np.where(kept, shared[of_edits == of_edits.max()].max(axis=0), -1.0)
            kept[np.argsort(-share)[: max(1, int(kept.sum()) // DROPPED_AT_ONCE)]] = False

    def metric(self, base: Metric, keys: Array, facts: NDArray[np.bool_], ridge: float) -> Metric:
        """The metric in which `facts` are protected; `base` where none is."""
        chosen = self.chosen(facts)
        return protect(base, keys[chosen], ridge) if chosen else base

    def _shares(self, metric: Metric, keys: Array, edited: Array) -> Array:
        """The part of each edit's whitened key that lies among each fact's own: (b, facts)."""
        whitened = metric.whiten(edited)
        whitened = whitened / np.linalg.norm(whitened, axis=0)
        shares = np.zeros((len(edited), len(self.facts)))
        for number, own in enumerate(self._of_fact):
            if own:
                of_fact: Protected = protect(metric, keys[own])
                shares[:, number] = ((of_fact.basis.T @ whitened) ** 2).sum(axis=0)
        return shares


def say_protected(
    facts: ProtectedFacts,
    kept: NDArray[np.bool_],
    prices: Array,
    protection: Protection,
    reporter: Reporter,
) -> None:
    """Say what is protected, and at what price, and name the facts that are not."""
    left = len(facts.facts) - int(kept.sum())
    at = "the subjects' last tokens" if protection.at == "subject" else "all tokens"
    keys = len(facts.chosen(kept))
    times = f"{prices.min():.2f} to {prices.max():.2f} times (median {np.median(prices):.2f})"
    if len(prices) == 1:
        times = f"{prices[0]:.2f} times"
    reporter.note(
        f"protected at {at}: {int(kept.sum()):,} of {len(kept):,} facts, by {keys:,} keys. At the "
        f"first edited layer an edit changes all text {times} as much as a plain one. "
        "Any p of an edit is that of a plain one."
    )
    if left:
        names = [fact.subject for fact, one in zip(facts.facts, kept, strict=True) if not one]
        more = f" and {left - NAMED} more" if left > NAMED else ""
        limit = protection.max_price
        dear = f"to protect them costs more than --max-price {limit:g}, or " if limit else ""
        reporter.warn(
            f"left unprotected, since {dear}all their keys are an edited fact's too: "
            f"{', '.join(names[:NAMED])}{more}."
        )


def _tokens_of(
    model: LoadedModel, facts: Sequence[Fact], at: Literal["tokens", "subject"]
) -> list[tuple[Tokens, Sequence[int]]]:
    """The tokens of each fact, and the positions at which its keys are protected."""
    if at == "subject":
        located = locate_keys(model.tokenizer, facts)
        return [(each.token_ids, [each.position]) for each in located]
    texts, targets = [fact.text for fact in facts], [fact.target for fact in facts]
    clozes = tokenize_clozes(model.tokenizer, texts, targets)
    whole = [cloze.prompt_ids + cloze.target_ids for cloze in clozes]
    return [(tokens, range(len(tokens))) for tokens in whole]
