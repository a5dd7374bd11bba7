"""The kinds of figure that kscli draws.

A new kind is one module of this folder with `draw(sources, options) -> Figure`, and its line in
`KINDS`. Its sources are models' matrices, or, where `FigureKind.source` says so, runs of edits.
This module imports neither matplotlib nor numpy, so that the command line can list the kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

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
    "Look",
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
    there are matrices of says. `name` is what the figure calls the model; empty: by its own name.
    `spectra` are the rows of `kscli.analysis.spectrum`, where they are known already.
    """

    matrices: FactMatrices
    layers: tuple[int, ...]
    depth: int = 0
    name: str = ""
    spectra: tuple[dict[str, Any], ...] = ()

    @property
    def model(self) -> str:
        """The model's name for people."""
        return self.name or self.matrices.model


@dataclass(frozen=True)
class Look:
    """How a figure looks, of any kind.

    `title` replaces its own; empty: it has none. `width` and `height` are in inches, and 0 is what
    suits the kind; the number of columns follows from the width. `dpi` is of images; 0: what suits
    the kind. `names` are of the sources, in their order; empty: the models' or runs' own.
    """

    title: str | None = None
    width: float = 0.0
    height: float = 0.0
    dpi: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class FigureOptions:
    """What may be asked of a figure; every kind takes some of it and refuses the rest.

    `grid`: a panel a layer, `PER_PAGE` of one model on a page. `mark_same_token`: show which
    pairs of facts have their keys at the same token. `facts_counts`: draw the first so many
    facts (empty: eight counts up to all). `seed`: of the facts that are drawn again for an
    interval. `no_sentence`: leave out what the figure says in words. `look` every kind takes.
    """

    grid: bool = False
    mark_same_token: bool = False
    facts_counts: tuple[int, ...] = ()
    seed: int = 0
    no_sentence: bool = False
    look: Look = field(default_factory=Look)


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
        from kscli.figures.style import house_style, looking

        draw: Callable[..., Figure] = import_module(f"{__name__}.{self.name}").draw
        shown, options = _by_size(sources, options)
        with house_style():
            return looking(draw(shown, options), options.look, self.name)

    def pages(
        self, sources: Sequence[Shown], options: FigureOptions = FigureOptions()
    ) -> list[Figure]:
        """A figure for each of the pages of `paged`; raises as `draw` does."""
        self._check(sources, options)
        if not options.grid:
            return [self.draw(sources, options)]
        shown, options = _by_size(sources, options)
        return [self.draw(page, options) for page in paged(shown, options)]

    def check_options(self, options: FigureOptions) -> None:
        """Raise UsageError naming an option that the kind does not take, and the kinds that do."""
        for option in fields(options):
            given = option.name != "look" and getattr(options, option.name) != option.default
            if given and option.name not in self.options:
                others = takers(option.name)
                does = "do" if len(others) > 1 else "does"
                raise UsageError(
                    f"{self.name} takes no {flag(option.name)}; {' and '.join(others)} {does}."
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
        (replace(source, layers=source.layers[at : at + PER_PAGE]),)
        for source in sorted(sources, key=_size)
        if isinstance(source, Source)
        for at in range(0, len(source.layers), PER_PAGE)
    ]


def _by_size(sources: Sequence[Shown], options: FigureOptions) -> tuple[list[Shown], FigureOptions]:
    """The sources that have layers, the smallest model first, with the names that were asked for.

    Those of unknown size come last, in their order. The names that are left in the options are
    those of runs.
    """
    named = options.look.names or ("",) * len(sources)
    pairs = [
        (replace(source, name=name or source.name) if isinstance(source, Source) else source, name)
        for source, name in zip(sources, named, strict=True)
        if source.layers
    ]
    pairs.sort(key=lambda pair: _size(pair[0]))
    left = tuple(name for source, name in pairs if not isinstance(source, Source) and name)
    shown = [source for source, _ in pairs]
    return shown, replace(options, look=replace(options.look, names=left))


def _size(source: Shown) -> float:
    own = source.matrices.model if isinstance(source, Source) else source.model
    return parameters(own) or float("inf")


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
            "The density of P's off-diagonal entries, one line a model and layer; a colour bar "
            "tells many layers apart.",
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
            options=("facts_counts", "seed", "no_sentence"),
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
            "How far edits were predicted to move every fact's value, and how far the live model's "
            "moved.",
            standard=False,
            source="edits",
        ),
        FigureKind(
            "forgetting",
            "Edits that held, known facts that stayed, scores, perplexity and KL divergence, over "
            "the edits made, one line a run.",
            standard=False,
            source="edits",
        ),
    )
}
