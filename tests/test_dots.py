"""Images of few dots: the largest entries stay visible."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from kscli.figures.dots import largest
from kscli.figures.saving import render


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (7, 4), (8, 9)])
def test_a_block_has_its_entry_of_largest_size(rows: int, columns: int) -> None:
    entries = np.random.default_rng(0).normal(size=(8, 9))
    found = largest(entries, rows, columns)
    assert found.shape == (rows, columns)
    row_of = [max(r for r in range(rows) if r * 8 // rows <= i) for i in range(8)]
    column_of = [max(c for c in range(columns) if c * 9 // columns <= j) for j in range(9)]
    for r in range(rows):
        for c in range(columns):
            block = [
                entries[i, j]
                for i in range(8)
                for j in range(9)
                if (row_of[i], column_of[j]) == (r, c)
            ]
            assert found[r, c] == max(block, key=abs)


@pytest.mark.parametrize("m", [100, 150, 399])
def test_a_png_of_fewer_dots_than_facts_shows_every_bound_pair(m: int) -> None:
    """The only entries that are not 0 are a diagonal and single ones, whose dots are counted."""
    P = np.eye(m)
    lone = np.random.default_rng(m).integers(0, m, size=(5, 2))
    P[lone[:, 0], lone[:, 1]] = -1
    fig = Figure(figsize=(1, 1), dpi=100)
    ax = fig.add_axes((0, 0, 1, 1))
    image = ax.imshow(P, cmap="RdBu", vmin=-1, vmax=1, interpolation="none", aspect="auto")
    ax.set_axis_off()
    dots = imread(io.BytesIO(render(fig, "png")))[..., :3]
    assert dots.shape[:2] == (100, 100)
    coloured = np.abs(dots - dots[0, 99]).max(axis=-1) > 0.1
    for i in range(m):
        at = i * 100 // m
        assert coloured[at, max(at - 1, 0) : at + 2].any()
    for i, j in lone.tolist():
        row, column = i * 100 // m, j * 100 // m
        assert coloured[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].any()
    assert np.asarray(image.get_array()).shape == (m, m)  # the figure itself stays as it was
