"""extract: the key of every fact at every layer, in one sweep of batched forward passes.

Editors write along the mean of a fact's keys after several texts too (`kscli.contexts`), and p to
the keys of a fact's paraphrases says how far an edit of it generalises. Further sweeps read these
means.
"""

from __future__ import annotations

import json
from collections import Counter
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
    of shared experts; there are no means.
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
    of_experts = model.decoder.n_experts > 0
    read = _read_routed if of_experts else _read
    with reporter.task("keys", len(prompts), unit="facts") as task:
        found = read(model, prompts, chosen, task.advance)
    for name in ("keys", "shared_keys"):
        if name in found:
            _check_finite(found[name], chosen, facts)
    texts = _contexts_of(model, contexts, reporter)
    context_keys = None
    if texts:
        in_contexts = [[in_context(text, fact) for text in texts] for fact in facts.facts]
        context_keys = _mean_keys(model, in_contexts, token, chosen, "keys in contexts", reporter)
        _check_finite(context_keys, chosen, facts)
    paraphrased = [paraphrases_of(fact) for fact in facts.facts]
    paraphrase_keys = None
    if any(paraphrased) and not of_experts:
        named = "keys of paraphrases"
        paraphrase_keys = _mean_keys(model, paraphrased, token, chosen, named, reporter)
    return Keys(
        facts=facts.facts,
        layers=chosen,
        **found,
        token_id=np.array([p.token_id for p in prompts], dtype=np.int64),
        position=np.array([p.position for p in prompts], dtype=np.int64),
        contexts=texts,
        context_keys=context_keys,
        paraphrase_keys=paraphrase_keys,
    )


def _contexts_of(
    model: LoadedModel, contexts: ContextChoice, reporter: Reporter
) -> tuple[str, ...]:
    """The context templates; none where a model without an LM head would have to make them up.

    Nor are there any of a mixture of experts: no editor writes to it yet.
    """
    if model.decoder.n_experts:
        return ()
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
) -> NDArray[np.float32]:
    """The mean key over each fact's `texts`, (layer, m, d_m); NaN where it has none."""
    means = np.full((len(layers), len(texts), model.decoder.d_m), np.nan, dtype=np.float32)
    with reporter.task(named, sum(map(len, texts)), unit="prompts") as task:
        for start in range(0, len(texts), FACTS_AT_ONCE):
            some = texts[start : start + FACTS_AT_ONCE]
            flat = [text for of_fact in some for text in of_fact]
            prompts = [_up_to_key(prompt) for prompt in locate_keys(model.tokenizer, flat, token)]
            for fact, prompt in zip(flat, prompts, strict=True):
                model.require_positions(fact.text, len(prompt.token_ids))
            found = _read(model, prompts, layers, task.advance)["keys"]
            of_facts = np.split(found, np.cumsum([*map(len, some)])[:-1], axis=1)
            for number, keys in enumerate(of_facts, start):
                if keys.shape[1]:
                    means[:, number] = keys.mean(axis=1, dtype=np.float64)
    return means


def _up_to_key(prompt: LocatedPrompt) -> LocatedPrompt:
    """A prompt without the tokens after the key's, which the key does not see."""
    return replace(prompt, token_ids=prompt.token_ids[: prompt.position + 1])


def _read(
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
    rows: list[tuple[int, int, int, NDArray[np.float32]]] = []
    shared: dict[tuple[int, int], NDArray[np.float32]] = {}

    def take(layer: int, keys: RoutedKeys, indexes: list[int], tokens: Tensor) -> None:
        index_of = dict(zip(tokens.tolist(), indexes, strict=True))
        own = keys.of_tokens(tokens)
        gated = own.gated.cpu().numpy()
        for token, expert, key in zip(own.token.tolist(), own.expert.tolist(), gated, strict=True):
            rows.append((layer, index_of[token], expert, key))
        if own.shared is not None:
            for index, key in zip(indexes, own.shared.cpu().numpy(), strict=True):
                shared[layer, index] = key

    _run(model, prompts, layers, take, advance)
    places = Counter((layer, index) for layer, index, *_ in rows)
    shape = len(layers), len(prompts), max(places.values(), default=1)
    found: dict[str, Any] = {
        "keys": np.zeros((*shape, model.decoder.d_m), dtype=np.float32),
        "experts": np.full(shape, -1, dtype=np.int64),
    }
    row_of = {layer: row for row, layer in enumerate(layers)}
    for layer, index, expert, key in rows:
        places[layer, index] -= 1
        place = row_of[layer], index, places[layer, index]
        found["keys"][place], found["experts"][place] = key, expert
    if shared:
        found["shared_keys"] = np.array(
            [[shared[layer, index] for index in range(len(prompts))] for layer in layers]
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
        for name in ("keys", "experts", "shared_keys"):
            if getattr(keys, name) is not None:
                writer.write(name, getattr(keys, name))
        writer.write("contexts", keys.contexts)
        for name in ("context_keys", "paraphrase_keys"):
            if getattr(keys, name) is not None:
                writer.write(name, getattr(keys, name))


def _check_finite(keys: NDArray[np.float32], layers: tuple[int, ...], facts: FactSet) -> None:
    bad = np.argwhere(~np.isfinite(keys).all(axis=tuple(range(2, keys.ndim))))
    if len(bad):
        row, fact = bad[0]
        raise NumericsError(
            f"the key of {quote(facts.facts[fact].text)} at layer {layers[row]} is NaN or "
            "infinite; try another --dtype, or check the weights."
        )
