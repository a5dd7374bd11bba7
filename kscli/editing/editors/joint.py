"""Joint edits: every value is reached exactly, and no edit disturbs another.

Delta W = sum_i delta_i d_i^T with d_i^T k_j = 1 for j = i and 0 for the others:
D = G^-1 (C^-1 K)^T, G = K^T C^-1 K. It is the least change tr(Delta W C Delta W^T) that does so. A
batch is written at once. Edits one after the other give the same, since each is made where the keys
of those before it are protected; then each value is sought in the model that those have left.
"""

from __future__ import annotations

from kscli.editing.editors import Afterwards, Direction, Editor, ValueSearch, everything
from kscli.editing.editors.keys import clean

EDITOR = Editor(
    title="exact values that disturb one another not at all",
    key=clean,
    direction=Direction(earlier="protected"),
    value=ValueSearch(),
    afterwards=Afterwards(share=everything),
    contexts=((10, 5),),
    at_once=True,
    predicted=True,
)
