"""Experts that are a list of modules, as Mixtral's were before transformers 5.

Which tokens such a block routes to an expert, and with what weights, only its own code knows. Both
follow from what can be seen: an expert is given rows of the block's input, and the block gives
y = sum_e g_e v_e, v_e what expert e gives. A token has few experts and y many entries, so the g_e
are the solution of a linear system that has many more equations than unknowns. That it holds is
checked (`ExpertLayer.require_sum`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kscli.errors import ModelError

TOKENS_AT_ONCE = 512
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Calls:
    """What experts were given, their keys and what they gave, by number: (n, size) each."""

    name: str
    inputs: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(
        self, block: nn.Module, experts: Sequence[nn.Module], downs: Sequence[nn.Module]
    ) -> Iterator[None]:
        """Note what a block's experts, whose down-projections are `downs`, are given and give."""
        with ExitStack() as hooks:
            hooks.enter_context(block.register_forward_pre_hook(lambda *_: self.clear()))
            for number, (expert, down) in enumerate(zip(experts, downs, strict=True)):

                def after(_: Any, inputs: Any, output: Any, number: int = number) -> None:
                    self._note(self.inputs, number, inputs[0])
                    self._note(self.outputs, number, output)

                def before(_: Any, inputs: Any, number: int = number) -> None:
                    self._note(self.keys, number, inputs[0])

                hooks.enter_context(expert.register_forward_hook(after))
                hooks.enter_context(down.register_forward_pre_hook(before))
            yield

    def clear(self) -> None:
        """Forget all."""
        for noted in (self.inputs, self.keys, self.outputs):
            noted.clear()

    def _note(self, what: dict[int, Tensor], number: int, value: Tensor) -> None:
        """Take one of them; a copy, as the model's code may change it in place."""
        if number in what:
            raise ModelError(
                f"expert {number} of {self.name} is called twice in a forward pass; kscli does not "
                "measure this mixture of experts."
            )
        what[number] = value.reshape(-1, value.shape[-1]).clone()

    def routed(self, given: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens, experts, gates and keys of all rows, and sum_e g_e v_e of every token.

        `given` (tokens, d) is the block's input, `value` (tokens, d) what the experts give in all.
        """
        numbers = sorted(number for number, rows in self.inputs.items() if len(rows))
        tokens = [_places(self.inputs[number], given, self.name) for number in numbers]
        token = torch.cat([*tokens, given.new_zeros(0, dtype=torch.long)])
        sizes = [len(each) for each in tokens]
        expert = torch.repeat_interleave(torch.tensor(numbers), torch.tensor(sizes)).to(token)
        if not len(token):
            raise ModelError(f"no token is routed to an expert of {self.name}.")
        outputs = torch.cat([self.outputs[number] for number in numbers])
        gates, fitted = _solve(token, outputs, value)
        keys = torch.cat([self.keys[number] for number in numbers])
        return token, expert, gates.to(keys.dtype), keys, fitted


def _places(rows: Tensor, of: Tensor, name: str) -> Tensor:
    """Where (n, d) rows stand among those `of` the block's input; equal ones in their order."""
    known, kinds = torch.unique(torch.cat([_bits(of), _bits(rows)]), return_inverse=True)
    ours, theirs = kinds[: len(of)], kinds[len(of) :]
    counts = torch.bincount(ours, minlength=len(known))
    wanted = torch.bincount(theirs, minlength=len(known))
    if (wanted > counts).any():
        raise ModelError(
            f"the experts of {name} are given what is no row of their block's input; kscli does "
            "not measure this mixture of experts."
        )
    order, starts = theirs.argsort(stable=True), counts.cumsum(0) - counts
    in_kind = (
        torch.arange(len(rows), device=rows.device) - (wanted.cumsum(0) - wanted)[theirs[order]]
    )
    found = torch.empty_like(theirs)
    found[order] = ours.argsort(stable=True)[starts[theirs[order]] + in_kind]
    return found


def _bits(rows: Tensor) -> Tensor:
    """A number for each row, (n,), that is the same for rows that are equal bit by bit."""
    bits = rows.contiguous().view(_INTEGERS[rows.dtype.itemsize]).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator)
    return (bits * factors.to(bits.device)).sum(1)


def _solve(token: Tensor, outputs: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gates g of rows, (rows,), with sum g v = `value` (tokens, d); and that sum, float32.

    `outputs` (rows, d) are the v, `token` (rows,) whose they are. In float64.
    """
    counts = torch.bincount(token, minlength=len(value))
    order = token.argsort(stable=True)
    slot = torch.empty_like(token)
    starts = counts.cumsum(0) - counts
    slot[order] = torch.arange(len(token), device=token.device) - starts[token[order]]
    gates, fitted = (
        value.new_zeros(len(token)).float(),
        torch.zeros_like(value, dtype=torch.float32),
    )
    for start in range(0, len(value), TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE, len(value))
        rows = torch.nonzero((token >= start) & (token < stop))[:, 0]
        shape = stop - start, int(counts[start:stop].max()), value.shape[1]
        V = torch.zeros(shape, dtype=torch.float64, device=value.device)
        V[token[rows] - start, slot[rows]] = outputs[rows].double()
        right = V @ value[start:stop, :, None].double()
        solved = torch.linalg.pinv(V @ V.mT, hermitian=True) @ right
        gates[rows] = solved[token[rows] - start, slot[rows], 0].float()
        fitted[start:stop] = (solved.mT @ V)[:, 0].float()
    return gates, fitted
