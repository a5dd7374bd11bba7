"""pmatrix.h5's own numbers of precision, and its warning, against dense float64 algebra."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from artifact_kit import FACTS, LAYERS, about_cov, second_moments, write_cov, write_keys
from cli_kit import kscli
from naive import Array, keys_of_text, subject_last
from naive import second_moments as naive_second_moments

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile, write_artifact
from kscli.pmatrix import superposition, write_pmatrix
from kscli.reporter import Reporter
from kscli.whitening import whitening

RNG = np.random.default_rng(3)


class Heard(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def symmetric_root_p(C: Array, keys: Array) -> Array:
    """p by the paper's own whitening: dot products of C^-1/2 k, C's symmetric inverse root."""
    values, vectors = np.linalg.eigh(C)
    root = (vectors / np.sqrt(values)) @ vectors.T
    whitened = [root @ key for key in keys]
    m = len(keys)
    P = np.empty((m, m))
    for i in range(m):
        for j in range(m):
            P[i, j] = (whitened[i] @ whitened[j]) / (whitened[i] @ whitened[i])
    return P


def random_c(d: int, tokens: int) -> Array:
    """Correlated coordinates, of scales that differ by 1e6."""
    mixing = np.eye(d) + 0.5 * RNG.standard_normal((d, d)) / np.sqrt(d)
    keys = RNG.standard_normal((tokens, d)) @ mixing * np.logspace(-3, 3, d)
    return keys.T @ keys / tokens


def test_p_by_the_cholesky_factor_is_p_by_the_symmetric_root_on_tiny() -> None:
    """Appendix B's C^-1/2 and kscli's L^-1 give the same p, on the embedded model's own C."""
    from itertools import islice

    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    from kscli.facts import read_facts
    from kscli.tiny import FACTS_PATH, MODEL_DIR
    from kscli.tiny.corpus import documents

    model = GPT2LMHeadModel.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    hooks = [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 3)]
    moments, count = naive_second_moments(
        model, tokenizer, list(islice(documents(), 250)), 256, hooks
    )
    keys: dict[str, list[Array]] = {hook: [] for hook in hooks}
    for fact in read_facts(FACTS_PATH, 24).facts:
        token_ids, position = subject_last(tokenizer, fact.text, *fact.subject_span)
        for hook, of_text in keys_of_text(model, token_ids, hooks).items():
            keys[hook].append(of_text[position])
    for hook in hooks:
        C, K = moments[hook], np.array(keys[hook])
        result = superposition(C.copy(), count, K)
        np.testing.assert_allclose(result.P, symmetric_root_p(C, K), atol=1e-8)
        assert result.whitening_residual < 1e-9
        assert result.solve_residual < 1e-9


@pytest.mark.parametrize("d", [1, 7, 64, 700])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_residuals_are_about_the_c_that_was_given(d: int, ridge: float) -> None:
    """The strict upper triangle beside the factor is C's, so that products with C are exact."""
    C = random_c(d, 3 * d + 10)
    ridged = C + ridge * np.trace(C) / d * np.eye(d)
    white = whitening(C.copy(), 3 * d + 10, ridge)
    scaled = ridged * np.outer(white.scale, white.scale)
    columns = np.asfortranarray(RNG.standard_normal((d, 3)))
    np.testing.assert_allclose(white._times_scaled(columns), scaled @ columns, atol=1e-11)
    np.testing.assert_allclose(np.tril(white.factor) @ np.tril(white.factor).T, scaled, atol=1e-12)
    assert 0 <= white.identity_residual() < 1e-10
    keys = RNG.standard_normal((4, d))
    # The keys are not scaled as C is, so that roundings count up to the range of the scales.
    assert 0 <= white.solve_residual(keys, white.whiten(keys)) < d * 2**-52 * 1e6


def test_residuals_show_a_factor_that_is_not_c_s() -> None:
    """A factor off by a known amount has the residuals that dense algebra gives."""
    d = 30
    C = random_c(d, 500)
    white = whitening(C.copy(), 500)
    white.factor[5, 2] += 1e-3
    L = np.tril(white.factor) / white.scale[:, None]
    solve = np.linalg.inv(L)
    x = np.random.default_rng(0).standard_normal((d, 8))
    expected = max(
        float(np.linalg.norm(solve @ C @ solve.T @ v - v) / np.linalg.norm(v)) for v in x.T
    )
    assert white.identity_residual() == pytest.approx(expected, rel=1e-6)
    keys = RNG.standard_normal((5, d))
    expected = max(
        float(np.linalg.norm(C @ (solve.T @ (solve @ k)) - k) / np.linalg.norm(k)) for k in keys
    )
    assert white.solve_residual(keys, white.whiten(keys)) == pytest.approx(expected, rel=1e-6)


def test_dead_coordinates_take_no_part_in_the_residuals() -> None:
    d, live = 20, np.setdiff1d(np.arange(20), [0, 4, 19])
    C = np.zeros((d, d))
    C[np.ix_(live, live)] = random_c(len(live), 300)
    keys = np.zeros((3, d))
    keys[:, live] = RNG.standard_normal((3, len(live)))
    result = superposition(C.copy(), 300, keys)
    assert result.whitening_residual < 1e-10
    assert result.solve_residual < 1e-10


def test_the_file_has_condition_and_residuals_of_every_layer(tmp_path: Path) -> None:
    heard = Heard()
    cov, keys = write_cov(tmp_path / "cov.h5"), write_keys(tmp_path / "keys.h5")
    with CovarianceFile(cov) as opened, KeysFile(keys) as of_facts:
        write_pmatrix(opened, of_facts, tmp_path / "p.h5", layers=LAYERS, reporter=heard)
    assert heard.warnings == []
    with h5py.File(tmp_path / "p.h5") as file:
        for name in ("condition", "whitening_residual", "solve_residual"):
            assert file[name].shape == (len(LAYERS),)
            assert file[name].dims[0][0] == file["layer"]
        assert (file["whitening_residual"][()] < 1e-13).all()
        assert (file["solve_residual"][()] < 1e-13).all()


def ill_conditioned(d: int, condition: float, seed: int) -> Array:
    """A C of unit diagonal and of about this condition number, rotated."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    C = (Q * np.logspace(0, -np.log10(condition), d)) @ Q.T
    scale = np.sqrt(np.diagonal(C))
    return C / scale / scale[:, None]


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("massive", [0.0, 10.0])
def test_the_storage_error_is_true_within_a_factor_of_ten(condition: float, massive: float) -> None:
    """Against P of the float64 C; also where massive keys make all entries large."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal(80)
        C = ill_conditioned(80, condition, seed) + massive * np.outer(direction, direction)
        keys = rng.standard_normal((12, 80)) @ np.linalg.cholesky(C).T
        stored = C.astype(np.float32).astype(np.float64)
        true = superposition(C.copy(), 10**5, keys)
        found = superposition(stored, 10**5, keys)
        error = np.abs(found.P - true.P).max()
        assert error / 10 < found.storage_error < error * 10


def write_conditioned(path: Path, conditions: dict[int, float]) -> Path:
    """A cov.h5 whose C have these condition numbers."""
    d = len(second_moments()[0])
    with write_artifact(path, "cov", about_cov()) as writer:
        writer.layers(LAYERS)
        writer.write("count", 2000)
        for index, layer in enumerate(LAYERS):
            writer.put("second_moment", index, ill_conditioned(d, conditions[layer], 0))
    return path


def test_layers_at_which_storage_shows_in_p_are_named_once(tmp_path: Path) -> None:
    cov = write_conditioned(tmp_path / "cov.h5", {0: 1e6, 1: 10, 2: 1e6})
    keys = write_keys(tmp_path / "keys.h5")
    heard = Heard()
    with CovarianceFile(cov) as opened, KeysFile(keys) as of_facts:
        write_pmatrix(opened, of_facts, tmp_path / "p.h5", layers=LAYERS, reporter=heard)
    with h5py.File(tmp_path / "p.h5") as file:
        errors = file["storage_error"][()]
    assert errors[1] < 1e-3 < min(errors[[0, 2]])
    (warning,) = heard.warnings
    assert "moves p at layers 0,2: by about" in warning
    assert f"{errors.max():.1g} at layer {LAYERS[int(errors.argmax())]}" in warning
    with PMatrixFile(tmp_path / "p.h5") as pm:
        assert pm.facts == FACTS


def test_storage_that_does_not_show_in_p_is_not_spoken_of(tmp_path: Path) -> None:
    write_conditioned(tmp_path / "cov.h5", dict.fromkeys(LAYERS, 1e2))
    write_keys(tmp_path / "keys.h5")
    result = kscli(
        "pmatrix", "--cov", tmp_path / "cov.h5", "--keys", tmp_path / "keys.h5",
        "-o", tmp_path / "p.h5",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "float32" not in result.stderr
