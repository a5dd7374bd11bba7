"""How a table is fitted to a terminal: which columns it has, and how wide each is.

No word is broken and no number is wrapped; a path is broken behind its slashes. Where there is not
room to read all columns with ease, those marked `spare` go, the most spare first; where there is
room left, those marked `wide` come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kscli.tables import Column

EASY_TEXT = 16  # a text that is narrower is hard to read
INTERVAL = " ["  # where a number ends and its interval begins, which may stand below it
LONGEST_WORD = 40  # what is longer may be broken: a path behind a slash, a digest anywhere


@dataclass(frozen=True)
class Layout:
    """The columns that a table has, by their indexes; their widths; and the gap between them.

    `intervals` are the indexes of the columns whose numbers have intervals.
    """

    intervals: frozenset[int]
    kept: tuple[int, ...]
    widths: tuple[int, ...]
    gap: int

    @property
    def width(self) -> int:
        """The width of the whole table."""
        return sum(self.widths) + self.gap * (len(self.widths) - 1)

    def placed(self, cells: Sequence[str]) -> list[str]:
        """The cells of a line that are kept; an interval is below its number for want of room."""
        return [
            self._placed(cells[at], width, interval=at in self.intervals)
            for at, width in zip(self.kept, self.widths, strict=True)
        ]

    @staticmethod
    def _placed(cell: str, width: int, *, interval: bool) -> str:
        if _width(cell) <= width:
            return cell
        return cell.replace(INTERVAL, "\n[") if interval else broken(cell, width)


def broken(text: str, room: int) -> str:
    """The text with each path that is wider than `room` broken behind some of its slashes."""
    return " ".join(
        _broken_path(word, room) if _width(word) > room else word for word in text.split(" ")
    )


def _broken_path(word: str, room: int) -> str:
    lines = [""]
    for part in _parts(word):
        if lines[-1] and _width(lines[-1] + part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _parts(word: str) -> list[str]:
    """The parts of a path, each with the slash behind it."""
    return re.findall(r"[^/]*/|[^/]+", word)


def without_intervals(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> list[list[str]]:
    """The cells with numbers alone where these had their intervals."""
    return [
        [
            cell.partition(INTERVAL)[0] if column.interval else cell
            for column, cell in zip(columns, line, strict=True)
        ]
        for line in cells
    ]


def fit(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], room: int | None
) -> Layout | None:
    """The layout of `cells`, the headings first, in `room` columns of a terminal (None: any).

    None where no layout fits.
    """
    natural = [max(map(_width, of_column)) for of_column in zip(*cells, strict=True)]
    intervals = frozenset(at for at, column in enumerate(columns) if column.interval)
    plain = [at for at, column in enumerate(columns) if not column.wide]
    if room is None:
        return Layout(intervals, tuple(plain), tuple(natural[at] for at in plain), 2)
    of_columns = list(zip(columns, zip(*cells, strict=True), natural, strict=True))
    least = [_least(column, of_column) for column, of_column, _ in of_columns]
    easy = [
        max(_least(column, of_column), _easy(column, of_column, own))
        for column, of_column, own in of_columns
    ]
    start, kept = easy, _kept(columns, plain, easy, room)
    if _total(easy, kept, 1) > room:
        # A number is as easy to read above its interval; further texts would narrow all texts.
        plain = [at for at in plain if columns[at].right or not columns[at].spare]
        start, kept = least, _kept(columns, plain, least, room)
    for at in range(len(columns)):
        more = sorted([*kept, at])
        if at not in kept and columns[at].wide and _total(natural, more, 2) <= room:
            kept = more
    if _total(start, kept, 1) > room:
        return None
    gap = 2 if _total(start, kept, 2) <= room else 1
    left = room - _total(start, kept, gap)
    widths = _shared([start[at] for at in kept], [natural[at] for at in kept], left)
    return Layout(intervals, tuple(kept), tuple(widths), gap)


def _kept(
    columns: Sequence[Column], plain: Sequence[int], widths: Sequence[int], room: int
) -> list[int]:
    """Those of `plain` that are left when as many spare ones went as the room asks for."""
    kept = list(plain)
    while _total(widths, kept, 1) > room:
        spare = [at for at in kept if columns[at].spare]
        if not spare:
            break
        kept.remove(max(spare, key=lambda at: (columns[at].spare, at)))
    return kept


def _easy(column: Column, cells: Sequence[str], natural: int) -> int:
    """A width that is read with ease: of a number with its interval, of a text some words."""
    if column.right:
        return max(map(_width, cells[1:]), default=0)
    return min(natural, EASY_TEXT)


def _total(widths: Sequence[int], kept: Sequence[int], gap: int) -> int:
    return sum(widths[at] for at in kept) + gap * max(len(kept) - 1, 0)


def _least(column: Column, cells: Sequence[str]) -> int:
    """The least width of a column: a number is whole, and so is every word of a text."""
    heading, *values = cells
    words = [
        part
        for text in values
        for word in text.split(" ")
        for part in (_parts(word) if _width(word) > LONGEST_WORD else [word])
    ]
    if column.right:
        words = [part for text in values for part in text.replace(INTERVAL, "\n[").split("\n")]
    longest = max(map(_width, words), default=0)
    if not column.right:
        longest = min(longest, LONGEST_WORD)
    return max([longest, *map(_width, heading.split(" "))])


def _shared(least: Sequence[int], natural: Sequence[int], left: int) -> list[int]:
    """The widths after the room that is left went, bit by bit, to who lacks most of his own."""
    widths = list(least)
    for _ in range(left):
        lacking = [at for at in range(len(widths)) if widths[at] < natural[at]]
        if not lacking:
            break
        widths[max(lacking, key=lambda at: natural[at] / widths[at])] += 1
    return widths


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
