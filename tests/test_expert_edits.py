"""Edits of layers of experts against the definition: the stacked key, in float64."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from experts_kit import FAMILIES, in_float64, save_experts, shared_weight, stacked_keys
from numpy.typing import NDArray
from scipy.linalg import block_diag
from test_expert_superposition import FACTS, measure, moment, parts_of, run, true_matrices
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.artifacts import CovarianceFile
from kscli.contexts import in_context
from kscli.editing.edits_file import EditsFile
from kscli.editing.metrics import InverseByExpert
from kscli.editing.weights import EditableWeight
from kscli.errors import NumericsError
from kscli.facts import read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions

Array = NDArray[np.float64]
LAYER = 0
EDITED = [3, 17, 8]
SHORT = ("--steps", "5", "--learning-rate", "0.1")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which a family's model is measured, once: `moe` and its `artifacts`."""

    @cache
    def of_family(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_experts(family, folder / "moe")
        measure(folder)
        return folder

    return of_family


def edit(folder: Path, out: Path, method: str, *options: Any) -> EditsFile:
    """Edit the model in `folder`/moe; the edited model comes to lie in `out`/edited."""
    chosen = [part for fact in EDITED for part in ("--fact", fact)]
    run(
        folder,
        *("edit", "-m", folder / "moe", "--method", method, "--layer", LAYER, *chosen),
        *("--generations", "0", "-o", out / "run.h5", "--save-model", out / "edited", *options),
    )
    return EditsFile(out / "run.h5")


def at_subjects(folder: Path, read: Any) -> Array:
    """Of every fact what `read` gives of its model and tokens, at the subject's last token."""
    model, tokenizer = in_float64(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for fact in read_facts("tiny", FACTS).facts:
        ids, at = naive.subject_last(tokenizer, fact.text, *fact.subject_span)
        found.append(read(model, ids)[at])
    return np.array(found)


def values_of(family: str, folder: Path) -> Array:
    """What the block gives at each fact's subject, (m, d), by transformers' own code.

    With what shared experts beside it give.
    """

    def read(model: Any, ids: list[int]) -> Array:
        found: list[Any] = []
        modules = [block_of(family, model)]
        if hasattr(model.model.layers[LAYER], "shared_mlp"):
            modules.append(model.model.layers[LAYER].shared_mlp)
        with torch.no_grad(), ExitStack() as hooks:
            for module in modules:
                hook = module.register_forward_hook(lambda *of: found.append(of[-1]))
                hooks.enter_context(hook)
            model(torch.tensor([ids]))
        outputs = [each[0] if isinstance(each, tuple) else each for each in found]
        values: Array = sum(each.reshape(len(ids), -1) for each in outputs).numpy()
        return values

    return at_subjects(folder, read)


def keys_of(family: str, folder: Path) -> Array:
    """Every fact's stacked key, (m, width), by the definition."""
    return at_subjects(
        folder,
        lambda model, ids: np.concatenate(stacked_keys(family, model, ids, LAYER), axis=1),
    )


def block_of(family: str, model: Any) -> Any:
    return model.get_submodule(f"model.layers.{LAYER}.{FAMILIES[family][-1]}")


def weight_of(family: str, folder: Path, dtype: str) -> Any:
    """(W_1 ... W_E), with that of shared experts last, as a tensor (d, width)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    block = block_of(family, model)
    with_d_m_first = family in ("gpt-oss", "llama4")
    parts = [W.T if with_d_m_first else W for W in block.experts.down_proj]
    shared = shared_weight(model, LAYER)
    if shared is not None:
        parts.append(shared)
    return torch.cat(parts, dim=1).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_shifts_of_the_saved_model_are_the_definitions(
    family: str, measured: Any, tmp_path: Path
) -> None:
    """One edit upon the other: Delta_j = sum_i p_ij delta_i, p and the model from outside kscli."""
    folder = measured(family)
    with edit(folder, tmp_path, "closed-form", *SHORT) as file:
        delta, direction = file.values("delta")[:, 0], file.values("direction")[:, 0]
        assert file.values("linear_error").max() < 1e-9
        assert file.values("live_error").max() < 1e-4
        live = file.values("measured_live")[-1]
        # Of a random model not every new target can be made likelier in so few steps.
        edited = file.values("edited")
        assert len(edited) >= 2
        assert (file.values("logprob_new_after") > file.values("logprob_new_previous")).all()
    P, _ = true_matrices(family, folder / "moe", LAYER)
    predicted = P[edited].T @ delta
    shifts = values_of(family, tmp_path / "edited") - values_of(family, folder / "moe")
    largest = np.linalg.norm(predicted, axis=1).max()
    assert np.linalg.norm(shifts - predicted, axis=1).max() < 1e-4 * largest
    others = np.setdiff1d(np.arange(FACTS), edited)
    lengths = np.linalg.norm(predicted, axis=1)
    np.testing.assert_allclose(live[others], lengths[others], atol=1e-4 * largest)
    keys = keys_of(family, folder / "moe")
    np.testing.assert_allclose(direction @ keys.T, P[edited], atol=2e-5)
    # Nothing is written to an expert that no edited fact is routed to.
    assert not direction[:, ~(keys[edited] != 0).any(axis=0)].any()


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_joint_edits_leave_those_before_them_alone(
    family: str, batch: int, measured: Any, tmp_path: Path
) -> None:
    folder = measured(family)
    with edit(folder, tmp_path, "joint", "--batch", batch, *SHORT) as file:
        delta, direction = file.values("delta")[:, 0], file.values("direction")[:, 0]
        assert file.values("live_error").max() < 1e-4
    moves = direction @ keys_of(family, folder / "moe")[EDITED].T
    untouched = np.eye(3) if batch == 3 else np.triu(moves)
    np.testing.assert_allclose(moves, untouched, atol=2e-5)
    np.testing.assert_allclose(moves.diagonal(), 1, atol=2e-5)
    shifts = values_of(family, tmp_path / "edited") - values_of(family, folder / "moe")
    expected = untouched.T @ delta
    np.testing.assert_allclose(shifts[EDITED], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["mixtral", "gpt-oss", "llama4", "qwen2-moe", "granite-moe-shared"]
)
def test_saved_weights_are_the_sum_rounded_once(
    family: str, dtype: str, measured: Any, tmp_path: Path
) -> None:
    folder = measured(family)
    of_random = ("--value", "random", "--value-norm", "50")
    with edit(folder, tmp_path, "closed-form", "--dtype", dtype, *of_random) as file:
        change = file.values("delta")[:, 0].T @ file.values("direction")[:, 0]
        assert file.values("linear_error").max() < 1e-9
        assert file.values("live_error").max() < (1e-4 if dtype == "float32" else 0.1)
    before, after = (weight_of(family, of, dtype) for of in (folder / "moe", tmp_path / "edited"))
    expected = (before.double() + torch.from_numpy(change)).to(before.dtype)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
    states = [
        AutoModelForCausalLM.from_pretrained(of, dtype=dtype).state_dict()
        for of in (folder / "moe", tmp_path / "edited")
    ]
    changed = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    of_W = ("down_proj", "down_proj.weight", "output_linear.weight")
    assert all(f"layers.{LAYER}." in name and name.endswith(of_W) for name in changed)


def test_restored_weights_are_bit_for_bit_what_they_were(tmp_path: Path) -> None:
    save_experts("deepseek-v3", tmp_path)
    model = load_model(ModelOptions(str(tmp_path), dtype="bfloat16"))
    state = {name: value.clone() for name, value in model.decoder.model.state_dict().items()}
    weight = EditableWeight(model, 1)
    keys = np.random.default_rng(0).standard_normal((5, weight.shape[1]))
    exact = keys @ weight.original.T
    np.testing.assert_allclose(weight.values(keys), exact, atol=1e-5 * np.abs(exact).max())
    assert weight.norm == pytest.approx(np.linalg.norm(weight.original))
    weight.set_change(np.ones(weight.shape))
    now = model.decoder.model.state_dict()
    changed = [name for name in state if not torch.equal(now[name], state[name])]
    assert len(changed) == 2
    assert all("layers.1.mlp" in name and "down_proj" in name for name in changed)
    with pytest.raises(NumericsError, match=r"layer 1 is not finite in torch\.bfloat16"):
        weight.set_change(np.full(weight.shape, 1e300))
    weight.restore()
    assert all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_protected_facts_stay_where_they_were(family: str, measured: Any, tmp_path: Path) -> None:
    folder = measured(family)
    options = ("--protect", "all", "--protect-at", "subject", "--max-price", "30")
    with edit(folder, tmp_path, "closed-form", *options, *SHORT) as file:
        protected = file.values("protected")
        delta, direction = file.values("delta")[:, 0], file.values("direction")[:, 0]
        assert (file.values("price") >= 1).all()
    assert 5 < protected.sum() < FACTS
    shifts = values_of(family, tmp_path / "edited") - values_of(family, folder / "moe")
    largest = np.linalg.norm(delta, axis=1).max()
    assert np.linalg.norm(shifts[protected], axis=1).max() < 1e-3 * largest
    moves = direction @ keys_of(family, folder / "moe").T
    np.testing.assert_allclose(moves[range(3), EDITED], 1, atol=1e-4)


def change_routers(folder: Path, change: Any) -> None:
    """Save the model in `folder` again, with the routers of all layers changed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            change(layer.mlp)
    model.save_pretrained(folder)


def test_an_expert_that_no_token_reaches_is_left_alone(tmp_path: Path) -> None:
    def shut(mlp: Any) -> None:
        mlp.router.bias[2] = -1e4

    save_experts("gpt-oss", tmp_path / "moe")
    change_routers(tmp_path / "moe", shut)
    measure(tmp_path)
    cov = tmp_path / "artifacts" / "moe" / "cov.h5"
    with CovarianceFile(cov) as file:
        assert file.routed(LAYER)[2] == 0
        d_m = file.about.d_m
        metric, key = InverseByExpert(file, LAYER, 0.0), np.ones((1, sum(file.widths)))
        directions = metric.solve(metric.whiten(key))
        assert not directions[:, 2 * d_m : 3 * d_m].any()
    with edit(tmp_path, tmp_path, "closed-form", *SHORT) as run_of:
        direction = run_of.values("direction")[:, 0]
        assert run_of.values("live_error").max() < 1e-4
    assert not direction[:, 2 * d_m : 3 * d_m].any()
    assert direction.any()


def test_an_expert_that_saw_too_little_is_named(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path / "moe")
    run(
        tmp_path,
        *("cache-cov", "-m", tmp_path / "moe", "--corpus", "tiny", "--samples", 6),
        *("--max-length", 12),
    )
    with CovarianceFile(tmp_path / "artifacts" / "moe" / "cov.h5") as file:
        starved = int(file.routed(LAYER).argmin())
        few, d_m = int(file.routed(LAYER)[starved]), file.about.d_m
        assert 0 < few < d_m
        key = np.zeros((1, sum(file.widths)))
        key[0, starved * d_m : (starved + 1) * d_m] = 1.0
        named = f"expert {starved} of layer 0: C was measured on {few} tokens and has"
        with pytest.raises(NumericsError, match=named):
            InverseByExpert(file, LAYER, 0.0).whiten(key)
        assert InverseByExpert(file, LAYER, 1e-3).whiten(key).any()


def test_ties_in_routing_are_taken_as_the_model_takes_them(tmp_path: Path) -> None:
    """Experts 0 and 1 have the same scores; which of them a token gets is the model's choice."""

    def tie(mlp: Any) -> None:
        mlp.gate.weight[1] = mlp.gate.weight[0]

    save_experts("mixtral", tmp_path / "moe")
    change_routers(tmp_path / "moe", tie)
    measure(tmp_path)
    with edit(tmp_path, tmp_path, "closed-form", *SHORT) as file:
        assert file.values("live_error").max() < 1e-4
        measured = file.values("measured")[-1]
    shifts = values_of("mixtral", tmp_path / "edited") - values_of("mixtral", tmp_path / "moe")
    others = np.setdiff1d(np.arange(FACTS), EDITED)
    lengths = np.linalg.norm(shifts, axis=1)[others]
    np.testing.assert_allclose(lengths, measured[others], atol=1e-4 * measured.max())


@pytest.mark.parametrize("method", ["pmet", "alphaedit", "rect", "prune", "wilke"])
def test_other_editors_are_refused_by_name(method: str, measured: Any) -> None:
    folder = measured("mixtral")
    how = ("--method", method, "--layer", "0", "--edits", "1")
    done = kscli("edit", "-m", folder / "moe", "--dir", folder / "artifacts", *how)
    assert done.exit_code == 2
    said = one_sentence(done.stderr)
    assert f"is of a mixture of 6 experts, which {method} does not edit" in said
    assert "the editors that do are closed-form, rome," in said


CONTEXTS = ("It was long ago. {}", "He wrote this in a letter. {}", "Nobody knows why. {}")
LAMBDA = 3.0


def naive_direction(method: str, C: Array, k: Array, others: Array) -> Array:
    """d of an edit at the key k (width,), with its keys in other contexts, as papers write it."""
    mean = (k + others.sum(axis=0)) / (1 + len(others))
    half = (k + others.mean(axis=0)) / 2
    if method in ("rome", "rome-identity"):
        u = mean if method == "rome-identity" else np.linalg.solve(C, mean)
        return u / (k @ u)
    if method == "r-rome":
        u = np.linalg.solve(C, mean)
        return u / (mean @ u)
    if method in ("memit", "memit-seq"):
        return np.linalg.solve(LAMBDA * C + np.outer(half, half), half)
    assert method == "emmet"
    u = np.linalg.solve(C, half)
    return u / (half @ u + LAMBDA)


@pytest.mark.parametrize(
    "method", ["rome", "rome-identity", "r-rome", "memit", "memit-seq", "emmet"]
)
def test_editors_of_keys_in_contexts_write_what_papers_say(
    method: str, measured: Any, tmp_path: Path
) -> None:
    """In other contexts a fact's token may go to other experts; the mean key has them all."""
    family = "gpt-oss"
    folder = measured(family)
    (tmp_path / "contexts.txt").write_text("\n".join(CONTEXTS))
    weight = () if "rome" in method else ("--weight", str(LAMBDA))
    options = ("--contexts", tmp_path / "contexts.txt", *weight, *SHORT)
    with edit(folder, tmp_path, method, *options) as file:
        direction = file.values("direction")[:, 0]
        assert file.values("live_error").max() < 1e-4
    tokens, _ = parts_of(family, folder / "moe", LAYER)
    C = block_diag(*map(moment, tokens))
    model, tokenizer = in_float64(folder / "moe"), AutoTokenizer.from_pretrained(folder / "moe")
    facts = read_facts("tiny", FACTS).facts
    # memit-seq weighs the keys of earlier edits, too.
    for number, fact in enumerate(EDITED[:1] if method == "memit-seq" else EDITED):
        keys = []
        for text in ("{}", *CONTEXTS):
            whole = in_context(text, facts[fact])
            ids, at = naive.subject_last(tokenizer, whole.text, *whole.subject_span)
            parts = stacked_keys(family, model, ids, LAYER)
            keys.append(np.concatenate([part[at] for part in parts]))
        expected = naive_direction(method, C, keys[0], np.array(keys[1:]))
        error = np.abs(direction[number] - expected).max()
        assert error < 1e-3 * np.abs(expected).max()


def test_what_reads_a_run_reads_one_of_experts(measured: Any, tmp_path: Path) -> None:
    folder = measured("gpt-oss")
    edit(folder, tmp_path, "closed-form", *SHORT).__exit__()
    rows = json.loads(run(folder, "verify", tmp_path / "run.h5", "-f", "json").stdout)
    assert rows[0]["linear_error"] < 1e-9
    assert rows[0]["live_error"] < 1e-4
    for figure in ("interference", "forgetting"):
        path = tmp_path / f"{figure}.png"
        run(folder, "plot", figure, "--edits", tmp_path / "run.h5", "-o", path)
        assert path.stat().st_size > 1000
