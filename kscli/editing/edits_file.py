"""edits/METHOD-LAYERS-SEED.h5: a run of edits, what was predicted of each and what came of it.

The same file, not yet finished, is what a run that was stopped goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import (
    BOOLEAN,
    INTEGER,
    REAL,
    TEXT,
    FactsFile,
    PMatrixFile,
    Provenance,
    Schema,
    write_artifact,
)

# What is known of every edit; of every edit and fact; of every edit and each of the facts that
# it was predicted to move most; of every pass over all facts.
_OF_EDIT: Schema = {
    "edited": (INTEGER,),
    "target_new": (TEXT,),
    **dict.fromkeys(("delta_norm", "linear_error", "live_error", "weight_change"), (REAL,)),
    **{
        f"{quantity}_{target}_{when}": (REAL if quantity == "logprob" else INTEGER,)
        for quantity in ("logprob", "rank")
        for target in ("true", "new")
        for when in ("before", "previous", "after")
    },
    **dict.fromkeys(("p", "whitened_cosine", "cosine", "gradient_cosine"), (REAL, "m")),
    **dict.fromkeys(("predicted", "measured", "measured_live", "difference"), (REAL, "m")),
    "moved_index": (INTEGER, "moved"),
    **{
        f"moved_logprob_{target}_{when}": (REAL, "moved")
        for target in ("true", "new")
        for when in ("before", "previous", "after")
    },
    "moved_answer_before": (TEXT, "moved"),
    "moved_answer_after": (TEXT, "moved"),
}
_OF_PASS: Schema = {
    "step": (INTEGER,),
    "perplexity": (REAL,),
    "logprob_true": (REAL, "m"),
    "rank_true": (INTEGER, "m"),
    "answer_changed": (BOOLEAN, "m"),
    "logprob_new": (REAL, "planned"),
    "rank_new": (INTEGER, "planned"),
}
_OF_LAYER: Schema = {"delta": (REAL, "edit", "d"), "direction": (REAL, "edit", "d_m")}


@dataclass
class EditLog:
    """What a run has found so far: a list over edits or passes for every dataset of the file.

    `delta` and `direction` of an edit are (layer, d) and (layer, d_m). `kept_out` are the edits
    that were not made, each with its number among those planned, from 0, its fact's index, its
    new target and the reason.
    """

    known: NDArray[np.bool_]
    of_edit: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in (*_OF_EDIT, *_OF_LAYER)}
    )
    of_pass: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _OF_PASS})
    kept_out: list[tuple[int, int, str, str]] = field(default_factory=list)

    @property
    def made(self) -> int:
        """How many edits were made."""
        return len(self.of_edit["edited"])

    @property
    def tried(self) -> int:
        """How many edits were made or kept out."""
        return self.made + len(self.kept_out)

    def add_edit(self, record: Mapping[str, Any]) -> None:
        """Add all that is known of one edit."""
        for name, values in self.of_edit.items():
            values.append(record[name])

    def add_pass(self, record: Mapping[str, Any]) -> None:
        """Add all that is known of one pass."""
        for name, values in self.of_pass.items():
            values.append(record[name])


class EditsFile(FactsFile):
    """A run of n edits of m facts' model, measured in s passes over all facts; read-only.

    `edited` (n,) are indexes into `facts`, `target_new` (n,) what was written. `delta`
    (n, layer, d) and `direction` (n, layer, d_m) give the change of a layer's W after edit i,
    the sum over edits up to i of delta direction^T. `p`, `whitened_cosine`, `cosine` and
    `gradient_cosine` (n, m) are the edited fact's rows at the first edited layer.

    `predicted` and `measured` (n, m) are |Delta_j| after each edit, `difference` the length of
    what parts the two; Delta is since the fact's own edit for those edited already (equation
    15), else since the clean model (equation 11). `linear_error` (n,) is the largest difference by
    the largest prediction. `measured_live` (n, m) and `live_error` (n,) are the same of the live
    model's MLP output: of a whole forward pass where a pass was made, else of the edited
    down-projection at the live keys, which no edit of its own layer changes. Predictions and live
    outputs are NaN for memit, which equations 11 and 15 do not describe.

    `logprob_`, `rank_` + `true_`, `new_` + `before`, `previous`, `after` (n,): the edited fact's
    own targets in the clean model, before this edit, and after it. `moved_...` (n, k): the same
    of the k facts with the largest |p|, `moved_index`, for their own target and the edit's.

    A pass was made after `step` (s,) edits: `logprob_true`, `rank_true`, `answer_changed` (s, m)
    of every fact; `logprob_new`, `rank_new` (s, planned) of every edit's new target after its
    own prompt, made or not; `perplexity` (s,), NaN without held-out text. `known` (m,): the clean
    model's greedy answer is the fact's target.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "edits")

    def schema(self) -> Schema:
        """The datasets of a run, beside its facts."""
        return {
            **super().schema(),
            **{name: (kind, "edit", *axes) for name, (kind, *axes) in _OF_EDIT.items()},
            **{name: (kind, "pass", *axes) for name, (kind, *axes) in _OF_PASS.items()},
            **{name: (kind, "layer", *axes) for name, (kind, *axes) in _OF_LAYER.items()},
            "known": (BOOLEAN, "m"),
            "kept_out/number": (INTEGER, "kept out"),
            "kept_out/fact": (INTEGER, "kept out"),
            "kept_out/target_new": (TEXT, "kept out"),
            "kept_out/reason": (TEXT, "kept out"),
        }

    @property
    def edits(self) -> int:
        """How many edits were made."""
        return len(self.values("edited"))

    def values(self, name: str) -> NDArray[Any]:
        """A dataset by its name; `delta` and `direction` with the edit as first axis."""
        with self._reading():
            dataset = self._dataset(name)
            if self.schema()[name][0] == TEXT:
                return np.asarray(dataset.asstr()[()], dtype=object)
            found = np.asarray(dataset[()])
        return found.swapaxes(0, 1) if name in _OF_LAYER else found

    def log(self) -> EditLog:
        """The run so far, to go on from."""
        log = EditLog(self.values("known"))
        for columns in (log.of_edit, log.of_pass):
            for name in columns:
                columns[name] = list(self.values(name))
        kept = [self.values(f"kept_out/{name}") for name in ("number", "fact")]
        said = [self.values(f"kept_out/{name}") for name in ("target_new", "reason")]
        log.kept_out = [
            (int(number), int(fact), str(target), str(reason))
            for number, fact, target, reason in zip(*kept, *said, strict=True)
        ]
        return log

    def objects(self) -> list[dict[str, Any]]:
        """The run as plain objects, one an edit, numbered from 1."""
        columns = {name: self.values(name) for name in _OF_EDIT}
        # Numbers as JSON has them; what is an array still is one.
        plain = {name: values.tolist() for name, values in columns.items() if values.ndim == 1}
        rows = [
            {name: (plain.get(name, values))[index] for name, values in columns.items()}
            for index in range(self.edits)
        ]
        return [self._object(number, row) for number, row in enumerate(rows, 1)]

    def _object(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        index = int(row["edited"])
        fact = self.facts[index]
        # Facts of the same text are one fact.
        others = row["p"][[other.text != fact.text for other in self.facts]]
        return {
            "edit": number,
            "method": self.attributes["method"],
            "layers": list(self.layers),
            "fact": index,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "target_true": fact.target,
            "target_new": row["target_new"],
            "p_max_other": float(others[np.abs(others).argmax()]) if len(others) else None,
            "delta_norm": row["delta_norm"],
            **{
                f"prob_{target}_{when}": math.exp(row[f"logprob_{target}_{when}"])
                for target in ("true", "new")
                for when in ("before", "previous", "after")
            },
            **{
                f"rank_{target}_{when}": row[f"rank_{target}_{when}"]
                for target in ("true", "new")
                for when in ("before", "previous", "after")
            },
            "linear_error": row["linear_error"],
            "live_error": row["live_error"],
            "weight_change": row["weight_change"],
            "moved": [self._moved(row, place) for place in range(len(row["moved_index"]))],
        }

    def _moved(self, row: Mapping[str, Any], place: int) -> dict[str, Any]:
        index = int(row["moved_index"][place])
        fact = self.facts[index]
        answers = row["moved_answer_before"][place], row["moved_answer_after"][place]
        return {
            "fact": index,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "target": fact.target,
            "p": float(row["p"][index]),
            "predicted": float(row["predicted"][index]),
            "measured": float(row["measured"][index]),
            **{
                f"logprob_{target}_{when}": float(row[f"moved_logprob_{target}_{when}"][place])
                for target in ("true", "new")
                for when in ("before", "previous", "after")
            },
            "answer_before": answers[0],
            "answer_after": answers[1],
            "answer_changed": bool(answers[0] != answers[1]),
        }


def write_edits(
    path: Path, log: EditLog, layers: Sequence[int], pm: PMatrixFile, provenance: Provenance
) -> None:
    """Write the run so far to `path`, replacing what is there."""
    with write_artifact(path, "edits", provenance, force=True) as writer:
        writer.layers(layers)
        writer.facts(pm.facts)
        writer.array("token_id", pm.token_id)
        writer.array("position", pm.position)
        writer.array("known", log.known)
        for schema, columns in ((_OF_EDIT, log.of_edit), (_OF_PASS, log.of_pass)):
            for name, (kind, *_) in schema.items():
                (writer.texts if kind == TEXT else writer.array)(name, columns[name])
        for name in _OF_LAYER:
            values = np.stack(log.of_edit[name], axis=1)
            writer.over_layers(name, values.shape[1:], np.float64)
            for index in range(len(layers)):
                writer.put(name, index, values[index])
        for column, name in enumerate(("number", "fact")):
            numbers = [row[column] for row in log.kept_out]
            writer.array(f"kept_out/{name}", np.array(numbers, dtype=np.int64))
        for column, name in enumerate(("target_new", "reason"), 2):
            writer.texts(f"kept_out/{name}", [row[column] for row in log.kept_out])
