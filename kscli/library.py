"""kscli in Python: the stages as functions, for a notebook or a script; `import kscli` shows them.

Each calls what the command of the same work calls. A result is the file that the stage writes,
open for reading. Where no `path` is named, it lies in a temporary folder and goes when the result
does; where one is named, a file that is up to date is opened and not made again, and another one
is refused unless `force` is set. Errors are `KscliError`, warnings `KscliWarning`; notes go to the
logger `kscli`, and progress is shown in notebooks and on terminals.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kscli.analysis.stats_file import StatisticsFile
from kscli.artifacts import Artifact, CovarianceFile, Existing, KeysFile, PMatrixFile
from kscli.cli.console import ConsoleReporter
from kscli.editing.edits_file import EditsFile
from kscli.errors import KscliError, ModelError, UsageError
from kscli.facts import Fact, FactSet, facts_of, read_facts
from kscli.interrupts import InterruptedRunError
from kscli.layers import format_layers, select_layers
from kscli.models.locating import ModelOptions

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure

    from kscli.corpus import Corpus
    from kscli.editing.choice import Order
    from kscli.models.loading import LoadedModel
    from kscli.pipeline import LoadedSession
    from kscli.positions import KeyToken

Texts = str | Path | Iterable[str | Mapping[str, object]]
Facts = str | Path | FactSet | Iterable[Mapping[str, object] | Fact]
AnyFile = TypeVar("AnyFile", bound=Artifact)

FILES: tuple[type[Artifact], ...] = (
    CovarianceFile,
    KeysFile,
    PMatrixFile,
    StatisticsFile,
    EditsFile,
)


class KscliWarning(UserWarning):
    """What must be known for a result to be read rightly."""


class LibraryReporter(ConsoleReporter):
    """Reports as Python's libraries do: warnings as warnings, notes to a logger, and bars."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._held: list[str] | None = None

    @contextmanager
    def holding_warnings(self) -> Iterator[None]:
        """Warn when the block ends: in it, the libraries' own warnings are ignored, and all are."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            for text in held:
                self.warn(text)

    def note(self, text: str) -> None:
        """Log a text."""
        logging.getLogger("kscli").info(text)

    def warn(self, text: str) -> None:
        """Warn, at the line that called kscli, each time that there is reason to."""
        if self._held is not None:
            self._held.append(text)
            return
        frame = sys._getframe(1)
        inside = ("kscli", "contextlib")
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
            frame = frame.f_back
        warnings.warn_explicit(text, KscliWarning, frame.f_code.co_filename, frame.f_lineno)


class Records(list[dict[str, Any]]):
    """Flat records, one a row of a table."""

    def to_pandas(self) -> pandas.DataFrame:
        """The records as a table."""
        from kscli.artifacts.frames import frame_of

        return frame_of(self)

    def to_xarray(self) -> xarray.Dataset:
        """The records as a data set, whose axis `index` counts them."""
        from kscli.artifacts.frames import dataset_of_rows

        return dataset_of_rows(self)


def load_model(
    model: Any,
    tokenizer: Any = None,
    *,
    source: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    merge_adapter: bool = False,
    quiet: bool = False,
) -> LoadedModel:
    """Load a model by its alias, Hub id, folder or .gguf file, or take one that is loaded already.

    Of one that is loaded, a causal decoder of transformers, give its tokenizer too; it stays where
    it is and as it is, but for being put in evaluation mode. Its weights have a fingerprint of
    their own, so that its files go together with one another alone. `source` names a model that it
    still is, as an alias or a folder: the weights of both are compared, and that model's files can
    be used with it. Whenever weights have changed, by an edit of your own say, the model is another
    to all functions.

    Raises ModelError where it cannot be loaded or measured.
    """
    reporter = LibraryReporter(quiet=quiet)
    if isinstance(model, str | Path):
        if tokenizer is not None or source is not None:
            raise UsageError("tokenizer= and source= are for a model that is loaded already.")
        from kscli.models.live import digest_of_weights
        from kscli.models.loading import load_model as load

        options = ModelOptions(
            str(model), revision, device, dtype, trust_remote_code, allow_pickle, merge_adapter
        )
        with reporter.holding_warnings(), reporter.task(f"loading {model}"):
            found = load(options, reporter)
        return replace(found, digest=digest_of_weights(found.decoder.model))
    from kscli.models.live import live_model

    return live_model(model, tokenizer, source, reporter)


def second_moments(
    model: str | Path | LoadedModel,
    corpus: Texts,
    *,
    layers: str = "all",
    samples: int | None = 100_000,
    tokens: int | None = None,
    max_length: int | None = None,
    until_settled: float | None = None,
    text_field: str | None = None,
    shuffle: int | Literal["default"] | None = "default",
    batch_tokens: int | None = None,
    max_memory: str | None = None,
    path: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
) -> CovarianceFile:
    """C of every layer's keys over a corpus, as `kscli cache-cov` measures it.

    The corpus is named, or is a file or folder, or an iterable of texts, a document each, or of
    records with a `text_field`. C takes 4 d_m^2 bytes a layer on the disk of `path`.
    """
    from kscli.resources import parse_size
    from kscli.second_moment.options import CovarianceOptions, Execution

    session = _session(model, force=force, quiet=quiet)
    chosen = _corpus(corpus, text_field, shuffle)
    for note in chosen.notes:
        session.reporter.note(note)
    options = CovarianceOptions(samples, tokens, max_length, layers, until_settled)
    execution = Execution(batch_tokens, parse_size(max_memory) if max_memory else None)
    return _made(CovarianceFile, path, lambda to: session.cache_cov(chosen, options, to, execution))


def extract_keys(
    model: str | Path | LoadedModel,
    facts: Facts,
    *,
    count: int | None = None,
    layers: str = "all",
    token: KeyToken = "subject-last",
    contexts: str | int | None = None,
    path: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
) -> KeysFile:
    """The key of every fact at every layer, as `kscli extract` reads it.

    Facts are a name, a file, a table of pandas, or an iterable of dicts with `prompt` (with {} for
    the subject), `subject` and `target`, and `target_new` and questions where they are to be
    edited. `count` takes the first so many.
    """
    from kscli.contexts import choose_contexts
    from kscli.editing.editors import ROME_CONTEXTS

    session = _session(model, force=force, quiet=quiet)
    chosen = _facts(facts, count)
    if chosen.left_out:
        session.reporter.warn(f"{chosen.name}: {chosen.left_out}.")
    texts = choose_contexts(None if contexts is None else str(contexts), ROME_CONTEXTS)
    return _made(KeysFile, path, lambda to: session.extract(chosen, token, layers, to, texts))


def superposition(
    cov: CovarianceFile | str | Path,
    keys: KeysFile | str | Path,
    *,
    layers: str = "all",
    ridge: float = 0.0,
    editor: str | None = None,
    weight: float | None = None,
    null_space: float | None = None,
    relative_null_space: float | None = None,
    path: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
) -> PMatrixFile:
    """P[i, j] = k_i^T C^-1 k_j / k_i^T C^-1 k_i for all pairs of facts, as `kscli pmatrix` does.

    With `editor`, p of that editor, of which `weight` and the cuts of the null space are settings.
    """
    from kscli.editing.editor_p import editor_of_p
    from kscli.editing.editors import PAPERS_EDITOR, find_editor, without_effect
    from kscli.editing.null_space import null_space_cut
    from kscli.pmatrix import write_pmatrix

    moments, of_facts = _opened(CovarianceFile, cov), _opened(KeysFile, keys)
    settings = {
        "weight": weight,
        "null_space": null_space,
        "relative_null_space": relative_null_space,
    }
    given = [name for name, number in settings.items() if number is not None]
    _refuse(given, without_effect(find_editor(editor or PAPERS_EDITOR)))
    cut = null_space_cut(_real(null_space), _real(relative_null_space))
    of_editor = editor_of_p(editor, of_facts.about.model, _real(weight), cut)
    return _made(
        PMatrixFile,
        path,
        lambda to: write_pmatrix(
            moments,
            of_facts,
            to,
            layers=select_layers(layers, of_facts.layers, str(of_facts.path)),
            ridge=float(ridge),
            editor=of_editor,
            existing=_existing(force=force),
            reporter=LibraryReporter(quiet=quiet),
        ),
    )


def statistics(
    pmatrix: PMatrixFile | str | Path,
    *,
    layers: str = "all",
    repeats: int = 1000,
    seed: int = 0,
    path: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
) -> StatisticsFile:
    """The statistics of P's off-diagonal entries at every layer, as `kscli stats` computes them."""
    from kscli.analysis.resampling import Resampling
    from kscli.analysis.statistics import say_caution
    from kscli.analysis.stats_file import statistics_of

    pm, reporter = _opened(PMatrixFile, pmatrix), LibraryReporter(quiet=quiet)
    chosen = select_layers(layers, pm.layers, str(pm.path))
    resampling = Resampling(repeats, seed)

    def make(to: Path) -> None:
        found = statistics_of(pm, chosen, to, resampling, reporter, _existing(force=force))
        say_caution(found, pm.facts, reporter)

    return _made(StatisticsFile, path, make)


def risk(
    pmatrix: PMatrixFile | str | Path,
    facts: str | int | Sequence[str | int] | None = None,
    *,
    by: Literal["fact", "layer", "price", "sequence"] = "fact",
    layers: str | None = None,
    k: int | None = 20,
    count: int | None = None,
    order: Order = "given",
    seed: int = 0,
) -> Records:
    """What edits of facts would do to the others, before any edit is made, as `kscli risk` says.

    Facts to edit are subjects or indexes; without them `count` (None: all) are drawn with `seed`.
    `by`: what each edited fact moves most; what each layer would do; the price of protecting all
    others; or what all the edits do in the `order` given. `layers` are by default the layer that
    `kscli.edit` takes, by layer all. `k` (None: all) of the facts are listed.
    """
    from kscli.editing.choice import choose_facts, find_facts
    from kscli.editing.editors import DEFAULT_EDITOR, find_editor
    from kscli.editing.predicted_damage import risk_rows
    from kscli.editing.presets import default_layers as layers_to_edit
    from kscli.editing.presets import preset_for

    pm = _opened(PMatrixFile, pmatrix)
    if layers is None:
        published = preset_for(DEFAULT_EDITOR, pm.about.model)
        layers, _ = layers_to_edit(find_editor(DEFAULT_EDITOR), published, pm)
        layers = "all" if by == "layer" else layers
    chosen = select_layers(layers, pm.layers, str(pm.path))
    named = [facts] if isinstance(facts, str | int) else facts
    if named is None:
        edited = choose_facts(pm.facts, count, seed, pm.path)
    else:
        edited = find_facts(pm.facts, [*map(str, named)], pm.path)
    return Records(risk_rows(pm, chosen, edited, by, k, order, seed))


def edit(
    model: str | Path | LoadedModel,
    cov: CovarianceFile | str | Path,
    keys: KeysFile | str | Path,
    pmatrix: PMatrixFile | str | Path,
    facts: str | int | Sequence[str | int] | None = None,
    target_new: str = "field:target_new",
    *,
    layers: str | None = None,
    count: int | None = 10,
    order: Order = "given",
    target_source: str | None = None,
    held_out: Texts | None = None,
    held_out_tokens: int = 2048,
    path: str | Path | None = None,
    force: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> EditsFile:
    """Edit facts one after the other and measure what becomes of the others, as `kscli edit` does.

    P, and C and the keys that it was made from, are those of the model. The model itself is put
    back as it was; `apply_edits` makes the edits in it. Facts are subjects or indexes; without
    them `count` (None: all) are drawn. `target_new` is a text, or `field:NAME` of the facts'
    records. `settings` are the fields of `kscli.editing.settings.EditSettings`, such as steps=25.
    """
    from kscli.editing.presets import default_layers as layers_to_edit
    from kscli.editing.settings import EditSettings
    from kscli.editing.sources import EditSources
    from kscli.editing.stage import EditRequest, HeldOut, edit_model
    from kscli.models.live import kept_weights

    session = _session(model, force=force, quiet=quiet)
    files = (
        _opened(CovarianceFile, cov),
        _opened(KeysFile, keys),
        _opened(PMatrixFile, pmatrix),
    )
    pm, asked = files[2], EditSettings(**settings)
    editor, published = asked.editor(_published_name(session.model))
    _refuse(settings, asked.without_effect(editor))
    options, protected = asked.options(editor)
    request = EditRequest(
        facts=tuple(_named(facts) or ()),
        count=count,
        order=order,
        target_new=target_new,
        target_source=target_source,
        options=options,
        held_out=None
        if held_out is None
        else HeldOut(_corpus(held_out, None, "default"), held_out_tokens),
        protected=protected,
        values_of=asked.values_of,
    )
    spec = layers or layers_to_edit(editor, published, pm)[0]
    sources = EditSources(*files, select_layers(spec, pm.layers, str(pm.path)))
    plan = request.plan(sources)

    def make(to: Path) -> None:
        with kept_weights(session.model, sources.layers):
            edit_model(session, sources, plan, to, None)

    return _made(EditsFile, path, make)


def apply_edits(model: LoadedModel, edits: EditsFile | str | Path) -> LoadedModel:
    """Make the edits of a run in a model, in place; returns the model as the other one that it is.

    Raises ArtifactError where the run was of a model of other weights.
    """
    from kscli.editing.stage import replay_edits

    replay_edits(_current(model), _opened(EditsFile, edits))
    return _current(model)


def plot(
    kind: str,
    *results: PMatrixFile | EditsFile | str | Path,
    layers: str | None = None,
    mark_same_token: bool = False,
    facts_counts: Sequence[int] = (),
    grid: bool = False,
    no_sentence: bool = False,
    title: str | None = None,
    size: tuple[float, float] = (0.0, 0.0),
    dpi: int = 0,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Figure:
    """A figure of one or more results, of P or of edits by the kind, as `kscli plot` draws it.

    `size` is (width, height) in inches, and `names` are what the figure calls the results; 0 and
    nothing are what suits the kind. `title` "" leaves the title out. Raises UsageError where `grid`
    would need several pages, naming the results and layers of each.
    """
    from kscli.figures import KINDS, FigureOptions, Look, Shown, paged, shown_of

    if kind not in KINDS:
        from kscli.errors import no_such

        raise no_such("figure", kind, KINDS)
    if names and len(names) != len(results):
        raise UsageError(f"names= are {len(names)}, and the results {len(results)}; name each.")
    look = Look(title, *size, dpi, tuple(names))
    options = FigureOptions(grid, mark_same_token, tuple(facts_counts), seed, no_sentence, look)
    sources: list[Shown] = []
    for each in results:
        if KINDS[kind].source == "edits":
            sources.append(_opened(EditsFile, each))
        else:
            sources.append(shown_of(KINDS[kind], _opened(PMatrixFile, each), layers))
    KINDS[kind].check_options(options)
    if len(pages := paged(sources, options)) > 1:
        each = "; ".join(f"{page.model}, layers={format_layers(page.layers)!r}" for [page] in pages)
        raise UsageError(
            f"grid= takes {len(pages)} pages here, and plot() draws one; draw each: {each}."
        )
    return KINDS[kind].draw(sources, options)


def open_artifact(path: str | Path) -> Any:
    """Open an artifact of any kind, as an object of its kind's class, a context manager.

    That is CovarianceFile, KeysFile, PMatrixFile, StatisticsFile or EditsFile. Raises
    ArtifactError where it is none, or was changed.
    """
    with Artifact(Path(path)) as artifact:
        kind = artifact.kind
    return _read(next(file for file in FILES if file.of_kind == kind), Path(path))


def _named(facts: str | int | Sequence[str | int] | None) -> list[str] | None:
    """Subjects and indexes of facts as texts."""
    if facts is None:
        return None
    return [*map(str, [facts] if isinstance(facts, str | int) else facts)]


def _real(number: float | None) -> float | None:
    """A number as the command line reads it: recipes tell 7 from 7.0."""
    return None if number is None else float(number)


def _refuse(given: Iterable[str], idle: Iterable[tuple[tuple[str, ...], str]]) -> None:
    """Raise UsageError for a setting that was given and has no effect, with the reason."""
    for names, reason in idle:
        for name in set(names) & set(given):
            raise UsageError(f"{name}= has no effect {reason}; leave it out.")


def _published_name(model: LoadedModel) -> str:
    """The name by which a model's published settings are found: its alias, or its id."""
    from kscli.models.aliases import find_alias

    identity = model.identity
    return identity.model if find_alias(identity.model) else identity.model_id


def _session(model: str | Path | LoadedModel, *, force: bool, quiet: bool) -> LoadedSession:
    from kscli.pipeline import LoadedSession

    return LoadedSession(
        _current(model, quiet=quiet), _existing(force=force), LibraryReporter(quiet=quiet)
    )


def _current(model: str | Path | LoadedModel, *, quiet: bool = False) -> LoadedModel:
    """The model with the identity of the weights that it has now."""
    from kscli.models.live import changed_identity, digest_of_weights
    from kscli.models.loading import LoadedModel

    if isinstance(model, str | Path):
        return load_model(model, quiet=quiet)
    if not isinstance(model, LoadedModel):
        raise ModelError(
            f"a {type(model).__name__} is not what kscli.load_model returns; give it the model and "
            "its tokenizer first."
        )
    digest = digest_of_weights(model.decoder.model)
    if digest == model.digest:
        return model
    return replace(model, identity=changed_identity(model.identity, digest), digest=digest)


def _existing(*, force: bool) -> Existing:
    return Existing.FORCE if force else Existing.REFUSE


def _corpus(
    corpus: Texts,
    text_field: str | None,
    shuffle: int | Literal["default"] | None,
) -> Corpus:
    from kscli.corpus import CorpusSpec, corpus_of, open_corpus

    if isinstance(corpus, str | Path):
        return open_corpus(CorpusSpec(str(corpus), text_field, shuffle))
    return corpus_of(corpus, text_field or "text")


def _facts(facts: Facts, count: int | None) -> FactSet:
    if isinstance(facts, str | Path):
        return read_facts(facts, count)
    records: Any = _rows(facts) if hasattr(facts, "to_dict") else facts
    found = records if isinstance(records, FactSet) else facts_of(records)
    return replace(found, facts=found.facts[:count])


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table of pandas, each without what is missing in it."""
    import pandas

    def there(value: Any) -> bool:
        return value is not pandas.NA and not (isinstance(value, float) and math.isnan(value))

    return [
        {name: value for name, value in row.items() if there(value)}
        for row in table.to_dict("records")
    ]


def _opened(kind: type[AnyFile], given: Any) -> AnyFile:
    """A file that is open, or that a path names."""
    if isinstance(given, kind):
        return given
    if isinstance(given, str | Path):
        return _read(kind, Path(given))
    raise UsageError(f"a {type(given).__name__} is not a {kind.__name__}, nor the path of one.")


def _read(kind: type[AnyFile], path: Path) -> AnyFile:
    """Open a file, which is closed when nothing refers to it any more."""
    file = kind(path)
    weakref.finalize(file, file.closing())
    return file


def _made(kind: type[AnyFile], path: str | Path | None, make: Callable[[Path], object]) -> AnyFile:
    """The file that `make` writes, open: at `path`, or in a folder that goes when the result does.

    Raises what `make` raises; of a run without a `path` that was interrupted nothing is left.
    """
    if path is not None:
        make(Path(path))
        return _read(kind, Path(path))
    folder = Path(tempfile.mkdtemp(prefix="kscli-"))
    try:
        place = folder / f"{kind.of_kind}.h5"
        make(place)
        file = _read(kind, place)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, InterruptedRunError):
            text = "nothing is left of it; a path= keeps what a run has done."
            raise InterruptedRunError(error.exit_code - 128, text) from None
        raise
    weakref.finalize(file, shutil.rmtree, folder, ignore_errors=True)
    return file


__all__ = [
    "CovarianceFile",
    "EditsFile",
    "Fact",
    "KeysFile",
    "KscliError",
    "KscliWarning",
    "PMatrixFile",
    "Records",
    "StatisticsFile",
    "apply_edits",
    "edit",
    "extract_keys",
    "load_model",
    "open_artifact",
    "plot",
    "risk",
    "second_moments",
    "statistics",
    "superposition",
]
