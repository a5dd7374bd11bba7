from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from kscli.corpus import Corpus, CorpusSpec, open_corpus
from kscli.errors import CorpusError
from kscli.records import COMPRESSIONS, FORMATS

DOCUMENTS = ["The first document.", "", "Zweites: äöü, 東京, 🙂", ' "quoted", with\nlines ', "\t"]


def as_jsonl(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: d}) + "\n" for d in documents).encode()


def as_json(documents: list[str], field: str = "text") -> bytes:
    return json.dumps([{field: d} for d in documents], ensure_ascii=False, indent=1).encode()


def as_csv(documents: list[str], field: str = "text", delimiter: str = ",") -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(["id", field])
    writer.writerows(enumerate(documents))
    return buffer.getvalue().encode()


def as_parquet(documents: list[str], field: str = "text") -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"id": range(len(documents)), field: documents})
    pq.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


def as_arrow(documents: list[str], field: str = "text") -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"id": range(len(documents)), field: documents})
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return buffer.getvalue()


WRITERS: dict[str, Callable[..., bytes]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": partial(as_csv, delimiter="\t"),
    ".parquet": as_parquet,
    ".arrow": as_arrow,
}
COMPRESSED_INSIDE = (".parquet", ".arrow")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def test_every_format_and_compression_is_tried() -> None:
    named = {kind for kind, form in FORMATS.items() if form.by_name}
    assert named == {".txt", *WRITERS}, "a format needs a writer in WRITERS"
    assert COMPRESSIONS.keys() | {""} == COMPRESSORS.keys(), "and a compression in COMPRESSORS"


def opened(path: Path, text_field: str | None = None) -> Corpus:
    return open_corpus(CorpusSpec(str(path), text_field))


def read(path: Path, text_field: str | None = None) -> list[str]:
    return list(opened(path, text_field).documents())


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CorpusError) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------- kinds of files


@pytest.mark.parametrize(
    ("kind", "compression"),
    [(k, c) for k in WRITERS for c in COMPRESSORS if not (k in COMPRESSED_INSIDE and c)],
)
def test_every_kind_gives_the_documents_unchanged(
    tmp_path: Path, kind: str, compression: str
) -> None:
    data = COMPRESSORS[compression](WRITERS[kind](DOCUMENTS))
    corpus = opened(write(tmp_path / f"my.corpus{kind}{compression}", data))
    assert list(corpus.documents()) == DOCUMENTS
    assert list(corpus.documents()) == DOCUMENTS  # a second call starts anew


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    data = COMPRESSORS[compression]("\ufeffone\r\n\r\ntwo ä\n".encode())
    assert read(write(tmp_path / f"a.txt{compression}", data)) == ["one\n\ntwo ä\n"]


@pytest.mark.parametrize("kind", WRITERS)
def test_text_field_names_another_field(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a{kind}", WRITERS[kind](DOCUMENTS, "body"))
    assert read(path, "body") == DOCUMENTS
    message = refusal(lambda: read(path))
    assert "no field 'text'" in message
    assert "'body'" in message
    assert "--text-field" in message
    assert str(path) in message


def test_jsonl_with_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\\r\\n"}'
    assert read(write(tmp_path / "a.jsonl", data)) == ["a", "b\r\n"]


def test_json_may_be_a_list_of_strings(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '\ufeff["a", "b"]')) == ["a", "b"]


def test_csv_takes_large_fields_and_windows_line_ends(tmp_path: Path) -> None:
    large = "a long document, " * 20_000
    data = f'\ufefftext,n\r\n"{large}",1\r\n"two\nlines",2\r\n'
    assert read(write(tmp_path / "a.csv", data)) == [large, "two\nlines"]


def test_a_document_of_ten_million_characters(tmp_path: Path) -> None:
    document = "0123456789" * 1_000_000
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(as_jsonl([document]), 1))) == [
        document
    ]


def test_zstandard_files_of_many_frames_and_long_windows(tmp_path: Path) -> None:
    one, two = as_jsonl(["a" * 300_000]), as_jsonl(["b"])
    long_window = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=long_window).compressobj()
    frames = stream.compress(one) + stream.flush() + zstandard.ZstdCompressor().compress(two)
    assert read(write(tmp_path / "a.jsonl.zst", frames)) == ["a" * 300_000, "b"]


def test_extensions_in_capitals(tmp_path: Path) -> None:
    assert read(write(tmp_path / "A.JSONL.GZ", gzip.compress(as_jsonl(["a"])))) == ["a"]


# ---------------------------------------------------------------- folders


def test_a_folder_is_its_files_by_relative_path(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.jsonl", as_jsonl(["a/z 1", "a/z 2"]))
    write(tmp_path / "a" / "deep" / "y.csv.gz", gzip.compress(as_csv(["a/deep/y"])))
    write(tmp_path / "c.parquet", as_parquet(["c"]))
    write(tmp_path / "README.md", "no corpus file")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / ".git" / "hidden.txt", "hidden")
    assert read(tmp_path) == ["a/deep/y", "a/z 1", "a/z 2", "b", "c"]


def test_a_folder_without_corpus_files(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "no corpus file")
    message = refusal(lambda: opened(tmp_path))
    assert str(tmp_path) in message
    assert ".jsonl" in message
    assert ".parquet" in message


def test_one_file_with_text_is_enough_for_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", " ")
    write(tmp_path / "b.txt", "b")
    assert read(tmp_path) == [" ", "b"]


# ---------------------------------------------------------------- standard input


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes | str) -> Corpus:
    raw = io.BytesIO(data.encode() if isinstance(data, str) else data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    return open_corpus(CorpusSpec("-"))


def test_standard_input_of_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = stdin(monkeypatch, b"\xef\xbb\xbf\n" + as_jsonl(DOCUMENTS))
    assert list(corpus.documents()) == DOCUMENTS


@pytest.mark.parametrize("first", ["plain", "{{Infobox}}", "[[Link]]", '"quoted"', "{| table"])
def test_standard_input_of_plain_text(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    corpus = stdin(monkeypatch, f"\n{first}\r\n\n  indented ä\n{{}}")
    assert list(corpus.documents()) == [first, "  indented ä", "{}"]


@pytest.mark.parametrize("text", ['{"text": "a"', '{\n "text": "a"\n}', '[\n "a"\n]'])
def test_broken_or_spread_out_json_on_standard_input_is_not_taken_for_text(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    message = refusal(lambda: list(stdin(monkeypatch, text).documents()))
    assert "standard input, line 1" in message
    assert "JSON" in message


def test_standard_input_is_read_once_and_has_an_identity_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = stdin(monkeypatch, "a\n")
    assert corpus.identity == corpus.identity
    assert corpus.identity != stdin(monkeypatch, "a\n").identity
    assert list(corpus.documents()) == ["a"]
    assert "only once" in refusal(corpus.documents)


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in refusal(open_corpus(CorpusSpec("-")).documents)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["", "no/such/file.jsonl", "nosuch", "with\0null"])
def test_no_such_file(name: str) -> None:
    message = refusal(lambda: open_corpus(CorpusSpec(name)))
    assert f"'{name}'" in message
    assert "wikipedia" in message


def test_a_name_like_a_hub_data_set_is_told_how_to_write_it() -> None:
    assert "hf:owner/name" in refusal(lambda: open_corpus(CorpusSpec("owner/name")))


@pytest.mark.parametrize("name", ["a.md", "a", "a.gz", "a.parquet.gz", "a.jsonl.lz4"])
def test_unknown_kind(tmp_path: Path, name: str) -> None:
    message = refusal(lambda: opened(write(tmp_path / name, "a")))
    assert name in message
    assert all(kind in message for kind in [*FORMATS, *COMPRESSIONS])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b""),
        ("a.txt", b" \n\t\xc2\xa0"),
        ("a.txt.gz", b""),
        ("a.jsonl", b"\n\n"),
        ("a.jsonl", b'{"text": " "}\n{"text": ""}\n'),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"text\n"),
        ("a.parquet", as_parquet([])),
        ("a.arrow", as_arrow([])),
    ],
)
def test_an_empty_corpus_is_refused_when_its_end_is_reached(
    tmp_path: Path, name: str, data: bytes
) -> None:
    path = write(tmp_path / name, data)
    message = refusal(lambda: read(path))
    assert str(path) in message
    assert "empty" in message


@pytest.mark.parametrize(
    ("name", "data", "place"),
    [
        ("a.txt", b"abc\xff", "offset 3"),
        ("a.txt", "ä".encode("utf-16"), "0xff at offset 0"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "line 2"),
        ("a.json", b'["\xe4"]', "offset 2"),
        ("a.csv", b"text\na\n\xe4\n", "line 3"),
    ],
)
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_text_that_is_not_utf8(
    tmp_path: Path, name: str, data: bytes, place: str, compression: str
) -> None:
    path = write(tmp_path / f"{name}{compression}", COMPRESSORS[compression](data))
    message = refusal(lambda: read(path))
    assert str(path) in message
    assert "not UTF-8" in message
    assert place in message


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff"]).view(pa.utf8())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "not UTF-8" in refusal(lambda: read(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', 3),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, 2),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", 1),
        ("a.json", '[{"text": "a"},\n {"text": "b"}', 2),
        ("a.json", '{"text": "a"}\n{"text": "b"', 2),
    ],
)
def test_invalid_json(tmp_path: Path, name: str, data: str, line: int) -> None:
    path = write(tmp_path / name, data)
    message = refusal(lambda: read(path))
    assert message.startswith(f"{path}, line {line}: ")
    assert "JSON" in message


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_lines_of_json_under_the_name_of_a_list(tmp_path: Path, name: str) -> None:
    """As C4, Dolma and `Dataset.to_json` have them."""
    data = b'{"text": "a"}\n\n{"text": "b"}\n'
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert read(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "data", "place", "kind"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}', "line 2", "int"),
        ("a.jsonl", b"[1]", "line 1", "list"),
        ("a.json", b'[{"text": "a"}, {"text": ["b"]}]', "record 2", "list"),
    ],
)
def test_text_that_is_no_string(
    tmp_path: Path, name: str, data: bytes, place: str, kind: str
) -> None:
    path = write(tmp_path / name, data)
    message = refusal(lambda: read(path))
    assert message.startswith(f"{path}, {place}: ")
    assert f"not a string but {kind}" in message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n{"text": "b"}'),
        ("a.csv", b"id,text\n1,a\n2\n3,b\n"),
    ],
)
def test_a_null_is_a_document_without_text(tmp_path: Path, name: str, data: bytes) -> None:
    assert read(write(tmp_path / name, data)) == ["a", "", "b"]


def test_nothing_but_nulls_is_an_empty_corpus(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "a.parquet")
    assert "is empty" in refusal(lambda: read(tmp_path / "a.parquet"))


@pytest.mark.parametrize("values", [[1], [b"a"]])
def test_a_parquet_column_that_is_no_text(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(pa.table({"text": pa.array(values)}), tmp_path / "a.parquet")
    message = refusal(lambda: read(tmp_path / "a.parquet"))
    assert "row 1" in message
    assert "not a string" in message


def test_half_of_a_surrogate_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude42"}\n{"text": "\\ud83d"}\n')
    documents = opened(path).documents()
    assert next(documents) == "🙂"
    assert "line 2" in refusal(lambda: next(documents))


def test_csv_of_old_macs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\r1,"a\rb"\r2,c\r')
    assert read(path) == ["a\rb", "c"]


def test_gzip_files_of_many_members_filled_up_with_zeros(tmp_path: Path) -> None:
    one, two = gzip.compress(as_jsonl(["a"])), gzip.compress(as_jsonl(["b"]))
    path = write(tmp_path / "a.jsonl.gz", one + bytes(512) + two + bytes(100_000))
    assert read(path) == ["a", "b"]


def test_csv_with_an_unquoted_comma_or_quote(tmp_path: Path) -> None:
    extra = write(tmp_path / "a.csv", "text\nHello, world\n")
    assert "line 2: more columns" in refusal(lambda: read(extra))
    cut = write(tmp_path / "b.csv", 'text\n"never closed\nb\n')
    assert "not valid CSV" in refusal(lambda: read(cut))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damaged_compressed_files(tmp_path: Path, compression: str) -> None:
    text = as_jsonl([hashlib.sha256(str(n).encode()).hexdigest() for n in range(20_000)])
    whole = COMPRESSORS[compression](text)
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "cut in its first bytes": whole[:3],
        "another kind": text,
        "overwritten": whole[:middle] + bytes(200) + whole[middle + 200 :],
        "with something behind it": whole + b"something",
    }
    for name, data in damaged.items():
        path = write(tmp_path / f"{name}.txt{compression}", data)
        assert refusal(partial(read, path)).startswith(f"{path} is damaged or cut off")


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = as_parquet([hashlib.sha256(str(n).encode()).hexdigest() for n in range(1000)])
    for data in (b"", b"no parquet", whole[:-100], whole[:20] + bytes(400) + whole[420:]):
        path = write(tmp_path / "a.parquet", data)
        assert refusal(partial(read, path)).startswith(f"{path} is damaged or cut off")


def test_a_file_that_disappears(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    corpus = opened(path)
    path.unlink()
    assert str(path) in refusal(lambda: list(corpus.documents()))


def test_a_dangling_link_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert "a.txt cannot be read" in refusal(lambda: opened(tmp_path))


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_nothing_is_read_ahead_of_what_is_asked(tmp_path: Path, compression: str) -> None:
    data = as_jsonl(["a", "b"]) + b"broken\n"
    write(tmp_path / f"1.jsonl{compression}", COMPRESSORS[compression](data))
    write(tmp_path / "2.jsonl", b"\xff")
    documents = opened(tmp_path).documents()
    assert list(islice(documents, 2)) == ["a", "b"]
    assert "line 3" in refusal(lambda: next(documents))


def test_standard_input_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lines() -> Iterator[bytes]:
        for number in range(1_000_000):
            asked.append(number)
            yield b"a\n"

    def fileno() -> int:
        raise OSError("no file behind it")

    fake = types.SimpleNamespace(buffer=lines(), fileno=fileno)
    monkeypatch.setattr(sys, "stdin", fake)
    documents = open_corpus(CorpusSpec("-")).documents()
    assert asked == []
    assert list(islice(documents, 3)) == ["a"] * 3
    assert asked == [0, 1, 2]


# ---------------------------------------------------------------- identity


def folder_of_files(root: Path) -> Path:
    write(root / "a.jsonl", as_jsonl(["a"]))
    write(root / "sub" / "b.txt", "b")
    return root


def test_identity_is_of_the_contents_and_not_of_the_place(tmp_path: Path) -> None:
    first = folder_of_files(tmp_path / "first")
    identity = opened(first).identity
    assert identity.startswith("files:sha256:")
    assert opened(first).identity == identity
    assert opened(Path(shutil.move(first, tmp_path / "elsewhere"))).identity == identity


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write(root / "a.jsonl", as_jsonl(["A"])),
        lambda root: write(root / "c.txt", "c"),
        lambda root: (root / "sub" / "b.txt").rename(root / "sub" / "z.txt"),
        lambda root: (root / "a.jsonl").unlink(),
    ],
)
def test_identity_changes_with_a_byte_a_name_or_a_file(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    root = folder_of_files(tmp_path)
    identity = opened(root).identity
    change(root)
    assert opened(root).identity != identity


def test_identity_tells_the_text_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "title": "b"}\n')
    assert opened(path).identity == opened(path, "text").identity
    assert opened(path).identity != opened(path, "title").identity


def test_identity_follows_every_byte_of_a_large_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x" * (70 << 20))
    before = opened(path).identity
    with path.open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"y")
    assert opened(path).identity != before


# ---------------------------------------------------------------- imports


def test_reading_a_file_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", as_jsonl(["a"]))
    program = (
        "import sys; from kscli.corpus import CorpusSpec, open_corpus;"
        f"list(open_corpus(CorpusSpec({str(path)!r})).documents());"
        "print({'torch', 'datasets', 'huggingface_hub', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert found.stdout.strip() == "set()"


# ---------------------------------------------------------------- tiny


def test_tiny_is_the_embedded_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kscli.tiny.corpus")
    texts = ["a", "b"]
    module.documents = lambda: iter(texts)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kscli.tiny.corpus", module)
    package = pytest.importorskip("kscli.tiny")
    monkeypatch.setattr(package, "corpus", module, raising=False)
    corpus = open_corpus(CorpusSpec("tiny"))
    assert corpus.name == "tiny"
    assert list(corpus.documents()) == texts
    identity = corpus.identity
    assert open_corpus(CorpusSpec("tiny")).identity == identity
    texts.append("c")
    assert open_corpus(CorpusSpec("tiny")).identity != identity
