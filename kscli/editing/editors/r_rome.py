"""R-ROME (Gupta et al. 2024): ROME with one mean key in the direction and in its denominator.

The mean key gets the value that was sought for the bare prompt, so what is written is
v + delta - W kbar.
"""

from __future__ import annotations

from dataclasses import replace

from kscli.editing.editors.keys import mean
from kscli.editing.editors.rome import EDITOR as ROME

EDITOR = replace(ROME, title="R-ROME: the mean key throughout", key=mean)
