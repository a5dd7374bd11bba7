"""Values against equation 4 of Meng et al. 2022, text by text in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_family
from torch import Tensor

from kscli.completion import score_targets, tokenize_clozes
from kscli.editing.editors.closed_form import edit_directions
from kscli.editing.live import mlp_outputs
from kscli.editing.value import (
    DivergedError,
    ShiftLoss,
    Site,
    ValueOptions,
    find_value,
    generated_prefixes,
    random_value,
)
from kscli.editing.weights import EditableWeight
from kscli.errors import FactsError
from kscli.facts import Fact
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.positions import locate_keys
from kscli.whitening import whitening

# An edit that so small a model takes: most of tiny's facts end below a probability of 0.5.
FACT = Fact("The continent that {} belongs to is", "Botswana", "Africa")
NEW = "Asia"
LATE = Fact("By profession, {} was a", "Leonhard Euler", "mathematician")
# The subject's text stands in the second prefix too, where no shift belongs.
PREFIXES = ("It was long ago. ", "France is large, as is Leonhard Euler. ")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelOptions("tiny", device="cpu", dtype="float32"))


@contextmanager
def added(module: Any, position: int, shift: Tensor) -> Iterator[None]:
    """Add a shift to a module's output at one token of a single sequence."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        own = (output[0] if isinstance(output, tuple) else output).clone()
        own.view(-1, own.shape[-1])[position] += shift
        return (own, *output[1:]) if isinstance(output, tuple) else own

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


def subject_last(tokenizer: Any, text: str, subject: str) -> tuple[list[int], int]:
    """A text's tokens and the last one of its last mention of the subject."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    start = text.rindex(subject)
    end = start + len(subject)
    at = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if max(a, start) < min(b, end)]
    return encoded["input_ids"], at[-1]


def naive_loss(
    model: Any, tokenizer: Any, name: str, fact: Fact, target: str, o: ValueOptions, shift: Tensor
) -> tuple[Tensor, float]:
    """Equation 4, one token at a time, and the target's log-probability after the bare prompt."""
    module = model.get_submodule(name)
    kept: list[Tensor] = []
    surprises = []
    for prefix in ("", *o.prefixes):
        text = prefix + fact.prompt.replace("{}", fact.subject)
        prompt, position = subject_last(tokenizer, text, fact.subject)
        whole = tokenizer(f"{text} {target}")["input_ids"]
        n = len(whole) - len(prompt)
        assert n > 0
        logprob = torch.zeros((), dtype=torch.float64)
        for end in range(len(prompt), len(whole)):
            with added(module, position, shift):
                logits = model(torch.tensor([whole[:end]])).logits[0, -1]
            logprob = logprob + logits.log_softmax(-1)[whole[end]]
        surprises.append(-logprob / n)
        if not prefix:
            handle = module.register_forward_hook(
                lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            model(torch.tensor([prompt]))
            handle.remove()
            v = kept[0].view(-1, kept[0].shape[-1])[position].detach()
            bare = float(logprob.detach())
    essence, position = subject_last(tokenizer, f"{fact.subject} is a", fact.subject)
    clean = model(torch.tensor([essence])).logits[0, -1].softmax(-1).detach()
    with added(module, position, shift):
        now = model(torch.tensor([essence])).logits[0, -1].softmax(-1)
    divergence = (now * (now / clean).log()).sum()
    loss = sum(surprises) / len(surprises) + o.kl_weight * divergence
    return loss + o.weight_decay * shift.norm() / v.norm() ** 2, bare


def check_loss(model: LoadedModel, layer: int, fact: Fact, target: str, site: Site) -> None:
    options = ValueOptions(kl_weight=3.0, weight_decay=2.0, prefixes=PREFIXES)
    objective = ShiftLoss(model, layer, fact, target, options, site)
    d = len(objective.value)
    size = float(objective.value.norm())
    start = torch.from_numpy(random_value(d, 0.3 * size, 0, 0))
    shift = start.float().requires_grad_()
    loss, logprob = objective(shift)
    loss.backward()  # type: ignore[no-untyped-call]
    name = model.decoder.projections[layer].name
    if site == "hidden":
        name = name[: name.index(f".{layer}.")] + f".{layer}"
    exact = copy.deepcopy(model.decoder.model).double()
    wanted_shift = start.clone().requires_grad_()
    wanted, wanted_logprob = naive_loss(
        exact, model.tokenizer, name, fact, target, options, wanted_shift
    )
    wanted.backward()  # type: ignore[no-untyped-call]
    assert shift.grad is not None
    assert wanted_shift.grad is not None
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logprob == pytest.approx(wanted_logprob, rel=1e-5)
    error = (shift.grad.double() - wanted_shift.grad).norm() / wanted_shift.grad.norm()
    assert wanted_shift.grad.norm() > 0
    assert error < 1e-4


@pytest.mark.parametrize("site", ["mlp", "hidden"])
@pytest.mark.parametrize(("fact", "target"), [(FACT, NEW), (LATE, "painter and composer")])
def test_loss_and_gradient_are_the_definition(
    tiny: LoadedModel, fact: Fact, target: str, site: Site
) -> None:
    check_loss(tiny, 1, fact, target, site)


@pytest.mark.parametrize("site", ["mlp", "hidden"])
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-j", "gpt-neox", "llama", "gemma", "opt", "falcon", "bloom"]
)
def test_loss_and_gradient_of_other_families(family: str, site: Site, tmp_path: Path) -> None:
    layers = "n_layer" if family in ("gpt2", "gpt-j", "bloom") else "num_hidden_layers"
    save_family(family, tmp_path, **{layers: 3})
    model = load_model(ModelOptions(str(tmp_path), device="cpu", dtype="float32"))
    # Layer 1 has one below it to replay; the last cannot reach the answer.
    for layer in (0, 1):
        check_loss(model, layer, LATE, "painter and composer", site)


@pytest.mark.parametrize("site", ["mlp", "hidden"])
def test_found_shift_really_makes_the_target_likely(tiny: LoadedModel, site: Site) -> None:
    found = find_value(tiny, 0, FACT, NEW, site=site)
    (prompt,) = locate_keys(tiny.tokenizer, [FACT])
    if site == "mlp":
        np.testing.assert_allclose(found.value, mlp_outputs(tiny, 0, [prompt])[0], rtol=1e-4)
    module = tiny.decoder.model.get_submodule(f"transformer.h.0{'.mlp.c_proj' * (site == 'mlp')}")
    clozes = tokenize_clozes(tiny.tokenizer, [FACT.text], [NEW])
    before = float(score_targets(tiny, clozes).logprob[0])
    with added(module, prompt.position, torch.from_numpy(found.shift).float()):
        after = float(score_targets(tiny, clozes).logprob[0])
    assert math.exp(after) == pytest.approx(found.probability, rel=1e-3)
    assert after > before
    assert found.probability > 0.8
    assert 0 < found.steps <= 20


def test_shift_written_into_the_weight_makes_the_target_likely(tiny: LoadedModel) -> None:
    found = find_value(tiny, 0, FACT, NEW)
    keys: list[Tensor] = []
    (prompt,) = locate_keys(tiny.tokenizer, [FACT])
    tiny.decoder.run(torch.tensor([prompt.token_ids]), [0], lambda _, k: keys.append(k))
    key = keys[0][0, prompt.position].double().numpy()[None]
    direction = edit_directions(whitening(np.eye(key.shape[1]), 10**6, 0.0), key)
    clozes = tokenize_clozes(tiny.tokenizer, [FACT.text], [NEW])
    before = float(score_targets(tiny, clozes).logprob[0])
    weight = EditableWeight(tiny, 0)
    weight.set_change(np.outer(found.shift, direction[0]))
    after = float(score_targets(tiny, clozes).logprob[0])
    weight.restore()
    assert after > before + 1


def test_norm_limit_holds(tiny: LoadedModel) -> None:
    options = ValueOptions(learning_rate=5.0, norm_limit=0.25)
    found = find_value(tiny, 0, LATE, "painter", options)
    size = np.linalg.norm(found.value)
    assert np.linalg.norm(found.shift) == pytest.approx(0.25 * size, rel=1e-5)


def test_search_stops_at_the_loss_or_after_its_steps(tiny: LoadedModel) -> None:
    none = find_value(tiny, 0, FACT, NEW, ValueOptions(stop_at=1e9))
    assert none.steps == 0
    assert not none.shift.any()
    three = find_value(tiny, 0, FACT, NEW, ValueOptions(steps=3, stop_at=0.0))
    assert three.steps == 3
    early = find_value(tiny, 0, FACT, NEW, ValueOptions(steps=200, stop_at=1.0))
    assert early.steps < 200
    assert early.loss < 1.0


def test_prefixes_take_part(tiny: LoadedModel) -> None:
    fact = Fact("The author of {} is", "Ulysses", "Joyce")
    bare = find_value(tiny, 0, fact, "Voltaire")
    prefixed = find_value(tiny, 0, fact, "Voltaire", ValueOptions(prefixes=PREFIXES))
    np.testing.assert_allclose(prefixed.value, bare.value, rtol=1e-4)
    module = tiny.decoder.projections[0].module
    scores = np.zeros((2, len(PREFIXES)))
    for column, prefix in enumerate(PREFIXES):
        (prompt,) = locate_keys(tiny.tokenizer, [replace(fact, prompt=prefix + fact.prompt)])
        clozes = tokenize_clozes(tiny.tokenizer, [prefix + fact.text], ["Voltaire"])
        for row, found in enumerate((bare, prefixed)):
            with added(module, prompt.position, torch.from_numpy(found.shift).float()):
                scores[row, column] = score_targets(tiny, clozes).logprob[0]
    assert scores[1].mean() > scores[0].mean()


def test_same_search_gives_the_same_shift(tiny: LoadedModel) -> None:
    first, second = (find_value(tiny, 2, LATE, "painter") for _ in range(2))
    np.testing.assert_array_equal(first.shift, second.shift)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ValueOptions(kl_weight=math.inf), "the loss is nan at step 0"),
        (ValueOptions(learning_rate=math.inf), "the shift is inf long after step 1"),
        (ValueOptions(learning_rate=1e30), "the shift is inf long after step 1"),
        (ValueOptions(steps=1, learning_rate=1e3, norm_limit=1e3), "its probability is .* was"),
    ],
)
def test_divergence_is_told(tiny: LoadedModel, options: ValueOptions, words: str) -> None:
    with pytest.raises(DivergedError, match=words):
        find_value(tiny, 2, Fact("The chemical symbol of {} is", "gold", "Au"), "Ag", options)


@pytest.mark.parametrize("options", [ValueOptions(steps=2), ValueOptions(kl_weight=math.inf)])
def test_model_is_left_as_it_was(tiny: LoadedModel, options: ValueOptions) -> None:
    before = {name: p.clone() for name, p in tiny.decoder.model.named_parameters()}
    for site in ("mlp", "hidden"):
        try:
            find_value(tiny, 0, FACT, NEW, options, site)  # type: ignore[arg-type]
        except DivergedError:
            assert math.isinf(options.kl_weight)
    for name, parameter in tiny.decoder.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in tiny.decoder.model.modules())


def test_value_is_found_in_no_grad_mode(tiny: LoadedModel) -> None:
    with torch.no_grad():
        assert find_value(tiny, 0, FACT, NEW).probability > 0.8


@contextmanager
def counted(model: LoadedModel, layer: int) -> Iterator[list[int]]:
    """How often a layer's down-projection ran, one entry each."""
    ran: list[int] = []
    module = model.decoder.projections[layer].module
    handle = module.register_forward_hook(lambda *_: ran.append(layer))
    yield ran
    handle.remove()


def test_layers_below_run_once(tiny: LoadedModel) -> None:
    options = ValueOptions(steps=5, stop_at=0.0)
    with counted(tiny, 0) as below, counted(tiny, 1) as own:
        found = find_value(tiny, 1, LATE, "painter", options)
    assert len(below) == 1
    # The clean model, again with the layers below replayed, and at each of six shifts.
    assert len(own) == 8
    assert found.steps == 5
    assert "forward" not in tiny.decoder.layer(0).__dict__


def test_layers_that_hand_on_more_run_every_time(tiny: LoadedModel) -> None:
    """As those do whose keys and values other layers take."""
    options = ValueOptions(steps=5, stop_at=0.0)
    plain = find_value(tiny, 1, LATE, "painter", options)
    handed: list[Tensor] = []
    lower, upper = tiny.decoder.layer(0), tiny.decoder.layer(1)
    handles = [
        lower.mlp.register_forward_hook(lambda _, __, output: handed.append(output)),
        upper.mlp.register_forward_hook(lambda _, __, output: output + 0 * handed.pop()),
    ]
    with counted(tiny, 0) as below:
        found = find_value(tiny, 1, LATE, "painter", options)
    for handle in handles:
        handle.remove()
    assert len(below) == 7
    np.testing.assert_allclose(found.shift, plain.shift, rtol=1e-4, atol=1e-6)


def test_half_precision_model(tmp_path: Path) -> None:
    model = load_model(ModelOptions("tiny", device="cpu", dtype="bfloat16"))
    found = find_value(model, 0, FACT, NEW)
    assert found.probability > 0.8
    assert found.shift.dtype == np.float64


def test_texts_that_do_not_fit_are_refused(tiny: LoadedModel) -> None:
    with pytest.raises(FactsError, match="tiny takes 256"):
        find_value(tiny, 0, FACT, NEW, ValueOptions(prefixes=("word " * 300,)))


def test_nothing_is_written_at_white_space_behind_a_subject(tiny: LoadedModel) -> None:
    options = ValueOptions(kl_weight=0.0)  # in the KL prompt the white space stands in the middle
    plain, blank = (
        find_value(tiny, 0, Fact("The capital of {}", subject, "Paris"), NEW, options)
        for subject in ("France", "France   ")
    )
    np.testing.assert_array_equal(blank.value, plain.value)
    np.testing.assert_allclose(blank.shift, plain.shift, rtol=1e-5, atol=1e-6)


def test_random_values() -> None:
    value = random_value(64, 2.5, seed=1, edit_number=7)
    assert np.linalg.norm(value) == pytest.approx(2.5)
    np.testing.assert_array_equal(value, random_value(64, 2.5, 1, 7))
    for other in (random_value(64, 2.5, 1, 8), random_value(64, 2.5, 2, 7)):
        assert abs(value @ other) < 0.5 * 2.5**2
    # Of many, no direction is preferred: their mean is near 0, their covariance near I / d.
    many = np.stack([random_value(4, 1.0, 0, number) for number in range(4000)])
    np.testing.assert_allclose(many.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(many.T @ many / 4000, np.eye(4) / 4, atol=0.03)


def test_generated_prefixes(tiny: LoadedModel) -> None:
    prefixes = generated_prefixes(tiny, 10, seed=3)
    assert prefixes == generated_prefixes(tiny, 10, seed=3)
    assert prefixes != generated_prefixes(tiny, 10, seed=4)
    assert 5 <= len(prefixes) <= 10
    assert len(set(prefixes)) == len(prefixes)
    for prefix in prefixes:
        assert prefix.endswith(". ")
        assert not set("{}\n") & set(prefix)
        # What can be put before a prompt.
        assert replace(FACT, prompt=prefix + FACT.prompt).text == prefix + FACT.text
    longer = generated_prefixes(tiny, 5, seed=3, length=16)
    assert sum(map(len, longer)) > sum(map(len, generated_prefixes(tiny, 5, seed=3)))
