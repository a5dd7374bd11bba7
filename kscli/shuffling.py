"""Texts in a random order, by way of a temporary file."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from kscli.errors import CorpusError


def shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    """The texts in the order that `seed` draws, each once; the same for the same texts.

    They are written to a temporary file first, so that they need not fit into memory: 8 bytes of
    each stay there. Raises CorpusError where the file has no room.
    """
    with tempfile.TemporaryFile() as file:
        ends = array("q", [0])
        for text in texts:
            try:
                ends.append(ends[-1] + file.write(text.encode()))
            except OSError as error:
                raise _no_room(error) from error
        try:
            file.flush()
        except OSError as error:
            raise _no_room(error) from error
        for at in np.random.default_rng(seed).permutation(len(ends) - 1).tolist():
            file.seek(ends[at])
            yield file.read(ends[at + 1] - ends[at]).decode()


def _no_room(error: OSError) -> CorpusError:
    return CorpusError(
        f"the text cannot be shuffled in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to "
        "a folder with room for all of it, or leave --shuffle out."
    )
