"""Experts that are a list of modules, beside the same model whose experts are one parameter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import listed_mixtral
import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from experts_kit import in_float64, save_experts
from families import LAYERS
from listed_mixtral import ListedConfig, ListedMixtral, ListOfExperts, OneExpert
from test_expert_superposition import measure, run, true_matrices
from torch import Tensor, nn

from kscli.artifacts import CovarianceFile, PMatrixFile
from kscli.editing.edits_file import EditsFile
from kscli.errors import ModelError
from kscli.models.forward import Decoder


def listed(fused: Any) -> ListedMixtral:
    """The model of the same weights whose experts are a list."""
    model = ListedMixtral(ListedConfig(**fused.config.to_dict())).to(next(fused.parameters()).dtype)
    state = {name: value for name, value in fused.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(fused.model.layers):
        begin = f"model.layers.{number}.mlp."
        state[f"{begin}router.weight"] = layer.mlp.gate.weight
        experts = zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
        for expert, (gate_up, down) in enumerate(experts):
            gate, up = gate_up.chunk(2)
            parts = {"w1": gate, "w2": down, "w3": up}
            state |= {f"{begin}experts.{expert}.{w}.weight": v for w, v in parts.items()}
    model.load_state_dict(state)
    return model.eval()


def save_listed(fused: Path, folder: Path) -> None:
    """Save it with its code, as models on the Hub that need --trust-remote-code are."""
    model = listed(in_float64(fused).float())
    model.save_pretrained(folder, save_original_format=False)
    for path in fused.glob("*token*"):
        shutil.copy(path, folder / path.name)
    shutil.copy(listed_mixtral.__file__, folder / "listed_mixtral.py")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "listed_mixtral"
    config["auto_map"] = {
        "AutoConfig": "listed_mixtral.ListedConfig",
        "AutoModelForCausalLM": "listed_mixtral.ListedMixtral",
    }
    (folder / "config.json").write_text(json.dumps(config))


def both(folder: Path) -> tuple[Decoder, Decoder]:
    save_experts("mixtral", folder)
    fused = in_float64(folder).float()
    return Decoder(fused, 32, LAYERS), Decoder(listed(fused), 32, LAYERS)


def test_keys_experts_and_gates_are_those_of_the_fused_model(tmp_path: Path) -> None:
    """Rows that are the same, as two sequences' first tokens, are told apart by their order."""
    fused, of_list = both(tmp_path)
    assert of_list.hook == "model.layers.{}.mlp.experts.w2"
    assert of_list.n_experts == fused.n_experts
    assert of_list.active_parameters == fused.active_parameters
    ids = torch.arange(100, 1300, 30).reshape(2, 20)
    ids[1, :7] = ids[0, :7]
    for layer in range(LAYERS):
        one, other = (decoder.keys_of(layer, ids) for decoder in (fused, of_list))
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5 * float(one.abs().max()))


def test_it_is_measured_and_edited_by_the_commands(tmp_path: Path) -> None:
    """P by the definition, from the fused model; the edit of either is the edit of the other."""
    for name in ("fused", "listed"):
        (tmp_path / name).mkdir()
    save_experts("mixtral", tmp_path / "fused" / "moe")
    save_listed(tmp_path / "fused" / "moe", tmp_path / "listed" / "moe")
    refused = kscli("cache-cov", "-m", tmp_path / "listed" / "moe", "--corpus", "tiny")
    assert refused.exit_code == 1
    assert "--trust-remote-code" in one_sentence(refused.stderr)
    path = measure(tmp_path / "listed", "--trust-remote-code")
    measure(tmp_path / "fused")
    with PMatrixFile(path) as pm:
        for layer in range(LAYERS):
            P, _ = true_matrices("mixtral", tmp_path / "fused" / "moe", layer)
            assert np.abs(pm.matrix("P", layer) - P).max() < 5e-5
    with (
        CovarianceFile(tmp_path / "listed" / "artifacts" / "moe" / "cov.h5") as of_list,
        CovarianceFile(tmp_path / "fused" / "artifacts" / "moe" / "cov.h5") as fused,
    ):
        for layer in range(LAYERS):
            np.testing.assert_array_equal(of_list.routed(layer), fused.routed(layer))
    found = {}
    for name in ("fused", "listed"):
        trusted = ("--trust-remote-code",) if name == "listed" else ()
        run(
            tmp_path / name,
            *("edit", "-m", tmp_path / name / "moe", "--method", "closed-form", "--layer", "0"),
            *("--fact", "3", "--fact", "17", "--generations", "0", "--dtype", "float32"),
            *("--steps", "5", "--learning-rate", "0.1", "-o", tmp_path / f"{name}.h5", *trusted),
        )
        with EditsFile(tmp_path / f"{name}.h5") as file:
            assert file.values("live_error").max() < 1e-3
            found[name] = file.values("delta")[:, 0].T @ file.values("direction")[:, 0]
    error = np.linalg.norm(found["listed"] - found["fused"])
    assert error < 1e-2 * np.linalg.norm(found["fused"])


def test_in_bfloat16_they_are_those_of_the_fused_model(tmp_path: Path) -> None:
    """Gates are found from outputs that are rounded; the first layer's routing is one and all."""
    save_experts("mixtral", tmp_path)
    fused = in_float64(tmp_path).bfloat16()
    ids = torch.arange(100, 1300, 30)[None]
    one, other = (Decoder(m, 32, LAYERS).keys_of(0, ids) for m in (fused, listed(fused)))
    assert float((one - other).norm() / one.norm()) < 0.02


class _WithShared(ListOfExperts):
    """With a shared expert, multiplied by a gate, as in Qwen2-MoE."""

    def forward(self, hidden: Tensor) -> Tensor:
        shared: Tensor = self.shared_gate(hidden).sigmoid() * self.shared(hidden)
        return super().forward(hidden) + shared


def test_shared_experts_beside_the_list_are_one_more_block(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path)
    model = listed(in_float64(tmp_path).float())
    ids = torch.arange(100, 1300, 30)[None]
    routed = Decoder(model, 32, LAYERS).keys_of(0, ids)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.shared, layer.mlp.shared_gate = OneExpert(model.config), nn.Linear(32, 1)
        layer.mlp.__class__ = _WithShared
    decoder = Decoder(model, 32, LAYERS)
    found = decoder.keys_of(0, ids)
    block = model.model.layers[0].mlp
    given: list[Tensor] = []
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, i: given.append(i[0])):
        model(ids)
        x, own = given[0], block.shared
        shared = block.shared_gate(x).sigmoid() * nn.functional.silu(own.w1(x)) * own.w3(x)
    width = routed.shape[-1]
    for part, true in ((found[..., :width], routed), (found[..., width:], shared)):
        torch.testing.assert_close(part, true, rtol=0, atol=2e-5 * float(true.abs().max()))


class _OfOtherInputs(ListOfExperts):
    """The experts see twice the block's input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(2 * hidden)


class _Bent(ListOfExperts):
    """What the experts give is not added up, but bent."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).tanh()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (_OfOtherInputs, "are given what is no row of their block's input"),
        (_Bent, r"do not add up to what _Bent gives"),
    ],
)
def test_a_block_that_does_something_else_is_refused(
    block: type[nn.Module], words: str, tmp_path: Path
) -> None:
    save_experts("mixtral", tmp_path)
    model = listed(in_float64(tmp_path).float())
    for layer in model.model.layers:
        layer.mlp.__class__ = block
    with pytest.raises(ModelError, match=words):
        Decoder(model, 32, LAYERS)
