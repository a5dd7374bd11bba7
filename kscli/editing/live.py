"""What the live model computes at the tokens of facts' keys: a module's input or output there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kscli.models.forward import LastWantedError, full_batches, hooked, pad_right
from kscli.models.loading import LoadedModel
from kscli.positions import LocatedPrompt

Side = Literal["input", "output"]


def mlp_outputs(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The output of a layer's down-projection, W k and its bias, at each key's token: (m, d)."""
    return _at_keys(model, model.decoder.projections[layer].module, "output", prompts)


def outputs_of_keys(
    model: LoadedModel, layer: int, keys: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a layer's down-projection gives for (m, d_m) keys of the live model: (m, d)."""
    module = model.decoder.projections[layer].module
    weight = next(module.parameters())
    with torch.no_grad():
        outputs = module(torch.as_tensor(keys).to(weight.device, weight.dtype))
    return np.asarray(outputs.double().cpu().numpy())


def mlp_keys(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The input of a layer's down-projection at each key's token: (m, d_m)."""
    return _at_keys(model, model.decoder.projections[layer].module, "input", prompts)


def hidden_states(
    model: LoadedModel, layer: int, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    """The residual stream as a layer leaves it, at each key's token: (m, d)."""
    return _at_keys(model, model.decoder.layer(layer), "output", prompts)


def _at_keys(
    model: LoadedModel, module: nn.Module, side: Side, prompts: Sequence[LocatedPrompt]
) -> NDArray[np.float64]:
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(prompts)
    sequences = [prompt.token_ids for prompt in prompts]
    for rows in full_batches(sequences, model.boundary):
        ids = pad_right([sequences[row] for row in rows]).to(model.decoder.device)
        values = _values(model.decoder.model, module, side, ids)
        for row, of_row in zip(rows, values, strict=True):
            found[row] = of_row[prompts[row].position].double().cpu().numpy()
    return np.stack(found)


def _values(model: nn.Module, module: nn.Module, side: Side, input_ids: Tensor) -> Tensor:
    """The module's input or output, (batch, length, size), the first of a tuple's."""
    taken: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = inputs if side == "input" else output
        taken.append(value[0] if isinstance(value, tuple) else value)
        raise LastWantedError

    with hooked(module.register_forward_hook(take)), torch.no_grad():
        model(input_ids=input_ids)
    return taken[0].reshape(*input_ids.shape, -1)
