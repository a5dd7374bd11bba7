"""The paper's equations 2 to 4: one fact is written at one layer, along the bare prompt's key.

The value is sought as ROME seeks it (Meng et al. 2022a, section 3.1), with the KL term read after
the text "{} is a", as that paper describes it.
"""

from __future__ import annotations

from kscli.editing.editors import Afterwards, Direction, Editor, ValueSearch, everything
from kscli.editing.editors.keys import clean

EDITOR = Editor(
    title="equation 2 on the bare prompt's key",
    key=clean,
    direction=Direction(),
    value=ValueSearch(steps=21, kl_at="end"),
    afterwards=Afterwards(share=everything),
    predicted=True,
)
