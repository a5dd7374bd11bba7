"""How p settles with the length of the corpus, and what bfloat16 does to it beside that.

    python tests/benchmarks/settling.py SmolLM2.gguf wikitext2_valid.jsonl counterfact.json

In bfloat16: the error of p that cache-cov itself estimates to be left at doublings of the tokens,
and how far P of 128 facts is apart between C of two disjoint halves of the documents, N tokens
each, over sqrt(2), at doublings of N from 2 d_m up. Then, at 16 d_m tokens and for every layer: P
with bfloat16 keys and C against float32 on the same text, beside the two halves over sqrt(2), the
noise of the corpus. Rms off the diagonal.
"""

from __future__ import annotations

import os

# As the command line does: threads that spin while they wait take the others' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
os.environ.setdefault("TQDM_DISABLE", "1")

import sys

import numpy as np
from numpy.typing import NDArray

from kscli.batching import make_batches
from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.layers import spread
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.pmatrix import superposition
from kscli.second_moment.covariance import second_moments
from kscli.second_moment.layer_sums import LayerSums
from kscli.second_moment.options import CovarianceOptions, Shard
from kscli.second_moment.settling import MOST_LAYERS
from kscli.second_moment.token_stream import TokenStream

MAX_LENGTH = 2048
BATCH_TOKENS = 4096
FACTS = 128
MATRICES = list[NDArray[np.float64]]


def main(model_path: str, corpus: str, facts_path: str) -> None:
    models = {d: load_model(ModelOptions(model_path, dtype=d)) for d in ("bfloat16", "float32")}
    facts = read_facts(facts_path, FACTS)
    keys = {dtype: extract_keys(model, facts).keys for dtype, model in models.items()}
    model = models["bfloat16"]
    d_m = model.decoder.d_m
    estimated = second_moments(
        model, open_corpus(CorpusSpec(corpus)), CovarianceOptions(None, None, MAX_LENGTH)
    )
    watched = spread(range(model.decoder.n_layers), MOST_LAYERS)
    print(f"{estimated.tokens:,} tokens; rms of p at layers {watched}")
    for settled in estimated.settled:
        at = ", ".join(f"{value:.3f}" for value in settled.by_layer)
        print(f"estimated at {settled.tokens:7,} ({settled.tokens / d_m:4.1f} d_m): {at}")
    sizes = [factor * d_m for factor in (2, 4, 8, 16, 32)]
    halves = [moments_at(model, corpus, Shard(i, 2), sizes) for i in range(2)]
    for size in sizes:
        P = [matrices(half[size], size, keys["bfloat16"]) for half in halves]
        apart = [rms(a - b) / np.sqrt(2) for a, b in zip(*P, strict=True)]
        at = ", ".join(f"{apart[layer]:.3f}" for layer in watched)
        print(f"halves of   {size:7,} ({size // d_m:4} d_m): {at}; all layers {pooled(apart):.3f}")
    size = 16 * d_m
    same = [moments_at(m, corpus, Shard(0, 2), [size])[size] for m in models.values()]
    P = [
        matrices(C, size, keys[dtype])
        for C, dtype in zip(same, ("bfloat16", "float32"), strict=True)
    ]
    off = [rms(a - b) for a, b in zip(*P, strict=True)]
    halves_P = [matrices(half[size], size, keys["bfloat16"]) for half in halves]
    apart = [rms(a - b) for a, b in zip(*halves_P, strict=True)]
    noise = [each / np.sqrt(2) for each in apart]
    worst = [float(np.abs(a - b).max()) for a, b in zip(*P, strict=True)]
    print(f"at {size:,} tokens, by layer, those where bfloat16 is most beside the noise first:")
    print("layer  bfloat16 against float32: rms  largest  noise of the corpus: rms  ratio")
    for layer in sorted(range(len(off)), key=lambda at: -off[at] / noise[at]):
        print(
            f"{layer:5}  {off[layer]:.4f}  {worst[layer]:.3f}  {noise[layer]:.4f}  "
            f"{off[layer] / noise[layer]:.2f}"
        )
    print(f"all layers: {pooled(off):.4f}, and the noise {pooled(noise):.4f}")


def moments_at(
    model: LoadedModel, corpus: str, shard: Shard, sizes: list[int]
) -> dict[int, MATRICES]:
    """C of every layer over the first tokens of a shard, at several numbers of them."""
    layers = tuple(range(model.decoder.n_layers))
    sums = LayerSums(model.decoder, layers)
    found: dict[int, MATRICES] = {}
    before = 0
    stream = TokenStream(
        model.tokenizer,
        open_corpus(CorpusSpec(corpus)),
        CovarianceOptions(None, None, MAX_LENGTH, shard=shard),
        1,
        1,
    )
    waiting = []
    for window in stream:
        waiting += window.sequences
        if window.end.tokens >= sizes[len(found)]:
            for batch in make_batches(waiting, BATCH_TOKENS):
                sums.add(batch)
            waiting, before = [], window.end.tokens
            found[sizes[len(found)]] = [
                sums.moments[layer].matrix().astype(np.float64) for layer in layers
            ]
        if len(found) == len(sizes):
            return found
    raise SystemExit(f"the corpus has {before:,} tokens a half, too few")


def matrices(moments: MATRICES, count: int, keys: NDArray[np.float32]) -> MATRICES:
    return [
        superposition(C.copy(), count, k.astype(np.float64)).P
        for C, k in zip(moments, keys, strict=True)
    ]


def rms(difference: NDArray[np.float64]) -> float:
    off_diagonal = ~np.eye(len(difference), dtype=bool)
    return float(np.sqrt(np.mean(np.square(difference[off_diagonal]))))


def pooled(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


if __name__ == "__main__":
    main(*sys.argv[1:])
