"""The commands, in the order of the help, and how a function becomes one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

# The command `merge-cov` is the function `merge_cov` of the module `kscli.cli.merge_cov`.
COMMANDS = (
    "run",
    "cache-cov",
    "extract",
    "pmatrix",
    "stats",
    "topk",
    "relations",
    "plot",
    "report",
    "edit",
    "verify",
    "risk",
    "trace",
    "editors",
    "models",
    "show",
    "merge-cov",
    "export-cov",
    "import-cov",
    "push",
    "pull",
    "facts",
    "corpus",
    "guide",
)
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


def load_command(name: str) -> Any:
    """Import the command of that name; `facts`, a group of commands, is an app already."""
    name = name.replace("-", "_")
    found = getattr(import_module(f"kscli.cli.{name}"), name)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False, **PLAIN)
        add(found, function)
    return typer.main.get_command(found)


def add(app: typer.Typer, function: Callable[..., None]) -> None:
    """Add a function as the command of its name; its docstring is the help page.

    Lines of the docstring are wrapped anew, but not those of its `Examples:`.
    """
    text = inspect.cleandoc(function.__doc__ or "")
    app.command(
        help=text.replace("\n\nExamples:\n", "\n\n\b\nExamples:\n"),
        short_help=text.partition("\n\n")[0],
    )(function)
