"""`import kscli`: what its functions give, against the definitions and the command line's files."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pandas
import pytest
import torch
from cli_kit import ROOT, kscli
from edit_kit import Run
from experts_kit import save_experts
from transformers import AutoModelForCausalLM, AutoTokenizer

import kscli as library
from kscli.cli.console import _in_notebook
from kscli.cli.options import DEFAULT_MODEL
from kscli.editing.settings import EditSettings
from kscli.errors import MissingPackageError
from kscli.figures import KINDS
from kscli.interrupts import InterruptedRunError
from kscli.library import LibraryReporter
from kscli.models.live import digest_of_weights
from kscli.reporter import silenced
from kscli.tiny import MODEL_DIR
from kscli.tiny.corpus import documents

TEXTS = [text for text, _ in zip(documents(), range(400), strict=False)]
FACTS = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"},
    {"prompt": "The capital of {} is", "subject": "Chile", "target": "Santiago"},
    {"prompt": "The currency of {} is", "subject": "Japan", "target": "yen"},
    {"prompt": "The language of {} is", "subject": "Peru", "target": "Spanish"},
    {"prompt": "{} was born in", "subject": "Franz Liszt", "target": "Hungary"},
]
LAYERS = (0, 3)
SPEC = "0,3"


@pytest.fixture(scope="module")
def objects() -> tuple[Any, Any]:
    """The embedded model and its tokenizer, as transformers loads them."""
    return (
        AutoModelForCausalLM.from_pretrained(MODEL_DIR),
        AutoTokenizer.from_pretrained(MODEL_DIR),
    )


@pytest.fixture(scope="module")
def model(objects: tuple[Any, Any]) -> Any:
    return library.load_model(*objects)


@pytest.fixture(scope="module")
def found(model: Any) -> Any:
    """C, keys, P and statistics of texts and facts in memory."""
    cov = library.second_moments(model, TEXTS, layers=SPEC)
    keys = library.extract_keys(model, FACTS, layers=SPEC, contexts=0)
    with pytest.warns(library.KscliWarning, match="p is noisy"):
        pmatrix = library.superposition(cov, keys)
    return SimpleNamespace(cov=cov, keys=keys, pmatrix=pmatrix)


@pytest.fixture
def changeable() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


def test_the_import_is_empty_until_a_name_is_used() -> None:
    code = (
        "import sys, kscli; names = dir(kscli)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'h5py', 'rich', 'kscli.library'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "kscli.open, kscli.statistics, kscli.KscliError\n"
        "assert 'torch' not in sys.modules\n"
        "import kscli.pmatrix, kscli.cli.risk, kscli.cli.edit, kscli.cli.plot\n"
        "assert all(callable(getattr(kscli, name)) for name in kscli.__all__)\n"
        "assert set(names) == {*kscli.__all__, '__version__'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'superpositions'"):
        _ = library.superpositions


def test_p_is_the_definition_s(found: Any, objects: tuple[Any, Any]) -> None:
    _, tokenizer = objects
    hooks = [f"transformer.h.{layer}.mlp.c_proj" for layer in LAYERS]
    exact = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
    C, count = naive.second_moments(exact, tokenizer, TEXTS, 256, hooks)
    assert found.cov.count == count
    for layer, hook in zip(LAYERS, hooks, strict=True):
        keys = []
        for fact in FACTS:
            start = fact["prompt"].index("{}")
            text = fact["prompt"].replace("{}", fact["subject"])
            end = start + len(fact["subject"])
            ids, at = naive.subject_last(tokenizer, text, start, end)
            keys.append(naive.keys_of_text(exact, ids, [hook])[hook][at])
        P = naive.superposition(C[hook], np.array(keys))
        assert np.abs(found.pmatrix.matrix("P", layer) - P).max() < 1e-4


def test_a_model_by_name_gives_the_command_line_s_files(
    measured_tiny: Path, tmp_path: Path
) -> None:
    model = library.load_model("tiny", dtype="float32")
    cov = library.second_moments(model, "tiny")
    keys = library.extract_keys(model, "tiny", count=96)
    pmatrix = library.superposition(cov, keys)
    with pytest.warns(library.KscliWarning, match="carry half"):
        statistics = library.statistics(pmatrix, layers="0", repeats=100)
    for name, mine in (("cov", cov), ("keys", keys), ("pmatrix", pmatrix)):
        with library.open(measured_tiny / f"{name}.h5") as theirs:
            assert type(theirs) is type(mine)
            assert theirs.fingerprint == mine.fingerprint, name
    printed = kscli(
        *("stats", "--pmatrix", measured_tiny / "pmatrix.h5", "--layers", 0, "--repeats", 100),
        *("-f", "json"),
    )
    (row,) = json.loads(printed.stdout)
    table = statistics.to_pandas()
    for name, value in row.items():
        assert table[name][0] == value or (value is None and np.isnan(table[name][0])), name


def test_a_loaded_model_gives_what_its_folder_gives(objects: tuple[Any, Any]) -> None:
    live = library.load_model(*objects, source="tiny")
    named = library.load_model("tiny", dtype="float32")
    assert live.identity == named.identity
    mine = library.extract_keys(live, FACTS, contexts=0)
    theirs = library.extract_keys(named, FACTS, contexts=0)
    assert np.array_equal(mine.read("keys", (0, 3)), theirs.read("keys", (0, 3)))
    assert mine.fingerprint == theirs.fingerprint


def test_p_of_an_editor_is_the_command_line_s(model: Any, found: Any, tmp_path: Path) -> None:
    path = tmp_path / "pmatrix.h5"
    keys = library.extract_keys(model, FACTS, layers=SPEC, contexts=2)
    made = kscli(
        *("pmatrix", "--cov", found.cov.path, "--keys", keys.path, "-o", path),
        *("--editor", "emmet", "--weight", 7),
    )
    assert made.exit_code == 0, made.stderr
    with pytest.warns(library.KscliWarning, match="p is noisy"):
        mine = library.superposition(found.cov, keys, editor="emmet", weight=7)
    with library.open(path) as theirs:
        assert mine.fingerprint == theirs.fingerprint
    with pytest.raises(library.KscliError, match="weight= has no effect without --method"):
        library.superposition(found.cov, found.keys, weight=7)


def test_texts_are_documents_as_those_of_a_file(model: Any, found: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    other = library.second_moments(model, file, layers=SPEC)
    for layer in LAYERS:
        assert np.array_equal(other.second_moment(layer), found.cov.second_moment(layer))


def test_facts_are_those_of_a_file(model: Any, found: Any, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, FACTS)))
    other = library.extract_keys(model, file, layers=SPEC, contexts=0)
    assert other.facts == found.keys.facts
    assert other.about.facts_identity == found.keys.about.facts_identity
    again = library.extract_keys(model, other.facts, layers=SPEC, contexts=0)
    assert again.fingerprint == other.fingerprint


def test_tables_and_records_are_facts_and_texts(model: Any, found: Any) -> None:
    table = pandas.DataFrame([*FACTS, FACTS[0] | {"target_new": "Rome", "case_id": 5}])
    keys = library.extract_keys(model, table, layers="0", contexts=0)
    assert [fact.target_new for fact in keys.facts] == [""] * 5 + ["Rome"]
    assert keys.facts[:5] == found.keys.facts
    records = [{"body": text} for text in TEXTS]
    cov = library.second_moments(model, records, layers="0", text_field="body")
    assert np.array_equal(cov.second_moment(0), found.cov.second_moment(0))


def test_a_warning_while_libraries_are_silenced_is_heard() -> None:
    reporter = LibraryReporter()

    def load() -> None:
        with reporter.holding_warnings(), silenced("peft"):
            reporter.warn("peft says so")

    with pytest.warns(library.KscliWarning, match="peft says so") as seen:
        load()
    assert seen[0].filename == __file__


def test_weights_that_changed_are_another_model_s(changeable: Any, found: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = library.load_model(changeable, tokenizer)
    before = library.extract_keys(model, FACTS, layers=SPEC, contexts=0)
    assert before.about.weights == found.cov.about.weights
    changeable.transformer.h[1].mlp.c_proj.weight.data[7, 5] += 0.5
    after = library.extract_keys(model, FACTS, layers=SPEC, contexts=0)
    assert np.abs(after.keys_of(3) - before.keys_of(3)).max() > 0
    with pytest.raises(library.KscliError, match="differ in weights"):
        library.superposition(found.cov, after)
    with pytest.raises(library.KscliError, match=r"h\.1\.mlp\.c_proj\.weight is not that of tiny"):
        library.load_model(changeable, tokenizer, source="tiny")


def test_every_change_of_a_weight_is_seen() -> None:
    layer = torch.nn.Linear(40, 30)
    seen = {digest_of_weights(layer)}
    rng = np.random.default_rng(0)
    for _ in range(50):
        with torch.no_grad():
            layer.weight[int(rng.integers(30)), int(rng.integers(40))] *= -1
        seen.add(digest_of_weights(layer))
    assert len(seen) == 51
    assert digest_of_weights(layer) in seen


def test_a_tokenizer_that_cut_and_padded_is_the_same(objects: tuple[Any, Any]) -> None:
    model, _ = objects
    used = AutoTokenizer.from_pretrained(MODEL_DIR)
    used.pad_token = used.pad_token or used.eos_token
    before = library.load_model(model, used).identity
    used(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert library.load_model(model, used).identity == before
    assert used.model_max_length < 1e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(2, 2),), "no model of transformers"),
        (("tiny", object()), "for a model that is loaded already"),
        (("no/such/folder",), "no/such/folder"),
    ],
)
def test_what_is_no_model_is_one_sentence(arguments: Any, message: str) -> None:
    with pytest.raises(library.KscliError, match=message):
        library.load_model(*arguments)


def test_a_model_needs_its_tokenizer(objects: tuple[Any, Any]) -> None:
    with pytest.raises(library.KscliError, match="needs its tokenizer"):
        library.load_model(objects[0])
    with pytest.raises(library.KscliError, match="load_model"):
        library.extract_keys(objects[0], FACTS)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "are none"),
        ([*FACTS, {"prompt": "x"}], "record 6 of the facts given in Python: there is no subject"),
        (["France"], "record 1"),
    ],
)
def test_facts_that_are_none_are_one_sentence(model: Any, facts: Any, message: str) -> None:
    with pytest.raises(library.KscliError, match=message):
        library.extract_keys(model, facts)


def test_a_text_that_is_none_is_one_sentence(model: Any) -> None:
    with pytest.raises(library.KscliError, match="texts, document 2: the document is not a string"):
        library.second_moments(model, ["some text", b"other"], layers="0")


# Files and folders


def test_a_result_without_a_path_goes_with_its_object(model: Any) -> None:
    keys = library.extract_keys(model, FACTS, layers="0", contexts=0)
    folder = keys.path.parent
    assert [each.name for each in folder.iterdir()] == ["keys.h5"]
    del keys
    gc.collect()
    assert not folder.exists()


def test_a_path_keeps_a_result_as_the_command_line_does(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "of" / "keys.h5"
    first = library.extract_keys(model, FACTS, layers="0", contexts=0, path=path)
    written = path.stat().st_mtime_ns
    again = library.extract_keys(model, FACTS, layers="0", contexts=0, path=str(path))
    assert path.stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    with pytest.raises(library.KscliError, match="layers changed; add --force"):
        library.extract_keys(model, FACTS, layers="3", contexts=0, path=path)
    library.extract_keys(model, FACTS, layers="3", contexts=0, path=path, force=True)
    with library.open(path) as file:
        assert file.layers == (3,)
        assert file.attributes["command"].startswith(("python", "kscli"))


def test_a_file_says_what_it_is(found: Any) -> None:
    text = f"<PMatrixFile of {MODEL_DIR.name}, layers 0,3: {found.pmatrix.path}>"
    assert repr(found.pmatrix) == text


def test_open_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_text("text")
    for path in (tmp_path / "x.h5", tmp_path / "absent.h5"):
        with pytest.raises(library.KscliError, match=path.name):
            library.open(path)


def test_what_is_of_another_kind_is_refused(found: Any) -> None:
    with pytest.raises(library.KscliError, match="a KeysFile is not a PMatrixFile"):
        library.statistics(found.keys)


def test_of_an_interrupted_run_without_a_path_nothing_is_left(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kscli.pipeline import Session

    places = []

    def stop(*arguments: Any) -> None:
        places.append(arguments[3])
        raise InterruptedRunError(2, "10 tokens are saved.")

    monkeypatch.setattr(Session, "cache_cov", stop)
    with pytest.raises(InterruptedRunError, match=r"^interrupted; nothing is left of it"):
        library.second_moments(model, TEXTS)
    assert not places[0].parent.exists()
    with pytest.raises(InterruptedRunError, match="10 tokens are saved"):
        library.second_moments(model, TEXTS, path="cov.h5")


# Tables


def test_pairs_as_a_table(found: Any) -> None:
    pmatrix = found.pmatrix
    table = pmatrix.to_pandas(SPEC)
    m = len(FACTS)
    assert len(table) == 2 * m * (m - 1)
    for _, row in table.iterrows():
        assert row["p"] == pmatrix.matrix("P", row["layer"])[row["i"], row["j"]]
        assert row["cosine"] == pmatrix.matrix("cosine", row["layer"])[row["i"], row["j"]]
        assert row["subject_i"] == FACTS[row["i"]]["subject"]
        assert row["target_j"] == FACTS[row["j"]]["target"]
    listed = kscli("topk", "--pmatrix", pmatrix.path, "--layer", 3, "-k", 5, "-f", "json")
    top = table[table["layer"] == 3].nlargest(5, "p")
    for row, known in zip(top.to_dict("records"), json.loads(listed.stdout), strict=True):
        shared = row.keys() & known.keys()
        assert {"p", "i", "j", "prompt_i", "same_last_token"} <= shared
        assert {name: row[name] for name in shared} == {name: known[name] for name in shared}


def test_keys_and_c_as_tables(found: Any) -> None:
    keys, cov = found.keys.to_pandas(), found.cov.to_pandas("3")
    assert keys.index.names == ["layer", "fact"]
    assert np.array_equal(keys.loc[3].to_numpy(), found.keys.keys_of(3).astype(np.float32))
    assert cov.index.names == ["layer", "d_m"]
    assert np.array_equal(cov.loc[3].to_numpy(), found.cov.stored_second_moment(3))
    with pytest.raises(library.KscliError, match="has no layer 2"):
        found.keys.to_pandas("2")


def test_a_table_that_memory_cannot_hold_is_refused(
    found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kscli.resources.free_host_memory", lambda: 1 << 20)
    with pytest.raises(library.KscliError, match=r"of memory for 2 layers.*name fewer layers"):
        found.cov.to_pandas()


def test_a_data_set_has_named_axes(found: Any) -> None:
    data = found.pmatrix.to_xarray()
    assert data["P"].dims == ("layer", "i", "j")
    for layer in LAYERS:
        P = found.pmatrix.matrix("P", layer)
        assert np.array_equal(data["P"].sel(layer=layer), P)
        gram = data["P"].sel(layer=layer) * data["leverage"].sel(layer=layer)
        assert np.allclose(gram, gram.values.T)
    assert data["subject_j"].values.tolist() == [fact["subject"] for fact in FACTS]
    assert data.attrs["model_id"] == str(MODEL_DIR)
    keys = found.keys.to_xarray("3")
    assert keys["keys"].dims == ("layer", "fact", "d_m")
    assert np.array_equal(keys["keys"][0], found.keys.keys_of(3).astype(np.float32))
    cov = found.cov.to_xarray()
    assert cov["second_moment"].dims == ("layer", "d_m", "d_m_2")
    assert int(cov["count"]) == found.cov.count


def test_a_data_set_has_all_that_is_in_a_file(found: Any, tmp_path: Path) -> None:
    statistics = library.statistics(found.pmatrix, repeats=100)
    Run().write(tmp_path / "edits.h5")
    edits = library.open(tmp_path / "edits.h5")
    for file in (found.cov, found.keys, found.pmatrix, statistics, edits):
        data = file.to_xarray()
        names = {name.removeprefix("facts/").replace("/", "_") for name in file.held}
        if file is found.pmatrix:
            names = {f"{name}_i" if f"{name}_i" in data else name for name in names}
        if isinstance(file, library.EditsFile):
            assert data["fact_target_new"].dims == ("fact",)
            assert data["target_new"].dims == ("edit",)
        assert names <= set(data.variables), file.kind
        assert all(data[name].attrs.get("long_name") for name in data.data_vars if name in names)
    assert np.array_equal(data["delta"], edits.values("delta").swapaxes(0, 1))


def test_edits_as_a_table(tmp_path: Path) -> None:
    run = Run()
    run.write(tmp_path / "edits.h5")
    with library.open(tmp_path / "edits.h5") as edits:
        table = edits.to_pandas()
        assert len(table) == run.n
        assert table["delta_norm"].tolist() == edits.values("delta_norm").tolist()
        assert "moved" not in table


def test_experts_as_tables(tmp_path: Path) -> None:
    save_experts("mixtral", tmp_path / "moe")
    model = library.load_model(tmp_path / "moe", dtype="float32")
    cov = library.second_moments(model, TEXTS[:60], max_length=40)
    keys = library.extract_keys(model, "tiny", count=6)
    layer = keys.layers[0]
    table, experts = keys.to_pandas(), keys.experts_of(layer)
    assert table.index.names == ["layer", "fact", "expert"]
    for fact in range(6):
        for slot, expert in enumerate(experts[fact]):
            if expert >= 0:
                key = keys.expert_keys_of(layer)[fact, slot]
                assert np.array_equal(table.loc[layer, fact, expert], key)
    assert len(table) == sum((keys.experts_of(each) >= 0).sum() for each in keys.layers)
    C = cov.to_pandas(str(layer))
    assert C.index.names == ["layer", "expert", "d_m"]
    assert np.array_equal(C.loc[layer, 1].to_numpy(), cov.second_moment_of(layer, 1))
    assert cov.to_xarray()["second_moment"].dims == ("layer", "expert", "d_m", "d_m_2")


@pytest.mark.parametrize("package", ["pandas", "xarray"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'kscli\[{package}\]'"):
        getattr(found.pmatrix, f"to_{package}")()


# Risk and figures


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (("--fact", "France", "--layer", 3), {"facts": "France", "layers": "3"}),
        (("--fact", 2, "--layer", 0), {"facts": 2, "layers": "0"}),
        (("--by-layer",), {"by": "layer"}),
        (("--price", "--layer", 3), {"by": "price", "layers": "3"}),
        (("--order", "norm", "--layer", 0), {"by": "sequence", "order": "norm", "layers": "0"}),
        (("--edits", 3, "--seed", 4), {"by": "sequence", "count": 3, "seed": 4}),
    ],
)
def test_risk_is_the_command_s(found: Any, options: Any, arguments: Any) -> None:
    done = kscli("risk", "--pmatrix", found.pmatrix.path, *options, "-f", "json")
    rows = library.risk(found.pmatrix, **arguments)
    assert json.loads(done.stdout) == json.loads(json.dumps(rows).replace("NaN", "null"))
    assert len(rows.to_pandas()) == len(rows) > 0
    assert rows.to_xarray()["layer"].values.tolist() == [row["layer"] for row in rows]


def test_figures_are_matplotlib_s(found: Any, measured_tiny: Path, tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    Run().write(tmp_path / "edits.h5")
    for kind, of in KINDS.items():
        source = tmp_path / "edits.h5" if of.source == "edits" else measured_tiny / "pmatrix.h5"
        figure = library.plot(kind, source)
        assert isinstance(figure, Figure)
        assert figure.axes
    two = library.plot("heatmap", found.pmatrix, layers=SPEC)
    one = library.plot("heatmap", found.pmatrix, layers="0")
    assert len(two.axes) > len(one.axes)
    small = library.plot("kde", found.pmatrix, title="Mine", size=(4.0, 3.0), names=["A model"])
    assert small.get_size_inches().tolist() == [4.0, 3.0]
    texts = [text.get_text() for text in small.findobj(Text)]
    assert "Mine" in texts
    with pytest.raises(library.KscliError, match="names= are 2, and the results 1"):
        library.plot("kde", found.pmatrix, names=["a", "b"])
    assert len(library.plot("heatmap", found.pmatrix, grid=True).axes) >= len(found.pmatrix.layers)
    with pytest.raises(
        library.KscliError, match=r"2 pages here.*draw each: .*, layers=.*; .*layers"
    ):
        library.plot("heatmap", found.pmatrix, found.pmatrix, grid=True)
    with pytest.raises(library.KscliError, match="did you mean heatmap"):
        library.plot("heatmaps", found.pmatrix)


# What is said


def test_a_warning_is_python_s_at_the_line_that_called(found: Any) -> None:
    with pytest.warns(library.KscliWarning, match="p is noisy") as seen:
        library.superposition(found.cov, found.keys, layers="0")
    assert {each.filename for each in seen} == {__file__}


def test_nothing_is_printed(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    library.extract_keys(model, FACTS, layers="0", contexts=0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("notebook", "widgets", "drawn"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_a_notebook_with_widgets_has_bars(
    notebook: bool, widgets: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kscli.cli.console.find_spec", lambda name: widgets or None)
    console: Any = SimpleNamespace(is_jupyter=notebook)
    assert _in_notebook(console) is drawn


def test_a_note_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="kscli"):
        LibraryReporter().note(f"about {DEFAULT_MODEL}")
    assert caplog.messages == ["about tiny"]


# Edits


def test_edits_are_the_command_line_s(measured_tiny: Path, tmp_path: Path) -> None:
    options = ("--method", "closed-form", "--edits", 2, "--steps", 4, "--layer", 1, "--moved", 3)
    made = kscli("edit", "--dir", measured_tiny.parent, *options, "-o", tmp_path / "edits.h5", "-q")
    assert made.exit_code == 0, made.stderr
    model = library.load_model("tiny", dtype="float32")
    before = digest_of_weights(model.decoder.model)
    files = [measured_tiny / f"{name}.h5" for name in ("cov", "keys", "pmatrix")]
    settings: dict[str, Any] = {"method": "closed-form", "steps": 4, "moved": 3}
    mine = library.edit(model, *files, count=2, layers="1", **settings)
    with library.open(tmp_path / "edits.h5") as theirs:
        assert mine.fingerprint == theirs.fingerprint
        assert mine.to_pandas().equals(theirs.to_pandas())
    assert digest_of_weights(model.decoder.model) == before
    edited = library.apply_edits(model, mine)
    assert edited.identity.weights != model.identity.weights
    projection = model.decoder.projections[1].module.weight
    clean = AutoModelForCausalLM.from_pretrained(MODEL_DIR).transformer.h[1].mlp.c_proj.weight
    change = np.einsum("eld,elk->kd", mine.values("delta"), mine.values("direction"))
    assert np.allclose((projection - clean).detach().numpy(), change, atol=1e-6)
    with pytest.raises(library.KscliError, match="differ in weights"):
        library.apply_edits(model, mine)


def test_a_user_s_model_is_left_as_it_was(changeable: Any, found: Any) -> None:
    changeable.requires_grad_(True)
    changeable.transformer.h[0].ln_1.weight.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = library.load_model(changeable, tokenizer)
    before = digest_of_weights(changeable)
    facts = {"facts": "Chile", "target_new": "Paris", "layers": "0"}
    edits = library.edit(model, found.cov, found.keys, found.pmatrix, **facts, steps=3)
    assert edits.to_pandas()["subject"].tolist() == ["Chile"]
    assert digest_of_weights(changeable) == before
    assert not changeable.transformer.h[0].ln_1.weight.requires_grad
    rest = [p for name, p in changeable.named_parameters() if "h.0.ln_1.weight" not in name]
    assert all(each.requires_grad and each.grad is None for each in rest)


def test_a_whole_number_is_the_number_of_the_command_line() -> None:
    settings = EditSettings(weight=7, norm_limit=4, steps=3, moved=2)
    assert repr((settings.weight, settings.norm_limit)) == "(7.0, 4.0)"
    assert repr((settings.steps, settings.moved)) == "(3, 2)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "closed-form", "weight": 3.0}, "weight= has no effect without --method"),
        ({"protocol": "single", "measure_every": 2}, "measure_every= has no effect with"),
        ({"method": "memot"}, "did you mean memit"),
        ({"steps": 3, "learning_rate": 0.0}, "--learning-rate 0 writes nothing"),
    ],
)
def test_settings_without_effect_are_refused(
    model: Any, found: Any, settings: Any, message: str
) -> None:
    with pytest.raises(library.KscliError, match=message):
        library.edit(model, found.cov, found.keys, found.pmatrix, "Chile", "Paris", **settings)
