"""The linear theory of a run of edits: what each fact's value is predicted to become, and becomes.

W_n - W_0 is a sum over edits (equation 5). The keys of original and edited facts stand in one
array (equation 6), and so do their values W_n k (equation 7, equation 8). Equation 9, equation 10
and equation 12 to equation 14 are these values less what they were.

Equation 11: an original fact's value moves by Delta_j = sum_i p(k_i, k_j) delta_i, p being the
editor's, d_i^T k_j. Equation 15: an edited one's, since its own edit t, by the same sum over i > t.
Measured is (W_n - W_0) k_j in float64, of which an edited fact's is taken from where its own edit
left it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDING = 1e-9


class Interference:
    """The values of m facts at one layer, `keys` (m, d_m), through edits of a W of `shape`.

    `predicted` and `measured` are Delta, (m, d), after the last edit; `change` is W_n - W_0.
    `longest` is the length of the longest delta that was written.
    """

    def __init__(self, keys: Array, shape: tuple[int, int]) -> None:
        self._keys = keys
        self.change: Array = np.zeros(shape)
        self.longest = 0.0
        self.predicted: Array = np.zeros((len(keys), shape[0]))
        self.measured: Array = np.zeros((len(keys), shape[0]))
        # Where its own edit left an edited fact's value.
        self._own: Array = np.zeros((len(keys), shape[0]))

    def edit(self, facts: Sequence[int], p: Array, deltas: Array, change: Array) -> None:
        """Make the edits of `facts` (b) at once: W moves by `change` (d, d_m).

        `p` (b, m) is d_i^T k_j of their directions, for equation 3 the facts' rows of P; `deltas`
        (b, d) is what is added to their values.
        """
        facts = list(facts)
        self.change += change  # equation 5
        self.longest = max(self.longest, float(np.linalg.norm(deltas, axis=1).max()))
        self.predicted += p.T @ deltas  # equation 11; 0 at the own edit makes it equation 15
        # equation 7, less W_0 K: so equations 9 and 10, equation 10 being equation 9 by C^-1
        values = self._keys @ self.change.T
        self.predicted[facts] = 0
        self._own[facts] = values[facts]
        self.measured = (
            values - self._own
        )  # equation 12, and its column j: equation 13, equation 14

    def replace(self, change: Array) -> None:
        """Make W_n - W_0 the `change` (d, d_m), with no edit more."""
        self.change = change
        self.measured = self._keys @ change.T - self._own

    def since_own_edit(self, shifts: Array) -> Array:
        """Shifts of all values since the clean model, (m, d), as Delta is counted."""
        return shifts - self._own

    def largest_error(self, shifts: Array) -> float:
        """max_j |predicted_j - shifts_j| / max_j |predicted_j| over (m, d) shifts.

        NaN where nothing is predicted to move by more than rounding, as where all is protected.
        """
        largest = float(np.linalg.norm(self.predicted, axis=1).max(initial=0))
        worst = float(np.linalg.norm(self.predicted - shifts, axis=1).max(initial=0))
        return worst / largest if largest > ROUNDING * self.longest else float("nan")
