"""kscli trace: edits by every editor are found again, and nothing is where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from experts_kit import save_experts
from test_expert_superposition import FACTS, measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.corpus import CorpusSpec, open_corpus
from kscli.editing.editors import EDITORS
from kscli.tiny import MODEL_DIR
from kscli.tracing.candidates import Written
from kscli.tracing.row_space import row_space
from kscli.tracing.trace import trace_layer

M = 96  # as many facts as `measured_tiny` has
Row = dict[str, Any]


def edit(folder: Path, out: Path, *options: object) -> list[int]:
    """Edits with random values, saved at `out`; the facts that were edited."""
    made = kscli(
        *("edit", "--dir", folder.parent, "-o", f"{out}.h5", "--save-model", out, "-q"),
        *("-f", "json", "--contexts", 0, "--generations", 0, "--measure-every", 1000),
        *("--value", "random", "--value-norm", 4, *options),
    )
    assert made.exit_code == 0, made.stderr
    return sorted(row["fact"] for row in json.loads(made.stdout))


def trace(folder: Path, model: Path, *options: object) -> tuple[list[Row], str]:
    """What is found among the 96 facts, and what is said of it."""
    done = kscli(
        *("trace", "tiny", model, "--dir", folder.parent, "--count", M, "-k", "all"),
        *("--dtype", "float32", "-f", "json", *options),
    )
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def found(rows: list[Row]) -> list[int]:
    return sorted(row["fact"] for row in rows if row["edited"])


@pytest.mark.parametrize("method", EDITORS)
def test_edits_by_every_editor(method: str, measured_tiny: Path, tmp_path: Path) -> None:
    layers = {"wilke": "1-2"}.get(method, "1")
    limits = ("--weight", 1) if method in ("memit", "memit-seq", "pmet", "rect", "prune") else ()
    edited = edit(
        measured_tiny,
        tmp_path / "edited",
        *("--method", method, "--layer", layers, "--edits", 4, "--seed", 3, *limits),
    )
    rows, said = trace(measured_tiny, tmp_path / "edited")
    assert found(rows) == edited
    for row in rows:
        assert method in row["editors"]
        assert row["share"] > 0.9 or not row["edited"]
    assert "the facts lie in it" in said


@pytest.mark.parametrize("number", [1, 10, 60])
def test_saved_in_bfloat16(number: int, measured_tiny: Path, tmp_path: Path) -> None:
    edited = edit(
        measured_tiny,
        tmp_path / "edited",
        *("--method", "closed-form", "--layer", 0, "--edits", number, "--seed", number),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "edited")
    rows, _ = trace(measured_tiny, tmp_path / "edited", "--seed", 1)
    assert {row["layer"] for row in rows} == {0}
    hits = set(found(rows)) & set(edited)
    assert len(hits) >= 0.95 * len(edited)
    assert len(found(rows)) - len(hits) <= max(1, 0.05 * number)


def test_edits_over_layers(measured_tiny: Path, tmp_path: Path) -> None:
    options = ("--method", "memit", "--layers", "1-2", "--edits", 5, "--batch", 5, "--weight", 1)
    edited = edit(measured_tiny, tmp_path / "edited", *options)
    rows, _ = trace(measured_tiny, tmp_path / "edited")
    first = [row for row in rows if row["layer"] == 1]
    assert {row["layer"] for row in rows} == {1, 2}
    assert found(first) == edited
    assert "memit" in first[0]["editors"]
    # The second layer's keys are those of the model that the first one's edit left.
    assert set(found(rows[M:])) <= set(edited)


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("method", ["closed-form", "rome-identity", "memit"])
def test_edits_of_experts(family: str, method: str, tmp_path: Path) -> None:
    """W is that of all experts side by side; shared ones, and biases beside them, too."""
    save_experts(family, tmp_path / "moe")
    measure(tmp_path)
    edited = edit(
        tmp_path / "artifacts" / "moe",
        tmp_path / "edited",
        *("-m", tmp_path / "moe", "--method", method, "--layer", 0, "--edits", 3, "--seed", 1),
        *(("--weight", 1) if method == "memit" else ()),
    )
    done = kscli(
        *("trace", tmp_path / "moe", tmp_path / "edited", "--dir", tmp_path / "artifacts"),
        *("--facts", "tiny", "--count", FACTS, "-k", "all", "--dtype", "float32", "-f", "json"),
    )
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["layer"] for row in rows} == {0}
    assert found(rows) == edited
    assert method in rows[0]["editors"]
    assert not {"pmet", "alphaedit", "rect", "prune", "wilke"} & set(rows[0]["editors"])
    assert rows[0]["explained"] == pytest.approx(1, abs=1e-3)
    assert "weights that no editor of kscli changes" not in done.stderr


def test_nothing_is_said_of_a_model_that_is_the_same(measured_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "same")
    rows, said = trace(measured_tiny, tmp_path / "same")
    assert rows == []
    assert "no weight differs, so no edit of a fact is traced" in said


def test_nothing_is_claimed_of_a_fine_tuned_model(measured_tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    documents = list(open_corpus(CorpusSpec("tiny")).documents())
    for step in range(8):
        ids = torch.tensor([tokenizer(documents[step])["input_ids"][:256]])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    rows, said = trace(measured_tiny, tmp_path / "tuned")
    assert {row["layer"] for row in rows} == {0, 1, 2, 3}
    assert found(rows) == []
    assert "nothing is claimed" in said
    assert "weights that no editor of kscli changes differ, too" in said


def test_models_that_are_no_pair(measured_tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    done = kscli("trace", "tiny", folder, "--dir", measured_tiny.parent, "--dtype", "float32")
    assert done.exit_code == 1
    assert "are not of one architecture: only tiny has the weight" in one_sentence(done.stderr)

    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    shutil.copytree(MODEL_DIR, tmp_path / "tokens")
    swapped = {"Ġis": vocabulary["Ġis"], "Ġof": vocabulary["Ġof"]}
    vocabulary["Ġis"], vocabulary["Ġof"] = swapped["Ġof"], swapped["Ġis"]
    (tmp_path / "tokens" / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = kscli("trace", "tiny", tmp_path / "tokens", "--dir", measured_tiny.parent)
    assert done.exit_code == 1
    assert "the tokenizers of tiny and" in one_sentence(done.stderr)


def test_the_rank_above_noise() -> None:
    rng = np.random.default_rng(0)
    change = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 200))
    for noise in (0.0, 1e-6, 0.1):
        space = row_space(change + noise * rng.standard_normal(change.shape))
        assert space.rank == 3
        np.testing.assert_allclose(space.basis.T @ space.basis, np.eye(3), atol=1e-12)
        assert space.shares(change[:1]) == pytest.approx([1], abs=0.02)
    assert space.shares(np.zeros((1, 200))).tolist() == [0]


def test_a_bound_fact_is_not_an_edited_one() -> None:
    """Fact 1 is near the edited fact 0, and fact 2 is apart from both."""
    rng = np.random.default_rng(1)
    facts = rng.standard_normal((3, 200))
    facts[1] = facts[0] + 0.3 * facts[1]
    decoys = rng.standard_normal((400, 200))
    kind = Written(("toy",), facts, decoys)
    change = np.outer(rng.standard_normal(60), facts[0])
    traced = trace_layer(change, row_space(change), [Written(("no",), decoys[:3], decoys), kind])
    assert (traced.editors, traced.edited, traced.bound) == (("toy",), (0,), {1: 0})
    assert traced.explained == pytest.approx(1)
    cosine = facts[1] @ facts[0] / np.linalg.norm(facts[0]) / np.linalg.norm(facts[1])
    assert traced.shares[1] == pytest.approx(cosine**2)
    assert traced.p_values[0] == 1 / 401
