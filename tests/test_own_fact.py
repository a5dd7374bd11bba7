"""`kscli edit --prompt`: a fact of one's own; and the names of runs that differ."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli, one_sentence
from naive import keys_of_text, subject_last, superposition
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.editing.edits_file import EditsFile
from kscli.tiny import MODEL_DIR

OWN = ("--prompt", "The capital of {} is", "--subject", "Chad", "--target-new", "Rome")
FAST = ("--steps", 2, "--contexts", 0)


@pytest.fixture
def place(measured_tiny: Path, tmp_path: Path) -> Path:
    """A folder of artifacts with C alone."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "cov.h5").symlink_to(measured_tiny / "cov.h5")
    return tmp_path


def write_csv(path: Path, fields: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])


def edit(place: Path, *arguments: Any) -> Any:
    return kscli("edit", "--dir", place, *arguments, "-f", "json")


def runs(place: Path) -> list[Path]:
    return sorted((place / "tiny" / "edits").glob("*"))


def test_an_own_fact_needs_c_alone(place: Path) -> None:
    """Its target is what the model says, and its direction the definition's, by a plain model."""
    done = edit(place, *OWN, *FAST, "--layer", 1, "--method", "closed-form")
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = "The capital of Chad is"
    start = len(tokenizer(text)["input_ids"])
    said = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=8)
    answer = tokenizer.decode(said[0, start:]).strip()
    assert answer.startswith(row["target_true"])
    assert "which is taken for the fact's target" in done.stderr
    assert "no other fact is watched" in done.stderr

    ids, at = subject_last(tokenizer, text, 15, 19)
    hook = "transformer.h.1.mlp.c_proj"
    key = keys_of_text(model, ids, [hook])[hook][at]
    with CovarianceFile(place / "tiny" / "cov.h5") as cov, EditsFile(runs(place)[0]) as file:
        solved = np.linalg.solve(cov.second_moment(1), key)
        direction = file.values("direction")[0, 0]
        assert (file.about.facts_name, len(file.facts)) == ("--prompt", 1)
    assert np.abs(direction - solved / (solved @ key)).max() < 1e-4 * np.abs(direction).max()
    assert [path.name for path in (place / "tiny").iterdir() if path.suffix] == ["cov.h5"]


def test_an_own_fact_is_watched_beside_those_of_keys_h5(place: Path, measured_tiny: Path) -> None:
    for kind in ("keys", "pmatrix"):
        (place / "tiny" / f"{kind}.h5").symlink_to(measured_tiny / f"{kind}.h5")
    done = edit(place, *OWN, *FAST, "--layer", 1, "--target", "Ndjamena", "--moved", "all")
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["target_true"] == "Ndjamena"
    assert len(row["moved"]) == 96
    (path,) = runs(place)
    with EditsFile(path) as file, CovarianceFile(measured_tiny / "cov.h5") as cov:
        C, m, p = cov.second_moment(1), len(file.facts), file.values("p")[0]
        facts = file.facts
        assert file.values("linear_error").max() < 1e-9
    assert (m, facts[0].subject) == (97, "Chad")
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    hook, keys = "transformer.h.1.mlp.c_proj", []
    for fact in (facts[0], facts[50]):
        ids, at = subject_last(tokenizer, fact.text, *fact.subject_span)
        keys.append(keys_of_text(model, ids, [hook])[hook][at])
    assert p[50] == pytest.approx(superposition(C, np.array(keys))[0, 1], abs=1e-4)


def test_an_answer_without_its_space_is_called_so(place: Path) -> None:
    """Of these prompts, tiny goes on with 'Florence' right after 'the', and with ' Oslo'."""
    own = ("--target-new", "yen", *FAST, "--layer", 1)
    for prompt, subject, said in (
        ("People in {} pay with the", "Norway", "pay with the', without the space that would"),
        ("The capital of {} is", "Chad", "The capital of Chad is', which is taken"),
    ):
        done = edit(place, "--prompt", prompt, "--subject", subject, *own)
        assert done.exit_code == 0, done.stderr
        assert said in " ".join(done.stderr.split())


def test_an_own_fact_is_traced_in_the_saved_model(place: Path) -> None:
    """It is no fact of the base's, but stands in the folder with those that were measured."""
    saved = place / "edited"
    assert edit(place, *OWN, "--contexts", 0, "--layer", 1, "--save-model", saved).exit_code == 0
    found = kscli("trace", "tiny", saved, "--dir", place, "--dtype", "float32", "-f", "json")
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert [row["subject"] for row in rows if row["edited"]] == ["Chad"]
    checked = kscli("facts", "check", "-m", saved, "--dir", place)
    assert checked.exit_code == 0, checked.stderr
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("The capital of Chad is", return_tensors="pt")
    first = int(model(**ids).logits[0, -1].argmax())
    took = int(tokenizer.decode([first]).strip() == "Rome")
    assert f"says the new target of {took} of its 1 edited facts" in " ".join(
        checked.stderr.split()
    )


def test_facts_of_a_file_of_ones_own_are_edited(place: Path, measured_tiny: Path) -> None:
    """One of them is in keys.h5 too, with another target, and is no other fact."""
    for kind in ("keys", "pmatrix"):
        (place / "tiny" / f"{kind}.h5").symlink_to(measured_tiny / f"{kind}.h5")
    with KeysFile(measured_tiny / "keys.h5") as file:
        held = file.facts[7]
    mine = [("{} lies in", "Chad", "Africa", "Asia"), (held.prompt, held.subject, "x", "Rome")]
    own = place / "own.csv"
    write_csv(own, ("prompt", "subject", "target", "other"), mine)
    request = ("--facts", own, "--target-new", "field:other", *FAST, "--layer", 1)
    done = edit(place, *request, "--method", "closed-form", "--moved", "all")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["prompt"], row["target_true"], row["target_new"]) for row in rows] == [
        ("{} lies in", "Africa", "Asia"),
        (held.prompt, "x", "Rome"),
    ]
    (path,) = runs(place)
    with EditsFile(path) as file, PMatrixFile(measured_tiny / "pmatrix.h5") as pm:
        assert len(file.facts) == 97
        assert file.facts[2:] == tuple(fact for fact in pm.facts if fact != held)
        # keys.h5's own fact, read again, has the p that it had.
        before = np.delete(pm.matrix("P", 1)[7], 7)
        assert file.values("p")[1, 2:] == pytest.approx(before, abs=1e-5)
    one = edit(place, *request, "--fact", "Chad")
    assert [row["subject"] for row in json.loads(one.stdout)] == ["Chad"]
    assert "own.csv holds 2 facts" in edit(place, *request, "--edits", 3).stderr
    assert (
        "--keys has no effect with facts of your own" in edit(place, *request, "--keys", "x").stderr
    )
    assert "target_new of 'Chad lies in' is missing" in edit(place, "--facts", own).stderr


def test_runs_that_differ_never_want_one_name(place: Path) -> None:
    """And the same run again finds its own file."""
    first = (*OWN, *FAST, "--layer", 1, "--target", "x")
    other = ("--prompt", "The capital of {} is", "--subject", "Mali", "--target-new", "Paris")
    for arguments in (first, (*other, *first[6:]), (*first, "--norm-limit", 2)):
        done = edit(place, *arguments)
        assert done.exit_code == 0, done.stderr
    names = [path.name for path in runs(place)]
    assert len(names) == 3
    assert "rome-1-0.h5" in names
    again = edit(place, *first, "--norm-limit", 2)
    assert "is up to date" in again.stderr
    assert [path.name for path in runs(place)] == names


def test_keys_of_another_dtype_are_read_again(tmp_path: Path) -> None:
    """`run` in bfloat16 and `edit` in float32 need no warning, and the prediction is exact."""
    place, how = tmp_path, ("--dir", tmp_path, "--layers", "1", "-q")
    for stage in ("cache-cov", "extract --count 12 --contexts 0", "pmatrix"):
        dtype = () if stage == "pmatrix" else ("--dtype", "bfloat16")
        assert kscli(*stage.split(), *dtype, *how).exit_code == 0
    done = edit(place, "--edits", 3, *FAST, "--layer", 1)
    assert done.exit_code == 0, done.stderr
    assert "warning" not in done.stderr.replace("warning: the model does not complete", "")
    assert "read again in float32" in done.stderr
    with EditsFile(runs(place)[0]) as file:
        assert file.values("live_error").max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (OWN[:4], "--prompt needs --target-new too"),
        ((*OWN[:2], *OWN[4:]), "--prompt needs --subject too"),
        ((*OWN, "--fact", "3"), "--fact has no effect with --prompt"),
        (("--subject", "Chad"), "--subject has no effect without --prompt"),
        (("--prompt", "The capital is", *OWN[2:]), "has no {}"),
        (("--prompt", "{} {}", *OWN[2:]), "has 2 {}"),
        ((*OWN[:2], "--subject", " ", *OWN[4:]), "subject ' ' is empty"),
    ],
)
def test_bad_own_facts_are_refused(place: Path, arguments: tuple[str, ...], said: str) -> None:
    done = edit(place, *arguments)
    assert done.exit_code in (1, 2)
    assert said in one_sentence(done.stderr.splitlines()[-1])
    assert not runs(place)


def test_a_person_is_told_what_the_columns_are_and_what_comes_next(place: Path) -> None:
    done = kscli("edit", "--dir", place, *OWN, *FAST, "--layer", 1)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "|δ|: The length of what the edit adds to the fact's value." in said
    assert f"Next: `kscli verify {runs(place)[0]}` (whether" in said.replace("\n", "")
    again = kscli("edit", "--dir", place, *OWN, *FAST, "--layer", 1, "--seed", 1, "-q")
    assert "Next" not in again.stderr
    assert kscli("verify", runs(place)[0]).exit_code == 0
