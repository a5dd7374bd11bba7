"""A decoder whose keys can be read: the down-projections, found by structure, and hooks on them.

The key k of a layer is the input of its MLP's down-projection, the linear map from
the intermediate size d_m to the hidden size. It is found in every decoder layer as
the linear (or `Conv1D`) module outside attention that ends at the hidden size and
starts from the most features; no table of model names is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError
from kscli.models.forward import LastWantedError, hooked

OnKeys = Callable[[int, Tensor], None]

# Parts of a layer that mix tokens; what is left is the MLP.
TOKEN_MIXERS = ("attn", "attention", "mixer", "mamba")


@dataclass(frozen=True)
class DownProjection:
    """One layer's down-projection: its dotted path in the model, the module, and d_m."""

    name: str
    module: nn.Module
    d_m: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, is used up."""
    # Only torch's own allocators have a class for it.
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Decoder:
    """A causal decoder and its down-projections, one a layer.

    Raises ModelError for a mixture of experts, for layers without a feed-forward
    down-projection or of different intermediate sizes, and for a model whose tokens
    see what follows them.
    """

    def __init__(self, model: nn.Module, hidden_size: int, n_layers: int) -> None:
        self.model = model.eval()
        takes = inspect.signature(model.forward).parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self._options = {"use_cache": False} if any_keyword or "use_cache" in takes else {}
        self.projections = find_down_projections(model, hidden_size, n_layers)
        self.d_m = self.projections[0].d_m
        self.n_layers = n_layers
        self.device = _entrance(model)
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(embeddings.weight.shape[0])
        self._check_causal()

    @property
    def hook(self) -> str:
        """The projections' dotted path with `{}` for the layer: `transformer.h.{}.mlp.c_proj`."""
        return ".".join(
            "{}" if part == "0" else part for part in self.projections[0].name.split(".")
        )

    def device_of(self, layer: int) -> str:
        """The device of a layer's down-projection, where its keys come to be."""
        weight = next(self.projections[layer].module.parameters(), None)
        return str(self.device if weight is None else weight.device)

    def layer(self, number: int) -> nn.Module:
        """The module of a whole decoder layer."""
        return self.model.get_submodule(f"{self.hook.partition('.{}')[0]}.{number}")

    def run(self, input_ids: Tensor, layers: Sequence[int], on_keys: OnKeys) -> None:
        """Run (batch, length) token ids up to the last of `layers`.

        `on_keys(layer, keys)` is called once a layer with keys of shape (batch, length, d_m)
        in the model's dtype. The batch is padded on the right and no mask is given: in a causal
        decoder no token sees what follows it, so padding changes nothing before it. What tells
        that memory is used up (`is_out_of_memory`) is raised as it is.
        """
        if int(input_ids.max()) >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gives token {int(input_ids.max())}, but the model embeds only "
                f"{self.vocabulary}; the tokenizer belongs to another model."
            )
        batch, length = input_ids.shape
        last = max(layers)
        seen: list[int] = []
        raised: list[Exception] = []

        def hook_of(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen.append(layer)
                try:
                    on_keys(layer, inputs[0].reshape(batch, length, self.d_m))
                except Exception as error:
                    raised.append(error)
                    raise
                if layer == last:
                    raise LastWantedError

            return hook

        handles = [
            self.projections[layer].module.register_forward_pre_hook(hook_of(layer))
            for layer in layers
        ]
        try:
            with hooked(*handles), torch.inference_mode():
                self.model(input_ids=input_ids.to(self.device), **self._options)
        except Exception as error:
            if raised or isinstance(error, ModelError) or is_out_of_memory(error):
                raise
            raise ModelError(
                f"the model cannot run {batch} sequences of {length} tokens: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        finally:
            # An error holds its frames and these all activations, for as long as it is held.
            raised.clear()
        if sorted(seen) != sorted(layers):
            raise ModelError(
                f"the down-projections {self.hook} of layers {sorted(layers)} were not each called "
                f"once in a forward pass (called: {sorted(seen)}); kscli cannot measure this model."
            )

    def _check_causal(self) -> None:
        """Refuse a model in which a change of the last tokens changes earlier keys.

        The tokens are ordinary ones: special ones have small ids, and some models mask them.
        """
        ids = torch.linspace(0.4, 0.9, 16).mul(self.vocabulary).long().reshape(2, 8)
        for row in ids:
            pair = row.repeat(2, 1)
            pair[1, -3:] = pair[1, :3]
            earlier = self._last_keys(pair)[:, :-3]
            change = (earlier[0] - earlier[1]).abs().max()
            tolerance = 1e-5 if earlier.dtype == torch.float32 else 1e-2
            if change > tolerance * earlier.abs().max():
                raise ModelError(
                    "in this model tokens see the tokens that follow them (an encoder); kscli "
                    "measures decoder-only causal language models."
                )

    def _last_keys(self, input_ids: Tensor) -> Tensor:
        keys: list[Tensor] = []
        self.run(input_ids, [self.n_layers - 1], lambda _, k: keys.append(k))
        return keys[0]


def _entrance(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: where its first weights are, or would be if it is spread.

    Of a model that is laid over several devices and the host, the weights on the host are
    carried to the first device for each use.
    """
    spread = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    cards = sorted(name for name in spread if name not in ("cpu", "disk"))
    if len(spread) > 1 and cards:
        return torch.device(int(cards[0]) if cards[0].isdigit() else cards[0])
    return next(model.parameters()).device


# equation 1: W_proj, whose input is the key.
def find_down_projections(
    model: nn.Module, hidden_size: int, n_layers: int
) -> tuple[DownProjection, ...]:
    """The down-projection of each of the model's `n_layers` decoder layers.

    Raises ModelError as `Decoder` does.
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
