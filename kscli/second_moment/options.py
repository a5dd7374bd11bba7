"""What cache-cov is asked for: what is measured, and how the run goes about it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kscli.errors import UsageError

if TYPE_CHECKING:
    from kscli.corpus import Corpus
    from kscli.second_moment.ranks import Ranks


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


@dataclass(frozen=True)
class CovarianceOptions:
    """How much of a corpus is read, and which layers are measured.

    `samples` documents at most and `tokens` tokens at most (None: no limit), each document
    cut at `max_length` tokens (None: the model's positions, 2048 at most). `until_settled` stops
    as soon as p is settled to so much (rms; see `settling`). A `shard` is every Nth of these
    documents.
    """

    samples: int | None = 100_000
    tokens: int | None = None
    max_length: int | None = None
    layers: str = "all"
    until_settled: float | None = None
    shard: Shard = WHOLE

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        if self.until_settled is not None and not 0 < self.until_settled < float("inf"):
            raise UsageError(f"--until-settled {self.until_settled} must be more than 0.")

    def own_share(self, longest: int, ranks: Ranks | None) -> CovarianceOptions:
        """What this process reads, of a model that takes documents of `longest` by default."""
        shard = ranks.shard if ranks else self.shard
        return replace(self, max_length=self.max_length or longest, shard=shard)

    def check(self, corpus: Corpus, ranks: Ranks | None) -> None:
        """Raise UsageError where a corpus or ranks do not go with these options."""
        parts = ranks is not None or self.shard != WHOLE
        if ranks and self.shard != WHOLE:
            raise UsageError(
                f"--shard {self.shard} was given to {ranks.shard.count} ranks, which share the "
                "documents by themselves; leave it out, or start one process a shard."
            )
        if parts and reads_stdin(corpus):
            raise UsageError(
                "standard input goes to one process, and cannot be shared; save it to a file that "
                "all can read, and give that as --corpus."
            )
        if parts and self.until_settled is not None:
            raise UsageError(
                "--until-settled looks at the whole stream of documents, of which each process has "
                "a part here; bound the run with --tokens or --samples."
            )


def reads_stdin(corpus: Corpus) -> bool:
    """Whether the corpus is standard input, which can be read once."""
    return corpus.identity.startswith("stdin:")


@dataclass(frozen=True)
class Execution:
    """How cache-cov is run; what it measures does not depend on it, but for rounding.

    `batch_tokens` and `max_memory` (bytes) of None are chosen by the memory plan; a checkpoint
    is written about every `checkpoint_every` seconds; `ranks` are processes that work together.
    """

    batch_tokens: int | None = None
    max_memory: int | None = None
    checkpoint_every: float = 300.0
    ranks: Ranks | None = None
