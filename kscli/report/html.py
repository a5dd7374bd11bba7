"""HTML in which every text is escaped: markup is only what `tag` made."""

from __future__ import annotations

import html
from collections.abc import Sequence

from kscli.escaping import escaped


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """An element; a child that is not `Html` is text and is escaped, None is left out.

    An attribute of True stands alone, one of False or None is left out; `class_` is `class`, and
    an underscore within a name is a hyphen.
    """
    start = "".join([name, *(_attribute(key, value) for key, value in attributes.items())])
    return Html(f"<{start}>{join(children)}</{name}>")


def void(name: str, /, **attributes: str | bool | None) -> Html:
    """An element that has no end tag, such as `meta`."""
    return Html(f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>")


def join(children: Sequence[Child]) -> Html:
    """Children one after the other, as in `tag`."""
    return Html(
        "".join(
            child if isinstance(child, Html) else _text(child)
            for child in children
            if child is not None
        )
    )


def _attribute(name: str, value: str | bool | None) -> str:
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{_text(value)}"'


def _text(text: str) -> str:
    return html.escape(escaped(text))
