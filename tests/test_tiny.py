from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive import Array, keys_of_text, subject_last
from scipy.stats import kurtosis
from transformers import AutoTokenizer, GPT2LMHeadModel

from kscli.facts import DEFAULT_COUNT, Fact, read_facts
from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions
from kscli.tiny import FACTS_PATH, MODEL_DIR
from kscli.tiny import build as building
from kscli.tiny.corpus import documents

FACTS = read_facts(FACTS_PATH).facts
LAYERS = 4
HOOKS = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(LAYERS)]
DOCUMENTS = 1000  # about a sixth of them: 25 tokens a dimension


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def second_moments(model: GPT2LMHeadModel, tokenizer: Any) -> list[Array]:
    sums: list[Any] = [0.0] * LAYERS
    count = 0
    for text in islice(documents(), DOCUMENTS):
        token_ids = tokenizer(text, truncation=True)["input_ids"]
        keys = keys_of_text(model, token_ids, HOOKS)
        sums = [total + keys[hook].T @ keys[hook] for total, hook in zip(sums, HOOKS, strict=True)]
        count += len(token_ids)
    assert count > 10 * len(sums[0])
    return [total / count for total in sums]


@pytest.fixture(scope="module")
def keys(model: GPT2LMHeadModel, tokenizer: Any) -> list[Array]:
    found = []
    for fact in FACTS:
        token_ids, position = subject_last(tokenizer, fact.text, *fact.subject_span)
        of_text = keys_of_text(model, token_ids, HOOKS)
        found.append([of_text[hook][position] for hook in HOOKS])
    return list(np.array(found).swapaxes(0, 1))


def off_diagonal(C: Array, keys: Array) -> Array:
    Q = keys @ np.linalg.solve(C, keys.T)
    P = Q / np.diag(Q)[:, None]
    return P[~np.eye(len(P), dtype=bool)]


@pytest.mark.parametrize("count", [DEFAULT_COUNT, len(FACTS)])
def test_kurtosis_is_high_and_falls_with_depth(
    second_moments: list[Array], keys: list[Array], count: int
) -> None:
    found = [
        kurtosis(off_diagonal(C, K[:count])) for C, K in zip(second_moments, keys, strict=True)
    ]
    assert found[0] > 10
    assert all(below > above for below, above in pairwise(found)), found


def test_the_closest_keys_share_the_subject_s_last_token(
    tokenizer: Any, second_moments: list[Array], keys: list[Array]
) -> None:
    K = keys[0][:DEFAULT_COUNT]
    Q = K @ np.linalg.solve(second_moments[0], K.T)
    P = Q / np.diag(Q)[:, None] - np.eye(len(Q))
    tokens = last_tokens(tokenizer, FACTS[:DEFAULT_COUNT])
    best = [divmod(int(flat), len(P)) for flat in np.argsort(-P, axis=None)[:10]]
    assert all(tokens[i] == tokens[j] for i, j in best)


def test_the_model_knows_its_facts(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    known = sum(
        completion(model, tokenizer, fact.text).startswith(f" {fact.target}.") for fact in FACTS
    )
    assert known >= 128


def completion(model: GPT2LMHeadModel, tokenizer: Any, text: str) -> str:
    """Eight tokens, the most probable one each time."""
    token_ids = tokenizer(text)["input_ids"]
    start = len(token_ids)
    for _ in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits
        token_ids.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(token_ids[start:]))


def test_facts() -> None:
    assert len(FACTS) >= 160
    assert len({fact.relation for fact in FACTS}) >= 6
    assert len({fact.subject for fact in FACTS}) >= 128
    assert [fact.case_id for fact in FACTS] == list(range(len(FACTS)))
    assert all(fact.prompt.count("{}") == 1 for fact in FACTS)
    prompts = Counter(fact.prompt for fact in FACTS)
    assert any(prompt.startswith("{}") for prompt in prompts)
    assert len(prompts) > len({fact.relation for fact in FACTS})


@pytest.mark.parametrize("count", [DEFAULT_COUNT, len(FACTS)])
def test_few_facts_share_the_subject_s_last_token(tokenizer: Any, count: int) -> None:
    tokens = Counter(last_tokens(tokenizer, FACTS[:count]))
    shared = sum(times for times in tokens.values() if times > 1)
    assert 0 < shared <= count / 10


def last_tokens(tokenizer: Any, facts: tuple[Fact, ...]) -> list[int]:
    found = [subject_last(tokenizer, fact.text, *fact.subject_span) for fact in facts]
    return [token_ids[position] for token_ids, position in found]


def test_tokenizer_is_gpt2_s_kind(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    encoded = tokenizer("Paris is in Paris", return_offsets_mapping=True)
    first, last = encoded["input_ids"][0], encoded["input_ids"][-1]
    assert tokenizer.decode([last]) == " Paris"
    assert not tokenizer.decode([first]).startswith(" ")
    assert first not in tokenizer.all_special_ids
    assert encoded["offset_mapping"][-1] == (11, 17)
    text = "Čapek, naïve\n\t🦎  of Côte d'Ivoire"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_size(model: GPT2LMHeadModel) -> None:
    assert 1e6 <= model.num_parameters() <= 2e6
    files = [path for path in MODEL_DIR.parent.rglob("*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 6e6


def test_documents_are_always_the_same() -> None:
    texts = list(documents())
    assert texts == list(documents())
    assert all(text.strip() for text in texts)


def test_documents_state_every_fact() -> None:
    text = "\n".join(documents())
    assert all(f"{fact.text} {fact.target}." in text for fact in FACTS)


def test_documents_do_without_any_one_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    for name in list(topics)[::2]:
        monkeypatch.delitem(topics, name)
    assert sum(map(len, documents())) > 200_000


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def few() -> Iterator[str]:
        return islice(documents(), 40)

    monkeypatch.setattr(building, "documents", few)
    monkeypatch.setattr(building, "EPOCHS", 1)
    monkeypatch.setattr(building, "VOCABULARY", 400)


@pytest.mark.usefixtures("quick")
def test_build_is_reproducible_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "notes").write_text("mine")
    for name in ("one", "two"):
        building.build(tmp_path / name)
    assert (tmp_path / "one" / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    for written in (tmp_path / "two").iterdir():
        assert written.read_bytes() == (tmp_path / "one" / written.name).read_bytes()
    GPT2LMHeadModel.from_pretrained(tmp_path / "two")
    AutoTokenizer.from_pretrained(tmp_path / "two")


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    held = building.new_model(0, kind).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in held}


def test_dense_and_expert_models_differ_in_the_mlp_alone() -> None:
    dense, wide, experts = (shapes(kind) for kind in ("dense", "wide", "experts"))
    apart = [
        {name: of[name] for name in of if ".mlp." not in name} for of in (dense, wide, experts)
    ]
    assert apart[0] == apart[1] == apart[2]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.mlp"
        assert dense[f"{block}.down_proj.weight"] == (128, 512)
        assert wide[f"{block}.down_proj.weight"] == (128, 8 * 256)
        assert experts[f"{block}.experts.down_proj"] == (8, 128, 256)


@pytest.mark.usefixtures("quick")
def test_a_small_mixture_of_experts_is_built_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, seed in (("dense", 0), ("experts", 0), ("experts", 1)):
        arguments = ["build", "--kind", kind, "--seed", str(seed), "--threads", "1"]
        output = tmp_path / f"{kind}-{seed}"
        monkeypatch.setattr("sys.argv", [*arguments, "--output", str(output)])
        building.main()
    dense, experts, other = (
        load_model(ModelOptions(str(tmp_path / name), dtype="float32")).decoder
        for name in ("dense-0", "experts-0", "experts-1")
    )
    assert (experts.n_experts, experts.d_m, dense.d_m) == (8, 256, 512)
    router = LAYERS * 8 * 128
    assert experts.active_parameters == dense.active_parameters + router
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(experts.model.get_parameter(name), other.model.get_parameter(name))
    building.build(tmp_path / "drawn", "experts", epochs=0)
    drawn = load_model(ModelOptions(str(tmp_path / "drawn"), dtype="float32")).decoder.model
    assert torch.equal(
        drawn.get_parameter(name), building.new_model(0, "experts").get_parameter(name)
    )
    assert not torch.equal(drawn.get_parameter(name), experts.model.get_parameter(name))


def test_only_the_embedded_model_is_written_without_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["build", "--kind", "experts"])
    with pytest.raises(SystemExit):
        building.main()
    assert "without --output" in capsys.readouterr().err
