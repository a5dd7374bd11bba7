"""Kernel density of many numbers: a fine histogram smoothed by a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.resampling import ROUNDING

# A Gaussian's interquartile range in standard deviations.
_GAUSSIAN_IQR = 1.349
_BINS_PER_BANDWIDTH = 10
_REACH = 5
# How few entries within one kernel of the bulk are single pairs.
_FEW_ENTRIES = 100
_FINEST = 1 / 8192
_UNBOUNDED = (-math.inf, math.inf)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Density:
    """Density `y` at the evenly spaced points `x`, and the standard deviation of the kernel."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    bandwidth: float


def robust_bandwidth(values: NDArray[np.float64]) -> float:
    """Silverman's bandwidth with the lesser of std and IQR/1.349 as scale.

    The standard deviation of a heavy-tailed sample says how far its tail goes, and a
    kernel of that size flattens its peak; the interquartile range does not know the tail.
    Silverman (1986), Density Estimation, equation 3.30, with the factor of his equation
    3.28 for a normal kernel, (4 / 3n)^(1/5).

    `values` are 1-D and not all equal.
    """
    low, high = np.percentile(values, [25, 75])
    iqr = float(high - low) / _GAUSSIAN_IQR
    std = float(values.std())
    scale = min(std, iqr) if iqr > 0 else std
    bandwidth: float = scale * (4 / (3 * values.size)) ** 0.2
    # Most values equal and a few far away: without a floor the grid would have no end.
    return max(bandwidth, float(np.ptp(values)) / 8192)


def kernel_density(
    values: NDArray[np.float64],
    *,
    bandwidth: float | None = None,
    bounds: tuple[float, float] = _UNBOUNDED,
) -> Density:
    """Gaussian kernel density of 1-D `values`, not all equal, over their whole range.

    `bandwidth` is by default `robust_bandwidth`'s. No value lies beyond `bounds`, and what a
    kernel would put there is reflected into them. Differs from the sum of kernels by the width
    of a bin, a tenth of the bandwidth; takes the time of a histogram, however many values.
    """
    from scipy.ndimage import gaussian_filter1d

    width = bandwidth or robust_bandwidth(values)
    low = max(float(values.min()) - _REACH * width, bounds[0])
    high = min(float(values.max()) + _REACH * width, bounds[1])
    bins = math.ceil((high - low) / width * _BINS_PER_BANDWIDTH)
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    step = (high - low) / bins
    # Where the range ends short of the bounds there is nothing to reflect.
    smooth = gaussian_filter1d(
        counts / (values.size * step), width / step, mode="reflect", truncate=_REACH
    )
    return Density((edges[:-1] + edges[1:]) / 2, smooth, width)


@dataclass(frozen=True)
class Curve:
    """Values, and their density; None where they are all equal or there are none."""

    values: Values
    density: Density | None


def make_curve(values: Values, bounds: tuple[float, float] | None = None) -> Curve:
    """The curve of 1-D `values`, none of which lies beyond `bounds`."""
    if not varies(values):
        return Curve(values, None)
    return Curve(
        values, kernel_density(values, bounds=bounds) if bounds else kernel_density(values)
    )


def varies(values: Values) -> bool:
    """Whether the values differ by more than rounding."""
    return bool(values.size) and float(np.ptp(values)) > ROUNDING * float(np.abs(values).max())


def marked_densities(
    curve: Curve, part: Values, window: tuple[float, float], bandwidth: float
) -> tuple[Values, Values, Values]:
    """Points within `window`, the density of the curve's values there, and what `part` adds to it.

    The bulk has the kernel of the curve's density. On a logarithmic scale that kernel would make a
    comb of the tail. Values with few others within it have the wider `bandwidth`, more so the
    fewer they are, and the same in both densities. The curve's values are not all equal.
    """
    from scipy.ndimage import gaussian_filter1d

    assert curve.density is not None
    low, high = window
    # Beside a line of a far wider range there is nothing finer to be seen.
    width = max(curve.density.bandwidth, (high - low) * _FINEST)
    bins = math.ceil((high - low) / width * _BINS_PER_BANDWIDTH)
    step = (high - low) / bins
    every, edges = np.histogram(curve.values, bins, window)
    a_kernel = math.sqrt(2 * math.pi) * width / step
    beside = a_kernel * gaussian_filter1d(every.astype(float), width / step)
    bulk = beside**2 / (beside**2 + _FEW_ENTRIES**2)
    smooth = [
        gaussian_filter1d(counts * bulk, width / step)
        + gaussian_filter1d(counts * (1 - bulk), max(width, bandwidth) / step)
        for counts in (every, np.histogram(part, bins, window)[0])
    ]
    x = (edges[:-1] + edges[1:]) / 2
    return x, smooth[0] / (curve.values.size * step), smooth[1] / (curve.values.size * step)
