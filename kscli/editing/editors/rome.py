"""ROME (Meng et al. 2022a): one fact is written at one layer.

The paper's equation 3, W_n = W_{n-1} + Lambda (C^-1 k)^T, with the Lambda of equation 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kscli.editing.editors import Editor, KeySource, ValueSearch

if TYPE_CHECKING:
    from kscli.editing.editors import Array
    from kscli.whitening import Whitening


def key(keys: KeySource) -> Array:
    """Return the bare prompt's key in the clean model (equation 2)."""
    return keys.stored()


def direction(white: Whitening, keys: Array, weight: float) -> Array:
    """Return d = C^-1 k / (k^T C^-1 k), for which d^T k = 1."""
    from kscli.editing.editors.closed_form import edit_directions

    return edit_directions(white, keys)


def afterwards(lacking: Array, layers_left: int) -> Array:
    """Write all that is lacking."""
    return lacking


EDITOR = Editor(
    title="ROME: one fact, one layer",
    key=key,
    direction=direction,
    value=ValueSearch(site="mlp", steps=20, norm_limit=4.0),
    afterwards=afterwards,
    predicted=True,
)
