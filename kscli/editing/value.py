"""The value that an edit writes, found as ROME finds it: what makes the model say the new target.

Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.1, step 2: v_e is
the output of the MLP at the subject's last token with which the model says the new target, found
by gradient descent on equation 4. Here the shift delta from the model's own v is optimised:

    L(delta) = mean over texts x of  -1/n sum_i log P(o_i | x, o_1 .. o_{i-1})
             + kl_weight KL(P'(. | "{subject} is a") || P(. | "{subject} is a"))
             + weight_decay |delta| / |v|^2

where o_1 .. o_n are the new target's tokens, a text is a prefix and the prompt, P' is the model
with the shift and P without. The last term and the division by n are those of the authors' code
(github.com/kmeng01/rome, rome/compute_v.py), as are the optimiser, Adam, and that after each step
delta is cut to |delta| <= norm_limit |v|. That code reads the KL term at the subject's last token;
the paper, and this module, after "{subject} is a".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kscli.batching import beyond, pad_right
from kscli.completion import Cloze, tokenize_clozes
from kscli.editing.editors import Site
from kscli.editing.lower_layers import LowerLayers
from kscli.errors import FactsError, ModelError, NumericsError, is_out_of_memory
from kscli.facts import SLOT, UNUSABLE, Fact
from kscli.models.loading import LoadedModel
from kscli.positions import LocatedPrompt, locate_keys

ESSENCE_PROMPT = f"{SLOT} is a"
LIKELIEST = 5  # ROME's and MEMIT's code sample prefixes from so many tokens
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's


@dataclass(frozen=True)
class ValueOptions:
    """How a value is searched; the defaults are ROME's (hparams/ROME/gpt2-xl.json of its code).

    An editor has `steps` and a `norm_limit` of its own (`kscli.editing.editors`). The names in
    ROME's and EasyEdit's hyper-parameters: `steps` is v_num_grad_steps, the most changes that are
    made to the shift; `learning_rate` v_lr; `weight_decay` v_weight_decay; `kl_weight` kl_factor;
    `norm_limit` clamp_norm_factor. The search ends as soon as the loss is below `stop_at`. The
    `prefixes` (context_templates) are put before the prompt as they are; the bare prompt is always
    used too.
    """

    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    norm_limit: float = 4.0
    stop_at: float = 0.05
    prefixes: tuple[str, ...] = ()


DEFAULTS = ValueOptions()


@dataclass(frozen=True)
class FoundValue:
    """What a search found at the subject's last token: `value` (d,) is v, `shift` (d,) is delta.

    `probability` is that of the new target after the bare prompt, and `loss` the loss, with the
    shift, which was changed `steps` times.
    """

    shift: NDArray[np.float64]
    value: NDArray[np.float64]
    loss: float
    probability: float
    steps: int


class DivergedError(NumericsError):
    """The search for a value did not end at one that makes the new target likelier."""


def find_value(
    model: LoadedModel,
    layer: int,
    fact: Fact,
    target_new: str,
    options: ValueOptions = DEFAULTS,
    site: Site = "mlp",
) -> FoundValue:
    """Find the shift of a layer's output at the subject's last token with which a target is said.

    Neither the model nor its parameters' `requires_grad` are changed. Raises DivergedError when
    the loss is not finite or the target is less probable with the shift than without, FactsError
    for a text that does not fit, and ModelError when memory does not suffice.
    """
    where = f"no value makes {target_new!r} follow {fact.text!r} at layer {layer}"
    with torch.enable_grad(), _enough_memory(model):
        objective = ShiftLoss(model, layer, fact, target_new, options, site)
        shift = torch.zeros_like(objective.value, requires_grad=True)
        limit = options.norm_limit * objective.value.norm()
        optimizer = torch.optim.Adam([shift], lr=options.learning_rate)
        before = -math.inf
        for step in range(options.steps + 1):
            loss, logprob = objective(shift)
            if step == 0:
                before = logprob
            if not math.isfinite(loss.item()):
                raise DivergedError(
                    f"{where}: the loss is {loss.item()} at step {step}. Lower --learning-rate, or "
                    "try another --dtype."
                )
            if loss < options.stop_at or step == options.steps:
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                length = shift.norm()
                if not math.isfinite(length.item()):
                    raise DivergedError(
                        f"{where}: the shift is {length.item()} long after step {step + 1}. Lower "
                        "--learning-rate."
                    )
                shift *= (limit / length).clamp(max=1)
    if logprob < before:
        raise DivergedError(
            f"{where}: its probability is {math.exp(logprob):.2g} at step {step}, and was "
            f"{math.exp(before):.2g}. Lower --learning-rate, or choose another layer."
        )
    return FoundValue(
        shift=shift.detach().double().cpu().numpy(),
        value=objective.value.double().cpu().numpy(),
        loss=loss.item(),
        probability=math.exp(logprob),
        steps=step,
    )


def random_value(d: int, norm: float, seed: int, edit_number: int) -> NDArray[np.float64]:
    """A (d,) vector of length `norm`, its direction uniform, drawn for one edit of a seed."""
    drawn = np.random.default_rng([seed, edit_number]).standard_normal(d)
    return np.asarray(drawn * (norm / np.linalg.norm(drawn)))


def generated_prefixes(
    model: LoadedModel, count: int, seed: int, length: int = 8
) -> tuple[str, ...]:
    """Sentences of `length` tokens, to be put before a prompt: ROME's context templates.

    They are what the model makes of `OPENINGS`, sampled from its `LIKELIEST` tokens, as in MEMIT's
    code (memit/memit_main.py); ROME's starts from a beginning-of-text token, after which not every
    model writes plain text. Those that come out twice are left out.
    """
    tokenizer = model.tokenizer
    generator = torch.Generator().manual_seed(seed)
    special = [token for token in tokenizer.all_special_ids if token < model.decoder.vocabulary]
    ids = torch.tensor([_beginning(tokenizer, number) for number in range(count)])
    with torch.no_grad():
        for _ in range(length - 1):
            logits = model.decoder.logits(ids, keep=1)[:, -1].float().cpu()
            logits[:, special] = -torch.inf
            likeliest, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))
            drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, tokens.gather(1, drawn)], dim=1)
    texts = [_plain(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return tuple(dict.fromkeys(f"{text}. " for text in texts if text))


class ShiftLoss:
    """The loss of a shift (see the module).

    `value` (d,) float32 is the site's output v at the subject's last token of the bare prompt.
    """

    def __init__(
        self,
        model: LoadedModel,
        layer: int,
        fact: Fact,
        target_new: str,
        options: ValueOptions,
        site: Site,
    ) -> None:
        self._model, self._options = model, options
        projection = model.decoder.projections[layer].module
        self._module = projection if site == "mlp" else model.decoder.layer(layer)
        self._batch = _batch(model, fact, target_new, options.prefixes)
        lower = LowerLayers(model, layer)
        self._below: Callable[[], AbstractContextManager[None]] = lower.recorded
        with torch.no_grad():
            clean, self.value = self._run(None)
            self._clean_essence = clean.essence
            self._below = lower.replayed
            if layer and not self._says_again(clean):
                self._below = nullcontext

    def __call__(self, shift: Tensor) -> tuple[Tensor, float]:
        """The loss of a (d,) shift, and the target's log-probability after the bare prompt."""
        options = self._options
        said, _ = self._run(shift)
        surprise = -(self._batch.weight.to(shift.device) * said.targets).sum()
        change = said.essence - self._clean_essence
        divergence = (said.essence.exp() * change).sum()
        length = shift.norm() / self.value.norm() ** 2
        loss = surprise + options.kl_weight * divergence + options.weight_decay * length
        return loss, float(said.targets[: self._batch.bare].detach().double().sum())

    def _says_again(self, clean: _Said) -> bool:
        """Whether the model says the same with the layers below replayed."""
        try:
            again, _ = self._run(None)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
        return all(map(torch.equal, again, clean))

    def _run(self, shift: Tensor | None) -> tuple[_Said, Tensor]:
        """What the model says with a shift, and the site's output without it in the bare prompt."""
        batch = self._batch
        with self._below(), _shifted(self._module, batch, shift) as outputs:
            logits = self._model.decoder.logits(batch.input_ids, int(-batch.place.min()))
        device = outputs[0].device
        asked = logits[batch.row, batch.place].float().log_softmax(-1).to(device)
        targets = asked[:-1].gather(1, batch.token.to(device)[:, None])[:, 0]
        return _Said(targets, asked[-1]), outputs[0]


class _Said(NamedTuple):
    """Log-probabilities: of each target token asked for, and of all tokens after the KL prompt."""

    targets: Tensor
    essence: Tensor


@dataclass(frozen=True)
class _Batch:
    """The texts of a search, a row each: the bare prompt, those with a prefix, the KL prompt.

    `input_ids` (rows, length) are padded on the right with token 0; no mask is needed, since in a
    causal decoder no token sees what follows it. The shift is added at `subject` (rows,). Asked are
    the logits at (`row`, `place`), places counted from the end: the last one after the KL prompt,
    the others for `token`, the targets' tokens, which count with `weight`. The first `bare` of
    these are the bare prompt's.
    """

    input_ids: Tensor
    subject: Tensor
    row: Tensor
    place: Tensor
    token: Tensor
    weight: Tensor
    bare: int


def _batch(model: LoadedModel, fact: Fact, target_new: str, prefixes: Sequence[str]) -> _Batch:
    prompts = [f"{prefix}{fact.prompt}" for prefix in ("", *prefixes)]
    facts = [replace(fact, prompt=prompt) for prompt in (*prompts, ESSENCE_PROMPT)]
    texts = [of_row.text for of_row in facts]
    *clozes, essence = tokenize_clozes(model.tokenizer, texts, [target_new] * len(texts))
    located = locate_keys(model.tokenizer, facts)
    rows = [cloze.sequence for cloze in clozes] + [essence.prompt_ids]
    for text, of_row, cloze in zip(texts, located, (*clozes, essence), strict=True):
        _check_row(model, text, of_row, cloze)
    if len({beyond(model.boundary, len(row)) for row in rows}) > 1:
        raise FactsError(
            f"The texts of {fact.text!r} and its prefixes lie on both sides of {model.boundary:,} "
            f"tokens, where {model.identity.model_id} changes its position encodings, so they "
            "cannot be in one batch; use fewer --prefixes."
        )
    input_ids = pad_right(rows)
    asked = [
        (row, len(cloze.prompt_ids) - 1 + index, token, 1 / len(cloze.target_ids) / len(clozes))
        for row, cloze in enumerate(clozes)
        for index, token in enumerate(cloze.target_ids)
    ]
    row, place, tokens, weights = zip(*asked, strict=True)
    return _Batch(
        input_ids=input_ids,
        subject=torch.tensor([prompt.position for prompt in located]),
        row=torch.tensor([*row, len(rows) - 1]),
        place=torch.tensor([*place, len(essence.prompt_ids) - 1]) - input_ids.shape[1],
        token=torch.tensor(tokens),
        weight=torch.tensor(weights),
        bare=len(clozes[0].target_ids),
    )


def _check_row(model: LoadedModel, text: str, located: LocatedPrompt, cloze: Cloze) -> None:
    end = located.position + 1
    if located.token_ids[:end] != cloze.prompt_ids[:end]:
        raise FactsError(
            f"In {text!r} the subject has other tokens where an answer follows; strip the white "
            "space at the text's end."
        )
    model.require_positions(text, len(cloze.sequence))


@contextmanager
def _shifted(module: nn.Module, batch: _Batch, shift: Tensor | None) -> Iterator[list[Tensor]]:
    """Add a shift to a module's output at the subjects' last tokens while the block runs.

    What is yielded holds, after a forward pass, the bare prompt's (d,) output without the shift.
    """
    found: list[Tensor] = []
    length = batch.input_ids.shape[1]
    tokens = torch.arange(len(batch.subject)) * length + batch.subject

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        # Some models flatten (batch, length, d) on the way.
        flat = own.reshape(-1, own.shape[-1])
        found.append(flat[tokens[0]].detach().float())
        if shift is None:
            return output
        rows = shift.to(flat).expand(len(tokens), -1)
        changed = flat.index_add(0, tokens.to(flat.device), rows).reshape(own.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with module.register_forward_hook(hook):
        yield found


@contextmanager
def _enough_memory(model: LoadedModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"memory does not suffice to search a value in {model.identity.model_id}: gradients "
            "take more than the model alone. Use fewer --prefixes, another --dtype or --device."
        ) from error


def _beginning(tokenizer: Any, number: int) -> list[int]:
    """The tokens that a generated text starts with, of one number for all: an opening's first."""
    opening = OPENINGS[number % len(OPENINGS)]
    first: int = tokenizer(opening, add_special_tokens=False)["input_ids"][0]
    begins = tokenizer(opening)["input_ids"][0]
    return [first] if begins == first else [begins, first]


def _plain(text: str) -> str:
    """A text that may stand in a fact's prompt, in one line and without braces."""
    return " ".join(UNUSABLE.sub(" ", text).replace("{", " ").replace("}", " ").split())
