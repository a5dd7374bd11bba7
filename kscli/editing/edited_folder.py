"""The folder of an edited model: where it may be, and what it says of its edits, base and facts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kscli.errors import FactsError, UsageError
from kscli.facts import Fact
from kscli.records import RecordFile

EDIT_LOG = "kscli_edits.jsonl"
BASE = "kscli_base.json"
BASE_FACTS = "kscli_facts.jsonl"
_OF_EDIT = ("prompt", "subject", "target_new")


def require_new_folder(folder: Path) -> None:
    """Raise UsageError unless a folder may be made at `folder`, or is there and empty.

    Makes nothing.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--save-model {folder} is not empty; name a new folder.")
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UsageError(f"--save-model {folder} is not a folder; name a new one.")
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"--save-model {folder}: nothing can be written in {there}.")
    except OSError as error:
        raise UsageError(f"--save-model {folder}: {error.strerror}.") from error


def facts_of_edited(model: str) -> Path | None:
    """The facts that an edited model's base was measured with; None of any other model."""
    path = Path(model).expanduser() / BASE_FACTS
    return path if path.is_file() else None


def edits_of_folder(model: str) -> list[Fact]:
    """What the edits of an edited model's folder were to have it say; nothing of any other model.

    Raises FactsError where the log of the edits cannot be read.
    """
    path = Path(model).expanduser() / EDIT_LOG
    if not path.is_file():
        return []
    found = {}
    for _, record in RecordFile(path, FactsError, kind=".jsonl").records():
        fields = record if isinstance(record, dict) else {}
        prompt, subject, target = (fields.get(name) for name in _OF_EDIT)
        if isinstance(prompt, str) and isinstance(subject, str) and isinstance(target, str):
            fact = Fact(prompt, subject, target)
            found[fact.text] = fact
    return list(found.values())


def first_model(model: str) -> str:
    """The model that an edited one was made from, through all its edits; any other one itself."""
    try:
        held = json.loads((Path(model).expanduser() / BASE).read_text("utf-8"))
    except (OSError, ValueError):
        return model
    base = held.get("model_id") if isinstance(held, dict) else None
    return base if isinstance(base, str) and base else model
