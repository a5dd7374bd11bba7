"""PMET (Li et al. 2024): MEMIT's form, with the value of the MLP's output alone.

It is sought together with a shift of the attention's output, which is thrown away; what is lacking
is shared as R / sqrt(L - i).
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors import Afterwards, ValueSearch, root_share
from kscli.editing.editors.memit import EDITOR as MEMIT

EDITOR = replace(
    MEMIT,
    title="PMET: MEMIT with values of the MLP alone",
    direction=replace(MEMIT.direction, weight=6000.0),
    value=ValueSearch(
        steps=30,
        learning_rate=0.2,
        kl_weight=1.0,
        norm_limit=0.75,
        reach=True,
        attention=True,
    ),
    afterwards=Afterwards(share=root_share),
)
