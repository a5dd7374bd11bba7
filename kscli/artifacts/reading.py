"""Artifacts opened for reading; a file that is not as its schema says is refused at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts.schema import (
    SCHEMAS,
    About,
    CovarianceAbout,
    Dataset,
    FactsAbout,
    KeysAbout,
    Kind,
    PMatrixAbout,
    SchemaError,
    Stamp,
    StatisticsAbout,
    check_datasets,
    datasets_of,
    from_attributes,
)
from kscli.artifacts.sealed import SealedFile
from kscli.artifacts.values import check_about, rules_of, wrong_values
from kscli.cosines import cosine, no_cosine, whitened_cosine
from kscli.errors import ArtifactError, FactsError, KscliError, MissingError
from kscli.fact_forms import QUESTION_FIELDS
from kscli.facts import Fact, Question
from kscli.layers import format_layers, layers_text
from kscli.models.families import whose_p
from kscli.slots import stacked

if TYPE_CHECKING:
    import pandas
    import xarray

MatrixName = Literal["P", "whitened_cosine", "cosine", "Q"]

IDENTITY = ("weights", "tokenizer", "hook", "d_m")
EXPECTED_EQUAL = ("dtype", "special_tokens")


class Artifact:
    """An artifact opened for reading; a context manager.

    `about` and `stamp` are its attributes as typed fields, None where the file says `unknown`;
    `attributes` are all of them as they are in the file. Raises ArtifactError, naming what is
    wrong, when the file is missing, is of another kind than asked for (None: of any), lacks what
    its kind has, or was written by a later format.
    """

    of_kind: ClassVar[Kind | None] = None
    about: About

    def __init__(self, path: Path, kind: Kind | None = None) -> None:
        self.path = path
        if not path.exists():
            raise MissingError(path, kind or self.of_kind or "")
        self._file = SealedFile(path)
        try:
            with self._reading():
                self.attributes: dict[str, Any] = dict(self._file.attributes)
                self._check_kind(kind or self.of_kind)
                self.stamp: Stamp = from_attributes(Stamp, self.attributes)
                self.about = from_attributes(SCHEMAS[self.kind].about, self.attributes)
                check_about(self.about)
                self._declared = datasets_of(self.kind, self.about)
                self._lengths = check_datasets(self._file.arrays, self._declared, self.about)
                if isinstance(self.about, StatisticsAbout):
                    self._lengths["m"] = self.about.m
                self.layers: tuple[int, ...] = tuple(self._values("layer").tolist())
                if self.layers[-1] >= self.about.n_layers:
                    raise SchemaError(
                        f"its dataset layer holds {self.layers[-1]}, where the model has "
                        f"{self.about.n_layers} layers"
                    )
        except KscliError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __repr__(self) -> str:
        where = f"{self.model}, {layers_text(self.layers)}"
        return f"<{type(self).__name__} of {where}: {self.path}>"

    def closing(self) -> Callable[[], None]:
        """What closes the file, and does not keep this object."""
        return self._file.close

    @property
    def model(self) -> str:
        """The model's name for people: its alias or slug."""
        return self.about.model

    @property
    def kind(self) -> str:
        """Which kind of artifact this is: cov, keys, pmatrix, stats or edits."""
        return str(self.attributes["kind"])

    @property
    def fingerprint(self) -> str:
        """The hash of what the file holds."""
        return self.stamp.fingerprint

    def datasets(self) -> dict[str, dict[str, Any]]:
        """Every dataset by its name: its `shape` and `dtype`.

        One number a layer has its `least` and `largest`, too: of what is defined, NaN without.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, held in sorted(self._file.arrays.items()):
            kind = held.dtype.kind
            text = "string" if kind == "S" else str(held.dtype)
            found[name] = {"shape": list(held.shape), "dtype": text}
            declared = self._declared.get(name)
            of_layers = declared and declared.axes == ("layer",) and name != "layer"
            if of_layers and kind in "iuf":
                values = self._values(name)
                values = values[~np.isnan(values)]
                ends = (values.min().item(), values.max().item()) if values.size else 2 * (np.nan,)
                found[name] |= {"least": ends[0], "largest": ends[1]}
        return found

    @property
    def held(self) -> dict[str, Dataset]:
        """What the schema declares of every dataset that the file holds, by its name."""
        arrays = self._file.arrays
        return {name: declared for name, declared in self._declared.items() if name in arrays}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a dataset."""
        return self._file.arrays[name].shape

    def read(self, name: str, layers: Sequence[int]) -> NDArray[Any]:
        """A dataset by its name, text as Python strings; of some layers where it has that axis.

        Raises ArtifactError as `require_layers` does.
        """
        if self._declared[name].axes[:1] != ("layer",):
            return self._values(name)
        self.require_layers(layers)
        if len(self.shape_of(name)) == 1:
            return self._values(name)[[self.layers.index(layer) for layer in layers]]
        return np.stack([self._of_layer(name, layer) for layer in layers])

    def to_xarray(self, layers: str = "all") -> xarray.Dataset:
        """All that the file holds as a data set with named axes, see `frames.dataset_of`."""
        from kscli.artifacts.frames import dataset_of

        return dataset_of(self, layers)

    def check(self) -> None:
        """Compare all of the file with its seal; raises ArtifactError where it was changed."""
        for name in self._file.arrays:
            self._file.check(name)

    def require_dense(self) -> None:
        """Raise ArtifactError where the file is of a mixture of experts."""
        if self.about.n_experts:
            raise ArtifactError(
                f"{self.path} is of a mixture of {self.about.n_experts} experts, so it holds no "
                "one key of a fact and no one C; read stacked_keys_of, and second_moment_of each."
            )

    def require_layers(self, layers: Sequence[int]) -> None:
        """Raise ArtifactError naming the first of `layers` that the file lacks."""
        for layer in layers:
            if layer not in self.layers:
                raise ArtifactError(
                    f"{self.path} has no layer {layer}; it holds {format_layers(self.layers)}."
                )

    def _values(self, name: str) -> NDArray[Any]:
        """A whole dataset, text as Python strings."""
        with self._reading():
            return self._checked(name, self._file.read(name))

    def _of_layer(self, name: str, layer: int, dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
        """One layer of a dataset; its type is by default the one that the schema declares."""
        shape = self._file.arrays[name].shape[1:]
        out = np.empty(shape, dtype or self._declared[name].dtype)
        self._read_rows(name, layer, 0, out)
        with self._reading():
            return self._checked(name, out, layer)

    def _read_rows(self, name: str, layer: int, start: int, out: NDArray[Any]) -> None:
        """Read rows of a layer, from `start` on, into `out`; a row is what the last axis holds."""
        self.require_layers([layer])
        with self._reading():
            shape = self._file.arrays[name].shape
            first = self.layers.index(layer) * math.prod(shape[1:]) + start * shape[-1]
            self._file.read_into(name, first, out)

    def _checked(self, name: str, values: NDArray[Any], layer: int | None = None) -> NDArray[Any]:
        """The values of a dataset, or of one layer of it, once they make sense."""
        rules = rules_of(self.about, self.kind, name)
        wrong = wrong_values(rules, values, self._lengths)
        if wrong:
            where = "" if layer is None else f", layer {layer},"
            raise SchemaError(f"its dataset {name}{where} {wrong}")
        return values

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what a file that is not as it was written raises into one sentence."""
        damaged = f"{self.path} is damaged or was not made by kscli"
        try:
            yield
        except SchemaError as error:
            raise ArtifactError(f"{damaged}: {error}; make it again.") from error
        except (OSError, RuntimeError, TypeError, ValueError, LookupError, FactsError) as error:
            raise ArtifactError(f"{damaged}; make it again.") from error

    def _check_kind(self, wanted: Kind | None) -> None:
        found = self.attributes.get("kind")
        if not isinstance(found, str) or found not in SCHEMAS:
            raise ArtifactError(f"{self.path} is an HDF5 file, but not one of kscli's.")
        if wanted is not None and found != wanted:
            raise ArtifactError(
                f"{self.path} holds {SCHEMAS[found].title}, not {SCHEMAS[wanted].title}."
            )


class CovarianceFile(Artifact):
    """cov.h5: the second moment C of every layer's keys."""

    of_kind = "cov"
    about: CovarianceAbout

    def to_pandas(self, layers: str = "all") -> pandas.DataFrame:
        """C of the layers, one below the other, with the index (layer, d_m)."""
        from kscli.artifacts.frames import covariance_frame

        return covariance_frame(self, layers)

    @property
    def count(self) -> int:
        """The number of tokens that C is a mean over."""
        return int(self._values("count"))

    def second_moment(self, layer: int) -> NDArray[np.float64]:
        """C of one layer as a new (d_m, d_m) float64 array, read without a float32 copy."""
        self.require_dense()
        return self._of_layer("second_moment", layer, np.dtype(np.float64))

    def stored_second_moment(self, layer: int) -> NDArray[np.float32]:
        """C of one layer as it is stored, a new (d_m, d_m) float32 array."""
        self.require_dense()
        return self._of_layer("second_moment", layer)

    def read(self, name: str, layers: Sequence[int]) -> NDArray[Any]:
        """As of every artifact; C is read matrix by matrix, each of which is checked."""
        if name not in [matrices for matrices, *_ in self.second_moments()]:
            return super().read(name, layers)
        self.require_layers(layers)
        return np.stack([self.stored_layer(layer)[name] for layer in layers])

    def stored_blocks(self, layer: int) -> list[NDArray[np.float32]]:
        """The blocks on the diagonal of C of one layer's stacked keys, as they are stored.

        Those of its experts, and then that of shared ones; of a dense layer C itself.
        """
        stored = self.stored_layer(layer)
        shared = [stored["shared_second_moment"]] if "shared_second_moment" in stored else []
        C = stored["second_moment"]
        return [*(C if self.about.n_experts else C[None]), *shared]

    def block(self, layer: int, number: int) -> tuple[NDArray[np.float64], int]:
        """One of a layer's blocks of experts, in float64, and how many tokens had a key in it."""
        shared = None if number < (self.about.n_experts or 0) else self.shared_second_moment(layer)
        if shared is not None:
            return shared, self.count
        return self.second_moment_of(layer, number), int(self.routed(layer)[number])

    def block_name(self, number: int) -> str:
        """What a block is called: `expert 3`, or `the shared experts`, which come last."""
        return f"expert {number}" if number < (self.about.n_experts or 0) else "the shared experts"

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of a layer's blocks, side by side the length of a stacked key."""
        return tuple(width for _, count, width in self.second_moments() for _ in range(count))

    @property
    def settling(self) -> dict[str, NDArray[Any]]:
        """How far p had settled while C was measured, by the names of the datasets; or nothing."""
        names = (name for name in self._declared if name.startswith("settling/"))
        return {name: self._values(name) for name in names if name in self._file.arrays}

    def second_moment_of(self, layer: int, expert: int) -> NDArray[np.float64]:
        """C of one expert of a layer, (d_m, d_m) float64."""
        C = np.empty((self.about.d_m, self.about.d_m))
        self._read_rows("second_moment", layer, expert * len(C), C)
        with self._reading():
            return self._checked("second_moment", C, layer)

    def shared_second_moment(self, layer: int) -> NDArray[np.float64] | None:
        """C of the experts of a layer that all tokens have, in float64; None without any."""
        if "shared_second_moment" not in self._file.arrays:
            return None
        return self._of_layer("shared_second_moment", layer, np.dtype(np.float64))

    def routed(self, layer: int) -> NDArray[np.int64]:
        """How many tokens were routed to each expert of a layer, (E,)."""
        return self._of_layer("routed", layer)

    def second_moments(self) -> list[tuple[str, int, int]]:
        """The matrices of every layer: their dataset, how many of them it holds, and their width.

        Of a dense layer it is one, of experts one each, and one of shared experts where there are.
        """
        d_m, n_experts = self.about.d_m, self.about.n_experts or 1
        found = [("second_moment", n_experts, d_m)]
        if "shared_second_moment" in self._file.arrays:
            width = self._file.arrays["shared_second_moment"].shape[-1]
            found.append(("shared_second_moment", 1, width))
        return found

    def stored_layer(self, layer: int) -> dict[str, NDArray[Any]]:
        """All that the file holds of a layer, as it is stored, by the names of the datasets."""
        found: dict[str, NDArray[Any]] = {}
        for name, count, width in self.second_moments():
            C = np.empty((count, width, width), dtype=np.float32)
            for number, matrix in enumerate(C):
                self._read_rows(name, layer, number * width, matrix)
                with self._reading():
                    self._checked(name, matrix, layer)
            found[name] = C if self.about.n_experts and name == "second_moment" else C[0]
        if self.about.n_experts:
            found["routed"] = self.routed(layer)
        return found

    def read_rows(
        self,
        layer: int,
        start: int,
        out: NDArray[np.float32 | np.float64],
        name: str = "second_moment",
    ) -> None:
        """Read rows of a layer's C, from `start` on, into `out`; only whole layers are checked.

        The rows of expert e begin at e d_m.
        """
        self._read_rows(name, layer, start, out)


class FactsFile(Artifact):
    """What keys.h5, pmatrix.h5 and edits share: the facts and where their keys were read."""

    about: FactsAbout

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, in the order of the file's fact axes."""
        with self._reading():
            columns = {
                name.removeprefix("facts/"): self._values(name).tolist()
                for name in self._declared
                if name.startswith("facts/") and name in self._file.arrays
            }
            asked = self._questions()
            rows = zip(*columns.values(), strict=True)
            return tuple(
                Fact(**dict(zip(columns, row, strict=True)), questions=tuple(asked.get(index, ())))
                for index, row in enumerate(rows)
            )

    def _questions(self) -> dict[int, list[Question]]:
        """The questions of every fact that has any, by its index."""
        found: dict[int, list[Question]] = {}
        for kind in QUESTION_FIELDS:
            if f"{kind}/fact" in self._declared and f"{kind}/fact" in self._file.arrays:
                names = (f"{kind}/{column}" for column in ("fact", "prompt", "target"))
                for index, prompt, target in zip(*map(self._values, names), strict=True):
                    found.setdefault(int(index), []).append(Question(kind, prompt, target))
        return found

    @cached_property
    def paraphrase_fact(self) -> NDArray[np.int64]:
        """The index of the fact that each paraphrase is of, (q,); empty where there is none."""
        name = "paraphrase/fact"
        return self._values(name) if name in self._file.arrays else np.empty(0, dtype=np.int64)

    @cached_property
    def token_id(self) -> NDArray[np.int64]:
        """The id of the token at which each key was read, (m,)."""
        return self._values("token_id")

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """The index of that token in the prompt's tokens, (m,)."""
        return self._values("position")


class KeysFile(FactsFile):
    """keys.h5: the key of every fact at every layer, and its mean over context templates."""

    of_kind = "keys"
    about: KeysAbout

    def to_pandas(self, layers: str = "all") -> pandas.DataFrame:
        """A key a row, with the index (layer, fact); of experts (layer, fact, expert)."""
        from kscli.artifacts.frames import keys_frame

        return keys_frame(self, layers)

    def keys_of(self, layer: int) -> NDArray[np.float64]:
        """The keys of one layer, (m, d_m), in float64."""
        self.require_dense()
        return self._of_layer("keys", layer).astype(np.float64)

    def experts_of(self, layer: int) -> NDArray[np.int64]:
        """The experts that each fact is routed to at one layer, (m, slot); -1: no more."""
        return self._of_layer("experts", layer)

    def stacked_keys_of(self, layer: int) -> NDArray[np.float64]:
        """The keys of one layer, (m, width) in float64: of experts side by side, shared ones last.

        0 where a fact is not routed to an expert; of a dense layer what `keys_of` gives.
        """
        return self._stacked("bare", layer)

    def expert_keys_of(self, layer: int) -> NDArray[np.float64]:
        """g k of each fact and expert of `experts_of`, (m, slot, d_m), in float64."""
        return self._of_layer("keys", layer).astype(np.float64)

    def keys_by_expert(self, layer: int) -> dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]]:
        """By an expert's number, the facts that are routed to it, and their keys (facts, d_m).

        Shared experts, to which all facts are, come last.
        """
        experts, parts = self.experts_of(layer), self.expert_keys_of(layer)
        found = {}
        for expert in np.unique(experts[experts >= 0]).tolist():
            rows, slots = np.nonzero(experts == expert)
            found[expert] = rows, parts[rows, slots]
        if "shared_keys" in self._file.arrays:
            found[self.about.n_experts or 0] = np.arange(len(experts)), self.shared_keys_of(layer)
        return found

    def shared_keys_of(self, layer: int) -> NDArray[np.float64]:
        """g k of the experts that all tokens have, (m, d_shared), in float64."""
        return self._of_layer("shared_keys", layer).astype(np.float64)

    @cached_property
    def contexts(self) -> tuple[str, ...]:
        """The context templates, the bare prompt not among them."""
        return tuple(self._values("contexts").tolist()) if "contexts" in self._file.arrays else ()

    def context_keys_of(self, layer: int) -> NDArray[np.float64]:
        """The mean of each key over the contexts at one layer, as `stacked_keys_of`: (m, width).

        Raises ArtifactError where the file has none.
        """
        if "context_keys" not in self._file.arrays:
            raise ArtifactError(
                f"{self.path} holds no keys in contexts, over which the editor takes a mean; make "
                "it again with `kscli extract --contexts FILE|N --force`."
            )
        return self._stacked("context", layer)

    def paraphrase_keys_of(self, layer: int) -> NDArray[np.float64] | None:
        """The mean of the keys of each fact's paraphrases at one layer, as `stacked_keys_of`.

        It is NaN for a fact without paraphrases; None where no fact has any.
        """
        if "paraphrase_keys" not in self._file.arrays:
            return None
        return self._stacked("paraphrase", layer)

    def _stacked(self, which: str, layer: int) -> NDArray[np.float64]:
        """One of `KEY_NAMES` of `kscli.slots` at one layer, (m, width) in float64."""

        def part(name: str) -> NDArray[Any] | None:
            return self._of_layer(name, layer) if name in self._file.arrays else None

        return stacked(part, which, self.about.n_experts or 0)


class PMatrixFile(FactsFile):
    """pmatrix.h5: P and Q of every layer, and the cosines of keys.

    P is the paper's, or p of the editor that `about` names.
    """

    of_kind = "pmatrix"
    about: PMatrixAbout

    def to_pandas(self, layers: str = "all") -> pandas.DataFrame:
        """An ordered pair of facts a row, with p, the cosines, and both facts."""
        from kscli.artifacts.frames import pairs_frame

        return pairs_frame(self, layers)

    @property
    def model(self) -> str:
        """The model's name for people, and the editor's where p is an editor's."""
        return whose_p(self.about.model, self.about.editor)

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        """One layer's (m, m) matrix of that name."""
        with self._reading():
            if name == "whitened_cosine" and name not in self._file.arrays:
                return whitened_cosine(self.matrix("P", layer), self.leverage(layer))
            if name == "cosine":
                return cosine(self.matrix("Q", layer))
            values = self._of_layer(name, layer).astype(np.float64)
            if name == "P" and not self.about.editor:
                place = no_cosine(values, self.leverage(layer))
                if place:
                    raise SchemaError(
                        f"its dataset P, layer {layer}, is {values[place]:.6g} at {place}, which "
                        "is no inner product of two keys of the leverage that it holds"
                    )
            return values

    def paraphrase_p(self, layer: int) -> NDArray[np.float64]:
        """The mean p from each fact to its own paraphrases, (m,); NaN where it has none."""
        if "paraphrase_p" not in self._file.arrays:
            return np.full(len(self.facts), np.nan)
        return self._of_layer("paraphrase_p", layer)

    def experts_of(self, layer: int) -> NDArray[np.int64] | None:
        """The experts that each fact is routed to, (m, slot), -1: no more; None where dense."""
        return self._of_layer("experts", layer) if self.about.n_experts else None

    def leverage(self, layer: int) -> NDArray[np.float64]:
        """k^T C^-1 k of every fact, (m,)."""
        return self._of_layer("leverage", layer)


def require_same_identity(
    first: Artifact, second: Artifact, passing_over: Sequence[str] = ()
) -> list[str]:
    """Raise ArtifactError unless both are about the same model; returns lesser differences.

    The lesser ones, dtype, special tokens, and what an imported file does not know of its
    weights and tokenizer, are sentences for a warning, but for those `passing_over`.
    """
    differences = []
    unchecked = []
    for name in (name for name in IDENTITY + EXPECTED_EQUAL if name not in passing_over):
        a, b = getattr(first.about, name), getattr(second.about, name)
        if a is None or b is None:
            unchecked.append(name)
        elif a != b and name in IDENTITY:
            raise ArtifactError(
                f"{first.path} and {second.path} differ in {name} ({a} and {b}): "
                "they are about different models. Make both from one."
            )
        elif a != b:
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
