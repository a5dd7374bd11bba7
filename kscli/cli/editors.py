"""`kscli editors`."""

from __future__ import annotations

from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.complete import complete_editor
from kscli.cli.output import FOR_MACHINES, Format, print_rows
from kscli.tables import EDITORS, SETTINGS


def editors(
    method: Annotated[
        str | None,
        typer.Argument(
            metavar="EDITOR",
            help="The editor whose settings are listed.",
            autocompletion=complete_editor,
        ),
    ] = None,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """List the editors of `kscli edit --method`, or the settings of one of them.

    For each editor: which layers it edits by default, what it needs, what the search for one value
    costs, and the models that there are presets for. "20 × 22" is 20 passes of the model at
    most, forward and backward, over 22 texts.

    With an editor: its own settings and the presets of models. These are from the hyper-parameter
    files of ROME, MEMIT, PMET, AlphaEdit, WilKE and EasyEdit; that of tiny was measured. `kscli
    edit` takes those of its model; an option or --preset takes others.

    Examples:
      kscli editors
      kscli editors memit
      kscli editors -f json | jq -r '.[] | select(.facts_at_once == "several") | .method'
    """
    from kscli.editing.overview import editor_rows, setting_rows

    rows = setting_rows(method) if method else editor_rows()
    if output_format in FOR_MACHINES and output_format is not Format.json and not method:
        # One field has no room for a list.
        rows = [row | {"presets": " ".join(row["presets"])} for row in rows]
    print_rows(rows, SETTINGS if method else EDITORS, output_format)
