"""An adapter in peft's format, merged into the weights of its base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from kscli.errors import ModelError
from kscli.reporter import Reporter


def merge_adapter(model: Any, folder: Path, model_id: str, reporter: Reporter) -> nn.Module:
    """The model with the adapter in `folder` added to its weights, as peft merges it.

    For LoRA, W becomes W + s B A, with peft's s: lora_alpha / r, or lora_alpha / sqrt(r) with
    use_rslora. What peft warns of is passed on. Raises ModelError where the adapter does not
    fit the model, or cannot be merged: one that adds tokens or keys, as prefix tuning does.
    """
    from peft import PeftConfig, PeftModel

    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ModelError(
            f"{model_id} does not fit on the device, and an adapter is merged only where it does. "
            "Merge it with peft's merge_and_unload(), and save the model to another folder."
        )
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            config: Any = PeftConfig.from_pretrained(str(folder))
            if config.is_prompt_learning:
                raise ModelError(
                    f"The adapter of {model_id} ({config.peft_type.value}) adds tokens to the text "
                    "and changes no weights, so it cannot be merged."
                )
            wrapped: Any = PeftModel(model, config)
            loaded = wrapped.load_adapter(
                str(folder),
                "default",
                torch_device=str(model.device),
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
            )
            _require_all_used(loaded, model_id)
            merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except ModelError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"The adapter of {model_id} cannot be merged: {said[:200]}") from error
    for text in dict.fromkeys(str(warning.message) for warning in warned):
        reporter.warn(f"peft says of the adapter of {model_id}: {text}")
    return merged.requires_grad_(False)


def _require_all_used(loaded: Any, model_id: str) -> None:
    """Raise ModelError where weights of the adapter are absent, or have no place in the model."""
    for names, what in (
        (loaded.missing_keys, "lacks"),
        (loaded.unexpected_keys, "has weights that the model has no place for:"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"The adapter of {model_id} {what} {names[0]}{more}.")
