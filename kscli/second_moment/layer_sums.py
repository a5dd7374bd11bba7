"""The sums of several layers over batches: each batch through the model once.

A batch that does not fit in memory is halved and tried again. A layer whose keys of the batch
were added already is left out then, so that no token is lost or counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kscli.batching import TokenBatch
from kscli.errors import ModelError, NumericsError, is_out_of_memory
from kscli.models.experts import RoutedKeys
from kscli.models.forward import Decoder
from kscli.second_moment.expert_moments import ExpertMoments, Moment, new_moment
from kscli.second_moment.moments import HostSums, Product, SecondMoment
from kscli.second_moment.plan import Placement

# Called with a layer, the keys (batch x length, d_m) of a batch, those of padding 0, or RoutedKeys,
# and the batch, when they are in the sums.
Watch = Callable[[int, Any, TokenBatch], None]


class LayerSums:
    """k k^T of several layers, summed over batches.

    `placement` says where the sums lie, `product` how keys are multiplied (`plan`). Float32 sums
    are added to the float64 ones when they are over `flush_tokens` tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        layers: tuple[int, ...],
        placement: Placement = "host",
        flush_tokens: int = 0,
        product: Product = "float32",
    ) -> None:
        self.layers = layers
        self.halved = False
        self._decoder = decoder
        self._flush_tokens = flush_tokens if placement == "split" else 0
        self._unflushed = 0
        self._most: int | None = None
        host = HostSums()
        self.moments: dict[int, Moment] = {
            layer: new_moment(
                decoder.projections[layer],
                home=decoder.device_of(layer) if placement == "device" else "cpu",
                partial=placement == "split",
                host=host,
                product=product,
            )
            for layer in layers
        }

    def dense(self, layer: int) -> SecondMoment:
        """The sums of a layer that is dense."""
        moment = self.moments[layer]
        assert isinstance(moment, SecondMoment)
        return moment

    def of_experts(self, layer: int) -> ExpertMoments:
        """The sums of a layer of experts."""
        moment = self.moments[layer]
        assert isinstance(moment, ExpertMoments)
        return moment

    @property
    def flushed(self) -> bool:
        """Whether everything that was added is in the float64 sums."""
        return self._unflushed == 0

    def add(self, batch: TokenBatch, watch: Watch | None = None) -> None:
        """Add a batch's keys at every layer, and flush when enough tokens are in float32.

        Raises NumericsError, naming layer and document, when a key is not finite; the sums are
        spoilt then. Raises ModelError when not even one sequence fits in memory.
        """
        self._add(batch, self.layers, watch)
        self._unflushed += batch.padded
        if self._unflushed >= self._flush_tokens:
            self.flush()

    def flush(self) -> None:
        """Bring everything into the float64 sums."""
        for moment in self.moments.values():
            moment.flush()
        self._unflushed = 0

    def _add(self, batch: TokenBatch, layers: Sequence[int], watch: Watch | None) -> None:
        if self._most and batch.padded > self._most and len(batch.sequences) > 1:
            left: Sequence[int] | None = layers
        else:
            left = self._try(batch, layers, watch)
        if left is None:
            return
        if len(batch.sequences) == 1:
            raise ModelError(
                f"one document of {batch.padded:,} tokens does not fit in memory; cut documents "
                "with --max-length, or bound the sums with --max-memory."
            )
        for half in batch.halves():
            self._add(half, left, watch)

    def _try(
        self, batch: TokenBatch, layers: Sequence[int], watch: Watch | None
    ) -> Sequence[int] | None:
        """Run a batch; None if it went through, else the layers that have not got it."""
        finite: dict[int, Tensor] = {}

        def add(layer: int, keys: Any) -> None:
            real = _without_padding(batch, keys)
            finite[layer] = self.moments[layer].add(real, batch.tokens)
            if watch:
                watch(layer, real, batch)

        try:
            self._decoder.run(batch.input_ids, layers, add)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        else:
            out_of_memory = False
        # Looked at once a batch: to look at a device's value is to wait for it.
        if not all(bool(flag) for flag in finite.values()):
            raise self._find_not_finite(batch, layers)
        if not out_of_memory:
            return None
        self.halved = True
        self._most = max(1, batch.padded // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [layer for layer in layers if layer not in finite]

    def _find_not_finite(self, batch: TokenBatch, layers: Sequence[int]) -> NumericsError:
        """Run the batch again for the first layer, and the document in it, that is at fault."""
        found: list[tuple[int, int]] = []

        def look(layer: int, keys: Any) -> None:
            bad = _not_finite(keys, batch.padded).cpu().reshape(batch.input_ids.shape)
            for row, sequence in enumerate(batch.sequences):
                if not found and bad[row, : len(sequence.token_ids)].any():
                    found.append((layer, sequence.index))

        self._decoder.run(batch.input_ids, layers, look)
        if not found:
            return NumericsError(
                "the keys of a layer are so large that their products overflow float32; "
                "are the weights sound?"
            )
        layer, document = found[0]
        dtype = next(self._decoder.model.parameters()).dtype
        remedy = (
            "use --dtype bfloat16 or float32."
            if dtype == torch.float16
            else "are the weights sound?"
        )
        return NumericsError(
            f"a key of layer {layer} is NaN or infinite in document {document} (counted from 0): "
            f"{remedy}"
        )


def _without_padding(batch: TokenBatch, keys: Tensor | RoutedKeys) -> Any:
    """The keys of a batch's tokens: of a dense layer those of padding are 0, else left out."""
    if isinstance(keys, RoutedKeys):
        return keys.of_tokens(batch.real_rows)
    return batch.without_padding(keys)


def _not_finite(keys: Tensor | RoutedKeys, tokens: int) -> Tensor:
    """Which of so many tokens have a key that is not finite."""
    if isinstance(keys, Tensor):
        return ~torch.isfinite(keys).all(dim=-1)
    bad = torch.zeros(tokens, dtype=torch.bool, device=keys.token.device)
    bad[keys.token[~torch.isfinite(keys.gated).all(dim=1)]] = True
    return bad if keys.shared is None else bad | ~torch.isfinite(keys.shared).all(dim=1)
