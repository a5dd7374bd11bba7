"""Tables of records, which a reader can sort by any column."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kscli.report.html import Html, join, tag
from kscli.tables import Column, Row, cell, shown

UNDEFINED = "\N{EN DASH}"


def table(rows: Sequence[Row], columns: Sequence[Column], caption: str) -> Html:
    """Records as a table in a box that scrolls by itself; the first column heads its row."""
    columns = shown(columns, rows, wide=True)
    head = [
        tag(
            "th",
            tag("button", column.title, type="button", title=column.meaning or None),
            scope="col",
            class_=_kind(column),
        )
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
    if column.right:
        value = row[column.key]
        sort = "" if value is None or math.isnan(value) else repr(float(value))
    name, scope = ("th", "row") if heads else ("td", None)
    text = cell(column, row, UNDEFINED)
    if column.right:
        text = text.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}").replace("%", " %")
    return tag(name, text, scope=scope, class_=_kind(column), data_sort=sort)


def _kind(column: Column) -> str:
    """The class of a column's cells."""
    return "number" if column.right else "long" if column.long else "short"
