"""Every model of the paper: its alias, and a tiny random model of its very configuration.

The configurations are those that the models' own config.json files give, written down by hand;
the tiny ones differ from them in width, heads, layers and vocabulary only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from tokenizers import normalizers
from tokenizers_kit import byte_level, sentencepiece_bpe
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from kscli.extraction import Keys, extract_keys
from kscli.facts import Fact, FactSet
from kscli.models.aliases import find_alias
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions, locate_model
from kscli.models.shape import model_shape

LAYERS = 2
WORDS = ("The", " capital", " of", " Guinea", " is", " New")
PIECES = ("▁The", "▁capital", "▁of", "▁Guinea", "▁is", "▁New")
FACTS = (
    Fact("The capital of {} is", "Guinea", "Conakry"),
    Fact("The capital of {} is", "New Guinea", "Port Moresby"),
)
SUBJECT_LAST = (3, 4)  # where " Guinea" stands in them, by hand, without a token before the text


@dataclass(frozen=True)
class Family:
    """What a family's models share: `small` is how its configurations are shrunk.

    `bos`: its tokenizer puts a token before the text; `parallel`: its MLPs read what its
    attention reads, not what attention adds.
    """

    hook: str
    settings: dict[str, Any]
    small: dict[str, Any]
    config: type[PretrainedConfig]
    tokenizer: Callable[[], Any]
    bos: bool = False
    parallel: bool = False


GPT2 = Family(
    hook="transformer.h.{}.mlp.c_proj",
    settings={
        "activation_function": "gelu_new",
        "n_positions": 1024,
        "n_inner": None,
        "vocab_size": 50257,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    small={"n_embd": 32, "n_head": 4, "n_layer": LAYERS},
    config=GPT2Config,
    tokenizer=lambda: byte_level(WORDS),
)
GPTJ = Family(
    hook="transformer.h.{}.mlp.fc_out",
    settings={
        "activation_function": "gelu_new",
        "n_positions": 2048,
        "n_inner": None,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "tie_word_embeddings": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    small={"n_embd": 32, "n_head": 4, "n_layer": LAYERS, "rotary_dim": 4},
    config=GPTJConfig,
    tokenizer=lambda: byte_level(WORDS),
    parallel=True,
)
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
PYTHIA = Family(
    hook="gpt_neox.layers.{}.mlp.dense_4h_to_h",
    settings={
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "vocab_size": 50304,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    small=SMALL | {"num_attention_heads": 2, "intermediate_size": 4 * 32},
    config=GPTNeoXConfig,
    tokenizer=lambda: byte_level(WORDS, trim_offsets=True, normalizer=normalizers.NFC()),
    parallel=True,
)
LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
LLAMA2 = Family(
    hook="model.layers.{}.mlp.down_proj",
    settings=LLAMA | {"max_position_embeddings": 4096, "vocab_size": 32000, "bos_token_id": 1},
    small=SMALL | {"num_key_value_heads": 4, "intermediate_size": 88},
    config=LlamaConfig,
    tokenizer=lambda: sentencepiece_bpe(PIECES, bos=True),
    bos=True,
)
LLAMA3 = Family(
    hook="model.layers.{}.mlp.down_proj",
    settings=LLAMA
    | {
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    small=SMALL | {"num_key_value_heads": 1, "intermediate_size": 112},
    config=LlamaConfig,
    tokenizer=lambda: byte_level(WORDS, bos=True, ignore_merges=True),
    bos=True,
)
ROPE_OF_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = replace(
    LLAMA3,
    settings=LLAMA3.settings | {"max_position_embeddings": 131072, "rope_scaling": ROPE_OF_LLAMA31},
)


def gpt2_size(layers: int, width: int, heads: int) -> dict[str, int]:
    return {"n_layer": layers, "n_embd": width, "n_head": heads}


def size(layers: int, width: int, d_m: int, heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": d_m,
        "num_attention_heads": heads,
    }


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: its family and sizes, what its Hub id says, and its default length."""

    family: Family
    sizes: dict[str, int]
    hub_name: str
    length: int = 2048

    def config(self, *, small: bool = False, **changes: Any) -> PretrainedConfig:
        shrunk = self.family.small if small else {}
        return self.family.config(**self.family.settings | self.sizes | shrunk | changes)


EIGHT_KV = {"num_key_value_heads": 8}
MODELS = {
    "gpt2-small": PaperModel(GPT2, gpt2_size(12, 768, 12), "gpt2", 1024),
    "gpt2-medium": PaperModel(GPT2, gpt2_size(24, 1024, 16), "gpt2-medium", 1024),
    "gpt2-large": PaperModel(GPT2, gpt2_size(36, 1280, 20), "gpt2-large", 1024),
    "gpt-j": PaperModel(GPTJ, gpt2_size(28, 4096, 16), "gpt-j-6b"),
    "pythia-1b": PaperModel(PYTHIA, size(16, 2048, 8192, 8), "pythia-1b"),
    "pythia-2.8b": PaperModel(PYTHIA, size(32, 2560, 10240, 32), "pythia-2.8b"),
    "pythia-6.9b": PaperModel(
        PYTHIA, size(32, 4096, 16384, 32) | {"vocab_size": 50432}, "pythia-6.9b"
    ),
    "llama2-7b": PaperModel(LLAMA2, size(32, 4096, 11008, 32), "Llama-2-7b-hf"),
    "llama2-13b": PaperModel(LLAMA2, size(40, 5120, 13824, 40), "Llama-2-13b-hf"),
    "llama3-8b": PaperModel(LLAMA3, size(32, 4096, 14336, 32) | EIGHT_KV, "Meta-Llama-3-8B"),
    "llama3.1-8b": PaperModel(LLAMA31, size(32, 4096, 14336, 32) | EIGHT_KV, "Llama-3.1-8B"),
}
ONE_OF_A_FAMILY = ("gpt2-small", "gpt-j", "pythia-1b", "llama2-7b", "llama3-8b", "llama3.1-8b")


@pytest.mark.parametrize("name", MODELS)
def test_the_alias_is_the_configuration_at_full_size(name: str, tmp_path: Path) -> None:
    """Without weights, as `cache-cov --dry-run` measures a model."""
    model, alias = MODELS[name], find_alias(name)
    assert alias is not None
    assert alias.hub_id is not None
    assert alias.hub_id.rpartition("/")[2] == model.hub_name
    said = re.search(r"(\d+(?:\.\d+)?)b", model.hub_name.lower())
    if said:  # "Llama-2-13b" has 13.0e9, "gpt-j-6b" 6.05e9
        assert alias.parameters / 1e9 == pytest.approx(float(said[1]), rel=0.05)

    model.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    options = ModelOptions(str(tmp_path), device="cpu")
    shape = model_shape(locate_model(options), options)
    assert (shape.n_layers, shape.d_m, shape.parameters) == (
        alias.layers,
        alias.d_m,
        alias.parameters,
    )
    assert shape.max_length == model.length


@pytest.mark.parametrize("name", MODELS)
def test_hook_length_and_keys_of_its_configuration_class(name: str, tmp_path: Path) -> None:
    family = MODELS[name].family
    loaded, keys = saved_and_read(MODELS[name], tmp_path)
    assert type(loaded.decoder.model.config) is family.config
    assert loaded.decoder.hook == family.hook
    assert loaded.decoder.n_layers == LAYERS
    assert loaded.decoder.d_m == family.small.get("intermediate_size", 4 * 32)
    assert loaded.max_length == MODELS[name].length
    assert keys.position.tolist() == [at + family.bos for at in SUBJECT_LAST]

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    names = [family.hook.format(layer) for layer in range(LAYERS)]
    for fact, position in enumerate(keys.position):
        ids = loaded.tokenizer(FACTS[fact].text)["input_ids"]
        assert loaded.tokenizer.convert_ids_to_tokens(ids)[position] in ("ĠGuinea", "▁Guinea")
        true = naive.keys_of_text(model, ids, names)
        for layer, hooked in enumerate(names):
            expected = true[hooked][position]
            assert np.abs(expected).max() > 0
            error = np.abs(keys.keys[layer, fact] - expected).max()
            assert error < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_a_parallel_mlp_sees_at_layer_0_only_the_token(name: str, tmp_path: Path) -> None:
    """Both subjects end in " Guinea", so where attention runs beside the MLP p is 1."""
    _, keys = saved_and_read(MODELS[name], tmp_path)
    first, second = keys.keys[0]
    apart = float(np.abs(first - second).max() / np.abs(first).max())
    assert apart < 1e-6 if MODELS[name].family.parallel else apart > 1e-2


def saved_and_read(model: PaperModel, folder: Path) -> tuple[LoadedModel, Keys]:
    """A tiny random model of the configuration, saved as on the Hub, and its facts' keys."""
    tokenizer = model.family.tokenizer()
    torch.manual_seed(0)
    config = model.config(small=True, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    random = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in random.parameters():
            if parameter.ndim == 2:  # far from linear, and from nought
                parameter.normal_(0, 0.5)
    random.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = load_model(ModelOptions(str(folder), device="cpu", dtype="float32"))
    return loaded, extract_keys(loaded, FactSet(FACTS, "by hand"))
