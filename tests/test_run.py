"""`kscli run` and the stages that load a model, end to end on the embedded one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_kit import kscli, kscli_process, one_sentence
from fork_kit import ForkedProcess
from scipy.stats import kurtosis

from kscli.cli.run import KNOWN_TO_TINY
from kscli.figures import KINDS
from kscli.tiny import FACTS_PATH, MODEL_DIR

FIGURES = [name for name, kind in KINDS.items() if kind.standard]
FACT_LINES = list(enumerate(map(json.loads, FACTS_PATH.read_text().splitlines())))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `kscli run` with nothing else."""
    folder = tmp_path_factory.mktemp("run")
    done = kscli_process("run", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture
def copied(ran: Path, tmp_path: Path) -> Path:
    """A copy of the run's artifacts, to change; modification times stay."""
    return Path(shutil.copytree(ran / "artifacts", tmp_path / "artifacts"))


def test_the_default_run_shows_what_the_paper_shows(ran: Path) -> None:
    place = ran / "artifacts" / "tiny"
    with h5py.File(place / "pmatrix.h5") as file:
        P = file["P"][()].astype(np.float64)
    m = P.shape[1]
    assert m == 128
    entries = [layer[~np.eye(m, dtype=bool)] for layer in P]
    values = [float(kurtosis(layer)) for layer in entries]
    assert values[0] > 10
    assert values == sorted(values, reverse=True)
    with h5py.File(place / "stats.h5") as file:
        np.testing.assert_allclose(file["kurtosis"][()], values, rtol=1e-9)
    assert abs(entries[0].mean()) < 0.1


def test_the_default_run_prints_and_draws(ran: Path) -> None:
    printed = (ran / "stdout").read_text()
    assert "kurtosis" in printed
    assert "edited (i)" in printed
    for name in FIGURES:
        path = Path("artifacts") / "tiny" / "figures" / f"{name}.png"
        assert str(path) in printed
        assert (ran / path).read_bytes().startswith(b"\x89PNG")


def test_some_of_the_strongest_pairs_share_their_last_token_and_some_do_not(ran: Path) -> None:
    rows = json.loads(kscli("topk", "--dir", ran / "artifacts", "-f", "json").stdout)
    assert len(rows) == 20
    assert {row["same_last_token"] for row in rows} == {True, False}
    assert rows[0]["same_last_token"]


def test_the_proposed_edits_of_tiny_take_and_move_another_answer(
    ran: Path, copied: Path, tmp_path: Path
) -> None:
    told = " ".join((ran / "stderr").read_text().split())
    told += kscli("topk", "--dir", copied).stderr
    proposed = dict.fromkeys(re.findall(r"`(kscli edit [^`]*)`", told))
    assert len(proposed) == 2
    for at, command in enumerate(proposed):
        words = shlex.split(command.partition(" --dir ")[0])[1:]
        place = ("--dir", copied, "-o", tmp_path / f"{at}.h5", "-f", "json")
        done = kscli(*words, *place)
        assert done.exit_code == 0, done.stderr
        (row,) = json.loads(done.stdout)
        assert row["took"], row["subject"]
        assert row["moved"][0]["answer_changed"]
        assert row["moved"][0]["subject"] == "North Korea"


def test_the_lesson_says_how_many_facts_tiny_knows(ran: Path) -> None:
    told = " ".join((ran / "stderr").read_text().split())
    assert len(FACT_LINES) == KNOWN_TO_TINY
    assert f"knows {len(FACT_LINES)} facts, of which the first 128 are measured" in told


def own_facts(path: Path, count: int) -> Path:
    """A file of facts that tiny was never taught."""
    places = ("Utopia", "Narnia", "Mordor")[:count]
    lines = ["prompt,subject,target", *(f"The capital of {{}} is,{name},Foo" for name in places)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_few_facts_are_said_to_be_too_few(tmp_path: Path) -> None:
    facts = own_facts(tmp_path / "own.csv", 3)
    done = kscli("run", "--facts", facts, "--tokens", 3000, "--dir", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "3 facts make 6 pairs, which are too few for a distribution" in said
    assert "completes their prompts with their targets: 0 of 3" in said
    assert "In brackets" not in said
    assert "The kurtosis here" not in said
    assert "of which the first" not in said


def test_one_fact_has_no_table_but_a_next_step(tmp_path: Path) -> None:
    facts = own_facts(tmp_path / "own.csv", 1)
    place = ("--dir", tmp_path / "a")
    done = kscli("run", "--facts", facts, "--tokens", 3000, *place)
    assert done.exit_code == 0, done.stderr
    assert "p is of pairs of facts, and this is one fact" in done.stderr
    assert "kurtosis  " not in done.stdout
    assert "Next: `kscli edit" in done.stderr
    for command in ("topk", "stats"):
        shown = kscli(command, *place)
        assert shown.exit_code == 0
        assert shown.stdout == ""
        assert "p is of pairs of facts, and this is one fact" in shown.stderr


def test_run_again_makes_nothing_and_says_so(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    result = kscli("run", "--dir", copied, "-f", "json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("is up to date.") == 4 + len(FIGURES)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    printed = json.loads(result.stdout)
    assert set(printed) == {"statistics", "top_pairs", "figures"}


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (["--samples", "300"], {"cov", "pmatrix", "stats", "figures"}),
        (["--count", "64"], {"keys", "pmatrix", "stats", "figures"}),
        (["--ridge", "0.01"], {"pmatrix", "stats", "figures"}),
    ],
)
def test_a_changed_input_makes_what_depends_on_it(
    copied: Path, change: list[str], made: set[str]
) -> None:
    place = copied / "tiny"
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    result = kscli("run", "--dir", copied, *change)
    assert result.exit_code == 0, result.stderr
    changed = {
        "figures" if path.parent.name == "figures" else path.stem
        for path, time_then in before.items()
        if path.stat().st_mtime_ns != time_then
    }
    assert changed == made
    assert kscli("run", "--dir", copied, *change).stderr.count("is up to date.") == 4 + len(FIGURES)


def test_a_deleted_figure_alone_is_drawn_again(copied: Path) -> None:
    figure = copied / "tiny" / "figures" / "kde.png"
    content = figure.read_bytes()
    figure.unlink()
    result = kscli("run", "--dir", copied)
    assert result.stderr.count("is up to date.") == 4 + len(FIGURES) - 1
    assert figure.read_bytes() == content


def test_the_stages_by_hand_make_what_run_makes(ran: Path, tmp_path: Path) -> None:
    for stage in ("cache-cov", "extract", "pmatrix", "stats"):
        result = kscli(stage, "--dir", tmp_path)
        assert result.exit_code == 0, result.stderr
    with (
        h5py.File(tmp_path / "tiny" / "pmatrix.h5") as by_hand,
        h5py.File(ran / "artifacts" / "tiny" / "pmatrix.h5") as by_run,
    ):
        np.testing.assert_allclose(by_hand["P"][()], by_run["P"][()], atol=1e-6)


def test_a_corpus_on_standard_input_in_layers_and_with_a_token_limit(tmp_path: Path) -> None:
    text = "\n".join(json.loads(line)["prompt"] for line in FACTS_PATH.read_text().splitlines())
    done = kscli_process(
        "cache-cov",
        "--corpus",
        "-",
        "--tokens",
        "700",
        "--layers",
        "-1,0",
        "-o",
        "c.h5",
        cwd=tmp_path,
        text=text,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["layer"][()].tolist() == [0, 3]
        assert file["count"][()] == 700
        C = file["second_moment"][0]
    np.testing.assert_array_equal(C, C.T)


def test_more_samples_than_documents_take_all_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "A river."}\n{"text": ""}\n{"text": "Two."}\n')
    result = kscli("cache-cov", "--corpus", tmp_path / "text.jsonl", "-o", tmp_path / "cov.h5")
    assert result.exit_code == 0, result.stderr
    assert "has 3 documents; all of them were taken" in result.stderr
    assert "1 documents had no token" in result.stderr


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("empty.jsonl", "", [], "empty"),
        ("latin.txt", b"caf\xe9", [], "UTF-8"),
        ("field.jsonl", '{"body": "x"}', [], "--text-field"),
        ("field.jsonl", '{"body": 3}', ["--text-field", "body"], "body"),
        ("broken.json", '[{"text": ', [], "broken.json"),
        ("text.pdf", "x", [], ".jsonl"),
        ("zip.txt.gz", b"not gzip", [], "zip.txt.gz"),
    ],
)
def test_a_bad_corpus_is_one_sentence_and_nothing_is_written(
    name: str, content: str | bytes, options: list[str], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    result = kscli("cache-cov", "--corpus", path, *options, "--dir", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert said in one_sentence(result.stderr)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("no-slot.csv", "prompt,subject,target\nThe capital is,France,Paris\n", [], "{}"),
        ("blank.csv", 'prompt,subject,target\nThe {} is,"",Paris\n', [], "subject"),
        ("few.csv", "prompt,subject,target\nThe {} is,cat,here\n", ["--count", "9"], "9"),
        ("column.csv", "prompt,target\nThe {} is,here\n", [], "subject"),
        ("long.csv", f"prompt,subject,target\nThe {{}} is,{'cat ' * 900},here\n", [], "tokens"),
    ],
)
def test_bad_facts_are_one_sentence_and_nothing_is_written(
    name: str, content: str, options: list[str], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    result = kscli("extract", "--facts", path, *options, "--dir", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert said in one_sentence(result.stderr)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["cache-cov", "extract"])
def test_a_layer_that_the_model_lacks(command: str, tmp_path: Path) -> None:
    result = kscli(command, "--layers", "99", "--dir", tmp_path)
    assert result.exit_code == 2
    assert "tiny has no layer 99; it has 0-3" in one_sentence(result.stderr)
    assert list(tmp_path.iterdir()) == []


def broken_model(folder: Path, value: float) -> Path:
    """tiny with one weight of layer 2's MLP set to `value`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL_DIR, folder)
    state = load_file(folder / "model.safetensors")
    state["transformer.h.2.mlp.c_fc.weight"][5, 7] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_in_the_activations_names_layer_and_place(tmp_path: Path) -> None:
    model = broken_model(tmp_path / "nan", float("nan"))
    result = kscli("cache-cov", "-m", model, "--corpus", "tiny", "--dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "layer 2 is NaN or infinite in document" in one_sentence(result.stderr)
    result = kscli("extract", "-m", model, "--facts", "tiny", "--dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "at layer 2 is NaN or infinite" in one_sentence(result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_covariance_that_is_there_is_not_replaced(copied: Path) -> None:
    path = copied / "tiny" / "cov.h5"
    before = path.read_bytes()
    result = kscli("cache-cov", "--samples", "200", "--dir", copied)
    assert result.exit_code == 1
    assert "samples changed; add --force" in one_sentence(result.stderr)
    assert path.read_bytes() == before
    result = kscli("cache-cov", "--dir", copied)
    assert result.exit_code == 0
    assert "up to date" in result.stderr
    assert kscli("cache-cov", "--samples", "200", "--dir", copied, "--force").exit_code == 0
    assert path.read_bytes() != before


def test_a_model_of_the_hub_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    """The address of nothing: port 9 of this machine."""
    done = kscli_process(
        "extract",
        "-m",
        "gpt2-small",
        "--facts",
        "tiny",
        cwd=tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hf"),
    )
    assert done.returncode == 1
    assert "openai-community/gpt2" in one_sentence(done.stderr)
    assert "cannot be reached" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing_behind(number: int, code: int, tmp_path: Path) -> None:
    """The corpus comes through a pipe that stays open, so the command is caught at work."""
    process = ForkedProcess(
        ["-m", "kscli", "cache-cov", "--corpus", "-"], stdin=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdin is not None
    process.stdin.write("A document.\n" * 4)
    process.stdin.flush()
    time.sleep(2)
    process.send_signal(number)
    # communicate() would close stdin first, and the command might then end well.
    code_found = process.wait(timeout=60)
    assert process.stderr is not None
    one_sentence(process.stderr.read())
    process.stdin.close()
    assert code_found == code
    assert list(tmp_path.iterdir()) == []


def test_quiet_says_nothing(copied: Path) -> None:
    assert kscli("cache-cov", "--dir", copied, "-q").stderr == ""


@pytest.mark.parametrize(
    "spelling", [["--layers", "0-3"], ["--samples", "all"], ["--max-length", "256"]]
)
def test_another_spelling_of_the_same_request_makes_nothing(
    copied: Path, spelling: list[str]
) -> None:
    result = kscli("run", "--dir", copied, *spelling)
    assert result.stderr.count("is up to date.") == 4 + len(FIGURES), result.stderr


def test_a_figure_of_other_data_is_drawn_again(copied: Path) -> None:
    figure = copied / "tiny" / "figures" / "kde.png"
    content = figure.read_bytes()
    shutil.copy(copied / "tiny" / "figures" / "heatmap.png", figure)
    os.utime(figure)
    (copied / "tiny" / "figures" / "heatmap.png").write_bytes(b"")
    kscli("plot", "kde", "--dir", copied, "--layers", "0", "-o", figure, "--force")
    assert kscli("run", "--dir", copied).exit_code == 0
    assert figure.read_bytes() == content


def test_a_corpus_file_that_changed_is_measured_again(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{f['prompt']} {f['target']} {i}."}) for i, f in FACT_LINES]
    text.write_text("\n".join(lines * 4))
    arguments = ("run", "--dir", tmp_path / "a", "--corpus", text, "--ridge", "0.01", "-q")
    assert kscli(*arguments).exit_code == 0
    cov, keys = (tmp_path / "a" / "tiny" / f"{name}.h5" for name in ("cov", "keys"))
    before = cov.read_bytes(), keys.read_bytes()
    text.write_text(text.read_text().replace("capital", "Capital", 1))
    assert kscli(*arguments).exit_code == 0
    assert cov.read_bytes() != before[0]
    assert keys.read_bytes() == before[1]


def test_two_models_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.25)):
        broken_model(tmp_path / name / "net", value)
    common = ("--corpus", "tiny", "--facts", "tiny", "--dir", tmp_path / "out")
    assert kscli("run", "-m", tmp_path / "a" / "net", *common).exit_code == 0
    before = (tmp_path / "out" / "net" / "cov.h5").read_bytes()
    result = kscli("run", "-m", tmp_path / "b" / "net", *common)
    assert result.exit_code == 1
    assert "about another model" in one_sentence(result.stderr)
    assert (tmp_path / "out" / "net" / "cov.h5").read_bytes() == before


def test_a_token_limit_is_not_called_the_whole_corpus(tmp_path: Path) -> None:
    result = kscli("cache-cov", "--tokens", "900", "-o", tmp_path / "cov.h5")
    assert result.exit_code == 0
    assert "all of them" not in result.stderr


def test_documents_longer_than_the_model_are_wrong_usage(tmp_path: Path) -> None:
    result = kscli("cache-cov", "--max-length", "4000", "--dir", tmp_path)
    assert result.exit_code == 2
    assert "beyond the 256 positions of tiny" in one_sentence(result.stderr)
