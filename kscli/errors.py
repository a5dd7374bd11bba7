"""The errors that kscli raises for its user, each one sentence and an exit code.

Everything a user can cause is a `KscliError`; the command line prints its text
and leaves with its `exit_code`. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class KscliError(Exception):
    """What could not be done, and what to do about it, in one or two lines."""

    exit_code = 1


class UsageError(KscliError):
    """The request itself is wrong: an option's value, a name that does not exist."""

    exit_code = 2


def no_such(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error that there is no thing of that name; it names the nearest, and all there are."""
    known = list(known)
    near = nearest(name, known)
    meant = f"did you mean {near[0]}? There are" if near else "there are"
    return UsageError(f"there is no {what} {name!r}; {meant} {', '.join(known)}.")


def nearest(name: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """The `n` names among `known` that look most like a mistyped `name`, whatever their case."""
    from difflib import get_close_matches

    by_lower = {each.lower(): each for each in known}
    close = get_close_matches(name.lower(), by_lower, n, cutoff)
    return [by_lower[each] for each in close]


class MissingPackageError(KscliError):
    """An optional package that is not installed, and the extra of kscli that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package}, which is not installed: "
            f"pip install 'kscli[{extra}]'."
        )


class ModelError(KscliError):
    """A model cannot be found, read, or measured."""


class CorpusError(KscliError):
    """A corpus cannot be found or read, or holds no usable text."""


class FactsError(KscliError):
    """A facts file cannot be read, or a fact cannot be located in its prompt."""


class ArtifactError(KscliError):
    """An HDF5 artifact is missing, foreign, damaged, or made from other inputs."""


class MissingError(ArtifactError):
    """An artifact that is not there: its path, and the kind that was wanted ("": any)."""

    def __init__(self, path: Path, kind: str = "") -> None:
        made_by = MADE_BY.get(kind)
        remedy = f"; `kscli {made_by} --model MODEL` makes such a file" if made_by else ""
        super().__init__(f"{path} does not exist{remedy}.")
        self.path = path
        self.kind = kind


MADE_BY = {
    "cov": "cache-cov",
    "keys": "extract",
    "pmatrix": "run",
    "stats": "stats",
    "edits": "edit",
}
"""The command that makes an artifact of each kind, and what it needs."""


class LockedError(ArtifactError):
    """An artifact that another program has open for writing."""


class NumericsError(KscliError):
    """A matrix or a key from which p cannot be computed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, is used up."""
    # Of torch only the caching allocators raise an error of a class of its own.
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
