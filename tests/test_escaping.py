"""Text from data is text, whatever way it goes out: formats, messages, the page, figures, files."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from artifact_kit import LAYERS, write_cov, write_keys
from cli_kit import kscli, kscli_process, one_sentence
from matplotlib.text import Text

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.cli.complete import complete_model
from kscli.escaping import escaped, escaped_json
from kscli.facts import Fact, read_facts, write_records
from kscli.figures import KINDS, FigureOptions, Source
from kscli.figures.saving import render
from kscli.pmatrix import write_pmatrix
from kscli.tiny import FACTS_PATH, MODEL_DIR

# What acts on a terminal, on the order of characters, on lines or on markup.
ACTIVE = "".join(
    character
    for character in map(chr, range(0x10000))
    if unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
    or unicodedata.bidirectional(character)
    in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
)
HOSTILE = (
    "\x1b]0;owned\x07\x1b[31m[red]x[/red] \x9b2J\x85",
    "a\rb\nc\td\v\f\x1c\u2028e\u2029",
    "\u202edesrever\u202c \u2066i\u2069 \u200f",
    "<script>alert(1)</script> $\\frac{a}$ \\input{x} a_b & 50% # ~ ^ | `c` *d* [e](http://f)",
    "=1+1;\"q\",'r'",
    "plain",
)
FORMATS = ("table", "markdown", "latex", "csv", "tsv", "json")


def acts(text: str, ours: str = "\n") -> set[str]:
    """The characters of a text that act."""
    return (set(text) & set(ACTIVE)) - set(ours)


def test_every_character_that_acts_is_escaped_and_no_other() -> None:
    assert len(ACTIVE) > 2000
    for character in map(chr, range(0x3000)):
        shown = escaped(f"a{character}b")
        assert not acts(shown, "")
        if unicodedata.category(character)[0] not in "CZ" or character == " ":
            assert shown == f"a{character}b"
    assert escaped("\x1b[0m\n\ud800\u202e") == r"\x1b[0m\n\ud800\u202e"
    assert escaped("a\tb\n", keep="\n\t") == "a\tb\n"


def test_json_is_exact() -> None:
    apart = " ".join(ACTIVE)  # two halves of a surrogate pair side by side are the whole
    text = escaped_json(json.dumps([apart], ensure_ascii=False))
    assert not acts(text, "")
    assert json.loads(text) == [apart]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the matrices of a model `toy` whose facts, and whose name, are hostile."""
    root = tmp_path_factory.mktemp("hostile")
    place = root / "toy"
    facts = [
        Fact(f"The {text} of {{}} is", text, f" {text}", HOSTILE[at % 2], at, text)
        for at, text in enumerate(HOSTILE)
    ]
    name = "m$x$\x1b[31m\n\u202e[b]"
    write_cov(place / "cov.h5", model=name)
    write_keys(place / "keys.h5", facts=facts, model=name)
    with CovarianceFile(place / "cov.h5") as cov, KeysFile(place / "keys.h5") as keys:
        write_pmatrix(cov, keys, place / "pmatrix.h5", layers=LAYERS)
    return root


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize(
    "command",
    [
        ["topk"],
        ["topk", "--strongest"],
        ["stats", "--repeats", 100],
        ["stats", "--spectrum"],
        ["relations"],
        ["risk", "--layer", "0"],
        ["show"],
    ],
    ids=lambda command: " ".join(map(str, command)),
)
def test_no_format_lets_text_act(command: list[str | int], output: str, hostile: Path) -> None:
    names = ["toy"] if command[0] == "show" else ["-m", "toy"]
    done = kscli(*map(str, command), *names, "--dir", hostile, "-f", output)
    assert done.exit_code == 0, done.stderr
    assert not acts(done.stdout, "\n\t" if output == "tsv" else "\n")
    assert not acts(done.stderr)


def test_a_row_of_csv_is_a_line_for_every_reader(hostile: Path) -> None:
    m = len(HOSTILE)
    for output, delimiter in (("csv", ","), ("tsv", "\t")):
        done = kscli("topk", "-m", "toy", "--dir", hostile, "-f", output, "-k", "1000")
        rows = list(csv.reader(io.StringIO(done.stdout, newline=""), delimiter=delimiter))
        assert len(rows) == len(done.stdout.splitlines()) == m * (m - 1) + 1
        assert len(set(map(len, rows))) == 1
        told = {row[rows[0].index("subject_i")] for row in rows[1:]}
        assert told == set(map(escaped, HOSTILE))


def test_json_gives_the_very_text(hostile: Path) -> None:
    done = kscli("topk", "-m", "toy", "--dir", hostile, "-f", "json", "-k", "1000")
    assert {row["subject_i"] for row in json.loads(done.stdout)} == set(HOSTILE)


def test_markdown_has_no_markup_of_the_data(hostile: Path) -> None:
    text = kscli("topk", "-m", "toy", "--dir", hostile, "-f", "markdown", "-k", "1000").stdout
    lines = text.splitlines()
    columns = [re.sub(r"\\.", "", line).count("|") for line in lines]
    assert len(set(columns)) == 1
    # What Markdown would read as markup, once what stands behind a backslash is gone.
    left = re.sub(r"\\[!-/:-@\[-`{-~]", "", "\n".join(lines[2:]))
    assert not re.search(r"<|`|\*|\]\(|&\w", left)


def test_latex_has_no_command_of_the_data(hostile: Path) -> None:
    text = kscli("topk", "-m", "toy", "--dir", hostile, "-f", "latex", "-k", "1000").stdout
    body = text.partition("\\hline\n")[2].rpartition("\\end{tabular}")[0]
    commands = set(re.findall(r"\\([a-z]+)", body))
    assert commands <= {
        *("hline", "textbackslash", "textasciitilde", "textasciicircum"),
        *("textless", "textgreater", "textbar"),
    }
    assert not re.search(r"(?<!\\)[%#$]", body)


def test_the_page_has_no_markup_of_the_data(hostile: Path, tmp_path: Path) -> None:
    done = kscli("report", "-m", "toy", "--dir", hostile, "-o", tmp_path / "r.html")
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "r.html").read_text("utf-8")
    assert not acts(page)
    assert "<script>alert" not in page
    assert html.escape(escaped(HOSTILE[1])) in page
    assert "\\n" not in re.sub(
        r"a\\rb\\nc|31m\\n", "", re.sub("(?s)<(script|style).*?</", "", page)
    )


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.source == "pmatrix"])
def test_labels_of_figures_are_text(kind: str, hostile: Path) -> None:
    with PMatrixFile(hostile / "toy" / "pmatrix.h5") as matrices:
        grids = (False, True) if "grid" in KINDS[kind].options else (False,)
        for grid in grids:
            for sources in ([Source(matrices, (0, 1))], [Source(matrices, (0,))] * 2):
                fig = KINDS[kind].draw(sources, FigureOptions(grid=grid))
                for text in fig.findobj(Text):
                    assert not acts(text.get_text())
                    assert not (text.get_parse_math() and "$x$" in text.get_text())
                ElementTree.fromstring(render(fig, "svg"))


def test_messages_are_text(tmp_path: Path) -> None:
    name = "\x1b[31m[red]\u202e\n\x9b.jsonl"
    for command in (
        ["extract", "--facts", name],
        ["cache-cov", "--corpus", name],
        ["topk", "--pmatrix", name],
        ["import-cov", name, "-m", "tiny"],
        ["stats", "--\x1b[31m"],
        ["topk", "-f", "\x1b[31m"],
        ["\x1b[31m"],
    ):
        done = kscli_process(*command, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert not acts(done.stdout + done.stderr), done.stderr
        assert "\\x1b[31m" in done.stderr
        if name in command:
            assert one_sentence(done.stderr).replace("'", "").count("[red]") == 1


def test_completion_offers_no_name_that_acts(tmp_path: Path) -> None:
    class Context:
        params = {"directory": str(tmp_path)}  # noqa: RUF012

    for name in ("_mine", "_\x1b[31m", "_\nx", "_\u202e"):
        (tmp_path / name).mkdir()
    assert complete_model(Context(), "_") == ["_mine"]


def test_facts_files_are_exact_and_do_not_act(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    fact = {"prompt": "The \x1b {} is", "subject": HOSTILE[2], "target": "\x9b\u2028"}
    write_records(path, [fact | {"model": "caf\udce9"}], force=False)
    assert not acts(path.read_text("utf-8"))
    (read,) = read_facts(path).facts
    assert (read.prompt, read.subject, read.target) == tuple(fact.values())


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is not UTF-8."""
    folder = os.fsencode(tmp_path_factory.mktemp("latin")) + b"/caf\xe9"
    try:
        Path(os.fsdecode(folder)).mkdir()
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    return Path(os.fsdecode(folder))


def test_a_path_that_is_no_utf8_is_a_path(latin: Path) -> None:
    shutil.copytree(MODEL_DIR, latin / "model")
    shutil.copy(FACTS_PATH, latin / "facts.jsonl")
    (latin / "corpus.txt").write_text("the river of a city in the north of a land. " * 400)
    model = ("-m", latin / "model", "--dir", latin)
    for command in (
        ("cache-cov", "--corpus", latin / "corpus.txt", "--dtype", "float32"),
        ("extract", "--facts", latin / "facts.jsonl", "--count", "8", "--dtype", "float32"),
        ("pmatrix", "--ridge", "1e-3"),
        ("stats", "--repeats", "100"),
        ("topk",),
        ("plot", "heatmap", "-o", latin / "p.png"),
        ("report", "-o", latin / "r.html"),
        ("facts", "check", "--facts", latin / "facts.jsonl", "--count", "4"),
        ("edit", "--edits", "1", "--steps", "2", "--save-model", latin / "edited"),
    ):
        done = kscli_process(*command, *model)
        assert done.returncode == 0, (command, done.stderr)
        assert not acts(done.stdout + done.stderr)
    with KeysFile(latin / "model" / "keys.h5") as keys:
        assert keys.about.facts_name == f"{latin}/facts.jsonl".replace("\udce9", r"\udce9")
