"""extract: the key of every fact at every layer, in one sweep of batched forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.artifacts import KeysAbout, Recipe, write_artifact
from kscli.batching import BATCH_TOKENS, TokenSequence, make_batches
from kscli.errors import NumericsError
from kscli.facts import Fact, FactSet
from kscli.layers import select_layers
from kscli.models.loading import LoadedModel
from kscli.models.locating import ModelIdentity
from kscli.positions import KeyToken, has_blank_end, locate_keys
from kscli.records import quote
from kscli.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Keys:
    """The keys of m `facts`: `keys` (layer, m, d_m) float32, `token_id` and `position` (m,)."""

    facts: tuple[Fact, ...]
    layers: tuple[int, ...]
    keys: NDArray[np.float32]
    token_id: NDArray[np.int64]
    position: NDArray[np.int64]


def extraction_recipe(
    identity: ModelIdentity, facts: FactSet, token: str, layers: str, dtype: str
) -> Recipe:
    """Everything that decides what keys.h5 holds."""
    return {
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "facts": facts.identity,
        "token": token,
        "layers": layers,
        "dtype": dtype,
    }


def extract_keys(
    model: LoadedModel,
    facts: FactSet,
    token: KeyToken = "subject-last",
    layers: str = "all",
    reporter: Reporter = SILENT,
) -> Keys:
    """Read the key of every fact at its token, at all chosen layers at once.

    Raises FactsError for a prompt longer than the model's positions, and NumericsError,
    naming layer and fact, when a key is not finite.
    """
    decoder = model.decoder
    chosen = select_layers(layers, range(decoder.n_layers), model.identity.model_id)
    prompts = locate_keys(model.tokenizer, facts.facts, token)
    blank = sum(map(has_blank_end, facts.facts))
    if blank:
        reporter.warn(
            f"{blank} of the {len(prompts)} subjects have white space or other unseen characters "
            "at an end; their keys are read at the last token that is seen."
        )
    for fact, prompt in zip(facts.facts, prompts, strict=True):
        model.require_positions(fact.text, len(prompt.token_ids))
    row_of = {layer: row for row, layer in enumerate(chosen)}
    keys = np.empty((len(chosen), len(prompts), decoder.d_m), dtype=np.float32)
    sequences = (TokenSequence(i, p.token_ids) for i, p in enumerate(prompts))
    with reporter.task("keys", len(prompts), unit="facts") as task:
        for batch in make_batches(sequences, BATCH_TOKENS, model.boundary):
            indexes = [sequence.index for sequence in batch.sequences]
            positions = torch.tensor([prompts[index].position for index in indexes])

            def take(
                layer: int,
                hidden: Tensor,
                indexes: list[int] = indexes,
                positions: Tensor = positions,
            ) -> None:
                rows = torch.arange(len(indexes), device=hidden.device)
                at = hidden[rows, positions.to(hidden.device)]
                keys[row_of[layer], indexes] = at.float().cpu().numpy()

            decoder.run(batch.input_ids, chosen, take)
            task.advance(len(indexes))
    _check_finite(keys, chosen, facts)
    return Keys(
        facts=facts.facts,
        layers=chosen,
        keys=keys,
        token_id=np.array([p.token_id for p in prompts], dtype=np.int64),
        position=np.array([p.position for p in prompts], dtype=np.int64),
    )


def write_keys(
    model: LoadedModel, facts: FactSet, token: KeyToken, keys: Keys, path: Path, recipe: Recipe
) -> None:
    """Write the keys of `facts` at `token` to keys.h5 at `path`, replacing what is there."""
    about = KeysAbout(
        **model.provenance(),
        facts_name=facts.name,
        facts_identity=facts.identity,
        token=token,
        recipe=recipe,
    )
    with write_artifact(path, "keys", about, force=True) as writer:
        writer.layers(keys.layers)
        writer.facts(keys)
        writer.write("keys", keys.keys)


def _check_finite(keys: NDArray[np.float32], layers: tuple[int, ...], facts: FactSet) -> None:
    bad = np.argwhere(~np.isfinite(keys).all(axis=2))
    if len(bad):
        row, fact = bad[0]
        raise NumericsError(
            f"the key of {quote(facts.facts[fact].text)} at layer {layers[row]} is NaN or "
            "infinite; try another --dtype, or check the weights."
        )
