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
from cli_kit import kscli

from kscli.models.aliases import ALIASES, classify, close_aliases, find_alias, slug

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


def llama(
    layers: int,
    hidden: int,
    d_m: int,
    vocabulary: int,
    kv: int,
    *,
    q: int = 0,
    tied: bool = False,
    more: int = 0,
) -> int:
    """A decoder with gated MLPs and two RMSNorms a layer, without biases.

    Queries and output have h·q, keys and values h·kv; a layer has so many `more`.
    """
    layer = 2 * hidden * (q or hidden) + 2 * hidden * kv + 3 * hidden * d_m + 2 * hidden + more
    return (2 - tied) * vocabulary * hidden + layers * layer + hidden


def qwen25(layers: int, hidden: int, d_m: int, kv: int, *, tied: bool = False) -> int:
    """Biases of queries, keys and values; the larger ones have a larger vocabulary."""
    vocabulary = 151936 if tied else 152064
    return llama(layers, hidden, d_m, vocabulary, kv, tied=tied, more=hidden + 2 * kv)


def qwen3(layers: int, hidden: int, d_m: int, heads: int, *, tied: bool = False) -> int:
    """Heads of 128, 8 of them for keys and values, each with a norm for queries and for keys."""
    return llama(layers, hidden, d_m, 151936, 1024, q=128 * heads, tied=tied, more=256)


def gemma3(
    layers: int, hidden: int, d_m: int, heads: int, kv: int, vocabulary: int = 262208, of: int = 256
) -> int:
    """Heads `of` 256, tied embeddings, four norms a layer, and norms of queries and keys."""
    more = 2 * hidden + 2 * of
    return llama(layers, hidden, d_m, vocabulary, kv * of, q=heads * of, tied=True, more=more)


def olmo2(layers: int, hidden: int, d_m: int, kv: int) -> int:
    """The norms of queries and keys are over all heads."""
    return llama(layers, hidden, d_m, 100352, kv, more=hidden + kv)


def qwen3_30b(experts: int) -> int:
    """So many of 128 experts of d_m = 768, of which a token has 8; the router has 128 rows."""
    more = 256 + experts * 3 * 2048 * 768 + 128 * 2048
    return llama(48, 2048, 0, 151936, 512, q=4096, more=more)


def gpt_oss_20b(experts: int) -> int:
    """So many of 32 experts of d_m = 2880, of which a token has 4. Biases everywhere.

    Each of the 64 heads has a sink.
    """
    more = experts * (3 * 2880**2 + 3 * 2880) + 32 * (2880 + 1) + 4096 + 2 * 512 + 2880 + 64
    return llama(24, 2880, 0, 201088, 512, q=4096, more=more)


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
    "llama3.2-1b": (16, 8192, llama(16, 2048, 8192, 128256, 512, tied=True)),
    "llama3.2-3b": (28, 8192, llama(28, 3072, 8192, 128256, 1024, tied=True)),
    "mistral-7b-v0.3": (32, 14336, llama(32, 4096, 14336, 32768, 1024)),
    "smollm2-135m": (30, 1536, llama(30, 576, 1536, 49152, 192, tied=True)),
    "smollm2-360m": (32, 2560, llama(32, 960, 2560, 49152, 320, tied=True)),
    "smollm2-1.7b": (24, 8192, llama(24, 2048, 8192, 49152, 2048, tied=True)),
    "phi3-mini": (32, 8192, llama(32, 3072, 8192, 32064, 3072)),
    "phi3-medium": (40, 17920, llama(40, 5120, 17920, 32064, 1280)),
    "phi4-mini": (32, 8192, llama(32, 3072, 8192, 200064, 1024, tied=True)),
    "phi4": (40, 17920, llama(40, 5120, 17920, 100352, 1280)),
    "qwen2.5-0.5b": (24, 4864, qwen25(24, 896, 4864, 128, tied=True)),
    "qwen2.5-1.5b": (28, 8960, qwen25(28, 1536, 8960, 256, tied=True)),
    "qwen2.5-3b": (36, 11008, qwen25(36, 2048, 11008, 256, tied=True)),
    "qwen2.5-7b": (28, 18944, qwen25(28, 3584, 18944, 512)),
    "qwen2.5-14b": (48, 13824, qwen25(48, 5120, 13824, 1024)),
    "qwen2.5-32b": (64, 27648, qwen25(64, 5120, 27648, 1024)),
    "qwen2.5-72b": (80, 29568, qwen25(80, 8192, 29568, 1024)),
    "qwen3-0.6b": (28, 3072, qwen3(28, 1024, 3072, 16, tied=True)),
    "qwen3-1.7b": (28, 6144, qwen3(28, 2048, 6144, 16, tied=True)),
    "qwen3-4b": (36, 9728, qwen3(36, 2560, 9728, 32, tied=True)),
    "qwen3-8b": (36, 12288, qwen3(36, 4096, 12288, 32)),
    "qwen3-14b": (40, 17408, qwen3(40, 5120, 17408, 40)),
    "qwen3-32b": (64, 25600, qwen3(64, 5120, 25600, 64)),
    "qwen3-30b-a3b": (48, 768, qwen3_30b(128)),
    "gemma3-270m": (18, 2048, gemma3(18, 640, 2048, 4, 1, 262144)),
    "gemma3-1b": (26, 6912, gemma3(26, 1152, 6912, 4, 1, 262144)),
    "gemma3-4b": (34, 10240, gemma3(34, 2560, 10240, 8, 4)),
    "gemma3-12b": (48, 15360, gemma3(48, 3840, 15360, 16, 8)),
    "gemma3-27b": (62, 21504, gemma3(62, 5376, 21504, 32, 16, of=128)),
    "olmo2-1b": (16, 8192, olmo2(16, 2048, 8192, 2048)),
    "olmo2-7b": (32, 11008, olmo2(32, 4096, 11008, 4096)),
    "olmo2-13b": (40, 13824, olmo2(40, 5120, 13824, 5120)),
    "olmo2-32b": (64, 27648, olmo2(64, 5120, 27648, 1024)),
    "gpt-oss-20b": (24, 2880, gpt_oss_20b(32)),
}
ACTIVE = {"qwen3-30b-a3b": qwen3_30b(8), "gpt-oss-20b": gpt_oss_20b(4)}


def test_every_promised_alias_is_there_once() -> None:
    names = [alias.name for alias in ALIASES]
    assert len(set(names)) == len(names)
    assert set(SIZES) == set(names)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_follow_from_the_architecture(name: str) -> None:
    alias = find_alias(name)
    assert alias is not None
    assert (alias.layers, alias.d_m, alias.parameters) == SIZES[name]
    assert alias.active == ACTIVE.get(name, alias.parameters)


def test_lines_are_in_the_order_of_families_and_sizes() -> None:
    first, *rest = ((alias.family.casefold(), alias.parameters) for alias in ALIASES)
    assert first[0] == "tiny"
    assert rest == sorted(rest)


def test_what_a_family_s_owner_asks_for_is_said_of_all_its_models() -> None:
    asked = {
        alias.family: {each.gate for each in ALIASES if each.family == alias.family}
        for alias in ALIASES
    }
    assert all(len(gates) == 1 for gates in asked.values())
    for alias in ALIASES:
        owner = (alias.hub_id or "").partition("/")[0]
        if owner in ("meta-llama", "google"):
            assert alias.gate is not None


def test_models_says_which_need_a_licence_and_which_listing_was_not_seen() -> None:
    lines = kscli("models", "-f", "markdown").stdout.splitlines()
    cells = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert list(cells) == [alias.name for alias in ALIASES]
    for alias in ALIASES:
        assert (alias.gate or "") in cells[alias.name]
        assert ("*" in cells[alias.name]) is not alias.listing_seen
    assert "could not be seen" in kscli("models").stderr
    rows = json.loads(kscli("models", "-f", "json").stdout)
    assert {row["name"] for row in rows if row["gate"] == "Gemma terms"} == {
        alias.name for alias in ALIASES if alias.family == "Gemma3"
    }


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
    assert close_aliases("someone/another-model") == []


def test_importing_aliases_is_light() -> None:
    code = (
        "import sys, kscli.models.aliases;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'difflib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
