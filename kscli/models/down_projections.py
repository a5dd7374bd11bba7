"""The down-projections of a decoder, found by structure.

The key k of a layer is the input of its MLP's down-projection, the linear map from
the intermediate size d_m to the hidden size. It is found in every decoder layer as
the linear (or `Conv1D`) module outside attention that ends at the hidden size and
starts from the most features; no table of model names is needed. A layer of experts has many
(`experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError, UsageError
from kscli.layers import format_layers, select_layers
from kscli.models.experts import ExpertLayer, Stack, find_stack

# Parts of a layer that mix tokens; what is left is the MLP.
TOKEN_MIXERS = ("attn", "attention", "mixer", "mamba")


@dataclass(frozen=True)
class DownProjection:
    """One layer's down-projection: its dotted path in the model, the module, and d_m."""

    name: str
    module: nn.Module
    d_m: int

    @contextmanager
    def watch(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `take` with the keys, (..., d_m), of whatever goes through the module."""
        with self.module.register_forward_pre_hook(lambda _, inputs: take(inputs[0])):
            yield

    @property
    def sizes(self) -> tuple[int, ...]:
        """What layers have in common whose C lies in one file."""
        return (self.d_m,)

    @property
    def width(self) -> int:
        """The length of a key."""
        return self.d_m


Projection = DownProjection | ExpertLayer


# equation 1: W_proj, whose input is the key.
def find_down_projections(
    model: nn.Module, hidden_size: int, n_layers: int
) -> dict[int, Projection]:
    """The down-projections of the model's `n_layers` decoder layers, by the layer's number.

    They are those of the list of modules in which the most layers have one. Where not all have,
    only what has a way up beside it is taken for an MLP's. Of a model that sees or hears, too, only
    the language model is looked at. Raises ModelError where no layer has one, where several layers
    share one, and for experts whose keys cannot be read.
    """
    language = getattr(model, "get_decoder", lambda: None)() or model
    if not any(isinstance(module, nn.ModuleList) for module in language.modules()):
        language = model  # ModernBERT's decoder calls its head so.
    prefix = next((name for name, module in model.named_modules() if module is language), "")
    most: dict[int, Projection] = {}
    for name, module in language.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            found = {
                index: projection
                for index, layer in enumerate(module)
                if (projection := _projection(f"{name}.{index}", layer, hidden_size))
            }
            if len(found) < n_layers:
                found = {
                    index: projection
                    for index, projection in found.items()
                    if _has_way_up(module[index], projection)
                }
            most = max(most, found, key=len)
    if len({id(projection.module) for projection in most.values()}) < len(most):
        raise ModelError(
            f"several layers of {type(model).__name__} share one MLP; kscli measures decoders in "
            "which each has its own."
        )
    if not most:
        raise ModelError(
            f"{type(model).__name__} has no list of {n_layers} layers with a linear map from an "
            f"MLP to the hidden size {hidden_size}; kscli measures decoders with a feed-forward "
            "MLP."
        )
    return most


def select_alike(
    projections: Mapping[int, Projection], spec: str, what: str
) -> dict[int, Projection]:
    """The projections of the layers that `spec` names, which must be of one size.

    `all` are those of the size that most layers have. Raises UsageError for layers that differ,
    and as `select_layers` does.
    """
    layers_of: dict[tuple[int, ...], list[int]] = {}
    for layer in select_layers(spec, tuple(projections), what):
        layers_of.setdefault(projections[layer].sizes, []).append(layer)
    if len(layers_of) > 1 and spec.strip() != "all":
        groups = " and ".join(map(format_layers, layers_of.values()))
        raise UsageError(
            f"--layers {spec}: a file holds layers of one size, and layers {groups} of {what} "
            "differ; name one group at a time, each with an --output of its own."
        )
    chosen = max(layers_of.values(), key=len)
    return {layer: projections[layer] for layer in chosen}


def _projection(name: str, layer: nn.Module, hidden_size: int) -> Projection | None:
    stack = find_stack(name, layer)
    if isinstance(stack, nn.ModuleList):
        return _layer_of_list(name, layer, hidden_size, stack)
    if stack:
        return _expert_layer(name, layer, hidden_size, stack)
    return _widest(_candidates(name, layer, hidden_size))


def _expert_layer(name: str, layer: nn.Module, hidden_size: int, stack: Stack) -> ExpertLayer:
    """The experts of a layer, with shared ones, which lie in one module with them, or beside it."""
    block = layer.get_submodule(stack.block)
    inside = f"{name}.{stack.block}".rstrip(".")
    stack.require_linear(hidden_size)
    candidates = _candidates(name, layer, hidden_size)
    beside = [each for each in candidates if not each.name.startswith(f"{inside}.")]
    # One MLP on a level with the block, whose output is added: seen when it is run.
    alone = len(beside) == len(candidates) == 1
    added = alone and beside[0].name.rsplit(".", 2)[0] == inside.rpartition(".")[0]
    if block is layer or (beside and not added):
        raise ModelError(
            f"{name} is a mixture of experts with another MLP beside them "
            f"({', '.join(each.name for each in beside) or inside}); kscli does not measure it."
        )
    shared = _widest(candidates)
    gates = [module for module in block.modules() if (_linear_shape(module) or (0, 0))[1] == 1]
    return ExpertLayer(
        name=f"{name}.{stack.path}.down_proj",
        module=beside[0].module if beside else block,
        beside=block if beside else None,
        experts=stack.module,
        d_m=stack.d_m,
        n_experts=len(stack.weight),
        transposed=stack.transposed,
        shared=shared.module if shared else None,
        d_shared=shared.d_m if shared else 0,
        shared_gate=gates[0] if shared and gates else None,
    )


def _layer_of_list(
    name: str, layer: nn.Module, hidden_size: int, experts: nn.ModuleList
) -> ExpertLayer:
    """Experts that are a list of modules, with shared ones in one module with them."""
    path = next(path for path, module in layer.named_modules() if module is experts)
    block, inside = layer.get_submodule(path.rpartition(".")[0]), f"{name}.{path}."
    candidates = _candidates(name, layer, hidden_size)
    of_each = [
        _widest([each for each in candidates if each.name.startswith(f"{inside}{number}.")])
        for number in range(len(experts))
    ]
    downs = [each for each in of_each if each]
    others = [each for each in candidates if not each.name.startswith(inside)]
    level = inside[:-1].rpartition(".")[0]
    beside = [each.name for each in others if not each.name.startswith(f"{level}.")]
    if block is layer or beside or None in of_each or len({each.d_m for each in downs}) > 1:
        raise ModelError(
            f"{name} is a mixture of experts that are a list of modules, and kscli measures those "
            "that end at the hidden size with a linear map of one size, in one module with their "
            f"router, without another MLP beside them ({', '.join(beside) or 'none here'})."
        )
    shared = _widest(others)
    gates = [module for module in block.modules() if (_linear_shape(module) or (0, 0))[1] == 1]
    return ExpertLayer(
        name=downs[0].name.replace(f"{inside}0.", inside, 1),
        module=block,
        experts=experts,
        d_m=downs[0].d_m,
        n_experts=len(downs),
        shared=shared.module if shared else None,
        d_shared=shared.d_m if shared else 0,
        shared_gate=gates[0] if shared and gates else None,
        downs=tuple(each.module for each in downs),
    )


def _candidates(name: str, layer: nn.Module, hidden_size: int) -> list[DownProjection]:
    """The linear maps of a layer to the hidden size, outside attention."""
    found = []
    for path, module in layer.named_modules():
        shape = _linear_shape(module)
        if shape and shape[1] == hidden_size and not _mixes_tokens(name, layer, path):
            found.append(DownProjection(f"{name}.{path}".rstrip("."), module, shape[0]))
    return found


def _widest(candidates: list[DownProjection]) -> DownProjection | None:
    # Where up- and down-projection have one shape, the last one registered is the way down.
    widest = max((candidate.d_m for candidate in candidates), default=0)
    return next((each for each in reversed(candidates) if each.d_m == widest), None)


def _has_way_up(layer: nn.Module, projection: Projection) -> bool:
    """Whether a linear map from the hidden size to d_m or twice that is beside the way down."""
    if isinstance(projection, ExpertLayer):
        return True
    _, hidden_size = _linear_shape(projection.module) or (0, 0)
    beside = next(
        parent
        for parent in reversed([*layer.modules()])
        if any(child is projection.module for child in parent.children())
    )
    others = [module for module in beside.children() if module is not projection.module]
    shapes = [_linear_shape(module) for module in others]
    return any((hidden_size, n * projection.d_m) in shapes for n in (1, 2))


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
