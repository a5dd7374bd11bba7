"""Text from data shown as text: characters that act where they are shown are written as escapes.

Every way out uses this where text is written, and nowhere before: `kscli.cli.output` (tables and
formats), `kscli.cli.console` and `kscli.cli.stderr` (messages), `kscli.report.html` (the page) and
`kscli.figures.style` (labels). JSON alone is exact.
"""

from __future__ import annotations

import re

# C1 controls with DEL, marks, embeddings, overrides and isolates of direction, the separators of
# lines and paragraphs, the deprecated format characters, lone surrogates, and what no XML may hold.
_BEYOND_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufffe\uffff"
_ACTIVE = re.compile(f"[\0-\x1f{_BEYOND_ASCII}]")
_ACTIVE_IN_JSON = re.compile(f"[{_BEYOND_ASCII}]")


def escaped(text: str, keep: str = "") -> str:
    r"""The text with what acts on a terminal, a row or a page as `\n`, `\x1b` or `\u202e`.

    These are control characters, controls of direction, separators of lines and paragraphs, and
    surrogates; those in `keep` stay.
    """
    return _ACTIVE.sub(lambda found: _escape(found[0], keep), text)


def escaped_json(text: str) -> str:
    r"""JSON in which such characters are `\uXXXX`, which stands for the very same text."""
    return _ACTIVE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def storable(text: str) -> str:
    r"""The text with what is no UTF-8, such as a byte of a path in Latin-1, as `\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def _escape(character: str, keep: str) -> str:
    return character if character in keep else character.encode("unicode_escape").decode()
