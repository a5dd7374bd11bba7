"""Corpora of local files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kscli.corpus.documents import CorpusSpec, documents, field_part
from kscli.corpus.hub import ALIASES
from kscli.corpus.readers import READERS, unreadable
from kscli.errors import CorpusError


@dataclass(frozen=True)
class FilesCorpus:
    """The documents of one or more local files, file by file."""

    name: str
    identity: str
    text_field: str
    files: tuple[Path, ...]

    def documents(self) -> Iterator[str]:
        """Stream them; see `Corpus.documents`."""
        records = (
            record for path in self.files for record in READERS[_kind(path)](path, self.text_field)
        )
        return documents(records, self.text_field, self.name)


def open_files(spec: CorpusSpec) -> FilesCorpus:
    """The corpus of a file or folder; raises CorpusError where it is of no known kind."""
    path = Path(spec.name)
    if not spec.name or not _exists(path):
        raise CorpusError(_not_found(spec.name))
    if path.is_dir():
        root, files = path, _files_under(path)
    else:
        root, files = path.parent, (path,)
        if not (path.is_file() and _kind(path)):
            raise CorpusError(f"{path} is of no known kind; {_known_kinds()}")
    if not files:
        raise CorpusError(f"The folder {path} holds no corpus file; {_known_kinds()}")
    return FilesCorpus(spec.name, _files_identity(root, files, spec.field), spec.field, files)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise unreadable(path, error) from error


def _not_found(name: str) -> str:
    aliases = ", ".join([*ALIASES, "tiny"])
    hub = f"hf:{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "hf:OWNER/NAME"
    return (
        f"There is no corpus file or folder '{name}'; "
        f"give an existing one, {hub} for a data set on the Hub, or one of {aliases}."
    )


def _known_kinds() -> str:
    *compressible, last = READERS
    return (
        f"known are {', '.join(compressible)} (also with .gz or .zst) and {last}. "
        "Other text can be sent to standard input, which is the corpus `-`."
    )


def _kind(path: Path) -> str:
    """The key of `READERS` for a file, or nothing."""
    compressed = path.suffix.lower() in (".gz", ".zst")
    kind = Path(path.stem).suffix.lower() if compressed else path.suffix.lower()
    known = kind in READERS and not (compressed and kind == ".parquet")
    return kind if known else ""


def _files_under(root: Path) -> tuple[Path, ...]:
    """All files of known kinds, by relative path; hidden ones and linked folders are skipped."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in found if _kind(path)]
    return tuple(sorted(files, key=lambda path: path.relative_to(root).as_posix()))


def _files_identity(root: Path, files: Iterable[Path], text_field: str) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            size, content = path.stat().st_size, _content_hash(path)
        except OSError as error:
            raise unreadable(path, error) from error
        digest.update(json.dumps([path.relative_to(root).as_posix(), size, content]).encode())
    return f"files:sha256:{digest.hexdigest()}{field_part(text_field)}"


def _content_hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
