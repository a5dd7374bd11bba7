"""Facts: prompts with a subject in them, and the files that hold them.

A fact is a prompt whose `{}` stands for the subject, the subject, and the target
that completes the prompt. Files are plain records of `prompt`, `subject`, `target`
and, if there are any, `relation` and `case_id`, or of a published form (see
`kscli.fact_forms`). Nothing is stripped or rewritten in plain records: what the file
says is what the model reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path

from kscli.errors import FactsError, UsageError
from kscli.escaping import escaped_json
from kscli.fact_forms import (
    QUESTION_FIELDS,
    SLOT,
    LeftOutError,
    QuestionKind,
    own_fields,
    plain_fields,
)
from kscli.files import replace_file, require_ordinary, require_writable
from kscli.hub.datasets import HubSource, open_dataset, parse_source
from kscli.records import (
    FORMATS,
    Located,
    RecordFile,
    cut,
    format_inside,
    format_of,
    kind_of,
    known_formats,
    quote,
)

DEFAULT_COUNT = 128  # the paper's m

IN_PYTHON = "facts given in Python"
NO_FIELDS: Mapping[str, str] = {}

# The field of a record that shows a change of a file that kscli wrote.
DIGEST = "digest"
_DIGEST = re.compile(r"kscli \d{1,9}/(\d{1,9}) [0-9a-f]{32}", re.ASCII)

_WHOLE = re.compile(r"(-?\d{1,19})(?:\.0)?", re.ASCII)

# The characters of all of a fact's texts: more than any sentence has, and few enough for a
# tokenizer to take no time.
MOST_CHARACTERS = 20_000

# Null characters and lone surrogates: no tokenizer or HDF5 string can hold them.
UNUSABLE = re.compile("[\0\ud800-\udfff]")

# The Hub's CounterFact: 19,728 records in train and 2,191 in test, fields as in the original
# JSON. The revision is pinned so that "the first 128" stay the same facts.
COUNTERFACT = HubSource(
    "azhx/counterfact",
    splits=("train", "test"),
    revision="c01c413f856ee38f5c080c9fc5e87aff478e2ff9",
)


@dataclass(frozen=True)
class Question:
    """A whole prompt that an edit of a fact is judged by, and its answer, where it has its own.

    Raises FactsError for a prompt that is empty, too long or no text, or a target that is no text.
    """

    kind: QuestionKind
    prompt: str
    target: str = ""

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("target", self.target)):
            _check_text(f"{self.kind} {name}", value)
            if len(value) > MOST_CHARACTERS:
                raise FactsError(
                    f"the {self.kind} {name} {quote(value)} is too long: it may have "
                    f"{MOST_CHARACTERS:,} characters, and has {len(value):,}; leave it out."
                )
        if not self.prompt.strip():
            raise FactsError(f"a {self.kind} prompt is empty; fill it in, or leave it out.")

    def record(self) -> str | dict[str, str]:
        """As a record's field lists it."""
        return {"prompt": self.prompt, "target": self.target} if self.target else self.prompt


@dataclass(frozen=True)
class Fact:
    """One fact; `prompt` holds `{}` exactly once, where the subject goes.

    `target_new` is what an edit would write instead of the target; empty where none is given.
    `questions` are asked about a fact and are no part of it: facts that differ in these are equal.

    Raises:
        FactsError: no `{}` or several, a blank subject or target, text that is not Unicode, over
            `MOST_CHARACTERS` characters.
    """

    prompt: str
    subject: str
    target: str
    relation: str = ""
    case_id: int = 0
    target_new: str = ""
    questions: tuple[Question, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        texts = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        length = sum(map(len, texts.values()))
        if length > MOST_CHARACTERS:
            longest = max(texts, key=lambda name: len(texts[name]))
            raise FactsError(
                f"the {longest} {quote(texts[longest])} is too long: a fact may have "
                f"{MOST_CHARACTERS:,} characters, and this one has {length:,}; leave it out."
            )
        for name, value in texts.items():
            _check_text(name, value)
        slots = self.prompt.count(SLOT)
        if slots != 1:
            found = f"has {slots} {SLOT}" if slots else f"has no {SLOT}"
            raise FactsError(
                f"the prompt {quote(self.prompt)} {found}; write {SLOT} once, "
                "where the subject goes."
            )
        for name, value in (("subject", self.subject), ("target", self.target)):
            if not value.strip():
                raise FactsError(f"the {name} {quote(value)} is empty; fill it in.")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in; every other brace is left as it is."""
        return self.prompt.replace(SLOT, self.subject, 1)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end of the subject's characters in `text`."""
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)


@dataclass(frozen=True)
class FactSet:
    """The facts taken from a source, under the name that the user gave it.

    `left_out` says in words how many records hold no fact, and why; it is empty where all do.
    """

    facts: tuple[Fact, ...]
    name: str
    left_out: str = ""

    @property
    def identity(self) -> str:
        """See `facts_identity`."""
        return facts_identity(self.facts)

    @property
    def questions_identity(self) -> str:
        """SHA-256 (hex) over every question of every fact, in order."""
        asked = [[astuple(question) for question in fact.questions] for fact in self.facts]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def paraphrases_of(fact: Fact) -> list[Fact]:
    """The paraphrases of a fact in which its subject stands, as facts; where it stands last."""
    found = []
    for question in fact.questions:
        before, subject, after = question.prompt.rpartition(fact.subject)
        if question.kind == "paraphrase" and subject and SLOT not in before + after:
            found.append(Fact(f"{before}{SLOT}{after}", subject, fact.target))
    return found


def facts_identity(facts: Sequence[Fact]) -> str:
    """SHA-256 (hex) over every field of the facts but their questions, in order.

    Equal for the same facts whatever file or format they were read from.
    """
    fields = [_identifying(fact) for fact in facts]
    canonical = json.dumps(fields, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _identifying(fact: Fact) -> tuple[str | int, ...]:
    """The values that tell facts apart."""
    values = (fact.prompt, fact.subject, fact.target, fact.relation, fact.case_id)
    # Facts without a new target are what they were before there was one.
    return (*values, fact.target_new) if fact.target_new else values


def read_facts(
    name: str | Path,
    count: int | None = None,
    *,
    at_most: bool = False,
    fields: Mapping[str, str] = NO_FIELDS,
) -> FactSet:
    """The first `count` facts (None: all) of a named set, a Hub data set, or a file.

    `name` is `tiny`, `counterfact`, `hf:OWNER/NAME[:CONFIG[:SPLIT]]` (default split `train`), or
    the path of a file whose records have fields (see `kscli.records`). With `at_most`, a source
    of fewer than `count` facts gives all it has. Records after the first `count` are not checked.
    `fields` names the records' own fields for prompt, subject or target.

    Raises:
        UsageError: a count below 1, or an `hf:` name of another form.
        FactsError: the source cannot be read, a record is no fact, or there are fewer than
            `count`; names the file, the line or record, and the remedy.
    """
    if count is not None and count < 1:
        raise UsageError(f"A count of {count} facts was asked for; ask for 1 or more, or all.")
    name = str(name)
    taken = _Taken(fields)
    facts = tuple(fact for _, fact, _ in islice(taken.read(_records(name)), count))
    if not facts:
        raise FactsError(f"{name} holds no facts{f': {taken.left_out}' if taken.left_out else ''}.")
    if count is not None and len(facts) < count and not at_most:
        raise FactsError(
            f"{count} facts were asked for, but {name} holds {len(facts)}; "
            f"ask for at most {len(facts)}, or all."
        )
    return FactSet(facts, name, taken.left_out)


def facts_of(records: Iterable[Mapping[str, object] | Fact], name: str = IN_PYTHON) -> FactSet:
    """The facts of records in memory, with fields as a file's have them; facts are taken as such.

    Raises FactsError, naming the record, where one is no fact, and where there are none.
    """
    taken = _Taken({})
    located = (
        (f"record {number} of the {name}", fact_record(each) if isinstance(each, Fact) else each)
        for number, each in enumerate(records, 1)
    )
    facts = tuple(fact for _, fact, _ in taken.read(located))
    if not facts:
        raise FactsError(f"the {name} are none{f': {taken.left_out}' if taken.left_out else ''}.")
    return FactSet(facts, name, taken.left_out)


def read_records(name: str | Path) -> Iterator[tuple[str, Fact, Mapping[str, object]]]:
    """Every fact of a source: where it stands, the fact, and all that its record says.

    Raises FactsError as `read_facts` does.
    """
    return _Taken({}).read(_records(str(name)))


class _Taken:
    """The facts that are taken from records, and the count of those left out, by the reason."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._own = fields
        self._records = 0
        self._reasons: Counter[str] = Counter()

    def read(self, records: Iterator[Located]) -> Iterator[tuple[str, Fact, Mapping[str, object]]]:
        """Where each fact stands, the fact, and its record's plain fields."""
        for index, (where, record) in enumerate(records):
            self._records += 1
            try:
                fields = own_fields(record, self._own) if self._own else plain_fields(record)
                yield where, _fact(fields, index), fields
            except LeftOutError as reason:
                self._reasons[str(reason)] += 1
            except FactsError as error:
                raise FactsError(f"{where}: {error}") from None

    @property
    def left_out(self) -> str:
        """In words, what was left out of the records read, and why; empty where nothing was."""
        if not self._reasons:
            return ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._reasons.items())
        return f"{self._reasons.total():,} of {self._records:,} records are left out: {reasons}"


def write_records(path: Path, records: Iterable[Mapping[str, object]], *, force: bool) -> None:
    """Write a facts file, one JSON object a line; raises as `require_facts_path` does.

    Every record ends with a `digest`, by which `read_facts` notices a change (`_unchanged`).
    """
    require_facts_path(path, force=force)
    rows = list(records)
    last = ""
    with replace_file(path, force=force) as temporary, temporary.open("w", encoding="utf-8") as out:
        for number, row in enumerate(rows, 1):
            last = _digest(row, number, len(rows), last)
            sealed = {**row, DIGEST: last}
            text = json.dumps(sealed, ensure_ascii=False, allow_nan=False)
            out.write(escaped_json(text) + "\n")


def _digest(record: Mapping[str, object], number: int, of: int, before: str) -> str:
    """What a record's `digest` must be: its number, how many there are, and a SHA-256.

    The hash is of the record without its digest and of the digest of the record before.
    """
    text = json.dumps([before, {name: record[name] for name in record if name != DIGEST}])
    return f"kscli {number}/{of} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _unchanged(path: Path, records: Iterator[Located]) -> Iterator[Located]:
    """The records of a file, as long as they are those that `write_records` wrote, if it did.

    Raises FactsError where one was changed, added or taken out.
    """
    last, ours, number, of = "", False, 0, 0
    for number, (where, record) in enumerate(records, 1):
        held = record.get(DIGEST) if isinstance(record, Mapping) else None
        match = _DIGEST.fullmatch(held) if isinstance(held, str) else None
        if number == 1 and match:
            ours, of = True, int(match[1])
        if ours or match:
            fields = record if isinstance(record, Mapping) else {}
            if not (ours and match and _digest(fields, number, of, last) == held):
                raise _changed_records(where)
            last = str(held)
        yield where, record
    if ours and number != of:
        raise _changed_records(f"{path}, after record {number}")


def _changed_records(where: str) -> FactsError:
    return FactsError(
        f"{where}: the file was changed after kscli wrote it; make it again, or, if the change was "
        f"yours, take the field {DIGEST} out of all its records."
    )


def require_facts_path(path: Path, *, force: bool) -> None:
    """Raise unless a facts file may be written at `path`; makes nothing.

    Raises UsageError for a name that does not end in .jsonl, and ArtifactError for a file that
    exists (unless `force`) or a folder that cannot be written.
    """
    if path.suffix.lower() != ".jsonl":
        raise UsageError(
            f"{path}: facts are written as one JSON object a line; name a file that ends in .jsonl."
        )
    require_writable(path, force=force)


def fact_record(fact: Fact) -> dict[str, object]:
    """A fact's fields, as a plain record has them."""
    return {
        "case_id": fact.case_id,
        "relation": fact.relation,
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target": fact.target,
        **({"target_new": fact.target_new} if fact.target_new else {}),
        **{
            name: [question.record() for question in fact.questions if question.kind == kind]
            for kind, name in QUESTION_FIELDS.items()
            if any(question.kind == kind for question in fact.questions)
        },
    }


def _records(name: str) -> Iterator[Located]:
    if name == "tiny":
        from kscli.tiny import FACTS_PATH

        return _file_records(FACTS_PATH)
    if name == "counterfact":
        return _hub_records(name, COUNTERFACT)
    if name.startswith("hf:"):
        return _hub_records(name, parse_source(name, UsageError))
    return _file_records(Path(name))


def _file_records(path: Path) -> Iterator[Located]:
    if not path.exists():
        raise FactsError(
            f"There is no facts file {path}; give tiny, counterfact, hf:OWNER/NAME, "
            f"or the path of a file that ends in {known_formats(fields=True)}."
        )
    require_ordinary(path, FactsError)
    kind = format_of(path)
    if not kind or not FORMATS[kind].fields:
        kind = format_inside(path, FactsError)
        if not kind or not FORMATS[kind].fields:
            raise FactsError(
                f"{path} is not a facts file; its name must end in {known_formats(fields=True)}, "
                "or it must hold one JSON object a line."
            )
    records = RecordFile(path, FactsError, kind=kind).records()
    return _unchanged(path, records) if kind == ".jsonl" else records


def _hub_records(name: str, source: HubSource) -> Iterator[Located]:
    dataset = open_dataset(source, FactsError, "give a local file as --facts")
    for split, number, record in dataset.records():
        yield f"{name}, {split} record {number}", record


def _fact(fields: Mapping[str, object], index: int) -> Fact:
    relation = fields.get("relation")
    return Fact(
        prompt=_string(fields, "prompt"),
        subject=_string(fields, "subject"),
        target=_string(fields, "target"),
        relation="" if relation is None else _string(fields, "relation"),
        case_id=_case_id(fields.get("case_id"), index),
        target_new=field_text(fields, "target_new") or "",
        questions=tuple(_questions(fields)),
    )


def _questions(fields: Mapping[str, object]) -> Iterator[Question]:
    """The questions of a record, kind by kind. Raises FactsError, naming the field."""
    for kind, name in QUESTION_FIELDS.items():
        listed = fields.get(name)
        if listed is None:
            continue
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise FactsError(f"{name} is {kind_of(listed)}, but should be a list.")
        for asked in listed:
            if isinstance(asked, Mapping):
                target = _string(asked, "target") if "target" in asked else ""
                yield Question(kind, _string(asked, "prompt"), target)
            else:
                yield Question(kind, _string({name: asked}, name))


def field_text(fields: Mapping[str, object], name: str) -> str | None:
    """A field's text, which CounterFact puts into an object's `str`; None where there is none.

    Raises FactsError for a field of another kind.
    """
    value = fields.get(name)
    if isinstance(value, Mapping):
        value = value.get("str")
    return None if value is None else _string({name: value}, name)


def _string(fields: Mapping[str, object], name: str) -> str:
    if name not in fields:
        there = ", ".join(map(repr, fields)) or "none"
        raise FactsError(f"there is no {name}; the fields there are: {cut(there)}.")
    value = fields[name]
    if not isinstance(value, str):
        raise FactsError(f"the {name} is {kind_of(value)}, but should be text.")
    return value


def _case_id(value: object, index: int) -> int:
    """The whole number of 64 bits that an id says, as 7, 7.0 or "7"; of any other, the index."""
    match = _WHOLE.fullmatch(str(value))
    number = int(match[1]) if match else index
    return number if -(2**63) <= number < 2**63 else index


def _check_text(name: str, value: str) -> None:
    if UNUSABLE.search(value):
        raise FactsError(
            f"the {name} {quote(value)} has a null character or half a surrogate pair; mend it."
        )
