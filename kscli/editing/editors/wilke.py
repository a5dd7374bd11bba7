"""WilKE (Hu et al. 2024, arXiv 2402.10987): ROME whose layer is chosen for each edit.

A value is sought at every layer that is asked for, and the edit is made at the one whose W it
changes least, |Delta W| / |W|, as the authors' code measures it (wilke/wilke_main.py).
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import FIRST_HALF
from kscli.editing.editors.rome import EDITOR as ROME

EDITOR = replace(
    ROME,
    title="WilKE: ROME at the layer that changes least",
    afterwards=replace(ROME.afterwards, one_layer=True),
    depth=FIRST_HALF,
    over_layers=True,
)
