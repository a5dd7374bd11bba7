"""Names of models, and every way in which a model cannot be loaded."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from families import GPT2_LIKE, save_family, save_model
from numpy.typing import NDArray

from kscli import resources
from kscli.batching import TokenBatch, TokenSequence, make_batches
from kscli.errors import ModelError, UsageError
from kscli.models.forward import Decoder
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions, dtype_of, locate_model
from kscli.models.shape import model_shape
from kscli.resources import MemorySplit, resolve_dtype
from kscli.second_moment.layer_sums import LayerSums
from kscli.tiny import MODEL_DIR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of tiny in a folder of its own."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "my-model"))


def test_a_folder_is_the_same_model_as_the_embedded_one(folder: Path) -> None:
    mine, embedded = locate_model(ModelOptions(str(folder))), locate_model(ModelOptions("tiny"))
    assert mine.identity.weights == embedded.identity.weights
    assert mine.identity.tokenizer == embedded.identity.tokenizer
    assert mine.identity.model == "my-model"


def test_the_fingerprint_follows_weights_config_and_tokenizer(folder: Path) -> None:
    before = locate_model(ModelOptions(str(folder))).identity
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = locate_model(ModelOptions(str(folder))).identity
    assert after.weights != before.weights
    assert after.tokenizer == before.tokenizer
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("France", "Frence") + " ")
    assert locate_model(ModelOptions(str(folder))).identity.tokenizer != before.tokenizer


def test_an_edit_of_one_matrix_changes_the_fingerprint_of_a_large_file(tmp_path: Path) -> None:
    """Beyond a size only blocks are hashed, but some of every tensor."""
    from safetensors.torch import save_file

    from kscli.models.fingerprint import WHOLE, fingerprint_file

    tensors = {f"w{i}": torch.full((256, 512), float(i)) for i in range(24)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size > WHOLE
    tensors["w11"] += torch.outer(torch.rand(256), torch.rand(512))
    save_file(tensors, tmp_path / "b.safetensors")
    first, second = (fingerprint_file(tmp_path / f"{x}.safetensors") for x in "ab")
    assert first != second
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert fingerprint_file(tmp_path / "c.safetensors") == first


def test_no_such_folder_or_file(tmp_path: Path) -> None:
    for name in ("absent/", "absent.gguf"):
        with pytest.raises(ModelError, match="absent"):
            load_model(ModelOptions(f"{tmp_path}/{name}"))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"my-model has no weights .* \(model"):
        load_model(ModelOptions(str(folder)))


def test_a_folder_without_a_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(ModelOptions(str(folder)))


@pytest.mark.parametrize("keep", [0, 5, 200, 0.9])
def test_corrupt_safetensors(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(ModelError, match=r"model\.safetensors is (damaged|truncated)"):
        load_model(ModelOptions(str(folder)))
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(ModelError, match="damaged"):
        load_model(ModelOptions(str(folder)))


def test_weights_that_lack_a_layer_are_not_filled_with_noise(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] = config["n_layer"] + 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_model(ModelOptions(str(folder)))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(ModelError, match=r"do not have the shapes that its config\.json says"):
        load_model(ModelOptions(str(folder)))


def test_pickled_weights_are_read_only_when_asked_for(folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--allow-pickle"):
        load_model(ModelOptions(str(folder)))
    assert load_model(ModelOptions(str(folder), allow_pickle=True)).decoder.d_m == 512


def test_remote_code_runs_only_when_asked_for(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "configuration_own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import GPT2Config\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(ModelOptions(str(folder)))
    assert not ran.exists()


def test_code_that_may_run_is_part_of_the_fingerprint(folder: Path) -> None:
    trusting = ModelOptions(str(folder), trust_remote_code=True)
    before = locate_model(trusting).identity.weights
    (folder / "modeling_own.py").write_text("x = 1\n")
    assert locate_model(trusting).identity.weights != before
    assert locate_model(ModelOptions(str(folder))).identity.weights == before


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="my-model"):
        load_model(ModelOptions(str(folder)))


def test_an_encoder_decoder_and_a_masked_model_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=32))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    for name, model in (("bert", bert), ("t5", t5)):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match="decoder-only causal language models"):
            load_model(ModelOptions(str(tmp_path / name)))


def test_a_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(ModelOptions(str(path)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes up a tokenizer of no tokens there."""
    for path in MODEL_DIR.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=r"has no tokenizer that reads text; .*tokenizer\.json"):
        load_model(ModelOptions(str(tmp_path)))


def test_a_gguf_file_without_its_package_is_noticed_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for command in (("run",), ("extract",), ("cache-cov",), ("edit",), ("facts", "check")):
        result = kscli(*command, "-m", path, "--dir", tmp_path / "out")
        assert result.exit_code == 1
        assert "pip install 'kscli[gguf]'" in one_sentence(result.stderr)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("read", [load_model, lambda o: model_shape(locate_model(o), o)])
def test_a_gguf_file_of_more_layers_than_tensors_is_refused_at_once(
    read: Callable[[ModelOptions], object], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(10**9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"block_count is 1000000000, more than its 0 tensors"):
        read(ModelOptions(str(path), device="cpu"))
    assert time.monotonic() - began < 20


def test_a_gguf_file_is_parsed_once(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For configuration, weights and tokenizer together: parsing is the larger part of loading."""
    gguf = pytest.importorskip("gguf")
    parsed: list[object] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: object) -> None:
            parsed.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    load_model(ModelOptions(str(smollm2), device="cpu"))
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counted


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    save_model("gpt2", GPT2_LIKE, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:40].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    loaded = load_model(ModelOptions(str(tmp_path)))
    with pytest.raises(ModelError, match="embeds only 40; the tokenizer belongs to another"):
        loaded.decoder.run(torch.tensor([[1, 2999]]), [0], lambda *_: None)


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions("tiny", device="gpu"),
        ModelOptions("tiny", device="cuda:99"),
        ModelOptions("tiny", device="cpu:banana"),
        ModelOptions("tiny", dtype="int8"),
        ModelOptions("tiny", revision="main"),
    ],
)
def test_wrong_options_are_wrong_usage(options: ModelOptions) -> None:
    with pytest.raises(UsageError):
        load_model(options)


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: str
) -> None:
    monkeypatch.setattr(resources, "fast_bfloat16", lambda device: fast)
    assert resolve_dtype("auto", "cpu") == dtype
    assert resolve_dtype("float16", "cpu") == "float16"
    with pytest.raises(UsageError, match="--dtype int8"):
        resolve_dtype("int8", "cpu")
    assert dtype_of(ModelOptions("gpt2-small"), "cpu") == dtype
    assert dtype_of(ModelOptions("tiny"), "cpu") == "float32"
    assert dtype_of(ModelOptions("tiny", dtype="bfloat16"), "cpu") == "bfloat16"


def keys_of(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(40, 72).reshape(2, 16)
    keys: list[torch.Tensor] = []
    decoder.run(ids, range(decoder.n_layers), lambda _, k: keys.append(k.clone()))
    return torch.stack(keys)


def sums_of(sums: LayerSums, batch: TokenBatch) -> list[NDArray[np.float64]]:
    sums.add(batch)
    return [moment.packed() for moment in sums.moments.values()]


def test_a_model_that_may_be_spread_has_the_same_keys() -> None:
    options = ModelOptions("tiny", device="cpu", dtype="float32")
    spread_out, whole = load_model(options, spread=MemorySplit(2**20)), load_model(options)
    assert torch.equal(keys_of(spread_out.decoder), keys_of(whole.decoder))


def test_a_model_of_which_a_part_lies_elsewhere_has_the_same_keys(tmp_path: Path) -> None:
    """The weights of two layers lie on the disk, as on a card's host, until they are used."""
    from accelerate import disk_offload

    options = ModelOptions("tiny", device="cpu", dtype="float32")
    whole = load_model(options).decoder
    network = load_model(options).decoder.model
    for layer in (1, 2):
        part = network.transformer.h[layer]  # type: ignore[union-attr, index]
        disk_offload(part, tmp_path / str(layer), torch.device("cpu"), offload_buffers=True)
    decoder = Decoder(network, whole.model.config.hidden_size, whole.n_layers)  # type: ignore[union-attr, arg-type]
    assert decoder.device_of(1) == "meta"
    assert torch.equal(keys_of(decoder), keys_of(whole))
    (batch,) = make_batches([TokenSequence(0, tuple(range(40, 72)))], 64)
    layers = (0, 1, 2, 3)
    for ours, reference in zip(
        *(sums_of(LayerSums(one, layers), batch) for one in (decoder, whole)), strict=True
    ):
        assert reference.any()
        np.testing.assert_array_equal(ours, reference)


def test_the_forward_pass_stops_at_the_last_layer_asked_for(tmp_path: Path) -> None:
    save_family("llama", tmp_path)
    loaded = load_model(ModelOptions(str(tmp_path)))
    called: list[str] = []
    for name, module in loaded.decoder.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    seen: list[int] = []
    loaded.decoder.run(torch.tensor([[1, 2, 3]]), [0], lambda layer, _: seen.append(layer))
    assert seen == [0]
    assert "model.layers.0.mlp.up_proj" in called
    for later in ("model.layers.0.mlp.down_proj", "model.layers.1", "model.norm", "lm_head"):
        assert later not in called


def test_an_encoder_that_masks_by_its_padding_token_is_refused(tmp_path: Path) -> None:
    """XLM counts tokens that are not padding, and keeps its layers in lists by part."""
    from transformers import XLMConfig, XLMWithLMHeadModel

    torch.manual_seed(0)
    config = XLMConfig(vocab_size=3000, emb_dim=32, n_layers=2, n_heads=4, causal=False)
    XLMWithLMHeadModel(config).save_pretrained(tmp_path)
    for path in MODEL_DIR.glob("*token*"):
        shutil.copy(path, tmp_path / path.name)
    with pytest.raises(ModelError, match=r"tokens see the tokens that follow|no list of 2 layers"):
        load_model(ModelOptions(str(tmp_path), dtype="float32"))


def test_a_forward_without_use_cache_is_run() -> None:
    from kscli.models.forward import Decoder

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 8)
            layer = {"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8)}
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict(layer)])

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            layer = self.layers[0]
            return layer["down"](layer["up"](self.embed(input_ids)).relu())

    decoder = Decoder(Bare(), 8, 1)
    assert decoder.hook == "layers.{}.down"
    assert decoder.d_m == 16


def test_a_failing_forward_pass_is_one_sentence() -> None:
    loaded = load_model(ModelOptions("tiny"))
    ids = torch.ones((1, 300), dtype=torch.int64)
    with pytest.raises(ModelError, match="cannot run 1 sequences of 300 tokens"):
        loaded.decoder.run(ids, [0], lambda *_: None)


def test_an_error_of_the_caller_passes_through() -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    loaded = load_model(ModelOptions("tiny"))
    with pytest.raises(ZeroDivisionError):
        loaded.decoder.run(torch.ones((1, 3), dtype=torch.int64), [0], fail)


def test_documents_keep_their_beginning_whatever_the_tokenizer_says(folder: Path) -> None:
    from kscli.batching import encode

    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    tokenizer = load_model(ModelOptions(str(folder))).tokenizer
    text = "The capital of France is Paris."
    (sequence,) = encode(tokenizer, [(0, text)], 4)
    assert list(sequence.token_ids) == tokenizer(text)["input_ids"][:4]


@pytest.mark.parametrize("text", ["The river. " * 40_000, "x" * 300_000, "東京" * 80_000])
def test_a_long_document_gives_the_tokens_that_the_whole_of_it_gives(text: str) -> None:
    from kscli.batching import encode

    tokenizer = load_model(ModelOptions("tiny")).tokenizer
    (sequence,) = encode(tokenizer, [(0, text)], 100)
    assert list(sequence.token_ids) == tokenizer(text)["input_ids"][:100]


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"my-model holds an adapter .* --merge-adapter"):
        load_model(ModelOptions(str(folder)))


def test_a_configuration_fetches_no_attention(folder: Path) -> None:
    path = folder / "config.json"
    wanted = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    model = load_model(ModelOptions(str(folder), dtype="float32"))
    assert model.decoder.model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
