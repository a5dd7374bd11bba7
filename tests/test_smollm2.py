"""A real model, SmolLM2-135M, on a corpus that is small enough for CI."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kscli.analysis.angles import angles, mode
from kscli.analysis.density import make_curve
from kscli.analysis.resampling import Resampling
from kscli.analysis.statistics import compute_statistics
from kscli.artifacts import MatrixName
from kscli.corpus import CorpusSpec, open_corpus
from kscli.extraction import Keys, extract_keys
from kscli.facts import FactSet, read_facts
from kscli.models.loading import LoadedModel
from kscli.pmatrix import Superposition, superposition
from kscli.second_moment.covariance import CovarianceOptions, SecondMoments, second_moments

LAYERS = (*range(0, 30, 3), 29)
LAST = 29
SELECTED = ",".join(map(str, LAYERS))
CHECKED = (0, 12, 29)  # against the definition, which is slow
CHECKED_FACTS = 16
DOCUMENTS = 6
MAX_LENGTH = 128
RIDGE = 0.1  # since a corpus that CI can afford is shorter than d_m
FACTS = 128


@dataclass(frozen=True)
class Measured:
    """P and the cosines of every layer."""

    results: tuple[Superposition, ...]
    token_id: NDArray[np.int64]
    model: str = "SmolLM2"
    layers: tuple[int, ...] = LAYERS

    def matrix(self, name: MatrixName, layer: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = getattr(self.results[LAYERS.index(layer)], name)
        return found


@pytest.fixture(scope="module")
def moments(smollm2_model: LoadedModel, shared_data: Path) -> SecondMoments:
    corpus = open_corpus(CorpusSpec(str(shared_data / "wikitext2_valid.jsonl")))
    return second_moments(
        smollm2_model, corpus, CovarianceOptions(DOCUMENTS, None, MAX_LENGTH, SELECTED)
    )


@pytest.fixture(scope="module")
def facts(shared_data: Path) -> FactSet:
    return read_facts(shared_data / "counterfact_known_256.json", FACTS)


@pytest.fixture(scope="module")
def keys(smollm2_model: LoadedModel, facts: FactSet) -> Keys:
    return extract_keys(smollm2_model, facts, layers=SELECTED)


@pytest.fixture(scope="module")
def measured(moments: SecondMoments, keys: Keys) -> Measured:
    results = (
        superposition(second_moment(moments, layer), moments.tokens, of_layer(keys, layer), RIDGE)
        for layer in LAYERS
    )
    return Measured(tuple(results), keys.token_id)


def second_moment(moments: SecondMoments, layer: int) -> NDArray[np.float64]:
    return np.asarray(moments.moments[layer].matrix(), dtype=np.float64)


def of_layer(keys: Keys, layer: int) -> NDArray[np.float64]:
    return keys.keys[LAYERS.index(layer)].astype(np.float64)


def test_c_and_p_equal_the_definition(
    smollm2_model: LoadedModel,
    moments: SecondMoments,
    facts: FactSet,
    keys: Keys,
    measured: Measured,
    shared_data: Path,
) -> None:
    hooks = [f"model.layers.{layer}.mlp.down_proj" for layer in CHECKED]
    model: Any = smollm2_model.decoder.model.double()
    try:
        with (shared_data / "wikitext2_valid.jsonl").open(encoding="utf-8") as lines:
            texts = [
                json.loads(line)["text"] for line, _ in zip(lines, range(DOCUMENTS), strict=False)
            ]
        tokenizer = smollm2_model.tokenizer
        true_C, count = naive.second_moments(model, tokenizer, texts, MAX_LENGTH, hooks)
        located = [
            naive.subject_last(tokenizer, f.text, *f.subject_span)
            for f in facts.facts[:CHECKED_FACTS]
        ]
        all_keys = [naive.keys_of_text(model, ids, hooks) for ids, _ in located]
    finally:
        torch.nn.Module.float(model)  # a GGUF model refuses its own float()

    assert moments.tokens == count == DOCUMENTS * MAX_LENGTH
    assert [position for _, position in located] == keys.position[:CHECKED_FACTS].tolist()
    for layer, hook in zip(CHECKED, hooks, strict=True):
        C = second_moment(moments, layer)
        assert np.linalg.norm(C - true_C[hook]) < 1e-6 * np.linalg.norm(true_C[hook])
        true_keys = np.stack([k[hook][at] for k, (_, at) in zip(all_keys, located, strict=True)])
        ridged = true_C[hook] + RIDGE * np.trace(true_C[hook]) / len(C) * np.eye(len(C))
        P = measured.matrix("P", layer)[:CHECKED_FACTS, :CHECKED_FACTS]
        assert np.abs(P - naive.superposition(ridged, true_keys)).max() < 2e-5


def test_kurtosis_is_scipys_and_falls_with_depth(measured: Measured) -> None:
    """As the paper's Figure 5 has it; scipy's default is the excess, biased."""
    from scipy.stats import kurtosis, spearmanr

    stored = compute_statistics(measured, resampling=Resampling(repeats=100)).values["kurtosis"]
    off_diagonal = ~np.eye(FACTS, dtype=bool)
    for at, layer in enumerate(LAYERS):
        by_scipy = kurtosis(measured.matrix("P", layer)[off_diagonal])
        assert stored[at] == pytest.approx(by_scipy, rel=0, abs=1e-9)
    assert spearmanr(LAYERS, stored).statistic < -0.5


def test_keys_of_the_last_layer_are_orthogonal_in_the_whitening_space_only(
    measured: Measured,
) -> None:
    """The paper's Figure 6: where the density of the angles is highest."""
    modes: dict[MatrixName, float] = {
        name: mode(make_curve(angles(measured.matrix(name, LAST)), (0, 180)))
        for name in ("whitened_cosine", "cosine")
    }
    assert abs(modes["whitened_cosine"] - 90) < 5
    assert abs(modes["cosine"] - 90) > 20


def test_the_key_is_read_at_the_subjects_last_token(
    smollm2_model: LoadedModel, facts: FactSet, keys: Keys
) -> None:
    """By hand: what the token at the position says."""
    tokens = [smollm2_model.tokenizer.decode([token]) for token in keys.token_id]
    subjects = [fact.subject for fact in facts.facts]
    for subject, token in zip(subjects, tokens, strict=True):
        assert subject.endswith(token.strip()), (subject, token)
    assert tokens[subjects.index("Patrick Rambaud")] == tokens[subjects.index("Pierre Trabaud")]
