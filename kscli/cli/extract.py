"""`kscli extract`."""

from __future__ import annotations

from pathlib import Path

from kscli.cli import options


def extract(
    model: options.Model = options.DEFAULT_MODEL,
    facts: options.Facts = None,
    count: options.Count = None,
    token: options.Token = "subject-last",
    layers: options.Layers = "all",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    merge_adapter: options.MergeAdapter = False,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Read the key of every fact at the last token of its subject, at all layers in one pass.

    Writes keys.h5.

    Examples:
      kscli extract -m gpt2-small
      kscli extract -m pythia-1b --facts counterfact.json --count 512
      kscli extract -m ./my-llama --facts my-facts.csv --count all --layers 0,-1
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import facts_for
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    reporter = ConsoleReporter(quiet=quiet)
    session = Session(
        ModelOptions(
            model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        ),
        Existing.FORCE if force else Existing.REFUSE,
        reporter,
    )
    path = output or Places(directory, model).path("keys")
    if session.extract(facts_for(model, facts, count), token, layers, path):
        reporter.note(f"wrote {path}")
