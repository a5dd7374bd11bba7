"""Short names of models, and what a model's name means: alias, Hub id, folder or GGUF file.

Imports nothing heavy: shell completion and every command that reads only artifacts use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ModelKind = Literal["embedded", "hub", "folder", "gguf"]


@dataclass(frozen=True)
class Alias:
    """A model with a short name.

    `revision` is a commit that holds safetensors weights; `layers` decoder layers, each with
    a down-projection from d_m features; `parameters` with embeddings and head, tied ones once.
    The embedded model has neither `hub_id` nor `revision`.
    """

    name: str
    family: str
    hub_id: str | None
    revision: str | None
    layers: int
    d_m: int
    parameters: int


# A commit each, so that the same name is the same model for ever and needs no network once
# it is cached. gpt-j's is the converter's pull request 40: its main branch has pickles only.
ALIASES: tuple[Alias, ...] = (
    Alias("tiny", "tiny", None, None, 4, 512, 1_210_112),
    Alias(
        "gpt2-small",
        "GPT2",
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        layers=12,
        d_m=3072,
        parameters=124_439_808,
    ),
    Alias(
        "gpt2-medium",
        "GPT2",
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        layers=24,
        d_m=4096,
        parameters=354_823_168,
    ),
    Alias(
        "gpt2-large",
        "GPT2",
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        layers=36,
        d_m=5120,
        parameters=774_030_080,
    ),
    Alias(
        "gpt2-xl",
        "GPT2",
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        layers=48,
        d_m=6400,
        parameters=1_557_611_200,
    ),
    Alias(
        "gpt-j",
        "GPT-J",
        "EleutherAI/gpt-j-6b",
        "f3f428825b6fc4c087af475ea729ac652edeee33",
        layers=28,
        d_m=16384,
        parameters=6_050_882_784,
    ),
    Alias(
        "pythia-1b",
        "Pythia",
        "EleutherAI/pythia-1b",
        "f73d7dcc545c8bd326d8559c8ef84ffe92fea6b2",
        layers=16,
        d_m=8192,
        parameters=1_011_781_632,
    ),
    Alias(
        "pythia-1.4b",
        "Pythia",
        "EleutherAI/pythia-1.4b",
        "fedc38a16eea3bd36a96b906d78d11d2ce18ed79",
        layers=24,
        d_m=8192,
        parameters=1_414_647_808,
    ),
    Alias(
        "pythia-2.8b",
        "Pythia",
        "EleutherAI/pythia-2.8b",
        "2a259cdd96a4beb1cdf467512e3904197345f6a9",
        layers=32,
        d_m=10240,
        parameters=2_775_208_960,
    ),
    Alias(
        "pythia-6.9b",
        "Pythia",
        "EleutherAI/pythia-6.9b",
        "c0e3eee36dc47af0c49f361c74cfe459c09f7f23",
        layers=32,
        d_m=16384,
        parameters=6_857_302_016,
    ),
    Alias(
        "llama2-7b",
        "Llama2",
        "meta-llama/Llama-2-7b-hf",
        "01c7f73d771dfac7d292323805ebc428287df4f9",
        layers=32,
        d_m=11008,
        parameters=6_738_415_616,
    ),
    Alias(
        "llama2-13b",
        "Llama2",
        "meta-llama/Llama-2-13b-hf",
        "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1",
        layers=40,
        d_m=13824,
        parameters=13_015_864_320,
    ),
    Alias(
        "llama3-8b",
        "Llama3",
        "meta-llama/Meta-Llama-3-8B",
        "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        layers=32,
        d_m=14336,
        parameters=8_030_261_248,
    ),
    Alias(
        "llama3.1-8b",
        "Llama3.1",
        "meta-llama/Llama-3.1-8B",
        "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        layers=32,
        d_m=14336,
        parameters=8_030_261_248,
    ),
)

_BY_NAME = {alias.name: alias for alias in ALIASES}


def find_alias(name: str) -> Alias | None:
    """The alias of this name, if there is one."""
    return _BY_NAME.get(name)


def close_aliases(name: str) -> list[str]:
    """Aliases that look like a mistyped `name`, or like the last part of a Hub id; best first."""
    import difflib

    return difflib.get_close_matches(name.rpartition("/")[2].lower(), _BY_NAME, n=3, cutoff=0.75)


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
