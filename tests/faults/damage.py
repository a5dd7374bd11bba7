"""Files that are not what they were: flipped bits and bytes, missing ends."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from sandbox import KINDS, Artifacts, Tally


def try_damaged(
    artifacts: Artifacts, kind: str, name: str, files: Iterable[tuple[str, bytes]], folder: Path
) -> Tally:
    """Read files of a kind that were damaged; `files` are what was done, and their bytes.

    A damaged file is survived if it is refused in a sentence, or if nothing comes out otherwise.
    """
    tally = Tally(name)
    whole = artifacts.path(kind).read_bytes()
    sound, wrote = artifacts.read(kind, whole, folder)
    assert sound.code == 0, sound
    for what, data in files:
        done, written = artifacts.read(kind, data, folder)
        outcome = done.fault
        if outcome is None and done.code == 0:
            same = (done.out, written) == (sound.out, wrote)
            outcome = "survived" if same else "wrong"
        elif outcome is None:
            named = "error: " in done.err and str(folder) in done.err.replace("\n", "")
            outcome = "survived" if not written and (named or kind == "checkpoint") else "wrong"
        tally.add(outcome, f"{what}: exit {done.code}, {done.err.strip()[-200:]}")
    return tally


def flips(artifacts: Artifacts, count: int, folder: Path) -> Iterator[Tally]:
    """Bits flipped one at a time, `count` in a file of every kind."""
    for kind in KINDS:
        rng = random.Random(kind)
        whole = artifacts.path(kind).read_bytes()
        places = [rng.randrange(8 * len(whole)) for _ in range(count)]
        files = ((f"bit {place}", _flipped(whole, place)) for place in places)
        yield try_damaged(artifacts, kind, f"bit flips, {kind}", files, folder)


def structure(artifacts: Artifacts, count: int, folder: Path) -> Iterator[Tally]:
    """Bytes of pmatrix.h5 that belong to no array, replaced one to five at a time."""
    from kscli.artifacts import SealedFile

    path, rng = artifacts.path("pmatrix"), random.Random(0)
    whole = path.read_bytes()
    with SealedFile(path) as file:
        taken = {
            place
            for held in file.arrays.values()
            for place in range(held.offset, held.offset + held.nbytes)
        }
    places = sorted(set(range(len(whole))) - taken)

    def damaged() -> Iterable[tuple[str, bytes]]:
        for _ in range(count):
            data = bytearray(whole)
            chosen = rng.sample(places, rng.randint(1, 5))
            for place in chosen:
                data[place] ^= rng.randint(1, 255)
            yield f"bytes {chosen}", bytes(data)

    name = "byte flips, structure of pmatrix"
    yield try_damaged(artifacts, "pmatrix", name, damaged(), folder)


def truncations(artifacts: Artifacts, steps: int, folder: Path) -> Iterator[Tally]:
    """Files of every kind cut off at so many places, evenly from their beginning to their end."""
    for kind in KINDS:
        whole = artifacts.path(kind).read_bytes()
        ends = [len(whole) * step // steps for step in range(steps)]
        files = ((f"cut at {end}", whole[:end]) for end in ends)
        yield try_damaged(artifacts, kind, f"truncations, {kind}", files, folder)


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
