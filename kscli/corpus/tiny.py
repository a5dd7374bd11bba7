"""The embedded corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property


class TinyCorpus:
    """The corpus of the embedded model, made by `kscli.tiny.corpus`."""

    name = "tiny"

    @cached_property
    def identity(self) -> str:
        """The hash of all its text; it is small."""
        text = json.dumps(list(self.documents()))
        return f"tiny:sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def documents(self) -> Iterator[str]:
        """Stream them; see `Corpus.documents`."""
        from kscli.tiny import corpus

        return corpus.documents()
