"""Fingerprints: which weights, which tokenizer, which file, in under two seconds.

A file of up to `WHOLE` bytes is hashed whole. Of a larger one the size and
blocks spread over it are hashed; of a safetensors file the header and blocks
of every tensor, so that an edit of a single matrix changes the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from kscli.errors import ModelError

WHOLE = 8 << 20
BLOCK = 4096
BLOCKS_PER_FILE = 256
BLOCKS_PER_TENSOR = 3
HEADER_LIMIT = 100 << 20


def fingerprint_file(path: Path) -> str:
    """SHA-256 of a file's size and of its contents, sampled beyond `WHOLE` bytes.

    Raises ModelError when a safetensors file is truncated or is none.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    spans = tensor_spans(path) if path.suffix == ".safetensors" else None
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        elif spans is not None:
            _update_from_tensors(digest, file, spans)
        else:
            _update_from_blocks(digest, file, 0, size, BLOCKS_PER_FILE)
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[Path]) -> str:
    """One `sha256:` fingerprint of several files' names and fingerprints, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{fingerprint_file(path)}\0".encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def _update_from_tensors(
    digest: hashlib._Hash, file: BinaryIO, spans: dict[str, tuple[int, int]]
) -> None:
    digest.update(json.dumps(spans, sort_keys=True).encode())
    for name in sorted(spans):
        start, end = spans[name]
        _update_from_blocks(digest, file, start, end, BLOCKS_PER_TENSOR)


def _update_from_blocks(
    digest: hashlib._Hash, file: BinaryIO, start: int, end: int, blocks: int
) -> None:
    """Hash `blocks` blocks spread evenly from `start` to `end`, both ends included."""
    last = max(start, end - BLOCK)
    for index in range(blocks):
        file.seek(start + (last - start) * index // max(1, blocks - 1))
        digest.update(file.read(min(BLOCK, end - start)))


def tensor_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: name to (start, end) bytes in the file.

    Raises ModelError when the file is truncated or is none.
    """
    damaged = ModelError(f"{path} is damaged or is not a safetensors file; fetch it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise damaged
        text = file.read(length)
    base = 8 + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        spans = {name: (base + start, base + end) for name, (start, end) in offsets.items()}
        if not all(base <= start <= end for start, end in spans.values()):
            raise ValueError
        whole = max((end for _, end in spans.values()), default=base) == size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if not whole:
        raise ModelError(f"{path} is truncated ({size:,} bytes); fetch it again.")
    return spans
