"""`kscli plot`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_paths
from kscli.figures import KINDS, PER_PAGE, FigureKind, FigureOptions, Look, Shown, flag, takers

if TYPE_CHECKING:
    from kscli.artifacts import Artifact
    from kscli.origin import Origin

PLAIN = FigureOptions()
LEAST_WIDTH, MOST_INCHES = 2.5, 60.0
KIND_SOURCES = {"pmatrix": "pmatrix.h5", "edits": "runs of edits (--edits)"}
KIND_HELP = "\n\n".join(
    f"{kind.name}: {kind.help}"
    + (f" Takes {', '.join(map(flag, kind.options))}." if kind.options else "")
    for kind in KINDS.values()
)


def complete_kind(incomplete: str) -> list[str]:
    """The kinds of figure."""
    return [name for name in KINDS if name.startswith(incomplete)]


def of_kinds(option: str) -> str:
    """The kinds that take an option, to begin its help with."""
    return f"({', '.join(takers(option))}) "


def of_source(source: str) -> list[str]:
    """The kinds that are drawn from `pmatrix` or from `edits`."""
    return [kind.name for kind in KINDS.values() if kind.source == source]


def plot(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help=KIND_HELP, autocompletion=complete_kind)
    ],
    model: options.Models = None,
    editor: options.EditorOfP = None,
    pmatrix: options.PMatrices = None,
    edits: Annotated[
        list[Path] | None,
        typer.Option(
            "--edits",
            metavar="FILE",
            help=f"({', '.join(of_source('edits'))}) A run of `kscli edit` to draw, instead of -m.",
            show_default="all of DIR/MODEL/edits/",
        ),
    ] = None,
    layers: options.LayerOfFigure = None,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help=f"{of_kinds('grid')}A panel a layer, {PER_PAGE} of one model on a page. Pages are "
            "those of one .pdf, or NAME-1.png, NAME-2.png and so on.",
        ),
    ] = False,
    mark_same_token: Annotated[
        bool,
        typer.Option(
            "--mark-same-token",
            help=f"{of_kinds('mark_same_token')}Show the pairs whose facts have the same last "
            "token of the subject.",
        ),
    ] = False,
    facts_counts: Annotated[
        str | None,
        typer.Option(
            "--facts-counts",
            metavar="COUNTS",
            help=f"{of_kinds('facts_counts')}How many of the first facts, as in 16,32,64,128.",
            show_default="eight, up to all",
        ),
    ] = None,
    no_sentence: Annotated[
        bool,
        typer.Option(
            "--no-sentence",
            help=f"{of_kinds('no_sentence')}Leave out whether the kurtosis has converged.",
        ),
    ] = False,
    title: Annotated[
        str | None,
        typer.Option(
            "--title", metavar="TEXT", help="The title; an empty one, '', for a figure without."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Width and height in inches, as in 6.5x4, or the width alone. Text keeps its "
            "size, and panels move into as many columns as fit.",
            show_default="one or both columns of a two-column page",
        ),
    ] = None,
    dpi: Annotated[
        int | None,
        typer.Option(
            "--dpi",
            metavar="N",
            min=30,
            max=2400,
            help="The dots per inch of a .png, and of images in other files. A dot of several "
            "pairs of facts shows their largest |p|.",
            show_default="300, or more for a heatmap of many facts",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="TEXT",
            help="What the figure calls a model, or a run of edits. Give it once for each, in the "
            "order of -m, --pmatrix or --edits.",
            show_default="their own names",
        ),
    ] = None,
    seed: options.Seed = 0,
    directory: options.Dir = Path("artifacts"),
    output: options.FigureOutput = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Draw a figure of P or of edits; prints the path of the file, or files, that it writes.

    Several models are drawn in one figure, the smallest first. A figure that is up to date is kept,
    and one whose inputs have changed is drawn again; --force replaces any other file.

    Examples:
      kscli plot heatmap -m gpt2-small -m gpt2-large -m gpt-j --layer 0 -o heatmap.pdf
      kscli plot heatmap -m gpt2-medium --grid -o layers.pdf
      kscli plot kde -m gpt2-small --layers 0,5,11 --mark-same-token
      kscli plot kurtosis -m gpt2-small -m gpt2-medium -m gpt2-large -o scaling.svg
      kscli plot forgetting --edits artifacts/gpt-j/edits/rome-5-0.h5
      kscli plot angles -m llama3-8b -m llama3.1-8b
      kscli plot convergence -m gpt2-small --facts-counts 16,32,64,128
      kscli plot kurtosis -m gpt2-xl -m gpt-j --name XL --name J --title '' --size 5x3
    """
    from kscli.artifacts import Existing
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import open_runs, pmatrix_paths, run_paths
    from kscli.cli.stderr import say_at_once
    from kscli.figures import paged
    from kscli.figures.saving import check_target, page_paths, save_pages
    from kscli.files import require_other

    reporter = ConsoleReporter(quiet=quiet)
    figure_kind = find_kind(kind)
    look = Look(title, *size_of(size), dpi or 0, tuple(names or ()))
    figure_options = FigureOptions(
        grid, mark_same_token, counts_of(facts_counts), seed, no_sentence, look
    )
    figure_kind.check_options(figure_options)
    with ExitStack() as stack:
        sources: Sequence[Shown]
        files: Sequence[Artifact]
        if figure_kind.source == "edits":
            refuse_others(kind, {"--pmatrix": pmatrix, "--editor": editor, "--layer": layers})
            paths = run_paths(model, edits, directory)
            sources = files = open_runs(paths, stack)
        else:
            refuse_others(kind, {"--edits": edits})
            paths = pmatrix_paths(model, pmatrix, directory, editor)
            sources, files = open_matrices(figure_kind, paths, layers, stack)
        check_names(look.names, files)
        folders = {folder_of(file) for file in files}
        folder = folders.pop() if len(folders) == 1 else directory
        if figure_kind.source == "edits":
            name = name_of_runs(kind, [file.model for file in files], edits)
        else:
            models = [file.about.model for file in files]
            name = default_name(kind, models, layers, figure_options, editor)
        path = output or folder / "figures" / name
        origin = origin_of(figure_kind, files, layers, figure_options)
        pages = page_paths(path, len(paged(sources, figure_options)))
        for page in pages:
            require_other(page, [file.path for file in files])
            check_target(page, force=True)
        existing = Existing.FORCE if force else Existing.REFUSE
        if [page for page in pages if origin.must_make(page, existing, reporter)]:
            if not quiet:
                say_at_once("kscli plot begins: Matplotlib is loaded, then the figure is drawn.")
            drawn = figure_kind.pages(sources, figure_options)
            save_pages(drawn, path, force=True, source=origin.line)
    print_paths(pages, output_format)


def refuse_others(kind: str, given: dict[str, object]) -> None:
    """Raise UsageError for an option that was given to a kind of another source."""
    from kscli.errors import UsageError

    for option, value in given.items():
        if value:
            raise UsageError(
                f"{kind} is drawn from {KIND_SOURCES[KINDS[kind].source]} and takes no {option}."
            )


def open_matrices(
    kind: FigureKind,
    paths: Sequence[Path],
    layers: str | None,
    stack: ExitStack,
) -> tuple[Sequence[Shown], Sequence[Artifact]]:
    """The matrices of pmatrix files, with the layers to draw, and these files."""
    from kscli.cli.requests import open_pmatrices
    from kscli.figures import shown_of

    opened = open_pmatrices(paths, stack)
    return [shown_of(kind, file, layers) for file in opened], opened


def origin_of(
    kind: FigureKind, files: Sequence[Artifact], layers: str | None, chosen: FigureOptions = PLAIN
) -> Origin:
    """What a figure of these files is made from."""
    from kscli.origin import Origin

    models = [file.model for file in files] if kind.source == "pmatrix" else []
    asked = asdict(chosen)
    look = asked.pop("look")
    request = (kind.name, layers or kind.layers, asked, models)
    # Another look is the same figure, made again.
    return Origin(request, [*(file.fingerprint for file in files), str(look)])


def folder_of(file: Artifact) -> Path:
    """The model's folder, where an artifact lies or, of a run of edits, the folder above."""
    return file.path.parent.parent if file.kind == "edits" else file.path.parent


def find_kind(name: str) -> FigureKind:
    """The kind of figure of that name. Raises UsageError naming the kinds there are."""
    from kscli.errors import no_such

    if name not in KINDS:
        raise no_such("figure", name, KINDS)
    return KINDS[name]


def counts_of(text: str | None) -> tuple[int, ...]:
    """The numbers of `--facts-counts`. Raises UsageError where they are none."""
    from kscli.errors import UsageError

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UsageError(f"--facts-counts {text!r} is not understood; write 16,32,64,128.")
    return tuple(sorted({int(part) for part in parts}))


def size_of(text: str | None) -> tuple[float, float]:
    """Width and height of `--size` in inches, 0 where not given. Raises UsageError."""
    from kscli.errors import UsageError

    if text is None:
        return 0.0, 0.0
    parts = text.lower().replace("\N{MULTIPLICATION SIGN}", "x").split("x")
    try:
        width, height = (*map(float, parts), 0.0)[:2] if len(parts) < 3 else (0.0, 0.0)
    except ValueError:
        width = height = 0.0
    if not (LEAST_WIDTH <= width <= MOST_INCHES and 0 <= height <= MOST_INCHES):
        raise UsageError(
            f"--size {text!r} is no size; write the width and height in inches, as in 6.5x4, or "
            f"the width alone, from {LEAST_WIDTH:g} to {MOST_INCHES:g}."
        )
    return width, height


def check_names(names: Sequence[str], files: Sequence[Artifact]) -> None:
    """Raise UsageError where there are names, and not one for each file."""
    from kscli.errors import UsageError

    if names and len(names) != len(files):
        paths = ", ".join(str(file.path) for file in files)
        raise UsageError(
            f"--name is given {len(names)} times, and the figure is of {len(files)}: {paths}; give "
            "it once for each, in this order."
        )


def default_name(
    kind: str,
    models: list[str],
    layers: str | None,
    chosen: FigureOptions = PLAIN,
    editor: str | None = None,
) -> str:
    """KIND.png of one model's default layers; further models and what was chosen are named."""
    parts = [kind, *(models if len(models) > 1 else []), *([editor] if editor else [])]
    if layers is not None:
        parts.append(f"layer{layers.replace(',', '_')}")
    if chosen.grid:
        parts.append("grid")
    if chosen.mark_same_token:
        parts.append("same-token")
    if chosen.no_sentence:
        parts.append("no-sentence")
    if chosen.facts_counts:
        parts.append(f"m{'_'.join(map(str, chosen.facts_counts))}")
    return f"{'-'.join(parts)}.png"


def name_of_runs(kind: str, models: list[str], edits: list[Path] | None) -> str:
    """KIND.png of all runs of a model; further models, or the runs that were named, are named."""
    if edits:
        return f"{'-'.join([kind, *(path.stem for path in edits)])}.png"
    return default_name(kind, list(dict.fromkeys(models)), None)
