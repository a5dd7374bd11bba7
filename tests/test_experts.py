"""Mixtures of experts against the definition, in float64, with its own router and experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts_kit import (
    EXPERTS,
    FAMILIES,
    in_float64,
    save_experts,
    stacked_keys,
)
from families import GROUPED, LAYERS, save_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kscli.errors import ModelError, UsageError
from kscli.models.down_projections import find_down_projections, select_alike
from kscli.models.experts import RoutedKeys
from kscli.models.forward import Decoder
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.reporter import Reporter


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(ModelOptions(str(folder), dtype=dtype))


def stacked(keys: RoutedKeys, tokens: int) -> list[np.ndarray[Any, Any]]:
    """The parts of the stacked keys that a decoder hands on, as `stacked_keys` gives them."""
    parts = np.zeros((keys.n_experts, tokens, keys.keys.shape[1]))
    parts[keys.expert.numpy(), keys.token.numpy()] = keys.gated.numpy()
    shared = [] if keys.shared is None else [keys.shared.numpy()]
    return [*parts, *shared]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_gates_are_the_definitions(family: str, tmp_path: Path) -> None:
    save_experts(family, tmp_path)
    decoder = load(tmp_path).decoder
    assert decoder.n_experts == (8 if family in ("deepseek-v3", "glm4-moe") else EXPERTS)
    ids = torch.arange(100, 1300, 30)[None]
    found: dict[int, RoutedKeys] = {}
    decoder.run(ids, range(LAYERS), found.__setitem__)

    model = in_float64(tmp_path)
    for layer, keys in found.items():
        assert len(keys.token) == 2 * ids.numel()  # tokens x experts a token
        true = stacked_keys(family, model, ids[0].tolist(), layer)
        for part, of_definition in zip(stacked(keys, ids.numel()), true, strict=True):
            largest = np.abs(of_definition).max()
            np.testing.assert_allclose(part, of_definition, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_that_a_token_uses_are_counted(family: str, tmp_path: Path) -> None:
    """All but the experts that it is not routed to, in all layers."""
    save_experts(family, tmp_path)
    loaded = load(tmp_path)
    held = {name: p.numel() for name, p in loaded.decoder.model.named_parameters()}
    of_experts = sum(size for name, size in held.items() if ".experts." in name)
    count = loaded.decoder.n_experts
    idle = of_experts * (count - loaded.decoder.model.config.num_experts_per_tok) // count
    assert idle > 0
    said = loaded.provenance()
    assert said["parameters"] == sum(held.values())
    assert said["active_parameters"] == said["parameters"] - idle


@pytest.mark.parametrize("family", ["gpt-oss", "llama4", "deepseek-v3"])
def test_in_bfloat16_keys_are_the_models_own(family: str, tmp_path: Path) -> None:
    """Routing may differ from float32's where two experts are close; keys then have other rows."""
    save_experts(family, tmp_path)
    ids = torch.arange(100, 1300, 30)[None]
    by_dtype = {}
    for dtype in ("float32", "bfloat16"):
        found: dict[int, RoutedKeys] = {}
        load(tmp_path, dtype).decoder.run(ids, [0], found.__setitem__)
        by_dtype[dtype] = stacked(found[0], ids.numel())
    exact, rounded = (np.concatenate(by_dtype[dtype], axis=1) for dtype in by_dtype)
    alike = ((exact != 0) == (rounded != 0)).all(1)
    assert alike.mean() > 0.8
    assert np.linalg.norm((exact - rounded)[alike]) < 0.05 * np.linalg.norm(exact[alike])


def test_tokens_that_an_expert_drops_have_no_key(tmp_path: Path) -> None:
    """An index beyond the experts is how a token that was dropped is routed."""
    save_experts("mixtral", tmp_path)
    decoder = load(tmp_path).decoder
    block: Any = decoder.projections[0].module
    route = block.gate.forward

    def drop(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, gates, index = route(hidden)
        index = index.masked_fill(index == 3, EXPERTS)
        return logits, gates, index

    block.gate.forward = drop
    found: dict[int, RoutedKeys] = {}
    ids = torch.arange(100, 1300, 30)[None]
    decoder.run(ids, [0], found.__setitem__)
    true = stacked_keys("mixtral", in_float64(tmp_path), ids[0].tolist(), 0)
    true[3][:] = 0
    for part, of_definition in zip(stacked(found[0], ids.numel()), true, strict=True):
        np.testing.assert_allclose(part, of_definition, atol=2e-5 * np.abs(true[0]).max())


def test_keys_of_some_tokens(tmp_path: Path) -> None:
    save_experts("qwen2-moe", tmp_path)
    found: dict[int, RoutedKeys] = {}
    ids = torch.arange(100, 1300, 30)[None]
    load(tmp_path).decoder.run(ids, [0], found.__setitem__)
    wanted = torch.tensor([2, 5, 17])
    of_some = found[0].of_tokens(wanted)
    whole, part = stacked(found[0], ids.numel()), stacked(of_some, ids.numel())
    for all_tokens, some in zip(whole[:-1], part[:-1], strict=True):
        np.testing.assert_array_equal(some[wanted], all_tokens[wanted])
        assert np.count_nonzero(some) == np.count_nonzero(some[wanted])
    np.testing.assert_array_equal(part[-1], whole[-1][wanted])


@pytest.mark.parametrize("family", ["gpt-oss", "llama4", "deepseek-v3"])
def test_no_key_depends_on_what_else_is_in_the_batch(family: str, tmp_path: Path) -> None:
    save_experts(family, tmp_path)
    decoder = load(tmp_path).decoder
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(5, 2900, (4, 24)))
    found: dict[int, RoutedKeys] = {}
    decoder.run(ids, [1], found.__setitem__)
    together = [part.reshape(4, 24, -1) for part in stacked(found[1], ids.numel())]
    for row, length in enumerate((24, 17, 3, 1)):
        decoder.run(ids[row : row + 1, :length], [1], found.__setitem__)
        for all_rows, alone in zip(together, stacked(found[1], length), strict=True):
            atol = 1e-5 * np.abs(all_rows).max()
            np.testing.assert_allclose(alone, all_rows[row, :length], rtol=0, atol=atol)


class _Halved(nn.Module):
    """A router whose weights the block then uses in another way than it says."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.experts = block.experts
        self.gate = block.gate

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, gates, index = self.gate(flat)
        return 0.5 * self.experts(flat, index, gates).reshape(hidden.shape)


def test_experts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path)
    model = in_float64(tmp_path).float()
    for layer in model.model.layers:
        layer.mlp = _Halved(layer.mlp)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.*do not add up to what _Halved gives"):
        Decoder(model, 32, LAYERS)


def test_a_token_that_is_routed_to_one_expert_twice_is_refused(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path)
    model = in_float64(tmp_path).float()
    gate = model.model.layers[1].mlp.gate
    route = gate.forward

    def twice(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, gates, index = route(hidden)
        return logits, gates, index[:, :1].expand_as(index)

    gate.forward = twice
    with pytest.raises(ModelError, match=r"layers\.1\.mlp.* routes a token to one expert twice"):
        Decoder(model, 32, LAYERS)


def test_experts_that_are_no_parameter_down_proj_are_refused(tmp_path: Path) -> None:
    save_model("jetmoe", GROUPED, tmp_path)
    with pytest.raises(ModelError, match="one parameter down_proj of three dimensions"):
        load(tmp_path)


def granite_with_shared(folder: Path) -> Any:
    save_experts("granite-moe-shared", folder)
    return in_float64(folder).float()


def test_shared_experts_beside_the_others_change_nothing_of_what_the_model_gives(
    tmp_path: Path,
) -> None:
    model = granite_with_shared(tmp_path)
    ids = torch.arange(100, 1300, 30)[None]
    with torch.no_grad():
        before = model(ids).logits
        decoder = Decoder(model, 32, LAYERS)
        torch.testing.assert_close(decoder.logits(ids, 40), before, rtol=0, atol=1e-4)
        # Where a value is read it is the sum; the model itself is left as it was.
        layer = model.model.layers[0]
        inputs: list[Tensor] = []
        with layer.block_sparse_moe.register_forward_pre_hook(lambda _, i: inputs.append(i[0])):
            decoder.logits(ids, 1)
        routed = layer.block_sparse_moe(inputs[0])
        routed = routed[0] if isinstance(routed, tuple) else routed
        true = routed + layer.shared_mlp(inputs[0])
        value = decoder.output_of(decoder.projections[0].module, ids)
        torch.testing.assert_close(value, true, rtol=0, atol=1e-5 * float(true.abs().max()))


def test_an_mlp_beside_experts_that_is_not_added_to_them_is_refused(tmp_path: Path) -> None:
    model = granite_with_shared(tmp_path)
    experts = model.model.layers[1].block_sparse_moe
    own = type(experts).forward

    class Doubled(type(experts)):  # type: ignore[misc]
        def forward(self, hidden: Tensor) -> Tensor:
            found = own(self, hidden)
            return found[0] if isinstance(found, tuple) else found

    experts.__class__ = Doubled
    layer_of = type(model.model.layers[1])

    class HalfOfThem(layer_of):  # type: ignore[misc, valid-type]
        """The experts' output counts half, and only once it has left their module."""

        def forward(self, *args: Any, **options: Any) -> Any:
            halve = lambda _, __, output: 0.5 * output  # noqa: E731
            with self.block_sparse_moe.register_forward_hook(halve):
                return super().forward(*args, **options)

    model.model.layers[1].__class__ = HalfOfThem
    with pytest.raises(ModelError, match="is not added to what the others give"):
        Decoder(model, 32, LAYERS)


def test_two_mlps_beside_experts_are_refused(tmp_path: Path) -> None:
    model = granite_with_shared(tmp_path)
    layer = model.model.layers[0]
    layer.another = type(layer.shared_mlp)(model.config)
    with pytest.raises(ModelError, match="another MLP beside them"):
        Decoder(model, 32, LAYERS)


def test_layers_that_differ_in_size_are_kept_apart() -> None:
    layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(8, n), "down": nn.Linear(n, 8)}) for n in (16, 24, 24)
    )
    found = find_down_projections(nn.ModuleDict({"layers": layers}), 8, 3)
    assert {layer: each.d_m for layer, each in found.items()} == {0: 16, 1: 24, 2: 24}
    assert tuple(select_alike(found, "all", "toy")) == (1, 2)
    assert tuple(select_alike(found, "0", "toy")) == (0,)
    with pytest.raises(UsageError, match="layers 0 and 1-2 of toy differ"):
        select_alike(found, "0-2", "toy")


def test_dense_layers_among_experts_are_layers_of_their_own(tmp_path: Path) -> None:
    save_experts("deepseek-v3", tmp_path, first_k_dense_replace=1, num_hidden_layers=3)
    notes: list[str] = []

    class Notes(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    loaded = load(tmp_path)
    of_experts = loaded.of_layers("all", Notes())
    assert of_experts.decoder.layers == (1, 2)
    assert of_experts.provenance()["hook"] == "model.layers.{}.mlp.experts.down_proj"
    assert "left out: layer 0 of" in notes[0]
    dense = loaded.of_layers("0")
    assert dense.provenance()["n_experts"] is None
    assert dense.provenance()["hook"] == "model.layers.{}.mlp.down_proj"
    keys = dense.decoder.keys_of(0, torch.arange(100, 1300, 30)[None])
    assert keys.shape == (1, 40, dense.decoder.d_m)


def test_layers_without_an_mlp_are_left_out() -> None:
    with_mlp = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(8, 8)}), with_mlp])
    found = find_down_projections(nn.ModuleDict({"layers": layers}), 8, 2)
    assert list(found) == [1]


def test_a_linear_map_without_a_way_up_is_no_mlp() -> None:
    """As in Zamba, whose hybrid layers have one from the hidden size to itself."""
    layers = nn.ModuleList(
        [nn.ModuleDict({"mamba": nn.Linear(8, 8)}), nn.ModuleDict({"linear": nn.Linear(8, 8)})]
    )
    with pytest.raises(ModelError, match="no list of 2 layers with a linear map from an MLP"):
        find_down_projections(nn.ModuleDict({"layers": layers}), 8, 2)


def test_an_mlp_that_layers_share_is_refused() -> None:
    mlp = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    layers = nn.ModuleList(nn.ModuleDict({"mlp": mlp}) for _ in range(2))
    with pytest.raises(ModelError, match="share one MLP"):
        find_down_projections(nn.ModuleDict({"layers": layers}), 8, 2)


# The values of the 4-bit floating-point numbers of MXFP4 (OCP Microscaling, E2M1), by their codes.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_experts_in_mxfp4_are_dequantised(tmp_path: Path) -> None:
    """As gpt-oss lies on the Hub: two numbers a byte, an exponent for each 32."""
    save_experts("gpt-oss", tmp_path, intermediate_size=32)
    random = np.random.default_rng(0)
    state = load_file(tmp_path / "model.safetensors")
    exact = {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        codes = random.integers(0, 16, (experts, outputs, inputs))
        scales = random.integers(121, 125, (experts, outputs, inputs // 32))
        values = np.array(E2M1 + [-value for value in E2M1])[codes]
        exact[name] = (values * np.repeat(2.0 ** (scales - 127), 32, axis=2)).transpose(0, 2, 1)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16)
        state[f"{name}_blocks"] = torch.from_numpy(packed.astype(np.uint8))
        state[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in tmp_path.glob("*.json"):
        (plain / path.name).write_bytes(path.read_bytes())
    weights = {name: torch.from_numpy(values.copy()).float() for name, values in exact.items()}
    unpacked = {k: v for k, v in state.items() if not k.endswith(("_blocks", "_scales"))}
    save_file(unpacked | weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    ids = torch.arange(100, 1300, 30)[None]
    found: dict[int, RoutedKeys] = {}
    load(tmp_path).decoder.run(ids, [0], found.__setitem__)
    true = stacked_keys("gpt-oss", in_float64(plain), ids[0].tolist(), 0)
    for part, of_definition in zip(stacked(found[0], ids.numel()), true, strict=True):
        largest = np.abs(of_definition).max()
        np.testing.assert_allclose(part, of_definition, rtol=0, atol=1e-4 * largest)
