"""Numbers as figures and sentences write them, and as options may have them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kscli.errors import UsageError


def number(value: float, digits: int) -> str:
    """A number as a figure shows it: a true minus sign, no negative zero, NaN in words."""
    return (
        "undefined" if math.isnan(value) else f"{value:z.{digits}f}".replace("-", "\N{MINUS SIGN}")
    )


def percent(share: float) -> str:
    """A share as a figure shows it; only all of it is 100 %."""
    value = 100 * share
    if 99.5 <= value < 100:
        return f"{math.floor(10 * value) / 10:.1f} %"
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def require_finite(given: Mapping[str, float | None]) -> None:
    """Raise UsageError for an option whose number is infinite or none."""
    for option, number in given.items():
        if number is not None and not math.isfinite(number):
            raise UsageError(f"{option} {number} must be a finite number.")
