"""What the command line writes: tables on terminals, formats, broken outputs, signals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
from artifact_kit import changed, write_toy
from cli_kit import ROOT, one_sentence

from kscli.cli.output import Format, print_rows
from kscli.tables import Column, Row

COLUMNS = [
    Column("layer", spec="d"),
    Column("fact"),
    *(Column(f"statistic {n}", f"statistic{n}", spec=".4f") for n in range(4)),
]
ROWS: list[Row] = [
    {
        "layer": layer,
        "fact": "The capital of [North Carolina] is [Raleigh].",
        **{f"statistic {n}": (layer + 1) / (n + 3) for n in range(4)},
    }
    for layer in range(3)
]


class Stdout(io.StringIO):
    """A stdout that is a terminal, or is not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def printed(
    rows: list[Row],
    columns: list[Column],
    output: Format,
    monkeypatch: pytest.MonkeyPatch,
    width: int | None = None,
) -> str:
    """What `print_rows` writes, to a terminal where there is a width."""
    stream = Stdout(terminal=width is not None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width or 20))
    monkeypatch.setenv("TERM", "xterm")
    print_rows(rows, columns, output)
    return plain(stream.getvalue())


def plain(text: str) -> str:
    """The text without its styles."""
    return re.sub(r"\x1b\[\d*m", "", text)


@pytest.mark.parametrize("width", [66, 72, 73, 80, 97, 100, 120, 200])
def test_a_terminal_cuts_no_number_and_no_heading(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(ROWS, COLUMNS, Format.table, monkeypatch, width)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "fact", *(f"statistic{n}" for n in range(4))]
    numbers = [[w for w in line.split() if w[0].isdigit()] for line in lines]
    assert [line for line in numbers if line] == [
        [str(layer), *(f"{(layer + 1) / (n + 3):.4f}" for n in range(4))] for layer in range(3)
    ]
    assert "…" not in text
    # Five numeric columns of 5 and 4 * 10, the facts at 11, and five gaps of 1 fit.
    assert max(map(len, lines)) <= width
    assert all(text.count(word) == 3 for word in ("capital", "[North", "Carolina]", "[Raleigh]."))


@pytest.mark.parametrize("width", [20, 40, 58])
def test_a_terminal_too_narrow_for_the_table_has_a_line_a_field(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(ROWS, COLUMNS, Format.table, monkeypatch, width)
    assert max(map(len, text.splitlines())) <= width
    for layer in range(3):
        for n in range(4):
            assert f"statistic{n}: {(layer + 1) / (n + 3):.4f}" in text
    assert all(text.count(word) == 3 for word in ("capital", "[North", "Carolina]", "[Raleigh]."))


def test_spare_columns_go_and_wide_ones_come_with_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = [
        Column("name"),
        Column("a", spec=".3f", spare=1),
        Column("b", "two words", spec=".3f", spare=2),
        Column("c", spec=".3f", wide=True),
    ]
    row = {"name": "some name of three", "a": 0.125, "b": 0.25, "c": 0.5}
    for width, there, left_out in (
        (20, [], "a; two words"),
        (25, ["0.125"], "two words"),
        (33, ["0.125", "0.250"], ""),
        (60, ["0.125", "0.250", "0.500"], ""),
    ):
        text = printed([row], columns, Format.table, monkeypatch, width)
        assert re.findall(r"0\.\d+", text) == there
        assert ("Not shown" in text) == bool(left_out)
        assert left_out in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= width
    assert "0.500" not in printed([row], columns, Format.table, monkeypatch)


def test_a_path_breaks_behind_its_slashes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["/home/", "somebody-of-the-house/", "artifacts/", "a-rather-long-name/", "rome-0-0.h5"]
    for width in (40, 60, 80):
        columns = [Column("path"), Column("p", spec=".3f")]
        lines = printed(
            [{"path": "".join(parts), "p": 0.5}], columns, Format.table, monkeypatch, width
        ).splitlines()
        assert max(map(len, lines)) <= width
        assert all(any(part in line for line in lines) for part in parts)
    # Records, where no table fits.
    columns += [Column(f"p{n}", spec=".3f") for n in range(12)]
    row = {"path": "".join(parts), "p": 0.5} | {f"p{n}": 0.5 for n in range(12)}
    lines = printed([row], columns, Format.table, monkeypatch, 40).splitlines()
    assert "p11: 0.500" in lines
    assert max(map(len, lines)) <= 40
    assert all(any(part in line for line in lines) for part in parts)


def test_a_fact_is_wrapped_between_words_and_not_before_its_brackets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = [Column("fact"), Column("p", spec=".2f")]
    row = {"fact": "The capital of [North Carolina] is [Raleigh].", "p": 0.5}
    text = printed([row], columns, Format.table, monkeypatch, 38)
    assert [line[:31].strip() for line in text.splitlines()[2:4]] == [
        "The capital of [North Carolina]",
        "is [Raleigh].",
    ]


def test_intervals_go_before_the_table_does(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column(name, spec=".2f", interval=True) for name in "abcde"]
    row = {f"{name}{end}": 0.25 for name in "abcde" for end in ("", "_low", "_high")}
    for width, intervals in ((120, True), (64, True), (63, False), (24, False)):
        text = printed([row], columns, Format.table, monkeypatch, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("[0.25, 0.25]") == (5 if intervals else 0)
        assert text.count("0.25") == (15 if intervals else 5)
        assert ("Not shown, for want of width: intervals." in " ".join(text.split())) != intervals


def test_a_spare_column_stays_where_intervals_stand_below_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = [Column(name, spec=".2f", interval=True, spare=name == "d") for name in "abcd"]
    row = {f"{name}{end}": 0.25 for name in "abcd" for end in ("", "_low", "_high")}
    # Three numbers with their intervals beside them need 53 columns, four with them below 51.
    for width, count in ((53, 3), (52, 4), (51, 4), (50, 3)):
        text = printed([row], columns, Format.table, monkeypatch, width)
        assert text.count("[0.25, 0.25]") == count
        assert max(map(len, text.splitlines())) <= width


def test_a_pipe_is_never_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [{"layer": 7, "fact": "word " * 5000 + "end"}]
    lines = printed(rows, COLUMNS[:2], Format.table, monkeypatch).splitlines()
    assert len([line for line in lines if line]) == 3
    assert lines[2].endswith("word end")


def test_a_table_without_rows_is_its_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (None, 80):
        text = printed([], COLUMNS, Format.table, monkeypatch, width)
        assert text.split()[:2] == ["layer", "fact"]


@pytest.mark.parametrize("output", [Format.markdown, Format.latex, Format.table])
def test_a_line_break_in_a_cell_does_not_end_its_row(
    output: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = [Column("fact")]
    whole = printed([{"fact": "a b c"}], columns, output, monkeypatch)
    broken = printed([{"fact": "a\nb\r\n\tc\n\u2028d\x85"}], columns, output, monkeypatch)
    assert len(broken.split("\n")) == len(broken.splitlines()) + 1 == len(whole.split("\n"))


@pytest.mark.parametrize("first", ["[br]", "*", "[X] is"])
def test_a_latex_row_does_not_begin_with_an_argument(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed([{"x": first}], [Column("x")], Format.latex, monkeypatch)
    assert f"  {{}}{first}" in text


def test_latex_escapes_comparisons_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column("x", "|p|>0.1")]
    text = printed([{"x": "a<b"}], columns, Format.latex, monkeypatch)
    assert r"\textbar{}p\textbar{}\textgreater{}0.1 \\" in text
    assert r"a\textless{}b \\" in text


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts whose subjects are not ASCII."""
    folder = tmp_path_factory.mktemp("artifacts")
    write_toy(folder)
    return folder


def shell(command: str, toy: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a bash command in which `kscli` is the program, `-m toy` its model."""
    program = f'kscli() {{ "{sys.executable}" -m kscli "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", program],
        capture_output=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "KSCLI_DIR": str(toy)} | environment,
    )


@pytest.mark.parametrize("arguments", ["topk -m toy", "--help", "--version", "topk --help"])
@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_an_stdout_that_takes_nothing_is_one_sentence(
    arguments: str, stdout: str, toy: Path
) -> None:
    done = shell(f"kscli {arguments} {stdout}", toy)
    assert done.returncode == 1
    one_sentence(done.stderr.decode())


@pytest.mark.parametrize("arguments", ["topk -m toy", "models", "--help", "--version"])
def test_a_reader_that_is_gone_is_no_error(arguments: str, toy: Path) -> None:
    # The reader closes its end at once, and its shell waits for kscli to meet that.
    done = shell(f"kscli {arguments} | {{ exec 0<&-; sleep 1.5; }}", toy)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_closed_stdin_and_stderr_change_nothing(toy: Path) -> None:
    expected = shell("kscli topk -m toy -f csv", toy)
    assert shell("kscli topk -m toy -f csv <&- 2>&-", toy).stdout == expected.stdout
    assert shell("kscli topk -m toy --layer 99 2>&-", toy).returncode == 2
    assert shell("kscli topk -m toy --layer 99 2>/dev/full", toy).returncode == 2


def test_what_an_encoding_lacks_is_escaped(toy: Path) -> None:
    for encoding, size in (("ascii", rb"Gr\xf6\xdfe 0"), ("latin-1", "Größe 0".encode("latin-1"))):
        done = shell("kscli topk -m toy -f csv", toy, PYTHONIOENCODING=encoding)
        assert done.returncode == 0
        assert size in done.stdout
    done = shell("kscli topk -m toy -f json", toy, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)[0]["subject_i"].startswith("Größe ")


def on_terminal(*arguments: str | Path) -> str:
    """What kscli writes on a real terminal of 80 columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-m", "kscli", *map(str, arguments)]
    done = subprocess.run(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        check=False,
        timeout=60,
    )
    text = plain(os.read(ours, 1 << 16).decode())
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_real_terminal_of_80_columns_shows_every_number(toy: Path) -> None:
    assert "same last" in on_terminal("topk", "-m", "toy", "-q", "--dir", toy)


@pytest.mark.parametrize("command", ["plot heatmap -m toy", "corpus peek tiny --samples 2"])
def test_what_imports_much_says_so_first_on_a_terminal(
    command: str, toy: Path, tmp_path: Path
) -> None:
    first = " ".join(command.split()[: 1 + command.startswith("corpus")])
    more = ("--dir", toy, "-o", tmp_path / "new.png") if first == "plot" else ()
    assert on_terminal(*command.split(), *more).startswith(f"kscli {first} begins: ")
    more = (*more, "--force") if more else ()
    assert f"kscli {first} begins" not in on_terminal(*command.split(), *more, "-q")
    assert f"kscli {first} begins" not in shell(f"kscli {command} 2>&1", toy).stdout.decode()


def test_a_terminal_shows_the_begin_of_a_digest_and_a_pipe_all(toy: Path) -> None:
    path, digest = toy / "keys.h5", "0123456789abcdef" * 4
    shutil.copy(toy / "toy" / "keys.h5", path)
    with changed(path) as contents:
        contents.attrs["facts_identity"] = digest
    text = on_terminal("show", path)
    assert f" {digest[:32]}...\n" in text.replace("\r", "")
    assert digest in shell(f"kscli show {path}", toy).stdout.decode()


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_at_any_time_is_one_line(number: signal.Signals, word: str, toy: Path) -> None:
    """Every import is a time: the signal falls on the n-th that kscli does itself."""
    program = (
        "import builtins, os, signal, sys\n"
        "from kscli.__main__ import main\n"
        "original, left = builtins.__import__, [int(sys.argv.pop(1))]\n"
        "def counting(name, *arguments):\n"
        "    left[0] -= 1\n"
        f"    if left[0] == 0: os.kill(os.getpid(), {int(number)})\n"
        "    return original(name, *arguments)\n"
        "builtins.__import__ = counting\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KSCLI_DIR": str(toy)}
    for count in (2, 40, 300, 800):
        done = subprocess.run(
            [sys.executable, "-c", program, str(count), "topk", "-m", "toy"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment,
        )
        assert done.stderr == f"error: {word}; no half-made file was left behind.\n", count
        assert done.returncode == 128 + number, count
        assert done.stdout == ""


def run_topk(program: str, toy: Path) -> subprocess.CompletedProcess[str]:
    """`topk` of the toy by a program that has changed something of it."""
    return subprocess.run(
        [sys.executable, "-c", program, "topk", "-m", "toy", "-q", "--dir", str(toy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


# Where Python or C drops what a signal's handler raises.
SWALLOWED = {
    "a weakref's callback": """
        class Thing: pass
        thing = Thing()
        reference = weakref.ref(thing, lambda _: kill())
        del thing
    """,
    "__del__": """
        class Thing:
            def __del__(self): kill()
        Thing()
    """,
    "a comparison that C makes": """
        class Key:
            def __hash__(self): return 1
            def __eq__(self, other): kill()
        try: {Key(): 1}[Key()]
        except BaseException: pass
    """,
    "a callback of HDF5": """
        import h5py
        with h5py.File("x.h5", "w", driver="core", backing_store=False) as file:
            file["a"] = 1
            try: file.visititems(lambda *_: kill())
            except BaseException: pass
    """,
    "an error of another kind": """
        try:
            try: kill()
            except BaseException: raise RuntimeError("of a library")
        except RuntimeError: pass
    """,
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", SWALLOWED)
def test_a_signal_is_never_swallowed(place: str, number: signal.Signals, toy: Path) -> None:
    """It falls where its exception is lost, and the command goes on for a while."""
    program = (
        "import os, sys, time, weakref\n"
        "import kscli.cli.topk\n"
        "from kscli.__main__ import main\n"
        f"def kill(): os.kill(os.getpid(), {int(number)})\n"
        "original = kscli.cli.topk.print_rows\n"
        "def print_rows(*arguments, **named):\n"
        f"{textwrap.indent(textwrap.dedent(SWALLOWED[place]), '    ')}\n"
        "    print('went on', flush=True)\n"
        "    for _ in range(100): time.sleep(0.1)\n"
        "    original(*arguments, **named)\n"
        "kscli.cli.topk.print_rows = print_rows\n"
        "main()\n"
    )
    done = run_topk(program, toy)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert done.stderr == f"error: {word}; no half-made file was left behind.\n"
    assert done.returncode == 128 + number
    assert done.stdout == "went on\n"


def test_a_signal_that_was_swallowed_is_told_at_the_end(toy: Path) -> None:
    """Nothing is left to do by the time it would be raised again."""
    program = (
        "import os, sys, kscli.cli.topk\n"
        "from kscli.__main__ import main\n"
        "original = kscli.cli.topk.print_rows\n"
        "def print_rows(*arguments, **named):\n"
        "    original(*arguments, **named)\n"
        "    try: os.kill(os.getpid(), 15)\n"
        "    except BaseException: pass\n"
        "kscli.cli.topk.print_rows = print_rows\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, "topk", "-m", "toy", "-q", "--dir", str(toy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 143
    assert done.stderr == "error: terminated; no half-made file was left behind.\n"


def test_cleaning_up_after_a_signal_is_not_disturbed(tmp_path: Path, toy: Path) -> None:
    """What a stopped command does before it ends may take longer than a signal is waited for."""
    program = (
        "import contextlib, os, sys, time, kscli.cli.topk\n"
        "from kscli.__main__ import main\n"
        "@contextlib.contextmanager\n"
        "def cleaning():\n"
        "    try: yield\n"
        "    finally:\n"
        "        for _ in range(5): time.sleep(0.1)\n"
        "        print('clean', flush=True)\n"
        "def print_rows(*arguments, **named):\n"
        "    with cleaning():\n"
        "        os.kill(os.getpid(), 15)\n"
        "kscli.cli.topk.print_rows = print_rows\n"
        "main()\n"
    )
    done = run_topk(program, toy)
    assert (done.returncode, done.stdout) == (143, "clean\n")


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2> >(exec 0<&-)"])
def test_a_stderr_that_takes_nothing_costs_no_result(
    stderr: str, toy: Path, tmp_path: Path
) -> None:
    made = tmp_path / "p.h5"
    files = f"--cov {toy}/toy/cov.h5 --keys {toy}/toy/keys.h5"
    done = shell(f"kscli pmatrix {files} -o {made} {stderr}", toy)
    assert done.returncode == 0
    assert made.exists()
    assert shell(f"kscli topk --nothing {stderr}", toy).returncode == 2
    assert shell(f"kscli pmatrix {files} -o {made} {stderr}; exit $?", toy).returncode == 0
    assert shell(f"kscli topk --pmatrix {toy}/toy/cov.h5 {stderr}", toy).returncode == 1
