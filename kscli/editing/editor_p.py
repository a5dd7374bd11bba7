"""The p of an editor: P[i, j] = d_i^T k_j, d_i the direction along which it writes fact i alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, KeysFile, MatrixName, PMatrixFile
from kscli.editing.editors import find_editor
from kscli.editing.sources import require_made_from
from kscli.places import Places


class EditorPMatrixFile(PMatrixFile):
    """A pmatrix.h5 whose P is that of an editor, computed from the C and the keys it was made of.

    The bare prompt's key stands for the mean over contexts, of which keys.h5 holds none.

    Raises UsageError for an editor that is not known.
    """

    def __init__(self, path: Path, method: str, cov: CovarianceFile, keys: KeysFile) -> None:
        self._editor = find_editor(method)
        super().__init__(path)
        self._cov, self._keys = cov, keys

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        """One layer's (m, m) matrix of that name."""
        if name != "P":
            return super().matrix(name, layer)
        from kscli.editing.directions import edit_directions
        from kscli.editing.metrics import Cut, metric_of

        direction = self._editor.direction
        metric = metric_of(direction.metric, self._cov, layer, self.about.ridge, Cut())
        keys = self._keys.keys_of(layer)
        directions = [edit_directions(metric, key[None], direction.weight or 0.0) for key in keys]
        return np.asarray(np.concatenate(directions) @ keys.T)


def open_p(
    method: str,
    places: Places,
    stack: ExitStack,
    *,
    cov: Path | None = None,
    keys: Path | None = None,
    pmatrix: Path | None = None,
) -> PMatrixFile:
    """The P of an editor: that of pmatrix.h5 where it is the editor's, else from C and the keys.

    Raises ArtifactError where pmatrix.h5 was made from other files than these.
    """
    path = pmatrix or places.path("pmatrix")
    if find_editor(method).predicted:
        return stack.enter_context(PMatrixFile(path))
    of_text = stack.enter_context(CovarianceFile(cov or places.path("cov")))
    of_facts = stack.enter_context(KeysFile(keys or places.path("keys")))
    file = stack.enter_context(EditorPMatrixFile(path, method, of_text, of_facts))
    require_made_from(file, {"cov": of_text, "keys": of_facts})
    return file
