"""Which files are the documents of a corpus: one file, a pattern's files, or a folder's.

A folder is read as people have it: with the README and the licence, with the files by which
`datasets` describes its tables, with links. What is left out is counted, by reason.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from kscli.errors import CorpusError
from kscli.files import require_ordinary
from kscli.records import format_inside, format_of, known_formats, lone_object, look_up, unreadable

NAMED = 3  # files of a reason that are named
# Texts that stand beside data and are about it.
_ABOUT = re.compile(
    r"(read_?me|licen[cs]e|copying|copyright|notice|changelog|requirements)([._-].*)?\.txt(\..*)?",
    re.IGNORECASE,
)
_SPLITS = re.compile(r"(train|test|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusFiles:
    """Files with the key of `FORMATS` of each, in their order; paths are named from `root`.

    `notes` say what was left out.
    """

    root: Path
    kinds: Mapping[Path, str]
    notes: tuple[str, ...] = ()


def find_files(name: str, field: str) -> CorpusFiles | None:
    """The files that `name` stands for: a path, or a pattern with * and ?; None for nothing.

    Raises CorpusError where what is there is no corpus, or cannot be read. `field` is that of the
    text.
    """
    path = Path(name)
    if not name or "\0" in name:
        return None
    try:
        exists = path.exists()
    except OSError as error:
        raise unreadable(path, error, CorpusError) from error
    if path.is_dir():
        return _of_folder(path, _walk(path), field)
    if exists:
        return _of_file(path)
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    if fixed == path:
        return None
    matching = [
        each
        for each in fixed.glob(str(path.relative_to(fixed)))
        if each.is_file() and not any(map(_is_hidden, each.relative_to(fixed).parts))
    ]
    return _of_folder(fixed, matching, field) if matching else None


def _of_file(path: Path) -> CorpusFiles:
    require_ordinary(path, CorpusError)
    kind = format_of(path) or format_inside(path, CorpusError)
    if not kind:
        raise CorpusError(
            f"{path} is of no known kind; known are {known_formats()}, and under any name one JSON "
            "object a line, and WikiExtractor's documents. Other text can be sent to standard "
            "input, which is the corpus `-`."
        )
    return CorpusFiles(path.parent, {path: kind})


def _of_folder(root: Path, found: Iterable[Path], field: str) -> CorpusFiles:
    order = sorted(found, key=lambda path: path.relative_to(root).as_posix())
    kinds = {path: format_of(path) or _inside(path) for path in order}
    for path in order:
        if kinds[path]:
            require_ordinary(path, CorpusError)
    left: dict[str, list[Path]] = {}

    def leave(reason: str, which: Sequence[Path], *, keep_one: bool = False) -> None:
        """Take files out, for a reason; with `keep_one` only if others stay."""
        if which and not (keep_one and len(which) == len(kinds)):
            left[reason] = list(which)
            for path in which:
                del kinds[path]

    leave("of no known kind", [path for path, kind in kinds.items() if not kind])
    leave("about the data, by name", [path for path in kinds if _ABOUT.fullmatch(path.name)])
    leave("read under another name", _twice(kinds))
    leave("of Arrow that `datasets` made on the way", _not_of_state(kinds))
    described = [path for path in kinds if _describes(path, field)]
    leave(f"of one JSON object without the field '{field}'", described, keep_one=True)
    if not kinds:
        raise CorpusError(
            f"{root} holds no corpus file{_listed(left, root, ': ')}; known are {known_formats()}."
        )
    notes = [f"{root}: left out: {_listed(left, root)}."] if left else []
    return CorpusFiles(root, kinds, (*notes, *_on_splits(kinds, root)))


def _walk(root: Path) -> list[Path]:
    """All files under a folder; hidden ones are skipped, links to folders are followed once."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error, CorpusError) from error

    seen = {os.path.realpath(root)}

    def is_new(folder: Path) -> bool:
        real = os.path.realpath(folder)
        new = real not in seen
        seen.add(real)
        return new

    found = []
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder)
        shown = sorted(name for name in subfolders if not _is_hidden(name))
        # Of a folder and links to it, itself is read.
        shown.sort(key=lambda name: (here / name).is_symlink())
        subfolders[:] = [name for name in shown if is_new(here / name)]
        found += [here / name for name in names if not _is_hidden(name)]
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _inside(path: Path) -> str:
    """The format of a file whose name does not tell it; a link to nothing is refused."""
    try:
        if not path.stat() or not path.is_file():
            return ""
    except OSError as error:
        raise unreadable(path, error, CorpusError) from error
    return format_inside(path, CorpusError)


def _twice(paths: Iterable[Path]) -> list[Path]:
    """Links to files that are among the paths already; of the same file, itself is kept."""
    seen: set[str] = set()
    again = []
    for path in sorted(paths, key=Path.is_symlink):
        real = os.path.realpath(path)
        if real in seen:
            again.append(path)
        seen.add(real)
    return again


def _not_of_state(paths: Iterable[Path]) -> list[Path]:
    """The .arrow files that are results of `map` and `filter`, or that a `state.json` leaves out.

    `save_to_disk` names in it the files of a data set, which may lie among older ones.
    """
    tables = [path for path in paths if format_of(path) == ".arrow"]
    named = {folder: _named_by_state(folder) for folder in {path.parent for path in tables}}
    others = []
    for path in tables:
        names = named[path.parent]
        if path.name.startswith("cache-") if names is None else path.name not in names:
            others.append(path)
    return others


def _named_by_state(folder: Path) -> list[str] | None:
    """The files that a `state.json` names; None where there is none of `datasets`."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        files = json.loads(state.read_bytes())["_data_files"]
        names = [str(file["filename"]) for file in files]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CorpusError(
            f"{state} names {missing[0]}, which is not there ({len(missing)} of {len(names)} are "
            "missing); copy the whole folder again."
        )
    return names


def _describes(path: Path, field: str) -> bool:
    """Whether a file holds one JSON object that is no document, such as `dataset_infos.json`."""
    try:
        record = lone_object(path, CorpusError)
        return record is not None and isinstance(look_up(record, field), Mapping)
    except KeyError:
        return True
    except CorpusError:
        return False  # reading it will say what is wrong


def _listed(left: Mapping[str, Sequence[Path]], root: Path, before: str = "") -> str:
    """How many files are left out for each reason, and the names of some."""
    texts = []
    for reason, paths in left.items():
        names = [path.relative_to(root).as_posix() for path in paths[:NAMED]]
        more = ["..."] if len(paths) > NAMED else []
        files = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
        texts.append(f"{files} {reason} ({', '.join(names + more)})")
    return before + "; ".join(texts) if texts else ""


def _on_splits(paths: Iterable[Path], root: Path) -> list[str]:
    """That several splits of a data set are read, by the names of their files or folders."""
    found = set()
    for path in paths:
        parts = path.relative_to(root).parts
        found |= {match[1].lower() for part in parts if (match := _SPLITS.match(part))}
    if len(found) < 2:
        return []
    return [
        f"{root}: the splits {', '.join(sorted(found))} are all read; name a folder, a file or a "
        "quoted pattern such as 'train*' to read one of them."
    ]
