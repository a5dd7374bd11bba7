"""`kscli extract`."""

from __future__ import annotations

from pathlib import Path

from kscli.cli import options


def extract(
    model: options.Model = options.DEFAULT_MODEL,
    facts: options.Facts = None,
    count: options.Count = None,
    prompt_field: options.PromptField = None,
    subject_field: options.SubjectField = None,
    target_field: options.TargetField = None,
    token: options.Token = "subject-last",
    contexts: options.Contexts = None,
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

    Writes keys.h5. It also holds the mean of a fact's keys after several texts, its contexts: ROME,
    MEMIT and others write along such a mean. `--contexts 0` leaves it out, which takes less time.

    Examples:
      kscli extract -m gpt2-small
      kscli extract -m pythia-1b --facts counterfact.json --count 512
      kscli extract -m ./my-llama --facts my-facts.csv --count all --layers 0,-1
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import facts_for
    from kscli.contexts import choose_contexts
    from kscli.editing.editors import ROME_CONTEXTS
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    own_names = {"prompt": prompt_field, "subject": subject_field, "target": target_field}
    reporter = ConsoleReporter(quiet=quiet)
    session = Session(
        ModelOptions(
            model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        ),
        Existing.FORCE if force else Existing.REFUSE,
        reporter,
    )
    path = output or Places(directory, model).path("keys")
    chosen = choose_contexts(contexts, ROME_CONTEXTS)
    session.require_model()
    chosen_facts = facts_for(model, facts, count, reporter, own_names)
    if session.extract(chosen_facts, token, layers, path, chosen):
        reporter.note(f"wrote {path}")
