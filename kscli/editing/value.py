"""The value that an edit writes, found as ROME finds it: what makes the model say the new target.

Meng et al., "Locating and Editing Factual Associations in GPT" (2022), section 3.1, step 2: v_e is
the output of the MLP at the subject's last token with which the model says the new target, found
by gradient descent on equation 4. Here the shift delta from the model's own v is optimised:

    L(delta) = likelihood_weight mean over texts x of  -1/n sum_i log P(o_i | x, o_1 .. o_{i-1})
             + kl_weight KL(P'(. | "{subject} is a") || P(. | "{subject} is a"))
             + weight_decay |delta| / |v|^2

where o_1 .. o_n are the new target's tokens, a text is the prompt in a context, P' is the model
with the shift and P without. The last term and the division by n are those of the authors' code
(github.com/kmeng01/rome, rome/compute_v.py), as are the optimiser, Adam, and that after each step
delta is cut to |delta| <= norm_limit |v|. That code reads the KL term at the subject's last token;
the paper after "{subject} is a".

PMET (Li et al. 2024) seeks a shift of the attention's output together with that of the MLP's, each
with its weight decay and its limit. Once the target's tokens are the likeliest in every text, the
likelihood counts `EASED` times; the search ends when the KL term is then at most `NEAR` too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kscli.batching import beyond, pad_right
from kscli.completion import Cloze, tokenize_clozes
from kscli.contexts import in_context
from kscli.editing.editors import ValueSearch
from kscli.editing.lower_layers import LowerLayers
from kscli.errors import FactsError, ModelError, NumericsError, is_out_of_memory
from kscli.fact_forms import SLOT
from kscli.facts import Fact
from kscli.models.down_projections import attention_output
from kscli.models.loading import LoadedModel
from kscli.models.prefixes import Prefixes
from kscli.positions import LocatedPrompt, locate_keys

ESSENCE_PROMPT = f"{SLOT} is a"
EASED, NEAR = 0.1, 0.01  # PMET's

DEFAULTS = ValueSearch()


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
    search: ValueSearch = DEFAULTS,
) -> FoundValue:
    """Find the shift of a layer's output at the subject's last token with which a target is said.

    Neither the model nor its parameters' `requires_grad` are changed. Raises DivergedError when
    the loss is not finite or the target is less likely with the shift than without, over all
    contexts, FactsError
    for a text that does not fit, and ModelError when memory does not suffice.
    """
    where = f"no value makes {target_new!r} follow {fact.text!r} at layer {layer}"
    with torch.enable_grad(), _enough_memory(model):
        objective = ShiftLoss(model, layer, fact, target_new, search)
        shifts = [torch.zeros_like(value, requires_grad=True) for value in objective.values]
        limits = [search.norm_limit * value.norm() for value in objective.values]
        optimizer = torch.optim.Adam(shifts, lr=search.learning_rate)
        before, ease = math.inf, 1.0
        for step in range(search.steps):
            loss = objective(shifts, ease)
            if step == 0:
                before = loss.surprise
            if not math.isfinite(loss.total.item()):
                raise DivergedError(
                    f"{where}: the loss is {loss.total.item()} at step {step}. Lower "
                    "--learning-rate, or try another --dtype."
                )
            if loss.total < search.stop_at or step == search.steps - 1:
                break
            if search.attention:
                ease = EASED if loss.likeliest else 1.0
                if loss.likeliest and loss.kl <= NEAR:
                    break
            optimizer.zero_grad()
            loss.total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            _cut(shifts, limits, f"{where}: the shift is {{}} long after step {step + 1}.")
    if loss.surprise > before:
        raise DivergedError(
            f"{where}: its probability is {math.exp(-loss.surprise):.2g} at step {step}, and was "
            f"{math.exp(-before):.2g}. Lower --learning-rate, or choose another layer."
        )
    return FoundValue(
        shift=shifts[0].detach().double().cpu().numpy(),
        value=objective.values[0].double().cpu().numpy(),
        loss=loss.total.item(),
        probability=math.exp(loss.logprob),
        steps=step,
    )


def _cut(shifts: Sequence[Tensor], limits: Sequence[Tensor], failed: str) -> None:
    """Cut each shift to its limit; raise DivergedError where one is not finite."""
    with torch.no_grad():
        for shift, limit in zip(shifts, limits, strict=True):
            length = shift.norm()
            if not math.isfinite(length.item()):
                raise DivergedError(f"{failed.format(length.item())} Lower --learning-rate.")
            shift *= (limit / length).clamp(max=1)


def random_value(d: int, norm: float, seed: int, edit_number: int) -> NDArray[np.float64]:
    """A (d,) vector of length `norm`, its direction uniform, drawn for one edit of a seed."""
    drawn = np.random.default_rng([seed, edit_number]).standard_normal(d)
    return np.asarray(drawn * (norm / np.linalg.norm(drawn)))


class Loss(NamedTuple):
    """The loss of shifts, its KL term, and the target's log-probability after the bare prompt.

    `surprise` is the target's negative log-probability a token, over all contexts. `likeliest`:
    whether the target's tokens are the likeliest in every text.
    """

    total: Tensor
    kl: float
    surprise: float
    logprob: float
    likeliest: bool


class ShiftLoss:
    """The loss of shifts (see the module), one for each place where the search adds one.

    `values` (d,) float32 are the outputs at these places, at the subject's last token of the bare
    prompt: the v, or z, that is sought, and with PMET the attention's output.
    """

    def __init__(
        self, model: LoadedModel, layer: int, fact: Fact, target_new: str, search: ValueSearch
    ) -> None:
        self._model, self._search = model, search
        projection = model.decoder.projections[layer].module
        self._modules = [projection if search.site == "mlp" else model.decoder.layer(layer)]
        if search.attention:
            self._modules.append(_attention_output(model, layer))
        self._batch = _batch(model, fact, target_new, search)
        lower = LowerLayers(model, layer)
        self._below: Callable[[], AbstractContextManager[None]] = lower.recorded
        self._head: Callable[[], AbstractContextManager[None]] = nullcontext
        self._held: Callable[[], dict[str, Any]] = partial(dict, use_cache=True)
        with torch.no_grad():
            clean, self.values = self._run(None)
            clean = self._without_prefixes(clean)
            self._below = lower.replayed
            if layer and not self._again(clean, 0.0):
                self._below = nullcontext
            self._head = partial(_asked_alone, model, self._batch)
            again = self._again(clean, _rounding(model))
            if again is None:
                self._head = nullcontext
            self._clean_essence = (again or clean).essence

    def __call__(self, shifts: Sequence[Tensor], ease: float = 1.0) -> Loss:
        """The loss of (d,) shifts; the likelihood's weight is multiplied by `ease`."""
        search = self._search
        said, _ = self._run(shifts)
        surprise = -(self._batch.weight.to(shifts[0].device) * said.targets).sum()
        change = said.essence - self._clean_essence
        kl = search.kl_weight * (said.essence.exp() * change).sum()
        length = sum(
            (shift.norm() / value.norm() ** 2).to(surprise.device)
            for shift, value in zip(shifts, self.values, strict=True)
        )
        total = search.likelihood_weight * ease * surprise + kl + search.weight_decay * length
        logprob = float(said.targets[: self._batch.bare].detach().double().sum())
        return Loss(total, float(kl.detach()), float(surprise.detach()), logprob, said.likeliest)

    def _without_prefixes(self, clean: _Said) -> _Said:
        """What the model says when it reads on from the subjects' last tokens.

        Where it does not say what it said of the whole texts, `clean`, it reads these from now on.
        """
        whole = self._batch
        length = whole.input_ids.shape[1]
        self._held = dict
        if not whole.subject.any():
            return clean
        try:
            held = Prefixes(self._model.decoder, clean.cache, length, whole.subject)
        except ModelError:
            return clean
        self._batch = whole.from_subjects()
        self._held = partial(held.options, self._batch.input_ids.shape[1])
        if again := self._again(clean, _rounding(self._model)):
            return again
        self._batch, self._held = whole, dict
        return self._run(None)[0]

    def _again(self, clean: _Said, rounding: float) -> _Said | None:
        """What the model says with what is left out now; None unless it is what it said `clean`."""
        try:
            again, _ = self._run(None)
            same = [
                torch.allclose(now, then, rtol=0.0, atol=rounding)
                for now, then in ((again.targets, clean.targets), (again.essence, clean.essence))
            ]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
        return again if all(same) else None

    def _run(self, shifts: Sequence[Tensor] | None) -> tuple[_Said, list[Tensor]]:
        """What the model says with shifts, and the outputs without them in the bare prompt."""
        batch, decoder = self._batch, self._model.decoder
        held = self._held()
        with ExitStack() as hooks:
            hooks.enter_context(self._below())
            outputs = [
                hooks.enter_context(_shifted(module, batch, shifts[at] if shifts else None))
                for at, module in enumerate(self._modules)
            ]
            if self._head is nullcontext:
                keep = int(-batch.place.min())
                output = decoder(batch.input_ids, keep, **held)
                asked = output.logits[:, -keep:][batch.row, batch.place]
            else:
                hooks.enter_context(self._head())
                output = decoder(batch.input_ids, **held)
                asked = output.logits[0]
        values = [found[0] for found in outputs]
        device = values[0].device
        asked = asked.float().log_softmax(-1).to(device)
        token = batch.token.to(device)
        targets = asked[:-1].gather(1, token[:, None])[:, 0]
        likeliest = self._search.attention and torch.equal(asked[:-1].argmax(-1), token)
        cache = getattr(output, decoder.cache_name, None)
        return _Said(targets, asked[-1], likeliest, cache), values


def _attention_output(model: LoadedModel, layer: int) -> nn.Module:
    projection = model.decoder.projections[layer].module
    found = attention_output(model.decoder.layer(layer), projection)
    if found is None:
        raise ModelError(
            f"layer {layer} of {model.identity.model_id} has no linear map at the end of its "
            "attention, whose output is sought too; use another --method."
        )
    return found


class _Said(NamedTuple):
    """Log-probabilities: of each target token asked for, and of all tokens for the KL term.

    `cache` is what the model kept of the tokens that it read.
    """

    targets: Tensor
    essence: Tensor
    likeliest: bool
    cache: Any


@dataclass(frozen=True)
class _Batch:
    """The texts of a search, a row each: the bare prompt, those in contexts, the KL prompt.

    `input_ids` (rows, length) are padded on the right with token 0; no mask is needed, since in a
    causal decoder no token sees what follows it. The shift is added at `subject` (rows,). Asked are
    the logits at (`row`, `place`), places counted from the end: the last one in the KL prompt, the
    others for `token`, the targets' tokens, which count with `weight`. The first `bare` of
    these are the bare prompt's.
    """

    input_ids: Tensor
    subject: Tensor
    row: Tensor
    place: Tensor
    token: Tensor
    weight: Tensor
    bare: int

    def from_subjects(self) -> _Batch:
        """The same without the tokens before each row's `subject`."""
        length, starts = self.input_ids.shape[1], self.subject
        asked = self.place + length - starts[self.row]
        kept = int(asked.max()) + 1
        at = starts[:, None] + torch.arange(kept)
        ids = self.input_ids.gather(1, at.clamp(max=length - 1))
        return replace(
            self,
            input_ids=ids.where(at < length, 0),
            subject=torch.zeros_like(starts),
            place=asked - kept,
        )


def _batch(model: LoadedModel, fact: Fact, target_new: str, search: ValueSearch) -> _Batch:
    facts = [in_context(context, fact) for context in (SLOT, *search.contexts)]
    facts.append(replace(fact, prompt=ESSENCE_PROMPT))
    texts = [of_row.text for of_row in facts]
    *clozes, essence = tokenize_clozes(model.tokenizer, texts, [target_new] * len(texts))
    located = locate_keys(model.tokenizer, facts)
    rows = [cloze.sequence for cloze in clozes] + [essence.prompt_ids]
    for text, of_row, cloze in zip(texts, located, (*clozes, essence), strict=True):
        _check_row(model, text, of_row, cloze)
    if len({beyond(model.boundary, len(row)) for row in rows}) > 1:
        raise FactsError(
            f"The texts of {fact.text!r} in its contexts lie on both sides of {model.boundary:,} "
            f"tokens, where {model.identity.model_id} changes its position encodings, so they "
            "cannot be in one batch; use fewer or shorter --contexts."
        )
    input_ids = pad_right(rows)
    asked = [
        (row, len(cloze.prompt_ids) - 1 + index, token, 1 / len(cloze.target_ids) / len(clozes))
        for row, cloze in enumerate(clozes)
        for index, token in enumerate(cloze.target_ids)
    ]
    row, place, tokens, weights = zip(*asked, strict=True)
    read_at = located[-1].position if search.kl_at == "subject" else len(essence.prompt_ids) - 1
    return _Batch(
        input_ids=input_ids,
        subject=torch.tensor([prompt.position for prompt in located]),
        row=torch.tensor([*row, len(rows) - 1]),
        place=torch.tensor([*place, read_at]) - input_ids.shape[1],
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
def _asked_alone(model: LoadedModel, batch: _Batch) -> Iterator[None]:
    """Have the LM head read what is asked alone, (1, asked, d), while the block runs.

    It is a third of a small model's work, and most of the logits of a batch are never read.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (inputs[0][batch.row, batch.place][None], *inputs[1:])

    head = model.decoder.model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(hook):
        yield


def _rounding(model: LoadedModel) -> float:
    """How far log-probabilities may be apart that a product of another shape gives."""
    dtype = next(model.decoder.model.parameters()).dtype
    return min(1000 * torch.finfo(dtype).eps, 0.05)


@contextmanager
def _enough_memory(model: LoadedModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"memory does not suffice to search a value in {model.identity.model_id}: gradients "
            "take more than the model alone. Use fewer --contexts, another --dtype or --device."
        ) from error
