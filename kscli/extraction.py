"""extract: the key of every fact at every layer, in one sweep of batched forward passes.

Editors write along the mean of a fact's keys after several texts too (`kscli.contexts`), and p to
the keys of a fact's paraphrases says how far an edit of it generalises. Further sweeps read these
means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.artifacts import KeysAbout, Recipe, write_artifact
from kscli.batching import BATCH_TOKENS, TokenSequence, make_batches
from kscli.contexts import ContextChoice, in_context
from kscli.errors import NumericsError
from kscli.facts import Fact, FactSet, paraphrases_of
from kscli.layers import format_layers
from kscli.models.experts import RoutedKeys
from kscli.models.loading import LoadedModel
from kscli.models.locating import ModelIdentity
from kscli.positions import KeyToken, LocatedPrompt, has_blank_end, locate_keys
from kscli.records import quote
from kscli.reporter import SILENT, Reporter
from kscli.slots import KEY_NAMES, in_slots, mean_in_slots

NO_CONTEXTS = ContextChoice()

# So many facts in all contexts are read at once, so that memory holds few keys beside the means.
FACTS_AT_ONCE = 8


@dataclass(frozen=True)
class Keys:
    """The keys of m `facts`: `keys` (layer, m, d_m) float32, `token_id` and `position` (m,).

    `context_keys` (layer, m, d_m) are the means of a fact's keys over the `contexts`, the bare
    prompt not among them; None where there are no contexts. `paraphrase_keys` (layer, m, d_m) are
    those over a fact's paraphrases, NaN for a fact without; None where no fact has any. Of layers
    of experts `keys` are (layer, m, slot, d_m), multiplied by the gates, of the `experts` (layer,
    m, slot) that a fact is routed to, -1 being none, and `shared_keys` (layer, m, d_shared) those
    of shared experts (`kscli.slots`); so are the means, in slots of their own.
    """

    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    keys: NDArray[np.float32]
    token_id: NDArray[np.int64]
    position: NDArray[np.int64]
    contexts: tuple[str, ...] = ()
    context_keys: NDArray[np.float32] | None = None
    paraphrase_keys: NDArray[np.float32] | None = None
    experts: NDArray[np.int64] | None = None
    shared_keys: NDArray[np.float32] | None = None
    context_experts: NDArray[np.int64] | None = None
    shared_context_keys: NDArray[np.float32] | None = None
    paraphrase_experts: NDArray[np.int64] | None = None
    shared_paraphrase_keys: NDArray[np.float32] | None = None


def extraction_recipe(
    identity: ModelIdentity,
    facts: FactSet,
    token: str,
    layers: str,
    dtype: str,
    contexts: ContextChoice = NO_CONTEXTS,
) -> Recipe:
    """Everything that decides what keys.h5 holds."""
    return {
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "facts": facts.identity,
        "questions": facts.questions_identity,
        "token": token,
        "layers": layers,
        "dtype": dtype,
        # As it is read back: JSON knows lists, not tuples.
        "contexts": json.loads(json.dumps(asdict(contexts))),
    }


def extract_keys(
    model: LoadedModel,
    facts: FactSet,
    token: KeyToken = "subject-last",
    layers: str = "all",
    reporter: Reporter = SILENT,
    contexts: ContextChoice = NO_CONTEXTS,
) -> Keys:
    """Read the key of every fact at its token, at all chosen layers at once.

    Raises FactsError for a prompt longer than the model's positions, and NumericsError,
    naming layer and fact, when a key is not finite.
    """
    model = model.of_layers(layers, reporter)
    chosen = model.decoder.layers
    prompts = locate_keys(model.tokenizer, facts.facts, token)
    blank = sum(map(has_blank_end, facts.facts))
    if blank:
        reporter.warn(
            f"{blank} of the {len(prompts)} subjects have white space or other unseen characters "
            "at an end; their keys are read at the last token that is seen."
        )
    for fact, prompt in zip(facts.facts, prompts, strict=True):
        model.require_positions(fact.text, len(prompt.token_ids))
    with reporter.task("keys", len(prompts), unit="facts") as task:
        found = _read(model, prompts, chosen, task.advance)
    _require_finite(found, chosen, facts)
    texts = _contexts_of(model, contexts, reporter)
    if texts:
        in_contexts = [[in_context(text, fact) for text in texts] for fact in facts.facts]
        means = _mean_keys(model, in_contexts, token, chosen, "keys behind other texts", reporter)
        _require_finite(means, chosen, facts)
        found |= {KEY_NAMES["context"][name]: values for name, values in means.items()}
    paraphrased = [paraphrases_of(fact) for fact in facts.facts]
    if any(paraphrased):
        means = _mean_keys(model, paraphrased, token, chosen, "keys of paraphrases", reporter)
        found |= {KEY_NAMES["paraphrase"][name]: values for name, values in means.items()}
    return Keys(
        facts=facts.facts,
        layers=chosen,
        **found,
        token_id=np.array([p.token_id for p in prompts], dtype=np.int64),
        position=np.array([p.position for p in prompts], dtype=np.int64),
        contexts=texts,
    )


def _contexts_of(
    model: LoadedModel, contexts: ContextChoice, reporter: Reporter
) -> tuple[str, ...]:
    """The context templates; none where a model without an LM head would have to make them up."""
    if contexts.generated and not model.has_head:
        reporter.warn(
            f"{model.identity.model_id} has no LM head and can make up no contexts, so keys.h5 "
            "holds the bare prompts' keys alone; --contexts FILE takes those of a file."
        )
        return contexts.texts
    return contexts.of(model)


def _mean_keys(
    model: LoadedModel,
    texts: Sequence[Sequence[Fact]],
    token: KeyToken,
    layers: Sequence[int],
    named: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """The mean key over each fact's `texts`, by the names that `_read` gives; NaN without texts."""
    means = _Means(len(layers), len(texts), model.decoder.d_m)
    with reporter.task(named, sum(map(len, texts)), unit="prompts") as task:
        for start in range(0, len(texts), FACTS_AT_ONCE):
            some = texts[start : start + FACTS_AT_ONCE]
            flat = [text for of_fact in some for text in of_fact]
            prompts = [_up_to_key(prompt) for prompt in locate_keys(model.tokenizer, flat, token)]
            for fact, prompt in zip(flat, prompts, strict=True):
                model.require_positions(fact.text, len(prompt.token_ids))
            found = _read(model, prompts, layers, task.advance)
            ends = np.cumsum([*map(len, some)])
            for number, (texts_of, end) in enumerate(zip(some, ends, strict=True), start):
                if texts_of:
                    means.add(number, found, slice(end - len(texts_of), end))
    return means.arrays()


class _Means:
    """The mean keys of m facts at some layers, as they come in."""

    def __init__(self, layers: int, m: int, d_m: int) -> None:
        self._shape, self._d_m = (layers, m), d_m
        self._dense: dict[str, NDArray[np.float32]] = {}
        self._routed: dict[tuple[int, int], Any] = {}

    def add(self, fact: int, found: dict[str, Any], prompts: slice) -> None:
        """Take the mean over these of the prompts that `_read` found keys of."""
        experts = found.get("experts")
        if experts is not None:
            for row in range(len(experts)):
                keys = found["keys"][row, prompts]
                self._routed[row, fact] = mean_in_slots(keys, experts[row, prompts])
        for name in ("shared_keys",) if experts is not None else ("keys",):
            if name in found:
                values = found[name][:, prompts]
                if name not in self._dense:
                    shape = (*self._shape, values.shape[-1])
                    self._dense[name] = np.full(shape, np.nan, dtype=np.float32)
                self._dense[name][:, fact] = values.mean(axis=1, dtype=np.float64)

    def arrays(self) -> dict[str, Any]:
        """The means of all facts; NaN of those without."""
        found: dict[str, Any] = dict(self._dense)
        if self._routed:
            found["keys"], found["experts"] = in_slots(self._routed, self._shape, self._d_m)
            with_texts = [fact for _, fact in self._routed]
            without = np.setdiff1d(np.arange(self._shape[1]), with_texts)
            found["keys"][:, without] = np.nan
        return found


def _up_to_key(prompt: LocatedPrompt) -> LocatedPrompt:
    """A prompt without the tokens after the key's, which the key does not see."""
    return replace(prompt, token_ids=prompt.token_ids[: prompt.position + 1])


def _read(
    model: LoadedModel,
    prompts: Sequence[LocatedPrompt],
    layers: Sequence[int],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """`keys` of prompts at their tokens, and what `Keys` has beside them of layers of experts."""
    read = _read_routed if model.decoder.n_experts else _read_dense
    return read(model, prompts, layers, advance)


def _read_dense(
    model: LoadedModel,
    prompts: Sequence[LocatedPrompt],
    layers: Sequence[int],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """`keys` of prompts at their tokens, (layer, prompts, d_m)."""
    row_of = {layer: row for row, layer in enumerate(layers)}
    keys = np.empty((len(layers), len(prompts), model.decoder.d_m), dtype=np.float32)

    def take(layer: int, hidden: Tensor, indexes: list[int], tokens: Tensor) -> None:
        at = hidden.reshape(-1, hidden.shape[-1])[tokens.to(hidden.device)]
        keys[row_of[layer], indexes] = at.float().cpu().numpy()

    _run(model, prompts, layers, take, advance)
    return {"keys": keys}


def _read_routed(
    model: LoadedModel,
    prompts: Sequence[LocatedPrompt],
    layers: Sequence[int],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """`keys`, `experts` and, where there are, `shared_keys` of prompts at their tokens, as `Keys`.

    As many slots are kept as the most experts of one prompt.
    """
    row_of = {layer: row for row, layer in enumerate(layers)}
    parts: dict[tuple[int, int], tuple[list[int], list[NDArray[np.float32]]]] = {}
    shared: dict[tuple[int, int], NDArray[np.float32]] = {}

    def take(layer: int, keys: RoutedKeys, indexes: list[int], tokens: Tensor) -> None:
        index_of = dict(zip(tokens.tolist(), indexes, strict=True))
        own = keys.of_tokens(tokens)
        gated = own.gated.cpu().numpy()
        for token, expert, key in zip(own.token.tolist(), own.expert.tolist(), gated, strict=True):
            experts, values = parts.setdefault((row_of[layer], index_of[token]), ([], []))
            experts.append(expert)
            values.append(key)
        if own.shared is not None:
            for index, key in zip(indexes, own.shared.cpu().numpy(), strict=True):
                shared[row_of[layer], index] = key

    _run(model, prompts, layers, take, advance)
    shape = len(layers), len(prompts)
    found: dict[str, Any] = {}
    found["keys"], found["experts"] = in_slots(parts, shape, model.decoder.d_m)
    if shared:
        found["shared_keys"] = np.array(
            [[shared[row, index] for index in range(len(prompts))] for row in range(len(layers))]
        )
    return found


def _run(
    model: LoadedModel,
    prompts: Sequence[LocatedPrompt],
    layers: Sequence[int],
    take: Callable[..., None],
    advance: Callable[[int], None],
) -> None:
    """Run prompts: `take` is given a layer, its keys, and which of whose tokens are wanted.

    These are the prompts' indexes, and those of their tokens among a batch's.
    """
    sequences = (TokenSequence(i, p.token_ids) for i, p in enumerate(prompts))
    for batch in make_batches(sequences, BATCH_TOKENS, model.boundary):
        indexes = [sequence.index for sequence in batch.sequences]
        positions = torch.tensor([prompts[index].position for index in indexes])
        tokens = torch.arange(len(indexes)) * batch.input_ids.shape[1] + positions
        model.decoder.run(batch.input_ids, layers, partial(take, indexes=indexes, tokens=tokens))
        advance(len(indexes))


def write_keys(
    model: LoadedModel, facts: FactSet, token: KeyToken, keys: Keys, path: Path, recipe: Recipe
) -> None:
    """Write the keys of `facts` at `token` to keys.h5 at `path`, replacing what is there."""
    about = KeysAbout(
        **model.of_layers(format_layers(keys.layers)).provenance(),
        facts_name=facts.name,
        facts_identity=facts.identity,
        token=token,
        recipe=recipe,
    )
    with write_artifact(path, "keys", about, force=True) as writer:
        writer.layers(keys.layers)
        writer.facts(keys)
        writer.write("contexts", keys.contexts)
        for name in (name for names in KEY_NAMES.values() for name in names.values()):
            if getattr(keys, name) is not None:
                writer.write(name, getattr(keys, name))


def _require_finite(found: dict[str, Any], layers: tuple[int, ...], facts: FactSet) -> None:
    """Raise NumericsError, naming fact and layer, where a key that `_read` found is not finite."""
    for name in (name for name in found if not name.endswith("experts")):
        keys = found[name]
        bad = np.argwhere(~np.isfinite(keys).all(axis=tuple(range(2, keys.ndim))))
        if len(bad):
            row, fact = bad[0]
            raise NumericsError(
                f"the key of {quote(facts.facts[fact].text)} at layer {layers[row]} is NaN or "
                "infinite; try another --dtype, or check the weights."
            )
