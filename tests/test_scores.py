"""The scores of the field: their definitions, and what the model is asked for them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import kscli
from edit_kit import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.analysis.edit_runs import course_of
from kscli.analysis.resampling import Resampling
from kscli.editing.edit_arrays import read_arrays
from kscli.editing.edits_file import EditsFile
from kscli.editing.scored import measure_scores
from kscli.scores import SCORES, TfIdf, harmonic_mean, n_gram_entropy, token_accuracy

FACTS: list[dict[str, Any]] = [
    {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target": "Paris",
        "target_new": "Rome",
        "paraphrase_prompts": ["France's capital is", "The seat of government of France is in"],
        "neighborhood_prompts": [
            "The river Seine runs through",
            "The Louvre is in",
            "Notre-Dame is in",
        ],
        "generation_prompts": ["France is known for", "In France"],
        "reference_texts": ["Rome is the capital of Italy and of an old empire.", "Rome is old."],
        "portability": [{"prompt": "The language of France's capital is", "target": "Italian"}],
        "locality": [{"prompt": "The capital of Spain is", "target": "Madrid"}],
    },
    {
        "prompt": "The mother tongue of {} is",
        "subject": "Marie Curie",
        "target": "Polish",
        "target_new": "Norwegian Bokmål",
        "paraphrase_prompts": ["Marie Curie grew up speaking"],
    },
    {"prompt": "{} is a product of", "subject": "Walkman", "target": "Sony", "target_new": "Fiat"},
]


@pytest.fixture(scope="module")
def scored(measured_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three edits at once of the facts above, on tiny in float32."""
    place = tmp_path_factory.mktemp("scored")
    (place / "tiny").mkdir()
    (place / "tiny" / "cov.h5").symlink_to(measured_tiny / "cov.h5")
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    how = ("--dir", place, "-q")
    extract = ("--facts", place / "facts.jsonl", "--dtype", "float32", "--contexts", 0)
    assert kscli("extract", *extract, *how).exit_code == 0
    assert kscli("pmatrix", *how).exit_code == 0
    edit = ("--edits", "all", "--layer", 1, "--method", "memit", "--weight", 1, "--batch", 3)
    done = kscli("edit", *edit, "--contexts", 0, "--norm-limit", 9, "--generations", 2, *how)
    assert done.exit_code == 0, done.stderr
    return place


class Naive:
    """A plain float64 model, one text at a time."""

    def __init__(self) -> None:
        from kscli.tiny import MODEL_DIR

        self.model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float64)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def asked(self, prompt: str, target: str) -> tuple[float, list[int], list[int]]:
        """The negative log-probability a token, the likeliest tokens, and the target's."""
        ids = self.tokenizer(prompt)["input_ids"]
        wanted = self.tokenizer(f"{prompt} {target}")["input_ids"][len(ids) :]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
        places = logits[len(ids) - 1 : -1]
        of_target = [float(row[token]) for row, token in zip(places, wanted, strict=True)]
        return -sum(of_target) / len(wanted), places.argmax(-1).tolist(), wanted

    def likelier(self, prompts: list[str], wanted: str, other: str) -> float:
        found = [self.asked(each, wanted)[0] < self.asked(each, other)[0] for each in prompts]
        return float(np.mean(found)) if found else math.nan

    def accuracy(self, pairs: list[tuple[str, str]]) -> float:
        of_each = [np.mean(np.equal(*self.asked(*pair)[1:])) for pair in pairs]
        return float(np.mean(of_each)) if of_each else math.nan

    def scores(self, fact: dict[str, Any], before: dict[str, list[int]]) -> dict[str, float]:
        text = fact["prompt"].replace("{}", fact["subject"])
        new, true = fact["target_new"], fact["target"]
        paraphrases = fact.get("paraphrase_prompts", [])
        others = [(each["prompt"], each["target"]) for each in fact.get("locality", [])]
        follows = [(each["prompt"], each["target"]) for each in fact.get("portability", [])]
        kept = []
        for pair in others:
            said = self.asked(*pair)[1]
            kept.append(float(np.mean(np.equal(said, before.setdefault(pair[0], said)))))
        ids = self.tokenizer(text, return_tensors="pt")
        drawn = self.model.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        said = self.tokenizer.decode(drawn[ids["input_ids"].shape[1] :])
        return {
            "ES": self.likelier([text], new, true),
            "PS": self.likelier(paraphrases, new, true),
            "NS": self.likelier(fact.get("neighborhood_prompts", []), true, new),
            "reliability": self.accuracy([(text, new)]),
            "generalisation": self.accuracy([(each, new) for each in paraphrases]),
            "locality": float(np.mean(kept)) if kept else math.nan,
            "portability": self.accuracy(follows),
            "says": float(said.strip().startswith(new)),
        }


def test_scores_are_their_definitions_on_the_model_before_and_after(scored: Path) -> None:
    """By a plain float64 model, which the run's own delta and direction edit."""
    (path,) = (scored / "tiny" / "edits").glob("*.h5")
    naive, before = Naive(), dict[str, list[int]]()
    with EditsFile(path) as file:
        order = file.values("edited").tolist()
        found = {name: file.values(f"scores/{name}") for name in SCORES}
        change = file.values("delta")[:, 0].T @ file.values("direction")[:, 0]
    for at, passed in ((0, "before"), (-1, "after")):
        if passed == "after":
            weight = naive.model.transformer.h[1].mlp.c_proj.weight
            with torch.no_grad():
                weight += torch.tensor(change.T)
        for edit, fact in enumerate(order):
            for name, value in naive.scores(FACTS[fact], before).items():
                assert found[name][at, edit] == pytest.approx(value, nan_ok=True), (name, fact)
    assert found["ES"][-1].mean() > found["ES"][0].mean()
    texts = [fact for fact in order if "generation_prompts" in FACTS[fact]]
    assert np.isfinite(found["GE"]).sum() == np.isfinite(found["RS"]).sum() == 2 * len(texts)
    assert (found["RS"][np.isfinite(found["RS"])] <= 1).all()


def test_what_is_absent_is_said_once(measured_tiny: Path, tmp_path: Path) -> None:
    how = ("--dir", measured_tiny.parent, "--edits", 3, "--measure-every", 1, "--steps", 2)
    done = kscli("edit", *how, "--contexts", 0, "--layer", 1, "-o", tmp_path / "edits.h5")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("the facts have no such questions") == 1
    assert "PS and generalisation (paraphrase)" in done.stderr
    table = kscli("verify", tmp_path / "edits.h5")
    assert "reliability" in table.stdout
    assert "PS" not in table.stdout
    (row,) = json.loads(kscli("verify", tmp_path / "edits.h5", "-f", "json").stdout)
    assert (row["PS"], row["S"], row["GE_before"]) == (None, None, None)
    assert row["ES_low"] is None  # of three edits there is no interval


def test_scores_of_single_edits_are_each_its_own(scored: Path, tmp_path: Path) -> None:
    """Single edits score as edits alone do."""
    how = ("--dir", scored, "--layer", 1, "--method", "closed-form", "--norm-limit", 9, "-q")
    alone = {}
    for subject in ("France", "Walkman"):
        path = tmp_path / f"{subject}.h5"
        assert kscli("edit", "--fact", subject, "-o", path, *how).exit_code == 0
        with EditsFile(path) as file:
            alone[subject] = {name: file.values(f"scores/{name}")[-1, 0] for name in SCORES}
    path = tmp_path / "single.h5"
    both = ("--fact", "France", "--fact", "Walkman", "--protocol", "single", "-o", path)
    assert kscli("edit", *both, *how).exit_code == 0
    with EditsFile(path) as file:
        run = read_arrays(file)
    for name, values in run.scores.items():
        own = [alone["France"][name], alone["Walkman"][name]]
        np.testing.assert_allclose(values[1:].diagonal(), own, err_msg=name)
        means = [np.nanmean(own) if not np.isnan(own).all() else None]
        found = {each.name: each.after.value for each in measure_scores(run, Resampling(100))}
        assert found[name] == pytest.approx(means[0])


def test_s_is_the_harmonic_mean_of_means_over_the_edits_that_have_all_three(tmp_path: Path) -> None:
    with EditsFile(Run(n=12).write(tmp_path / "edits.h5")) as file:
        run, course = read_arrays(file), course_of(file).scores["ES"]
    run.scores["PS"][:, 3] = np.nan
    found = {each.name: each for each in measure_scores(run, Resampling(400, 0))}
    kept = [at for at in range(12) if at != 3]
    means = [run.scores[name][-1, kept].mean() for name in ("ES", "PS", "NS")]
    assert found["S"].after.value == pytest.approx(3 / sum(1 / mean for mean in means))
    first = [run.scores[name][0, kept].mean() for name in ("ES", "PS", "NS")]
    assert found["S"].before == pytest.approx(3 / sum(1 / mean for mean in first))
    drawn = np.random.default_rng(1).integers(0, 12, (4000, 12))
    low, high = np.quantile(run.scores["ES"][-1][drawn].mean(axis=1), [0.025, 0.975])
    after = found["ES"].after
    assert after.low == pytest.approx(low, abs=0.02)
    assert after.high == pytest.approx(high, abs=0.02)
    assert course[-1] == pytest.approx(run.scores["ES"][-1].mean())
    assert course[1] == pytest.approx(run.scores["ES"][1, : run.step[1]].mean())


def test_entropy_of_n_grams_is_romes() -> None:
    """Of `a b a b c`: bigrams ab 2, ba 1, bc 1; trigrams aba, bab, abc."""
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    trigrams = math.log2(3)
    expected = (2 / 3 * bigrams + 4 / 3 * trigrams) / 2
    assert n_gram_entropy("a b a b c") == pytest.approx(expected)
    assert n_gram_entropy("so so so so so so") == 0
    assert n_gram_entropy("") == 0


def test_tf_idf_is_scikit_learns() -> None:
    references = ["Rome is old, old as stone.", "Paris is old too.", "Oslo is cold."]
    n, texts = 3, [{"rome", "is", "old", "as", "stone"}, {"paris", "is", "old", "too"}]
    texts.append({"oslo", "is", "cold"})

    def vector(words: list[str]) -> dict[str, float]:
        df = Counter(word for text in texts for word in text)
        weights = {w: math.log((1 + n) / (1 + df[w])) + 1 for w in df}
        return {w: words.count(w) * weights[w] for w in words if w in weights}

    a, b = vector(["rome", "rome", "is", "old"]), vector(["old", "stone", "rome"])
    product = sum(a[w] * b.get(w, 0) for w in a)
    expected = product / math.sqrt(sum(v**2 for v in a.values()) * sum(v**2 for v in b.values()))
    found = TfIdf(references).cosine("Rome, Rome is a very old", "an old stone of Rome")
    assert found == pytest.approx(expected)
    assert math.isnan(TfIdf(references).cosine("nothing", "Rome"))


def test_shares() -> None:
    assert token_accuracy([(1, 2), (3,)], [(1, 5), (3,)]) == 0.75
    assert math.isnan(token_accuracy([], []))
    assert harmonic_mean(np.array([[0.5, 1.0, 1.0]]))[0] == pytest.approx(0.75)
    assert harmonic_mean(np.array([[0.0, 1.0, 1.0]]))[0] == 0
    assert math.isnan(harmonic_mean(np.array([[math.nan, 1.0, 1.0]]))[0])
