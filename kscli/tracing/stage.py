"""trace: from two models and C to which candidates were edited; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kscli.artifacts import CovarianceFile
from kscli.contexts import ContextChoice
from kscli.editing.sources import require_about
from kscli.errors import ModelError
from kscli.facts import FactSet
from kscli.models.loading import LoadedModel
from kscli.positions import locate_keys
from kscli.reporter import Reporter
from kscli.tracing.candidates import Candidates, directions_of_editors, read_candidates
from kscli.tracing.differences import Differences, compare_models
from kscli.tracing.row_space import RowSpace, row_space
from kscli.tracing.trace import Traced, trace_layer


@dataclass(frozen=True)
class TracedLayer:
    """One layer whose W differs: the rank of dW, |dW| / |W|, and what was traced in it."""

    layer: int
    rank: int
    size: float
    traced: Traced


@dataclass(frozen=True)
class Trace:
    """The layers whose down-projections differ, the names of `others` that do, and the facts."""

    layers: tuple[TracedLayer, ...]
    others: tuple[str, ...]
    facts: FactSet

    def rows(self, k: int | None = None) -> list[dict[str, Any]]:
        """Flat records: at each layer the `k` (None: all) candidates of largest share."""
        return [row for each in self.layers for row in self._rows(each, k)]

    def _rows(self, of: TracedLayer, k: int | None) -> Iterator[dict[str, Any]]:
        found = of.traced
        order = sorted(range(len(found.shares)), key=lambda fact: -found.shares[fact])
        for rank, index in enumerate(order[:k], 1):
            fact = self.facts.facts[index]
            bound = found.bound.get(index)
            yield {
                "layer": of.layer,
                "rank_of_change": of.rank,
                "relative_change": of.size,
                "editors": list(found.editors),
                "explained": found.explained,
                "rank": rank,
                "fact": index,
                "subject": fact.subject,
                "prompt": fact.prompt,
                "target": fact.target,
                "share": float(found.shares[index]),
                "p_value": float(found.p_values[index]),
                "edited": index in found.edited,
                "bound_to": None if bound is None else bound,
                "subject_bound_to": None if bound is None else self.facts.facts[bound].subject,
            }


def trace_models(
    base: LoadedModel,
    edited: LoadedModel,
    cov: CovarianceFile,
    facts: FactSet,
    contexts: ContextChoice,
    reporter: Reporter,
    seed: int = 0,
) -> Trace:
    """Which of `facts` were edited where `edited` differs from `base`, whose C is in `cov`.

    Raises ModelError for models of other weights or with another tokenizer, ArtifactError where
    `cov` is about another model or lacks a layer that differs, and what `read_candidates` raises.
    """
    require_about(cov, base)
    _require_same_tokens(base, edited, facts)
    found = compare_models(base, edited)
    layers = tuple(found.changes)
    cov.require_layers(layers)
    if not layers:
        return Trace((), found.others, facts)
    candidates = read_candidates(base, facts, layers, contexts, reporter)
    traced = []
    with reporter.task("tracing", len(layers), unit="layers") as task:
        for layer in layers:
            traced.append(_trace(found, candidates, cov, layer, seed))
            task.advance()
    return Trace(tuple(traced), found.others, facts)


def _trace(
    found: Differences, candidates: Candidates, cov: CovarianceFile, layer: int, seed: int
) -> TracedLayer:
    change = found.changes[layer]
    space: RowSpace = row_space(change)
    several = len(found.changes) > 1
    kinds = directions_of_editors(candidates, cov, layer, several=several, seed=seed)
    return TracedLayer(layer, space.rank, found.sizes[layer], trace_layer(change, space, kinds))


def say_what_differs(trace: Trace, edited: str, reporter: Reporter) -> None:
    """Say which weights differ, and what is said of each layer."""
    if not trace.layers:
        what = "no down-projection differs" if trace.others else "no weight differs"
        reporter.note(f"{edited}: {what}, so no edit of a fact is traced.")
    for each in trace.layers:
        facts = len(each.traced.edited)
        which = f"the directions of {facts} of the facts lie in it"
        editors = ", ".join(each.traced.editors)
        by = f", as {editors} writes them, and explain {each.traced.explained:.0%} of the change"
        if not facts:
            which, by = "no direction of a fact lies in it beyond chance; nothing is claimed", ""
        reporter.note(
            f"layer {each.layer}: the change has rank {each.rank} and |ΔW| / |W| = "
            f"{each.size:.2g}; {which}{by}."
        )
    if trace.others:
        more = f" and {len(trace.others) - 3} more" if len(trace.others) > 3 else ""
        reporter.warn(
            f"weights that no editor of kscli changes differ, too: {', '.join(trace.others[:3])}"
            f"{more}. The model was trained further, or changed otherwise."
        )


def _require_same_tokens(base: LoadedModel, edited: LoadedModel, facts: FactSet) -> None:
    """Raise ModelError where the two tokenizers read the facts' prompts otherwise."""
    both = (locate_keys(model.tokenizer, facts.facts) for model in (base, edited))
    for fact, before, after in zip(facts.facts, *both, strict=True):
        if before != after:
            raise ModelError(
                f"the tokenizers of {base.identity.model_id} and {edited.identity.model_id} read "
                f"{fact.text!r} otherwise; name the model that was edited, and what it became."
            )
