"""A model's files as a decoder that can be run, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from kscli.errors import FactsError, ModelError
from kscli.layers import format_layers, layers_text
from kscli.models.config import (
    boundary_of,
    default_length,
    gguf_read_once,
    load_config,
    model_errors,
    positions_of,
    quiet_transformers,
    reading,
    sizes_of,
)
from kscli.models.files import ADAPTER
from kscli.models.locating import (
    LocatedModel,
    ModelIdentity,
    ModelOptions,
    dtype_of,
    locate_model,
)
from kscli.reporter import SILENT, Reporter

if TYPE_CHECKING:
    import torch

    from kscli.models.forward import Decoder
    from kscli.resources import MemorySplit


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
    files: tuple[Path, ...] = ()  # those that it was read from
    digest: str = ""  # of the weights in memory, where they may be changed (`kscli.models.live`)

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

    def of_layers(self, spec: str, reporter: Reporter = SILENT) -> LoadedModel:
        """The model as one of the layers that `spec` names, all of one size.

        Those that `all` leaves out are named. Raises UsageError as `select_alike` does.
        """
        decoder = self.decoder.of_layers(spec, self.identity.model_id)
        others = sorted({*self.decoder.layers} - {*decoder.layers})
        if others and spec.strip() == "all":
            reporter.note(
                f"of another size than most, and left out: {layers_text(others)} of "
                f"{self.identity.model_id} (--layers {format_layers(others)} measures what is left "
                "out; give it an --output of its own)."
            )
        return replace(self, decoder=decoder)

    def provenance(self) -> dict[str, Any]:
        """The fields of `kscli.artifacts.About` that every file of this model shares."""
        return {
            **asdict(self.identity),
            "hook": self.decoder.hook,
            "d_m": self.decoder.d_m,
            "n_experts": self.decoder.n_experts or None,
            "n_layers": self.decoder.n_layers,
            "parameters": self.decoder.parameters,
            "active_parameters": self.decoder.active_parameters,
            "dtype": self.dtype,
            "device": self.device,
            "special_tokens": self.special_tokens,
        }


def load_model(
    options: ModelOptions,
    reporter: Reporter = SILENT,
    located: LocatedModel | None = None,
    *,
    spread: MemorySplit | None = None,
) -> LoadedModel:
    """Load the model that `options` names, on its device and in its dtype, without gradients.

    An adapter that was located with it is merged. `located` saves finding its files again; with
    `spread` the model is laid over all devices, and over the host's memory where these are not
    enough (True: all that is free). Raises ModelError when it cannot be read, is not a dense causal
    decoder, or lacks weights, and as `merge_adapter` does.
    """
    from kscli.models.adapters import merge_adapter
    from kscli.models.forward import Decoder
    from kscli.resources import resolve_device

    device = resolve_device(options.device)
    dtype = dtype_of(options, device)
    located = located or locate_model(options, reporter)
    with quiet_transformers(), gguf_read_once(located):
        config = load_config(located, options)
        model, has_head = _load_weights(
            located, config, options, _device_arguments(device, spread), dtype
        )
        if located.adapter:
            model = merge_adapter(model, located.adapter, located.identity.model_id, reporter)
        tokenizer = load_tokenizer(located, options)
    located.require_unchanged()
    text = config.get_text_config()
    decoder = Decoder(model, *sizes_of(config))
    return LoadedModel(
        identity=located.identity,
        decoder=decoder,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        positions=positions_of(text),
        boundary=boundary_of(text),
        has_head=has_head,
        files=located.files,
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

    with model_errors(located), _without_adapter(located) as base:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=None if options.allow_pickle or located.gguf else True,
            output_loading_info=True,
            **device,
            **reading(base, options),
        )
    model, info = loaded
    if not device.get("device_map"):
        _leave_the_files(model)
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


@contextmanager
def _without_adapter(located: LocatedModel) -> Iterator[LocatedModel]:
    """The model in a folder of links that leaves out the adapter beside it, where there is one.

    Where peft is installed, transformers would add an adapter of the folder by itself.
    """
    if located.adapter != located.folder:
        yield located
        return
    with TemporaryDirectory(prefix="kscli-") as folder:
        for path in located.folder.iterdir():
            if path.name != ADAPTER:
                Path(folder, path.name).symlink_to(path.absolute())
        yield replace(located, folder=Path(folder))


def _leave_the_files(model: torch.nn.Module) -> None:
    """Copy weights in the host's memory, one by one.

    They may lie in a mapped file: a change of the file would be one of theirs, and where it is cut
    off the system would end the process.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def load_tokenizer(located: LocatedModel, options: ModelOptions) -> Any:
    """The model's tokenizer, which truncates nothing by itself; raises ModelError without one."""
    from transformers import AutoTokenizer

    with model_errors(located):
        tokenizer = AutoTokenizer.from_pretrained(**reading(located, options))
    if not tokenizer("The Tower of London, 1066", add_special_tokens=False)["input_ids"]:
        # What transformers makes up where a folder has no files of a tokenizer.
        raise ModelError(
            f"{located.identity.model_id} has no tokenizer that reads text; put that of its base "
            "model beside its weights (tokenizer.json and what goes with it)."
        )
    # Documents are truncated by kscli; a longer one is no news to the user.
    tokenizer.model_max_length = int(1e30)
    tokenizer.truncation_side = "right"
    return tokenizer


def read_tokenizer(options: ModelOptions, reporter: Reporter = SILENT) -> tuple[Any, int]:
    """A model's tokenizer and the default length of a document, without the model's weights.

    Raises ModelError as `load_model` does, as far as these two are concerned.
    """
    options = replace(options, weights=False)
    located = locate_model(options, reporter)
    with quiet_transformers(), gguf_read_once(located):
        config = load_config(located, options)
        tokenizer = load_tokenizer(located, options)
    return tokenizer, default_length(positions_of(config.get_text_config()))


def _device_arguments(device: str, spread: MemorySplit | None) -> dict[str, Any]:
    if spread:
        from kscli.resources import free_on_devices, measure_resources

        free, host = free_on_devices(device), measure_resources(device).host_memory
        return {"device_map": "auto", "max_memory": spread.for_weights(free, host)}
    return {} if device == "cpu" else {"device_map": {"": device}}
