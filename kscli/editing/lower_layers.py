"""The layers below an edited one, which compute nothing new while a value is searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from kscli.models.loading import LoadedModel


class LowerLayers:
    """What the decoder layers below one give for one input, kept to be given again.

    What is added at a layer changes nothing below it, so passes that differ in that alone need
    those layers once. A model whose layers hand on more than their outputs cannot do without
    them: whoever replays has to see that the model says the same.
    """

    def __init__(self, model: LoadedModel, layer: int) -> None:
        self._modules = [model.decoder.layer(number) for number in range(layer)]
        self._outputs: list[Any] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the layers give in the pass that the block makes."""
        self._outputs.clear()
        with ExitStack() as hooks:
            for module in self._modules:
                keep = module.register_forward_hook(lambda _, __, out: self._outputs.append(out))
                hooks.enter_context(keep)
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Have the layers give what they gave, whatever their input, while the block runs."""
        own = [module.__dict__.get("forward") for module in self._modules]
        for module, output in zip(self._modules, self._outputs, strict=True):
            module.forward = _giving(output)
        try:
            yield
        finally:
            for module, forward in zip(self._modules, own, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: _copied(output)


def _copied(output: Any) -> Any:
    """A layer's output whose tensors may be changed in place."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output
