"""`kscli models`."""

from __future__ import annotations

from dataclasses import asdict

from kscli.cli import options
from kscli.cli.output import Column, Format, field, print_rows


def models(output_format: options.OutputFormat = Format.table) -> None:
    """List the aliases. Any other causal decoder goes by its Hub id, folder or .gguf file.

    Examples:
      kscli models
      kscli models -f json | jq -r '.[] | select(.parameters < 2e9) | .name'
    """
    from kscli.models.aliases import ALIASES

    columns = [
        field("name"),
        Column("Hub id", lambda row: row["hub_id"] or "(in the package)"),
        field("layers", spec="d"),
        field("d_m", spec=",d"),
        Column("parameters", lambda row: f"{row['parameters'] / 1e6:,.1f} M", right=True),
    ]
    print_rows([asdict(alias) for alias in ALIASES], columns, output_format)
