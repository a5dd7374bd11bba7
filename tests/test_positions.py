from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import normalizers
from tokenizers_kit import byte_level, sentencepiece_bpe, unigram, wordpiece
from transformers import PreTrainedTokenizerBase

from kscli.errors import FactsError, ModelError, UsageError
from kscli.facts import Fact, read_facts
from kscli.models.loading import LoadedModel
from kscli.positions import KeyToken, has_blank_end, locate_keys

KNOWN = Path(__file__).parent.parent.parent / "shared" / "data" / "counterfact_known_256.json"

WORDS = ["The", " capital", " of", " is", " in", " Paris", "Paris", " Pol", " Poland", " Caf"]
WORDS += [" Café", "York", " York", " New", "'s"]
PIECES = [word.replace(" ", "▁") for word in WORDS]

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    # Byte-level BPE, no special tokens.
    "gpt2": lambda: byte_level(WORDS),
    # The same with a BOS; a word of the vocabulary is taken whole, without merges.
    "llama3": lambda: byte_level(WORDS, bos=True, ignore_merges=True),
    # Offsets without the leading space, as Pythia's file has them.
    "pythia": lambda: byte_level(WORDS, trim_offsets=True, normalizer=normalizers.NFC()),
    # A space before the text, a BOS and an EOS.
    "roberta": lambda: byte_level(WORDS, bos=True, eos=True, trim_offsets=True, prefix_space=True),
    "qwen": lambda: byte_level(WORDS, normalizer=normalizers.NFC()),
    "prefixed": lambda: byte_level(WORDS, prefix_space=True),
    # SentencePiece: a ▁ before the text, byte fallback, a BOS.
    "llama2": lambda: sentencepiece_bpe(PIECES, bos=True),
    "llama2-normalizer": lambda: sentencepiece_bpe(PIECES, bos=True, prefix="normalizer"),
    "gemma": lambda: sentencepiece_bpe(PIECES, bos=True, prefix="none"),
    "llama2-eos": lambda: sentencepiece_bpe(PIECES, bos=True, eos=True),
    "xglm": lambda: unigram(PIECES, bos=True, eos=True),
    "bert": lambda: wordpiece(
        ["the", "capital", "of", "is", "in", "paris", "pol", "##and", "cafe", "new", "york"]
    ),
}

# Where the key is, written by hand from the tokens: subject-first, subject-last and last,
# each the index in the prompt's tokens and the token there.
BY_HAND = {
    "gpt2": [
        ("The capital of {} is", "Paris", "3 ĠParis", "3 ĠParis", "4 Ġis"),
        ("The capital of {}", "New York", "3 ĠNew", "5 York", "5 York"),
        ("The capital of {}and is", "Pol", "3 ĠPoland", "3 ĠPoland", "4 Ġis"),
        ("The capital of Pol{} is", "and", "3 ĠPoland", "3 ĠPoland", "4 Ġis"),
        ("{}'s capital", "Paris", "0 Paris", "0 Paris", "2 Ġcapital"),
        ("{} is in Paris of", "Paris", "0 Paris", "0 Paris", "4 Ġof"),
        ("The Paris in {} is", "Paris", "3 ĠParis", "3 ĠParis", "4 Ġis"),
        ("The{} is", " Paris", "1 ĠParis", "1 ĠParis", "2 Ġis"),
        ("{} is", "Café", "0 C", "4 ©", "5 Ġis"),
        ("{} is", "Cafe\u0301", "0 C", "5 ģ", "6 Ġis"),
        ("{} is in", "中文", "0 ä", "5 ĩ", "7 Ġin"),
        ("The {} is", "🦊", "2 ð", "5 Ĭ", "6 Ġis"),
        ("The capital of {} ", "Paris", "3 ĠParis", "3 ĠParis", "4 Ġ"),
    ],
    "llama3": [
        ("The capital of {} is", "Paris", "4 ĠParis", "4 ĠParis", "5 Ġis"),
        ("The capital of {}", "New York", "4 ĠNew", "5 ĠYork", "5 ĠYork"),
        ("The capital of {}and is", "Pol", "4 ĠPoland", "4 ĠPoland", "5 Ġis"),
        ("{} is in Paris of", "Paris", "1 Paris", "1 Paris", "5 Ġof"),
        ("The Paris in {} is", "Paris", "4 ĠParis", "4 ĠParis", "5 Ġis"),
        ("{} is", "Cafe\u0301", "1 C", "6 ģ", "7 Ġis"),
        ("The {} is", "🦊", "3 ð", "6 Ĭ", "7 Ġis"),
    ],
    "pythia": [
        ("The capital of {} is", "Paris", "3 ĠParis", "3 ĠParis", "4 Ġis"),
        ("{} is", "Cafe\u0301", "0 C", "4 ©", "5 Ġis"),
        ("The capital of {} ", "Paris", "3 ĠParis", "3 ĠParis", "4 Ġ"),
    ],
    "roberta": [
        ("The capital of {} is", "Paris", "5 ĠParis", "5 ĠParis", "6 Ġis"),
        ("{} is in Paris of", "Paris", "1 ĠParis", "1 ĠParis", "5 Ġof"),
        ("The capital of {}", "New York", "5 ĠNew", "7 York", "7 York"),
        ("{} is", "Café", "1 ĠCafÃ©", "1 ĠCafÃ©", "2 Ġis"),
        ("{} is in", "中文", "2 ä", "7 ĩ", "9 Ġin"),
    ],
    "prefixed": [
        ("{} is in", "中文", "1 ä", "6 ĩ", "8 Ġin"),
        ("{} is", " Paris", "0 ĠParis", "0 ĠParis", "1 Ġis"),
    ],
    "llama2": [
        ("The capital of {} is", "Paris", "5 ▁Paris", "5 ▁Paris", "6 ▁is"),
        ("The capital of {}", "New York", "5 ▁New", "7 York", "7 York"),
        ("The capital of {}and is", "Pol", "5 ▁Poland", "5 ▁Poland", "6 ▁is"),
        ("{} is in Paris of", "Paris", "1 ▁Paris", "1 ▁Paris", "5 ▁of"),
        ("The Paris in {} is", "Paris", "5 ▁Paris", "5 ▁Paris", "6 ▁is"),
        ("{} is", "Café", "1 ▁Café", "1 ▁Café", "2 ▁is"),
        ("{} is", "Cafe\u0301", "1 ▁Caf", "4 <0x81>", "5 ▁is"),
        ("{} is in", "中文", "2 <0xE4>", "7 <0x87>", "9 ▁in"),
        ("The {} is", "🦊", "4 <0xF0>", "7 <0x8A>", "8 ▁is"),
        ("{} is", " zoo", "2 <0x7A>", "4 o", "5 ▁is"),
    ],
    "llama2-normalizer": [
        ("The capital of {} is", "Paris", "5 ▁Paris", "5 ▁Paris", "6 ▁is"),
        ("{} is in", "中文", "2 <0xE4>", "7 <0x87>", "9 ▁in"),
    ],
    "gemma": [
        ("The capital of {} is", "Paris", "4 ▁Paris", "4 ▁Paris", "5 ▁is"),
        ("{} is in", "中文", "1 <0xE4>", "6 <0x87>", "8 ▁in"),
    ],
    "llama2-eos": [
        ("The capital of {}", "New York", "5 ▁New", "7 York", "7 York"),
        ("{} is in", "Paris", "1 ▁Paris", "1 ▁Paris", "3 ▁in"),
    ],
    "xglm": [
        ("The capital of {}", "New York", "5 ▁New", "6 ▁York", "6 ▁York"),
        ("{} is", "Cafe\u0301", "1 ▁Café", "1 ▁Café", "2 ▁is"),
        ("{} is in", "中文", "2 <unk>", "2 <unk>", "4 ▁in"),
        ("The {} is", "Ｐａｒｉｓ", "3 ▁Paris", "3 ▁Paris", "4 ▁is"),
    ],
    "bert": [
        ("The capital of {} is", "PARIS", "3 paris", "3 paris", "4 is"),
        ("The capital of {}", "New York", "3 new", "4 york", "4 york"),
        ("The capital of {}and is", "Pol", "3 pol", "3 pol", "5 is"),
        ("The capital of Pol{} is", "and", "4 ##and", "4 ##and", "5 is"),
        ("{} is", "Cafe\u0301", "0 cafe", "0 cafe", "1 is"),
        ("The {} is", "中文", "1 [UNK]", "2 [UNK]", "3 is"),
    ],
}

# Cases of the CounterFact file, with SmolLM2's tokens: subject-last and last.
SMOLLM2_BY_HAND = {
    12328: ("In United Kingdom, the language spoken is", "2 ĠKingdom", "7 Ġis"),
    19640: ("Google Trends is owned by", "1 ĠTrends", "4 Ġby"),
    17180: ("Mali belongs to the continent of", "1 ali", "6 Ġof"),
    5673: ("The native language of Georges Pompidou is", "7 ou", "8 Ġis"),
    17331: ("Kingdom of Afghanistan's capital city,", "3 ĠAfghanistan", "7 ,"),
    1997: ("Suzuki GSX-R750, produced by", "9 0", "12 Ġby"),
    8078: ("Intel 80286, a product developed by", "7 6", "12 Ġby"),
    17756: ("In Independent State of Croatia, the language spoken is", "4 ĠCroatia", "9 Ġis"),
    5281: ("Louis-Jean-Marie Daubenton is a native speaker of", "8 enton", "13 Ġof"),
    5779: ("Kyōto Prefecture is located in the country of", "5 fecture", "11 Ġof"),
}


def key(tokenizer: PreTrainedTokenizerBase, fact: Fact, token: KeyToken) -> str:
    (found,) = locate_keys(tokenizer, [fact], token)
    assert found.token_ids[found.position] == found.token_id
    return f"{found.position} {tokenizer.convert_ids_to_tokens(found.token_id)}"


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {kind: build() for kind, build in TOKENIZERS.items()}


@pytest.mark.parametrize("kind", BY_HAND)
def test_by_hand(tokenizers: dict[str, PreTrainedTokenizerBase], kind: str) -> None:
    for prompt, subject, first, last, end in BY_HAND[kind]:
        fact = Fact(prompt, subject, "x")
        found = [
            key(tokenizers[kind], fact, token)
            for token in ("subject-first", "subject-last", "last")
        ]
        assert found == [first, last, end], fact.text


def test_smollm2_by_hand(smollm2_model: LoadedModel) -> None:
    if not KNOWN.exists():
        pytest.skip(f"{KNOWN.name} is not there")
    facts = {fact.case_id: fact for fact in read_facts(KNOWN).facts}
    for case_id, (text, last, end) in SMOLLM2_BY_HAND.items():
        fact = facts[case_id]
        assert fact.text == text
        assert key(smollm2_model.tokenizer, fact, "subject-last") == last, text
        assert key(smollm2_model.tokenizer, fact, "last") == end, text


def test_smollm2_against_bytes(smollm2_model: LoadedModel) -> None:
    if not KNOWN.exists():
        pytest.skip(f"{KNOWN.name} is not there")
    check_against_bytes(smollm2_model.tokenizer, [*read_facts(KNOWN).facts, *random_facts(300)])


# Two more ways to find the token, neither of them by the code's own arithmetic.


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "llama3", "prefixed", "llama2", "llama2-normalizer", "gemma", "llama2-eos"],
)
def test_against_bytes(tokenizers: dict[str, PreTrainedTokenizerBase], kind: str) -> None:
    check_against_bytes(tokenizers[kind], random_facts(300))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_against_brute_force(tokenizers: dict[str, PreTrainedTokenizerBase], kind: str) -> None:
    """subject-last by the definition: every token and every character is looked at."""
    tokenizer = tokenizers[kind]
    facts = random_facts(300)
    for fact, found in zip(facts, locate_keys(tokenizer, facts), strict=True):
        start, end = fact.subject_span
        encoding = tokenizer(fact.text, return_offsets_mapping=True)
        overlapping = []
        for index, (left, right) in enumerate(encoding["offset_mapping"]):
            if any(start <= character < end for character in range(left, right)):
                overlapping.append(index)
        assert found.position == max(overlapping), fact.text
        assert list(found.token_ids) == encoding["input_ids"]


def check_against_bytes(tokenizer: PreTrainedTokenizerBase, facts: list[Fact]) -> None:
    """Compare with where each token's own bytes lie in the text, which needs no offsets."""
    spelling = byte_level_bytes if "Ġ" in tokenizer.get_vocab() else sentencepiece_bytes
    for token in get_args(KeyToken):
        for fact, found in zip(facts, locate_keys(tokenizer, facts, token), strict=True):
            names = tokenizer.convert_ids_to_tokens(list(found.token_ids))
            pieces = [b"" if name in ("<s>", "</s>") else spelling(name) for name in names]
            assert found.position == position_by_bytes(pieces, fact, token), (fact, token)


def position_by_bytes(pieces: list[bytes], fact: Fact, token: KeyToken) -> int:
    added = len(b"".join(pieces)) - len(fact.text.encode())  # the space before the text
    assert added in (0, 1)
    assert b"".join(pieces) == b" " * added + fact.text.encode()
    start, end = fact.subject_span
    first_byte = added + len(fact.text[:start].encode())
    last_byte = added + len(fact.text[:end].encode()) - 1
    ends = list(itertools.accumulate(map(len, pieces)))
    holding = {
        "subject-first": first_byte,
        "subject-last": last_byte,
        "last": ends[-1] - 1,
    }[token]
    return next(index for index, end_byte in enumerate(ends) if holding < end_byte)


def sentencepiece_bytes(token: str) -> bytes:
    if token.startswith("<0x"):
        return bytes([int(token[3:-1], 16)])
    return token.replace("▁", " ").encode()


def byte_level_bytes(token: str) -> bytes:
    return bytes(BYTES[letter] for letter in token)


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 is itself, the rest follow from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


BYTES = byte_letters()


def random_facts(count: int) -> list[Fact]:
    """Prompts and subjects thrown together from words and characters of many scripts."""
    draw = random.Random(0)
    bits = ["Paris", "Poland", "Café", unicodedata.normalize("NFD", "Café"), "New York", "中文"]
    bits += ["🦊", "👩‍🚀", "é", "ﬁ", "½", "İ", "ß", "Ω", "한국", "और", "x", "'s", "and", "{", "2"]
    bits += ["Ａ", "…", "Zürich", "ñ", "العربية", "The", " of", " is", ", ", "-", "\n", "  "]

    def some(least: int, most: int) -> str:
        return "".join(
            draw.choice(bits) + draw.choice(["", " "]) for _ in range(draw.randint(least, most))
        )

    facts: list[Fact] = []
    while len(facts) < count:
        before, subject, after = some(0, 3), some(1, 3).strip(" \n"), some(0, 3)
        if subject.strip("{,- \n") and "{}" not in before + after:
            facts.append(Fact(f"{before}{{}}{after}", subject, "x"))
    return facts


# The rest of the contract


def test_many_facts_at_once(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    facts = random_facts(20)
    for tokenizer in tokenizers.values():
        together = locate_keys(tokenizer, facts)
        alone = tuple(itertools.chain.from_iterable(locate_keys(tokenizer, [f]) for f in facts))
        assert together == alone
    assert locate_keys(tokenizers["gpt2"], []) == ()


def test_one_call_without_padding_or_truncation() -> None:
    tokenizer = byte_level(WORDS, bos=True)
    tokenizer.pad_token = "</s>"
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 3
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    facts = [Fact("{} is", "Paris", "x"), Fact("The capital of {} is in", "Paris", "x")]
    short, long = locate_keys(tokenizer, facts)
    assert (len(short.token_ids), short.position) == (3, 1)
    assert (len(long.token_ids), long.position) == (7, 4)


def test_special_tokens_in_the_text_are_text() -> None:
    tokenizer = byte_level(WORDS, bos=True, eos=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert key(tokenizer, Fact("The {}</s>", "<s>", "x"), "subject-last") == "3 <s>"
    assert key(tokenizer, Fact("The {}</s>", "<s>", "x"), "last") == "4 </s>"


def test_subject_without_a_token(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    # BERT's normalizer drops control characters.
    with pytest.raises(FactsError, match=r"case 5\) stands for the subject '\\x01'"):
        locate_keys(tokenizers["bert"], [Fact("The {} is", "\x01", "x", case_id=5)])


def test_the_added_space_is_not_the_subject() -> None:
    # The normalizer drops the subject; the ▁ before the text has the offsets of its place.
    tokenizer = unigram(PIECES)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\x01", "")
    with pytest.raises(FactsError, match="stands for the subject"):
        locate_keys(tokenizer, [Fact("{}中", "\x01", "x")])


def test_wrong_requests(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    wrong: Any = "middle"
    with pytest.raises(UsageError, match="subject-last, subject-first, last"):
        locate_keys(tokenizers["gpt2"], [Fact("{}", "x", "x")], wrong)


def test_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    slow: Any = Slow()
    with pytest.raises(ModelError, match=r"some/model \(Slow\) gives no character offsets"):
        locate_keys(slow, [Fact("{}", "x", "x")])


@pytest.mark.parametrize("subject", ["France ", " France", "France\u00a0\u2003", "\u200bFrance\t"])
def test_a_subject_s_key_is_at_its_last_token_that_is_seen(subject: str) -> None:
    tokenizer = byte_level([" The", " capital", " of", " France", "France", " is"])
    fact = Fact("The capital of {} is", subject, "Paris")
    clean = Fact("The capital of {} is", subject.strip("\u200b\t \u00a0\u2003"), "Paris")
    (located,) = locate_keys(tokenizer, [fact])
    (expected,) = locate_keys(tokenizer, [clean])
    assert has_blank_end(fact)
    assert not has_blank_end(clean)
    text = tokenizer.decode([located.token_id]).strip()
    assert tokenizer.decode([expected.token_id]).strip().endswith(text)


def test_an_accent_that_joins_the_subject_is_refused() -> None:
    with pytest.raises(FactsError, match="joins its last letter"):
        locate_keys(byte_level([]), [Fact("{}\u0301 is in", "Cafe", "Paris")])
