"""`kscli trace`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.tables import TRACED


def trace(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model before: as --model of other commands.")
    ],
    edited: Annotated[
        str, typer.Argument(metavar="EDITED", help="What it became: a folder, a Hub id or a file.")
    ],
    facts: options.Facts = None,
    count: options.Count = None,
    prompt_field: options.PromptField = None,
    subject_field: options.SubjectField = None,
    target_field: options.TargetField = None,
    contexts: options.ContextsOfMean = None,
    k: options.TopFacts = "20",
    cov: options.Cov = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    directory: options.Dir = Path("artifacts"),
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Find out which facts of an edited model were edited, and by which kind of editor.

    Compares the weights of two models, and reads cov.h5 of the first. An edit of fact i changes W
    along its direction d_i (C^-1 k for the paper and ROME). So d_i lies in the row space of the
    change. "share" is the part of d_i that lies there. "p-value" is the part of decoys that lie
    there as far: keys of the prompts' other tokens, and permuted keys. A fact counts as edited
    where most of its direction lies there, and more than chance allows over all facts (Benjamini
    and Hochberg, 5 %). A fact that lies there only because it is bound to an edited one is marked
    so.

    The directions of all editors are tried. The kind that explains most of the change is shown.
    Nothing is written. The facts that are tried are by default those that `kscli edit --save-model`
    has written into the folder of the edited model.

    Examples:
      kscli trace gpt2-small edited/ --facts counterfact --count 256
      kscli trace gpt-j ./downloaded --facts mine.jsonl -f json | jq '.[] | select(.edited).subject'
    """
    from kscli.artifacts import CovarianceFile, Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import facts_for, number_or_all
    from kscli.contexts import choose_contexts
    from kscli.editing.edited_folder import facts_of_edited
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    reporter = ConsoleReporter(quiet=quiet)
    listed = number_or_all("-k", k)
    own_names = {"prompt": prompt_field, "subject": subject_field, "target": target_field}
    chosen = choose_contexts(contexts or "0", ())
    of_base = ModelOptions(base, revision, device, dtype, trust_remote_code, allow_pickle)
    of_edited = replace(of_base, model=edited, revision=None)
    sessions = [Session(each, Existing.REFUSE, reporter) for each in (of_base, of_edited)]
    for each in sessions:
        each.require_model()
    whose = edited if facts_of_edited(edited) else base
    candidates = facts_for(whose, facts, count, reporter, own_names)
    with CovarianceFile(cov or Places(directory, base).path("cov")) as file:
        from kscli.tracing.stage import say_what_differs, trace_models

        before, after = (each.model for each in sessions)
        found = trace_models(before, after, file, candidates, chosen, reporter, seed)
    say_what_differs(found, edited, reporter)
    print_rows(found.rows(listed), TRACED, output_format)
