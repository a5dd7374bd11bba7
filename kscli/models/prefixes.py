"""What a causal decoder keeps of the tokens before a place, so that they are read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kscli.errors import ModelError
from kscli.models.forward import Decoder


class Prefixes:
    """The keys and values of attention before a place of each row, to go on from there.

    `cache` is what the decoder kept of rows of `length` tokens, padded on the right; row r is read
    on from place `starts[r]`. Prefixes of different lengths are padded on the left, and masked
    there. Memory: two vectors a token and layer. Raises ModelError for a cache of another kind.
    """

    def __init__(self, decoder: Decoder, cache: Any, length: int, starts: Tensor) -> None:
        self._decoder, self._starts = decoder, starts
        places = starts[:, None] + torch.arange(-int(starts.max()), 0)
        self._held = places >= 0
        layers = getattr(cache, "layers", [])
        kept = [getattr(layer, "keys", None) for layer in layers]
        if not layers or any(keys is None or keys.shape[-2] != length for keys in kept):
            raise ModelError("this model does not keep the keys and values of all tokens.")
        self._layers = [
            (_rows_at(layer.keys, places), _rows_at(layer.values, places)) for layer in layers
        ]

    def options(self, length: int) -> dict[str, Any]:
        """What to give the model beside (rows, length) ids, whose first is at `starts`."""
        config: Any = self._decoder.model.config
        cache = DynamicCache(config=config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        unread = torch.arange(length)
        mask = torch.cat([self._held, torch.ones(len(self._held), length, dtype=torch.bool)], 1)
        given = {
            "attention_mask": mask.long().to(self._decoder.device),
            "position_ids": (self._starts[:, None] + unread).to(self._decoder.device),
        }
        taken = {name: value for name, value in given.items() if name in self._decoder.takes}
        return {self._decoder.cache_name: cache, **taken}


def _rows_at(kept: Tensor, places: Tensor) -> Tensor:
    """(rows, heads, places, size) of (rows, heads, length, size); anything where a place is < 0."""
    index = places.clamp(min=0).to(kept.device)[:, None, :, None]
    return kept.gather(2, index.expand(-1, kept.shape[1], -1, kept.shape[3]))
