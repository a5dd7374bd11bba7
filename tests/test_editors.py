"""Editors: what each does follows from its four choices; a new one is a module and a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from naive import Array, keys_of_text, subject_last
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.editors import EDITORS, find_editor
from kscli.editing.edits_file import EditsFile
from kscli.tiny import MODEL_DIR

# ROME without C, as EasyEdit's settings have it: d = k / k^T k.
TOY = """
from dataclasses import replace
from kscli.editing.editors import Direction
from kscli.editing.editors.closed_form import EDITOR as CLOSED_FORM

EDITOR = replace(
    CLOSED_FORM, title="TOY: without C", direction=Direction("identity"), predicted=False
)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new editor: one module, and one line in the registry."""
    (tmp_path / "toy_editor.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EDITORS, "toy", "toy_editor")
    return "toy"


def objects(*arguments: str | int | Path) -> list[dict[str, Any]]:
    return objects_of(kscli(*arguments, "-f", "json", "-q"))


def objects_of(done: Any) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_new_editor_is_known_to_every_command(
    toy: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """`edit` writes along its direction; `verify`, `report` and `risk` name it and take it."""
    root, path = measured_tiny.parent, tmp_path / "toy.h5"
    how = ("--fact", 3, "--value", "random", "--target-new", "text:Rome", "-o", path)
    (row,) = objects("edit", "--dir", root, "--method", toy, "--layer", 1, *how)
    assert row["method"] == toy
    with EditsFile(path) as file, KeysFile(measured_tiny / "keys.h5") as keys:
        key = keys.keys_of(1)[3]
        direction = file.values("direction")[0, 0]
    assert np.allclose(direction, key / (key @ key), rtol=1e-12)
    (verified,) = objects("verify", path)
    assert verified["method"] == toy
    assert verified["linear_error"] < 1e-9
    made = tmp_path / "pmatrix.h5"
    arguments = ("--cov", measured_tiny / "cov.h5", "--keys", measured_tiny / "keys.h5")
    assert kscli("pmatrix", *arguments, "--editor", toy, "-o", made, "-q").exit_code == 0
    risk = objects("risk", "--pmatrix", made, "--layer", 1, "--fact", 3, "-k", "all")
    with KeysFile(measured_tiny / "keys.h5") as keys:
        expected = keys.keys_of(1) @ direction
    found = [each["p"] for each in risk]
    assert np.allclose(found, [expected[each["j"]] for each in risk], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", EDITORS)
def test_every_shift_of_one_layer_is_known_before_the_edit(
    method: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """By the edits' directions, whatever the editor; not where the change is altered afterwards."""
    path = tmp_path / "edits.h5"
    how = ["--layer", 1, "--edits", 6, "--value", "random", "--contexts", 0, "-o", path]
    if find_editor(method).direction.weight is not None:
        how += ["--weight", 1]  # the published: changes near float32 rounding
    objects("edit", "--dir", measured_tiny.parent, "--method", method, *map(str, how))
    with EditsFile(path) as file:
        linear, live = file.values("linear_error"), file.values("live_error")
    assert len(linear) == 6
    if method in ("rect", "prune"):
        assert np.isnan(linear).all()
    else:
        assert linear.max() < 1e-9
        assert live.max() < 1e-4


@pytest.mark.usefixtures("no_pictures")
def test_a_report_names_a_new_editor(toy: str, measured_tiny: Path, tmp_path: Path) -> None:
    """The page of a model whose runs are of an editor that the report's code never heard of."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for kind in ("cov", "keys", "pmatrix"):
        (folder / f"{kind}.h5").symlink_to(measured_tiny / f"{kind}.h5")
    how = ("--edits", 2, "--value", "random", "--dir", tmp_path)
    assert kscli("edit", "--method", toy, *how, "-q").exit_code == 0
    page = kscli("report", "--dir", tmp_path, "-q")
    assert page.exit_code == 0, page.stderr
    text = Path(page.stdout.strip()).read_text()
    assert "toy" in text


def naive_keys(method: str, bare: Array, others: Array, n: int) -> tuple[Array, Array]:
    """The key along which an editor writes, and the one at which, as their papers' code has it."""
    mean = (bare + n * others) / (n + 1)
    half = bare / 2 + others / 2
    of_rome = dict.fromkeys(("closed-form", "joint"), (bare, bare))
    of_rome |= dict.fromkeys(("r-rome", "r-rome-identity"), (mean, mean))
    of_rome |= dict.fromkeys(("rome", "rome-identity", "wilke"), (mean, bare))
    return of_rome.get(method, (half, half))


@pytest.mark.parametrize("method", EDITORS)
def test_p_of_an_editor_is_how_far_its_edit_of_one_fact_moves_the_others(
    method: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """d_i^T k_j = along_i^T M k_j / (lambda + along_i^T M at_i), M written out in float64."""
    direction = find_editor(method).direction
    made = tmp_path / "pmatrix.h5"
    arguments = ("--cov", measured_tiny / "cov.h5", "--keys", measured_tiny / "keys.h5")
    done = kscli("pmatrix", *arguments, "--editor", method, "--layers", "0", "-o", made, "-q")
    assert done.exit_code == 0, done.stderr
    with (
        CovarianceFile(measured_tiny / "cov.h5") as cov,
        KeysFile(measured_tiny / "keys.h5") as keys,
        PMatrixFile(made) as file,
        PMatrixFile(measured_tiny / "pmatrix.h5") as papers,
    ):
        K, C = keys.keys_of(0), cov.second_moment(0)
        along, at = naive_keys(method, K, keys.context_keys_of(0), len(keys.contexts))
        found = file.matrix("P", 0)
        of_paper = papers.matrix("whitened_cosine", 0)
        assert np.allclose(file.matrix("whitened_cosine", 0), of_paper, atol=1e-6)
        own = method not in ("closed-form", "joint")
        shown = f"tiny, p of {method}" if own else "tiny"
        assert file.model == shown
    values, vectors = np.linalg.eigh(C)
    null = vectors[:, values < 0.02]
    M = {
        "second-moment": np.linalg.pinv(C, hermitian=True, rcond=1e-14),
        "identity": np.eye(len(C)),
        "null-space": null @ null.T,
    }[direction.metric]
    gains = np.einsum("id,de,ie->i", along, M, at)
    naive = along @ M @ K.T / ((direction.weight or 0.0) + gains)[:, None]
    assert np.allclose(found, naive, atol=1e-4 * np.abs(naive).max())


def test_keys_in_contexts_are_means_of_a_plain_models(measured_tiny: Path) -> None:
    """By a hook of torch's own, one text after the other, in float64."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    with KeysFile(measured_tiny / "keys.h5") as keys:
        assert 15 < len(keys.contexts) <= 20  # of 20 made up, those that differ
        for index in (0, 17, 95):
            fact = keys.facts[index]
            found = []
            for context in keys.contexts:
                before = context.replace("{}", fact.prompt)
                start = before.index("{}")
                text = before.replace("{}", fact.subject)
                ids, at = subject_last(tokenizer, text, start, start + len(fact.subject))
                found.append(keys_of_text(model, ids, ["transformer.h.2.mlp.c_proj"]))
                found[-1] = found[-1]["transformer.h.2.mlp.c_proj"][at]
            mean = np.mean(found, axis=0)
            error = np.abs(keys.context_keys_of(2)[index] - mean).max()
            assert error < 1e-5 * np.abs(mean).max()


@pytest.mark.parametrize("method", ["rome", "r-rome-identity", "memit"])
def test_p_of_an_editor_is_that_of_its_edit(
    method: str, measured_tiny: Path, tmp_path: Path
) -> None:
    """The row of pmatrix-EDITOR.h5 is d^T k_j of the edit that the editor really makes."""
    texts, edits, made = (tmp_path / name for name in ("contexts.txt", "edits.h5", "p.h5"))
    with KeysFile(measured_tiny / "keys.h5") as keys:
        texts.write_text("\n".join(keys.contexts), encoding="utf-8")
        K = keys.keys_of(1)
        arguments = ("--cov", measured_tiny / "cov.h5", "--keys", keys.path, "--editor", method)
        assert kscli("pmatrix", *arguments, "-o", made, "-q").exit_code == 0
    how = ("--layer", 1, "--fact", 5, "--value", "random", "--contexts", texts, "-o", edits)
    objects("edit", "--dir", measured_tiny.parent, "--method", method, *how)
    with EditsFile(edits) as run, PMatrixFile(made) as file:
        expected = K @ run.values("direction")[0, 0]
        found = file.matrix("P", 1)[5]
    assert np.allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_p_of_an_editor_is_asked_for_by_its_name(measured_tiny: Path, tmp_path: Path) -> None:
    """`pmatrix --editor` makes a file that the others find; without it they name the command."""
    for kind in ("cov", "keys", "pmatrix"):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / f"{kind}.h5").symlink_to(measured_tiny / f"{kind}.h5")
    place = ("--dir", tmp_path)
    absent = kscli("topk", "--editor", "rome", *place)
    assert absent.exit_code == 1
    assert "kscli pmatrix --model tiny --editor rome" in one_sentence(absent.stderr)
    made = kscli("pmatrix", "-m", "tiny", "--editor", "rome", *place)
    assert made.exit_code == 0, made.stderr
    with KeysFile(measured_tiny / "keys.h5") as keys:
        assert f"over {len(keys.contexts)} contexts" in made.stderr
    (row,) = objects_of(kscli("topk", "--editor", "rome", "-k", 1, "-f", "json", *place))
    assert row["model"] == "tiny, p of rome"
    (papers,) = objects_of(kscli("topk", "-k", 1, "-f", "json", *place))
    assert papers["model"] == "tiny"
    assert (papers["i"], papers["j"], papers["p"]) != (row["i"], row["j"], row["p"])
    assert (
        "The largest p at layer 0: tiny, p of rome"
        in kscli("topk", "--editor", "rome", *place).stdout
    )
    table = kscli("stats", "--editor", "rome", "--repeats", 100, *place).stdout
    assert "layer by layer: tiny, p of rome" in table
    assert (tmp_path / "tiny" / "stats-rome.h5").exists()
    assert not (tmp_path / "tiny" / "stats.h5").exists()
    figure = kscli("plot", "heatmap", "--editor", "rome", *place)
    assert figure.stdout.strip().endswith("heatmap-rome.png")
    risk = kscli("risk", "--editor", "rome", "--layer", 0, *place).stdout
    assert "by p of rome" in risk
    assert "the least there is" not in risk  # proved of the paper's P alone
    both = kscli("topk", "--editor", "rome", "--pmatrix", tmp_path / "tiny" / "pmatrix.h5")
    assert both.exit_code == 2
    idle = kscli("pmatrix", "--editor", "rome", "--weight", 3, "--force", *place)
    assert idle.exit_code == 2
    assert "--weight" in one_sentence(idle.stderr)


def test_p_of_an_editor_of_means_needs_keys_in_contexts(
    measured_tiny: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "keys.h5"
    how = ("--dtype", "float32", "--count", 8, "--contexts", 0, "-o", bare, "-q")
    assert kscli("extract", *how).exit_code == 0
    arguments = ("--cov", measured_tiny / "cov.h5", "--keys", bare, "-o", tmp_path / "p.h5")
    refused = kscli("pmatrix", *arguments, "--editor", "rome")
    assert refused.exit_code == 1
    assert "kscli extract --contexts" in one_sentence(refused.stderr)
    assert not (tmp_path / "p.h5").exists()
    assert kscli("pmatrix", *arguments, "--editor", "closed-form", "-q").exit_code == 0


@pytest.mark.parametrize("command", ["edit", "risk"])
def test_an_unknown_editor_is_named_with_those_there_are(command: str, measured_tiny: Path) -> None:
    option = "--editor" if command == "risk" else "--method"
    found = kscli(command, "--dir", measured_tiny.parent, option, "romee")
    assert found.exit_code == 2
    sentence = one_sentence(found.stderr)
    assert "romee" in sentence
    assert all(name in sentence for name in EDITORS)


def test_no_code_but_the_registry_tells_editors_apart() -> None:
    """`method ==`, or an editor's name as a value, stands in no other module."""
    package = Path(__file__).parent.parent / "kscli"
    own = package / "editing" / "editors"
    # The layouts of other people's files bear the names of their editors.
    files = {package / "second_moment" / "interchange.py", package / "cli" / "export_cov.py"}
    for path in package.rglob("*.py"):
        if own not in path.parents and path not in files:
            text = path.read_text()
            assert "method ==" not in text, path
            assert not [name for name in EDITORS if f'"{name}"' in text], path
