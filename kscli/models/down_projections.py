"""The down-projections of a decoder, found by structure.

The key k of a layer is the input of its MLP's down-projection, the linear map from
the intermediate size d_m to the hidden size. It is found in every decoder layer as
the linear (or `Conv1D`) module outside attention that ends at the hidden size and
starts from the most features; no table of model names is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError

# Parts of a layer that mix tokens; what is left is the MLP.
TOKEN_MIXERS = ("attn", "attention", "mixer", "mamba")


@dataclass(frozen=True)
class DownProjection:
    """One layer's down-projection: its dotted path in the model, the module, and d_m."""

    name: str
    module: nn.Module
    d_m: int


# equation 1: W_proj, whose input is the key.
def find_down_projections(
    model: nn.Module, hidden_size: int, n_layers: int
) -> tuple[DownProjection, ...]:
    """The down-projection of each of the model's `n_layers` decoder layers.

    Raises ModelError for a mixture of experts, for layers without a feed-forward down-projection,
    and for layers of different intermediate sizes.
    """
    found = _projections_of_layers(model, hidden_size, n_layers)
    sizes = sorted({projection.d_m for projection in found})
    if len(sizes) > 1:
        raise ModelError(
            f"the layers of this model have different intermediate sizes {sizes}; kscli needs one."
        )
    return found


def _projections_of_layers(
    model: nn.Module, hidden_size: int, n_layers: int
) -> tuple[DownProjection, ...]:
    """The projections of the first list of `n_layers` layers that has one in each.

    Of a model that sees or hears, too, only the language model is looked at.
    """
    language = getattr(model, "get_decoder", lambda: None)() or model
    prefix = next((name for name, module in model.named_modules() if module is language), "")
    for name, module in language.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            found = [
                _down_projection(f"{name}.{index}", layer, hidden_size)
                for index, layer in enumerate(module)
            ]
            if all(found):
                return tuple(projection for projection in found if projection)
    raise ModelError(
        f"{type(model).__name__} has no list of {n_layers} layers with a linear map from an MLP "
        f"to the hidden size {hidden_size} in each; kscli measures decoders with a feed-forward "
        "MLP in every layer."
    )


def _down_projection(name: str, layer: nn.Module, hidden_size: int) -> DownProjection | None:
    candidates: list[DownProjection] = []
    for path, module in layer.named_modules():
        if "expert" in path.lower() or "expert" in type(module).__name__.lower():
            raise ModelError(
                f"{name} is a mixture of experts: it has no single down-projection, "
                "and kscli measures dense decoders only."
            )
        shape = _linear_shape(module)
        if shape and shape[1] == hidden_size and not _mixes_tokens(name, layer, path):
            candidates.append(DownProjection(f"{name}.{path}".rstrip("."), module, shape[0]))
    if not candidates:
        return None
    # Where up- and down-projection have one shape, the last one registered is the way down.
    widest = max(candidate.d_m for candidate in candidates)
    return [candidate for candidate in candidates if candidate.d_m == widest][-1]


def attention_output(layer: nn.Module, projection: nn.Module) -> nn.Module | None:
    """The linear map that ends a decoder layer's attention: the last one to the hidden size.

    That size is what the layer's down-projection gives.
    """
    _, hidden_size = _linear_shape(projection) or (0, 0)
    found = [
        module
        for path, module in layer.named_modules()
        if (_linear_shape(module) or (0, 0))[1] == hidden_size and _mixes_tokens("", layer, path)
    ]
    return found[-1] if found else None


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module, or None."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return None


def _mixes_tokens(name: str, layer: nn.Module, path: str) -> bool:
    """Whether the module at `path` of a layer lies in attention, by attribute or class names."""
    names = [name]
    module = layer
    for part in path.split(".") if path else []:
        module = getattr(module, part)
        names += [part, type(module).__name__]
    return any(word in part.lower() for part in names for word in TOKEN_MIXERS)
