"""Artifacts as tables of pandas and as data sets of xarray; both packages are extras of kscli."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from kscli.errors import ArtifactError, MissingPackageError
from kscli.layers import select_layers

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

    from kscli.artifacts.reading import (
        Artifact,
        CovarianceFile,
        FactsFile,
        KeysFile,
        MatrixName,
        PMatrixFile,
    )

_MEANINGS = {
    "P": "p[i, j]: fact i is edited, fact j is moved",
    "whitened_cosine": "k_i^T C^-1 k_j over the norms of both keys after whitening",
    "cosine": "k_i^T k_j over the norms of both keys",
    "Q": "the inner product of two keys",
}
MATRICES: tuple[MatrixName, ...] = ("P", "whitened_cosine", "cosine", "Q")
_OF_PAIR = ("subject", "prompt", "target")


def frame_of(rows: Iterable[Mapping[str, Any]]) -> DataFrame:
    """Flat records as a table, a row each; what is None in them is NaN or None there."""
    found: DataFrame = _package("pandas").DataFrame(list(rows))
    return found


def dataset_of_rows(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Flat records as a data set with the axis `index`."""
    _package("xarray")
    found: Dataset = frame_of(rows).to_xarray()
    return found


def covariance_frame(file: CovarianceFile, layers: str) -> DataFrame:
    """C, (d_m, d_m), of every layer, and expert if there are any, one below the other."""
    pandas, chosen = _package("pandas"), _chosen(file, layers)
    _require_room(file, ["second_moment"], chosen)
    if file.about.n_experts:
        keys: list[Any] = [
            (layer, expert) for layer in chosen for expert in range(file.about.n_experts)
        ]
        parts = [file.second_moment_of(*key).astype(np.float32) for key in keys]
    else:
        keys, parts = list(chosen), [file.stored_second_moment(layer) for layer in chosen]
    names = ["layer", "expert", "d_m"] if file.about.n_experts else ["layer", "d_m"]
    found: DataFrame = pandas.concat(map(pandas.DataFrame, parts), keys=keys, names=names)
    return found


def keys_frame(file: KeysFile, layers: str) -> DataFrame:
    """A key a row, of every layer and fact; of experts one row for each that the fact goes to."""
    pandas, chosen = _package("pandas"), _chosen(file, layers)
    _require_room(file, ["keys"], chosen)
    keys = file.read("keys", chosen)
    places = np.indices(keys.shape[:-1]).reshape(keys.ndim - 1, -1)
    index = {"layer": np.take(chosen, places[0]), "fact": places[1]}
    rows = keys.reshape(-1, keys.shape[-1])
    if file.about.n_experts:
        experts = file.read("experts", chosen).ravel()
        there = experts >= 0
        index = {name: values[there] for name, values in index.items()}
        index["expert"], rows = experts[there], rows[there]
    named = pandas.MultiIndex.from_arrays([*index.values()], names=[*index])
    found: DataFrame = pandas.DataFrame(rows, index=named)
    return found


def pairs_frame(file: PMatrixFile, layers: str) -> DataFrame:
    """An ordered pair i != j a row, of every layer, with the columns of `kscli topk -f json`.

    p is P[i, j], what an edit of fact i does to fact j. Texts are categories, which are held once.
    """
    pandas, chosen = _package("pandas"), _chosen(file, layers)
    _require_room(file, len(MATRICES) * ["Q"], chosen)
    m = len(file.facts)
    i, j = np.nonzero(~np.eye(m, dtype=bool))
    texts = {
        name: pandas.Categorical([getattr(fact, name) for fact in file.facts]) for name in _OF_PAIR
    }
    of_pairs = {
        "i": i,
        "j": j,
        **{f"{name}_i": texts[name][i] for name in _OF_PAIR},
        **{f"{name}_j": texts[name][j] for name in _OF_PAIR},
        "same_last_token": file.token_id[i] == file.token_id[j],
    }
    parts = [
        pandas.DataFrame(
            {
                "layer": np.full(len(i), layer),
                "p": file.matrix("P", layer)[i, j],
                "whitened_cosine": file.matrix("whitened_cosine", layer)[i, j],
                "cosine": file.matrix("cosine", layer)[i, j],
                **of_pairs,
            }
        )
        for layer in chosen
    ]
    found: DataFrame = pandas.concat(parts, ignore_index=True)
    return found


def dataset_of(file: Artifact, layers: str) -> Dataset:
    """All that a file holds, of some layers, as one data set with named axes.

    Axes have the names of the schema, but for m, the facts: that is `fact`; in pmatrix.h5, where a
    pair has two, `i` (edited) and `j` (moved). A second axis of one name ends in `_2`. `/` in
    names is `_`. The facts' fields are coordinates (`fact_NAME` where edits have that name too),
    the file's attributes are the attributes.
    """
    from kscli.artifacts.reading import FactsFile, PMatrixFile

    xarray, chosen = _package("xarray"), _chosen(file, layers)
    of_pairs = isinstance(file, PMatrixFile)
    matrices = MATRICES if isinstance(file, PMatrixFile) else ()
    names = [name for name in file.held if name not in (*matrices, "layer")]
    _require_room(file, [*names, *(len(matrices) * ["Q"])], chosen)
    found: dict[str, Any] = {}
    for name in names:
        declared = file.held[name]
        if not name.startswith("facts/") and name not in ("token_id", "position"):
            dims = _dims(declared.axes, of_pairs=of_pairs)
            values = file.read(name, chosen)
            found[name.replace("/", "_")] = (dims, values, {"long_name": declared.meaning})
    if isinstance(file, PMatrixFile):
        for matrix in MATRICES:
            values = np.stack([file.matrix(matrix, layer) for layer in chosen])
            found[matrix] = (("layer", "i", "j"), values, {"long_name": _MEANINGS[matrix]})
    coords: dict[str, Any] = {"layer": list(chosen)}
    if isinstance(file, FactsFile):
        of_facts = _facts_of(file, ("i", "j") if of_pairs else ("fact",))
        coords |= {f"fact_{name}" if name in found else name: of_facts[name] for name in of_facts}
    held: Dataset = xarray.Dataset(found, coords, file.attributes)
    return held


def _facts_of(file: FactsFile, axes: Sequence[str]) -> dict[str, Any]:
    """The facts' fields as coordinates along axes: `subject`, or of pairs `subject_i`."""
    columns: dict[str, Any] = {
        each.name: [getattr(fact, each.name) for fact in file.facts]
        for each in fields(file.facts[0])
        if each.name != "questions"
    }
    columns |= {"token_id": file.token_id, "position": file.position}
    coords: dict[str, Any] = {}
    for axis in axes:
        coords[axis] = np.arange(len(file.facts))
        end = "" if axis == "fact" else f"_{axis}"
        coords |= {f"{name}{end}": (axis, values) for name, values in columns.items()}
    return coords


def _dims(axes: Sequence[str], *, of_pairs: bool) -> tuple[str, ...]:
    names = [("i" if of_pairs else "fact") if axis == "m" else axis for axis in axes]
    return tuple(f"{name}_2" if name in names[:at] else name for at, name in enumerate(names))


def _chosen(file: Artifact, layers: str) -> tuple[int, ...]:
    return select_layers(layers, file.layers, str(file.path))


def _require_room(file: Artifact, names: Sequence[str], layers: Sequence[int]) -> None:
    """Raise ArtifactError where the datasets of the layers would not fit in memory, held twice."""
    from kscli.resources import format_size, free_host_memory

    needed = 2 * sum(_bytes(file, name, len(layers)) for name in names)
    free = free_host_memory()
    if needed > free:
        raise ArtifactError(
            f"{file.path} needs {format_size(needed)} of memory for {len(layers)} layers, and "
            f"{format_size(free)} are free; name fewer layers."
        )


def _bytes(file: Artifact, name: str, layers: int) -> int:
    shape = file.shape_of(name)
    of_layers = file.held[name].axes[:1] == ("layer",)
    return 8 * math.prod((layers, *shape[1:]) if of_layers else shape)


def _package(name: str) -> Any:
    """An optional package; raises MissingPackageError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(name, name) from error
