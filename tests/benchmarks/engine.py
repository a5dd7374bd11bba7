"""How fast cache-cov is on a CPU, as ratios against other ways measured in the same run.

    python tests/benchmarks/engine.py SmolLM2.gguf wikitext2_valid.jsonl [PART ...]

Parts (default: all): `loop` the loop over the bare decoder on the same batches, in float32 and
bfloat16; `command` the whole command over it, with its loading and without; `naive` one pass a
layer with float32 products, as the paper describes its code; `memory` the peak above the model's
own; `tokens` and `layers` whether the time is linear in them.
"""

from __future__ import annotations

import os

# As the command line does: threads that spin while they wait take the others' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
os.environ.setdefault("TQDM_DISABLE", "1")

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kscli.batching import TokenBatch, make_batches
from kscli.corpus import CorpusSpec, open_corpus
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.second_moment.corpus_run import WINDOW_BATCHES
from kscli.second_moment.covariance import BATCH_TOKENS, second_moments
from kscli.second_moment.options import CovarianceOptions
from kscli.second_moment.settling import Settling
from kscli.second_moment.token_stream import TokenStream

MAX_LENGTH = 512
REPEATS = 3
PARTS = ("loop", "command", "naive", "memory", "tokens", "layers")


def main(model: str, corpus: str, *parts: str) -> None:
    for part in parts or PARTS:
        globals()[f"measure_{part}"](model, corpus)


def load(model: str, dtype: str) -> LoadedModel:
    return load_model(ModelOptions(model, device="cpu", dtype=dtype))


def batches_of(model: LoadedModel, corpus: str, tokens: int | None = None) -> list[TokenBatch]:
    """The batches that cache-cov makes."""
    stream = TokenStream(
        model.tokenizer,
        open_corpus(CorpusSpec(corpus)),
        CovarianceOptions(None, tokens, MAX_LENGTH),
        Settling((), model.decoder.d_m).next_at,
        WINDOW_BATCHES * BATCH_TOKENS,
    )
    return [batch for w in stream for batch in make_batches(w.sequences, BATCH_TOKENS)]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare(model: LoadedModel, batches: list[TokenBatch]) -> None:
    """The decoder alone, all its layers, as transformers runs it."""
    decoder = model.decoder.model.get_decoder()  # type: ignore[operator]
    with torch.inference_mode():
        for batch in batches:
            decoder(input_ids=batch.input_ids, use_cache=False)


def engine(model: LoadedModel, corpus: str, **options: object) -> int:
    wanted = CovarianceOptions(samples=None, **options)  # type: ignore[arg-type]
    return second_moments(model, open_corpus(CorpusSpec(corpus)), wanted).tokens


def measure_loop(name: str, corpus: str) -> None:
    models = {dtype: load(name, dtype) for dtype in ("float32", "bfloat16")}
    batches = batches_of(models["float32"], corpus)
    tokens = sum(batch.tokens for batch in batches)
    padding = 1 - tokens / sum(batch.padded for batch in batches)
    ratios: dict[str, list[float]] = {dtype: [] for dtype in models}
    rates: dict[str, list[float]] = {"bare float32": [], **{dtype: [] for dtype in models}}
    for model in models.values():
        bare(model, batches[:1])
    for _ in range(REPEATS):
        alone = seconds(lambda: bare(models["float32"], batches))
        rates["bare float32"].append(tokens / alone)
        for dtype, model in models.items():
            took = seconds(lambda model=model: engine(model, corpus, max_length=MAX_LENGTH))  # type: ignore[misc]
            ratios[dtype].append(took / alone)
            rates[dtype].append(tokens / took)
    print(f"{tokens:,} tokens in {len(batches)} batches, {padding:.2%} padding, {REPEATS} repeats")
    for what, rate in rates.items():
        print(f"  {what:14} {statistics.median(rate):7.0f} tokens/s")
    for dtype, ratio in ratios.items():
        spread = ", ".join(f"{value:.2f}" for value in ratio)
        print(f"  {dtype} loop / bare float32 decoder: {statistics.median(ratio):.2f} ({spread})")


def measure_command(name: str, corpus: str) -> None:
    """Whole processes; the loading is what the same command takes for the first document."""
    model = load(name, "float32")
    batches = batches_of(model, corpus)
    bare(model, batches[:1])
    ratios: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        alone = seconds(lambda: bare(model, batches))
        for dtype in ("float32", "bfloat16"):
            whole = seconds(lambda dtype=dtype: command(name, corpus, dtype))  # type: ignore[misc]
            loading = seconds(lambda dtype=dtype: command(name, corpus, dtype, "--tokens", "1"))  # type: ignore[misc]
            ratios.setdefault((dtype, "whole"), []).append(whole / alone)
            ratios.setdefault((dtype, "less its loading"), []).append((whole - loading) / alone)
    for (dtype, what), ratio in ratios.items():
        spread = ", ".join(f"{value:.2f}" for value in ratio)
        print(
            f"  {dtype} command, {what} / bare float32 decoder: "
            f"{statistics.median(ratio):.2f} ({spread})"
        )


def command(name: str, corpus: str, dtype: str, *options: str) -> None:
    """cache-cov as a user runs it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        line = ["cache-cov", "-m", name, "--corpus", corpus, "--dtype", dtype, "--device", "cpu"]
        line += ["--max-length", str(MAX_LENGTH), "--samples", "all", "--dir", folder, *options]
        subprocess.run([sys.executable, "-m", "kscli", *line], check=True, capture_output=True)


def measure_naive(name: str, corpus: str) -> None:
    """One pass a layer, stopped there: every pass pads, masks and sums in float32."""
    tokens = 10240
    models = {dtype: load(name, dtype) for dtype in ("float32", "bfloat16")}
    model = models["float32"]
    batches = batches_of(model, corpus, tokens)
    bare(model, batches)
    naive = seconds(lambda: [one_layer(model, layer, batches) for layer in layers_of(model)])
    print(f"one pass a layer, {tokens:,} tokens: {naive:.1f} s")
    for dtype, other in models.items():
        took = [
            seconds(lambda other=other: engine(other, corpus, max_length=MAX_LENGTH, tokens=tokens))  # type: ignore[misc]
            for _ in range(REPEATS)
        ]
        ratio = naive / statistics.median(took)
        print(f"  cache-cov {dtype}: {statistics.median(took):.1f} s, {ratio:.1f} times faster")


def layers_of(model: LoadedModel) -> range:
    return range(model.decoder.n_layers)


class Stop(Exception):  # noqa: N818
    pass


def one_layer(model: LoadedModel, layer: int, batches: list[TokenBatch]) -> Tensor:
    """C of one layer: a pass of its own, keys of the tokens that are not padding, one product."""
    total = torch.zeros(model.decoder.d_m, model.decoder.d_m)
    found: list[Tensor] = []

    def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise Stop

    handle = model.decoder.projections[layer].module.register_forward_pre_hook(hook)
    with torch.inference_mode():
        for batch in batches:
            lengths = torch.tensor([len(s.token_ids) for s in batch.sequences])
            mask = torch.arange(batch.input_ids.shape[1])[None, :] < lengths[:, None]
            try:
                model.decoder.model(input_ids=batch.input_ids, attention_mask=mask.long())
            except Stop:
                keys = found.pop()[mask]
                total += keys.T @ keys
    handle.remove()
    return total


def measure_memory(name: str, corpus: str) -> None:
    """In a process of its own, since a process's peak never falls."""
    out = subprocess.run(
        [sys.executable, __file__, name, corpus, "peak"], capture_output=True, text=True, check=True
    )
    print(out.stdout.strip())


def measure_peak(name: str, corpus: str) -> None:
    model = load(name, "float32")
    bare(model, [make_batches(batches_of(model, corpus, 64)[0].sequences, 64)[0]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now = resident()
    engine(model, corpus, max_length=MAX_LENGTH, tokens=3 * BATCH_TOKENS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    d_m, n_layers = model.decoder.d_m, model.decoder.n_layers
    allowed = 6 * n_layers * d_m**2 / 2**30 + 1
    print(
        f"peak above the model's own {now / 2**20:.2f} GiB: {(peak - now) / 2**20:.2f} GiB "
        f"(6 bytes x {n_layers} x {d_m}^2 + 1 GiB = {allowed:.2f} GiB)"
        + ("" if peak > before else "; the loading's peak was higher")
    )


def resident() -> float:
    """KiB of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize() / 1024


def measure_tokens(name: str, corpus: str) -> None:
    model = load(name, "bfloat16")
    sizes = [8192, 16384, 32768, 65536, 112 * 1024]
    engine(model, corpus, tokens=2048)
    took = [seconds(lambda size=size: engine(model, corpus, tokens=size)) for size in sizes]  # type: ignore[misc]
    report_line("tokens", sizes, took)


def measure_layers(name: str, corpus: str) -> None:
    model = load(name, "bfloat16")
    counts = [5, 10, 15, 20, 25, 30]
    engine(model, corpus, tokens=2048)
    took = [
        seconds(lambda last=count - 1: engine(model, corpus, layers=f"0-{last}", tokens=12288))  # type: ignore[misc]
        for count in counts
    ]
    report_line("layers", counts, took)


def report_line(what: str, sizes: list[int], took: list[float]) -> None:
    slope, offset = np.polyfit(sizes, took, 1)
    rest = np.array(took) - (slope * np.array(sizes) + offset)
    r2 = 1 - (rest**2).sum() / ((np.array(took) - np.mean(took)) ** 2).sum()
    points = ", ".join(f"{size:,}: {value:.1f} s" for size, value in zip(sizes, took, strict=True))
    print(f"bfloat16, time over {what}: {points}; R^2 = {r2:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
