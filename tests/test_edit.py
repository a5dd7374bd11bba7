"""Runs of edits on the embedded model, against the definitions written out in float64."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import fork_kit
import numpy as np
import pytest
import torch
from artifact_kit import changed
from cli_kit import kscli, one_sentence
from edit_kit import HOOK, Naive
from families import save_family
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.artifacts import UNKNOWN, CovarianceFile, KeysFile, PMatrixFile
from kscli.corpus import CorpusSpec, open_corpus
from kscli.editing import loop as run_module
from kscli.editing.directions import edit_directions
from kscli.editing.edited_layers import WriteOptions
from kscli.editing.edits_file import EditsFile
from kscli.editing.gradients import gradient_cosines
from kscli.editing.loop import ALREADY, Edit, EditOptions, EditRun
from kscli.editing.protected_facts import Protection
from kscli.editing.sources import EditSources
from kscli.editing.stage import (
    EditPlan,
    HeldOut,
    checkpoint_of,
    edits_recipe,
    make_edits,
    replay_edits,
)
from kscli.editing.value import DivergedError
from kscli.editing.weights import EditableWeight
from kscli.errors import ArtifactError, ModelError, NumericsError, UsageError
from kscli.facts import Fact, fact_record, read_facts, write_records
from kscli.interrupts import InterruptedRunError
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.reporter import SILENT, Reporter
from kscli.tiny import MODEL_DIR
from kscli.whitening import whitening

Array = NDArray[np.float64]
EDITED = (3, 40, 17, 77, 5)
M = 96  # as many facts as `measured_tiny` has


@pytest.fixture
def folder(measured_tiny: Path) -> Path:
    return measured_tiny


def fresh_tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


@pytest.fixture
def tiny() -> LoadedModel:
    """The embedded model, for one test to edit."""
    return fresh_tiny()


def sources_of(folder: Path, stack: ExitStack, *layers: int) -> EditSources:
    return EditSources(
        stack.enter_context(CovarianceFile(folder / "cov.h5")),
        stack.enter_context(KeysFile(folder / "keys.h5")),
        stack.enter_context(PMatrixFile(folder / "pmatrix.h5")),
        layers,
    )


def plan_of(sources: EditSources, facts: tuple[int, ...] = EDITED, **options: Any) -> EditPlan:
    edits = tuple(Edit(fact, sources.pm.facts[fact].target_new) for fact in facts)
    held_out = HeldOut(open_corpus(CorpusSpec("tiny")), 300)
    return EditPlan(edits, "given", EditOptions(**options), held_out)


def perform(
    model: LoadedModel,
    sources: EditSources,
    plan: EditPlan,
    path: Path,
    reporter: Reporter = SILENT,
) -> None:
    recipe = edits_recipe(sources, plan, model.dtype)
    make_edits(model, sources, plan, path, recipe, force=False, reporter=reporter)


def run_on_tiny(model: LoadedModel, folder: Path, path: Path, *layers: int, **options: Any) -> None:
    with ExitStack() as stack:
        sources = sources_of(folder, stack, *layers)
        perform(model, sources, plan_of(sources, **options), path)


def test_closed_form_is_equations_3_and_4(tiny: LoadedModel, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "closed-form.h5"
    layer = 1
    run_on_tiny(tiny, folder, path, layer, measure_every=2)
    with ExitStack() as stack:
        sources = sources_of(folder, stack, layer)
        C, keys = sources.cov.second_moment(layer), sources.keys.keys_of(layer)
        file = stack.enter_context(EditsFile(path))
        delta = file.values("delta")[:, 0]
        assert file.values("edited").tolist() == list(EDITED)
        naive = Naive()
        W0 = naive.matrix(layer)
        W, values, kept = W0.copy(), [], {}
        for n, fact in enumerate(EDITED):
            k = keys[fact]
            v = W @ k + delta[n]
            solved = np.linalg.solve(C, k)
            W = W + np.outer(v - W @ k, solved) / (solved @ k)
            values.append(v)
            kept[fact] = W @ k
            np.testing.assert_allclose(W @ k, v, atol=1e-9)

            # Equations 11 and 15, measured: since the fact's own edit, or since the clean model.
            moved = np.array([W @ keys[j] - kept.get(j, W0 @ keys[j]) for j in range(M)])
            scale = np.linalg.norm(moved, axis=1).max()
            for name in ("measured", "predicted"):
                found = file.values(name)[n]
                np.testing.assert_allclose(found, np.linalg.norm(moved, axis=1), atol=1e-6 * scale)
            np.testing.assert_allclose(
                file.values("weight_change")[n], np.linalg.norm(W - W0), rtol=1e-6
            )
            # What the edit alone does to all text: |delta|^2 / (k^T C^-1 k), by tr(W C W^T).
            of_all = np.trace(W0 @ C @ W0.T)
            alone = delta[n] @ delta[n] / (solved @ k) / of_all
            assert file.values("own_text_change")[n] == pytest.approx(alone, rel=1e-5)
        together = np.trace((W - W0) @ C @ (W - W0).T) / of_all
        assert file.values("text_change")[[0, -1]] == pytest.approx([0, together], rel=1e-5)
        assert file.values("linear_error").max() < 1e-9
        live = file.values("live_error")
        assert live.max() < 1e-4
        np.testing.assert_allclose(
            file.values("measured_live"), file.values("measured"), atol=1e-4 * scale
        )

        edited = tiny.decoder.model.get_submodule(HOOK.format(layer)).weight
        error = np.linalg.norm(edited.detach().double().numpy().T - W)
        assert error < 1e-6 * np.linalg.norm(W)
        direction = file.values("direction")[:, 0]
        np.testing.assert_allclose(delta.T @ direction, W - W0, atol=1e-6 * np.abs(W - W0).max())


def test_what_is_measured_is_what_the_edited_model_says(
    tiny: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "closed-form.h5"
    run_on_tiny(tiny, folder, path, 0, measure_every=100, moved=3)
    naive = Naive()
    facts = []
    with EditsFile(path) as file:
        facts = list(file.facts)
        naive_states = [{f: naive.logprob(facts[f].text, facts[f].target) for f in range(0, M, 9)}]
        clean_new = [naive.logprob(facts[f].text, facts[f].target_new) for f in EDITED]
        change = [
            np.outer(d, r)
            for d, r in zip(file.values("delta")[:, 0], file.values("direction")[:, 0], strict=True)
        ]
        objects = file.objects()
        for n, row in enumerate(objects):
            fact = facts[EDITED[n]]
            assert row["prob_new_before"] == pytest.approx(math.exp(clean_new[n]), rel=1e-3)
            previous = naive.logprob(fact.text, fact.target_new)
            assert row["prob_new_previous"] == pytest.approx(math.exp(previous), rel=1e-3, abs=1e-9)
            moved = row["moved"]
            P = file.values("p")[n]
            others = [j for j in np.argsort(-np.abs(P)) if j != EDITED[n]]
            assert [each["fact"] for each in moved] == others[:3]
            assert row["p_max_other"] == P[others[0]] == moved[0]["p"]
            other = facts[others[0]]
            was = naive.logprob(other.text, fact.target_new)
            assert moved[0]["logprob_new_previous"] == pytest.approx(was, abs=1e-3)
            naive.add(0, change[n])
            now = naive.logprob(other.text, fact.target_new)
            assert moved[0]["logprob_new_after"] == pytest.approx(now, abs=1e-3)
            true = naive.logprob(other.text, other.target)
            assert moved[0]["logprob_true_after"] == pytest.approx(true, abs=1e-3)
            after = naive.logprob(fact.text, fact.target_new)
            assert row["prob_new_after"] == pytest.approx(math.exp(after), rel=1e-3, abs=1e-9)
        naive_states.append(
            {f: naive.logprob(facts[f].text, facts[f].target) for f in range(0, M, 9)}
        )
        assert file.values("step").tolist() == [0, 1, 5]
        logprob = file.values("logprob_true")
        for row, state in ((logprob[0], naive_states[0]), (logprob[-1], naive_states[1])):
            np.testing.assert_allclose(row[list(state)], list(state.values()), atol=2e-3)
        retained = [naive.logprob(facts[f].text, facts[f].target_new) for f in EDITED]
        np.testing.assert_allclose(file.values("logprob_new")[-1], retained, atol=2e-3)
        np.testing.assert_allclose(file.values("logprob_new")[0], clean_new, atol=2e-3)
        assert file.values("perplexity")[-1] == pytest.approx(perplexity(naive, 300), rel=1e-4)
        assert file.values("kl")[0] == 0
        assert file.values("kl")[-1] == pytest.approx(divergence(Naive(), naive, 300), rel=1e-3)
        assert not file.values("answer_changed")[0].any()


def perplexity(naive: Naive, tokens: int) -> float:
    """Of the first tokens of the embedded corpus, each document apart."""
    nll: list[float] = []
    for ids in held_out_ids(naive, tokens):
        with torch.no_grad():
            logits = naive.model(torch.tensor([ids])).logits[0]
        nll += [-float(logits[t].log_softmax(0)[ids[t + 1]]) for t in range(len(ids) - 1)]
    return math.exp(sum(nll) / len(nll))


def divergence(clean: Naive, edited: Naive, tokens: int) -> float:
    """The mean KL(clean || edited) of the next token, over the same tokens."""
    found: list[float] = []
    for ids in held_out_ids(clean, tokens):
        with torch.no_grad():
            then, now = (
                naive.model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
                for naive in (clean, edited)
            )
        found += [float((p.exp() * (p - q)).sum()) for p, q in zip(then, now, strict=True)]
    return sum(found) / len(found)


def held_out_ids(naive: Naive, tokens: int) -> Iterator[list[int]]:
    left = tokens
    for document in open_corpus(CorpusSpec("tiny")).documents():
        ids = naive.tokenizer(document)["input_ids"][:256][:left]
        if len(ids) > 1:
            left -= len(ids)
            yield ids
        if left <= 1:
            break


def test_memit_is_its_definition_over_two_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three facts at once, two layers: written out with an inverse and hooks of its own."""
    tiny = fresh_tiny()
    tiny.decoder.model.double()  # its keys move with the edit of an earlier layer
    layers, weight, facts_edited = (0, 2), 3.0, (3, 40, 17)
    naive = Naive()
    generator = np.random.default_rng(0)
    with ExitStack() as stack:
        sources = sources_of(folder, stack, *layers)
        facts = [sources.pm.facts[fact] for fact in facts_edited]
        positions = [int(sources.pm.position[fact]) for fact in facts_edited]

        def hidden(index: int) -> Array:
            block = naive.model.get_submodule(f"transformer.h.{layers[-1]}")
            return naive.at(block, facts[index].text, positions[index], given=False)

        shifts = generator.standard_normal((3, len(hidden(0))))
        monkeypatch.setattr(run_module, "random_value", lambda d, norm, seed, n: shifts[n])
        plan = plan_of(
            sources,
            facts_edited,
            method="memit",
            write=WriteOptions(weight),
            batch=3,
            random_norm=1.0,
        )
        path = tmp_path / "memit.h5"
        perform(tiny, sources, plan, path)

        wanted = np.array([hidden(i) + shifts[i] for i in range(3)])
        for at, layer in enumerate(layers):
            projection = naive.projection(layer)
            K = np.array(
                [naive.at(projection, facts[i].text, positions[i], given=True) for i in range(3)]
            ).T
            R = (wanted - np.array([hidden(i) for i in range(3)])).T / (len(layers) - at)
            C = sources.cov.second_moment(layer)
            change = R @ K.T @ np.linalg.inv(weight * C + K @ K.T)
            naive.add(layer, change)
            live = tiny.decoder.model.get_submodule(HOOK.format(layer)).weight
            error = np.linalg.norm(live.detach().double().numpy().T - naive.matrix(layer))
            assert error < 1e-6 * np.linalg.norm(naive.matrix(layer))
    with EditsFile(path) as file:
        assert np.isnan(file.values("predicted")).all()
        assert all(row["linear_error"] != row["linear_error"] for row in file.objects())


def test_one_fact_and_layer_of_memit_moves_others_by_the_shrunk_p(folder: Path) -> None:
    """Delta_j = p delta a / (lambda + a); of ROME, without lambda, p delta."""
    with ExitStack() as stack:
        sources = sources_of(folder, stack, 2)
        C, keys = sources.cov.second_moment(2), sources.keys.keys_of(2)
        P = sources.pm.matrix("P", 2)[7]
        a = sources.pm.leverage(2)[7]
        white = whitening(C, sources.cov.count)
        delta = np.random.default_rng(0).standard_normal(128)
        for weight in (0.0, 10.0, 15000.0):
            change = np.outer(delta, edit_directions(white, keys[7:8], weight)[0])
            expected = np.outer(P, delta) * a / (weight + a)
            np.testing.assert_allclose(
                keys @ change.T, expected, atol=1e-8 * np.abs(expected).max()
            )


def test_two_equal_keys_cannot_have_two_values(folder: Path) -> None:
    with ExitStack() as stack:
        sources = sources_of(folder, stack, 0)
        white = whitening(sources.cov.second_moment(0), sources.cov.count)
        keys = sources.keys.keys_of(0)[[4, 4]]
        with pytest.raises(NumericsError, match="not independent"):
            edit_directions(white, keys)
        assert edit_directions(white, keys, 1.0).shape == keys.shape


def arrays(path: Path) -> dict[str, list[Any]]:
    with EditsFile(path) as file:
        return {name: file.values(name).tolist() for name in file.datasets() if "/" not in name}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": "single"},
        {"method": "memit", "write": WriteOptions(1.0)},
        {"method": "memit-seq", "write": WriteOptions(1.0)},
        {"method": "rect", "write": WriteOptions(1.0, keep=0.4)},
        {"method": "prune", "write": WriteOptions(1.0)},
        {"method": "joint", "protection": Protection("all", "subject", max_price=2.0)},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_file(
    tiny: LoadedModel,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "stopped.h5"
    run_on_tiny(tiny, folder, whole, 1, measure_every=2, random_norm=2.0, **options)
    calls: list[int] = []
    original = EditRun._edit

    def stop_after_two(self: EditRun, *arguments: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, *arguments)
        calls.append(1)

    monkeypatch.setattr(EditRun, "_edit", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_on_tiny(fresh_tiny(), folder, path, 1, measure_every=2, random_norm=2.0, **options)
    assert not path.exists()
    with EditsFile(checkpoint_of(path)) as file:
        assert file.edits == 2
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"is in the way .*measure_every changed"):
        run_on_tiny(tiny, folder, path, 1, measure_every=3, random_norm=2.0, **options)

    run_on_tiny(fresh_tiny(), folder, path, 1, measure_every=2, random_norm=2.0, **options)
    assert not checkpoint_of(path).exists()
    found, expected = arrays(path), arrays(whole)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_held_signal_ends_the_run_after_an_edit(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EditRun._edit

    def then_signal(self: EditRun, *arguments: Any) -> None:
        original(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(EditRun, "_edit", then_signal)
    with pytest.raises(InterruptedRunError, match=r"1 of 5 edits are in .*same command") as raised:
        run_on_tiny(tiny, folder, tmp_path / "a.h5", 0, random_norm=1.0)
    assert raised.value.exit_code == 130


def test_a_signal_before_the_first_edit(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the clean model is asked it acts at once; held later, it promises no checkpoint."""
    for name, error in (("prepare", KeyboardInterrupt), ("_replay", InterruptedRunError)):
        original = getattr(EditRun, name)

        def then_signal(self: EditRun, *arguments: Any, original: Any = original) -> None:
            original(self, *arguments)
            signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patched:
            patched.setattr(EditRun, name, then_signal)
            with pytest.raises(error) as raised:
                run_on_tiny(tiny, folder, tmp_path / "a.h5", 0, random_norm=1.0)
    assert "no edit was made yet" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_in_the_last_edit_costs_no_pass(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: EditRun, number: int, edit: Edit) -> Array:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
            raise DivergedError("the loss is NaN")
        return np.ones(128)

    monkeypatch.setattr(EditRun, "_value", diverging)
    with ExitStack() as stack:
        plan = plan_of(sources_of(folder, stack, 0), EDITED[:3])
        path = tmp_path / "a.h5"
        perform(tiny, sources_of(folder, stack, 0), plan, path)
    with EditsFile(path) as file:
        assert file.values("step").tolist() == [0, 1, 2]


def test_batches_with_an_edit_kept_out_are_made_again_as_they_were(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(self: EditRun, number: int, edit: Edit) -> Array:
        if number == 1:
            raise DivergedError("the loss is NaN")
        return np.full(128, 1.0 + number)

    monkeypatch.setattr(EditRun, "_value", value)
    options = {"method": "memit", "batch": 2, "write": WriteOptions(1.0), "measure_every": 3}
    whole, path = tmp_path / "whole.h5", tmp_path / "run.h5"
    run_on_tiny(tiny, folder, whole, 1, **options)
    original = EditRun._edit

    def stopping(self: EditRun, planned: Any, log: Any, task: Any) -> None:
        if log.tried == 4:
            raise KeyboardInterrupt
        original(self, planned, log, task)

    with monkeypatch.context() as patched:
        patched.setattr(EditRun, "_edit", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_on_tiny(fresh_tiny(), folder, path, 1, **options)
    run_on_tiny(fresh_tiny(), folder, path, 1, **options)
    found, expected = arrays(path), arrays(whole)
    for name in ("edited", "step", "delta", "measured", "logprob_true", "logprob_new"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_two_runs_of_one_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run twice is no harm; another one neither mixes with it nor replaces its file."""
    path, original = tmp_path / "a.h5", EditRun.prepare

    def make(norm: float, between: Any = None) -> None:
        def prepare(self: EditRun) -> None:
            original(self)
            if between:
                monkeypatch.setattr(EditRun, "prepare", original)
                between()

        monkeypatch.setattr(EditRun, "prepare", prepare)
        with ExitStack() as stack:
            sources = sources_of(folder, stack, 0)
            plan = replace(plan_of(sources, EDITED[:1], random_norm=norm), held_out=None)
            perform(fresh_tiny(), sources, plan, path)

    make(1.0, lambda: make(1.0))
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    with pytest.raises(ArtifactError, match="exists; add --force"):
        make(2.0, lambda: make(1.0))
    with EditsFile(path) as file:
        np.testing.assert_allclose(file.values("delta_norm"), 1.0)
    other = path.rename(tmp_path / "other.h5")
    checkpoint_of(path).unlink()
    with pytest.raises(ArtifactError, match=r"another run writes .*random_norm.* another --output"):
        make(2.0, lambda: other.rename(checkpoint_of(path)))


def test_single_edits_are_taken_back(tiny: LoadedModel, folder: Path, tmp_path: Path) -> None:
    single, first = tmp_path / "single.h5", tmp_path / "first.h5"
    run_on_tiny(tiny, folder, single, 0, protocol="single", random_norm=5.0)
    with ExitStack() as stack:
        sources = sources_of(folder, stack, 0)
        fresh = fresh_tiny()
        plan = plan_of(sources, EDITED[:1], random_norm=5.0)
        perform(fresh, sources, plan, first)
        with EditsFile(single) as file, EditsFile(first) as alone:
            assert file.values("step").tolist() == [0, 1, 2, 3, 4, 5]
            np.testing.assert_array_equal(
                file.values("logprob_true")[1], alone.values("logprob_true")[1]
            )
            np.testing.assert_allclose(file.values("delta_norm"), 5.0)
            P = sources.pm.matrix("P", 0)[list(EDITED)]
            P[range(5), list(EDITED)] = 0
            np.testing.assert_allclose(file.values("predicted"), 5 * np.abs(P), atol=1e-9)
            assert np.isfinite(file.values("live_error")).all()


def test_replayed_edits_are_the_model_that_was_edited(
    tiny: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.h5"
    run_on_tiny(tiny, folder, path, 2, random_norm=3.0)
    fresh = fresh_tiny()
    with EditsFile(path) as file:
        replay_edits(fresh, file)
    for layer in range(4):
        name = HOOK.format(layer)
        live, again = (m.decoder.model.get_submodule(name).weight for m in (tiny, fresh))
        torch.testing.assert_close(live, again, rtol=0, atol=1e-6)


def test_edits_are_not_replayed_in_another_model(folder: Path, tmp_path: Path) -> None:
    """Up to date by its own inputs, but --model names other weights."""
    other, path = tmp_path / "other", tmp_path / "a.h5"
    changed = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    with torch.no_grad():
        changed.get_submodule(HOOK.format(1)).weight.mul_(1.1)
    changed.save_pretrained(other)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(other)
    sources = [
        word for kind in ("cov", "keys", "pmatrix") for word in (f"--{kind}", folder / f"{kind}.h5")
    ]
    # The copy has no settings of its own, as tiny has.
    command = (*sources, "--edits", 1, "--value", "random", "--preset", "none", "-o", path)
    assert edit(folder, *command).exit_code == 0
    found = edit(folder, *command, "-m", other, "--save-model", tmp_path / "saved")
    assert found.exit_code == 1
    assert "the file is about another model" in one_sentence(found.stderr)
    assert not (tmp_path / "saved").exists()


def test_gradients_of_a_layer_that_adds_in_place(tmp_path: Path) -> None:
    """Falcon adds attention to the down-projection's output in place."""
    hook = save_family("falcon", tmp_path)
    model = load_model(ModelOptions(str(tmp_path), device="cpu", dtype="float32"))
    facts = [Fact("The capital of {} is", name, "Paris") for name in ("France", "Japan")]
    weight: Any = model.decoder.model.get_submodule(hook.format(0)).weight.requires_grad_()
    gradients = []
    for fact in facts:
        ids = model.tokenizer(f"{fact.text} Paris", return_tensors="pt")["input_ids"]
        target = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
        logprob = model.decoder.model(input_ids=ids).logits[0].log_softmax(-1)
        said = logprob[-1 - len(target) : -1].gather(1, torch.tensor(target)[:, None]).sum()
        gradients.append(torch.autograd.grad(said, weight)[0].flatten())
    expected = float(torch.cosine_similarity(*gradients, dim=0))
    found = gradient_cosines(model, 0, facts, [0])
    np.testing.assert_allclose(found, [[1.0, expected]], atol=1e-4)


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_is_kept_out(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit to what the model says already, and one whose optimisation diverges."""
    original = run_module.find_value

    def diverging(model: Any, layer: Any, fact: Any, *others: Any) -> Any:
        if fact.case_id == EDITED[4]:
            raise DivergedError("the loss is NaN at step 3. Lower it.")
        return original(model, layer, fact, *others)

    monkeypatch.setattr(run_module, "find_value", diverging)
    heard = Heard()
    with ExitStack() as stack:
        sources = sources_of(folder, stack, 0)
        plan = plan_of(sources)
        edits = list(plan.edits)
        edits[0] = Edit(EDITED[0], sources.pm.facts[EDITED[0]].target)
        plan = replace(plan, edits=tuple(edits))
        path = tmp_path / "a.h5"
        perform(tiny, sources, plan, path, heard)
        subjects = [sources.pm.facts[fact].subject for fact in EDITED]
    with EditsFile(path) as file:
        assert file.values("edited").tolist() == list(EDITED[1:4])
        assert file.values("step").tolist() == [0, 1, 3]
        assert file.values("logprob_new").shape == (3, 5)
        assert file.log().kept_out == [
            (0, EDITED[0], edits[0].target_new, ALREADY),
            (4, EDITED[4], edits[4].target_new, "the loss is NaN at step 3. Lower it."),
        ]
    assert [w for w in heard.warnings if "was not edited" in w] == [
        f"{subjects[0]!r} was not edited to {edits[0].target_new!r}: {ALREADY}.",
        f"{subjects[4]!r} was not edited to {edits[4].target_new!r}: the loss is NaN at step 3. "
        "Lower it.",
    ]


def test_an_edit_that_a_dtype_cannot_hold_changes_nothing() -> None:
    model = load_model(ModelOptions("tiny", device="cpu", dtype="float16"))
    weight = EditableWeight(model, 0)
    before = model.decoder.projections[0].module.weight.clone()
    with pytest.raises(NumericsError, match="entries up to 1e\\+05"):
        weight.set_change(np.full(weight.shape, 1e5))
    assert torch.equal(model.decoder.projections[0].module.weight, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_quantised_matrix_is_refused(tiny: LoadedModel, dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 3)
    module.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)
    projection = replace(tiny.decoder.projections[0], module=module)
    decoder = tiny.decoder
    kept, decoder.projections = decoder.projections, (projection,)
    try:
        with pytest.raises(ModelError, match=r"is a Linear of u?int8, not a matrix of floating"):
            EditableWeight(tiny, 0)
        projection.module.weight = None
        with pytest.raises(ModelError, match="is a Linear, not a matrix"):
            EditableWeight(tiny, 0)
    finally:
        decoder.projections = kept


def test_the_last_layer_cannot_reach_the_answer(
    tiny: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        sources = sources_of(folder, stack, 3)
        ends = [fact for fact in range(M) if sources.pm.facts[fact].prompt.endswith("{}")]
        plan = plan_of(sources, (3,), random_norm=1.0)
        with pytest.raises(UsageError, match="at layer 3, the last, cannot reach the answer"):
            EditRun(tiny, sources, plan.edits, plan.options, SILENT)
        for fact in ends[:1]:
            EditRun(tiny, sources, plan_of(sources, (fact,)).edits, plan.options, SILENT)


def test_files_of_other_inputs_are_refused(tiny: LoadedModel, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "cov.h5"
    other.parent.mkdir()
    made = kscli(
        "cache-cov", "-o", other, "--samples", 400, "--layers", "0", "--dtype", "float32", "-q"
    )
    assert made.exit_code == 0, made.stderr
    request = ("--fact", 0, "--value", "random", "-o", tmp_path / "a.h5")
    for _ in range(2):
        for layer, match in ((0, "pmatrix.h5 was not made from .*cov.h5"), (1, "has no layer 1")):
            found = edit(folder, *request, "--cov", other, "--layer", layer)
            assert found.exit_code == 1
            assert re.search(match, one_sentence(found.stderr))
        # Nor is what is there already taken for theirs.
        assert edit(folder, *request).exit_code == 0


def test_keys_of_another_token_are_refused(folder: Path, tmp_path: Path) -> None:
    keys, pmatrix = tmp_path / "keys.h5", tmp_path / "pmatrix.h5"
    made = kscli(
        *("extract", "--token", "last", "--count", 3, "--dtype", "float32", "-q", "-o", keys)
    )
    assert made.exit_code == 0, made.stderr
    cov = folder / "cov.h5"
    assert kscli("pmatrix", "--cov", cov, "--keys", keys, "-o", pmatrix, "-q").exit_code == 0
    found = edit(folder, "--keys", keys, "--pmatrix", pmatrix, "--edits", 1, "--layer", 1)
    assert found.exit_code == 1
    assert "is of keys at the token 'last'" in one_sentence(found.stderr)


def edit(folder: Path, *arguments: Any) -> Any:
    return kscli("edit", "--dir", folder.parent, "-q", *arguments)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    command = ("--edits", 2, "--layer", 1, "--seed", 4, "--value", "random", "-o", path)
    found = edit(folder, *command, "-f", "json")
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert [row["edit"] for row in rows] == [1, 2]
    for name in (
        *("subject", "target_new", "p_max_other", "prob_new_before", "prob_new_after"),
        *("linear_error", "moved"),
    ):
        assert name in rows[0]
    for name in (
        *("subject", "p", "logprob_true_before", "logprob_true_after", "logprob_new_before"),
        *("logprob_new_after", "logprob_true_previous", "logprob_new_previous", "answer_changed"),
    ):
        assert name in rows[0]["moved"][0]
    assert [row["fact"] for row in rows] == sorted(row["fact"] for row in rows)

    again = edit(folder, *command, "-f", "json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == rows
    for output in ("table", "csv", "tsv", "markdown", "latex"):
        assert rows[0]["target_new"] in edit(folder, *command, "-f", output).stdout
    other = edit(folder, *command[:-2], "--value-norm", 2, "-o", path)
    assert other.exit_code == 1
    assert "random_norm changed; add --force" in one_sentence(other.stderr)

    saved = edit(folder, *command, "--save-model", tmp_path / "edited")
    assert saved.exit_code == 0, saved.stderr
    known = kscli("facts", "check", "-m", tmp_path / "edited", "--dir", tmp_path, "-f", "json")
    assert known.exit_code == 0, known.stderr
    assert "The facts are those that tiny was measured with before its edits" in known.stderr
    with KeysFile(folder / "keys.h5") as keys:
        assert json.loads(known.stdout)[0]["facts"] == len(keys.facts)
    assert read_facts(tmp_path / "edited" / "facts.jsonl").facts == keys.facts
    assert edit(folder, *command, "--save-model", tmp_path / "edited").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--fact", "Atlantis"), 2, "has no fact about 'Atlantis'"),
        (("--fact", "Japn"), 2, "there is 'Japan'"),
        (("--fact", "0", "--target-new", "text: "), 1, "--target-new is empty"),
        (("--fact", "0", "--target-new", "field:nothing"), 1, "nothing of 'The capital of France"),
        (("--target-new", "field:"), 1, "is missing or empty"),
        (("--edits", "97"), 2, "97 edits were asked for, but .* holds 96"),
        (("--edits", "some"), 2, "positive number, or all"),
        (("--layer", "0,1"), 2, "rome edits one layer"),
        (("--layer", "9"), 2, "9"),
        (("--batch", "2"), 2, "--batch is for --method memit"),
        (("--protocol", "single", "--save-model", "x"), 2, "takes every edit back"),
        (("--held-out", "tiny"), 2, "is the text that .* was measured on"),
        (("--fact", "0", "--target-new", "text:Paris"), 1, "no edit was made"),
        (("--protect", "knwon"), 2, "did you mean known"),
        (("--fact", "0", "--edits", "1"), 2, "--edits has no effect with --fact"),
        (("--value-norm", "2"), 2, "--value-norm has no effect without --value random"),
        (("--value", "random", "--steps", "2"), 2, "--steps has no effect with --value random"),
        (("--weight", "2"), 2, "--weight has no effect without --method memit"),
        (("--text-field", "x"), 2, "--text-field has no effect without --held-out"),
        (("--target-new", "text:x", "--facts", "y"), 2, "--facts has no effect with"),
        (("--method", "memit", "--weight", "inf"), 2, "--weight inf must be a finite number"),
        (("--learning-rate", "0"), 2, "--learning-rate 0 writes nothing; name one above 0"),
        (("--norm-limit", "0"), 2, "--norm-limit 0 writes nothing; name one above 0"),
        (("--value", "random", "--value-norm", "0"), 2, "--value-norm 0 writes nothing"),
        (("--protocol", "single", "--measure-every", "2"), 2, "--measure-every has no effect"),
    ],
)
def test_bad_requests(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    found = edit(folder, *arguments, "-o", tmp_path / "a.h5")
    assert found.exit_code == code, found.stderr
    assert re.search(sentence, one_sentence(found.stderr)), found.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "norm", "reason"),
    [
        ("float16", "1e9", "edited so, an edit of layer 0 is not finite in torch.float16"),
        ("float32", "1e30", "edited so, .* infinite"),
    ],
)
def test_an_edit_that_leaves_nothing_to_measure_is_kept_out(
    folder: Path, tmp_path: Path, dtype: str, norm: str, reason: str
) -> None:
    options = ("--dtype", dtype, "--value", "random", "--value-norm", norm, "--fact", 0)
    found = kscli("edit", "--dir", folder.parent, "--layer", 0, *options, "-o", tmp_path / "a.h5")
    assert found.exit_code == 1
    said = " ".join(found.stderr.split())
    assert re.search(f"'France' was not edited to '.*': {reason}", said), said
    assert "no edit was made" in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_after_an_edit_that_was_kept_out(
    tiny: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model has of it is gone: the others are those of a run without it."""
    original = run_module.random_value

    def huge_third(d: int, norm: float, seed: int, number: int) -> Array:
        return original(d, 1e30 if number == 2 else norm, seed, number)

    monkeypatch.setattr(run_module, "random_value", huge_third)
    run_on_tiny(tiny, folder, tmp_path / "all.h5", 0, random_norm=2.0)
    with EditsFile(tmp_path / "all.h5") as file:
        log = file.log()
        edited, deltas = file.values("edited"), file.values("delta")
        measured = file.values("measured")[-1]
        assert [number for number, *_ in log.kept_out] == [2]
    assert edited.tolist() == [fact for at, fact in enumerate(EDITED) if at != 2]
    with PMatrixFile(folder / "pmatrix.h5") as pm:
        P = pm.matrix("P", 0)
    shifts = P[edited].T @ deltas[:, 0]
    for at, fact in enumerate(edited):
        shifts[fact] = P[edited[at + 1 :], fact] @ deltas[at + 1 :, 0]
    np.testing.assert_allclose(measured, np.linalg.norm(shifts, axis=1), atol=1e-9)


def test_a_remainder_beside_a_finished_run_goes(folder: Path, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "a.h5", tmp_path / "a.h5.checkpoint"
    request = ("--fact", 0, "--value", "random", "-o", path)
    assert edit(folder, *request).exit_code == 0
    shutil.copy(path, checkpoint)
    assert edit(folder, *request).exit_code == 0
    assert not checkpoint.exists()
    checkpoint.write_bytes(b"torn")
    found = edit(folder, *request[:-1], tmp_path / "b.h5")
    assert found.exit_code == 0
    path.unlink()
    found = edit(folder, *request)
    assert found.exit_code == 1
    assert re.search(
        r"a.h5.checkpoint is in the way \(it cannot be read\)", one_sentence(found.stderr)
    )
    assert edit(folder, *request, "--force").exit_code == 0
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["a.h5", "b.h5"]


def test_how_many_edits_took_is_told(folder: Path, tmp_path: Path) -> None:
    request = ("edit", "--dir", folder.parent, "--target-new", "text:Rome", "--fact", 0)
    few = kscli(*request, "--steps", 2, "--layer", 2, "-o", tmp_path / "a.h5")
    assert few.exit_code == 0, few.stderr
    said = " ".join(few.stderr.split())
    assert "the edit did not take: 'Rome' is not the model's first choice after it (P = " in said
    saved = tmp_path / "edited"
    again = kscli(
        *request, "--steps", 2, "--layer", 2, "-o", tmp_path / "a.h5", "--save-model", saved
    )
    assert f"warning: {saved} was saved with an edit that did not take." in " ".join(
        again.stderr.split()
    )
    assert "The files of tiny are unchanged" in again.stderr
    # The advice after a failed edit is not to ask `risk`, which does not know what took.
    assert "`kscli risk" not in few.stderr
    assert "Another --target-new, another --layer, more --steps" in said
    check, trace = re.findall(r"`(kscli (?:facts check|trace) [^`]*)`", again.stderr)
    for command in (check, trace):
        words = shlex.split(command)[1:]
        done = kscli(*words, *(("--force",) if words[0] == "facts" else ()))
        assert done.exit_code == 0, done.stderr


def test_the_edits_that_did_not_take_or_were_not_made_are_named(
    folder: Path, tmp_path: Path
) -> None:
    """The first fact is refused: the model says the target already."""
    request = [word for fact in (0, 1, 2) for word in ("--fact", fact)]
    request += ["--target-new", "text:Paris", "--steps", 2, "--layer", 2, "-f", "json"]
    done = kscli("edit", "--dir", folder.parent, *request, "-o", tmp_path / "a.h5")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["fact"] for row in rows] == [1, 2]
    failed = [row for row in rows if not row["took"]]
    assert [row["took"] for row in rows] == [row["rank_new_after"] == 1 for row in rows]
    said = " ".join(done.stderr.split())
    assert "3 edits were asked for, and 1 of them not made." in said
    assert failed
    for row in failed:
        assert repr(row["subject"]) in said.partition("did not take")[2]


def test_a_subject_of_several_facts_is_said(tmp_path: Path) -> None:
    facts = [
        Fact(prompt, "France", target, target_new="Rome")
        for prompt, target in (("The capital of {} is", "Paris"), ("People in {} speak", "French"))
    ]
    write_records(tmp_path / "f.jsonl", map(fact_record, facts), force=False)
    place = ("--dir", tmp_path / "own")
    done = kscli("run", "--facts", tmp_path / "f.jsonl", "--tokens", 3000, *place)
    assert done.exit_code == 0, done.stderr
    few = ("--steps", 2, "--contexts", 0, "-o", tmp_path / "a.h5")
    done = kscli("edit", *place, "--fact", "France", *few, "--force")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "'France' is the subject of 2 facts, which are all edited" in said
    assert "takes one alone" not in kscli("edit", *place, "--fact", "1", *few, "--force").stderr


def test_equal_keys_cannot_be_given_two_values() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((6, 6))
    white = whitening(root @ root.T, 100)
    keys = rng.standard_normal((3, 6))
    keys[2] = keys[0]
    with pytest.raises(NumericsError, match="3 keys are not independent"):
        edit_directions(white, keys)
    assert np.isfinite(edit_directions(white, keys, 1.0)).all()


def test_held_out_text_that_c_may_have_seen_is_told(folder: Path, tmp_path: Path) -> None:
    """C that came from elsewhere does not say what text it is of."""
    cov, text = tmp_path / "cov.h5", tmp_path / "text.jsonl"
    shutil.copy(folder / "cov.h5", cov)
    with changed(cov) as file:
        file.attrs["corpus_identity"] = UNKNOWN
    text.write_text('{"text": "The capital of France is Paris."}\n')
    options = ("--cov", cov, "--held-out", text, "-o", tmp_path / "a.h5", "--value", "random")
    found = kscli("edit", "--dir", folder.parent, "--edits", 1, *options)
    assert found.exit_code == 0, found.stderr
    assert f"{cov} does not say what text it was measured on" in " ".join(found.stderr.split())


def test_a_killed_process_loses_no_finished_edit(folder: Path, tmp_path: Path) -> None:
    """SIGKILL right after a checkpoint; the next run's file is the undisturbed run's."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from kscli.editing.loop import EditRun\n"
        "original = EditRun._edit\n"
        "def edit(self, planned, log, task):\n"
        "    if log.made == 1: os.kill(os.getpid(), 9)\n"
        "    original(self, planned, log, task)\n"
        "EditRun._edit = edit\n"
        "from kscli.cli.app import main\n"
        "main()\n"
    )
    path = tmp_path / "run.h5"
    command = [
        *("edit", "--dir", str(folder.parent), "--edits", "3", "--value", "random", "-o", str(path))
    ]
    killed = fork_kit.run([str(script), *command])
    assert killed.returncode == -9
    assert not path.exists()
    gone_on = kscli(*command)
    assert gone_on.exit_code == 0
    assert "1 of 3 edits; going on" in gone_on.stderr
    whole = tmp_path / "whole.h5"
    assert kscli(*command[:-1], whole).exit_code == 0
    expected = arrays(whole)
    for name, values in arrays(path).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
