"""`kscli models`."""

from __future__ import annotations

from dataclasses import asdict

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.tables import Column


def models(output_format: options.OutputFormat = Format.table) -> None:
    """List the aliases. Name any other causal decoder by its Hub id, folder or .gguf file.

    Examples:
      kscli models
      kscli models -f json | jq -r '.[] | select(.parameters < 2e9) | .name'
    """
    from kscli.models.aliases import ALIASES

    columns = [
        Column("name"),
        Column("hub_id", "Hub id", value=lambda row: row["hub_id"] or "(in the package)"),
        Column("layers", spec="d"),
        Column("d_m", spec=",d"),
        Column("parameters", spec="f", value=lambda row: f"{row['parameters'] / 1e6:,.1f} M"),
    ]
    print_rows([asdict(alias) for alias in ALIASES], columns, output_format)
