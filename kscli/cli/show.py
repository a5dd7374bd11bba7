"""`kscli show`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import Format, print_json, print_rows, terminal_width
from kscli.tables import Column


def show(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|MODEL",
            help="Artifacts, or models whose artifacts are shown.",
            show_default="tiny",
        ),
    ] = None,
    model: options.Models = None,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Say what an artifact holds and where it came from.

    Where it has one number a layer, such as a residual, the least and the largest are named.

    Examples:
      kscli show artifacts/gpt2-small/cov.h5
      kscli show gpt2-small -f json | jq '.[] | {path, corpus, documents}'
    """
    from kscli.artifacts import SCHEMAS, Artifact
    from kscli.layers import format_layers

    descriptions = []
    named = [*(what or []), *(model or [])] or [options.DEFAULT_MODEL]
    for path in [path for name in named for path in _paths(name, directory)]:
        with Artifact(path) as artifact:
            descriptions.append(
                {
                    "path": str(path),
                    "holds": SCHEMAS[artifact.kind].title,
                    "layers": format_layers(artifact.layers),
                    **_attributes(artifact.attributes),
                    "datasets": artifact.datasets(),
                }
            )
    if output_format is Format.json:
        print_json(descriptions)
        return
    rows = [
        {"path": description["path"], "attribute": name, "value": value}
        for description in descriptions
        for name, value in _flat(description)
    ]
    if output_format in (Format.csv, Format.tsv):
        print_rows(rows, [], output_format)
        return
    if output_format is Format.table and terminal_width():
        rows = [{**row, "value": _shortened(row["value"])} for row in rows]
    for description in descriptions:
        own = [row for row in rows if row["path"] == description["path"]]
        print_rows(own, [Column("attribute"), Column("value")], output_format)


def _paths(name: str, directory: Path) -> list[Path]:
    from kscli.errors import MissingError
    from kscli.places import Places

    path = Path(name)
    if path.suffix == ".h5" or (path.is_file() and path.suffix != ".gguf"):
        return [path]
    folder = Places(directory, name).folder
    found = sorted(folder.glob("*.h5"))
    if not found:
        raise MissingError(folder / "pmatrix.h5", "pmatrix")
    return found


def _attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, those that hold JSON as what they hold."""
    return {
        name: json.loads(value) if name in ("inputs", "recipe") else value
        for name, value in sorted(attributes.items())
    }


def _flat(description: dict[str, Any]) -> list[tuple[str, str]]:
    """The description as lines for a table; the recipe repeats the other attributes."""
    lines: list[tuple[str, str]] = []
    for name, value in description.items():
        if name == "datasets":
            lines += [(f"/{dataset}", _dataset(about)) for dataset, about in value.items()]
        elif name == "inputs":
            lines += [(f"input {kind}", fingerprint) for kind, fingerprint in value.items()]
        elif name != "recipe":
            lines.append((name, str(value)))
    return lines


def _shortened(text: str) -> str:
    """A text with the first 32 digits of longer digests, for which a terminal has no room."""
    return re.sub(r"([0-9a-f]{32})[0-9a-f]+", r"\1...", text)


def _dataset(about: dict[str, Any]) -> str:
    """Shape and type of a dataset and, of one number a layer, the least and the largest."""
    text = f"{tuple(about['shape'])} {about['dtype']}"
    if "least" not in about:
        return text
    least, largest = about["least"], about["largest"]
    if math.isnan(least):
        return f"{text}, undefined"
    return f"{text}, {least:.4g}" + ("" if least == largest else f" to {largest:.4g}")
