"""A model's sizes, from its configuration alone: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kscli.models.config import (
    default_length,
    gguf_read_once,
    load_config,
    model_errors,
    positions_of,
    quiet_transformers,
    sizes_of,
)
from kscli.models.down_projections import Projection, find_down_projections, select_alike
from kscli.models.experts import ExpertLayer, experts_a_token
from kscli.models.locating import LocatedModel, ModelOptions


@dataclass(frozen=True)
class ExpertShape:
    """How many experts a layer has, and of these each token; what they are in all layers.

    `d_shared` is the length of the key of shared experts, 0 without any.
    """

    count: int
    each: int
    d_shared: int
    parameters: int


@dataclass(frozen=True)
class ModelShape:
    """How large a decoder is; `layers` are those that are measured, all of one size.

    `parameters` counts all, tied ones once; `layer_parameters` those of the decoder layers, of
    which every token is multiplied by `active_parameters`. `experts` are those of a mixture, None
    where it is dense.
    """

    n_layers: int
    d_m: int
    hidden_size: int
    parameters: int
    layer_parameters: int
    max_length: int
    layers: tuple[int, ...]
    experts: ExpertShape | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """The lengths of the keys of one layer, of all its experts."""
        if self.experts is None:
            return (self.d_m,)
        shared = (self.experts.d_shared,) if self.experts.d_shared else ()
        return (self.d_m,) * self.experts.count + shared

    @property
    def widths_a_token(self) -> tuple[int, ...]:
        """The lengths of the keys that one token has in one layer."""
        of_all = self.widths
        return of_all if self.experts is None else of_all[self.experts.count - self.experts.each :]

    @property
    def active_parameters(self) -> int:
        """The parameters of the decoder layers by which one token is multiplied."""
        if self.experts is None:
            return self.layer_parameters
        idle = 1 - self.experts.each / self.experts.count
        return self.layer_parameters - int(idle * self.experts.parameters)


def model_shape(located: LocatedModel, options: ModelOptions, layers: str = "all") -> ModelShape:
    """The shape of a model that is not loaded, as one of some layers.

    Raises ModelError as loading it does, and UsageError as `select_alike` does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), gguf_read_once(located):
        config = load_config(located, options)
        with model_errors(located), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=options.trust_remote_code
            )
    return shape_of(model, config, layers, located.identity.model_id)


def shape_of(model: Any, config: Any, layers: str, model_id: str) -> ModelShape:
    """The shape of a model that is built, on whatever device; raises as `model_shape` does."""
    text = config.get_text_config()
    hidden_size, n_layers = sizes_of(config)
    found = find_down_projections(model, hidden_size, n_layers)
    projections = select_alike(found, layers, model_id)
    layer, first = next(iter(projections.items()))
    within = first.name.partition(f".{layer}.")[0]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return ModelShape(
        n_layers=n_layers,
        d_m=first.d_m,
        hidden_size=hidden_size,
        parameters=sum(sizes.values()),
        layer_parameters=sum(n for name, n in sizes.items() if name.startswith(f"{within}.")),
        max_length=default_length(positions_of(text)),
        layers=tuple(projections),
        experts=_experts(first, found, text),
    )


def _experts(first: Projection, found: Mapping[int, Projection], config: Any) -> ExpertShape | None:
    if not isinstance(first, ExpertLayer):
        return None
    layers = [each for each in found.values() if isinstance(each, ExpertLayer)]
    return ExpertShape(
        count=first.n_experts,
        each=experts_a_token(config, first.n_experts),
        d_shared=first.d_shared,
        parameters=sum(p.numel() for layer in layers for p in layer.experts.parameters()),
    )
