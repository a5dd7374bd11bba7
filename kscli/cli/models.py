"""`kscli models`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.tables import Column, Row


def _millions(row: Row, key: str) -> str:
    return f"{row[key] / 1e6:,.1f} M"


def _active(row: Row) -> str:
    return _millions(row, "active") if row["active"] != row["parameters"] else ""


COLUMNS = (
    Column("name"),
    Column("family"),
    Column("hub_id", "Hub id", value=lambda row: row["hub_id"] or "(in the package)"),
    Column("layers", spec="d"),
    Column("d_m", spec=",d"),
    Column("parameters", spec="f", value=partial(_millions, key="parameters")),
    Column("active", spec="f", value=_active),
    Column("gate", "the Hub asks for", value=lambda row: row["gate"] or ""),
    Column("listing_seen", "listing", value=lambda row: "" if row["listing_seen"] else "not seen"),
)
NOT_SEEN = (
    "listing not seen: the model's page on the Hub could not be read when its line was written; "
    "its commit, its sizes and what the Hub asks for are as public repositories have them."
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
    if output_format is Format.table and not all(row["listing_seen"] for row in rows):
        ConsoleReporter().note(NOT_SEEN)
