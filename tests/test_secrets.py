"""Tokens and passwords are in no file, message or traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import ROOT, kscli_process, one_sentence

from kscli.secrets import HIDDEN, without_secrets

SECRET = "hf_GeheimGeheimGeheimGeheim1234567"


@pytest.mark.parametrize(
    "token",
    [
        f"{SECRET}é",
        f"{SECRET}\nX: y",
        f"{SECRET} {SECRET}",
        f"\udce9{SECRET}",
        f"“{SECRET}”",
        f"{SECRET}\x7f",
    ],
)
def test_a_token_that_cannot_be_sent_is_one_sentence(token: str, tmp_path: Path) -> None:
    for command in (
        ["extract", "-m", "gpt2-small", "--facts", "tiny"],
        ["extract", "-m", "tiny", "--facts", "counterfact"],
        ["cache-cov", "-m", "tiny", "--corpus", "wikipedia"],
    ):
        done = kscli_process(*command, "--dir", tmp_path, HF_TOKEN=token)
        assert done.returncode == 1
        said = one_sentence(done.stderr)
        assert "HF_TOKEN" in said
        assert "Geheim" not in done.stdout + done.stderr


def fresh(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a new interpreter: the Hub's client reads its settings when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "kscli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"} | environment,
    )


@pytest.mark.parametrize(
    "token", [f"{SECRET}é".encode(), SECRET.encode() + b"\xe9", b"my own token"]
)
def test_so_is_one_that_was_kept(token: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(token)
    done = fresh("extract", "-m", "gpt2-small", "--facts", "tiny", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "HF_TOKEN" in one_sentence(done.stderr)
    assert not any(word in done.stderr for word in ("Geheim", "my own"))


def test_what_needs_no_hub_does_not_mind_the_token(tmp_path: Path) -> None:
    done = kscli_process(
        *("extract", "-m", "tiny", "--count", "2", "--dir", tmp_path), HF_TOKEN=f"{SECRET}é"
    )
    assert done.returncode == 0, done.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.h5"))
    assert b"Geheim" not in written


def test_no_file_and_no_message_tells_a_token(tmp_path: Path) -> None:
    """It was given where it does not belong, and the Hub is out of reach."""
    place = tmp_path / SECRET
    done = kscli_process(*("extract", "-m", "tiny", "--count", "2", "-o", place.with_suffix(".h5")))
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stderr
    assert SECRET.encode() not in place.with_suffix(".h5").read_bytes()
    for name in (SECRET, f"{SECRET}/x", f"hf:{SECRET}/x"):
        done = kscli_process("cache-cov", "-m", "tiny", "--corpus", name, "--dir", tmp_path)
        assert done.returncode == 1
        assert SECRET not in one_sentence(done.stderr)
    endpoint = {"HF_ENDPOINT": "http://me:passw0rd@127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = fresh("extract", "-m", "gpt2-small", "--facts", "tiny", **endpoint)
    assert done.returncode == 1
    assert "passw0rd" not in one_sentence(done.stderr)


def test_a_traceback_tells_no_token() -> None:
    program = (
        "import sys, kscli.cli.topk\n"
        "from kscli.__main__ import main\n"
        "def broken(*a, **b): raise KeyError('Bearer my-own-long-token')\n"
        "import kscli.cli.requests\n"
        "kscli.cli.requests.pmatrix_paths = broken\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "topk"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": "my-own-long-token"},
    )
    assert "KeyError" in done.stderr
    assert "my-own-long-token" not in done.stderr
    assert HIDDEN in done.stderr


def test_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a")
    text = "the hf_hub of a model; hf:owner/name; https://huggingface.co/a@b; me@here"
    assert without_secrets(text) == text
