"""PRUNE (Ma et al. 2024): MEMIT, the spectrum of whose whole change is limited after the last edit.

The limited change is added to the original W. The script in AlphaEdit's repository adds it to the
edited weights instead, so that the change is there twice.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="PRUNE: MEMIT, its spectrum limited at the end",
    afterwards=replace(MEMIT.afterwards, limited=True),
)
