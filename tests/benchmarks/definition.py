"""A real model against the definition, in full: every layer's C and P in naive float64.

    python tests/benchmarks/definition.py MODEL.gguf CORPUS.jsonl FACTS.json [DOCUMENTS]

Runs kscli's stages in float32 (all documents, or the first ones; --max-length 512, 128 facts), then
the model in float64 one document at a time with hooks of its own, and prints the errors of every
layer and where the pairs that the paper names stand. About ten minutes on 2 cores.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import naive

from kscli.analysis.pairs import top_pairs
from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import extract_keys
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.pmatrix import superposition
from kscli.second_moment.covariance import CovarianceOptions, second_moments

MAX_LENGTH = 512


def main() -> None:
    """Measure and print."""
    model_path, corpus_path, facts_path, *documents = sys.argv[1:]
    samples = int(documents[0]) if documents else None
    loaded = load_model(ModelOptions(model_path, dtype="float32"))
    layers = range(loaded.decoder.n_layers)
    start = time.perf_counter()
    moments = second_moments(
        loaded,
        open_corpus(CorpusSpec(corpus_path)),
        CovarianceOptions(samples=samples, max_length=MAX_LENGTH),
    )
    print(f"cache-cov: {moments.tokens:,} tokens in {time.perf_counter() - start:.1f} s")
    facts = read_facts(facts_path, 128)
    start = time.perf_counter()
    keys = extract_keys(loaded, facts)
    extracted = time.perf_counter()
    matrices = [moments.moments[layer].matrix().astype(np.float64) for layer in layers]
    whitened = time.perf_counter()
    results = [
        superposition(matrices[layer].copy(), moments.tokens, keys.keys[layer].astype(np.float64))
        for layer in layers
    ]
    print(
        f"extract: {extracted - start:.1f} s, P of all layers: "
        f"{time.perf_counter() - whitened:.1f} s, {len(facts.facts)} facts"
    )

    hooks = [projection.name for projection in loaded.decoder.projections]
    model = loaded.decoder.model.double()
    model.set_output_embeddings(torch.nn.Identity())  # type: ignore[operator]  # keys need no logits
    sums = [np.zeros_like(matrices[0]) for _ in layers]
    count = 0
    with Path(corpus_path).open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, samples):
            token_ids = loaded.tokenizer(json.loads(line)["text"])["input_ids"][:MAX_LENGTH]
            count += len(token_ids)
            for layer, K in enumerate(naive.keys_of_text(model, token_ids, hooks).values()):
                sums[layer] += K.T @ K
    located = [naive.subject_last(loaded.tokenizer, f.text, *f.subject_span) for f in facts.facts]
    all_keys = [naive.keys_of_text(model, ids, hooks) for ids, _ in located]
    c_errors, p_errors = [], []
    for layer, hook in enumerate(hooks):
        C = sums[layer] / count
        K = np.stack([k[hook][at] for k, (_, at) in zip(all_keys, located, strict=True)])
        G = K @ torch.linalg.solve(torch.from_numpy(C), torch.from_numpy(K.T)).numpy()
        P = G / np.diagonal(G)[:, None]
        c_errors.append(np.linalg.norm(matrices[layer] - C) / np.linalg.norm(C))
        p_errors.append(np.abs(results[layer].P - P).max())
    print(f"tokens equal: {count == moments.tokens}")
    print(f"C, relative Frobenius error: worst {max(c_errors):.2e} (layer {np.argmax(c_errors)})")
    print(f"P, largest absolute error:   worst {max(p_errors):.2e} (layer {np.argmax(p_errors)})")
    for layer in layers:
        print(f"layer {layer:2}: C {c_errors[layer]:.1e}, P {p_errors[layer]:.1e}")
    for pair in top_pairs(results[0].P, 20):
        print(f"{pair.p:5.2f}  {facts.facts[pair.i].subject}  ->  {facts.facts[pair.j].subject}")


if __name__ == "__main__":
    main()
