"""Inputs that hypothesis makes up, given to everything that reads a file.

A reader must give a result or raise a `KscliError`. Each runs in a process of its own, so that one
that crashes ends nothing else.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from artifact_kit import changed
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from sandbox import Artifacts, Tally

from kscli.errors import KscliError

Read = Callable[[Path], object]
Reader = tuple[str, Read, "st.SearchStrategy[Any]"]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["{}", "unknown", "-1", "1e999", "../../x", "\x1b[31m", "\ud800", "=1+1"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = ("prompt", "subject", "target", "relation", "case_id", "requested_rewrite", "digest")
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"}


def mutated(good: bytes) -> st.SearchStrategy[Callable[[], bytes]]:
    """What makes sound bytes with a few places replaced or left out, or without their end.

    hypothesis keeps all that a strategy gives, so that 10,000 copies of a file would fill memory.
    """
    place = st.integers(0, len(good))
    edit = st.tuples(place, st.integers(0, 8), st.binary(max_size=8))

    def change(edits: list[tuple[int, int, bytes]], end: int | None) -> bytes:
        data = bytearray(good)
        for at, length, new in edits:
            data[at : at + length] = new
        return bytes(data if end is None else data[:end])

    return st.builds(partial, st.just(change), st.lists(edit, max_size=6), st.none() | place)


RECORDS = st.lists(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)
    | st.builds(lambda more: {**FACT, **more}, st.dictionaries(st.sampled_from(FIELDS), JSON))
    | JSON,
    max_size=4,
)


def _dumped(form: str) -> Callable[[Any], bytes]:
    def dump(records: list[Any]) -> bytes:
        if form == ".json":
            text = json.dumps(records)
        elif form == ".jsonl":
            text = "".join(json.dumps(record) + "\n" for record in records)
        else:
            text = f"{','.join(FIELDS)}\n" + "".join(f"{json.dumps(r)},\n" for r in records)
        return text.encode("utf-8", "surrogatepass")

    return dump


def text_readers(_: Artifacts) -> list[Reader]:
    """What reads text: facts in every format, corpora, selections of layers."""
    from kscli.errors import CorpusError
    from kscli.facts import FORMATS, read_facts
    from kscli.layers import select_layers
    from kscli.records import RecordFile

    def bytes_of(form: str) -> st.SearchStrategy[Any]:
        good = _dumped(form)([FACT] * 3)
        texts = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
        return RECORDS.map(_dumped(form)) | mutated(good) | texts | st.binary(max_size=100)

    forms = [form for form, how in FORMATS.items() if how.fields and how.compressible]
    found: list[Reader] = [(f"facts{form}", read_facts, bytes_of(form)) for form in forms]
    for form in (".txt", ".jsonl", ".csv"):
        found.append(
            (
                f"corpus{form}",
                lambda path: list(RecordFile(path, CorpusError).records()),
                bytes_of(form),
            )
        )
    layers = st.text(alphabet="0123456789-, all", max_size=20) | st.text(max_size=20)
    found.append(
        (
            "layers.txt",
            lambda path: select_layers(path.read_bytes().decode(), range(12), "model"),
            layers.map(lambda text: text.encode("utf-8", "ignore")),
        )
    )
    return found


def config_reader(_: Artifacts) -> Reader:
    """What compares a model's configuration with the size of its weights."""
    from kscli.models.declared import require_possible

    def possible(path: Path) -> None:
        weights = path.with_name("w.bin")
        weights.write_bytes(bytes(1000))
        require_possible(path.parent, "model")

    good = json.dumps({"n_layer": 4, "n_embd": 128, "text_config": {"hidden_size": 7}}).encode()
    configs = st.dictionaries(st.sampled_from(["n_layer", "hidden_size", "x"]), JSON).map(
        lambda held: json.dumps(held).encode()
    )
    return "config.json", possible, mutated(good) | configs


def binary_readers(artifacts: Artifacts) -> list[Reader]:
    """What reads bytes: artifacts, checkpoints, .npz files, weights, compressed files, Parquet."""
    import zstandard

    from kscli.errors import CorpusError
    from kscli.models.fingerprint import tensor_spans
    from kscli.records import RecordFile
    from kscli.second_moment.checkpoints import Checkpoints
    from kscli.second_moment.interchange import find_statistics, read_second_moment

    def checkpoint(path: Path) -> None:
        found = Checkpoints(path.parent, {}).latest()
        if found:
            [found.sums(layer) for layer in found.layers]

    def npz(path: Path) -> None:
        for file in find_statistics(path, "tiny"):
            read_second_moment(file)

    def records(path: Path) -> None:
        list(RecordFile(path, CorpusError).records())

    C = np.eye(6, dtype=np.float32)
    archive, header = io.BytesIO(), b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    arrays = {"mom2.mom2": C, "mom2.count": np.int64(9), "kscli.note": "x"}
    np.savez(archive, **arrays)  # type: ignore[arg-type]
    lines = b'{"text": "one"}\n' * 3
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    found: list[Reader] = [
        ("h.3.mlp_float32_mom2_9.npz", npz, mutated(archive.getvalue())),
        ("w.safetensors", tensor_spans, mutated(weights)),
        ("c.jsonl.gz", records, mutated(gzip.compress(lines))),
        ("c.jsonl.xz", records, mutated(lzma.compress(lines))),
        ("c.jsonl.zst", records, mutated(zstandard.compress(lines))),
        ("c.parquet", records, mutated(_parquet())),
        ("state-000000.h5", checkpoint, mutated(artifacts.path("checkpoint").read_bytes())),
    ]
    for kind in ("cov", "keys", "pmatrix", "stats", "edits"):
        good = artifacts.path(kind).read_bytes()
        found.append((f"{kind}.h5", _read_artifact, mutated(good)))
        # Files whose seal is right, so that what it declares is what is read.
        found.append((f"sealed-{kind}.h5", _read_artifact, _sealed(artifacts.path(kind))))
    return found


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), out)
    return out.getvalue()


def _read_artifact(path: Path) -> None:
    """Read all of an artifact, as its commands do."""
    from kscli.analysis.stats_file import StatisticsFile
    from kscli.artifacts import Artifact, CovarianceFile, FactsFile, KeysFile, PMatrixFile
    from kscli.editing.edit_arrays import read_arrays
    from kscli.editing.edits_file import EditsFile

    with Artifact(path) as artifact:
        artifact.datasets()
        kind = artifact.kind
    readers = {"cov": CovarianceFile, "keys": KeysFile, "pmatrix": PMatrixFile}
    readers |= {"stats": StatisticsFile, "edits": EditsFile}
    with readers[kind](path) as file:
        if isinstance(file, FactsFile):
            _ = file.facts, file.token_id, file.position
        if isinstance(file, CovarianceFile):
            _ = file.count, [file.second_moment(layer) for layer in file.layers]
        if isinstance(file, KeysFile):
            _ = [file.keys_of(layer) for layer in file.layers]
        if isinstance(file, PMatrixFile):
            for layer in file.layers:
                _ = file.matrix("P", layer), file.leverage(layer)
        if isinstance(file, StatisticsFile):
            file.statistics()
        if isinstance(file, EditsFile):
            _ = file.log(), file.objects(), read_arrays(file)


def _sealed(path: Path) -> st.SearchStrategy[Callable[[], bytes]]:
    """What makes files whose attributes and arrays make no sense, under a seal that is right."""
    whole = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "a.h5"
        copy.write_bytes(whole)
        with changed(copy) as contents:
            attributes, arrays = sorted(contents.attrs), sorted(contents.arrays)
    array = st.sampled_from(arrays)
    number = st.sampled_from(
        [0, -1, 1, 2, 9999, 2**62, -(2**63), float("nan"), float("inf"), 1e300]
    )
    change = st.one_of(
        st.tuples(st.just("attribute"), st.sampled_from(attributes), JSON),
        st.tuples(st.just("fill"), array, number),
        st.tuples(st.just("entry"), array, number),
        st.tuples(st.just("shape"), array, st.lists(st.integers(0, 3), max_size=4)),
        st.tuples(st.just("lacks"), array, st.none()),
        st.tuples(st.just("text"), array, st.text(max_size=5)),
    )

    def make(changes: list[tuple[str, str, Any]]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "a.h5"
            copy.write_bytes(whole)
            with changed(copy) as contents:
                for what, name, value in changes:
                    _change(contents, what, name, value)
            return copy.read_bytes()

    return st.builds(partial, st.just(make), st.lists(change, min_size=1, max_size=2))


def _change(contents: Any, what: str, name: str, value: Any) -> None:
    if what == "attribute":
        contents.attrs[name] = value
    elif name in contents:
        held = contents[name]
        if what == "lacks":
            del contents[name]
        elif what == "shape":
            contents[name] = np.zeros(value, held.dtype if held.dtype.kind != "O" else "S3")
        elif what == "text":
            encodable = value.encode("utf-8", "ignore").decode()
            contents[name] = np.full(held.shape, encodable, dtype=object)
        elif held.size and held.dtype.kind != "O":
            with np.errstate(all="ignore"):
                entry = np.array(value).astype(held.dtype)
            at = 0 if what == "entry" else slice(None)
            held.reshape(-1)[at] = entry


def text(artifacts: Artifacts, count: int, _: Path) -> Iterator[Tally]:
    """Made-up inputs for every reader of text."""
    return (_one(*reader, count) for reader in text_readers(artifacts))


def config(artifacts: Artifacts, count: int, _: Path) -> Iterator[Tally]:
    """Made-up configurations of models."""
    yield _one(*config_reader(artifacts), count)


def binary(artifacts: Artifacts, count: int, _: Path) -> Iterator[Tally]:
    """Made-up inputs for every reader of bytes."""
    return (_one(*reader, count) for reader in binary_readers(artifacts))


def _one(name: str, read: Read, inputs: st.SearchStrategy[Any], count: int) -> Tally:
    """Run a reader in a fork, which writes how many inputs it was given and what went wrong."""
    tally = Tally(f"made-up {name}")
    with tempfile.NamedTemporaryFile() as report:
        pid = os.fork()
        if pid == 0:
            try:
                _examine(name, read, inputs, count, Path(report.name))
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tried, _, wrong = Path(report.name).read_text("utf-8", "replace").partition("\n")
    if wrong:
        tally.add("traceback", wrong)
    elif status != 0:
        tally.add("crashed", f"exit {status}")
    tally.add("survived", count=int(tried or 0))
    return tally


def _examine(
    name: str, read: Read, inputs: st.SearchStrategy[Any], count: int, report: Path
) -> None:
    tried = 0

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name

        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(inputs)
        def one(made: bytes | Callable[[], bytes]) -> None:
            nonlocal tried
            # A new file: to empty one and fill it again makes ext4 wait for the disk.
            path.unlink(missing_ok=True)
            path.write_bytes(made() if callable(made) else made)
            try:
                read(path)
            except KscliError as error:
                lines = str(error).splitlines()
                if not 1 <= len(lines) <= 2:
                    raise ValueError(f"the error is no sentence: {error}") from error
            tried += 1

        wrong = ""
        try:
            one()
        except BaseException:
            wrong = traceback.format_exc()[-1500:]
    report.write_text(f"{tried}\n{wrong}", "utf-8", "replace")
