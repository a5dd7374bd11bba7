"""The layers that a run edits: their down-projections, and how the run's editor changes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kscli.contexts import in_context
from kscli.editing.afterwards import largest_entries, limited_deltas
from kscli.editing.directions import edit_directions
from kscli.editing.editors import Editor, FactKeys
from kscli.editing.interference import Interference
from kscli.editing.live import hidden_states, mlp_keys, mlp_outputs
from kscli.editing.metrics import Cut, Metric, metric_of, naming_facts
from kscli.editing.protected_facts import ProtectedFacts, Protection
from kscli.editing.protection import Sparing, prices_of, require_room
from kscli.editing.sources import EditSources
from kscli.editing.text_change import TextChange
from kscli.editing.weights import EditableWeight
from kscli.models.loading import LoadedModel
from kscli.positions import LocatedPrompt, locate_keys
from kscli.reporter import Reporter

Array = NDArray[np.float64]


@dataclass(frozen=True)
class WriteOptions:
    """How a value is written, whatever it is.

    `weight` is the editor's lambda; `null_space` where AlphaEdit cuts C's spectrum; `keep` the part
    of entries that RECT keeps.
    """

    weight: float = 0.0
    null_space: Cut = field(default_factory=Cut)
    keep: float = 0.4


class Written(NamedTuple):
    """What edits at once wrote: deltas (b, layer, d), directions (b, layer, d_m), prices (b,)."""

    deltas: Array
    directions: Array
    prices: Array


class EditedLayers:
    """The edited layers of a model, ascending, changed by an editor; `restore` takes all back.

    `keys` (layer, m, d_m) are the facts' keys in the clean model. Raises what `EditableWeight`
    raises.
    """

    def __init__(
        self,
        model: LoadedModel,
        sources: EditSources,
        editor: Editor,
        options: WriteOptions,
        prompts: Sequence[LocatedPrompt],
    ) -> None:
        self._model, self._sources = model, sources
        self._editor, self._options = editor, options
        self._prompts = prompts
        self._weights = [EditableWeight(model, layer) for layer in sources.layers]
        self._contexts: tuple[str, ...] = ()
        self._in_contexts: dict[int, tuple[LocatedPrompt, ...]] = {}

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def predicted(self) -> bool:
        """Whether the edits' directions say all shifts: one layer, which nothing else changes."""
        afterwards = self._editor.afterwards
        return len(self) == 1 and afterwards.keep is None and not afterwards.limited

    @property
    def contexts(self) -> int:
        """How many contexts keys are averaged over, the bare prompt not among them."""
        return len(self._contexts)

    @property
    def d(self) -> int:
        """The length of a value."""
        return self._weights[-1].shape[0]

    def prepare(self, contexts: Sequence[str], reporter: Reporter) -> None:
        """Read the clean model's keys, and factorise C; keys are averaged over `contexts` too."""
        sources, layers = self._sources, self._sources.layers
        name, cut = self._editor.direction.metric, self._options.null_space
        self._contexts = tuple(contexts)
        self._metrics: list[Metric] = []
        with reporter.task("factorising C", len(layers), "layers") as task:
            for layer in layers:
                self._metrics.append(metric_of(name, sources.cov, layer, sources.ridge, cut))
                task.advance()
        self._text = TextChange.measure(
            [sources.cov.stored_blocks(layer) for layer in layers],
            [weight.original for weight in self._weights],
        )
        self._protecting = list(self._metrics)
        self._paraphrase_keys = [sources.keys.paraphrase_keys_of(layer) for layer in layers]
        self.keys = [self._clean_keys(layer, reporter) for layer in layers]
        self.clean()

    def protect(
        self, facts: ProtectedFacts, protection: Protection, edited: Sequence[int]
    ) -> tuple[NDArray[np.bool_], Array]:
        """Protect facts from all edits, in the clean model, and from those of `edited` facts.

        Returns which of the facts are, and the price of each edit, at the first edited layer.
        Raises NumericsError where they leave no direction to write in.
        """
        first, *others = (facts.keys_at(layer) for layer in self._sources.layers)
        own = self._editor.key(_EditedKeys(self, 0, edited))
        found = facts.affordable(self._metrics[0], first, (own.along, own.at), protection)
        self._protecting = [found.metric]
        for metric, keys in zip(self._metrics[1:], others, strict=True):
            self._protecting.append(facts.metric(metric, keys, found.kept, protection.ridge))
        self.clean()
        return found.kept, found.prices

    def _clean_keys(self, layer: int, reporter: Reporter) -> Array:
        """The facts' keys at a layer of the clean model, in the dtype that it is edited in."""
        stored = self._sources.keys
        if stored.about.dtype == self._model.dtype:
            return stored.stacked_keys_of(layer)
        reporter.note(
            f"{stored.path} is in {stored.about.dtype}; its keys are read again in "
            f"{self._model.dtype}, in which the model is edited."
        )
        return mlp_keys(self._model, layer, self._prompts)

    def clean(self) -> None:
        """Go back to the clean model, with no edit made."""
        self.restore()
        self.interference = [
            Interference(keys, weight.shape)
            for keys, weight in zip(self.keys, self._weights, strict=True)
        ]
        self._earlier = [np.empty((0, keys.shape[1])) for keys in self.keys]
        spared = self._editor.direction.earlier == "protected"
        self._writing = [Sparing(m) if spared else m for m in self._protecting]

    def restore(self) -> None:
        """Make the model what it was."""
        for weight in self._weights:
            weight.restore()

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """The clean model, while the block runs; then the edited one, bit for bit."""
        self.restore()
        try:
            yield
        finally:
            for weight, interference in zip(self._weights, self.interference, strict=True):
                weight.set_change(interference.change)

    @property
    def text_change(self) -> float:
        """How much of the values' size over all text has changed (`kscli.editing.text_change`)."""
        return self._text.of_changes([each.change for each in self.interference])

    def text_change_of(self, deltas: Array, directions: Array) -> float:
        """The same of one edit alone, (layer, d) deltas along (layer, d_m) directions."""
        return self._text.of_edit(deltas, directions)

    def state(self, facts: Sequence[int]) -> Array:
        """What the model now gives where values are sought, at the last edited layer: (b, d)."""
        read = hidden_states if self._editor.value.site == "hidden" else mlp_outputs
        prompts = [self._prompts[fact] for fact in facts]
        return read(self._model, self._sources.layers[-1], prompts)

    def write(self, facts: Sequence[int], values: Array) -> Written:
        """Write values of facts at once (equation 3).

        `values` are (b, d): what the last layer's output is to be, where the editor has the model
        `reach` it, else what to add; of an editor that chooses one layer, (b, layer, d). Raises
        NumericsError where the key of a fact is protected, or that of another one.
        """
        self._prices = np.ones((len(self), len(facts)))
        if self._editor.afterwards.one_layer:
            deltas, directions = self._wisest(facts, values)
        else:
            deltas, directions = self._every_layer(facts, values)
        self.settle(facts, deltas, directions)
        at = int(directions.any(axis=(1, 2)).argmax())
        return Written(deltas.swapaxes(0, 1), directions.swapaxes(0, 1), self._prices[at])

    def p_of(self, direction: Array) -> Array:
        """p of an edit with directions (layer, d_m), d^T k of all facts, (m,).

        Of several layers it is that of the first one that is written.
        """
        at = int(direction.any(axis=1).argmax())
        p: Array = self.keys[at] @ direction[at]
        return p

    def p_to_paraphrases(self, fact: int, direction: Array) -> float:
        """The mean p of such an edit to the paraphrases of its fact; NaN where it has none."""
        at = int(direction.any(axis=1).argmax())
        keys = self._paraphrase_keys[at]
        return np.nan if keys is None else float(keys[fact] @ direction[at])

    def settle(self, facts: Sequence[int], deltas: Array, directions: Array) -> None:
        """Change every layer by (layer, b, d) deltas along (layer, b, d_m) directions, for good."""
        for at, weight in enumerate(self._weights):
            change = deltas[at].T @ directions[at]
            interference = self.interference[at]
            if self._editor.afterwards.keep is not None:
                before = weight.changed(interference.change).double().numpy()
                change = largest_entries(change, before, self._options.keep)
            p = directions[at] @ self.keys[at].T
            interference.edit(facts, p, deltas[at], change)
            if change.any():
                weight.set_change(interference.change)
        if self._editor.direction.earlier == "weighed":
            # Read again in the edited model, as the published code does.
            for at, earlier in enumerate(self._earlier):
                keys = self._editor.key(_EditedKeys(self, at, facts)).along
                self._earlier[at] = np.concatenate([earlier, keys])
        for at, metric in enumerate(self._writing):
            if isinstance(metric, Sparing):
                metric.add(self._editor.key(_EditedKeys(self, at, facts)).at)

    def limit(self, deltas: Array, directions: Array) -> Array:
        """Limit the spectrum of the whole change, of all n edits; returns their new deltas.

        `deltas` and `directions` are (n, layer, d) and (n, layer, d_m).
        """
        found = np.empty_like(deltas)
        for at, weight in enumerate(self._weights):
            found[:, at] = limited_deltas(deltas[:, at], directions[:, at], weight.original)
            self.interference[at].replace(found[:, at].T @ directions[:, at])
            weight.set_change(self.interference[at].change)
        return found

    def _every_layer(self, facts: Sequence[int], values: Array) -> tuple[Array, Array]:
        """From the lowest layer up, each with its share of what is lacking."""
        deltas, directions = [], []
        for at, weight in enumerate(self._weights):
            share = self._editor.afterwards.share(len(self) - at)
            keys = self._editor.key(_EditedKeys(self, at, facts))
            deltas.append(share * self._lacking(at, facts, values, keys))
            directions.append(self._direction(at, facts, keys))
            if at < len(self) - 1:
                # The layers above read what this one gives now; `settle` writes all of them.
                weight.set_change(self.interference[at].change + deltas[at].T @ directions[at])
        return np.stack(deltas), np.stack(directions)

    def _wisest(self, facts: Sequence[int], values: Array) -> tuple[Array, Array]:
        """Of one fact, at the layer whose W changes least, |Delta W| / |W|; 0 at all others."""
        deltas, directions, sizes = [], [], []
        for at, weight in enumerate(self._weights):
            keys = self._editor.key(_EditedKeys(self, at, facts))
            deltas.append(self._lacking(at, facts, values[:, at], keys))
            directions.append(self._direction(at, facts, keys))
            change = np.linalg.norm(deltas[at]) * np.linalg.norm(directions[at])
            sizes.append(change / weight.norm)
        chosen = np.arange(len(self))[:, None, None] == np.nanargmin(sizes)
        return np.where(chosen, deltas, 0.0), np.where(chosen, directions, 0.0)

    def _lacking(self, at: int, facts: Sequence[int], values: Array, keys: FactKeys) -> Array:
        """What the values of the edited facts lack of those sought, (b, d)."""
        if self._editor.value.reach:
            return values - self.state(facts)
        if keys.at is keys.bare:
            return values
        # R-ROME: the mean key gets the value that was sought for the bare prompt's key.
        return values + self._weights[at].values(keys.bare - keys.at)

    def _direction(self, at: int, facts: Sequence[int], keys: FactKeys) -> Array:
        earlier = self._earlier[at] if self._editor.direction.earlier == "weighed" else None
        weight, plain, metric = self._options.weight, self._metrics[at], self._writing[at]
        with naming_facts([self._sources.keys.facts[fact].text for fact in facts]):
            require_room(plain, metric, keys.at)
            directions = edit_directions(metric, keys.along, weight, at=keys.at, earlier=earlier)
        self._prices[at] = prices_of(plain, directions, keys)
        return directions

    def keys_of(self, at: int, facts: Sequence[int]) -> Array:
        """The bare prompts' keys in the model as it is now, at the `at`-th edited layer."""
        prompts = [self._prompts[fact] for fact in facts]
        return mlp_keys(self._model, self._sources.layers[at], prompts)

    def mean_in_contexts(self, at: int, facts: Sequence[int]) -> Array:
        """The mean over the contexts of the prompts' keys in the model as it is now: (b, d_m)."""
        prompts = [prompt for fact in facts for prompt in self._prompts_in_contexts(fact)]
        if not prompts:
            return np.zeros((len(facts), self.keys[at].shape[1]))
        found = mlp_keys(self._model, self._sources.layers[at], prompts)
        of_facts = found.reshape(len(facts), -1, found.shape[1])
        return np.asarray(of_facts.mean(axis=1))

    def _prompts_in_contexts(self, fact: int) -> tuple[LocatedPrompt, ...]:
        if fact not in self._in_contexts:
            whole = self._sources.keys.facts[fact]
            texts = [in_context(context, whole) for context in self._contexts]
            self._in_contexts[fact] = locate_keys(self._model.tokenizer, texts)
        return self._in_contexts[fact]


@dataclass(frozen=True)
class _EditedKeys:
    """The keys of the edited facts at one layer, for an editor to choose from."""

    layers: EditedLayers
    at: int
    facts: Sequence[int]

    def stored(self) -> Array:
        return self.layers.keys[self.at][list(self.facts)]

    def bare(self) -> Array:
        return self.layers.keys_of(self.at, self.facts)

    def in_contexts(self) -> tuple[Array, int]:
        return self.layers.mean_in_contexts(self.at, self.facts), self.layers.contexts
