"""Images of few dots: a pair of facts that is bound stays visible where a dot has many pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

Real = NDArray[np.float64]


@contextmanager
def largest_shown(fig: Figure) -> Iterator[None]:
    """While the block runs, a dot of an image shows the largest of its entries, by absolute value.

    Matplotlib would show one of them and drop the others. The dots are those of `fig.dpi`.
    """
    fig.draw_without_rendering()
    with ExitStack() as stack:
        for ax in fig.axes:
            for image in ax.images:
                stack.enter_context(_reduced(image))
        yield


@contextmanager
def _reduced(image: AxesImage) -> Iterator[None]:
    entries = image.get_array()
    assert entries is not None  # imshow gave it one
    box = image.axes.get_window_extent()
    rows, columns = min(len(entries), int(box.height)), min(entries.shape[1], int(box.width))
    if 0 < rows * columns < entries.size:
        extent = image.get_extent()
        image.set_data(largest(np.asarray(entries), rows, columns))
        image.set_extent(extent)
    yield
    image.set_data(entries)


def largest(entries: Real, rows: int, columns: int) -> Real:
    """The entries (m, n) in rows × columns blocks: of each the one of largest absolute value."""

    def over_blocks(of: np.ufunc) -> Real:
        starts = [
            np.arange(count) * length // count
            for count, length in zip((rows, columns), entries.shape, strict=True)
        ]
        found: Real = of.reduceat(of.reduceat(entries, starts[0], axis=0), starts[1], axis=1)
        return found

    high, low = over_blocks(np.maximum), over_blocks(np.minimum)
    return np.where(-low > high, low, high)
