"""Second moments in the `.npz` files of ROME-family editors, written and read.

ROME, MEMIT, EasyEdit and AlphaEdit keep one file a layer,
`STATS_DIR/MODEL/DATASET_stats/LAYERNAME_PRECISION_mom2_SAMPLESIZE.npz`, of four arrays:
`mom2.constructor`, `mom2.count`, `mom2.mom2` (the sum of k k^T, not divided) and
`sample_size`. Their code finds a file by its name alone and takes it if its `sample_size` is
the one of their hyper-parameters; otherwise it runs the corpus again.

One layer at most is in memory.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kscli.artifacts import CovarianceAbout, CovarianceFile, write_artifact
from kscli.artifacts.schema import HOOK, LAYER
from kscli.errors import ArtifactError, NumericsError, UsageError
from kscli.files import replace_file, require_ordinary, require_other, require_writable
from kscli.layers import select_layers
from kscli.models.aliases import classify, find_alias, slug
from kscli.reporter import SILENT, Reporter

Editor = Literal["rome", "memit", "easyedit", "alphaedit"]

COUNT, MATRIX, NOTE = "mom2.count", "mom2.mom2", "kscli.note"
CONSTRUCTOR = "util.runningstats.SecondMoment()"
DATASET = "wikipedia"
PRECISION = "float32"
# All four editors' hyper-parameter files say so, and a file that says another is not taken.
SAMPLE_SIZE = 100_000

# The editors' own commands and hyper-parameters call these models by their older Hub ids.
OLDER_IDS = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
    "EleutherAI/gpt-j-6b": "EleutherAI/gpt-j-6B",
}

# A deflated file of nothing but zeros is 1030 times as small as they are.
MOST_COMPRESSED = 200
BLOCK = 64  # rows that are made symmetric at once
# Entries (i, j) and (j, i) of a sum in float32 drift apart by the rounding of each of some
# 1e5 additions: sqrt(1e5) 2^-24 is 2e-5 of sqrt(S_ii S_jj), and the largest of 1e8 pairs is
# six times as far. What differs by more than this is no second moment.
SYMMETRIC = 2.0**-12


@dataclass(frozen=True)
class LayerFile:
    """One layer's `.npz` file: what its name says of the layer, and what its arrays say.

    `hook` is the module's dotted path with `{}` for the layer, `d_m` the matrix's width,
    `note` what kscli wrote into the file ("" where it did not).
    """

    path: Path
    layer: int
    hook: str
    count: int
    d_m: int
    note: str


@dataclass(frozen=True)
class ExportOptions:
    """For which editor files are written, of which layers.

    `name` is the name or path by which the editor loads the model (None: the model's Hub id,
    as the editor's own commands write it); `note` is kept in the files, and no editor reads it.
    """

    editor: Editor
    name: str | None = None
    layers: str = "all"
    note: str | None = None


def model_folder(editor: Editor, name: str) -> str:
    """The folder's name that the editor makes of the model's name or path.

    ROME and MEMIT put `_` for `/`; EasyEdit and AlphaEdit take what follows the last `/`.
    Raises UsageError when nothing is left.
    """
    folder = name.replace("/", "_") if editor in ("rome", "memit") else name.rpartition("/")[2]
    if folder in ("", ".", ".."):
        raise UsageError(f"the model's name {name!r} gives no folder; name it with --as.")
    return folder


def statistics_path(stats_dir: Path, folder: str, layer_name: str) -> Path:
    """Where an editor with its default hyper-parameters looks for a layer's file."""
    file = f"{layer_name}_{PRECISION}_mom2_{SAMPLE_SIZE}.npz"
    return stats_dir / folder / f"{DATASET}_stats" / file


def export_covariance(
    cov_path: Path,
    stats_dir: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> list[Path]:
    """Write the files of cov.h5's chosen layers that the editor looks for; returns their paths.

    `sample_size` is always 100000: it is the key by which the editors take a file, not a
    count. A file that holds already what would be written is left, so that an export that was
    cut short goes on. Raises ArtifactError, before anything is written, when another file is in
    the way and `force` is not set, or the file is of experts, and NumericsError when a sum is
    beyond float32.
    """
    with CovarianceFile(cov_path) as cov:
        if cov.about.n_experts:
            raise ArtifactError(
                f"{cov_path} is of a mixture of experts, with a C for each of "
                f"{cov.about.n_experts} experts a layer; what {options.editor} reads is one C a "
                "layer, of a dense down-projection, so nothing can be exported."
            )
        layers = select_layers(options.layers, cov.layers, str(cov_path))
        model_id, hook = cov.about.model_id, cov.about.hook
        name = options.name or OLDER_IDS.get(model_id, model_id)
        folder = model_folder(options.editor, name)
        paths = [
            statistics_path(stats_dir, folder, hook.replace(LAYER, str(layer))) for layer in layers
        ]
        left = []
        for layer, path in zip(layers, paths, strict=True):
            require_other(path, [cov_path])
            if force or not _is_written(path, cov, layer, options.note):
                require_writable(path, force=force)
                left.append((layer, path))
        if len(left) < len(layers):
            reporter.note(f"{len(layers) - len(left)} of {len(layers)} files were there already.")
        with reporter.task("exporting", len(left), unit="layers") as task:
            for layer, path in left:
                _write_statistics(path, cov, layer, options.note, force)
                task.advance()
    return paths


def import_covariance(
    source: Path,
    model: str,
    path: Path,
    *,
    note: str | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> list[LayerFile]:
    """Read the editors' files under `source` into cov.h5 at `path`; returns what was read.

    `source` is a folder of any depth or one file. Each sum is divided by its count and made
    symmetric, (A + A^T) / 2. The files say neither weights nor corpus: these are recorded as
    `unknown`, the corpus as `note` where it is given. Raises ArtifactError when there are no
    such files or they do not belong together, and NumericsError for a matrix that is not a
    second moment; nothing is written then.
    """
    files = find_statistics(source, model)
    require_other(path, [file.path for file in files])
    require_writable(path, force=force)
    _check_together(files, model)
    about = _about(files, model, note or files[0].note)
    with (
        write_artifact(path, "cov", about, force=force) as writer,
        reporter.task("importing", len(files), unit="layers") as task,
    ):
        writer.layers([file.layer for file in files])
        writer.write("count", files[0].count)
        for index, file in enumerate(files):
            writer.put("second_moment", index, read_second_moment(file))
            task.advance()
    return files


def find_statistics(source: Path, model: str) -> list[LayerFile]:
    """The second-moment files under `source`, by layer.

    Where `source` has a folder of the model's name, as the editors name it, that one is read.
    Files of other statistics are passed over. Raises ArtifactError when there is none, and as
    `describe_statistics` does.
    """
    if source.is_file():
        paths = [source]
    elif source.is_dir():
        source = _folder_of_model(source, model)
        paths = [path for path in sorted(source.rglob("*.npz")) if not path.name.startswith(".")]
    else:
        require_ordinary(source, ArtifactError)
        raise ArtifactError(f"{source} does not exist.")
    described = [describe_statistics(path) for path in paths]
    found = sorted((file for file in described if file), key=lambda file: file.layer)
    if not found:
        raise ArtifactError(
            f"{source} holds no second moments (.npz files with the array mom2.mom2)."
        )
    return found


def describe_statistics(path: Path) -> LayerFile | None:
    """What one file holds, without reading its matrix; None if it is another statistic's.

    Raises ArtifactError when it is damaged, lacks an array, or its matrix cannot be one of
    second moments by its shape, type or count, or its name gives no layer.
    """
    with _opened(path) as archive:
        names = set(archive.namelist())
        if f"{MATRIX}.npy" not in names and "mom2" not in path.name:
            return None
        for name in (COUNT, MATRIX):
            if f"{name}.npy" not in names:
                raise ArtifactError(f"{path} has no array {name}.")
        d_m = _width(path, archive)
        count = _scalar(path, archive, COUNT)
        note = _scalar(path, archive, NOTE) if f"{NOTE}.npy" in names else ""
    if not isinstance(count, int):
        raise ArtifactError(f"{path}: mom2.count is {count!r}, where an integer is needed.")
    if count < 1:
        raise NumericsError(f"{path}: mom2.count is {count}, so that there is no mean.")
    layer, hook = _layer_and_hook(path)
    return LayerFile(path, layer, hook, count, d_m, str(note))


def read_second_moment(file: LayerFile) -> NDArray[np.float32]:
    """The file's C, its sum divided by its count, (d_m, d_m) and symmetric.

    Raises NumericsError when an entry is NaN or infinite, a diagonal entry is negative, or the
    matrix is not symmetric to within a float32 sum's rounding, and ArtifactError when the file
    is damaged.
    """
    with _opened(file.path) as archive:
        sums = _array(archive, MATRIX)
    if sums.shape != (file.d_m, file.d_m):
        raise ArtifactError(f"{file.path} changed while it was read.")
    C = sums if sums.dtype == np.float32 else np.empty(sums.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        np.divide(sums, file.count, out=C, dtype=np.float64, casting="same_kind")
    if not np.isfinite(C).all():
        raise NumericsError(f"{file.path}: {MATRIX} holds NaN or infinite entries.")
    negative = np.flatnonzero(np.diagonal(C) < 0)
    if len(negative):
        raise NumericsError(
            f"{file.path}: entry ({negative[0]}, {negative[0]}) of {MATRIX} is negative, which "
            "no sum of squares is."
        )
    _make_symmetric(C, file.path)
    return C


def _sums(cov: CovarianceFile, layer: int) -> NDArray[np.float32]:
    """C times the count, (d_m, d_m)."""
    sums = cov.stored_second_moment(layer)
    with np.errstate(over="ignore"):
        np.multiply(sums, cov.count, out=sums, dtype=np.float64, casting="same_kind")
    if not np.isfinite(sums).all():
        raise NumericsError(
            f"layer {layer} of {cov.path}: the sum over {cov.count:,} tokens is not finite in "
            "float32, in which the editors keep it."
        )
    return sums


def _statistics(cov: CovarianceFile, layer: int, note: str | None) -> dict[str, NDArray[Any]]:
    """The arrays of a layer's file, by name."""
    noted = {} if note is None else {NOTE: np.asarray(note)}
    return {
        "mom2.constructor": np.asarray(CONSTRUCTOR),
        COUNT: np.asarray(cov.count, np.int64),
        "sample_size": np.asarray(SAMPLE_SIZE, np.int64),
        MATRIX: _sums(cov, layer),
        **noted,
    }


def _is_written(path: Path, cov: CovarianceFile, layer: int, note: str | None) -> bool:
    """Whether a file holds already what `_write_statistics` would write."""
    if not path.is_file():
        return False
    wanted = _statistics(cov, layer, note)
    try:
        with _opened(path) as archive:
            return {f"{name}.npy" for name in wanted} == set(archive.namelist()) and all(
                np.array_equal(_array(archive, name), wanted[name]) for name in wanted
            )
    except ArtifactError:
        return False


def _write_statistics(
    path: Path, cov: CovarianceFile, layer: int, note: str | None, force: bool
) -> None:
    arrays: dict[str, Any] = {**_statistics(cov, layer, note)}
    with replace_file(path, force=force) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _folder_of_model(stats_dir: Path, model: str) -> Path:
    model_id = _model_id(model)
    older = OLDER_IDS.get(model_id, model_id)
    editors: tuple[Editor, ...] = get_args(Editor)
    names = [model_folder(editor, name) for name in (older, model_id) for editor in editors]
    present = sorted({stats_dir / name for name in names if (stats_dir / name).is_dir()})
    return present[0] if len(present) == 1 else stats_dir


def _model_id(model: str) -> str:
    alias = find_alias(model)
    if alias is not None:
        return alias.hub_id or alias.name
    return model if classify(model) == "hub" else slug(model)


def _check_together(files: Sequence[LayerFile], model: str) -> None:
    """Raise ArtifactError unless the files can be the layers of one run on `model`."""
    first = files[0]
    for one, other in pairwise(files):
        if one.layer == other.layer:
            raise ArtifactError(
                f"{one.path} and {other.path} are both of layer {one.layer}; "
                "name the folder of one."
            )
    for file in files:
        for name, what in (("d_m", "width"), ("count", "mom2.count"), ("hook", "module")):
            mine, theirs = getattr(file, name), getattr(first, name)
            if mine != theirs:
                raise ArtifactError(
                    f"{first.path} and {file.path} differ in {what} ({theirs} and {mine}), so that "
                    "they are not of one run over one corpus; name the folder of one, or a file."
                )
    alias = find_alias(model)
    if alias is not None and first.d_m != alias.d_m:
        raise ArtifactError(
            f"{first.path} is {first.d_m} wide, where {model} has d_m {alias.d_m}; it is of "
            "another model."
        )
    if alias is not None and files[-1].layer >= alias.layers:
        raise ArtifactError(
            f"{files[-1].path} is of layer {files[-1].layer}, where {model} has layers 0 to "
            f"{alias.layers - 1}; it is of another model."
        )


def _about(files: Sequence[LayerFile], model: str, note: str) -> CovarianceAbout:
    """What the files tell; they name neither weights nor text."""
    alias = find_alias(model)
    return CovarianceAbout(
        model=slug(model),
        model_id=_model_id(model),
        revision=None,
        weights=None,
        tokenizer=None,
        hook=files[0].hook,
        d_m=files[0].d_m,
        n_layers=alias.layers if alias else files[-1].layer + 1,
        dtype=None,
        device=None,
        special_tokens=None,
        corpus=note or None,
        corpus_identity=None,
        documents=None,
        max_length=None,
        note=note or None,
        recipe={"imported": [file.path.name for file in files], "note": note},
    )


def _layer_and_hook(path: Path) -> tuple[int, str]:
    """The layer and the hook from `transformer.h.5.mlp.c_proj_float32_mom2_100000.npz`."""
    name = re.split(r"_b?float\d+(?=_)|[_-]mom2", path.stem)[0]
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isascii() and part.isdigit()]
    if len(numbers) != 1:
        raise ArtifactError(
            f"{path}: its name does not begin with a module's dotted path and its layer's number, "
            "as in transformer.h.5.mlp.c_proj_float32_mom2_100000.npz; rename it."
        )
    layer = int(parts[numbers[0]])
    parts[numbers[0]] = LAYER
    hook = ".".join(parts)
    if not HOOK.fullmatch(hook):
        raise ArtifactError(f"{path}: its name gives no module's dotted path; rename it.")
    return layer, hook


def _width(path: Path, archive: zipfile.ZipFile) -> int:
    """d_m by the header of `mom2.mom2`, once its shape, type and length are those of a C."""
    shape, dtype = _header(archive, MATRIX)
    if dtype.hasobject:
        raise ArtifactError(f"{path} holds pickled objects, which are not read.")
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise NumericsError(f"{path}: {MATRIX} is of shape {shape}, not a square matrix.")
    if dtype.kind != "f" or dtype.itemsize not in (4, 8):
        raise NumericsError(f"{path}: {MATRIX} is {dtype}, where float32 or float64 is needed.")
    return int(shape[0])


def _make_symmetric(C: NDArray[np.float32], path: Path) -> None:
    """Replace C by (C + C^T) / 2 in place; NumericsError when the two are far apart."""
    scale = np.sqrt(np.diagonal(C).astype(np.float64))
    for start in range(0, len(C), BLOCK):
        rows, columns = slice(start, start + BLOCK), slice(min(start + BLOCK, len(C)))
        lower = C[rows, columns].astype(np.float64)
        upper = C[columns, rows].T.astype(np.float64)
        apart = np.abs(lower - upper) > SYMMETRIC * scale[rows, None] * scale[columns]
        if apart.any():
            i, j = np.argwhere(apart)[0]
            raise NumericsError(
                f"{path}: {MATRIX} is not symmetric: entries ({start + i}, {j}) and ({j}, "
                f"{start + i}) differ by more than rounding."
            )
        mean = (lower + upper) / 2
        C[rows, columns] = mean
        C[columns, rows] = mean.T


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, once the archive has room for it; ValueError if not.

    NumPy takes the memory for what a header declares before it reads on.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        old = npy.read_magic(file) == (1, 0)
        read_header = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        held = member.file_size - file.tell()
    if not dtype.hasobject and held != math.prod(shape) * dtype.itemsize:
        raise ValueError("the array is longer or shorter than its header says")
    if member.file_size > MOST_COMPRESSED * max(1, member.compress_size):
        raise ValueError("the array is compressed more than any second moment can be")
    return shape, dtype


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    _header(archive, name)
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
        # The checksum is compared where the member ends.
        member.read()
        return array


def _scalar(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    array = _array(archive, name)
    if array.size != 1:
        raise ArtifactError(f"{path}: {name} is of shape {array.shape}, where one value is needed.")
    return array.item()


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what a file that is no sound .npz raises becomes one sentence."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except PermissionError as error:
        raise ArtifactError(f"{path} cannot be read: permission denied.") from error
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ArtifactError(
            f"{path} is not an .npz file, or is damaged; compute or download it again."
        ) from error
