"""cache-cov on a GPU, random weights at a real model's full shape: ready to run, all layers.

    python tests/benchmarks/gpu.py [MODEL ...] [--tokens 2000000] [--device cuda] [--dtype bfloat16]

MODEL is gpt-j, llama2-7b, llama2-13b, llama3.1-8b (default: these), qwen3-30b-a3b or gpt-oss-20b,
mixtures of experts, or small or small-experts, for a try on a CPU.
Documents have lengths as Wikipedia's articles have, ARTICLE_TOKENS on average. Prints tokens/s,
the share of the card's peak, the peak of memory, the wall over that of the bare decoder and the
half products at the rate measured here, and the hours that 100,000 articles would take,
extrapolated.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from kscli.batching import make_batches
from kscli.models.forward import Decoder
from kscli.models.loading import LoadedModel
from kscli.models.locating import ModelIdentity, ModelOptions, locate_model
from kscli.models.shape import ModelShape, model_shape
from kscli.resources import format_size, matmul_rate, measure_resources
from kscli.second_moment.corpus_run import WINDOW_BATCHES
from kscli.second_moment.covariance import second_moments
from kscli.second_moment.moments import lower_products
from kscli.second_moment.options import CovarianceOptions
from kscli.second_moment.plan import plan_memory
from kscli.second_moment.settling import Settling
from kscli.second_moment.token_stream import TokenStream

ARTICLE_TOKENS = 800
ARTICLES = 100_000
MAX_LENGTH = 2048
CONFIGS: dict[str, Any] = {
    "gpt-j": lambda: GPTJConfig(),
    "llama2-7b": lambda: LlamaConfig(),
    "llama2-13b": lambda: LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama3.1-8b": lambda: LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
    ),
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "gpt-oss-20b": lambda: GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "small-experts": lambda: Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    ),
    "small": lambda: LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
}
FULL = ("gpt-j", "llama2-7b", "llama2-13b", "llama3.1-8b")


class RandomTokens:
    """A tokenizer of documents that are a number: random tokens, as many as an article has."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        most = options.get("max_length", MAX_LENGTH)
        if isinstance(texts, str):
            return {"input_ids": self.ids(texts, most)}
        return {"input_ids": [self.ids(text, most) for text in texts]}

    def ids(self, text: str, most: int) -> list[int]:
        generator = np.random.default_rng(int(text or 0))
        # Log-normal, of the mean that is named above.
        length = int(generator.lognormal(np.log(ARTICLE_TOKENS) - 0.5, 1.0))
        size = min(max(length, 8), most)
        return generator.integers(10, self.vocabulary, size).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Numbers:
    """A corpus of the numbers from 0 on."""

    name: str = "random articles"
    identity: str = "random"

    def documents(self) -> Iterator[str]:
        return (str(number) for number in range(10**9))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(FULL))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    peak = matmul_rate(arguments.device, arguments.dtype)
    print(f"bare products: {peak / 1e12:.1f} TFLOP/s in {arguments.dtype}")
    for name in arguments.models:
        measure(name, arguments, peak)
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure(name: str, arguments: argparse.Namespace, peak: float) -> None:
    config = CONFIGS[name]()
    dtype = getattr(torch, arguments.dtype)
    with torch.device(arguments.device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    hidden, n_layers = config.hidden_size, config.num_hidden_layers
    decoder = Decoder(network.requires_grad_(False), hidden, n_layers)
    model = LoadedModel(
        ModelIdentity(name, name, "", "random", "random"),
        decoder,
        RandomTokens(config.vocab_size),
        arguments.dtype,
        arguments.device,
        MAX_LENGTH,
    )
    shape = shape_of(config)
    resources = measure_resources(arguments.device)
    # The weights are there already, and what is free does not hold them.
    weights = shape.parameters * dtype.itemsize
    grown = type(resources)(
        resources.device,
        resources.host_memory + (weights if resources.device_memory is None else 0),
        None if resources.device_memory is None else resources.device_memory + weights,
        resources.all_devices + weights,
    )
    plan = plan_memory(shape, range(n_layers), arguments.dtype, grown)
    print(f"{name}: {plan.sentences()[0]}")
    options = CovarianceOptions(None, arguments.tokens, MAX_LENGTH)
    warm_up = CovarianceOptions(None, 2 * plan.batch_tokens, MAX_LENGTH)
    second_moments(model, Numbers(), warm_up, plan=plan)
    batches = batches_of(model, options, plan.batch_tokens)
    tokens = sum(batch.tokens for batch in batches)
    every = max(1, len(batches) // 12)
    some = batches[::every]
    share = tokens / sum(batch.tokens for batch in some)

    def bare() -> None:
        for batch in some:
            decoder.run(batch.input_ids, [n_layers - 1], lambda layer, keys: None)

    alone = seconds(bare, arguments.device) * share
    count, each = (shape.experts.count, shape.experts.each) if shape.experts else (1, 1)
    rows = plan.batch_tokens * each // count
    keys = torch.randn(rows, decoder.d_m, dtype=dtype, device=arguments.device)
    product = min(seconds(lambda: lower_products(keys), arguments.device) for _ in range(5))
    products = count * product * n_layers * tokens / plan.batch_tokens
    reset_peak(arguments.device)
    wall = seconds(lambda: second_moments(model, Numbers(), options, plan=plan), arguments.device)
    squares = n_layers * sum(width**2 for width in shape.widths_a_token)
    flops = tokens * (2 * shape.active_parameters + squares)
    hours = ARTICLES * ARTICLE_TOKENS / tokens * wall / 3600
    print(
        f"  {tokens:,} tokens: {tokens / wall:,.0f} tokens/s, {flops / wall / peak:.0%} of the "
        f"peak, {peak_memory(arguments.device)}; wall / (decoder {alone:.1f} s + half products "
        f"{products:.1f} s) = {wall / (alone + products):.2f}; {ARTICLES:,} articles of "
        f"{ARTICLE_TOKENS} tokens: {hours:.2f} h (extrapolated)"
    )


def shape_of(config: Any) -> ModelShape:
    """The sizes of a model, from its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        options = ModelOptions(folder, weights=False)
        return model_shape(locate_model(options), options)


def batches_of(model: LoadedModel, options: CovarianceOptions, budget: int) -> list[Any]:
    first = Settling((), model.decoder.d_m).next_at
    stream = TokenStream(model.tokenizer, Numbers(), options, first, WINDOW_BATCHES * budget)
    return [batch for window in stream for batch in make_batches(window.sequences, budget)]


def seconds(work: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> str:
    if not device.startswith("cuda"):
        return "memory not measured"
    return f"{format_size(torch.cuda.max_memory_allocated())} at most"


if __name__ == "__main__":
    main()
