"""AlphaEdit (Fang et al. 2025): MEMIT inside a null space of C, with the keys of earlier edits.

Delta W^T = (Pi (K K^T + S) + L2 I)^-1 Pi K R^T. Pi projects on the singular vectors of C whose
singular value is small; S is the sum of k k^T over the keys of all earlier batches.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import Direction
from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="AlphaEdit: MEMIT in a null space of C",
    direction=Direction(metric="null-space", weight=10.0, earlier="weighed"),
)
