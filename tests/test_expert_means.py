"""Keys of experts in contexts and of paraphrases, and p of editors: the stacked key, in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from cli_kit import kscli, one_sentence
from experts_kit import FAMILIES, in_float64, save_experts, stacked_keys
from families import LAYERS
from naive import Array
from scipy.linalg import block_diag
from test_expert_edits import CONTEXTS, LAMBDA, naive_direction
from test_expert_superposition import measure, moment, parts_of, run
from transformers import AutoTokenizer

from kscli.artifacts import CovarianceFile, KeysFile, PMatrixFile
from kscli.contexts import in_context
from kscli.facts import FactSet, paraphrases_of, read_facts

# The second fact has no paraphrase; one of the third has not its subject in it.
SUBJECTS = ("France", "Japan", "Italy", "Marie Curie", "Kyoto University")
PARAPHRASES = (
    ("They say that France has a capital.", "The seat of France"),
    (),
    ("It is", "In the past Italy was"),
    ("As a child Marie Curie spoke",),
    ("Where is Kyoto University",),
)


def write_facts(path: Path) -> FactSet:
    """Facts, some of which have paraphrases."""
    rows = [
        {"prompt": "It is known of {} that", "subject": s, "target": "so", "paraphrase_prompts": q}
        for s, q in zip(SUBJECTS, PARAPHRASES, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_facts(str(path))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder in which a family's model is measured, once, with contexts and paraphrases."""

    @cache
    def of_family(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        save_experts(family, folder / "moe")
        measure(folder)  # C; the keys are made again
        write_facts(folder / "facts.jsonl")
        (folder / "contexts.txt").write_text("\n".join(CONTEXTS))
        run(
            folder,
            *("extract", "-m", folder / "moe", "--facts", folder / "facts.jsonl", "--force"),
            *("--contexts", folder / "contexts.txt", "--dtype", "float32"),
        )
        run(folder, "pmatrix", "-m", folder / "moe", "--force")
        return folder

    return of_family


def true_keys(family: str, folder: Path, layer: int) -> tuple[Array, Array, Array]:
    """By the definition, stacked: the bare keys, those in each context, the paraphrases' means."""
    model, tokenizer = in_float64(folder / "moe"), AutoTokenizer.from_pretrained(folder / "moe")

    def key(fact: Any) -> Array:
        ids, at = naive.subject_last(tokenizer, fact.text, *fact.subject_span)
        return np.concatenate([part[at] for part in stacked_keys(family, model, ids, layer)])

    bare, contexts, own = [], [], []
    for fact in read_facts(str(folder / "facts.jsonl")).facts:
        bare.append(key(fact))
        contexts.append([key(in_context(text, fact)) for text in CONTEXTS])
        texts = paraphrases_of(fact)
        none = np.full_like(bare[-1], np.nan)
        own.append(np.mean([key(text) for text in texts], axis=0) if texts else none)
    return np.array(bare), np.array(contexts), np.array(own)


def moment_of(family: str, folder: Path, layer: int) -> Array:
    tokens, _ = parts_of(family, folder / "moe", layer)
    C: Array = block_diag(*map(moment, tokens))
    return C


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_keys_are_the_means_of_stacked_keys(family: str, measured: Any) -> None:
    folder = measured(family)
    with KeysFile(folder / "artifacts" / "moe" / "keys.h5") as keys:
        assert keys.contexts == CONTEXTS
        for layer in range(LAYERS):
            bare, contexts, own = true_keys(family, folder, layer)
            held = (
                (keys.stacked_keys_of(layer), bare),
                (keys.context_keys_of(layer), contexts.mean(axis=1)),
                (keys.paraphrase_keys_of(layer), own),
            )
            for found, true in held:
                assert found is not None
                np.testing.assert_array_equal(np.isnan(found), np.isnan(true))
                np.testing.assert_allclose(found, true, atol=1e-5 * np.nanmax(np.abs(true)))


@pytest.mark.parametrize("family", FAMILIES)
def test_p_to_own_paraphrases_is_the_definitions(family: str, measured: Any) -> None:
    folder = measured(family)
    with PMatrixFile(folder / "artifacts" / "moe" / "pmatrix.h5") as pm:
        for layer in range(LAYERS):
            bare, _, own = true_keys(family, folder, layer)
            solved = np.linalg.solve(moment_of(family, folder, layer), bare.T).T
            wanted = (solved * own).sum(axis=1) / (solved * bare).sum(axis=1)
            assert np.isnan(wanted[1])
            np.testing.assert_allclose(pm.paraphrase_p(layer), wanted, atol=5e-5)


@pytest.mark.parametrize(
    "method", ["rome", "rome-identity", "r-rome", "memit", "memit-seq", "emmet"]
)
@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
def test_p_of_an_editor_is_that_of_its_directions(
    family: str, method: str, measured: Any, tmp_path: Path
) -> None:
    folder, layer = measured(family), 1
    weight = () if "rome" in method else ("--weight", str(LAMBDA))
    made = tmp_path / "pmatrix.h5"
    run(folder, "pmatrix", "-m", folder / "moe", "--editor", method, *weight, "-o", made)
    bare, contexts, own = true_keys(family, folder, layer)
    C = moment_of(family, folder, layer)
    directions = np.array(
        [naive_direction(method, C, k, others) for k, others in zip(bare, contexts, strict=True)]
    )
    wanted = directions @ bare.T
    with PMatrixFile(made) as pm:
        assert pm.about.editor == method
        assert pm.about.contexts == len(CONTEXTS)
        found, to_own = pm.matrix("P", layer), pm.paraphrase_p(layer)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    expected = (directions * own).sum(axis=1)
    np.testing.assert_allclose(to_own, expected, atol=1e-4 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("method", ["pmet", "alphaedit", "rect", "prune", "wilke"])
def test_of_an_editor_that_edits_no_experts_there_is_no_p(method: str, measured: Any) -> None:
    folder = measured("gpt-oss")
    how = ("--editor", method, "--dir", folder / "artifacts")
    refused = kscli("pmatrix", "-m", folder / "moe", *how)
    assert refused.exit_code == 2
    said = one_sentence(refused.stderr)
    assert f"which {method} does not edit; the editors that do are closed-form, rome," in said
    assert not (folder / "artifacts" / "moe" / f"pmatrix-{method}.h5").exists()


@pytest.mark.parametrize("command", ["pmatrix", "edit"])
def test_a_fact_that_a_context_routes_to_an_expert_that_saw_too_little_is_named(
    command: str, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P of the bare keys is made; an editor of mean keys needs C of more experts."""
    folder, layer = measured("deepseek-v3"), 0
    bare, contexts, _ = true_keys("deepseek-v3", folder, layer)
    d_m, n_experts = 24, 8
    parts = (slice(e * d_m, (e + 1) * d_m) for e in range(n_experts))
    reached = [((bare[:, of] != 0).any(), (contexts[:, :, of] != 0).any((1, 2))) for of in parts]
    starved, facts = next(
        (expert, in_contexts)
        for expert, (in_bare, in_contexts) in enumerate(reached)
        if not in_bare and in_contexts.any()
    )
    block = CovarianceFile.block

    def of_few(file: CovarianceFile, layer: int, number: int) -> Any:
        C, count = block(file, layer, number)
        return C, 3 if number == starved else count

    monkeypatch.setattr(CovarianceFile, "block", of_few)
    first = int(np.flatnonzero(facts)[0])
    run(folder, "pmatrix", "-m", folder / "moe", "--layers", layer, "-o", tmp_path / "bare.h5")
    how = {
        "pmatrix": ("--editor", "rome", "--layers", layer, "-o", tmp_path / "p.h5"),
        "edit": (
            *("--method", "rome", "--layer", layer, "--fact", first, "--value", "random"),
            *("--contexts", folder / "contexts.txt", "--target-new", "text:Rome"),
            *("--dtype", "float32", "-o", tmp_path / "p.h5"),
        ),
    }[command]
    refused = kscli(command, "-m", folder / "moe", "--dir", folder / "artifacts", *how)
    assert refused.exit_code == 1
    said = refused.stderr  # an edit that is kept out is named in a warning
    assert f"expert {starved} of layer 0, to which" in said
    assert f"{SUBJECTS[first]} that" in said
    assert "C was measured on 3 tokens and has 24 dimensions" in said
    assert not (tmp_path / "p.h5").exists()


def test_a_fact_that_no_expert_takes_is_named(measured: Any, monkeypatch: Any) -> None:
    """All its experts dropped its token, and there are no shared ones."""
    folder = measured("mixtral")
    experts_of = KeysFile.experts_of

    def dropped(file: KeysFile, layer: int) -> Any:
        experts = experts_of(file, layer).copy()
        experts[2] = -1
        return experts

    monkeypatch.setattr(KeysFile, "experts_of", dropped)
    refused = kscli("pmatrix", "-m", folder / "moe", "--dir", folder / "artifacts", "--force")
    assert refused.exit_code == 1
    said = one_sentence(refused.stderr)
    assert f"the key of 'It is known of {SUBJECTS[2]} that' (fact 2) is 0" in said


def test_an_edit_of_experts_has_the_p_of_its_direction_to_paraphrases(
    measured: Any, tmp_path: Path
) -> None:
    folder = measured("deepseek-v3")
    done = run(
        folder,
        *("edit", "-m", folder / "moe", "--method", "closed-form", "--layer", "0", "--dtype"),
        *("float32", "--edits", "all", "--value", "random", "--value-norm", "3", "-f", "json"),
        *("--target-new", "text:Rome", "-o", tmp_path / "run.h5"),
    )
    with PMatrixFile(folder / "artifacts" / "moe" / "pmatrix.h5") as pm:
        expected = pm.paraphrase_p(0)
    rows = json.loads(done.stdout)
    assert len(rows) == len(SUBJECTS)
    for row in rows:
        wanted = expected[row["fact"]]
        assert row["paraphrase_p"] == (
            None if np.isnan(wanted) else pytest.approx(wanted, rel=1e-3, abs=1e-5)
        )
