"""Artifacts written as their schema says.

Every file is written beside its place and renamed into it. Its `fingerprint` is a hash of what
it holds and of its `recipe`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kscli import __version__
from kscli.artifacts.schema import (
    About,
    Dataset,
    Kind,
    Stamp,
    check_datasets,
    datasets_of,
    to_attributes,
)
from kscli.artifacts.sealed import FORMAT_VERSION
from kscli.artifacts.sealing import SealedWriter, open_for_writing
from kscli.fact_forms import QUESTION_FIELDS
from kscli.facts import Fact
from kscli.files import replace_file
from kscli.secrets import command_line


class LocatedFacts(Protocol):
    """Facts, (m,), and where their keys were read; a file of facts, or what becomes one."""

    @property
    def facts(self) -> Sequence[Fact]:
        """The facts."""

    @property
    def token_id(self) -> NDArray[np.int64]:
        """The ids of the tokens at which the keys were read."""

    @property
    def position(self) -> NDArray[np.int64]:
        """The indexes of these tokens in the prompts' tokens."""


class ArtifactWriter:
    """Fills one file with the datasets that its kind declares."""

    def __init__(self, file: SealedWriter, declared: Mapping[str, Dataset]) -> None:
        self._file = file
        self._declared = declared
        self._layers = 0

    def layers(self, layers: Sequence[int]) -> None:
        """Write the `layer` dimension scale, which comes before any array over layers."""
        self._file.write("layer", np.asarray(layers, dtype=np.int64))
        self._file.make_scale("layer")
        self._layers = len(layers)

    def facts(self, of: LocatedFacts) -> None:
        """Write facts, one dataset a field, their questions, and where their keys were read."""
        for name in self._declared:
            if name.startswith("facts/"):
                column = name.removeprefix("facts/")
                self.write(name, [getattr(fact, column) for fact in of.facts])
        for kind in QUESTION_FIELDS:
            if f"{kind}/fact" in self._declared:
                self._questions(kind, of.facts)
        self.write("token_id", of.token_id)
        self.write("position", of.position)

    def _questions(self, kind: str, facts: Sequence[Fact]) -> None:
        """Write the questions of a kind as a table over all facts, if there are any."""
        rows = [
            (index, question.prompt, question.target)
            for index, fact in enumerate(facts)
            for question in fact.questions
            if question.kind == kind
        ]
        if rows:
            for name, column in zip(
                ("fact", "prompt", "target"), zip(*rows, strict=True), strict=True
            ):
                self.write(f"{kind}/{name}", column)

    def write(self, name: str, values: ArrayLike) -> None:
        """Write a whole dataset."""
        wanted = self._declared[name]
        dtype = object if wanted.dtype == "text" else wanted.dtype
        array = np.asarray(values, dtype=dtype)
        of_layers = array.ndim > 1 and wanted.axes[0] == "layer"
        self._file.write(name, array, self._layers if of_layers else 1)
        self._attach(name)

    def put(self, name: str, index: int, values: ArrayLike) -> None:
        """Fill the `index`-th layer of an array over layers, which is made by the first of them."""
        array = np.ascontiguousarray(values, self._declared[name].dtype).reshape(np.shape(values))
        first = name not in self._file
        self._file.put(name, index, array, self._layers)
        if first:
            self._attach(name)

    def _attach(self, name: str) -> None:
        axes = self._declared[name].axes
        self._file.attach(name, axes, [self._scale(axis) for axis in axes])

    def _scale(self, axis: str) -> str:
        """Where an axis has its dimension scale: in the one group whose datasets have it, if any.

        The axis `kept_out` and the group of that name would both be at the root.
        """
        groups = {
            name.rpartition("/")[0]
            for name, dataset in self._declared.items()
            if axis in dataset.axes
        }
        (group,) = groups if len(groups) == 1 else {""}
        return f"{group}/{axis}".removeprefix("/")


def _fingerprint(
    kind: Kind, about: About, file: SealedWriter, declared: Mapping[str, Dataset]
) -> str:
    """A hash of the recipe and of the results, by the digests of their blocks."""
    held = {
        name: (array.type, array.shape, array.blocks)
        for name, array in file.arrays.items()
        if declared[name].result
    }
    text = json.dumps([kind, about.recipe, held], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def write_artifact(
    path: Path, kind: Kind, about: About, *, force: bool = False, made: Stamp | None = None
) -> Iterator[ArtifactWriter]:
    """Open a writer for the artifact at `path`; nothing appears there unless all goes well.

    `made` is the stamp of another file, of which this one is a part: who measured it, and when.

    Raises ArtifactError when the file exists and `force` is not set, when its folder cannot
    be written, and when the disk is full; SchemaError when not all was written that its kind has.
    """
    with replace_file(path, force=force) as temporary, open_for_writing(temporary) as file:
        declared = datasets_of(kind, about)
        yield ArtifactWriter(file, declared)
        check_datasets(file.arrays, declared, about)
        stamp = Stamp(
            format_version=FORMAT_VERSION,
            kscli_version=made.kscli_version if made else __version__,
            kind=kind,
            fingerprint=_fingerprint(kind, about, file, declared),
            command=made.command if made else command_line(),
            created=made.created if made else datetime.now(UTC).isoformat(timespec="seconds"),
        )
        file.attributes |= to_attributes(stamp) | to_attributes(about)
