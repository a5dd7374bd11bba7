"""push and pull: a model's artifacts into a data set repository of the Hub, and out of it.

What is pushed is checked against its seal first. What is pulled is checked before it is put in
place: the SHA-256 that the index gives, the seal, that the parts are of one run, and that they are
of the model that was asked for.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kscli.artifacts import IDENTITY, Artifact, CovarianceFile, Kind
from kscli.errors import ArtifactError, UsageError
from kscli.files import replace_file
from kscli.hub.card import card
from kscli.hub.holdings import (
    INDEX,
    KINDS,
    WHOLE,
    Holding,
    Part,
    holding_of,
    index_path,
    path_of,
    read_index,
    write_index,
)
from kscli.hub.repository import Repository, Upload, find_repository, make_repository
from kscli.layers import format_layers, select_layers
from kscli.models.aliases import classify, find_alias, slug
from kscli.places import Places
from kscli.reporter import SILENT, Reporter, Task
from kscli.second_moment.single_layers import join_layers, write_layer

CARD = "README.md"


@dataclass(frozen=True)
class Selection:
    """Which artifacts: their kinds (none named: all that there are), and the layers of C."""

    kinds: tuple[str, ...] = ()
    layers: str = "all"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"--only {kind} is unknown; known are {', '.join(KINDS)}.")

    def of(self, there: Sequence[Kind]) -> tuple[Kind, ...]:
        """The kinds that are asked for, or all that are there."""
        return tuple(kind for kind in KINDS if kind in (self.kinds or there))


# Push


def push(
    name: str,
    places: Places,
    selection: Selection,
    *,
    private: bool = False,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> str | None:
    """Put a model's artifacts into the repository; the commit, or None where all was there.

    Raises ArtifactError where an artifact is missing or was changed, where the repository holds
    another one in its place and `force` is not set, and where the Hub does not take it.
    """
    kinds = selection.of([kind for kind in KINDS if places.path(kind).exists()])
    if not kinds:
        raise ArtifactError(
            f"{places.folder} holds no artifact; `kscli run --model {places.model}` makes them."
        )
    model = places.folder.name
    with ExitStack() as stack:
        files = {kind: stack.enter_context(_opened(places.path(kind), kind)) for kind in kinds}
        layers = _layers_of(files, selection)
        repository = make_repository(name, private=private)
        held = _held(repository, model)
        for kind, file in files.items():
            if kind in held and held[kind].fingerprint != file.fingerprint and not force:
                raise ArtifactError(
                    f"{name} holds another {kind} of {model}; add --force to replace it."
                )
        upload = Upload(repository)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kscli-push-")))
        now = dict(held)
        for kind, file in files.items():
            now[kind] = _send(upload, model, kind, file, layers, held.get(kind), folder, reporter)
        if now == held:
            return None
        for path in _replaced(model, held, now):
            upload.delete(path)
        upload.add(index_path(model), write_index(now).encode())
        old = repository.read(CARD) if CARD in repository.paths else ""
        others = {other: _held(repository, other) for other in _models(repository)}
        models = dict(sorted({**others, model: now}.items()))
        upload.add(CARD, card(old, name, models).encode())
        return upload.commit(f"{', '.join(kinds)} of {model}, by kscli")


def _opened(path: Path, kind: Kind) -> Artifact:
    """An artifact whose parts that are sent as they are have been compared with its seal."""
    file = CovarianceFile(path) if kind == "cov" else Artifact(path, kind)
    if kind != "cov":
        file.check()
    return file


def _layers_of(files: Mapping[Kind, Artifact], selection: Selection) -> tuple[int, ...]:
    """The layers of C that are asked for."""
    if "cov" in files:
        return select_layers(selection.layers, files["cov"].layers, str(files["cov"].path))
    if selection.layers != "all":
        raise UsageError("--layers is of C, and no cov.h5 is pushed; leave it out.")
    return ()


def _send(
    upload: Upload,
    model: str,
    kind: Kind,
    file: Artifact,
    layers: Sequence[int],
    held: Holding | None,
    folder: Path,
    reporter: Reporter,
) -> Holding:
    """Send the parts of an artifact that are not in the repository; all that is there then."""
    same = held if held and held.fingerprint == file.fingerprint else None
    parts = dict(same.parts) if same else {}
    if isinstance(file, CovarianceFile):
        left = [layer for layer in layers if str(layer) not in parts]
        with reporter.task("sending C", len(left), unit="layers") as task:
            for layer in left:
                path = folder / f"layer-{layer}.h5"
                write_layer(file, layer, path)
                parts[str(layer)] = _part(path)
                if upload.add(path_of(model, kind, str(layer)), path):
                    path.unlink()
                task.advance()
    elif not parts:
        parts[WHOLE] = _part(file.path)
        upload.add(path_of(model, kind, WHOLE), file.path)
    return holding_of(file, parts)


def _part(path: Path) -> Part:
    with path.open("rb") as file:
        return Part(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _replaced(model: str, held: Mapping[str, Holding], now: Mapping[str, Holding]) -> list[str]:
    """The paths of layers of an earlier C that the new one does not have."""
    gone = set(held["cov"].parts) - set(now["cov"].parts) if "cov" in held else set()
    return [path_of(model, "cov", part) for part in sorted(gone)]


# Pull


def pull(
    name: str,
    root: Path,
    model: str | None,
    selection: Selection,
    *,
    revision: str | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> list[tuple[Path, Holding]]:
    """Put artifacts of the repository into the model's folder under `root`; those that were put.

    Without `model` it is the only one that the repository holds. Nothing is put in place unless
    all is sound. Raises ArtifactError where the repository lacks what was asked for, where a file
    is in the way and `force` is not set, and where one is not what it should be.
    """
    repository = find_repository(name, revision)
    places = Places(root, model or _only_model(repository))
    holder = _holder(repository, places.model)
    held = _held(repository, holder)
    kinds = selection.of([kind for kind in KINDS if kind in held])
    missing = [kind for kind in kinds if kind not in held]
    if missing:
        there = ", ".join(held)
        raise ArtifactError(f"{name} holds no {missing[0]} of {holder}; it holds {there}.")
    layers = _layers_held(held, selection, name) if "cov" in kinds else ()
    wanted = []
    for kind in kinds:
        if _is_there(places.path(kind), kind, held[kind], layers):
            reporter.note(f"{places.path(kind)} is there already.")
        else:
            wanted.append(kind)
    size = sum(part.size for kind in wanted for part in _parts(held[kind], layers).values())
    with ExitStack() as stack:
        temporary = {
            kind: stack.enter_context(replace_file(places.path(kind), force=force))
            for kind in wanted
        }
        task = stack.enter_context(reporter.task(f"fetching {holder}", size, unit="B"))
        fetched = _Fetched(repository, holder, held, task)
        for kind, path in temporary.items():
            _put(fetched, kind, path, layers)
        _check_identity(name, places, temporary)
    return [(places.path(kind), held[kind]) for kind in wanted]


@dataclass(frozen=True)
class _Fetched:
    """The files of a model in a repository, each compared with its SHA-256."""

    repository: Repository
    model: str
    held: Mapping[str, Holding]
    task: Task

    def __call__(self, kind: Kind, part: str) -> Path:
        expected = self.held[kind].parts[part]
        name = path_of(self.model, kind, part)
        path = self.repository.fetch(name, self.task)
        if _part(path) != expected:
            raise ArtifactError(
                f"{name} of {self.repository.name} is not the file of SHA-256 "
                f"{expected.sha256} that its {INDEX} names; remove {path.resolve()} to fetch it "
                "again."
            )
        return path


def _put(fetched: _Fetched, kind: Kind, path: Path, layers: Sequence[int]) -> None:
    """Write an artifact to `path`, once its parts are found to be sound."""
    holding = fetched.held[kind]
    if kind == "cov":
        whole = format_layers(layers) == holding.layers
        source = {f"hf:{fetched.repository.name}": holding.fingerprint}
        spelled = holding.spelled if whole else format_layers(layers)
        file_of: Callable[[int], Path] = lambda layer: fetched("cov", str(layer))  # noqa: E731
        join_layers(path, layers, file_of, source, spelled, Task())
    else:
        whole = True
        with fetched(kind, WHOLE).open("rb") as source_file, path.open("wb") as target:
            while block := source_file.read(1 << 20):
                target.write(block)
    with Artifact(path, kind) as artifact:
        artifact.check()
        if whole and artifact.fingerprint != holding.fingerprint:
            raise ArtifactError(
                f"{kind} of {fetched.model} in {fetched.repository.name} has the fingerprint "
                f"{artifact.fingerprint}, where its {INDEX} says {holding.fingerprint}; tell who "
                "pushed it."
            )


def _check_identity(name: str, places: Places, pulled: Mapping[Kind, Path]) -> None:
    """Raise ArtifactError unless what was pulled is of the model, and goes with what is there."""
    wanted = _model_id(places.model)
    paths = {kind: pulled.get(kind, places.path(kind)) for kind in KINDS}
    abouts = {}
    for kind, path in paths.items():
        if path.exists():
            with Artifact(path, kind) as artifact:
                abouts[kind] = artifact.about
    for kind in pulled:
        if wanted not in (None, abouts[kind].model_id):
            raise ArtifactError(
                f"{kind} of {name} is of {abouts[kind].model_id}, and {places.model} is {wanted}."
            )
        for other, about in abouts.items():
            for field in IDENTITY:
                mine, theirs = getattr(abouts[kind], field), getattr(about, field)
                if None not in (mine, theirs) and mine != theirs:
                    where = f"that of {name}" if other in pulled else str(places.path(other))
                    raise ArtifactError(
                        f"{kind} of {name} and {other} ({where}) differ in {field} ({mine} and "
                        f"{theirs}): they are about different models; give another --dir."
                    )


def _model_id(model: str) -> str | None:
    """The id on the Hub of the model of that name; None where the name does not tell."""
    alias = find_alias(model)
    if alias is not None:
        return alias.hub_id or alias.name
    return model if "/" in model and classify(model) == "hub" else None


# What a repository holds


def _held(repository: Repository, model: str) -> dict[str, Holding]:
    """What the repository holds of a model, by kind; empty where it has no index of it."""
    path = index_path(model)
    if path not in repository.paths:
        return {}
    return read_index(repository.read(path), f"{path} of {repository.name}")


def _models(repository: Repository) -> list[str]:
    """The models of which the repository has an index."""
    folders = [path.split("/") for path in sorted(repository.paths)]
    return [parts[0] for parts in folders if len(parts) == 2 and parts[1] == INDEX]


def _holder(repository: Repository, model: str) -> str:
    """The folder of a model in the repository: by its name here, else by its id on the Hub."""
    models = _models(repository)
    if slug(model) in models:
        return slug(model)
    wanted = _model_id(model)
    for other in models:
        said = (holding.said for holding in _held(repository, other).values())
        if wanted and any(each.get("model_id") == wanted for each in said):
            return other
    raise ArtifactError(
        f"{repository.name} holds nothing of {model}; {_what_it_holds(repository)}."
    )


def _what_it_holds(repository: Repository) -> str:
    models = _models(repository)
    return f"it holds {', '.join(models)}" if models else "no kscli pushed to it"


def _only_model(repository: Repository) -> str:
    models = _models(repository)
    if len(models) != 1 or slug(models[0]) != models[0]:
        what = _what_it_holds(repository)
        raise ArtifactError(f"name the model of {repository.name} with --model: {what}.")
    return models[0]


def _layers_held(held: Mapping[str, Holding], selection: Selection, name: str) -> tuple[int, ...]:
    return select_layers(selection.layers, sorted(map(int, held["cov"].parts)), f"C in {name}")


def _parts(holding: Holding, layers: Sequence[int]) -> Mapping[str, Part]:
    """The parts that are wanted of a kind."""
    if WHOLE in holding.parts:
        return holding.parts
    return {str(layer): holding.parts[str(layer)] for layer in layers}


def _is_there(path: Path, kind: Kind, holding: Holding, layers: Sequence[int]) -> bool:
    """Whether what is wanted lies at `path` already."""
    try:
        with Artifact(path, kind) as artifact:
            known = (artifact.fingerprint, *artifact.about.inputs.values())
            wanted = artifact.layers == tuple(layers) if kind == "cov" else True
            return wanted and holding.fingerprint in known
    except ArtifactError:
        return False
