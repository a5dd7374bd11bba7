"""A run of cache-cov stopped, gone on with, halved, spoilt: against the undisturbed one."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.corpus import CorpusSpec, open_corpus
from kscli.errors import ArtifactError, CorpusError, ModelError, NumericsError, UsageError
from kscli.interrupts import InterruptedRunError
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.reporter import Reporter, Task
from kscli.second_moment import checkpoints as checkpoints_module
from kscli.second_moment.checkpoints import Checkpoints
from kscli.second_moment.corpus_run import CovarianceRun
from kscli.second_moment.covariance import (
    cache_covariance,
    checkpoint_recipe,
    covariance_recipe,
    one_pass,
    second_moments,
)
from kscli.second_moment.moments import SecondMoment
from kscli.second_moment.options import WHOLE, CovarianceOptions, Shard
from kscli.second_moment.plan import RunPlan
from kscli.second_moment.ranks import RankError

OPTIONS = CovarianceOptions(samples=900, max_length=40)
BATCH_TOKENS = 512


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def plan(model: LoadedModel) -> RunPlan:
    return one_pass(model, batch_tokens=BATCH_TOKENS)


@dataclass
class Watcher(Reporter):
    """Calls `at_batch` with the number of every batch that is done, and keeps what is said."""

    at_batch: Callable[[int], None] = lambda number: None
    at_note: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    batches: int = 0
    reached: list[tuple[float, float | None]] = field(default_factory=list)

    @contextmanager
    def task(
        self, label: str, total: float | None = None, unit: str = "", done: float = 0.0
    ) -> Iterator[Task]:
        watcher = self

        class Counter(Task):
            def reach(self, done: float, total: float | None, status: str = "") -> None:
                watcher.reached.append((done, total))
                watcher.batches += 1
                watcher.at_batch(watcher.batches)

        yield Counter()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.at_note(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(
    model: LoadedModel,
    plan: RunPlan,
    path: Path,
    watcher: Reporter | None = None,
    options: CovarianceOptions = OPTIONS,
    every: float = 1e9,
) -> None:
    corpus = open_corpus(CorpusSpec("tiny"))
    recipe = covariance_recipe(model.identity, corpus, options, model.dtype)
    checkpoints = Checkpoints(
        folder_of(path), checkpoint_recipe(recipe, BATCH_TOKENS, WHOLE), every
    )
    measured = CovarianceRun(model, corpus, options, plan, watcher or Watcher(), checkpoints)
    cache_covariance(measured, path, recipe)


def folder_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.checkpoint")


def interrupt_at(*batches: int) -> Callable[[int], None]:
    def at_batch(number: int) -> None:
        if number in batches:
            signal.raise_signal(signal.SIGINT)

    return at_batch


def contents(path: Path) -> dict[str, NDArray[np.generic]]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]})
                if isinstance(item, h5py.Dataset) and name != "seal"
                else None
            )
        )
        found["fingerprint"] = np.array(file.attrs["fingerprint"])
        for name in ("documents", "whole_corpus", "padding", "batch_tokens"):
            found[name] = np.array(file.attrs[name])
    return found


def assert_same(path: Path, other: Path) -> None:
    first, second = contents(path), contents(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(
    model: LoadedModel, plan: RunPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """The file of a run that nothing disturbed, and how many batches it has."""
    path = tmp_path_factory.mktemp("undisturbed") / "cov.h5"
    watcher = Watcher()
    run(model, plan, path, watcher)
    assert not folder_of(path).exists()
    assert watcher.batches > 12
    return path, watcher.batches


def test_progress_ends_where_it_said_it_would(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    watcher = Watcher()
    run(model, plan, tmp_path / "cov.h5", watcher)
    done = [done for done, _ in watcher.reached]
    assert done == sorted(done)
    assert watcher.reached[-1][0] == watcher.reached[-1][1] == contents(undisturbed[0])["count"]


@pytest.mark.parametrize("at", [1, 2, 5, -1])
def test_interrupted_and_gone_on_with_it_is_the_same_file(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int], at: int
) -> None:
    expected, batches = undisturbed
    path = tmp_path / "cov.h5"
    with pytest.raises(InterruptedRunError, match="the same command goes on") as raised:
        run(model, plan, path, Watcher(interrupt_at(at if at > 0 else batches)))
    assert raised.value.exit_code == 130
    assert not path.exists()
    watcher = Watcher()
    # The checkpoint's plan counts, not the one that the machine would have today.
    run(model, replace(plan, batch_tokens=64), path, watcher)
    assert "going on from" in watcher.notes[0]
    assert watcher.batches == batches - (at if at > 0 else batches)
    assert_same(path, expected)
    assert not folder_of(path).exists()


def test_interrupted_again_and_again(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    path = tmp_path / "cov.h5"
    while not path.exists():
        try:
            run(model, plan, path, Watcher(interrupt_at(4)))
        except InterruptedRunError:
            assert len(list(folder_of(path).iterdir())) <= 2
    assert_same(path, undisturbed[0])


def test_a_second_signal_acts_at_once(model: LoadedModel, plan: RunPlan, tmp_path: Path) -> None:
    def twice(number: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, tmp_path / "cov.h5", Watcher(twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_after_a_checkpoint_it_goes_on_from_there(
    model: LoadedModel,
    plan: RunPlan,
    tmp_path: Path,
    undisturbed: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `kill -9` leaves it: an error that nothing expects, between two checkpoints."""
    monkeypatch.setattr(checkpoints_module, "WRITES_APART", 0)
    path = tmp_path / "cov.h5"

    def die(number: int) -> None:
        if number == 9:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(model, plan, path, Watcher(die), every=0)
    assert len(list(folder_of(path).iterdir())) == 2
    watcher = Watcher()
    run(model, plan, path, watcher)
    assert watcher.batches == undisturbed[1] - 8
    assert_same(path, undisturbed[0])


def test_the_newest_checkpoint_damaged_the_one_before_serves(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    path = tmp_path / "cov.h5"
    for at in (3, 4):
        with pytest.raises(InterruptedRunError):
            run(model, plan, path, Watcher(interrupt_at(at)))
    _, newer = sorted(folder_of(path).iterdir())
    newer.write_bytes(newer.read_bytes()[:3000])
    watcher = Watcher()
    run(model, plan, path, watcher)
    assert watcher.batches == undisturbed[1] - 3
    assert_same(path, undisturbed[0])


def test_a_checkpoint_of_other_options_is_refused_and_named(
    model: LoadedModel, plan: RunPlan, tmp_path: Path
) -> None:
    path = tmp_path / "cov.h5"
    with pytest.raises(InterruptedRunError):
        run(model, plan, path, Watcher(interrupt_at(2)))
    corpus = open_corpus(CorpusSpec("tiny"))
    recipe = covariance_recipe(model.identity, corpus, OPTIONS, model.dtype)
    for change, named in (
        ({"samples": 901}, "samples"),
        ({"weights": "sha256:other", "corpus": "files:other"}, "corpus, weights"),
        ({"batch_tokens": 64}, "batch_tokens"),
    ):
        changed = checkpoint_recipe({**recipe, **change}, BATCH_TOKENS, WHOLE) | change
        other = Checkpoints(folder_of(path), changed)
        with pytest.raises(ArtifactError, match=rf"{folder_of(path).name}.*\({named} differ\)"):
            other.require_own()
    own = Checkpoints(folder_of(path), checkpoint_recipe(recipe, BATCH_TOKENS, WHOLE))
    own.require_own()
    own.discard_others()
    assert own.latest() is not None
    other.discard_others()
    assert not folder_of(path).exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(
    model: LoadedModel,
    plan: RunPlan,
    tmp_path: Path,
    undisturbed: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "cov.h5"
    fill = checkpoints_module._fill
    writes = []

    def full(*arguments: object) -> None:
        writes.append(arguments)
        if len(writes) > 2:
            raise OSError(28, "No space left on device")
        fill(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints_module, "_fill", full)
    monkeypatch.setattr(checkpoints_module, "WRITES_APART", 0)
    kept: list[list[str]] = []
    watcher = Watcher(lambda number: kept.append(sorted(p.name for p in folder_of(path).glob("*"))))
    run(model, plan, path, watcher, every=0)
    assert len(writes) > 2
    assert kept[-1] == ["state-000001.h5"]
    assert any("the disk is full" in warning for warning in watcher.warnings)
    assert_same(path, undisturbed[0])


@pytest.mark.parametrize("stop", [None, 5, 30])
def test_several_passes_give_the_same_bits(
    model: LoadedModel,
    plan: RunPlan,
    tmp_path: Path,
    undisturbed: tuple[Path, int],
    stop: int | None,
) -> None:
    path = tmp_path / "cov.h5"
    passes = replace(plan, groups=((0, 1), (2,), (3,)))
    if stop:
        with pytest.raises(InterruptedRunError):
            run(model, passes, path, Watcher(interrupt_at(stop)))
    watcher = Watcher()
    run(model, passes, path, watcher)
    assert watcher.batches == 3 * undisturbed[1] - (stop or 0)
    with h5py.File(path) as one, h5py.File(undisturbed[0]) as other:
        np.testing.assert_array_equal(one["second_moment"][()], other["second_moment"][()])
        assert one["count"][()] == other["count"][()]
    assert not folder_of(path).exists()


@pytest.mark.parametrize("placement", ["device", "split"])
def test_wherever_the_sums_lie_they_are_the_same(
    model: LoadedModel, plan: RunPlan, undisturbed: tuple[Path, int], placement: str
) -> None:
    """`split` sums 16 batches in float32."""
    corpus = open_corpus(CorpusSpec("tiny"))
    other = replace(plan, placement=placement)  # type: ignore[arg-type]
    C = second_moments(model, corpus, OPTIONS, plan=other)
    expected = contents(undisturbed[0])["second_moment"]
    for layer in range(4):
        np.testing.assert_allclose(C.moments[layer].matrix(), expected[layer], rtol=1e-4, atol=1e-6)
        scale = np.sqrt(np.diagonal(expected[layer]))
        error = np.abs(C.moments[layer].matrix() - expected[layer]) / np.outer(scale, scale)
        assert error.max() < (0 if placement == "device" else 1e-6) + 1e-12


def refuse_beyond(limit: int, at_layer: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the sums of the `at_layer`th layer of a batch run out of memory beyond `limit` rows."""
    add = SecondMoment.add
    seen: list[int] = []

    def refuse(self: SecondMoment, keys: Tensor, tokens: int | None = None) -> Tensor:
        seen.append(len(keys))
        if len(keys) > limit and len(seen) % 4 == at_layer:
            seen.append(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add(self, keys, tokens)

    monkeypatch.setattr(SecondMoment, "add", refuse)
    return seen


@pytest.mark.parametrize("at_layer", [0, 1, 3])
def test_out_of_memory_halves_the_batch_and_loses_no_token(
    model: LoadedModel,
    plan: RunPlan,
    tmp_path: Path,
    undisturbed: tuple[Path, int],
    monkeypatch: pytest.MonkeyPatch,
    at_layer: int,
) -> None:
    refuse_beyond(200, at_layer, monkeypatch)
    path = tmp_path / "cov.h5"
    run(model, plan, path)
    got, expected = contents(path), contents(undisturbed[0])
    assert got["count"] == expected["count"]
    assert got["documents"] == expected["documents"]
    error = np.linalg.norm(got["second_moment"] - expected["second_moment"], axis=(1, 2))
    assert (error / np.linalg.norm(expected["second_moment"], axis=(1, 2))).max() < 1e-6
    with h5py.File(path) as file:
        assert file.attrs["batches_halved"]


def test_one_document_that_does_not_fit_is_said_to(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_beyond(0, 0, monkeypatch)
    with pytest.raises(ModelError, match=r"one document of [\d]+ tokens does not fit in memory"):
        run(model, plan, tmp_path / "cov.h5")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_key_that_is_not_finite_names_layer_and_document_and_keeps_the_checkpoint(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, layer: int
) -> None:
    documents = [f"The capital of place {i} is here." for i in range(60)]
    documents[41] = "Tokyo"
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    corpus = open_corpus(CorpusSpec(str(text)))
    ids = model.tokenizer("Tokyo")["input_ids"]
    others = {
        i for j, d in enumerate(documents) if j != 41 for i in model.tokenizer(d)["input_ids"]
    }
    spoilt = next(i for i in ids if i not in others)
    projection = model.decoder.projections[layer].module

    def spoil(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        keys = inputs[0].clone()
        keys[current["ids"] == spoilt] = float("nan")
        return (keys,)

    current: dict[str, Tensor] = {}
    embeddings = model.decoder.model.get_input_embeddings()  # type: ignore[operator]
    handles = [
        embeddings.register_forward_pre_hook(lambda _, inputs: current.update(ids=inputs[0])),
        projection.register_forward_pre_hook(spoil),
    ]
    options = CovarianceOptions()
    recipe = covariance_recipe(model.identity, corpus, options, model.dtype)
    checkpoints = Checkpoints(tmp_path / "c", checkpoint_recipe(recipe, 64, WHOLE), every=0)
    small = replace(plan, batch_tokens=64)
    spoilt_run = CovarianceRun(model, corpus, options, small, checkpoints=checkpoints)
    try:
        with pytest.raises(NumericsError, match=rf"layer {layer} .* in document 41 "):
            cache_covariance(spoilt_run, tmp_path / "cov.h5", recipe)
    finally:
        for handle in handles:
            handle.remove()
    assert not (tmp_path / "cov.h5").exists()
    saved = checkpoints.latest()
    assert saved is not None
    assert all(np.isfinite(saved.sums(i)).all() for i in range(4))


def test_until_settled_stops_when_p_is(model: LoadedModel, plan: RunPlan) -> None:
    corpus = open_corpus(CorpusSpec("tiny"))
    options = CovarianceOptions(samples=None, max_length=40, until_settled=0.03)
    result = second_moments(model, corpus, options, plan=plan)
    assert result.settled[-1].rms <= 0.03
    assert all(settled.rms > 0.03 for settled in result.settled[:-1])
    assert result.settled[-1].tokens == result.tokens < 20_000
    assert not result.totals.whole


def test_what_cannot_be_is_refused_before_anything_is_run(
    model: LoadedModel, plan: RunPlan, tmp_path: Path
) -> None:
    passes = replace(plan, groups=((0,), (1, 2, 3)))
    settled = replace(OPTIONS, until_settled=0.1)
    with pytest.raises(UsageError, match="needs all layers in one pass, and the sums need 2"):
        run(model, passes, tmp_path / "cov.h5", options=settled)
    stdin = open_corpus(CorpusSpec("-"))
    with pytest.raises(UsageError, match="standard input can be read once"):
        CovarianceRun(model, stdin, OPTIONS, passes).sum_up()
    part = CovarianceOptions(shard=Shard(0, 2))
    with pytest.raises(UsageError, match="each process has a part"):
        replace(part, until_settled=0.1).check(open_corpus(CorpusSpec("tiny")), None)
    with pytest.raises(UsageError, match="standard input goes to one process"):
        part.check(stdin, None)
    with pytest.raises(UsageError, match="--until-settled 0"):
        CovarianceOptions(until_settled=0.0)
    with pytest.raises(UsageError, match="beyond the"):
        run(model, plan, tmp_path / "cov.h5", options=replace(OPTIONS, max_length=10**6))


def test_shards_add_up_to_the_whole(
    model: LoadedModel, plan: RunPlan, undisturbed: tuple[Path, int]
) -> None:
    corpus = open_corpus(CorpusSpec("tiny"))
    parts = [
        second_moments(model, corpus, replace(OPTIONS, shard=Shard(i, 3)), plan=plan)
        for i in range(3)
    ]
    expected = contents(undisturbed[0])
    assert sum(part.tokens for part in parts) == expected["count"]
    assert sum(part.totals.window.own for part in parts) == expected["documents"]
    for layer in range(4):
        total = sum(part.moments[layer].sums() for part in parts) / expected["count"]
        C = expected["second_moment"][layer]
        assert np.linalg.norm(total - C) < 1e-6 * np.linalg.norm(C)


@pytest.mark.parametrize("text", ["a", "word " * 2_000_000, "\n".join(["One."] * 3)])
def test_odd_documents(model: LoadedModel, tmp_path: Path, text: str) -> None:
    """One token, ten million characters, a corpus shorter than a batch."""
    path = tmp_path / "text.txt"
    path.write_text(text)
    result = second_moments(model, open_corpus(CorpusSpec(str(path))), CovarianceOptions())
    ids = [
        model.tokenizer(document[:100_000])["input_ids"][: model.max_length]
        for document in open_corpus(CorpusSpec(str(path))).documents()
    ]
    assert result.tokens == sum(map(len, ids)) > 0


def test_a_corpus_without_tokens_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": ""}\n{"text": "x"}\n')
    corpus = open_corpus(CorpusSpec(str(path)))
    with pytest.raises(CorpusError, match="gave no token"):
        second_moments(model, corpus, CovarianceOptions(samples=1))
    assert second_moments(model, corpus, CovarianceOptions()).totals.window.empty == 1


def test_a_signal_in_the_last_evaluation_is_not_lost(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    path = tmp_path / "cov.h5"
    first = Watcher()
    run(model, plan, tmp_path / "first.h5", first)
    last = [note for note in first.notes if "p is about" in note][-1]
    watcher = Watcher(
        at_note=lambda text: signal.raise_signal(signal.SIGTERM) if text == last else None
    )
    with pytest.raises(InterruptedRunError, match="the same command goes on") as raised:
        run(model, plan, path, watcher)
    assert raised.value.exit_code == 143
    run(model, plan, path)
    assert_same(path, undisturbed[0])


def test_unreadable_checkpoints_are_said_to_be(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    path = tmp_path / "cov.h5"
    with pytest.raises(InterruptedRunError):
        run(model, plan, path, Watcher(interrupt_at(3)))
    for state in folder_of(path).iterdir():
        state.write_bytes(b"no HDF5")
    watcher = Watcher()
    run(model, plan, path, watcher)
    assert "no checkpoint in" in watcher.warnings[0]
    assert_same(path, undisturbed[0])


def test_a_damaged_finished_pass_is_summed_again(
    model: LoadedModel, plan: RunPlan, tmp_path: Path, undisturbed: tuple[Path, int]
) -> None:
    path = tmp_path / "cov.h5"
    passes = replace(plan, groups=((0, 1), (2, 3)))
    with pytest.raises(InterruptedRunError):
        run(model, passes, path, Watcher(interrupt_at(undisturbed[1] + 3)))
    (finished,) = folder_of(path).glob("pass-*.h5")
    finished.write_bytes(finished.read_bytes()[:5000])
    run(model, passes, path)
    with h5py.File(path) as one, h5py.File(undisturbed[0]) as other:
        np.testing.assert_array_equal(one["second_moment"][()], other["second_moment"][()])


class LostRanks:
    """One rank of one, whose fellows are lost at the third look."""

    shard = Shard(0, 1)
    leader = True

    def __init__(self) -> None:
        self.looks = 0

    def check(self) -> None:
        self.looks += 1
        if self.looks == 3:
            raise RankError("rank 1 was killed")


def test_a_rank_whose_fellow_is_lost_saves_its_own_sums(
    model: LoadedModel, plan: RunPlan, tmp_path: Path
) -> None:
    corpus = open_corpus(CorpusSpec("tiny"))
    checkpoints = Checkpoints(tmp_path / "c", {"corpus": "tiny"}, every=1e9)
    lost: Any = LostRanks()
    with pytest.raises(RankError):
        CovarianceRun(model, corpus, OPTIONS, plan, Watcher(), checkpoints, lost).sum_up()
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.position.batches == 3


def test_what_ran_out_of_memory_is_let_go(model: LoadedModel) -> None:
    """An error that is held would hold the keys, and with them the memory to try again with."""
    seen: list[weakref.ref[Tensor]] = []

    def refuse(layer: int, keys: Tensor) -> None:
        seen.append(weakref.ref(keys))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        with suppress(torch.OutOfMemoryError):
            model.decoder.run(torch.tensor([[5, 6, 7]]), [0], refuse)
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()
