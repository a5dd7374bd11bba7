"""GradSim: how alike two facts' gradients are, for comparison with p.

The cosine of the gradients, with respect to the edited matrix W, of -log P(target | prompt). Qin et
al., "Why Does New Knowledge Create Messy Ripple Effects in LLMs?" (arXiv 2407.12828), relate the
cosine of two facts' gradients to the ripple effects of edits; the gradient of P, as they may take
it, is that of log P but for a factor P > 0, which the cosine does not see.

A gradient is G = sum_t g_t k_t^T over the prompt's tokens t, g_t that at the down-projection's
output and k_t the key, and is never formed: <G_i, G_j> = sum_{t, t'} (g_t . g_t') (k_t . k_t').
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.batching import padded_batches
from kscli.completion import Cloze, asked_logits, tokenize_clozes
from kscli.facts import Fact
from kscli.models.forward import as_stacked
from kscli.models.loading import LoadedModel
from kscli.reporter import SILENT, Reporter

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class FactGradient:
    """A fact's gradient in factors: `outputs` (T, d) g_t, and `keys` (T, width) k_t, float32."""

    outputs: NDArray[np.float32]
    keys: NDArray[np.float32]


def gradient_cosines(
    model: LoadedModel,
    layer: int,
    facts: Sequence[Fact],
    rows: Sequence[int],
    reporter: Reporter = SILENT,
) -> NDArray[np.float64]:
    """The cosines (len(rows), m) of the gradients of the facts `rows` with those of all m facts.

    0 where a gradient is 0, as at a last layer that the answer does not read.
    """
    gradients = fact_gradients(model, layer, facts, reporter)
    lengths = np.sqrt([inner_products([each], [each])[0, 0] for each in gradients])
    blocks, chosen = _blocks(gradients), _blocks([gradients[row] for row in rows])
    products = np.vstack(
        [np.hstack([inner_products(some, block) for block in blocks]) for some in chosen]
    )
    scale = lengths[list(rows)][:, None] * lengths[None, :]
    return np.asarray(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0))


def fact_gradients(
    model: LoadedModel, layer: int, facts: Sequence[Fact], reporter: Reporter = SILENT
) -> list[FactGradient]:
    """Every fact's gradient at a layer's down-projection, in factors."""
    clozes = tokenize_clozes(
        model.tokenizer, [fact.text for fact in facts], [fact.target for fact in facts]
    )
    sequences = [cloze.sequence for cloze in clozes]
    found: dict[int, FactGradient] = {}
    with reporter.task("gradients", len(facts), unit="facts") as task:
        for rows, ids in padded_batches(sequences, model.boundary):
            keys, outputs = _factors(model, layer, ids, [clozes[row] for row in rows])
            for place, row in enumerate(rows):
                own = slice(len(sequences[row]))
                found[row] = FactGradient(
                    outputs[place, own].float().cpu().numpy(),
                    keys[place, own].float().cpu().numpy(),
                )
            task.advance(len(rows))
    return [found[row] for row in range(len(facts))]


def inner_products(
    some: Sequence[FactGradient], others: Sequence[FactGradient]
) -> NDArray[np.float64]:
    """<G_i, G_j> of every pair, (some, others)."""
    products = _stacked(some, "outputs") @ _stacked(others, "outputs").T
    products *= _stacked(some, "keys") @ _stacked(others, "keys").T
    by_row = np.add.reduceat(products.astype(np.float64), _starts(some), axis=0)
    return np.asarray(np.add.reduceat(by_row, _starts(others), axis=1))


def _factors(
    model: LoadedModel, layer: int, ids: Tensor, clozes: Sequence[Cloze]
) -> tuple[Tensor, Tensor]:
    """The keys and the gradients at the down-projection's output, (batch, length, ...) each."""
    taken: list[Tensor] = []
    leaves: list[Tensor] = []

    def hook(_: Any, __: tuple[Any, ...], output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        leaf = value.detach().requires_grad_()
        leaves.append(leaf)
        # Falcon adds to it in place, which is not allowed of a leaf.
        return (leaf.clone(), *output[1:]) if isinstance(output, tuple) else leaf.clone()

    projection = model.decoder.projections[layer]
    with (
        projection.watch(lambda keys: taken.append(as_stacked(keys, ids).detach())),
        projection.module.register_forward_hook(hook),
        torch.enable_grad(),
    ):
        first, logits = asked_logits(model, ids, clozes)
        rows = zip(logits, clozes, strict=True)
        surprises = [-cloze.read(of_row, first)[1].sum() for of_row, cloze in rows]
        (gradients,) = torch.autograd.grad(torch.stack(surprises).sum(), leaves)
    return taken[0], gradients.reshape(*ids.shape, -1)


def _blocks(gradients: Sequence[FactGradient]) -> list[Sequence[FactGradient]]:
    """The gradients in order, at most `TOKENS_AT_ONCE` tokens together."""
    blocks: list[list[FactGradient]] = [[]]
    for each in gradients:
        tokens = sum(len(other.keys) for other in blocks[-1])
        if blocks[-1] and tokens + len(each.keys) > TOKENS_AT_ONCE:
            blocks.append([])
        blocks[-1].append(each)
    return list(blocks)


def _stacked(gradients: Sequence[FactGradient], factor: str) -> NDArray[np.float32]:
    return np.concatenate([getattr(each, factor) for each in gradients])


def _starts(gradients: Sequence[FactGradient]) -> NDArray[np.int64]:
    """Where each fact's tokens begin among all."""
    return np.cumsum([0, *(len(each.keys) for each in gradients[:-1])])
