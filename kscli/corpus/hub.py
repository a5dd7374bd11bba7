"""Corpora of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kscli.corpus.documents import CorpusSpec, documents, field_part
from kscli.errors import CorpusError
from kscli.hub_datasets import HubDataset, HubSource, open_dataset

ALIASES = {
    "wikipedia": HubSource("wikimedia/wikipedia", "20231101.en"),
    # The repository holds this dump as 41 Parquet files, but beside them the old
    # `wikipedia.py`, for which `load_dataset(repository, config)` has refused it
    # since datasets 4.0: so the files are named themselves, at the last commit seen.
    "wikipedia-20220301": HubSource(
        "legacy-datasets/wikipedia",
        "20220301.en",
        files="data/20220301.en/train-*.parquet",
        revision="97a0b052c326b45fb68593a14972d9eed884cd17",
    ),
}


@dataclass(frozen=True)
class HubCorpus:
    """A data set of the Hub, streamed."""

    name: str
    text_field: str
    dataset: HubDataset

    @property
    def identity(self) -> str:
        """Repository, configuration, split, field, and the commit where it is known."""
        source, commit = self.dataset.source, self.dataset.commit
        name = f"hf:{source.repository}:{source.config or 'default'}:{'+'.join(source.splits)}"
        return f"{name}{field_part(self.text_field)}{f'@{commit}' if commit else ''}"

    def documents(self) -> Iterator[str]:
        """Stream them; see `Corpus.documents`. Raises at once if the Hub did not answer."""
        rows = self.dataset.records()
        records = ((f"{self.name}, document {number}", row) for _, number, row in rows)
        return documents(records, self.text_field, self.name)


def open_hub(spec: CorpusSpec, source: HubSource) -> HubCorpus:
    """The corpus of `source`; raises CorpusError where the Hub has no such data set."""
    dataset = open_dataset(source, CorpusError, "give a file or folder as --corpus")
    return HubCorpus(spec.name, spec.field, dataset)
