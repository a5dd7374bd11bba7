"""Continuations against transformers' own generate, probabilities against the definition."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_family
from tokenizers import decoders, normalizers
from tokenizers_kit import byte_level, sentencepiece_bpe, unigram
from transformers import AutoModelForCausalLM

from kscli import batching
from kscli.completion import (
    Cloze,
    continue_greedily,
    decode_continuation,
    greedy_answers,
    score_targets,
    space_before,
    tokenize_clozes,
)
from kscli.errors import FactsError, ModelError, NumericsError
from kscli.facts import read_facts
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.tiny import MODEL_DIR

FACTS = read_facts("tiny", 40).facts
LENGTHS = [1 + index % 7 for index in range(len(FACTS))]
WORDS = ["The", " capital", " of", " France", " is", " Par", " Paris", "Paris"]
PIECES = [word.replace(" ", "▁") for word in WORDS]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


def clozes_of(model: LoadedModel) -> tuple[Cloze, ...]:
    """Facts' prompts, with targets of one token to several, none after a space of the prompt."""
    targets = [f"{f.target} and {f.subject}" if i % 3 else f.target for i, f in enumerate(FACTS)]
    return tokenize_clozes(model.tokenizer, [fact.text for fact in FACTS], targets)


def generated(model: Any, prompt: tuple[int, ...], length: int, end: int) -> tuple[int, ...]:
    """What transformers generates after one prompt alone, without the end-of-text token."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        min_new_tokens=0,
        eos_token_id=end,
        pad_token_id=end,
        repetition_penalty=1.0,
    )[0, len(prompt) :].tolist()
    return tuple(made[: made.index(end)] if end in made else made)


def naive_score(model: Any, cloze: Cloze) -> tuple[float, int]:
    """The target one token at a time, each by a pass of its own over what stands before it."""
    logprob, rank = 0.0, 0
    for index, token_id in enumerate(cloze.target_ids):
        before = [*cloze.prompt_ids, *cloze.target_ids[:index]]
        with torch.no_grad():
            logits = model(torch.tensor([before])).logits[0, -1].double().numpy()
        logprob += logits[token_id] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        if index == 0:
            rank = 1 + sum(other > logits[token_id] for other in logits)
    return logprob, rank


# Mistral's attention slides over 8 tokens, which most prompts are longer than.
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-j", "gpt-neox", "llama", "mistral", "gemma", "opt", "falcon", "bloom"]
)
def test_a_batch_gives_what_each_prompt_gives_alone(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    loaded = load_model(ModelOptions(str(tmp_path), device="cpu", dtype="float32"))
    clozes = clozes_of(loaded)
    assert len({len(cloze.prompt_ids) for cloze in clozes}) > 3

    prompts = [cloze.prompt_ids for cloze in clozes]
    found = continue_greedily(loaded, prompts, LENGTHS)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    end = loaded.tokenizer.eos_token_id
    assert list(found) == [
        generated(reference, prompt, length, end)
        for prompt, length in zip(prompts, LENGTHS, strict=True)
    ]

    scores = score_targets(loaded, clozes)
    reference = reference.double()
    expected = [naive_score(reference, cloze) for cloze in clozes]
    np.testing.assert_allclose(scores.logprob, [logprob for logprob, _ in expected], rtol=1e-4)
    # Among 3,000 random logits a few lie within float32 of the target's.
    np.testing.assert_allclose(scores.rank, [rank for _, rank in expected], atol=3)


def test_the_embedded_model_completes_as_transformers_does(tiny: LoadedModel) -> None:
    clozes = clozes_of(tiny)
    prompts = [cloze.prompt_ids for cloze in clozes]
    reference = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="float32").eval()
    end = tiny.tokenizer.eos_token_id
    expected = [
        generated(reference, prompt, length, end)
        for prompt, length in zip(prompts, LENGTHS, strict=True)
    ]
    # The model ends its sentences, so that some continuations end early.
    assert any(len(made) < length for made, length in zip(expected, LENGTHS, strict=True))
    assert list(continue_greedily(tiny, prompts, LENGTHS)) == expected
    scores = score_targets(tiny, clozes)
    naive = [naive_score(reference.double(), cloze) for cloze in clozes]
    np.testing.assert_allclose(
        scores.logprob, [logprob for logprob, _ in naive], rtol=1e-5, atol=1e-5
    )
    # Several targets of a prompt share its pass, and answers come from the scores where they can.
    targets = [len(cloze.target_ids) for cloze in clozes]
    again = [Cloze(cloze.prompt_ids, cloze.target_ids[:1]) for cloze in clozes]
    both = score_targets(tiny, [*clozes, *again])
    np.testing.assert_array_equal(both.some(range(len(clozes))).rank, scores.rank)
    np.testing.assert_allclose(both.logprob[: len(clozes)], scores.logprob, rtol=1e-5, atol=1e-5)
    assert None in scores.answers(clozes)
    assert greedy_answers(tiny, clozes, scores) == continue_greedily(tiny, prompts, targets)
    long = [
        Cloze(prompt, made) for prompt, made in zip(prompts, expected, strict=True) if len(made) > 1
    ]
    assert score_targets(tiny, long).answers(long) == [cloze.target_ids for cloze in long]
    assert scores.rank.tolist() == [rank for _, rank in naive]


def test_small_batches_and_a_model_without_a_cache_give_the_same(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clozes = clozes_of(tiny)
    prompts = [cloze.prompt_ids for cloze in clozes]
    expected, scores = continue_greedily(tiny, prompts, LENGTHS), score_targets(tiny, clozes)
    forward = tiny.decoder.model.forward
    calls: list[torch.Size] = []

    def plain(input_ids: torch.Tensor) -> Any:
        calls.append(input_ids.shape)
        return forward(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(batching, "BATCH_ROWS", 3)
    monkeypatch.setattr(tiny.decoder.model, "forward", plain)
    assert continue_greedily(tiny, prompts, LENGTHS) == expected
    again = score_targets(tiny, clozes)
    np.testing.assert_allclose(again.logprob, scores.logprob, atol=1e-5)
    assert again.rank.tolist() == scores.rank.tolist()
    assert max(rows for rows, _ in calls) == 3


# By hand: a prompt's tokens and the target's, after `The capital of France is` and ` Paris`.
TOKENIZED = {
    "gpt2": (byte_level(WORDS), "The Ġcapital Ġof ĠFrance Ġis", "ĠParis"),
    "llama3": (byte_level(WORDS, bos=True), "<s> The Ġcapital Ġof ĠFrance Ġis", "ĠParis"),
    "roberta": (
        byte_level(WORDS, bos=True, eos=True, trim_offsets=True),
        "<s> The Ġcapital Ġof ĠFrance Ġis",
        "ĠParis",
    ),
    "llama2": (
        sentencepiece_bpe(["▁The", *PIECES], bos=True),
        "<s> ▁The ▁capital ▁of ▁France ▁is",
        "▁Paris",
    ),
    "gemma": (
        sentencepiece_bpe(PIECES, bos=True, prefix="none"),
        "<s> The ▁capital ▁of ▁France ▁is",
        "▁Paris",
    ),
    "xglm": (
        unigram(["▁The", *PIECES], bos=True, eos=True),
        "<s> ▁The ▁capital ▁of ▁France ▁is",
        "▁Paris",
    ),
    # A token of two words, which prompt and target together would be read as.
    "words": (
        sentencepiece_bpe(["▁is▁Paris", *PIECES], prefix="none"),
        "The ▁capital ▁of ▁France ▁is",
        "▁Paris",
    ),
}


@pytest.mark.parametrize("kind", TOKENIZED)
def test_tokens_of_a_prompt_and_its_target(kind: str) -> None:
    tokenizer, prompt, target = TOKENIZED[kind]
    for text, wanted in (("of France is", "Paris"), ("of France is ", " Paris ")):
        (cloze,) = tokenize_clozes(tokenizer, [f"The capital {text}"], [wanted])
        assert tokenizer.convert_ids_to_tokens(cloze.prompt_ids) == prompt.split()
        assert tokenizer.convert_ids_to_tokens(cloze.target_ids) == target.split()


def test_a_target_of_several_tokens() -> None:
    (cloze,) = tokenize_clozes(byte_level(WORDS), ["The capital"], ["Par of"])
    assert byte_level(WORDS).convert_ids_to_tokens(cloze.target_ids) == ["ĠPar", "Ġof"]


def test_nothing_to_complete(tiny: LoadedModel) -> None:
    assert tokenize_clozes(tiny.tokenizer, [], []) == ()
    assert continue_greedily(tiny, [], []) == ()
    assert score_targets(tiny, []).logprob.shape == (0,)


def test_the_space_before_a_continuation_is_kept() -> None:
    tokenizer = sentencepiece_bpe(["▁The", *PIECES], bos=True)
    # As in Llama 2's tokenizer.json: the space before a text is the tokenizer's own.
    parts = decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(list(parts))
    (cloze,) = tokenize_clozes(tokenizer, ["The capital of France is"], ["Paris"])
    assert tokenizer.decode(cloze.target_ids) == "Paris"
    assert decode_continuation(tokenizer, cloze.prompt_ids, cloze.target_ids) == " Paris"
    assert decode_continuation(tokenizer, cloze.prompt_ids, ()) == ""


# What cannot be done


def test_a_prompt_longer_than_the_positions(tiny: LoadedModel) -> None:
    clozes = tokenize_clozes(tiny.tokenizer, ["The capital of France is " + "of " * 254], ["Paris"])
    with pytest.raises(FactsError, match=r"'The capital of France.* tokens, and tiny takes 256;"):
        score_targets(tiny, clozes)
    prompts = [cloze.prompt_ids[:250] for cloze in clozes]
    assert len(continue_greedily(tiny, prompts, [6])) == 1
    with pytest.raises(FactsError, match="257 tokens, and tiny takes 256"):
        continue_greedily(tiny, prompts, [7])


def test_a_tokenizer_of_another_model(tiny: LoadedModel) -> None:
    with pytest.raises(ModelError, match="token 3000, but the model embeds only 3000"):
        score_targets(tiny, [Cloze((1, 3000), (2,))])


def test_text_that_the_tokenizer_drops() -> None:
    tokenizer = byte_level(WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" Paris", "")
    with pytest.raises(FactsError, match="No token stands for 'Paris'"):
        tokenize_clozes(tokenizer, ["The capital of France is"], ["Paris"])


def test_probabilities_that_are_not_finite() -> None:
    loaded = load_model(ModelOptions("tiny", device="cpu", dtype="float32"))
    clozes = clozes_of(loaded)[:3]
    loaded.decoder.model.transformer.ln_f.weight.data[5] = math.nan  # type: ignore[union-attr]
    with pytest.raises(NumericsError, match="NaN or infinite; try another --dtype"):
        score_targets(loaded, clozes)


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    save_family("llama", tmp_path / "full")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    whole.base_model.save_pretrained(tmp_path / "decoder")
    for path in MODEL_DIR.glob("*token*"):
        shutil.copy(path, tmp_path / "decoder")
    loaded = load_model(ModelOptions(str(tmp_path / "decoder"), device="cpu"))
    with pytest.raises(ModelError, match="has no LM head"):
        score_targets(loaded, clozes_of(loaded))


@pytest.mark.parametrize(
    ("text", "target", "space"),
    [
        ("The capital of France is", "Paris", " "),
        ("The capital of France is ", "Paris", " "),
        ("中国的首都是", "北京", ""),
        ("The capital of China is", "北京", ""),
        ("日本の首都は", "Tokyo", ""),
        ("서울은", "한국", " "),
        ('He said "', "yes", ""),
        ('He said "yes" to', "no", " "),
        ('It is called "X"', "later", " "),
        ("born (", "1945", ""),
        ("born in 19", "45", ""),
        ("pi is 3.", "14", ""),
        ("The year", "1990", " "),
        ("It costs $", "5", ""),
        ("capitale de l'", "Italie", ""),
        ("parce qu’", "il", ""),
        ("James'", "book", " "),
        ("Franco-", "German", ""),
        ("That is all", ".", ""),
    ],
)
def test_the_space_before_a_target_is_as_it_is_written(text: str, target: str, space: str) -> None:
    assert space_before(text, target) == space
