"""R-ROME as EasyEdit ships it: the identity stands for C."""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import Direction
from kscli.editing.editors.r_rome import EDITOR as R_ROME

EDITOR = replace(
    R_ROME,
    title="R-ROME without C, as EasyEdit ships it",
    direction=Direction(metric="identity"),
)
