"""Saved models, as transformers and kscli read them again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_family
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.editing.edited_folder import (
    BASE,
    EDIT_LOG,
    facts_of_edited,
    first_model,
    require_new_folder,
)
from kscli.editing.saving import QUANTISATION_NOTES, save_edited_model
from kscli.editing.weights import EditableWeight
from kscli.errors import ArtifactError, UsageError
from kscli.facts import read_facts
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.tiny import MODEL_DIR

LOG = [
    {"edit": 1, "subject": "Zoë", "linear_error": math.nan, "moved": [{"p": 0.5, "x": math.inf}]},
    {"edit": 2, "subject": "Leonhard Euler", "linear_error": 1e-9, "moved": []},
]
TEXT = "The capital of France is Rome."


def load(name: str) -> LoadedModel:
    return load_model(ModelOptions(name, device="cpu", dtype="float32"))


def edited(name: str) -> LoadedModel:
    model = load(name)
    weight = EditableWeight(model, 1)
    weight.set_change(np.random.default_rng(0).standard_normal(weight.shape) * 0.1)
    return model


def logits(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        of_text: Tensor = model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits
    return of_text


def check_saved(model: LoadedModel, folder: Path, length: int) -> None:
    """That transformers and kscli read from `folder` what the live model is."""
    live = logits(model.decoder.model, model.tokenizer)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert torch.equal(logits(read, tokenizer), live)
    again = load(str(folder))
    assert torch.equal(logits(again.decoder.model, again.tokenizer), live)
    assert tokenizer.model_max_length == length
    assert not hasattr(read.config, "quantization_config")


def test_saved_model_is_the_live_one(tmp_path: Path) -> None:
    model = edited("tiny")
    assert not torch.equal(
        logits(model.decoder.model, model.tokenizer),
        logits(load("tiny").decoder.model, model.tokenizer),
    )
    folder = tmp_path / "new" / "saved"
    save_edited_model(model, folder, LOG, [])
    check_saved(model, folder, length=256)
    lines = (folder / EDIT_LOG).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"edit": 1, "subject": "Zoë", "linear_error": None, "moved": [{"p": 0.5, "x": None}]},
        LOG[1],
    ]
    assert list(folder.parent.iterdir()) == [folder]
    # The limit that kscli took from the live tokenizer stays away.
    assert model.tokenizer.model_max_length > 10**9


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    save_family("llama", tmp_path / "made", tie_word_embeddings=tied)
    model = edited(str(tmp_path / "made"))
    save_edited_model(model, tmp_path / "saved", [], [])
    check_saved(model, tmp_path / "saved", length=256)
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118
    read = load(str(tmp_path / "saved")).decoder.model
    same = read.get_input_embeddings().weight is read.get_output_embeddings().weight  # type: ignore[operator]
    assert same is tied


def write_gguf(path: Path) -> None:
    """A random Llama of two layers in a GGUF file, with tiny's tokenizer."""
    gguf = pytest.importorskip("gguf")
    tokens = json.loads((MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    d, d_m = 32, 48
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(d_m)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens["vocab"], key=tokens["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokens["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens["vocab"]), d), "output_norm": (d,)}
    for block in ("blk.0", "blk.1"):
        shapes |= {f"{block}.attn_{name}": (d, d) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}.{name}_norm": (d,) for name in ("attn", "ffn")}
        shapes |= {f"{block}.ffn_{name}": (d_m, d) for name in ("gate", "up")}
        shapes[f"{block}.ffn_down"] = (d, d_m)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.5, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_model_read_from_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    model = edited(str(tmp_path / "small.gguf"))
    network: Any = model.decoder.model
    before = {name: getattr(network, name, None) for name in QUANTISATION_NOTES}
    note = getattr(network.config, "quantization_config", None)
    save_edited_model(model, tmp_path / "saved", LOG, [])
    check_saved(model, tmp_path / "saved", length=128)
    assert {name: getattr(network, name, None) for name in QUANTISATION_NOTES} == before
    assert getattr(network.config, "quantization_config", None) is note


def test_saved_model_says_its_base_and_facts(tmp_path: Path) -> None:
    facts = read_facts("tiny", 3).facts
    save_edited_model(load("tiny"), tmp_path / "once", LOG, facts)
    save_edited_model(load(str(tmp_path / "once")), tmp_path / "twice", LOG, facts[:2])
    for name, number in (("once", 3), ("twice", 2)):
        folder = str(tmp_path / name)
        path = facts_of_edited(folder)
        assert path is not None
        assert read_facts(path).facts == facts[:number]
        assert first_model(folder) == "tiny"
    assert (first_model("tiny"), facts_of_edited("tiny")) == ("tiny", None)
    assert (first_model(str(MODEL_DIR)), facts_of_edited(str(MODEL_DIR))) == (str(MODEL_DIR), None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_id": 3}', '{"model_id": ""}', "\xff"])
def test_damaged_record_of_the_base_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / BASE).write_text(text, "latin-1")
    assert first_model(str(tmp_path)) == str(tmp_path)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    model = load("tiny")
    save_edited_model(model, tmp_path, [], [])
    check_saved(model, tmp_path, length=256)


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, words in [
        ("full", "is not empty"),
        ("file", "is not a folder"),
        ("dangling", "is not a folder"),
        ("file/below", "nothing can be written in"),
    ]:
        for refuse in (
            require_new_folder,
            lambda path: save_edited_model(load("tiny"), path, LOG, []),
        ):
            with pytest.raises(UsageError, match=words):
                refuse(tmp_path / name)
    assert (tmp_path / "full" / "a.txt").read_text() == "a"
    require_new_folder(tmp_path / "new" / "and" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "full"]


def test_nothing_stays_of_a_folder_that_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("tiny")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.decoder.model, "save_pretrained", full)
    with pytest.raises(ArtifactError, match="No space left"):
        save_edited_model(model, tmp_path / "saved", LOG, [])
    assert list(tmp_path.iterdir()) == []
