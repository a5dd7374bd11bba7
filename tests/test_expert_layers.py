"""MEMIT over several layers of experts: each layer's change by its formula, in float64.

The model is edited by hand beside kscli: keys, by the definition, and outputs are read again after
each layer and in each batch, so that tokens that go to other experts then are part of it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from experts_kit import FAMILIES, in_float64, save_experts, stacked_keys
from naive import Array
from scipy.linalg import block_diag
from test_edited_layers import CONTEXTS, LAMBDA, edited_layers, sources_of
from test_expert_edits import weight_of
from test_expert_superposition import measure, run
from transformers import AutoTokenizer

from kscli.contexts import in_context
from kscli.editing.edited_layers import WriteOptions
from kscli.editing.editors import find_editor
from kscli.editing.edits_file import EditsFile
from kscli.editing.weights import EditableWeight
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.reporter import SILENT

LAYERS = (0, 1)
BATCHES = ([3, 17], [8, 5])


class ByHand:
    """A model of experts in float64, read and changed without kscli."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.model = in_float64(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def located(self, fact: Any) -> tuple[list[int], int]:
        return naive.subject_last(self.tokenizer, fact.text, *fact.subject_span)

    def key(self, fact: Any, layer: int) -> Array:
        ids, at = self.located(fact)
        parts = stacked_keys(self.family, self.model, ids, layer)
        return np.concatenate([part[at] for part in parts])

    def output(self, fact: Any, layer: int) -> Array:
        """What a decoder layer gives at the subject's last token."""
        ids, at = self.located(fact)
        found: list[Any] = []
        module = self.model.model.layers[layer]
        with torch.no_grad(), module.register_forward_hook(lambda *of: found.append(of[-1])):
            self.model(torch.tensor([ids]))
        output = found[0][0] if isinstance(found[0], tuple) else found[0]
        values: Array = output.reshape(len(ids), -1)[at].numpy()
        return values

    def change(self, layer: int, change: Array) -> None:
        """Add to (W_1 ... W_E), shared ones last."""
        block = self.model.get_submodule(f"model.layers.{layer}.{FAMILIES[self.family][-1]}")
        down = block.experts.down_proj
        d_m_first = self.family in ("gpt-oss", "llama4")
        d_m = down.shape[1 if d_m_first else 2]
        with torch.no_grad():
            for expert in range(len(down)):
                part = torch.from_numpy(change[:, expert * d_m : (expert + 1) * d_m])
                down[expert] += part.T if d_m_first else part
            rest = torch.from_numpy(change[:, len(down) * d_m :])
            if rest.numel():
                block.shared_experts.down_proj.weight += rest


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("method", ["memit", "memit-seq"])
def test_memit_over_layers_of_experts_writes_its_formula(
    family: str, method: str, tmp_path: Path
) -> None:
    save_experts(family, tmp_path / "moe")
    measure(tmp_path)
    rng = np.random.default_rng(0)
    hand = ByHand(family, tmp_path / "moe")
    with ExitStack() as stack:
        sources = sources_of(tmp_path / "artifacts" / "moe", stack, LAYERS)
        model = load_model(ModelOptions(str(tmp_path / "moe"), device="cpu", dtype="float32"))
        written = edited_layers(model, sources, find_editor(method), WriteOptions(weight=LAMBDA))
        written.prepare(CONTEXTS, SILENT)
        original = [EditableWeight(model, layer).original for layer in LAYERS]
        C = [block_diag(*map(np.float64, sources.cov.stored_blocks(layer))) for layer in LAYERS]
        totals = [np.zeros_like(each) for each in original]
        earlier = [np.zeros_like(each) for each in C]
        for batch in BATCHES:
            facts = [sources.keys.facts[fact] for fact in batch]
            before = np.array([hand.output(fact, LAYERS[-1]) for fact in facts])
            target = before + rng.standard_normal(before.shape)
            for at, layer in enumerate(LAYERS):
                lacking = target - [hand.output(fact, LAYERS[-1]) for fact in facts]
                K = mean_keys(hand, facts, layer)
                inverse = np.linalg.inv(LAMBDA * C[at] + earlier[at] + K @ K.T)
                change = (lacking.T / (len(LAYERS) - at)) @ K.T @ inverse
                hand.change(layer, change)
                totals[at] += change
            if method == "memit-seq":
                for at, layer in enumerate(LAYERS):
                    K = mean_keys(hand, facts, layer)
                    earlier[at] += K @ K.T
            written.write(batch, target)
        for at, layer in enumerate(LAYERS):
            found = EditableWeight(model, layer).original - original[at]
            error = np.linalg.norm(found - totals[at])
            assert error < 1e-4 * np.linalg.norm(totals[at])
        written.restore()


def mean_keys(hand: ByHand, facts: list[Any], layer: int) -> Array:
    """Columns: half the bare prompt's key and half the mean of those in the contexts."""
    columns = []
    for fact in facts:
        others = [hand.key(in_context(text, fact), layer) for text in CONTEXTS]
        columns.append((hand.key(fact, layer) + np.mean(others, axis=0)) / 2)
    return np.array(columns).T


@pytest.mark.parametrize("method", ["memit", "memit-seq"])
def test_the_saved_model_is_that_of_its_deltas_and_directions(method: str, tmp_path: Path) -> None:
    """By the command: values are sought, and every layer's change is in the run and the model."""
    family = "deepseek-v3"
    save_experts(family, tmp_path / "moe", num_hidden_layers=3)
    measure(tmp_path)
    done = run(
        tmp_path,
        *("edit", "-m", tmp_path / "moe", "--method", method, "--layer", "0-1", "--edits", "4"),
        *("--batch", "2", "--weight", "3", "--steps", "4", "--contexts", "2", "-f", "json"),
        *("--generations", "0", "-o", tmp_path / "run.h5", "--save-model", tmp_path / "edited"),
    )
    rows = json.loads(done.stdout)
    assert len(rows) == 4
    before, after = (weight_of(family, tmp_path / of, "float32") for of in ("moe", "edited"))
    with EditsFile(tmp_path / "run.h5") as file:
        assert file.layers == LAYERS
        deltas, directions = file.values("delta"), file.values("direction")
    change = torch.from_numpy(deltas[:, 0].T @ directions[:, 0])
    assert change.abs().max() > 1e-3
    expected = (before.double() + change).to(before.dtype)
    assert torch.allclose(after, expected, rtol=0, atol=1e-6 * float(change.abs().max()))
    verified = json.loads(run(tmp_path, "verify", tmp_path / "run.h5", "-f", "json").stdout)
    assert verified[0]["method"] == method
