"""RECT (Gu et al. 2024): MEMIT of whose change only the relatively largest entries are kept.

p of the change before that is still d_i^T k_j, of what is kept no longer.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="RECT: MEMIT, a part of whose change is kept",
    afterwards=replace(MEMIT.afterwards, keep=0.4),
)
