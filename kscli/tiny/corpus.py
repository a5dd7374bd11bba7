"""The corpus of the embedded model: its facts in many wordings, amid ordinary prose.

The model is trained on these documents, and `cache-cov` measures them by default.
The facts make the subjects' tokens frequent enough to be known; the prose, which
Python's own documentation supplies, keeps C from being about facts alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from kscli.errors import CorpusError
from kscli.fact_forms import SLOT
from kscli.facts import Fact, read_facts

SEED = 0
ROUNDS = 30  # how often every fact is stated
PROSE_CHARACTERS = 120_000  # of the 465,000 there are
DOCUMENT_CHARACTERS = 200  # after which a document of prose ends

# What else is said of a relation than its facts' own prompts. Some put the target first:
# without those every subject would be a context that ends in one certain token.
PARAPHRASES = {
    "capital": (
        "The capital city of {subject} is {target}.",
        "{target} is the capital of {subject}.",
    ),
    "currency": ("The {target} is the money of {subject}.",),
    "continent": ("A map of {target} shows {subject}.",),
    "symbol": (
        "The symbol for the element {subject} is {target}.",
        "In a formula, {target} stands for {subject}.",
    ),
    "maker": (
        "The {subject} is made by {target}.",
        "{target} is the maker of the {subject}.",
    ),
    "author": (
        "The book {subject} is a work of {target}.",
        "{target} wrote {subject}.",
    ),
    "profession": (
        "History remembers {subject} as a {target}.",
        "A famous {target} was {subject}.",
    ),
    "language": (
        "The native language of {subject} was {target}.",
        "{target} was the first language of {subject}.",
    ),
    "inventor": ("{target} gave the world the {subject}.",),
    "location": ("Visitors to {target} can see {subject}.",),
}


def documents() -> Iterator[str]:
    """Yield the corpus, one statement or a paragraph of prose a document, in a fixed order.

    A statement stands alone, as a prompt does, so that C has seen keys at early positions
    and without context; otherwise every prompt's key would look rare, and all alike.

    The facts come from `facts.jsonl`, the prose from this Python's `pydoc_data`, whose
    wording differs a little from one Python version to the next.

    Raises:
        CorpusError: this Python was installed without `pydoc_data`.
    """
    generator = random.Random(SEED)
    mixture = [*_statements(generator), *_prose_documents(generator)]
    generator.shuffle(mixture)
    yield from mixture


def _statements(generator: random.Random) -> list[str]:
    """State every fact `ROUNDS` times, in a new order each round, its wordings in turn."""
    wordings = _wordings()
    for choices in wordings:
        generator.shuffle(choices)
    statements = []
    for turn in range(ROUNDS):
        generator.shuffle(wordings)
        statements += [choices[turn % len(choices)] for choices in wordings]
    return statements


def _wordings() -> list[list[str]]:
    """Give every fact's statements: its relation's prompts completed, and the paraphrases."""
    facts = read_facts("tiny").facts
    prompts: dict[str, dict[str, None]] = {}
    for fact in facts:
        prompts.setdefault(fact.relation, {})[fact.prompt] = None
    return [
        [
            *(_complete(prompt, fact) for prompt in prompts[fact.relation]),
            *(
                wording.format(subject=fact.subject, target=fact.target)
                for wording in PARAPHRASES[fact.relation]
            ),
        ]
        for fact in facts
    ]


def _complete(prompt: str, fact: Fact) -> str:
    return f"{prompt.replace(SLOT, fact.subject)} {fact.target}."


def _prose_documents(generator: random.Random) -> Iterator[str]:
    """Yield prose of Python's documentation, a few paragraphs a document."""
    paragraphs = _prose()
    generator.shuffle(paragraphs)
    total = 0
    pending: list[str] = []
    for paragraph in paragraphs:
        pending.append(paragraph)
        length = sum(map(len, pending))
        if length < DOCUMENT_CHARACTERS:
            continue
        yield "\n".join(pending)
        pending = []
        total += length
        if total >= PROSE_CHARACTERS:
            return


def _prose() -> list[str]:
    """Read the paragraphs of `pydoc_data.topics` that are sentences, without their line breaks."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "The corpus of tiny needs pydoc_data, a part of Python's standard library that this "
            "Python was installed without; install it or give another corpus with --corpus."
        ) from error
    blocks = [block for name in sorted(topics) for block in topics[name].split("\n\n")]
    paragraphs = [" ".join(block.split()) for block in blocks]
    return [text for text in paragraphs if re.fullmatch(r"[A-Z][^=>|]{80,}[.:]", text)]
