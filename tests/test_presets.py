"""Published settings: which are found for a model, what they change, and `kscli editors`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_kit import kscli, one_sentence

from kscli.editing import presets
from kscli.editing.editors import EDITORS, EIGHTH_TO_QUARTER, FIRST_HALF, SIXTH, Depth, find_editor
from kscli.editing.edits_file import EditsFile
from kscli.editing.presets import PRESETS, Preset, default_layers, preset_for, presets_of
from kscli.layers import format_layers, select_layers
from kscli.models.aliases import find_alias


@pytest.mark.parametrize(
    ("method", "model", "layers", "steps", "rate", "decay", "kl", "limit", "weight"),
    [
        ("rome", "gpt2-xl", "17", 20, 0.5, 0.5, 0.0625, 4, None),
        ("memit", "gpt-j", "3-8", 25, 0.5, 0.5, 0.0625, 0.75, 15000),
        ("memit", "EleutherAI/gpt-j-6b", "3-8", 25, 0.5, 0.5, 0.0625, 0.75, 15000),
        ("rect", "meta-llama/Meta-Llama-3-8B", "4-8", 25, 0.1, 0.5, 0.0625, 0.75, 15000),
        ("r-rome-identity", "mistral-7b", "5", 25, 0.5, 0.001, 0.0625, 4, None),
        ("emmet", "gpt2-xl", "17", 20, 0.5, 0.5, 0.0625, 0.75, 1000),
        ("pmet", "gpt-j", "3-8", 30, 0.2, 0.5, 1, 0.75, 6000),
        ("alphaedit", "Qwen/Qwen2.5-7B", "4-8", 25, 0.5, 0.001, 0.0625, 4, 1),
        ("wilke", "gpt-j", "0-6", 20, 0.5, 0.5, 0.0625, 4, None),
    ],
)
def test_the_settings_of_their_files(
    method: str,
    model: str,
    layers: str,
    steps: int,
    rate: float,
    decay: float,
    kl: float,
    limit: float,
    weight: float | None,
) -> None:
    found = preset_for(method, model)
    assert found is not None
    assert found.layers == layers
    editor = found.apply(find_editor(method))
    value = editor.value
    assert (value.steps, value.learning_rate, value.weight_decay) == (steps, rate, decay)
    assert (value.kl_weight, value.norm_limit) == (kl, limit)
    assert editor.direction.weight == weight
    # What makes the editor what it is stays.
    own = find_editor(method)
    assert replace(editor, value=own.value, direction=own.direction) == own
    assert (value.site, value.reach, value.attention) == (
        *(own.value.site, own.value.reach, own.value.attention),
    )


def test_every_line_is_of_editors_and_of_a_model_that_has_the_layers() -> None:
    for preset in PRESETS:
        assert set(preset.methods) <= set(EDITORS)
        last = max(select_layers(preset.layers, range(preset.n_layers), preset.model))
        assert last < preset.n_layers - 1
        alias = find_alias(preset.model)
        assert alias is None or (alias.layers, alias.d_m) == (preset.n_layers, preset.d_m)
        for method in preset.methods:
            editor = find_editor(method)
            assert (preset.weight is None) == (editor.direction.weight is None)
            assert "-" not in preset.layers or editor.over_layers
    for method in EDITORS:
        several = [preset for preset in PRESETS if method in preset.methods]
        assert len(presets_of(method)) == len(several)


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (SIXTH, {1: "0", 2: "0", 4: "1", 12: "2", 28: "5", 32: "5", 48: "8"}),
        (EIGHTH_TO_QUARTER, {1: "0", 4: "0-1", 12: "2-3", 28: "4-7", 32: "4-8", 48: "6-12"}),
        (FIRST_HALF, {1: "0", 2: "0", 4: "0-2", 12: "0-6", 48: "0-24"}),
    ],
)
def test_default_layers_are_shares_of_the_depth(depth: Depth, expected: dict[int, str]) -> None:
    assert {n: format_layers(depth.layers(n)) for n in expected} == expected


@pytest.fixture
def of_tiny(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Settings for the embedded model, as if they had been published."""
    search = {"steps": 3, "learning_rate": 0.1, "weight_decay": 0.2, "kl_weight": 0.3}
    found = Preset(
        methods=("memit",),
        model="tiny",
        hub_id="",
        n_layers=4,
        d_m=512,
        layers="1-2",
        search=search | {"norm_limit": 0.4},
        weight=7.0,
        source="nowhere",
    )
    monkeypatch.setattr(presets, "PRESETS", (*PRESETS, found))
    return found


def settings_of(path: Path) -> dict[str, Any]:
    with EditsFile(path) as file:
        recipe = file.about.recipe
    return {**recipe["find"], "layers": recipe["layers"], "weight": recipe["write"]["weight"]}


@pytest.mark.usefixtures("of_tiny")
def test_a_model_is_edited_with_the_settings_published_for_it(
    measured_tiny: Path, tmp_path: Path
) -> None:
    command = ("edit", "--dir", measured_tiny.parent, "--method", "memit", "--edits", 1)
    for name, more, expected in (
        ("own", (), {"layers": "1-2", "steps": 3, "weight_decay": 0.2, "weight": 7.0}),
        ("given", ("--layer", 1, "--steps", 4), {"layers": "1", "steps": 4, "weight": 7.0}),
        ("none", ("--preset", "none"), {"layers": "0-1", "steps": 25, "weight": 15000.0}),
    ):
        path = tmp_path / f"{name}.h5"
        done = kscli(*command, *more, "--contexts", 0, "-o", path)
        assert done.exit_code == 0, done.stderr
        found = settings_of(path)
        assert {key: found[key] for key in expected} == expected
        said = " ".join(done.stderr.split())
        assert ("settings published for tiny: nowhere" in said) == (name != "none")
        assert ("--layer names another" in said) == (name != "given")
    assert "memit edits layer 0-1, an eighth to a quarter of the depth" in said


def test_most_edits_of_tiny_take_with_what_is_set_for_it(
    measured_tiny: Path, tmp_path: Path
) -> None:
    command = ("edit", "--dir", measured_tiny.parent, "--edits", 8, "--moved", 1)
    path = tmp_path / "edits.h5"
    done = kscli(*command, "--generations", 0, "-f", "json", "-o", path)
    assert done.exit_code == 0, done.stderr
    took = [row["rank_new_after"] == 1 for row in json.loads(done.stdout)]
    assert sum(took) > len(took) / 2
    with EditsFile(path) as file:
        assert file.about.recipe["layers"] == "0"
        assert file.about.recipe["find"]["contexts"] == []


@dataclass
class Holds:
    """A file of a model of 12 layers that holds some of them."""

    layers: tuple[int, ...]
    path: str = "pmatrix.h5"
    about: Any = field(default_factory=lambda: SimpleNamespace(n_layers=12))


@pytest.mark.parametrize(
    ("method", "held", "chosen"),
    [
        ("rome", range(12), "2"),
        ("rome", (0, 3, 11), "3"),
        ("rome", (0, 9), "0"),
        ("memit", range(12), "2-3"),
        ("memit", (0, 3, 11), "3"),
        ("memit", (0, 11), "0"),
    ],
)
def test_default_layers_are_those_that_the_file_holds(
    method: str, held: Sequence[int], chosen: str
) -> None:
    layers, why = default_layers(find_editor(method), None, Holds(tuple(held)))  # type: ignore[arg-type]
    assert layers == chosen
    assert ("by what pmatrix.h5 holds" in why) == (len(held) < 12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--preset", "gpt-j"), "gpt-j is for a model of 28 layers and d_m 16,384, and tiny has 4"),
        (("--preset", "gpt-i"), "there is no preset of memit 'gpt-i'; did you mean gpt-j?"),
    ],
)
def test_a_preset_of_another_model(
    measured_tiny: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    how = ("--method", "memit", "--edits", 1, "-o", tmp_path / "a.h5")
    found = kscli("edit", "--dir", measured_tiny.parent, *how, *arguments)
    assert found.exit_code == 2
    assert sentence in one_sentence(found.stderr)


def test_an_alias_whose_files_are_of_another_model(measured_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(measured_tiny, tmp_path / "gpt-j")
    found = kscli("edit", "-m", "gpt-j", "--dir", tmp_path, "--method", "memit", "--edits", 1)
    assert found.exit_code == 2
    assert "the preset gpt-j is for a model of 28 layers" in one_sentence(found.stderr)


def test_editors_are_listed_with_what_they_need() -> None:
    rows = json.loads(kscli("editors", "-f", "json").stdout)
    assert [row["method"] for row in rows] == list(EDITORS)
    by_name = {row["method"]: row for row in rows}
    assert by_name["memit"]["presets"][:2] == ["gpt2-xl", "gpt-j"]
    assert by_name["rome-identity"]["needs"] == "nothing of C"
    assert by_name["alphaedit"]["needs"] == "C and its singular vectors, earlier keys"
    # 20 contexts, the bare prompt and the text of the KL term.
    assert (by_name["rome"]["passes"], by_name["rome"]["texts"]) == (20, 22)
    for output in ("table", "csv", "markdown"):
        assert all(name in kscli("editors", "-f", output).stdout for name in EDITORS)


def test_settings_of_an_editor_are_listed() -> None:
    own, *published = json.loads(kscli("editors", "memit", "-f", "json").stdout)
    assert own["model"] is None
    assert own["layers"] == "an eighth to a quarter of the depth"
    (gpt_j,) = [row for row in published if row["model"] == "gpt-j"]
    assert (gpt_j["layers"], gpt_j["steps"], gpt_j["weight"]) == ("3-8", 25, 15000.0)
    assert "kmeng01/memit" in kscli("editors", "memit").stdout
    wrong = kscli("editors", "memitt")
    assert wrong.exit_code == 2
    assert "did you mean memit?" in one_sentence(wrong.stderr)
