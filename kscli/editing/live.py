"""What the live model computes at the tokens of facts' keys: a module's input or output there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.batching import padded_batches
from kscli.models.loading import LoadedModel
from kscli.positions import LocatedPrompt


def mlp_keys(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The key of a layer at each key's token, stacked where it has experts: (m, width)."""
    return _at_keys(model, prompts, lambda ids: model.decoder.keys_of(layer, ids))


def mlp_outputs(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The output of a layer's W, W k and its bias, at each key's token: (m, d)."""
    module = model.decoder.projections[layer].module
    return _at_keys(model, prompts, lambda ids: model.decoder.output_of(module, ids))


def hidden_states(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The residual stream as a layer leaves it, at each key's token: (m, d)."""
    module = model.decoder.layer(layer)
    return _at_keys(model, prompts, lambda ids: model.decoder.output_of(module, ids))


def outputs_of_keys(
    model: LoadedModel, layer: int, keys: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a layer's down-projection gives for (m, d_m) keys of the live model: (m, d)."""
    module = model.decoder.projections[layer].module
    weight = next(module.parameters())
    with torch.no_grad():
        outputs = module(torch.as_tensor(keys).to(weight.device, weight.dtype))
    return np.asarray(outputs.double().cpu().numpy())


def _at_keys(
    model: LoadedModel, prompts: Sequence[LocatedPrompt], read: Callable[[Tensor], Tensor]
) -> NDArray[np.float64]:
    """Of what `read` gives for token ids, (batch, length, size), each key's token: (m, size)."""
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(prompts)
    sequences = [prompt.token_ids for prompt in prompts]
    for rows, input_ids in padded_batches(sequences, model.boundary):
        for row, values in zip(rows, read(input_ids), strict=True):
            found[row] = values[prompts[row].position].double().cpu().numpy()
    return np.stack(found)
