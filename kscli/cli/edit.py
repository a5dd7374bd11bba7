"""`kscli edit`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.tables import EDITS

if TYPE_CHECKING:
    from kscli.cli.console import ConsoleReporter
    from kscli.editing.sources import EditSources
    from kscli.places import Places


def edit(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    layer: options.EditedLayer = "0",
    fact: options.EditedFacts = None,
    edits: options.EditCount = "10",
    order: options.Order = "given",
    target_new: Annotated[
        str,
        typer.Option(
            "--target-new", metavar="field:NAME|text:TARGET", help="What to write for the target."
        ),
    ] = "field:target_new",
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts",
            metavar="FACTS",
            help="Where --target-new's field is read.",
            show_default="where keys.h5 has its facts from",
        ),
    ] = None,
    method: Annotated[
        Literal["rome", "memit"], typer.Option("--method", help="The closed form.")
    ] = "rome",
    protocol: Annotated[
        Literal["sequential", "single"],
        typer.Option(
            "--protocol", help="One edit upon the other, or each in the clean model and taken back."
        ),
    ] = "sequential",
    value: Annotated[
        Literal["optimised", "random"],
        typer.Option(
            "--value", help="What is written: a value that says the new target, or noise."
        ),
    ] = "optimised",
    value_norm: Annotated[
        float, typer.Option("--value-norm", min=0.0, help="The length of random values.")
    ] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="Steps of the optimisation of a value.",
            show_default="20; memit 25",
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=0.0, help="Of that optimisation.")
    ] = 0.5,
    kl_weight: Annotated[
        float,
        typer.Option(
            "--kl-weight", min=0.0, help="What keeping all else said of the subject weighs."
        ),
    ] = 0.0625,
    norm_limit: Annotated[
        float | None,
        typer.Option(
            "--norm-limit",
            min=0.0,
            help="How much longer than the value itself its change may get.",
            show_default="4; memit 0.75",
        ),
    ] = None,
    prefixes: Annotated[
        int,
        typer.Option(
            "--prefixes",
            metavar="N",
            min=0,
            help="Find values after N texts that the model makes up, too, as ROME does.",
        ),
    ] = 0,
    weight: Annotated[
        float,
        typer.Option("--weight", min=0.0, help="(memit) Its lambda: what the known weighs."),
    ] = 15000.0,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="(memit) How many edits are made at once.")
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
            "--moved", metavar="K|all", help="After each edit, ask for the K facts it moves most."
        ),
    ] = "10",
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="CORPUS",
            help="Measure perplexity on text that C did not see: a --corpus of cache-cov's kinds.",
        ),
    ] = None,
    held_out_tokens: Annotated[
        int, typer.Option("--held-out-tokens", metavar="N", min=2, help="As many tokens of it.")
    ] = 2048,
    text_field: options.TextField = None,
    save_model: Annotated[
        Path | None,
        typer.Option(
            "--save-model", metavar="DIR", help="Write the edited model, a Hugging Face folder."
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
    directory: options.Dir = Path("artifacts"),
    output: options.EditsOutput = None,
    force: options.Force = False,
    output_format: options.OutputFormat = Format.table,
    quiet: options.Quiet = False,
) -> None:
    """Edit facts of a model one after the other, and measure what becomes of all others.

    Every edit's damage is predicted from pmatrix.h5 before it is made, and measured after it. The
    model's own files are never changed; a run that was stopped goes on from its last edit.

    Examples:
      kscli edit -m gpt2-small --layer 0 --fact "Patrick Rambaud" --target-new text:Italian
      kscli edit -m gpt-j --layer 5 --edits 100 --seed 1 --held-out other.jsonl -f json > edits.json
      kscli edit -m gpt-j --method memit --layers 3-8 --edits 100 --batch 100
      kscli edit -m gpt2-small --layer 5 --protocol single --edits 40 --moved all
      kscli edit -m gpt2-small --edits 10 --save-model edited/ && kscli facts check -m edited/
    """
    from kscli.artifacts import Existing, must_make
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import number_or_all, refuse_given, require_finite
    from kscli.corpus import CorpusSpec, open_corpus
    from kscli.editing.edits_file import EditsFile
    from kscli.editing.fact_choice import find_facts
    from kscli.editing.order import edit_order
    from kscli.editing.run import Edit, EditOptions
    from kscli.editing.saving import require_new_folder
    from kscli.editing.saving import save_model as save_edited
    from kscli.editing.stage import (
        EditPlan,
        HeldOut,
        check_held_out,
        check_request,
        choose_facts,
        discard_checkpoint,
        edits_recipe,
        make_edits,
        new_targets,
        replay_edits,
    )
    from kscli.editing.value import ValueOptions
    from kscli.errors import UsageError
    from kscli.layers import format_layers
    from kscli.models.loading import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    reporter = ConsoleReporter(quiet=quiet)
    places = Places(directory, model)
    if save_model:
        require_new_folder(save_model)
    of_values = ("steps", "learning_rate", "kl_weight", "norm_limit", "prefixes")
    for idle, names, reason in (
        (fact, ("edits",), "with --fact"),
        (value != "random", ("value_norm",), "without --value random"),
        (value == "random", of_values, "with --value random"),
        (method != "memit", ("weight",), "without --method memit"),
        (not held_out, ("held_out_tokens", "text_field"), "without --held-out"),
        (target_new.startswith("text:"), ("facts",), "with --target-new text:..."),
        (protocol == "single", ("measure_every",), "with --protocol single, which always does"),
    ):
        if idle:
            refuse_given(context, names, reason)
    for option, given in (
        ("--learning-rate", learning_rate),
        ("--norm-limit", norm_limit),
        ("--value-norm", value_norm),
    ):
        if given == 0:
            raise UsageError(f"{option} 0 writes nothing; name one above 0.")
    require_finite(
        {"--value-norm": value_norm, "--learning-rate": learning_rate, "--kl-weight": kl_weight}
        | {"--norm-limit": norm_limit, "--weight": weight}
    )
    most_steps, longest = (20, 4.0) if method == "rome" else (25, 0.75)
    find = ValueOptions(
        steps=most_steps if steps is None else steps,
        learning_rate=learning_rate,
        kl_weight=kl_weight,
        norm_limit=longest if norm_limit is None else norm_limit,
    )
    edit_options = EditOptions(
        method=method,
        protocol=protocol,
        find=find,
        random_norm=value_norm if value == "random" else None,
        weight=weight if method == "memit" else 0.0,
        batch=batch,
        prefixes=prefixes,
        measure_every=measure_every,
        moved=number_or_all("--moved", moved),
        seed=seed,
    )
    with ExitStack() as stack:
        sources = _open_sources(cov, keys, pmatrix, places, layer, stack)
        check_request(edit_options, sources.layers, save_model)
        chosen = (
            find_facts(sources.pm, fact)
            if fact
            else choose_facts(sources, number_or_all("--edits", edits), seed)
        )
        chosen = edit_order(order, sources.pm.leverage(sources.layers[0]), chosen, seed)
        targets = new_targets(sources.pm, chosen, target_new, facts)
        plan = EditPlan(
            tuple(map(Edit, chosen, targets)),
            order,
            edit_options,
            HeldOut(open_corpus(CorpusSpec(held_out, text_field)), held_out_tokens)
            if held_out
            else None,
        )
        check_held_out(plan, sources, reporter)
        name = f"{method}-{format_layers(sources.layers)}-{seed}.h5"
        path = output or places.folder / "edits" / name
        session = Session(
            ModelOptions(model, revision, device, dtype, trust_remote_code, allow_pickle),
            Existing.FORCE if force else Existing.REFUSE,
            reporter,
        )
        recipe = edits_recipe(sources, plan, session.dtype)
        made = must_make(path, "edits", recipe, session.existing, reporter)
        if made:
            make_edits(session.model, sources, plan, path, recipe, reporter=reporter, force=force)
    if made:
        reporter.note(f"wrote {path}")
    else:
        discard_checkpoint(path, recipe)
    with EditsFile(path) as file:
        rows = file.objects()
        if save_model:
            if not made:
                replay_edits(session.model, file, reporter)
            save_edited(session.model, save_model, rows)
            reporter.note(f"wrote {save_model}")
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


def _open_sources(
    cov: Path | None,
    keys: Path | None,
    pmatrix: Path | None,
    places: Places,
    layer: str,
    stack: ExitStack,
) -> EditSources:
    from kscli.artifacts import CovarianceFile, KeysFile
    from kscli.cli.requests import open_pmatrices
    from kscli.editing.sources import EditSources
    from kscli.layers import select_layers

    (pm,) = open_pmatrices([pmatrix or places.path("pmatrix")], stack)
    return EditSources(
        stack.enter_context(CovarianceFile(cov or places.path("cov"))),
        stack.enter_context(KeysFile(keys or places.path("keys"))),
        pm,
        select_layers(layer, pm.layers, str(pm.path)),
    )
