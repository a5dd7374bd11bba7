"""Selections of layers: `all`, `0`, `0,3,5-8`, `-1`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kscli.errors import UsageError

_PART = re.compile(r"(-?\d+)(?:-(-?\d+))?")


def select_layers(spec: str, available: Sequence[int], what: str) -> tuple[int, ...]:
    """The layers that `spec` names, in ascending order, each once.

    `available` are the layers there are; negative numbers count back from the last of them.
    Raises UsageError for a spec that is not understood, and for a layer that `what` (named in
    the message) does not have.
    """
    if spec.strip() == "all":
        return tuple(sorted(available))
    end = max(available) + 1
    chosen: set[int] = set()
    for part, written in _ranges(spec):
        first, last = (number if number >= 0 else end + number for number in written)
        if last < first:
            raise _backwards(spec, part)
        if first < 0:
            raise _no_layer(what, written[0], available)
        if last >= end:
            raise _no_layer(what, max(first, end), available)
        chosen.update(range(first, last + 1))
    absent = chosen - set(available)
    if absent:
        raise _no_layer(what, min(absent), available)
    return tuple(sorted(chosen))


def require_understood(spec: str) -> None:
    """Raise UsageError for a selection that no model could have, whatever its layers."""
    if spec.strip() != "all":
        list(_ranges(spec))


def _ranges(spec: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each part of a selection, and its first and last layer as they are written."""
    for part in map(str.strip, spec.split(",")):
        match = _PART.fullmatch(part)
        if match is None:
            raise UsageError(f"layers {spec!r} are not understood; write all, 0, 0,3,5-8 or -1.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first and (first < 0) == (last < 0):
            raise _backwards(spec, part)
        yield part, (first, last)


def default_layers(spec: str, available: Sequence[int]) -> tuple[int, ...]:
    """The layers that are shown where the user names none: `0` is the first that there is."""
    places = select_layers(spec, range(len(available)), "the file")
    return tuple(sorted(available)[place] for place in places)


def format_layers(layers: Sequence[int]) -> str:
    """Layers as a selection: (0, 1, 2, 5) gives `0-2,5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _backwards(spec: str, part: str) -> UsageError:
    return UsageError(f"layers {spec!r}: the range {part} runs backwards.")


def _no_layer(what: str, layer: int, available: Sequence[int]) -> UsageError:
    return UsageError(f"{what} has no layer {layer}; it has {format_layers(available)}.")


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the layers, evenly over the depth, the first and the last among them."""
    if len(layers) <= count:
        return tuple(layers)
    step = (len(layers) - 1) / (count - 1)
    return tuple(layers[round(step * at)] for at in range(count))


def layers_text(layers: Sequence[int]) -> str:
    """Layers in words: `layer 3`, `layers 0-19`."""
    return f"layer{'s' * (len(layers) > 1)} {format_layers(layers)}"
