"""What README shows of the library runs as it stands there."""

from __future__ import annotations

import re

import pytest
from cli_kit import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_library_s_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 1
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    shape, _, p = capsys.readouterr().out.strip().rpartition(" ")
    assert shape == "(128, 128)"
    assert abs(float(p)) < 1
