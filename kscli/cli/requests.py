"""From options' values to what the library takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from kscli.cli.options import DEFAULT_MODEL
from kscli.cli.remedies import command_for, listed, measured_models
from kscli.editing.edited_folder import facts_of_edited, first_model
from kscli.editing.editors import find_editor
from kscli.errors import ArtifactError, UsageError
from kscli.models.aliases import classify, close_aliases, find_alias
from kscli.places import Places

# The parameters of files that are read instead of a model's.
NAMING_FILES = ("pmatrix", "keys", "edits", "files", "parts", "what", "results")
NO_FIELDS: Mapping[str, str | None] = {}

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile
    from kscli.corpus import Corpus
    from kscli.editing.edits_file import EditsFile
    from kscli.facts import FactSet
    from kscli.reporter import Reporter
    from kscli.second_moment.ranks import Ranks


def corpus_for(
    model: str,
    corpus: str | None,
    text_field: str | None,
    shuffle: str | None,
    reporter: Reporter,
) -> Corpus:
    """The corpus that the options name, or the model's default; says what is left out of it."""
    embedded = classify(first_model(model)) == "embedded"
    name = corpus or (DEFAULT_MODEL if embedded else "wikipedia")
    if shuffle is None:
        return named_corpus(name, text_field, reporter)
    if shuffle != "none" and not (shuffle.isascii() and shuffle.isdecimal()):
        raise UsageError(f"--shuffle {shuffle} is not understood; give a seed, 0 or more, or none.")
    return named_corpus(name, text_field, reporter, None if shuffle == "none" else int(shuffle))


def named_corpus(
    name: str,
    text_field: str | None,
    reporter: Reporter,
    shuffle: int | Literal["default"] | None = "default",
) -> Corpus:
    """The corpus of that name; says what is left out of it."""
    from kscli.corpus import CorpusSpec, open_corpus

    found = open_corpus(CorpusSpec(name, text_field, shuffle))
    for note in found.notes:
        reporter.note(note)
    return found


def facts_for(
    model: str,
    facts: str | None,
    count: str | None,
    reporter: Reporter,
    fields: Mapping[str, str | None] = NO_FIELDS,
) -> FactSet:
    """The facts that the options name, or the model's default; says what is left out of them.

    The default of an edited model are all facts that its base was measured with, which is said.
    `fields` are the records' own names of prompt, subject and target, where they have others.
    """
    from kscli.facts import DEFAULT_COUNT, read_facts

    name = facts or default_facts(model, reporter)
    own = {name: field for name, field in fields.items() if field is not None}
    if count is not None:
        number = number_or_all("--count", count)
    else:
        number = None if facts is None and facts_of_edited(model) else DEFAULT_COUNT
    found = read_facts(name, number, at_most=count is None, fields=own)
    if found.left_out:
        reporter.warn(f"{name}: {found.left_out}.")
    return found


def default_facts(model: str, reporter: Reporter) -> str:
    """The facts that a model is measured with where none are named."""
    if of_base := facts_of_edited(model):
        reporter.note(
            f"The facts are those that {first_model(model)} was measured with before its edits: "
            f"{of_base} (--facts names others)."
        )
        return str(of_base)
    return DEFAULT_MODEL if classify(model) == "embedded" else "counterfact"


def device_of_rank(device: str, ranks: Ranks | None) -> str:
    """The device of one of several ranks: each has the card of its number on its machine."""
    if ranks is None or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{ranks.local % torch.cuda.device_count()}"


def number_or_all(option: str, value: str) -> int | None:
    """The number that an option gives; None for `all`."""
    if value == "all":
        return None
    if value.isascii() and value.isdecimal() and int(value) > 0:
        return int(value)
    raise UsageError(f"{option} {value!r} must be a positive number, or all.")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option, by its parameter's name, is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Raise UsageError for an option, by its parameter's name, that was given without effect."""
    written = {each.name: each.opts[0] for each in context.command.params}
    for name in names:
        if is_given(context, name):
            option = written[name]
            add = "add that, or " if reason.startswith("without ") else ""
            raise UsageError(f"{option} has no effect {reason}; {add}leave it out.")


def pmatrix_paths(
    models: Sequence[str] | None,
    files: Sequence[Path] | None,
    directory: Path,
    editor: str | None = None,
) -> list[Path]:
    """The pmatrix files of the named models, of an editor's p if asked for, and those of `files`.

    Raises UsageError for an editor that is not known, and ArtifactError, naming the command that
    makes it, where its p is not there.
    """
    of_editor = editors_own_p(editor) if editor else ""
    if editor and files:
        raise UsageError("--editor names a file of the model's; leave it out beside --pmatrix.")
    if not models and not files:
        models = [DEFAULT_MODEL]
    paths = []
    for model in models or []:
        path = Places(directory, model).path("pmatrix", of_editor)
        if of_editor and not path.exists():
            raise ArtifactError(
                f"{path} does not exist; "
                f"{command_for('pmatrix', model, directory, '--editor', of_editor)} makes it."
            )
        paths.append(path)
    return paths + list(files or [])


def editors_own_p(name: str) -> str:
    """The editor's name, or none where its p is the paper's; raises UsageError if unknown."""
    return "" if find_editor(name).predicted else name


def models_of(context: typer.Context) -> list[str]:
    """The models that a command is about: those named, or the default one."""
    models = context.params.get("model") or []
    named = [models] if isinstance(models, str) else [*models]
    named += map(str, context.params.get("what") or [])
    return named or [DEFAULT_MODEL]


def refuse_mistyped_alias(context: typer.Context) -> None:
    """Raise UsageError where a model is to be loaded whose name is nearly that of an alias.

    A Hub id has an owner before its name, but for a few of the Hub's first models.
    """
    if "trust_remote_code" not in context.params:
        return
    for model in filter(None, map(context.params.get, ("model", "base", "edited"))):
        if classify(model) != "hub" or "/" in model or find_alias(model) is not None:
            continue
        if near := close_aliases(model):
            raise UsageError(
                f"there is no model {model!r}; did you mean {near[0]}? `kscli models` lists the "
                "aliases; a Hub id is OWNER/NAME."
            )


def note_default_model(context: typer.Context) -> None:
    """Say that the model is the default one, where the user may have meant another that he has."""
    source = context.get_parameter_source("model")
    if source is None or source.name != "DEFAULT" or "directory" not in context.params:
        return
    (model,) = (each for each in context.command.params if each.name == "model")
    if DEFAULT_MODEL not in (model.default, getattr(model, "show_default", None)):
        return
    directory = context.params["directory"]
    named = [context.params.get(name) for name in NAMING_FILES]
    if any(isinstance(each, (Path, list)) for each in named) or context.params.get("quiet"):
        return
    others = [name for name in measured_models(directory) if name != DEFAULT_MODEL]
    if others:
        from kscli.cli.console import ConsoleReporter

        ConsoleReporter().note(
            f"This is about {DEFAULT_MODEL}, as no --model is named; {directory} has "
            f"{listed(others)} too."
        )


def open_pmatrices(paths: Sequence[Path], stack: ExitStack) -> list[PMatrixFile]:
    """Open pmatrix files."""
    from kscli.artifacts import PMatrixFile

    return [stack.enter_context(PMatrixFile(path)) for path in paths]


def editor_of(files: Sequence[PMatrixFile]) -> str:
    """The editor whose p all the files hold; empty where that is the paper's, or they differ."""
    names = {file.about.editor for file in files}
    return names.pop() if len(names) == 1 else ""


def run_paths(
    models: Sequence[str] | None, files: Sequence[Path] | None, directory: Path
) -> list[Path]:
    """The named runs of edits, and all of the named models. Raises ArtifactError where none is."""
    paths = list(files or [])
    for model in models or ([] if files else [DEFAULT_MODEL]):
        folder = Places(directory, model).folder
        found = runs_in(folder)
        if not found:
            raise ArtifactError(
                f"{folder / 'edits'} holds no run of edits; "
                f"{command_for('edit', model, directory)} makes one."
            )
        paths += found
    return paths


def open_runs(paths: Sequence[Path], stack: ExitStack) -> list[EditsFile]:
    """Open runs of edits."""
    from kscli.editing.edits_file import EditsFile

    return [stack.enter_context(EditsFile(path)) for path in paths]


def runs_in(folder: Path) -> list[Path]:
    """The files of the runs of edits in a model's folder, numbers in their names in order."""
    return sorted((folder / "edits").glob("*.h5"), key=_natural)


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", path.name)]
