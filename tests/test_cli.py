"""The command line over files that exist: printing, formats, exit codes, errors."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from artifact_kit import changed, write_cov, write_keys, write_toy
from cli_kit import ROOT, kscli, kscli_process, one_sentence
from typer.testing import Result

FORBIDDEN = ("torch", "transformers", "datasets", "matplotlib")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder of artifacts with one model, `toy`, and room for others."""
    write_toy(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("edit", "--prompt", "{} is", "--subject", "Chad", "--prompt", "{} was"),
        ("topk", "--layer", "0", "--layers", "1"),
        ("run", "--facts", "a.json", "--facts=b.json"),
    ],
)
def test_an_option_that_takes_one_value_is_not_given_twice(arguments: tuple[str, ...]) -> None:
    """Click would take the last one, and the edit or layer before it would be lost."""
    done = kscli(*arguments)
    assert done.exit_code == 2
    assert one_sentence(done.stderr).endswith(f"{arguments[1]} is given 2 times; give it once.")


def test_topk_prints_the_largest_entries_of_p(toy: Path) -> None:
    result = kscli("topk", "-m", "toy", "--dir", toy, "--layer", "1", "-k", "4", "-f", "json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        P = file["P"][1]
    np.fill_diagonal(P, -np.inf)
    best = np.sort(P.ravel())[::-1][:4]
    assert [row["p"] for row in rows] == best.tolist()
    for rank, row in enumerate(rows, start=1):
        assert row["rank"] == rank
        assert row["layer"] == 1
        assert P[row["i"], row["j"]] == row["p"]
        assert row["subject_i"] == f"Größe {row['i']}"
        assert row["target_j"] == f"target {row['j']}"
        assert row["prompt_j"] == f"The {{}} of place {row['j']} is"
        assert row["same_last_token"] is ({row["i"], row["j"]} == {0, 1})


def test_topk_of_absolute_values_and_of_several_layers(toy: Path) -> None:
    result = kscli(
        "topk", "-m", "toy", "--dir", toy, "--layer", "all", "-k", "2", "--abs", "-f", "json"
    )
    rows = json.loads(result.stdout)
    assert [row["layer"] for row in rows] == [0, 0, 1, 1, 2, 2]
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        P = np.abs(file["P"][2])
    np.fill_diagonal(P, 0)
    assert abs(rows[4]["p"]) == P.max()


def test_stats_prints_and_writes_the_statistics(toy: Path) -> None:
    result = kscli("stats", "-m", "toy", "--dir", toy, "-f", "json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert {"model", "layer", "m", "mean", "std", "skewness", "kurtosis"} <= set(rows[0])
    assert rows[0]["model"] == "toy"
    assert rows[0]["m"] == 6
    with h5py.File(toy / "toy" / "stats.h5") as file:
        for name in ("mean", "std", "skewness", "kurtosis"):
            assert file[name][()].tolist() == [row[name] for row in rows]
            assert file[name].dims[0][0] == file["layer"]


def test_stats_of_an_older_pmatrix_are_kept_and_said_to_be_so(toy: Path) -> None:
    kscli("stats", "-m", "toy", "--dir", toy)
    path = toy / "toy" / "stats.h5"
    before = path.read_bytes()
    write_keys(toy / "toy" / "keys.h5", np.random.default_rng(5).random((3, 6, 12), np.float32))
    assert kscli("pmatrix", "-m", "toy", "--dir", toy, "--force").exit_code == 0
    result = kscli("stats", "-m", "toy", "--dir", toy)
    assert result.exit_code == 0
    assert "warning:" in result.stderr
    assert "--force" in result.stderr
    assert path.read_bytes() == before
    kscli("stats", "-m", "toy", "--dir", toy, "--force")
    assert path.read_bytes() != before


def test_every_format_prints_the_same_rows(toy: Path) -> None:
    outputs = {
        name: kscli("topk", "-m", "toy", "--dir", toy, "-k", "3", "-f", name).stdout
        for name in ("table", "json", "csv", "tsv", "markdown", "latex")
    }
    rows = json.loads(outputs["json"])
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        read = list(csv.DictReader(io.StringIO(outputs[name]), delimiter=delimiter))
        assert [float(row["p"]) for row in read] == [row["p"] for row in rows]
        assert list(read[0]) == list(rows[0])
    assert outputs["markdown"].count("\n") == 5
    assert "The [Größe" in outputs["table"]
    assert outputs["latex"].startswith("\\begin{tabular}")
    assert all(f"{rows[0]['p']:.2f}" in outputs[name] for name in ("table", "markdown", "latex"))


def test_latex_and_markdown_escape_what_they_would_read(tmp_path: Path) -> None:
    from kscli.cli.output import Format, print_rows
    from kscli.tables import Column

    rows = [{"text": r"a|b & 50% \ _x_ {y} $1 #2 ~ ^"}]
    for output, expected in (
        (Format.markdown, r"a\|b & 50%"),
        (Format.latex, r"a\textbar{}b \& 50\% \textbackslash{} \_x\_ \{y\} \$1 \#2 \textascii"),
    ):
        stream = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            print_rows(rows, [Column("text")], output)
        assert expected in stream.getvalue()


def test_undefined_is_null_in_json_and_empty_in_csv(tmp_path: Path) -> None:
    """One fact has no pairs, so no statistic is defined."""
    from kscli.facts import Fact

    keys = np.ones((3, 1, 12), np.float32)
    write_keys(tmp_path / "toy" / "keys.h5", keys, facts=[Fact("{} is", "a", "b")])
    write_cov(tmp_path / "toy" / "cov.h5")
    assert kscli("pmatrix", "-m", "toy", "--dir", tmp_path).exit_code == 0
    printed = kscli("stats", "-m", "toy", "--dir", tmp_path, "-f", "json").stdout
    row = json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))[0]
    assert row["m"] == 1
    assert row["kurtosis"] is None
    lines = kscli("stats", "-m", "toy", "--dir", tmp_path, "-f", "csv").stdout.splitlines()
    assert lines[1].startswith("toy,0,1,,")
    assert json.loads(kscli("topk", "-m", "toy", "--dir", tmp_path, "-f", "json").stdout) == []
    assert kscli("topk", "-m", "toy", "--dir", tmp_path).exit_code == 0


def test_show_says_what_a_file_is(toy: Path) -> None:
    shown = json.loads(kscli("show", "toy", "--dir", toy, "-f", "json").stdout)
    assert [Path(item["path"]).name for item in shown] == ["cov.h5", "keys.h5", "pmatrix.h5"]
    pmatrix = shown[2]
    assert pmatrix["kind"] == "pmatrix"
    assert pmatrix["layers"] == "0-2"
    assert pmatrix["model_id"] == "someone/toy"
    assert pmatrix["datasets"]["P"] == {"shape": [3, 6, 6], "dtype": "float32"}
    assert pmatrix["inputs"] == {"cov": shown[0]["fingerprint"], "keys": shown[1]["fingerprint"]}
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        condition = file["condition"][()]
    assert pmatrix["datasets"]["condition"] == {
        "shape": [3],
        "dtype": "float64",
        "least": condition.min(),
        "largest": condition.max(),
    }
    assert {name for name, about in pmatrix["datasets"].items() if "least" in about} == {
        *("condition", "dead_coordinates"),
        *("solve_residual", "storage_error", "whitening_residual"),
    }
    text = kscli("show", toy / "toy" / "pmatrix.h5").stdout
    assert f"(3,) float64, {condition.min():.4g} to {condition.max():.4g}\n" in text
    assert "(3,) int64, 0\n" in text
    text = kscli("show", toy / "toy" / "cov.h5").stdout
    assert "second moments" in text
    assert "sha256:w" in text


def test_show_of_what_is_undefined_at_some_layers_or_all(toy: Path) -> None:
    path = toy / "toy" / "pmatrix.h5"
    with changed(path) as file:
        file["condition"][0] = np.nan
        file["solve_residual"][...] = np.nan
        left = file["condition"][1:]
    text = kscli("show", path).stdout
    assert f"(3,) float64, {left.min():.4g} to {left.max():.4g}\n" in text
    assert "(3,) float64, undefined\n" in text
    [shown] = json.loads(kscli("show", path, "-f", "json").stdout)
    assert shown["datasets"]["condition"]["largest"] == left.max()
    assert shown["datasets"]["solve_residual"]["least"] is None


def test_pmatrix_takes_explicit_paths_and_finds_the_models_folder(tmp_path: Path) -> None:
    cov = write_cov(tmp_path / "a" / "cov.h5")
    keys = write_keys(tmp_path / "b" / "keys.h5")
    result = kscli("pmatrix", "--cov", cov, "--keys", keys, "--dir", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "toy" / "pmatrix.h5").exists()


def test_pmatrix_again_is_up_to_date_and_with_a_ridge_is_refused(toy: Path) -> None:
    path = toy / "toy" / "pmatrix.h5"
    before = path.read_bytes()
    again = kscli("pmatrix", "-m", "toy", "--dir", toy)
    assert again.exit_code == 0
    assert "up to date" in again.stderr
    other = kscli("pmatrix", "-m", "toy", "--dir", toy, "--ridge", "0.1")
    assert other.exit_code == 1
    assert "ridge changed; add --force" in one_sentence(other.stderr)
    assert path.read_bytes() == before


def test_few_tokens_are_a_warning_and_too_few_an_error(tmp_path: Path) -> None:
    write_keys(tmp_path / "toy" / "keys.h5")
    write_cov(tmp_path / "toy" / "cov.h5", count=100)
    result = kscli("pmatrix", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "100 tokens, 8.3 a dimension" in result.stderr
    write_cov(tmp_path / "toy" / "cov.h5", count=11)
    result = kscli("pmatrix", "-m", "toy", "--dir", tmp_path, "--force")
    assert result.exit_code == 1
    assert "--ridge" in one_sentence(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["topk", "-m", "toy", "--layer", "99"], 2, "no layer 99; it has 0-2"),
        (["topk", "-m", "toy", "--layer", "x"], 2, "not understood"),
        (["topk", "-m", "absent"], 1, "`kscli run --model absent` makes it"),
        (["topk", "-m", "a model"], 1, "`kscli run --model 'a model'` makes it"),
        (["pmatrix", "-m", "absent"], 1, "`kscli cache-cov --model absent` makes it"),
        (["verify", "-m", "absent"], 1, "`kscli edit --model absent` makes one"),
        (["topk", "-m", "gpt2-smal"], 1, "did you mean gpt2-small?"),
        (["run", "-m", "gpt2-smal"], 2, "did you mean gpt2-small?"),
        (["show", "tooy"], 1, "did you mean toy?"),
        (["topk", "-m", "toy", "--editor", "Romme"], 2, "did you mean rome?"),
        (["plot", "heatmp", "-m", "toy"], 2, "did you mean heatmap?"),
        (["guide", "edit"], 2, "did you mean edits?"),
        (["help", "topkk"], 2, "did you mean topk?"),
        (["topkk"], 2, "Did you mean 'topk'?"),
        (["topk", "--lyer", "0"], 2, "did you mean --layer?"),
        (["run", "gpt2-small"], 2, "did you mean --model gpt2-small?"),
        (["cache-cov", "toy"], 2, "did you mean --corpus toy?"),
        (["topk", "7", "8"], 2, "nothing takes 7 8 without an option before it"),
        (["topk", "--debug"], 2, "kscli --debug topk"),
        (["topk", "-f", "jsn"], 2, "'--format' / '-f': 'jsn' is not one of"),
        (["risk", "-m", "toy", "--layer", "0", "--fact", "Grösse 1"], 2, "there is 'Größe 1'"),
        (["stats", "-m", "toy", "-o", "/proc/nope/stats.h5"], 1, "was not written"),
        (["stats", "-m", "toy", "-m", "toy", "-o", "x.h5"], 2, "--output names one file"),
        (["plot", "pie", "-m", "toy"], 2, "heatmap"),
        (["plot", "heatmap", "-m", "toy", "-o", "figure.bmp"], 2, ".png"),
        (["show", "absent.h5"], 1, "does not exist"),
        (["verify", "absent.h5"], 1, "`kscli edit --model MODEL` makes such a file"),
        (["show", "absent"], 1, "`kscli run --model absent` makes it"),
        (["pmatrix", "-m", "toy", "--layers", "7"], 2, "no layer 7"),
        (["topk", "-m", "./absent"], 1, "does not exist, and no model ./absent either"),
        (["cache-cov", "-m", "absent/"], 1, "there is no folder absent;"),
        (["edit", "-m", "absent.gguf"], 1, "there is no GGUF file absent.gguf"),
        (["run", "-m", "./toy/cov.h5"], 1, "toy/cov.h5 is a file; name the folder of a model"),
        (["trace", "tiny", "./absent"], 1, "there is no folder absent;"),
        (["trace", "tinny", "toy"], 2, "did you mean tiny?"),
        (["trace", "-m", "tiny"], 2, "there is no option -m: kscli trace BASE EDITED"),
        (["cache-cov", "--layers", "0;1"], 2, "not understood"),
        (["edit", "--layer", ""], 2, "not understood"),
        (["run", "--device", "cuda:one"], 2, "--device cuda:one is unknown"),
        (["edit", "--method", "romme"], 2, "did you mean rome?"),
        (["run", "-m", ""], 2, "it is empty; name a model."),
        (["stats", "-m", "toy", "-m", ""], 2, "it is empty; name a model."),
        (["run", "-m", "./tinny"], 1, "Did you mean the alias tiny?"),
        (["extract", "--layers", "5-2"], 2, "the range 5-2 runs backwards"),
        (["topk", "-k", "0"], 2, "'-k': '0' should be greater than or equal to 1."),
        (["topk", "-k", "x"], 2, "'-k': 'x' should be a valid integer."),
        (["run", "--ridge", "much"], 2, "'much' should be a valid number."),
        (["topk", "--dir", "toy/cov.h5"], 2, "toy/cov.h5 is a file; name a folder."),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], code: int, said: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KSCLI_DIR", str(toy))
    monkeypatch.chdir(toy)
    before = sorted(toy.rglob("*"))
    result = kscli(*arguments)
    assert result.exit_code == code, result.stderr
    assert said in one_sentence(result.stderr)
    assert result.stdout == ""
    assert sorted(toy.rglob("*")) == before


def test_a_model_named_in_the_place_of_a_file_is_understood(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toy / "elsewhere").mkdir()
    monkeypatch.chdir(toy / "elsewhere")
    for arguments, kind in (
        (("stats", "-m", "toy", "--against", "toy"), "pmatrix"),
        (("topk", "--pmatrix", "toy"), "pmatrix"),
        (("pmatrix", "-m", "toy", "--cov", "toy", "-o", "x.h5"), "cov"),
    ):
        result = kscli(*arguments, "--dir", toy)
        assert result.exit_code == 1
        assert f"did you mean {toy / 'toy' / kind}.h5?" in one_sentence(result.stderr)


LOADING = (
    ("run", "-m"),
    ("cache-cov", "-m"),
    ("extract", "-m"),
    ("edit", "-m"),
    ("facts", "check", "-m"),
    ("corpus", "peek", "-m"),
    ("trace",),
    ("trace", "tiny"),
)
"""The commands that load a model, up to its name."""


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nosuch/model", "nosuch/model is not complete in the local cache. Unset HF_HUB_OFFLINE"),
        ("toy/model", "There is no folder toy/model either."),
        ("nosuch", "nosuch is no alias (`kscli models` lists them) and no folder here"),
        ("./nosuch", "there is no folder nosuch;"),
    ],
)
def test_a_model_that_is_not_there_is_what_is_said_first(
    model: str, said: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(toy)
    for command in LOADING:
        result = kscli(*command, model, *(["tiny"] if command == ("trace",) else []))
        assert result.exit_code == 1
        assert said in one_sentence(result.stderr).replace("\n", " ")
        assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--layers", "x"],
        ["run", "--facts", "nosuch.jsonl"],
        ["run", "--corpus", "nosuch"],
        ["extract", "--contexts", "nosuch.txt"],
        ["cache-cov", "--device", "gpu"],
        ["edit", "--method", "romme"],
        ["edit", "--edits", "x"],
        ["edit", "--held-out", "nosuch"],
        ["edit", "--prompt", "{} is"],
        ["edit", "--fact", "0", "--edits", "3"],
        ["trace", "tiny", "tiny", "--cov", "nosuch.h5"],
        ["facts", "check", "-m", "./nosuch"],
        ["corpus", "peek", "nosuch"],
    ],
)
def test_what_needs_no_model_is_refused_before_pytorch_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    program = (
        "import sys; from kscli.cli.app import app\n"
        f"try: app({arguments!r}, prog_name='kscli')\n"
        "except SystemExit as left: print(left.code, {'torch', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.stdout.splitlines()[-1] in ("1 set()", "2 set()")
    assert "error: " in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_an_option_is_asked_for_by_the_option_that_takes_it(tmp_path: Path) -> None:
    facts = tmp_path / "facts.tsv.gz"
    facts.write_bytes(b"")
    for command, option in ((("facts", "check"), "--facts"), (("cache-cov",), "--corpus")):
        mistaken = kscli(*command, facts)
        assert mistaken.exit_code == 2
        assert f"did you mean {option} {facts}?" in one_sentence(mistaken.stderr)


def test_the_command_that_makes_a_file_has_the_folder_that_was_named(toy: Path) -> None:
    refused = kscli("topk", "-m", "absent", "--dir", toy)
    made_by = f"`kscli run --model absent --dir {toy}` makes it ({toy} has toy)"
    assert made_by in one_sentence(refused.stderr)
    (toy / "toy" / "pmatrix.h5").unlink()
    refused = kscli("topk", "-m", "toy", "--dir", toy)
    assert "`kscli pmatrix --model toy --dir" in one_sentence(refused.stderr)


def test_without_a_model_the_one_that_is_used_is_said(toy: Path) -> None:
    (toy / "toy").rename(toy / "tiny")
    assert "This is about" not in kscli("topk", "--dir", toy).stderr
    write_toy(toy)
    said = f"This is about tiny, as no --model is named; {toy} has toy too."
    assert said in kscli("topk", "--dir", toy).stderr
    for arguments in (("-q",), ("-m", "tiny"), ("--pmatrix", toy / "toy" / "pmatrix.h5")):
        assert "This is about" not in kscli("topk", "--dir", toy, *arguments).stderr


def test_a_table_is_explained_unless_quiet_or_for_machines(toy: Path) -> None:
    place = ("-m", "toy", "--dir", toy)
    for command in ("topk", "stats"):
        told = kscli(command, *place).stderr
        assert "p(i, j): how much of what an edit writes into fact i reaches fact j" in told
        assert f"`kscli report --model toy --dir {toy}`" in told
        assert "p(i, j)" not in kscli(command, *place, "-q").stderr
        assert "p(i, j)" not in kscli(command, *place, "-f", "csv").stderr
    with h5py.File(toy / "toy" / "pmatrix.h5") as file:
        P = np.abs(file["P"][0])
    share = np.mean(P[~np.eye(6, dtype=bool)] > 0.25)
    assert (
        f"Of all pairs at layer 0, {share:.1%} have |p| above 0.25" in kscli("topk", *place).stderr
    )
    # Of 6 facts nothing is compared with other models, and it is said that they are too few.
    told = kscli("stats", *place).stderr
    assert "6 facts make 30 pairs, which are too few for a distribution" in told
    assert "The kurtosis here" not in told
    rows = json.loads(kscli("stats", *place, "-f", "json").stdout)
    notes: list[str] = []

    from kscli.cli.explaining import compare_kurtosis
    from kscli.reporter import Reporter

    class Told(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    compare_kurtosis([{**row, "m": 10} for row in rows], Told())
    assert f"{max(row['kurtosis'] for row in rows):.1f} at layer" in notes[0]


def test_intervals_are_explained_where_there_are_some(toy: Path) -> None:
    rows = json.loads(kscli("stats", "-m", "toy", "--dir", toy, "-f", "json").stdout)
    told = kscli("stats", "-m", "toy", "--dir", toy).stderr
    there = any(row["kurtosis_low"] is not None for row in rows)
    assert ("In brackets" in told) == there


def test_help_is_that_of_the_command() -> None:
    for command in ("topk", "facts check"):
        assert kscli("help", *command.split()).stdout == kscli(*command.split(), "--help").stdout
    assert kscli("help").stdout == kscli("--help").stdout


def test_debug_shows_where_an_error_comes_from(toy: Path) -> None:
    refused = kscli("--debug", "topk", "-m", "absent", "--dir", toy)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Traceback")
    assert "error: " in refused.stderr.splitlines()[-1]


def test_the_same_options_have_the_same_names() -> None:
    for command in commands():
        taken = set(option_names(command))
        assert len({"--layer", "--layers"} & taken) in (0, 2), command
        if "--dir" in taken and command != "trace":  # which has two models, as arguments
            assert {"-q", "-m"} <= taken, command
    printing = ("topk", "stats", "relations", "risk", "verify", "edit", "plot", "report", "show")
    assert all("-f" in option_names(command) for command in printing)


def test_an_unknown_option_is_wrong_usage() -> None:
    assert kscli("topk", "--no-such-option").exit_code == 2
    assert kscli("no-such-command").exit_code == 2
    assert kscli("topk", "-k", "0").exit_code == 2
    assert kscli("extract", "--token", "middle").exit_code == 2


def test_keys_of_one_model_with_the_covariance_of_another(tmp_path: Path) -> None:
    write_cov(tmp_path / "toy" / "cov.h5", weights="sha256:other")
    write_keys(tmp_path / "toy" / "keys.h5")
    result = kscli("pmatrix", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 1
    assert "differ in weights" in one_sentence(result.stderr)
    assert not (tmp_path / "toy" / "pmatrix.h5").exists()


def test_a_layer_that_only_the_keys_have_is_named(tmp_path: Path) -> None:
    write_cov(tmp_path / "toy" / "cov.h5")
    write_keys(tmp_path / "toy" / "keys.h5", layers=(0, 5), n_layers=6)
    result = kscli("pmatrix", "-m", "toy", "--dir", tmp_path)
    assert result.exit_code == 1
    assert "no layer 5; it holds 0-2" in one_sentence(result.stderr)


COMPUTING = tuple(
    f"kscli.{name}" for name in ("superposition", "pipeline", "extraction", "analysis.resampling")
)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (["--help"], COMPUTING),
        (["topk", "-m", "toy"], (*COMPUTING, "kscli.analysis.statistics", "scipy")),
        (["stats", "-m", "toy"], COMPUTING[:-1]),
        (["show", "toy"], (*COMPUTING, "kscli.analysis")),
        (["models"], COMPUTING),
        (["editors"], COMPUTING),
        (["editors", "memit"], COMPUTING),
    ],
)
def test_light_commands_import_nothing_heavy(
    command: list[str], more: tuple[str, ...], toy: Path
) -> None:
    program = (
        "import sys\n"
        "from kscli.__main__ import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print([m for m in {FORBIDDEN + more} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "KSCLI_DIR": str(toy)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_help_imports_no_numpy_either() -> None:
    program = (
        "import sys, kscli.cli.app\n"
        "heavy = [m for m in ('numpy', 'h5py', 'scipy', 'pydantic', 'huggingface_hub') "
        "if m in sys.modules]\n"
        "print(heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]"


def commands() -> list[str]:
    """Every command, those of a group with the group's name in front."""
    from kscli.cli.commands import COMMANDS, load_command

    groups = {name: getattr(load_command(name), "commands", {"": None}) for name in COMMANDS}
    return [f"{name} {each}".strip() for name, group in groups.items() for each in group]


def option_names(command: str) -> list[str]:
    from kscli.cli.commands import load_command

    group, _, name = command.partition(" ")
    found = load_command(group)
    return [name for each in (found.commands[name] if name else found).params for name in each.opts]


@pytest.mark.parametrize("command", commands())
def test_a_help_page_is_whole(command: str) -> None:
    page = kscli(*command.split(), "--help").stdout
    summary, _, _ = page.split("\n\n", 1)[1].partition("\n\n")
    assert " ".join(summary.split()) in " ".join(kscli("--help").stdout.split()) or " " in command
    examples = page.split("Examples:")[1].split("\n\n")[0]
    assert f"kscli {command} " in f"{examples} ".replace("\n", " ")
    # Nothing is cut, no type is Python's, nothing is markup, and no option breaks at a hyphen.
    types = ("<bool>", "<path>", "range>", "list[")
    for wrong in (*types, "\N{HORIZONTAL ELLIPSIS}", "[bold]", "\\["):
        assert wrong not in page
    assert not [line for line in page.splitlines() if line.endswith("-") or len(line) > 100]


def test_a_long_help_page_has_sections_that_name_each_option_once() -> None:
    from kscli.cli.sections import MANY, SECTIONS

    named = [name for names in SECTIONS.values() for name in names.split()]
    known = {name.lstrip("-") for command in commands() for name in option_names(command)}
    assert len(set(named)) == len(named)
    assert set(named) <= known | {"help"}
    page = kscli("edit", "--help").stdout
    heads = [line[:-1] for line in page.splitlines() if line.endswith(":") and line[0] != " "]
    assert heads == [heading for heading in SECTIONS if heading in heads]
    assert "Options" not in heads  # every option is named in another section
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed)) > MANY
    short = {"-m", "-o", "-f", "-q", "--layers"}
    assert {*listed} == {*option_names("edit"), "--help"} - short


def test_a_short_help_page_has_no_sections() -> None:
    page = kscli("models", "--help").stdout
    assert [line for line in page.splitlines() if line.endswith(":") and line[0] != " "] == [
        "Options:"
    ]


def test_an_option_of_one_meaning_is_declared_once() -> None:
    """An option that two commands have is declared in `options`, which both use."""
    declared: dict[str, list[str]] = {}
    for path in sorted((ROOT / "kscli" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                if path.stem != "options":
                    declared.setdefault(str(names[0]), []).append(path.stem)
    assert not {name: files for name, files in declared.items() if len(files) > 1}


def test_no_color_is_honoured(toy: Path) -> None:
    done = kscli_process("topk", "-m", "absent", NO_COLOR="1", FORCE_COLOR="")
    assert "\x1b[" not in done.stderr + done.stdout


def test_a_closed_pipe_ends_quietly(toy: Path) -> None:
    command = f"{sys.executable} -m kscli topk -m toy -k 1000 --layer all -f json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "KSCLI_DIR": str(toy)},
    )
    assert done.stdout == "["
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_version_is_printed() -> None:
    import torch
    import transformers

    from kscli import __version__

    assert kscli("--version").stdout.strip() == f"kscli {__version__}"
    whole = kscli("--version", "-v").stdout.splitlines()
    assert whole[0] == f"kscli {__version__}"
    assert {f"torch {torch.__version__}", f"transformers {transformers.__version__}"} <= {*whole}
    assert any(line.startswith("CUDA ") for line in whole)


def test_stats_to_a_named_file_hold_the_layers_asked_for_and_replace_nothing(toy: Path) -> None:
    path = toy / "s.h5"
    arguments = ("stats", "-m", "toy", "--dir", toy, "--layers", "2", "-o", path)
    assert kscli(*arguments).exit_code == 0
    with h5py.File(path) as file:
        assert file["layer"][()].tolist() == [2]
        assert file["kurtosis"].shape == (1,)
    assert not (toy / "toy" / "stats.h5").exists()
    path.write_text("mine")
    result = kscli(*arguments)
    assert result.exit_code == 1
    assert "--force" in one_sentence(result.stderr)
    assert path.read_text() == "mine"


def test_stats_of_several_models_write_nothing_when_one_lacks_the_layer(tmp_path: Path) -> None:
    write_toy(tmp_path / "a")
    write_toy(tmp_path / "b")
    (tmp_path / "a" / "toy").rename(tmp_path / "one")
    cov, keys = tmp_path / "b" / "toy" / "cov.h5", tmp_path / "b" / "toy" / "keys.h5"
    short = tmp_path / "two" / "pmatrix.h5"
    kscli("pmatrix", "--cov", cov, "--keys", keys, "--layers", "0", "-o", short)
    result = kscli("stats", "-m", "one", "-m", "two", "--dir", tmp_path, "--layers", "2")
    assert result.exit_code == 2
    assert not list(tmp_path.rglob("stats.h5"))


@pytest.mark.parametrize("count", ["0", "-1", "many", "²", "1.5"])
def test_a_count_that_is_no_number_is_wrong_usage(count: str) -> None:
    result = kscli("extract", "--count", count)
    assert result.exit_code == 2
    assert "--count" in one_sentence(result.stderr)


def test_names_are_printed_as_they_are() -> None:
    result = kscli("cache-cov", "--corpus", "my:id:corpus[bold].txt")
    assert "my:id:corpus[bold].txt" in result.stderr.replace("\n", "")


def test_show_as_csv_is_one_table(toy: Path) -> None:
    printed = kscli("show", "toy", "--dir", toy, "-f", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert set(rows[0]) == {"path", "attribute", "value"}
    assert len({row["path"] for row in rows}) == 3


@pytest.mark.parametrize("name", ["f.png", "f.svg", "f.pdf", "report.html"])
def test_a_figure_or_page_is_made_again_where_its_inputs_changed(name: str, toy: Path) -> None:
    path, command = toy / name, "report" if name == "report.html" else "plot heatmap"

    def make(*more: str) -> Result:
        return kscli(*command.split(), "-m", "toy", "--dir", toy, "-o", path, *more)

    assert make().stdout.strip() == str(path)
    before = path.read_bytes()
    again = make()
    assert again.stdout.strip() == str(path)
    assert f"{path} is up to date." in again.stderr
    assert path.read_bytes() == before
    write_keys(toy / "toy" / "keys.h5", np.random.default_rng(5).random((3, 6, 12), np.float32))
    assert kscli("pmatrix", "-m", "toy", "--dir", toy, "--force").exit_code == 0
    assert "made again: its inputs changed" in make().stderr
    assert path.read_bytes() != before
    for other in (["--seed", "1"] if command == "report" else ["--layers", "2"], ["--force"]):
        changed_request = make(*other)
        assert changed_request.exit_code == (0 if other == ["--force"] else 1)
        assert ("--force" in changed_request.stderr) == (changed_request.exit_code == 1)
    path.write_text("mine")
    assert "--force" in one_sentence(make().stderr)
    assert path.read_text() == "mine"


def test_a_grid_is_made_again_as_a_whole(toy: Path) -> None:
    arguments = ("plot", "heatmap", "-m", "toy", "--dir", toy, "--grid", "-o", toy / "g.png")
    assert kscli(*arguments).exit_code == 0
    assert "up to date" in kscli(*arguments).stderr
    assert "up to date" not in kscli(*arguments[:-3], "--grid", "-o", toy / "h.png").stderr


def test_a_figure_of_a_named_file_lies_beside_it(toy: Path) -> None:
    result = kscli("plot", "kurtosis", "--pmatrix", toy / "toy" / "pmatrix.h5")
    assert result.stdout.strip() == str(toy / "toy" / "figures" / "kurtosis.png")


@pytest.mark.parametrize("seed", [-1, 10**30])
@pytest.mark.parametrize(
    "command",
    ["edit", "facts select x", "plot kde", "relations", "report", "risk", "stats", "verify"],
)
def test_seeds_out_of_range_are_refused(command: str, seed: int) -> None:
    result = kscli(*command.split(), "--seed", seed)
    assert result.exit_code == 2
    assert "--seed" in result.stderr
    assert "is not in the range from 0 to" in " ".join(result.stderr.replace("│", " ").split())
