"""What an artifact says of each of its layers in one number, such as a residual."""

from __future__ import annotations

import h5py
import numpy as np

from kscli.artifacts import Artifact


class LayerValues(Artifact):
    """An artifact of any kind."""

    def extremes(self) -> dict[str, dict[str, int | float]]:
        """The `least` and `largest` value of every dataset of one number a layer, by its name.

        What is undefined at some layer does not count; at all layers, both are NaN.
        """
        found: dict[str, dict[str, int | float]] = {}

        def visit(name: str, item: object) -> None:
            if not isinstance(item, h5py.Dataset) or item.ndim != 1 or item.dtype.kind not in "iuf":
                return
            if item.dims[0].label == "layer":
                values = item[()][~np.isnan(item[()])]
                ends = (values.min().item(), values.max().item()) if values.size else 2 * (np.nan,)
                found[name] = {"least": ends[0], "largest": ends[1]}

        with self._reading():
            self._file.visititems(visit)
        return found
