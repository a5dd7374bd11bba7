from __future__ import annotations

import pytest

from kscli.errors import UsageError
from kscli.second_moment.options import WHOLE, Shard, parse_shard


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_document_is_in_one_shard(count: int) -> None:
    shards = [Shard(index, count) for index in range(count)]
    for document in range(30):
        assert [shard.index for shard in shards if shard.holds(document)] == [document % count]


def test_the_whole_is_one_shard() -> None:
    assert Shard(0, 1) == WHOLE
    assert all(WHOLE.holds(document) for document in range(10))


def test_parse_and_print() -> None:
    assert parse_shard("0/4") == Shard(0, 4)
    assert parse_shard(" 3/4 ") == Shard(3, 4)
    assert parse_shard("0/1") == WHOLE
    assert str(parse_shard("11/100")) == "11/100"
    assert Shard(3, 16).file_name() == "cov.shard-3-of-16.h5"


@pytest.mark.parametrize("text", ["", "2", "/4", "1/", "-1/4", "1/-4", "a/4", "1.0/4", "1/2/3"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--shard .*write I/N, as in 0/4\.$"):
        parse_shard(text)


def test_a_shard_beyond_the_last_is_refused() -> None:
    with pytest.raises(UsageError, match="of 4 shards, the first is 0 and the last 3"):
        parse_shard("4/4")
    with pytest.raises(UsageError, match="at least one"):
        parse_shard("0/0")
