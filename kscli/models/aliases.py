"""Short names of models, and what a model's name means: alias, Hub id, folder or GGUF file.

Imports nothing heavy: shell completion and every command that reads only artifacts use it.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kscli.errors import nearest

ModelKind = Literal["embedded", "hub", "folder", "gguf"]


@dataclass(frozen=True)
class Alias:
    """A model with a short name.

    `revision` is a commit that holds safetensors weights; `layers` decoder layers, each with
    a down-projection from d_m features; `parameters` with embeddings and head, tied ones once, and
    without the part that sees images. `active` are those that one token uses, which are fewer only
    in a mixture of experts. `gate` is what the Hub asks for before it gives the files; None where
    it asks for nothing. The embedded model has neither `hub_id` nor `revision`.

    `listing_seen` is False where the model's page on the Hub could not be read when the line was
    written: its commit, sizes and gate are what public repositories say that pin it. A gate begins
    with `perhaps` where these disagree.
    """

    name: str
    family: str
    hub_id: str | None
    revision: str | None
    layers: int
    d_m: int
    parameters: int
    active: int
    gate: str | None
    listing_seen: bool


def _alias(row: dict[str, str]) -> Alias:
    layers, d_m, parameters = (int(row[name]) for name in ("layers", "d_m", "parameters"))
    hub_id, revision = row["hub_id"] or None, row["revision"] or None
    return Alias(
        row["name"],
        row["family"],
        hub_id,
        revision,
        layers,
        d_m,
        parameters,
        active=int(row["active"] or parameters),
        gate=row["gate"] or None,
        listing_seen=row["listing"] != "not seen",
    )


# aliases.csv has a commit each, so that the same name is the same model for ever and needs no
# network once it is cached. gpt-j's is the converter's pull request 40: its main branch has pickles
# only. The lines are in the order of families, and of sizes within one.
with Path(__file__).with_name("aliases.csv").open(encoding="utf-8", newline="") as _rows:
    ALIASES: tuple[Alias, ...] = tuple(map(_alias, csv.DictReader(_rows)))

_BY_NAME = {alias.name: alias for alias in ALIASES}


def find_alias(name: str) -> Alias | None:
    """The alias of this name, if there is one."""
    return _BY_NAME.get(name)


def close_aliases(name: str) -> list[str]:
    """Aliases that look like a mistyped `name`, or like the last part of a Hub id; best first."""
    return nearest(name.rpartition("/")[2], _BY_NAME, n=3, cutoff=0.75)


def classify(model: str) -> ModelKind:
    """What `model` names.

    An alias wins over a folder of the same name (`./gpt2-small` is the folder), and a path
    that exists over a Hub id. `OWNER/NAME` and single words that are neither are Hub ids.
    """
    alias = find_alias(model)
    if alias is not None:
        return "embedded" if alias.hub_id is None else "hub"
    if model.lower().endswith(".gguf"):
        return "gguf"
    return "folder" if _is_path(model) else "hub"


def slug(model: str) -> str:
    """The name of the model's folder of artifacts.

    The alias; or the Hub id with `/` as `--`; or the base name of the folder or file, which
    need not exist any more.
    """
    if find_alias(model) is not None:
        return model
    if classify(model) == "hub":
        return model.replace("/", "--")
    name = Path(model).name
    # Only what has no name of its own is resolved: a link keeps the name that was asked for.
    return Path(model).expanduser().resolve().name if name in ("", "..", "~") else name


def _is_path(model: str) -> bool:
    written_as_one = model.startswith((".", "/", "~")) or model.endswith("/")
    return written_as_one or model.count("/") > 1 or Path(model).exists()
