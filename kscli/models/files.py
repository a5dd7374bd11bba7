"""Which files of a model are read, in a folder or in a repository of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kscli.errors import ModelError

if TYPE_CHECKING:
    from kscli.models.locating import ModelOptions

CONFIG = "config.json"
SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"

_TOKENIZER_NAMES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
_TOKENIZER_SUFFIXES = (".model", ".tiktoken")


@dataclass(frozen=True)
class ModelFiles:
    """The names of a model's files beside its configuration; `weights` with their index."""

    tokenizer: list[str]
    code: list[str]
    weights: list[str]

    @property
    def all(self) -> list[str]:
        """The names of all files that are read."""
        return [CONFIG, *self.tokenizer, *self.code, *self.weights]


def model_files(
    names: Collection[str], read: Callable[[str], str], where: str, options: ModelOptions
) -> ModelFiles:
    """The files to read among `names`; `read` gives the text of one.

    Weights are safetensors; pickled ones only where `options` allow them and there are no others.
    Python files count only where `options` trust them.

    Raises ModelError, naming `where`, when there is no model, when its weights are not all there,
    and for an adapter, which changes what the weights compute: transformers adds it to them, or
    does not, by whether peft is installed.
    """
    if CONFIG not in names:
        gguf = any(name.endswith(".gguf") for name in names)
        raise ModelError(
            f"{where} has no {CONFIG}, so it is not a transformers model."
            + (" Give the path of one of its .gguf files, here or downloaded." if gguf else "")
        )
    if "adapter_config.json" in names:
        raise ModelError(
            f"{where} holds an adapter (adapter_config.json), which changes the model. Merge it "
            "into the weights with peft's merge_and_unload() and save the model to another folder, "
            "or move the adapter's files away to measure the base model."
        )
    return ModelFiles(
        tokenizer=sorted(filter(_is_tokenizer_file, names)),
        code=sorted(name for name in names if options.trust_remote_code and name.endswith(".py")),
        weights=_weight_files(names, read, where, options.allow_pickle),
    )


def _is_tokenizer_file(name: str) -> bool:
    return name in _TOKENIZER_NAMES or ("/" not in name and name.endswith(_TOKENIZER_SUFFIXES))


def _weight_files(
    names: Collection[str], read: Callable[[str], str], where: str, allow_pickle: bool
) -> list[str]:
    for kind in (SAFE, PICKLED) if allow_pickle else (SAFE,):
        if kind in names:
            return [kind]
        index = f"{kind}.index.json"
        if index in names:
            shards = _shards(where, index, read(index))
            absent = [shard for shard in shards if shard not in names]
            if absent:
                raise ModelError(f"{where} lacks {absent[0]}, which its {index} names.")
            return [index, *shards]
    if {PICKLED, f"{PICKLED}.index.json"} & set(names):
        raise ModelError(
            f"{where} has only pickled weights, and reading them can run code. Add --allow-pickle "
            "if you trust them, or name a model or --revision that has safetensors."
        )
    raise ModelError(f"{where} has no weights that transformers reads ({SAFE} or its shards).")


def _shards(where: str, index: str, text: str) -> list[str]:
    damaged = ModelError(f"{index} of {where} is damaged; fetch it again.")
    try:
        shards = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    # A shard lies beside the index, and nowhere else.
    if any("/" in shard or "\\" in shard for shard in shards):
        raise damaged
    return shards
