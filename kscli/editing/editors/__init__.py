"""The editors: each is a module of this folder that holds an `EDITOR`, and a line in `EDITORS`.

Every editor of the ROME family changes a down-projection to W + sum_i delta_i d_i^T: delta_i (d) is
added to the value of fact i, and d_i (d_m) is the direction along which it is written. An edit of
fact i so moves the value of fact j by (d_i^T k_j) delta_i. Editors differ in the four choices that
an `Editor` states: the key that stands for an edited fact, the direction, how the value is sought,
and what happens afterwards.

This module imports neither NumPy nor torch, so that the command line can list the editors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from kscli.errors import UsageError, no_such

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

EDITORS: dict[str, str] = {
    "closed-form": "kscli.editing.editors.closed_form",
    "rome": "kscli.editing.editors.rome",
    "rome-identity": "kscli.editing.editors.rome_identity",
    "r-rome": "kscli.editing.editors.r_rome",
    "r-rome-identity": "kscli.editing.editors.r_rome_identity",
    "wilke": "kscli.editing.editors.wilke",
    "memit": "kscli.editing.editors.memit",
    "memit-seq": "kscli.editing.editors.memit_seq",
    "joint": "kscli.editing.editors.joint",
    "emmet": "kscli.editing.editors.emmet",
    "pmet": "kscli.editing.editors.pmet",
    "alphaedit": "kscli.editing.editors.alphaedit",
    "rect": "kscli.editing.editors.rect",
    "prune": "kscli.editing.editors.prune",
}
DEFAULT_EDITOR = "rome"
"""The editor of `kscli edit`."""
PAPERS_EDITOR = "closed-form"
"""The editor of the theory, whose p is the paper's P."""
ROME_CONTEXTS = ((5, 10), (10, 10))
"""The contexts that ROME's code makes up: so many texts of so many tokens, (length, number)."""


class KeySource(Protocol):
    """The keys of the facts that are being edited, at one layer."""

    def stored(self) -> Array:
        """The bare prompts' keys in the clean model, from keys.h5: (b, d_m)."""
        ...

    def bare(self) -> Array:
        """The bare prompts' keys in the model as it is now: (b, d_m)."""
        ...

    def in_contexts(self) -> tuple[Array, int]:
        """The mean of the prompts' keys in n contexts, in the model as it is now, and n.

        The mean is (b, d_m), the bare prompt not in it; of no contexts it is of no use.
        """
        ...


@dataclass(frozen=True)
class FactKeys:
    """The keys that stand for edited facts, each (b, d_m).

    The direction is along M `along`, and the key `at` gets the value that is written. That value is
    sought at the key `bare`, the bare prompt's.
    """

    along: Array
    at: Array
    bare: Array


MetricName = Literal["second-moment", "identity", "null-space"]
"""M in the direction M k: C^-1, the identity, or the projection on a null space of C."""


@dataclass(frozen=True)
class Direction:
    """The direction d_i of an editor (see `kscli.editing.directions`).

    `weight` is its lambda by default (mom2_update_weight; EMMET: times emmet_lambda; AlphaEdit:
    L2); None: it has none. The keys of `earlier` edits are `weighed` where they stand in the
    inverse, and `protected` where no edit moves them.
    """

    metric: MetricName = "second-moment"
    weight: float | None = None
    earlier: Literal["weighed", "protected"] | None = None


Site = Literal["mlp", "hidden"]
"""Where a shift is added while a value is sought: to the down-projection's output, which is ROME's
v, or to the output of the decoder layer, which is MEMIT's z."""


@dataclass(frozen=True)
class ValueSearch:
    """How a value is sought; the defaults are ROME's (hparams/ROME/gpt2-xl.json of its code).

    The names in the published hyper-parameters: `steps` is v_num_grad_steps, the passes of the
    model, which change the shift one time fewer at most; `learning_rate` v_lr; `weight_decay`
    v_weight_decay; `kl_weight` kl_factor; `norm_limit` clamp_norm_factor, which bounds |shift| /
    |value|; `likelihood_weight` nll_loss_factor. The search ends as soon as the loss is below
    `stop_at`. The `contexts` (context_templates) hold {} once, where the prompt goes; the bare
    prompt is always used too.

    `kl_at`: where the KL term reads the text "{} is a", at the subject's last token or at the end.
    `reach`: what is written is what the last layer's output lacks of the value found, read again
    before each layer; else the shift. `attention`: a shift of the attention's output is sought
    too, and thrown away, and the likelihood counts less once the target is the likeliest (PMET).
    """

    site: Site = "mlp"
    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_weight: float = 0.0625
    norm_limit: float = 4.0
    likelihood_weight: float = 1.0
    stop_at: float = 0.05
    kl_at: Literal["subject", "end"] = "subject"
    reach: bool = False
    attention: bool = False
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Afterwards:
    """What happens to the change of W.

    `share` is the part of what is lacking that is written with n layers left, this one included.
    `keep`: the part of the entries of a batch's change that is kept (RECT). `limited`: the spectrum
    of the whole change is limited after the last edit (PRUNE). `one_layer`: of several layers each
    edit takes the one whose W it changes least (WilKE).
    """

    share: Callable[[int], float]
    keep: float | None = None
    limited: bool = False
    one_layer: bool = False


def everything(layers_left: int) -> float:
    """Write all that is lacking."""
    return 1.0


def equal_share(layers_left: int) -> float:
    """Write an equal share (MEMIT): R / (L - i)."""
    return 1.0 / layers_left


def root_share(layers_left: int) -> float:
    """Write a share of R / sqrt(L - i) (PMET)."""
    return float(layers_left**-0.5)


@dataclass(frozen=True)
class Depth:
    """Which layers are edited where nothing else is published or asked for.

    `first` and `last` are shares of the depth, both included; `words` says them.
    """

    first: float
    last: float
    words: str

    def layers(self, n_layers: int) -> range:
        """The layers of a model; never the last of several."""
        end = max(n_layers - 2, 0)
        first, last = (min(round(share * n_layers), end) for share in (self.first, self.last))
        return range(first, last + 1)


SIXTH = Depth(1 / 6, 1 / 6, "a sixth of the depth")
EIGHTH_TO_QUARTER = Depth(1 / 8, 1 / 4, "an eighth to a quarter of the depth")
FIRST_HALF = Depth(0, 1 / 2, "the first half of the depth")


@dataclass(frozen=True)
class Editor:
    """An editor by its four choices: `key`, `direction`, `value` and `afterwards`.

    `key` chooses the keys that stand for the edited facts. `contexts` are the (number of tokens,
    number of texts) that the model makes up to put before prompts (context_template_length_params).
    `depth`: the layers that it edits by default; several only where it is `over_layers`. `at_once`:
    it edits several facts at once. `predicted`: the P of pmatrix.h5 is this editor's p, so that
    equations 11 and 15 predict what its edits move.
    """

    title: str
    key: Callable[[KeySource], FactKeys]
    direction: Direction
    value: ValueSearch
    afterwards: Afterwards
    contexts: tuple[tuple[int, int], ...] = ()
    depth: Depth = SIXTH
    over_layers: bool = False
    at_once: bool = False
    predicted: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether it edits mixtures of experts, too.

        Not those that look at more of a layer than its keys and what W gives for them: the null
        space of C, the attention's output, the entries and the spectrum of W.
        """
        afterwards = self.afterwards
        of_W = afterwards.keep is not None or afterwards.limited or afterwards.one_layer
        return not (of_W or self.value.attention or self.direction.metric == "null-space")


def find_editor(name: str) -> Editor:
    """The editor of that name. Raises UsageError, naming those there are, for another name."""
    if name not in EDITORS:
        raise no_such("editor", name, EDITORS)
    found: Editor = import_module(EDITORS[name]).EDITOR
    return found


def editors_where(wanted: Callable[[Editor], bool]) -> str:
    """The names of the editors that `wanted` holds for, as in `memit, pmet or toy`."""
    names = [name for name in EDITORS if wanted(find_editor(name))]
    return " or ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def require_of_experts(name: str, editor: Editor, whose: str, n_experts: int) -> None:
    """Raise UsageError where an editor does not edit mixtures of experts, as `whose` C is of."""
    if not editor.of_experts:
        others = editors_where(lambda other: other.of_experts)
        raise UsageError(
            f"{whose} is of a mixture of {n_experts} experts, which {name} does not edit; the "
            f"editors that do are {others}."
        )


def without_effect(editor: Editor) -> list[tuple[tuple[str, ...], str]]:
    """The options of directions that an editor has no use for, and without what they have none."""
    direction = editor.direction
    weighted = editors_where(lambda each: each.direction.weight is not None)
    cutting = editors_where(lambda each: each.direction.metric == "null-space")
    found: list[tuple[tuple[str, ...], str]] = []
    if direction.weight is None:
        found.append((("weight",), f"without --method {weighted}"))
    if direction.metric != "null-space":
        found.append((("null_space", "relative_null_space"), f"without --method {cutting}"))
    return found
