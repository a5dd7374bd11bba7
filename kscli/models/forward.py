"""How a model is run: short sequences in batches, hooks on its modules, and its logits.

In a causal decoder no token sees what follows it. So sequences are padded on the right, and no mask
is needed. The logits are the model's own, with whatever it does to them (a scale, a soft cap).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kscli.errors import FactsError

if TYPE_CHECKING:
    from kscli.models.decoder import Decoder
    from kscli.models.loading import LoadedModel

BATCH_ROWS = 64
BATCH_TOKENS = 4096
FEW_TOKENS = 256


class LastWantedError(Exception):
    """A hook raises it to end a forward pass, when nothing that follows is wanted."""


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Keep hooks while the block runs, and remove them then. `LastWantedError` ends the block."""
    try:
        yield
    except LastWantedError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def logits_of(
    decoder: Decoder, input_ids: Tensor, keep: int, *, cache: Any = None, keep_cache: bool = False
) -> tuple[Tensor, Any]:
    """The last `keep` tokens' logits, (batch, keep, vocabulary), and the cache if there is one.

    Only these are computed where the model can do that. With a `cache`, `input_ids` (batch, length)
    are the tokens that follow those that it holds.
    """
    takes = inspect.signature(decoder.model.forward).parameters
    options = {"logits_to_keep": keep, "use_cache": keep_cache}
    options = {name: value for name, value in options.items() if name in takes}
    if cache is not None:
        # Its name since transformers 5.24, and before.
        options["cache" if "cache" in takes else "past_key_values"] = cache
    output = decoder.model(input_ids=input_ids.to(decoder.device), **options)
    return output.logits[:, -keep:], getattr(output, "past_key_values", None)


def beyond(boundary: int | None, length: int) -> bool:
    """On which side of a model's `boundary` a sequence lies; a batch has those of one side."""
    return boundary is not None and length > boundary


def same_length_batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indexes of sequences of one length, longest first."""
    return _batches(sequences, few=0)


def full_batches(
    sequences: Sequence[Sequence[int]], boundary: int | None = None
) -> Iterator[list[int]]:
    """Indexes of sequences, longest first, of one length where these are many.

    A pass over few tokens takes as long as reading the weights does; shorter sequences of the same
    side of `boundary` join it.
    """
    return _batches(sequences, FEW_TOKENS, boundary)


def _batches(
    sequences: Sequence[Sequence[int]], few: int, boundary: int | None = None
) -> Iterator[list[int]]:
    """Indexes of sequences of one length, or of any as long as a batch has `few` tokens."""
    lengths = [len(sequence) for sequence in sequences]
    batch: list[int] = []
    for row in sorted(range(len(sequences)), key=lambda index: -lengths[index]):
        tokens = len(batch) * lengths[batch[0]] if batch else 0
        side = beyond(boundary, lengths[row])
        joins = batch and (
            lengths[row] == lengths[batch[0]]
            or (tokens < few and side == beyond(boundary, lengths[batch[0]]))
        )
        full = batch and (len(batch) == BATCH_ROWS or tokens + lengths[batch[0]] > BATCH_TOKENS)
        if batch and (full or not joins):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Token ids (sequences, longest), padded with token 0."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])


def require_positions(model: LoadedModel, text: str, length: int) -> None:
    """Raise FactsError where a text and what follows it have more tokens than the model takes."""
    if length > (model.positions or length):
        raise FactsError(
            f"{text[:60]!r}... comes to {length:,} tokens, and {model.identity.model_id} takes "
            f"{model.positions:,}; leave the fact out."
        )
