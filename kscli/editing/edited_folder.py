"""What an edited model's folder says of itself: its edits, its base, and the base's facts."""

from __future__ import annotations

import json
from pathlib import Path

EDIT_LOG = "kscli_edits.jsonl"
BASE = "kscli_base.json"
BASE_FACTS = "kscli_facts.jsonl"


def facts_of_edited(model: str) -> Path | None:
    """The facts that an edited model's base was measured with; None of any other model."""
    path = Path(model).expanduser() / BASE_FACTS
    return path if path.is_file() else None


def first_model(model: str) -> str:
    """The model that an edited one was made from, through all its edits; any other one itself."""
    try:
        held = json.loads((Path(model).expanduser() / BASE).read_text("utf-8"))
    except (OSError, ValueError):
        return model
    base = held.get("model_id") if isinstance(held, dict) else None
    return base if isinstance(base, str) and base else model
