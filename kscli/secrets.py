"""Secrets that are in no file and no message: tokens of the Hub, and passwords in URLs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

HIDDEN = "[hidden]"

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # characters; what is shorter may be a word of any message


def without_secrets(text: str) -> str:
    """The text without tokens of the Hub, by their form or their value, and passwords in URLs."""
    for value in (*_tokens_set(), *_tokens_kept()):
        # As it is, and as messages of libraries quote it.
        for form in (value, repr(value)[1:-1], ascii(value)[1:-1], repr(_bytes(value))[2:-1]):
            if len(value) >= _SHORTEST:
                text = text.replace(form, HIDDEN)
    return _PASSWORD.sub(f"{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def command_line() -> str:
    """The command line of this process, for files that say what made them."""
    of_kscli = "kscli.cli.app" in sys.modules
    program = ["kscli"] if of_kscli else ["python", *(Path(name).name for name in sys.argv[:1])]
    return without_secrets(shlex.join([*program, *sys.argv[1:]]))


def _tokens_set() -> Iterator[str]:
    """The tokens of the environment, which the client takes without white space around them."""
    return (os.environ.get(name, "").strip() for name in _VARIABLES)


@lru_cache(maxsize=1)
def _tokens_kept() -> tuple[str, ...]:
    """The token in the file that `hf auth login` wrote, if there is one."""
    environment = os.environ
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(environment.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        return (path.read_text("utf-8", errors="surrogateescape").strip(),)
    except (OSError, RuntimeError):
        return ()


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", errors="surrogateescape")
