"""Shards: the documents of one ordered corpus dealt out to several processes or machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kscli.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """The documents `index`, `index + count`, `index + 2 count`, … of a corpus."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, document: int) -> bool:
        """Whether the document of that number in the corpus, counted from 0, is in this shard."""
        return document % self.count == self.index

    def file_name(self) -> str:
        """What the shard's second moments are called in the model's folder."""
        return f"cov.shard-{self.index}-of-{self.count}.h5"


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """The shard that `I/N` names, I from 0 to N - 1; UsageError for anything else."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
    if match is None:
        raise UsageError(f"--shard {text} is not understood; write I/N, as in 0/4.")
    index, count = int(match[1]), int(match[2])
    if count == 0:
        raise UsageError(f"--shard {text}: there must be at least one shard, as in 0/1.")
    if index >= count:
        raise UsageError(
            f"--shard {text}: of {count} shards, the first is 0 and the last {count - 1}."
        )
    return Shard(index, count)
