"""What a user can do about a mistake: the command that makes a file, the name that was meant."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kscli.cli.output import Format
from kscli.cli.settings import find_settings
from kscli.errors import MADE_BY, ArtifactError, MissingError, nearest
from kscli.models.aliases import ALIASES, classify, find_alias
from kscli.places import Places
from kscli.records import format_of

# What Typer says of words that no argument takes.
_EXTRA = re.compile(r"Got unexpected extra argument\(s\) \((.*)\)", re.DOTALL)
# What Pydantic says of a text that is no number, after it has said so.
_PARSING = re.compile(r", unable to parse string as an? \w+")
DEFAULT_DIR = Path("artifacts")


def command_for(verb: str, model: str, directory: Path, *more: str, named: bool = True) -> str:
    """A command as the user would write it for a model, as `kscli run --model gpt-j`.

    Where it is not `named` by an option, the model is the first argument.
    """
    words = ["kscli", *verb.split(), *(["--model"] if named else []), model, *more]
    if directory != DEFAULT_DIR and str(directory) != os.environ.get("KSCLI_DIR"):
        words += ["--dir", str(directory)]
    return f"`{shlex.join(words)}`"


def measured_models(directory: Path) -> list[str]:
    """The folders of a `--dir` that hold artifacts, in alphabetical order."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if any(path.glob("*.h5")))


def meant_model(model: str, directory: Path) -> str | None:
    """The alias, or the model that was measured, that a name which is neither looks like."""
    if classify(model) != "hub" or "/" in model:
        return None
    known = [*measured_models(directory), *(alias.name for alias in ALIASES)]
    near = nearest(model, known, cutoff=0.75)
    return near[0] if near and near[0] != model else None


def of_models(error: MissingError, models: Sequence[str], directory: Path) -> ArtifactError:
    """The error that names the command with the user's own model, where the file is that one's.

    Where a model's name stands for a file, it names that model's file.
    """
    for model in models:
        places = Places(directory, model)
        if places.folder not in error.path.parents:
            continue
        made_by = MADE_BY.get(error.kind, "run")
        if error.kind == "pmatrix" and all(places.path(of).exists() for of in ("cov", "keys")):
            made_by = "pmatrix"
        meant = meant_model(model, directory)
        others = [name for name in measured_models(directory) if name != places.folder.name]
        if meant:
            return ArtifactError(f"{error.path} does not exist; did you mean {meant}?")
        there = f" ({directory} has {listed(others)})" if others else ""
        if classify(model) in ("folder", "gguf") and not Path(model).expanduser().exists():
            return ArtifactError(
                f"{error.path} does not exist, and no model {model} either{there}."
            )
        remedy = f"{command_for(made_by, model, directory)} makes it"
        return ArtifactError(f"{error.path} does not exist; {remedy}{there}.")
    of_model = Places(directory, str(error.path)).path(error.kind or "pmatrix")
    if not error.path.suffix and of_model.exists():
        return ArtifactError(f"there is no file {error.path}; did you mean {of_model}?")
    return error


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names as in `a, b and 4 others`."""
    if len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} others"]
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def usage_mistake(error: Any) -> str:
    """What Typer found wrong with a command line, in one line that says what was meant."""
    option = getattr(error, "option_name", None)
    if option is not None and "No such option" in error.message:
        return _no_option(option, error)
    extra = _EXTRA.fullmatch(error.message)
    if extra:
        return _no_argument(extra[1], error)
    parameter = getattr(error, "param", None)
    text = _named_value(" ".join(error.format_message().split()), error.__cause__)
    if text.startswith("Missing argument"):
        text = f"{text.rstrip('.')}: {error.ctx.command_path} {_arguments(error.ctx)}"
    end = "" if text.endswith("?") else "."
    return f"{text[:1].lower()}{text[1:].rstrip('.')}{_where(error, parameter)}{end}"


def _named_value(text: str, cause: Any) -> str:
    """What Pydantic says of a value, for Typer reads numbers through it, with the value in it."""
    text = _PARSING.sub("", text.replace("Value error, ", ""))
    if "Input should" in text and hasattr(cause, "errors"):
        text = text.replace("Input should", f"{cause.errors()[0]['input']!r} should")
    return text


def _arguments(context: Any) -> str:
    """What a command takes without an option, as its help has it."""
    taken = [each for each in context.command.params if not each.opts[0].startswith("-")]
    named = " ".join(each.metavar or each.name.upper() for each in taken)
    return f"{named} (`{context.command_path} --help` says more)"


def _no_argument(words: str, error: Any) -> str:
    """The words that no argument takes, and the option that is meant by the first."""
    context = error.ctx
    first = words.split(" ")[0]
    there = {name for each in context.command.params for name in each.opts}
    meant = next((name for name in _options_for(first) if name in there), None)
    hint = f"did you mean {meant} {first}? " if meant else ""
    return (
        f"nothing takes {words} without an option before it; {hint}"
        f"`{context.command_path} --help` lists the options."
    )


def _options_for(word: str) -> tuple[str, ...]:
    """The options that are given such a word, the likeliest first."""
    path = Path(word)
    if (path / "config.json").exists() or path.suffix == ".gguf" or find_alias(word):
        return ("--model",)
    if path.is_file() and format_of(path):
        return ("--facts", "--corpus")
    return ("--corpus",) if path.is_dir() else ()


def _where(error: Any, parameter: Any) -> str:
    """Where a wrong value is from, if not from the command line."""
    source = error.ctx.get_parameter_source(parameter.name) if parameter and error.ctx else None
    if source is None or source.name not in ("ENVIRONMENT", "DEFAULT_MAP"):
        return ""
    if source.name == "ENVIRONMENT":
        return f" (from {next(name for name in parameter.envvar if os.environ.get(name))})"
    settings = find_settings(Path.cwd())
    return f" (from {settings.path})" if settings else ""


def _no_option(option: str, error: Any) -> str:
    context = error.ctx
    own = [name for each in context.command.params for name in each.opts]
    above = context.parent.command.params if context.parent else []
    if any(option in each.opts for each in above):
        return f"{option} stands before the command: kscli {option} {context.info_name}."
    if option in ("-m", "--model") and any(not name.startswith("-") for name in own):
        return f"there is no option {option}: {context.command_path} {_arguments(context)}."
    near = nearest(option.lstrip("-"), [name.lstrip("-") for name in own], cutoff=0.7)
    meant = f"did you mean --{near[0]}? " if near else ""
    if "--format" in own and option.lstrip("-") in [*map(str, Format)]:
        meant = f"did you mean --format {option.lstrip('-')}? "
    return f"there is no option {option}; {meant}`{context.command_path} --help` lists them all."
