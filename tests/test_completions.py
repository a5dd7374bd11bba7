"""The scripts in completions/, and what the shell is offered."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifact_kit import write_toy
from cli_kit import ROOT, kscli_process

from kscli.models.aliases import ALIASES

SCRIPTS = {"bash": "kscli.bash", "zsh": "_kscli", "fish": "kscli.fish"}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_scripts_are_those_that_the_app_gives(shell: str) -> None:
    done = kscli_process(_KSCLI_COMPLETE=f"source_{shell}")
    shipped = (ROOT / "completions" / SCRIPTS[shell]).read_text()
    assert done.stdout.strip() == shipped.strip()


def offered(line: str, directory: Path) -> list[str]:
    """What bash is offered for the last word of `line`."""
    words = line.split(" ")
    done = kscli_process(
        _KSCLI_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
        KSCLI_DIR=str(directory),
    )
    return done.stdout.split()


def test_aliases_and_measured_models_complete(tmp_path: Path) -> None:
    write_toy(tmp_path)
    names = [alias.name for alias in ALIASES]
    assert offered("kscli topk -m gpt2-", tmp_path) == sorted(
        n for n in names if n.startswith("gpt2-")
    )
    assert offered("kscli stats --model to", tmp_path) == ["toy"]


def test_the_layers_of_an_artifact_complete(tmp_path: Path) -> None:
    write_toy(tmp_path)
    assert offered("kscli topk -m toy --layer ", tmp_path)[:3] == ["0", "1", "2"]
    assert offered("kscli stats -m toy --layers 0,", tmp_path) == ["0,0", "0,1", "0,2"]


def test_the_layers_of_an_alias_complete_before_anything_is_made(tmp_path: Path) -> None:
    assert offered("kscli cache-cov -m gpt2-small --layers 11", tmp_path) == ["11"]


def test_commands_and_kinds_of_figure_complete(tmp_path: Path) -> None:
    assert offered("kscli pm", tmp_path) == ["pmatrix"]
    assert "heatmap" in offered("kscli plot h", tmp_path)
