from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_kit import kscli, one_sentence

from kscli.artifacts import KeysFile
from kscli.errors import FactsError, UsageError
from kscli.facts import (
    DEFAULT_COUNT,
    Fact,
    fact_record,
    facts_identity,
    read_facts,
    write_records,
)
from kscli.records import FORMATS

KNOWN = Path(__file__).parent.parent.parent / "shared" / "data" / "counterfact_known_256.json"

PLAIN = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"},
    {"prompt": "{} was born in", "subject": "Ada Lovelace", "target": "London"},
    {"prompt": "The currency of {}", "subject": "Japan", "target": "the yen"},
]


def counterfact_record(case_id: int = 7) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "pararel_idx": 3,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "subject": "Danielle Darrieux",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
    }


def as_csv(records: list[dict[str, str]]) -> str:
    lines = [",".join(records[0])]
    lines += [",".join(f'"{value}"' for value in record.values()) for record in records]
    return "\n".join(lines) + "\n"


def as_jsonl(records: list[Any]) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


def message(path: Path, text: str | bytes, **options: Any) -> str:
    """What is said when the file holds this text."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FactsError) as caught:
        read_facts(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A fact


@pytest.mark.parametrize(
    ("prompt", "subject", "text", "span"),
    [
        ("The capital of {} is", "France", "The capital of France is", (15, 21)),
        ("{} is in", "Paris", "Paris is in", (0, 5)),
        ("In Paris, the mayor of {}", "Paris", "In Paris, the mayor of Paris", (23, 28)),
        ("{0} and {x} of {} are }{", "A{}B", "{0} and {x} of A{}B are }{", (15, 19)),
        ("{{}} is", "x", "{x} is", (1, 2)),
        ("Of {}  is", " Zoë ", "Of  Zoë   is", (3, 8)),
        ("{} 是", "🦊中", "🦊中 是", (0, 2)),
    ],
)
def test_text_and_span(prompt: str, subject: str, text: str, span: tuple[int, int]) -> None:
    fact = Fact(prompt, subject, "x")
    assert fact.text == text
    assert fact.subject_span == span
    assert fact.text[slice(*fact.subject_span)] == subject


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("The capital of France is", "France", "Paris"), "has no {}"),
        (("{} and {}", "France", "Paris"), "has 2 {}"),
        (("{} is", "", "Paris"), "subject '' is empty"),
        (("{} is", " \t", "Paris"), r"subject ' \\t' is empty"),
        (("{} is", "France", ""), "target '' is empty"),
        (("{} is", "France\0", "Paris"), "null character"),
        (("{} is", "France", "\ud800"), "surrogate"),
    ],
)
def test_not_a_fact(fields: tuple[str, str, str], said: str) -> None:
    with pytest.raises(FactsError, match=said):
        Fact(*fields)


# Files


def test_every_format_gives_the_same_facts(tmp_path: Path) -> None:
    expected = tuple(
        Fact(record["prompt"], record["subject"], record["target"], "", index)
        for index, record in enumerate(PLAIN)
    )
    files = {
        "f.json": json.dumps(PLAIN),
        "f.jsonl": as_jsonl(PLAIN),
        "f.csv": as_csv(PLAIN),
        "bom.csv": "\ufeff" + as_csv(PLAIN),
        "bom.json": "\ufeff" + json.dumps(PLAIN),
        "crlf.csv": as_csv(PLAIN).replace("\n", "\r\n"),
        "crlf.jsonl": as_jsonl(PLAIN).replace("\n", "\r\n"),
        "blank.jsonl": "\n\n" + as_jsonl(PLAIN).replace("\n", "\n\n"),
        "UPPER.JSON": json.dumps(PLAIN),
        "semicolons.csv": as_csv(PLAIN).replace(",", ";"),
        "f.tsv": as_csv(PLAIN).replace(",", "\t"),
    }
    contents = {name: text.encode() for name, text in files.items()}
    contents["f.jsonl.gz"] = gzip.compress(contents["f.jsonl"])
    contents["f.csv.xz"] = lzma.compress(contents["f.csv"])
    pq.write_table(pa.Table.from_pylist(PLAIN), tmp_path / "f.parquet")
    contents["f.parquet"] = (tmp_path / "f.parquet").read_bytes()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found = read_facts(str(tmp_path / name))
        assert found.facts == expected, name
        assert found.name == str(tmp_path / name)
        assert found.identity == facts_identity(expected)


def test_counterfact_record(tmp_path: Path) -> None:
    fact = Fact("The mother tongue of {} is", "Danielle Darrieux", "French", "P103", 7, "English")
    for name, text in {
        "c.json": json.dumps([counterfact_record()]),
        "c.jsonl": as_jsonl([counterfact_record()]),
    }.items():
        (tmp_path / name).write_text(text)
        assert read_facts(tmp_path / name).facts == (fact,)
    pq.write_table(pa.Table.from_pylist([counterfact_record()]), tmp_path / "c.parquet")
    assert read_facts(tmp_path / "c.parquet").facts == (fact,)


def test_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text(
        "note,relation,case_id,target,subject,prompt\n"
        'a,capital,12,Paris,"France, the country","Of {}\nis"\n'
        "b,,,Rome,Italy,Of {} is\n"
    )
    assert read_facts(path).facts == (
        Fact("Of {}\nis", "France, the country", "Paris", "capital", 12),
        Fact("Of {} is", "Italy", "Rome", "", 1),
    )
    path = tmp_path / "f.jsonl"
    records = [{**PLAIN[0], "case_id": "5"}, {**PLAIN[1], "case_id": None, "relation": None}]
    path.write_text(as_jsonl(records))
    assert [fact.case_id for fact in read_facts(path).facts] == [5, 1]


def test_nothing_is_altered(tmp_path: Path) -> None:
    record = {
        "prompt": " {}\u2028 is {0} ",
        "subject": " Zoe\u0308\t",
        "target": " x ",
        "case_id": 0,
    }
    (tmp_path / "f.jsonl").write_bytes(as_jsonl([record]).encode())
    (tmp_path / "f.json").write_bytes(json.dumps([record]).encode())
    with (tmp_path / "f.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, record)
        writer.writeheader()
        writer.writerow(record)
    for name in ("f.jsonl", "f.json", "f.csv"):
        assert read_facts(tmp_path / name).facts == (
            Fact(" {}\u2028 is {0} ", " Zoe\u0308\t", " x "),
        )


def test_tiny() -> None:
    pytest.importorskip("kscli.tiny", reason="the embedded model is not there")
    found = read_facts("tiny")
    assert len(found.facts) >= 160
    assert found.name == "tiny"


def test_known_facts() -> None:
    if not KNOWN.exists():
        pytest.skip(f"{KNOWN.name} is not there")
    records = json.loads(KNOWN.read_text())
    facts = read_facts(KNOWN).facts
    assert len(facts) == len(records) == 256
    for fact, record in zip(facts, records, strict=True):
        rewrite = record["requested_rewrite"]
        assert fact.case_id == record["case_id"]
        assert fact.text == rewrite["prompt"].replace("{}", rewrite["subject"])
        assert fact.target == rewrite["target_true"]["str"]
        assert fact.relation == rewrite["relation_id"]
        assert fact.target_new == rewrite["target_new"]["str"]
    assert read_facts(KNOWN, DEFAULT_COUNT, at_most=True).facts == facts[:128]


# How many


def test_count(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps(PLAIN))
    everything = read_facts(path)
    assert len(everything.facts) == 3
    assert read_facts(path, 2).facts == everything.facts[:2]
    assert read_facts(path, 3).facts == everything.facts
    assert read_facts(path, DEFAULT_COUNT, at_most=True).facts == everything.facts
    with pytest.raises(FactsError, match=r"4 facts were asked for, but .*f\.json holds 3; .* all"):
        read_facts(path, 4)
    for count in (0, -1):
        with pytest.raises(UsageError, match=f"count of {count} facts"):
            read_facts(path, count)


def test_identity_tells_every_field_apart() -> None:
    fact = Fact("a {} b", "s", "t", "r", 1)
    others = [
        Fact("a {} c", "s", "t", "r", 1),
        Fact("a {} b", "x", "t", "r", 1),
        Fact("a {} b", "s", "x", "r", 1),
        Fact("a {} b", "s", "t", "x", 1),
        Fact("a {} b", "s", "t", "r", 2),
        Fact("a {} b", "s", "t", "r", 1, "n"),
    ]
    identities = {facts_identity([each]) for each in [fact, *others]}
    identities |= {facts_identity([fact, fact]), facts_identity([*others, fact])}
    assert len(identities) == 9
    assert facts_identity([fact, others[0]]) != facts_identity([others[0], fact])
    assert facts_identity([fact]) == facts_identity((Fact("a {} b", "s", "t", "r", 1),))


# Bad files


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FactsError, match=r"no facts file .*nowhere\.json; give tiny, counterfact"):
        read_facts(tmp_path / "nowhere.json")
    with pytest.raises(FactsError, match="is a folder"):
        read_facts(tmp_path)
    for name in ("f.txt", "f", "f.parquet.gz"):
        _, said = message(tmp_path / name, "France: Paris\n").split("must end in")
        assert [kind for kind in FORMATS if kind in said] == [
            kind for kind, known in FORMATS.items() if known.fields
        ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_files_without_facts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    for text in (b"", b" \n\n", b"\xef\xbb\xbf"):
        assert "holds no facts" in message(path, text)
    assert "line 2: not UTF-8" in message(path, b"\nd\xe9f\n")
    assert "not UTF-8" in message(path, as_jsonl(PLAIN).encode("utf-16"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("f.json", "[]", "holds no facts"),
        ("f.csv", "prompt,subject,target\n", "holds no facts"),
        (
            "f.json",
            json.dumps({"facts": PLAIN}),
            "line 1: there is no prompt; the fields",
        ),
        (
            "f.json",
            json.dumps(PLAIN[0], indent=1)[:-1],
            "a .json file holds one list, a .jsonl file",
        ),
        ("f.json", "[{]", "not valid JSON"),
        ("f.json", "[" * 100_000, "not valid JSON"),
        ("f.json", "[" + "9" * 5000 + "]", "not valid JSON"),
        ("f.json", as_jsonl(PLAIN) + "{", "f.json, line 4: not valid JSON"),
        ("f.jsonl", json.dumps(PLAIN), "line 1: a list, but should be an object"),
        ("f.jsonl", as_jsonl(PLAIN) + "{", "line 4: not valid JSON"),
        ("f.jsonl", "\n\nnull", "line 3: nothing, but should be an object"),
        ("f.json", json.dumps([PLAIN[0], "x"]), "record 2: 'x', but should be an object"),
        (
            "f.csv",
            "Prompt,subject,target\nOf {},a,b\n",
            "line 2: there is no prompt; the fields there are: 'Prompt', 'subject', 'target'",
        ),
        (
            "f.csv",
            "prompt|subject|target\nOf {}|a|b\n",
            "there are: 'prompt|subject|target'",
        ),
        ("f.csv", "prompt,subject,target\nOf {},a\n", "line 2: the target is nothing"),
        ("f.csv", "prompt,subject,target\nOf {}, a,b,c\n", "more columns than the header's 3"),
        ("f.csv", "prompt,subject,target\nOf {},,b\n", "line 2: the subject '' is empty"),
        ("f.csv", 'prompt,subject,target\n"Of {},a,b\n', "not valid CSV"),
        ("f.csv", "prompt,subject,target\nOf {},a,b\nOf c,a,b\n", "line 3: the prompt 'Of c' has"),
        (
            "f.jsonl",
            as_jsonl([{**PLAIN[0], "prompt": "{} {}"}]),
            "the prompt '{} {}' has 2",
        ),
        ("f.jsonl", as_jsonl([{**PLAIN[0], "subject": 7}]), "line 1: the subject is 7"),
        ("f.jsonl", as_jsonl([{**PLAIN[0], "target": ["a"]}]), "the target is a list"),
        ("f.jsonl", as_jsonl([{**PLAIN[0], "relation": {}}]), "the relation is an object"),
        ("f.jsonl", as_jsonl([{**PLAIN[0], "target_new": ["a"]}]), "the target_new is a list"),
        ("f.jsonl", '{"prompt": "{}", "subject": "\\ud800", "target": "x"}', "surrogate"),
        ("f.jsonl", "{}", "there is no prompt; the fields there are: none"),
        ("f.json", '[{"requested_rewrite": 3}]', "requested_rewrite is 3"),
        ("f.json", '[{"requested_rewrite": {}}]', "record 1: requested_rewrite has no target_true"),
        ("f.csv", "a\nb\n", "the fields there are: 'a'"),
        ("f.csv", '"a\nb",' * 500 + "\nc\n", r"are: 'a\nb'"),
        (
            "f.json",
            '[{"requested_rewrite": {"target_true": {"str": "x"}, "prompt": "{}"}}]',
            "there is no subject; the fields there are: 'target_true', 'prompt'",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    assert said in message(tmp_path / name, text)


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    record = {**PLAIN[0], "prompt": "word " * 1000}
    assert len(message(tmp_path / "f.jsonl", as_jsonl([record]))) < 300 + len(str(tmp_path))


def test_records_after_the_count_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(as_jsonl(PLAIN) + "{")
    assert len(read_facts(path, 3).facts) == 3


# The Hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[Any]]) -> list[Any]:
    """Puts these splits in the Hub's place; the list returned fills with what is asked for."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def load_dataset(*arguments: Any, split: str, **options: Any) -> list[Any]:
        asked.append((*arguments, split, options))
        if split not in splits:
            raise ValueError(f"Bad split: {split}.\nAvailable splits: {list(splits)}")
        return splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = SimpleNamespace(sha="0" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: commit)
    return asked


def test_counterfact_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {
        "train": [counterfact_record(4), counterfact_record(2)],
        "test": [counterfact_record(9)],
    }
    asked = fake_hub(monkeypatch, splits)
    assert [fact.case_id for fact in read_facts("counterfact").facts] == [4, 2, 9]
    assert [(repository, split) for repository, _, split, _ in asked] == [
        ("azhx/counterfact", "train"),
        ("azhx/counterfact", "test"),
    ]
    assert all(options["streaming"] and len(options["revision"]) == 40 for *_, options in asked)
    asked.clear()
    assert len(read_facts("counterfact", 2).facts) == 2
    assert len(asked) == 1
    with pytest.raises(FactsError, match="4 facts were asked for, but counterfact holds 3"):
        read_facts("counterfact", 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:me/facts", ("me/facts", None, "train")),
        ("hf:me/facts:en", ("me/facts", "en", "train")),
        ("hf:me/facts:en:test", ("me/facts", "en", "test")),
        ("hf:me/facts::test", ("me/facts", None, "test")),
    ],
)
def test_other_data_sets_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None, str]
) -> None:
    asked = fake_hub(monkeypatch, {"train": PLAIN, "test": PLAIN})
    assert [fact.subject for fact in read_facts(name).facts] == [
        record["subject"] for record in PLAIN
    ]
    assert [request[:3] for request in asked] == [expected]


def test_bad_names_and_records_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"train": [{"text": "x"}]})
    for name in ("hf:", "hf::en", "hf:me/facts:en:test:more"):
        with pytest.raises(UsageError, match=r"hf:OWNER/NAME\[:CONFIG"):
            read_facts(name)
    with pytest.raises(FactsError, match="hf:me/facts, train record 1: there is no prompt"):
        read_facts("hf:me/facts")
    said = r"me/facts cannot be fetched: Bad split: dev\. Available splits: \['train'\]\. Write"
    with pytest.raises(FactsError, match=said):
        read_facts("hf:me/facts::dev")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FactsError) as caught:
        read_facts("counterfact", 1)
    assert "The Hub at http://127.0.0.1:9 cannot be reached" in str(caught.value)
    assert "data set azhx/counterfact cannot be read" in str(caught.value)
    assert "--facts" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_a_file_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(as_jsonl(PLAIN))
    program = (
        "import sys; from kscli.facts import read_facts; import kscli.positions;"
        f"read_facts({str(path)!r});"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'huggingface_hub'};"
        "print(heavy & set(sys.modules))"
    )
    root = str(Path(__file__).parent.parent)
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("field", ["prompt", "subject", "target", "relation", "target_new"])
def test_a_fact_of_very_many_characters_is_refused_at_once(field: str, tmp_path: Path) -> None:
    record = {"prompt": "The capital of {} is", "subject": "X", "target": "y"}
    long = "a{}" if field == "prompt" else ""
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(record | {field: long + "b c " * 20_000}) + "\n")
    began = time.monotonic()
    with pytest.raises(FactsError, match=rf"f.jsonl, line 1: the {field} .* too long") as refused:
        read_facts(path)
    assert time.monotonic() - began < 1
    assert len(str(refused.value)) < 400
    path.write_text(json.dumps(record | {field: long + "b c " * 4_900}) + "\n")
    assert len(read_facts(path).facts) == 1


# Questions


def test_counterfacts_questions_go_into_keys_and_edits_and_facts_files(
    shared_data: Path, tmp_path: Path
) -> None:
    """Paraphrase, neighbourhood and generation prompts, as the file has them, kind by kind."""
    source = shared_data / "counterfact_known_256.json"
    listed = json.loads(source.read_text())[:6]
    expected = [
        [
            *(("paraphrase", text, "") for text in record["paraphrase_prompts"]),
            *(("neighbourhood", text, "") for text in record["neighborhood_prompts"]),
            *(("generation", text, "") for text in record["generation_prompts"]),
        ]
        for record in listed
    ]

    def asked(facts: Sequence[Fact]) -> list[list[Any]]:
        return [[astuple(question) for question in fact.questions] for fact in facts]

    facts = read_facts(source, 6)
    assert asked(facts.facts) == expected
    how = ("--facts", source, "--count", 6, "--contexts", 0, "--layers", 0, "--dtype", "float32")
    assert kscli("extract", "--dir", tmp_path, *how, "-q").exit_code == 0
    with KeysFile(tmp_path / "tiny" / "keys.h5") as keys:
        assert asked(keys.facts) == expected
    write_records(tmp_path / "again.jsonl", map(fact_record, facts.facts), force=False)
    assert asked(read_facts(tmp_path / "again.jsonl").facts) == expected


def test_questions_are_no_part_of_a_fact_but_of_its_keys_file(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "{} is in", "subject": "Lima", "target": "Peru"}
    row["portability"] = [{"prompt": "Lima's president is of", "target": "Peru"}]
    row["locality"] = [{"prompt": "Rome is in", "target": "Italy"}, "Oslo is in"]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text(json.dumps(row))
    paths[1].write_text(json.dumps({name: row[name] for name in ("prompt", "subject", "target")}))
    first, second = map(read_facts, paths)
    assert first.facts == second.facts
    assert first.identity == second.identity
    assert [(q.kind, q.prompt, q.target) for q in first.facts[0].questions] == [
        ("portability", "Lima's president is of", "Peru"),
        ("locality", "Rome is in", "Italy"),
        ("locality", "Oslo is in", ""),
    ]
    how = ("extract", "--contexts", 0, "--layers", 0, "--dtype", "float32", "--dir", tmp_path)
    assert kscli(*how, "--facts", paths[0], "-q").exit_code == 0
    changed = kscli(*how, "--facts", paths[1])
    assert changed.exit_code == 1
    assert "questions changed" in one_sentence(changed.stderr)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "paraphrase_prompts",
            "Lima lies in",
            "paraphrase_prompts is 'Lima lies in', but should be a list",
        ),
        ("paraphrase_prompts", [3], "the paraphrase_prompts is 3, but should be text"),
        ("neighborhood_prompts", [" "], "a neighbourhood prompt is empty"),
        ("locality", [{"question": "x"}], "there is no prompt"),
        ("portability", [{"prompt": "x", "target": ["a"]}], "the target is a list"),
        ("generation_prompts", ["x" * 20_001], "is too long"),
        ("generation_prompts", ["a\0b"], "null character"),
    ],
)
def test_questions_that_make_no_sense_are_refused(
    tmp_path: Path, name: str, value: Any, said: str
) -> None:
    path = tmp_path / "facts.jsonl"
    row = {"prompt": "{} is in", "subject": "Lima", "target": "Peru", name: value}
    path.write_text(json.dumps(row))
    with pytest.raises(FactsError, match=said) as found:
        read_facts(path)
    assert str(path) in str(found.value)
