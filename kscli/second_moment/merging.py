"""merge-cov: the second moments of a corpus from those of its shards.

C is the mean of k k^T over all tokens, so that of parts with n_p tokens each it is
sum_p n_p C_p / sum_p n_p. It is summed in float64, a block of rows at a time: one layer in
float32 is the most that is in memory, and entries (i, j) and (j, i) come from equal sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import (
    EXPECTED_EQUAL,
    IDENTITY,
    ArtifactWriter,
    CovarianceAbout,
    CovarianceFile,
    write_artifact,
)
from kscli.artifacts.schema import SchemaError
from kscli.artifacts.values import VALUES, wrong_values
from kscli.errors import ArtifactError, UsageError
from kscli.files import require_other, require_writable
from kscli.layers import format_layers
from kscli.reporter import SILENT, Reporter
from kscli.second_moment.options import Shard, parse_shard

BLOCK_BYTES = 2**24
# Beside identity, these must agree; what the recipe says of layers and length is compared as
# what it came to, and batches are how and not what.
DETAILS = ("corpus_identity", "max_length")
RECIPE_APART = ("shard", "layers", "max_length", "batch_tokens")


@dataclass(frozen=True)
class MergeResult:
    """What was merged into the file at `path`: `tokens` in `documents`, from `parts`."""

    path: Path
    parts: tuple[Path, ...]
    layers: tuple[int, ...]
    tokens: int
    documents: int


def find_parts(folder: Path) -> list[Path]:
    """The shards' files in a model's folder, by the names that `cache-cov --shard` gives them.

    Raises ArtifactError when there is none, or they are of several partitions.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("cov.shard-*-of-*.h5"):
        match = re.fullmatch(r"cov\.shard-(\d+)-of-(\d+)\.h5", path.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise ArtifactError(
            f"{folder} holds no shards (cov.shard-I-of-N.h5); cache-cov --shard I/N makes them."
        )
    if len(found) > 1:
        counts = " and ".join(str(count) for count in sorted(found))
        raise ArtifactError(
            f"{folder} holds shards of partitions into {counts}; name the files of one."
        )
    (parts,) = found.values()
    return [parts[index] for index in sorted(parts)]


def model_of(part: Path) -> str:
    """The name of the model that a part is about, which is its folder's among the artifacts."""
    with CovarianceFile(part) as cov:
        return cov.model


def merge_covariances(
    parts: Sequence[Path], path: Path, *, force: bool = False, reporter: Reporter = SILENT
) -> MergeResult:
    """Write to `path` the second moments over the documents of all `parts`, in any order.

    The parts are all the shards of one partition, made by `cache-cov --shard`; the result has
    the recipe of a run that was never divided. Raises ArtifactError, naming file and value,
    when a part is no shard, is there twice or is missing, or differs from another in anything
    but its documents, or holds what is no second moment.
    """
    require_other(path, parts)
    require_writable(path, force=force)
    with ExitStack() as stack:
        opened = [stack.enter_context(_Part(part)) for part in parts]
        ordered = _complete(opened)
        first = ordered[0]
        for other in ordered[1:]:
            _require_alike(first, other)
        tokens = sum(part.count for part in ordered)
        documents = sum(part.about.documents or 0 for part in ordered)
        about = _about(ordered, tokens, documents)
        with (
            write_artifact(path, "cov", about, force=force) as writer,
            reporter.task("merging", len(first.layers), unit="layers") as task,
        ):
            writer.layers(first.layers)
            writer.write("count", tokens)
            for index, layer in enumerate(first.layers):
                _merge_layer(ordered, layer, tokens, writer, index)
                task.advance()
        paths = tuple(part.path for part in ordered)
        return MergeResult(path, paths, first.layers, tokens, documents)


class _Part(CovarianceFile):
    """cov.h5 of one shard."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.shard = self._shard()
        except ArtifactError:
            self.__exit__()
            raise

    def _shard(self) -> Shard:
        if self.about.imported:
            raise ArtifactError(f"{self.path} was imported, and is no shard of a corpus.")
        made = self.about.recipe.get("shard")
        if made is None:
            raise ArtifactError(f"{self.path} is no shard: it was made without --shard.")
        with self._reading():
            for name in ("documents", *DETAILS):
                if getattr(self.about, name) is None:
                    raise SchemaError(f"its attribute {name} is unknown, and it is of a shard")
            try:
                return parse_shard(str(made))
            except UsageError as error:
                raise SchemaError(f"its recipe names the shard {made!r}") from error


def _merge_layer(
    parts: Sequence[_Part], layer: int, tokens: int, writer: ArtifactWriter, index: int
) -> None:
    """Write what the merged file holds of a layer, its `index`-th."""
    n_experts = parts[0].about.n_experts
    for name, count, width in parts[0].second_moments():
        C = np.empty((count, width, width), dtype=np.float32)
        for number, matrix in enumerate(C):
            _merge_matrix(parts, layer, tokens, matrix, name, number * width)
        writer.put(name, index, C if n_experts and name == "second_moment" else C[0])
        del C
    if n_experts:
        writer.put("routed", index, np.sum([part.routed(layer) for part in parts], axis=0))


def _merge_matrix(
    parts: Sequence[_Part],
    layer: int,
    tokens: int,
    out: NDArray[np.float32],
    name: str,
    first: int,
) -> None:
    """Merge the matrix that begins at row `first` of a layer's dataset."""
    width = len(out)
    step = max(1, BLOCK_BYTES // (8 * width))
    for start in range(0, width, step):
        total = np.zeros((min(step, width - start), width))
        rows = np.empty_like(total)
        for part in parts:
            part.read_rows(layer, first + start, rows, name)
            if not (np.isfinite(rows).all() and (np.diagonal(rows, start) >= 0).all()):
                _refuse(parts, layer, name)
            rows *= part.count
            total += rows
        total /= tokens
        out[start : start + step] = total
    # A sum of symmetric matrices is symmetric.
    if wrong_values(VALUES["cov"][name], out, {}):
        _refuse(parts, layer, name)


def _refuse(parts: Sequence[_Part], layer: int, name: str) -> None:
    """Read the whole layer of every part: ArtifactError says which makes no sense, and where."""
    for part in parts:
        if name == "shared_second_moment":
            part.shared_second_moment(layer)
        elif part.about.n_experts:
            for expert in range(part.about.n_experts):
                part.second_moment_of(layer, expert)
        else:
            part.second_moment(layer)


def _complete(parts: Sequence[_Part]) -> list[_Part]:
    """The parts by their index; ArtifactError unless each shard of one partition is there."""
    first = parts[0]
    by_index: dict[int, _Part] = {}
    for part in parts:
        if part.shard.count != first.shard.count:
            raise ArtifactError(
                f"{first.path} is shard {first.shard} and {part.path} is shard {part.shard}: "
                "they are of different partitions of the corpus."
            )
        other = by_index.setdefault(part.shard.index, part)
        if other is not part:
            raise ArtifactError(
                f"{other.path} and {part.path} are both shard {part.shard}; its documents would "
                "be counted twice."
            )
    missing = [Shard(i, first.shard.count) for i in range(first.shard.count) if i not in by_index]
    if missing:
        names = ", ".join(map(str, missing))
        which = f"shard {names} is" if len(missing) == 1 else f"shards {names} are"
        raise ArtifactError(f"{which} missing; run `{_command(first, missing[0])}`.")
    return [by_index[index] for index in sorted(by_index)]


def _command(part: _Part, shard: Shard) -> str:
    """The command that made a part, for another shard."""
    command, found = re.subn(r"(--shard[ =])\S+", rf"\g<1>{shard}", part.stamp.command)
    return command if found else f"kscli cache-cov -m {part.model} --shard {shard}"


def _require_alike(first: _Part, other: _Part) -> None:
    """Raise ArtifactError when two parts differ in anything but documents, machine and batches."""
    mine, theirs = _compared(first), _compared(other)
    for name in mine | theirs:
        if mine.get(name) != theirs.get(name):
            raise ArtifactError(
                f"{first.path} and {other.path} differ in {name} ({_shown(mine.get(name))} and "
                f"{_shown(theirs.get(name))}); make both with the same options."
            )


def _compared(part: _Part) -> dict[str, Any]:
    about = part.about
    attributes = {name: getattr(about, name) for name in (*IDENTITY, *EXPECTED_EQUAL, *DETAILS)}
    recipe = {name: value for name, value in about.recipe.items() if name not in RECIPE_APART}
    return recipe | attributes | {"layers": format_layers(part.layers)}


def _shown(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _about(parts: Sequence[_Part], tokens: int, documents: int) -> CovarianceAbout:
    first = parts[0].about
    padded = [part.count / (1 - (part.about.padding or 0)) for part in parts]
    return replace(
        first,
        device=_of_all(parts, "device"),
        documents=documents,
        whole_corpus=all(part.about.whole_corpus for part in parts),
        padding=1 - tokens / sum(padded),
        batch_tokens=_of_all(parts, "batch_tokens"),
        batches_halved=any(part.about.batches_halved for part in parts),
        inputs={f"shard {part.shard}": part.fingerprint for part in parts},
        recipe={name: value for name, value in first.recipe.items() if name != "shard"},
    )


def _of_all(parts: Sequence[_Part], name: str) -> Any:
    """The parts' value of an attribute, or their values as a list where they differ."""
    values = list(dict.fromkeys(getattr(part.about, name) for part in parts))
    return values[0] if len(values) == 1 else ", ".join(map(str, values))
