"""What massive activations cost P, layer by layer, and what is left of it.

    python tests/benchmarks/massive.py SmolLM2.gguf wikitext2_valid.jsonl facts.json [--tokens 7680]

The keys of all tokens and layers are held, so --layers is there for much text.

The reference is P of the float64 second moment of the same float32 keys. For every layer: how many
keys are massive; how many times the longest key is as long as the median; and the largest error
in P of m facts (a) with float32 sums of all keys, (b) as cache-cov sums them. Against P of (b), the
largest error of (c) its storage in float32, (d) its storage in float32 beside its 8 largest
directions in float64, and (e) what pmatrix estimates of (c).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.batching import TokenBatch, make_batches
from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.pmatrix import superposition
from kscli.second_moment import moments
from kscli.second_moment.moments import SecondMoment, massive_keys
from kscli.second_moment.options import CovarianceOptions
from kscli.second_moment.token_stream import TokenStream

BATCH = 4096
DIRECTIONS = 8

Real = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "corpus", "facts"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=7680)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--layers", default="all")
    given = parser.parse_args()
    model = load_model(ModelOptions(given.model, device="cpu", dtype="float32"))
    facts = read_facts(given.facts, given.count)
    options = CovarianceOptions(None, given.tokens, given.max_length)
    stream = TokenStream(
        model.tokenizer, open_corpus(CorpusSpec(given.corpus)), options, 2**14, 2**18
    )
    batches = [batch for window in stream for batch in make_batches(window.sequences, BATCH)]
    keys = extract_keys(model, facts, "subject-last", given.layers)
    layers = keys.layers
    print(
        "layer massive longest/median  float32 sums  as summed  stored  beside 8  estimated",
        flush=True,
    )
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in batches:

        def keep(layer: int, found: Tensor, batch: TokenBatch = batch) -> None:
            rows[layer].append(batch.without_padding(found.clone()))

        model.decoder.run(batch.input_ids, layers, keep)
    for layer in layers:
        report(layer, rows.pop(layer), keys.keys[keys.layers.index(layer)].astype(np.float64))


def report(layer: int, rows: list[Tensor], facts: Real) -> None:
    all_keys = torch.cat(rows)
    lengths = all_keys.norm(dim=1)
    lengths = lengths[lengths > 0]
    count = len(lengths)
    exact = (all_keys.double().T @ all_keys.double()).numpy() / count
    massive = sum(len(massive_keys(batch)) for batch in rows)
    plain, summed = SecondMoment(exact.shape[0]), SecondMoment(exact.shape[0])
    for batch in rows:
        summed.add(batch, int((batch != 0).any(dim=1).sum()))
    before, moments.MASSIVE = moments.MASSIVE, float("inf")
    for batch in rows:
        plain.add(batch, int((batch != 0).any(dim=1).sum()))
    moments.MASSIVE = before
    C = summed.sums() / count
    true, of_sums = p_of(exact, count, facts), p_of(C, count, facts)
    in_float32 = C.astype(np.float32).astype(np.float64)
    errors = [
        np.abs(P - than).max()
        for P, than in (
            (p_of(plain.sums() / count, count, facts), true),
            (of_sums, true),
            (p_of(in_float32, count, facts), of_sums),
            (p_of(beside(C), count, facts), of_sums),
        )
    ]
    ratio = float(lengths.max() / lengths.median())
    text = "  ".join(f"{error:.1e}" for error in errors)
    estimated = superposition(in_float32, count, facts).storage_error
    print(f"{layer:5} {massive:7} {ratio:14.0f}  {text}  {estimated:.1e}", flush=True)


def p_of(C: Real, count: int, facts: Real) -> Real:
    return superposition(C.copy(), count, facts).P


def beside(C: Real) -> Real:
    """C of which its largest directions are stored in float64, and the rest in float32."""
    values, vectors = np.linalg.eigh(C)
    largest = vectors[:, -DIRECTIONS:] * np.sqrt(values[-DIRECTIONS:])
    low_rank = largest @ largest.T
    return low_rank + (C - low_rank).astype(np.float32).astype(np.float64)


if __name__ == "__main__":
    main()
