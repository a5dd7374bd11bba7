"""`kscli edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.editing.editors import DEFAULT_EDITOR, defaults, editors_where, find_editor
from kscli.tables import EDITS

if TYPE_CHECKING:
    from kscli.cli.console import ConsoleReporter

_SEVERAL = editors_where(lambda editor: editor.several)
_WEIGHTED = editors_where(lambda editor: editor.weight is not None)


def edit(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    layer: options.EditedLayer = "0",
    fact: options.EditedFacts = None,
    edits: options.EditCount = "10",
    order: options.Order = "given",
    target_new: Annotated[
        str,
        typer.Option("--target-new", metavar="field:NAME|text:TARGET", help="The new target."),
    ] = "field:target_new",
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts",
            metavar="FACTS",
            help="The facts whose records hold the field of --target-new.",
            show_default="where keys.h5 has its facts from",
        ),
    ] = None,
    method: options.Method = DEFAULT_EDITOR,
    protocol: Annotated[
        Literal["sequential", "single"],
        typer.Option(
            "--protocol",
            help="sequential: each edit is made in the model that the edits before it have left. "
            "single: each edit is made in the clean model and is taken back.",
        ),
    ] = "sequential",
    value: Annotated[
        Literal["optimised", "random"],
        typer.Option(
            "--value",
            help="optimised: write a value with which the model says the new target. random: write "
            "a random vector.",
        ),
    ] = "optimised",
    value_norm: Annotated[
        float, typer.Option("--value-norm", min=0.0, help="The length of a random value.")
    ] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="The steps that the search for a value takes at most (v_num_grad_steps).",
            show_default=defaults(lambda editor: editor.value.steps),
        ),
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", min=0.0, help="The learning rate of that search (v_lr)."),
    ] = 0.5,
    kl_weight: Annotated[
        float,
        typer.Option(
            "--kl-weight",
            min=0.0,
            help="The weight of the loss term that keeps what else is said of the subject "
            "(kl_factor).",
        ),
    ] = 0.0625,
    norm_limit: Annotated[
        float | None,
        typer.Option(
            "--norm-limit",
            min=0.0,
            help="The longest change of a value, as a multiple of that value's own length "
            "(clamp_norm_factor).",
            show_default=defaults(lambda editor: editor.value.norm_limit),
        ),
    ] = None,
    prefixes: Annotated[
        int,
        typer.Option(
            "--prefixes",
            metavar="N",
            min=0,
            help="Find a value that holds also after N texts that the model makes up "
            "(context_templates).",
        ),
    ] = 0,
    weight: Annotated[
        float | None,
        typer.Option(
            "--weight",
            min=0.0,
            help=f"({_WEIGHTED}) The weight of C, lambda (mom2_update_weight).",
            show_default=defaults(lambda editor: editor.weight),
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help=f"({_SEVERAL}) The number of facts to edit at once."),
    ] = 1,
    measure_every: Annotated[
        int,
        typer.Option(
            "--measure-every",
            metavar="N",
            min=1,
            help="Ask the model for all facts after the first, the last and every N-th edit.",
        ),
    ] = 10,
    moved: Annotated[
        str,
        typer.Option(
            "--moved", metavar="K|all", help="After each edit, ask for the K facts of largest |p|."
        ),
    ] = "10",
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="CORPUS",
            help="Measure perplexity on this text, which C has not seen. It takes what --corpus of "
            "cache-cov takes.",
        ),
    ] = None,
    held_out_tokens: Annotated[
        int,
        typer.Option(
            "--held-out-tokens", metavar="N", min=2, help="The number of its tokens to take."
        ),
    ] = 2048,
    text_field: options.TextField = None,
    save_model: Annotated[
        Path | None,
        typer.Option(
            "--save-model",
            metavar="DIR",
            help="Write the edited model to this folder, in Hugging Face's format.",
        ),
    ] = None,
    seed: options.Seed = 0,
    cov: options.Cov = None,
    keys: options.Keys = None,
    pmatrix: options.PMatrix = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    merge_adapter: options.MergeAdapter = False,
    directory: options.Dir = Path("artifacts"),
    output: options.EditsOutput = None,
    force: options.Force = False,
    output_format: options.OutputFormat = Format.table,
    quiet: options.Quiet = False,
) -> None:
    """Edit facts of a model one after the other, and measure what becomes of all others.

    The damage of every edit is predicted from pmatrix.h5 before it is made, and measured after it.
    The model's own files never change. A run that was stopped goes on after its last edit. The
    names in brackets are those of ROME's, MEMIT's and EasyEdit's hyper-parameters.

    Examples:
      kscli edit -m gpt2-small --layer 0 --fact "Patrick Rambaud" --target-new text:Italian
      kscli edit -m gpt-j --layer 5 --edits 100 --seed 1 --held-out other.jsonl -f json > edits.json
      kscli edit -m gpt-j --method memit --layers 3-8 --edits 100 --batch 100
      kscli edit -m gpt2-small --layer 5 --protocol single --edits 40 --moved all
      kscli edit -m gpt2-small --edits 10 --save-model edited/ && kscli facts check -m edited/
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import number_or_all, refuse_given, require_above_0, require_finite
    from kscli.corpus import CorpusSpec, open_corpus
    from kscli.editing.loop import EditOptions
    from kscli.editing.saving import require_new_folder
    from kscli.editing.sources import EditSources
    from kscli.editing.stage import EditRequest, HeldOut, edit_model
    from kscli.editing.value import ValueOptions
    from kscli.layers import format_layers
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    editor = find_editor(method)
    reporter = ConsoleReporter(quiet=quiet)
    places = Places(directory, model)
    if save_model:
        require_new_folder(save_model)
    of_values = ("steps", "learning_rate", "kl_weight", "norm_limit", "prefixes")
    for idle, names, reason in (
        (fact, ("edits",), "with --fact"),
        (value != "random", ("value_norm",), "without --value random"),
        (value == "random", of_values, "with --value random"),
        (editor.weight is None, ("weight",), f"without --method {_WEIGHTED}"),
        (not held_out, ("held_out_tokens", "text_field"), "without --held-out"),
        (target_new.startswith("text:"), ("facts",), "with --target-new text:..."),
        (protocol == "single", ("measure_every",), "with --protocol single, which always does"),
    ):
        if idle:
            refuse_given(context, names, reason)
    of_sizes = {
        "--learning-rate": learning_rate,
        "--norm-limit": norm_limit,
        "--value-norm": value_norm,
    }
    require_above_0(of_sizes)
    require_finite({**of_sizes, "--kl-weight": kl_weight, "--weight": weight})
    edit_options = EditOptions(
        method=method,
        protocol=protocol,
        find=ValueOptions(
            steps=editor.value.steps if steps is None else steps,
            learning_rate=learning_rate,
            kl_weight=kl_weight,
            norm_limit=editor.value.norm_limit if norm_limit is None else norm_limit,
        ),
        random_norm=value_norm if value == "random" else None,
        weight=(editor.weight or 0.0) if weight is None else weight,
        batch=batch,
        prefixes=prefixes,
        measure_every=measure_every,
        moved=number_or_all("--moved", moved),
        seed=seed,
    )
    request = EditRequest(
        facts=tuple(fact or ()),
        count=number_or_all("--edits", edits),
        order=order,
        target_new=target_new,
        target_source=facts,
        options=edit_options,
        held_out=HeldOut(open_corpus(CorpusSpec(held_out, text_field)), held_out_tokens)
        if held_out
        else None,
    )
    session = Session(
        ModelOptions(
            model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        ),
        Existing.FORCE if force else Existing.REFUSE,
        reporter,
    )
    with EditSources.open(places, layer, cov=cov, keys=keys, pmatrix=pmatrix) as sources:
        plan = request.plan(sources)
        name = f"{method}-{format_layers(sources.layers)}-{seed}.h5"
        path = output or places.folder / "edits" / name
        rows = edit_model(session, sources, plan, path, save_model)
    print_edits(rows, output_format)
    if value == "optimised":
        note_how_many_took(rows, reporter)


def note_how_many_took(rows: list[dict[str, Any]], reporter: ConsoleReporter) -> None:
    """Say after how many edits the model says the new target, and what may help the others."""
    took = sum(row["rank_new_after"] == 1 for row in rows)
    said = f"the new target's first token is the first choice right after {took} of {len(rows)}"
    if took < len(rows):
        reporter.note(f"{said} edits; more --steps, or another --layer, may write the others.")


def print_edits(rows: list[dict[str, Any]], output_format: Format) -> None:
    """Print edits: all that is known of them for JSON, one line each for people."""
    from kscli.layers import format_layers

    if output_format in (Format.csv, Format.tsv):
        # One line has no room for a list of facts.
        rows = [{name: of for name, of in row.items() if name != "moved"} for row in rows]
        rows = [row | {"layers": format_layers(row["layers"])} for row in rows]
    print_rows(rows, EDITS, output_format)
