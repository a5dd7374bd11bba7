"""The forms in which facts are published: each one function, from its record to a fact's fields.

The fields are those of a plain record: prompt, subject, target, relation, case_id, target_new, and
the lists of questions. A form is known by the fields that it alone has; `FORMS` lists them. A
record that holds no fact that kscli can take is left out, with the reason, and counted: in these
files that is usual. A record of plain fields is never left out, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kscli.errors import FactsError
from kscli.records import cut, kind_of

Fields = Mapping[str, object]

SLOT = "{}"
PLAIN = ("prompt", "subject", "target")
"""The fields of a plain record, which is one whatever else it holds."""
NQ = "nq question: "  # MEND's mark of questions that are not zsRE's


QuestionKind = Literal[
    "paraphrase", "neighbourhood", "generation", "reference", "portability", "locality"
]
"""What a question about an edited fact asks for, in the field's words.

paraphrase: the fact again, in other words. neighbourhood: another fact, whose answer is the fact's
own target. generation: the beginning of a text about the subject. reference: a text
about what the new target says, with which those are compared. portability: what follows from
the new target. locality: what has nothing to do with it.
"""


QUESTION_FIELDS: dict[QuestionKind, str] = {
    "paraphrase": "paraphrase_prompts",
    "neighbourhood": "neighborhood_prompts",
    "generation": "generation_prompts",
    "reference": "reference_texts",
    "portability": "portability",
    "locality": "locality",
}
"""The fields of a record that hold them: lists of prompts, or of objects of prompt and target."""


class LeftOutError(FactsError):
    """A record holds no fact that can be taken; the message is the reason, and no more."""


NO_SUBJECT = "whose text does not contain the subject"
NO_ANSWER = "without an answer"
SEVERAL_EDITS = "of several edits at once"


@dataclass(frozen=True)
class Form:
    """A published form: the fields by which its records are known, and how one is read."""

    name: str
    known_by: tuple[str, ...]
    read: Callable[[Fields], Fields]


def plain_fields(record: object) -> Fields:
    """The plain fields of a record of any form.

    Raises FactsError for a record that is none, and LeftOutError for one to leave out.
    """
    if not isinstance(record, Mapping):
        raise FactsError(
            f"{kind_of(record)}, but should be an object with prompt, subject and target."
        )
    if all(name in record for name in PLAIN):
        return {**record, "prompt": subject_as_slot(record["prompt"], record["subject"])}
    for form in FORMS:
        if all(record.get(name) is not None for name in form.known_by):
            return form.read(record)
    return record


def own_fields(record: object, names: Mapping[str, str]) -> Fields:
    """The plain fields of a record whose own names for some of them are `names`.

    A prompt without {} gets it where the subject stands. Raises as `plain_fields` does.
    """
    fields = dict(plain_fields(record))
    given = record if isinstance(record, Mapping) else {}
    for name, own in names.items():
        if own not in given:
            there = ", ".join(map(repr, given)) or "none"
            raise FactsError(f"there is no field {own!r}; the fields there are: {cut(there)}.")
        value = given[own]
        fields[name] = next(_texts(value), "") if isinstance(value, list) else value
    prompt, subject = fields.get("prompt"), fields.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str):
        fields["prompt"] = with_slot(prompt, subject)
    return fields


def with_slot(text: str, subject: str) -> str:
    """The text with {} in place of the subject, where that stands first.

    A text that has the {} already is as it was. Raises LeftOutError for one without the subject.
    """
    if SLOT in text:
        return text
    if not subject or subject not in text:
        raise LeftOutError(NO_SUBJECT)
    return text.replace(subject, SLOT, 1)


def subject_as_slot(prompt: object, subject: object) -> object:
    """A prompt that has no {} but the subject once, with {} in its place; any other as it is."""
    if not isinstance(prompt, str) or not isinstance(subject, str) or SLOT in prompt:
        return prompt
    return prompt.replace(subject, SLOT) if subject and prompt.count(subject) == 1 else prompt


# The forms


def _counterfact(record: Fields) -> Fields:
    """CounterFact's (Meng et al. 2022), and MQuAKE's, whose `requested_rewrite` is a list."""
    rewrite = record["requested_rewrite"]
    if isinstance(rewrite, Sequence) and not isinstance(rewrite, str):
        return _mquake(record, rewrite)
    if not isinstance(rewrite, Mapping):
        raise FactsError(f"requested_rewrite is {kind_of(rewrite)}, but should be an object.")
    asked = {name: record[name] for name in QUESTION_FIELDS.values() if name in record}
    return {**_rewrite(rewrite), **asked, "case_id": record.get("case_id")}


def _rewrite(rewrite: Fields) -> Fields:
    target = rewrite.get("target_true")
    if not isinstance(target, Mapping) or "str" not in target:
        raise FactsError("requested_rewrite has no target_true with a str in it; add it.")
    return {**rewrite, "target": target["str"], "relation": rewrite.get("relation_id")}


def _mquake(record: Fields, rewrites: Sequence[object]) -> Fields:
    """MQuAKE's (Zhong et al. 2023) of a single edit: its multi-hop questions are portability."""
    if len(rewrites) != 1:
        raise LeftOutError(SEVERAL_EDITS)
    (rewrite,) = rewrites
    if not isinstance(rewrite, Mapping):
        raise FactsError(f"requested_rewrite holds {kind_of(rewrite)}, but should hold an object.")
    questions = record.get("questions") or []
    answer = _text(record, "new_answer")
    return {
        **_rewrite(rewrite),
        "case_id": record.get("case_id"),
        "paraphrase_prompts": list(_texts(rewrite.get("question"))),
        "portability": [{"prompt": each, "target": answer} for each in _texts(questions)],
    }


def _zsre(record: Fields) -> Fields:
    """zsRE as MEND and ROME have it (Levy et al. 2017): a question instead of a prompt.

    `answers` hold the target, `alt` what EasyEdit writes; ROME writes the answer itself.
    """
    answer = next(_texts(record["answers"]), "")
    if not answer:
        raise LeftOutError(NO_ANSWER)
    subject = _text(record, "subject")
    locality = _text(record, "loc").removeprefix(NQ)
    loc_answer = next(_texts(record.get("loc_ans")), "").removeprefix(NQ)
    return {
        "prompt": with_slot(_text(record, "src"), subject),
        "subject": subject,
        "target": answer,
        "target_new": _text(record, "alt") or None,
        "case_id": record.get("case_id"),
        "paraphrase_prompts": list(_texts(record.get("rephrase"))),
        "portability": list(_grouped(record.get("portability"))),
        "locality": [{"prompt": f"{locality.rstrip('?')}?", "target": loc_answer}]
        if locality
        else [],
    }


def _known(record: Fields) -> Fields:
    """ROME's known_1000: `attribute` is the target, and `template` the prompt with its {}."""
    subject = _text(record, "subject")
    return {
        "prompt": with_slot(_text(record, "template") or _text(record, "prompt"), subject),
        "subject": subject,
        "target": _text(record, "attribute").strip(),
        "relation": record.get("relation_id"),
        "case_id": record.get("known_id"),
    }


def _tracing(record: Fields) -> Fields:
    """counterfact-tracing of the Hub: flat, with the spaces before subject and targets in them."""
    subject = _text(record, "subject")
    space = " " if subject.startswith(" ") else ""
    return {
        "prompt": f"{_text(record, 'relation_prefix')}{space}{SLOT}"
        f"{_text(record, 'relation_suffix')}",
        "subject": subject.strip(),
        "target": _text(record, "target_true").strip(),
        "target_new": _text(record, "target_false").strip() or None,
        "relation": record.get("relation_id"),
    }


def _knowedit(record: Fields) -> Fields:
    """KnowEdit's (Zhang et al. 2024): groups of questions under portability and locality.

    EasyEdit's own files of the kind have one question of each, in fields of their own.
    """
    subject = _text(record, "subject") or _text(record, "concept")
    prompt = _text(record, "prompt") or _text(record, "text")
    new = next(_texts(record.get("target_new") or record.get("labels")), "")
    # wiki_recent has no answer before the edit.
    target = next(_texts(record.get("ground_truth")), "") or new
    if not target:
        raise LeftOutError(NO_ANSWER)
    rephrased = record.get("rephrase_prompt") or record.get("rephrase")
    return {
        "prompt": with_slot(prompt, subject),
        "subject": subject,
        "target": target,
        "target_new": new or None,
        "case_id": record.get("case_id"),
        "paraphrase_prompts": list(_texts(rephrased)),
        **{kind: list(_asked_of(record, kind)) for kind in ("portability", "locality")},
    }


def _asked_of(record: Fields, kind: str) -> Iterator[Fields]:
    """The questions of a kind, in groups or in `KIND_prompt` and `KIND_ground_truth`."""
    yield from _grouped(record.get(kind))
    yield from _asked(record.get(f"{kind}_prompt"), record.get(f"{kind}_ground_truth"))


def _grouped(groups: object) -> Iterator[Fields]:
    """The questions of all groups: of each a list of objects, or an object of lists."""
    if not isinstance(groups, Mapping):
        return
    # EasyEdit's zsRE has one question beside what it recalls.
    yield from _asked(groups.get("New Question"), groups.get("New Answer"))
    for questions in groups.values():
        listed = [questions] if isinstance(questions, Mapping) else questions
        for asked in [] if isinstance(listed, str) else listed or []:
            if not isinstance(asked, Mapping):
                raise FactsError(f"a question is {kind_of(asked)}, but should be an object.")
            yield from _asked(asked.get("prompt"), asked.get("ground_truth"))


def _asked(prompts: object, answers: object) -> Iterator[Fields]:
    """Each prompt with its answer, or a lone prompt with the first of its answers."""
    pairs: Iterable[tuple[object, object]] = [(prompts, answers)]
    if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) > 1:
        pairs = zip(prompts, answers, strict=False)
    for prompt, answer in pairs:
        text, target = next(_texts(prompt), ""), next(_texts(answer), "")
        if text and target:
            yield {"prompt": text, "target": target}


FORMS = (
    Form("CounterFact, MQuAKE", ("requested_rewrite",), _counterfact),
    Form("zsRE", ("src", "answers", "subject"), _zsre),
    Form("known_1000", ("attribute", "subject"), _known),
    Form("counterfact-tracing", ("relation_prefix", "subject", "target_true"), _tracing),
    *(
        Form("KnowEdit", ("subject", "prompt", "target_new", its_own), _knowedit)
        for its_own in ("ground_truth", "portability", "locality", "rephrase_prompt")
    ),
    Form("KnowEdit", ("concept", "text", "labels"), _knowedit),
)


def _text(record: Fields, name: str) -> str:
    """A field that is text; empty where it is not there. Raises FactsError for another kind."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FactsError(f"the {name} is {kind_of(value)}, but should be text.")
    return value


def _texts(value: object) -> Iterator[str]:
    """The texts of a text, or of a list of them at any depth, that are not blank."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        raise FactsError(f"{cut(repr(value))} should be text or a list of texts.")
