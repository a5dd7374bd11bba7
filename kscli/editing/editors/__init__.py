"""The editors: each is a module of this folder that holds an `EDITOR`, and a line in `EDITORS`.

Every editor of the ROME family changes a down-projection to W + sum_i delta_i d_i^T: delta_i (d) is
added to the value of fact i, and d_i (d_m) is the direction along which it is written. An edit of
fact i so moves the value of fact j by (d_i^T k_j) delta_i. Editors differ in the four choices that
an `Editor` states: the key that stands for an edited fact, the direction, how the value is sought,
and what happens afterwards.

This module imports neither NumPy nor torch, so that the command line can list the editors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from kscli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kscli.whitening import Whitening

    Array = NDArray[np.float64]

EDITORS: dict[str, str] = {
    "rome": "kscli.editing.editors.rome",
    "memit": "kscli.editing.editors.memit",
}
DEFAULT_EDITOR = "rome"

Site = Literal["mlp", "hidden"]
"""Where a shift is added while a value is sought: to the down-projection's output, which is ROME's
v, or to the output of the decoder layer, which is MEMIT's z."""


class KeySource(Protocol):
    """The keys of one edited layer, for the edits that are being made."""

    def stored(self) -> Array:
        """The keys of the clean model, from keys.h5: (b, d_m)."""
        ...

    def live(self) -> Array:
        """The keys of the model as it is now: (b, d_m)."""
        ...


@dataclass(frozen=True)
class ValueSearch:
    """How an editor seeks the value: where the shift is added, and the limits of the search.

    `steps` (v_num_grad_steps) bounds the optimisation, and `norm_limit` (clamp_norm_factor) bounds
    |shift| / |value|.
    """

    site: Site
    steps: int
    norm_limit: float


@dataclass(frozen=True)
class Editor:
    """An editor by its four choices: `key`, `direction`, `value` and `afterwards`.

    `key` chooses the (b, d_m) keys that stand for the edited facts. `direction` turns them into the
    (b, d_m) directions d_i; its last argument is `weight`. `afterwards` takes the (b, d) values
    that are lacking and the number of edited layers left, this one included; it returns what
    is written at this layer.

    `weight` is the default of the editor's lambda (mom2_update_weight); None: it has none.
    `several`: the editor takes several layers, and several facts at once. `predicted`: the P of
    pmatrix.h5 is this editor's p, so that equations 11 and 15 predict what its edits move.
    """

    title: str
    key: Callable[[KeySource], Array]
    direction: Callable[[Whitening, Array, float], Array]
    value: ValueSearch
    afterwards: Callable[[Array, int], Array]
    weight: float | None = None
    several: bool = False
    predicted: bool = False


def find_editor(name: str) -> Editor:
    """The editor of that name. Raises UsageError, naming those there are, for another name."""
    if name not in EDITORS:
        near = get_close_matches(name, EDITORS, n=1)
        remedy = f"did you mean {near[0]}? There are" if near else "there are"
        raise UsageError(f"--method {name!r} is no editor; {remedy} {', '.join(EDITORS)}.")
    found: Editor = import_module(EDITORS[name]).EDITOR
    return found


def editors_where(wanted: Callable[[Editor], bool]) -> str:
    """The names of the editors that `wanted` holds for, as in `memit or toy`."""
    return " or ".join(name for name in EDITORS if wanted(find_editor(name)))


def defaults(of: Callable[[Editor], object]) -> str:
    """An option's default with each editor, as in `rome 20; memit 25`; None is left out."""
    found: Sequence[tuple[str, object]] = [(name, of(find_editor(name))) for name in EDITORS]
    return "; ".join(f"{name} {value}" for name, value in found if value is not None)
