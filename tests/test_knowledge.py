"""Which facts a model knows, the files that say so, and the facts that several models know."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_kit import ROOT, kscli, one_sentence
from families import save_family

from kscli.errors import ArtifactError, FactsError, UsageError
from kscli.facts import Fact, fact_record, read_facts, write_records
from kscli.knowledge import begins_with, check_facts, read_knowledge, select_facts, write_knowledge
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions

FACTS = tuple(Fact("The capital of {} is", f"Land {i}", f"City {i}", "P36", i) for i in range(10))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


def write_results(
    path: Path, model: str, known: Sequence[int], facts: Sequence[Fact] = FACTS
) -> Path:
    """A file as `facts check` writes it, where the facts of these indexes are known."""
    records = [
        {**fact_record(fact), "known": index in known, "model": model}
        for index, fact in enumerate(facts)
    ]
    write_records(path, records, force=False)
    return path


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    return [
        write_results(tmp_path / "a" / "facts.jsonl", "a", [0, 1, 2, 3, 4, 5]),
        write_results(tmp_path / "b" / "facts.jsonl", "b", [2, 3, 4, 5, 6, 7]),
    ]


# What it is to know a fact


@pytest.mark.parametrize(
    ("continuation", "target", "known"),
    [
        (" Paris, the city", "Paris", True),
        ("Paris", "Paris", True),
        (" \n Paris", " Paris ", True),
        (" Paris's mayor", "Paris", True),
        (" France", "Fran", False),
        (" Parisian", "Paris", False),
        (" 1984", "198", False),
        (" Par", "Paris", False),
        (" paris", "Paris", False),
        (" the city of Paris", "Paris", False),
        (" New York City", "New York", True),
        (" New Yorkers", "New York", False),
        (" C++11", "C++", True),
        (" Caf\u0065\u0301 de", "Caf\u00e9", True),
        (" Caf\u00e9 de", "Cafe", False),
        (" 巴黎是", "巴黎", True),
        ("", "Paris", False),
        (" \ufffd", "Paris", False),
    ],
)
def test_a_continuation_begins_with_the_target(continuation: str, target: str, known: bool) -> None:
    assert begins_with(continuation, target) is known


def test_the_embedded_model_knows_its_facts(tiny: LoadedModel) -> None:
    facts = read_facts("tiny").facts
    checked = check_facts(tiny, facts)
    assert [each.fact for each in checked] == list(facts)
    assert sum(each.known for each in checked) == 177
    assert all(each.continuation.startswith(f" {each.fact.target}") for each in checked)
    assert all(each.rank == 1 and each.logprob > math.log(0.1) for each in checked)


def test_another_target_is_not_known(tiny: LoadedModel) -> None:
    fact = Fact("The capital of {} is", "France", "Rome")
    (checked,) = check_facts(tiny, [fact])
    (true,) = check_facts(tiny, [Fact(fact.prompt, fact.subject, "Paris")])
    assert not checked.known
    assert checked.rank > 1
    assert checked.logprob < true.logprob
    assert checked.continuation == true.continuation == " Paris."


def test_a_real_model_knows_some_of_the_facts(
    smollm2_model: LoadedModel, shared_data: Path
) -> None:
    """Of the first 8 facts; transformers' generate on single prompts gives the same."""
    facts = read_facts(shared_data / "counterfact_known_256.json", 8).facts
    checked = check_facts(smollm2_model, facts)
    assert [index for index, each in enumerate(checked) if each.known] == [0, 2, 3, 4, 6, 7]


# The file


def test_the_file_is_read_as_facts_and_as_knowledge(tiny: LoadedModel, tmp_path: Path) -> None:
    facts = (*read_facts("tiny", 5).facts, Fact("Of {}\u2028 is", "Zoë", 'the \n"x"', "r", -3))
    checked = check_facts(tiny, facts)
    path = tmp_path / "new" / "facts.jsonl"
    write_knowledge(tiny, checked, path)
    assert read_facts(path).facts == facts
    knowledge = read_knowledge(path)
    assert knowledge.model == "tiny"
    assert knowledge.known == {fact: index < 5 for index, fact in enumerate(facts)}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    for record, each in zip(records, checked, strict=True):
        assert record["probability"] == pytest.approx(math.exp(each.logprob))
        assert record["logprob"] == each.logprob
        assert record["rank"] == each.rank
        assert record["continuation"] == each.continuation
        assert record["weights"] == tiny.identity.weights
        assert record["dtype"] == "float32"
    with pytest.raises(ArtifactError, match="exists; add --force"):
        write_knowledge(tiny, checked, path)
    write_knowledge(tiny, checked[:1], path, force=True)
    assert len(read_facts(path).facts) == 1
    with pytest.raises(UsageError, match=r"facts\.json: .*ends in \.jsonl"):
        write_knowledge(tiny, checked, path.with_suffix(".json"))


def test_files_that_say_nothing_of_a_model(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    write_records(plain, map(fact_record, FACTS), force=False)
    with pytest.raises(FactsError, match=r"plain\.jsonl, line 1: it does not say which model"):
        read_knowledge(plain)
    one, two = (write_results(tmp_path / f"{name}.jsonl", name, []) for name in "ab")
    both = [json.loads(line) for path in (one, two) for line in path.read_text().splitlines()]
    one.write_text("".join(json.dumps(row | {"digest": None}) + "\n" for row in both))
    with pytest.raises(FactsError, match=r"a\.jsonl holds what 2 models know"):
        read_knowledge(one)
    with pytest.raises(FactsError, match="no facts file"):
        read_knowledge(tmp_path / "nowhere.jsonl")


# Several models


def test_the_facts_that_all_know_and_that_none_knows(results: list[Path]) -> None:
    read = [read_knowledge(path) for path in results]
    assert [fact.case_id for fact in select_facts(read, None).facts] == [2, 3, 4, 5]
    unknown = select_facts(read, None, unknown=True)
    assert [fact.case_id for fact in unknown.facts] == [8, 9]
    assert unknown.candidates == 2
    of_one = select_facts(read[:1], None, unknown=True)
    assert [fact.case_id for fact in of_one.facts] == [6, 7, 8, 9]


def test_the_draw_is_the_seed_s(results: list[Path]) -> None:
    read = [read_knowledge(path) for path in results]
    draws = {
        tuple(fact.case_id for fact in select_facts(read, 2, seed).facts) for seed in range(30)
    }
    assert draws == {(2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)}
    assert select_facts(read, 2, 7) == select_facts(read, 2, 7)
    assert select_facts(read, 2, 7).candidates == 4
    assert set(select_facts(read, 2, 7).facts) == set(select_facts(read[::-1], 2, 7).facts)


def test_a_fact_repeated_word_for_word_is_one(tmp_path: Path) -> None:
    path = write_results(tmp_path / "f.jsonl", "a", [0, 1, 2], [FACTS[0], FACTS[0], FACTS[1]])
    assert select_facts([read_knowledge(path)], None).facts == FACTS[:2]


def test_too_few_facts(results: list[Path]) -> None:
    read = [read_knowledge(path) for path in results]
    said = "5 facts were asked for, but of the 10 that a, b completed there are 4 that every model"
    with pytest.raises(FactsError, match=said):
        select_facts(read, 5)
    with pytest.raises(FactsError, match="there are 4 that it does not know"):
        select_facts(read[:1], 5, unknown=True)


def test_different_facts(results: list[Path], tmp_path: Path) -> None:
    fewer = write_results(tmp_path / "c.jsonl", "c", [], FACTS[:8])
    read = [read_knowledge(path) for path in (results[0], fewer)]
    for order in (read, read[::-1]):
        with pytest.raises(FactsError) as caught:
            select_facts(order, 1)
        assert f"{fewer} lacks 2 of the 10 facts of {results[0]}" in str(caught.value)
        assert "'The capital of Land 8 is'" in str(caught.value)


# The command line


def test_check_select_and_extract(tmp_path: Path) -> None:
    """Two models: tiny, and one of random weights that knows nothing."""
    save_family("gpt2", tmp_path / "random")
    models = {"tiny": ("tiny", 20), str(tmp_path / "random"): ("random", 0)}
    at = ("--dir", tmp_path / "artifacts")
    for model, (name, known) in models.items():
        asked = ("--facts", "tiny", "--count", "20", "-f", "json")
        done = kscli("facts", "check", "-m", model, *asked, *at)
        assert done.exit_code == 0, done.stderr
        path = tmp_path / "artifacts" / name / "facts.jsonl"
        assert json.loads(done.stdout) == [
            {"model": name, "facts": 20, "known": known, "share": known / 20, "path": str(path)}
        ]
        assert len(read_facts(path).facts) == 20

    out = tmp_path / "chosen.jsonl"
    select = ("facts", "select", "tiny", *at, "-o", out)
    done = kscli(*select, "--count", "12", "--seed", "3", "-f", "json")
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["models"], row["facts"], row["candidates"], row["selected"]) == ("tiny", 20, 20, 12)
    chosen = read_facts(out).facts
    assert len(chosen) == 12
    assert set(chosen) < set(read_facts("tiny", 20).facts)
    done = kscli("extract", "--facts", out, "--layers", "0", *at)
    assert done.exit_code == 0, done.stderr

    assert "exists; add --force" in one_sentence(kscli(*select, "--count", "12").stderr)
    few = kscli(*select, "--force")
    assert few.exit_code == 1
    assert "128 facts were asked for" in one_sentence(few.stderr)
    assert read_facts(out).facts == chosen
    none = kscli(*select, "random", "--unknown", "--count", "all", "--force")
    assert "no model knows" in one_sentence(none.stderr)
    path = tmp_path / "artifacts" / "random" / "facts.jsonl"
    done = kscli("facts", "select", path, "--unknown", "--count", "all", "-o", out, "--force", "-q")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert "known to none" in done.stdout
    assert len(read_facts(out).facts) == 20


def test_what_cannot_be_checked_or_selected(tmp_path: Path) -> None:
    at = ("--dir", tmp_path)
    for arguments, code, said in (
        (("check", "-o", tmp_path / "f.csv"), 2, "ends in .jsonl"),
        (("check", "--facts", tmp_path / "none.json"), 1, "no facts file"),
        (("check", "--count", "999"), 1, "999 facts were asked for"),
        (("check", "--count", "no"), 2, "must be a positive number, or all"),
        (("select", "gpt-j"), 1, "`kscli facts check --model gpt-j --dir"),
        (("select", tmp_path / "none.jsonl"), 1, "no facts file"),
        (("select", "tiny", "-o", tmp_path), 2, "ends in .jsonl"),
    ):
        done = kscli("facts", *arguments, *at)
        assert done.exit_code == code, done.stderr
        assert said in one_sentence(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_select_imports_nothing_heavy(results: list[Path], tmp_path: Path) -> None:
    program = (
        "import sys; from kscli.cli.app import app;"
        f"app(['facts', 'select', {str(results[0])!r}, '--count', '2', '-o',"
        f" {str(tmp_path / 'out.jsonl')!r}], standalone_mode=False);"
        "print({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.stdout.splitlines()[-1] == "set()"
    assert len(read_facts(tmp_path / "out.jsonl").facts) == 2


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    """Its records were written by kscli, so one that is changed, moved or taken out is noticed."""
    path = write_results(tmp_path / "a.jsonl", "a", [])
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    first, second, *others = lines
    wrong = {
        "a value": whole.replace("false", "true", 1),
        "a name": whole.replace(FACTS[0].subject, "Somebody", 1),
        "order": "".join([second, first, *others]),
        "the end": "".join(lines[:-1]),
        "the beginning": "".join(lines[1:]),
        "one twice": first + whole,
        "a digest": whole.replace('"digest"', '"other"', 1),
        "an own one": whole + json.dumps(fact_record(FACTS[0])) + "\n",
    }
    for what, text in wrong.items():
        assert text != whole, what
        path.write_text(text)
        with pytest.raises(FactsError, match=r"a\.jsonl, .*was changed after kscli wrote it"):
            read_facts(path)
    path.write_text(whole)
    assert len(read_facts(path).facts) == len(lines)
    # What a person takes out on purpose is a facts file of its own.
    kept = [{k: v for k, v in json.loads(line).items() if k != "digest"} for line in lines[1:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert len(read_facts(path).facts) == len(kept)
