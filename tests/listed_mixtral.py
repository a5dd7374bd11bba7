"""Mixtral with its experts as a list of modules, as transformers had it: code in a folder.

Copied beside a model's weights and named in its config.json, it is loaded with
`--trust-remote-code`. The weights have the names of that time: `block_sparse_moe.experts.3.w2`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu
from transformers import MixtralConfig, MixtralForCausalLM


class ListedConfig(MixtralConfig):
    """Mixtral's, under a name that transformers does not know."""

    model_type = "listed_mixtral"


class OneExpert(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.w2(silu(self.w1(hidden)) * self.w3(hidden))
        return found


class ListOfExperts(nn.Module):
    """The block of old: the router is a linear map, each expert is called with its tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.each = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(OneExpert(config) for _ in range(config.num_local_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = self.router(flat).float().softmax(-1)
        gates, chosen = scores.topk(self.each, dim=-1)
        gates = (gates / gates.sum(-1, keepdim=True)).to(flat.dtype)
        found = torch.zeros_like(flat)
        routed = one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = routed[number].nonzero(as_tuple=True)
            found.index_add_(0, token, expert(flat[token]) * gates[token, slot, None])
        return found.reshape(hidden.shape)


class ListedMixtral(MixtralForCausalLM):
    """Mixtral with these blocks."""

    config_class = ListedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListOfExperts(config)
