"""What a model says after a prompt: its greedy continuation, and how probable a target is.

Targets that follow one text share a row of a batch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.batching import padded_batches
from kscli.errors import FactsError, ModelError, NumericsError
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter

# How Unicode's names of the characters begin that stand in words without spaces between them.
UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "FULLWIDTH "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN "),
)


@dataclass(frozen=True)
class Cloze:
    """A prompt's tokens, special ones in front included, and those of a target to follow it."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def sequence(self) -> tuple[int, ...]:
        """What the model reads: nothing is asked of the target's last token."""
        return self.prompt_ids + self.target_ids[:-1]

    def read(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities from the logits of its sequence, those of the token `first` foremost.

        Those of all tokens at the place of each of the target's, (n, vocabulary), and those of the
        target's own, (n,).
        """
        start = len(self.prompt_ids) - 1 - first
        own = logits[start : start + len(self.target_ids)]
        own = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)
        targets = torch.tensor(self.target_ids, device=own.device)
        return own, own.gather(1, targets[:, None])[:, 0]


@dataclass(frozen=True)
class TargetScores:
    """How a model takes n targets: `logprob` (n,) float64 and `rank` (n,) int64.

    `logprob` is the natural logarithm of the probability of the whole target after the prompt,
    the sum over its tokens; `rank` is that of its first token among all tokens, from 1. `likeliest`
    holds for each target the most probable token at the place of each of its own, given those.
    """

    logprob: NDArray[np.float64]
    rank: NDArray[np.int64]
    likeliest: tuple[tuple[int, ...], ...]

    def some(self, chosen: Sequence[int]) -> TargetScores:
        """Those of some targets, by their indexes, in their order."""
        rows = list(chosen)
        likeliest = tuple(self.likeliest[row] for row in rows)
        return TargetScores(self.logprob[rows], self.rank[rows], likeliest)

    def answers(self, clozes: Sequence[Cloze]) -> list[tuple[int, ...] | None]:
        """The greedy continuations, as long as the targets, as far as the scores tell them.

        They do where the continuation keeps to the target up to the target's last token; None
        for the rest.
        """
        return [
            of_one if of_one[:-1] == cloze.target_ids[:-1] else None
            for of_one, cloze in zip(self.likeliest, clozes, strict=True)
        ]


def tokenize_clozes(
    tokenizer: Any, texts: Sequence[str], targets: Sequence[str]
) -> tuple[Cloze, ...]:
    """Tokenize each text, and its target as it would be written after the text.

    White space at a text's end and around a target is left out: the space between them, where
    there is one (`space_before`), belongs to the target's first token. Special tokens that the
    tokenizer puts at the end are left out too, since nothing follows them. Raises FactsError for a
    text or target without a token.
    """
    heads = [text.rstrip() for text in texts]
    tails = [
        space_before(text, target.strip()) + target.strip()
        for text, target in zip(texts, targets, strict=True)
    ]
    prompts = _token_ids(tokenizer, heads)
    both = _token_ids(tokenizer, [head + tail for head, tail in zip(heads, tails, strict=True)])
    clozes = tuple(
        Cloze(prompt, _target_ids(tokenizer, prompt, whole, tail))
        for prompt, whole, tail in zip(prompts, both, tails, strict=True)
    )
    for cloze, head, tail in zip(clozes, heads, tails, strict=True):
        if not cloze.prompt_ids or not cloze.target_ids:
            dropped = tail.strip() if cloze.prompt_ids else head
            raise FactsError(
                f"No token stands for {dropped!r}: the model's tokenizer drops it. Leave the "
                "fact out."
            )
    return clozes


def space_before(text: str, target: str) -> str:
    """The space that is written between a text and a target that follows it: one, or none.

    There is none where either is of a script that writes no spaces between words, inside a number,
    after an opening bracket or quotation mark and the like, and before closing ones.
    """
    head = text.rstrip()
    if not head or not target:
        return ""
    last, first = head[-1], target[0]
    if head != text and not _is_unspaced(first):
        return " "
    inside_number = first.isdigit() and re.search(r"\d[.,]?$", head)
    opening = unicodedata.category(last) in ("Ps", "Pi", "Sc", "Pc") or last in "/-#@"
    closing = unicodedata.category(first) in ("Pe", "Pf") or first in ",.;:!?%"
    # A straight mark opens after a space; an elision has one or two letters before it (l', qu').
    quoted = re.search(r"""(^|[\s(\[])["']$|(^|\W)\w{1,2}['’]$""", head)
    if inside_number or opening or closing or quoted:
        return ""
    return "" if _is_unspaced(last) or _is_unspaced(first) else " "


def _is_unspaced(character: str) -> bool:
    """Whether a character is of a script whose words are not parted by spaces."""
    return unicodedata.name(character, "").startswith(UNSPACED)


def score_targets(
    model: LoadedModel, clozes: Sequence[Cloze], reporter: Reporter = SILENT
) -> TargetScores:
    """The log-probability of each cloze's target, and the rank of its first token.

    Raises FactsError for a cloze longer than the model's positions, ModelError for a model
    without an LM head or with another model's tokenizer, and NumericsError, naming the prompt,
    when a probability is not finite.
    """
    sequences = [cloze.sequence for cloze in clozes]
    _check(model, sequences, [len(sequence) for sequence in sequences])
    # One-word targets of a prompt share a sequence.
    wanting: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        wanting.setdefault(sequence, []).append(index)
    unique = list(wanting)
    logprob, rank = np.empty(len(clozes)), np.empty(len(clozes), dtype=np.int64)
    likeliest: list[tuple[int, ...]] = [()] * len(clozes)
    with torch.no_grad(), reporter.task("probabilities", len(clozes), unit="targets") as task:
        for rows, ids in padded_batches(unique, model.boundary):
            indexes = [wanting[unique[row]] for row in rows]
            first, logits = asked_logits(model, ids, [clozes[i] for same in indexes for i in same])
            for same, of_row in zip(indexes, logits, strict=True):
                for index in same:
                    of_all, of_target = clozes[index].read(of_row, first)
                    logprob[index] = sum(of_target.tolist())
                    rank[index] = int((of_all[0] > of_target[0]).sum()) + 1
                    likeliest[index] = tuple(of_all.argmax(-1).tolist())
                task.advance(len(same))
    _check_finite(model, clozes, logprob)
    return TargetScores(logprob, rank, tuple(likeliest))


def asked_logits(
    model: LoadedModel, input_ids: Tensor, clozes: Sequence[Cloze]
) -> tuple[int, Tensor]:
    """The first token whose logits the targets of a batch ask for, and the logits from it on."""
    first = min(len(cloze.prompt_ids) for cloze in clozes) - 1
    return first, model.decoder.logits(input_ids, input_ids.shape[1] - first)


def greedy_answers(
    model: LoadedModel, clozes: Sequence[Cloze], scores: TargetScores, reporter: Reporter = SILENT
) -> tuple[tuple[int, ...], ...]:
    """Each prompt's greedy continuation, as long as its target; raises as `score_targets` does.

    The model is run again only for those that its `scores` leave open.
    """
    answers = scores.answers(clozes)
    left = [index for index, answer in enumerate(answers) if answer is None]
    prompts = [clozes[index].prompt_ids for index in left]
    lengths = [len(clozes[index].target_ids) for index in left]
    run = dict(zip(left, continue_greedily(model, prompts, lengths, reporter), strict=True))
    end = model.tokenizer.eos_token_id
    return tuple(
        run[index] if answer is None else _until(answer, end)
        for index, answer in enumerate(answers)
    )


def continue_greedily(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    reporter: Reporter = SILENT,
) -> tuple[tuple[int, ...], ...]:
    """The most probable token after each prompt, `lengths` times over.

    A continuation is shorter where the tokenizer's end-of-text token comes first, which is left
    out. Raises as `score_targets` does.
    """
    _check(model, prompts, [len(p) + more for p, more in zip(prompts, lengths, strict=True)])
    end = model.tokenizer.eos_token_id
    found: list[tuple[int, ...]] = [()] * len(prompts)
    with torch.no_grad(), reporter.task("continuations", len(prompts), unit="prompts") as task:
        for rows, ids in padded_batches(prompts, few_tokens=0):
            tokens = model.decoder.greedy(ids, max(lengths[row] for row in rows))
            for row, token_ids in zip(rows, tokens.tolist(), strict=True):
                found[row] = _until(tuple(token_ids[: lengths[row]]), end)
            task.advance(len(rows))
    return tuple(found)


def decode_continuation(tokenizer: Any, prompt: Sequence[int], continuation: Sequence[int]) -> str:
    """What a continuation adds to the prompt's text, the space between them included."""

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    return decode([*prompt, *continuation])[len(decode(prompt)) :]


def _until(token_ids: tuple[int, ...], end: int | None) -> tuple[int, ...]:
    """The tokens before the end-of-text token, where there is one."""
    return token_ids[: token_ids.index(end)] if end in token_ids else token_ids


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    return [
        tuple(ids[: len(mask) - mask[::-1].index(0)]) if 0 in mask else tuple(ids)
        for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


def _target_ids(
    tokenizer: Any, prompt: tuple[int, ...], whole: tuple[int, ...], tail: str
) -> tuple[int, ...]:
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    # The tokenizer has tokens of several words, one of which reaches from prompt to target.
    return tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])


def _check(model: LoadedModel, sequences: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Refuse what the model cannot take: `lengths` are what the sequences grow to."""
    identity = model.identity
    if not model.has_head:
        raise ModelError(
            f"{identity.model_id} has no LM head, so it cannot complete a prompt; its files hold "
            "the decoder alone. Use a checkpoint that has one."
        )
    for sequence, length in zip(sequences, lengths, strict=True):
        model.require_positions(_opening(model, sequence), length)


def _check_finite(
    model: LoadedModel, clozes: Sequence[Cloze], logprob: NDArray[np.float64]
) -> None:
    bad = np.flatnonzero(~np.isfinite(logprob))
    if len(bad):
        raise NumericsError(
            f"after the prompt {_opening(model, clozes[bad[0]].prompt_ids)!r}... the probabilities "
            "are NaN or infinite; try another --dtype, or check the weights."
        )


def _opening(model: LoadedModel, token_ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(token_ids[:32])))[:60]
