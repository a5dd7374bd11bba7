"""Adapters in peft's format: merged where that is asked for, and part of the model's identity."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from families import save_family
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from kscli.editing.saving import save_edited_model
from kscli.errors import ModelError, UsageError
from kscli.models.loading import load_model
from kscli.models.locating import ModelIdentity, ModelOptions, locate_model

RANK, ALPHA = 3, 8
PREFIX = "base_model.model."

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the package peft is not installed"
)

# Family: the modules that the adapter changes, and whether they hold W transposed (Conv1D).
TARGETS = {
    "llama": (["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"], False),
    "gpt2": (["attn.c_attn", "mlp.c_fc", "mlp.c_proj"], True),
}


@pytest.fixture(params=TARGETS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_family(request.param, tmp_path / "base")
    return tmp_path / "base"


def targets(base: Path) -> tuple[list[str], bool]:
    return TARGETS[json.loads((base / "config.json").read_text())["model_type"]]


def adapted_names(base: Path) -> list[str]:
    names = [name.removesuffix(".weight") for name in load_file(base / "model.safetensors")]
    return [name for name in names if name.endswith(tuple(targets(base)[0]))]


def write_adapter(base: Path, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """A LoRA adapter of random A and B, as peft writes it; returns its weights."""
    torch.manual_seed(1)
    names, transposed = targets(base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": names,
        "fan_in_fan_out": transposed,
    }
    weights = load_file(base / "model.safetensors")
    adapter: dict[str, torch.Tensor] = {}
    for name in adapted_names(base):
        shape = weights[f"{name}.weight"].shape
        outputs, inputs = reversed(shape) if transposed else shape
        adapter[f"{PREFIX}{name}.lora_A.weight"] = 0.15 * torch.randn(RANK, inputs)
        adapter[f"{PREFIX}{name}.lora_B.weight"] = 0.15 * torch.randn(outputs, RANK)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(adapter, folder / "adapter_model.safetensors")
    return adapter


def write_merged(base: Path, folder: Path, adapter: dict[str, torch.Tensor], scale: float) -> Path:
    """The definition: W + scale B A in float64, rounded to float32 once, as a model of its own."""
    shutil.copytree(base, folder)
    transposed = targets(base)[1]
    weights = load_file(base / "model.safetensors")
    for name in adapted_names(base):
        a, b = (adapter[f"{PREFIX}{name}.lora_{x}.weight"].double() for x in "AB")
        change = scale * (b @ a)
        weight = weights[f"{name}.weight"].double()
        merged = weight + (change.T if transposed else change)
        weights[f"{name}.weight"] = merged.float().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def keys_of(model: Path, *options: str) -> NDArray[np.float32]:
    path = model.parent / f"{model.name}{len(options)}.h5"
    made = kscli(
        "extract", "-m", model, "--facts", "tiny", "--count", "12", "--dtype", "float32",
        "-o", path, "-q", *options,
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    with h5py.File(path) as file:
        return np.asarray(file["keys"])


def assert_same_keys(found: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def identity(model: Path, *, merge: bool = False) -> ModelIdentity:
    return locate_model(ModelOptions(str(model), merge_adapter=merge)).identity


# What is merged


@needs_peft
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_keys_are_those_of_w_plus_scale_b_a(
    base: Path, tmp_path: Path, rslora: bool
) -> None:
    """At every layer: of an adapter beside its base model, and of one alone."""
    adapter = write_adapter(base, tmp_path / "alone", use_rslora=rslora)
    scale = ALPHA / RANK**0.5 if rslora else ALPHA / RANK
    expected = keys_of(write_merged(base, tmp_path / "merged", adapter, scale))
    beside = Path(shutil.copytree(base, tmp_path / "beside"))
    write_adapter(tmp_path / "base", beside, use_rslora=rslora)
    assert_same_keys(keys_of(beside, "--merge-adapter"), expected)
    assert_same_keys(keys_of(tmp_path / "alone", "--merge-adapter"), expected)
    unmerged = keys_of(base)
    for layer in range(len(expected)):
        assert np.abs(unmerged[layer] - expected[layer]).max() > 0.1 * np.abs(expected[layer]).max()


@needs_peft
def test_a_merged_model_that_is_saved_is_that_model(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "alone")
    options = ModelOptions(
        str(tmp_path / "alone"), device="cpu", dtype="float32", merge_adapter=True
    )
    save_edited_model(load_model(options), tmp_path / "saved", [], [])
    np.testing.assert_array_equal(
        keys_of(tmp_path / "saved"), keys_of(tmp_path / "alone", "--merge-adapter")
    )


@needs_peft
def test_every_stage_takes_the_merged_model(base: Path, tmp_path: Path) -> None:
    """C and keys of one model agree with each other; those of the base model do not with them."""
    write_adapter(base, tmp_path / "alone")
    shared = ("-m", tmp_path / "alone", "--merge-adapter", "--dir", tmp_path, "-q")
    done = kscli(
        "run", *shared, "--corpus", "tiny", "--tokens", "2000", "--facts", "tiny", "--count", "12",
        "--dtype", "float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    keys_of(base)
    mixed = kscli(
        "pmatrix", "--cov", tmp_path / "alone" / "cov.h5", "--keys", tmp_path / "base0.h5",
        "-o", tmp_path / "mixed.h5", "-m", tmp_path / "alone",
    )  # fmt: skip
    assert mixed.exit_code == 1
    assert "weights" in one_sentence(mixed.stderr)


# The identity


@needs_peft
def test_merged_and_unmerged_are_different_identities(base: Path, tmp_path: Path) -> None:
    beside = Path(shutil.copytree(base, tmp_path / "beside"))
    for folder in (tmp_path / "alone", beside):
        write_adapter(base, folder)
    unmerged, merged = identity(base), identity(beside, merge=True)
    assert merged.weights != unmerged.weights
    assert merged.weights == identity(tmp_path / "alone", merge=True).weights
    assert merged.tokenizer == identity(tmp_path / "alone", merge=True).tokenizer
    assert merged.tokenizer == unmerged.tokenizer
    assert merged.model == "beside"
    write_adapter(base, beside, lora_alpha=2 * ALPHA)
    other_scale = identity(beside, merge=True).weights
    path = beside / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len({merged.weights, other_scale, identity(beside, merge=True).weights}) == 3


# What is refused


def test_an_adapter_that_is_alone_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "alone")
    with pytest.raises(ModelError, match=r"alone holds an adapter .* --merge-adapter"):
        load_model(ModelOptions(str(tmp_path / "alone")))


def test_without_peft_the_remedy_is_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(base, base)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = kscli(
        "extract", "-m", base, "--facts", "tiny", "--merge-adapter", "-o", tmp_path / "keys.h5"
    )
    assert made.exit_code == 1
    assert "pip install 'kscli[peft]'" in one_sentence(made.stderr)
    assert not (tmp_path / "keys.h5").exists()


@needs_peft
def test_a_model_without_an_adapter_is_not_merged(base: Path) -> None:
    with pytest.raises(ModelError, match=r"base has no adapter .* leave --merge-adapter out"):
        load_model(ModelOptions(str(base), merge_adapter=True))
    with pytest.raises(UsageError, match="tiny has no adapter"):
        load_model(ModelOptions("tiny", merge_adapter=True))


def without(key: str, folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))


def with_weights(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: w.contiguous() for name, w in change(load_file(path)).items()}, path)


DAMAGES = {
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"alone has no adapter weights",
    ),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"only a pickled adapter.*--allow-pickle",
    ),
    "no base": (lambda folder: without("base_model_name_or_path", folder), r"is damaged"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), r"is damaged"),
    "a weight is absent": (
        lambda folder: with_weights(folder, lambda w: dict(list(w.items())[1:])),
        r"alone lacks base_model",
    ),
    "a layer too many": (
        lambda folder: with_weights(
            folder,
            lambda w: w | {next(iter(w)).replace(".0.", ".7."): next(iter(w.values())).clone()},
        ),
        r"no place for: base_model.*\.7\.",
    ),
    "other shapes": (
        lambda folder: with_weights(folder, lambda w: {n: x[:, :-1] for n, x in w.items()}),
        r"cannot be merged: .*size mismatch",
    ),
    "not finite": (
        lambda folder: with_weights(folder, lambda w: {n: x * torch.nan for n, x in w.items()}),
        r"cannot be merged: ",
    ),
}


@needs_peft
@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path, damage: str) -> None:
    write_adapter(base, tmp_path / "alone")
    do, said = DAMAGES[damage]
    do(tmp_path / "alone")  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=said) as caught:
        load_model(ModelOptions(str(tmp_path / "alone"), merge_adapter=True))
    assert "\n" not in str(caught.value)


@needs_peft
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_adapter_whose_base_is_gone_names_both(base: Path, tmp_path: Path) -> None:
    write_adapter(base, tmp_path / "alone")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"alone is one of the model .*base: there is no folder"):
        load_model(ModelOptions(str(tmp_path / "alone"), merge_adapter=True))


@needs_peft
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_adapter_that_adds_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    write_adapter(base, folder)
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "num_virtual_tokens": 4,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"PROMPT_TUNING\) adds tokens"):
        load_model(ModelOptions(str(folder), merge_adapter=True))
