"""Tables of records, which a reader can sort by any column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kscli.report.html import Html, join, tag
from kscli.report.words import magnitude, number

Row = Mapping[str, Any]
UNDEFINED = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column: its title, the text of a row's cell, and the number that it is sorted by.

    Without `sort` a column is of text; a row whose number is NaN goes last in either order.
    `kind` is the class of its cells.
    """

    title: str
    text: Callable[[Row], str]
    sort: Callable[[Row], float] | None = None
    kind: str = "number"


def words(name: str, title: str = "", *, long: bool = False) -> Column:
    """A column of a field that is text; a long one keeps some width on a narrow screen."""

    def text(row: Row) -> str:
        return UNDEFINED if row[name] is None else str(row[name])

    return Column(title or name, text, kind="long" if long else "short")


def numbers(name: str, title: str = "", digits: int = 2) -> Column:
    """A column of a field that is a number."""
    return Column(title or name, lambda row: _shown(row[name], digits), lambda row: row[name])


def exponents(name: str, title: str = "") -> Column:
    """A column of a field that is a small number, to its order of magnitude."""

    def text(row: Row) -> str:
        return UNDEFINED if math.isnan(row[name]) else magnitude(row[name])

    return Column(title or name, text, lambda row: row[name])


def shares(name: str, title: str = "", digits: int = 1) -> Column:
    """A column of a field that is a share, in per cent."""

    def text(row: Row) -> str:
        value = row[name]
        return UNDEFINED if math.isnan(value) else f"{100 * value:.{digits}f} %"

    return Column(title or name, text, lambda row: row[name])


def intervals(name: str, title: str = "", digits: int = 1) -> Column:
    """A column of an estimate with the interval of `NAME_low` and `NAME_high`."""

    def text(row: Row) -> str:
        value, low, high = (row[name + end] for end in ("", "_low", "_high"))
        if math.isnan(value) or math.isnan(low):
            return _shown(value, digits)
        return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"

    return Column(title or name, text, lambda row: row[name])


def table(rows: Sequence[Row], columns: Sequence[Column], caption: str) -> Html:
    """Records as a table in a box that scrolls by itself; the first column heads its row."""
    head = [
        tag("th", tag("button", column.title, type="button"), scope="col", class_=column.kind)
        for column in columns
    ]
    body = [tag("tr", *(_cell(column, row, not at) for at, column in enumerate(columns)))
            for row in rows]  # fmt: skip
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), aria_label=caption)
    return _boxed(inner, caption)


def plain_table(pairs: Sequence[tuple[str, str]], caption: str) -> Html:
    """Names and what they stand for, in their order."""
    body = [tag("tr", tag("th", name, scope="row"), tag("td", text)) for name, text in pairs]
    return _boxed(tag("table", tag("tbody", *body), class_="names", aria_label=caption), caption)


def _boxed(inner: Html, caption: str) -> Html:
    """A table under its caption, in a box that can be scrolled by keyboard too."""
    box = tag("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")
    return join([tag("p", caption, class_="caption above"), box])


def _cell(column: Column, row: Row, heads: bool) -> Html:
    sort = None
    if column.sort is not None:
        value = column.sort(row)
        sort = "" if math.isnan(value) else repr(float(value))
    name, scope = ("th", "row") if heads else ("td", None)
    return tag(name, column.text(row), scope=scope, class_=column.kind, data_sort=sort)


def _shown(value: float, digits: int) -> str:
    return UNDEFINED if math.isnan(value) else number(value, digits)
