"""Values against equation 4 of Meng et al. 2022, text by text in float64."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save_family
from torch import Tensor

from kscli.completion import score_targets, tokenize_clozes
from kscli.contexts import generated_contexts, in_context, read_contexts
from kscli.editing.directions import edit_directions
from kscli.editing.editors import Site, ValueSearch
from kscli.editing.live import mlp_outputs
from kscli.editing.value import (
    DivergedError,
    ShiftLoss,
    find_value,
    random_value,
)
from kscli.editing.weights import EditableWeight
from kscli.errors import FactsError
from kscli.facts import Fact
from kscli.models.down_projections import attention_output
from kscli.models.loading import LoadedModel, load_model
from kscli.models.locating import ModelOptions
from kscli.positions import locate_keys
from kscli.whitening import whitening

# An edit that so small a model takes: most of tiny's facts end below a probability of 0.5.
FACT = Fact("The continent that {} belongs to is", "Botswana", "Africa")
NEW = "Asia"
LATE = Fact("By profession, {} was a", "Leonhard Euler", "mathematician")
# The subject's text stands in the second prefix too, where no shift belongs.
CONTEXTS = ("It was long ago. {}", "France is large, as is Leonhard Euler. {}")


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
    model: Any,
    tokenizer: Any,
    names: list[str],
    fact: Fact,
    target: str,
    o: ValueSearch,
    shifts: list[Tensor],
) -> tuple[Tensor, float]:
    """Equation 4, one token at a time, and the target's log-probability after the bare prompt."""
    modules = [model.get_submodule(name) for name in names]

    @contextmanager
    def shifted(position: int) -> Iterator[None]:
        with ExitStack() as hooks:
            for module, shift in zip(modules, shifts, strict=True):
                hooks.enter_context(added(module, position, shift))
            yield

    kept: list[Tensor] = []
    surprises = []
    for context in ("{}", *o.contexts):
        text = context.replace("{}", fact.prompt.replace("{}", fact.subject))
        prompt, position = subject_last(tokenizer, text, fact.subject)
        whole = tokenizer(f"{text} {target}")["input_ids"]
        n = len(whole) - len(prompt)
        assert n > 0
        logprob = torch.zeros((), dtype=torch.float64)
        for end in range(len(prompt), len(whole)):
            with shifted(position):
                logits = model(torch.tensor([whole[:end]])).logits[0, -1]
            logprob = logprob + logits.log_softmax(-1)[whole[end]]
        surprises.append(-logprob / n)
        if context == "{}":
            for module in modules:
                handle = module.register_forward_hook(
                    lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
                )
                model(torch.tensor([prompt]))
                handle.remove()
            values = [out.view(-1, out.shape[-1])[position].detach() for out in kept]
            bare = float(logprob.detach())
    essence, position = subject_last(tokenizer, f"{fact.subject} is a", fact.subject)
    read = position if o.kl_at == "subject" else -1
    clean = model(torch.tensor([essence])).logits[0, read].softmax(-1).detach()
    with shifted(position):
        now = model(torch.tensor([essence])).logits[0, read].softmax(-1)
    divergence = (now * (now / clean).log()).sum()
    loss = o.likelihood_weight * sum(surprises) / len(surprises) + o.kl_weight * divergence
    for shift, v in zip(shifts, values, strict=True):
        loss = loss + o.weight_decay * shift.norm() / v.norm() ** 2
    return loss, bare


def check_loss(
    model: LoadedModel, layer: int, fact: Fact, target: str, search: ValueSearch
) -> None:
    options = replace(search, kl_weight=3.0, weight_decay=2.0, contexts=CONTEXTS)
    objective = ShiftLoss(model, layer, fact, target, options)
    name = model.decoder.projections[layer].name
    names = [name[: name.index(f".{layer}.")] + f".{layer}" if search.site == "hidden" else name]
    if search.attention:
        ends = attention_output(model.decoder.layer(layer), model.decoder.projections[layer].module)
        names += [each for each, module in model.decoder.model.named_modules() if module is ends]
    start = [
        torch.from_numpy(random_value(len(value), 0.3 * float(value.norm()), 0, number))
        for number, value in enumerate(objective.values)
    ]
    shifts = [each.float().requires_grad_() for each in start]
    loss = objective(shifts)
    loss.total.backward()  # type: ignore[no-untyped-call]
    exact = copy.deepcopy(model.decoder.model).double()
    wanted_shifts = [each.clone().requires_grad_() for each in start]
    wanted, wanted_logprob = naive_loss(
        exact, model.tokenizer, names, fact, target, options, wanted_shifts
    )
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.logprob == pytest.approx(wanted_logprob, rel=1e-5)
    assert len(shifts) == len(names) == 1 + search.attention
    for shift, wanted_shift in zip(shifts, wanted_shifts, strict=True):
        assert shift.grad is not None
        assert wanted_shift.grad is not None
        error = (shift.grad.double() - wanted_shift.grad).norm() / wanted_shift.grad.norm()
        assert wanted_shift.grad.norm() > 0
        assert error < 1e-4


SEARCHES = {
    "the paper's": ValueSearch(kl_at="end"),
    "rome": ValueSearch(),
    "memit": ValueSearch(site="hidden"),
    "pmet": ValueSearch(attention=True, likelihood_weight=0.7),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(("fact", "target"), [(FACT, NEW), (LATE, "painter and composer")])
def test_loss_and_gradient_are_the_definition(
    tiny: LoadedModel, fact: Fact, target: str, search: ValueSearch
) -> None:
    check_loss(tiny, 1, fact, target, search)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-j", "gpt-neox", "llama", "gemma", "opt", "falcon", "bloom"]
)
def test_loss_and_gradient_of_other_families(
    family: str, search: ValueSearch, tmp_path: Path
) -> None:
    layers = "n_layer" if family in ("gpt2", "gpt-j", "bloom") else "num_hidden_layers"
    save_family(family, tmp_path, **{layers: 3})
    model = load_model(ModelOptions(str(tmp_path), device="cpu", dtype="float32"))
    # Layer 1 has one below it to replay; the last cannot reach the answer.
    for layer in (0, 1):
        check_loss(model, layer, LATE, "painter and composer", search)


@pytest.mark.parametrize("site", ["mlp", "hidden"])
def test_found_shift_really_makes_the_target_likely(tiny: LoadedModel, site: Site) -> None:
    found = find_value(tiny, 0, FACT, NEW, ValueSearch(site=site))
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
    options = ValueSearch(learning_rate=5.0, norm_limit=0.25)
    found = find_value(tiny, 0, LATE, "painter", options)
    size = np.linalg.norm(found.value)
    assert np.linalg.norm(found.shift) == pytest.approx(0.25 * size, rel=1e-5)


def test_search_stops_at_the_loss_or_after_its_steps(tiny: LoadedModel) -> None:
    none = find_value(tiny, 0, FACT, NEW, ValueSearch(stop_at=1e9))
    assert none.steps == 0
    assert not none.shift.any()
    # As published: so many passes, and the last one is followed by no change.
    three = find_value(tiny, 0, FACT, NEW, ValueSearch(steps=4, stop_at=0.0))
    assert three.steps == 3
    early = find_value(tiny, 0, FACT, NEW, ValueSearch(steps=200, stop_at=1.0))
    assert early.steps < 200
    assert early.loss < 1.0


def test_contexts_take_part(tiny: LoadedModel) -> None:
    fact = Fact("The author of {} is", "Ulysses", "Joyce")
    bare = find_value(tiny, 0, fact, "Voltaire")
    in_contexts = find_value(tiny, 0, fact, "Voltaire", ValueSearch(contexts=CONTEXTS))
    np.testing.assert_allclose(in_contexts.value, bare.value, rtol=1e-4)
    module = tiny.decoder.projections[0].module
    scores = np.zeros((2, len(CONTEXTS)))
    for column, context in enumerate(CONTEXTS):
        there = in_context(context, fact)
        (prompt,) = locate_keys(tiny.tokenizer, [there])
        clozes = tokenize_clozes(tiny.tokenizer, [there.text], ["Voltaire"])
        for row, found in enumerate((bare, in_contexts)):
            with added(module, prompt.position, torch.from_numpy(found.shift).float()):
                scores[row, column] = score_targets(tiny, clozes).logprob[0]
    assert scores[1].mean() > scores[0].mean()


def test_same_search_gives_the_same_shift(tiny: LoadedModel) -> None:
    first, second = (find_value(tiny, 2, LATE, "painter") for _ in range(2))
    np.testing.assert_array_equal(first.shift, second.shift)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ValueSearch(kl_weight=math.inf), "the loss is nan at step 0"),
        (ValueSearch(learning_rate=math.inf), "the shift is inf long after step 1"),
        (ValueSearch(learning_rate=1e30), "the shift is inf long after step 1"),
        (ValueSearch(steps=2, learning_rate=1e3, norm_limit=1e3), "its probability is .* was"),
    ],
)
def test_divergence_is_told(tiny: LoadedModel, options: ValueSearch, words: str) -> None:
    with pytest.raises(DivergedError, match=words):
        find_value(tiny, 2, Fact("The chemical symbol of {} is", "gold", "Au"), "Ag", options)


@pytest.mark.parametrize("options", [ValueSearch(steps=3), ValueSearch(kl_weight=math.inf)])
def test_model_is_left_as_it_was(tiny: LoadedModel, options: ValueSearch) -> None:
    before = {name: p.clone() for name, p in tiny.decoder.model.named_parameters()}
    sites: tuple[Site, ...] = ("mlp", "hidden")
    for site in sites:
        try:
            find_value(tiny, 0, FACT, NEW, replace(options, site=site))
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
    """How many tokens a layer's down-projection read, one entry each time that it ran."""
    ran: list[int] = []
    module = model.decoder.projections[layer].module
    handle = module.register_forward_hook(lambda *given: ran.append(given[2][..., 0].numel()))
    yield ran
    handle.remove()


def test_layers_below_run_once(tiny: LoadedModel) -> None:
    options = ValueSearch(steps=6, stop_at=0.0)
    with counted(tiny, 0) as below, counted(tiny, 1) as own:
        found = find_value(tiny, 1, LATE, "painter", options)
    assert len(below) == 2
    # The clean model's whole texts, from the subjects on, again with the layers below replayed,
    # again with the head asked for what is read alone, and at each of six shifts.
    assert len(own) == 10
    assert found.steps == 5
    assert "forward" not in tiny.decoder.layer(0).__dict__


def test_layers_that_hand_on_more_run_every_time(tiny: LoadedModel) -> None:
    """As those do whose keys and values other layers take."""
    options = ValueSearch(steps=6, stop_at=0.0)
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
    assert len(below) == 9
    np.testing.assert_allclose(found.shift, plain.shift, rtol=1e-4, atol=1e-6)


def test_the_head_reads_what_is_asked_alone(tiny: LoadedModel) -> None:
    """And all where the model does more with its logits than what each token's tell."""
    options = ValueSearch(steps=6, stop_at=0.0, contexts=("It rained for days. {}",))
    head = tiny.decoder.model.get_output_embeddings()  # type: ignore[operator]
    read: list[int] = []

    def count(_: Any, __: Any, output: Tensor) -> None:
        read.append(output[..., 0].numel())

    def mix(_: Any, __: Any, output: Tensor) -> Tensor:
        return output * (1 + 0.1 * output.square().mean())

    handle = head.register_forward_hook(count)
    find_value(tiny, 1, LATE, "painter", options)
    # All of them to begin with and from the subjects on, then one in each of the three texts: the
    # target has one token.
    assert read == [read[0]] + [read[1]] * 2 + [3] * 7
    assert read[0] > 10 > read[1] > 3
    read.clear()
    mixing = head.register_forward_hook(mix)
    find_value(tiny, 1, LATE, "painter", options)
    for each in (handle, mixing):
        each.remove()
    assert read[-6:] == [read[0]] * 6


def test_tokens_before_the_subjects_are_read_once(tiny: LoadedModel) -> None:
    options = ValueSearch(steps=6, stop_at=0.0, contexts=("It rained for days. {}",))
    with counted(tiny, 1) as read:
        held = find_value(tiny, 1, LATE, "painter", options)
    assert all(few < read[0] / 2 for few in read[1:])
    assert held.steps == 5


@pytest.mark.parametrize("kept", [None, "shorter"])
def test_models_that_keep_other_things_read_whole_texts(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, kept: str | None
) -> None:
    """As those do that keep states instead of keys and values, or those of a window alone."""
    options = ValueSearch(steps=6, stop_at=0.0, contexts=("It rained for days. {}",))
    plain = find_value(tiny, 1, LATE, "painter", options)
    forward = tiny.decoder.model.forward

    def without(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        if kept is None:
            output[tiny.decoder.cache_name] = None
        elif output.get(tiny.decoder.cache_name) is not None:
            output[tiny.decoder.cache_name].crop(-1)
        return output

    functools.update_wrapper(without, forward)
    monkeypatch.setattr(tiny.decoder.model, "forward", without)
    with counted(tiny, 1) as read:
        whole = find_value(tiny, 1, LATE, "painter", options)
    assert set(read) == {read[0]}
    np.testing.assert_allclose(whole.shift, plain.shift, rtol=1e-4, atol=1e-6)


def test_half_precision_model(tmp_path: Path) -> None:
    model = load_model(ModelOptions("tiny", device="cpu", dtype="bfloat16"))
    found = find_value(model, 0, FACT, NEW)
    assert found.probability > 0.8
    assert found.shift.dtype == np.float64


def test_texts_that_do_not_fit_are_refused(tiny: LoadedModel) -> None:
    with pytest.raises(FactsError, match="tiny takes 256"):
        find_value(tiny, 0, FACT, NEW, ValueSearch(contexts=("word " * 300 + "{}",)))


def test_nothing_is_written_at_white_space_behind_a_subject(tiny: LoadedModel) -> None:
    options = ValueSearch(kl_weight=0.0)  # in the KL prompt the white space stands in the middle
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


def test_generated_contexts(tiny: LoadedModel) -> None:
    contexts = generated_contexts(tiny, [(8, 10)], seed=3)
    assert contexts == generated_contexts(tiny, [(8, 10)], seed=3)
    assert contexts != generated_contexts(tiny, [(8, 10)], seed=4)
    assert 5 <= len(contexts) <= 10
    assert len(set(contexts)) == len(contexts)
    for context in contexts:
        assert context.endswith(". {}")
        assert not set("{}\n") & set(context[:-2])
        assert in_context(context, FACT).text == context[:-2] + FACT.text
    longer = generated_contexts(tiny, [(16, 5)], seed=3)
    assert sum(map(len, longer)) > sum(map(len, generated_contexts(tiny, [(8, 5)], seed=3)))
    both = generated_contexts(tiny, [(8, 5), (16, 5)], seed=3)
    assert both[:5] == generated_contexts(tiny, [(8, 5)], seed=3)
    assert 5 < len(both) <= 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It rained. {}\n\nIt snowed.\n", r"line 3 of .* has no {}; a context has it once"),
        ("{} and {}\n", r"line 1 of .* has 2 {}"),
        ("\n", "holds no context"),
        (None, "cannot be read: No such file"),
        (b"\xff", "cannot be read: it is not UTF-8"),
    ],
)
def test_contexts_that_are_none(tmp_path: Path, text: str | bytes | None, words: str) -> None:
    path = tmp_path / "contexts.txt"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(FactsError, match=words):
        read_contexts(path)


def test_contexts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "contexts.txt"
    path.write_text("{}\nIt rained. {}\n\nHe says: {}, no less.\nIt rained. {}\n")
    assert read_contexts(path) == ("It rained. {}", "He says: {}, no less.")


def test_pmet_eases_the_likelihood_and_ends_when_all_is_near(tiny: LoadedModel) -> None:
    """Once the target is the likeliest: with no weight on the KL term the search ends there."""
    search = ValueSearch(attention=True, steps=40, stop_at=0.0, kl_weight=0.0, norm_limit=1e3)
    found = find_value(tiny, 0, FACT, NEW, search)
    assert 0 < found.steps < 39
    assert found.probability > 0.3
    shorter = find_value(tiny, 0, FACT, NEW, replace(search, steps=found.steps))
    assert shorter.probability < found.probability
    # A KL term that stays above 0.01 keeps it going, the likelihood weighed by 0.1.
    kept = find_value(tiny, 0, FACT, NEW, replace(search, kl_weight=100.0))
    assert kept.steps == 39
    objective = ShiftLoss(tiny, 0, FACT, NEW, search)
    shifts = [torch.full_like(value, 0.1) for value in objective.values]
    plain, eased = objective(shifts), objective(shifts, ease=0.1)
    surprise = -plain.logprob / len(
        tokenize_clozes(tiny.tokenizer, [FACT.text], [NEW])[0].target_ids
    )
    assert float(plain.total - eased.total) == pytest.approx(0.9 * surprise, rel=1e-4)
