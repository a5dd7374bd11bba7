"""MEMIT in sequence: the keys of earlier batches stand in the inverse.

R K^T (lambda C + S + K K^T)^-1, S the sum of k k^T over the keys of all earlier batches.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="MEMIT that protects earlier edits",
    direction=replace(MEMIT.direction, earlier="weighed"),
)
