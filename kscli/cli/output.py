"""Results on stdout, as a table for people or in a format for machines."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Row = Mapping[str, Any]


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    markdown = "markdown"
    latex = "latex"


@dataclass(frozen=True)
class Column:
    """A column of the formats for people: its title and how a row's cell is written."""

    title: str
    cell: Callable[[Row], str]
    right: bool = False


def field(name: str, title: str | None = None, spec: str = "") -> Column:
    """A column that shows one field; `spec` formats a number, an undefined one shows as `-`."""

    def cell(row: Row) -> str:
        value = row[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        return format(value, spec)

    return Column(title or name, cell, right=bool(spec))


def print_rows(
    rows: Sequence[Row], columns: Sequence[Column], output: Format, title: str = ""
) -> None:
    """Print records: every field for machines, `columns` for people."""
    if output is Format.json:
        print_json(rows)
    elif output in (Format.csv, Format.tsv):
        _write(_separated(rows, "," if output is Format.csv else "\t"))
    elif output is Format.markdown:
        _write(_markdown(rows, columns))
    elif output is Format.latex:
        _write(_latex(rows, columns))
    else:
        _print_table(rows, columns, title)


def print_json(value: Any) -> None:
    """Print one strict JSON document; what is undefined is null."""
    _write(json.dumps(_strict(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def print_line(text: str) -> None:
    """Print one line of results."""
    _write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _separated(rows: Sequence[Row], delimiter: str) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in _strict(row).items()})
    return text.getvalue()


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    rule = "|" + "|".join("---:" if column.right else "---" for column in columns) + "|\n"
    head = line([column.title for column in columns])
    return head + rule + "".join(line([c.cell(row) for c in columns]) for row in rows)


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    def line(cells: list[str]) -> str:
        escaped = ("".join(LATEX_SPECIAL.get(c, c) for c in cell) for cell in cells)
        return "  " + " & ".join(escaped) + r" \\" + "\n"

    alignment = "".join("r" if column.right else "l" for column in columns)
    body = "".join(line([column.cell(row) for column in columns]) for row in rows)
    return (
        f"\\begin{{tabular}}{{{alignment}}}\n  \\hline\n"
        + line([column.title for column in columns])
        + "  \\hline\n"
        + body
        + "  \\hline\n\\end{tabular}\n"
    )


def _print_table(rows: Sequence[Row], columns: Sequence[Column], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=column.right
        )
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in columns))
    # A pipe has no width; a table there is never folded to a terminal's 80 columns.
    width = None if sys.stdout.isatty() else 10_000
    Console(file=sys.stdout, width=width, highlight=False).print(table)
    sys.stdout.flush()
