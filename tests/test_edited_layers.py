"""What each editor writes: its formula as published, in float64, and what published code did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_kit import kscli, one_sentence
from edit_kit import HOOK, Naive
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.contexts import in_context
from kscli.editing.edited_layers import EditedLayers, WriteOptions
from kscli.editing.editors import EDITORS, Editor, find_editor
from kscli.editing.edits_file import EditsFile
from kscli.editing.live import mlp_outputs
from kscli.editing.loop import Edit, EditRun
from kscli.editing.metrics import Cut, null_space
from kscli.editing.sources import EditSources
from kscli.editing.stage import replay_edits
from kscli.editing.value import DivergedError
from kscli.errors import NumericsError
from kscli.facts import Fact
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.positions import locate_keys
from kscli.reporter import SILENT

Array = NDArray[np.float64]
CONTEXTS = ("It was long ago. {}", "He wrote this in a letter. {}", "Nobody knows why. {}")


def sources_of(folder: Path, stack: ExitStack, layers: Sequence[int]) -> EditSources:
    return EditSources(
        stack.enter_context(CovarianceFile(folder / "cov.h5")),
        stack.enter_context(KeysFile(folder / "keys.h5")),
        stack.enter_context(PMatrixFile(folder / "pmatrix.h5")),
        tuple(layers),
    )


def edited_layers(
    model: LoadedModel, sources: EditSources, editor: Editor, options: WriteOptions
) -> EditedLayers:
    prompts = locate_keys(model.tokenizer, sources.pm.facts)
    return EditedLayers(model, sources, editor, options, prompts)


def fresh_tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


def weight_of(model: LoadedModel, layer: int) -> Array:
    weight = model.decoder.model.get_submodule(HOOK.format(layer)).weight
    found: Array = weight.detach().double().numpy().T
    return found.copy()


class Reading(Naive):
    """Facts' keys and outputs in a model that is edited by hand; `stored` are keys of keys.h5."""

    stored: Array

    def __init__(self, facts: Sequence[Fact]) -> None:
        super().__init__()
        self.facts = facts

    def last(self, fact: Fact) -> int:
        """The subject's last token."""
        start, end = fact.subject_span
        offsets = self.tokenizer(fact.text, return_offsets_mapping=True)["offset_mapping"]
        return [i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, end)][-1]

    def key(self, layer: int, fact: Fact) -> Array:
        return self.at(self.projection(layer), fact.text, self.last(fact), given=True)

    def keys(self, layer: int) -> tuple[Array, Array]:
        """Columns: the bare prompts' keys; and axis 0 the contexts, the other contexts' keys."""
        bare = np.stack([self.key(layer, fact) for fact in self.facts], axis=1)
        others = [
            np.stack([self.key(layer, in_context(c, fact)) for fact in self.facts], axis=1)
            for c in CONTEXTS
        ]
        return bare, np.stack(others)

    def outputs(self, path: str) -> Array:
        """Columns: what a module gives after the bare prompts."""
        module = self.model.get_submodule(path)
        return np.stack(
            [self.at(module, fact.text, self.last(fact), given=False) for fact in self.facts],
            axis=1,
        )


SITE = {"hidden": "transformer.h.{}", "mlp": HOOK}
LAMBDA = 3.0


def naive_change(
    method: str, reading: Reading, layer: int, C: Array, lacking: Array, earlier: Array
) -> Array:
    """One layer's Delta W for the (d, b) values that are lacking, as each paper writes it."""
    k, others = reading.keys(layer)
    mean = (k + others.sum(axis=0)) / (1 + len(others))
    K = (k + others.mean(axis=0)) / 2
    R = lacking
    if method == "closed-form":
        k = reading.stored
        u = np.linalg.inv(C) @ k
        return R @ u.T / (k.T @ u)
    if method == "joint":
        A = np.concatenate([earlier, reading.stored], axis=1)
        U = np.linalg.inv(C) @ A
        return R @ (U @ np.linalg.inv(A.T @ U))[:, -R.shape[1] :].T
    if method in ("rome", "rome-identity", "wilke"):
        u = mean if method == "rome-identity" else np.linalg.inv(C) @ mean
        return R @ u.T / (k.T @ u)
    if method in ("r-rome", "r-rome-identity"):
        u = mean if method == "r-rome-identity" else np.linalg.inv(C) @ mean
        W = reading.matrix(layer)
        return (R + W @ k - W @ mean) @ u.T / (mean.T @ u)
    if method in ("memit", "pmet", "rect", "prune"):
        return R @ K.T @ np.linalg.inv(LAMBDA * C + K @ K.T)
    if method == "memit-seq":
        return R @ K.T @ np.linalg.inv(LAMBDA * C + earlier @ earlier.T + K @ K.T)
    if method == "emmet":
        w, e = 30.0, LAMBDA / 30.0
        inverse = np.linalg.inv(w * C)
        return R @ np.linalg.inv(K.T @ inverse @ K + e * np.eye(K.shape[1])) @ K.T @ inverse
    assert method == "alphaedit", method
    U, s, _ = np.linalg.svd(C)
    Pi = U[:, s < 0.02] @ U[:, s < 0.02].T
    left = Pi @ (K @ K.T + earlier @ earlier.T) + LAMBDA * np.eye(len(C))
    change: Array = np.linalg.solve(left, Pi @ K @ R.T).T
    return change


def naive_share(method: str, left: int) -> float:
    return 1 / np.sqrt(left) if method == "pmet" else 1 / left


@pytest.mark.parametrize("method", EDITORS)
def test_an_editor_writes_its_published_formula(method: str, measured_tiny: Path) -> None:
    """Two batches, the second in the model that the first has left; random values, float64."""
    editor = find_editor(method)
    layers = (0, 1, 2) if editor.afterwards.one_layer else (0, 1) if editor.over_layers else (1,)
    batches = [[3, 40], [17, 5]] if editor.at_once else [[3], [17]]
    rng, scale = np.random.default_rng(0), 2.0 if editor.afterwards.limited else 1.0
    with ExitStack() as stack:
        sources = sources_of(measured_tiny, stack, layers)
        model = fresh_tiny()
        model.decoder.model.double()
        options = WriteOptions(weight=LAMBDA if editor.direction.weight else 0.0)
        written = edited_layers(model, sources, editor, options)
        written.prepare(CONTEXTS, SILENT)
        reading = Reading([])
        C = {layer: sources.cov.second_moment(layer) for layer in layers}
        original = {layer: reading.matrix(layer) for layer in layers}
        earlier = {layer: np.empty((512, 0)) for layer in layers}
        found = []
        for facts in batches:
            reading.facts = [sources.pm.facts[fact] for fact in facts]
            reading.stored = sources.keys.keys_of(layers[0])[facts].T
            last = SITE[editor.value.site].format(layers[-1])
            if editor.afterwards.one_layer:
                shifts = rng.standard_normal((len(facts), len(layers), 128))
                changes = [
                    naive_change(method, reading, layer, C[layer], shifts[:, at].T, earlier[layer])
                    for at, layer in enumerate(layers)
                ]
                sizes = [
                    np.linalg.norm(change) / np.linalg.norm(reading.matrix(layer))
                    for change, layer in zip(changes, layers, strict=True)
                ]
                reading.add(layers[int(np.argmin(sizes))], changes[int(np.argmin(sizes))])
                values = shifts
            else:
                shifts = scale * rng.standard_normal((len(facts), 128))
                target = reading.outputs(last) + shifts.T
                values = target.T if editor.value.reach else shifts
                before = {layer: reading.matrix(layer) for layer in layers}
                for at, layer in enumerate(layers):
                    lacking = target - reading.outputs(last)
                    share = naive_share(method, len(layers) - at)
                    change = naive_change(
                        method, reading, layer, C[layer], lacking * share, earlier[layer]
                    )
                    reading.add(layer, change)
                if method == "rect":
                    for layer in layers:
                        change = reading.matrix(layer) - before[layer]
                        relative = np.abs(change / (before[layer] + 1e-8))
                        smallest = np.sort(relative.ravel())[int(0.6 * relative.size) - 1]
                        reading.add(layer, np.where(relative >= smallest, 0, -change))
                for layer in layers:
                    k, others = reading.keys(layer)
                    K = reading.stored if method == "joint" else (k + others.mean(axis=0)) / 2
                    earlier[layer] = np.concatenate([earlier[layer], K], axis=1)
            found.append(written.write(facts, values))
        if method == "prune":
            deltas, directions = (np.concatenate([each[at] for each in found]) for at in (0, 1))
            kept = written.limit(deltas, directions)
            above: list[bool] = []
            for at, layer in enumerate(layers):
                change = reading.matrix(layer) - original[layer]
                U, s, V = np.linalg.svd(change, full_matrices=False)
                sigma = np.linalg.norm(original[layer], 2)
                above += (s[:4] > sigma).tolist()
                s = np.where(s > sigma, sigma + np.log(s / sigma), s)
                reading.add(layer, (U * s) @ V - change)
                np.testing.assert_allclose(
                    kept[:, at].T @ directions[:, at], (U * s) @ V, atol=1e-9
                )
            assert set(above) == {False, True}
        for layer in layers:
            change = reading.matrix(layer) - original[layer]
            error = np.linalg.norm(weight_of(model, layer) - original[layer] - change)
            assert error <= 1e-6 * np.linalg.norm(change)
        # Facts move by d_i^T k_j delta_i at the first layer, whose keys no edit changes.
        if method != "rect" and not editor.afterwards.limited:
            keys = sources.keys.keys_of(layers[0])
            moved = sum((keys @ along[:, 0].T) @ deltas[:, 0] for deltas, along, _ in found)
            change = weight_of(model, layers[0]) - original[layers[0]]
            np.testing.assert_allclose(moved, keys @ change.T, atol=1e-9)
        written.restore()
        for layer in layers:
            assert np.array_equal(weight_of(model, layer), original[layer])


# What published code did on the embedded model


@pytest.fixture(scope="module")
def peers(shared_data: Path) -> Path:
    found = shared_data / "peers"
    if not found.exists():
        pytest.skip("shared/data/peers is not beside the checkout")
    return found


@pytest.fixture(scope="module")
def four_facts(peers: Path, measured_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C of the embedded model, and keys and P of the four facts that were edited."""
    folder = tmp_path_factory.mktemp("peers") / "tiny"
    folder.mkdir()
    shutil.copy(measured_tiny / "cov.h5", folder)
    of_run = json.loads((peers / "memit-A.json").read_text())["facts"]
    records = [{**fact, "case_id": fact["line_of_facts_jsonl"]} for fact in of_run]
    facts = folder / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "contexts.txt").write_text("\n".join(contexts_of(peers, "memit")))
    (folder / "bare.txt").write_text("{}\n")
    for command in (("extract", "--facts", facts, "--dtype", "float32"), ("pmatrix",)):
        done = kscli(*command, "--dir", folder.parent, "-q")
        assert done.exit_code == 0, done.stderr
    return folder


def contexts_of(peers: Path, name: str) -> list[str]:
    found = json.loads((peers / f"{name}-A.json").read_text())["context_templates"]
    return [text for each in found for text in ([each] if isinstance(each, str) else each)]


# Their names, and the options of `kscli edit` that say the same. The guide `edits` has these.
LIGHT = ("--layers", "0-1", "--steps", 20, "--weight", 100)
PEERS: dict[str, tuple[Any, ...]] = {
    "rome-original": ("--method", "rome", "--layer", 0),
    "rome-original-early": (
        *("--method", "rome", "--layer", 0, "--steps", 40, "--weight-decay", 0.001),
    ),
    "rome-easyedit": ("--method", "rome-identity", "--layer", 0),
    "r-rome-easyedit": ("--method", "r-rome-identity", "--layer", 0),
    "r-rome-easyedit-c": ("--method", "r-rome", "--layer", 0),
    "memit": ("--method", "memit", "--layers", "1-2", "--steps", 20, "--weight", 20000),
    "memit-light": ("--method", "memit", *LIGHT),
    "memit-seq": ("--method", "memit-seq", *LIGHT),
    "emmet": ("--method", "emmet", "--layer", 1, "--weight", 1000),
    "pmet": ("--method", "pmet", "--layers", "1-2"),
    "pmet-light": ("--method", "pmet", "--layers", "0-1", "--weight", 10),
    "alphaedit": ("--method", "alphaedit", "--layers", "1-2", "--steps", 20),
    "alphaedit-light": (
        *("--method", "alphaedit", "--layers", "0-1", "--steps", 20, "--weight", 0.1),
    ),
    "rect": ("--method", "rect", *LIGHT),
    "prune": ("--method", "prune", *LIGHT),
}


class Peer:
    """A run of published code: its facts by number, from 0, its batches, values and changes."""

    def __init__(self, folder: Path, name: str) -> None:
        about = json.loads((folder / f"{name}-A.json").read_text())
        self.arrays = np.load(folder / f"{name}-A.npz")
        self.batches = [[number - 1 for number in batch] for batch in about["order"]]
        self.layers: list[int] = about["hyper_parameters"]["layers"]
        self.name = name

    def change(self, layer: int) -> Array:
        """What it added to W; of the run that keeps factors only, their product."""
        if f"delta_w_layer{layer}" in self.arrays:
            found = self.arrays[f"delta_w_layer{layer}"]
        else:
            found = self.arrays["right"].T @ self.arrays["u"]
        return np.asarray(found, dtype=np.float64)

    def values(self, number: int) -> Array:
        """The values of a batch that it reached: v or z."""
        for name in (f"z_batch{number + 1}", "z_mlp", "z"):
            if name in self.arrays:
                return np.asarray(self.arrays[name], dtype=np.float64)
        return np.asarray(self.arrays["v_star"][[number]], dtype=np.float64)


def relative_error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def options_of(arguments: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@pytest.mark.parametrize("name", PEERS)
def test_their_values_are_written_as_they_wrote_them(
    name: str, peers: Path, four_facts: Path
) -> None:
    peer, given = Peer(peers, name), options_of(PEERS[name])
    editor = find_editor(given["--method"])
    weight = given.get("--weight", editor.direction.weight or 0.0)
    with ExitStack() as stack:
        sources = sources_of(four_facts, stack, peer.layers)
        model = fresh_tiny()
        prompts = locate_keys(model.tokenizer, sources.pm.facts)
        written = edited_layers(model, sources, editor, WriteOptions(weight=weight))
        contexts = () if name.endswith("early") else contexts_of(peers, "memit")[1:]
        written.prepare(contexts, SILENT)
        original = {layer: weight_of(model, layer) for layer in peer.layers}
        made = []
        for number, batch in enumerate(peer.batches):
            values = peer.values(number)
            if not editor.value.reach:
                values = values - mlp_outputs(model, peer.layers[-1], [prompts[i] for i in batch])
            made.append(written.write(batch, values))
        if editor.afterwards.limited:
            both = (np.concatenate([each[at] for each in made]) for at in (0, 1))
            written.limit(*both)
        for layer in peer.layers:
            found = weight_of(model, layer) - original[layer]
            assert relative_error(found, peer.change(layer)) < 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_the_command_line_alone_does_what_they_did(
    name: str, peers: Path, four_facts: Path, tmp_path: Path
) -> None:
    """Values found at their hyper-parameters and in their contexts; what is on file is replayed."""
    peer, path = Peer(peers, name), tmp_path / "run.h5"
    arguments = [*PEERS[name], "--dir", four_facts.parent, "--moved", 1, "-o", path, "-q"]
    arguments += ["--preset", "none"]
    contexts = "bare.txt" if name.endswith("early") else "contexts.txt"
    arguments += ["--contexts", four_facts / contexts]
    if find_editor(options_of(PEERS[name])["--method"]).at_once:
        arguments += ["--batch", len(peer.batches[0])]
    for fact in (number for batch in peer.batches for number in batch):
        arguments += ["--fact", fact]
    done = kscli("edit", *arguments)
    assert done.exit_code == 0, done.stderr
    model = fresh_tiny()
    original = {layer: weight_of(model, layer) for layer in peer.layers}
    with EditsFile(path) as file:
        replay_edits(model, file)
    for layer in peer.layers:
        found = weight_of(model, layer) - original[layer]
        assert relative_error(found, peer.change(layer)) < (2e-2 if name == "rect" else 1e-3)


# Runs


def deltas_of(path: Path) -> Array:
    with EditsFile(path) as file:
        return file.values("delta")


def test_wilke_edits_at_the_layer_that_rome_would_change_least(
    measured_tiny: Path, tmp_path: Path
) -> None:
    how = ("edit", "--dir", measured_tiny.parent, "--fact", 3, "--contexts", 2, "--steps", 5, "-q")
    how += ("--preset", "none")
    changes, W = [], [weight_of(fresh_tiny(), layer) for layer in range(3)]
    for layer in range(3):
        path = tmp_path / f"{layer}.h5"
        done = kscli(*how, "--method", "rome", "--layer", layer, "-o", path)
        assert done.exit_code == 0, done.stderr
        with EditsFile(path) as file:
            changes.append(file.values("delta")[0, 0][:, None] * file.values("direction")[0, 0])
    done = kscli(*how, "--method", "wilke", "--layers", "0-2", "-o", tmp_path / "wilke.h5")
    assert done.exit_code == 0, done.stderr
    relative = [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(changes, W, strict=True)]
    least = int(np.argmin(relative))
    with EditsFile(tmp_path / "wilke.h5") as file:
        for at in range(3):
            found = file.values("delta")[0, at][:, None] * file.values("direction")[0, at]
            np.testing.assert_allclose(found, changes[at] if at == least else 0, atol=1e-12)


def test_prune_limits_the_spectrum_even_if_the_last_edit_is_kept_out(
    measured_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks the limited model for all facts."""
    how = ("edit", "--dir", measured_tiny.parent, "--method", "prune", "--layer", 1, "--weight", 1)
    how += ("--value", "random", "--value-norm", 60, "--contexts", 0, "--measure-every", 1, "-q")
    two = ("--fact", 3, "--fact", 40)
    assert kscli(*how, *two, "-o", tmp_path / "two.h5").exit_code == 0
    original = EditRun._value

    def value(self: EditRun, number: int, edit: Edit) -> Array:
        if number == 2:
            raise DivergedError("the loss is NaN")
        return original(self, number, edit)

    monkeypatch.setattr(EditRun, "_value", value)
    assert kscli(*how, *two, "--fact", 17, "-o", tmp_path / "three.h5").exit_code == 0
    limited = deltas_of(tmp_path / "two.h5")
    np.testing.assert_allclose(deltas_of(tmp_path / "three.h5"), limited, atol=1e-12)
    assert np.linalg.norm(limited[0]) < 50
    with EditsFile(tmp_path / "two.h5") as a, EditsFile(tmp_path / "three.h5") as b:
        assert b.values("step").tolist() == [0, 1, 2]
        np.testing.assert_allclose(
            a.values("logprob_true")[-1], b.values("logprob_true")[-1], atol=1e-6
        )


def test_without_lambda_one_key_cannot_have_two_values(measured_tiny: Path, tmp_path: Path) -> None:
    """Up to the subject two prompts are one text, so their keys are one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    shutil.copy(measured_tiny / "cov.h5", folder)
    records = [
        {"prompt": prompt, "subject": "Japan", "target": "Asia", "target_new": "Europe"}
        for prompt in ("{} is on the continent of", "{} is a country of")
    ]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    for command in (("extract", "--facts", folder / "facts.jsonl"), ("pmatrix",)):
        assert kscli(*command, "--dir", tmp_path, "-q").exit_code == 0
    how = ("edit", "--dir", tmp_path, "--method", "emmet", "--layer", 1, "--edits", "all", "-q")
    how += ("--batch", 2, "--contexts", 1, "--steps", 3)
    refused = kscli(*how, "--weight", 0)
    assert refused.exit_code == 1
    assert "2 keys are not independent" in one_sentence(refused.stderr)
    assert "with a --weight above 0" in one_sentence(refused.stderr)
    assert kscli(*how).exit_code == 0


# Null spaces


@pytest.fixture
def spectrum() -> Array:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    found: Array = basis @ np.diag([0.001, 0.01, 0.1, 1.0, 2.0, 3.0]) @ basis.T
    return found


@pytest.mark.parametrize(
    ("cut", "kept"), [(Cut(0.02), 2), (Cut(0.5), 3), (Cut(0.5, relative=True), 3), (Cut(1.5), 4)]
)
def test_a_null_space_projects_on_small_singular_values(
    spectrum: Array, cut: Cut, kept: int
) -> None:
    U, _, _ = np.linalg.svd(spectrum)
    Pi = U[:, 6 - kept :] @ U[:, 6 - kept :].T
    space = null_space(spectrum.copy(), cut)
    keys = np.random.default_rng(1).standard_normal((4, 6))
    np.testing.assert_allclose(space.solve(space.whiten(keys)), keys @ Pi, atol=1e-12)
    # A relative cut does not depend on the scale of C.
    scaled = null_space(7 * spectrum, cut if cut.relative else Cut(7 * cut.size))
    assert scaled.basis.shape == space.basis.shape == (6, kept)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Cut(1e-4), "empty .* 0.001 to 3: raise --null-space"),
        (Cut(4.0), "everything .* lower --null-space"),
        (Cut(1e-6, relative=True), "empty .* raise --relative-null-space"),
    ],
)
def test_a_null_space_that_is_nothing_or_everything(spectrum: Array, cut: Cut, words: str) -> None:
    with pytest.raises(NumericsError, match=words):
        null_space(spectrum, cut)


@pytest.mark.parametrize(
    ("option", "size", "limit"),
    [("--null-space", 0.05, 0.05), ("--relative-null-space", 0.5, 36.862109 / 512 / 2)],
)
def test_alphaedit_writes_in_the_null_space_that_was_asked_for(
    option: str, size: float, limit: float, measured_tiny: Path, tmp_path: Path
) -> None:
    """The trace of C at layer 1 is 36.862109."""
    path = tmp_path / "a.h5"
    how = ("--method", "alphaedit", "--layer", 1, "--fact", 3, "--value", "random")
    done = kscli("edit", "--dir", measured_tiny.parent, *how, option, size, "-q", "-o", path)
    assert done.exit_code == 0, done.stderr
    with CovarianceFile(measured_tiny / "cov.h5") as cov, EditsFile(path) as file:
        U, s, _ = np.linalg.svd(cov.second_moment(1))
        direction = file.values("direction")[0, 0]
    inside = U[:, s < limit].T @ direction
    assert np.linalg.norm(inside) == pytest.approx(np.linalg.norm(direction), rel=1e-9)
    # Up to the cut: nothing of the space is left out.
    edge = U[:, s < limit][:, 0] @ direction
    assert abs(edge) > 1e-6 * np.linalg.norm(direction)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--null-space", "1e-9"), 1, "its null space is empty"),
        (("--null-space", "1e9"), 1, "its null space is everything"),
        (("--null-space", "1", "--relative-null-space", "1"), 2, "are two cuts; give one"),
        (("--method", "memit", "--null-space", "1"), 2, "no effect without --method alphaedit"),
        (("--keep", "0.2"), 2, "no effect without --method rect"),
        (("--contexts", "nowhere.txt"), 1, "nowhere.txt cannot be read"),
    ],
)
def test_bad_requests(
    measured_tiny: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    how = ("--layer", 1, "--edits", 1, "-o", tmp_path / "a.h5")
    if "--method" not in arguments:
        how = ("--method", "alphaedit", *how)
    found = kscli("edit", "--dir", measured_tiny.parent, *how, *arguments)
    assert found.exit_code == code, found.stderr
    assert sentence in one_sentence(found.stderr)
    assert list(tmp_path.iterdir()) == []
