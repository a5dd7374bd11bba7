"""Data sets of the Hugging Face Hub, as streams of records.

Importing this is light; opening a data set imports huggingface_hub, reading it `datasets`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kscli.errors import KscliError
from kscli.reporter import silenced

if TYPE_CHECKING:
    from kscli.hub.asking import Wanted


SHUFFLED_AT_ONCE = 10_000  # records, which stay in memory


@dataclass(frozen=True)
class HubSource:
    """Which records: of a repository, one configuration, split after split.

    `files` (a pattern inside the repository) reads Parquet files directly and lets the
    configuration be a name only; `revision` pins a commit. `shuffle` is the seed of a random order
    of each split: of its row groups or files, ten of which are read at a time, and of records.
    """

    repository: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    files: str | None = None
    revision: str | None = None
    shuffle: int | None = None

    def load(self, split: str) -> Iterable[object]:
        """The records of a split, streamed; raises what `datasets` raises."""
        from datasets import load_dataset

        if self.files is not None:
            url = f"hf://datasets/{self.repository}@{self.revision or 'main'}/{self.files}"
            rows = load_dataset("parquet", data_files={split: url}, split=split, streaming=True)
        else:
            pinned = {"revision": self.revision} if self.revision else {}
            rows = load_dataset(self.repository, self.config, split=split, streaming=True, **pinned)
        if self.shuffle is not None:
            rows = rows.reshard().shuffle(self.shuffle, buffer_size=SHUFFLED_AT_ONCE)
        return cast(Iterable[object], rows)


@dataclass(frozen=True)
class HubDataset:
    """A data set, its commit where that is known, and why the Hub did not answer, if it did not."""

    source: HubSource
    commit: str | None
    unreachable: KscliError | None
    wanted: Wanted

    def records(self) -> Iterator[tuple[str, int, object]]:
        """Stream (split, number in the split from 1, record).

        Raises the error of `wanted` where reading fails; at once if the Hub did not answer,
        where `datasets` would go on trying for half a minute.
        """
        if self.unreachable:
            raise self.unreachable
        return self._stream()

    def _stream(self) -> Iterator[tuple[str, int, object]]:
        from kscli.hub import asking

        _prepare_datasets()
        # No base class unites what `datasets` lets through of its file systems and formats.
        with asking.explained(self.wanted, (Exception,)):
            for split in self.source.splits:
                for number, record in enumerate(self.source.load(split), 1):
                    yield split, number, record


def parse_source(name: str, error: type[KscliError]) -> HubSource:
    """What `hf:OWNER/NAME[:CONFIG[:SPLIT]]` names; raises `error` for another form."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([^:]*))?(?::([^:]+))?", name)
    if match is None:
        raise error(f"'{name}' is not of the form hf:OWNER/NAME[:CONFIG[:SPLIT]].")
    repository, config, split = match.groups()
    return HubSource(repository, config or None, (split or "train",))


def open_dataset(source: HubSource, error: type[KscliError], instead: str) -> HubDataset:
    """Ask the Hub for the data set's commit.

    Out of reach of the Hub, the commit is the one last seen, and in offline mode the records
    are left to the cache of `datasets`. `instead` says what to give in place of the data set.

    Raises `error` where the Hub has no such data set, or refuses it.
    """
    from huggingface_hub import HfApi

    from kscli.hub import asking

    repository, revision = source.repository, source.revision
    wanted = asking.Wanted(
        "data set",
        repository,
        revision or "main",
        error,
        unreachable=f", so the data set {repository} cannot be read; check the network, set "
        f"HF_HUB_OFFLINE=1 if `datasets` has cached it, or {instead}.",
        offline=f", and {repository} is not in the cache. Unset HF_HUB_OFFLINE, or {instead}.",
    )
    asking.require_sound_token(error)
    try:
        with silenced("huggingface_hub"):
            info = asking.ask(
                lambda timeout: HfApi().dataset_info(repository, revision=revision, timeout=timeout)
            )
        return HubDataset(source, info.sha, None, wanted)
    except asking.CLIENT_ERRORS as refusal:
        explanation = asking.explain(refusal, wanted)
        if not asking.is_out_of_reach(refusal):
            raise explanation from refusal
        unreachable = None if asking.is_offline(refusal) else explanation
        return HubDataset(source, revision or _cached_commit(repository), unreachable, wanted)


def _cached_commit(repository: str) -> str | None:
    """The commit last seen, so that what was made from it still counts as made from it offline."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(repository, "README.md", repo_type="dataset")
    return Path(card).parent.name if isinstance(card, str) else None


def _prepare_datasets() -> None:
    """Keep the logs and bars of `datasets` off the terminal, and bound its retries.

    For good, because a stream is read between other work. A lost connection ends the stream after
    about a minute: each of these tries is up to six of the client's own, which take 23 s when they
    fail at once; by default `datasets` makes 20, up to a minute apart.
    """
    import datasets
    from datasets import config
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 2
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RETRY_INTERVAL
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = config.STREAMING_READ_RETRY_INTERVAL
