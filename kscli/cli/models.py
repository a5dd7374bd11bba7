"""`kscli models`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_rows
from kscli.tables import Column, Row


def _size(row: Row, key: str) -> str:
    size = row[key]
    return f"{size / 1e9:,.1f} B" if size >= 1e9 else f"{size / 1e6:,.1f} M"


def _active(row: Row) -> str:
    return _size(row, "active") if row["active"] != row["parameters"] else ""


def _hub_id(row: Row) -> str:
    return f"{row['hub_id'] or '(in the package)'}{'' if row['listing_seen'] else ' *'}"


COLUMNS = (
    Column("name"),
    Column("family", spare=4),
    Column("hub_id", "Hub id", value=_hub_id),
    Column("layers", spec="d", spare=2),
    Column("d_m", spec=",d", spare=3),
    Column("parameters", spec="f", value=partial(_size, key="parameters")),
    Column("active", spec="f", value=_active, spare=1),
    Column("gate", "the Hub asks for", value=lambda row: row["gate"] or ""),
)
NOT_SEEN = (
    "*: the model's listing on the Hub could not be seen when its line was written; its commit, "
    "its sizes and what the Hub asks for are as public repositories have them."
)


def models(output_format: options.OutputFormat = Format.table) -> None:
    """List the aliases by family. Name any other decoder by its Hub id, folder or .gguf file.

    `active` counts the parameters that one token uses, of a mixture of experts. `the Hub asks for`
    says what you must accept or give on the model's page before you can fetch it.

    Examples:
      kscli models
      kscli models -f json | jq -r '.[] | select(.parameters < 2e9) | .name'
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.models.aliases import ALIASES

    rows = [asdict(alias) for alias in ALIASES]
    print_rows(rows, COLUMNS, output_format)
    if output_format not in FOR_MACHINES and not all(row["listing_seen"] for row in rows):
        ConsoleReporter().note(NOT_SEEN)
