"""edit: from a request to edits/METHOD-LAYERS-SEED.h5, with what a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kscli.artifacts import EditsAbout, Existing, PMatrixFile, Recipe, difference, must_make
from kscli.corpus import Corpus, same_text
from kscli.editing.afterwards import largest_entries
from kscli.editing.choice import Order, choose_facts, edit_order, find_facts
from kscli.editing.edit_arrays import edit_numbers
from kscli.editing.editors import editors_where, find_editor, require_of_experts
from kscli.editing.edits_file import EditLog, EditsFile, write_edits
from kscli.editing.examination import HeldOutText
from kscli.editing.loop import Edit, EditOptions, EditRun
from kscli.editing.other_values import OtherValues, read_values
from kscli.editing.saving import save_edited_model
from kscli.editing.sources import EditSources, require_about
from kscli.editing.weights import EditableWeight
from kscli.errors import ArtifactError, FactsError, UsageError
from kscli.facts import Fact, field_text, read_records
from kscli.files import require_other, require_writable
from kscli.interrupts import InterruptedRunError, held_signals
from kscli.layers import format_layers
from kscli.models.loading import LoadedModel
from kscli.pipeline import Session
from kscli.records import quote
from kscli.reporter import Reporter


@dataclass(frozen=True)
class HeldOut:
    """Text that C did not see, and how much of it perplexity is measured on."""

    corpus: Corpus
    tokens: int


@dataclass(frozen=True)
class EditPlan:
    """The edits of a run, in their order, how they are made, and what is measured on them."""

    edits: tuple[Edit, ...]
    order: Order
    options: EditOptions
    held_out: HeldOut | None = None
    protected: tuple[Fact, ...] = ()
    values: OtherValues | None = None


@dataclass(frozen=True)
class EditRequest:
    """Which facts are to be edited, to what, and how.

    `facts` are subjects or indexes; without them `count` (None: all) facts are drawn with the
    options' seed, and with `at_most` all where there are fewer. Where `first` is given, the first
    so many are edited instead. `target_new` is the target for all, with or without `text:` before
    it, or `field:NAME` of the facts' records in `target_source` (None: where keys.h5 has its facts
    from). Values are those of the run in the file `values_of`, where one is named.
    """

    facts: tuple[str, ...]
    count: int | None
    order: Order
    target_new: str
    target_source: str | None
    options: EditOptions
    held_out: HeldOut | None = None
    protected: tuple[Fact, ...] = ()
    values_of: Path | None = None
    at_most: bool = False
    first: int | None = None

    def plan(self, sources: EditSources) -> EditPlan:
        """The edits that are asked for.

        Raises UsageError for what cannot be asked together, FactsError for a fact that is not
        there or has no new target.
        """
        self._check(sources)
        seed = self.options.seed
        facts, name = sources.pm.facts, sources.pm.path
        if self.first is not None:
            chosen = list(range(self.first))
        elif self.facts:
            chosen = find_facts(facts, self.facts, name)
        else:
            chosen = choose_facts(facts, self.count, seed, name, at_most=self.at_most)
        leverage = sources.pm.leverage(sources.layers[0])
        chosen = edit_order(self.order, leverage, chosen, seed)
        targets = new_targets(sources.pm, chosen, self.target_new, self.target_source)
        edits = tuple(map(Edit, chosen, targets))
        options, values = self.options, None
        if self.values_of:
            values = read_values(self.values_of, sources, options.method)
            options = replace(options, values=values.identity)
        return EditPlan(edits, self.order, options, self.held_out, self.protected, values)

    def _check(self, sources: EditSources) -> None:
        options, layers = self.options, sources.layers
        editor = find_editor(options.method)
        if len(layers) > 1 and not editor.over_layers:
            others = editors_where(lambda other: other.over_layers)
            raise UsageError(
                f"{options.method} edits one layer, and --layer {format_layers(layers)} names "
                f"{len(layers)}; name one, or use --method {others}."
            )
        if n_experts := sources.cov.about.n_experts:
            require_of_experts(options.method, editor, str(sources.cov.path), n_experts)
        if options.batch > 1 and (not editor.at_once or options.protocol == "single"):
            others = editors_where(lambda other: other.at_once)
            raise UsageError(f"--batch is for --method {others} and --protocol sequential.")


def check_held_out(plan: EditPlan, sources: EditSources, reporter: Reporter) -> None:
    """Raise UsageError where the held-out text is what C was measured on; warn where none knows."""
    if not plan.held_out:
        return
    measured_on = sources.cov.about.corpus_identity
    if measured_on is None:
        reporter.warn(
            f"{sources.cov.path} does not say what text it was measured on, which --held-out "
            f"{plan.held_out.corpus.name} must not be part of."
        )
    elif same_text(plan.held_out.corpus.identity, measured_on):
        raise UsageError(
            f"--held-out {plan.held_out.corpus.name} is the text that {sources.cov.path} was "
            "measured on; name other text."
        )


def new_targets(
    pm: PMatrixFile, chosen: Sequence[int], wanted: str, source: str | None
) -> list[str]:
    """The new target of each chosen fact: what is `wanted`, or `field:NAME` of their records.

    The field is read from `source`, or from where the facts came from; `target_new` is with the
    facts already. Raises FactsError, naming the fact, where there is no text.
    """
    facts = [pm.facts[index] for index in chosen]
    value = wanted.removeprefix("field:")
    kind = "text" if value == wanted else "field"
    if kind == "text":
        targets = [wanted.removeprefix("text:")] * len(facts)
    elif value == "target_new" and source is None:
        targets = [fact.target_new for fact in facts]
    else:
        found = _fields(source or pm.about.facts_name, value)
        targets = [found.get(_key(fact), "") for fact in facts]
    for fact, target in zip(facts, targets, strict=True):
        if not target.strip():
            of_fact = f"{value} of {fact.text!r} is missing or"
            where = "--target-new is" if kind == "text" else of_fact
            raise FactsError(
                f"{where} empty; say what to write with --target-new text:TARGET, or name another "
                "field or facts file."
            )
    return targets


def _fields(source: str, name: str) -> dict[tuple[str, str, str], str]:
    return {_key(fact): field_text(record, name) or "" for _, fact, record in read_records(source)}


def _key(fact: Fact) -> tuple[str, str, str]:
    return fact.prompt, fact.subject, fact.target


def edits_recipe(sources: EditSources, plan: EditPlan, dtype: str) -> Recipe:
    """Everything that decides what the file of a run holds."""
    # As it is read back: JSON knows lists, not tuples.
    options = json.loads(json.dumps(asdict(plan.options)))
    chosen = json.dumps([asdict(edit) for edit in plan.edits])
    return {
        "pmatrix": sources.pm.fingerprint,
        "layers": format_layers(sources.layers),
        "edits": hashlib.sha256(chosen.encode()).hexdigest()[:32],
        **options,
        "held_out": plan.held_out.corpus.identity if plan.held_out else None,
        "held_out_tokens": plan.held_out.tokens if plan.held_out else None,
        "dtype": dtype,
    }


def checkpoint_of(path: Path) -> Path:
    """Where a run that will write `path` keeps what it has done."""
    return path.with_name(f"{path.name}.checkpoint")


def discard_checkpoint(path: Path, recipe: Recipe) -> None:
    """Remove what a run left beside its finished `path`, if it is this run's."""
    checkpoint = checkpoint_of(path)
    if difference(checkpoint, "edits", recipe) is None:
        checkpoint.unlink()


def run_path(folder: Path, sources: EditSources, plan: EditPlan, dtype: str) -> Path:
    """Where a run is written that names no file: METHOD-LAYERS-SEED.h5.

    Where another run has that name, a hash of all that decides what the file holds follows it.
    """
    recipe = edits_recipe(sources, plan, dtype)
    name = f"{plan.options.method}-{format_layers(sources.layers)}-{plan.options.seed}"
    plain = folder / f"{name}.h5"
    for path in (plain, checkpoint_of(plain)):
        if path.exists() and difference(path, "edits", recipe) is not None:
            digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
            return folder / f"{name}-{digest[:8]}.h5"
    return plain


def edit_model(
    session: Session, sources: EditSources, plan: EditPlan, path: Path, save_model: Path | None
) -> list[dict[str, Any]]:
    """Make the run at `path` unless it is up to date; write the edited model where asked.

    Returns the edits as `EditsFile.objects` does. Raises what `make_edits` and `save_edited_model`
    raise.
    """
    reporter, force = session.reporter, session.existing is Existing.FORCE
    if save_model and plan.options.protocol == "single":
        raise UsageError(
            "--save-model has nothing to write with --protocol single, which takes every edit back."
        )
    held_out = plan.held_out.corpus.files if plan.held_out else ()
    read = [file.path for file in (sources.cov, sources.keys, sources.pm)]
    read += [plan.values.path] if plan.values else []
    require_other(path, [*read, *held_out, *session.located.files])
    check_held_out(plan, sources, reporter)
    recipe = edits_recipe(sources, plan, session.dtype)
    made = must_make(path, "edits", recipe, session.existing, reporter)
    if made:
        make_edits(session.model, sources, plan, path, recipe, reporter=reporter, force=force)
        reporter.note(f"wrote {path}")
    else:
        discard_checkpoint(path, recipe)
    with EditsFile(path) as file:
        rows = file.objects()
        if save_model:
            if not made:
                replay_edits(session.model, file)
            save_edited_model(session.model, save_model, rows, file.facts)
            reporter.note(f"wrote {save_model}")
    return rows


def make_edits(
    model: LoadedModel,
    sources: EditSources,
    plan: EditPlan,
    path: Path,
    recipe: Recipe,
    *,
    force: bool,
    reporter: Reporter,
) -> EditRun:
    """Make the edits in the live model, measure them, and write `path`; the model stays edited.

    A run that was stopped goes on after its last finished edit. Raises InterruptedRunError when a
    signal stops it, ArtifactError when no edit could be made or another run writes the same file,
    and what `EditRun` raises.
    """
    require_writable(path, force=force)
    checkpoint = checkpoint_of(path)
    log = _log_so_far(checkpoint, recipe, force)
    about = _about(model, sources, plan, recipe)
    run = EditRun(model, sources, plan.edits, plan.options, reporter, plan.protected, plan.values)
    if plan.held_out:
        # An imported C does not say at which length its documents were cut.
        length = sources.cov.about.max_length or model.max_length
        held_out = plan.held_out
        run.measure_perplexity_on(HeldOutText(model, held_out.corpus, held_out.tokens, length))
    if log:
        reporter.note(f"{checkpoint} holds {log.tried} of {len(plan.edits)} edits; going on.")

    def save(log: EditLog) -> None:
        _require_own(checkpoint, recipe)
        write_edits(checkpoint, log, sources.layers, sources.keys, about)

    # Until the first edit there is nothing to lose: a signal acts at once.
    run.prepare()
    with held_signals() as held:
        log = run.run(log, save, held)
    if held.received and log.tried < len(plan.edits):
        raise InterruptedRunError(
            held.received,
            f"{log.tried} of {len(plan.edits)} edits are in {checkpoint}; the same command goes on."
            if log.made
            else "no edit was made yet.",
        )
    for _, fact, target, reason in log.kept_out:
        subject = sources.keys.facts[fact].subject
        what = f"{quote(subject)} was not edited to {quote(target)}"
        reporter.warn(f"{what}: {reason.removesuffix('.')}.")
    if not log.made:
        raise ArtifactError(f"no edit was made, so {path} was not written.")
    if difference(path, "edits", recipe) is not None:
        # Another run may have made it since this one began.
        require_writable(path, force=force)
    write_edits(path, log, sources.layers, sources.keys, about)
    checkpoint.unlink(missing_ok=True)
    return run


def replay_edits(model: LoadedModel, file: EditsFile) -> None:
    """Make the edits of a finished run in the live model.

    Raises ArtifactError where the run was of another model.
    """
    require_about(file, model)
    delta, direction = file.values("delta"), file.values("direction")
    keep = find_editor(file.about.method).afterwards.keep
    batches = edit_numbers(file) // file.about.batch
    for at, layer in enumerate(file.layers):
        weight = EditableWeight(model, layer)
        change = np.zeros(weight.shape)
        # Without what happens to each batch's change the order does not matter: all are one.
        for number in np.unique(batches) if keep else [None]:
            of = slice(None) if number is None else batches == number
            part = delta[of, at].T @ direction[of, at]
            if keep:
                before = weight.changed(change).double().numpy()
                part = largest_entries(part, before, file.about.recipe["write"]["keep"])
            change += part
        weight.set_change(change)


def _require_own(checkpoint: Path, recipe: Recipe) -> None:
    """Raise ArtifactError where another run writes the same checkpoint."""
    reason = difference(checkpoint, "edits", recipe)
    if reason and checkpoint.exists():
        raise ArtifactError(
            f"another run writes {checkpoint} ({reason}); give this one another --output."
        )


def _log_so_far(checkpoint: Path, recipe: Recipe, force: bool) -> EditLog | None:
    reason = difference(checkpoint, "edits", recipe)
    if reason is None:
        with EditsFile(checkpoint) as file:
            return file.log()
    if checkpoint.exists():
        if not force:
            raise ArtifactError(
                f"{checkpoint} is in the way ({reason}); finish the run that it is of, or begin "
                "this one with --force, which removes it."
            )
        checkpoint.unlink()
    return None


def _whose_value(options: EditOptions) -> str:
    if options.values:
        return "another run's"
    return "optimised" if options.random_norm is None else "random"


def _about(model: LoadedModel, sources: EditSources, plan: EditPlan, recipe: Recipe) -> EditsAbout:
    options = plan.options
    return sources.pm.about.derive(
        EditsAbout,
        dtype=model.dtype,
        device=model.device,
        special_tokens=model.special_tokens,
        method=options.method,
        protocol=options.protocol,
        order=plan.order,
        value=_whose_value(options),
        weight=options.write.weight,
        batch=options.batch,
        planned=len(plan.edits),
        held_out=plan.held_out.corpus.name if plan.held_out else "",
        inputs={"cov": sources.cov.fingerprint, "pmatrix": sources.pm.fingerprint},
        recipe=recipe,
        seed=options.seed,
    )
