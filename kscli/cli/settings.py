"""Options from `kscli.toml` or `pyproject.toml`, and the names of their `KSCLI_` variables.

What is given on the command line wins over a variable, a variable over the file, and the file
over the default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kscli.errors import UsageError, no_such

# What runs foreign code or replaces files is asked for each time.
NEVER_FROM_FILE = ("trust-remote-code", "allow-pickle", "force")


@dataclass(frozen=True)
class Settings:
    """The options that a file gives: of all commands, and in tables of one command each."""

    path: Path
    values: Mapping[str, Any]


def find_settings(folder: Path) -> Settings | None:
    """The settings of the nearest folder upward that has some; `kscli.toml` wins.

    Raises UsageError for a file that is no TOML.
    """
    for each in (folder, *folder.parents):
        own, project = each / "kscli.toml", each / "pyproject.toml"
        if own.is_file():
            return Settings(own, _read(own))
        if project.is_file():
            values = _read(project).get("tool", {}).get("kscli")
            if isinstance(values, dict):
                return Settings(project, values)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}.") from error


def names_of(parameter: Any) -> list[str]:
    """An option's names without dashes, as in `layers` and `layer`; none of an argument."""
    if parameter.param_type_name != "option":
        return []
    long = [name for name in parameter.opts if name.startswith("--")]
    return [name.lstrip("-") for name in long or parameter.opts]


def variables_of(parameter: Any) -> list[str]:
    """The environment variables that give an option, as `KSCLI_MAX_LENGTH`."""
    return [f"KSCLI_{name.upper().replace('-', '_')}" for name in names_of(parameter)]


def options_of_file(
    settings: Settings, command: Sequence[str], parameters: Sequence[Any], known: Sequence[str]
) -> dict[str, Any]:
    """The options that a file gives to a command, by the names of its parameters.

    `command` is the path of its name, as `facts`, `check`. `known` are the names of all options
    of all commands. Raises UsageError, naming the file and the key, for one that no command has.
    """
    own = {name: each for each in parameters for name in names_of(each)}
    shared = {key: value for key, value in settings.values.items() if not isinstance(value, dict)}
    table: Any = settings.values
    for name in command:
        table = table.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{settings.path}: {name} is a command; write a table [{name}].")
    only_own = {key: value for key, value in table.items() if not isinstance(value, dict)}
    found = {}
    for key, value in [*shared.items(), *(only_own.items() if command else ())]:
        name = key.replace("_", "-")
        if name in NEVER_FROM_FILE:
            raise UsageError(
                f"{settings.path}: {key} is taken from the command line or from "
                f"KSCLI_{name.upper().replace('-', '_')} alone; remove it."
            )
        if name in own:
            found[own[name].name] = _value(settings.path, key, value, own[name])
        elif key in only_own or name not in known:
            raise UsageError(f"{settings.path}: {no_such('option', name, own or known)}")
    return found


def _value(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value of TOML as the command line would have it; a path is taken from the file's folder."""
    if parameter.is_flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{path}: {key} is {value!r}, and must be true or false.")
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float)) for one in several):
        raise UsageError(f"{path}: {key} is {value!r}, and must be a text or a number.")
    texts = [_placed(path.parent, str(one), parameter) for one in several]
    if parameter.multiple:
        return texts
    return ",".join(texts)


def _placed(folder: Path, text: str, parameter: Any) -> str:
    """A text; where it names a path, as it is from the working folder."""
    path = Path(text).expanduser()
    is_path = parameter.type_descriptor.is_path or (folder / path).is_file()
    if not is_path or path.is_absolute() or folder == Path.cwd():
        return str(path) if is_path else text
    return os.path.relpath(folder / path)
