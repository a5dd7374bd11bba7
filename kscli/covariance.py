"""cache-cov: the second moment of every layer's keys over a corpus, in one pass of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kscli.artifacts import Provenance, Recipe, write_artifact
from kscli.batching import TokenBatch, TokenSequence, encode, limit_tokens, make_batches
from kscli.corpus import Corpus
from kscli.errors import CorpusError, NumericsError, UsageError
from kscli.files import require_writable
from kscli.layers import select_layers
from kscli.models.loading import LoadedModel, ModelIdentity
from kscli.moments import SecondMoment
from kscli.reporter import SILENT, Reporter

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384, "mps": 4096}


@dataclass(frozen=True)
class CovarianceOptions:
    """How much of a corpus is read, and which layers are measured.

    `samples` documents at most and `tokens` tokens at most (None: no limit), each document
    cut at `max_length` tokens (None: the model's positions, 2048 at most).
    """

    samples: int | None = 100_000
    tokens: int | None = None
    max_length: int | None = None
    layers: str = "all"

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1.")


@dataclass(frozen=True)
class SecondMoments:
    """The second moments of several layers over one corpus.

    `tokens` were counted in `documents` documents, `empty` of them without a token; `whole`
    says that the corpus has no more.
    """

    layers: tuple[int, ...]
    moments: dict[int, SecondMoment]
    tokens: int
    documents: int
    empty: int
    whole: bool


def covariance_recipe(
    identity: ModelIdentity, corpus: Corpus, options: CovarianceOptions, dtype: str
) -> Recipe:
    """Everything that decides what cov.h5 holds."""
    return {
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "corpus": corpus.identity,
        "samples": options.samples,
        "tokens": options.tokens,
        "max_length": options.max_length,
        "layers": options.layers,
        "dtype": dtype,
    }


def second_moments(
    model: LoadedModel, corpus: Corpus, options: CovarianceOptions, reporter: Reporter = SILENT
) -> SecondMoments:
    """Run the corpus through the model once and sum k k^T at every chosen layer.

    Raises NumericsError, naming layer and document, when a key is not finite, and CorpusError
    when the corpus gives no token at all.
    """
    decoder = model.decoder
    if model.positions and (options.max_length or 0) > model.positions:
        raise UsageError(
            f"--max-length {options.max_length:,} is beyond the {model.positions:,} positions of "
            f"{model.identity.model_id}."
        )
    layers = select_layers(options.layers, range(decoder.n_layers), model.identity.model_id)
    moments = {layer: SecondMoment(decoder.d_m) for layer in layers}
    stream = _Stream(model, corpus, options)
    tokens = 0
    with reporter.task("second moments", options.tokens, unit="tokens") as task:
        for batch in make_batches(stream, BATCH_TOKENS[model.device.partition(":")[0]]):

            def add(layer: int, keys: Tensor, batch: TokenBatch = batch) -> None:
                if not moments[layer].update(batch.rows(keys)):
                    raise _not_finite(layer, keys, batch, model.dtype)

            decoder.run(batch.input_ids, layers, add)
            tokens += batch.tokens
            task.advance(batch.tokens, f"{stream.documents:,} documents")
    if tokens == 0:
        raise CorpusError(f"the corpus {corpus.name} gave no token; is its text empty?")
    whole = stream.exhausted and (options.tokens is None or tokens < options.tokens)
    if whole and options.samples is not None:
        reporter.note(f"{corpus.name} has {stream.documents:,} documents; all of them were taken.")
    if stream.empty:
        reporter.note(f"{stream.empty:,} documents had no token and were passed over.")
    return SecondMoments(layers, moments, tokens, stream.documents, stream.empty, whole)


def cache_covariance(
    model: LoadedModel,
    corpus: Corpus,
    options: CovarianceOptions,
    path: Path,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> SecondMoments:
    """Measure the second moments and write them to cov.h5 at `path`.

    Raises what `second_moments` and `write_artifact` raise; nothing is measured when `path`
    cannot be written.
    """
    require_writable(path, force=force)
    result = second_moments(model, corpus, options, reporter)
    provenance = Provenance(
        **model.provenance(),
        details={
            "corpus": corpus.name,
            "corpus_identity": corpus.identity,
            "documents": result.documents,
            "whole_corpus": result.whole,
            "max_length": options.max_length or model.max_length,
        },
        recipe=covariance_recipe(model.identity, corpus, options, model.dtype),
    )
    d_m = model.decoder.d_m
    with write_artifact(path, "cov", provenance, force=force) as writer:
        writer.layers(result.layers)
        writer.array("count", np.int64(result.tokens))
        writer.over_layers("second_moment", (d_m, d_m), np.float32)
        for index, layer in enumerate(result.layers):
            writer.put("second_moment", index, result.moments[layer].matrix())
    return result


class _Stream:
    """The corpus as token sequences; counts the documents that went by."""

    def __init__(self, model: LoadedModel, corpus: Corpus, options: CovarianceOptions) -> None:
        texts = islice(self._texts(corpus), options.samples)
        sequences = encode(model.tokenizer, texts, options.max_length or model.max_length)
        self._sequences = (
            sequences if options.tokens is None else limit_tokens(sequences, options.tokens)
        )
        self.documents = 0
        self.empty = 0
        self.exhausted = False

    def __iter__(self) -> Iterator[TokenSequence]:
        for sequence in self._sequences:
            self.documents += 1
            self.empty += not sequence.token_ids
            yield sequence

    def _texts(self, corpus: Corpus) -> Iterator[str]:
        yield from corpus.documents()
        self.exhausted = True


def _not_finite(layer: int, keys: Tensor, batch: TokenBatch, dtype: str) -> NumericsError:
    bad = (~torch.isfinite(keys).all(dim=2)).any(dim=1).nonzero()[:, 0].tolist()
    if not bad:
        return NumericsError(
            f"the keys of layer {layer} are so large that their products overflow float32; "
            "nothing was written."
        )
    document = batch.sequences[bad[0]].index
    remedy = "use --dtype bfloat16 or float32." if dtype == "float16" else "are the weights sound?"
    return NumericsError(
        f"a key of layer {layer} is NaN or infinite in document {document} (counted from 0); "
        f"nothing was written: {remedy}"
    )
