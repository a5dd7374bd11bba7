"""C of one layer as a file of its own, and cov.h5 put together from such files.

A large model's cov.h5 is passed on layer by layer (`kscli.hub.sharing`). Such a file is a cov.h5 of
one layer. Put together again, all layers are the file that they came from, by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kscli.artifacts import CovarianceAbout, CovarianceFile, write_artifact
from kscli.errors import ArtifactError
from kscli.layers import format_layers
from kscli.reporter import Task


def write_layer(cov: CovarianceFile, layer: int, path: Path) -> None:
    """Write C of one layer to `path`, with all that cov.h5 says of how it was measured."""
    about = _of_layers(cov.about, format_layers([layer]))
    with write_artifact(path, "cov", about, force=True, made=cov.stamp) as writer:
        writer.layers([layer])
        writer.write("count", cov.count)
        for name, values in cov.settling.items():
            writer.write(name, values)
        for name, values in cov.stored_layer(layer).items():
            writer.put(name, 0, values)


def join_layers(
    path: Path,
    layers: Sequence[int],
    file_of: Callable[[int], Path],
    source: dict[str, str],
    spelled: str,
    task: Task,
) -> None:
    """Write to `path` the cov.h5 of some layers, whose files `file_of` gives one after the other.

    `source` names where they come from, for `inputs`; `spelled` is what the recipe says of layers.
    Raises ArtifactError where a file was changed, is not of its layer, or differs from the first in
    anything but its layer.
    """
    with CovarianceFile(file_of(layers[0])) as first:
        about = replace(_of_layers(first.about, spelled), inputs=first.about.inputs | source)
        with write_artifact(path, "cov", about, force=True, made=first.stamp) as writer:
            writer.layers(layers)
            writer.write("count", first.count)
            for name, values in first.settling.items():
                writer.write(name, values)
            for index, layer in enumerate(layers):
                with CovarianceFile(file_of(layer)) if index else nullcontext(first) as part:
                    _require_alike(first, part, layer)
                    for name, values in part.stored_layer(layer).items():
                        writer.put(name, index, values)
                task.advance()


def _of_layers(about: CovarianceAbout, spelled: str) -> CovarianceAbout:
    """What a file of other layers of the same run says; an imported one's recipe names none."""
    if "layers" not in about.recipe:
        return about
    return replace(about, recipe={**about.recipe, "layers": spelled})


def _require_alike(first: CovarianceFile, part: CovarianceFile, layer: int) -> None:
    if part.layers != (layer,):
        raise ArtifactError(
            f"{part.path} holds layers {format_layers(part.layers)}, where layer {layer} alone is "
            "expected."
        )
    mine, theirs = _compared(first), _compared(part)
    for name in mine | theirs:
        if mine.get(name) != theirs.get(name):
            raise ArtifactError(
                f"{first.path} and {part.path} differ in {name}: they are not of one run."
            )


def _compared(part: CovarianceFile) -> dict[str, Any]:
    """All that files of one run have in common."""
    about = asdict(_of_layers(part.about, "all"))
    settling = {name: values.tobytes() for name, values in part.settling.items()}
    return {**about, "count": part.count, "created": part.stamp.created, **settling}
