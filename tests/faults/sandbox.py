"""Commands in forked processes that are killed or starved of disk, and what came of it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import fork_kit

HANGS = 120.0
KINDS = ("cov", "keys", "pmatrix", "stats", "edits", "checkpoint", "facts")
COLUMNS = ("tried", "survived", "wrong", "lost", "traceback", "crashed")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status (negative: a signal's number; None: it hung)."""

    code: int | None
    out: str
    err: str

    @property
    def fault(self) -> str | None:
        """`crashed` for a signal or a hang, `traceback` for an error that no one foresaw."""
        if self.code is None or self.code < 0:
            return "crashed"
        return "traceback" if "Traceback" in self.err else None


def kscli(
    folder: Path,
    *arguments: str | Path,
    after: float | None = None,
    send: int = signal.SIGKILL,
    most_bytes: int | None = None,
) -> Done:
    """Run a command in `folder`, in a fork of this process.

    The signal `send` comes `after` so many seconds; no file grows beyond `most_bytes`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _run(folder, list(map(str, arguments)), out.fileno(), err.fileno(), most_bytes)
        code = _wait(pid, after, send)
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode("utf-8", "replace"))
    return Done(code, *said)


def _run(folder: Path, arguments: list[str], out: int, err: int, most_bytes: int | None) -> None:
    code = 70
    try:
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        own = {"KSCLI_DIR": "art", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(fork_kit.ROOT)}
        request = {
            "arguments": ["-m", "kscli", *arguments],
            "environment": dict(os.environ) | fork_kit.ONE_THREAD | own,
            "folder": str(folder),
        }
        code = fork_kit._child([os.open(os.devnull, os.O_RDONLY), out, err], request)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, after: float | None, send: int) -> int | None:
    began = time.monotonic()
    sent = hung = False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return None if hung else os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if after is not None and passed >= after and not sent:
            os.kill(pid, send)
            sent = True
        if passed > HANGS and not hung:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.002)


@dataclass
class Tally:
    """How often what came of the faults of one kind, and what the first of the bad ones was."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: str, what: str = "", count: int = 1) -> None:
        """Count a fault by its outcome, one of `COLUMNS`; `what` says which it was."""
        self.counts["tried"] += count
        self.counts[outcome] += count
        if outcome != "survived":
            self.first.setdefault(outcome, what)

    @property
    def bad(self) -> int:
        """How many were not survived."""
        return self.counts["tried"] - self.counts["survived"]


def table(tallies: Iterable[Tally]) -> str:
    """The tallies as a Markdown table, and below it the first bad case of each."""
    lines = ["| fault | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    cases = []
    for each in tallies:
        row = [each.name, *(str(each.counts[column]) for column in COLUMNS)]
        lines.append("| " + " | ".join(row) + " |")
        cases += [f"{each.name}, {outcome}: {what}" for outcome, what in each.first.items()]
    return "\n".join(lines + cases)


@dataclass(frozen=True)
class Artifacts:
    """Sound files of every kind of `tiny`, in `folder`, and the command that reads each."""

    folder: Path

    def path(self, kind: str) -> Path:
        """Where the file of a kind lies."""
        tiny = self.folder / "art" / "tiny"
        return {
            "edits": tiny / "edits" / "rome-0-0.h5",
            "facts": tiny / "facts.jsonl",
            "checkpoint": self.folder / "cut.h5.checkpoint" / "state-000000.h5",
        }.get(kind, tiny / f"{kind}.h5")

    def reader(self, kind: str, path: Path, out: Path) -> tuple[str | Path, ...]:
        """A command that reads the file at `path`, and writes, if it writes, to `out`."""
        tiny = self.folder / "art" / "tiny"
        commands: dict[str, tuple[str | Path, ...]] = {
            "cov": ("pmatrix", "--cov", path, "--keys", tiny / "keys.h5", "-o", out, "-q"),
            "keys": ("pmatrix", "--keys", path, "--cov", tiny / "cov.h5", "-o", out, "-q"),
            "pmatrix": ("topk", "--pmatrix", path, "-f", "json"),
            "stats": ("show", path, "-f", "json"),
            "edits": ("verify", path, "-f", "json", "-q", "--repeats", "100"),
            "facts": ("facts", "select", path, "--count", "all", "-o", out, "-q"),
            "checkpoint": (*CORPUS, "-o", out),
        }
        return commands[kind]

    def read(self, kind: str, data: bytes, folder: Path) -> tuple[Done, bytes]:
        """What a command makes of a file of these bytes: how it ended, and what it wrote."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        out = folder / ("out.jsonl" if kind == "facts" else "out.h5")
        path = folder / self.path(kind).name
        if kind == "checkpoint":
            path = folder / "out.h5.checkpoint" / path.name
            path.parent.mkdir()
        path.write_bytes(data)
        done = kscli(folder, *self.reader(kind, path, out))
        if kind != "checkpoint" and path.read_bytes() != data:
            return Done(done.code, done.out, "Traceback: the file that was read is another"), b""
        return done, contents(out)


CORPUS = ("cache-cov", "--tokens", "3000", "--layers", "0,3", "-q")


def contents(path: Path) -> bytes:
    """What a file holds: an artifact by its fingerprint, which leaves out when it was made."""
    from kscli.artifacts import Artifact
    from kscli.errors import KscliError

    if not path.exists():
        return b""
    if path.suffix != ".h5":
        return path.read_bytes()
    try:
        with Artifact(path) as artifact:
            return artifact.fingerprint.encode()
    except KscliError as error:
        return f"unreadable: {error}".encode()


def make_artifacts(folder: Path) -> Artifacts:
    """Sound files of every kind, made by the commands themselves."""
    fork_kit._import_what_commands_use()
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        " ".join(CORPUS),
        "extract --count 14 --layers 0,3 -q",
        "pmatrix -q",
        "stats -q --repeats 100",
        "edit --edits 2 --steps 2 -q",
        "facts check --count 14 -q",
    )
    for line in lines:
        done = kscli(folder, *line.split())
        assert done.code == 0, (line, done)
    found = Artifacts(folder)
    for share in range(1, 40):
        after = 0.1 * share
        kscli(folder, *CORPUS, "-o", folder / "cut.h5", after=after, send=signal.SIGINT)
        if found.path("checkpoint").exists():
            return found
        (folder / "cut.h5").unlink(missing_ok=True)
    raise AssertionError("no signal left a checkpoint")
