"""`kscli guide`."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Annotated, Any

import typer

PAGES = files("kscli") / "guides"


def _titles() -> dict[str, str]:
    """Every page's name, and its first line, in alphabetical order."""
    pages = {page.name.removesuffix(".md"): page for page in PAGES.iterdir()}
    return {
        name: page.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        for name, page in sorted(pages.items())
    }


def _complete(ctx: Any, incomplete: str) -> list[tuple[str, str]]:
    return [(name, title) for name, title in _titles().items() if name.startswith(incomplete)]


def guide(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="The page to show. Without it, the pages are listed.",
            autocompletion=_complete,
        ),
    ] = None,
) -> None:
    """Show a page of the documentation, or list the pages.

    Examples:
      kscli guide
      kscli guide paper-map
      kscli guide library > library.md
    """
    from kscli.errors import no_such

    titles = _titles()
    if name is None:
        width = max(map(len, titles))
        for page, title in titles.items():
            typer.echo(f"{page:{width}}  {title}")
        return
    if name not in titles:
        raise no_such("guide", name, titles)
    text = (PAGES / f"{name}.md").read_text("utf-8")
    if not sys.stdout.isatty():
        typer.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
