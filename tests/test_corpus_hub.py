from __future__ import annotations

import socket
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from kscli.corpus import CorpusSpec, open_corpus, same_text
from kscli.errors import CorpusError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CorpusError) as caught:
        call()
    return str(caught.value)


class Rows(list[object]):
    """A streamed data set, whose only other order is the reverse."""

    def reshard(self) -> Rows:
        return self

    def shuffle(self, seed: int, *, buffer_size: int) -> Rows:
        return Rows(self[::-1])


class FakeHub:
    """Stands in for `HfApi.dataset_info` and `load_dataset`; notes how they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[object] = [{"text": "a", "title": "A"}, {"text": "b", "title": "B"}]
        self.asked: list[tuple[str, str | None]] = []
        self.loaded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.info_error: Exception | None = None
        self.load_error: Exception | None = None
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.dataset_info)
        monkeypatch.setattr("datasets.load_dataset", self.load_dataset)
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", self.cached)
        self.cached_card: str | None = None

    def dataset_info(self, repository: str, *, revision: str | None, timeout: float) -> object:
        self.asked.append((repository, revision))
        if self.info_error:
            raise self.info_error
        return types.SimpleNamespace(sha=revision or COMMIT)

    def load_dataset(self, *arguments: Any, **options: Any) -> Rows:
        self.loaded.append((arguments, options))
        if self.load_error:
            raise self.load_error
        return Rows(self.rows)

    def cached(self, repository: str, filename: str, repo_type: str) -> str | None:
        return self.cached_card


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch)


@pytest.mark.parametrize(
    ("name", "arguments", "split", "identity"),
    [
        (
            "wikipedia",
            ("wikimedia/wikipedia", "20231101.en"),
            "train",
            "hf:wikimedia/wikipedia:20231101.en:train",
        ),
        ("hf:owner/name", ("owner/name", None), "train", "hf:owner/name:default:train"),
        ("hf:owner/name:config", ("owner/name", "config"), "train", "hf:owner/name:config:train"),
        ("hf:o/n.x-y:c:test[:9]", None, None, None),
        ("hf:o/n:c:test", ("o/n", "c"), "test", "hf:o/n:c:test"),
        ("hf:o/n::test", ("o/n", None), "test", "hf:o/n:default:test"),
    ],
)
def test_hub_names(
    hub: FakeHub,
    name: str,
    arguments: tuple[str, str | None] | None,
    split: str | None,
    identity: str | None,
) -> None:
    if arguments is None:
        assert "hf:OWNER/NAME[:CONFIG[:SPLIT]]" in refusal(lambda: open_corpus(CorpusSpec(name)))
        return
    corpus = open_corpus(CorpusSpec(name, shuffle=None))
    assert hub.loaded == []
    assert corpus.name == name
    assert corpus.identity == f"{identity}@{COMMIT}"
    assert list(corpus.documents()) == ["a", "b"]
    assert hub.asked == [(arguments[0], None)]
    assert hub.loaded == [(arguments, {"split": split, "streaming": True})]


def test_the_dump_of_the_paper_is_read_as_parquet_files_at_one_commit(hub: FakeHub) -> None:
    corpus = open_corpus(CorpusSpec("wikipedia-20220301", shuffle=None))
    assert list(corpus.documents()) == ["a", "b"]
    ((arguments, options),) = hub.loaded
    ((repository, revision),) = hub.asked
    assert repository == "legacy-datasets/wikipedia"
    assert arguments == ("parquet",)
    url = f"hf://datasets/{repository}@{revision}/data/20220301.en/train-*.parquet"
    assert options == {"data_files": {"train": url}, "split": "train", "streaming": True}
    assert corpus.identity == f"hf:legacy-datasets/wikipedia:20220301.en:train@{revision}"


def test_documents_of_the_hub_are_drawn_unless_told_otherwise(hub: FakeHub) -> None:
    drawn, first = (open_corpus(CorpusSpec("wikipedia", shuffle=s)) for s in ("default", None))
    assert list(drawn.documents()) == ["b", "a"]
    assert list(first.documents()) == ["a", "b"]
    assert drawn.identity == f"{first.identity}#shuffle:0"
    assert open_corpus(CorpusSpec("wikipedia", shuffle=7)).identity == f"{first.identity}#shuffle:7"
    assert same_text(drawn.identity, first.identity)
    assert not same_text(drawn.identity, open_corpus(CorpusSpec("hf:o/n")).identity)


def test_a_hub_draw_takes_documents_from_everywhere(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `datasets` itself, of Parquet files in which a row group is 50 neighbours."""
    for part in range(3):
        rows = [{"text": str(part * 1000 + row)} for row in range(1000)]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=50)

    def local(*_: Any, split: str, streaming: bool) -> Any:
        files = sorted(map(str, tmp_path.glob("*.parquet")))
        return datasets.IterableDataset.from_parquet(files, split=datasets.Split(split))

    monkeypatch.setattr("datasets.load_dataset", local)
    monkeypatch.setattr("kscli.hub.datasets.SHUFFLED_AT_ONCE", 100)
    first, again, other = (
        list(map(int, open_corpus(CorpusSpec("wikipedia", shuffle=seed)).documents()))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(3000))
    # 300 of 3,000 documents come from all three files.
    assert {document // 1000 for document in first[:300]} == {0, 1, 2}


def test_hub_text_field(hub: FakeHub) -> None:
    corpus = open_corpus(CorpusSpec("hf:o/n", "title", None))
    assert list(corpus.documents()) == ["A", "B"]
    assert corpus.identity != open_corpus(CorpusSpec("hf:o/n")).identity
    message = refusal(lambda: list(open_corpus(CorpusSpec("hf:o/n", "body")).documents()))
    assert "document 1" in message
    assert "'title'" in message


def test_an_empty_hub_data_set(hub: FakeHub) -> None:
    hub.rows = []
    assert "empty" in refusal(lambda: list(open_corpus(CorpusSpec("hf:o/n")).documents()))


def test_a_hub_data_set_that_does_not_exist(hub: FakeHub) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    response: Any = types.SimpleNamespace(status_code=404, headers={}, request=None)
    hub.info_error = RepositoryNotFoundError("404", response=response)
    message = refusal(lambda: open_corpus(CorpusSpec("hf:owner/nosuch")))
    assert "no data set owner/nosuch" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Dataset 'o/n' is a gated dataset on the Hub. You must be authenticated.", "HF_TOKEN"),
        ("Dataset scripts are no longer supported, but found n.py", "no code"),
        ("Config name is missing.\nPlease pick one: ['a', 'b']", "hf:OWNER/NAME:CONFIG"),
        ("BuilderConfig 'c' not found. Available: ['a']", "hf:OWNER/NAME:CONFIG"),
        ("Bad split: x. Available splits: ['train']", "hf:OWNER/NAME:CONFIG:SPLIT"),
        ("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)", "Unset HF_HUB_OFFLINE"),
        ("", "ValueError"),
    ],
)
def test_what_datasets_raises_becomes_a_sentence(hub: FakeHub, said: str, remedy: str) -> None:
    hub.load_error = ValueError(said)
    message = refusal(lambda: list(open_corpus(CorpusSpec("hf:o/n")).documents()))
    assert "o/n" in message
    assert remedy in message
    assert "\n" not in message


def test_the_network_is_down(hub: FakeHub) -> None:
    hub.info_error = ConnectionError("[Errno -2] Name or service not known")
    corpus = open_corpus(CorpusSpec("wikipedia"))
    assert corpus.identity == "hf:wikimedia/wikipedia:20231101.en:train#shuffle:0"
    message = refusal(corpus.documents)
    assert "cannot be reached" in message
    assert "Name or service not known" in message
    assert hub.loaded == []  # `datasets` would retry for half a minute


def test_offline_the_commit_is_the_one_last_seen(hub: FakeHub) -> None:
    online = open_corpus(CorpusSpec("wikipedia")).identity
    hub.info_error = ConnectionError("no network")
    hub.cached_card = f"/cache/snapshots/{COMMIT}/README.md"
    assert open_corpus(CorpusSpec("wikipedia")).identity == online


def test_offline_mode_leaves_it_to_the_cache_of_datasets(hub: FakeHub) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub.info_error = OfflineModeIsEnabled("offline")
    assert list(open_corpus(CorpusSpec("wikipedia", shuffle=None)).documents()) == ["a", "b"]


def test_a_hub_that_never_answers_is_given_up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr("kscli.hub.asking.DEADLINE", 0.05)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: never.wait(60))
    corpus = open_corpus(CorpusSpec("wikipedia"))
    never.set()
    assert "no answer" in refusal(corpus.documents)


def test_the_real_client_gives_up_on_a_refused_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        started = time.monotonic()
        message = refusal(open_corpus(CorpusSpec("hf:owner/name")).documents)
    assert "cannot be reached" in message
    assert "refused" in message
    assert time.monotonic() - started < 10  # the limit that the issue sets, 0.1 s here
