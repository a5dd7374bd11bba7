"""A run of edits: each predicted, made in the live model, and measured.

Before the first edit the clean model is asked everything that later answers are compared with.
Each edit then finds its value, changes W by the closed form, and is measured: the linear theory at
every edit, the facts that it should move most at every edit, all facts at some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import MatrixName
from kscli.contexts import generated_contexts
from kscli.cosines import cosine
from kscli.editing.edited_layers import EditedLayers, WriteOptions
from kscli.editing.editors import PAPERS_EDITOR, ValueSearch, find_editor
from kscli.editing.edits_file import EditLog
from kscli.editing.examination import Asked, Examination, FactsPass, HeldOutText, changed
from kscli.editing.gradients import gradient_cosines
from kscli.editing.live import hidden_states, mlp_keys, mlp_outputs, outputs_of_keys
from kscli.editing.other_values import OtherValues
from kscli.editing.paraphrased import Paraphrases
from kscli.editing.protected_facts import ProtectedFacts, Protection, say_protected
from kscli.editing.scoring import Scoring, absent_scores
from kscli.editing.sources import EditSources
from kscli.editing.value import DivergedError, find_value, random_value
from kscli.errors import NumericsError, UsageError
from kscli.facts import Fact
from kscli.interrupts import HeldSignals
from kscli.models.loading import LoadedModel
from kscli.positions import locate_keys
from kscli.reporter import Reporter, Task

Array = NDArray[np.float64]
Protocol = Literal["sequential", "single"]

ALREADY = "the model says the new target already"


@dataclass(frozen=True)
class Edit:
    """What is written: a fact, by its index, and its new target."""

    fact: int
    target_new: str


@dataclass(frozen=True)
class EditOptions:
    """How edits are made and measured.

    `method` is the editor, an entry of `EDITORS`. Its values are found as `find` says (None: as the
    editor does), also in contexts that the model makes up: `contexts` are their (number of tokens,
    number of texts). `random_norm`: write a random value of that norm instead; `values`: those of
    the run whose file has this fingerprint. `write`: how values are written. `protection`: which
    facts no edit is to move. `batch`: how many edits are made at once. In the protocol `single`
    every edit is made in the clean model and taken back. All facts are asked after the first, the
    last and every `measure_every`-th edit (single: after each); the `moved` facts of largest |p|
    (None: all) after each. `generations`: how many texts are made up for each edited fact, at each
    such pass.
    """

    method: str = PAPERS_EDITOR
    protocol: Protocol = "sequential"
    find: ValueSearch | None = None
    contexts: tuple[tuple[int, int], ...] = ()
    random_norm: float | None = None
    values: str = ""
    write: WriteOptions = field(default_factory=WriteOptions)
    protection: Protection | None = None
    batch: int = 1
    measure_every: int = 10
    moved: int | None = 10
    generations: int = 1
    seed: int = 0


class EditRun:
    """Edits of one model, which is left as it was found by `restore`.

    Raises what `EditSources.check` and `EditableWeight` raise, and UsageError where an edit could
    not reach its answer.
    """

    def __init__(
        self,
        model: LoadedModel,
        sources: EditSources,
        edits: Sequence[Edit],
        options: EditOptions,
        reporter: Reporter,
        protected: Sequence[Fact] = (),
        values: OtherValues | None = None,
    ) -> None:
        sources.check(model, reporter)
        self.model, self.sources, self.edits, self.options = model, sources, edits, options
        self._reporter = reporter
        self._facts = sources.keys.facts
        self._prompts = locate_keys(model.tokenizer, self._facts)
        self._refuse_out_of_reach()
        self._editor = find_editor(options.method)
        self._layers = EditedLayers(model, sources, self._editor, options.write, self._prompts)
        self._examination = Examination(model, self._facts)
        self._held_out: HeldOutText | None = None
        self._of_file, self._values = protected, values
        self._find = options.find or self._editor.value
        self._of_experts = sources.cov.about.n_experts is not None

    def measure_perplexity_on(self, text: HeldOutText) -> None:
        """Measure perplexity, in every pass, on held-out text."""
        self._held_out = text

    def run(
        self, log: EditLog | None, save: Callable[[EditLog], None], held: HeldSignals
    ) -> EditLog:
        """Make all edits, or those that `log` lacks; `save` is called after every one.

        Everything is `prepare`d. Returns early, after an edit, when a signal was `held`.
        """
        if log is None:
            log = EditLog(self._known, self._protected, self._paraphrases.known)
            log.add_pass(self._clean_pass)
        self._replay(log)
        with self._reporter.task("edits", len(self.edits), "edits", log.tried) as task:
            while log.tried < len(self.edits) and not held.received:
                batch = self.edits[log.tried :][: self.options.batch]
                self._edit(batch, log, task)
                if log.made:
                    save(log)
                task.advance(len(batch))
        finished = log.tried == len(self.edits)
        if finished and log.made and log.of_pass["step"][-1] != log.made:
            # The last edits were kept out, and so the last pass was not made.
            log.add_pass(self._measure(log.made))
            save(log)
        return log

    def restore(self) -> None:
        """Make the model what it was."""
        self._layers.restore()

    def _refuse_out_of_reach(self) -> None:
        last = self.model.decoder.n_layers - 1
        if last not in self.sources.layers:
            return
        for edit in self.edits:
            prompt = self._prompts[edit.fact]
            if prompt.position < len(prompt.token_ids) - 1:
                raise UsageError(
                    f"an edit of {self._facts[edit.fact].text!r} at layer {last}, the last, cannot "
                    "reach the answer: no later layer reads what it writes at the subject. Name an "
                    "earlier --layer."
                )

    def prepare(self) -> None:
        """Ask the clean model all that edits are compared with."""
        options, layers = self.options, self.sources.layers
        if options.contexts:
            texts = generated_contexts(self.model, options.contexts, options.seed)
            self._find = replace(self._find, contexts=texts)
        self._layers.prepare(self._find.contexts, self._reporter)
        self._similar = self._similarities()
        self._clean: FactsPass = self._examination.all_facts(self._reporter)
        true = self._examination.true
        self._known = np.array(
            [
                answer == cloze.target_ids
                for answer, cloze in zip(self._clean.answers, true, strict=True)
            ]
        )
        self._paraphrases = Paraphrases(self.model, self._facts, self._known, self._reporter)
        self._protected = self._protect()
        self._moved = [self._moved_most(edit.fact) for edit in self.edits]
        self._clean_asked = self._ask_clean()
        self._own = [(edit.fact, edit.target_new) for edit in self.edits]
        self._scoring = Scoring(
            self.model,
            [(self._facts[edit.fact], edit.target_new) for edit in self.edits],
            generations=options.generations,
            seed=options.seed,
        )
        scores = self._examination.new_targets(self._own)
        new = self._examination.new(self._own)
        self._already = [
            said == cloze.target_ids for said, cloze in zip(scores.likeliest, new, strict=True)
        ]
        # An edit changes nothing below its own layer, and so not these.
        if not self._of_experts:
            self._live_keys = mlp_keys(self.model, layers[0], self._prompts)
        self._clean_outputs = mlp_outputs(self.model, layers[0], self._prompts)
        self._clean_pass = self._measure(0)
        rows = [edit.fact for edit in self.edits]
        self._gradient_cosine = gradient_cosines(
            self.model, layers[0], self._facts, rows, self._reporter
        )
        self._say_what_is_absent()
        unknown = sum(not self._known[edit.fact] for edit in self.edits)
        if unknown:
            self._reporter.warn(
                f"the model does not complete {unknown} of the {len(self.edits)} edited facts with "
                "their target, so it cannot forget these."
            )

    def _protect(self) -> NDArray[np.bool_]:
        """Protect what is to be, say at what price, and return which facts are."""
        found: NDArray[np.bool_] = np.zeros(len(self._facts), dtype=bool)
        protection = self.options.protection
        if protection is None:
            return found
        edited = [edit.fact for edit in self.edits]
        texts = {self._facts[fact].text for fact in edited}
        chosen = self._of_file
        if protection.what in ("known", "all"):
            known = self._known | (protection.what == "all")
            chosen = [fact for fact, one in zip(self._facts, known, strict=True) if one]
        ends = [self._prompts[fact] for fact in edited]
        facts = ProtectedFacts(
            self.model,
            [fact for fact in chosen if fact.text not in texts],
            protection.at,
            {prompt.token_ids[: prompt.position + 1] for prompt in ends},
        )
        kept, prices = self._layers.protect(facts, protection, edited)
        say_protected(facts, kept, prices, protection, self._reporter)
        of_kept = {fact.text for fact, one in zip(facts.facts, kept, strict=True) if one}
        return np.array([fact.text in of_kept for fact in self._facts])

    def _say_what_is_absent(self) -> None:
        absent = absent_scores([self._facts[edit.fact] for edit in self.edits])
        if absent:
            kinds = ", ".join(f"{' and '.join(of)} ({kind})" for kind, of in absent.items())
            self._reporter.note(f"not scored, since the facts have no such questions: {kinds}.")

    def _moved_most(self, fact: int) -> list[int]:
        """The other facts, by predicted damage: |p|, largest first."""
        order = np.argsort(-np.abs(self._similar["p"][fact]), kind="stable")
        return [int(j) for j in order if j != fact][: self.options.moved]

    def _ask_clean(self) -> list[Asked]:
        """For every edit, what the clean model says of its fact and of those that it moves most."""
        asked = [[edit.fact, *moved] for edit, moved in zip(self.edits, self._moved, strict=True)]
        pairs = [
            (fact, edit.target_new)
            for edit, facts in zip(self.edits, asked, strict=True)
            for fact in facts
        ]
        new = self._examination.new_targets(pairs, self._reporter)
        ends = np.cumsum([len(facts) for facts in asked])
        return [
            Asked(self._clean.scores.some(facts), new.some(range(end - len(facts), end)))
            for facts, end in zip(asked, ends.tolist(), strict=True)
        ]

    def _replay(self, log: EditLog) -> None:
        """Make the edits of the log again, all of which the model has to have seen."""
        if self.options.protocol == "single":
            return
        kept_out = {number for number, *_ in log.kept_out}
        made = [number for number in range(log.tried) if number not in kept_out]
        for _, of_batch in groupby(range(log.made), lambda n: made[n] // self.options.batch):
            batch = list(of_batch)
            edited = [int(log.of_edit["edited"][n]) for n in batch]
            deltas = np.stack([log.of_edit["delta"][n] for n in batch], axis=1)
            directions = np.stack([log.of_edit["direction"][n] for n in batch], axis=1)
            self._layers.settle(edited, deltas, directions)

    def _edit(self, planned: Sequence[Edit], log: EditLog, task: Task) -> None:
        """Make the edits of a batch at once, and log them."""
        if self.options.protocol == "single":
            self._layers.clean()
        batch, values = [], []
        for number, edit in enumerate(planned, log.tried):
            task.advance(0, status=self._facts[edit.fact].subject)
            try:
                values.append(self._value(number, edit))
                batch.append(number)
            except DivergedError as error:
                log.kept_out.append((number, edit.fact, edit.target_new, str(error)))
        if not batch:
            self._limit_late(log)
            return
        try:
            records, found = self._make(batch, np.stack(values), log)
        except NumericsError as error:
            if len(batch) > 1:
                raise
            # Nothing that follows could be measured.
            edit = self.edits[batch[0]]
            log.kept_out.append((batch[0], edit.fact, edit.target_new, f"edited so, {error}"))
            self._layers.clean()
            self._replay(log)
            self._limit_late(log)
            return
        for record in records:
            log.add_edit(record)
        if found:
            log.add_pass(found)

    def _make(
        self, batch: Sequence[int], values: Array, log: EditLog
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Make a batch of edits after those logged; what is known of each, and the pass if due."""
        made = log.made
        previous = [self._ask_previous(number, made) for number in batch]
        edited = [self.edits[number].fact for number in batch]
        deltas, directions, prices = self._layers.write(edited, values)
        # Those of the batch that were kept out are in the log.
        last = log.tried + len(batch) == len(self.edits)
        if self._editor.afterwards.limited and (last or self.options.protocol == "single"):
            deltas = self._limit(log, deltas, directions)
        found = self._pass_if_due(made, made + len(batch), batch)
        records = []
        for place, number in enumerate(batch):
            record = self._record(number, previous[place], found)
            record |= {"delta": deltas[place], "direction": directions[place]}
            record["delta_norm"] = float(np.linalg.norm(deltas[place]))
            record["price"] = float(prices[place])
            record["own_text_change"] = self._layers.text_change_of(
                deltas[place], directions[place]
            )
            record["editor_p"] = self._layers.p_of(directions[place])
            record["paraphrase_p"] = self._layers.p_to_paraphrases(edited[place], directions[place])
            records.append(record)
        return records, found

    def _limit(self, log: EditLog, deltas: Array, directions: Array) -> Array:
        """Limit the spectrum of all that was written; returns the new deltas.

        `deltas` (b, layer, d) and `directions` (b, layer, d_m) are of the edits after the log's,
        whose deltas are changed.
        """
        earlier = [] if self.options.protocol == "single" else log.of_edit["delta"]
        along = log.of_edit["direction"][: len(earlier)]
        limited = self._layers.limit(np.stack([*earlier, *deltas]), np.stack([*along, *directions]))
        earlier[:] = limited[: len(earlier)]
        return limited[len(earlier) :]

    def _limit_late(self, log: EditLog) -> None:
        """Limit the spectrum where the run ends with edits that were kept out."""
        if (
            self._editor.afterwards.limited
            and self.options.protocol == "sequential"
            and log.made
            and log.tried == len(self.edits)
        ):
            nothing = np.empty((0, *np.shape(log.of_edit["delta"][0])))
            along = np.empty((0, *np.shape(log.of_edit["direction"][0])))
            self._limit(log, nothing, along)
            if log.of_pass["step"][-1] == log.made:
                # The pass after the last edit is made again.
                for values in log.of_pass.values():
                    values.pop()

    def _value(self, number: int, edit: Edit) -> Array:
        """The value to write, as `EditedLayers.write` takes it of one fact.

        Raises DivergedError where none is found, and where none is needed.
        """
        if self._already[number] and self.options.random_norm is None:
            raise DivergedError(ALREADY)
        if not self._editor.afterwards.one_layer:
            return self._value_at(number, edit, -1)
        values: Array = np.full((len(self._layers), self._layers.d), np.nan)
        failed: list[DivergedError] = []
        for at in range(len(values)):
            try:
                values[at] = self._value_at(number, edit, at)
            except DivergedError as error:
                failed.append(error)
        if len(failed) == len(values):
            raise failed[-1]
        return values

    def _value_at(self, number: int, edit: Edit, at: int) -> Array:
        """The value to write at the `at`-th edited layer."""
        options, reach = self.options, self._editor.value.reach
        if options.random_norm is not None:
            shift = random_value(self._layers.d, options.random_norm, options.seed, number)
            return shift + self._layers.state([edit.fact])[0] if reach else shift
        layer, fact = self.sources.layers[at], self._facts[edit.fact]
        if self._values:
            return self._values.of(fact, edit.target_new)
        found = find_value(self.model, layer, fact, edit.target_new, self._find)
        return found.value + found.shift if reach else found.shift

    def _ask_previous(self, number: int, made: int) -> Asked | None:
        """What the model says of an edit's facts before the edit; None: what the clean one says."""
        if made == 0 or self.options.protocol == "single":
            return None
        edit = self.edits[number]
        return self._examination.ask([edit.fact, *self._moved[number]], edit.target_new)

    def _pass_if_due(self, before: int, made: int, batch: Sequence[int]) -> dict[str, Any] | None:
        every = self.options.measure_every
        due = (
            self.options.protocol == "single"
            or before == 0
            or made // every > before // every
            or batch[-1] == len(self.edits) - 1
        )
        single = self.options.protocol == "single"
        return self._measure(made, batch if single else None) if due else None

    def _measure(self, step: int, scored: Sequence[int] | None = None) -> dict[str, Any]:
        """Ask the model as it is for all facts, all edits' targets and held-out text.

        `scored` are the edits, by their numbers, that are scored; None: all.
        """
        asked = self._clean if step == 0 else self._examination.all_facts(self._reporter)
        new = self._examination.new_targets(self._own)
        scores = self._scoring.measure(scored, self._reporter)
        clean = self._layers.taken_back if step else None
        perplexity, kl = self._held_out.measure(clean) if self._held_out else (np.nan, np.nan)
        return {
            "step": step,
            "perplexity": perplexity,
            "kl": kl,
            "text_change": self._layers.text_change,
            "paraphrase/changed": self._paraphrases.changed(self._reporter),
            "logprob_true": asked.scores.logprob,
            "rank_true": asked.scores.rank,
            "answer_changed": changed(asked.answers, self._clean.answers),
            "logprob_new": new.logprob,
            "rank_new": new.rank,
            **{f"scores/{name}": values for name, values in scores.items()},
        }

    def _record(
        self, number: int, previous: Asked | None, found: dict[str, Any] | None
    ) -> dict[str, Any]:
        """All that is known of one edit of the batch that was just made, but what was written."""
        edit, moved = self.edits[number], self._moved[number]
        facts = [edit.fact, *moved]
        before = self._clean_asked[number]
        previous = previous or before
        after = self._examination.ask(facts, edit.target_new)
        record: dict[str, Any] = {
            "edited": edit.fact,
            "target_new": edit.target_new,
            "moved_index": np.array(moved, dtype=np.int64),
            **{name: rows[edit.fact] for name, rows in self._similar.items()},
            "gradient_cosine": self._gradient_cosine[number],
            **self._linear(found is not None),
        }
        for when, asked in (("before", before), ("previous", previous), ("after", after)):
            for target, scores in (("true", asked.true), ("new", asked.new)):
                record[f"logprob_{target}_{when}"] = scores.logprob[0]
                record[f"rank_{target}_{when}"] = scores.rank[0]
                record[f"moved_logprob_{target}_{when}"] = scores.logprob[1:]
        text = self._examination.text
        answers = self._examination.answers(facts, after)[1:]
        record["moved_answer_before"] = [text(j, self._clean.answers[j]) for j in moved]
        record["moved_answer_after"] = list(map(text, moved, answers))
        return record

    def _similarities(self) -> dict[str, dict[int, Array]]:
        """The rows, by edited fact, of P and of the cosines that it is compared with.

        The cosine of hidden states is CLaRE (Baser et al. 2026, arXiv 2603.19297), read here at
        the subject's last token, as the first edited layer leaves it.
        """
        facts = sorted({edit.fact for edit in self.edits})
        pm, layer = self.sources.pm, self.sources.layers[0]
        names: tuple[MatrixName, ...] = ("P", "whitened_cosine", "cosine")
        found = {name.lower(): pm.matrix(name, layer)[facts] for name in names}
        hidden = hidden_states(self.model, layer, self._prompts)
        found["hidden_cosine"] = cosine(hidden @ hidden.T)[facts]
        return {name: dict(zip(facts, rows, strict=True)) for name, rows in found.items()}

    def _linear(self, in_full: bool) -> dict[str, Any]:
        """The theory's prediction for every fact after the last edit, and what came of it.

        The live model's outputs are of whole passes where asked for `in_full` and where it has
        experts, whose biases the gates multiply; else of its edited down-projection alone.
        """
        moved = self._layers.interference
        measured = np.sqrt(sum(np.square(each.measured).sum(axis=1) for each in moved))
        change = np.sqrt(sum(np.square(each.change).sum() for each in moved))
        nothing = np.full(len(self._facts), np.nan)
        found: dict[str, Any] = {
            "predicted": nothing,
            "measured": measured,
            "measured_live": nothing,
            "difference": nothing,
            "linear_error": np.nan,
            "live_error": np.nan,
            "weight_change": float(change),
        }
        if not self._layers.predicted:
            return found
        (only,) = moved
        found["predicted"] = np.linalg.norm(only.predicted, axis=1)
        found["difference"] = np.linalg.norm(only.predicted - only.measured, axis=1)
        found["linear_error"] = only.largest_error(only.measured)
        layer = self.sources.layers[0]
        outputs = (
            mlp_outputs(self.model, layer, self._prompts)
            if in_full or self._of_experts
            else outputs_of_keys(self.model, layer, self._live_keys)
        )
        shifts = only.since_own_edit(outputs - self._clean_outputs)
        found["measured_live"] = np.linalg.norm(shifts, axis=1)
        found["live_error"] = only.largest_error(shifts)
        return found
