from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kscli.errors import ModelError
from kscli.models.locating import ModelOptions, locate_model
from kscli.models.shape import ModelShape, model_shape
from kscli.resources import Resources
from kscli.second_moment.moments import lower_entries
from kscli.second_moment.plan import (
    MemoryPlan,
    batch_tokens_for,
    plan_memory,
    seconds_a_token,
)

GIB = 2**30
GPT_J = ModelShape(28, 16384, 4096, 6_050_000_000, 5_640_000_000, 2048, tuple(range(28)))
LLAMA2_13B = ModelShape(40, 13824, 5120, 13_000_000_000, 12_690_000_000, 2048, tuple(range(40)))
LLAMA31_8B = ModelShape(32, 14336, 4096, 8_030_000_000, 6_980_000_000, 2048, tuple(range(32)))
SMALL = ModelShape(30, 1536, 576, 134_515_008, 106_200_000, 2048, tuple(range(30)))
SHAPES = [GPT_J, LLAMA2_13B, LLAMA31_8B, SMALL]


def card(gib: float, host: float = 128) -> Resources:
    return Resources("cuda", int(host * GIB), int(gib * GIB), int(gib * GIB))


def plan(shape: ModelShape, resources: Resources, **bounds: int) -> MemoryPlan:
    dtype = "float32" if resources.kind == "cpu" else "bfloat16"
    return plan_memory(shape, range(shape.n_layers), dtype, resources, **bounds)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.n_layers}x{s.d_m}")
@pytest.mark.parametrize("gib", [4, 8, 24, 40, 78, 139])
@pytest.mark.parametrize("host", [4, 32, 128])
def test_no_plan_is_over_its_bounds_and_every_layer_is_in_one_group(
    shape: ModelShape, gib: int, host: int
) -> None:
    try:
        found = plan(shape, card(gib, host))
    except ModelError:
        assert host < 128 or gib < 78
        return
    assert [layer for group in found.groups for layer in group] == list(range(shape.n_layers))
    on_device = found.device_sums + found.work + (0 if found.spread else found.model)
    assert on_device <= gib * GIB
    assert found.host_sums + 16 * shape.d_m**2 + found.host_model <= host * GIB
    if found.spread:
        split = found.split
        assert split is not None
        sizes = split.for_weights({0: gib * GIB}, found.host_model)
        assert sum(sizes.values()) >= found.model


def test_what_the_known_machines_do() -> None:
    h100 = card(78)
    gpt_j = plan(GPT_J, h100)
    assert (gpt_j.placement, gpt_j.passes) == ("device", 1)
    # float64 of half of 28 x 16,384^2, and a half block a row.
    assert gpt_j.device_sums == 8 * 28 * lower_entries(16384)
    assert gpt_j.device_sums / GIB == pytest.approx(28, rel=0.02)
    assert plan(LLAMA2_13B, h100).passes == 1
    assert plan(LLAMA31_8B, h100).placement == "device"
    small_card = plan(GPT_J, card(24))
    assert (small_card.placement, small_card.passes) == ("host", 1)
    assert plan(GPT_J, card(40)).placement == "split"
    assert plan(GPT_J, card(8)).spread
    assert plan(GPT_J, card(24, host=24)).passes == 2
    two_cards = Resources("cuda", 64 * GIB, 8 * GIB, 16 * GIB, device_count=2)
    assert plan(GPT_J, two_cards).host_model < plan(GPT_J, card(8)).host_model
    many_cards = Resources("cuda", 48 * GIB, 8 * GIB, 64 * GIB, device_count=8)
    laid_out = plan(LLAMA2_13B, many_cards)
    assert (laid_out.spread, laid_out.host_model, laid_out.passes) == (True, 0, 1)
    cpu = plan(SMALL, Resources("cpu", 22 * GIB))
    assert (cpu.placement, cpu.passes, cpu.batch_tokens) == ("host", 1, 4096)


def test_more_memory_never_means_more_passes_and_the_fewest_are_taken() -> None:
    entries = lower_entries(GPT_J.d_m)
    passes = []
    for host in range(16, 80, 2):
        found = plan(GPT_J, Resources("cpu", int((host + 24) * GIB)))
        passes.append(found.passes)
        room = (host + 24) * GIB - found.model - found.work
        assert found.passes == -(-GPT_J.n_layers // int(room // (8 * entries)))
        sizes = [len(group) for group in found.groups]
        assert max(sizes) - min(sizes) <= 1
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == 1 < passes[0]


def test_max_memory_bounds_the_device_or_the_process() -> None:
    free = plan(GPT_J, card(78))
    bound = plan(GPT_J, card(78), max_memory=30 * GIB)
    assert (free.placement, bound.placement) == ("device", "split")
    assert bound.model + bound.device_sums + bound.work <= 30 * GIB
    little = 5 * GIB // 4
    process = plan(SMALL, Resources("cpu", 22 * GIB), max_memory=little)
    assert process.passes > 1
    assert process.model + process.host_sums + process.work <= little
    assert plan(SMALL, Resources("cpu", little), max_memory=22 * GIB).groups == process.groups


def test_a_model_that_is_spread_stays_within_the_bound_on_each_device() -> None:
    bound = 8 * GIB
    found = plan(GPT_J, card(78), max_memory=bound)
    assert found.split is not None
    sizes = found.split.for_weights({0: 78 * GIB, 1: 2 * GIB}, 100 * GIB)
    assert sizes == {0: bound - found.work, 1: 0, "cpu": 100 * GIB}
    assert plan(GPT_J, card(78)).split is None


def test_more_memory_on_a_card_or_beside_it_never_means_more_passes() -> None:
    def passes(shape: ModelShape, gib: int, host: int) -> float:
        try:
            return plan(shape, card(gib, host)).passes
        except ModelError:
            return float("inf")

    sizes = range(4, 84, 4)
    for shape in SHAPES:
        table = [[passes(shape, gib, host) for host in sizes] for gib in sizes]
        for row in (*table, *map(list, zip(*table, strict=True))):
            assert row == sorted(row, reverse=True)


@pytest.mark.parametrize(
    ("resources", "bound"),
    [(Resources("cpu", GIB // 4), None), (card(0.1, host=0.1), None), (card(78), GIB // 8)],
)
def test_where_not_even_one_layer_fits_the_remedy_is_told(
    resources: Resources, bound: int | None
) -> None:
    with pytest.raises(ModelError, match="one layer's sums need about") as raised:
        plan(
            GPT_J, Resources(resources.device, GIB, resources.device_memory, GIB), max_memory=bound
        )  # type: ignore[arg-type]
    assert "--dtype" in str(raised.value)


def test_batches_are_a_function_of_model_dtype_and_device() -> None:
    assert batch_tokens_for(GPT_J, "bfloat16", "cpu") == 4096
    sizes = [batch_tokens_for(shape, "bfloat16", "cuda") for shape in SHAPES]
    assert sizes == [8192, 8192, 8192, 32768]
    assert batch_tokens_for(GPT_J, "float32", "cuda") == 4096
    assert plan(GPT_J, card(78), batch_tokens=100).batch_tokens == 100


def test_the_estimate_counts_what_each_pass_runs() -> None:
    rate = 1e12
    whole = plan(SMALL, Resources("cpu", 22 * GIB))
    once = seconds_a_token(whole, SMALL, 0.0, rate)
    forward = 2 * SMALL.layer_parameters / 0.6 / rate
    products = 30 * 1536**2 / rate
    assert once == pytest.approx(forward + products)
    passes = plan(SMALL, Resources("cpu", 5 * GIB // 4))
    assert passes.passes > 1
    runs = sum((group[-1] + 1) / 30 for group in passes.groups)
    assert seconds_a_token(passes, SMALL, 0.0, rate) == pytest.approx(forward * runs + products)
    assert seconds_a_token(whole, SMALL, 512.0, rate) > once


def test_the_plan_in_words_and_for_programs() -> None:
    found = plan(GPT_J, card(40))
    (sentence,) = found.sentences()
    assert "one pass over 28 layers" in sentence
    assert "14.2 GiB on cuda (float32) and 28.4 GiB on the host (float64)" in sentence
    assert sentence.endswith("of checkpoints.")
    (spread,) = plan(GPT_J, card(8)).sentences()
    assert "11.3 GiB, of which" in spread
    two = plan(GPT_J, card(24, host=24))
    assert "2 passes, over layers 0-13, 14-27" in two.sentences()[0]
    assert two.as_dict()["passes"] == 2
    assert two.as_dict()["groups"][1] == list(range(14, 28))


# By their own config.json on the Hub.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {  # Qwen3-30B-A3B
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gpt_oss": {  # gpt-oss-20b
        "vocab_size": 201088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
    },
}


def shape_of(model_type: str, folder: Path) -> ModelShape:
    """The shape of a model of which there is nothing but a configuration."""
    AutoConfig.for_model(model_type, **MIXTURES[model_type]).save_pretrained(folder)
    options = ModelOptions(str(folder), weights=False)
    return model_shape(locate_model(options), options)


def test_qwen3_30b_a3b_on_one_card_from_its_configuration_alone(tmp_path: Path) -> None:
    shape = shape_of("qwen3_moe", tmp_path)
    assert shape.parameters == pytest.approx(30.5e9, rel=0.01)
    # Of 3.3 billion active parameters, 0.6 are the embeddings and the head.
    assert shape.active_parameters == pytest.approx(2.7e9, rel=0.03)
    found = plan(shape, card(78))
    assert found.output == 48 * 128 * 4 * 768**2
    assert (found.placement, found.passes) == ("split", 1)
    assert found.device_sums == 4 * 48 * 128 * lower_entries(768)


def test_gpt_oss_20b_on_one_card_from_its_configuration_alone(tmp_path: Path) -> None:
    shape = shape_of("gpt_oss", tmp_path)
    assert shape.parameters == pytest.approx(20.9e9, rel=0.01)
    found = plan(shape, card(78))
    assert found.output == 24 * 32 * 4 * 2880**2
    assert (found.placement, found.passes) == ("device", 1)
