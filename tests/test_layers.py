from __future__ import annotations

import pytest

from kscli.errors import UsageError
from kscli.layers import format_layers, select_layers, spread


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("0", (0,)),
        ("0,3-5", (0, 3, 4, 5)),
        ("-1", (5,)),
        ("-3--1", (3, 4, 5)),
        ("4,0,4", (0, 4)),
        (" 1 , 2 ", (1, 2)),
        ("2--1", (2, 3, 4, 5)),
    ],
)
def test_selections(spec: str, layers: tuple[int, ...]) -> None:
    assert select_layers(spec, range(6), "m") == layers


@pytest.mark.parametrize("spec", ["", "a", "1-", "1,,2", "5-3", "0x1", "1.5"])
def test_what_is_not_understood_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        select_layers(spec, range(6), "m")


@pytest.mark.parametrize(
    ("spec", "named"), [("99", "99"), ("-7", "-7"), ("4-9", "6"), ("0-999999999", "6")]
)
def test_an_absent_layer_is_named_with_those_there_are(spec: str, named: str) -> None:
    with pytest.raises(UsageError, match=rf"^m has no layer {named}; it has 0-5\.$"):
        select_layers(spec, range(6), "m")


def test_a_file_may_hold_some_layers_only() -> None:
    assert select_layers("-1", (2, 7), "m") == (7,)
    with pytest.raises(UsageError, match="no layer 3; it has 2,7"):
        select_layers("2-7", (2, 7), "m")


def test_formatting_is_read_back() -> None:
    assert format_layers((5, 0, 1, 2)) == "0-2,5"
    assert select_layers(format_layers((0, 2, 3, 9)), range(10), "m") == (0, 2, 3, 9)


def test_layers_spread_over_the_depth() -> None:
    assert spread(range(30), 4) == (0, 10, 19, 29)
    assert spread([3, 7], 4) == (3, 7)
    assert spread([5], 4) == (5,)
    assert spread([0, 2, 4, 6, 8, 10, 12], 4) == (0, 4, 8, 12)
    assert spread(range(30), 2) == (0, 29)
