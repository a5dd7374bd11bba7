"""ROME as EasyEdit ships it: mom2_adjustment is false, so the identity stands for C."""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import Direction
from kscli.editing.editors.rome import EDITOR as ROME

EDITOR = replace(
    ROME,
    title="ROME without C, as EasyEdit ships it",
    direction=Direction(metric="identity"),
)
