"""From a name to a loaded decoder: alias, Hub id, local folder or GGUF file.

Whatever the name, the model ends as files on this disk (`locate_model`), and is read from
there (`load_model`). Pickled weights are read, and remote code is run, only when asked for.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kscli.errors import FactsError, KscliError, ModelError, UsageError
from kscli.models.aliases import classify, find_alias, slug
from kscli.models.fingerprint import (
    fingerprint_files,
    is_tokenizer_file,
    read_safetensors_header,
)
from kscli.models.weights import refuse_adapter, weight_files
from kscli.reporter import SILENT, Reporter

if TYPE_CHECKING:
    import torch

    from kscli.models.forward import Decoder
    from kscli.resources import MemorySplit

DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST_DOCUMENT = 2048


@dataclass(frozen=True)
class ModelOptions:
    """Which model, from where, and how it is to be run."""

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree between two files that are used together.

    `weights` and `tokenizer` are fingerprints: a Hub commit, or hashes of the files.
    """

    slug: str
    model_id: str
    revision: str
    weights: str
    tokenizer: str


@dataclass(frozen=True)
class LocatedModel:
    """A model's files on this disk, and who it is."""

    folder: Path
    gguf: str | None
    identity: ModelIdentity


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with its tokenizer, ready to be run."""

    identity: ModelIdentity
    decoder: Decoder
    tokenizer: Any
    dtype: str
    device: str
    positions: int | None
    boundary: int | None = None  # sequences of more tokens have other position encodings
    has_head: bool = True  # False: its checkpoint lacks the LM head, and random weights stand in

    @property
    def max_length(self) -> int:
        """The default length of a document: the model's positions, `LONGEST_DOCUMENT` at most."""
        return default_length(self.positions)

    @property
    def special_tokens(self) -> str:
        """The special tokens that the tokenizer puts around a text, as in `<s> ...`."""
        ids = self.tokenizer("", add_special_tokens=True)["input_ids"]
        return " ".join(self.tokenizer.convert_ids_to_tokens(ids))

    def require_positions(self, text: str, length: int) -> None:
        """Raise FactsError where a text and what follows it have more tokens than positions."""
        if length > (self.positions or length):
            raise FactsError(
                f"{text[:60]!r}... comes to {length:,} tokens, and {self.identity.model_id} takes "
                f"{self.positions:,}; leave the fact out."
            )

    def provenance(self) -> dict[str, Any]:
        """The fields of `kscli.artifacts.About` that every file of this model shares."""
        return {
            "model": self.identity.slug,
            "model_id": self.identity.model_id,
            "revision": self.identity.revision,
            "weights": self.identity.weights,
            "tokenizer": self.identity.tokenizer,
            "hook": self.decoder.hook,
            "d_m": self.decoder.d_m,
            "n_layers": self.decoder.n_layers,
            "dtype": self.dtype,
            "device": self.device,
            "special_tokens": self.special_tokens,
        }


def locate_model(options: ModelOptions, reporter: Reporter = SILENT) -> LocatedModel:
    """Find the model's files, downloading them when it lives on the Hub.

    Raises ModelError when there are none, or they are damaged or pickled and
    `allow_pickle` is not set.
    """
    kind = classify(options.model)
    name = slug(options.model)
    if kind == "hub":
        return _locate_on_hub(options, name, reporter)
    if options.revision is not None:
        raise UsageError(
            f"--revision {options.revision} is for models on the Hub; {options.model} is local."
        )
    if kind == "gguf":
        return _locate_gguf(Path(options.model).expanduser(), name)
    if kind == "embedded":
        from kscli.tiny import MODEL_DIR

        return _locate_folder(MODEL_DIR, name, name, options)
    path = Path(options.model)
    return _locate_folder(path.expanduser(), name, str(path), options)


def load_model(
    options: ModelOptions,
    reporter: Reporter = SILENT,
    located: LocatedModel | None = None,
    *,
    spread: MemorySplit | None = None,
) -> LoadedModel:
    """Load the model that `options` names, on its device and in its dtype, without gradients.

    `located` saves finding its files again; with `spread` the model is laid over all devices,
    and over the host's memory where these are not enough (True: all that is free). Raises
    ModelError when it cannot be read, is not a dense causal decoder, or lacks weights.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    located = located or locate_model(options, reporter)
    from kscli.models.forward import Decoder

    with quiet_transformers():
        config = load_config(located, options)
        model, has_head = _load_weights(
            located, config, options, _device_arguments(device, spread), dtype
        )
        tokenizer = load_tokenizer(located, options)
    text = config.get_text_config()
    decoder = Decoder(model, text.hidden_size, text.num_hidden_layers)
    return LoadedModel(
        identity=located.identity,
        decoder=decoder,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        positions=positions_of(text),
        boundary=boundary_of(text),
        has_head=has_head,
    )


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


def resolve_device(device: str) -> str:
    """The device that `auto` means here; UsageError when the one named is not at hand."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps") or (kind != "cuda" and ":" in device):
        raise UsageError(f"--device {device} is unknown; it is auto, cpu, cuda, cuda:N or mps.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is available; use --device cpu.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"--device {device}: MPS is not available; use --device cpu.")
    if kind == "cuda" and ":" in device:
        number = device.partition(":")[2]
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, "
                "counted from 0."
            )
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """The dtype that `auto` means: bfloat16 where the hardware multiplies it fast, else float32."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown; it is one of {', '.join(DTYPES)}.")
    if dtype != "auto":
        return dtype
    from kscli.resources import fast_bfloat16

    return "bfloat16" if fast_bfloat16(device) else "float32"


def _locate_on_hub(options: ModelOptions, name: str, reporter: Reporter) -> LocatedModel:
    from kscli.hub.models import fetch_model

    alias = find_alias(options.model)
    hub_id = alias.hub_id if alias and alias.hub_id else options.model
    revision = options.revision or (alias.revision if alias else None) or "main"
    fetched = fetch_model(
        hub_id,
        revision,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
        reporter=reporter,
    )
    commit = f"commit:{fetched.commit}"
    identity = ModelIdentity(name, hub_id, revision, commit, commit)
    return LocatedModel(fetched.folder, None, identity)


def _locate_gguf(path: Path, name: str) -> LocatedModel:
    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"{path} is a GGUF file, and the package gguf is not installed: "
            "pip install 'kscli[gguf]'."
        ) from error
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.")
    whole = fingerprint_files([path])
    return LocatedModel(path.parent, path.name, ModelIdentity(name, str(path), "", whole, whole))


def _locate_folder(folder: Path, name: str, model_id: str, options: ModelOptions) -> LocatedModel:
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder with a model.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; it is not a Hugging Face model folder.")
    files = [path.name for path in folder.iterdir() if path.is_file()]
    refuse_adapter(files, str(folder))
    names = weight_files(
        files, lambda name: (folder / name).read_text("utf-8"), str(folder), options.allow_pickle
    )
    weights = [folder / name for name in names if not name.endswith(".json")]
    code = sorted(folder.glob("*.py")) if options.trust_remote_code else []
    for path in weights:
        if path.suffix == ".safetensors":
            read_safetensors_header(path)
    tokenizer = [folder / name for name in files if is_tokenizer_file(name)]
    identity = ModelIdentity(
        slug=name,
        model_id=model_id,
        revision="",
        weights=fingerprint_files([folder / "config.json", *weights, *code]),
        tokenizer=fingerprint_files(tokenizer),
    )
    return LocatedModel(folder, None, identity)


def load_config(located: LocatedModel, options: ModelOptions) -> Any:
    """The model's configuration; raises ModelError when it is not that of a causal decoder."""
    from transformers import AutoConfig

    with model_errors(located):
        config = AutoConfig.from_pretrained(
            located.folder,
            trust_remote_code=options.trust_remote_code,
            **_gguf_argument(located),
        )
    _check_kind(located, config)
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


def _load_weights(
    located: LocatedModel,
    config: Any,
    options: ModelOptions,
    device: dict[str, Any],
    dtype: str,
) -> tuple[torch.nn.Module, bool]:
    """The model, and whether its checkpoint has the LM head's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with model_errors(located):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            located.folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=None if options.allow_pickle or located.gguf else True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **device,
            **_gguf_argument(located),
        )
    model, info = loaded
    # Keys are read without the LM head, so a checkpoint of the decoder alone will do for them.
    head_module = model.get_output_embeddings()
    own = {id(p) for p in head_module.parameters()} if head_module is not None else set()
    head = {name for name, p in model.named_parameters() if id(p) in own}
    absent = set(info.get("missing_keys", ()))
    missing = sorted(absent - head)
    if missing:
        raise ModelError(
            f"{located.identity.model_id} lacks {len(missing)} weights of a "
            f"{type(model).__name__} ({missing[0]}, ...); its files are incomplete."
        )
    frozen: torch.nn.Module = model.requires_grad_(False)
    return frozen, absent.isdisjoint(head)


def load_tokenizer(located: LocatedModel, options: ModelOptions) -> Any:
    """The model's tokenizer, which truncates nothing by itself; raises ModelError without one."""
    from transformers import AutoTokenizer

    with model_errors(located):
        tokenizer = AutoTokenizer.from_pretrained(
            located.folder,
            trust_remote_code=options.trust_remote_code,
            **_gguf_argument(located),
        )
    # Documents are truncated by kscli; a longer one is no news to the user.
    tokenizer.model_max_length = int(1e30)
    tokenizer.truncation_side = "right"
    return tokenizer


def _device_arguments(device: str, spread: MemorySplit | None) -> dict[str, Any]:
    if spread:
        from kscli.resources import free_on_devices, measure_resources

        free, host = free_on_devices(device), measure_resources(device).host_memory
        return {"device_map": "auto", "max_memory": spread.for_weights(free, host)}
    return {} if device == "cpu" else {"device_map": {"": device}}


def _gguf_argument(located: LocatedModel) -> dict[str, str]:
    return {"gguf_file": located.gguf} if located.gguf else {}


@contextmanager
def model_errors(located: LocatedModel) -> Iterator[None]:
    """Turn whatever transformers raises while it reads files into one sentence."""
    try:
        yield
    except KscliError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{located.identity.model_id} needs code from its repository; add "
                "--trust-remote-code if you have read and trust it."
            ) from error
        if "ignore_mismatched_sizes" in text or "size mismatch" in text:
            raise ModelError(
                f"{located.identity.model_id} cannot be loaded: its weights do not have the shapes "
                "that its config.json says."
            ) from error
        if "backend tokenizer" in text:
            raise ModelError(
                f"{located.identity.model_id} has no tokenizer that can be read; its folder needs "
                "a tokenizer.json."
            ) from error
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        raise ModelError(f"{located.identity.model_id} cannot be loaded: {first}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars, logs and warnings off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
