"""How edits are asked for, from the command line or from Python, and what a run makes of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kscli.contexts import choose_contexts
from kscli.editing.edited_layers import WriteOptions
from kscli.editing.editors import (
    DEFAULT_EDITOR,
    Editor,
    ValueSearch,
    editors_where,
    find_editor,
    without_effect,
)
from kscli.editing.loop import EditOptions, Protocol
from kscli.editing.null_space import null_space_cut
from kscli.editing.presets import Preset, named_preset, preset_for
from kscli.editing.protected_facts import DEFAULT_RIDGE, Protection
from kscli.errors import UsageError, nearest
from kscli.facts import read_facts
from kscli.numbers import require_finite

if TYPE_CHECKING:
    from kscli.facts import Fact


OF_VALUES = (
    "steps",
    "learning_rate",
    "weight_decay",
    "kl_weight",
    "likelihood_weight",
    "norm_limit",
)
"""The options of the search for a value."""


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """The options of `kscli edit` that say how edits are made and measured, by their names.

    None is what the preset has for the editor and the model, or the editor's own.
    """

    method: str = DEFAULT_EDITOR
    preset: str | None = None
    protocol: Protocol = "sequential"
    value: str = "optimised"
    value_norm: float = 1.0
    steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    kl_weight: float | None = None
    likelihood_weight: float = 1.0
    norm_limit: float | None = None
    contexts: str | None = None
    weight: float | None = None
    null_space: float | None = None
    relative_null_space: float | None = None
    keep: float | None = None
    protect: str | None = None
    protect_at: Literal["tokens", "subject"] = "tokens"
    protect_ridge: float | None = None
    max_price: float | None = None
    batch: int = 1
    measure_every: int = 10
    moved: int | None = 10
    generations: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        # As the command line reads them: recipes tell 7 from 7.0.
        for each in fields(self):
            number = getattr(self, each.name)
            if "float" in str(each.type) and isinstance(number, int):
                object.__setattr__(self, each.name, float(number))

    def editor(self, model: str) -> tuple[Editor, Preset | None]:
        """The editor with the preset for a model, and that preset. Raises UsageError."""
        editor, published = find_editor(self.method), None
        if self.preset != "none":
            published = (
                named_preset(self.method, self.preset)
                if self.preset
                else preset_for(self.method, model)
            )
        return (published.apply(editor) if published else editor), published

    def without_effect(self, editor: Editor) -> list[tuple[tuple[str, ...], str]]:
        """The options that have no effect beside the others, and why, to end a sentence with."""
        keeping = editors_where(lambda each: each.afterwards.keep is not None)
        of_protection = ("protect_at", "protect_ridge", "max_price")
        found = without_effect(editor)
        if self.value != "random":
            found.append((("value_norm",), "without --value random"))
        if self.value != "optimised":
            found.append((OF_VALUES, f"with --value {self.value}"))
        if editor.afterwards.keep is None:
            found.append((("keep",), f"without --method {keeping}"))
        if self.protect is None:
            found.append((of_protection, "without --protect"))
        if self.protocol == "single":
            found.append((("measure_every",), "with --protocol single, which always does"))
        return found

    def options(self, editor: Editor) -> tuple[EditOptions, tuple[Fact, ...]]:
        """How a run by that editor is made, and the facts to protect where they are a file's.

        Raises UsageError for a number that cannot be.
        """
        self._check_numbers()
        chosen = choose_contexts(self.contexts, editor.contexts, self.seed)
        asked = {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "kl_weight": self.kl_weight,
            "norm_limit": self.norm_limit,
        }
        given = {name: number for name, number in asked.items() if number is not None}
        find: ValueSearch = replace(
            editor.value,
            **given,  # type: ignore[arg-type]
            likelihood_weight=self.likelihood_weight,
            contexts=chosen.texts,
        )
        own_weight = editor.direction.weight or 0.0
        protection, of_file = self._protection()
        options = EditOptions(
            method=self.method,
            protocol=self.protocol,
            find=find,
            contexts=chosen.generated,
            random_norm=self.value_norm if self.value == "random" else None,
            write=WriteOptions(
                weight=own_weight if self.weight is None else self.weight,
                null_space=null_space_cut(self.null_space, self.relative_null_space),
                keep=(editor.afterwards.keep or 1.0) if self.keep is None else self.keep,
            ),
            protection=protection,
            batch=self.batch,
            measure_every=self.measure_every,
            moved=self.moved,
            generations=self.generations,
            seed=self.seed,
        )
        return options, of_file

    @property
    def values_of(self) -> Path | None:
        """The file whose run found the values, where `value` names one."""
        if self.value in ("optimised", "random"):
            return None
        if not Path(self.value).exists():
            raise UsageError(
                f"--value {self.value} is neither optimised nor random, nor a file that is there; "
                "name a file of `kscli edit`."
            )
        return Path(self.value)

    def _check_numbers(self) -> None:
        of_sizes = {
            "--learning-rate": self.learning_rate,
            "--norm-limit": self.norm_limit,
            "--value-norm": self.value_norm,
            "--keep": self.keep,
        }
        for option, number in of_sizes.items():
            if number == 0:
                raise UsageError(f"{option} 0 writes nothing; name one above 0.")
        require_finite(
            {
                **of_sizes,
                "--weight-decay": self.weight_decay,
                "--kl-weight": self.kl_weight,
                "--likelihood-weight": self.likelihood_weight,
                "--weight": self.weight,
                "--protect-ridge": self.protect_ridge,
                "--max-price": self.max_price,
            }
        )

    def _protection(self) -> tuple[Protection | None, tuple[Fact, ...]]:
        """Which facts no edit is to move, and these facts where they are a file's."""
        if self.protect is None:
            return None, ()
        if self.max_price is not None and self.max_price < 1:
            raise UsageError(
                f"--max-price {self.max_price:g} is below 1, the price of a plain edit."
            )
        at, ridge = self.protect_at, self.protect_ridge
        if ridge is None:
            ridge = DEFAULT_RIDGE[at]
        if self.protect in ("known", "all"):
            return Protection(self.protect, at, ridge, self.max_price), ()
        close = nearest(self.protect, ("known", "all"))
        if close and not Path(self.protect).exists():
            raise UsageError(
                f"--protect {self.protect!r} is not known, all or a file; did you mean {close[0]}?"
            )
        of_file = read_facts(self.protect, None)
        return Protection(of_file.identity, at, ridge, self.max_price), of_file.facts
