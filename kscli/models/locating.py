"""From a name to a model's files on this disk: alias, Hub id, local folder or GGUF file.

Pickled weights are read, and remote code is run, only when asked for.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kscli.errors import ModelError, UsageError
from kscli.files import require_ordinary
from kscli.models.aliases import classify, close_aliases, find_alias, slug
from kscli.models.files import ADAPTER, ModelFiles, model_files
from kscli.models.fingerprint import fingerprint_files
from kscli.reporter import SILENT, Reporter
from kscli.resources import resolve_dtype


@dataclass(frozen=True)
class ModelOptions:
    """Which model, from where, and how it is to be run; without `weights` it is only planned.

    Then only its configuration and its tokenizer are fetched.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    merge_adapter: bool = False
    weights: bool = True


def dtype_of(options: ModelOptions, device: str) -> str:
    """The dtype that a model is run in on a device.

    `auto` is float32 for the embedded model, for which it takes no time to speak of; for others see
    `resolve_dtype`.
    """
    if options.dtype == "auto" and classify(options.model) == "embedded":
        return "float32"
    return resolve_dtype(options.dtype, device)


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree between two files that are used together; `model` is the slug.

    `weights` and `tokenizer` are fingerprints: a Hub commit, or hashes of the files. Weights into
    which an adapter is merged are `BASE+ADAPTER`.
    """

    model: str
    model_id: str
    revision: str
    weights: str
    tokenizer: str


@dataclass(frozen=True)
class LocatedModel:
    """A model's files on this disk, who it is, and the folder of an adapter to be merged."""

    folder: Path
    gguf: str | None
    identity: ModelIdentity
    files: tuple[Path, ...]
    states: tuple[tuple[int, ...], ...]
    adapter: Path | None = None

    def require_unchanged(self) -> None:
        """Raise ModelError where a file is not as it was when the identity was taken from it."""
        for path, state in zip(self.files, self.states, strict=True):
            if _state(path) != state:
                raise ModelError(
                    f"{path} changed while it was read; run the command again when nothing writes "
                    "to it any more."
                )


def _located(
    folder: Path, gguf: str | None, files: Iterable[Path], identify: Callable[[], ModelIdentity]
) -> LocatedModel:
    """The model of some files, whose state is noted before they are read to `identify` it."""
    files = tuple(files)
    states = tuple(map(_state, files))
    return LocatedModel(folder, gguf, identify(), files, states)


def _state(path: Path) -> tuple[int, ...]:
    """What of a file changes when it is written or replaced; empty where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def locate_model(options: ModelOptions, reporter: Reporter = SILENT) -> LocatedModel:
    """Find the model's files, downloading them when it lives on the Hub.

    With `merge_adapter` an adapter is found beside its base model, or alone, with the base model
    that it names. Raises ModelError when there are no files, or they are damaged or pickled and
    `allow_pickle` is not set, and for an adapter where peft is not installed.
    """
    kind = classify(options.model)
    name = slug(options.model)
    if options.merge_adapter:
        _require_peft(options.model, can_have_adapter=kind in ("hub", "folder"))
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

        return _locate_folder(MODEL_DIR, name, name, options, reporter)
    path = Path(options.model)
    return _locate_folder(path.expanduser(), name, str(path), options, reporter)


def _locate_on_hub(options: ModelOptions, name: str, reporter: Reporter) -> LocatedModel:
    from kscli.hub.models import fetch_model

    alias = find_alias(options.model)
    hub_id = alias.hub_id if alias and alias.hub_id else options.model
    revision = options.revision or (alias.revision if alias else None) or "main"
    folder = fetch_model(replace(options, model=hub_id, revision=revision), reporter)
    commit = f"commit:{folder.name}"
    identity = ModelIdentity(name, hub_id, revision, commit, commit)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    located = _located(folder, None, files, lambda: identity)
    if not options.merge_adapter:
        return located
    return _with_adapter(located, _files_of(folder, hub_id, options), options, reporter)


def _locate_gguf(path: Path, name: str) -> LocatedModel:
    require_ordinary(path, ModelError)
    if not path.exists():
        raise ModelError(f"there is no GGUF file {path}; give the path of one that is there.")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{path} is a GGUF file, and the package gguf is not installed: "
            "pip install 'kscli[gguf]'."
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.")

    def identify() -> ModelIdentity:
        whole = fingerprint_files([path])
        return ModelIdentity(name, str(path), "", whole, whole)

    return _located(path.parent, path.name, [path], identify)


def _locate_folder(
    folder: Path, name: str, model_id: str, options: ModelOptions, reporter: Reporter
) -> LocatedModel:
    if not folder.exists():
        near = close_aliases(folder.name)
        meant = f" Did you mean the alias {near[0]}?" if near else ""
        raise ModelError(
            f"there is no folder {folder}; give the path of a model's folder, an alias "
            f"(`kscli models` lists them) or a Hub id (OWNER/NAME).{meant}"
        )
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file; name the folder of a model, or a .gguf file.")
    files = _files_of(folder, str(folder), options)
    weights = [name for name in files.weights if not name.endswith(".json")]

    def identify() -> ModelIdentity:
        return ModelIdentity(
            model=name,
            model_id=model_id,
            revision="",
            weights=fingerprint_files(folder / name for name in [*files.config, *weights]),
            tokenizer=fingerprint_files(folder / name for name in files.tokenizer),
        )

    located = _located(folder, None, [folder / name for name in files.all], identify)
    return _with_adapter(located, files, options, reporter) if files.adapter else located


def _files_of(folder: Path, where: str, options: ModelOptions) -> ModelFiles:
    return model_files(
        [path.name for path in folder.iterdir() if path.is_file()],
        lambda name: (folder / name).read_text("utf-8"),
        where,
        options,
    )


def _with_adapter(
    found: LocatedModel, files: ModelFiles, options: ModelOptions, reporter: Reporter
) -> LocatedModel:
    """The model whose weights are those of a base model and of the adapter in `found.folder`.

    The base model lies there too, or is the one that the adapter names.
    """
    base = found if files.weights else _base_of(found, options, reporter)
    adapter = fingerprint_files(found.folder / name for name in files.adapter)
    identity = replace(
        found.identity,
        weights=f"{base.identity.weights}+{adapter}",
        tokenizer=base.identity.tokenizer,
    )
    return replace(
        base,
        identity=identity,
        files=base.files + found.files,
        states=base.states + found.states,
        adapter=found.folder,
    )


def _base_of(found: LocatedModel, options: ModelOptions, reporter: Reporter) -> LocatedModel:
    """The base model that an adapter names, of the revision that it names."""
    adapter = found.identity.model_id
    try:
        config = json.loads((found.folder / ADAPTER).read_text("utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{ADAPTER} of {adapter} is damaged; fetch it again.") from error
    if not name or not isinstance(name, str):
        raise ModelError(f"{ADAPTER} of {adapter} names no base model (base_model_name_or_path).")
    reporter.note(f"The adapter {adapter} is merged into {name}.")
    base = replace(
        options,
        model=name,
        revision=revision if classify(name) == "hub" else None,
        merge_adapter=False,
    )
    try:
        return locate_model(base, reporter)
    except ModelError as error:
        raise ModelError(f"The adapter {adapter} is one of the model {name}: {error}") from error


def _require_peft(model: str, *, can_have_adapter: bool) -> None:
    if not can_have_adapter:
        raise UsageError(f"{model} has no adapter; leave --merge-adapter out.")
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "--merge-adapter needs the package peft, which is not installed: "
            "pip install 'kscli[peft]'."
        )
