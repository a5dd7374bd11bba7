"""How far p of a corpus's first half is from p of a random half: what `--shuffle` is for.

    python tests/benchmarks/first_documents.py SmolLM2.gguf wikitext2_valid.jsonl counterfact.json

P of 128 facts, by C over the first half of the tokens as they stand, and over those of three random
orders. A random half shares half of its documents with the first half, and with another random one;
so beside the distance between first and random stands that between two random ones.
"""

from __future__ import annotations

import os

# As the command line does: threads that spin while they wait take the others' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
os.environ.setdefault("TQDM_DISABLE", "1")

import sys
from itertools import combinations

import numpy as np
from settling import FACTS, MATRICES, matrices, pooled, rms

from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.second_moment.covariance import second_moments
from kscli.second_moment.options import CovarianceOptions

MAX_LENGTH = 512
TOKENS = 15_360
SEEDS = (0, 1, 2)


def main(model_path: str, corpus: str, facts_path: str) -> None:
    model = load_model(ModelOptions(model_path, dtype="float32"))
    keys = extract_keys(model, read_facts(facts_path, FACTS)).keys

    def of_half(seed: int | None) -> MATRICES:
        text = open_corpus(CorpusSpec(corpus, shuffle=seed))
        half = second_moments(model, text, CovarianceOptions(None, TOKENS, MAX_LENGTH))
        C = [half.moments[layer].matrix().astype(np.float64) for layer in half.layers]
        return matrices(C, half.tokens, keys)

    first, drawn = of_half(None), [of_half(seed) for seed in SEEDS]
    to_random = [[rms(a - b) for a, b in zip(first, P, strict=True)] for P in drawn]
    between = [
        [rms(a - b) for a, b in zip(P, other, strict=True)] for P, other in combinations(drawn, 2)
    ]
    print(f"{TOKENS:,} tokens; rms of the difference of P, off the diagonal, pooled over halves")
    print("layer  first and random  two random  ratio")
    for layer in range(len(first)):
        one, two = (pooled([each[layer] for each in of]) for of in (to_random, between))
        print(f"{layer:5}  {one:.4f}            {two:.4f}      {one / two:.2f}")
    one, two = (pooled([value for each in of for value in each]) for of in (to_random, between))
    print(f"  all  {one:.4f}            {two:.4f}      {one / two:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
