"""The embedded default model: where its folder and its facts are.

`corpus` makes the text that it was trained on, `build` trains it again.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
FACTS_PATH: Path = Path(__file__).parent / "facts.jsonl"
