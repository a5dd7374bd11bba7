"""Results on stdout, as a table for people or in a format for machines."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from kscli.cli.layout import Layout, broken, fit, without_intervals
from kscli.errors import KscliError
from kscli.escaping import escaped, escaped_json
from kscli.tables import Column, Row, cell, shown

TEXTS_AT_ONCE = 1000  # of a long list, that are written together


class Format(StrEnum):
    """How results are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    tsv = "tsv"
    markdown = "markdown"
    latex = "latex"


FOR_MACHINES = (Format.json, Format.csv, Format.tsv)


def print_rows(
    rows: Iterable[Row],
    columns: Sequence[Column],
    output: Format,
    title: str = "",
    *,
    further: bool = False,
) -> None:
    """Print records: every field for machines, as they come; `columns` for people.

    A `further` table has its title in Markdown and LaTeX too, to part it from the one before.
    """
    if output is Format.json:
        _write_all(_objects(rows))
        return
    if output in FOR_MACHINES:
        _write_all(_separated(rows, "," if output is Format.csv else "\t"))
        return
    rows = list(rows)
    columns = shown(columns, rows, wide=output is Format.table)
    cells = [[column.title for column in columns], *(_cells(row, columns) for row in rows)]
    if output is Format.table:
        _print_table(cells, columns, title)
        return
    if further:
        print_head(title, output)
    _write((_markdown if output is Format.markdown else _latex)(cells, columns))


def print_head(title: str, output: Format) -> None:
    """Part a further table from what was printed before it, where the format itself does not."""
    title = escaped(title)
    if output is Format.markdown:
        _write(f"\n{_markdown_text(title)}\n\n")
    elif output is Format.latex:
        _write(f"\n% {title}\n")


def print_json(value: Any) -> None:
    """Print one strict JSON document; what is undefined is null."""
    _write(_json(value) + "\n")


def print_line(text: str) -> None:
    """Print one line of results; on a terminal wrapped between its words."""
    text = escaped(text)
    room = terminal_width()
    _write((wrapped(text, room) if room and text else text) + "\n")


def print_paths(paths: Iterable[Path], output: Format) -> None:
    """Print the paths of files that were written: a line each, or records for machines."""
    if output is Format.table:
        for path in paths:
            print_line(str(path))
    else:
        print_rows([{"path": str(path)} for path in paths], [Column("path")], output)


def _write_all(texts: Iterable[str]) -> None:
    """Write texts as they come, some at once."""
    iterator = iter(texts)
    while some := "".join(islice(iterator, TEXTS_AT_ONCE)):
        _write(some)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise KscliError(f"stdout does not take the results: {error.strerror}.") from error


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _cells(row: Row, columns: Sequence[Column]) -> list[str]:
    """A row for people."""
    return [escaped(cell(column, row)) for column in columns]


def _separated(rows: Iterable[Row], delimiter: str) -> Iterator[str]:
    text = io.StringIO()
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _field(value) for name, value in _strict(row).items()})
        yield text.getvalue()
        text.seek(0)
        text.truncate()


def _field(value: Any) -> Any:
    """A value in CSV or TSV, where a row is one line for every reader."""
    if value is None:
        return ""
    return escaped(value) if isinstance(value, str) else value


def _objects(rows: Iterable[Row]) -> Iterator[str]:
    """The list of the rows as `_json` writes it, one by one."""
    before = "[\n"
    for row in rows:
        yield before + textwrap.indent(_json(row), "  ")
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _json(value: Any) -> str:
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(_strict(value), ensure_ascii=not unicode, indent=2, allow_nan=False)
    return escaped_json(text)


def _markdown(cells: Sequence[Sequence[str]], columns: Sequence[Column]) -> str:
    head, *lines = ("| " + " | ".join(map(_markdown_text, line)) + " |\n" for line in cells)
    rule = "|" + "|".join("---:" if column.right else "---" for column in columns) + "|\n"
    return head + rule + "".join(lines)


# What is markup within a line: a `_` not inside a word, and a `(` where it would make a link.
_MARKDOWN = re.compile(r"[\\`*~<|]|&(?=#?\w)|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(")


def _markdown_text(text: str) -> str:
    """Text that stands in Markdown for itself."""
    return _MARKDOWN.sub(r"\\\g<0>", text)


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(cells: Sequence[Sequence[str]], columns: Sequence[Column]) -> str:
    def line(texts: Sequence[str]) -> str:
        escaped = ["".join(LATEX_SPECIAL.get(c, c) for c in text) for text in texts]
        # At the begin of a row these would be arguments of the `\\` before it.
        guard = "{}" if escaped and escaped[0][:1] in ("[", "*") else ""
        return f"  {guard}" + " & ".join(escaped) + r" \\" + "\n"

    alignment = "".join("r" if column.right else "l" for column in columns)
    head, *body = map(line, cells)
    rule = "  \\hline\n"
    begin, end = f"\\begin{{tabular}}{{{alignment}}}\n", "\\end{tabular}\n"
    return "".join([begin, rule, head, rule, *body, rule, end])


def _print_table(cells: Sequence[Sequence[str]], columns: Sequence[Column], title: str) -> None:
    """Print a table as wide as the terminal allows; a pipe has no width."""
    room = terminal_width()
    left_out = []
    layout = fit(columns, cells, room)
    if layout is None:
        cells = without_intervals(columns, whole := cells)
        left_out.append("intervals")
        layout = fit(columns, cells, room)
        if layout is None:
            _write(_records(whole, title, room or 0))
            return
    _write(_table(cells, columns, layout, title))
    left_out += [
        column.title
        for at, column in enumerate(columns)
        if at not in layout.kept and not column.wide
    ]
    if left_out:
        print_line(f"Not shown, for want of width: {'; '.join(dict.fromkeys(left_out))}.")
        _write("\n")


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None where it is none."""
    from rich.console import Console

    return Console(file=sys.stdout).width if sys.stdout.isatty() else None


def _table(
    cells: Sequence[Sequence[str]], columns: Sequence[Column], layout: Layout, title: str
) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, emoji=False)
    heading_room = console.width if sys.stdout.isatty() else layout.width + len(title)
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, layout.gap - 1, 0, 0)
    )
    for at, width in zip(layout.kept, layout.widths, strict=True):
        table.add_column(
            Text(columns[at].title),
            justify="right" if columns[at].right else "left",
            vertical="top",
            overflow="fold",
            width=width,
        )
    for line in cells[1:]:
        table.add_row(*map(Text, layout.placed(line)))
    with console.capture() as capture:
        if title:
            console.width = heading_room
            console.print(Text(escaped(title), style="bold"))
        console.width = max(layout.width, 1)
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()) + "\n"


def _records(cells: Sequence[Sequence[str]], title: str, room: int) -> str:
    """A table that is too wide for the terminal: each row as lines of `heading: value`."""
    headings, *rows = cells
    blocks = [[wrapped(escaped(title), room)]] if title else []
    blocks += [
        [
            broken(wrapped(f"{heading}: {value}", room, indent="  "), room - 2)
            for heading, value in zip(headings, row, strict=True)
        ]
        for row in rows
    ]
    return "".join("\n".join(block) + "\n\n" for block in blocks)


def wrapped(text: str, room: int, indent: str = "") -> str:
    """A text in lines of at most `room` columns, where its words allow."""
    return textwrap.fill(
        text,
        max(room, 1),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
