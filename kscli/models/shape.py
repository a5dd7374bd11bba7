"""A model's sizes, from its configuration alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from kscli.models.config import (
    default_length,
    gguf_read_once,
    load_config,
    model_errors,
    positions_of,
    quiet_transformers,
)
from kscli.models.down_projections import find_down_projections
from kscli.models.locating import LocatedModel, ModelOptions


@dataclass(frozen=True)
class ModelShape:
    """How large a decoder is; `layers` are those that are measured.

    `parameters` counts all, tied ones once; `layer_parameters` those of the decoder layers, by
    which every token is multiplied.
    """

    n_layers: int
    d_m: int
    hidden_size: int
    parameters: int
    layer_parameters: int
    max_length: int
    layers: tuple[int, ...]


def model_shape(located: LocatedModel, options: ModelOptions) -> ModelShape:
    """The shape of a model that is not loaded; raises ModelError as loading it does."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), gguf_read_once(located):
        config = load_config(located, options)
        with model_errors(located), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=options.trust_remote_code
            )
    text = config.get_text_config()
    projections = find_down_projections(model, text.hidden_size, text.num_hidden_layers)
    layer, first = next(iter(projections.items()))
    layers = first.name.partition(f".{layer}.")[0]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return ModelShape(
        n_layers=text.num_hidden_layers,
        d_m=first.d_m,
        hidden_size=text.hidden_size,
        parameters=sum(sizes.values()),
        layer_parameters=sum(n for name, n in sizes.items() if name.startswith(f"{layers}.")),
        max_length=default_length(positions_of(text)),
        layers=tuple(projections),
    )
