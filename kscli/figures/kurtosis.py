"""Excess kurtosis of P over the layers of one or several models (Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from kscli.analysis.resampling import Interval, Resampling, bootstrap_moments, interval
from kscli.analysis.statistics import STATISTICS, off_diagonal
from kscli.escaping import escaped
from kscli.figures import FigureOptions, Source
from kscli.figures.curves import no_pairs, note
from kscli.figures.style import (
    COLOURS,
    COLUMN,
    GREY,
    MARKERS,
    PAGE,
    SMALL,
    TEXT,
    axes_over_lists,
    fitted,
    fitting,
    line_style,
    list_below,
    make_room,
    names,
    open_axes,
    shades,
    title,
)
from kscli.layers import layers_text
from kscli.models.families import Member, family, member_of, of_one_active_size

_AXES_HEIGHT = 2.2
# Layers that a column of the page has room for, and lines whose bands can be told apart, and
# whose bars can; the points between these, which would hide each other at one depth.
_FEW_LAYERS = 32
_MOST_BANDS = 2
_MOST_BARS = 4
_BAR_GAP = 1.2


@dataclass(frozen=True)
class _Line:
    """A model's kurtosis at its layers; `x` are these, or the depths relative to the last."""

    model: str
    family: str
    m: int
    layers: tuple[int, ...]
    x: tuple[float, ...]
    kurtosis: tuple[float, ...]
    intervals: tuple[Interval, ...]
    member: Member | None


@dataclass(frozen=True)
class _Panel:
    """The lines that share axes; `title` is empty where there is one panel."""

    title: str
    lines: tuple[_Line, ...]
    styles: tuple[dict[str, Any], ...]


def draw(sources: Sequence[Source], options: FigureOptions) -> Figure:
    """One line a model, over its layers; a layer whose kurtosis is undefined is a gap.

    Families of several sizes have axes each, side by side on one scale, of one colour, lighter
    for smaller models. Mixtures of experts, dashed, have axes with the dense models of which a
    token uses as many parameters. Models of different depth are drawn over the relative depth, 0
    the first layer and 1 the last. The 95 % intervals of resampled facts are bands, or bars where
    some axes have more than two lines; where some have more than four there are none, as a note
    says. The legend, in the order of `sources`, names undefined layers; without them one model
    needs none.
    """
    relative = len({_depth(source) for source in sources}) > 1
    lines = [_line(source, relative, options.seed) for source in sources]
    panels = _panels(lines)
    span = max(len(line.layers) for line in lines)
    alone = len(panels) == 1 and (relative or span <= _FEW_LAYERS + 1)
    width = options.look.width or (COLUMN if alone else PAGE)
    columns = fitting(width, min(len(panels), 2 if len(panels) == 4 else 3), 2.0)
    most = max(len(panel.lines) for panel in panels)
    named = names([(line.model, f"m = {line.m}") for line in lines])
    own = dict(zip([id(line) for line in lines], named.own, strict=True))
    fig = axes_over_lists(width, _AXES_HEIGHT, columns, len(panels))
    heights = []
    for at, (ax, panel) in enumerate(zip(fig.axes, panels, strict=True)):
        handles = _draw_panel(ax, panel, span)
        _draw_intervals(ax, panel, most)
        if at:
            ax.sharey(fig.axes[0])
        ax.set_xlabel("relative depth (0 first, 1 last layer)" if relative else "layer")
        if at % columns == 0:
            ax.set_ylabel("excess kurtosis (Gaussian: 0)")
        else:
            ax.tick_params(labelleft=False)
        _set_x(ax, lines, relative)
        labels = [_label(line, own[id(line)], width / columns) for line in panel.lines]
        heights.append(list_below(ax, handles, labels) if any(labels) else 0.0)
    make_room(fig, heights, columns)
    title(fig, "Excess kurtosis of P off the diagonal", named.shared)
    return fig


def _depth(source: Source) -> int:
    return source.depth or max(source.matrices.layers) + 1


def _line(source: Source, relative: bool, seed: int) -> _Line:
    kurtosis = STATISTICS["kurtosis"]
    values, intervals, m = [], [], 0
    for layer in source.layers:
        P = source.matrices.matrix("P", layer)
        m = len(P)
        values.append(kurtosis(off_diagonal(P)))
        counts = Resampling(seed=seed).counts(m)
        intervals.append(interval(bootstrap_moments(P, counts).kurtosis))
    last = max(_depth(source) - 1, 1) if relative else 1
    return _Line(
        source.model,
        family(source.matrices.model),
        m,
        source.layers,
        tuple(layer / last for layer in source.layers),
        tuple(values),
        tuple(intervals),
        _member(source),
    )


def _member(source: Source) -> Member | None:
    """The model's family and sizes, by its file or its name."""
    about = getattr(source.matrices, "about", None)
    if about is None:
        return member_of(source.matrices.model)
    return member_of(source.matrices.model, about.model_id, about.sizes)


def _panels(lines: Sequence[_Line]) -> list[_Panel]:
    """One a family of several sizes, one a mixture of experts beside dense models, one of others.

    One panel where nothing but others is there.
    """
    beside = _beside(lines)
    placed = {id(line) for of in beside for line in of if line.member and line.member.sparse}
    families: dict[str, list[_Line]] = {}
    for line in lines:
        if id(line) not in placed:
            families.setdefault(line.family, []).append(line)
    several = {name: of for name, of in families.items() if len(of) > 1}
    placed |= {id(line) for of in beside for line in of}
    single = [of[0] for of in families.values() if len(of) == 1 and id(of[0]) not in placed]
    panels = []
    for at, (name, of) in enumerate(several.items()):
        colours = shades(COLOURS[at % len(COLOURS)], len(of))
        panels.append(_Panel(name, tuple(of), tuple({"color": colour} for colour in colours)))
    panels += map(_sparse_panel, beside)
    if single:
        styles = tuple(line_style(len(panels) + at) for at in range(len(single)))
        name = single[0].family if len(single) == 1 else "other models"
        panels.append(_Panel(name if panels else "", tuple(single), styles))
    return panels


def _beside(lines: Sequence[_Line]) -> list[list[_Line]]:
    """Mixtures of experts with the dense models of their active size; no line is in two groups."""
    groups: list[list[_Line]] = []
    for mixture in lines:
        group = [mixture, *(line for line in lines if _alike(line, mixture))]
        if len(group) == 1:
            continue
        held = {id(line) for line in group}
        joined = [of for of in groups if held & {id(line) for line in of}]
        held |= {id(line) for of in joined for line in of}
        groups = [of for of in groups if of not in joined]
        groups.append([line for line in lines if id(line) in held])
    return groups


def _alike(dense: _Line, mixture: _Line) -> bool:
    if dense.member is None or mixture.member is None:
        return False
    return of_one_active_size(dense.member, mixture.member)


def _sparse_panel(lines: Sequence[_Line]) -> _Panel:
    """Dense models in one colour, mixtures in another and dashed."""
    sparse = [line.member is not None and line.member.sparse for line in lines]
    active = max(line.member.active for line in lines if line.member is not None)
    unit, scale = ("B", 1e9) if active >= 1e9 else ("M", 1e6)
    shade = {kind: iter(shades(COLOURS[kind], sparse.count(kind))) for kind in (False, True)}
    styles = tuple(
        {"color": next(shade[kind]), "linestyle": "--" if kind else "-"} for kind in sparse
    )
    return _Panel(f"about {active / scale:.2g} {unit} active parameters", tuple(lines), styles)


def _label(line: _Line, own: Sequence[str], width: float) -> str:
    undefined = [
        layer for layer, value in zip(line.layers, line.kurtosis, strict=True) if math.isnan(value)
    ]
    gaps = f"undefined at {layers_text(undefined)}" if undefined else ""
    name = fitted(own, width - 0.95 - (1.2 if gaps else 0), SMALL)
    return ": ".join(text for text in (name, gaps) if text)


def _draw_panel(ax: Axes, panel: _Panel, span: int) -> list[Line2D]:
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=1)
    handles = [
        ax.plot(
            line.x,
            line.kurtosis,
            marker=MARKERS[at % len(MARKERS)],
            markersize=3.2 if span <= _FEW_LAYERS + 1 else 2.6,
            markeredgewidth=0,
            **style,
        )[0]
        for at, (line, style) in enumerate(zip(panel.lines, panel.styles, strict=True))
    ]
    if all(math.isnan(value) for line in panel.lines for value in line.kurtosis):
        few = all(line.m < 2 for line in panel.lines)
        no_pairs(ax, "no pairs of facts" if few else "the kurtosis is undefined")
    ax.set_title(
        escaped(panel.title), pad=11.5 if panel.title else 6, fontsize=TEXT, parse_math=False
    )
    open_axes(ax)
    return handles


def _draw_intervals(ax: Axes, panel: _Panel, most: int) -> None:
    """The intervals of the panel's lines, all panels alike; `most` is of lines in one of them."""
    known = [
        (line, style["color"])
        for line, style in zip(panel.lines, panel.styles, strict=True)
        if not all(math.isnan(of.low) for of in line.intervals)
    ]
    if not known:
        return
    if most > _MOST_BARS:
        note(ax, "intervals: too many lines; `kscli stats` has them", "right")
        return
    for at, (line, colour) in enumerate(known):
        if most <= _MOST_BANDS and len(line.x) > 1:
            _draw_band(ax, line, colour)
        else:
            _draw_bars(ax, line, colour, (at - (len(known) - 1) / 2) * _BAR_GAP)
    drawn = "band" if ax.collections[0].get_alpha() else "bar"
    note(ax, f"{drawn}: 95 % interval, facts resampled", "right")


def _draw_band(ax: Axes, line: _Line, colour: Any) -> None:
    low, high = [of.low for of in line.intervals], [of.high for of in line.intervals]
    ax.fill_between(line.x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1.5)


def _draw_bars(ax: Axes, line: _Line, colour: Any, aside: float) -> None:
    """A thin bar at every layer, `aside` so many points."""
    low, high = [of.low for of in line.intervals], [of.high for of in line.intervals]
    bars = ax.vlines(line.x, low, high, color=colour, linewidth=0.6, zorder=1.5)
    shift = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
    bars.set_transform(ax.transData + shift)


def _set_x(ax: Axes, lines: Sequence[_Line], relative: bool) -> None:
    first = min(min(line.x) for line in lines)
    last = max(max(line.x) for line in lines)
    if relative:
        ax.set_xlim(min(first, 0) - 0.03, max(last, 1) + 0.03)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        return
    room = max(0.5, 0.02 * (last - first))
    ax.set_xlim(first - room, last + room)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
