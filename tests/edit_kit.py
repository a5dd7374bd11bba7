"""Runs of edits with made-up numbers, and a model that is edited by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifact_kit import OF_FACTS, PROVENANCE, located
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from kscli.artifacts import EditsAbout
from kscli.editing.edits_file import EditLog, write_edits
from kscli.facts import Fact
from kscli.scores import SCORES
from kscli.tiny import MODEL_DIR

Real = NDArray[np.float64]
HOOK = "transformer.h.{}.mlp.c_proj"


@dataclass
class Run:
    """A run of edits with numbers as SmolLM2 gives them; `rank_new` is (passes, edits)."""

    n: int = 10
    m: int = 30
    layer: int = 0
    method: str = "closed-form"
    protocol: str = "sequential"
    every: int = 10
    perplexity: bool = True
    seed: int = 0
    model: str = "toy"
    d: int = 6
    target_new: str = "Italian"
    facts: tuple[Fact, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    log: EditLog = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.layer])
        n, m = self.n, self.m
        known = rng.random(m) < 0.5
        self.log = EditLog(known, np.zeros(m, dtype=bool), np.ones(self.q, dtype=bool))
        self.log.add_pass(self._pass(rng, 0))
        shifts = np.zeros((m, self.d))
        for number, fact in enumerate(rng.permutation(m)[:n].tolist(), 1):
            delta = rng.standard_normal(self.d) * rng.lognormal(0, 0.3)
            p = 0.05 * rng.standard_t(2.5, m)
            p[fact] = 1
            shifts = np.zeros((m, self.d)) if self.protocol == "single" else shifts
            shifts = shifts + np.outer(p, delta)
            shifts[fact] = 0
            predicted = np.linalg.norm(shifts, axis=1)
            off = 1e-13 * rng.random(m) * predicted.max()
            measured = predicted + off
            due = number in (1, n) or number % self.every == 0 or self.protocol == "single"
            self.log.add_edit(self._edit(fact, delta, p, predicted, measured, off, live=due))
            if due:
                self.log.add_pass(self._pass(rng, number))

    def _edit(
        self,
        fact: int,
        delta: Real,
        p: Real,
        predicted: Real,
        measured: Real,
        off: Real,
        live: bool,
    ) -> dict[str, Any]:
        nothing = np.full(self.m, np.nan)
        theory = self.method == "closed-form"
        names = self.log.of_edit
        return {
            **{name: 1 for name in names if name.startswith("rank")},
            **{name: -1.0 for name in names if name.startswith("logprob")},
            **{name: [] for name in names if name.startswith("moved")},
            "moved_index": np.zeros(0, dtype=np.int64),
            "edited": fact,
            "target_new": self.target_new,
            "delta": delta[None],
            "direction": np.zeros((1, 12)),
            "price": 1.0,
            "delta_norm": float(np.linalg.norm(delta)),
            "linear_error": float(off.max() / predicted.max()) if theory and self.m > 1 else np.nan,
            "live_error": 3e-6 if live and theory else np.nan,
            "weight_change": 1.0,
            "own_text_change": 0.01,
            "paraphrase_p": 0.5 * float(p.max()),
            "p": p,
            **dict.fromkeys(
                ("whitened_cosine", "cosine", "gradient_cosine", "hidden_cosine"),
                np.clip(p, -1.0, 1.0),
            ),
            "editor_p": p,
            "predicted": predicted if theory else nothing,
            "measured": measured,
            "measured_live": measured if live and theory else nothing,
            "difference": off if theory else nothing,
        }

    @property
    def q(self) -> int:
        """How many paraphrases the facts have."""
        asked = (question for fact in self.facts for question in fact.questions)
        return sum(question.kind == "paraphrase" for question in asked)

    def _pass(self, rng: np.random.Generator, step: int) -> dict[str, Any]:
        forgotten = 0.004 * step * (1 + self.layer / 10)
        return {
            "step": step,
            "perplexity": 21 * (1 + 0.004 * step) if self.perplexity else np.nan,
            "kl": 0.01 * step if self.perplexity else np.nan,
            "text_change": 0.01 * step,
            "paraphrase/changed": (rng.random(self.q) < forgotten) & (step > 0),
            "logprob_true": -rng.random(self.m),
            "rank_true": np.ones(self.m, dtype=np.int64),
            "answer_changed": (rng.random(self.m) < forgotten) & (step > 0),
            "logprob_new": -rng.random(self.n),
            "rank_new": 1 + (rng.random(self.n) < forgotten),
            **{f"scores/{name}": rng.random(self.n) for name in SCORES},
        }

    def write(self, path: Path) -> Path:
        facts = self.facts or tuple(
            Fact("{} is in", f"Subject {at}", f"target {at}") for at in range(self.m)
        )
        about = EditsAbout(
            **(PROVENANCE | OF_FACTS | {"model": self.model, "n_layers": 30}),
            corpus="toy text",
            corpus_identity="c0",
            method=self.method,
            protocol=self.protocol,
            order="given",
            value="optimised",
            weight=0.0,
            batch=1,
            planned=self.n,
            held_out="",
            seed=self.seed,
            inputs=self.inputs,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_edits(path, self.log, (self.layer,), located(facts), about)
        return path


class Naive:
    """transformers' own model, edited by hand in float64."""

    def __init__(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        self.model: Any = model.eval().double()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def projection(self, layer: int) -> Any:
        return self.model.get_submodule(HOOK.format(layer))

    def matrix(self, layer: int) -> Real:
        found: Real = self.projection(layer).weight.detach().numpy().T.copy()
        return found

    def add(self, layer: int, change: Real) -> None:
        with torch.no_grad():
            self.projection(layer).weight += torch.from_numpy(change).T

    def at(self, module: Any, text: str, position: int, *, given: bool) -> Real:
        """A module's input or output at one token of a text."""
        found: list[Real] = []

        def hook(_: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if given else output
            value = value[0] if isinstance(value, tuple) else value
            found.append(value.detach()[0, position].numpy())

        handle = module.register_forward_hook(hook)
        self.ids(text)
        with torch.no_grad():
            self.model(self.ids(text))
        handle.remove()
        return found[0]

    def ids(self, text: str) -> Any:
        return torch.tensor([self.tokenizer(text)["input_ids"]])

    def logprob(self, text: str, target: str) -> float:
        """log P of a target after a text, token by token."""
        prompt, total = self.ids(text)[0].tolist(), 0.0
        for token in self.tokenizer(f" {target}")["input_ids"]:
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt])).logits[0, -1]
            total += float(logits[token] - logits.logsumexp(0))
            prompt.append(token)
        return total
