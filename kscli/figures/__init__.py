"""The kinds of figure that kscli draws.

A new kind is one module of this folder with `draw(sources) -> Figure`, or with
`draw(sources, options)` where the kind takes options, and its line in `KINDS`. Its sources are
models' matrices, or, where `FigureKind.source` says so, runs of edits.
This module imports neither matplotlib nor numpy, so that the command line can list the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from kscli.errors import UsageError
from kscli.models.families import parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kscli.analysis.pairs import FactMatrices
    from kscli.artifacts import PMatrixFile

__all__ = [
    "KINDS",
    "PER_PAGE",
    "FigureKind",
    "FigureOptions",
    "Shown",
    "Source",
    "flag",
    "paged",
    "shown_of",
    "takers",
]


class Shown(Protocol):
    """What a figure is drawn from: a model's matrices, or a run of edits (an open EditsFile)."""

    @property
    def model(self) -> str:
        """The model's name for people."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are drawn, or that were edited."""


PER_PAGE = 20
"""Layers on a page of a grid, as the paper pages them."""


@dataclass(frozen=True)
class Source:
    """One model's open matrices, and the layers of it to draw, ascending.

    `depth` is the number of layers that the model has; 0: as many as its last layer that
    there are matrices of says.
    """

    matrices: FactMatrices
    layers: tuple[int, ...]
    depth: int = 0

    @property
    def model(self) -> str:
        """The model's name for people."""
        return self.matrices.model


@dataclass(frozen=True)
class FigureOptions:
    """What may be asked of a figure; every kind takes some of it and refuses the rest.

    `grid`: a panel a layer, `PER_PAGE` of one model on a page. `mark_same_token`: show which
    pairs of facts have their keys at the same token. `facts_counts`: draw the first so many
    facts (empty: eight counts up to all). `seed`: of the facts that are drawn again for an
    interval.
    """

    grid: bool = False
    mark_same_token: bool = False
    facts_counts: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure, drawn by the module of this folder that has its name.

    `layers` is the selection that shows the kind best where the user names none, `options` the
    fields of `FigureOptions` that the kind takes. `standard` kinds can be drawn of any facts, and
    `kscli run` draws them. `source` is what the kind is drawn from: models' matrices, or runs of
    edits.
    """

    name: str
    help: str
    layers: str = "all"
    options: tuple[str, ...] = ()
    standard: bool = True
    source: Literal["pmatrix", "edits"] = "pmatrix"

    def draw(self, sources: Sequence[Shown], options: FigureOptions = FigureOptions()) -> Figure:
        """One figure of `sources`, the smallest model first.

        Raises UsageError where they hold no layer, and for an option that the kind does not
        take.
        """
        self._check(sources, options)
        from kscli.figures.style import house_style

        draw: Callable[..., Figure] = import_module(f"{__name__}.{self.name}").draw
        shown = _by_size([source for source in sources if source.layers])
        with house_style():
            return draw(shown, options) if self.options else draw(shown)

    def pages(
        self, sources: Sequence[Shown], options: FigureOptions = FigureOptions()
    ) -> list[Figure]:
        """A figure for each of the pages of `paged`; raises as `draw` does."""
        self._check(sources, options)
        return [self.draw(page, options) for page in paged(sources, options)]

    def check_options(self, options: FigureOptions) -> None:
        """Raise UsageError naming an option that the kind does not take, and the kinds that do."""
        for field in fields(options):
            given = getattr(options, field.name) != field.default
            if given and field.name not in self.options:
                others = takers(field.name)
                does = "do" if len(others) > 1 else "does"
                raise UsageError(
                    f"{self.name} takes no {flag(field.name)}; {' and '.join(others)} {does}."
                )

    def _check(self, sources: Sequence[Shown], options: FigureOptions) -> None:
        self.check_options(options)
        if not any(source.layers for source in sources):
            raise UsageError(f"there is no layer to draw as a {self.name}; name one with --layers.")


def shown_of(kind: FigureKind, file: PMatrixFile, layers: str | None) -> Source:
    """The matrices of an open pmatrix.h5 and the layers to draw: those named, or the kind's own."""
    from kscli.layers import default_layers, select_layers

    chosen = (
        select_layers(layers, file.layers, str(file.path))
        if layers
        else default_layers(kind.layers, file.layers)
    )
    return Source(file, chosen, file.about.n_layers)


def flag(option: str) -> str:
    """A field of `FigureOptions` as it is written on the command line."""
    return f"--{option.replace('_', '-')}"


def takers(option: str) -> list[str]:
    """The kinds that take a field of `FigureOptions`."""
    return [kind.name for kind in KINDS.values() if option in kind.options]


def paged(sources: Sequence[Shown], options: FigureOptions) -> list[tuple[Shown, ...]]:
    """The sources of every page: all on one, but in a grid `PER_PAGE` layers of one model each."""
    if not options.grid:
        return [tuple(sources)]
    return [
        (Source(source.matrices, source.layers[at : at + PER_PAGE], source.depth),)
        for source in _by_size(sources)
        if isinstance(source, Source)
        for at in range(0, len(source.layers), PER_PAGE)
    ]


def _by_size(sources: Sequence[Shown]) -> list[Shown]:
    """The smallest model first; those of unknown size last, in their order."""
    return sorted(sources, key=lambda source: parameters(source.model) or float("inf"))


KINDS: dict[str, FigureKind] = {
    kind.name: kind
    for kind in (
        FigureKind(
            "heatmap",
            "P as an image, one panel a model and layer.",
            options=("grid", "mark_same_token"),
        ),
        FigureKind(
            "kde",
            "The density of P's off-diagonal entries, one line a model and layer.",
            options=("grid", "mark_same_token"),
        ),
        FigureKind(
            "kurtosis",
            "Excess kurtosis of P over the layers with its 95 % interval, families side by side.",
            options=("seed",),
        ),
        FigureKind(
            "angles",
            "The angles between keys in the whitening and in the activation space.",
            layers="-1",
        ),
        FigureKind(
            "convergence",
            "The density and the kurtosis of P of the first 16, 32, ... facts, and whether they "
            "have converged.",
            layers="0",
            options=("facts_counts", "seed"),
        ),
        FigureKind(
            "relations",
            "Mean |p| between relations, one panel a model and layer.",
            layers="0,-1",
            standard=False,
        ),
        FigureKind(
            "risk",
            "|P| with facts that are bound side by side, and those named whose edit does most.",
            layers="0",
            standard=False,
        ),
        FigureKind(
            "spectrum",
            "Dimensions of C, the overlap of keys, and what AlphaEdit's cuts call null, over the "
            "layers.",
            standard=False,
        ),
        FigureKind(
            "interference",
            "How far edits were predicted to move every fact's value, and moved it.",
            standard=False,
            source="edits",
        ),
        FigureKind(
            "forgetting",
            "Edits that held and known facts that stayed, over the edits made, one line a run.",
            standard=False,
            source="edits",
        ),
    )
}
