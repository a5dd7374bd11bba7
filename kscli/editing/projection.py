"""AlphaEdit's `null_space_project.pt`: the projections on null spaces of C, for its own code.

AlphaEdit's and EasyEdit's scripts load one float32 tensor (layers, d_m, d_m). Its i-th matrix is
Pi = U U^T of the i-th layer in their hyper-parameters, U the singular vectors of C whose singular
value is below `nullspace_threshold` (0.02).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kscli.artifacts import CovarianceFile
from kscli.editing.metrics import Cut, null_space
from kscli.errors import NumericsError
from kscli.files import replace_file, require_other, require_writable
from kscli.layers import select_layers
from kscli.reporter import SILENT, Reporter

FILE_NAME = "null_space_project.pt"


def export_projection(
    cov_path: Path,
    folder: Path,
    layers: str,
    cut: Cut,
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> tuple[Path, tuple[int, ...]]:
    """Write `folder`/null_space_project.pt of cov.h5's chosen layers; returns it and the layers.

    Raises NumericsError, naming the layer, where the cut leaves nothing or everything, and
    ArtifactError where the file is there and `force` is not set. Nothing is written then.
    """
    import torch

    path = folder / FILE_NAME
    with CovarianceFile(cov_path) as cov:
        chosen = select_layers(layers, cov.layers, str(cov_path))
        require_other(path, [cov_path])
        require_writable(path, force=force)
        d_m = cov.about.d_m
        projections = np.empty((len(chosen), d_m, d_m), np.float32)
        with reporter.task("projecting", len(chosen), unit="layers") as task:
            for index, layer in enumerate(chosen):
                try:
                    basis = null_space(cov.second_moment(layer), cut).basis
                except NumericsError as error:
                    raise NumericsError(f"layer {layer} of {cov_path}: {error}") from None
                projections[index] = basis @ basis.T
                task.advance()
    with replace_file(path, force=force) as temporary, temporary.open("wb") as file:
        torch.save(torch.from_numpy(projections), file)
    return path, chosen
