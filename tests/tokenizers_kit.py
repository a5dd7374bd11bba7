"""Small tokenizers of every kind that decoders use, built from fixed vocabularies.

Each is a pipeline of the same parts as the real family's tokenizer.json, around a handful
of words; what is not a word falls apart into characters or bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<s>", "</s>")


def byte_level(
    words: Sequence[str],
    *,
    bos: bool = False,
    eos: bool = False,
    trim_offsets: bool = False,
    prefix_space: bool = False,
    ignore_merges: bool = False,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (GPT-2, Pythia, Llama 3, Qwen); `words` with their leading space."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    spelled = [_byte_letters(word) for word in words]
    vocab, merges = _bpe([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())], spelled)
    tokenizer = Tokenizer(
        models.BPE(vocab, [] if ignore_merges else merges, ignore_merges=ignore_merges)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trim = processors.ByteLevel(trim_offsets=trim_offsets, add_prefix_space=prefix_space)
    tokenizer.post_processor = processors.Sequence([trim, _template(bos, eos)])
    return _wrapped(tokenizer)


def sentencepiece_bpe(
    words: Sequence[str],
    *,
    bos: bool = False,
    eos: bool = False,
    prefix: str = "metaspace",
) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback (Llama 2, Mistral, Gemma); `words` with their ▁.

    `prefix`: "metaspace" and "normalizer" put a ▁ before the text, by the two ways in which
    Llama 2's file is found; "none" does not, as Gemma.
    """
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab, merges = _bpe(["<unk>", *SPECIALS, *fallback, *letters], words)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = _template(bos, eos, first_id=1)
    return _wrapped(tokenizer)


def unigram(
    words: Sequence[str], *, bos: bool = False, eos: bool = False
) -> PreTrainedTokenizerFast:
    """SentencePiece Unigram with NFKC (XGLM, T5); `words` with their ▁."""
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(word, -1.0) for word in words]
    pieces += [(letter, -10.0) for letter in letters if letter not in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = _template(bos, eos, first_id=1)
    return _wrapped(tokenizer)


def wordpiece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """WordPiece that lower-cases and drops accents (BERT's), without special tokens."""
    vocab = {piece: index for index, piece in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def _byte_letters(text: str) -> str:
    """The text in the letters by which byte-level BPE writes bytes."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in pieces.pre_tokenize_str(text))


def _bpe(
    first: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges that build each word from left to right, earlier words first."""
    vocab = {piece: index for index, piece in enumerate(first)}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault(word[: end + 1], len(vocab))
    return vocab, merges


def _template(bos: bool, eos: bool, first_id: int = 0) -> processors.TemplateProcessing:
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    return processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", first_id), ("</s>", first_id + 1)]
    )
