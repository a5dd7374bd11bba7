"""One ROME edit beside EasyEdit's, on the same model, fact, contexts and steps: paired times.

    python tests/benchmarks/editors.py SmolLM2.gguf counterfact.json [PAIRS]

EasyEdit's is written here as its code describes it (easyeditor/models/rome, its settings for models
without an alias of their own: no C, mean key over the contexts): every step runs the whole model on
all texts, and takes the logarithm of the probabilities of all tokens at all places. kscli's is
`rome-identity`. Both find the value and the direction, and write nothing. Prints the seconds of
each, their ratio, and how far the two changes of W are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kscli.contexts import generated_contexts, in_context
from kscli.editing.directions import edit_directions
from kscli.editing.editors import ROME_CONTEXTS, find_editor
from kscli.editing.live import mlp_keys
from kscli.editing.metrics import Identity
from kscli.editing.value import find_value
from kscli.facts import Fact, read_facts
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.positions import locate_keys

SEARCH = find_editor("rome-identity").value


def easyedit(model: LoadedModel, layer: int, fact: Fact, contexts: Sequence[str]) -> Any:
    """The change of W (d, d_m) of one edit, by whole passes of the model."""
    module, tokenizer = model.decoder.model, model.tokenizer
    projection = model.decoder.projections[layer].module
    target = tokenizer(f" {fact.target_new}", add_special_tokens=False)["input_ids"]
    asked = [in_context(context, fact) for context in ("{}", *contexts)]
    texts = [each.text + tokenizer.decode(target[:-1]) for each in asked]
    texts.append(f"{fact.subject} is a")
    kl = Fact("{} is a", fact.subject, "x")
    at = [each.position for each in locate_keys(tokenizer, [*asked, kl])]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    wanted = torch.full((len(asked), longest), -100)
    for row, place in enumerate(map(len, rows[:-1])):
        wanted[row, place - len(target) : place] = torch.tensor(target)
    shift = torch.zeros(projection.weight.shape[0], requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=SEARCH.learning_rate)
    clean: list[Any] = []

    def add(_: Any, __: Any, output: Any) -> Any:
        if not clean:
            clean.append(output[0, at[0]].detach().clone())
        output = output.clone()
        for row, place in enumerate(at):
            output[row, place] += shift
        return output

    first_kl = None
    for step in range(SEARCH.steps):
        optimizer.zero_grad()
        handle = projection.register_forward_hook(add)
        logits = module(input_ids=ids).logits
        handle.remove()
        essence = logits[-1, at[-1]].log_softmax(-1)
        first_kl = essence.detach().clone() if first_kl is None else first_kl
        said = logits.log_softmax(-1)[:-1]
        of_target = said.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
        likely = -(of_target * (wanted >= 0)).sum(1) / len(target)
        change = torch.nn.functional.kl_div(first_kl, essence, log_target=True, reduction="sum")
        length = SEARCH.weight_decay * shift.norm() / clean[0].norm() ** 2
        loss = likely.mean() + SEARCH.kl_weight * change + length
        if loss < SEARCH.stop_at or step == SEARCH.steps - 1:
            break
        loss.backward()
        optimizer.step()
        limit = SEARCH.norm_limit * clean[0].norm()
        if shift.norm() > limit:
            with torch.no_grad():
                shift *= limit / shift.norm()
    keys = mlp_keys(model, layer, locate_keys(tokenizer, asked))
    mean = keys.mean(axis=0)
    return np.outer(shift.detach().double().numpy(), mean) / (mean @ keys[0])


def ours(model: LoadedModel, layer: int, fact: Fact, contexts: Sequence[str]) -> Any:
    """The same by kscli's search and direction."""
    from dataclasses import replace

    found = find_value(model, layer, fact, fact.target_new, replace(SEARCH, contexts=(*contexts,)))
    asked = [in_context(context, fact) for context in ("{}", *contexts)]
    keys = mlp_keys(model, layer, locate_keys(model.tokenizer, asked))
    direction = edit_directions(Identity(), keys.mean(axis=0)[None], at=keys[:1])
    return np.outer(found.shift, direction[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("facts")
    parser.add_argument("pairs", type=int, nargs="?", default=3)
    parser.add_argument("--layers", type=int, nargs="*", default=[5, 15])
    given = parser.parse_args()
    model = load_model(ModelOptions(given.model, device="cpu", dtype="float32"))
    for parameter in model.decoder.model.parameters():
        parameter.requires_grad_(False)
    contexts = generated_contexts(model, ROME_CONTEXTS, 0)
    facts = read_facts(given.facts, given.pairs).facts
    for layer in given.layers:
        ratios, apart = [], []
        for fact in facts:
            seconds, changes = [], []
            for way in (easyedit, ours):
                start = time.perf_counter()
                changes.append(way(model, layer, fact, contexts))
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
            apart.append(np.linalg.norm(changes[0] - changes[1]) / np.linalg.norm(changes[0]))
            print(f"layer {layer}, {fact.subject}: {seconds[0]:.1f} s and {seconds[1]:.1f} s")
        print(f"layer {layer}: {statistics.median(ratios):.2f} times as fast ", end="")
        print(f"({min(ratios):.2f} to {max(ratios):.2f}); Delta W apart by {max(apart):.1e}")


if __name__ == "__main__":
    main()
