"""A decoder that can be run: the keys of its layers, a module's output, its logits.

A batch is padded on the right and no mask is given: in a causal decoder no token sees what follows
it, so padding changes nothing before it. What tells that memory is used up
(`kscli.errors.is_out_of_memory`) is raised as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kscli.errors import ModelError, first_line, is_out_of_memory
from kscli.models.down_projections import find_down_projections, select_alike
from kscli.models.experts import PROBE, ExpertLayer, RoutedKeys, experts_a_token, use_experts

# Keys are a tensor (batch, length, d_m), of a layer of experts RoutedKeys.
OnKeys = Callable[[int, Any], None]


# Tokens of each of the two sequences on which experts are checked.
PROBED = 32


def as_stacked(keys: Tensor | RoutedKeys, input_ids: Tensor) -> Tensor:
    """The keys of (batch, length) tokens in one layer, (batch, length, width), whatever it is."""
    flat = keys.stacked(input_ids.numel()) if isinstance(keys, RoutedKeys) else keys
    return flat.reshape(*input_ids.shape, -1)


class _EndOfPassError(Exception):
    """Ends a forward pass when nothing that follows is wanted."""


class Decoder:
    """A causal decoder and its down-projections, one a layer.

    Raises ModelError as `find_down_projections` does, for
    experts that do not add up, and for a model whose tokens see what follows them.
    """

    def __init__(self, model: nn.Module, hidden_size: int, n_layers: int) -> None:
        self.model = model.eval()
        self.projections = find_down_projections(model, hidden_size, n_layers)
        self.n_layers = n_layers
        self.device = _entrance(model)
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(embeddings.weight.shape[0])
        self.parameters = sum(each.numel() for each in model.parameters())
        self.active_parameters = self.parameters - self._idle_parameters()
        if self._experts():
            self._check_experts()
        self._check_causal()

    def of_layers(self, spec: str, what: str) -> Decoder:
        """The decoder as one of some layers of one size; UsageError as `select_alike` raises it."""
        narrowed = copy(self)
        narrowed.projections = select_alike(self.projections, spec, what)
        return narrowed

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a down-projection, in ascending order."""
        return tuple(self.projections)

    @property
    def d_m(self) -> int:
        """The length of a key at the first layer, and at all where they are of one size."""
        return self.projections[self.layers[0]].d_m

    @property
    def n_experts(self) -> int:
        """How many experts a layer has; 0 where it is dense."""
        first = self.projections[self.layers[0]]
        return first.n_experts if isinstance(first, ExpertLayer) else 0

    @property
    def hook(self) -> str:
        """The projections' dotted path with `{}` for the layer: `transformer.h.{}.mlp.c_proj`."""
        layer, projection = next(iter(self.projections.items()))
        return projection.name.replace(f".{layer}.", ".{}.", 1)

    def _experts(self) -> list[ExpertLayer]:
        """The layers that have experts."""
        return [each for each in self.projections.values() if isinstance(each, ExpertLayer)]

    def _idle_parameters(self) -> int:
        """How many parameters of experts one token does not use."""
        idle = 0
        for layer in self._experts():
            config = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
            left_out = layer.n_experts - experts_a_token(config, layer.n_experts)
            held = sum(each.numel() for each in layer.experts.parameters())
            idle += held * left_out // layer.n_experts
        return idle

    def layer(self, number: int) -> nn.Module:
        """The module of a whole decoder layer."""
        return self.model.get_submodule(f"{self.hook.partition('.{}')[0]}.{number}")

    def device_of(self, layer: int) -> str:
        """The device of a layer's down-projection, where its keys come to be."""
        weight = next(self.projections[layer].module.parameters(), None)
        return str(self.device if weight is None else weight.device)

    def __call__(
        self, input_ids: Tensor, keep: int | None = None, use_cache: bool = False, **cache: Any
    ) -> Any:
        """The model's own output for (batch, length) token ids; None where a hook ends the pass.

        A model that can compute the logits of the last `keep` tokens alone does so. Raises
        ModelError for a token that the model does not embed, and where it cannot run.
        """
        largest = int(input_ids.max())
        if largest >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gives token {largest}, but the model embeds only "
                f"{self.vocabulary}; the tokenizer belongs to another model."
            )
        takes = self.takes
        options: dict[str, Any] = {"use_cache": use_cache} if "use_cache" in takes else {}
        if keep is not None and "logits_to_keep" in takes:
            options["logits_to_keep"] = keep
        try:
            with ExitStack() as joined:
                for projection in self._experts():
                    joined.enter_context(projection.joined())
                return self.model(input_ids=input_ids.to(self.device), **options, **cache)
        except _EndOfPassError:
            return None
        except ModelError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            batch, length = input_ids.shape
            raise ModelError(
                f"the model cannot run {batch} sequences of {length} tokens: {first_line(error)}"
            ) from error

    def logits(self, input_ids: Tensor, keep: int) -> Tensor:
        """The model's logits of the last `keep` tokens, (batch, keep, vocabulary).

        They have what the model does to its logits (a scale, a soft cap). Raises as a call does.
        """
        logits: Tensor = self(input_ids, keep).logits[:, -keep:]
        return logits

    def greedy(self, input_ids: Tensor, steps: int) -> Tensor:
        """The (batch, steps) tokens that greedily follow the (batch, length) ids.

        The model's cache is kept, where it has one; else the whole sequence is read at each step.
        Raises as a call does.
        """
        ids = input_ids.to(self.device)
        cache: Any = None
        for _ in range(steps):
            unread, held = (ids, {}) if cache is None else (ids[:, -1:], {self.cache_name: cache})
            output = self(unread, keep=1, use_cache=True, **held)
            cache = getattr(output, self.cache_name, None)
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids[:, input_ids.shape[1] :]

    def output_of(self, module: nn.Module, input_ids: Tensor) -> Tensor:
        """What a module gives, (batch, length, size), the first of a tuple; the pass ends there."""
        taken: list[Tensor] = []

        def take(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)
            raise _EndOfPassError

        with torch.inference_mode(), module.register_forward_hook(take):
            self(input_ids)
        return taken[0].reshape(*input_ids.shape, -1)

    def keys_of(self, layer: int, input_ids: Tensor) -> Tensor:
        """The keys of one layer, (batch, length, width); stacked ones of experts, in float32."""
        taken: list[Tensor | RoutedKeys] = []
        self.run(input_ids, [layer], lambda _, keys: taken.append(keys))
        return as_stacked(taken[0], input_ids)

    def run(self, input_ids: Tensor, layers: Sequence[int], on_keys: OnKeys) -> None:
        """Run (batch, length) token ids up to the last of `layers`.

        `on_keys(layer, keys)` is called once a layer with keys of shape (batch, length, d_m)
        in the model's dtype, or with `RoutedKeys` of a layer of experts; what it raises is raised
        here. Raises as a call does.
        """
        last = max(layers)
        seen: list[int] = []
        raised: list[Exception] = []

        def take(layer: int, keys: Tensor | RoutedKeys) -> None:
            seen.append(layer)
            if isinstance(keys, Tensor):
                keys = keys.reshape(*input_ids.shape, -1)
            try:
                on_keys(layer, keys)
            except Exception as error:
                raised.append(error)
            if raised or layer == last:
                raise _EndOfPassError

        with torch.inference_mode(), ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(self.projections[layer].watch(partial(take, layer)))
            self(input_ids)
        if raised:
            # Taken out: an error holds its frames and these all activations, while it is held.
            raise raised.pop()
        if sorted(seen) != sorted(layers):
            raise ModelError(
                f"the down-projections {self.hook} of layers {sorted(layers)} were not each called "
                f"once in a forward pass (called: {sorted(seen)}); kscli cannot measure this model."
            )

    @property
    def cache_name(self) -> str:
        """The name of the model's cache: since transformers 5.24, or before."""
        return "cache" if "cache" in self.takes else "past_key_values"

    @property
    def takes(self) -> set[str]:
        """What may be given to the model by name; `use_cache` also where it takes any name."""
        parameters = inspect.signature(self.model.forward).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return {*parameters, *(["use_cache"] if takes_any else [])}

    def _check_experts(self) -> None:
        """Refuse experts of which keys, gates and weights do not add up to what the model gives.

        The model's own code computes the output that is compared, the lower layers' included.
        """
        use_experts(self.model, PROBE)
        ids = self._ordinary_tokens(PROBED)
        with torch.inference_mode(), ExitStack() as watched:
            for projection in self._experts():
                watched.enter_context(projection.require_sum())
            joined = self(ids)[0]
        beside = [each.name for each in self._experts() if each.beside is not None]
        if beside:
            with torch.inference_mode():
                apart = self.model(input_ids=ids.to(self.device))[0]
            difference = float((joined - apart).abs().max() / apart.abs().max())
            if not difference <= (1e-4 if apart.dtype == torch.float32 else 0.03):
                raise ModelError(
                    f"what the shared experts beside {beside[0]} give is not added to what the "
                    "others give; kscli does not measure this mixture of experts."
                )
        use_experts(self.model)

    def _ordinary_tokens(self, count: int) -> Tensor:
        """Two sequences of `count` tokens; special tokens have small ids, and some are masked."""
        return torch.linspace(0.4, 0.9, 2 * count).mul(self.vocabulary).long().reshape(2, count)

    def _check_causal(self) -> None:
        """Refuse a model in which a change of the last tokens changes earlier values."""
        last = self.projections[self.layers[-1]].module
        for row in self._ordinary_tokens(8):
            pair = row.repeat(2, 1)
            pair[1, -3:] = pair[1, :3]
            earlier = self.output_of(last, pair)[:, :-3]
            change = (earlier[0] - earlier[1]).abs().max()
            tolerance = 1e-5 if earlier.dtype == torch.float32 else 1e-2
            if change > tolerance * earlier.abs().max():
                raise ModelError(
                    "in this model tokens see the tokens that follow them (an encoder); kscli "
                    "measures decoder-only causal language models."
                )


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
