from __future__ import annotations

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from cli_kit import kscli

from kscli.corpus import Corpus, CorpusSpec, open_corpus
from kscli.errors import CorpusError

TEXTS = [f"Document {number}, of the river and the sea." for number in range(30)]


def opened(name: Path | str, field: str | None = None) -> Corpus:
    return open_corpus(CorpusSpec(str(name), field))


def read(name: Path | str, field: str | None = None) -> list[str]:
    return list(opened(name, field).documents())


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CorpusError) as caught:
        call()
    return str(caught.value)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"id": "1", "title": "t", "text": text}) + "\n" for text in texts)


def parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


# ---------------------------------------------------------------- data sets as they lie on disk


def of_the_hub(root: Path) -> None:
    """As `hf download --repo-type dataset` leaves it."""
    parquet(root / "data" / "train-00000-of-00002.parquet", TEXTS[:20])
    parquet(root / "data" / "train-00001-of-00002.parquet", TEXTS[20:])
    write(root / "README.md", "---\nconfigs: []\n---\n# A data set\n")
    write(root / ".gitattributes", "*.parquet filter=lfs\n")
    write(root / ".cache" / "huggingface" / "download" / "x.jsonl", lines(["hidden"]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset_infos.json", json.dumps({"default": {"features": {"text": {}}}})),
        ("dataset_infos.json", json.dumps({"default": {"features": {"text": {}}}}, indent=2)),
        ("dataset_infos.json", json.dumps({"text": {"features": {"text": {}}}})),
        ("data/croissant.json", json.dumps({"@type": "sc:Dataset", "name": "x"}, indent=1)),
        ("LICENSE.txt", "Apache License"),
        ("LICENSE", "Apache License"),
        ("README.txt", "All about it."),
        ("data/Readme", "{about it}"),
        ("load.py", "import datasets"),
    ],
)
def test_a_folder_of_the_hub_is_its_tables(tmp_path: Path, name: str, text: str) -> None:
    of_the_hub(tmp_path)
    plain = opened(tmp_path)
    write(tmp_path / name, text)
    corpus = opened(tmp_path)
    assert list(corpus.documents()) == TEXTS
    assert corpus.identity == plain.identity
    (note,) = corpus.notes
    assert note.startswith(f"{tmp_path}: left out: ")
    assert name in note
    assert "README.md" in note
    assert "gitattributes" not in note


def test_left_out_files_are_counted_by_reason(tmp_path: Path) -> None:
    of_the_hub(tmp_path)
    for number in range(4):
        write(tmp_path / f"a{number}.pdf", "%PDF")
    write(tmp_path / "dataset_infos.json", "{}")
    assert opened(tmp_path).notes == (
        f"{tmp_path}: left out: 5 files of no known kind (README.md, a0.pdf, a1.pdf, ...); "
        "1 file of one JSON object without the field 'text' (dataset_infos.json).",
    )


def test_nothing_left_out_is_not_mentioned(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines(TEXTS))
    assert opened(tmp_path).notes == ()


def test_a_folder_with_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "LICENSE.txt", "Apache License")
    message = refusal(lambda: opened(tmp_path))
    assert "holds no corpus file" in message
    assert "LICENSE.txt" in message
    assert read(tmp_path / "LICENSE.txt") == ["Apache License"]  # where it is named itself


def test_objects_that_are_documents_are_read(tmp_path: Path) -> None:
    write(tmp_path / "1.json", json.dumps({"text": "a"}, indent=1))
    write(tmp_path / "2.json", json.dumps({"text": None}))
    write(tmp_path / "3.json", json.dumps({"text": "c"}))
    write(tmp_path / "4.json", json.dumps({"title": "d"}))
    assert read(tmp_path) == ["a", "", "c"]
    message = refusal(lambda: read(tmp_path, "body"))  # of none of them
    assert "no field 'body'" in message
    assert "'text'" in message


@pytest.mark.parametrize("shards", [1, 3])
def test_what_save_to_disk_wrote(tmp_path: Path, shards: int) -> None:
    saved = tmp_path / "saved"
    whole = datasets.Dataset.from_dict({"id": range(30), "text": TEXTS})
    whole.save_to_disk(saved, num_shards=shards)
    plain = opened(saved)
    assert list(plain.documents()) == TEXTS
    # `map` and `filter` keep their results beside what they read.
    loaded = datasets.load_from_disk(str(saved))
    loaded.map(lambda row: {"text": row["text"].upper()}, cache_file_name=f"{saved}/cache-1.arrow")
    write(saved / "data-00000-of-00007.arrow", b"of an earlier one")
    corpus = opened(saved)
    assert list(corpus.documents()) == TEXTS
    assert corpus.identity == plain.identity
    assert "2 files of Arrow" in corpus.notes[0]
    assert "cache-1.arrow" in corpus.notes[0]
    (saved / f"data-00000-of-0000{shards}.arrow").unlink()
    assert f"1 of {shards} are missing" in refusal(lambda: opened(saved))


def test_splits_that_save_to_disk_wrote(tmp_path: Path) -> None:
    splits = {
        "train": datasets.Dataset.from_dict({"text": TEXTS[:20]}),
        "test": datasets.Dataset.from_dict({"text": TEXTS[20:]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    corpus = opened(tmp_path / "saved")
    assert list(corpus.documents()) == TEXTS[20:] + TEXTS[:20]
    assert any("the splits test, train are all read" in note for note in corpus.notes)
    one = opened(tmp_path / "saved" / "train")
    assert list(one.documents()) == TEXTS[:20]
    assert not any("the splits" in note for note in one.notes)


def test_a_pattern_names_files(tmp_path: Path) -> None:
    of_the_hub(tmp_path)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ["a test"])
    assert read(tmp_path) == ["a test", *TEXTS]
    assert read(tmp_path / "data" / "train-*") == TEXTS
    assert read(f"{tmp_path}/**/t*.parquet") == ["a test", *TEXTS]
    assert read(f"{tmp_path}/**/*") == ["a test", *TEXTS]
    whole, part = opened(tmp_path / "*" / "train-*"), opened(tmp_path / "*" / "t*-00000-*")
    assert whole.identity != part.identity
    assert "no corpus file" in refusal(lambda: opened(tmp_path / "data" / "valid*"))


def test_the_cache_of_the_hub_is_read_once(tmp_path: Path) -> None:
    """Its snapshots are links to files without extensions."""
    write(tmp_path / "blobs" / "0123abcd", lines(TEXTS))
    write(tmp_path / "refs" / "main", "c0ffee")
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert read(tmp_path) == TEXTS
    assert read(snapshot) == TEXTS


# ---------------------------------------------------------------- links


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "a.jsonl", lines(TEXTS))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "part").symlink_to(tmp_path / "disk")
    assert read(tmp_path / "corpus") == TEXTS


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "b" / "a.jsonl", lines(TEXTS))
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")  # sorts before what it links to
    assert read(tmp_path) == TEXTS
    assert read(tmp_path / "b" / "back") == TEXTS


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines(TEXTS))
    (tmp_path / "part").symlink_to(tmp_path / "not mounted")
    assert "part cannot be read" in refusal(lambda: opened(tmp_path))


# ---------------------------------------------------------------- WikiExtractor's folders

LONG = "an article of more than one block, " * 2000
DOC = """<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a philosophy &lt;and&gt; movement.

It has <br> a line.
</doc>
<doc id="39" url="https://en.wikipedia.org/wiki?curid=39" title="A &amp; B">
A &amp; B

Second.

</doc>
"""


@pytest.mark.parametrize("compression", ["", ".bz2"])
def test_json_lines_without_an_extension(tmp_path: Path, compression: str) -> None:
    pack = bz2.compress if compression else bytes
    write(tmp_path / "AA" / f"wiki_00{compression}", pack(lines([LONG, "b"]).encode()))
    write(tmp_path / "AA" / f"wiki_01{compression}", pack(lines(["c"]).encode()))
    write(tmp_path / "AB" / f"wiki_00{compression}", pack(lines(["d"]).encode()))
    corpus = opened(tmp_path)
    assert list(corpus.documents()) == [LONG, "b", "c", "d"]
    assert corpus.notes == ()
    assert read(tmp_path / "AA" / f"wiki_00{compression}", "title") == ["t", "t"]


def test_documents_as_wikiextractor_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "AA" / "wiki_00", DOC)
    expected = [
        "Anarchism\n\nAnarchism is a philosophy &lt;and&gt; movement.\n\nIt has <br> a line.",
        "A &amp; B\n\nSecond.",
    ]
    assert read(tmp_path) == read(path) == expected
    assert read(path, "title") == ["Anarchism", "A & B"]


def test_a_damaged_file_of_wikiextractor(tmp_path: Path) -> None:
    cut = write(tmp_path / "wiki_00", DOC[:-8])
    assert "line 8: this <doc ...> has no </doc>" in refusal(lambda: read(cut))
    loose = write(tmp_path / "wiki_01", DOC + "loose\n")
    assert "line 14: text outside" in refusal(lambda: read(loose))


# ---------------------------------------------------------------- fields inside others

NESTED = [{"text": {"en": "a", "de": "A"}}, {"text": {"en": None, "de": "B"}}, {"text": None}]


def write_nested(folder: Path, kind: str) -> Path:
    path = folder / f"a{kind}"
    fields = pa.struct([("en", pa.string()), ("de", pa.string())])
    table = pa.Table.from_pylist(NESTED, schema=pa.schema([("text", fields)]))
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    elif kind == ".json":
        path.write_text(json.dumps(NESTED))
    elif kind == ".parquet":
        pq.write_table(table, path)
    else:
        feather.write_feather(table, path)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".arrow"])
def test_a_field_inside_a_field(tmp_path: Path, kind: str) -> None:
    path = write_nested(tmp_path, kind)
    assert read(path, "text.en") == ["a", "", ""]
    assert read(path, "text.de") == ["A", "B", ""]
    absent = refusal(lambda: read(path, "text.fr"))
    assert "no field 'text.fr' (there are: 'text.en', 'text.de')" in absent
    whole = refusal(lambda: read(path))
    assert "not a string but dict (there are: 'text.en', 'text.de')" in whole


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", ".csv"])
def test_a_field_whose_own_name_has_a_dot(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"text.en": ["a"], "text": ["b"]}), path)
    else:
        path.write_text('{"text.en": "a", "text": "b"}\n' if kind == ".jsonl" else "text.en\na\n")
    assert read(path, "text.en") == ["a"]


def test_identity_tells_the_field_inside(tmp_path: Path) -> None:
    path = write_nested(tmp_path, ".jsonl")
    assert opened(path, "text.en").identity != opened(path, "text.de").identity


# ---------------------------------------------------------------- Arrow


def test_a_stream_of_arrow_that_was_cut_off(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
    path = tmp_path / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:cut])
        assert f"{path} is damaged or cut off" in refusal(lambda: read(path))


def test_json_that_is_no_list_is_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", lines(["a", "b"]) + "broken\n")
    documents = opened(path).documents()
    assert [next(documents), next(documents)] == ["a", "b"]
    assert "line 3" in refusal(lambda: next(documents))


def test_what_is_left_out_is_said_once_before_the_run(tmp_path: Path) -> None:
    of_the_hub(tmp_path / "ds")
    asked = ("cache-cov", "--corpus", tmp_path / "ds", "--layers", "0", "--dry-run")
    said = kscli(*asked)
    assert said.exit_code == 0, said.stderr
    assert said.stderr.count("left out: 1 file of no known kind (README.md)") == 1
    assert "left out" not in kscli(*asked, "-q").stderr
