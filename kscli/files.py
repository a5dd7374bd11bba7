"""Files written beside their place and renamed into it, so that none is ever half written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kscli.errors import ArtifactError


@contextmanager
def replace_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `path` that is flushed and renamed to it if the block succeeds."""
    require_writable(path, force=force)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _writing_failed(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: Path, *, force: bool) -> None:
    """Raise ArtifactError unless a file may be written at `path`. Makes nothing."""
    try:
        if path.is_dir():
            raise ArtifactError(f"{path} is a folder; name a file with --output.")
        if path.exists() and not force:
            raise ArtifactError(f"{path} exists; add --force to replace it.")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _writing_failed(path, error) from error


def _writing_failed(path: Path, error: OSError) -> ArtifactError:
    text = str(error)
    if error.errno == errno.ENOSPC or "No space left" in text:
        reason = "the disk is full"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "its folder cannot be written"
    else:
        reason = error.strerror or text.splitlines()[0]
    return ArtifactError(f"{path} was not written: {reason}; nothing was changed.")
