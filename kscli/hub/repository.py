"""A data set repository of the Hub in which artifacts are passed on: asked, read and written.

Importing this imports huggingface_hub. Its errors become sentences; no token is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from kscli.errors import ArtifactError, UsageError
from kscli.hub import asking
from kscli.hub.models import bar_class
from kscli.reporter import Task, silenced

_TYPE = "dataset"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, and the paths of its files."""

    name: str
    commit: str
    paths: tuple[str, ...]

    def fetch(self, path: str, task: Task) -> Path:
        """Have a file in the Hub's cache on this machine; raises ArtifactError."""
        with _explained(self.name, self.commit, "fetched"):
            return Path(
                hf_hub_download(
                    self.name,
                    path,
                    repo_type=_TYPE,
                    revision=self.commit,
                    tqdm_class=bar_class(task),
                )
            )

    def read(self, path: str) -> str:
        """The text of a small file; raises ArtifactError."""
        try:
            return self.fetch(path, Task()).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} of {self.name} is no UTF-8 text.") from error


class Upload:
    """Files on their way into a repository, where one commit makes them all appear at once."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._operations: list[CommitOperationAdd | CommitOperationDelete] = []

    def add(self, path: str, content: Path | bytes) -> bool:
        """Send a file; False where it is so small that it must stay there until the commit."""
        operation = CommitOperationAdd(path, content)
        with _explained(self._repository.name, "main", "written"):
            HfApi().preupload_lfs_files(self._repository.name, [operation], repo_type=_TYPE)
        self._operations.append(operation)
        return operation.path_or_fileobj == b""

    def delete(self, path: str) -> None:
        """Take a file out of the repository."""
        self._operations.append(CommitOperationDelete(path))

    def commit(self, message: str) -> str:
        """Make the changes, unless someone else has made some meanwhile; the new commit."""
        with _explained(self._repository.name, "main", "written"):
            made = HfApi().create_commit(
                self._repository.name,
                self._operations,
                commit_message=message,
                repo_type=_TYPE,
                parent_commit=self._repository.commit,
            )
        return str(made.oid)


def find_repository(name: str, revision: str | None = None) -> Repository:
    """Ask the Hub for a repository; raises ArtifactError where it does not answer or has none."""
    _require_name(name)
    with _explained(name, revision or "main", "fetched"):
        info = asking.ask(
            lambda timeout: HfApi().dataset_info(name, revision=revision, timeout=timeout)
        )
    paths = tuple(file.rfilename for file in info.siblings or ())
    return Repository(name, info.sha or "main", paths)


def make_repository(name: str, *, private: bool) -> Repository:
    """The repository of that name, made where there is none; raises ArtifactError."""
    _require_name(name)
    asking.require_sound_token(ArtifactError)
    if get_token() is None:
        raise ArtifactError(
            f"{name} cannot be written without a token of the Hub that may write: log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    with _explained(name, "main", "written"):
        HfApi().create_repo(name, repo_type=_TYPE, private=private or None, exist_ok=True)
    return find_repository(name)


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"{name!r} is no repository of the Hub; write it as OWNER/NAME.")


@contextmanager
def _explained(name: str, revision: str, doing: Literal["fetched", "written"]) -> Iterator[None]:
    """Turn what the client raises into one sentence; its bars and logs stay off the terminal."""
    disable_progress_bars()
    wanted = asking.Wanted(
        "data set",
        name,
        revision,
        ArtifactError,
        unreachable=f", so {name} cannot be {doing}; check the network and try again.",
        offline=f", so {name} cannot be {doing}. Unset HF_HUB_OFFLINE.",
        doing=doing,
    )
    with silenced("huggingface_hub"), asking.explained(wanted, (*asking.CLIENT_ERRORS, ValueError)):
        yield
