"""Documents in a random order: each once, the same for a seed, whatever reads them."""

from __future__ import annotations

import errno
import io
import signal
from pathlib import Path

import numpy as np
import pytest
from cli_kit import kscli, one_sentence
from test_cache_cov import (
    COMMON,
    assert_close,
    second_moments,
    start,
    wait_for_checkpoint,
)

from kscli.corpus import CorpusSpec, open_corpus, same_text
from kscli.errors import CorpusError
from kscli.shuffling import shuffled

TEXTS = [f"{'ä' * (n % 5)} text {n}" for n in range(200)] + ["", "\n"]


def test_each_text_comes_once_in_an_order_of_the_seed() -> None:
    first, again, other = (list(shuffled(TEXTS, seed)) for seed in (1, 1, 2))
    assert sorted(first) == sorted(other) == sorted(TEXTS)
    assert first == again != other
    assert TEXTS not in (first, other)
    assert list(shuffled([], 1)) == []


def test_every_place_is_as_likely() -> None:
    """Where the first of 5 texts comes, over 2,000 seeds: 400 times at each, within 4 sigma."""
    places = [list(shuffled("abcde", seed)).index("a") for seed in range(2000)]
    assert np.abs(np.bincount(places, minlength=5) - 400).max() < 4 * np.sqrt(2000 * 0.2 * 0.8)


@pytest.mark.parametrize("when", ["write", "flush"])
def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    class Full(io.BytesIO):
        pass

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Full, when, fail)
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(CorpusError, match=r"No space left on device.*TMPDIR"):
        list(shuffled(TEXTS, 1))


@pytest.mark.parametrize("name", ["tiny", "file", "folder"])
def test_a_shuffled_corpus_has_the_same_documents_and_another_identity(
    corpus: Path, name: str
) -> None:
    named = {"file": str(corpus), "folder": str(corpus.parent)}.get(name, name)
    plain, drawn, other = (open_corpus(CorpusSpec(named, shuffle=s)) for s in (None, 1, 2))
    assert open_corpus(CorpusSpec(named)).identity == plain.identity
    assert len({plain.identity, drawn.identity, other.identity}) == 3
    assert same_text(plain.identity, drawn.identity)
    orders = [list(each.documents()) for each in (plain, drawn, other)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_a_blank_corpus_is_refused_shuffled_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(CorpusError, match="empty"):
        list(open_corpus(CorpusSpec(str(tmp_path), shuffle=1)).documents())


def test_all_of_a_corpus_gives_one_c_in_any_order(corpus: Path, tmp_path: Path) -> None:
    for name, options in (("plain.h5", ()), ("drawn.h5", ("--shuffle", "4"))):
        made = kscli(*COMMON, "--corpus", corpus, "-o", tmp_path / name, *options)
        assert made.exit_code == 0, made.stderr
    assert_close(tmp_path / "drawn.h5", tmp_path / "plain.h5")


def test_shards_share_one_order(corpus: Path, tmp_path: Path) -> None:
    unshuffled = (*COMMON, "--corpus", corpus, "--dir", tmp_path, "--samples", "701")
    common = (*unshuffled, "--shuffle", "4")
    whole = tmp_path / "whole.h5"
    assert kscli(*common, "-o", whole).exit_code == 0
    for index in range(2):
        assert kscli(*common, "--shard", f"{index}/2").exit_code == 0
    assert kscli("merge-cov", "--dir", tmp_path).exit_code == 0
    assert_close(tmp_path / "tiny" / "cov.h5", whole)
    first = tmp_path / "first.h5"
    assert kscli(*unshuffled, "--shuffle", "none", "-o", first).exit_code == 0
    assert not np.allclose(second_moments(first), second_moments(whole), rtol=1e-3)


def test_killed_it_goes_on_in_the_same_order_and_in_no_other(corpus: Path, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.h5", tmp_path / "cov.h5"
    command = (*COMMON, "--corpus", corpus, "--shuffle", "4")
    assert kscli(*command, "-o", whole).exit_code == 0
    process = start("kscli", *command, "-o", path)
    wait_for_checkpoint(tmp_path / "cov.h5.checkpoint", process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    other = kscli(*COMMON, "--corpus", corpus, "--shuffle", "5", "-o", path)
    assert other.exit_code == 1
    assert "another run (corpus differ)" in one_sentence(other.stderr)
    again = kscli(*command, "-o", path)
    assert "going on from" in again.stderr
    np.testing.assert_array_equal(second_moments(path), second_moments(whole))


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "²", ""])
def test_what_is_no_seed_is_refused(seed: str, tmp_path: Path) -> None:
    refused = kscli("cache-cov", f"--shuffle={seed}", "-o", tmp_path / "cov.h5")
    assert refused.exit_code == 2
    assert "--shuffle" in refused.stderr
    assert "seed" in refused.stderr


def test_standard_input_cannot_be_shuffled(tmp_path: Path) -> None:
    refused = kscli("cache-cov", "--corpus", "-", "--shuffle", "1", "-o", tmp_path / "cov.h5")
    assert refused.exit_code == 1
    assert "save it to a file" in one_sentence(refused.stderr)
