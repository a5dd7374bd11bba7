"""Numbers and layers as the page's sentences and tables write them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kscli.layers import layers_text
from kscli.numbers import number, percent

__all__ = [
    "at_layers",
    "counted",
    "layers_text",
    "listed",
    "magnitude",
    "number",
    "quoted",
    "share",
    "with_interval",
]


def share(value: float) -> str:
    """A share in per cent; `undefined` for NaN."""
    return "undefined" if math.isnan(value) else percent(value)


def magnitude(value: float) -> str:
    """A small number to its order of magnitude: `2e−6`."""
    return f"{value:.0e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def with_interval(value: float, low: float, high: float, digits: int) -> str:
    """An estimate with its 95 % interval, where it has one: `47.5 (29.3 to 73.0)`."""
    if math.isnan(value) or math.isnan(low):
        return number(value, digits)
    return f"{number(value, digits)} ({number(low, digits)} to {number(high, digits)})"


def quoted(text: str) -> str:
    """A text in quotation marks."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 pair`, `2,000 pairs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(texts: Sequence[str]) -> str:
    """Texts as a list in a sentence: `a, b and c`."""
    return " and ".join([*([", ".join(texts[:-1])] if texts[1:] else []), *texts[-1:]])


def at_layers(some: Sequence[int], every: Sequence[int]) -> str:
    """Where in the model: `at every layer`, `at no layer`, `at layers 0-3,7`."""
    if len(some) == len(every) > 1:
        return f"at each of the {len(every)} layers"
    return f"at {layers_text(some)}" if some else "at no layer"
