"""Make the embedded model again: `python -m kscli.tiny.build [--output DIR]`.

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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kscli.tiny import MODEL_DIR
from kscli.tiny.corpus import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0
THREADS = 2
VOCABULARY = 3000
POSITIONS = 256
WIDTH = 128
LAYERS = 4
HEADS = 4
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


def new_model(end: int) -> GPT2LMHeadModel:
    """Initialise the decoder: 4 layers of width 128, d_m = 512, 1.2 million parameters."""
    torch.manual_seed(SEED)
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
    model = GPT2LMHeadModel(config)
    # A large model's first layer sees mostly the token itself. At this width it would see
    # mostly the context, so the tokens start large, and the positions stay as small as drawn.
    model.transformer.wte.weight.data *= TOKEN_SCALE
    model.transformer.wpe.weight.requires_grad_(False)
    return model


def train_model(model: GPT2LMHeadModel, sequences: list[list[int]], end: int) -> None:
    """Train on whole documents, each from position 0, as the model will be measured.

    `sequences` holds the token ids of each document; `end` is appended to each.
    """
    steps = sum(1 for _ in _batches(sequences, end))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    model.train()
    for step, (ids, labels) in enumerate(_batches(sequences, end), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            _say(f"step {step} of {steps}, loss {loss.item():.3f}")


def _batches(sequences: list[list[int]], end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels), both (batch, longest), in a new order each epoch.

    Sequences of about one length share a batch. The padding follows the text, where causal
    attention does not see it; its labels are ignored.
    """
    generator = random.Random(SEED)
    rows = [torch.tensor([*ids, end]) for ids in sequences]
    for _ in range(EPOCHS):
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


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both beside `folder`, then move each file into it; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (Path(temporary) / "generation_config.json").unlink(missing_ok=True)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors lets only the owner read
            file.replace(folder / file.name)


def build(folder: Path) -> None:
    """Train tokenizer and model and write them to `folder`."""
    torch.set_num_threads(THREADS)
    texts = list(documents())
    tokenizer = train_tokenizer(texts)
    sequences: list[list[int]] = tokenizer(texts, truncation=True, max_length=POSITIONS - 1)[
        "input_ids"
    ]
    _say(f"{len(texts)} documents, {sum(map(len, sequences))} tokens")
    end: int = tokenizer.eos_token_id
    model = new_model(end)
    train_model(model, sequences, end)
    save(model, tokenizer, folder)
    _say(f"{model.num_parameters()} parameters in {folder}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m kscli.tiny.build", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=MODEL_DIR, help="the folder to write [%(default)s]"
    )
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
