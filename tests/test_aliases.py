"""Aliases: the table's numbers against closed forms, and what a model's name means."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from kscli.models.aliases import ALIASES, classify, close_aliases, find_alias, slug

NAMES = ["tiny", "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt-j"]
NAMES += ["pythia-1b", "pythia-1.4b", "pythia-2.8b", "pythia-6.9b"]
NAMES += ["llama2-7b", "llama2-13b", "llama3-8b", "llama3.1-8b"]

TINY = Path(__file__).parent.parent / "kscli" / "tiny" / "model"


def gpt2(layers: int, hidden: int, vocabulary: int = 50257, positions: int = 1024) -> int:
    """Tied embeddings; a layer: 4h² attention, 8h² MLP, their biases, two LayerNorms."""
    layer = 12 * hidden**2 + 13 * hidden
    return (vocabulary + positions) * hidden + layers * layer + 2 * hidden


def neox(layers: int, hidden: int, vocabulary: int = 50304) -> int:
    """As GPT-2's layers, rotary positions, a head of its own without bias."""
    return 2 * vocabulary * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


def gptj(layers: int, hidden: int, vocabulary: int = 50400) -> int:
    """Attention without biases, one LayerNorm a layer, a head with bias."""
    layer = 12 * hidden**2 + (4 + 1) * hidden + 2 * hidden
    return 2 * vocabulary * hidden + vocabulary + layers * layer + 2 * hidden


def llama(layers: int, hidden: int, d_m: int, vocabulary: int, kv: int) -> int:
    """No biases; queries and output h², keys and values h·kv, a gated MLP, two RMSNorms."""
    layer = 2 * hidden**2 + 2 * hidden * kv + 3 * hidden * d_m + 2 * hidden
    return 2 * vocabulary * hidden + layers * layer + hidden


# name: (layers, d_m, parameters)
SIZES = {
    "tiny": (4, 4 * 128, gpt2(4, 128, 3000, 256)),
    "gpt2-small": (12, 4 * 768, gpt2(12, 768)),
    "gpt2-medium": (24, 4 * 1024, gpt2(24, 1024)),
    "gpt2-large": (36, 4 * 1280, gpt2(36, 1280)),
    "gpt2-xl": (48, 4 * 1600, gpt2(48, 1600)),
    "gpt-j": (28, 16384, gptj(28, 4096)),
    "pythia-1b": (16, 4 * 2048, neox(16, 2048)),
    "pythia-1.4b": (24, 4 * 2048, neox(24, 2048)),
    "pythia-2.8b": (32, 4 * 2560, neox(32, 2560)),
    "pythia-6.9b": (32, 4 * 4096, neox(32, 4096, 50432)),
    "llama2-7b": (32, 11008, llama(32, 4096, 11008, 32000, 4096)),
    "llama2-13b": (40, 13824, llama(40, 5120, 13824, 32000, 5120)),
    "llama3-8b": (32, 14336, llama(32, 4096, 14336, 128256, 1024)),
    "llama3.1-8b": (32, 14336, llama(32, 4096, 14336, 128256, 1024)),
}


def test_every_promised_alias_is_there_once() -> None:
    names = [alias.name for alias in ALIASES]
    assert len(set(names)) == len(names)
    assert set(NAMES) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_follow_from_the_architecture(name: str) -> None:
    alias = find_alias(name)
    assert alias is not None
    assert (alias.layers, alias.d_m, alias.parameters) == SIZES[name]


def test_all_but_the_embedded_name_a_commit() -> None:
    for alias in ALIASES:
        if alias.name == "tiny":
            assert (alias.hub_id, alias.revision) == (None, None)
        else:
            assert re.fullmatch(r"[\w-]+/[\w.-]+", alias.hub_id or "")
            assert re.fullmatch("[0-9a-f]{40}", alias.revision or "")
    assert len({alias.revision for alias in ALIASES}) == len(ALIASES)


def test_tiny_is_what_ships() -> None:
    if not (TINY / "model.safetensors").is_file():
        pytest.skip("the embedded model is not built")
    config = json.loads((TINY / "config.json").read_text())
    with (TINY / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    alias = find_alias("tiny")
    assert alias is not None
    assert alias.layers == config["n_layer"]
    assert alias.d_m == (config.get("n_inner") or 4 * config["n_embd"])
    assert alias.parameters == sum(prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        ("tiny", "embedded", "tiny"),
        ("gpt-j", "hub", "gpt-j"),
        ("gpt2", "hub", "gpt2"),
        ("HuggingFaceTB/SmolLM2-135M", "hub", "HuggingFaceTB--SmolLM2-135M"),
        ("openai-community/gpt2", "hub", "openai-community--gpt2"),
        ("here", "folder", "here"),
        ("here/", "folder", "here"),
        ("owner/model", "folder", "model"),
        ("./gpt-j", "folder", "gpt-j"),
        ("./gone", "folder", "gone"),
        ("../gone/", "folder", "gone"),
        ("~/gone", "folder", "gone"),
        ("/data/gone", "folder", "gone"),
        ("a/b/gone", "folder", "gone"),
        ("gone/", "folder", "gone"),
        (".", "folder", "work"),
        ("owner/..", "folder", "work"),
        ("here/..", "folder", "work"),
        ("link", "folder", "link"),
        ("model.Q4_0.gguf", "gguf", "model.Q4_0.gguf"),
        ("owner/gone.GGUF", "gguf", "gone.GGUF"),
    ],
)
def test_what_a_name_means(
    model: str, kind: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "here").mkdir(parents=True)
    (work / "owner" / "model").mkdir(parents=True)
    (work / "link").symlink_to(work / "here")
    monkeypatch.chdir(work)
    assert classify(model) == kind
    assert slug(model) == expected


def test_an_alias_wins_over_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2-small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert classify("gpt2-small") == "hub"
    assert classify("./gpt2-small") == "folder"


@pytest.mark.parametrize(
    ("mistyped", "first"),
    [
        ("gpt2-smal", "gpt2-small"),
        ("GPT2-Small", "gpt2-small"),
        ("llama-3-8b", "llama3-8b"),
        ("meta-llama/Llama-3-8B", "llama3-8b"),
        ("pythia1b", "pythia-1b"),
        ("gptj", "gpt-j"),
    ],
)
def test_close_aliases(mistyped: str, first: str) -> None:
    assert close_aliases(mistyped)[0] == first


def test_nothing_is_close_to_another_name() -> None:
    assert close_aliases("HuggingFaceTB/SmolLM2-135M") == []


def test_importing_aliases_is_light() -> None:
    code = (
        "import sys, kscli.models.aliases;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'difflib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
