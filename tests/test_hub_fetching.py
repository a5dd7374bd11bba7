"""Fetching from the Hub, against a small Hub of our own on this machine's loopback.

The real client library talks to it, so what is checked is which files arrive, what is asked
of the Hub, and what is said when it refuses, is gone, or never answers.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hub_kit import Answering
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import api

from kscli.errors import ModelError
from kscli.hub import models as hub
from kscli.hub.asking import REQUEST_TIMEOUT, HTTPError
from kscli.hub.models import fetch_model
from kscli.models.aliases import find_alias
from kscli.models.locating import ModelOptions, locate_model
from kscli.reporter import SILENT, Reporter, Task

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
PICKLE_INDEX = {"weight_map": {"a": "pytorch_model-1-of-1.bin"}}

REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/plain": {
        "config.json": b"{}",
        "model.safetensors": b"w" * 50_000,
        "model.fp16.safetensors": b"w",
        "consolidated.safetensors": b"w",
        "pytorch_model.bin": b"p",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "tokenizer.model": b"t",
        "original/tokenizer.model": b"t",
        "generation_config.json": b"{}",
        "README.md": b"r",
        "modeling.py": b"c",
    },
    "owner/adapted": {
        "config.json": b"{}",
        "model.safetensors": b"w",
        "tokenizer.json": b"{}",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"a",
        "adapter_model.bin": b"p",
    },
    "owner/adapter": {
        "adapter_config.json": b'{"base_model_name_or_path": "owner/plain", "revision": null}',
        "adapter_model.safetensors": (2).to_bytes(8, "little") + b"{}",
        "tokenizer.json": b"{}",
        "training_args.bin": b"p",
    },
    "owner/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "model-1-of-2.safetensors": b"1",
        "model-2-of-2.safetensors": b"2",
        "pytorch_model.bin": b"p",
        "vocab.json": b"{}",
        "merges.txt": b"m",
    },
    "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"p", "tokenizer.json": b"{}"},
    "owner/pickled-shards": {
        "config.json": b"{}",
        "pytorch_model.bin.index.json": json.dumps(PICKLE_INDEX).encode(),
        "pytorch_model-1-of-1.bin": b"p",
        "tokenizer.json": b"{}",
    },
    "owner/torn": {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        "model-1-of-2.safetensors": b"1",
    },
    "owner/garbled": {"config.json": b"{}", "model.safetensors.index.json": b"[]"},
    "owner/gguf": {"model.Q4_0.gguf": b"g"},
    "owner/weightless": {"config.json": b"{}", "tokenizer.json": b"{}"},
    "owner/gated": {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}"},
}
PLAIN = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
PLAIN += ["tokenizer_config.json"]


class _Handler(Answering, BaseHTTPRequestHandler):
    """The few routes of the Hub that a download uses."""

    asked: list[str]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/")
            self._describe("/".join(parts[:-2]), *parts[-2:])
        elif "/resolve/" in path:
            repository, _, rest = path.strip("/").partition("/resolve/")
            self._serve(repository, rest.partition("/")[2])
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    def _describe(self, repository: str, what: str, revision: str) -> None:
        if repository not in REPOSITORIES:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound")
        else:
            files = REPOSITORIES[repository].items()
            if what == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": "0"}
                    for name, body in files
                ]
                self._answer(200, json.dumps(tree).encode())
            else:
                siblings = [{"rfilename": name, "size": len(body)} for name, body in files]
                info = {"id": repository, "sha": COMMIT, "siblings": siblings}
                self._answer(200, json.dumps(info).encode())

    def _serve(self, repository: str, name: str) -> None:
        if repository == "owner/gated":
            self._answer(401, X_Error_Code="GatedRepo")
            return
        body = REPOSITORIES[repository][name]
        etag = hashlib.sha256(name.encode() + body).hexdigest()
        self._answer(200, body, X_Repo_Commit=COMMIT, ETag=f'"{etag}"')


class LocalHub:
    """A running Hub; `asked` is what was requested of it, `stop()` takes the network down."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"asked": self.asked})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The files whose contents were asked for, in name order."""
        prefix = f"/resolve/{COMMIT}/"
        return sorted(
            line.partition(prefix)[2]
            for line in self.asked
            if line.startswith("GET ") and prefix in line
        )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a Hub that refuses connections until `local_hub` starts one."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _use_endpoint(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
    return folder


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    server = LocalHub()
    _use_endpoint(monkeypatch, server.endpoint)
    yield server
    server.stop()


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class RecordingReporter(Reporter):
    """Keeps the tasks' totals, how far they came, and the notes."""

    def __init__(self) -> None:
        self.total: float | None = None
        self.done = 0.0
        self.notes: list[str] = []

    @contextmanager
    def task(
        self, label: str, total: float | None = None, unit: str = "", done: float = 0.0
    ) -> Iterator[Task]:
        reporter = self
        self.total = total

        class Counter(Task):
            def advance(self, amount: float = 1.0, status: str = "") -> None:
                reporter.done += amount

        yield Counter()

    def note(self, text: str) -> None:
        self.notes.append(text)


def fetch(
    hub_id: str,
    revision: str = "main",
    *,
    pickle: bool = False,
    code: bool = False,
    merge: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    options = ModelOptions(
        hub_id, revision, allow_pickle=pickle, trust_remote_code=code, merge_adapter=merge
    )
    return fetch_model(options, reporter)


def refusal(hub_id: str, revision: str = "main", *, pickle: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        fetch(hub_id, revision, pickle=pickle)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def files(model: Path) -> list[str]:
    paths = (path for path in model.rglob("*") if path.is_file())
    return sorted(path.relative_to(model).as_posix() for path in paths)


def http_error(kind: type[Exception], status: int, message: str = "refused") -> Exception:
    """An error of the Hub client, with as much of a response as it needs."""

    class Response:
        status_code = status
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    return kind(message, response=Response())  # type: ignore[call-arg]


# What is fetched


def test_only_what_is_read_is_fetched(local_hub: LocalHub) -> None:
    model = fetch("owner/plain")
    assert model.name == COMMIT
    assert files(model) == PLAIN == local_hub.fetched()
    assert (model / "model.safetensors").read_bytes() == b"w" * 50_000


def test_python_files_only_when_remote_code_is_trusted(local_hub: LocalHub) -> None:
    assert files(fetch("owner/plain", code=True)) == sorted([*PLAIN, "modeling.py"])


def test_a_tokenizer_alone(local_hub: LocalHub) -> None:
    """What is fetched of a model is not taken for all of it afterwards."""
    model = fetch_model(ModelOptions("owner/sharded", "main", weights=False))
    assert files(model) == ["config.json", "merges.txt", "vocab.json"] == local_hub.fetched()
    assert "model-1-of-2.safetensors" in files(fetch("owner/sharded"))


def test_an_adapter_only_when_it_is_merged(local_hub: LocalHub) -> None:
    """Beside its base model, and alone; what was fetched is found again without the network."""
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert "--merge-adapter" in refusal("owner/adapted")
    assert "--merge-adapter" in refusal("owner/adapter")
    assert local_hub.fetched() == []
    beside = ["config.json", "model.safetensors", "tokenizer.json"]
    assert files(fetch("owner/adapted", merge=True)) == sorted(adapter + beside)
    assert files(fetch("owner/adapter", merge=True)) == adapter
    asked = len(local_hub.fetched())
    for hub_id in ("owner/adapted", "owner/adapter"):
        assert fetch(hub_id, COMMIT, merge=True).name == COMMIT
    assert len(local_hub.fetched()) == asked


def test_the_base_model_of_an_adapter_is_fetched(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    reporter = RecordingReporter()
    found = locate_model(ModelOptions("owner/adapter", merge_adapter=True), reporter)
    assert files(found.folder) == PLAIN
    assert found.adapter is not None
    assert files(found.adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    assert found.identity.model_id == "owner/adapter"
    assert found.identity.weights.startswith(f"commit:{COMMIT}+sha256:")
    assert reporter.notes == ["The adapter owner/adapter is merged into owner/plain."]


def test_shards_are_those_the_index_names(local_hub: LocalHub) -> None:
    assert files(fetch("owner/sharded", pickle=True)) == [
        "config.json",
        "merges.txt",
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        "model.safetensors.index.json",
        "vocab.json",
    ]


@pytest.mark.parametrize("hub_id", ["owner/pickled", "owner/pickled-shards"])
def test_pickles_only_when_allowed(hub_id: str, local_hub: LocalHub) -> None:
    text = refusal(hub_id)
    assert "--allow-pickle" in text
    assert hub_id in text
    assert local_hub.fetched() == []
    assert files(fetch(hub_id, pickle=True)) == sorted(REPOSITORIES[hub_id])


def test_the_library_is_asked_for_that_revision_and_those_files(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def spy(hub_id: str, **options: Any) -> Any:
        calls.append((hub_id, options))
        return snapshot_download(hub_id, **options)

    monkeypatch.setattr(hub, "snapshot_download", spy)
    fetch("owner/plain", "main")
    [(hub_id, options)] = calls
    assert (hub_id, options["revision"]) == ("owner/plain", "main")
    assert sorted(options["allow_patterns"]) == PLAIN
    assert set(options) == {"revision", "allow_patterns", "tqdm_class"}


def test_progress_is_reported_in_bytes_and_nothing_is_printed(
    local_hub: LocalHub, capfd: pytest.CaptureFixture[str]
) -> None:
    reporter = RecordingReporter()
    fetch("owner/sharded")
    fetch("owner/plain", reporter=reporter)
    size = sum(len(REPOSITORIES["owner/plain"][name]) for name in PLAIN)
    assert (reporter.total, reporter.done) == (size, size)
    fetch("owner/plain", code=True, reporter=reporter)
    assert (reporter.total, reporter.done) == (1, size + 1)
    assert capfd.readouterr() == ("", "")


def test_received_and_written_bytes_are_not_counted_twice() -> None:
    reporter = RecordingReporter()
    with reporter.task("") as task:
        bar = hub.bar_class(task)
        received, written, count = bar(unit="B", name="x"), bar(unit="B"), bar(total=3)
        received.update(6)
        written.update(4)
        written.update(4)
        count.update(3)
        received.update(-6)
        received.update(7)
    assert reporter.done == 8


# What is not fetched again


def test_a_complete_commit_needs_no_network(local_hub: LocalHub) -> None:
    first = fetch("owner/plain", COMMIT)
    asked = len(local_hub.asked)
    assert fetch("owner/plain", COMMIT) == first
    assert len(local_hub.asked) == asked


def test_a_branch_that_has_not_moved_is_only_asked_about(local_hub: LocalHub) -> None:
    first = fetch("owner/plain")
    asked = len(local_hub.asked)
    assert fetch("owner/plain") == first
    assert len(local_hub.asked) == asked + 1


def test_what_is_missing_is_fetched_again(local_hub: LocalHub) -> None:
    model = fetch("owner/plain", COMMIT)
    (model / "tokenizer.json").unlink()
    assert files(fetch("owner/plain", COMMIT)) == PLAIN


def test_the_cache_serves_when_the_network_is_down(local_hub: LocalHub) -> None:
    first = fetch("owner/sharded")
    local_hub.stop()
    reporter = RecordingReporter()
    assert fetch("owner/sharded", reporter=reporter) == first
    assert reporter.notes == ["The Hub is out of reach; owner/sharded comes from the local cache."]
    (first / "model-2-of-2.safetensors").unlink()
    assert "not complete in the local cache" in refusal("owner/sharded")


def test_a_cache_without_the_list_of_files_serves_too(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_list(*_: Any, **__: Any) -> Any:
        raise hub_errors.CachedRepoTreeNotFoundError

    model = fetch("owner/plain")
    local_hub.stop()
    # So it is when other programs have downloaded the files one by one.
    monkeypatch.setattr(hub, "get_cached_repo_tree", no_list)
    assert fetch("owner/plain") == model
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "not complete in the local cache" in refusal("owner/plain")


def test_cached_pickles_are_refused_for_what_they_are(local_hub: LocalHub) -> None:
    fetch("owner/pickled", pickle=True)
    local_hub.stop()
    assert "--allow-pickle" in refusal("owner/pickled")


def test_offline_mode_asks_nobody(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch("owner/plain")
    asked = len(local_hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reporter = RecordingReporter()
    assert fetch("owner/plain", reporter=reporter) == first
    assert reporter.notes == []
    assert "HF_HUB_OFFLINE is set" in refusal("owner/sharded")
    assert len(local_hub.asked) == asked


# Refusals


@pytest.mark.parametrize(
    ("hub_id", "revision", "parts"),
    [
        ("owner/nothing", "main", ["no model owner/nothing", "hf auth login", "HF_TOKEN"]),
        ("meta-llama/Llama-3-8B", "main", ["no model", "Did you mean llama3-8b"]),
        ("owner/plain", "v9", ["owner/plain has no revision v9"]),
        ("owner/gated", "main", ["is gated", "/owner/gated", "hf auth login", "HF_TOKEN"]),
        ("owner/gguf", "main", ["no config.json", ".gguf"]),
        ("owner/weightless", "main", ["no weights", "model.safetensors"]),
        ("owner/torn", "main", ["lacks model-2-of-2.safetensors"]),
        ("owner/garbled", "main", ["model.safetensors.index.json", "damaged"]),
        ("not an id", "main", ["neither an alias", "OWNER/NAME"]),
        ("gpt2 small", "main", ["neither an alias", "Did you mean gpt2-small"]),
    ],
)
def test_refusals(hub_id: str, revision: str, parts: list[str], local_hub: LocalHub) -> None:
    text = refusal(hub_id, revision)
    for part in parts:
        assert part in text


def test_an_alias_is_not_suggested_for_itself() -> None:
    alias = find_alias("pythia-1b")
    assert alias is not None
    assert alias.hub_id is not None
    assert "Did you mean" not in refusal(alias.hub_id)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (http_error(hub_errors.GatedRepoError, 403), ["owner/m is gated", "/owner/m"]),
        (http_error(hub_errors.RepositoryNotFoundError, 401), ["no model owner/m"]),
        (http_error(hub_errors.RevisionNotFoundError, 404), ["no revision main"]),
        (http_error(hub_errors.DisabledRepoError, 403), ["disabled"]),
        (http_error(hub_errors.HfHubHTTPError, 401), ["rejects your token", "hf auth login"]),
        (http_error(hub_errors.HfHubHTTPError, 403, "\n\n403 no\nmore"), ["fetched: 403 no"]),
        (http_error(hub_errors.HfHubHTTPError, 503, "503 down"), ["cannot be reached (503 down)"]),
        (http_error(hub_errors.HfHubHTTPError, 429, "slow down"), ["cannot be reached (slow"]),
        (json.JSONDecodeError("not JSON", "<html>", 0), ["cannot be reached (not JSON"]),
        (HTTPError("no route"), ["cannot be reached (no route)"]),
        (hub_errors.LocalEntryNotFoundError("lost"), ["cannot be reached (lost)"]),
        (OSError(errno.ENOSPC, "x"), ["disk is full", "HF_HOME"]),
        (OSError(errno.EDQUOT, "x"), ["disk is full"]),
        (RuntimeError("I/O: No space left on device (os error 28)"), ["disk is full"]),
        (OSError(errno.EROFS, "x"), ["cannot be written", "HF_HOME"]),
        (OSError("Consistency check failed"), ["cannot be fetched: Consistency check"]),
    ],
)
def test_each_error_of_the_client_is_explained(
    error: Exception, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(hub, "model_info", fail)
    text = refusal("owner/m")
    for part in parts:
        assert part in text


def test_the_cause_of_a_missing_entry_is_what_is_explained(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise hub_errors.LocalEntryNotFoundError("x") from http_error(
            hub_errors.GatedRepoError, 401
        )

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert "is gated" in refusal("owner/plain")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(hub, "model_info", fail)
    with pytest.raises(ZeroDivisionError):
        fetch("owner/plain")


# The network down


def test_refused_connections(capfd: pytest.CaptureFixture[str]) -> None:
    text = refusal("owner/plain")
    assert f"The Hub at {constants.ENDPOINT} cannot be reached" in text
    assert capfd.readouterr() == ("", "")


def test_a_mistyped_alias_is_suggested_when_the_network_is_down() -> None:
    assert refusal("gpt2-smal").endswith("Did you mean gpt2-small or gpt2-xl?")
    assert "Did you mean" not in refusal("EleutherAI/pythia-12b")


def test_what_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    def fail(hub_id: str, **given: Any) -> None:
        options.update(given)
        raise TimeoutError("no answer in time")

    monkeypatch.setattr(hub, "model_info", fail)
    assert "cannot be reached (no answer in time)" in refusal("owner/plain")
    assert options["timeout"] == REQUEST_TIMEOUT
    assert options["revision"] == "main"


def test_the_real_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
    except OSError:
        _use_endpoint(monkeypatch, "https://huggingface.co")
        text = refusal("openai-community/gpt2")
        assert "The Hub at https://huggingface.co cannot be reached" in text
    else:
        pytest.skip("the Hub can be reached from here")
