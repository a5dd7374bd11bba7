"""`kscli corpus peek`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kscli.cli import options
from kscli.cli.commands import PLAIN, add
from kscli.cli.output import Format, print_rows
from kscli.tables import PEEKED

if TYPE_CHECKING:
    from kscli.peeking import Peeked


def peek(
    named: Annotated[
        str | None,
        typer.Argument(metavar="CORPUS", help="The same as --corpus.", show_default=False),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    text_field: options.TextField = None,
    shuffle: options.Shuffle = None,
    samples: options.Samples = "10",
    max_length: options.MaxLength = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Show the first documents of a corpus, and how many tokens of each `cache-cov` would take.

    They come in the order in which `cache-cov` reads them with the same options. The tokens are
    those of the model's tokenizer. Its weights are not read.

    Examples:
      kscli corpus peek texts/ -m gpt2-small
      kscli corpus peek hf:wikimedia/wikipedia:20231101.fr --shuffle none -m ./my-llama
      kscli corpus peek --corpus 'opus/train-*.parquet' --text-field translation.en --samples 100
    """
    from kscli.cli.stderr import say_at_once

    if not quiet:
        say_at_once("kscli corpus peek begins: the model's tokenizer is loaded.")
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import corpus_for, number_or_all
    from kscli.errors import UsageError
    from kscli.models.loading import read_tokenizer
    from kscli.models.locating import ModelOptions, locate_model

    if named and corpus:
        raise UsageError(f"{named} and --corpus {corpus} name two corpora; give one.")
    reporter = ConsoleReporter(quiet=quiet)
    most = number_or_all("--samples", samples)
    asked = ModelOptions(model, revision, trust_remote_code=trust_remote_code, weights=False)
    locate_model(asked, reporter)
    chosen = corpus_for(model, named or corpus, text_field, shuffle, reporter)
    tokenizer, longest = read_tokenizer(asked, reporter)
    from kscli.peeking import peek as peek_into

    documents = list(peek_into(tokenizer, chosen, most, max_length or longest))
    print_rows(map(asdict, documents), PEEKED, output_format)
    reporter.note(_sum(documents, model, max_length or longest))


def _sum(documents: Sequence[Peeked], model: str, max_length: int) -> str:
    """What the documents are together."""
    tokens = sum(document.tokens for document in documents)
    cut = sum(document.cut for document in documents)
    empty = sum(not document.tokens for document in documents)
    return (
        f"documents: {len(documents):,}, with {tokens:,} tokens of {model}; cut at {max_length:,} "
        f"tokens: {cut:,}; without a token: {empty:,}."
    )


corpus = typer.Typer(no_args_is_help=True, add_completion=False, **PLAIN)
add(corpus, peek)


@corpus.callback()
def _group() -> None:
    """Look at the text that C would be measured on."""
