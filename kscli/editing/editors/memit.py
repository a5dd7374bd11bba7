"""MEMIT (Meng et al. 2022b): many facts are written at once, over several layers.

Algorithm 1 of that paper: what the last layer's output lacks is shared evenly over the edited
layers, and after each of them keys and outputs are read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kscli.editing.editors import Editor, KeySource, ValueSearch

if TYPE_CHECKING:
    from kscli.editing.editors import Array
    from kscli.whitening import Whitening


def key(keys: KeySource) -> Array:
    """Return the bare prompt's key in the model with the layers below edited already."""
    return keys.live()


def direction(white: Whitening, keys: Array, weight: float) -> Array:
    """Return the rows of (weight I + K^T C^-1 K)^-1 (C^-1 K)^T; `weight` is lambda."""
    from kscli.editing.editors.closed_form import edit_directions

    return edit_directions(white, keys, weight)


def afterwards(lacking: Array, layers_left: int) -> Array:
    """Write an equal share, R / (L - i)."""
    return lacking / layers_left


EDITOR = Editor(
    title="MEMIT: many facts at once, several layers",
    key=key,
    direction=direction,
    value=ValueSearch(site="hidden", steps=25, norm_limit=0.75),
    afterwards=afterwards,
    weight=15000.0,
    several=True,
)
