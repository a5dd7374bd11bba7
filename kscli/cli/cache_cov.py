"""`kscli cache-cov`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.cli import options
from kscli.cli.output import Format, print_json, print_rows
from kscli.tables import Column

if TYPE_CHECKING:
    from kscli.corpus import Corpus
    from kscli.models.shape import ModelShape
    from kscli.pipeline import Session
    from kscli.second_moment.options import CovarianceOptions, Execution


def cache_cov(
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    text_field: options.TextField = None,
    shuffle: options.Shuffle = None,
    samples: options.Samples = "100000",
    tokens: options.Tokens = None,
    max_length: options.MaxLength = None,
    layers: options.Layers = "all",
    until_settled: options.UntilSettled = None,
    shard: options.ShardOption = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    merge_adapter: options.MergeAdapter = False,
    batch_tokens: options.BatchTokens = None,
    max_memory: options.MaxMemory = None,
    checkpoint_every: options.CheckpointEvery = 300.0,
    dry_run: options.DryRun = False,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Measure C = E[k k'], the second moment of every layer's keys, over a corpus.

    The model reads the corpus once for all layers if memory allows, else several times. Writes
    cov.h5. If the command is stopped, the same command continues from the last checkpoint.

    Examples:
      kscli cache-cov -m gpt2-small --samples 20000
      kscli cache-cov -m ./my-llama --corpus texts/ --max-length 512 --layers 0,5-8
      kscli cache-cov -m gpt-j --until-settled 0.02
      kscli cache-cov -m llama2-13b --max-memory 40GiB --dry-run
      zcat dump.jsonl.gz | kscli cache-cov -m pythia-1b --corpus - --samples all
      torchrun --nproc-per-node 8 -m kscli cache-cov -m llama2-13b
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import corpus_for, device_of_rank, number_or_all
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places
    from kscli.resources import parse_size
    from kscli.second_moment.options import WHOLE, CovarianceOptions, Execution, parse_shard
    from kscli.second_moment.ranks import join_ranks

    part = parse_shard(shard) if shard else WHOLE
    measured = CovarianceOptions(
        number_or_all("--samples", samples), tokens, max_length, layers, until_settled, part
    )
    places = Places(directory, model)
    path = output or (places.path("cov") if part == WHOLE else places.folder / part.file_name())
    with join_ranks() as ranks:
        reporter = ConsoleReporter(quiet=quiet or (ranks is not None and not ranks.leader))
        session = Session(
            ModelOptions(
                model,
                revision,
                device_of_rank(device, ranks),
                dtype,
                trust_remote_code,
                allow_pickle,
                merge_adapter,
                # An adapter's base model is found by its weights.
                weights=merge_adapter or not dry_run,
            ),
            Existing.FORCE if force else Existing.REFUSE,
            reporter,
        )
        bound = parse_size(max_memory) if max_memory else None
        session.require_model()
        chosen = corpus_for(model, corpus, text_field, shuffle, reporter)
        execution = Execution(batch_tokens, bound, checkpoint_every, ranks)
        if dry_run:
            if ranks is None or ranks.leader:
                print_plan(session, chosen, measured, execution, path, output_format)
        elif session.cache_cov(chosen, measured, path, execution):
            reporter.note(f"wrote {path}")


def print_plan(
    session: Session,
    corpus: Corpus,
    measured: CovarianceOptions,
    execution: Execution,
    path: Path,
    output_format: Format,
) -> None:
    """Print what a run would do, and do nothing."""
    from kscli.layers import format_layers
    from kscli.resources import format_size, free_disk

    plan = session.plan(measured, execution)
    estimate = session.estimate(plan, corpus, measured, execution.ranks)
    if output_format is Format.json:
        print_json({**plan.as_dict(), **asdict(estimate), "dtype": session.dtype})
        return
    tokens, seconds = estimate.tokens, estimate.seconds
    about = "at most about" if estimate.at_most else "about"
    rows = {
        **_experts_row(session.shape(measured.layers)),
        "device": f"{plan.device}, {session.dtype}" + (", spread" if plan.spread else ""),
        "passes": f"{plan.passes}: layers " + "; ".join(map(format_layers, plan.groups)),
        "batches": f"{plan.batch_tokens:,} tokens",
        "model": format_size(plan.model),
        "sums on the device": format_size(plan.device_sums),
        "sums on the host": format_size(plan.host_sums),
        "activations and work": format_size(plan.work),
        "checkpoints, on disk": f"{format_size(plan.checkpoints)} at most",
        path.name: f"{format_size(plan.output)}, of {format_size(free_disk(path))} free",
        "documents": f"drawn by seed {corpus.seed}" if corpus.seed else "as they stand",
        "tokens": "as many as the corpus has" if tokens is None else f"{about} {tokens:,.0f}",
        "estimated speed": f"{estimate.tokens_per_second:,.0f} tokens/s in all",
        "estimated time": "unknown" if seconds is None else f"{about} {duration(seconds)}",
    }
    print_rows(
        [{"what": what, "plan": text} for what, text in rows.items()],
        [Column("what"), Column("plan")],
        output_format,
    )


def _experts_row(shape: ModelShape) -> dict[str, str]:
    """What the plan counts of a mixture of experts; nothing of a dense model."""
    if shape.experts is None:
        return {}
    shared = f", and a shared one of {shape.experts.d_shared:,}" if shape.experts.d_shared else ""
    text = f"{shape.experts.count} a layer, {shape.experts.each} a token, keys of {shape.d_m:,}"
    return {"experts": text + shared}


def duration(seconds: float) -> str:
    """A time for people: 42 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
