"""Fetch what is needed of a model's repository on the Hugging Face Hub.

`fetch_model` downloads exactly the files that kscli reads and hands back their folder in the
Hub's own cache; everything is then loaded from there.
"""

from __future__ import annotations

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
from kscli.models.files import ADAPTER, CONFIG, model_files
from kscli.models.locating import ModelOptions
from kscli.reporter import SILENT, Reporter, Task, silenced


def fetch_model(options: ModelOptions, reporter: Reporter = SILENT) -> Path:
    """Have the files of the repository `options.model` at `options.revision` in the cache.

    Returns their folder, which has the commit's name. A commit that is complete in the cache is
    used without asking the Hub, and so is any revision when the Hub is out of reach.

    Raises ModelError as `model_files` does, when the Hub does not answer in time or refuses, and
    when the disk is full.
    """
    with silenced("huggingface_hub"), asking.explained(_wanted(options)):
        return _fetch(options, reporter)


def _fetch(options: ModelOptions, reporter: Reporter) -> Path:
    cached = _cached_model(options, listed_only=True)
    if cached is not None and cached.name == options.revision:
        return cached
    try:
        # The commit, and the files with their sizes.
        info = asking.ask(
            lambda timeout: model_info(
                options.model, revision=options.revision, timeout=timeout, files_metadata=True
            )
        )
    except asking.CLIENT_ERRORS as error:
        if not asking.is_out_of_reach(error):
            raise
        cached = _cached_model(options, listed_only=False)
        if cached is None:
            raise
        if not asking.is_offline(error):
            reporter.note(f"The Hub is out of reach; {options.model} comes from the local cache.")
        return cached
    if cached is not None and cached.name == info.sha:
        return cached
    return _download(options, info, reporter)


def _download(options: ModelOptions, info: ModelInfo, reporter: Reporter) -> Path:
    commit = info.sha
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(name: str) -> str:
        path = hf_hub_download(options.model, name, revision=commit, tqdm_class=bar_class(Task()))
        return Path(path).read_text("utf-8")

    files = model_files(sizes, read, f"{options.model} at {options.revision}", options).all
    missing = [name for name in files if _cached_file(options.model, name, commit) is None]
    with reporter.task(
        f"Fetching {options.model}", total=sum(sizes[name] for name in missing), unit="B"
    ) as task:
        # By its name and not by its commit, so that the cache can find the name again offline.
        folder = snapshot_download(
            options.model,
            revision=options.revision,
            allow_patterns=files,
            tqdm_class=bar_class(task),
        )
    return Path(folder)


def _cached_model(options: ModelOptions, *, listed_only: bool) -> Path | None:
    """The revision's snapshot in the cache, if it is complete.

    Complete by the repository's list of files, which a download leaves in the cache; or,
    without `listed_only` and where there is no such list, by what lies in the folder.
    """
    always_there = ADAPTER if options.merge_adapter else CONFIG
    config = _cached_file(options.model, always_there, options.revision)
    if config is None:
        return None
    folder = config.parent
    listed = _cached_list(options.model, folder.name)
    if listed is None and listed_only:
        return None
    names = listed or {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    where = f"{options.model} at {options.revision}"
    try:
        files = model_files(names, lambda name: (folder / name).read_text("utf-8"), where, options)
    except OSError:
        return None
    except ModelError:
        # Without the list, or for a branch that may have moved, the Hub may know better.
        if listed is None or listed_only:
            return None
        raise
    complete = all((folder / name).is_file() for name in files.all)
    return folder if complete and files.complete else None


def _cached_list(hub_id: str, commit: str) -> set[str] | None:
    try:
        return {file.path for file in get_cached_repo_tree(hub_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _cached_file(hub_id: str, name: str, revision: str | None) -> Path | None:
    path = try_to_load_from_cache(hub_id, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def bar_class(task: Task) -> type[tqdm]:
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


def _wanted(options: ModelOptions) -> asking.Wanted:
    hub_id = options.model
    known = any(alias.hub_id == hub_id for alias in ALIASES)
    close = [] if known else close_aliases(hub_id)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    absent = f", and {hub_id} is not complete in the local cache."
    if "/" not in hub_id:
        hint = hint or (
            f" {hub_id} is no alias (`kscli models` lists them) and no folder here; a Hub id is "
            "OWNER/NAME."
        )
        unreachable = offline = f"{absent}{hint}"
    else:
        # A name with an owner is none of a mistyped alias; only the Hub can say that it is wrong.
        folder = Path(hub_id)
        no_folder = f" There is no folder {hub_id} either." if folder.parent.is_dir() else ""
        hint += no_folder
        unreachable = f"{absent}{no_folder} Check the network, or name a folder with a model."
        offline = f"{absent}{no_folder} Unset HF_HUB_OFFLINE, or name a folder with a model."
    return asking.Wanted(
        "model", hub_id, options.revision or "main", ModelError, unreachable, offline, hint
    )
