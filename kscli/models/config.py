"""A model's configuration, read and judged before its weights are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from kscli.errors import KscliError, ModelError, first_line
from kscli.files import utf8_path
from kscli.models.declared import require_possible, require_possible_gguf
from kscli.models.locating import LocatedModel, ModelOptions
from kscli.reporter import silenced

LONGEST_DOCUMENT = 2048

# What transformers says somewhere in an error, and what this means for a model.
_EXPLANATIONS = (
    (
        ("trust_remote_code",),
        "needs code from its repository; add --trust-remote-code if you have read and trust it.",
    ),
    (
        ("ignore_mismatched_sizes", "size mismatch"),
        "cannot be loaded: its weights do not have the shapes that its config.json says.",
    ),
    (
        ("backend tokenizer",),
        "has no tokenizer that can be read; its folder needs a tokenizer.json.",
    ),
)


def reading(located: LocatedModel, options: ModelOptions) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a model's files."""
    gguf = {"gguf_file": located.gguf} if located.gguf else {}
    trust = {"trust_remote_code": options.trust_remote_code}
    return {"pretrained_model_name_or_path": utf8_path(located.folder), **trust, **gguf}


def load_config(located: LocatedModel, options: ModelOptions) -> Any:
    """The model's configuration; raises ModelError when it is not that of a causal decoder."""
    from transformers import AutoConfig

    if not located.gguf:
        require_possible(located.folder, located.identity.model_id)
    with model_errors(located):
        config = AutoConfig.from_pretrained(**reading(located, options))
    _check_kind(located, config)
    # In MXFP4 (gpt-oss) experts are run by kernels that show no keys; their weights are exact in
    # bfloat16.
    quantised = getattr(config, "quantization_config", None)
    if isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4":
        quantised["dequantize"] = True
    # A configuration may name an attention that is fetched from the Hub. None lets transformers
    # choose its own: scaled_dot_product_attention where the model has it, else eager.
    config._attn_implementation = None
    return config


def _check_kind(located: LocatedModel, config: Any) -> None:
    """Refuse what the configuration already shows not to be a causal decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = list(getattr(config, "architectures", None) or [])
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    masked = architectures and all("MaskedLM" in a or "PreTraining" in a for a in architectures)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or remote
    if getattr(config, "is_encoder_decoder", False) or masked or not known:
        what = ", ".join(architectures) or config.model_type
        raise ModelError(
            f"{located.identity.model_id} is a {what}; kscli measures decoder-only causal "
            "language models."
        )


def sizes_of(config: Any) -> tuple[int, int]:
    """A decoder's hidden size and number of layers; ModelError where a configuration says none."""
    text = config.get_text_config()
    found: list[Any] = [getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers")]
    if not all(isinstance(size, int) for size in found):
        raise ModelError(
            f"a {config.model_type} has no single hidden size and number of layers; kscli measures "
            "decoders with one list of layers."
        )
    return found[0], found[1]


def default_length(positions: int | None) -> int:
    """The default length of a document: a model's positions, `LONGEST_DOCUMENT` at most."""
    return min(positions or LONGEST_DOCUMENT, LONGEST_DOCUMENT)


def positions_of(config: Any) -> int | None:
    """How many positions a model has; None where its configuration sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def boundary_of(config: Any) -> int | None:
    """The length beyond which LongRoPE gives all tokens of a batch other position encodings.

    Then a batch must not hold sequences of both sides. None for models of another encoding; with
    dynamic NTK the encodings change only beyond the positions that kscli uses.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for of_layers in (rope, *rope.values()):
        if isinstance(of_layers, dict) and of_layers.get("rope_type") == "longrope":
            return int(of_layers["original_max_position_embeddings"])
    return None


@contextmanager
def model_errors(located: LocatedModel) -> Iterator[None]:
    """Turn whatever transformers raises while it reads files into one sentence."""
    try:
        yield
    except KscliError:
        raise
    except Exception as error:
        known = [said for signs, said in _EXPLANATIONS if any(sign in str(error) for sign in signs)]
        said = known[0] if known else f"cannot be loaded: {first_line(error)}"
        raise ModelError(f"{located.identity.model_id} {said}") from error


@contextmanager
def gguf_read_once(located: LocatedModel) -> Iterator[None]:
    """Let transformers parse a GGUF file once while the block runs, and judge what it declares.

    It parses the file for the configuration, for the weights and for the tokenizer, and each time
    takes many seconds where the vocabulary is large. Raises ModelError, inside the block, as
    `require_possible_gguf` does.
    """
    if located.gguf is None:
        yield
        return
    gguf: Any = import_module("gguf")
    reader = gguf.GGUFReader  # transformers takes it from the package each time

    @cache
    def read(path: Any) -> Any:
        found = reader(path)
        require_possible_gguf(found, located.identity.model_id)
        return found

    gguf.GGUFReader = read
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars, logs and warnings off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with silenced("transformers"):
        yield
