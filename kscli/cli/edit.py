"""`kscli edit`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_rows
from kscli.editing.editors import DEFAULT_EDITOR, editors_where
from kscli.tables import EDITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kscli.artifacts import Artifact
    from kscli.cli.console import ConsoleReporter
    from kscli.editing.own_facts import OwnFacts
    from kscli.editing.sources import EditSources
    from kscli.editing.stage import EditPlan

_AT_ONCE = editors_where(lambda editor: editor.at_once)
_KEEPING = editors_where(lambda editor: editor.afterwards.keep is not None)
FIELD = "field:target_new"
"""The default of --target-new."""
_BY_EDITOR = "by editor and model, see `kscli editors`"


def edit(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    layer: options.EditedLayer = None,
    fact: options.EditedFacts = None,
    edits: options.EditCount = "10",
    order: options.Order = "given",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Edit a fact of your own instead: its prompt, with {} where the --subject stands. "
            "Several go into a file for --facts.",
        ),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option("--subject", metavar="TEXT", help="(--prompt) The fact's subject."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="TEXT",
            help="(--prompt) What completes the prompt before the edit.",
            show_default="what the model says",
        ),
    ] = None,
    target_new: Annotated[
        str,
        typer.Option(
            "--target-new",
            metavar="TEXT|field:NAME",
            help="The new target: a text, or the field of the facts' records that holds it. "
            "text: before a text keeps it from being a field.",
        ),
    ] = FIELD,
    facts: Annotated[
        str | None,
        typer.Option(
            "--facts",
            metavar="FACTS",
            help="The facts whose records hold the field of --target-new. Where it has not all "
            "facts of keys.h5, its facts are edited, as your own.",
            show_default="where keys.h5 has its facts from",
        ),
    ] = None,
    method: options.Method = DEFAULT_EDITOR,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="MODEL|none",
            help="Take the settings that are published, or measured with kscli, for this model.",
            show_default="those of --model, if there are any",
        ),
    ] = None,
    protocol: Annotated[
        Literal["sequential", "single"],
        typer.Option(
            "--protocol",
            help="sequential: each edit is made in the model that the edits before it have left. "
            "single: each edit is made in the clean model and is taken back.",
        ),
    ] = "sequential",
    value: Annotated[
        str,
        typer.Option(
            "--value",
            metavar="optimised|random|FILE",
            help="optimised: write a value with which the model says the new target. random: write "
            "a random vector. A file of `kscli edit`: write the values that this run found.",
        ),
    ] = "optimised",
    value_norm: Annotated[
        float,
        typer.Option("--value-norm", metavar="X", min=0.0, help="The length of a random value."),
    ] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=2,
            help="The passes of the model that the search for a value takes at most. They change "
            "the value N-1 times (v_num_grad_steps).",
            show_default=_BY_EDITOR,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            min=0.0,
            help="The learning rate of that search (v_lr).",
            show_default=_BY_EDITOR,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            "--weight-decay",
            metavar="X",
            min=0.0,
            help="The weight of the loss term that keeps the change of a value short "
            "(v_weight_decay).",
            show_default=_BY_EDITOR,
        ),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            "--kl-weight",
            metavar="X",
            min=0.0,
            help="The weight of the loss term that keeps what else is said of the subject "
            "(kl_factor).",
            show_default=_BY_EDITOR,
        ),
    ] = None,
    likelihood_weight: Annotated[
        float,
        typer.Option(
            "--likelihood-weight",
            metavar="X",
            min=0.0,
            help="The weight of the loss term that makes the model say the new target "
            "(nll_loss_factor).",
        ),
    ] = 1.0,
    norm_limit: Annotated[
        float | None,
        typer.Option(
            "--norm-limit",
            metavar="X",
            min=0.0,
            help="The longest change of a value, as a multiple of that value's own length "
            "(clamp_norm_factor).",
            show_default=_BY_EDITOR,
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            metavar="FILE|N",
            help="The context templates: find a value that holds in them too, and average keys "
            "over them, as the editor does. A file of texts, one a line, with {} for the prompt; "
            "or the number of texts of 10 tokens that the model makes up (context_templates, "
            "context_template_length_params).",
            show_default="as many as published, made up; 0 with closed-form",
        ),
    ] = None,
    weight: options.Weight = None,
    null_space: options.NullSpace = None,
    relative_null_space: options.RelativeNullSpace = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help=f"({_KEEPING}) The share of the change's entries that is kept: those that change "
            "W most, relatively.",
            show_default="0.4",
        ),
    ] = None,
    protect: options.Protect = None,
    protect_at: options.ProtectAt = "tokens",
    protect_ridge: options.ProtectRidge = None,
    max_price: options.MaxPrice = None,
    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            metavar="N",
            min=1,
            help=f"({_AT_ONCE}) The number of facts to edit at once.",
        ),
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
    generations: Annotated[
        int,
        typer.Option(
            "--generations",
            metavar="N",
            min=0,
            help="The texts that the model makes up about each edited fact, each time that it is "
            "asked for all facts: fluency (GE) is measured on them.",
        ),
    ] = 1,
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

    With --protect the edits leave the values of other facts where they are, with the least change
    to all other text. The price is said before the first edit: how many times as much as a plain
    edit such an edit changes in all text.

    With --prompt a fact of your own is edited, and with --facts the facts of a file. Their keys and
    p are made on the way, and the facts of keys.h5 are watched beside them.

    Examples:
      kscli edit -m gpt2-small --prompt "The capital of {} is" --subject France --target-new Rome
      kscli edit -m gpt2-small --layer 0 --fact "Patrick Rambaud" --target-new Italian
      kscli edit -m gpt-j --method rome --edits 100 --held-out other.jsonl -f json > edits.json
      kscli edit -m gpt-j --method memit --edits 100 --batch 100
      kscli edit -m llama3-8b --method alphaedit --edits 100 --batch 10 --contexts contexts.txt
      kscli edit -m gpt2-small --method joint --edits 20 --protect known --max-price 5
      kscli edit -m gpt2-small --layer 5 --protocol single --edits 40 --moved all
      kscli edit -m gpt2-small --edits 10 --save-model edited/ && kscli facts check -m edited/
    """
    from kscli.artifacts import CovarianceFile, Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.explaining import (
        explain_columns,
        explainer,
        suggest_check,
        suggest_verify,
    )
    from kscli.cli.requests import (
        is_given,
        named_corpus,
        number_or_all,
        refuse_given,
    )
    from kscli.editing.edited_folder import require_new_folder
    from kscli.layers import format_layers, select_layers
    from kscli.models.aliases import classify
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places

    reporter = ConsoleReporter(quiet=quiet)
    places = Places(directory, model)
    count, of_largest_p = number_or_all("--edits", edits), number_or_all("--moved", moved)
    if save_model:
        require_new_folder(save_model)
    for idle, names, reason in (
        (fact, ("edits",), "with --fact"),
        (not held_out, ("held_out_tokens", "text_field"), "without --held-out"),
        (not target_new.startswith("field:"), ("facts",), "with a text for --target-new"),
        (prompt is None, ("subject", "target"), "without --prompt TEXT"),
        (
            prompt is not None,
            ("fact", "edits", "order", "facts", "keys", "pmatrix"),
            "with --prompt",
        ),
    ):
        if idle:
            refuse_given(context, names, reason)
    own = None if prompt is None else fact_of_prompt(prompt, subject, target, target_new)
    session = Session(
        ModelOptions(
            model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        ),
        Existing.FORCE if force else Existing.REFUSE,
        reporter,
    )
    # Of a model on the Hub that was measured, its files say first what is wrong; they are here.
    if classify(model) != "hub" or not places.folder.exists():
        session.require_model()
    text = named_corpus(held_out, text_field, reporter) if held_out else None

    # These import PyTorch, which takes seconds: what needs none of it is refused before.
    from kscli.editing.own_facts import OwnFacts, own_files
    from kscli.editing.presets import default_layers
    from kscli.editing.settings import EditSettings
    from kscli.editing.sources import EditSources
    from kscli.editing.stage import EditRequest, HeldOut, edit_model, run_path

    settings = EditSettings(
        method=method,
        preset=preset,
        protocol=protocol,
        value=value,
        value_norm=value_norm,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        kl_weight=kl_weight,
        likelihood_weight=likelihood_weight,
        norm_limit=norm_limit,
        contexts=contexts,
        weight=weight,
        null_space=null_space,
        relative_null_space=relative_null_space,
        keep=keep,
        protect=protect,
        protect_at=protect_at,
        protect_ridge=protect_ridge,
        max_price=max_price,
        batch=batch,
        measure_every=measure_every,
        moved=of_largest_p,
        generations=generations,
        seed=seed,
    )
    editor, published = settings.editor(model)
    for unused, reason in settings.without_effect(editor):
        refuse_given(context, unused, reason)
    edit_options, of_file = settings.options(editor)
    at_most = not is_given(context, "edits")
    if prompt is None and facts is not None:
        field = target_new.removeprefix("field:")
        own = OwnFacts.of_file(facts, keys or places.path("keys"), field)
        if own:
            refuse_given(context, ("keys", "pmatrix"), "with facts of your own")
            own = own.choose(fact or (), count, seed, at_most=at_most)
            reporter.note(f"{len(own.facts)} of the facts of {facts} are edited as your own.")
    request = EditRequest(
        facts=tuple(fact or ()),
        count=count,
        at_most=at_most,
        order=order,
        target_new=FIELD if own else target_new,
        target_source=None if own else facts,
        options=edit_options,
        held_out=HeldOut(text, held_out_tokens) if text else None,
        protected=of_file,
        values_of=settings.values_of,
        first=len(own.facts) if own else None,
    )

    def layers_of(file: Artifact) -> str:
        default, why = default_layers(editor, published, file)
        if published:
            reporter.note(published.sentence)
        if layer is None:
            reporter.note(f"{method} edits layer {default}, {why}; --layer names another.")
        return layer or default

    with ExitStack() as stack:
        spec: str | Callable[[Artifact], str] = layers_of
        if own:
            of_text = stack.enter_context(CovarianceFile(cov or places.path("cov")))
            layers = select_layers(layers_of(of_text), of_text.layers, str(of_text.path))
            made = own_files(session, own, of_text, places, layers)
            keys, pmatrix = stack.enter_context(made)
            spec = format_layers(layers)
        sources = stack.enter_context(
            EditSources.open(places, spec, cov=cov, keys=keys, pmatrix=pmatrix)
        )
        plan = request.plan(sources)
        if own is None:
            say_several_facts(fact or (), plan, sources, reporter)
        path = output or run_path(places.folder / "edits", sources, plan, session.dtype)
        rows = edit_model(session, sources, plan, path, save_model)
    from_model = own is not None and not own.has_targets
    print_edits(rows, output_format, from_model=from_model)
    if value == "optimised":
        say_how_many_took(rows, len(plan.edits), save_model, reporter)
    told = explainer(reporter, output_format)
    explain_columns(EDITS, rows, told)
    told.note(f"The files of {model} are unchanged, so there is nothing to undo.")
    suggest_verify(path, told)
    if save_model:
        suggest_check(model, save_model, directory, told)


def fact_of_prompt(
    prompt: str, subject: str | None, target: str | None, target_new: str
) -> OwnFacts:
    """The fact that --prompt and its options give. Raises UsageError where one is missing."""
    from kscli.errors import UsageError
    from kscli.fact_forms import subject_as_slot

    if subject is None or target_new == FIELD:
        missing = "--subject" if subject is None else "--target-new"
        raise UsageError(
            f"--prompt needs {missing} too: --prompt 'The capital of {{}} is' --subject France "
            "--target-new Rome."
        )
    from kscli.editing.own_facts import OwnFacts

    slotted = str(subject_as_slot(prompt, subject))
    return OwnFacts.of_prompt(slotted, subject, target_new.removeprefix("text:"), target)


def say_several_facts(
    named: Sequence[str], plan: EditPlan, sources: EditSources, reporter: ConsoleReporter
) -> None:
    """Say where a subject names more than one fact, all of which are edited."""
    from kscli.records import quote

    for name in named:
        numbers = [each.fact for each in plan.edits if sources.pm.facts[each.fact].subject == name]
        if len(numbers) > 1:
            reporter.note(
                f"{quote(name)} is the subject of {len(numbers)} facts, which are all edited; "
                f"--fact with one of the numbers {', '.join(map(str, numbers))} takes one alone."
            )


def say_how_many_took(
    rows: list[dict[str, Any]], asked: int, saved: Path | None, reporter: ConsoleReporter
) -> None:
    """Say which edits did not take, and what may help; warn where such a model was saved."""
    from kscli.cli.remedies import listed
    from kscli.records import quote

    failed = [row for row in rows if not row["took"]]
    if asked > len(rows):
        reporter.note(f"{asked} edits were asked for, and {asked - len(rows)} of them not made.")
    if not failed:
        return
    if len(rows) == 1:
        said = (
            f"the edit did not take: {failed[0]['target_new']!r} is not the model's first choice "
            f"after it (P = {failed[0]['prob_new_after']:.1%})"
        )
    else:
        said = (
            f"{len(failed)} of the {len(rows)} edits made did not take "
            f"({listed([quote(row['subject']) for row in failed])}): right after each, the new "
            "target's first token is not the model's first choice"
        )
    reporter.note(
        f"{said}. Another --target-new, another --layer, more --steps or a larger --norm-limit "
        "may take."
    )
    if saved:
        edits = "an edit" if len(failed) == 1 else f"{len(failed)} edits"
        reporter.warn(f"{saved} was saved with {edits} that did not take.")


def print_edits(
    rows: list[dict[str, Any]], output_format: Format, *, from_model: bool = False
) -> None:
    """Print edits: all that is known of them for JSON, one line each for people.

    `from_model`: what stands for the true target is what the model said before.
    """
    from kscli.editing.edits_file import flat_edits

    if output_format in (Format.csv, Format.tsv):
        # One line has no room for a list of facts.
        rows = flat_edits(rows)
    columns = [
        replace(column, heading="model said")
        if from_model and column.key == "target_true"
        else column
        for column in EDITS
    ]
    print_rows(rows, columns, output_format)
