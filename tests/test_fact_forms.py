"""Facts in the forms in which they are published, each a small file of its real fields."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_kit import kscli, one_sentence

from kscli.artifacts import KeysFile
from kscli.errors import FactsError
from kscli.facts import Fact, FactSet, read_facts

ZSRE = [
    {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": "University of Michigan",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
        "cond": "Trinity College >> University of Michigan || What university did ...",
    },
    {
        "subject": "Ramalinaceae",
        "src": "To which family does Ramalinaceae belong, if Ramalinaceae is one?",
        "rephrase": "",
        "alt": "",
        "answers": ["Lecanorales", "Lecanoromycetes"],
        "loc": "nq question: what is it?",
        "loc_ans": ["this", "that"],
    },
    {"subject": "Nobody", "src": "Who is it?", "answers": ["x"], "alt": "y"},
    {"subject": "it", "src": "Who is it?", "answers": [], "alt": "y"},
]
MQUAKE = [
    {
        "case_id": 1,
        "requested_rewrite": [
            {
                "prompt": "{} is a citizen of",
                "relation_id": "P27",
                "target_new": {"str": "Croatia", "id": "Q224"},
                "target_true": {"str": "United States of America", "id": "Q30"},
                "subject": "Ellie Kemper",
                "question": "What is the country of citizenship of Ellie Kemper?",
            }
        ],
        "questions": ["Who leads the country of Ellie Kemper?", "Who is its president?"],
        "answer": "Joe Biden",
        "new_answer": "Kolinda Grabar",
        "new_answer_alias": [],
        "single_hops": [],
    },
    {"case_id": 2, "requested_rewrite": [{}, {}], "questions": [], "new_answer": "x"},
]
KNOWN = [
    {
        "known_id": 0,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "template": "{} is located in the continent",
        "prediction": " of Antarctica. It is",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    }
]
KNOWEDIT = [
    {
        "subject": "Leo Arons",
        "prompt": "The place of death of Leo Arons is",
        "target_new": "Berlin",
        "ground_truth": ["Munich"],
        "rephrase": "Leo Arons passed away in",
        "portability": {
            "Logical_Generalization": [
                {"prompt": "Is Leo Arons alive?", "ground_truth": [["No"], ["Incorrect"]]}
            ],
            "Reasoning": [{"prompt": "The country of his death is", "ground_truth": "Germany"}],
            "Subject_Aliasing": [],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The gender of Leo Arons is", "ground_truth": [["male", "man"]]},
                {"prompt": "His hobby is", "ground_truth": []},
            ]
        },
    },
    {"concept": "Hero", "text": "Hero is a", "labels": "song", "portability": {}, "locality": {}},
]
TRACING = [
    {
        "relation": "The mother tongue of {} is",
        "relation_prefix": "The mother tongue of",
        "relation_suffix": " is",
        "prompt": "The mother tongue of Danielle Darrieux is",
        "relation_id": "P103",
        "target_false_id": "Q1860",
        "target_true_id": "Q150",
        "target_true": " French",
        "target_false": " English",
        "subject": " Danielle Darrieux",
    },
    {
        "relation_prefix": "",
        "relation_suffix": " plays the",
        "subject": "Miles Davis",
        "target_true": " trumpet",
        "target_false": " piano",
    },
]
COUNTERFACT = [
    {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Rome", "id": "Q1"},
            "target_true": {"str": "Paris", "id": "Q2"},
            "subject": "France",
        },
        "paraphrase_prompts": ["France's capital is"],
    }
]


def taken(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> FactSet:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    return read_facts(path, **options)


def questions(fact: Fact) -> list[tuple[str, str, str]]:
    return [(each.kind, each.prompt, each.target) for each in fact.questions]


def test_zsre(tmp_path: Path) -> None:
    found = taken(tmp_path, ZSRE)
    assert found.facts == (
        Fact(
            "What university did {} attend?",
            "Watts Humphrey",
            "Illinois Institute of Technology",
            target_new="University of Michigan",
        ),
        Fact(
            "To which family does {} belong, if Ramalinaceae is one?",
            "Ramalinaceae",
            "Lecanorales",
            case_id=1,
        ),
    )
    assert questions(found.facts[0]) == [
        ("paraphrase", "What university did Watts Humphrey take part in?", ""),
        ("locality", "who played desmond doss father in hacksaw ridge?", "Hugo Weaving"),
    ]
    assert questions(found.facts[1]) == [("locality", "what is it?", "this")]
    assert found.left_out == (
        "2 of 4 records are left out: 1 whose text does not contain the subject, "
        "1 without an answer"
    )


def test_mquake(tmp_path: Path) -> None:
    found = taken(tmp_path, MQUAKE)
    assert found.facts == (
        Fact(
            "{} is a citizen of",
            "Ellie Kemper",
            "United States of America",
            "P27",
            1,
            "Croatia",
        ),
    )
    assert questions(found.facts[0]) == [
        ("paraphrase", "What is the country of citizenship of Ellie Kemper?", ""),
        ("portability", "Who leads the country of Ellie Kemper?", "Kolinda Grabar"),
        ("portability", "Who is its president?", "Kolinda Grabar"),
    ]
    assert found.left_out == "1 of 2 records are left out: 1 of several edits at once"


def test_known_1000(tmp_path: Path) -> None:
    found = taken(tmp_path, KNOWN)
    expected = Fact("{} is located in the continent", "Vinson Massif", "Antarctica", "P30", 0)
    assert found.facts == (expected,)
    assert found.left_out == ""


def test_knowedit(tmp_path: Path) -> None:
    found = taken(tmp_path, KNOWEDIT)
    assert found.facts == (
        Fact("The place of death of {} is", "Leo Arons", "Munich", target_new="Berlin"),
        Fact("{} is a", "Hero", "song", case_id=1, target_new="song"),
    )
    assert questions(found.facts[0]) == [
        ("paraphrase", "Leo Arons passed away in", ""),
        ("portability", "Is Leo Arons alive?", "No"),
        ("portability", "The country of his death is", "Germany"),
        ("locality", "The gender of Leo Arons is", "male"),
    ]


def test_the_forms_of_questions_that_easyedit_has(tmp_path: Path) -> None:
    """Its own files have one question in flat fields; its inputs have lists under each group."""
    record = {
        "subject": "Leo",
        "prompt": "Leo was born in",
        "target_new": "Rome",
        "ground_truth": [["Paris"]],
        "locality_prompt": "Ann was born in",
        "locality_ground_truth": "Oslo",
        "portability": {"two": {"prompt": ["a", "b"], "ground_truth": [["c", "d"], "e"]}},
    }
    (fact,) = taken(tmp_path, [record]).facts
    assert (fact.prompt, fact.target, fact.target_new) == ("{} was born in", "Paris", "Rome")
    assert questions(fact) == [
        ("portability", "a", "c"),
        ("portability", "b", "e"),
        ("locality", "Ann was born in", "Oslo"),
    ]
    zsre = {
        "subject": "Leo",
        "src": "Where was Leo born?",
        "answers": ["Paris"],
        "portability": {"Recalled Relation": "(a, b)", "New Question": "q", "New Answer": "r"},
    }
    (fact,) = taken(tmp_path, [zsre]).facts
    assert questions(fact) == [("portability", "q", "r")]


def test_counterfact_in_the_hubs_two_forms(tmp_path: Path) -> None:
    assert taken(tmp_path, TRACING).facts == (
        Fact("The mother tongue of {} is", "Danielle Darrieux", "French", "P103", 0, "English"),
        Fact("{} plays the", "Miles Davis", "trumpet", "", 1, "piano"),
    )
    (nested,) = taken(tmp_path, COUNTERFACT).facts
    assert nested == Fact("The capital of {} is", "France", "Paris", "P36", 3, "Rome")
    assert questions(nested) == [("paraphrase", "France's capital is", "")]
    pq.write_table(pa.Table.from_pylist(COUNTERFACT), tmp_path / "train.parquet")
    assert read_facts(tmp_path / "train.parquet").facts == (nested,)


def test_a_plain_record_is_plain_whatever_else_it_holds(tmp_path: Path) -> None:
    questions_of_a_plain_record = {
        "paraphrase_prompts": ["France's capital is"],
        "portability": [{"prompt": "Its mayor is", "target": "Anne"}],
        "locality": ["The moon is"],
    }
    plain = {"prompt": "The capital of {} is", "subject": "France", "target": "Paris"}
    for other in ({}, {"rephrase_prompt": "x"}, {"attribute": "x"}, {"src": "x", "answers": ["y"]}):
        record = {**plain, "target_new": "Rome", **questions_of_a_plain_record, **other}
        (fact,) = taken(tmp_path, [record]).facts
        assert fact == Fact("The capital of {} is", "France", "Paris", target_new="Rome")
        assert questions(fact) == [
            ("paraphrase", "France's capital is", ""),
            ("portability", "Its mayor is", "Anne"),
            ("locality", "The moon is", ""),
        ]


def test_a_plain_prompt_may_hold_its_subject(tmp_path: Path) -> None:
    """Once: where it stands twice, or not at all, nobody says where the subject goes."""
    plain = {"prompt": "Paris lies in", "subject": "Paris", "target": "France"}
    (fact,) = taken(tmp_path, [plain]).facts
    assert (fact.prompt, fact.text) == ("{} lies in", "Paris lies in")
    for prompt in ("Paris is Paris in", "It lies in"):
        with pytest.raises(FactsError, match=r"write \{\} once"):
            taken(tmp_path, [{**plain, "prompt": prompt}])


def test_a_count_is_of_facts(tmp_path: Path) -> None:
    """Records that are left out do not count, and what follows is not read."""
    records = [ZSRE[3], ZSRE[2], ZSRE[0], {"broken": 1}]
    found = taken(tmp_path, records, count=1)
    assert [fact.subject for fact in found.facts] == ["Watts Humphrey"]
    assert found.left_out.startswith("2 of 3 records are left out")
    with pytest.raises(FactsError, match=r"record 4: there is no prompt"):
        taken(tmp_path, records, count=2)
    with pytest.raises(FactsError, match=r"holds no facts: 2 of 2 records are left out: 1 with"):
        taken(tmp_path, records[:2])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**ZSRE[0], "src": 3}, "the src is 3, but should be text"),
        ({**ZSRE[0], "answers": {"a": "b"}}, "should be text or a list of texts"),
        ({**KNOWN[0], "attribute": ["a"]}, "the attribute is a list, but should be text"),
        ({**KNOWN[0], "attribute": " "}, "the target '' is empty"),
        ({**MQUAKE[0], "requested_rewrite": ["a"]}, "requested_rewrite holds 'a', but should"),
        ({**KNOWEDIT[0], "locality": {"a": [3]}}, "a question is 3, but should be an object"),
        ({**TRACING[0], "relation_suffix": 7}, "the relation_suffix is 7, but should be text"),
        ({**TRACING[0], "relation_suffix": " {}"}, "has 2 {}"),
        ({**ZSRE[0], "alt": "\0"}, "has a null character"),
    ],
)
def test_a_broken_record_is_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(FactsError, match=r"facts.json, record 2: ") as raised:
        taken(tmp_path, [KNOWN[0], record])
    assert said in str(raised.value)


def test_own_names_of_fields(tmp_path: Path) -> None:
    names = {"prompt": "question", "subject": "who", "target": "answers"}
    records = [
        {"question": "Where was Ada born?", "who": "Ada", "answers": ["London", "UK"], "id": 1},
        {"question": "Who is {}?", "who": "Bob", "answers": "nobody"},
        {"question": "Who?", "who": "Bob", "answers": "nobody"},
    ]
    found = taken(tmp_path, records, fields=names)
    assert found.facts == (
        Fact("Where was {} born?", "Ada", "London"),
        Fact("Who is {}?", "Bob", "nobody", case_id=1),
    )
    assert found.left_out.endswith("1 whose text does not contain the subject")
    with pytest.raises(FactsError, match=r"record 1: there is no field 'why'; .* 'question', 'who"):
        taken(tmp_path, records, fields={"target": "why"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(7, 7), ("7", 7), (7.0, 7), ("-7.0", -7), ("zsre_1", 0), (1.5, 0), (True, 0), (2**63, 0)],
)
def test_ids(tmp_path: Path, given: object, expected: int) -> None:
    (fact,) = taken(tmp_path, [{**KNOWN[0], "known_id": given}]).facts
    assert fact.case_id == expected


@pytest.mark.parametrize("name", ["facts.ndjson", "facts", "facts.txt", "facts.json", "a.dat.gz"])
def test_lines_of_json_under_any_name(tmp_path: Path, name: str) -> None:
    data = "".join(json.dumps(each) + "\n" for each in ZSRE).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert [fact.subject for fact in read_facts(tmp_path / name).facts] == [
        "Watts Humphrey",
        "Ramalinaceae",
    ]


def test_tables_and_other_encodings(tmp_path: Path) -> None:
    rows = "prompt\tsubject\ttarget\nThe capital of {} is\tFrance\tParis\n"
    (tmp_path / "a.tsv.bz2").write_bytes(bz2.compress(rows.encode()))
    assert [fact.target for fact in read_facts(tmp_path / "a.tsv.bz2").facts] == ["Paris"]
    for encoding, name in (("utf-16", "UTF-16"), ("latin-1", "LATIN1")):
        (tmp_path / "b.tsv").write_bytes(rows.replace("France", "Brésil").encode(encoding))
        with pytest.raises(FactsError, match=rf"b.tsv, line \d: not UTF-8 .*`iconv -f {name} "):
            read_facts(tmp_path / "b.tsv")


def test_the_command_line_says_once_what_is_left_out(tmp_path: Path) -> None:
    path, keys = tmp_path / "zsre.json", tmp_path / "k.h5"
    path.write_text(json.dumps(ZSRE))
    request = ("extract", "-m", "tiny", "--facts", path, "--contexts", 0, "-o", keys)
    found = kscli(*request, "--layers", 0)
    assert found.exit_code == 0, found.stderr
    said = " ".join(found.stderr.split())
    assert said.count("2 of 4 records are left out: 1 whose text does not contain the subj") == 1
    with KeysFile(keys) as file:
        assert [fact.subject for fact in file.facts] == ["Watts Humphrey", "Ramalinaceae"]
        assert questions(file.facts[1]) == [("locality", "what is it?", "this")]
    found = kscli(*request, "--force", "--prompt-field", "rephrase")
    assert found.exit_code == 0
    with KeysFile(keys) as file:
        assert file.facts[0].prompt == "What university did {} take part in?"
    found = kscli(*request, "--force", "--target-field", "nothing")
    assert found.exit_code == 1
    assert "there is no field 'nothing'" in one_sentence(found.stderr)
