"""Make the embedded model again: `python -m kscli.tiny.build [--output DIR]`.

With `--kind` it trains another model in the same way, on the same text: `experts` has a mixture of
experts for its MLPs; `dense` has one MLP of the width that a token of `experts` sees, and is the
same otherwise; `wide` has one MLP of the width of all experts.

Trains the tokenizer and the model from scratch on `corpus.documents()`, with a fixed
seed, in a few minutes on 2 cores, and writes an ordinary Hugging Face folder. The same
machine, Python and torch give the same weights; another gives a model that differs in
its last digits at first and, after training has amplified them, in its weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from kscli.tiny import MODEL_DIR
from kscli.tiny.corpus import documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 0
THREADS = 2
VOCABULARY = 3000
POSITIONS = 256
WIDTH = 128
D_M = 4 * WIDTH
LAYERS = 4
HEADS = 4
EXPERTS, EACH = 8, 2  # how many experts a layer of `experts` has, and how many a token
EPOCHS = 20
BATCH_TOKENS = 2048
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
TOKEN_SCALE = 10.0
END = "<|endoftext|>"
IGNORED = -100  # the label that transformers' loss leaves out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Train GPT-2's kind of tokenizer: byte-level BPE, a word's space belonging to it.

    No space is put before the text and no special token around it, as in GPT-2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def new_model(end: int, kind: str = "tiny", seed: int = SEED) -> Any:
    """Initialise the decoder of a kind, one of `KINDS`."""
    torch.manual_seed(seed)
    model: Any = KINDS[kind](end)
    # A large model's first layer sees mostly the token itself. At this width it would see
    # mostly the context, so the tokens start large, and the positions stay as small as drawn.
    model.get_input_embeddings().weight.data *= TOKEN_SCALE
    if kind == "tiny":
        model.transformer.wpe.weight.requires_grad_(False)
    return model


def _tiny(end: int) -> GPT2LMHeadModel:
    """The embedded model: 4 layers of width 128, d_m = 512, 1.2 million parameters."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def _dense(end: int) -> PreTrainedModel:
    """As `_experts`, with one gated MLP of d_m = 512 a layer: 1.4 million parameters."""
    return _mistral(MistralConfig, end, D_M)


def _wide(end: int) -> PreTrainedModel:
    """As `_dense`, with d_m = 2048: 3.8 million parameters."""
    return _mistral(MistralConfig, end, D_M * EXPERTS // EACH)


def _experts(end: int) -> PreTrainedModel:
    """8 experts of d_m = 256 a layer, 2 a token: 3.8 million parameters, 1.4 of them active."""
    mixture = {"num_local_experts": EXPERTS, "num_experts_per_tok": EACH}
    # The loss that evens out how many tokens each expert has, as Mixtral was trained.
    return _mistral(MixtralConfig, end, D_M // EACH, **mixture, output_router_logits=True)


def _mistral(config: Any, end: int, d_m: int, **more: Any) -> PreTrainedModel:
    """A decoder of Mistral's kind, or Mixtral's, which differs in the MLP alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=d_m,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            **more,
        )
    )
    return model


KINDS: dict[str, Callable[[int], PreTrainedModel]] = {
    "tiny": _tiny,
    "dense": _dense,
    "wide": _wide,
    "experts": _experts,
}


def train_model(
    model: PreTrainedModel, sequences: list[list[int]], end: int, seed: int, epochs: int
) -> None:
    """Train on whole documents, each from position 0, as the model will be measured.

    `sequences` holds the token ids of each document; `end` is appended to each.
    """
    steps = sum(1 for _ in _batches(sequences, end, seed, epochs))
    if not steps:
        return
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    model.train()
    for step, (ids, labels) in enumerate(_batches(sequences, end, seed, epochs), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            _say(f"step {step} of {steps}, loss {loss.item():.3f}")


def _batches(
    sequences: list[list[int]], end: int, seed: int, epochs: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), both (batch, longest), in a new order each epoch.

    Sequences of about one length share a batch. The padding follows the text, where causal
    attention does not see it; its labels are ignored.
    """
    generator = random.Random(seed)
    rows = [torch.tensor([*ids, end]) for ids in sequences]
    for _ in range(epochs):
        order = sorted(rows, key=lambda row: len(row) + 2 * generator.random())
        batches: list[list[torch.Tensor]] = [[]]
        for row in order:
            if (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS and batches[-1]:
                batches.append([])
            batches[-1].append(row)
        generator.shuffle(batches)
        for batch in batches:
            yield (
                torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=end),
                torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED),
            )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both beside `folder`, then move each file into it; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (Path(temporary) / "generation_config.json").unlink(missing_ok=True)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read
            file.replace(folder / file.name)


def build(
    folder: Path,
    kind: str = "tiny",
    seed: int = SEED,
    epochs: int | None = None,
    threads: int = THREADS,
) -> None:
    """Train tokenizer and model and write them to `folder`; without epochs, the tokenizer alone.

    `epochs` is by default `EPOCHS`.
    """
    torch.set_num_threads(threads)
    texts = list(documents())
    tokenizer = train_tokenizer(texts)
    sequences: list[list[int]] = tokenizer(texts, truncation=True, max_length=POSITIONS - 1)[
        "input_ids"
    ]
    _say(f"{len(texts)} documents, {sum(map(len, sequences))} tokens")
    end: int = tokenizer.eos_token_id
    model = new_model(end, kind, seed)
    train_model(model, sequences, end, seed, EPOCHS if epochs is None else epochs)
    save(model, tokenizer, folder)
    _say(f"{model.num_parameters()} parameters in {folder}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m kscli.tiny.build", description=__doc__)
    parser.add_argument("--output", type=Path, help=f"the folder to write [{MODEL_DIR}]")
    parser.add_argument("--kind", choices=KINDS, default="tiny", help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=SEED, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=THREADS, help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="[%(default)s]")
    given = parser.parse_args()
    if given.output is None and (given.kind, given.seed, given.epochs) != ("tiny", SEED, EPOCHS):
        parser.error("only the embedded model is written without --output")
    build(given.output or MODEL_DIR, given.kind, given.seed, given.epochs, given.threads)


if __name__ == "__main__":
    main()
