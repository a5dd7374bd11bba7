"""ROME as its authors' code has it (Meng et al. 2022a, rome/compute_u.py, rome/compute_v.py).

The direction is C^-1 kbar, kbar the mean key over all contexts; it is divided by k^T C^-1 kbar, k
the bare prompt's key. So the bare prompt gets its value exactly, and the contexts do not.
"""

from __future__ import annotations

from kscli.editing.editors import (
    ROME_CONTEXTS,
    Afterwards,
    Direction,
    Editor,
    ValueSearch,
    everything,
)
from kscli.editing.editors.keys import mean_to_bare

EDITOR = Editor(
    title="ROME as published",
    key=mean_to_bare,
    direction=Direction(),
    value=ValueSearch(),
    afterwards=Afterwards(share=everything),
    contexts=ROME_CONTEXTS,
)
