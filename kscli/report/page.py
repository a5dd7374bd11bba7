"""The page as a whole: its head, its parts, and the file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kscli import __version__
from kscli.artifacts import UNKNOWN, Artifact, Existing, PMatrixFile
from kscli.editing.edits_file import EditsFile
from kscli.errors import ArtifactError
from kscli.files import replace_file, require_other, require_writable
from kscli.origin import Origin
from kscli.places import file_name
from kscli.report import comparison, sections
from kscli.report.edits import edits, risk
from kscli.report.examined import Examined, examine
from kscli.report.html import Html, tag, void
from kscli.report.opening import preface
from kscli.report.sections import Section
from kscli.report.words import counted, listed
from kscli.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Part:
    """What the page says of one thing; `key` begins the ids of its sections."""

    key: str
    title: str
    about: str
    sections: tuple[Section, ...]


Builder = Callable[[Examined], Section | None]

_OF_PAIRS: tuple[Builder, ...] = (
    sections.depth,
    sections.distribution,
    sections.matrices,
    sections.same_token,
    sections.pairs,
    sections.right_angles,
    sections.spectrum,
    sections.convergence,
    sections.relations,
    risk,
    edits,
)


@dataclass(frozen=True)
class ModelFiles:
    """What a part of the page is on: a model's open matrices, and the runs of edits made with P."""

    pmatrix: PMatrixFile
    runs: Sequence[EditsFile] = ()


def write_report(
    sources: Sequence[ModelFiles],
    path: Path,
    *,
    seed: int = 0,
    command: str = "",
    force: bool = False,
    reporter: Reporter = SILENT,
) -> None:
    """Write the page on the open files of one or several models to `path`.

    `command` is said to have made it. A page that is up to date is kept, and one whose inputs have
    changed is made again. Raises ArtifactError where another file exists, unless `force`, and where
    it cannot be written.
    """
    for source in sources:
        matrices = source.pmatrix.path
        stats = file_name("stats", source.pmatrix.about.editor)
        others = [matrices.with_name(name) for name in ("cov.h5", "keys.h5", stats)]
        require_other(path, [matrices, *others, *(run.path for run in source.runs)])
    require_writable(path, force=True)
    origin = _origin(sources, seed)
    if not origin.must_make(path, Existing.FORCE if force else Existing.REFUSE, reporter):
        return
    models = [
        examine(files.pmatrix, f"model-{at}", seed, reporter, files.runs)
        for at, files in enumerate(sources, start=1)
    ]
    parts = model_parts(models, reporter)
    content = document(_title(models), parts, command, origin.line)
    with replace_file(path, force=True) as beside:
        beside.write_text(content, encoding="utf-8")


def _origin(sources: Sequence[ModelFiles], seed: int) -> Origin:
    """What the page is made from: P, the files beside it, and the runs."""
    inputs = []
    for source in sources:
        inputs += [source.pmatrix.fingerprint, *(run.fingerprint for run in source.runs)]
        stats = file_name("stats", source.pmatrix.about.editor)
        inputs += [_fingerprint(source.pmatrix.path.with_name(name)) for name in ("cov.h5", stats)]
    about = [source.pmatrix.about for source in sources]
    return Origin(("report", seed, [(each.model, each.editor) for each in about]), inputs)


def _fingerprint(path: Path) -> str:
    """The fingerprint of an artifact; empty where there is none that can be read."""
    try:
        with Artifact(path) as artifact:
            return artifact.fingerprint
    except ArtifactError:
        return ""


def model_parts(models: Sequence[Examined], reporter: Reporter = SILENT) -> list[Part]:
    """A part on all models beside each other where they are several, and one on each."""
    plans: list[tuple[str, str, str, Sequence[Callable[[Any], Section | None]], Any]] = [
        (one.key, _heading(one, models), _about(one), _builders(one), one) for one in models
    ]
    if len(models) > 1:
        about = f"{counted(len(models), 'model')}: {listed([one.model for one in models])}."
        plans.insert(0, (comparison.KEY, "All models", about, comparison.SECTIONS, models))
    parts = []
    steps = sum(len(builders) for _, _, _, builders, _ in plans)
    with reporter.task("report", steps, unit="sections") as task:
        for key, title, about, builders, source in plans:
            made = []
            for build in builders:
                made.append(build(source))
                task.advance()
            there = tuple(section for section in made if section is not None)
            parts.append(Part(key, title, about, there))
    return parts


def _builders(examined: Examined) -> tuple[Builder, ...]:
    """What makes the sections on a model, in their order; one fact has no pairs to show."""
    of_pairs = _OF_PAIRS if examined.m > 1 else ()
    return (sections.short, sections.summary, *of_pairs, sections.provenance)


def document(title: str, parts: Sequence[Part], command: str = "", origin: str = "") -> str:
    """The HTML of the page, which loads nothing and runs no script but its own.

    `origin` is the line that says what it was made from.
    """
    style, script = _own_file("style.css"), _own_file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures bring their colours in style attributes, which no hash allows.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=policy),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="generator", content=origin or f"kscli {__version__}"),
        tag("title", title),
        tag("style", Html(style)),
    )
    made_by = f"Made by kscli {__version__}" + (f": {command}" if command else ".")
    body = tag(
        "body",
        tag("header", tag("h1", title), *([_about_of(parts[0])] if len(parts) == 1 else [])),
        preface(),
        _contents(parts),
        tag("main", *(_part(part, headed=len(parts) > 1) for part in parts)),
        tag("footer", made_by),
        tag("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _own_file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _contents(parts: Sequence[Part]) -> Html:
    lists = []
    for part in parts:
        links = [
            tag("li", tag("a", section.title, href=f"#{part.key}-{section.name}"))
            for section in part.sections
        ]
        named = tag("li", tag("a", tag("strong", part.title), href=f"#{part.key}"))
        lists.append(tag("ul", *([named] if len(parts) > 1 else []), *links))
    return tag("nav", *lists, aria_label="Contents")


def _part(part: Part, *, headed: bool) -> Html:
    head = [tag("h2", part.title), _about_of(part)] if headed else []
    sections = [
        tag(
            "section",
            tag("h3" if headed else "h2", section.title),
            section.body,
            id=f"{part.key}-{section.name}",
        )
        for section in part.sections
    ]
    return tag("article", *head, *sections, id=part.key)


def _about_of(part: Part) -> Html:
    return tag("p", part.about, class_="about")


def _title(models: Sequence[Examined]) -> str:
    return f"Knowledge superposition in {listed([one.model for one in models])}"


def _heading(one: Examined, models: Sequence[Examined]) -> str:
    """The model's name; with the file where another has the same."""
    same = [other for other in models if other.model == one.model]
    return one.model if len(same) == 1 else f"{one.model} ({one.file.path})"


def _about(one: Examined) -> str:
    """One line of what was measured."""
    about = one.file.about
    tokens = f"{counted(one.corpus.tokens, 'token')} of " if one.corpus else ""
    return (
        f"{counted(one.m, 'fact')} of {about.facts_name} at "
        f"{counted(len(one.layers), 'layer')}; C of {tokens}{about.corpus or UNKNOWN}; "
        f"{about.dtype or UNKNOWN}."
    )
