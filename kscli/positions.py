"""Where in a prompt's tokens the key is read: the token of the fact's subject.

The position comes from the character offsets that a fast tokenizer gives, never from a
search for the subject's text or tokens: the subject can occur twice, and its tokens
depend on what stands around it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from kscli.errors import FactsError, ModelError, UsageError
from kscli.facts import Fact
from kscli.records import quote

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

KeyToken = Literal["subject-last", "subject-first", "last"]
"""The last or first token that overlaps the subject's characters, or the prompt's last token."""

PREFIX_TOKENS = ("▁", "Ġ")  # a lone space, as SentencePiece and byte-level BPE write it

_UNSEEN = "ZC"  # Unicode's general categories of separators, and of control and format characters


@dataclass(frozen=True)
class LocatedPrompt:
    """A prompt's tokens, special ones included, and the index of the key's token in them."""

    token_ids: tuple[int, ...]
    position: int

    @property
    def token_id(self) -> int:
        """The id of the key's token."""
        return self.token_ids[self.position]


def locate_keys(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], token: KeyToken = "subject-last"
) -> tuple[LocatedPrompt, ...]:
    """Tokenize each fact's text, neither padded nor truncated, and find the key's token in it.

    The tokenizer adds its own special tokens, which are never the key's token.

    Raises:
        UsageError: `token` is none of `KeyToken`.
        ModelError: the tokenizer gives no offsets (it is not a fast one).
        FactsError: no token stands for the subject; names the fact.
    """
    if token not in get_args(KeyToken):
        raise UsageError(f"{token!r} is not a key token; choose {', '.join(get_args(KeyToken))}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} "
            f"({type(tokenizer).__name__}) gives no character offsets; "
            "use a model that has a tokenizer.json."
        )
    if not facts:
        return ()
    batch = tokenizer(
        [fact.text for fact in facts],
        add_special_tokens=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return tuple(
        LocatedPrompt(tuple(encoding.ids), _position(encoding, fact, token))
        for encoding, fact in zip(batch.encodings, facts, strict=True)
    )


def _position(encoding: Encoding, fact: Fact, token: KeyToken) -> int:
    own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    if token == "last" and own:
        return own[-1]
    if own and _is_added_space(encoding, own[0], fact.text):
        del own[0]
    start, end = _visible_span(fact)
    offsets = encoding.offsets  # which is made anew for every look
    covering = [index for index in own if _overlaps(offsets[index], start, end)]
    if not covering:
        raise FactsError(
            f"No token of {quote(fact.text)} (case {fact.case_id}) stands for the subject "
            f"{quote(fact.subject)}: the model's tokenizer drops it. Leave the fact out."
        )
    return covering[0] if token == "subject-first" else covering[-1]


def has_blank_end(fact: Fact) -> bool:
    """Whether the subject begins or ends with characters that are not seen."""
    return _visible_span(fact) != fact.subject_span


def _visible_span(fact: Fact) -> tuple[int, int]:
    """The subject's characters in the fact's text, less white space and the like at its ends.

    Raises FactsError where what follows the subject joins its last letter, as an accent does.
    """
    start, end = fact.subject_span
    text = fact.text
    if unicodedata.category(text[end : end + 1] or " ").startswith("M"):
        raise FactsError(
            f"In {quote(text)} (case {fact.case_id}) the character after the subject "
            f"{quote(fact.subject)} joins its last letter, so the subject has no last token of its "
            "own. Make it part of the subject."
        )
    while end - start > 1 and unicodedata.category(text[end - 1])[0] in _UNSEEN:
        end -= 1
    while end - start > 1 and unicodedata.category(text[start])[0] in _UNSEEN:
        start += 1
    return start, end


def _overlaps(offsets: tuple[int, int], start: int, end: int) -> bool:
    return max(offsets[0], start) < min(offsets[1], end)


def _is_added_space(encoding: Encoding, index: int, text: str) -> bool:
    """Whether the text's first token is only the space that the tokenizer puts before it.

    tokenizers gives that space the offsets of the first character, which it holds none of.
    """
    token = encoding.tokens[index]
    start = encoding.offsets[index][0]
    first = text[start : start + 1]
    return token in PREFIX_TOKENS and first != token and not first.isspace()
