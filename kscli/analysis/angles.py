"""The angles between the keys of two facts (Figure 6)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.density import Curve, make_curve

BOUNDS = (0.0, 180.0)


def angles(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The angles in degrees of the m(m-1)/2 pairs i < j, of their cosines (m, m)."""
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    # Rounding takes the cosine of two equal keys beyond 1.
    return np.asarray(np.degrees(np.arccos(np.clip(pairs, -1, 1))))


def angle_curve(cosine: NDArray[np.float64]) -> Curve:
    """The density of the angles of all pairs, of their cosines (m, m)."""
    return make_curve(angles(cosine), BOUNDS)


def mode(curve: Curve) -> float:
    """Where the density is highest; where all values are equal, there; else NaN."""
    if curve.density is not None:
        return float(curve.density.x[curve.density.y.argmax()])
    return float(curve.values[0]) if curve.values.size else float("nan")
