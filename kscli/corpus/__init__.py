"""The documents that C is averaged over: local files, folders, standard input, the Hub.

`open_corpus` checks what the user named and says who it is (`identity`); the text itself is
streamed by `Corpus.documents`, so a corpus larger than memory is no larger here than one of
its documents. Each kind of corpus is a module that turns it into (place, value) pairs, and
`documents` takes the text out of the values.
"""

from __future__ import annotations

from kscli.corpus.documents import Corpus, CorpusSpec
from kscli.corpus.files import open_files
from kscli.corpus.hub import ALIASES, open_hub
from kscli.corpus.stdin import StdinCorpus
from kscli.corpus.tiny import TinyCorpus
from kscli.errors import CorpusError
from kscli.hub_datasets import parse_source

__all__ = ["Corpus", "CorpusSpec", "open_corpus"]


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Find the corpus that `spec` names; raises CorpusError if there is none of a known kind."""
    if spec.name == "-":
        return StdinCorpus(spec.field)
    if spec.name == "tiny":
        return TinyCorpus()
    if spec.name in ALIASES:
        return open_hub(spec, ALIASES[spec.name])
    if spec.name.startswith("hf:"):
        return open_hub(spec, parse_source(spec.name, CorpusError))
    return open_files(spec)
