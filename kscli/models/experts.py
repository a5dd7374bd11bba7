"""A layer of experts: its parts, found by structure, and the keys of the tokens routed to them.

A layer y = sum_e g_e W_e k_e over the experts that a token is routed to (g_e the gate's weight, k_e
the input of expert e's down-projection) is one linear map on the stacked key (g_1 k_1, ..., g_E
k_E), 0 where the token is not routed. Shared experts, which every token has, are one more block.

The weights W_e of all experts are one three-dimensional parameter, whose products no hook of a
module sees. transformers lets the forward pass of experts be registered under a name
(`ALL_EXPERTS_FUNCTIONS`), and this module registers one that hands the keys on: `kscli`. Experts
that are given all tokens, multiplied by their gates already (Llama 4), need no such thing.

Experts that are a list of modules are watched one by one (`listed_experts`).

No model is taken at its word: see `require_sum`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kscli.errors import ModelError
from kscli.models.listed_experts import Calls

# The names under which transformers calls the functions here: `PROBE` gives the model's own result.
KEYS, PROBE = "kscli", "kscli-probe"


@dataclass(frozen=True)
class RoutedKeys:
    """The keys of a batch's tokens in one layer of experts.

    Each row says that token `token` (of batch x length) was routed to `expert`, with the weight
    `gates` and the key `keys` (rows, d_m); rows are in the order of `n_experts` experts. Of shared
    experts every token has the key `shared` (tokens, d_shared), multiplied by its gate.
    """

    n_experts: int
    token: Tensor
    expert: Tensor
    gates: Tensor
    keys: Tensor
    shared: Tensor | None = None

    @property
    def gated(self) -> Tensor:
        """g_e k_e of every row, (rows, d_m) float32: the parts of stacked keys that are not 0."""
        return self.keys.float() * self.gates.float()[:, None]

    def by_expert(self) -> Iterator[tuple[int, slice]]:
        """Each expert to which a token was routed, and its rows."""
        return _spans(self.expert, self.n_experts)

    def stacked(self, tokens: int) -> Tensor:
        """(g_1 k_1, ..., g_E k_E) of all of so many tokens, shared experts last: float32."""
        d_m = self.keys.shape[1]
        parts = self.keys.new_zeros(tokens, self.n_experts, d_m, dtype=torch.float32)
        parts[self.token, self.expert] = self.gated
        flat = parts.reshape(tokens, -1)
        return flat if self.shared is None else torch.cat([flat, self.shared.float()], dim=1)

    def of_tokens(self, tokens: Tensor) -> RoutedKeys:
        """The keys of some tokens alone; `tokens` (n,) are their indexes."""
        wanted = tokens.to(self.token.device)
        rows = torch.isin(self.token, wanted)
        shared = None if self.shared is None else self.shared[wanted]
        return replace(
            self,
            token=self.token[rows],
            expert=self.expert[rows],
            gates=self.gates[rows],
            keys=self.keys[rows],
            shared=shared,
        )


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts: the dotted path of their weights W_e, and d_m of each.

    `module` is the block whose output is the layer's value, `experts` the module in it that holds
    the weights of `n_experts` experts. Where shared experts lie `beside` that block, which comes
    first, `module` is their down-projection, and `joined` has it give the sum. `shared` is the
    down-projection of shared experts, of `d_shared` inputs (0: there are none), and `shared_gate`
    gives what the sigmoid of which they are multiplied by. `transposed`: the weights are
    (E, d_m, d), not (E, d, d_m). `downs` are the down-projections of experts that are a list.
    """

    name: str
    module: nn.Module
    experts: nn.Module
    d_m: int
    n_experts: int
    transposed: bool = False
    shared: nn.Module | None = None
    d_shared: int = 0
    shared_gate: nn.Module | None = None
    beside: nn.Module | None = None
    downs: tuple[nn.Module, ...] = ()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Have `module` give the layer's value: add what the block beside it gives, and that 0."""
        if self.beside is None:
            yield
            return
        routed: list[Tensor] = []

        def take(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            routed.append(first)
            nothing = torch.zeros_like(first)
            return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

        def add(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            if len(routed) != 1:
                raise ModelError(
                    f"the shared experts beside {self.name} are not called once after the others; "
                    "kscli does not measure this mixture of experts."
                )
            return routed.pop().reshape(output.shape) + output

        # Before all hooks that want the value.
        with (
            self.beside.register_forward_hook(take, prepend=True),
            self.module.register_forward_hook(add, prepend=True),
        ):
            yield

    @contextmanager
    def watch(self, take: Callable[[RoutedKeys], None]) -> Iterator[None]:
        """Call `take` with the layer's keys whenever a batch has gone through it."""
        with self._watch(lambda keys, *_: take(keys)):
            yield

    @contextmanager
    def _watch(self, take: Callable[[RoutedKeys, Tensor, Tensor], None]) -> Iterator[None]:
        """As `watch`; `take` gets what keys and weights come to, and the block's output, too."""
        routed: list[tuple[RoutedKeys, Tensor]] = []
        shared: list[tuple[Tensor, Tensor]] = []
        gates: list[Tensor] = []
        calls = Calls(self.name)

        def finish(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if self.downs:
                routed.append(self._of_list(calls, inputs[0], output, shared, gates))
            if len(routed) != 1 or len(shared) != (self.shared is not None):
                raise ModelError(
                    f"the experts of {self.name} are not called once in a forward pass, as "
                    "transformers calls experts; kscli does not measure this model."
                )
            keys, value = routed.pop()
            if shared:
                of_shared, given = (flat.reshape(len(value), -1) for flat in shared.pop())
                gate = gates.pop().reshape(-1, 1).float().sigmoid() if gates else 1.0
                keys = replace(keys, shared=of_shared.float() * gate)
                value = value + given.float() * gate
            take(keys, value, output.reshape(value.shape))

        with ExitStack() as hooks:
            if self.downs:
                listed = tuple(self.experts.children())
                hooks.enter_context(calls.watching(self.module, listed, self.downs))
            else:
                hooks.enter_context(_listening(self.experts, lambda *found: routed.append(found)))
            if self.shared is not None:
                hooks.enter_context(
                    self.shared.register_forward_hook(
                        lambda module, inputs, output: shared.append(
                            (inputs[0], self._own_output(module, inputs[0], output))
                        )
                    )
                )
            if self.shared_gate is not None:
                hooks.enter_context(
                    self.shared_gate.register_forward_hook(lambda *found: gates.append(found[-1]))
                )
            hooks.enter_context(self.module.register_forward_hook(finish))
            yield

    def _of_list(
        self,
        calls: Calls,
        given: Tensor,
        output: Tensor,
        shared: Sequence[tuple[Tensor, Tensor]],
        gates: Sequence[Tensor],
    ) -> tuple[RoutedKeys, Tensor]:
        """The keys of experts that are a list, and what they and the weights come to."""
        flat = given.reshape(-1, given.shape[-1])
        value = output.reshape(len(flat), -1).float()
        if shared:
            gate = gates[-1].reshape(-1, 1).float().sigmoid() if gates else 1.0
            value = value - shared[-1][1].reshape(len(flat), -1).float() * gate
        *parts, fitted = calls.routed(flat, value)
        return RoutedKeys(self.n_experts, *parts), fitted

    def _own_output(self, shared: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """What shared experts give, without the others (`joined`)."""
        if self.beside is not None:
            return shared.forward(inputs)  # type: ignore[no-any-return]
        # Copied: Llama 4 adds the routed experts' output to it in place.
        return output.clone()

    @property
    def sizes(self) -> tuple[int, ...]:
        """What layers have in common whose C lies in one file."""
        return self.d_m, self.n_experts, self.d_shared

    @property
    def width(self) -> int:
        """The length of a stacked key."""
        return self.n_experts * self.d_m + self.d_shared

    @contextmanager
    def require_sum(self) -> Iterator[None]:
        """Raise ModelError unless keys, gates and weights come to what the block gives.

        The block is to be run once meanwhile, by its own code (`use_experts` of `PROBE`).
        """
        errors: list[float] = []

        def compare(keys: RoutedKeys, value: Tensor, output: Tensor) -> None:
            error = float((value - output).abs().max() / output.abs().max())
            errors.append(error)
            if not error <= (1e-4 if output.dtype == torch.float32 else 0.03):
                raise ModelError(
                    f"the keys, gates and weights of {self.name} do not add up to what "
                    f"{type(self.module).__name__} gives (by {error:.1g} of its largest output); "
                    "kscli does not measure this mixture of experts."
                )
            if torch.bincount(keys.token * keys.n_experts + keys.expert).max() > 1:
                raise ModelError(
                    f"{self.name} routes a token to one expert twice; kscli does not measure this "
                    "mixture of experts."
                )

        with self._watch(compare):
            yield
        if not errors:
            raise ModelError(
                f"{self.name} is not called in a forward pass; kscli cannot measure it."
            )


@dataclass(frozen=True)
class Stack:
    """The module in which the weights of a layer's experts lie, its dotted path, and theirs."""

    path: str
    module: nn.Module
    weight: Tensor

    def require_linear(self, hidden_size: int) -> None:
        """Raise ModelError where the weights do not end at the hidden size."""
        _, *sides = self.weight.shape
        # What follows a down-projection (`post_expert_norm`) would not be linear in the key.
        if hidden_size not in sides or getattr(self.module, "has_post_expert_norm", False):
            raise ModelError(
                f"the experts of {self.path} do not end at the hidden size {hidden_size} with a "
                "linear map; kscli does not measure this model."
            )

    @property
    def transposed(self) -> bool:
        """Whether the weights are (E, d_m, d), not (E, d, d_m)."""
        return bool(getattr(self.module, "is_transposed", not _is_registered(self.module)))

    @property
    def d_m(self) -> int:
        """The length of a key."""
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def block(self) -> str:
        """The path of the module that holds the experts, their router and shared experts."""
        return self.path.rpartition(".")[0]


def find_stack(name: str, layer: nn.Module) -> Stack | nn.ModuleList | None:
    """The experts of a decoder layer called `name`, or the list of them; None without any.

    Raises ModelError for experts that are neither, and where there are several.
    """
    modules = dict(layer.named_modules())
    if not any("expert" in f"{path} {type(m).__name__}".lower() for path, m in modules.items()):
        return None
    stacks = [
        Stack(path, module, weight)
        for path, module in modules.items()
        if isinstance(weight := getattr(module, "down_proj", None), Tensor) and weight.ndim == 3
    ]
    lists = [
        module
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and "expert" in f"{path} {type(module[0]).__name__}".lower()
        and len({type(each) for each in module}) == 1
    ]
    if not stacks and len(lists) == 1:
        return lists[0]
    if len(stacks) != 1:
        raise ModelError(
            f"{name} is a mixture of experts, and kscli measures those whose weights are one "
            "parameter down_proj of three dimensions, or that are one list of modules; "
            f"{len(stacks)} such parameters and {len(lists)} such lists were found in the layer."
        )
    return stacks[0]


# How experts are called: by transformers, or with all tokens, as Llama 4's.

_Listener = Callable[[RoutedKeys, Tensor], None]
_LISTENERS: dict[nn.Module, _Listener] = {}


@contextmanager
def _listening(experts: nn.Module, listener: _Listener) -> Iterator[None]:
    """Have the listener called with keys, and what they and the weights come to, (tokens, d)."""
    if not _is_registered(experts):
        with experts.register_forward_pre_hook(lambda _, i: listener(*_of_all_tokens(experts, *i))):
            yield
        return
    _LISTENERS[experts] = listener
    try:
        yield
    finally:
        del _LISTENERS[experts]


def _is_registered(experts: nn.Module) -> bool:
    """Whether transformers calls these experts as it is asked to."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed"))


def experts_a_token(config: Any, count: int) -> int:
    """Of `count` experts those that a token is routed to; all where the configuration is silent."""
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    each = next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)
    return min(each or count, count)


def use_experts(model: Any, name: str = KEYS) -> None:
    """Have transformers call the model's experts by a function of this module."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(KEYS, _forward)
    ALL_EXPERTS_FUNCTIONS.register(PROBE, _own_forward)
    model.set_experts_implementation(name)


def _forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What registered experts give for (tokens, d) hidden states, each routed to k of them."""
    keys = _route(experts, hidden_states, top_k_index, top_k_weights)
    value = _value(experts, keys, len(hidden_states))
    if experts in _LISTENERS:
        _LISTENERS[experts](keys, value)
    return value.to(hidden_states.dtype)


def _own_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `_forward`, but the result is that of the model's own code."""
    _forward(experts, hidden_states, top_k_index, top_k_weights)
    own: Tensor = type(experts).forward.__wrapped__(
        experts, hidden_states, top_k_index, top_k_weights
    )
    return own


def _route(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> RoutedKeys:
    """The keys of (tokens, d) hidden states, of which each is routed to the (tokens, k) experts.

    An index beyond the experts is a token that is dropped.
    """
    n_experts = len(experts.down_proj)
    expert, order = index.reshape(-1).sort(stable=True)
    kept = int((expert < n_experts).sum())
    expert, order = expert[:kept], order[:kept]
    token = order // index.shape[-1]
    up = _Linear(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    d_m = experts.down_proj.shape[1 if experts.is_transposed else 2]
    keys = hidden.new_empty(kept, d_m)
    for number, rows in _spans(expert, n_experts):
        given = up(number, hidden[token[rows]])
        keys[rows] = experts._apply_gate(given) if experts.has_gate else experts.act_fn(given)
    return RoutedKeys(n_experts, token, expert, weights.reshape(-1)[order], keys)


def _value(experts: Any, keys: RoutedKeys, tokens: int) -> Tensor:
    """sum_e g_e (W_e k_e + b_e) of every token: (tokens, d) float32."""
    down = _Linear(experts, "down_proj")
    value = keys.keys.new_zeros(tokens, down.outputs, dtype=torch.float32)
    for number, rows in keys.by_expert():
        weighted = down(number, keys.keys[rows]) * keys.gates[rows, None]
        value.index_add_(0, keys.token[rows], weighted.float())
    return value


def _of_all_tokens(experts: Any, given: Tensor) -> tuple[RoutedKeys, Tensor]:
    """Keys, and what they come to, of experts that are given (E x tokens, d) gated hidden states.

    Of a token that is not routed to an expert it is given 0. The gate is in the key.
    """
    n_experts, _, hidden_size = experts.down_proj.shape
    gated = given.reshape(n_experts, -1, hidden_size)
    gate, up = torch.bmm(gated, experts.gate_up_proj).chunk(2, dim=-1)
    keys = up * experts.act_fn(gate)
    expert, token = gated.any(-1).nonzero(as_tuple=True)
    ones = keys.new_ones(len(token))
    value = torch.bmm(keys, experts.down_proj).float().sum(0)
    return RoutedKeys(n_experts, token, expert, ones, keys[expert, token]), value


class _Linear:
    """The linear maps of all experts under one name, as registered experts keep them."""

    def __init__(self, experts: Any, name: str) -> None:
        self._weight: Tensor = getattr(experts, name)
        self._bias: Tensor | None = getattr(experts, f"{name}_bias") if experts.has_bias else None
        self._transposed: bool = experts.is_transposed
        self.outputs = self._weight.shape[2 if self._transposed else 1]

    def __call__(self, expert: int, inputs: Tensor) -> Tensor:
        weight = self._weight[expert]
        bias = None if self._bias is None else self._bias[expert]
        return linear(inputs, weight.T if self._transposed else weight, bias)


def _spans(expert: Tensor, n_experts: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and these, of rows in the order of experts."""
    start = 0
    for number, count in enumerate(torch.bincount(expert, minlength=n_experts).tolist()):
        if count:
            yield number, slice(start, start + count)
        start += count
