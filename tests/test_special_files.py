"""What is no file is called what it is, by every command that reads one; nothing waits for it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from cli_kit import kscli, one_sentence

# Each input of each command; @ is where the special file stands, with its suffix.
INPUTS: dict[str, tuple[str, ...]] = {
    "topk": ("topk", "--pmatrix", "@.h5"),
    "stats": ("stats", "--pmatrix", "@.h5"),
    "stats --against": ("stats", "--against", "@.h5"),
    "relations": ("relations", "--pmatrix", "@.h5"),
    "plot": ("plot", "heatmap", "--pmatrix", "@.h5", "-o", "out.png"),
    "risk": ("risk", "--pmatrix", "@.h5"),
    "report": ("report", "--pmatrix", "@.h5", "-o", "out"),
    "verify": ("verify", "@.h5"),
    "show": ("show", "@.h5"),
    "edit --cov": ("edit", "--cov", "@.h5", "-o", "out.h5"),
    "edit --keys": ("edit", "--keys", "@.h5", "-o", "out.h5"),
    "edit --pmatrix": ("edit", "--pmatrix", "@.h5", "-o", "out.h5"),
    "edit --held-out": ("edit", "--held-out", "@.txt", "-o", "out.h5"),
    "edit --contexts": ("edit", "--contexts", "@.txt", "-o", "out.h5"),
    "edit --protect": ("edit", "--protect", "@.json", "-o", "out.h5"),
    "edit --facts": ("edit", "--facts", "@.json", "--target-new", "field:x", "-o", "out.h5"),
    "cache-cov": ("cache-cov", "-m", "tiny", "--corpus", "@.jsonl", "-o", "out.h5"),
    "extract": ("extract", "-m", "tiny", "--facts", "@.jsonl", "-o", "out.h5"),
    "extract --contexts": ("extract", "-m", "tiny", "--contexts", "@.txt", "-o", "out.h5"),
    "extract -m": ("extract", "-m", "@.gguf", "--facts", "tiny", "-o", "out.h5"),
    "pmatrix --cov": ("pmatrix", "--cov", "@.h5", "-o", "out.h5"),
    "pmatrix --keys": ("pmatrix", "--keys", "@.h5", "-o", "out.h5"),
    "import-cov": ("import-cov", "@.npz", "-m", "tiny", "-o", "out.h5"),
    "export-cov": ("export-cov", "--cov", "@.h5", "--for", "rome", "-o", "out"),
    "facts check": ("facts", "check", "--facts", "@.json", "-o", "out.jsonl"),
    "facts select": ("facts", "select", "@.jsonl", "-o", "out.jsonl"),
}


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", INPUTS)
def test_a_special_file_is_refused_by_its_kind(
    name: str, kind: str, measured_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KSCLI_DIR", str(measured_tiny.parent))
    arguments = [argument.replace("@", "input") for argument in INPUTS[name]]
    (path,) = [argument for argument in arguments if argument.startswith("input")]
    special(kind, tmp_path / path)
    found = kscli(*arguments)
    assert found.exit_code in (1, 2)
    said = one_sentence(found.stderr)
    assert path in said
    assert kind in said
    assert [each.name for each in tmp_path.iterdir()] == [path]
