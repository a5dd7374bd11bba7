"""The kinds of figure that kscli draws.

A new kind is one module of this folder with `draw(sources) -> Figure`, and its line in `KINDS`.
This module imports neither matplotlib nor numpy, so that the command line can list the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from kscli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kscli.statistics import Matrices

__all__ = ["KINDS", "FigureKind", "Source"]


@dataclass(frozen=True)
class Source:
    """One model's open matrices, and the layers of it to draw, ascending."""

    matrices: Matrices
    layers: tuple[int, ...]


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure, drawn by the module of this folder that has its name.

    `layers` is the selection that shows the kind best where the user names none.
    """

    name: str
    help: str
    layers: str = "all"

    def draw(self, sources: Sequence[Source]) -> Figure:
        """The figure of `sources`, in their order. Raises UsageError where they hold no layer."""
        if not any(source.layers for source in sources):
            raise UsageError(f"there is no layer to draw as a {self.name}; name one with --layers.")
        from kscli.figures.style import house_style

        draw: Callable[[Sequence[Source]], Figure]
        draw = import_module(f"{__name__}.{self.name}").draw
        with house_style():
            return draw([source for source in sources if source.layers])


KINDS: dict[str, FigureKind] = {
    kind.name: kind
    for kind in (
        FigureKind("heatmap", "P as an image, one panel a model and layer."),
        FigureKind("kde", "The density of P's off-diagonal entries, one line a model and layer."),
        FigureKind("kurtosis", "Excess kurtosis of P over the layers, one line a model."),
    )
}
