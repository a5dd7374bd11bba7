"""The card of a repository of artifacts: its README.md, of which kscli writes one section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kscli.escaping import escaped
from kscli.hub.holdings import KINDS, WHOLE, Holding, path_of, title_of
from kscli.layers import format_layers

BEGIN = "<!-- The text from here on is written by `kscli push`. -->"
END = "<!-- The text up to here is written by `kscli push`. -->"

_HEAD = """---
viewer: false
tags:
- kscli
- knowledge-editing
---
# {repository}

"""
_ABOUT = """These files were measured with kscli on the models below. A key k is the input of a
layer's MLP down-projection. `cov` holds its second moment C = E[k k^T] over a text, not centred,
layer by layer: what ROME, MEMIT and their kin call `mom2`. `keys` holds the keys of facts.
`pmatrix` holds p(i, j) = k_i^T C^-1 k_j / k_i^T C^-1 k_i, which says how far an edit of fact i
moves fact j. `stats` holds statistics of p. All are HDF5. Their attributes say with which command,
when, on which weights and on which text they were made. `kscli.json` beside them has the SHA-256 of
each.
"""
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|#~&]")


def card(old: str, repository: str, models: Mapping[str, Mapping[str, Holding]]) -> str:
    """The card with kscli's section about `models`; what others wrote around it stays."""
    section = "\n".join([BEGIN, _ABOUT, *(_model(repository, *each) for each in models.items())])
    section += f"{END}\n"
    before, begin, rest = old.partition(BEGIN)
    if begin:
        return before + section + rest.partition(f"{END}\n")[2]
    return (
        f"{old.rstrip()}\n\n{section}"
        if old.strip()
        else _HEAD.format(repository=repository) + section
    )


def _model(repository: str, model: str, held: Mapping[str, Holding]) -> str:
    """The part of the section about one model."""
    lines = [f"## {_plain(model)}", "", "```bash", f"kscli pull {repository} -m {model}"]
    if "cov" in held and len(held["cov"].parts) > 1:
        first = min(map(int, held["cov"].parts))
        lines.append(f"kscli pull {repository} -m {model} --only cov --layers {first}")
    lines += ["```", ""]
    for kind in filter(held.__contains__, KINDS):
        rows = _rows(model, kind, held[kind])
        lines += [f"### {title_of(kind)}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_plain(value)} |" for name, value in rows.items()] + [""]
    return "\n".join(lines)


def _rows(model: str, kind: str, holding: Holding) -> dict[str, Any]:
    """What the card says of a kind, by name."""
    said = holding.said
    whole = WHOLE in holding.parts
    here = holding.layers if whole else format_layers(list(map(int, holding.parts)))
    size = sum(part.size for part in holding.parts.values())
    rows = {
        "file": path_of(model, kind, WHOLE) if whole else f"{model}/{kind}/layer-NNNNN.h5",
        "size": f"{size:,} bytes",
        "layers": holding.layers
        if here in (WHOLE, holding.layers)
        else f"{here} of {holding.layers}",
        "model": _joined(said, "model_id", "revision"),
        "weights": said.get("weights"),
        "keys": f"the input of {said.get('hook')}, d_m = {said.get('d_m')}",
        "text": _joined(said, "corpus", "corpus_identity"),
        "tokens": _number(said, "tokens"),
        "documents": _number(said, "documents"),
        "cut at": _number(said, "max_length", " tokens"),
        "note": said.get("note"),
        "facts": _joined(said, "facts_name", "facts_identity"),
        "numbers": said.get("dtype"),
        "made": f"{said.get('created')}, by kscli {said.get('kscli_version')}",
        "fingerprint": holding.fingerprint,
    }
    return {name: value for name, value in rows.items() if value}


def _joined(said: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(said[name]) for name in names if said.get(name))


def _number(said: Mapping[str, Any], name: str, unit: str = "") -> str:
    value = said.get(name)
    return f"{value:,}{unit}" if isinstance(value, int) else str(value or "")


def _plain(value: Any) -> str:
    """Text that stands in Markdown for itself, on one line."""
    return _MARKUP.sub(r"\\\g<0>", escaped(str(value)))
