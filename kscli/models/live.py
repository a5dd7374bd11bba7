"""A model that the user has loaded already, and perhaps changed, as a decoder that can be run."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from kscli.errors import ModelError
from kscli.models.config import boundary_of, positions_of, sizes_of
from kscli.models.forward import Decoder
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelIdentity, ModelOptions
from kscli.reporter import SILENT, Reporter

LIVE = "live"
"""What stands before a fingerprint of weights that are in memory alone."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def live_model(
    model: Any, tokenizer: Any, source: str | None = None, reporter: Reporter = SILENT
) -> LoadedModel:
    """A transformers model with its tokenizer, as kscli runs it; it is put in evaluation mode.

    Its weights have a fingerprint of their own. With `source`, an alias, a Hub id or a path, they
    are compared with those of that model, and have its identity: its files are this model's files.
    Raises ModelError where it is no causal decoder, or differs from its source.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ModelError(
            f"a {type(model).__name__} is no model of transformers; give what "
            "AutoModelForCausalLM.from_pretrained returns, or the model's name."
        )
    if tokenizer is None:
        raise ModelError("a loaded model needs its tokenizer: load_model(model, tokenizer).")
    config: Any = model.config
    text = config.get_text_config()
    # The user's own goes on truncating as it does.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length, tokenizer.truncation_side = int(1e30), "right"
    decoder = Decoder(model, *sizes_of(config))
    digest = digest_of_weights(model)
    live = LoadedModel(
        identity=_own_identity(model, tokenizer, digest),
        decoder=decoder,
        tokenizer=tokenizer,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=str(decoder.device),
        positions=positions_of(text),
        boundary=boundary_of(text),
        digest=digest,
    )
    return replace(live, identity=_identity_of(source, live, reporter)) if source else live


def digest_of_weights(model: nn.Module) -> str:
    """A SHA-256 (hex) that is another when a weight of the model is: see `_sums`."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\0".encode())
        for sums in _sums(weight):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def kept_weights(model: LoadedModel, layers: Sequence[int]) -> Iterator[None]:
    """Put the weights of layers back, bit for bit, when the block ends; no gradient is kept."""
    whole = model.decoder.model
    trained = [weight for weight in whole.parameters() if weight.requires_grad]
    weights = [each for layer in layers for each in model.decoder.layer(layer).parameters()]
    before = [weight.detach().clone() for weight in weights]
    whole.requires_grad_(False)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, was in zip(weights, before, strict=True):
                weight.copy_(was)
        for weight in trained:
            weight.requires_grad_(True)


def changed_identity(identity: ModelIdentity, digest: str) -> ModelIdentity:
    """Who a model is whose weights were changed in memory, and have that digest."""
    return replace(identity, weights=_named(digest))


def _sums(weight: Tensor) -> Iterator[Tensor]:
    """The sums of a weight's numbers, read as integers, over its rows and over its columns.

    These are exact, and the same on every device. A change that leaves them all is one of four
    numbers at least, in two rows and two columns, that cancel.
    """
    bits = weight.detach()
    if bits.is_meta:
        raise ModelError("weights that are on no device (meta) cannot be told apart; load them.")
    if bits.dtype != torch.bool:
        bits = bits.contiguous().view(_INTEGERS.get(bits.dtype.itemsize, torch.int8))
    if bits.ndim < 2:
        yield bits.long()
    else:
        bits = bits.flatten(1)
        yield from (bits.sum(axis) for axis in (0, 1))


def _own_identity(model: Any, tokenizer: Any, digest: str) -> ModelIdentity:
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    of_tokenizer = hashlib.sha256(_text_of(tokenizer).encode()).hexdigest()
    return ModelIdentity(
        model=PurePath(name).name,
        model_id=name,
        revision="",
        weights=_named(digest),
        tokenizer=_named(of_tokenizer),
    )


def _text_of(tokenizer: Any) -> str:
    """All that a fast tokenizer is, as JSON; how it was last asked to cut and pad aside."""
    backend = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is None:
        raise ModelError(
            f"a {type(tokenizer).__name__} does not say where its tokens lie in a text; load the "
            "fast tokenizer."
        )
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _named(digest: str) -> str:
    return f"{LIVE}:sha256:{digest[:32]}"


def _identity_of(source: str, live: LoadedModel, reporter: Reporter) -> ModelIdentity:
    """The identity of a model whose weights, in the live model's dtype, and tokenizer are alike."""
    found = load_model(ModelOptions(source, device="cpu", dtype=live.dtype), reporter)
    theirs = found.decoder.model.state_dict()
    for name, weight in live.decoder.model.state_dict().items():
        if name not in theirs or not torch.equal(weight.cpu(), theirs[name]):
            raise ModelError(
                f"the model's weight {name} is not that of {source}; leave source= out, and the "
                "model is one of its own."
            )
    if _text_of(live.tokenizer) != _text_of(found.tokenizer):
        raise ModelError(f"the tokenizer is not that of {source}; leave source= out.")
    return found.identity
