"""Published settings of editors, by method and model: presets.csv.

The numbers are those of the hyper-parameter files that each line names. EMMET's `weight` is
mom2_update_weight times emmet_lambda, AlphaEdit's is L2. Imports nothing heavy.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kscli.editing.editors import Editor
from kscli.errors import UsageError, no_such
from kscli.layers import format_layers
from kscli.models.aliases import find_alias

if TYPE_CHECKING:
    from kscli.artifacts import Artifact

# Models that settings are published for and that have no alias: Hub id, layers, d_m.
_OTHERS = {
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", 32, 14336),
}
_MEASURED = "measured with kscli: "
_WHOLE = ("steps",)
_REAL = ("learning_rate", "weight_decay", "kl_weight", "norm_limit")


@dataclass(frozen=True)
class Preset:
    """The settings published, or measured with kscli, for some methods and one model.

    `search` are fields of `ValueSearch` by name; `weight` is lambda, None where the methods have
    none. The model has `n_layers` layers and keys of length `d_m`. `without_contexts`: no text is
    put before its prompts, for it has read none there.
    """

    methods: tuple[str, ...]
    model: str
    hub_id: str
    n_layers: int
    d_m: int
    layers: str
    search: Mapping[str, int | float]
    weight: float | None
    source: str
    without_contexts: bool = False

    @property
    def origin(self) -> str:
        """How the settings came about."""
        return "measured" if self.source.startswith(_MEASURED) else "published"

    @property
    def sentence(self) -> str:
        """For which model the settings are, and where they are from."""
        return f"settings {self.origin} for {self.model}: {self.source.removeprefix(_MEASURED)}"

    def apply(self, editor: Editor) -> Editor:
        """The editor with these settings for its own."""
        direction = editor.direction
        if self.weight is not None:
            direction = replace(direction, weight=self.weight)
        value = replace(editor.value, **self.search)  # type: ignore[arg-type]
        contexts = () if self.without_contexts else editor.contexts
        return replace(editor, value=value, direction=direction, contexts=contexts)

    def require_fits(self, model: str, n_layers: int, d_m: int) -> None:
        """Raise UsageError where the preset is for a model of another shape."""
        if (n_layers, d_m) != (self.n_layers, self.d_m):
            raise UsageError(
                f"the preset {self.model} is for a model of {self.n_layers} layers and d_m "
                f"{self.d_m:,}, and {model} has {n_layers} and {d_m:,}; name another --preset, or "
                "none."
            )


def _preset(row: Mapping[str, str]) -> Preset:
    alias = find_alias(row["model"])
    of_model = (alias.hub_id or "", alias.layers, alias.d_m) if alias else _OTHERS[row["model"]]
    search: dict[str, int | float] = {name: int(row[name]) for name in _WHOLE}
    search |= {name: float(row[name]) for name in _REAL}
    weight = float(row["weight"]) if row["weight"] else None
    methods = tuple(row["methods"].split())
    return Preset(
        methods,
        row["model"],
        *of_model,
        row["layers"],
        search,
        weight,
        row["source"],
        without_contexts=row["contexts"] == "0",
    )


with Path(__file__).with_name("presets.csv").open(encoding="utf-8", newline="") as _rows:
    PRESETS: tuple[Preset, ...] = tuple(map(_preset, csv.DictReader(_rows)))


def presets_of(method: str) -> dict[str, Preset]:
    """The presets of a method, by model."""
    return {preset.model: preset for preset in PRESETS if method in preset.methods}


def preset_for(method: str, model: str) -> Preset | None:
    """The preset of a method for a model by its alias or Hub id, if there is one."""
    wanted = model.lower()
    for name, preset in presets_of(method).items():
        if wanted in (name, preset.hub_id.lower()):
            return preset
    return None


def default_layers(editor: Editor, preset: Preset | None, file: Artifact) -> tuple[str, str]:
    """The layers to edit where none is asked for, as `--layers` takes them, and why those.

    Without a preset they are those by the depth that the `file` holds, or the nearest that it
    holds. Raises UsageError where the preset is for another model.
    """
    about = file.about
    if preset is not None:
        preset.require_fits(about.model, about.n_layers, about.d_m)
        return preset.layers, f"as {preset.origin} for {preset.model}"
    wanted = editor.depth.layers(about.n_layers)
    held = [layer for layer in wanted if layer in file.layers]
    if len(held) == len(wanted):
        return format_layers(held), editor.depth.words
    nearest = min(file.layers, key=lambda layer: abs(layer - wanted[0]))
    return format_layers(held or [nearest]), f"{editor.depth.words}, by what {file.path} holds"


def named_preset(method: str, name: str) -> Preset:
    """The preset of a method that was asked for by its model's name.

    Raises UsageError, naming those there are, for another name.
    """
    found = preset_for(method, name)
    if found is None:
        if there := presets_of(method):
            raise no_such(f"preset of {method}", name, there)
        raise UsageError(f"there is no preset of {method}: no settings are published for it.")
    return found
