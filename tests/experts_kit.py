"""Tiny random mixtures of experts, and their stacked keys by the definition, in float64.

Nothing here uses kscli: the router, the experts and the stacked key are written out for each
family, from the block's input and its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import GROUPED, save_model
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

Array = NDArray[np.float64]
Router = Callable[[Any, Tensor], Tensor]

D_M, EXPERTS = 24, 6
LIKE_QWEN = GROUPED | {
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": D_M,
}
LIKE_MIXTRAL = GROUPED | {
    "intermediate_size": D_M,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
LIKE_DEEPSEEK = GROUPED | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": D_M,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def _top(scores: Tensor, weights: Tensor, k: int = 2) -> Tensor:
    """`weights` (tokens, E) where the `scores` are a token's k largest, else 0."""
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
    return weights * chosen


def _softmax_then_top(block: Any, x: Tensor) -> Tensor:
    scores = (x @ block.gate.weight.double().T).softmax(1)
    return _top(scores, scores)


def _normalised(block: Any, x: Tensor) -> Tensor:
    gates = _softmax_then_top(block, x)
    return gates / gates.sum(1, keepdim=True)


def _top_then_softmax(block: Any, x: Tensor) -> Tensor:
    scores = x @ block.router.weight.double().T
    if getattr(block.router, "bias", None) is not None:
        scores = scores + block.router.bias
    return _top(scores, scores.masked_fill(_top(scores, scores) == 0, -torch.inf).softmax(1))


def _sigmoid_in_groups(block: Any, x: Tensor) -> Tensor:
    scores = (x @ block.gate.weight.double().T).sigmoid()
    biased = scores + block.gate.e_score_correction_bias.double()
    groups = biased.reshape(len(x), 2, -1)
    best = groups.topk(2).values.sum(-1).argmax(1)
    of_best = torch.arange(2)[None] == best[:, None]
    allowed = of_best[:, :, None].expand_as(groups).reshape(biased.shape)
    gates = _top(biased.masked_fill(~allowed, -torch.inf), scores)
    return 1.5 * gates / gates.sum(1, keepdim=True)


def _sigmoid_of_top(block: Any, x: Tensor) -> Tensor:
    scores = x @ block.router.weight.double().T
    return _top(scores, scores.sigmoid())


# Family: configuration class, settings, how tokens are routed, the block's path in a layer.
FAMILIES: dict[str, tuple[str, dict[str, Any], Router, str]] = {
    "mixtral": ("mixtral", LIKE_MIXTRAL, _normalised, "mlp"),
    "qwen3-moe": ("qwen3_moe", LIKE_QWEN | {"norm_topk_prob": True}, _normalised, "mlp"),
    "qwen2-moe": (
        "qwen2_moe",
        LIKE_QWEN | {"shared_expert_intermediate_size": 40},
        _softmax_then_top,
        "mlp",
    ),
    "olmoe": ("olmoe", LIKE_QWEN | {"intermediate_size": D_M}, _softmax_then_top, "mlp"),
    "gpt-oss": (
        "gpt_oss",
        LIKE_MIXTRAL | {"head_dim": 8, "sliding_window": 8},
        _top_then_softmax,
        "mlp",
    ),
    "deepseek-v3": ("deepseek_v3", LIKE_DEEPSEEK | MLA, _sigmoid_in_groups, "mlp"),
    "glm4-moe": ("glm4_moe", LIKE_DEEPSEEK | {"head_dim": 8}, _sigmoid_in_groups, "mlp"),
    "llama4": (
        "llama4_text",
        LIKE_MIXTRAL | {"head_dim": 8, "intermediate_size_mlp": 48},
        _sigmoid_of_top,
        "feed_forward",
    ),
    "granite-moe": ("granitemoe", LIKE_MIXTRAL, _top_then_softmax, "block_sparse_moe"),
    "granite-moe-shared": (
        "granitemoeshared",
        LIKE_MIXTRAL | {"shared_intermediate_size": 40, "residual_multiplier": 0.7},
        _top_then_softmax,
        "block_sparse_moe",
    ),
    # Its first layer mixes tokens by a state space.
    "granite-moe-hybrid": (
        "granitemoehybrid",
        LIKE_MIXTRAL
        | {
            "shared_intermediate_size": 40,
            "layers_block_type": ["linear_attention", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "mamba_chunk_size": 8,
        },
        _top_then_softmax,
        "block_sparse_moe",
    ),
}
# The shared experts' module, in a layer; not all families have it.
SHARED_PATHS = (
    "mlp.shared_experts",
    "mlp.shared_expert",
    "feed_forward.shared_expert",
    "shared_mlp",
)


def shared_experts(model: Any, layer: int) -> Any:
    """The module of a layer's shared experts; None without any."""
    modules = dict(model.model.layers[layer].named_modules())
    return next((modules[path] for path in SHARED_PATHS if path in modules), None)


def shared_weight(model: Any, layer: int) -> Tensor | None:
    """The down-projection of a layer's shared experts; None without any."""
    shared = shared_experts(model, layer)
    if shared is None:
        return None
    down = shared.down_proj if hasattr(shared, "down_proj") else shared.output_linear
    weight: Tensor = down.weight
    return weight


def save_experts(family: str, folder: Path, **changes: Any) -> None:
    """Save a random mixture of experts of a family.

    Larger weights would make routers so sharp that gates magnify float32's rounding.
    """
    model_type, settings, *_ = FAMILIES[family]
    save_model(model_type, settings | changes, folder, scale=0.2)


def in_float64(folder: Path) -> Any:
    """The saved model, with its own forward pass of experts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="float64", experts_implementation="eager"
    ).eval()


def stacked_keys(family: str, model: Any, token_ids: Sequence[int], layer: int) -> list[Array]:
    """The parts of the stacked key of every token of a sequence, (tokens, d) each.

    One part an expert, 0 where the token is not routed to it, and one of the shared experts.
    """
    *_, route, path = FAMILIES[family]
    block = model.get_submodule(f"model.layers.{layer}.{path}")
    found: list[Tensor] = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, i: found.append(i[0])):
        model(torch.tensor([list(token_ids)]))
        x = found[0].reshape(len(token_ids), -1).double()
        gates = route(block, x)
        parts = [
            _gated_key(family, block.experts, expert, x, gates[:, [expert]])
            for expert in range(gates.shape[1])
        ]
        shared = shared_experts(model, layer)
        if shared is not None and hasattr(shared, "input_linear"):
            gate, up = shared.input_linear(x).chunk(2, dim=1)
            parts.append(silu(gate) * up)
        elif shared is not None:
            parts.append(silu(shared.gate_proj(x)) * shared.up_proj(x))
        if family == "qwen2-moe":
            parts[-1] *= block.shared_expert_gate(x).sigmoid()
    return [part.numpy() for part in parts]


def _gated_key(family: str, experts: Any, expert: int, x: Tensor, g: Tensor) -> Tensor:
    """The gate's weights `g` (tokens, 1) times an expert's keys; Llama 4 multiplies its inputs."""
    weight = experts.gate_up_proj[expert].double()
    if family == "gpt-oss":
        both = x @ weight + experts.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return g * (up + 1) * gate * (1.702 * gate).sigmoid()
    if family == "llama4":
        gate, up = (g * x @ weight).chunk(2, dim=1)
        return silu(gate) * up
    gate, up = (x @ weight.T).chunk(2, dim=1)
    return g * silu(gate) * up
