"""edit: from a request to edits/METHOD-LAYERS-SEED.h5, with what a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kscli.artifacts import EditsAbout, PMatrixFile, Recipe, difference
from kscli.corpus import Corpus
from kscli.editing.edits_file import EditLog, EditsFile, write_edits
from kscli.editing.examination import HeldOutText
from kscli.editing.order import Order, draw_edits
from kscli.editing.run import Edit, EditOptions, EditRun
from kscli.editing.sources import EditSources, require_about
from kscli.editing.weights import EditableWeight
from kscli.errors import ArtifactError, FactsError, UsageError
from kscli.facts import Fact, field_text, read_records
from kscli.files import require_writable
from kscli.interrupts import InterruptedRunError, held_signals
from kscli.layers import format_layers
from kscli.models.loading import LoadedModel
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


def check_request(options: EditOptions, layers: Sequence[int], save_model: Path | None) -> None:
    """Raise UsageError for what cannot be asked together."""
    if options.method == "rome" and len(layers) > 1:
        raise UsageError(
            f"rome edits one layer, and --layer {format_layers(layers)} names {len(layers)}; name "
            "one, or use --method memit."
        )
    if options.batch > 1 and (options.method == "rome" or options.protocol == "single"):
        raise UsageError("--batch is for --method memit and --protocol sequential.")
    if save_model and options.protocol == "single":
        raise UsageError(
            "--save-model has nothing to write with --protocol single, which takes every edit back."
        )


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
    if plan.held_out.corpus.identity == measured_on:
        raise UsageError(
            f"--held-out {plan.held_out.corpus.name} is the text that {sources.cov.path} was "
            "measured on; name other text."
        )


def choose_facts(sources: EditSources, count: int | None, seed: int) -> list[int]:
    """Draw `count` (None: all) of the facts with `seed`, in their order in the file.

    Raises FactsError when there are fewer.
    """
    m = len(sources.pm.facts)
    if (count or 0) > m:
        raise FactsError(
            f"{count} edits were asked for, but {sources.pm.path} holds {m} facts; name fewer with "
            "--edits, or all."
        )
    return draw_edits(m, m if count is None else count, seed)


def new_targets(
    pm: PMatrixFile, chosen: Sequence[int], wanted: str, source: str | None
) -> list[str]:
    """The new target of each chosen fact: `text:...` for all, or `field:NAME` of their records.

    The field is read from `source`, or from where the facts came from; `target_new` is with the
    facts already. Raises UsageError for another `wanted`, FactsError, naming the fact, where there
    is no text.
    """
    kind, _, value = wanted.partition(":")
    if kind not in ("field", "text") or not value:
        raise UsageError(f"--target-new {wanted!r} must be field:NAME or text:TARGET.")
    facts = [pm.facts[index] for index in chosen]
    if kind == "text":
        targets = [value] * len(facts)
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
    run = EditRun(model, sources, plan.edits, plan.options, reporter)
    if plan.held_out:
        # An imported C does not say at which length its documents were cut.
        length = sources.cov.about.max_length or model.max_length
        held_out = plan.held_out
        run.measure_perplexity_on(HeldOutText(model, held_out.corpus, held_out.tokens, length))
    if log:
        reporter.note(f"{checkpoint} holds {log.tried} of {len(plan.edits)} edits; going on.")

    def save(log: EditLog) -> None:
        _require_own(checkpoint, recipe)
        write_edits(checkpoint, log, sources.layers, sources.pm, about)

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
        subject = sources.pm.facts[fact].subject
        reporter.warn(f"{subject!r} was not edited to {target!r}: {reason.removesuffix('.')}.")
    if not log.made:
        raise ArtifactError(f"no edit was made, so {path} was not written.")
    if difference(path, "edits", recipe) is not None:
        # Another run may have made it since this one began.
        require_writable(path, force=force)
    write_edits(path, log, sources.layers, sources.pm, about)
    checkpoint.unlink(missing_ok=True)
    return run


def replay_edits(model: LoadedModel, file: EditsFile, reporter: Reporter) -> None:
    """Make the edits of a finished run in the live model, all at once.

    Raises ArtifactError where the run was of another model.
    """
    require_about(file, model, reporter)
    delta, direction = file.values("delta"), file.values("direction")
    for at, layer in enumerate(file.layers):
        EditableWeight(model, layer).set_change(delta[:, at].T @ direction[:, at])


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
        value="optimised" if options.random_norm is None else "random",
        weight=options.weight,
        batch=options.batch,
        planned=len(plan.edits),
        held_out=plan.held_out.corpus.name if plan.held_out else "",
        inputs={"cov": sources.cov.fingerprint, "pmatrix": sources.pm.fingerprint},
        recipe=recipe,
        seed=options.seed,
    )
