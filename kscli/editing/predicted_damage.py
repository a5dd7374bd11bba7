"""What editing facts would do to the others, from P alone: before any edit, without a model.

An edit of fact i by delta moves the value of fact j by P[i, j] delta, so |P[i, j]| is the damage
per unit of |delta|. Of n edits an original fact is moved by all (equation 11), an edited one
by the later ones (equation 15). How far depends on how the delta lie to one another: with
independent ones the squares add up, with aligned ones the sizes, and nothing is worse than that.

Facts of the same text are one fact: what an edit does to its own copies is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.pairs import Pair, pair_facts, pair_record
from kscli.editing.choice import Order, edit_order, sequence_interference
from kscli.errors import UsageError

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile

HARMFUL = 0.25
"""A |p| above this counts as harm in `layer_rows`."""

Real = NDArray[np.float64]

ROUNDING = 1e-6
Mask = NDArray[np.bool_]


def other_facts(pm: PMatrixFile) -> Mask:
    """Which facts are not one another's copies, (m, m): those whose texts differ."""
    texts = np.array([fact.text for fact in pm.facts], dtype=object)
    return np.asarray(texts[:, None] != texts[None, :])


def moved_rows(
    pm: PMatrixFile, layer: int, edited: Sequence[int], k: int | None = None
) -> list[dict[str, Any]]:
    """For each edited fact the `k` (None: all) others of largest |p|, as flat records.

    The records are those of `kscli.analysis.pairs.pair_rows`, i edited and j moved, with `damage`,
    which is |p|; rank 1 is the largest, and equals are in the order of the facts.
    """
    P, others = pm.matrix("P", layer), other_facts(pm)
    rows = []
    for i in edited:
        order = np.argsort(-np.abs(P[i]), kind="stable")
        moved = [int(j) for j in order if others[i, j]][:k]
        rows += [
            pair_record(pm, layer, rank, Pair(i, j, float(P[i, j])))
            | {"damage": abs(float(P[i, j]))}
            for rank, j in enumerate(moved, start=1)
        ]
    return rows


def layer_rows(
    pm: PMatrixFile, layers: Sequence[int], edited: Sequence[int]
) -> list[dict[str, Any]]:
    """What editing the facts does to all others, one flat record a layer.

    `rms` is the root mean square of p from each of them, edited, to each other fact, `largest` the
    largest |p|, with its two facts, and `harmful` the share of |p| above `HARMFUL`; NaN and None
    where there is no other fact. `reaches` is False at the last layer where a fact's key is not at
    its prompt's end: nothing reads there what the edit writes. `least` marks the layer of least rms
    among those that reach the answer, and `chosen` is that of `chosen_layer`. `text_rms` is the rms
    of p from the edited facts to all tokens of the corpus.
    """
    others = other_facts(pm)[list(edited)]
    rows = []
    for layer in layers:
        P = pm.matrix("P", layer)[list(edited)]
        size = np.where(others, np.abs(P), 0.0)
        pairs = int(others.sum())
        rms = math.sqrt(float(np.square(size).sum()) / pairs) if pairs else math.nan
        row, column = np.unravel_index(int(size.argmax()), size.shape)
        i, j = (edited[int(row)], int(column)) if pairs else (None, None)
        rows.append(
            {
                "model": pm.model,
                "layer": layer,
                "edits": len(edited),
                "rms": rms,
                "largest": float(size.max()) if pairs else math.nan,
                "harmful": float((size > HARMFUL).sum()) / pairs if pairs else math.nan,
                "i": i,
                "j": j,
                **(
                    dict.fromkeys(("subject_i", "subject_j"))
                    if i is None or j is None
                    else _subjects(pm, i, j)
                ),
                "reaches": _reaches(pm, layer, edited),
                **_reach_of_paraphrases(pm, layer, edited, rms),
                "text_rms": _text_rms(pm, layer, edited),
            }
        )
    least, chosen = least_layer(rows), chosen_layer(rows)
    return [
        {**row, "least": row["layer"] == least, "chosen": row["layer"] == chosen} for row in rows
    ]


def chosen_layer(rows: Sequence[dict[str, Any]]) -> int | None:
    """The layer to edit: of least `ratio` among `layer_rows` that reach the answer.

    An edit moves a fact's paraphrases by p to them, times delta, and another fact by p to that. So
    to move the paraphrases by 1 it moves another fact by the `ratio`, in root mean square. None
    where no edited fact has a paraphrase.
    """
    able = [row for row in rows if row["reaches"] and row["ratio"] is not None]
    return min(able, key=lambda row: row["ratio"])["layer"] if able else None


def price_rows(
    pm: PMatrixFile, layer: int, edited: Sequence[int], k: int | None = None
) -> list[dict[str, Any]]:
    """Of the edits that protect all other facts at their subjects the `k` (None: all) dearest.

    Flat records: `price` as `protection_prices`, `text_rms`, the rms of p from the fact to the
    tokens of the corpus, `rms` that to the other facts, and the mean p to its paraphrases.
    """
    prices, P = protection_prices(pm, layer, edited), pm.matrix("P", layer)
    others, paraphrase_p = other_facts(pm), pm.paraphrase_p(layer)
    rows = []
    for rank, at in enumerate(np.argsort(-prices, kind="stable")[:k].tolist(), 1):
        index = edited[at]
        fact, moved = pm.facts[index], P[index][others[index]]
        rows.append(
            {
                "model": pm.model,
                "layer": layer,
                "rank": rank,
                "price": float(prices[at]),
                "text_rms": _text_rms(pm, layer, [index]),
                "rms": math.sqrt(float((moved**2).mean())) if len(moved) else None,
                "paraphrase_p": None
                if math.isnan(paraphrase_p[index])
                else float(paraphrase_p[index]),
                "fact": index,
                "subject": fact.subject,
                "prompt": fact.prompt,
                "target": fact.target,
            }
        )
    return rows


def _reach_of_paraphrases(
    pm: PMatrixFile, layer: int, edited: Sequence[int], rms: float
) -> dict[str, float | None]:
    """The median p to the edited facts' paraphrases, and the `rms` of p to others by that median.

    Both are None where there is no paraphrase, or no other fact (`rms` is NaN); the ratio also
    where the paraphrases are not reached, p <= 0.
    """
    own = pm.paraphrase_p(layer)[list(edited)]
    own = own[~np.isnan(own)]
    if not len(own) or math.isnan(rms):
        return {"paraphrase_p": None, "ratio": None}
    median = float(np.median(own))
    return {"paraphrase_p": median, "ratio": rms / median if median > 0 else None}


def _text_rms(pm: PMatrixFile, layer: int, edited: Sequence[int]) -> float | None:
    """The rms of p from edited facts to all tokens of the corpus; of the paper's p only.

    E (d^T k)^2 = d^T C d over the corpus, which is 1 / k_i^T C^-1 k_i for d = C^-1 k_i over that.
    """
    if pm.about.editor:
        return None
    return math.sqrt(float((1 / pm.leverage(layer)[list(edited)]).mean()))


def least_layer(rows: Sequence[dict[str, Any]]) -> int | None:
    """The layer of least rms among `layer_rows` that reach the answer, the first of equals."""
    able = [row for row in rows if row["reaches"] and not math.isnan(row["rms"])]
    return min(able, key=lambda row: row["rms"])["layer"] if able else None


def moved_rows_of(
    pm: PMatrixFile,
    layers: Sequence[int],
    edited: Sequence[int],
    k: int | None,
    of_layers: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """`moved_rows` of several layers, each with the `least_layer` of the `layer_rows` of all."""
    least = least_layer(of_layers)
    return [
        {**row, "least_layer": least}
        for layer in layers
        for row in moved_rows(pm, layer, edited, k)
    ]


def priced_layer_rows(
    pm: PMatrixFile, layers: Sequence[int], edited: Sequence[int]
) -> list[dict[str, Any]]:
    """`layer_rows` with the median and the largest of `protection_prices`, of the paper's p."""
    rows = layer_rows(pm, layers, edited)
    if not pm.about.editor:
        for row in rows:
            prices = protection_prices(pm, row["layer"], edited)
            row |= {"price": float(np.median(prices)), "price_largest": float(prices.max())}
    return rows


def risk_rows(
    pm: PMatrixFile,
    layers: Sequence[int],
    edited: Sequence[int],
    by: Literal["fact", "layer", "price", "sequence"],
    k: int | None = None,
    order: Order = "given",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One of the four lists of `kscli risk`; `order` and `seed` are those of a sequence."""
    if by == "layer":
        return priced_layer_rows(pm, layers, edited)
    if by == "price":
        require_papers(pm)
        return [row for layer in layers for row in price_rows(pm, layer, edited, k)]
    if by == "sequence":
        risks = [sequence_risk(pm, layer, edited, order, seed) for layer in layers]
        return [row for each in risks for row in sequence_rows(pm, each, k)]
    return moved_rows_of(pm, layers, edited, k, layer_rows(pm, pm.layers, edited))


def require_papers(pm: PMatrixFile) -> None:
    """Raise UsageError where P is an editor's, of which there is no price."""
    if pm.about.editor:
        raise UsageError("--price is of the paper's p; leave --editor out.")


@dataclass(frozen=True)
class Shifts:
    """How far a sequence of edits moves every fact at one layer, per unit of |delta|; all (m,).

    `expected` is the root of the sum of p^2, `worst` the sum of |p|, over all edits, or over those
    after the fact's own. `place` is the number of the fact's own edit, from 1; 0: it is not edited.
    `by` is the edit's fact that moves it most, -1 where none does.
    """

    expected: Real
    worst: Real
    place: NDArray[np.int64]
    by: NDArray[np.int64]


def sequence_shifts(P: Real, sequence: Sequence[int]) -> Shifts:
    """Equations 11 and 15 for edits of `sequence`, distinct indexes into P (m, m), in that order.

    P[i, j] = 0 stands for pairs that are not to be counted, the diagonal among them.
    """
    place = np.zeros(len(P), dtype=np.int64)
    place[list(sequence)] = np.arange(1, len(sequence) + 1)
    later = place[list(sequence)][:, None] > place[None, :]
    size = np.where(later, np.abs(P[list(sequence)]), 0.0)
    by = np.asarray(sequence, dtype=np.int64)[size.argmax(axis=0)]
    return Shifts(
        expected=np.sqrt(np.square(size).sum(axis=0)),
        worst=size.sum(axis=0),
        place=place,
        by=np.where(size.max(axis=0) > 0, by, -1),
    )


@dataclass(frozen=True)
class SequenceRisk:
    """A planned sequence at one layer, in its order and in the order `norm`.

    `interference` and `interference_norm` are the sums of p^2 over later and earlier edits: what
    the order decides, and the least that one can make of it.
    """

    layer: int
    order: Order
    sequence: tuple[int, ...]
    shifts: Shifts
    norm: Shifts
    interference: float
    interference_norm: float

    @property
    def saved(self) -> float:
        """The share of the interference that the order `norm` saves."""
        return 1 - self.interference_norm / self.interference if self.interference else 0.0

    @property
    def largest(self) -> float:
        """The largest expected shift of a fact."""
        return float(self.shifts.expected.max())


def sequence_risk(
    pm: PMatrixFile, layer: int, edited: Sequence[int], order: Order = "given", seed: int = 0
) -> SequenceRisk:
    """What edits of distinct facts, in the order asked for, would do at a layer."""
    P = np.where(other_facts(pm), pm.matrix("P", layer), 0.0)
    leverage = pm.leverage(layer)
    sequence = edit_order(order, leverage, edited, seed)
    norm = edit_order("norm", leverage, edited, seed)
    return SequenceRisk(
        layer,
        order,
        tuple(sequence),
        sequence_shifts(P, sequence),
        sequence_shifts(P, norm),
        sequence_interference(P, sequence),
        sequence_interference(P, norm),
    )


def protection_prices(pm: PMatrixFile, layer: int, edited: Sequence[int]) -> Real:
    """What it costs each edit (n,) to move no other fact of the file at its subject's last token.

    The price is G_ee (G^-1)_ee over the Gram matrix G of all keys (see `kscli.editing.protection`),
    so the diagonal of the inverse of the whitened cosines. Facts of one text count once. What is
    below `ROUNDING`, in the spectrum of the cosines, P's storage in float32 does not tell; there a
    price is the least that it can be.
    """
    first: dict[str, int] = {}
    for index, fact in enumerate(pm.facts):
        first.setdefault(fact.text, index)
    once = list(first.values())
    place = {text: number for number, text in enumerate(first)}
    cosines = pm.matrix("whitened_cosine", layer)[np.ix_(once, once)]
    sizes, vectors = np.linalg.eigh(cosines)
    prices = (vectors**2) @ (1 / np.maximum(sizes, ROUNDING))
    return np.array([prices[place[pm.facts[index].text]] for index in edited])


def sequence_rows(
    pm: PMatrixFile, risk: SequenceRisk, k: int | None = None
) -> list[dict[str, Any]]:
    """Of the original facts and then of the edited ones the `k` (None: all) that move most.

    Flat records; `state` is `original` or `edited`, `rank` counts within it by `expected`. Those
    that end in `_norm` are the same in the order `norm`, `edit` is the number of the fact's own
    edit, and `i`, `p_i` the edited fact that moves it most.
    """
    P = pm.matrix("P", risk.layer)
    is_edited = risk.shifts.place > 0
    by_damage = np.argsort(-risk.shifts.expected, kind="stable")
    rows = []
    for state, chosen in (("original", ~is_edited), ("edited", is_edited)):
        listed = [int(j) for j in by_damage if chosen[j]][:k]
        rows += [
            {
                "model": pm.model,
                "layer": risk.layer,
                "edits": len(risk.sequence),
                "order": risk.order,
                "state": state,
                "rank": rank,
                "fact": j,
                "subject": pm.facts[j].subject,
                "prompt": pm.facts[j].prompt,
                "target": pm.facts[j].target,
                "edit": int(risk.shifts.place[j]) or None,
                "expected": float(risk.shifts.expected[j]),
                "worst": float(risk.shifts.worst[j]),
                **_mover(pm, P, int(risk.shifts.by[j]), j),
                "edit_norm": int(risk.norm.place[j]) or None,
                "expected_norm": float(risk.norm.expected[j]),
                "worst_norm": float(risk.norm.worst[j]),
                "interference": risk.interference,
                "interference_norm": risk.interference_norm,
                "saved": risk.saved,
            }
            for rank, j in enumerate(listed, start=1)
        ]
    return rows


def _mover(pm: PMatrixFile, P: Real, i: int, j: int) -> dict[str, Any]:
    if i < 0:
        return {"i": None, "subject_i": None, "p_i": None}
    return {"i": i, "subject_i": pm.facts[i].subject, "p_i": float(P[i, j])}


def _subjects(pm: PMatrixFile, i: int, j: int) -> dict[str, str]:
    of_pair = pair_facts(pm.facts, i, j)
    return {name: of_pair[name] for name in ("subject_i", "subject_j")}


def _reaches(pm: PMatrixFile, layer: int, edited: Sequence[int]) -> bool:
    """Whether an edit at the layer can change the answers to all edited facts' prompts."""
    if layer < pm.about.n_layers - 1 or pm.about.token == "last":
        return True
    return pm.about.token == "subject-last" and all(
        pm.facts[index].subject_span[1] == len(pm.facts[index].text) for index in edited
    )
