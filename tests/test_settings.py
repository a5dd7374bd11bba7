"""Options from kscli.toml, pyproject.toml and the environment, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifact_kit import write_toy
from cli_kit import kscli, one_sentence

from kscli.cli.commands import COMMANDS, load_command
from kscli.cli.settings import names_of, variables_of


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with artifacts of `toy` below it, which is the working folder."""
    write_toy(tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def layers_of(*arguments: str) -> set[int]:
    """The layers that topk lists."""
    result = kscli("topk", *arguments)
    assert result.exit_code == 0, result.stderr
    return {row["layer"] for row in json.loads(result.stdout)}


def test_the_command_line_wins_over_a_variable_over_the_file_over_the_default(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layers_of("-m", "toy", "-f", "json") == {0}
    (project / "kscli.toml").write_text(
        'model = "toy"\nformat = "json"\nlayer = "2"\n[topk]\nk = 3\n'
    )
    assert layers_of() == {2}
    assert len(json.loads(kscli("topk").stdout)) == 3
    monkeypatch.setenv("KSCLI_LAYERS", "1")
    assert layers_of() == {1}
    assert layers_of("--layer", "all") == {0, 1, 2}


def test_a_table_wins_over_the_top_and_is_for_its_command_alone(project: Path) -> None:
    (project / "kscli.toml").write_text(
        'layers = [0, 1]\nmodel = "toy"\nformat = "json"\n[topk]\nlayers = 1\n[plot]\ngrid = true\n'
    )
    assert layers_of() == {1}
    assert {row["layer"] for row in json.loads(kscli("stats").stdout)} == {0, 1}


def test_the_nearest_file_upward_is_read_and_its_paths_are_from_its_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pyproject.toml").write_text(
        '[tool.kscli]\nmodel = "toy"\ndir = "artifacts"\n[tool.kscli.topk]\nformat = "json"\n'
    )
    below = project / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert layers_of() == {0}
    (project / "a" / "kscli.toml").write_text('layers = "2"\nformat = "json"\n')
    assert layers_of("-m", "toy", "--dir", str(project / "artifacts")) == {2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modell = 'toy'", "there is no option 'modell'; did you mean model?"),
        ("[topk]\nabs = 3", "abs is 3, and must be true or false"),
        ("[topk]\nlayr = 3", "there is no option 'layr'; did you mean layer?"),
        ("force = true", "force is taken from the command line or from KSCLI_FORCE alone"),
        ("trust_remote_code = true", "KSCLI_TRUST_REMOTE_CODE alone"),
        ("topk = 3", "topk is a command; write a table [topk]"),
        ("model = 2020-01-01", "must be a text or a number"),
        ("model =", "cannot be read as TOML"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(
    text: str, said: str, project: Path
) -> None:
    (project / "kscli.toml").write_text(text)
    refused = kscli("topk", "-m", "toy")
    assert refused.exit_code == 2
    error = one_sentence(refused.stderr)
    assert str(project / "kscli.toml") in error
    assert said in error
    assert kscli("topk", "--help").exit_code == 0


def test_a_wrong_value_says_where_it_is_from(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "kscli.toml").write_text("seed = -1")
    refused = kscli("stats", "-m", "toy")
    assert refused.exit_code == 2
    assert str(project / "kscli.toml") in one_sentence(refused.stderr)
    monkeypatch.setenv("KSCLI_SEED", "-2")
    assert "KSCLI_SEED" in one_sentence(kscli("stats", "-m", "toy").stderr)


def test_every_option_has_a_variable_and_no_two_have_one() -> None:
    for name in COMMANDS:
        command = load_command(name)
        for each in getattr(command, "commands", {name: command}).values():
            taken = [variable for param in each.params for variable in variables_of(param)]
            assert len(taken) == len(set(taken))
            assert all(param.envvar for param in each.params if names_of(param))


def test_several_models_in_a_variable_are_parted_by_spaces(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy(project / "other")
    (project / "other" / "toy").rename(project / "artifacts" / "second")
    monkeypatch.setenv("KSCLI_MODEL", "toy second")
    rows = json.loads(kscli("topk", "-f", "json", "-k", "2").stdout)
    assert len(rows) == 4
