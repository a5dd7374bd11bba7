"""What a run of cache-cov leaves on disk so that, killed, it can go on.

A checkpoint is a sealed file of the float64 sums, lower triangle only, of the layers of one
pass, of the place in the stream that they were summed to, and of the plan of batches. It is
written beside its place and renamed, at most two are kept, and a pass that is finished leaves
its sums until the run is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import Recipe, SealedFile, SealedWriter, open_for_writing
from kscli.errors import ArtifactError
from kscli.files import replace_file
from kscli.second_moment.token_stream import Cursor

FORMAT = 1
EVERY_SECONDS = 300.0
WRITES_APART = 20
ARRAYS = "arrays/"

# What reading a file that is no checkpoint, or was changed, raises.
_UNREADABLE = (ArtifactError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Position:
    """How far a pass over the corpus has come.

    `batches` of the window that begins at `window`, and whose documents have the hash `digest`,
    were summed; `tokens` and `padded` (padding included) count all batches of the pass, `documents`
    those that had a token. `halved` says that a batch did not fit in memory, and `whole` that the
    corpus has no more.
    """

    window: Cursor = field(default_factory=Cursor)
    batches: int = 0
    digest: str = ""
    tokens: int = 0
    padded: int = 0
    documents: int = 0
    halved: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: the sums of `layers` in pass `number` of the plan at `position`.

    `plan` is what decides the batches; `arrays` are the settling estimate's.
    """

    number: int
    layers: tuple[int, ...]
    plan: dict[str, Any]
    position: Position
    arrays: dict[str, NDArray[Any]]
    path: Path = field(default_factory=Path)

    def sums(self, layer: int) -> NDArray[np.float64]:
        """The packed lower triangle of one layer, read from the file."""
        with SealedFile(self.path) as file:
            return file.read(f"sums/{layer}")


class Checkpoints:
    """The checkpoints of one run, in a folder of their own beside the file that it makes.

    `recipe` is everything that decides the sums; a checkpoint of another recipe is refused. One
    is due `every` so many seconds, or 20 times as long as the last took to write.
    """

    def __init__(self, folder: Path, recipe: Recipe, every: float = EVERY_SECONDS) -> None:
        self.folder = folder
        self._recipe: Recipe = json.loads(json.dumps({"format": FORMAT, **recipe}))
        self._every = every
        self._due = time.monotonic() + every

    def due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() >= self._due

    def require_own(self) -> None:
        """Raise ArtifactError if the folder holds checkpoints of another run."""
        for path in self._paths("*.h5"):
            found = _recipe_of(path)
            changed = sorted(
                name
                for name in found.keys() | self._recipe.keys()
                if found.get(name) != self._recipe.get(name)
            )
            if changed and found:
                raise ArtifactError(
                    f"{self.folder} holds the checkpoint of another run ({', '.join(changed)} "
                    "differ); finish that run with its own options, or discard it with --force."
                )

    def discard_others(self) -> None:
        """Remove the folder if it holds checkpoints of another run."""
        try:
            self.require_own()
        except ArtifactError:
            self.remove()

    def discard_own(self) -> None:
        """Remove the folder unless it holds checkpoints of another run."""
        with suppress(ArtifactError):
            self.require_own()
            self.remove()

    def exist(self) -> bool:
        """Whether there is any checkpoint, readable or not."""
        return bool(self._paths("*.h5"))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, with those of the passes before it."""
        for path in [*self._paths("state-*.h5")[::-1], *self._paths("pass-*.h5")[::-1]]:
            with suppress(*_UNREADABLE):
                found = _read(path)
                for number in range(found.number):
                    _read(self._pass_path(number))
                return found
        return None

    def finished_pass(self, number: int) -> Checkpoint:
        """The sums of a pass that is finished."""
        try:
            return _read(self._pass_path(number))
        except _UNREADABLE as error:
            raise ArtifactError(
                f"{self._pass_path(number)} is missing or damaged; start anew with --force."
            ) from error

    def save(self, checkpoint: Checkpoint, sums: Callable[[int], NDArray[np.float64]]) -> None:
        """Write a checkpoint, `sums(layer)` being its packed sums; the newest two stay.

        Raises ArtifactError when it cannot be written; the last one is still there then.
        """
        began = time.monotonic()
        before = self._paths("state-*.h5")
        for path in before[:-1]:
            path.unlink(missing_ok=True)
        serial = int(before[-1].stem.rpartition("-")[2]) + 1 if before else 0
        try:
            self._write(self.folder / f"state-{serial:06d}.h5", checkpoint, sums)
        finally:
            took = time.monotonic() - began
            self._due = time.monotonic() + max(self._every, WRITES_APART * took)

    def finish_pass(
        self, checkpoint: Checkpoint, sums: Callable[[int], NDArray[np.float64]]
    ) -> None:
        """Keep the sums of a pass until the whole run is done; raises as `save` does."""
        self._write(self._pass_path(checkpoint.number), checkpoint, sums)
        for path in self._paths("state-*.h5"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pass_path(self, number: int) -> Path:
        return self.folder / f"pass-{number:03d}.h5"

    def _paths(self, pattern: str) -> list[Path]:
        # A hidden one is being written, or was when its process was killed.
        return sorted(path for path in self.folder.glob(pattern) if path.name[0] != ".")

    def _write(
        self, path: Path, checkpoint: Checkpoint, sums: Callable[[int], NDArray[np.float64]]
    ) -> None:
        with replace_file(path, force=True) as temporary:
            sums_of = ((layer, sums(layer)) for layer in checkpoint.layers)
            with open_for_writing(temporary) as file:
                _fill(file, checkpoint, self._recipe, sums_of)


def _fill(
    file: SealedWriter,
    checkpoint: Checkpoint,
    recipe: Recipe,
    sums: Iterable[tuple[int, NDArray[np.float64]]],
) -> None:
    file.attributes |= {
        "recipe": json.dumps(recipe, sort_keys=True),
        "plan": json.dumps(checkpoint.plan, sort_keys=True),
        "position": json.dumps(asdict(checkpoint.position), sort_keys=True),
        "number": checkpoint.number,
    }
    file.write("layers", np.asarray(checkpoint.layers, dtype=np.int64))
    for name, array in checkpoint.arrays.items():
        file.write(f"{ARRAYS}{name}", array)
    for layer, packed in sums:
        file.write(f"sums/{layer}", packed)


def _read(path: Path) -> Checkpoint:
    """A checkpoint without its sums, of which it is seen that all are there and are whole."""
    with SealedFile(path) as file:
        layers = tuple(file.read("layers").tolist())
        for layer in layers:
            file.check(f"sums/{layer}")
        position = json.loads(file.attributes["position"])
        return Checkpoint(
            number=int(file.attributes["number"]),
            layers=layers,
            plan=json.loads(file.attributes["plan"]),
            position=Position(**position | {"window": Cursor(**position["window"])}),
            arrays={
                name.removeprefix(ARRAYS): file.read(name)
                for name in file.arrays
                if name.startswith(ARRAYS)
            },
            path=path,
        )


def _recipe_of(path: Path) -> Recipe:
    """The recipe of a checkpoint; empty where the file cannot be read."""
    try:
        with SealedFile(path) as file:
            return dict(json.loads(file.attributes["recipe"]))
    except _UNREADABLE:
        return {}
