"""`kscli cache-cov`."""

from __future__ import annotations

from pathlib import Path

import typer

from kscli.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("cache-cov")(cache_cov)


def cache_cov(
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    text_field: options.TextField = None,
    samples: options.Samples = "100000",
    tokens: options.Tokens = None,
    max_length: options.MaxLength = None,
    layers: options.Layers = "all",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure C = E\\[k k'], the second moment of every layer's keys, over a corpus.

    One pass of the model for all layers. Writes cov.h5.

    [bold]Examples[/bold]

      kscli cache-cov -m gpt2-small --samples 20000

      kscli cache-cov -m ./my-llama --corpus texts/ --max-length 512 --layers 0,5-8

      zcat dump.jsonl.gz | kscli cache-cov -m pythia-1b --corpus - --samples all
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import corpus_for, covariance_options
    from kscli.models.loading import ModelOptions
    from kscli.pipeline import Existing, Places, Session

    reporter = ConsoleReporter(quiet=quiet)
    session = Session(
        ModelOptions(model, revision, device, dtype, trust_remote_code, allow_pickle),
        Existing.FORCE if force else Existing.REFUSE,
        reporter,
    )
    path = output or Places(directory, model).path("cov")
    made = session.cache_cov(
        corpus_for(model, corpus, text_field),
        covariance_options(samples, tokens, max_length, layers),
        path,
    )
    if made:
        reporter.note(f"wrote {path}")
