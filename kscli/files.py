"""Files written beside their place and renamed into it, so that none is ever half written."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kscli.errors import ArtifactError, KscliError, UsageError

ROOM = 2**20


@contextmanager
def replace_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `path` that is flushed and renamed to it if the block succeeds.

    If it fails, neither the temporary file nor a folder made for it stays. What an earlier
    process left there when it was killed is removed.
    """
    require_writable(path, force=force)
    host = socket.gethostname()
    temporary = path.with_name(f".{path.stem}.{host}.{os.getpid()}.part{path.suffix}")
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path, host)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        made.clear()
    except OSError as error:
        raise _writing_failed(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def utf8_path(path: Path) -> Path:
    """The path of a folder, or another path of it where its own is not UTF-8.

    Libraries in Rust, such as safetensors, take no other paths. The folder stays open until the
    process ends.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Path(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}")
    return path


def require_room(path: Path) -> None:
    """Write some zeros to `path`, which is written anew afterwards; OSError where they do not fit.

    HDF5 crashes, rather than fail, where not even the beginning of a file fits.
    """
    with path.open("wb") as file:
        for _ in range(16):
            file.write(bytes(ROOM // 16))


def require_writable(path: Path, *, force: bool) -> None:
    """Raise ArtifactError unless a file may be written at `path`. Makes nothing."""
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} is {kind_of_file(path)}; name a file with --output.")
        if path.exists() and not force:
            raise ArtifactError(f"{path} exists; add --force to replace it.")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _writing_failed(path, error) from error


def kind_of_file(path: Path) -> str:
    """What lies at `path`, for messages; raises OSError where nothing does."""
    mode = path.stat().st_mode
    kinds = {
        "an ordinary file": stat.S_ISREG,
        "a folder": stat.S_ISDIR,
        "a FIFO (a named pipe)": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "a device")


def require_ordinary(path: Path, error: type[KscliError]) -> None:
    """Raise `error`, saying what it is, where something else than a file lies at `path`."""
    if path.exists() and not path.is_file():
        raise error(f"{path} is {kind_of_file(path)}, which is not read; name a file.")


def require_other(path: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UsageError where a file to be written is one of those that are read for it."""
    for each in inputs:
        with suppress(OSError, ValueError):
            if path.samefile(each):
                raise UsageError(
                    f"{path} is read by this command and is not overwritten by it; name another "
                    "file with --output."
                )


def _remove_abandoned(path: Path, host: str) -> None:
    """Remove temporary files for `path` of this host's processes that are gone."""
    name = re.compile(
        re.escape(f".{path.stem}.{host}.") + r"(\d+)" + re.escape(f".part{path.suffix}")
    )
    for other in path.parent.iterdir():
        match = name.fullmatch(other.name)
        if match and not _is_running(int(match[1])):
            other.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _writing_failed(path: Path, error: OSError) -> ArtifactError:
    # HDF5 gives the number of the system's error only in the middle of its own text.
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found[1]) if found else error.errno
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would be larger than the limit on a file's size",
        errno.EACCES: "its folder cannot be written",
        errno.EPERM: "its folder cannot be written",
        errno.EROFS: "its folder cannot be written",
    }
    reason = reasons.get(number or 0) or (
        os.strerror(number) if number else str(error).splitlines()[0]
    )
    return ArtifactError(f"{path} was not written: {reason}; nothing was changed.")
