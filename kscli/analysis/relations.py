"""p between facts of one relation, beside p between facts of different relations.

A relation is what the facts' file says (CounterFact's P103 is a person's mother tongue). Three
things pass for it. Two subjects that end in one token have like keys whatever the facts say, so
such pairs are left out everywhere. Two prompts with the same text before the subject give the
subject the same context, and facts of one relation often have it; such pairs are kept apart,
where text that is empty counts as no text. And a mean over few pairs is large by chance, so
each is put beside the same mean under relations dealt out to the facts at random.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import different_last_token
from kscli.analysis.pairs import FactMatrices
from kscli.errors import FactsError, UsageError
from kscli.layers import format_layers
from kscli.reporter import SILENT, Reporter
from kscli.wikidata import titled

if TYPE_CHECKING:
    from kscli.facts import Fact

FEWEST_FACTS = 3
THREADS = 2
BLOCK_BYTES = 2**27  # of the layers that are put beside permuted relations at once
FEW_RELATIONS = 3  # that are named of a layer

# The pairs that a mean is over: those within a relation, and those across, all of them and by
# whether both prompts have the same text before the subject.
WITHIN = ("within", "within_same_text", "within_other_text")
ACROSS = ("across", "across_same_text", "across_other_text")
# Those that are put beside permuted relations: relations and texts go together, so under
# permuted relations hardly a pair within one has the same text.
TESTED = ("within", "within_other_text")

Real = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Relation:
    """A relation of at least `FEWEST_FACTS` facts; `facts` are their indices.

    `example` is the prompt that most of them have, `{}` where the subject goes.
    """

    name: str
    facts: tuple[int, ...]
    example: str

    @property
    def title(self) -> str:
        """The name beside Wikidata's id, where it is one: `religion (P140)`."""
        return titled(self.name)


@dataclass(frozen=True)
class Permutations:
    """The null: how often, and from which seed, relations are dealt out to the facts anew."""

    count: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class RelationStatistics:
    """Mean |p| by kind of pair, layer and relation; ordered pairs of facts, i edited, j moved.

    `means[kind]` is (layers, R + 1), the last column of all relations together, and so are
    `null_95[kind]`, the 95 % quantile of the same mean under permuted relations, and
    `p_value[kind]`, (1 + permutations with as large a mean) / (1 + permutations), for the kinds
    of `TESTED`. `pairs[kind]` (R + 1,) counts the pairs. A mean over no pair is NaN.

    A relation's pairs across are those with one fact of it and one of another relation, whether
    or not that has enough facts to be in `relations`.
    """

    model: str
    layers: tuple[int, ...]
    relations: tuple[Relation, ...]
    means: dict[str, Real]
    pairs: dict[str, NDArray[np.int64]]
    null_95: dict[str, Real]
    p_value: dict[str, Real]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a layer and relation; that of all together has the relation None."""
        names: list[str | None] = [relation.name for relation in self.relations]
        examples: list[str | None] = [relation.example for relation in self.relations]
        sizes = [len(relation.facts) for relation in self.relations]
        return [
            {
                "model": self.model,
                "layer": layer,
                "relation": [*names, None][column],
                "example": [*examples, None][column],
                "facts": [*sizes, sum(sizes)][column],
                **{kind: float(self.means[kind][at, column]) for kind in WITHIN + ACROSS},
                **{f"pairs_{kind}": int(self.pairs[kind][column]) for kind in WITHIN + ACROSS},
                **{f"null_95_{kind}": float(self.null_95[kind][at, column]) for kind in TESTED},
                **{f"p_value_{kind}": float(self.p_value[kind][at, column]) for kind in TESTED},
            }
            for at, layer in enumerate(self.layers)
            for column in range(len(names) + 1)
        ]

    def by_layer(self) -> list[dict[str, Any]]:
        """The records of all relations together, a layer each, and the `hardest` relations.

        These are the ones of largest mean |p| above 95 % of the permuted ones, with that mean, by
        id and by title.
        """
        rows = self.rows()
        found = []
        for together in (row for row in rows if row["relation"] is None):
            above = [
                row
                for row in rows
                if row["layer"] == together["layer"] and row["relation"] and _above_null(row)
            ]
            above.sort(key=lambda row: -row["within_other_text"])
            named = [
                [f"{name(row['relation'])} {row['within_other_text']:.2f}" for row in above]
                for name in (str, titled)
            ]
            ids, titles = (", ".join(one[:FEW_RELATIONS]) or None for one in named)
            found.append({**together, "hardest": ids, "hardest_titles": titles})
        return found

    def by_relation(self) -> list[dict[str, Any]]:
        """A record a relation, the one of largest mean |p| first.

        `by_layer` is its mean |p| at every layer, `largest` the largest of these, `null` what 95 %
        of permuted relations have below at that layer, `hardest_at` the layer, and `above_at` the
        layers where it is above the null.
        """
        found = []
        rows = self.rows()
        for name in (relation.name for relation in self.relations):
            own = [row for row in rows if row["relation"] == name]
            defined = [row for row in own if not math.isnan(row["within_other_text"])]
            hardest = max(defined, key=lambda row: row["within_other_text"], default=None)
            found.append(
                {
                    **own[0],
                    "title": titled(name),
                    "pairs": own[0]["pairs_within_other_text"],
                    "by_layer": {row["layer"]: row["within_other_text"] for row in own},
                    "largest": hardest["within_other_text"] if hardest else None,
                    "null": hardest["null_95_within_other_text"] if hardest else None,
                    "hardest_at": hardest["layer"] if hardest else None,
                    "above_at": format_layers([r["layer"] for r in own if _above_null(r)]) or None,
                }
            )
        return sorted(
            found, key=lambda row: math.inf if row["largest"] is None else -row["largest"]
        )


def _above_null(row: dict[str, Any]) -> bool:
    """Whether a relation binds harder than 95 % of permuted ones; not where undefined."""
    return bool(row["within_other_text"] > row["null_95_within_other_text"])


def relation_statistics(
    pm: FactMatrices,
    layers: Sequence[int],
    permutations: Permutations | None = None,
    reporter: Reporter = SILENT,
) -> RelationStatistics:
    """Mean |p| within and across relations at `layers`, a few layers in memory at a time.

    Facts without a relation take no part. Raises FactsError where no relation has
    `FEWEST_FACTS` facts, or all facts of one have their keys at one token, and UsageError for
    less than one permutation.
    """
    permutations = permutations or Permutations()
    if permutations.count < 1:
        raise UsageError(f"{permutations.count} permutations were asked for; ask for 1 or more.")
    relations = find_relations(pm)
    groups = _Groups.of(pm, relations)
    null = _Null(groups, permutations)
    pairs = {kind: groups.sums(kind, groups.masks[kind]) for kind in WITHIN + ACROSS}
    shape = (len(layers), len(relations) + 1)
    means = {kind: np.full(shape, np.nan) for kind in WITHIN + ACROSS}
    null_95, p_value = (
        {kind: np.full(shape, np.nan) for kind in TESTED} for _ in ("null_95", "p_value")
    )
    with reporter.task("relations", len(layers), unit="layers") as task:
        for block in _blocks(len(layers), len(pm.facts)):
            sizes = [np.abs(pm.matrix("P", layers[at])) for at in block]
            for at, size in zip(block, sizes, strict=True):
                for kind in WITHIN + ACROSS:
                    sums = groups.sums(kind, np.where(groups.masks[kind], size, 0.0))
                    means[kind][at] = _ratio(sums, pairs[kind])
            for kind, of_layers in null.means(sizes).items():
                for at, values in zip(block, of_layers, strict=True):
                    null_95[kind][at] = _quantile_95(values)
                    p_value[kind][at] = _p_values(means[kind][at], values)
            task.advance(len(block))
    counts = {kind: np.rint(count).astype(np.int64) for kind, count in pairs.items()}
    return RelationStatistics(pm.model, tuple(layers), relations, means, counts, null_95, p_value)


def relation_matrix(pm: FactMatrices, layer: int) -> Real:
    """Mean |p| from facts of one relation, edited, to those of another, moved: (R, R).

    Over pairs whose keys are at different tokens and whose prompts have other text before the
    subject, NaN where there are none; in the order of `find_relations`, and raises as that does.
    """
    relations = find_relations(pm)
    pairs = different_last_token(pm.token_id) & ~_same_text(pm.facts)
    member = _membership(relations, len(pm.facts))
    sums = member.T @ np.where(pairs, np.abs(pm.matrix("P", layer)), 0.0) @ member
    return _ratio(sums, member.T @ pairs @ member)


def find_relations(pm: FactMatrices) -> tuple[Relation, ...]:
    """The relations of at least `FEWEST_FACTS` facts, by name, P9 before P10.

    Raises FactsError where there is none, or where no two facts of one relation have their keys
    at different tokens.
    """
    of_facts = [fact.relation for fact in pm.facts]
    sizes = Counter(name for name in of_facts if name.strip())
    if not sizes:
        raise FactsError(
            f"the facts of {pm.model} have no relation; give `kscli extract` a facts file whose "
            "records have one."
        )
    names = sorted((name for name, n in sizes.items() if n >= FEWEST_FACTS), key=_natural)
    if not names:
        name, n = sizes.most_common(1)[0]
        raise FactsError(
            f"no relation of the facts of {pm.model} has {FEWEST_FACTS} facts (the largest, "
            f"{name}, has {n}); extract more facts with --count."
        )
    relations = tuple(
        Relation(
            name,
            tuple(at for at, other in enumerate(of_facts) if other == name),
            Counter(fact.prompt for fact in pm.facts if fact.relation == name).most_common(1)[0][0],
        )
        for name in names
    )
    if all(len(set(pm.token_id[list(relation.facts)].tolist())) == 1 for relation in relations):
        raise FactsError(
            f"within each relation the subjects of the facts of {pm.model} end in the same token, "
            "which by itself makes p large; extract more facts with --count."
        )
    return relations


def text_before(fact: Fact) -> str:
    """What the prompt says before the subject."""
    return fact.prompt[: fact.subject_span[0]]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """For sorting names so that their numbers count as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _same_text(facts: Sequence[Fact]) -> Mask:
    """Which pairs of facts have the same text before the subject, and have any."""
    texts = np.array([text_before(fact).strip() for fact in facts], dtype=object)
    some = texts != ""
    return np.asarray((texts[:, None] == texts[None, :]) & some[:, None] & some[None, :])


def _membership(relations: Sequence[Relation], m: int) -> Real:
    """(m, R), 1 where the fact is of the relation."""
    member = np.zeros((m, len(relations)))
    for column, relation in enumerate(relations):
        member[list(relation.facts), column] = 1
    return member


@dataclass(frozen=True)
class _Groups:
    """The facts by relation, and which pairs of them each kind of mean is over."""

    relations: tuple[Relation, ...]
    member: Real
    related: NDArray[np.intp]
    masks: dict[str, Mask]

    @classmethod
    def of(cls, pm: FactMatrices, relations: tuple[Relation, ...]) -> _Groups:
        names = np.array([fact.relation for fact in pm.facts], dtype=object)
        related = np.array([bool(name.strip()) for name in names])
        apart = different_last_token(pm.token_id) & related[:, None] & related[None, :]
        one = names[:, None] == names[None, :]
        same = _same_text(pm.facts)
        masks = {"within": apart & one, "across": apart & ~one}
        for kind in ("within", "across"):
            masks[f"{kind}_same_text"] = masks[kind] & same
            masks[f"{kind}_other_text"] = masks[kind] & ~same
        # What permuted relations may make a pair within one.
        masks["apart"], masks["apart_other_text"] = apart, apart & ~same
        member = _membership(relations, len(pm.facts))
        return cls(relations, member, np.flatnonzero(related), masks)

    def sums(self, kind: str, values: NDArray[Any]) -> Real:
        """The sum of (m, m) values, 0 beyond the kind's mask, by relation and in all: (R + 1,)."""
        values = values.astype(np.float64)
        if kind in WITHIN:
            of_each = ((values @ self.member) * self.member).sum(axis=0)
            return np.append(of_each, of_each.sum())
        return np.append((values.sum(axis=0) + values.sum(axis=1)) @ self.member, values.sum())


class _Null:
    """Mean |p| within relations that were dealt out to the facts at random.

    The relations keep their sizes, and the facts their keys, tokens and texts; the same
    permutations serve every layer.
    """

    def __init__(self, groups: _Groups, permutations: Permutations) -> None:
        rng = np.random.default_rng(permutations.seed)
        m = len(groups.member)
        self._dealt = np.tile(np.arange(m), (permutations.count, 1))
        shuffled = np.tile(groups.related, (permutations.count, 1))
        self._dealt[:, groups.related] = rng.permuted(shuffled, axis=1)
        self._masks = {"within": groups.masks["apart"]}
        self._masks["within_other_text"] = groups.masks["apart_other_text"]
        # P is not symmetric, but a sum over both orders of a pair is.
        corners = [np.triu_indices(len(relation.facts), 1) for relation in groups.relations]
        places = [np.array(relation.facts) for relation in groups.relations]
        self._i = np.concatenate([at[i] for at, (i, _) in zip(places, corners, strict=True)])
        self._j = np.concatenate([at[j] for at, (_, j) in zip(places, corners, strict=True)])
        self._starts = np.cumsum([0, *(len(i) for i, _ in corners)])[:-1]
        masks = [mask.astype(np.float64) for mask in self._masks.values()]
        self._counts = dict(zip(self._masks, self._sums(masks), strict=True))

    def means(self, sizes: Sequence[Real]) -> dict[str, list[Real]]:
        """(permutations, R + 1) means of each |P| (m, m) over the pairs of every kind."""
        masked = [np.where(mask, size, 0.0) for mask in self._masks.values() for size in sizes]
        sums = iter(self._sums(masked))
        return {
            kind: [_ratio(next(sums), self._counts[kind]) for _ in sizes] for kind in self._masks
        }

    def _sums(self, values: Sequence[Real]) -> list[Real]:
        """The sums of several (m, m) values by permuted relation, (permutations, R + 1) each.

        All values of a pair lie side by side, since the pairs that are looked up lie far apart.
        """
        m = len(values[0])
        table = np.empty((m * m, len(values)))
        for at, each in enumerate(values):
            table[:, at] = (each + each.T).ravel()
        sums = np.empty((len(self._dealt), len(self._starts) + 1, len(values)))

        def sum_up(permutations: range) -> None:
            picked = np.empty((len(self._i), len(values)))
            for at in permutations:
                facts = self._dealt[at]
                np.take(table, facts[self._i] * m + facts[self._j], axis=0, out=picked, mode="clip")
                np.add.reduceat(picked, self._starts, axis=0, out=sums[at, :-1])

        # NumPy's work in one thread leaves the interpreter to another.
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(sum_up, [range(at, len(sums), THREADS) for at in range(THREADS)]))
        sums[:, -1] = sums[:, :-1].sum(axis=1)
        return list(np.moveaxis(sums, 2, 0))


def _blocks(layers: int, m: int) -> list[range]:
    """Indexes of layers in blocks whose values are worked on together, within `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // (8 * len(TESTED) * m**2))
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def _ratio(sums: Real, counts: Real) -> Real:
    """`sums` over `counts`, NaN where there is nothing to count."""
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def _quantile_95(values: Real) -> Real:
    """By column, over what is defined; NaN where nothing is."""
    return np.array(
        [
            np.quantile(column[np.isfinite(column)], 0.95) if np.isfinite(column).any() else np.nan
            for column in values.T
        ]
    )


def _p_values(observed: Real, null: Real) -> Real:
    """How rarely permuted relations have as large a mean; those without a pair do not count."""
    # Equal means, summed in another order, are equal to rounding only.
    as_large = (null >= observed * (1 - 1e-12)).sum(axis=0)
    defined = np.isfinite(null).sum(axis=0)
    values = (1 + as_large) / (1 + defined)
    return np.asarray(np.where(np.isfinite(observed), values, np.nan))
