"""The p of an editor: p[i, j] = d_i^T k_j, d_i the direction along which it writes fact i alone.

Each layer is taken as if the editor wrote it alone, in the clean model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kscli.artifacts import CovarianceFile, KeysFile, Recipe
from kscli.editing.directions import directions_of_each
from kscli.editing.editors import PAPERS_EDITOR, Editor, find_editor, require_of_experts
from kscli.editing.metrics import Cut, Metric, metric_of, naming_facts
from kscli.editing.presets import preset_for

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EditorOfP:
    """An editor whose p is asked for; `null_space` is where AlphaEdit cuts C's spectrum."""

    name: str
    editor: Editor
    null_space: Cut = field(default_factory=Cut)

    @property
    def weight(self) -> float:
        """The editor's lambda; 0 where it has none."""
        return self.editor.direction.weight or 0.0

    def recipe(self) -> Recipe:
        """What decides the editor's p beside C and the keys."""
        return {"editor": self.name, "weight": self.weight, "null_space": asdict(self.null_space)}

    def p(
        self,
        cov: CovarianceFile,
        keys: KeysFile,
        layer: int,
        ridge: float,
        inverse: Metric | None = None,
    ) -> tuple[Array, Array | None]:
        """p of all pairs of facts at one layer, (m, m), and to each fact's own paraphrases, (m,).

        `inverse` is the metric C^-1 with that ridge, where it is at hand. p to paraphrases is NaN
        of a fact without, and None where no fact has any.

        Raises ArtifactError where `keys` has no keys in contexts and the editor takes their mean,
        and NumericsError where the editor could write nothing, and, naming the fact, where it is
        routed in a context to an expert that saw too few tokens.
        """
        name = self.editor.direction.metric
        metric = inverse if name == "second-moment" else None
        if metric is None:
            metric = metric_of(name, cov, layer, ridge, self.null_space)
        stored = _StoredKeys(keys, layer)
        with naming_facts([fact.text for fact in keys.facts]):
            directions = directions_of_each(metric, self.editor.key(stored), self.weight)
        paraphrases = keys.paraphrase_keys_of(layer)
        own = None if paraphrases is None else (directions * paraphrases).sum(axis=1)
        return directions @ stored.bare().T, own

    def require_of_experts(self, cov: CovarianceFile) -> None:
        """Raise UsageError where the editor does not edit mixtures of experts, as `cov` is of."""
        require_of_experts(self.name, self.editor, str(cov.path), cov.about.n_experts or 0)


def editor_of_p(name: str | None, model: str, weight: float | None, cut: Cut) -> EditorOfP | None:
    """The editor of that name with the settings published for a model; None: P is the paper's.

    A `weight` of None is the published one. Raises UsageError for an editor that is not known.
    """
    name = name or PAPERS_EDITOR
    editor = find_editor(name)
    if preset := preset_for(name, model):
        # The contexts are those of keys.h5, whatever an edit of this model takes.
        editor = replace(preset.apply(editor), contexts=editor.contexts)
    if editor.predicted:
        return None
    if weight is not None:
        editor = replace(editor, direction=replace(editor.direction, weight=weight))
    return EditorOfP(name, editor, cut)


@dataclass(frozen=True)
class _StoredKeys:
    """The keys of all facts in the clean model, for an editor to choose from."""

    file: KeysFile
    layer: int

    def stored(self) -> Array:
        return self.bare()

    def bare(self) -> Array:
        return self.file.stacked_keys_of(self.layer)

    def in_contexts(self) -> tuple[Array, int]:
        return self.file.context_keys_of(self.layer), len(self.file.contexts)
