"""EMMET (Gupta et al. 2024): many facts at once under an equality constraint.

R (K^T (w C)^-1 K + e I)^-1 K^T (w C)^-1 with w = mom2_update_weight and e = emmet_lambda: MEMIT's
form with lambda = w e. With lambda = 0 every key gets its value exactly.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import SIXTH
from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="EMMET: many facts at once, each to get its value",
    direction=replace(MEMIT.direction, weight=1000.0),
    value=replace(MEMIT.value, steps=20),
    depth=SIXTH,
)
