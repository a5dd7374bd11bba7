"""`kscli facts check` and `kscli facts select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options
from kscli.cli.commands import PLAIN, add
from kscli.cli.output import Format, print_rows
from kscli.tables import Column

FILE_NAME = "facts.jsonl"


def check(
    model: options.Model = options.DEFAULT_MODEL,
    facts: options.Facts = None,
    count: options.HowMany = "all",
    prompt_field: options.PromptField = None,
    subject_field: options.SubjectField = None,
    target_field: options.TargetField = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    merge_adapter: options.MergeAdapter = False,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    output_format: options.OutputFormat = Format.table,
    quiet: options.Quiet = False,
) -> None:
    """Find which facts a model knows: its greedy continuation begins with the target.

    Takes the first N facts of --count. Writes facts.jsonl, a facts file. It says of every fact
    whether the model knows it (known), the probability of the target, the rank of the target's
    first token, and the continuation.

    Examples:
      kscli facts check -m gpt2-small
      kscli facts check -m pythia-1b --facts counterfact.json --count 512
      jq -r 'select(.known | not) | .prompt + " ->" + .continuation' artifacts/tiny/facts.jsonl
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import facts_for
    from kscli.editing.edited_folder import edits_of_folder
    from kscli.facts import require_facts_path
    from kscli.files import require_other
    from kscli.knowledge import check_facts, write_knowledge
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    own_names = {"prompt": prompt_field, "subject": subject_field, "target": target_field}
    reporter = ConsoleReporter(quiet=quiet)
    path = output or Places(directory, model).folder / FILE_NAME
    if facts:
        require_other(path, [facts])
    require_facts_path(path, force=force)
    edits = edits_of_folder(model)
    if edits and dtype == "auto":
        dtype = "float32"
        reporter.note(f"{model} is asked in float32, in which `kscli edit` measures.")
    chosen = ModelOptions(
        model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
    )
    session = Session(chosen, Existing.FORCE if force else Existing.REFUSE, reporter)
    session.require_model()
    asked = facts_for(model, facts, count, reporter, own_names).facts
    loaded = session.model
    checked = check_facts(loaded, asked, reporter)
    write_knowledge(loaded, checked, path, force=force)
    reporter.note(f"wrote {path}")
    if edits:
        said = sum(each.known for each in check_facts(loaded, edits))
        reporter.note(f"{model} says the new target of {said} of its {len(edits)} edited facts.")
    known = sum(each.known for each in checked)
    row = {
        "model": loaded.identity.model,
        "facts": len(checked),
        "known": known,
        "share": known / len(checked),
        "path": str(path),
    }
    columns = [
        Column("model"),
        Column("facts", spec=",d"),
        Column("known", spec=",d"),
        Column("share", spec=".1%"),
    ]
    print_rows([row], columns, output_format)


def select(
    results: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|MODEL",
            help="What `facts check` wrote, or the models that it checked.",
            show_default="tiny",
        ),
    ] = None,
    model: options.Models = None,
    count: options.HowMany = "128",
    seed: options.Seed = 0,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Draw facts that none of the models knows.")
    ] = False,
    directory: options.Dir = Path("artifacts"),
    output: options.FactsOutput = Path("facts.jsonl"),
    force: options.Force = False,
    output_format: options.OutputFormat = Format.table,
    quiet: options.Quiet = False,
) -> None:
    """Draw facts that all of several models know, and write them as a facts file.

    Examples:
      kscli facts select gpt2-medium gpt-j pythia-1b -o known.jsonl
      kscli facts select gpt2-small --unknown --count all -o unknown.jsonl
      kscli extract -m gpt-j --facts known.jsonl
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import number_or_all
    from kscli.facts import fact_record, require_facts_path, write_records
    from kscli.files import require_other
    from kscli.knowledge import read_knowledge, select_facts

    require_facts_path(output, force=force)
    named = [*(results or []), *(model or [])] or [options.DEFAULT_MODEL]
    paths = [_path(name, directory) for name in named]
    require_other(output, paths)
    number = number_or_all("--count", count)
    read = [read_knowledge(path) for path in paths]
    selection = select_facts(read, number, seed, unknown=unknown)
    write_records(output, map(fact_record, selection.facts), force=force)
    ConsoleReporter(quiet=quiet).note(f"wrote {output}")
    row = {
        "models": ", ".join(each.model for each in read),
        "facts": len(read[0].known),
        "unknown": unknown,
        "candidates": selection.candidates,
        "selected": len(selection.facts),
        "path": str(output),
    }
    columns = [
        Column("models"),
        Column("facts", spec=",d"),
        Column("candidates", "known to none" if unknown else "known to all", spec=",d"),
        Column("selected", spec=",d"),
    ]
    print_rows([row], columns, output_format)


def _path(name: str, directory: Path) -> Path:
    from kscli.cli.remedies import command_for
    from kscli.errors import FactsError
    from kscli.places import Places

    path = Path(name)
    if path.suffix == ".jsonl" or (path.is_file() and path.suffix != ".gguf"):
        return path
    path = Places(directory, name).folder / FILE_NAME
    if not path.exists():
        made_by = command_for("facts check", name, directory)
        raise FactsError(f"{path} does not exist; {made_by} makes it.")
    return path


facts = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Find the facts that models know, and choose among them.",
    **PLAIN,
)
add(facts, check)
add(facts, select)
