"""What a model's configuration declares, compared with what its weights can hold.

transformers builds layers and lists of them for whatever number a configuration says, so a number
that cannot be true is refused before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kscli.errors import ModelError
from kscli.models.files import CONFIG
from kscli.models.fingerprint import tensor_spans

# Each number is a factor of some matrix's size.
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "n_embd", "n_inner", "d_model")
HARMLESS_LAYERS, HARMLESS_WIDTH = 1000, 10**6
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def require_possible(folder: Path, model_id: str) -> None:
    """Raise ModelError, naming the number, where `config.json` declares what cannot be.

    A layer has a tensor of its own at least, and a width has a parameter, of at least one bit, for
    each of its entries. Numbers that take no time to build are let through: a model's memory can be
    planned before it has weights.
    """
    path = folder / CONFIG
    weights = [each for each in folder.iterdir() if each.suffix in (".safetensors", ".bin")]
    if not (path.is_file() and weights):
        return
    try:
        declared = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{model_id}: {CONFIG} is damaged; fetch it again.") from error
    size = sum(each.stat().st_size for each in weights)
    safe = all(each.suffix == ".safetensors" for each in weights)
    tensors = sum(len(tensor_spans(each)) for each in weights) if safe else size
    for names, most in (
        (_LAYERS, max(tensors, HARMLESS_LAYERS)),
        (_WIDTHS, max(8 * size, HARMLESS_WIDTH)),
    ):
        for name, number in _numbers(declared, names):
            if number > most:
                raise ModelError(
                    f"{model_id}: {CONFIG} says {name} {number:,}, more than its weights of "
                    f"{size:,} bytes can have; fetch the model again."
                )


def require_possible_gguf(gguf: Any, model_id: str) -> None:
    """Raise ModelError where a GGUF file, a `GGUFReader`, declares more layers than tensors."""
    most = max(len(gguf.tensors), HARMLESS_LAYERS)
    for name, field in gguf.fields.items():
        if name.endswith(".block_count"):
            number = field.contents()
            if not (isinstance(number, int) and 0 <= number <= most):
                raise ModelError(
                    f"{model_id}: {name} is {number!r:.30}, more than its {len(gguf.tensors)} "
                    "tensors can be of; fetch the model again."
                )


def _numbers(declared: Any, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """The numbers under such names, at the top and in the configurations in it."""
    if isinstance(declared, dict):
        for name, value in declared.items():
            if name in names and isinstance(value, int | float):
                yield name, value
            yield from _numbers(value, names)
