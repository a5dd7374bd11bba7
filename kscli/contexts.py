"""Context templates: texts with {} in them, where a fact's prompt goes (context_templates).

ROME and MEMIT seek a value that holds after other texts too, and average keys over them. The
texts are what the model itself makes up, or those of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kscli.errors import FactsError
from kscli.fact_forms import SLOT
from kscli.facts import UNUSABLE, Fact
from kscli.files import require_ordinary

if TYPE_CHECKING:
    import torch

    from kscli.models.loading import LoadedModel

LIKELIEST = 5  # ROME's and MEMIT's code sample texts from so many tokens
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's


@dataclass(frozen=True)
class ContextChoice:
    """Which context templates are used: `texts`, and `generated` ones that the model makes up.

    These are so many texts of so many tokens, as (length, number), drawn with `seed`.
    """

    texts: tuple[str, ...] = ()
    generated: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def of(self, model: LoadedModel) -> tuple[str, ...]:
        """The templates, the bare prompt not among them."""
        if not self.generated:
            return self.texts
        return self.texts + generated_contexts(model, self.generated, self.seed)


def choose_contexts(
    wanted: str | None, published: Sequence[tuple[int, int]], seed: int = 0
) -> ContextChoice:
    """What `--contexts FILE|N` asks for: a file's, N texts of 10 tokens, or those `published`.

    Raises FactsError as `read_contexts` does.
    """
    if wanted is None:
        return ContextChoice(generated=tuple(published), seed=seed)
    if wanted.isascii() and wanted.isdecimal():
        count = int(wanted)
        return ContextChoice(generated=((10, count),) if count else (), seed=seed)
    return ContextChoice(read_contexts(Path(wanted)))


def in_context(context: str, fact: Fact) -> Fact:
    """The fact with its prompt in a context."""
    before, _, after = context.partition(SLOT)
    return replace(fact, prompt=f"{before}{fact.prompt}{after}")


def read_contexts(path: Path) -> tuple[str, ...]:
    """The context templates of a file, one a line, each once; the bare prompt, {}, is left out.

    Raises FactsError, naming the line, where {} does not stand in it once.
    """
    require_ordinary(path, FactsError)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FactsError(f"the contexts {path} cannot be read: {reason}.") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise FactsError(f"{path} holds no context; write one a line, with {SLOT} for the prompt.")
    for number, line in enumerate(lines, 1):
        if line.strip() and line.count(SLOT) != 1:
            raise FactsError(
                f"line {number} of {path} has {line.count(SLOT) or 'no'} {SLOT}; a context has it "
                "once, where the prompt goes."
            )
    return tuple(line for line in dict.fromkeys(found) if line.strip() != SLOT)


def generated_contexts(
    model: LoadedModel, lengths: Sequence[tuple[int, int]], seed: int
) -> tuple[str, ...]:
    """Context templates that the model makes up: for each (length, count) so many, as long.

    They are what the model makes of `OPENINGS`, sampled from its `LIKELIEST` tokens, as in MEMIT's
    code (memit/memit_main.py); ROME's starts from a beginning-of-text token, after which not every
    model writes plain text. Those that come out twice are left out.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    texts = [text for each in lengths for text in _generated(model, *each, generator)]
    return tuple(dict.fromkeys(f"{text}. {SLOT}" for text in texts if text))


def _generated(
    model: LoadedModel, length: int, count: int, generator: torch.Generator
) -> list[str]:
    import torch

    tokenizer = model.tokenizer
    special = [token for token in tokenizer.all_special_ids if token < model.decoder.vocabulary]
    ids = torch.tensor([_beginning(tokenizer, number) for number in range(count)])
    with torch.no_grad():
        for _ in range(length - 1):
            logits = model.decoder.logits(ids, keep=1)[:, -1].float().cpu()
            logits[:, special] = -torch.inf
            likeliest, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))
            drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, tokens.gather(1, drawn)], dim=1)
    return [_plain(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _beginning(tokenizer: Any, number: int) -> list[int]:
    """The tokens that a generated text starts with, of one number for all: an opening's first."""
    opening = OPENINGS[number % len(OPENINGS)]
    first: int = tokenizer(opening, add_special_tokens=False)["input_ids"][0]
    begins = tokenizer(opening)["input_ids"][0]
    return [first] if begins == first else [begins, first]


def _plain(text: str) -> str:
    """A text that may stand in a fact's prompt, in one line and without braces."""
    return " ".join(UNUSABLE.sub(" ", text).replace("{", " ").replace("}", " ").split())
