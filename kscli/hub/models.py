"""Fetch what is needed of a model's repository on the Hugging Face Hub.

`fetch_model` downloads exactly the files that kscli reads and hands back their folder in the
Hub's own cache; everything is then loaded from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import (
    ModelInfo,
    get_cached_repo_tree,
    hf_hub_download,
    model_info,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from kscli.errors import ModelError
from kscli.hub import asking
from kscli.models.aliases import ALIASES, close_aliases
from kscli.models.fingerprint import is_tokenizer_file
from kscli.models.weights import refuse_adapter, weight_files
from kscli.reporter import SILENT, Reporter, Task

CONFIG = "config.json"


@dataclass(frozen=True)
class FetchedModel:
    """A model's files on this disk and the commit they belong to."""

    folder: Path
    commit: str


@dataclass(frozen=True)
class _Request:
    hub_id: str
    revision: str
    allow_pickle: bool
    trust_remote_code: bool


def fetch_model(
    hub_id: str,
    revision: str,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    reporter: Reporter = SILENT,
) -> FetchedModel:
    """Have the configuration, tokenizer and weights of `hub_id` at `revision` in the cache.

    Weights are safetensors; pickled ones only with `allow_pickle` and where there are no
    others. Python files come only with `trust_remote_code`. A commit that is complete in the
    cache is used without asking the Hub, and so is any revision when the Hub is out of reach.

    Raises ModelError when the Hub does not answer in time or refuses, when the repository lacks
    what is needed, and when the disk is full.
    """
    request = _Request(hub_id, revision, allow_pickle, trust_remote_code)
    with asking.silenced(), asking.explained(_wanted(request)):
        return _fetch(request, reporter)


def _fetch(request: _Request, reporter: Reporter) -> FetchedModel:
    cached = _cached_model(request, listed_only=True)
    if cached is not None and cached.commit == request.revision:
        return cached
    try:
        # The commit, and the files with their sizes.
        info = asking.ask(
            lambda timeout: model_info(
                request.hub_id, revision=request.revision, timeout=timeout, files_metadata=True
            )
        )
    except asking.CLIENT_ERRORS as error:
        cached = (
            _cached_model(request, listed_only=False) if asking.is_out_of_reach(error) else None
        )
        if cached is None:
            raise
        if not asking.is_offline(error):
            reporter.note(f"The Hub is out of reach; {request.hub_id} comes from the local cache.")
        return cached
    if cached is not None and cached.commit == info.sha:
        return cached
    return _download(request, info, reporter)


def _download(request: _Request, info: ModelInfo, reporter: Reporter) -> FetchedModel:
    commit = info.sha
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(name: str) -> str:
        path = hf_hub_download(request.hub_id, name, revision=commit, tqdm_class=_bar_class(Task()))
        return Path(path).read_text("utf-8")

    files = _needed_files(request, sizes, read)
    missing = [name for name in files if _cached_file(request.hub_id, name, commit) is None]
    with reporter.task(
        f"Fetching {request.hub_id}", total=sum(sizes[name] for name in missing), unit="B"
    ) as task:
        # By its name and not by its commit, so that the cache can find the name again offline.
        folder = Path(
            snapshot_download(
                request.hub_id,
                revision=request.revision,
                allow_patterns=files,
                tqdm_class=_bar_class(task),
            )
        )
    return FetchedModel(folder, folder.name)


def _needed_files(
    request: _Request, names: Collection[str], read: Callable[[str], str]
) -> list[str]:
    """Which of a repository's files to fetch; `read` gives the text of one."""
    if CONFIG not in names:
        gguf = any(name.endswith(".gguf") for name in names)
        raise ModelError(
            f"{request.hub_id} has no {CONFIG}, so it is not a transformers model."
            + (" Download one of its .gguf files and give its path." if gguf else "")
        )
    refuse_adapter(names, f"{request.hub_id} at {request.revision}")
    return [
        CONFIG,
        *sorted(name for name in names if is_tokenizer_file(name)),
        *sorted(name for name in names if request.trust_remote_code and name.endswith(".py")),
        *weight_files(names, read, f"{request.hub_id} at {request.revision}", request.allow_pickle),
    ]


def _cached_model(request: _Request, *, listed_only: bool) -> FetchedModel | None:
    """The revision's snapshot in the cache, if it is complete.

    Complete by the repository's list of files, which a download leaves in the cache; or,
    without `listed_only` and where there is no such list, by what lies in the folder.
    """
    config = _cached_file(request.hub_id, CONFIG, request.revision)
    if config is None:
        return None
    folder = config.parent
    listed = _cached_list(request.hub_id, folder.name)
    if listed is None and listed_only:
        return None
    names = listed or {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    try:
        files = _needed_files(request, names, lambda name: (folder / name).read_text("utf-8"))
    except OSError:
        return None
    except ModelError:
        # Without the list, or for a branch that may have moved, the Hub may know better.
        if listed is None or listed_only:
            return None
        raise
    complete = all((folder / name).is_file() for name in files)
    has_tokenizer = any(is_tokenizer_file(name) for name in files)
    return FetchedModel(folder, folder.name) if complete and has_tokenizer else None


def _cached_list(hub_id: str, commit: str) -> set[str] | None:
    try:
        return {file.path for file in get_cached_repo_tree(hub_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _cached_file(hub_id: str, name: str, revision: str | None) -> Path | None:
    path = try_to_load_from_cache(hub_id, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _bar_class(task: Task) -> type[tqdm]:
    """A stand-in for the Hub's progress bars that draws nothing and advances `task`.

    The Hub shows two bars of bytes, received and written; whichever is ahead counts.
    """
    lock = Lock()
    reported = 0.0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal reported
            with lock:
                self.n += n or 0
                if self.counts_bytes and self.n > reported:
                    task.advance(self.n - reported)
                    reported = self.n

    return Bar


def _wanted(request: _Request) -> asking.Wanted:
    hub_id = request.hub_id
    known = any(alias.hub_id == hub_id for alias in ALIASES)
    close = [] if known else close_aliases(hub_id)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    # A name with an owner is none of a mistyped alias; only the Hub can say that it is wrong.
    absent = f", and {hub_id} is not complete in the local cache.{'' if '/' in hub_id else hint}"
    return asking.Wanted("model", hub_id, request.revision, ModelError, absent, absent, hint)
