"""The facts that may have been edited: their keys in the base model, and keys of no edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile
from kscli.batching import padded_batches
from kscli.contexts import ContextChoice
from kscli.editing.editors import EDITORS, Editor, find_editor
from kscli.editing.metrics import Cut, Metric, metric_of
from kscli.errors import NumericsError
from kscli.extraction import Keys, extract_keys
from kscli.facts import FactSet
from kscli.models.loading import LoadedModel
from kscli.positions import LocatedPrompt, locate_keys
from kscli.reporter import Reporter
from kscli.slots import stacked

Array = NDArray[np.float64]

MOST_OTHER_TOKENS = 4096
PERMUTED = 40  # so often each candidate's key is permuted


@dataclass(frozen=True)
class Candidates:
    """The keys of m facts in the base model, at some layers, and of their prompts' other tokens.

    `others` (tokens, d_m) by layer are the keys at all tokens but the subjects' last. Keys of
    `n_experts` experts (0: the layers are dense) are stacked.
    """

    keys: Keys
    others: Mapping[int, Array]
    n_experts: int

    def at(self, layer: int) -> AtLayer:
        """Those of one layer."""
        contexts = len(self.keys.contexts)
        mean = self._keys_of("context", layer) if contexts else None
        return AtLayer(self._keys_of("bare", layer), mean, contexts)

    def _keys_of(self, which: str, layer: int) -> Array:
        row = self.keys.layers.index(layer)

        def part(name: str) -> Array | None:
            values = getattr(self.keys, name)
            return None if values is None else values[row]

        return stacked(part, which, self.n_experts)


@dataclass(frozen=True)
class AtLayer:
    """The candidates' keys at one layer, for an editor to choose from."""

    keys: Array
    mean: Array | None
    contexts: int

    def stored(self) -> Array:
        """The bare prompts' keys, (m, d_m)."""
        return self.keys

    def bare(self) -> Array:
        """The bare prompts' keys, (m, d_m)."""
        return self.keys

    def in_contexts(self) -> tuple[Array, int]:
        """The mean keys over the contexts, and the number of contexts."""
        return (self.keys if self.mean is None else self.mean), self.contexts


def read_candidates(
    model: LoadedModel,
    facts: FactSet,
    layers: Sequence[int],
    contexts: ContextChoice,
    reporter: Reporter,
) -> Candidates:
    """Read the keys of facts, and of their prompts' other tokens, at `layers` of the base model.

    Raises as `extract_keys` does.
    """
    spec = ",".join(map(str, layers))
    keys = extract_keys(model, facts, "subject-last", spec, reporter, contexts)
    prompts = locate_keys(model.tokenizer, facts.facts)
    others = {layer: _other_keys(model, layer, prompts) for layer in layers}
    return Candidates(keys, others, model.decoder.n_experts)


def _other_keys(model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]) -> Array:
    """The keys at the tokens of prompts that are no subject's last, each text once."""
    ends = {prompt.token_ids[: prompt.position + 1] for prompt in prompts}
    seen = set(ends)
    found: list[Array] = []
    texts = [prompt.token_ids for prompt in prompts]
    for rows, input_ids in padded_batches(texts, model.boundary):
        for row, keys in zip(rows, model.decoder.keys_of(layer, input_ids), strict=True):
            for end in range(2, len(texts[row]) + 1):
                if texts[row][:end] not in seen and len(found) < MOST_OTHER_TOKENS:
                    seen.add(texts[row][:end])
                    found.append(keys[end - 1].double().cpu().numpy())
    return np.stack(found) if found else np.empty((0, model.decoder.projections[layer].width))


@dataclass(frozen=True)
class Written:
    """The directions, as rows of length 1, along which some `editors` write at one layer.

    `facts` (m, d_m) are the candidates', `decoys` (n, d_m) those of keys that no edit is of: of
    the prompts' other tokens, and of the candidates' keys with their entries permuted.
    """

    editors: tuple[str, ...]
    facts: Array
    decoys: Array


def directions_of_editors(
    candidates: Candidates, cov: CovarianceFile, layer: int, *, several: bool, seed: int
) -> list[Written]:
    """The directions of each kind of editor; `several`: of those that edit several layers, too.

    Editors are of one kind where they write along the same keys in the same metric. Raises what
    `metric_of` raises, but where C has no null space; then no editor could have written in it.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name in EDITORS:
        editor = find_editor(name)
        if editor.over_layers or not several:
            # Without contexts all take the bare prompt's key.
            key = editor.key if candidates.keys.contexts else None
            if candidates.n_experts and not editor.of_experts:
                continue
            kinds.setdefault((editor.direction.metric, key), []).append(name)
    rng = np.random.default_rng(seed)
    at_layer = candidates.at(layer)
    metrics: dict[str, Metric | None] = {}
    found = []
    for names in kinds.values():
        editor = find_editor(names[0])
        metric = _metric(metrics, editor, cov, layer)
        if metric:
            along = editor.key(at_layer).along
            permuted = _permuted(along, cov.widths, rng)
            decoys = np.concatenate([candidates.others[layer], permuted])
            found.append(Written(tuple(names), _along(metric, along), _along(metric, decoys)))
    return found


def _permuted(keys: Array, widths: Sequence[int], rng: np.random.Generator) -> Array:
    """Each of (m, width) keys `PERMUTED` times, its entries permuted in every block of columns."""
    ends = np.cumsum(widths)[:-1]
    repeated = np.split(np.repeat(keys, PERMUTED, axis=0), ends, axis=1)
    return np.concatenate([rng.permuted(part, axis=1) for part in repeated], axis=1)


def _metric(
    known: dict[str, Metric | None], editor: Editor, cov: CovarianceFile, layer: int
) -> Metric | None:
    name = editor.direction.metric
    if name not in known:
        try:
            known[name] = metric_of(name, cov, layer, 0.0, Cut())
        except NumericsError:
            if name != "null-space":
                raise
            known[name] = None
    return known[name]


def _along(metric: Metric, keys: Array) -> Array:
    """M k of (n, d_m) keys, each of length 1; 0 where it is 0."""
    directions = metric.solve(metric.whiten(keys))
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    return np.asarray(directions / np.where(lengths > 0, lengths, 1.0))
