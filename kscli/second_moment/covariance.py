"""cache-cov: the second moment of every layer's keys over a corpus, from the model to cov.h5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from kscli.artifacts import ArtifactWriter, CovarianceAbout, Recipe, write_artifact
from kscli.corpus import Corpus
from kscli.errors import CorpusError
from kscli.layers import spread
from kscli.models.loading import LoadedModel
from kscli.models.locating import ModelIdentity
from kscli.reporter import SILENT, Reporter
from kscli.second_moment.checkpoints import Position
from kscli.second_moment.corpus_run import CovarianceRun
from kscli.second_moment.expert_moments import ExpertMoments, Moment, new_moment
from kscli.second_moment.options import WHOLE, CovarianceOptions, Shard
from kscli.second_moment.plan import RunPlan
from kscli.second_moment.ranks import Ranks
from kscli.second_moment.settling import MOST_LAYERS, Settled

BATCH_TOKENS = 4096

__all__ = ["CovarianceOptions", "SecondMoments", "cache_covariance", "second_moments"]


@dataclass(frozen=True)
class SecondMoments:
    """The second moments of several layers over one corpus, and how settled they are."""

    layers: tuple[int, ...]
    moments: dict[int, Moment]
    totals: Position
    settled: list[Settled] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of tokens that C is a mean over."""
        return self.totals.tokens


def covariance_recipe(
    identity: ModelIdentity, corpus: Corpus, options: CovarianceOptions, dtype: str
) -> Recipe:
    """Everything that decides what cov.h5 holds."""
    return {
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "corpus": corpus.identity,
        "samples": options.samples,
        "tokens": options.tokens,
        "max_length": options.max_length,
        "layers": options.layers,
        "until_settled": options.until_settled,
        "shard": None if options.shard == WHOLE else str(options.shard),
        "dtype": dtype,
    }


def checkpoint_recipe(recipe: Recipe, batch_tokens: int | None, rank: Shard) -> Recipe:
    """Everything that decides a run's sums on their way, from what decides cov.h5.

    Standard input has another identity each time; its documents are compared when they are read
    again.
    """
    corpus = recipe["corpus"]
    if corpus.startswith("stdin:"):
        corpus = "stdin"
    return {**recipe, "corpus": corpus, "batch_tokens": batch_tokens, "rank": str(rank)}


def one_pass(model: LoadedModel, layers: str = "all", batch_tokens: int = BATCH_TOKENS) -> RunPlan:
    """A plan for those who have the memory: one pass, the sums on the model's own device."""
    chosen = model.of_layers(layers).decoder.layers
    return RunPlan((chosen,), "device" if model.device.startswith("cuda") else "host", batch_tokens)


def second_moments(
    model: LoadedModel,
    corpus: Corpus,
    options: CovarianceOptions,
    reporter: Reporter = SILENT,
    plan: RunPlan | None = None,
) -> SecondMoments:
    """Run the corpus through the model once and sum k k^T at every chosen layer.

    Raises NumericsError, naming layer and document, when a key is not finite, and CorpusError
    when the corpus gives no token at all.
    """
    plan = plan or one_pass(model, options.layers)
    run = CovarianceRun(model, corpus, options, plan, reporter)
    moments, totals = run.sum_up()
    _check_totals(run, totals)
    return SecondMoments(plan.layers, moments, totals, run.settled)


def cache_covariance(run: CovarianceRun, path: Path, recipe: Recipe) -> Position:
    """Measure the second moments and write them to cov.h5 at `path`, replacing what is there.

    Where there is a checkpoint the run goes on from it, by the checkpoint's plan, and removes it
    at the end. Of several ranks the first writes, and gets the totals of all. Raises what
    `second_moments` and `write_artifact` raise, RankError when another rank fails, and
    InterruptedRunError when a signal stopped the run.
    """
    last, own = run.sum_up()
    totals = _of_all_ranks(own, run.ranks)
    _check_totals(run, totals)
    sums = _sums(run, last, totals, run.ranks)
    if run.ranks is None or run.ranks.leader:
        with write_artifact(path, "cov", _about(run, totals, recipe), force=True) as writer:
            _write(writer, run, totals, sums)
    else:
        for _ in sums:
            pass
    if run.ranks:
        # Until the first has written the file, the others' checkpoints may still be needed.
        run.ranks.wait()
    if run.checkpoints:
        run.checkpoints.remove()
    return totals


def _check_totals(run: CovarianceRun, totals: Position) -> None:
    corpus, options, note = run.corpus, run.options, run.reporter.note
    if totals.tokens == 0:
        if options.shard != WHOLE:
            raise CorpusError(f"shard {options.shard} of {corpus.name} has no token; use fewer.")
        raise CorpusError(f"the corpus {corpus.name} gave no token; is its text empty?")
    if totals.whole and options.samples is not None and options.shard == WHOLE:
        count = totals.window.own
        note(f"{corpus.name} has {count:,} document{'s' * (count != 1)}; all of them were taken.")
    if totals.window.empty:
        note(f"{totals.window.empty:,} documents had no token and were passed over.")


def _of_all_ranks(own: Position, ranks: Ranks | None) -> Position:
    if ranks is None:
        return own
    window = own.window
    tokens, padded, halved, whole, documents, empty = ranks.sum_counts(
        [own.tokens, own.padded, own.halved, own.whole, window.own, window.empty]
    )
    return Position(
        replace(window, own=documents, empty=empty),
        tokens=tokens,
        padded=padded,
        halved=halved > 0,
        whole=whole == ranks.shard.count,
    )


def _sums(
    run: CovarianceRun, last: dict[int, Moment], totals: Position, ranks: Ranks | None
) -> Iterator[Moment]:
    """The sums of every layer in turn; of several ranks, on the first. One is reduced at a time."""
    for layer in run.plan.layers:
        moment = run.moment(layer, last)
        if ranks:
            packed = moment.packed()
            ranks.reduce(torch.from_numpy(packed))
            if not ranks.leader:
                yield moment
                continue
            moment = new_moment(run.model.decoder.projections[layer])
            moment.restore(packed, totals.tokens)
            del packed
        yield moment


def _about(run: CovarianceRun, totals: Position, recipe: Recipe) -> CovarianceAbout:
    return CovarianceAbout(
        **run.model.provenance(),
        corpus=run.corpus.name,
        corpus_identity=run.corpus.identity,
        documents=totals.window.own,
        whole_corpus=totals.whole,
        max_length=run.options.max_length or run.model.max_length,
        batch_tokens=run.plan.batch_tokens,
        batches_halved=totals.halved,
        padding=1 - totals.tokens / totals.padded,
        recipe=recipe,
    )


def _write(
    writer: ArtifactWriter,
    run: CovarianceRun,
    totals: Position,
    sums: Iterator[Moment],
) -> None:
    layers = run.plan.layers
    writer.layers(layers)
    writer.write("count", totals.tokens)
    if run.settled:
        writer.write("settling/layer", spread(layers, MOST_LAYERS))
        writer.write("settling/tokens", [s.tokens for s in run.settled])
        writer.write("settling/rms", [s.by_layer for s in run.settled])
    with run.reporter.task("writing", len(layers), unit="layers") as task:
        for index, moment in enumerate(sums):
            for name, array in moment.arrays().items():
                writer.put(name, index, array)
            if isinstance(moment, ExpertMoments):
                _name_starved(layers[index], moment, run.model.decoder.d_m, run.reporter)
            task.advance()


def _name_starved(layer: int, moment: ExpertMoments, d_m: int, reporter: Reporter) -> None:
    """Say which experts of a layer saw fewer tokens than their keys have dimensions."""
    starved = np.flatnonzero(moment.routed < d_m).tolist()
    if starved:
        named = ", ".join(f"{expert} ({moment.routed[expert]:,})" for expert in starved[:8])
        more = f" and {len(starved) - 8} more" if len(starved) > 8 else ""
        reporter.warn(
            f"experts of layer {layer} saw fewer tokens than their {d_m:,} dimensions: "
            f"{named}{more}. p of a fact that is routed to one needs more text, or a --ridge."
        )
