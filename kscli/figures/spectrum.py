"""Dimensions of C, overlap of keys, and what AlphaEdit's cuts call null, over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kscli.analysis.spectrum import spectra_of
from kscli.artifacts import PMatrixFile
from kscli.errors import UsageError
from kscli.figures import FigureOptions, Source
from kscli.figures.style import (
    GREY,
    PAGE,
    TEXT,
    axes_over_lists,
    fitted,
    fitting,
    line_style,
    list_below,
    make_room,
    names,
    open_axes,
    title,
)

_AXES_HEIGHT = 1.75
_MOST_ROWS = 6


class _Panel(NamedTuple):
    """One panel: its title, its lines as (field of a row, label), and whether they are shares.

    The `references`, which are the same at all layers, are drawn in grey.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    references: tuple[tuple[str, str], ...] = ()
    share: bool = False


_PANELS = (
    _Panel(
        "dimensions of C",
        (
            ("effective_rank", "effective rank"),
            ("participation_ratio", "participation ratio"),
        ),
        (("d_m", "d_m"),),
    ),
    _Panel(
        "mean squared overlap of keys",
        (
            ("overlap", "activation space"),
            ("overlap_whitened", "whitening space"),
        ),
        (("one_over_m", "1/m"), ("one_over_d_m", "1/d_m")),
    ),
    _Panel(
        "null by AlphaEdit's cuts",
        (
            ("null_share", "directions, absolute"),
            ("keys_in_null", "keys there, absolute"),
            ("relative_null_share", "directions, relative"),
            ("keys_in_relative_null", "keys there, relative"),
        ),
        share=True,
    ),
)


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """A row a model: dimensions and overlaps on logarithmic axes, and shares.

    The cuts are 0.02, and 0.02 times the mean singular value. Reads the cov.h5 and keys.h5 beside
    each pmatrix.h5, and raises as `spectra_of` does. Raises UsageError for more models than a page
    holds, and where a source is no pmatrix file.
    """
    if len(sources) > _MOST_ROWS:
        raise UsageError(
            f"spectrum has a row a model, and a page holds {_MOST_ROWS} of them, not "
            f"{len(sources)}; name fewer."
        )
    tables = [_rows(source) for source in sources]
    named = names(
        [
            (source.model, f"m = {rows[0]['m']}")
            for source, rows in zip(sources, tables, strict=True)
        ]
    )
    width = options.look.width or PAGE
    columns = fitting(width, len(_PANELS), 2.2)
    if columns == 2:
        columns = 1  # a row of two would break the rows of the models
    fig = axes_over_lists(width, _AXES_HEIGHT, columns, len(_PANELS) * len(sources))
    heights = []
    for at, ax in enumerate(fig.axes):
        panel, rows = _PANELS[at % len(_PANELS)], tables[at // len(_PANELS)]
        own = named.own[at // len(_PANELS)] if panel is _PANELS[0] else ()
        head = fitted(own, width / columns - 0.4, TEXT) if own else panel.title
        ax.set_title(head, parse_math=False)
        handles = _draw(ax, panel, rows)
        labels = [label for _, label in panel.lines + panel.references]
        heights.append(list_below(ax, handles, labels))
    make_room(fig, heights, columns)
    title(fig, "The spectrum of C and the overlap of keys", named.shared)
    return fig


def _rows(source: Source) -> Sequence[dict[str, Any]]:
    if source.spectra:
        return source.spectra
    if not isinstance(source.matrices, PMatrixFile):
        raise UsageError("spectrum is drawn from a pmatrix.h5 with its cov.h5 and keys.h5.")
    return spectra_of(source.matrices, source.layers)


def _draw(ax: Axes, panel: _Panel, rows: Sequence[dict[str, Any]]) -> list[Line2D]:
    layers = [row["layer"] for row in rows]
    handles = [
        ax.plot(layers, [row[name] for row in rows], marker="o", markersize=2, **line_style(at))[0]
        for at, (name, _) in enumerate(panel.lines)
    ] + [
        ax.axhline(rows[0][name], color=GREY, linestyle=dashes, linewidth=0.8)
        for (name, _), dashes in zip(panel.references, ("--", ":"), strict=False)
    ]
    open_axes(ax)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.share:
        ax.set_ylim(-0.04, 1.04)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    else:
        ax.set_yscale("log")
    return handles
