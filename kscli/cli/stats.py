"""`kscli stats`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_head, print_line, print_rows
from kscli.tables import (
    BY_EXPERT,
    FIXED_POINTS,
    PAIRS_ABOVE_NOISE,
    ROUTING,
    SCALING,
    SPARSITY,
    SPECTRUM,
    STATISTICS,
    Row,
    noise_columns,
)

if TYPE_CHECKING:
    from kscli.analysis.resampling import Resampling
    from kscli.analysis.statistics import Statistics
    from kscli.artifacts import Existing, PMatrixFile
    from kscli.reporter import Reporter

    Chosen = list[tuple[PMatrixFile, tuple[int, ...]]]


def stats(
    context: typer.Context,
    model: options.Models = None,
    editor: options.EditorOfP = None,
    pmatrix: options.PMatrices = None,
    layers: options.Layers = "all",
    scaling: Annotated[
        bool,
        typer.Option("--scaling", help="Compare kurtosis and size of several models, by family."),
    ] = False,
    fixed_points: Annotated[
        bool,
        typer.Option(
            "--fixed-points", help="List the pairs that are in the top K of every model at layer 0."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="A pmatrix.h5 of the same keys, with C of disjoint text. Shows how much of p is "
            "noise.",
        ),
    ] = None,
    above: Annotated[
        bool, typer.Option("--above", help="With --against: list the pairs above the noise.")
    ] = False,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum",
            help="Show the spectrum of C, the overlap of keys, and what cuts of AlphaEdit call "
            "null.",
        ),
    ] = False,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="Show P of every expert alone: the tokens and facts routed to it, and their p.",
        ),
    ] = False,
    null_space: Annotated[
        float | None,
        typer.Option(
            "--null-space",
            metavar="X",
            min=0.0,
            help="With --spectrum: the absolute cut (nullspace_threshold).",
            show_default="0.02",
        ),
    ] = None,
    relative_null_space: Annotated[
        float | None,
        typer.Option(
            "--relative-null-space",
            metavar="X",
            min=0.0,
            help="With --spectrum: the relative cut, X times the mean singular value of C.",
            show_default="0.02",
        ),
    ] = None,
    k: options.TopPairs = 20,
    repeats: options.Repeats = 1000,
    seed: options.Seed = 0,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Describe the distribution of P's off-diagonal entries, layer by layer.

    Intervals are 95 % bootstrap intervals: facts are resampled. `different last token` is the
    kurtosis of pairs whose subjects do not end in the same token. `carry half` is the least number
    of pairs of facts that carry half of the fourth moment. json, csv and tsv have more: quantiles,
    tails, a Hill index, the pairs and the fact that carry the variance, and the same statistics of
    pairs of a different last token (NAME_distinct). Of a mixture of experts, pairs that have no
    expert in common are counted, and pairs that have one are described (NAME_common).

    Reads pmatrix.h5 and loads no model. Writes the statistics of all layers to stats.h5 beside
    each model's pmatrix.h5. Statistics of chosen layers, or of a file that --pmatrix names, are
    written only with --output.

    Several models are compared in further tables. --scaling, --fixed-points, --against,
    --spectrum and --experts print such a table alone, in any format. The last two read the cov.h5
    and keys.h5 beside each pmatrix.h5, too. The family and size of a model are known from its
    alias or its name. --scaling compares a mixture of experts with the dense models of which a
    token uses as many parameters, and with those that have as many in all.

    Examples:
      kscli stats -m gpt2-small
      kscli stats -m gpt2-small -m gpt2-medium -m gpt2-large -f csv > kurtosis.csv
      kscli stats -m gpt2-small -m gpt2-medium --scaling -f json | jq '.[].difference'
      kscli stats -m gpt-j --layers 0,-1 -f json | jq '.[] | {layer, kurtosis, kurtosis_low}'
      kscli stats -m gpt2-small --against other-text/pmatrix.h5
      kscli stats -m gpt2-small --spectrum
      kscli stats -m olmoe --experts --layers 0
    """
    from kscli.analysis.few_facts import few_facts
    from kscli.analysis.fixed_points import comparable
    from kscli.analysis.resampling import Resampling
    from kscli.analysis.statistics import say_caution
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.explaining import (
        REPORT,
        TOPK,
        compare_kurtosis,
        explain_columns,
        explainer,
        suggest,
    )
    from kscli.cli.requests import (
        models_of,
        open_pmatrices,
        pmatrix_paths,
    )
    from kscli.errors import UsageError
    from kscli.layers import select_layers
    from kscli.numbers import require_finite
    from kscli.places import file_name

    reporter = ConsoleReporter(quiet=quiet)
    paths = pmatrix_paths(model, pmatrix, directory, editor)
    alone = sum([scaling, fixed_points, against is not None, spectrum, experts])
    if alone > 1:
        raise UsageError(
            "--scaling, --fixed-points, --against, --spectrum and --experts each print a table; "
            "name one."
        )
    if output is not None and len(paths) > 1:
        raise UsageError("--output names one file, but several models were given.")
    if output is not None and alone:
        raise UsageError("--output stores statistics; this table cannot be stored.")
    if above and against is None:
        raise UsageError("--above needs --against FILE, which tells the noise.")
    if against is not None and len(paths) > 1:
        raise UsageError("--against compares one model with itself on other text; name one model.")
    cuts = {"--null-space": null_space, "--relative-null-space": relative_null_space}
    require_finite(cuts)
    for option, cut in cuts.items():
        if cut is not None and not spectrum:
            raise UsageError(f"{option} has no effect without --spectrum; leave it out.")
    resampling = Resampling(repeats, seed)
    with ExitStack() as stack:
        files = open_pmatrices(paths, stack)
        chosen = [(file, select_layers(layers, file.layers, str(file.path))) for file in files]
        if against is not None:
            (other,) = open_pmatrices([against], stack)
            _print_noise(*chosen[0], other, k, above, output_format, reporter)
        elif spectrum:
            _print_spectrum(chosen, null_space, relative_null_space, output_format, reporter)
        elif experts:
            _print_experts(chosen, output_format, reporter)
        elif scaling:
            _print_scaling(chosen, resampling, output_format, reporter, asked=True)
        elif fixed_points:
            _print_fixed_points(files, k, output_format, reporter)
        else:
            in_the_way = Existing.KEEP if output is None else Existing.REFUSE
            existing = Existing.FORCE if force else in_the_way
            rows = []
            for file, of_file in chosen:
                path = output
                if path is None and of_file == file.layers and file.path not in (pmatrix or []):
                    path = file.path.with_name(file_name("stats", file.about.editor))
                statistics = _make(file, of_file, path, existing, resampling, reporter)
                rows += statistics.rows()
                if too_few := few_facts(statistics.m):
                    reporter.warn(f"{file.path}: {too_few}")
                say_caution(statistics, file.facts, reporter)
            if output_format is Format.table and all(row["m"] < 2 for row in rows):
                return
            print_rows(rows, STATISTICS, output_format, _title(rows))
            routed = [row for row in rows if "no_common_expert" in row]
            if routed and output_format not in FOR_MACHINES:
                print_head("Experts that facts are routed to", output_format)
                print_rows(routed, ROUTING, output_format)
            told = explainer(reporter, output_format)
            explain_columns(STATISTICS, rows, told)
            if len(files) == 1:
                compare_kurtosis(rows, told)
                if not pmatrix:
                    suggest((TOPK, REPORT), models_of(context)[0], directory, told)
            if len(files) > 1 and output_format not in FOR_MACHINES:
                _print_scaling(chosen, resampling, output_format, reporter)
                if comparable(files):
                    print_head("Fixed interference points", output_format)
                    _print_fixed_points(files, k, output_format, reporter)


def _make(
    file: PMatrixFile,
    layers: tuple[int, ...],
    path: Path | None,
    existing: Existing,
    resampling: Resampling,
    reporter: Reporter,
) -> Statistics:
    """The statistics, stored at `path` unless it is None; if need be not, where nobody named it."""
    from kscli.analysis.stats_file import statistics_of
    from kscli.artifacts import Existing
    from kscli.errors import ArtifactError

    try:
        return statistics_of(file, layers, path, resampling, reporter, existing)
    except ArtifactError as error:
        if path is None or existing is not Existing.KEEP:
            raise
        reporter.warn(f"the statistics are not stored: {error}")
        return statistics_of(file, layers, None, resampling, reporter)


def _title(rows: Sequence[Row]) -> str:
    facts = {row["m"] for row in rows}
    m = f" between {facts.pop()} facts" if len(facts) == 1 else ""
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    return f"p{m}, layer by layer: {models}"


def _print_scaling(
    chosen: Chosen,
    resampling: Resampling,
    output_format: Format,
    reporter: Reporter,
    *,
    asked: bool = False,
) -> None:
    from kscli.analysis.scaling import BY_SIZE, Measured, scaling_rows

    rows = scaling_rows([Measured.of_file(file, of) for file, of in chosen], resampling)
    if asked and not rows:
        reporter.warn(
            "no two of the models are known to be sizes of one family, or a dense model and a "
            "mixture of experts of one size; a family is known from an alias, or from a "
            "name that says the size, as my-model-350M."
        )
    for row in rows:
        if not row["same_facts"]:
            reporter.warn(
                f"{row['smaller']} and {row['larger']} were measured on different facts: their "
                "difference has no interval. Extract the keys of one facts file from both."
            )
    if output_format in FOR_MACHINES:
        print_rows(rows, SCALING, output_format)
        return
    sizes = [row for row in rows if row["compared"] == BY_SIZE]
    sparse = [row for row in rows if row["compared"] != BY_SIZE]
    if sizes:
        title = (
            "Kurtosis against size: means over layers, and the share of depths where it is larger"
        )
        print_rows(sizes, SCALING, output_format, title, further=not asked)
    if sparse:
        title = "Dense models and mixtures of experts of one size: means over layers"
        print_rows(sparse, SPARSITY, output_format, title, further=not asked or bool(sizes))


def _print_fixed_points(
    files: Sequence[PMatrixFile], k: int, output_format: Format, reporter: Reporter
) -> None:
    from kscli.analysis.fixed_points import fixed_points

    points = fixed_points(files, k)
    rows = points.rows(files[0].facts)
    if output_format in FOR_MACHINES:
        reporter.note(points.sentence())
    else:
        print_line(points.sentence())
        if not rows:
            return
        print_line("")
    print_rows(rows, FIXED_POINTS, output_format)


def _print_spectrum(
    chosen: Chosen,
    absolute: float | None,
    relative: float | None,
    output_format: Format,
    reporter: Reporter,
) -> None:
    from kscli.analysis.spectrum import PUBLISHED, RELATIVE, spectra_of
    from kscli.editing.metrics import Cut

    cuts = (
        PUBLISHED if absolute is None else Cut(absolute),
        RELATIVE if relative is None else Cut(relative, relative=True),
    )
    rows = [
        row for file, layers in chosen for row in spectra_of(file, layers, *cuts, reporter=reporter)
    ]
    title = (
        f"The spectrum of C and the overlap of keys; null: below {cuts[0].size:g}, and below "
        f"{cuts[1].size:g} times the mean singular value"
    )
    print_rows(rows, SPECTRUM, output_format, title)


def _print_experts(chosen: Chosen, output_format: Format, reporter: Reporter) -> None:
    from kscli.analysis.by_expert import expert_rows

    rows = [row for file, layers in chosen for row in expert_rows(file, layers, reporter)]
    print_rows(rows, BY_EXPERT, output_format, "P of every expert alone")


def _print_noise(
    file: PMatrixFile,
    layers: tuple[int, ...],
    other: PMatrixFile,
    k: int,
    above: bool,
    output_format: Format,
    reporter: Reporter,
) -> None:
    from kscli.analysis.noise import above_rows, noise_rows, require_disjoint

    for warning in require_disjoint(file, other, layers):
        reporter.warn(warning)
    if above:
        rows, title = above_rows(file, other, layers), "Pairs above the noise of the corpus"
        print_rows(rows, PAIRS_ABOVE_NOISE, output_format, title)
    else:
        rows, title = noise_rows(file, other, layers, k), "P against P on disjoint text"
        print_rows(rows, noise_columns(k), output_format, title)
