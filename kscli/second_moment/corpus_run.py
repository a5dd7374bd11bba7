"""The corpus through the model, summed: from any batch on, to the end or to a signal.

A run reads the corpus as windows of documents, each window as batches, and sums every batch at
every layer (`layer_sums`). It goes once over the corpus where all sums fit in memory, else once for
each group of layers. After any batch it can be saved and gone on with (`checkpoints`).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.batching import TokenBatch, make_batches
from kscli.corpus import Corpus
from kscli.errors import ArtifactError, UsageError
from kscli.interrupts import HeldSignals, InterruptedRunError, held_signals
from kscli.layers import spread
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter, Task
from kscli.second_moment.checkpoints import Checkpoint, Checkpoints, Position
from kscli.second_moment.expert_moments import Moment, new_moment
from kscli.second_moment.expert_settling import ExpertSettling
from kscli.second_moment.layer_sums import LayerSums
from kscli.second_moment.moments import fastest_product
from kscli.second_moment.options import WHOLE, CovarianceOptions, reads_stdin
from kscli.second_moment.plan import RunPlan
from kscli.second_moment.ranks import RankError, Ranks
from kscli.second_moment.settling import MOST_LAYERS, Settled, Settling
from kscli.second_moment.token_stream import TokenStream, ahead, count_documents

WINDOW_BATCHES = 64
WINDOWS_AHEAD = 2
# Where float32 sums are kept on the device, they are added to the float64 ones after so many.
FLUSH_BATCHES = 16


@dataclass
class _Pass:
    """One pass over the corpus, as far as it has come; `before` tokens by an earlier process."""

    number: int
    sums: LayerSums
    settling: Settling | ExpertSettling | None
    position: Position = field(default_factory=Position)
    before: int = 0

    def __post_init__(self) -> None:
        watched = self.settling.layers if self.settling else ()
        self._offered = dict.fromkeys(watched, self.before)

    def watch(self, layer: int, keys: Any, batch: TokenBatch) -> None:
        """Sample keys of a batch for the settling estimate."""
        if self.settling is None or layer not in self._offered:
            return
        if isinstance(self.settling, ExpertSettling):
            self.settling.offer(layer, keys, self.sums.of_experts(layer).routed)
            return
        start = self._offered[layer]
        self._offered[layer] = start + batch.tokens
        wanted = self.settling.wants(start, start + batch.tokens)
        if wanted:
            rows = keys[batch.real_rows[wanted].to(keys.device)]
            self.settling.offer(layer, start, rows.float().cpu().numpy())

    def packed(self, layer: int) -> NDArray[np.float64]:
        """The packed sums of a layer."""
        return self.sums.moments[layer].packed()


class CovarianceRun:
    """One run of a corpus through a model by a plan, saved and gone on with by `checkpoints`.

    Of `ranks` this process sums its own share of the documents.
    """

    def __init__(
        self,
        model: LoadedModel,
        corpus: Corpus,
        options: CovarianceOptions,
        plan: RunPlan,
        reporter: Reporter = SILENT,
        checkpoints: Checkpoints | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        options.check(corpus, ranks)
        if model.positions and (options.max_length or 0) > model.positions:
            raise UsageError(
                f"--max-length {options.max_length:,} is beyond the {model.positions:,} positions "
                f"of {model.identity.model_id}."
            )
        self.model = model.of_layers(options.layers, reporter)
        self.corpus = corpus
        self.options = options
        self.plan = plan
        self.reporter = reporter
        self.checkpoints = checkpoints
        self.ranks = ranks
        self.settled: list[Settled] = []
        self._share = options.own_share(model.max_length, ranks)
        self._documents: int | None = None

    def sum_up(self) -> tuple[dict[int, Moment], Position]:
        """Sum all layers; returns those of the last pass, and how far it came.

        The sums of earlier passes lie in the checkpoints until these are removed. Raises
        NumericsError, naming layer and document, when a key is not finite, CorpusError when the
        text is not what it was at the checkpoint, and InterruptedRunError when a signal stopped
        the run.
        """
        saved = self._saved()
        if saved is None:
            self._choose_product()
        self._refuse_impossible()
        if self._share.tokens is None:
            self._documents = count_documents(self.corpus, self._share.samples)
        first = saved.number if saved else 0
        result = self._sum_group(first, saved)
        for number in range(first + 1, self.plan.passes):
            # They lie in the checkpoints; two groups' sums must not stand in memory at once.
            result[0].clear()
            result = self._sum_group(number, None)
        return result

    def _saved(self) -> Checkpoint | None:
        """The checkpoint to go on from; its groups of layers and its batches are the plan's."""
        if self.checkpoints is None:
            return None
        saved = self.checkpoints.latest()
        if saved is None:
            if self.checkpoints.exist():
                self.reporter.warn(
                    f"no checkpoint in {self.checkpoints.folder} can be read; starting anew."
                )
            return None
        groups = tuple(tuple(group) for group in saved.plan["groups"])
        chosen = {name: saved.plan[name] for name in ("batch_tokens", "product")}
        self.plan = replace(self.plan, groups=groups, **chosen)
        passes = "" if len(groups) == 1 else f" in pass {saved.number + 1} of {len(groups)}"
        self.reporter.note(
            f"going on from {self.checkpoints.folder}, where {saved.position.tokens:,} tokens are "
            f"summed{passes}, in batches of {self.plan.batch_tokens:,} tokens."
        )
        return saved

    def _choose_product(self) -> None:
        """Multiply keys in the way that is fastest on this machine, and say which."""
        decoder = self.model.decoder
        # Keys multiplied by their gates are float32 numbers.
        if decoder.device.type != "cpu" or decoder.n_experts:
            return
        product, ratio = fastest_product(decoder.d_m, next(decoder.model.parameters()).dtype)
        self.plan = replace(self.plan, product=product)
        if math.isfinite(ratio):
            self.reporter.note(
                f"products in {product}: bfloat16 takes {ratio:.2f} of float32's time on this "
                "machine."
            )

    def moment(self, layer: int, last: dict[int, Moment]) -> Moment:
        """The sums of a layer, of the last pass or read from the checkpoints."""
        if layer in last:
            return last[layer]
        if self.checkpoints is None:
            raise ArtifactError(f"layer {layer} was not summed.")
        number = next(i for i, group in enumerate(self.plan.groups) if layer in group)
        saved = self.checkpoints.finished_pass(number)
        moment = new_moment(self.model.decoder.projections[layer])
        moment.restore(saved.sums(layer), saved.position.tokens)
        return moment

    def _refuse_impossible(self) -> None:
        passes = self.plan.passes
        if passes == 1:
            return
        if reads_stdin(self.corpus):
            raise UsageError(
                f"the sums need {passes} passes over the corpus, and standard input can be read "
                "once; save it to a file, choose fewer --layers, or allow more --max-memory."
            )
        if self.options.until_settled is not None:
            raise UsageError(
                f"--until-settled needs all layers in one pass, and the sums need {passes}; choose "
                "fewer --layers, allow more --max-memory, or bound the run with --tokens."
            )

    def _sum_group(
        self, number: int, saved: Checkpoint | None
    ) -> tuple[dict[int, Moment], Position]:
        """One pass over the corpus, from where `saved` stands."""
        current = self._begin(number, saved)
        stream = TokenStream(
            self.model.tokenizer,
            self.corpus,
            self._share,
            Settling((), self.model.decoder.d_m).next_at,
            WINDOW_BATCHES * self.plan.batch_tokens,
            current.position.window,
        )
        passes = self.plan.passes
        label = "second moments" if passes == 1 else f"second moments, pass {number + 1}/{passes}"
        hold = held_signals() if self.checkpoints else nullcontext(HeldSignals())
        with (
            hold as signals,
            self.reporter.task(label, unit="tokens", done=current.position.tokens) as task,
        ):
            whole = self._sum_stream(current, stream, signals, task)
            if signals.received is not None:
                self._stop(current, signals.received)
        current.sums.flush()
        if self.checkpoints and number + 1 < passes:
            self.checkpoints.finish_pass(self._checkpoint(current), current.packed)
        if current.settling:
            self.settled = current.settling.history
        return current.sums.moments, replace(current.position, whole=whole)

    def _begin(self, number: int, saved: Checkpoint | None) -> _Pass:
        group = self.plan.groups[number]
        flush_tokens = FLUSH_BATCHES * self.plan.batch_tokens
        sums = LayerSums(
            self.model.decoder, group, self.plan.placement, flush_tokens, self.plan.product
        )
        settling = self._settling(group)
        if saved is None:
            return _Pass(number, sums, settling)
        for layer in group:
            sums.moments[layer].restore(saved.sums(layer), saved.position.tokens)
        if settling:
            settling = type(settling).restore(saved.arrays)
        return _Pass(number, sums, settling, saved.position, before=saved.position.tokens)

    def _settling(self, group: tuple[int, ...]) -> Settling | ExpertSettling | None:
        """What follows p while C is measured; None where nobody can, or of experts need."""
        if self.plan.passes > 1 or self._share.shard != WHOLE:
            return None
        decoder, watched = self.model.decoder, spread(group, MOST_LAYERS)
        if not decoder.n_experts:
            return Settling(watched, decoder.d_m)
        # To look at all experts takes long enough to be asked for.
        if self.options.until_settled is None:
            return None
        return ExpertSettling(watched, decoder.d_m, decoder.n_experts)

    def _sum_stream(
        self, current: _Pass, stream: TokenStream, signals: HeldSignals, task: Task
    ) -> bool:
        """Sum the windows of the stream; whether they were all of the corpus."""

        def stop_if_asked() -> None:
            # A signal often goes to all ranks: each saves its own sums before it hears of others.
            if signals.received is not None:
                self._stop(current, signals.received)
            if self.ranks:
                self._check_ranks(current, self.ranks)

        for window in ahead(stream, WINDOWS_AHEAD, stop_if_asked):
            if current.position.batches and current.position.digest != window.end.digest:
                raise stream.changed(window.end)
            batches = make_batches(window.sequences, self.plan.batch_tokens, self.model.boundary)
            current.position = replace(current.position, digest=window.end.digest)
            for batch in batches[current.position.batches :]:
                current.sums.add(batch, current.watch)
                current.position = _after(current, batch)
                self._show(current, stream, task)
                stop_if_asked()
                if self.checkpoints and current.sums.flushed and self.checkpoints.due():
                    self._save(current)
            current.position = replace(current.position, window=window.end, batches=0)
            if self._has_settled(current):
                return False
        if current.position.batches:
            raise stream.changed(current.position.window)
        return stream.exhausted and (
            self.options.tokens is None or current.position.window.limited < self.options.tokens
        )

    def _has_settled(self, current: _Pass) -> bool:
        """Look how settled C is, when it is time; whether that is enough."""
        settling, tokens = current.settling, current.position.tokens
        if settling is None or tokens < settling.next_at:
            return False
        device_of, worst = self.model.decoder.device_of, ""
        if isinstance(settling, ExpertSettling):
            settled = settling.evaluate(tokens, current.sums.of_experts, device_of)
            worst = " in the worst experts"
        else:
            settled = settling.evaluate(
                tokens, lambda layer: current.sums.dense(layer).lower_sums(device_of(layer))
            )
        if settled is None:
            return False
        self.reporter.note(
            f"at {tokens:,} tokens p is about {settled.rms:.4f} (rms){worst} from what it would "
            "be with endless text."
        )
        limit = self.options.until_settled
        return limit is not None and settled.rms <= limit

    def _show(self, current: _Pass, stream: TokenStream, task: Task) -> None:
        position = current.position
        words = [
            f"{position.documents:,} documents",
            f"{1 - position.tokens / position.padded:.1%} padding",
        ]
        if current.settling and current.settling.history:
            words.append(f"p ± {current.settling.history[-1].rms:.3f}")
        task.reach(position.tokens, self._expected(stream), " · ".join(words))

    def _expected(self, stream: TokenStream) -> float | None:
        """How many tokens this pass will have summed at its end, as far as that can be told."""
        read, share = stream.read, self._share
        if stream.finished:
            return read.tokens
        if share.tokens is not None:
            return share.tokens / share.shard.count
        limits = [each for each in (share.samples, self._documents) if each is not None]
        if not limits or read.documents == 0:
            return None
        return read.tokens * min(limits) / read.documents

    def _checkpoint(self, current: _Pass) -> Checkpoint:
        return Checkpoint(
            number=current.number,
            layers=self.plan.groups[current.number],
            plan={
                "groups": self.plan.groups,
                "batch_tokens": self.plan.batch_tokens,
                "product": self.plan.product,
            },
            position=current.position,
            arrays=current.settling.state() if current.settling else {},
        )

    def _save(self, current: _Pass) -> bool:
        """Save the run as it stands; whether that could be done. A full disk does not stop it."""
        if self.checkpoints is None:
            return False
        try:
            self.checkpoints.save(self._checkpoint(current), current.packed)
        except ArtifactError as error:
            self.reporter.warn(f"no checkpoint at {current.position.tokens:,} tokens: {error}")
            return False
        self.reporter.note(f"saved at {current.position.tokens:,} tokens.")
        return True

    def _check_ranks(self, current: _Pass, ranks: Ranks) -> None:
        try:
            ranks.check()
        except RankError:
            current.sums.flush()
            if current.position.tokens:
                self._save(current)
            raise

    def _stop(self, current: _Pass, number: int) -> None:
        current.sums.flush()
        tokens = f"{current.position.tokens:,} tokens"
        if current.position.tokens == 0:
            text = "nothing was summed yet."
        elif self._save(current):
            text = f"{tokens} are saved, and the same command goes on from there."
        else:
            text = f"{tokens} are lost but for what an earlier checkpoint holds."
        raise InterruptedRunError(number, text)


def _after(current: _Pass, batch: TokenBatch) -> Position:
    position = current.position
    return replace(
        position,
        batches=position.batches + 1,
        tokens=position.tokens + batch.tokens,
        padded=position.padded + batch.padded,
        documents=position.documents + len(batch.sequences),
        halved=position.halved or current.sums.halved,
    )
