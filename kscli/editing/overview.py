"""What the editors are, need and cost, and the settings published for them. No numerics."""

from __future__ import annotations

from typing import Any

from kscli.editing.editors import EDITORS, Editor, MetricName, find_editor
from kscli.editing.presets import presets_of

NEEDS: dict[MetricName, str] = {
    "second-moment": "C and its inverse",
    "identity": "nothing of C",
    "null-space": "C and its singular vectors",
}


def editor_rows() -> list[dict[str, Any]]:
    """One record an editor: what it is, which layers it edits, what it needs and what it costs."""
    return [_row(name, find_editor(name)) for name in EDITORS]


def setting_rows(method: str) -> list[dict[str, Any]]:
    """The editor's own settings, and those published for models, one record each.

    Raises UsageError for an editor that is not known.
    """
    own = find_editor(method)
    rows = [_settings(method, "", own, own.depth.words, "")]
    for model, preset in presets_of(method).items():
        rows.append(_settings(method, model, preset.apply(own), preset.layers, preset.source))
    return rows


def _row(name: str, editor: Editor) -> dict[str, Any]:
    needs = NEEDS[editor.direction.metric]
    return {
        "method": name,
        "title": editor.title,
        "layers": editor.depth.words,
        "facts_at_once": "several" if editor.at_once else "one",
        "needs": f"{needs}, earlier keys" if editor.direction.earlier else needs,
        "passes": editor.value.steps,
        "texts": _texts(editor),
        "each_layer": editor.afterwards.one_layer,
        "presets": list(presets_of(name)),
    }


def _texts(editor: Editor) -> int:
    """How many texts a pass of the search reads: the prompt in all contexts, and the KL text."""
    return 2 + sum(count for _, count in editor.contexts)


def _settings(method: str, model: str, editor: Editor, layers: str, source: str) -> dict[str, Any]:
    value = editor.value
    return {
        "method": method,
        "model": model or None,
        "layers": layers,
        "steps": value.steps,
        "learning_rate": value.learning_rate,
        "weight_decay": value.weight_decay,
        "kl_weight": value.kl_weight,
        "norm_limit": value.norm_limit,
        "weight": editor.direction.weight,
        "source": source or None,
    }
