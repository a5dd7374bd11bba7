"""P of every expert alone: which facts reach it, and how they share it.

P_e[i, j] = k_i^T C_e^-1 k_j / k_i^T C_e^-1 k_i over the facts that are routed to expert e, with
keys multiplied by their gates. P of the layer is P[i, j] = sum_e w_ie P_e[i, j], where w_ie is the
share of the leverage k_i^T C^-1 k_i that lies in e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.statistics import STATISTICS, off_diagonal
from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.sources import require_made_from
from kscli.errors import UsageError
from kscli.pmatrix import Superposition, superpositions_by_expert
from kscli.reporter import SILENT, Reporter

SHARED = "shared"
DESCRIBED = ("std", "kurtosis", "max")


def expert_rows(
    pmatrix: PMatrixFile, layers: Sequence[int], reporter: Reporter = SILENT
) -> list[dict[str, Any]]:
    """One row a layer and expert, of the cov.h5 and keys.h5 that lie beside pmatrix.h5.

    Shared experts are the row `shared`, which all tokens and facts reach. Statistics of P_e are NaN
    where fewer than two facts are routed to the expert. Raises UsageError of a dense model,
    ArtifactError where the files are not of one measurement or lack a layer.
    """
    if not pmatrix.about.n_experts:
        raise UsageError(f"{pmatrix.path} is of a dense model; --experts is for one with experts.")
    with (
        CovarianceFile(pmatrix.path.with_name("cov.h5")) as cov,
        KeysFile(pmatrix.path.with_name("keys.h5")) as keys,
        reporter.task("experts", len(layers), unit="layers") as task,
    ):
        require_made_from(pmatrix, {"cov": cov, "keys": keys})
        rows = []
        for layer in layers:
            by_expert = superpositions_by_expert(cov, keys, layer, pmatrix.about.ridge)
            of_facts, leverage = dict(by_expert), pmatrix.leverage(layer)
            tokens = [*cov.routed(layer).tolist(), cov.count]
            for number in range(len(cov.widths)):
                row = {
                    "model": pmatrix.model,
                    "layer": layer,
                    "expert": number if number < pmatrix.about.n_experts else SHARED,
                    "tokens": tokens[number],
                    "token_share": tokens[number] / cov.count,
                }
                rows.append(row | _described(of_facts.get(number), leverage))
            task.advance()
    return rows


def _described(
    of_expert: tuple[Superposition, NDArray[np.intp]] | None, leverage: NDArray[np.float64]
) -> dict[str, Any]:
    """An expert's facts, their mean share of the `leverage` (m,), and P_e of these facts."""
    if of_expert is None:
        return {"facts": 0, "leverage_share": float("nan"), **dict.fromkeys(DESCRIBED, np.nan)}
    found, facts = of_expert
    entries = off_diagonal(found.P)
    return {
        "facts": len(facts),
        "leverage_share": float((found.leverage / leverage[facts]).mean()),
        **{name: STATISTICS[name](entries) for name in DESCRIBED},
    }
