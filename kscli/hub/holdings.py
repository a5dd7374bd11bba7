"""What a repository of artifacts holds of a model: its index, `MODEL/kscli.json`.

    MODEL/cov/layer-00003.h5    C of one layer, a cov.h5 of its own
    MODEL/keys.h5, pmatrix.h5, stats.h5
    MODEL/kscli.json            what there is, with the SHA-256 of every file

C is kept layer by layer, so that one layer can be fetched without the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kscli.artifacts import SCHEMAS, Artifact, CovarianceFile, Kind
from kscli.errors import ArtifactError
from kscli.layers import format_layers

INDEX = "kscli.json"
FORMAT = 1
KINDS: tuple[Kind, ...] = ("cov", "keys", "pmatrix", "stats")
WHOLE = "all"  # the part of a kind that is one file

_SHA256 = re.compile("[0-9a-f]{64}")
# What the card says of a file.
_SAID = (
    "model_id",
    "revision",
    "weights",
    "hook",
    "d_m",
    "n_layers",
    "dtype",
    "corpus",
    "corpus_identity",
    "documents",
    "max_length",
    "note",
    "facts_name",
    "facts_identity",
    "kscli_version",
    "created",
)


@dataclass(frozen=True)
class Part:
    """A file of the repository."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Holding:
    """A kind of artifact: `parts` by their layer, as text, or by `WHOLE`.

    `fingerprint`, `layers` and `spelled` (what its recipe says of layers) are those of the file
    that was pushed, and `said` what it says of itself.
    """

    fingerprint: str
    layers: str
    spelled: str
    parts: Mapping[str, Part]
    said: Mapping[str, Any]


def holding_of(artifact: Artifact, parts: Mapping[str, Part]) -> Holding:
    """What the index says of an artifact whose parts are in the repository."""
    said = {name: artifact.attributes[name] for name in _SAID if name in artifact.attributes}
    if isinstance(artifact, CovarianceFile):
        said["tokens"] = artifact.count
    spelled = str(artifact.about.recipe.get("layers", ""))
    return Holding(artifact.fingerprint, format_layers(artifact.layers), spelled, dict(parts), said)


def path_of(model: str, kind: str, part: str) -> str:
    """Where a part of a kind lies in the repository."""
    return f"{model}/{kind}.h5" if part == WHOLE else f"{model}/{kind}/layer-{int(part):05d}.h5"


def index_path(model: str) -> str:
    """Where the index of a model lies in the repository."""
    return f"{model}/{INDEX}"


def write_index(held: Mapping[str, Holding]) -> str:
    """The text of an index."""
    holds = {kind: asdict(held[kind]) for kind in KINDS if kind in held}
    return json.dumps({"format": FORMAT, "holds": holds}, indent=1, ensure_ascii=False) + "\n"


def read_index(text: str, where: str) -> dict[str, Holding]:
    """The holdings that an index lists, by kind; raises ArtifactError naming `where`."""
    try:
        index = json.loads(text)
        if index["format"] != FORMAT:
            raise ArtifactError(f"{where} is of format {index['format']!r}; upgrade kscli.")
        return {
            kind: _holding(kind, held) for kind, held in index["holds"].items() if kind in KINDS
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged, or was not written by kscli.") from error


def _holding(kind: str, held: Mapping[str, Any]) -> Holding:
    parts = {}
    for name, part in held["parts"].items():
        of_layer = kind == "cov" and re.fullmatch(r"0|[1-9]\d{0,4}", name)
        if not (of_layer or (kind != "cov" and name == WHOLE)):
            raise ValueError(name)
        if not _SHA256.fullmatch(part["sha256"]) or not isinstance(part["size"], int):
            raise ValueError(part)
        parts[name] = Part(part["sha256"], part["size"])
    texts = held["fingerprint"], held["layers"], held["spelled"]
    if not parts or not all(isinstance(text, str) for text in texts):
        raise ValueError(held)
    return Holding(*texts, parts, dict(held["said"]))


def title_of(kind: str) -> str:
    """What a kind of artifact is, for people."""
    return SCHEMAS[kind].title
