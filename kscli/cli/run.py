"""`kscli run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kscli.cli import options
from kscli.cli.output import Format, print_json, print_line, print_rows
from kscli.cli.topk import print_pairs
from kscli.tables import STATISTICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kscli.artifacts import Existing, PMatrixFile
    from kscli.facts import Fact
    from kscli.models.loading import LoadedModel
    from kscli.reporter import Reporter


KNOWN_TO_TINY = 177
LESSON = (
    "tiny is a GPT-2 of 4 layers that comes with kscli and knows {known} facts{measured}. The "
    "down-projection of each layer finds by a key what the model knows of a subject. Facts of "
    "similar keys are bound: an edit of one moves the other. This run measures which facts these "
    "are; -m names your model."
)
"""What a first run is, for the embedded model; `lesson` fills in what is measured of them."""


def run(
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    text_field: options.TextField = None,
    shuffle: options.Shuffle = None,
    samples: options.Samples = "100000",
    tokens: options.Tokens = None,
    max_length: options.MaxLength = None,
    facts: options.Facts = None,
    count: options.Count = None,
    prompt_field: options.PromptField = None,
    subject_field: options.SubjectField = None,
    target_field: options.TargetField = None,
    token: options.Token = "subject-last",
    contexts: options.Contexts = None,
    layers: options.Layers = "all",
    ridge: options.Ridge = 0.0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_pickle: options.AllowPickle = False,
    merge_adapter: options.MergeAdapter = False,
    directory: options.Dir = Path("artifacts"),
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Do every stage in order: cache-cov, extract, pmatrix, stats, and the figures.

    A stage is skipped if its file exists and was made from the same inputs. If its inputs changed,
    it is made again, and so are the stages that depend on it. Prints the statistics, the top pairs
    of the first layer and the paths of the figures; in csv and tsv only the statistics.

    Examples:
      kscli run
      kscli run -m gpt2-small --samples 20000
      kscli run -m SmolLM2.gguf --corpus wikitext.jsonl --facts counterfact.json -f json
    """
    from kscli.analysis.few_facts import few_facts
    from kscli.analysis.pairs import pair_rows
    from kscli.analysis.statistics import say_caution
    from kscli.analysis.stats_file import statistics_of
    from kscli.artifacts import CovarianceFile, Existing, KeysFile, PMatrixFile
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.explaining import (
        EDIT_OWN,
        REPORT,
        RISK,
        compare_kurtosis,
        explain_columns,
        explainer,
        fact_to_edit,
        suggest,
    )
    from kscli.cli.requests import corpus_for, facts_for, number_or_all
    from kscli.contexts import choose_contexts
    from kscli.editing.editors import ROME_CONTEXTS
    from kscli.models.locating import ModelOptions
    from kscli.pipeline import Session
    from kscli.places import Places
    from kscli.pmatrix import write_pmatrix
    from kscli.second_moment.options import CovarianceOptions

    refuse_ranks()
    own_names = {"prompt": prompt_field, "subject": subject_field, "target": target_field}
    reporter = ConsoleReporter(quiet=quiet)
    existing = Existing.FORCE if force else Existing.REMAKE
    places = Places(directory, model)
    session = Session(
        ModelOptions(
            model, revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        ),
        existing,
        reporter,
    )
    told = explainer(reporter, output_format)
    measured = CovarianceOptions(number_or_all("--samples", samples), tokens, max_length, layers)
    chosen_contexts = choose_contexts(contexts, ROME_CONTEXTS)
    session.require_model()
    chosen_facts = facts_for(model, facts, count, reporter, own_names)
    m = len(chosen_facts.facts)
    if too_few := few_facts(m):
        reporter.warn(too_few)
    chosen_corpus = corpus_for(model, corpus, text_field, shuffle, reporter)
    if model == options.DEFAULT_MODEL:
        told.note(lesson(m, own=facts is not None))
    told.note(f"1. C: which keys {model} has in text. The more text, the less p changes.")
    session.cache_cov(chosen_corpus, measured, places.path("cov"))
    told.note("2. Keys: what the model looks up at the last token of each fact's subject.")
    read = session.extract(chosen_facts, token, layers, places.path("keys"), chosen_contexts)
    if read and too_few:
        say_what_is_known(session.model, chosen_facts.facts, told)
    told.note("3. P: p of every pair of facts, its statistics, and the figures.")
    path = places.path("pmatrix")
    with CovarianceFile(places.path("cov")) as cov, KeysFile(places.path("keys")) as keys:
        write_pmatrix(
            cov,
            keys,
            path,
            layers=keys.layers,
            ridge=ridge,
            existing=existing,
            reporter=reporter,
        )
    with PMatrixFile(path) as pm:
        described = statistics_of(pm, pm.layers, places.path("stats"), None, reporter, existing)
        figures = draw_figures(pm, places.figures, existing, reporter)
        say_caution(described, pm.facts, reporter)
        statistics = described.rows()
        pairs = list(pair_rows(pm, pm.layers[0], k=20))  # read while the file is open
        subjects = [fact.subject for fact in pm.facts]
    if output_format is Format.json:
        print_json(
            {
                "statistics": statistics,
                "top_pairs": pairs,
                "figures": [str(path) for path in figures],
            }
        )
        return
    if output_format in (Format.csv, Format.tsv):
        print_rows(statistics, [], output_format)
        return
    if pairs:
        print_rows(statistics, STATISTICS, output_format, f"p of {model}, layer by layer")
        explain_columns(STATISTICS, statistics, told)
        compare_kurtosis(statistics, told)
        told.note("")
        title = f"The pairs that are bound most tightly at layer {pairs[0]['layer']}"
        print_pairs(pairs, output_format, title)
    for path in figures:
        print_line(str(path))
    if not pairs:
        suggest((EDIT_OWN,), model, directory, told)
    else:
        fact = fact_to_edit(model, subjects, pairs[0]["subject_i"])
        suggest((REPORT, RISK, EDIT_OWN), model, directory, told, fact)
        if model == options.DEFAULT_MODEL:
            told.note("`kscli guide start` explains these tables, and goes on from here.")


def lesson(m: int, *, own: bool) -> str:
    """`LESSON`, and which facts are measured: `m` of them, the user's `own` or the model's."""
    if own:
        measured = ", beside the facts of --facts, which are measured here"
    elif m < KNOWN_TO_TINY:
        measured = f", of which the first {m} are measured (--count all takes all)"
    else:
        measured = ", which are measured here"
    return LESSON.format(known=KNOWN_TO_TINY, measured=measured)


def say_what_is_known(model: LoadedModel, facts: Sequence[Fact], reporter: Reporter) -> None:
    """Say how many of a few facts the model knows."""
    from kscli.knowledge import check_facts

    known = sum(each.known for each in check_facts(model, facts))
    reporter.note(
        f"Facts that the model knows, for it completes their prompts with their targets: {known} "
        f"of {len(facts)}. Of others p says how far they would move, and not what would be lost."
    )


def refuse_ranks() -> None:
    """Raise UsageError where several processes were started that would all do the same."""
    import os

    from kscli.errors import UsageError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "`run` is one process; start `cache-cov` with torchrun, and then `run` without it."
        )


def draw_figures(
    pm: PMatrixFile, folder: Path, existing: Existing, reporter: Reporter
) -> list[Path]:
    """Draw every kind of figure that does not show `pm` already; returns all their paths."""
    from kscli.cli.plot import origin_of
    from kscli.figures import KINDS, Source
    from kscli.figures.saving import save_figure
    from kscli.layers import default_layers

    paths = []
    for kind in (kind for kind in KINDS.values() if kind.standard):
        path = folder / f"{kind.name}.png"
        paths.append(path)
        layers = default_layers(kind.layers, pm.layers)
        origin = origin_of(kind, [pm], None)
        if origin.must_make(path, existing, reporter):
            drawn = kind.draw([Source(pm, layers, pm.about.n_layers)])
            save_figure(drawn, path, force=True, source=origin.line)
    return paths
