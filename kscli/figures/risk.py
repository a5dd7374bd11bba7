"""|P| with facts that are bound side by side, and those named whose edit does most to others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kscli.analysis.binding import cluster_order, rms_to_others
from kscli.analysis.resampling import ROUNDING
from kscli.figures import FigureOptions, Source
from kscli.figures.style import (
    COLUMN,
    GREY,
    PAGE,
    SMALL,
    TEXT,
    fitted,
    fitting,
    names,
    new_figure,
    size_colours,
    text_width,
    title,
)

# Inches: left of the names of facts, what these may take, from them to the panel, the bar and its
# label; what stands above the panels and below them, between rows.
_MARGIN, _NAME, _LEADER, _BAR = 0.06, 1.25, 0.22, 0.62
_HEADING, _BELOW, _GAP = 0.55, 0.22, 0.12
_SIDE, _LEAST_SIDE = 4.0, 1.0
_SHORT_NAME = 0.85  # that names of facts may take in a narrow figure
_LINE = 1.25 * SMALL / 72  # inches that a name takes down the side
_MOST = 24  # facts that are named where not all can be

Real = NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """|P| (m, m) of one layer in the order of its facts, `order` (m,).

    `damage` (m,), in that order too, is the root mean square of p from each fact to the others,
    and `labels` are its subject and that number.
    """

    names: tuple[str, ...]
    order: NDArray[np.intp]
    size: Real
    damage: Real
    labels: tuple[tuple[str, str], ...]


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One panel a model and layer, on one scale from 0 to 1; rows are edited, columns are moved.

    Facts are in the order of a clustering by |p|. Named are all, or those of largest rms p to the
    others where there is no room, with that number. The sources' matrices must have facts.
    """
    panels = [panel_of(source, layer) for source in sources for layer in source.layers]
    page = options.look.width or PAGE
    columns = fitting(page, 1 if len(panels) == 1 else 2, 3.0)
    rows = math.ceil(len(panels) / columns)
    room = _NAME if page / columns >= COLUMN + 0.1 else _SHORT_NAME
    beside = _MARGIN + room + _LEADER
    side = min(_SIDE, (page - _BAR) / columns - beside - 0.1)
    named = names([panel.names for panel in panels])
    head = (TEXT * 1.2 + 3) / 72 if named.own[0] else 0.0
    if options.look.height:
        room_below = (options.look.height - _HEADING - _BELOW + _GAP) / rows - head - _GAP
        side = min(side, max(room_below, _LEAST_SIDE))
    height = rows * (side + head + _GAP) - _GAP + _HEADING + _BELOW
    filled = columns * (beside + side + 0.1) + _BAR
    width = max(options.look.width, filled)
    edge = (width - filled) / 2
    # Set by hand: the names beside the panels would take part in any automatic layout.
    fig = new_figure(width, height, layout="none")
    for at, (panel, own) in enumerate(zip(panels, named.own, strict=True)):
        row, column = divmod(at, columns)
        left = edge + column * (beside + side + 0.1) + beside
        bottom = height - _HEADING - (row + 1) * (head + side) - row * _GAP
        ax = fig.add_axes((left / width, bottom / height, side / width, side / height))
        _draw_panel(ax, panel, side, room)
        if own:
            ax.set_title(fitted(own, side, TEXT), pad=3, parse_math=False)
    length = height - _HEADING - _BELOW - head
    bar = fig.add_axes(
        ((width - edge - _BAR + 0.05) / width, _BELOW / height, 0.09 / width, length / height)
    )
    beyond = any(panel.size.max() > 1 + ROUNDING for panel in panels)
    fig.colorbar(
        fig.axes[0].images[0], cax=bar, extend="max" if beyond else "neither", extendfrac=0.03
    ).set_label("$|p(k_i, k_j)|$")
    title(
        fig, "What an edit of each fact would move\nbeside names: rms p to the others", named.shared
    )
    fig.supxlabel(
        "rows: fact $i$, which is edited; columns: fact $j$, which is moved",
        y=0.04 / height,
        va="bottom",
    )
    return fig


def panel_of(source: Source, layer: int) -> Panel:
    """One layer's |P|, ordered."""
    matrices = source.matrices
    size = np.abs(matrices.matrix("P", layer))
    m = len(size)
    damage = rms_to_others(size)
    order = cluster_order(size)
    labels = tuple(
        (matrices.facts[at].subject, f" {damage[at]:.2f}" if m > 1 else "") for at in order
    )
    named = (source.model, f"layer {layer}", f"m = {m}")
    return Panel(named, order, size[np.ix_(order, order)], damage[order], labels)


def spread(wanted: Real, gap: float, low: float, high: float) -> Real:
    """Ascending places at least `gap` apart, within `low` and `high`, near ascending `wanted`.

    Blocks that would overlap are moved as one to where they are nearest to what is wanted.
    """
    steps = gap * np.arange(len(wanted))
    blocks: list[Real] = []
    for place in wanted - steps:
        blocks.append(np.array([place]))
        while len(blocks) > 1 and blocks[-2].mean() > blocks[-1].mean():
            blocks[-2:] = [np.concatenate(blocks[-2:])]
    starts = np.concatenate([np.full(len(block), block.mean()) for block in blocks])
    moved: Real = np.clip(starts, low, max(low, high - steps[-1])) + steps
    return moved


def _draw_panel(ax: Axes, panel: Panel, side: float, name: float) -> None:
    m = len(panel.size)
    ax.imshow(
        panel.size, cmap=size_colours(), norm=Normalize(0, 1 + ROUNDING), interpolation="none"
    )
    ax.set(xticks=[], yticks=[])
    room = max(1, int(side / _LINE))
    # The most harmful where not all have room, in their order down the side.
    named = m if m <= room else min(room, _MOST)
    chosen = np.sort(np.argsort(-panel.damage, kind="stable")[:named])
    inch = m / side  # in facts
    places = spread(
        chosen.astype(np.float64), _LINE * inch, -0.5 + _LINE * inch / 2, m - 0.5 - _LINE * inch / 2
    )
    for at, place in zip(chosen.tolist(), places.tolist(), strict=True):
        ax.text(
            -0.5 - _LEADER * inch,
            place,
            _name(panel.labels[at], name),
            fontsize=SMALL,
            ha="right",
            va="center",
            parse_math=False,
        )
        ax.plot(
            [-0.5 - (_LEADER - 0.03) * inch, -0.5 - 0.06 * inch, -0.5 - 0.01 * inch],
            [place, at, at],
            color=GREY,
            linewidth=0.4,
            clip_on=False,
        )
    ax.set(xlim=(-0.5, m - 0.5), ylim=(m - 0.5, -0.5))


def _name(label: tuple[str, str], room: float) -> str:
    """The subject, cut where it is too long for `room` inches, and its number."""
    subject, number = label
    return fitted((subject,), room - text_width(number, SMALL), SMALL) + number
