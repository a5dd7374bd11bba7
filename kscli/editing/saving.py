"""An edited model as an ordinary Hugging Face folder, with its edits, base and facts inside."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kscli.editing.edited_folder import (
    BASE,
    BASE_FACTS,
    EDIT_LOG,
    first_model,
    require_new_folder,
)
from kscli.errors import ArtifactError
from kscli.escaping import escaped_json
from kscli.facts import Fact, fact_record, write_records
from kscli.files import utf8_path
from kscli.models.config import quiet_transformers
from kscli.models.loading import LoadedModel

# Where transformers keeps that a model was read from GGUF, though its weights are ordinary now.
QUANTISATION_NOTES = ("hf_quantizer", "is_quantized", "quantization_method")


def save_edited_model(
    model: LoadedModel,
    folder: Path,
    log: Sequence[Mapping[str, object]],
    facts: Sequence[Fact],
) -> None:
    """Write config, weights (safetensors) and tokenizer to a new folder, and what was edited.

    That is the `log` in `EDIT_LOG`, one JSON object a line, where what is not finite is null; the
    model it was in `BASE`; and in `BASE_FACTS` the `facts` that this one was measured with. The
    folder is written beside its place and renamed, and the model is left as it is. Raises
    UsageError as `require_new_folder` does, and ArtifactError when the folder cannot be written.
    """
    require_new_folder(folder)
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        with quiet_transformers(), _no_quantisation_note(model.decoder.model):
            there = utf8_path(temporary)
            model.decoder.model.save_pretrained(there)  # type: ignore[operator]
            _tokenizer_as_read(model).save_pretrained(there)
        with (temporary / EDIT_LOG).open("w", encoding="utf-8") as file:
            for edit in log:
                text = json.dumps(_strict(edit), ensure_ascii=False, allow_nan=False)
                file.write(escaped_json(text) + "\n")
        base = {"model_id": first_model(model.identity.model_id)}
        (temporary / BASE).write_text(json.dumps(base) + "\n", "utf-8")
        write_records(temporary / BASE_FACTS, map(fact_record, facts), force=False)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"{folder} was not written: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_quantisation_note(model: Any) -> Iterator[None]:
    """Hide that a model was read from GGUF while the block runs: transformers would not save it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        yield
        return
    notes = {name: vars(model).pop(name) for name in QUANTISATION_NOTES if name in vars(model)}
    config = vars(model.config).pop("quantization_config", None)
    try:
        yield
    finally:
        vars(model).update(notes)
        model.config.quantization_config = config


def _tokenizer_as_read(model: LoadedModel) -> Any:
    """The tokenizer with the length that it had before kscli took the limit away."""
    tokenizer = copy.deepcopy(model.tokenizer)
    length = tokenizer.init_kwargs.get("model_max_length") or model.positions
    if length:
        tokenizer.model_max_length = length
    return tokenizer


def _strict(value: object) -> object:
    """A value as strict JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
