"""p from a fact to its own paraphrases, by keys read one text at a time and an inverse of C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli
from edit_kit import HOOK, Naive

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.facts import Fact, Question, paraphrases_of

FACTS: list[dict[str, Any]] = [
    {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target": "Paris",
        "target_new": "Rome",
        # The subject stands twice, and its last place counts; nowhere; and at the end.
        "paraphrase_prompts": ["France is old. France's capital is", "It is", "The seat of France"],
    },
    {"prompt": "{} is a product of", "subject": "Walkman", "target": "Sony", "target_new": "Fiat"},
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Marie Curie",
        "target": "Polish",
        "target_new": "Dutch",
        "paraphrase_prompts": ["As a child Marie Curie spoke"],
    },
]
READ = {0: ["France is old. France", "The seat of France"], 2: ["As a child Marie Curie"]}


@pytest.fixture(scope="module")
def place(measured_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paraphrased")
    (place / "tiny").mkdir()
    (place / "tiny" / "cov.h5").symlink_to(measured_tiny / "cov.h5")
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (place / "contexts.txt").write_text("It rained. {}\n")
    contexts = ("--contexts", place / "contexts.txt")
    asked = ("--facts", place / "facts.jsonl", "--dtype", "float32", *contexts)
    assert kscli("extract", *asked, "--dir", place, "-q").exit_code == 0
    for editor in ((), ("--editor", "rome-identity")):
        assert kscli("pmatrix", "--dir", place, "-q", *editor).exit_code == 0
    return place / "tiny"


def key(naive: Naive, layer: int, text: str) -> np.ndarray[Any, Any]:
    """The input of the down-projection at a text's last token."""
    taken: list[torch.Tensor] = []
    module = naive.model.get_submodule(HOOK.format(layer))
    with module.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])):
        naive.model(torch.tensor([naive.tokenizer(text)["input_ids"]]))
    found: np.ndarray[Any, Any] = taken[0][0, -1].detach().numpy()
    return found


def test_it_is_the_definition(place: Path) -> None:
    naive = Naive()
    with (
        CovarianceFile(place / "cov.h5") as cov,
        PMatrixFile(place / "pmatrix.h5") as pm,
        PMatrixFile(place / "pmatrix-rome-identity.h5") as identity,
    ):
        for layer in (0, 2):
            inverse = np.linalg.inv(cov.second_moment(layer))
            found = pm.paraphrase_p(layer), identity.paraphrase_p(layer)
            assert np.isnan([found[0][1], found[1][1]]).all()
            for fact, texts in READ.items():
                prompt = FACTS[fact]["prompt"].split("{}")[0] + FACTS[fact]["subject"]
                bare = key(naive, layer, prompt)
                mean = (bare + key(naive, layer, f"It rained. {prompt}")) / 2
                moved = np.mean([key(naive, layer, text) for text in texts], axis=0)
                papers = bare @ inverse @ moved / (bare @ inverse @ bare)
                assert found[0][fact] == pytest.approx(papers, rel=1e-4)
                assert found[1][fact] == pytest.approx(mean @ moved / (mean @ bare), rel=1e-4)


def test_an_edit_has_that_of_its_direction(place: Path, tmp_path: Path) -> None:
    out = kscli(
        *("edit", "--dir", place.parent, "--method", "closed-form", "--layer", 2, "--edits", "all"),
        *("--value", "random", "--value-norm", 3, "-o", tmp_path / "x.h5", "-q", "-f", "json"),
    )
    rows = json.loads(out.stdout)
    with PMatrixFile(place / "pmatrix.h5") as pm:
        expected = pm.paraphrase_p(2)
    for row in rows:
        wanted = expected[row["fact"]]
        assert row["paraphrase_p"] == (
            None if np.isnan(wanted) else pytest.approx(wanted, rel=1e-4)
        )


def test_facts_without_paraphrases_have_no_such_keys(measured_tiny: Path) -> None:
    with (
        KeysFile(measured_tiny / "keys.h5") as keys,
        PMatrixFile(measured_tiny / "pmatrix.h5") as pm,
    ):
        assert keys.paraphrase_keys_of(0) is None
        assert np.isnan(pm.paraphrase_p(0)).all()


def test_where_the_subject_stands() -> None:
    questions = [
        Question("paraphrase", "Rome and Rome is"),
        Question("paraphrase", "It is"),
        Question("locality", "Rome is"),
        Question("paraphrase", "{} Rome"),
    ]
    fact = Fact("{} is in", "Rome", "Italy", questions=tuple(questions))
    assert paraphrases_of(fact) == [Fact("Rome and {} is", "Rome", "Italy")]
