"""What a figure or a page was made from, as the file itself says, and whether it is up to date.

An artifact has a recipe (`kscli.artifacts.making`); a figure or a page has this one line, which
stands uncompressed in every format that is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kscli import __version__
from kscli.artifacts.making import Existing
from kscli.errors import ArtifactError
from kscli.reporter import Reporter

_LINE = re.compile(rb"kscli \S+ ([0-9a-f]{16}) [0-9a-f]{16}")


@dataclass(frozen=True)
class Origin:
    """What was asked for, and the fingerprints of the files that it was made from."""

    request: tuple[Any, ...]
    inputs: Sequence[str]

    @property
    def line(self) -> str:
        """The line that the file carries."""
        return f"kscli {__version__} {_digest(self.request)} {_digest(self.inputs)}"

    def must_make(self, path: Path, existing: Existing, reporter: Reporter) -> bool:
        """Whether the file has to be made: it is not there, or its inputs have changed.

        Raises ArtifactError where another file is in the way and `existing` says to refuse.
        """
        if existing is Existing.FORCE or not path.exists():
            return True
        held = _LINE.search(path.read_bytes()) if path.is_file() else None
        same = held is not None and held[1].decode() == _digest(self.request)
        if held and held[0].decode() == self.line:
            reporter.note(f"{path} is up to date.")
            return False
        if not same and existing is Existing.REFUSE:
            raise ArtifactError(
                f"{path} exists, and is not what this command makes; add --force to replace it, or "
                "name another file with --output."
            )
        reporter.note(
            f"{path} is made again: {'its inputs changed' if same else 'it showed something else'}."
        )
        return True


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
