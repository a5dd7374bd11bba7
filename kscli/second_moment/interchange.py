"""Second moments in the `.npz` files of ROME-family editors, written and read.

ROME, MEMIT, EasyEdit and AlphaEdit keep one file a layer,
`STATS_DIR/MODEL/DATASET_stats/LAYERNAME_PRECISION_mom2_SAMPLESIZE.npz`, of four arrays:
`mom2.constructor`, `mom2.count`, `mom2.mom2` (the sum of k k^T, not divided) and
`sample_size`. Their code finds a file by its name alone and takes it if its `sample_size` is
the one of their hyper-parameters; otherwise it runs the corpus again.

Matrices are read and written in blocks of rows, so that one layer at most is in memory.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from kscli.artifacts import CovarianceAbout, CovarianceFile, write_artifact
from kscli.errors import ArtifactError, NumericsError, UsageError
from kscli.files import replace_file, require_writable
from kscli.layers import select_layers
from kscli.models.aliases import classify, find_alias, slug
from kscli.reporter import SILENT, Reporter

Editor = Literal["rome", "memit", "easyedit", "alphaedit"]

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

BLOCK_BYTES = 2**22
BLOCK = 512
# Entries (i, j) and (j, i) of a sum in float32 drift apart by the rounding of each of some
# 1e5 additions: sqrt(1e5) 2^-24 is 2e-5 of sqrt(S_ii S_jj), and the largest of 1e8 pairs is
# six times as far. What differs by more than this is no second moment.
SYMMETRIC = 2.0**-12


@dataclass(frozen=True)
class StatisticsFile:
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
    count. Raises ArtifactError, before anything is written, when one of the files exists and
    `force` is not set, and NumericsError when a sum is beyond float32.
    """
    with CovarianceFile(cov_path) as cov:
        layers = select_layers(options.layers, cov.layers, str(cov_path))
        model_id, hook = cov.about.model_id, cov.about.hook
        name = options.name or OLDER_IDS.get(model_id, model_id)
        folder = model_folder(options.editor, name)
        paths = [statistics_path(stats_dir, folder, hook.format(layer)) for layer in layers]
        for path in paths:
            require_writable(path, force=force)
        with reporter.task("exporting", len(layers), unit="layers") as task:
            for layer, path in zip(layers, paths, strict=True):
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
) -> list[StatisticsFile]:
    """Read the editors' files under `source` into cov.h5 at `path`; returns what was read.

    `source` is a folder of any depth or one file. Each sum is divided by its count and made
    symmetric, (A + A^T) / 2. The files say neither weights nor corpus: these are recorded as
    `unknown`, the corpus as `note` where it is given. Raises ArtifactError when there are no
    such files or they do not belong together, and NumericsError for a matrix that is not a
    second moment; nothing is written then.
    """
    require_writable(path, force=force)
    files = find_statistics(source, model)
    _check_together(files, model)
    C = np.empty((files[0].d_m, files[0].d_m), dtype=np.float32)
    about = _about(files, model, note or files[0].note)
    with (
        write_artifact(path, "cov", about, force=force) as writer,
        reporter.task("importing", len(files), unit="layers") as task,
    ):
        writer.layers([file.layer for file in files])
        writer.write("count", files[0].count)
        for index, file in enumerate(files):
            read_second_moment(file, C)
            writer.put("second_moment", index, C)
            task.advance()
    return files


def find_statistics(source: Path, model: str) -> list[StatisticsFile]:
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
        raise ArtifactError(f"{source} does not exist.")
    described = [describe_statistics(path) for path in paths]
    found = sorted((file for file in described if file), key=lambda file: file.layer)
    if not found:
        raise ArtifactError(
            f"{source} holds no second moments (.npz files with the array mom2.mom2)."
        )
    return found


def describe_statistics(path: Path) -> StatisticsFile | None:
    """What one file holds, without reading its matrix; None if it is another statistic's.

    Raises ArtifactError when it is damaged, lacks an array, or its matrix cannot be one of
    second moments by its shape, type or count, or its name gives no layer.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if "mom2.mom2.npy" not in names and "mom2" not in path.name:
            return None
        for name in ("mom2.count", "mom2.mom2"):
            if f"{name}.npy" not in names:
                raise ArtifactError(f"{path} has no array {name}.")
        with _open_matrix(path, archive) as (_, dtype, shape):
            _check_matrix(path, dtype, shape)
        count = _scalar(path, archive, "mom2.count")
        note = _scalar(path, archive, "kscli.note") if "kscli.note.npy" in names else ""
    if not isinstance(count, int):
        raise ArtifactError(f"{path}: mom2.count is {count!r}, where an integer is needed.")
    if count < 1:
        raise NumericsError(f"{path}: mom2.count is {count}, so that there is no mean.")
    layer, hook = _layer_and_hook(path)
    return StatisticsFile(path, layer, hook, count, shape[0], str(note))


def read_second_moment(file: StatisticsFile, out: NDArray[np.float32]) -> None:
    """Read the file's C, its sum divided by its count, into `out` (d_m, d_m), symmetric.

    Raises NumericsError when an entry is NaN or infinite, a diagonal entry is negative, or the
    matrix is not symmetric to within a float32 sum's rounding, and ArtifactError when the file
    is damaged.
    """
    for start, stop, rows in _rows_of(file):
        # A sum that is stored column by column is read as its transpose, which is itself.
        with np.errstate(over="ignore", invalid="ignore"):
            np.divide(rows, file.count, out=out[start:stop], dtype=np.float64, casting="same_kind")
        if not np.isfinite(out[start:stop]).all():
            raise NumericsError(f"{file.path}: mom2.mom2 holds NaN or infinite entries.")
    negative = np.flatnonzero(np.diagonal(out) < 0)
    if len(negative):
        raise NumericsError(
            f"{file.path}: entry ({negative[0]}, {negative[0]}) of mom2.mom2 is negative, which "
            "no sum of squares is."
        )
    _make_symmetric(out, file.path)


def _sums(cov: CovarianceFile, layer: int) -> Iterator[NDArray[np.float32]]:
    """The rows of C times the count, block by block, in float32."""
    d_m, count = cov.about.d_m, cov.count
    for start, stop in _blocks(d_m, d_m * 4):
        rows = np.empty((stop - start, d_m), dtype=np.float32)
        cov.read_rows(layer, start, rows)
        with np.errstate(over="ignore"):
            np.multiply(rows, count, out=rows, dtype=np.float64, casting="same_kind")
        if not np.isfinite(rows).all():
            raise NumericsError(
                f"layer {layer} of {cov.path}: the sum over {count:,} tokens is not finite in "
                "float32, in which the editors keep it."
            )
        yield rows


def _write_statistics(
    path: Path, cov: CovarianceFile, layer: int, note: str | None, force: bool
) -> None:
    scalars: dict[str, ArrayLike] = {
        "mom2.constructor": CONSTRUCTOR,
        "mom2.count": np.int64(cov.count),
        "sample_size": np.int64(SAMPLE_SIZE),
    }
    if note is not None:
        scalars["kscli.note"] = note
    with (
        replace_file(path, force=force) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, value in scalars.items():
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, np.asarray(value), allow_pickle=False)
        with archive.open("mom2.mom2.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": 2 * (cov.about.d_m,)}
            npy.write_array_header_1_0(member, header)
            for rows in _sums(cov, layer):
                member.write(rows.astype("<f4", copy=False).data)


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


def _check_together(files: Sequence[StatisticsFile], model: str) -> None:
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


def _about(files: Sequence[StatisticsFile], model: str, note: str) -> CovarianceAbout:
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
    parts[numbers[0]] = "{}"
    return layer, ".".join(parts)


def _check_matrix(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise NumericsError(f"{path}: mom2.mom2 is of shape {shape}, not a square matrix.")
    if dtype.kind != "f" or dtype.itemsize not in (4, 8):
        raise NumericsError(f"{path}: mom2.mom2 is {dtype}, where float32 or float64 is needed.")


def _make_symmetric(C: NDArray[np.float32], path: Path) -> None:
    """Replace C by (C + C^T) / 2 in place; NumericsError when the two are far apart."""
    scale = np.sqrt(np.diagonal(C).astype(np.float64))
    spans = [slice(start, start + BLOCK) for start in range(0, len(C), BLOCK)]
    for index, rows in enumerate(spans):
        for columns in spans[: index + 1]:
            lower = C[rows, columns].astype(np.float64)
            upper = C[columns, rows].T.astype(np.float64)
            apart = np.abs(lower - upper) > SYMMETRIC * scale[rows, None] * scale[columns]
            if apart.any():
                i, j = np.argwhere(apart)[0]
                raise NumericsError(
                    f"{path}: mom2.mom2 is not symmetric: entries ({rows.start + i}, "
                    f"{columns.start + j}) and ({columns.start + j}, {rows.start + i}) differ by "
                    "more than rounding."
                )
            mean = (lower + upper) / 2
            C[rows, columns] = mean
            C[columns, rows] = mean.T


def _blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _rows_of(file: StatisticsFile) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """The matrix as (start, stop, rows) in blocks."""
    with (
        _reading(file.path),
        zipfile.ZipFile(file.path) as archive,
        _open_matrix(file.path, archive) as (member, dtype, shape),
    ):
        if shape != (file.d_m, file.d_m):
            raise ArtifactError(f"{file.path} changed while it was read.")
        row_bytes = shape[1] * dtype.itemsize
        for start, stop in _blocks(shape[0], row_bytes):
            block = np.frombuffer(_exactly(member, (stop - start) * row_bytes), dtype)
            yield start, stop, block.reshape(stop - start, shape[1])
        # The checksum is compared where the member ends.
        member.read()


@contextmanager
def _open_matrix(
    path: Path, archive: zipfile.ZipFile
) -> Iterator[tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]]:
    """The member `mom2.mom2`, open after its header, with its type and shape."""
    with archive.open("mom2.mom2.npy") as member:
        dtype, shape = _header(path, member)
        held = archive.getinfo("mom2.mom2.npy").file_size - member.tell()
        if held != dtype.itemsize * int(np.prod(shape, dtype=object)):
            raise ValueError("the matrix is longer or shorter than its header says")
        yield member, dtype, shape


def _header(path: Path, member: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    version = npy.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(member)
    else:
        raise ValueError(f"an array of .npy version {version}")
    if dtype.hasobject:
        raise ArtifactError(f"{path} holds pickled objects, which are not read.")
    return dtype, shape


def _scalar(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(f"{name}.npy") as member:
        dtype, shape = _header(path, member)
        if np.prod(shape, dtype=object) != 1:
            raise ArtifactError(f"{path}: {name} is of shape {shape}, where one value is needed.")
        return np.frombuffer(_exactly(member, dtype.itemsize), dtype)[0].item()


def _exactly(member: IO[bytes], length: int) -> bytes:
    data = member.read(length)
    if len(data) != length:
        raise EOFError
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a file that is no sound .npz raises into one sentence."""
    try:
        yield
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
