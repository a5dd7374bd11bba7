"""Which files hold a model's weights, in a folder or in a repository of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from kscli.errors import ModelError

SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"


def refuse_adapter(names: Collection[str], where: str) -> None:
    """Raise ModelError for an adapter among the files, which changes what the weights compute.

    transformers adds it to the weights, or does not, by whether peft is installed.
    """
    if "adapter_config.json" in names:
        raise ModelError(
            f"{where} holds an adapter (adapter_config.json), which changes the model. Merge it "
            "into the weights with peft's merge_and_unload() and save the model to another folder, "
            "or move the adapter's files away to measure the base model."
        )


def weight_files(
    names: Collection[str], read: Callable[[str], str], where: str, allow_pickle: bool
) -> list[str]:
    """The files of weights among `names`, and their index; `read` gives the text of one.

    They are safetensors; pickled ones only with `allow_pickle`, and where there are no others.
    Raises ModelError, naming `where`, when there are none or not all.
    """
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
    try:
        return sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} of {where} is damaged; fetch it again.") from error
