"""Tiny random models, one of each family, saved as ordinary Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kscli.tiny import MODEL_DIR

VOCABULARY = 3000
HIDDEN = 32
LAYERS = 2

GPT2_LIKE = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = LLAMA_LIKE | {"num_key_value_heads": 2}

# Family: configuration, and the down-projection's dotted name, written down by hand.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", GPT2_LIKE | {"n_inner": 64}, "transformer.h.{}.mlp.c_proj"),
    "gpt-j": ("gptj", GPT2_LIKE | {"n_inner": 64, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out"),
    "gpt-neox": ("gpt_neox", LLAMA_LIKE, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "llama": ("llama", GROUPED, "model.layers.{}.mlp.down_proj"),
    "mistral": ("mistral", GROUPED | {"sliding_window": 8}, "model.layers.{}.mlp.down_proj"),
    # Beyond 16 tokens all positions of a batch are encoded with the long factors.
    "phi3-longrope": (
        "phi3",
        GROUPED
        | {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.5, 3.0, 6.0, 12.0],
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 10000.0,
            },
        },
        "model.layers.{}.mlp.down_proj",
    ),
    "qwen2": ("qwen2", GROUPED, "model.layers.{}.mlp.down_proj"),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}, "model.layers.{}.mlp.down_proj"),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}, "model.layers.{}.mlp.down_proj"),
    "opt": (
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 128,
        },
        "model.decoder.layers.{}.fc2",
    ),
    "falcon": (
        "falcon",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
        },
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "bloom": (
        "bloom",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "olmo": ("olmo", LLAMA_LIKE, "model.layers.{}.mlp.down_proj"),
    "phi": ("phi", LLAMA_LIKE, "model.layers.{}.mlp.fc2"),
    # A square down-projection, and attention as wide as the MLP: structure alone must tell.
    # What it calls its decoder is its head.
    "modernbert-decoder": (
        "modernbert-decoder",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "cls_token_id": 0,
            "sep_token_id": 0,
        },
        "model.layers.{}.mlp.Wo",
    ),
    "square": (
        "gemma",
        GROUPED | {"intermediate_size": HIDDEN, "head_dim": 8},
        "model.layers.{}.mlp.down_proj",
    ),
}


def save_family(family: str, folder: Path, **changes: Any) -> str:
    """Save a random model of the family, with tiny's tokenizer; returns its hook.

    The weights are large enough that the activation is far from linear and C has full rank.
    """
    model_type, settings, hook = FAMILIES[family]
    save_model(model_type, settings | changes, folder)
    return hook


def save_model(model_type: str, settings: dict[str, Any], folder: Path, scale: float = 0.6) -> None:
    """Save a random model of a configuration class, with tiny's tokenizer.

    The matrices are Gaussian of standard deviation `scale`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.0 if "emb" in name or "wte" in name else scale)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    for path in MODEL_DIR.glob("*token*"):
        shutil.copy(path, folder / path.name)
