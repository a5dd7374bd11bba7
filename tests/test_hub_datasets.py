from __future__ import annotations

import importlib
import io
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]

from kscli.errors import CorpusError, UsageError
from kscli.hub.asking import HTTPError, Wanted
from kscli.hub.datasets import HubDataset, HubSource, parse_source

WANTED = Wanted("data set", "o/n", "main", CorpusError, ", so wait.", ", so unset it.")


LINE = b'{"text": "%s"}\n' % (b"a" * 1_000_000)


class BreakingFile(io.BytesIO):
    """A file of 30 lines whose connection is lost after the ten megabytes that are read first."""

    tries = 0

    def __init__(self) -> None:
        super().__init__(LINE * 30)

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 10_000_000:
            type(self).tries += 1
            raise _network_error("no route")
        return super().read(size)


class BreakingFileSystem(AbstractFileSystem):  # type: ignore[misc]
    protocol = "breaking"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": 30 * len(LINE), "type": "file"}

    def _open(self, path: str, **_: Any) -> BreakingFile:
        return BreakingFile()


class BreakingSource(HubSource):
    def load(self, split: str) -> Iterable[object]:
        from datasets import load_dataset

        files = {split: "breaking://x.jsonl"}
        rows = load_dataset("json", data_files=files, split=split, streaming=True)
        return cast(Iterable[object], rows)


def _network_error(text: str) -> Exception:
    """An error of the kind that the installed client raises when it is disconnected."""
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])
    return cast(Exception, client.ConnectError(text))


def test_a_lost_connection_ends_the_stream_after_about_a_minute(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    records = HubDataset(BreakingSource("o/n"), None, None, WANTED).records()
    assert [number for _, number, _ in islice(records, 11)] == list(range(1, 12))
    with pytest.raises(CorpusError, match=r"cannot be reached \(no route\), so wait\."):
        next(records)
    # Each try stands for up to six of the client's own, which wait 1, 2, 4, 8 and 8 seconds.
    assert 40 < BreakingFile.tries * 23 + sum(slept) < 80
    assert capfd.readouterr() == ("", "")


def test_splits_are_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubSource, "load", lambda _, split: [f"{split} a", f"{split} b"])
    dataset = HubDataset(HubSource("o/n", splits=("train", "test")), None, None, WANTED)
    assert list(dataset.records()) == [
        ("train", 1, "train a"),
        ("train", 2, "train b"),
        ("test", 1, "test a"),
        ("test", 2, "test b"),
    ]


def test_where_the_hub_did_not_answer_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(HubSource, "load", lambda _, split: loaded.append(split))
    unreachable = CorpusError("no answer")
    with pytest.raises(CorpusError) as caught:
        HubDataset(HubSource("o/n"), None, unreachable, WANTED).records()
    assert caught.value is unreachable
    assert loaded == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hf:o/n", HubSource("o/n")),
        ("hf:o/n:c", HubSource("o/n", "c")),
        ("hf:o/n:c:test", HubSource("o/n", "c", ("test",))),
        ("hf:o-1/n.x_y::test", HubSource("o-1/n.x_y", None, ("test",))),
    ],
)
def test_names(name: str, source: HubSource) -> None:
    assert parse_source(name, UsageError) == source


@pytest.mark.parametrize("name", ["hf:", "hf:n", "hf:o/", "hf:o/n/x", "hf:o/n:c:s:x", "hf:o/n:c:"])
def test_names_of_another_form(name: str) -> None:
    for error in (UsageError, CorpusError):
        with pytest.raises(error, match=r"hf:OWNER/NAME\[:CONFIG\[:SPLIT\]\]"):
            parse_source(name, error)
