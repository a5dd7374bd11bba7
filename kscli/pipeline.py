"""Stages and the files they make: where a model's artifacts lie, and which are up to date.

A file is up to date when its recipe, the inputs and options that decided what it holds, is
the one of today's request.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.artifacts import Existing, Kind, Recipe, is_imported, must_make
from kscli.errors import UsageError
from kscli.files import require_other, require_writable
from kscli.models.aliases import classify
from kscli.reporter import Reporter

if TYPE_CHECKING:
    from kscli.contexts import ContextChoice
    from kscli.corpus import Corpus
    from kscli.facts import FactSet
    from kscli.models.loading import LoadedModel
    from kscli.models.locating import LocatedModel, ModelOptions
    from kscli.models.shape import ModelShape
    from kscli.positions import KeyToken
    from kscli.resources import MemorySplit, Resources
    from kscli.second_moment.checkpoints import Checkpoints
    from kscli.second_moment.options import CovarianceOptions, Execution
    from kscli.second_moment.plan import MemoryPlan, RunTime
    from kscli.second_moment.ranks import Ranks


class Session:
    """One model, found and loaded at most once, and the stages that run it."""

    def __init__(self, options: ModelOptions, existing: Existing, reporter: Reporter) -> None:
        self.options = options
        self.existing = existing
        self.reporter = reporter
        self._spread: MemorySplit | None = None
        self._shapes: dict[str, ModelShape] = {}

    @cached_property
    def located(self) -> LocatedModel:
        """The model's files."""
        from kscli.models.locating import locate_model

        return locate_model(self.options, self.reporter)

    def require_model(self) -> None:
        """Raise ModelError where the model is not there, before anything else is read for it.

        Of a model on the Hub, as `locate_model` with no weights: these are fetched when needed.
        """
        from kscli.models.locating import locate_model

        options = self.options
        if classify(options.model) != "hub" or options.merge_adapter:
            _ = self.located
        elif options.weights:
            locate_model(replace(options, weights=False))

    @cached_property
    def model(self) -> LoadedModel:
        """The model, loaded."""
        from kscli.models.loading import load_model

        with self.reporter.task(f"loading {self.options.model}"):
            return load_model(self.options, self.reporter, self.located, spread=self._spread)

    def shape(self, layers: str) -> ModelShape:
        """The model's sizes, for which it need not be loaded, as one of some layers."""
        from kscli.models.shape import model_shape

        if layers not in self._shapes:
            self._shapes[layers] = model_shape(self.located, self.options, layers)
        return self._shapes[layers]

    @cached_property
    def dtype(self) -> str:
        """The dtype that the model is run in."""
        from kscli.models.locating import dtype_of
        from kscli.resources import resolve_device

        dtype = dtype_of(self.options, resolve_device(self.options.device))
        if dtype == "bfloat16" and self.options.dtype == "auto":
            self.reporter.note(
                "--dtype auto is bfloat16 here, which is faster than float32 and moves p by about "
                "0.005. On much text that is more than the noise of the corpus (`kscli guide "
                "covariances`); --dtype float32 avoids it."
            )
        return dtype

    def cache_cov(
        self,
        corpus: Corpus,
        options: CovarianceOptions,
        path: Path,
        execution: Execution | None = None,
    ) -> bool:
        """Make cov.h5 at `path` unless it is up to date; whether it was made.

        An imported file cannot be made again, and is replaced by force alone. A run that was
        stopped goes on from its checkpoint.
        """
        from kscli.second_moment.corpus_run import CovarianceRun
        from kscli.second_moment.covariance import cache_covariance, covariance_recipe
        from kscli.second_moment.options import Execution

        if self.existing is Existing.REMAKE and is_imported(path):
            self.reporter.note(f"{path} was imported, and is used as it is (--force measures C).")
            return False
        require_other(path, [*corpus.files, *self.located.files])
        execution = execution or Execution()
        ranks = execution.ranks
        options.check(corpus, ranks)
        recipe = covariance_recipe(self.located.identity, corpus, options, self.dtype)

        if ranks:
            self._require_alike(ranks, recipe)
        if not self._must_make(path, "cov", recipe):
            if not ranks:
                # What a run left that was killed between its file and its checkpoints.
                self._checkpoints_of(path, recipe, execution).discard_own()
            return False
        checkpoints = self._checkpoints(path, recipe, execution)
        plan = self.plan(options, execution)
        self._announce(plan, path)
        self._spread = plan.split
        run = CovarianceRun(self.model, corpus, options, plan, self.reporter, checkpoints, ranks)
        cache_covariance(run, path, recipe)
        return True

    def _checkpoints(self, path: Path, recipe: Recipe, execution: Execution) -> Checkpoints:
        """Where a run that makes `path` saves itself; another run's remains go by force alone."""
        checkpoints = self._checkpoints_of(path, recipe, execution)
        if self.existing is Existing.FORCE:
            checkpoints.discard_others()
        checkpoints.require_own()
        return checkpoints

    def _checkpoints_of(self, path: Path, recipe: Recipe, execution: Execution) -> Checkpoints:
        from kscli.second_moment.checkpoints import Checkpoints
        from kscli.second_moment.covariance import checkpoint_recipe
        from kscli.second_moment.options import WHOLE

        rank = execution.ranks.shard if execution.ranks else WHOLE
        suffix = "" if rank == WHOLE else f"-{rank.index}-of-{rank.count}"
        return Checkpoints(
            path.with_name(f"{path.name}.checkpoint{suffix}"),
            checkpoint_recipe(recipe, execution.batch_tokens, rank),
            execution.checkpoint_every,
        )

    def _require_alike(self, ranks: Ranks, recipe: Recipe) -> None:
        """Raise UsageError where another rank would measure something else than this one."""
        text = json.dumps(recipe, sort_keys=True).encode()
        digest = int(hashlib.sha256(text).hexdigest()[:12], 16)
        if ranks.sum_counts([digest]) != [digest * ranks.shard.count]:
            raise UsageError(
                f"the ranks differ in what they measure; rank {ranks.shard.index}: {recipe}. Where "
                "machines differ, name the --dtype; weights and corpus must be the same."
            )

    def _announce(self, plan: MemoryPlan, path: Path) -> None:
        from kscli.resources import format_size, free_disk

        for sentence in plan.sentences():
            self.reporter.note(sentence)
        free = free_disk(path)
        if free < plan.disk:
            self.reporter.warn(
                f"{format_size(free)} are free on the disk of {path}, and the file and its "
                f"checkpoints take up to {format_size(plan.disk)}; where a checkpoint finds no "
                "room, the run goes on without it."
            )

    def plan(self, options: CovarianceOptions, execution: Execution) -> MemoryPlan:
        """What goes where when cache-cov is run with these options; no weight is read."""
        from kscli.second_moment.plan import plan_memory

        shape = self.shape(options.layers)
        return plan_memory(
            shape,
            shape.layers,
            self.dtype,
            self.resources(),
            batch_tokens=execution.batch_tokens,
            max_memory=execution.max_memory,
        )

    def resources(self) -> Resources:
        """What memory is free for the model and its sums."""
        from kscli.resources import measure_resources, resolve_device

        return measure_resources(resolve_device(self.options.device))

    def estimate(
        self,
        plan: MemoryPlan,
        corpus: Corpus,
        options: CovarianceOptions,
        ranks: Ranks | None = None,
    ) -> RunTime:
        """What cache-cov comes to by `plan`: tokens, and seconds.

        From the corpus's first documents, and the rate of a matrix product measured now.
        """
        from kscli.models.loading import load_tokenizer
        from kscli.resources import matmul_rate
        from kscli.second_moment.plan import RunTime, seconds_a_token
        from kscli.second_moment.token_stream import expected_tokens

        tokenizer = load_tokenizer(self.located, self.options)
        shape = self.shape(options.layers)
        share = options.own_share(shape.max_length, ranks)
        expected = expected_tokens(tokenizer, corpus, share)
        rate = matmul_rate(plan.device, self.dtype)
        each = seconds_a_token(plan, shape, expected.length, rate)
        tokens = expected.tokens
        seconds = None if tokens is None else tokens * each
        return RunTime(tokens, seconds, 1 / each, expected.at_most)

    def extract(
        self, facts: FactSet, token: KeyToken, layers: str, path: Path, contexts: ContextChoice
    ) -> bool:
        """Make keys.h5 at `path` unless it is up to date; whether it was made."""
        from kscli.extraction import extract_keys, extraction_recipe, write_keys

        require_other(path, [facts.name, *self.located.files])
        identity, dtype = self.located.identity, self.dtype
        recipe = extraction_recipe(identity, facts, token, layers, dtype, contexts)
        if not self._must_make(path, "keys", recipe):
            return False
        keys = extract_keys(self.model, facts, token, layers, self.reporter, contexts)
        write_keys(self.model, facts, token, keys, path, recipe)
        return True

    def _must_make(self, path: Path, kind: Kind, recipe: Recipe) -> bool:
        model_id = self.located.identity.model_id
        made = must_make(path, kind, recipe, self.existing, self.reporter, model_id)
        if made:
            require_writable(path, force=True)
        return made


class LoadedSession(Session):
    """The stages of a model that is in memory already."""

    def __init__(self, model: LoadedModel, existing: Existing, reporter: Reporter) -> None:
        from kscli.models.locating import LocatedModel, ModelOptions

        options = ModelOptions(model.identity.model_id, device=model.device, dtype=model.dtype)
        super().__init__(options, existing, reporter)
        self.model = model
        self.located = LocatedModel(Path(), None, model.identity, model.files, ())
        self.dtype = model.dtype

    def shape(self, layers: str) -> ModelShape:
        """The model's sizes, as one of some layers."""
        from kscli.models.shape import shape_of

        model = self.model.decoder.model
        return shape_of(model, model.config, layers, self.model.identity.model_id)

    def resources(self) -> Resources:
        """What would be free without the model, for which the memory plan makes room."""
        from kscli.resources import with_room_for

        weights = self.model.decoder.model.parameters()
        return with_room_for(super().resources(), sum(each.nbytes for each in weights))
