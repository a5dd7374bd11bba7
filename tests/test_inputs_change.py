"""Inputs that are no files, that change while they are read, or that would be overwritten."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from artifact_kit import FACTS, write_toy
from cli_kit import kscli, kscli_process, one_sentence

from kscli.content import BLOCK, read_content
from kscli.corpus import CorpusSpec, open_corpus
from kscli.errors import CorpusError, KscliError, ModelError
from kscli.facts import fact_record, write_records
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions, locate_model
from kscli.second_moment.interchange import ExportOptions, export_covariance
from kscli.tiny import MODEL_DIR

LINES = [json.dumps({"text": f"document {n} " + "of some words " * 300}) for n in range(600)]
TEXT = "\n".join(LINES).encode() + b"\n"


def as_parquet(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    rows = [json.loads(line)["text"] + line[:0] for line in data.decode().splitlines()]
    noise = np.random.default_rng(0).bytes(3000)
    texts = [f"{text} {noise.hex()}{n}" for n, text in enumerate(rows)]
    pq.write_table(pa.table({"text": texts}), sink, compression=None, row_group_size=50)
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "c.jsonl": bytes,
    "c.jsonl.gz": lambda data: gzip.compress(data, 0),
    "c.parquet": as_parquet,
}
CHANGES: dict[str, Callable[[Path, bytes], object]] = {
    "grown": lambda path, data: path.write_bytes(data + data[:5000]),
    "cut": lambda path, data: os.truncate(path, len(data) - 10),
    "emptied": lambda path, _: os.truncate(path, 0),
    "rewritten": lambda path, data: path.write_bytes(data[:-900] + data[-900:].swapcase()),
    "replaced": lambda path, data: replace(path, data[:-900] + data[-900:].swapcase()),
    "same size and time": lambda path, data: in_disguise(path, data[:-900] + bytes(900)),
}


def replace(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


def in_disguise(path: Path, data: bytes) -> None:
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_corpus_that_changes_gives_no_other_text(name: str, change: str, tmp_path: Path) -> None:
    """Before it is read, and while it is: the text of its identity, or one sentence."""
    path = tmp_path / name
    data = KINDS[name](TEXT)
    assert len(data) > 4 * BLOCK
    path.write_bytes(data)
    original = list(open_corpus(CorpusSpec(str(path))).documents())
    for read in (0, 5):
        path.write_bytes(data)
        corpus = open_corpus(CorpusSpec(str(path)))
        documents = corpus.documents()
        found = [next(documents) for _ in range(read)]
        CHANGES[change](path, data)
        refused = ""
        try:
            found += documents
        except CorpusError as error:
            refused = str(error)
        assert found == original[: len(found)]
        if len(found) == len(original):
            # A file that was replaced is still there for who has it open, and what is behind the
            # end of a Parquet file is not looked at.
            assert read
        else:
            assert "changed while it was read" in refused


def test_a_corpus_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(TEXT)
    corpus = open_corpus(CorpusSpec(str(tmp_path)))
    documents = corpus.documents()
    next(documents)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"b\.jsonl cannot be read"):
        list(documents)


def test_a_file_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK):
        data = np.random.default_rng(size).bytes(size)
        path.write_bytes(data)
        content = read_content(path)
        assert content.size == size
        with content.open(CorpusError) as file:
            assert file.read() == data
            for at in (0, size // 2, max(0, size - 3), size):
                file.seek(at)
                assert file.read(5) == data[at : at + 5]
        path.write_bytes(data + b"x")
        with content.open(CorpusError) as file, pytest.raises(CorpusError):
            file.read()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_changes_before_it_is_loaded_is_refused(file: str, model: Path) -> None:
    options = ModelOptions(str(model), device="cpu", dtype="float32")
    located = locate_model(options)
    data = bytearray((model / file).read_bytes())
    at = len(data) - 100 if file == "model.safetensors" else data.rindex(b"}")
    data[at:at] = b"" if file == "model.safetensors" else b"  "
    data[at] ^= 1 if file == "model.safetensors" else 0
    replace(model / file, bytes(data))
    with pytest.raises(ModelError, match=f"{file} changed while it was read"):
        load_model(options, located=located)


def test_a_loaded_model_does_not_change_with_its_files(model: Path) -> None:
    loaded = load_model(ModelOptions(str(model), device="cpu", dtype="float32"))
    before = {n: p.clone() for n, p in loaded.decoder.model.named_parameters()}
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\1" * (path.stat().st_size // 2))
    os.truncate(path, 10)
    for name, parameter in loaded.decoder.model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    """A folder with artifacts of `toy`, facts, a corpus and statistics of an editor."""
    write_toy(tmp_path)
    write_records(tmp_path / "facts.jsonl", map(fact_record, FACTS), force=True)
    (tmp_path / "text.txt").write_text("the river of a city in the north of a land. " * 50)
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    export_covariance(tmp_path / "toy/cov.h5", tmp_path / "st", ExportOptions("rome"))
    return tmp_path


def test_no_stage_overwrites_what_it_reads(there: Path) -> None:
    toy, npz = there / "toy", next(there.glob("st/**/*.npz"))
    own = there / "model" / "model.safetensors"
    for inputs, command in (
        (["toy/cov.h5", "toy/keys.h5"], ["pmatrix", "-m", "toy"]),
        (["toy/pmatrix.h5"], ["stats", "-m", "toy", "--repeats", 100]),
        (["toy/pmatrix.h5", "toy/cov.h5"], ["report", "-m", "toy"]),
        (["facts.jsonl", own], ["extract", "-m", there / "model", "--facts", "facts.jsonl"]),
        (["facts.jsonl"], ["facts", "check", "-m", "tiny", "--facts", "facts.jsonl"]),
        (["text.txt", own], ["cache-cov", "-m", there / "model", "--corpus", "text.txt"]),
        ([npz], ["import-cov", npz, "-m", "toy"]),
        (["toy/cov.h5"], ["merge-cov", "toy/cov.h5"]),
    ):
        for each in inputs:
            path = there / each
            before = path.read_bytes()
            link = there / f"link{path.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(path)
            for name in (path, link):
                place = {"KSCLI_DIR": str(there)}
                done = kscli_process(*map(str, command), "-o", name, "--force", cwd=there, **place)
                assert done.returncode in (1, 2), (command, done.stderr)
                assert "is not overwritten" in one_sentence(done.stderr)
                assert path.read_bytes() == before
    assert toy.is_dir()


def test_an_export_that_was_cut_short_goes_on(there: Path) -> None:
    shutil.rmtree(there / "st")
    options = ("export-cov", "-m", "toy", "--dir", there, "--for", "rome", "-o", there / "st")
    assert kscli(*options, "--layers", 1).exit_code == 0
    (first,) = there.glob("st/**/*.npz")
    written = first.stat().st_mtime_ns, first.stat().st_ino
    whole = kscli(*options)
    assert whole.exit_code == 0, whole.stderr
    assert "1 of 3 files were there already" in whole.stderr
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == written
    assert len(list(there.glob("st/**/*.npz"))) == 3
    again = kscli(*options)
    assert again.exit_code == 0
    # Another's file, and what is no such file, are in the way.
    assert "exists; add --force" in kscli(*options, "--note", "other text").stderr
    first.write_bytes(first.read_bytes()[:-1])
    assert "exists; add --force" in kscli(*options).stderr


def test_a_locked_file_is_not_made_again(there: Path) -> None:
    """It is called locked, by the stage that reads it and by the one that would replace it."""
    toy = there / "toy"
    with (toy / "pmatrix.h5").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = (toy / "pmatrix.h5").read_bytes()
        for command in (["topk", "-m", "toy"], ["pmatrix", "-m", "toy", "--ridge", "1e-3"]):
            done = kscli_process(*command, "--dir", there)
            assert done.returncode == 1
            assert "open for writing in another program" in one_sentence(done.stderr)
        assert (toy / "pmatrix.h5").read_bytes() == before


def special_files(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Something else than a file at each of some paths, and what it is called."""
    for word in ("FIFO", "socket", "folder"):
        path = folder / word / name
        path.parent.mkdir()
        if word == "FIFO":
            os.mkfifo(path)
        elif word == "socket":
            server = socket.socket(socket.AF_UNIX)
            os.chdir(path.parent)  # a socket's path may not be long
            server.bind(path.name)
            server.close()
        else:
            path.mkdir()
        yield word, path


def test_what_is_no_file_is_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word, path in special_files(tmp_path, "x.jsonl"):
        errors = [kscli("extract", "-m", "tiny", "--facts", path)]
        errors.append(kscli("facts", "check", "-m", "tiny", "-o", path, "--force"))
        errors.append(kscli("show", path.rename(path.with_suffix(".h5"))))
        path.with_suffix(".h5").rename(path)
        if word != "folder":
            errors.append(kscli("cache-cov", "-m", "tiny", "--corpus", path))
            errors.append(kscli("cache-cov", "-m", "tiny", "--corpus", path.parent))
            errors.append(kscli("import-cov", path, "-m", "tiny"))
        for done in errors:
            assert done.exit_code in (1, 2)
            raised = done.exception
            said = str(raised) if isinstance(raised, KscliError) else done.stderr
            assert f"is a {word}" in said, said
