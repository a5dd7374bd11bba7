"""A decoder whose keys can be read: the down-projections, found by structure, and hooks on them.

The key k of a layer is the input of its MLP's down-projection, the linear map from
the intermediate size d_m to the hidden size. It is found in every decoder layer as
the linear (or `Conv1D`) module outside attention that ends at the hidden size and
starts from the most features; no table of model names is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError

OnKeys = Callable[[int, Tensor], None]

# Parts of a layer that mix tokens; what is left is the MLP.
TOKEN_MIXERS = ("attn", "attention", "mixer", "mamba")


@dataclass(frozen=True)
class DownProjection:
    """One layer's down-projection: its dotted path in the model, the module, and d_m."""

    name: str
    module: nn.Module
    d_m: int


class _LastLayerReachedError(Exception):
    """Ends a forward pass when nothing that follows is wanted."""


class Decoder:
    """A causal decoder and its down-projections, one a layer.

    Raises ModelError for a mixture of experts, for layers without a feed-forward
    down-projection or of different intermediate sizes, and for a model whose tokens
    see what follows them.
    """

    def __init__(self, model: nn.Module, hidden_size: int, n_layers: int) -> None:
        self.model = model.eval()
        self.projections = find_down_projections(model, hidden_size, n_layers)
        self.d_m = self.projections[0].d_m
        self.n_layers = n_layers
        self.device = next(model.parameters()).device
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(embeddings.weight.shape[0])
        self._check_causal()

    @property
    def hook(self) -> str:
        """The projections' dotted path with `{}` for the layer: `transformer.h.{}.mlp.c_proj`."""
        return ".".join(
            "{}" if part == "0" else part for part in self.projections[0].name.split(".")
        )

    def run(self, input_ids: Tensor, layers: Sequence[int], on_keys: OnKeys) -> None:
        """Run (batch, length) token ids up to the last of `layers`.

        `on_keys(layer, keys)` is called once a layer with keys of shape (batch, length, d_m)
        in the model's dtype. The batch is padded on the right and no mask is given: in a causal
        decoder no token sees what follows it, so padding changes nothing before it.
        """
        if int(input_ids.max()) >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gives token {int(input_ids.max())}, but the model embeds only "
                f"{self.vocabulary}; the tokenizer belongs to another model."
            )
        batch, length = input_ids.shape
        last = max(layers)
        seen: list[int] = []

        def hook_of(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen.append(layer)
                on_keys(layer, inputs[0].reshape(batch, length, self.d_m))
                if layer == last:
                    raise _LastLayerReachedError

            return hook

        handles = [
            self.projections[layer].module.register_forward_pre_hook(hook_of(layer))
            for layer in layers
        ]
        try:
            with torch.inference_mode():
                self.model(input_ids=input_ids.to(self.device), use_cache=False)
        except _LastLayerReachedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if sorted(seen) != sorted(layers):
            raise ModelError(
                f"the down-projections {self.hook} of layers {sorted(layers)} were not each called "
                f"once in a forward pass (called: {sorted(seen)}); kscli cannot measure this model."
            )

    def _check_causal(self) -> None:
        """Refuse a model in which a change of the last token changes earlier keys."""
        length = 6
        ids = torch.arange(1, length + 1).remainder(self.vocabulary).repeat(2, 1)
        ids[1, -1] = 0
        keys: list[Tensor] = []
        self.run(ids, [self.n_layers - 1], lambda _, k: keys.append(k[:, :-1]))
        change = (keys[0][0] - keys[0][1]).abs().max()
        tolerance = 1e-5 if keys[0].dtype == torch.float32 else 1e-2
        if change > tolerance * keys[0].abs().max():
            raise ModelError(
                "in this model tokens see the tokens that follow them (an encoder); kscli measures "
                "decoder-only causal language models."
            )


def find_down_projections(
    model: nn.Module, hidden_size: int, n_layers: int
) -> tuple[DownProjection, ...]:
    """The down-projection of each of the model's `n_layers` decoder layers.

    Raises ModelError as `Decoder` does.
    """
    prefix, layers = _decoder_layers(model, n_layers)
    found = tuple(
        _down_projection(f"{prefix}.{index}", layer, hidden_size)
        for index, layer in enumerate(layers)
    )
    sizes = sorted({projection.d_m for projection in found})
    if len(sizes) > 1:
        raise ModelError(
            f"the layers of this model have different intermediate sizes {sizes}; kscli needs one."
        )
    return found


def _decoder_layers(model: nn.Module, n_layers: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return name, module
    raise ModelError(f"no list of {n_layers} decoder layers was found in {type(model).__name__}.")


def _down_projection(name: str, layer: nn.Module, hidden_size: int) -> DownProjection:
    candidates: list[DownProjection] = []
    for path, module in layer.named_modules():
        if "expert" in path.lower() or "expert" in type(module).__name__.lower():
            raise ModelError(
                f"{name} is a mixture of experts: it has no single down-projection, "
                "and kscli measures dense decoders only."
            )
        shape = _linear_shape(module)
        if shape and shape[1] == hidden_size and not _mixes_tokens(layer, path):
            candidates.append(DownProjection(f"{name}.{path}", module, shape[0]))
    if not candidates:
        raise ModelError(
            f"{name} has no linear map from an MLP to the hidden size {hidden_size}; "
            "kscli measures decoders with a feed-forward MLP in every layer."
        )
    # Where up- and down-projection have one shape, the last one registered is the way down.
    widest = max(candidate.d_m for candidate in candidates)
    return [candidate for candidate in candidates if candidate.d_m == widest][-1]


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear module, or None."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return None


def _mixes_tokens(layer: nn.Module, path: str) -> bool:
    """Whether the module at `path` lies in the layer's attention, by attribute or class name."""
    module = layer
    for part in path.split("."):
        module = getattr(module, part)
        if any(word in f"{part} {type(module).__name__}".lower() for word in TOKEN_MIXERS):
            return True
    return False
