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
ADAPTER = "adapter_config.json"

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
    """The names of a model's files: `config` with the code, `weights` with their index.

    `adapter` has the files of an adapter that is to be merged. Where these are alone, all else
    comes from the base model that the adapter names.
    """

    config: list[str]
    tokenizer: list[str]
    weights: list[str]
    adapter: list[str]

    @property
    def all(self) -> list[str]:
        """The names of all files that are read."""
        return [*self.config, *self.tokenizer, *self.weights, *self.adapter]

    @property
    def complete(self) -> bool:
        """Whether nothing is lacking: a model has a tokenizer, and an adapter needs none."""
        return bool(self.tokenizer or not self.config)


def model_files(
    names: Collection[str], read: Callable[[str], str], where: str, options: ModelOptions
) -> ModelFiles:
    """The files to read among `names`; `read` gives the text of one.

    There are no weights among them where `options` do without. Weights are safetensors; pickled
    ones only where `options` allow them and there are no others. Python files count only where
    `options` trust them.

    The adapter's files count only where `options` merge it.

    Raises ModelError, naming `where`, when there is no model, when its weights are not all there,
    and for an adapter that is not to be merged: it changes what the weights compute, and
    transformers adds it to them, or does not, by whether peft is installed.
    """
    adapter = _adapter_files(names, where, options)
    if CONFIG not in names:
        if adapter:
            return ModelFiles([], [], [], adapter)
        gguf = any(name.endswith(".gguf") for name in names)
        raise ModelError(
            f"{where} has no {CONFIG}, so it is not a transformers model."
            + (" Give the path of one of its .gguf files, here or downloaded." if gguf else "")
        )
    code = sorted(name for name in names if options.trust_remote_code and name.endswith(".py"))
    return ModelFiles(
        config=[CONFIG, *code],
        tokenizer=sorted(filter(_is_tokenizer_file, names)),
        weights=_weight_files(names, read, where, options.allow_pickle) if options.weights else [],
        adapter=adapter,
    )


def _adapter_files(names: Collection[str], where: str, options: ModelOptions) -> list[str]:
    """The files of an adapter in peft's format, if it is there and is to be merged."""
    if ADAPTER not in names:
        if options.merge_adapter:
            raise ModelError(f"{where} has no adapter ({ADAPTER}); leave --merge-adapter out.")
        return []
    if not options.merge_adapter:
        raise ModelError(
            f"{where} holds an adapter ({ADAPTER}), which changes the model. Add --merge-adapter "
            "to measure the model with it, or name the base model alone."
        )
    if "adapter_model.safetensors" in names:
        return [ADAPTER, "adapter_model.safetensors"]
    if "adapter_model.bin" not in names:
        raise ModelError(f"{where} has no adapter weights (adapter_model.safetensors).")
    if not options.allow_pickle:
        raise ModelError(
            f"{where} has only a pickled adapter, and reading it can run code. Add --allow-pickle "
            "if you trust it."
        )
    return [ADAPTER, "adapter_model.bin"]


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
