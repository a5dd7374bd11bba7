"""`kscli help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def complete_command(incomplete: str) -> list[str]:
    """The commands whose names begin with what was typed."""
    from kscli.cli.commands import COMMANDS

    return [name for name in COMMANDS if name.startswith(incomplete)]


def help(  # noqa: A001
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="The command to explain.",
            show_default="all of them, one line each",
            autocompletion=complete_command,
        ),
    ] = None,
) -> None:
    """Show the help of a command, as its --help does, or the list of all commands.

    Examples:
      kscli help
      kscli help topk
      kscli help facts check
    """
    from kscli.errors import no_such

    found: Any = context.parent
    for name in command or []:
        known = getattr(found.command, "commands", {})
        if name not in known:
            raise no_such("command", name, known)
        of_name = found.command.get_command(found, name)
        found = type(context)(of_name, info_name=name, parent=found)
    typer.echo(found.get_help())
