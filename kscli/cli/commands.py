"""The commands, in the order of the help, and how a function becomes one of them."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from kscli.errors import MissingError

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
    "help",
)
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class Command(TyperCommand):
    """A command whose options may come from a file or the environment, too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        from kscli.cli.settings import variables_of

        super().__init__(*args, **settings)
        for parameter in self.params:
            if variables := variables_of(parameter):
                parameter.envvar = variables
                parameter.show_envvar = False  # type: ignore[attr-defined]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, in sections where they are many."""
        from kscli.cli.sections import MANY, sections

        if len(self.get_params(ctx)) <= MANY:
            super().format_options(ctx, formatter)
            return
        for heading, records in sections(self, ctx):
            with formatter.section(heading):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, over what the file of settings gives."""
        asks_help = any(name in args for name in ctx.help_option_names)
        if not ctx.resilient_parsing and not asks_help:
            from kscli.cli.settings import find_settings, options_of_file

            if settings := find_settings(Path.cwd()):
                path = ctx.command_path.split()[1:]
                ctx.default_map = options_of_file(settings, path, self.params, all_options())
            self.refuse_repeated(ctx, args)
        return super().parse_args(ctx, args)

    def refuse_repeated(self, ctx: Any, args: Sequence[str]) -> None:
        """Raise UsageError where an option that takes one value is given twice.

        Click would take the last one without a word, and so lose an edit, a layer or a file.
        """
        from kscli.errors import UsageError

        _, _, order = self.make_parser(ctx).parse_args(list(args))
        given = Counter(each.name for each in order)
        for each in self.params:
            one = not (getattr(each, "multiple", False) or getattr(each, "is_flag", False))
            if given[each.name] > 1 and one and each.nargs == 1:
                raise UsageError(f"{each.opts[0]} is given {given[each.name]} times; give it once.")

    def invoke(self, ctx: Any) -> Any:
        """Run the command; says which model it is about, and how to make what is missing."""
        from kscli.cli.requests import note_default_model, refuse_mistyped_alias

        note_default_model(ctx)
        refuse_mistyped_alias(ctx)
        if "device" in ctx.params and not ctx.params.get("quiet"):
            from kscli.cli.stderr import say_at_once

            say_at_once(f"{ctx.command_path} begins: PyTorch is loaded, then the model.")
        try:
            return super().invoke(ctx)
        except MissingError as error:
            from kscli.cli.remedies import of_models
            from kscli.cli.requests import models_of

            raise of_models(error, models_of(ctx), ctx.params.get("directory")) from error


def all_options() -> Sequence[str]:
    """The names of the options of all commands, without dashes."""
    from kscli.cli.settings import names_of

    found: dict[str, None] = {}
    for name in COMMANDS:
        command = load_command(name)
        for each in getattr(command, "commands", {name: command}).values():
            found.update(dict.fromkeys(name for one in each.params for name in names_of(one)))
    return list(found)


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
        cls=Command,
        help=text.replace("\n\nExamples:\n", "\n\n\b\nExamples:\n"),
        short_help=text.partition("\n\n")[0],
    )(function)
