"""The HDF5 files that carry results from one stage to the next.

Every file is written beside its place and renamed into it, and says in its attributes
what it holds, which model and inputs it was made from, and how. A file's `fingerprint` is
a hash of what it holds and of who it is about; its `recipe` is everything that decides
what it holds, so that a file whose recipe is today's need not be made again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kscli import __version__
from kscli.errors import ArtifactError, FactsError, KscliError, UsageError
from kscli.facts import Fact
from kscli.files import replace_file, require_room
from kscli.layers import format_layers, select_layers

FORMAT_VERSION = 1
Kind = Literal["cov", "keys", "pmatrix", "stats", "edits"]
MatrixName = Literal["P", "whitened_cosine", "cosine", "Q"]
Recipe = dict[str, Any]

KIND_NAMES: dict[str, str] = {
    "cov": "second moments (cov.h5)",
    "keys": "keys of facts (keys.h5)",
    "pmatrix": "superposition matrices (pmatrix.h5)",
    "stats": "statistics of P (stats.h5)",
    "edits": "a run of edits (edits/METHOD-LAYERS-SEED.h5)",
}


@dataclass(frozen=True)
class Provenance:
    """Who and what a file is about, beside the arrays it holds.

    `weights`, `tokenizer`, `hook` and `d_m` are its identity: two files that are used
    together must agree in them. `details` is what only one kind of file has.
    """

    model: str
    model_id: str
    revision: str
    weights: str
    tokenizer: str
    hook: str
    d_m: int
    n_layers: int
    dtype: str
    device: str
    special_tokens: str
    details: dict[str, str | int | float | bool] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=dict)
    seed: int = 0


IDENTITY = ("weights", "tokenizer", "hook", "d_m")
EXPECTED_EQUAL = ("dtype", "special_tokens")
# What an imported file says of all that the files it was made from do not tell.
UNKNOWN = "unknown"

# What every file of a kind has, or it is refused. A dataset's type is NumPy's codes for those
# that it may have; axes of one name are of one length, and `d_m` is the attribute's.
TEXT, INTEGER, REAL, BOOLEAN = "OS", "iu", "f", "b"
Schema = dict[str, tuple[str, ...]]
MAY_BE_EMPTY = ("moved", "kept out")
_FACT_TEXTS = ("prompt", "subject", "target", "relation", "target_new")
_LAYERS: Schema = {"layer": (INTEGER, "layer")}
_FACTS: Schema = {
    "facts/prompt": (TEXT, "m"),
    "facts/subject": (TEXT, "m"),
    "facts/target": (TEXT, "m"),
    "facts/relation": (TEXT, "m"),
    "facts/case_id": (INTEGER, "m"),
    "token_id": (INTEGER, "m"),
    "position": (INTEGER, "m"),
}
_DATASETS: dict[str, Schema] = {
    "cov": {**_LAYERS, "count": (INTEGER,), "second_moment": (REAL, "layer", "d_m", "d_m")},
    "keys": {**_LAYERS, **_FACTS, "keys": (REAL, "layer", "m", "d_m")},
    "pmatrix": {
        **_LAYERS,
        **_FACTS,
        "P": (REAL, "layer", "m", "m"),
        "whitened_cosine": (REAL, "layer", "m", "m"),
        "cosine": (REAL, "layer", "m", "m"),
        "Q": (REAL, "layer", "m", "m"),
        "leverage": (REAL, "layer", "m"),
    },
    "stats": _LAYERS,
    "edits": {**_LAYERS, **_FACTS},
}
_INTEGER_ATTRIBUTES = ("d_m", "n_layers", "seed")
_JSON_ATTRIBUTES = ("inputs", "recipe")
_TEXT_ATTRIBUTES = (
    *("model", "model_id", "revision", "weights", "tokenizer", "hook", "dtype", "device"),
    *("special_tokens", "fingerprint", *_JSON_ATTRIBUTES),
)
_FACTS_DETAILS = ("facts_name", "facts_identity", "token")
_TEXT_DETAILS: dict[str, tuple[str, ...]] = {
    "cov": ("corpus",),
    "keys": _FACTS_DETAILS,
    "pmatrix": ("corpus", *_FACTS_DETAILS),
    "stats": ("corpus", *_FACTS_DETAILS),
    "edits": ("corpus", *_FACTS_DETAILS, "method", "protocol", "order", "value"),
}


class ArtifactWriter:
    """Writes one file; entered as a context, it becomes the file at `path` on leaving."""

    def __init__(self, file: h5py.File, digest: hashlib._Hash) -> None:
        self._file = file
        self._digest = digest

    def layers(self, layers: Sequence[int]) -> None:
        """Write the `layer` dimension scale."""
        scale = self._file.create_dataset("layer", data=np.asarray(layers, dtype=np.int64))
        scale.make_scale("layer")
        self._digest.update(np.asarray(layers, dtype=np.int64).tobytes())

    def over_layers(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Make an array over layers, first axis `layer`, to be filled with `put`."""
        layers = self._file["layer"]
        dataset = self._file.create_dataset(name, (len(layers), *shape), dtype)
        dataset.dims[0].attach_scale(layers)
        dataset.dims[0].label = "layer"

    def put(self, name: str, index: int, values: ArrayLike) -> None:
        """Fill the `index`-th layer of an array over layers."""
        dataset = self._file[name]
        array = np.ascontiguousarray(values, dtype=dataset.dtype)
        dataset[index] = array
        self._digest.update(f"{name}{index}".encode())
        self._digest.update(array.data)

    def array(self, name: str, values: ArrayLike) -> None:
        """Write an array that has no layer axis."""
        array = np.asarray(values)
        self._file.create_dataset(name, data=array)
        self._digest.update(name.encode() + array.tobytes())

    def texts(self, name: str, values: ArrayLike) -> None:
        """Write an array of text, as UTF-8 strings."""
        array = np.asarray(values, dtype=object)
        self._file.create_dataset(name, data=array, dtype=h5py.string_dtype())
        self._digest.update(name.encode() + json.dumps(array.tolist()).encode())

    def facts(self, facts: Sequence[Fact]) -> None:
        """Write facts, one dataset a field, as UTF-8 strings."""
        group = self._file.create_group("facts")
        for column in _FACT_TEXTS:
            values = [getattr(fact, column) for fact in facts]
            group.create_dataset(column, data=values, dtype=h5py.string_dtype())
            self._digest.update(json.dumps(values).encode())
        group.create_dataset("case_id", data=np.array([f.case_id for f in facts], dtype=np.int64))


@contextmanager
def write_artifact(
    path: Path, kind: Kind, provenance: Provenance, *, force: bool = False
) -> Iterator[ArtifactWriter]:
    """Open a writer for the artifact at `path`; nothing appears there unless all goes well.

    Raises ArtifactError when the file exists and `force` is not set, when its folder cannot
    be written, and when the disk is full.
    """
    with replace_file(path, force=force) as temporary:
        digest = hashlib.sha256(json.dumps([kind, provenance.recipe], sort_keys=True).encode())
        with open_for_writing(temporary) as file:
            yield ArtifactWriter(file, digest)
            _write_attributes(file, kind, provenance, digest.hexdigest()[:32])


@contextmanager
def open_for_writing(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file at `path`, flushed at the end; OSError where the disk is full."""
    require_room(path)
    file = h5py.File(path, "w", locking="best-effort")
    try:
        yield file
        file.flush()
    except BaseException:
        with suppress(Exception):
            file.close()
        raise
    file.close()


def _write_attributes(file: h5py.File, kind: Kind, provenance: Provenance, content: str) -> None:
    fields = asdict(provenance)
    details, inputs, recipe = fields.pop("details"), fields.pop("inputs"), fields.pop("recipe")
    attributes: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kscli_version": __version__,
        "kind": kind,
        **fields,
        **details,
        "inputs": json.dumps(inputs, sort_keys=True),
        "recipe": json.dumps(recipe, sort_keys=True),
        "fingerprint": content,
        "command": shlex.join(["kscli", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for name, value in attributes.items():
        file.attrs[name] = value


class Artifact:
    """An artifact opened for reading; a context manager.

    Raises ArtifactError when the file is missing, is no artifact of `kind` (None: of any
    kind), is truncated, lacks what its kind has, or was written by a later format.
    """

    def __init__(self, path: Path, kind: Kind | None = None) -> None:
        self.path = path
        self._file = _open_for_reading(path)
        try:
            with self._reading():
                self.attributes: dict[str, Any] = {
                    name: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
                    for name, value in self._file.attrs.items()
                }
                self._check_kind(kind)
                self._check_attributes()
                self._check_datasets()
                self.layers: tuple[int, ...] = tuple(self._file["layer"][()].tolist())
        except KscliError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def model(self) -> str:
        """The model's name for people: its alias or slug."""
        return str(self.attributes["model"])

    @property
    def kind(self) -> str:
        """Which kind of artifact this is: cov, keys, pmatrix or stats."""
        return str(self.attributes["kind"])

    @property
    def fingerprint(self) -> str:
        """The hash of what the file holds."""
        return str(self.attributes["fingerprint"])

    @property
    def recipe(self) -> Recipe:
        """Everything that decided what the file holds."""
        return dict(json.loads(self.attributes["recipe"]))

    def provenance(self, **changes: Any) -> Provenance:
        """This file's provenance, for a file derived from it."""
        names = set(Provenance.__dataclass_fields__) - {"details", "inputs", "recipe"}
        return Provenance(**{name: self.attributes[name] for name in names} | changes)

    def schema(self) -> Schema:
        """The datasets that the file must have, with their types and axes."""
        return _DATASETS[self.kind]

    def datasets(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every dataset, by name."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                kind = "string" if h5py.check_string_dtype(item.dtype) else str(item.dtype)
                found[name] = (tuple(item.shape), kind)

        with self._reading():
            self._file.visititems(visit)
        return found

    def require_layers(self, layers: Sequence[int]) -> None:
        """Raise ArtifactError naming the first of `layers` that the file lacks."""
        for layer in layers:
            if layer not in self.layers:
                raise ArtifactError(
                    f"{self.path} has no layer {layer}; it holds {format_layers(self.layers)}."
                )

    def _dataset(self, name: str) -> h5py.Dataset:
        return self._file[name]

    def _values(self, name: str) -> NDArray[Any]:
        with self._reading():
            return np.asarray(self._dataset(name)[()])

    def _of_layer(self, name: str, layer: int) -> NDArray[Any]:
        self.require_layers([layer])
        with self._reading():
            return np.asarray(self._dataset(name)[self.layers.index(layer)])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what a file that is not as it was written raises into one sentence."""
        try:
            yield
        except (OSError, RuntimeError, TypeError, ValueError, LookupError, FactsError) as error:
            raise ArtifactError(
                f"{self.path} is damaged or was not made by kscli; make it again."
            ) from error

    def _check_kind(self, kind: Kind | None) -> None:
        found = self.attributes.get("kind")
        if not isinstance(found, str) or found not in KIND_NAMES:
            raise ArtifactError(f"{self.path} is an HDF5 file, but not one of kscli's.")
        self._check_type("format_version", int)
        version = self.attributes["format_version"]
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"{self.path} has format {version}; this kscli reads up to {FORMAT_VERSION}. "
                "Upgrade kscli."
            )
        if kind is not None and found != kind:
            raise ArtifactError(f"{self.path} holds {KIND_NAMES[found]}, not {KIND_NAMES[kind]}.")

    def _check_type(self, name: str, wanted: type) -> None:
        if not isinstance(self.attributes[name], wanted):
            raise TypeError(f"the attribute {name} is {self.attributes[name]!r}")

    def _check_attributes(self) -> None:
        for name in _INTEGER_ATTRIBUTES:
            self._check_type(name, int)
        for name in _TEXT_ATTRIBUTES + _TEXT_DETAILS[self.kind]:
            self._check_type(name, str)
        for name in _JSON_ATTRIBUTES:
            if not isinstance(json.loads(self.attributes[name]), dict):
                raise ValueError(f"the attribute {name} is no JSON object")

    def _check_datasets(self) -> None:
        lengths = {"d_m": self.attributes["d_m"]}
        for name, (types, *axes) in self.schema().items():
            dataset = self._file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in types:
                raise TypeError(f"{name} is {dataset}")
            for axis, length in zip(axes, dataset.shape, strict=True):
                empty = length == 0 and axis not in MAY_BE_EMPTY
                if empty or lengths.setdefault(axis, length) != length:
                    raise ValueError(f"{name} is of shape {dataset.shape}")


class CovarianceFile(Artifact):
    """cov.h5: the second moment C of every layer's keys."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "cov")

    @property
    def count(self) -> int:
        """The number of tokens that C is a mean over."""
        return int(self._values("count"))

    def second_moment(self, layer: int) -> NDArray[np.float64]:
        """C of one layer as a new (d_m, d_m) float64 array, read without a float32 copy."""
        self.require_layers([layer])
        dataset = self._dataset("second_moment")
        out = np.empty(dataset.shape[1:])
        with self._reading():
            dataset.read_direct(out, np.s_[self.layers.index(layer)])
        return out


class FactsFile(Artifact):
    """What keys.h5, pmatrix.h5 and edits share: the facts and where their keys were read."""

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, in the order of the file's fact axes."""
        with self._reading():
            columns: dict[str, list[Any]] = {
                name: self._dataset(f"facts/{name}").asstr()[()].tolist()
                for name in _FACT_TEXTS
                if f"facts/{name}" in self._file
            }
            columns["case_id"] = self._values("facts/case_id").tolist()
            rows = zip(*columns.values(), strict=True)
            return tuple(Fact(**dict(zip(columns, row, strict=True))) for row in rows)

    @cached_property
    def token_id(self) -> NDArray[np.int64]:
        """The id of the token at which each key was read, (m,)."""
        return self._values("token_id")

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """The index of that token in the prompt's tokens, (m,)."""
        return self._values("position")


class KeysFile(FactsFile):
    """keys.h5: the key of every fact at every layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "keys")

    def keys_of(self, layer: int) -> NDArray[np.float64]:
        """The keys of one layer, (m, d_m), in float64."""
        return self._of_layer("keys", layer).astype(np.float64)


class PMatrixFile(FactsFile):
    """pmatrix.h5: P, the cosines and Q of every layer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "pmatrix")

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        """One layer's (m, m) matrix of that name."""
        return self._of_layer(name, layer)

    def leverage(self, layer: int) -> NDArray[np.float64]:
        """k^T C^-1 k of every fact, (m,)."""
        return self._of_layer("leverage", layer)


def require_same_identity(first: Artifact, second: Artifact) -> list[str]:
    """Raise ArtifactError unless both are about the same model; returns lesser differences.

    The lesser ones, dtype, special tokens, and what an imported file does not know of its
    weights and tokenizer, are sentences for a warning.
    """
    differences = []
    unchecked = []
    for name in IDENTITY + EXPECTED_EQUAL:
        a, b = first.attributes[name], second.attributes[name]
        if a == b != UNKNOWN:
            continue
        if UNKNOWN in (a, b) and name not in ("hook", "d_m"):
            unchecked.append(name)
        elif name in IDENTITY:
            raise ArtifactError(
                f"{first.path} and {second.path} differ in {name} ({a} and {b}): "
                "they are about different models. Make both from one."
            )
        else:
            differences.append(
                f"{first.path} and {second.path} differ in {name} "
                f"({a or 'none'} and {b or 'none'})."
            )
    if unchecked:
        differences.append(
            f"that {first.path} and {second.path} agree in {', '.join(unchecked)} could not be "
            "checked: an imported file does not say."
        )
    return differences


def difference(path: Path, kind: Kind, recipe: Mapping[str, Any]) -> str | None:
    """None if the artifact at `path` was made by `recipe`, else why it was not, in words."""
    if not path.exists():
        return "it does not exist"
    try:
        with Artifact(path, kind) as artifact:
            changed = [name for name in recipe if not _unchanged(name, recipe[name], artifact)]
    except ArtifactError:
        return "it cannot be read"
    return f"{', '.join(changed)} changed" if changed else None


def _unchanged(name: str, wanted: Any, artifact: Artifact) -> bool:
    """Whether an entry of the recipe asks for what the file holds, however it is spelled."""
    made, attributes = artifact.recipe.get(name), artifact.attributes
    if made == wanted:
        return True
    if name == "layers":
        try:
            layers = select_layers(wanted, range(attributes["n_layers"]), "")
        except UsageError:
            return False
        return layers == artifact.layers
    # Of a shard `documents` are its own, and not how far it read.
    if name == "samples" and attributes.get("whole_corpus") and not artifact.recipe.get("shard"):
        return wanted is None or wanted >= attributes["documents"]
    return bool(name == "max_length" and wanted == attributes.get("max_length"))


def is_imported(path: Path) -> bool:
    """Whether a covariance file lies at `path` that was imported, so not made from a model."""
    try:
        with CovarianceFile(path) as cov:
            return bool(cov.attributes["weights"] == UNKNOWN)
    except ArtifactError:
        return False


def _open_for_reading(path: Path) -> h5py.File:
    if not path.exists():
        raise ArtifactError(f"{path} does not exist.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name an HDF5 file.")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if isinstance(error, PermissionError):
            raise ArtifactError(f"{path} cannot be read: permission denied.") from error
        raise ArtifactError(f"{path} is not an HDF5 file, or is truncated.") from error
