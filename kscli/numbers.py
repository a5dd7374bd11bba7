"""Numbers as figures and sentences write them."""

from __future__ import annotations

import math


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
