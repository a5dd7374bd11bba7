"""What every kind of file must hold, field by field as the schema declares it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import h5py
import numpy as np
import pytest
from artifact_kit import LAYERS, Contents, changed, write_toy
from cli_kit import kscli, one_sentence
from edit_kit import Run

from kscli.analysis.stats_file import StatisticsFile, statistics_of
from kscli.artifacts import (
    SCHEMAS,
    UNKNOWN,
    Artifact,
    CovarianceAbout,
    CovarianceFile,
    Existing,
    KeysFile,
    PMatrixFile,
    write_artifact,
)
from kscli.artifacts.schema import (
    MAY_BE_EMPTY,
    Stamp,
    datasets_of,
    described,
    from_attributes,
    to_attributes,
)
from kscli.cli.commands import COMMANDS
from kscli.editing.edits_file import EditsFile
from kscli.errors import ArtifactError
from kscli.tiny import MODEL_DIR

READERS: dict[str, Callable[[Path], Artifact]] = {
    "cov": CovarianceFile,
    "keys": KeysFile,
    "pmatrix": PMatrixFile,
    "stats": StatisticsFile,
    "edits": EditsFile,
}
ATTRIBUTES = [
    (kind, each)
    for kind, of in SCHEMAS.items()
    for cls in (Stamp, of.about)
    for each in fields(cls)
]
DATASETS = [(kind, name) for kind in SCHEMAS for name in SCHEMAS[kind].datasets]
WRONG: tuple[Any, ...] = (3, 1.5, "three", "{", "[1]", True, [1, 2])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound file of every kind, about one toy model."""
    place = write_toy(tmp_path_factory.mktemp("sound"))
    with PMatrixFile(place / "pmatrix.h5") as pm:
        statistics_of(pm, LAYERS, place / "stats.h5", existing=Existing.REFUSE)
    Run(n=3, m=6).write(place / "edits.h5")
    return {kind: place / f"{kind}.h5" for kind in SCHEMAS}


def spoiled(path: Path, to: Path, change: Callable[[Contents], None]) -> Path:
    to.write_bytes(path.read_bytes())
    with changed(to) as file:
        change(file)
    return to


def require_refused(kind: str, name: str, path: Path) -> None:
    """The file is refused in one sentence that names it, what is wrong, and what to do."""
    for opened in (Artifact, READERS[kind]):
        with pytest.raises(ArtifactError) as raised:
            opened(path)
        said = str(raised.value)
        assert said.startswith(str(path))
        assert f" {name}" in said or name == "kind"
        assert said.endswith(("make it again.", "not one of kscli's."))
        assert said.count("\n") == 0


def allowed_types(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def test_every_kind_has_a_reader_and_all_of_it_a_meaning() -> None:
    assert READERS.keys() == SCHEMAS.keys()
    for kind in SCHEMAS:
        for name, meaning in described(kind).items():
            assert meaning, (kind, name)
            assert "\n" not in meaning


@pytest.mark.parametrize(("kind", "each"), ATTRIBUTES, ids=lambda x: getattr(x, "name", x))
def test_an_attribute_that_is_missing_or_wrong_is_named(
    kind: str, each: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    name, path = each.name, tmp_path / f"{kind}.h5"
    cls = Stamp if each in fields(Stamp) else SCHEMAS[kind].about
    hint = get_type_hints(cls)[name]
    allowed = allowed_types(hint)
    if each.default is None:
        spoiled(files[kind], path, lambda file: file.attrs.pop(name, None))
        with READERS[kind](path) as opened:
            assert getattr(opened.about, name) is None
    else:
        spoiled(files[kind], path, lambda file: file.attrs.pop(name))
        require_refused(kind, name, path)
    for value in WRONG:
        fits = type(value) in allowed or (type(value) is int and float in allowed)
        if fits and name != "kind":
            continue
        spoiled(files[kind], path, lambda file, value=value: file.attrs.__setitem__(name, value))
        require_refused(kind, name, path)
    spoiled(files[kind], path, lambda file: file.attrs.__setitem__(name, UNKNOWN))
    if types.NoneType in allowed:
        with READERS[kind](path) as opened:
            assert getattr(opened.about, name) is None
    elif str not in allowed or name == "kind":
        require_refused(kind, name, path)


@pytest.mark.parametrize(("kind", "name"), DATASETS)
def test_a_dataset_that_is_missing_or_wrong_is_named(
    kind: str, name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path, declared = tmp_path / f"{kind}.h5", SCHEMAS[kind].datasets[name]

    def remove(file: Contents) -> None:
        if name in file:
            del file[name]

    def replace(value: Any) -> Callable[[Contents], None]:
        def change(file: Contents) -> None:
            remove(file)
            file[name] = value

        return change

    spoiled(files[kind], path, remove)
    if declared.optional:
        with READERS[kind](path) as opened:
            assert name not in opened.datasets()
    else:
        require_refused(kind, name, path)
    shape = (2,) * (len(declared.axes) + 1)
    other = np.zeros(shape, "S1" if declared.dtype == "text" else declared.dtype)
    wrong = [other, "text" if declared.dtype != "text" else 1.5]
    if any(axis not in MAY_BE_EMPTY for axis in declared.axes) and not declared.optional:
        wrong.append(np.zeros((0,) * len(declared.axes), other.dtype))
    for value in wrong:
        spoiled(files[kind], path, replace(value))
        require_refused(kind, name, path)


def test_axes_of_one_name_must_have_one_length(files: dict[str, Path], tmp_path: Path) -> None:
    """Every declared axis that another dataset has, too, is one entry too long in turn."""
    for kind, of in SCHEMAS.items():
        axes = [axis for dataset in of.datasets.values() for axis in dataset.axes]
        with h5py.File(files[kind]) as file:
            held = {name: file[name].shape for name in of.datasets if name in file}
        for name, shape in held.items():
            dataset = of.datasets[name]
            for at, axis in enumerate(dataset.axes):
                if axes.count(axis) == 1 or name == "layer":
                    continue
                longer = tuple(length + (place == at) for place, length in enumerate(shape))

                def change(file: Contents, name: str = name, longer: Any = longer) -> None:
                    file[name] = np.zeros(longer, file[name].dtype)

                path = spoiled(files[kind], tmp_path / f"{kind}.h5", change)
                with pytest.raises(ArtifactError, match="is damaged or was not made by kscli: its"):
                    READERS[kind](path)


def test_the_statistics_that_the_recipe_names_are_declared(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with StatisticsFile(files["stats"]) as file:
        named = file.about.recipe["statistics"]
        assert set(file.datasets()) == {"layer", *named}
    for name in named:
        path = tmp_path / "stats.h5"
        spoiled(files["stats"], path, lambda file, name=name: file.__delitem__(name))
        require_refused("stats", name, path)
    for recipe in ("{}", '{"statistics": 3}', '{"statistics": [3]}'):
        spoiled(
            files["stats"],
            path,
            lambda file, recipe=recipe: file.attrs.__setitem__("recipe", recipe),
        )
        require_refused("stats", "recipe", path)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_all_that_is_written_is_declared(kind: str, files: dict[str, Path]) -> None:
    with READERS[kind](files[kind]) as file:
        declared = datasets_of(kind, file.about)
        assert set(file.datasets()) <= set(declared)
        assert {n for n, d in declared.items() if not d.optional} <= set(file.datasets())
        known = {each.name for cls in (Stamp, type(file.about)) for each in fields(cls)}
        assert set(file.attributes) <= known
        # What is written of the fields gives the fields back.
        assert from_attributes(type(file.about), to_attributes(file.about)) == file.about


def rewritten(kind: str, path: Path, to: Path, changed: str) -> str:
    """The fingerprint of a copy that is written anew, with another value in one dataset."""
    with READERS[kind](path) as file, h5py.File(path) as held:
        declared = datasets_of(kind, file.about)
        with write_artifact(to, file.kind, file.about, force=True) as writer:  # type: ignore[arg-type]
            writer.layers(file.layers)
            for name in declared:
                if name == "layer" or name not in held:
                    continue
                text = declared[name].dtype == "text"
                values = np.array(held[name].asstr()[()] if text else held[name][()])
                if name == changed and values.size:
                    flat = values.reshape(-1)
                    flat[0] = f"{flat[0]}!" if text else not flat[0]
                writer.write(name, values)
        with Artifact(to) as copy:
            return copy.fingerprint


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_fingerprint_follows_results_and_nothing_else(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    same = rewritten(kind, files[kind], tmp_path / "a.h5", "")
    with h5py.File(files[kind]) as held:
        filled = {name for name in SCHEMAS[kind].datasets if name in held and held[name].size}
    for name in filled - {"layer"}:
        other = rewritten(kind, files[kind], tmp_path / "b.h5", name)
        assert (other != same) is SCHEMAS[kind].datasets[name].result, name
    assert kind != "pmatrix" or not SCHEMAS[kind].datasets["condition"].result


COMMAND_OF_KIND: dict[str, tuple[str, ...]] = {
    "cov": ("pmatrix", "--cov"),
    "keys": ("pmatrix", "--keys"),
    "pmatrix": ("topk", "--pmatrix"),
    "stats": ("show",),
    "edits": ("verify",),
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_spoiled_file_is_one_sentence_of_the_command_that_reads_it(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / f"{kind}.h5"
    own = {*fields(SCHEMAS[kind].about)}
    for each in own:
        if each.default is None:
            continue
        spoiled(files[kind], path, lambda file, name=each.name: file.attrs.pop(name))
        at = ("-m", "toy", "--dir", files[kind].parent.parent) if kind in ("cov", "keys") else ()
        more = ("-o", tmp_path / "p.h5") if at else ()
        result = kscli(*COMMAND_OF_KIND[kind], path, *at, *more)
        assert result.exit_code == 1, (each.name, result.exception)
        assert f"it has no attribute {each.name}; make it again." in one_sentence(result.stderr)


# What was imported, which does not know of weights or text

# These read no file of kscli's, or have one of their own below; test_sharing.py is about the Hub.
READ_NONE = {
    *("editors", "models", "facts", "extract", "import-cov", "guide", "help", "corpus"),
    *("push", "pull"),
}
HELD_OUT = "the river of a city in the north of a land. " * 50


@pytest.mark.usefixtures("no_pictures")
def test_what_was_imported_goes_through_every_command(measured_tiny: Path, tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    (place / "keys.h5").write_bytes((measured_tiny / "keys.h5").read_bytes())
    (tmp_path / "held.txt").write_text(HELD_OUT)
    exported = kscli(
        "export-cov", "--cov", measured_tiny / "cov.h5", "--for", "rome", "-o", tmp_path / "s", "-q"
    )
    assert exported.exit_code == 0, exported.stderr
    imported = kscli("import-cov", tmp_path / "s", "-m", "tiny", "--dir", tmp_path, "-q")
    assert imported.exit_code == 0, imported.stderr
    with CovarianceFile(place / "cov.h5") as cov:
        assert isinstance(cov.about, CovarianceAbout)
        unknown = {name for name, value in vars(cov.about).items() if value is None}
    assert {"weights", "corpus_identity", "documents", "max_length"} <= unknown
    at: tuple[str | Path, ...] = ("-m", "tiny", "--dir", tmp_path)
    edit = ("--layer", "0", "--edits", "1", "--steps", "2", "--dtype", "float32")
    ways: dict[str, tuple[str | Path, ...]] = {
        "pmatrix": at,
        "stats": at,
        "topk": at,
        "relations": at,
        "plot": ("kurtosis", *at, "-o", tmp_path / "figure.svg"),
        "edit": (*at, *edit, "--held-out", tmp_path / "held.txt", "-q"),
        "verify": at,
        "risk": (*at, "--layer", "0"),
        "report": at,
        "trace": ("tiny", MODEL_DIR, "--dir", tmp_path, "--count", "4", "--dtype", "float32"),
        "show": ("tiny", "--dir", tmp_path),
        "export-cov": (*at, "--for", "memit", "-o", tmp_path / "t"),
        "run": (*at, "--count", "4", "--dtype", "float32"),
    }
    refused = {
        "merge-cov": (place / "cov.h5", "-o", tmp_path / "merged.h5"),
        "cache-cov": (*at, "--tokens", "500"),
    }
    assert {*ways, *refused, *READ_NONE} >= set(COMMANDS)
    for command, arguments in ways.items():
        result = kscli(command, *arguments)
        assert result.exit_code == 0, (command, result.stderr, result.exception)
    for command, arguments in refused.items():
        result = kscli(command, *arguments)
        assert result.exit_code == 1, (command, result.stderr, result.exception)
        assert str(place / "cov.h5") in one_sentence(result.stderr)
    for shown in json.loads(kscli("show", "tiny", "--dir", tmp_path, "-f", "json").stdout):
        assert shown.get("corpus", UNKNOWN) == UNKNOWN
    page = (place / "report.html").read_text()
    assert "None" not in page
