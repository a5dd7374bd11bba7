"""The tables' cells against their definition, and their columns against the rows they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from artifact_kit import write_toy
from cli_kit import kscli

from kscli import tables
from kscli.tables import Column, cell, shown


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (None, ".2f", "-"),
        (math.nan, ".2f", "-"),
        (None, "", "-"),
        (0.126, ".2f", "0.13"),
        (-0.001, ".2f", "0.00"),
        (-12, "d", "-12"),
        (0.5, ".0%", "50%"),
        (1.0, ".0%", "100%"),
        (0.996, ".0%", "99.6%"),
        (0.99996, ".1%", "99.9%"),
        ("3 of 4", ".0%", "3 of 4"),
        (True, "", "yes"),
        (False, "", ""),
        ("text", "", "text"),
    ],
)
def test_a_cell(value: Any, spec: str, text: str) -> None:
    assert cell(Column("x", spec=spec), {"x": value}) == text


@pytest.mark.parametrize("undefined", [None, math.nan])
def test_an_interval_stands_beside_its_value_where_it_is_defined(undefined: float | None) -> None:
    column = Column("x", spec=".1f", interval=True)
    assert cell(column, {"x": 2.0, "x_low": -0.01, "x_high": 3.06}) == "2.0 [0.0, 3.1]"
    assert cell(column, {"x": 2.0, "x_low": undefined, "x_high": undefined}) == "2.0"
    assert cell(column, {"x": undefined, "x_low": 1.0, "x_high": 3.0}, "?") == "?"


def test_an_edit_that_changed_no_answer_moved_none() -> None:
    [column] = [column for column in tables.EDITS if column.key == "moved"]
    same = {"subject": "Rome", "answer_changed": False, "answer_before": "a", "answer_after": "a"}
    other = {**same, "subject": "Oslo", "answer_changed": True, "answer_after": "b"}
    assert cell(column, {"moved": [same, other]}) == "Oslo: a → b"
    assert cell(column, {"moved": [same]}) == "none"
    assert cell(column, {"moved": []}) == "-"


def test_columns_that_vary_and_columns_that_need_room() -> None:
    columns = [Column("model", varying=True), Column("layer"), Column("min", wide=True)]
    one, two = {"model": "a"}, {"model": "b"}
    assert [column.key for column in shown(columns, [one, one])] == ["layer"]
    assert [column.key for column in shown(columns, [one, two])] == ["model", "layer"]
    assert [column.key for column in shown(columns, [], wide=True)] == ["layer", "min"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("stats -m toy", ("STATISTICS", "SAME_TOKEN")),
        ("topk -m toy", ("PAIRS", "PAIRS_OF_LAYERS")),
        ("risk -m toy --by-layer", ("RISK_BY_LAYER",)),
        ("risk -m toy --fact 0", ("FACTS_MOVED",)),
    ],
)
def test_every_column_has_a_field_of_the_rows(
    command: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    write_toy(tmp_path)
    row = json.loads(kscli(*command.split(), "--dir", tmp_path, "-f", "json").stdout)[0]
    for name in names:
        for column in getattr(tables, name):
            # What the order of edits saves is on the page only.
            if column.key != "saved":
                assert column.value is not None or column.key in row
                assert isinstance(cell(column, row), str)


def test_no_two_columns_of_a_table_have_one_key() -> None:
    declared = [value for value in vars(tables).values() if isinstance(value, tuple)]
    assert len(declared) > 10
    for columns in declared:
        keys = [column.key for column in columns]
        assert len(keys) == len(set(keys))
        assert all(column.title.strip() for column in columns)
