"""MEMIT (Meng et al. 2022b): many facts are written at once, over several layers.

Algorithm 1 of that paper: what the last layer's output lacks is shared evenly over the edited
layers, and after each of them keys and outputs are read again.
"""

from __future__ import annotations

from kscli.editing.editors import (
    EIGHTH_TO_QUARTER,
    Afterwards,
    Direction,
    Editor,
    ValueSearch,
    equal_share,
)
from kscli.editing.editors.keys import half_bare

EDITOR = Editor(
    title="MEMIT: many facts at once, several layers",
    key=half_bare,
    direction=Direction(weight=15000.0),
    value=ValueSearch(site="hidden", steps=25, norm_limit=0.75, reach=True),
    afterwards=Afterwards(share=equal_share),
    contexts=((10, 5),),
    depth=EIGHTH_TO_QUARTER,
    over_layers=True,
    at_once=True,
)
