"""README and the guides: their commands run or exist, and what they name is there."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import fork_kit
import numpy as np
import pytest
from cli_kit import ROOT, kscli

from kscli.artifacts.schema import SCHEMAS, described
from kscli.cli.commands import COMMANDS, load_command

GUIDES = {path.stem: path for path in (ROOT / "kscli" / "guides").glob("*.md")}
PAGES = {"README": ROOT / "README.md", **GUIDES}
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?```bash\n(.*?)```", re.DOTALL)
BLOCKS = [
    pytest.param(text, bool(mark), id=f"{name}-{number}")
    for name, path in PAGES.items()
    for number, (mark, text) in enumerate(BLOCK.findall(path.read_text("utf-8")))
]
COMMAND = re.compile(r"\bkscli ((?:" + "|".join(COMMANDS) + r")\b[^|;&>)#\n]*)")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_list_names_every_page() -> None:
    listed = dict(line.split(maxsplit=1) for line in kscli("guide").stdout.splitlines())
    assert set(listed) == set(GUIDES)
    assert all(f"kscli/guides/{name}.md" in PAGES["README"].read_text() for name in listed)


@pytest.mark.parametrize("name", GUIDES)
def test_a_page_in_a_pipe_is_its_text(name: str) -> None:
    assert kscli("guide", name).stdout == GUIDES[name].read_text("utf-8")


def test_an_unknown_page_is_refused_with_the_names() -> None:
    refused = kscli("guide", "nonesuch")
    assert refused.exit_code == 2
    assert all(name in refused.stderr.replace("\n", " ") for name in ("nonesuch", *GUIDES))


def test_readme_is_read_in_one_sitting() -> None:
    assert len(PAGES["README"].read_text().splitlines()) <= 200


@pytest.mark.parametrize(("text", "marked"), BLOCKS)
def test_options_of_every_command_exist(text: str, marked: bool) -> None:
    for found in COMMAND.findall(text.replace("\\\n", " ")):
        try:
            words = shlex.split(found)
        except ValueError:  # a quotation that a pipe or a parenthesis cut
            words = found.split()
        command = load_command(words[0])
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        known = {name for param in command.params for name in param.opts + param.secondary_opts}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert used <= known | {"--help"}, found


@pytest.mark.parametrize("text", [each.values[0] for each in BLOCKS if not each.values[1]])
def test_a_block_that_is_not_marked_runs(text: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    folder = fork_kit.program(tmp_path / "bin").parent
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*carry half of the fourth moment:kscli.KscliWarning")
def test_the_library_s_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in PYTHON.findall(GUIDES["library"].read_text("utf-8")):
        exec(compile(block, "library.md", "exec"), names)
    P, m = names["P"], 64
    assert P.shape == (m, m)
    assert (P.diagonal() == 1).all()
    assert len(names["pairs"]) == m * (m - 1)
    assert (names["data"].P.sel(layer=0) == P).all()
    assert names["statistics"].to_pandas()["kurtosis"][0] > 3
    assert (tmp_path / "heatmap.png").stat().st_size > 10_000
    assert names["moved"]["p"].abs().is_monotonic_decreasing
    (edit,) = names["edits"].objects()
    assert edit["prob_new_after"] > 10 * edit["prob_new_before"]
    assert names["edited"].identity.weights.startswith("live:")
    assert "differ in weights" in names["refused"]
    assert np.allclose(names["result"].P, P, atol=1e-6)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_files_names_every_attribute_and_dataset(kind: str) -> None:
    page = GUIDES["files"].read_text("utf-8")
    assert not [name for name in described(kind) if f"`{name}`" not in page]


def test_files_names_every_statistic() -> None:
    from kscli.analysis.statistics import field_names

    page = GUIDES["files"].read_text("utf-8")
    plain = {re.sub("_distinct|_low$|_high$", "", name) for name in field_names()}
    assert not [name for name in plain if f"`{name}`" not in page]


@pytest.mark.parametrize(
    "part",
    [*(f"equation {n}" for n in range(1, 19)), *(f"Appendix {letter}" for letter in "ABCDEFG")],
)
def test_the_paper_is_found_by_its_numbers(part: str) -> None:
    row = re.search(rf"^\| {part} \| `([\w.]+)` \|", GUIDES["paper-map"].read_text("utf-8"), re.M)
    assert row, part
    module, _, name = row[1].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
