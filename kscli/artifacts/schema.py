"""What each kind of file holds: every attribute and every dataset, declared once.

The attributes of a kind are the fields of its `About`: a name, a type and a meaning. A field of
type `... | None` may be unknown: the file says `unknown`, and Python says None. A field whose
default is None may also be absent. `Stamp` is what the writer adds to every file. The datasets
of a kind are in `SCHEMAS`, by name. The writer and the reader both go by these declarations.

`described("cov")` gives {name: meaning} of all that a file of that kind may hold, for a page of
documentation or a test of one.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kscli.artifacts.sealed import Held
from kscli.escaping import storable
from kscli.fact_forms import QUESTION_FIELDS
from kscli.scores import SCORES

Kind = Literal["cov", "keys", "pmatrix", "stats", "edits"]
Recipe = dict[str, Any]

# What stands in a file for None.
UNKNOWN = "unknown"

# A hook is a module's dotted path, in which LAYER stands for the layer's number, once.
LAYER = "{}"
HOOK = re.compile(r"(?!.*\{\}.*\{\})(?=.*\{\})([\w-]+|\{\})(\.([\w-]+|\{\}))*", re.ASCII)


class SchemaError(ValueError):
    """What a file lacks or has wrong, as the end of a sentence that begins with the file."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What the writer adds to every file."""

    format_version: Annotated[int, "the format of the file; this kscli reads 2"]
    kscli_version: Annotated[str, "the kscli that wrote the file"]
    kind: Annotated[str, "cov, keys, pmatrix, stats or edits"]
    fingerprint: Annotated[str, "a hash of what the file holds, by which other files name it"]
    command: Annotated[str, "the command line that wrote the file"]
    created: Annotated[str, "when the file was written, in UTC"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What every file says of itself.

    `weights`, `tokenizer`, `hook` and `d_m` are its identity: files that are used together must
    agree in them.
    """

    model: Annotated[str, "the model's name for people: its alias, or the name of its folder"]
    model_id: Annotated[str, "the model's id on the Hub, or its path"]
    revision: Annotated[str | None, "the revision of the model on the Hub"]
    weights: Annotated[str | None, "the fingerprint of the model's weights"]
    tokenizer: Annotated[str | None, "the fingerprint of the tokenizer"]
    hook: Annotated[str, "the module whose input is the key, with {} for the layer"]
    d_m: Annotated[int, "the length of a key"]
    n_layers: Annotated[int, "how many layers the model has"]
    n_experts: Annotated[int | None, "how many experts a layer has; absent: it is dense"] = None
    parameters: Annotated[int | None, "how many parameters the model has"] = None
    active_parameters: Annotated[int | None, "how many of them one token uses"] = None
    dtype: Annotated[str | None, "the type of number in which the model was run"]
    device: Annotated[str | None, "the device on which the model was run"]
    special_tokens: Annotated[str | None, "the tokens that the tokenizer puts around a text"]
    seed: Annotated[int, "the seed of what was drawn at random"] = 0
    inputs: Annotated[dict[str, str], "the fingerprints of the files it was made from"] = field(
        default_factory=dict
    )
    recipe: Annotated[Recipe, "everything that decides what the file holds"] = field(
        default_factory=dict
    )

    @property
    def sizes(self) -> tuple[int, int] | None:
        """The parameters of the model and those that one token uses, where the file says them."""
        if self.parameters is None or self.active_parameters is None:
            return None
        return self.parameters, self.active_parameters

    def derive(self, about: type[AnyAbout], **own: Any) -> AnyAbout:
        """What a file made from this one says: the fields that both have, and its `own`."""
        names = {each.name for each in fields(about)} & {each.name for each in fields(self)}
        return about(**{name: getattr(self, name) for name in names} | own)


AnyAbout = TypeVar("AnyAbout", bound=About)


@dataclass(frozen=True, kw_only=True)
class CorpusAbout(About):
    """What a file says of the text that C was measured on."""

    corpus: Annotated[str | None, "the name of the text that C was measured on"]
    corpus_identity: Annotated[str | None, "the fingerprint of that text"]


@dataclass(frozen=True, kw_only=True)
class FactsAbout(About):
    """What a file says of its facts."""

    facts_name: Annotated[str, "where the facts came from"]
    facts_identity: Annotated[str, "the fingerprint of the facts"]
    token: Annotated[str, "the token at which keys were read: subject-last, subject-first, last"]


@dataclass(frozen=True, kw_only=True)
class CovarianceAbout(CorpusAbout):
    """What cov.h5 says of itself."""

    documents: Annotated[int | None, "how many documents were read"]
    max_length: Annotated[int | None, "the tokens at which a document was cut"]
    whole_corpus: Annotated[bool | None, "whether the text was read to its end"] = None
    batch_tokens: Annotated[int | str | None, "the most tokens in one batch; of shards, all"] = None
    batches_halved: Annotated[bool | None, "whether a batch did not fit and was halved"] = None
    padding: Annotated[float | None, "the share of the tokens run that were padding"] = None
    note: Annotated[str | None, "what import-cov was told of the text"] = None

    @property
    def imported(self) -> bool:
        """Whether the file was imported, so that it does not know of which weights it is."""
        return self.weights is None


@dataclass(frozen=True, kw_only=True)
class KeysAbout(FactsAbout):
    """What keys.h5 says of itself."""


@dataclass(frozen=True, kw_only=True)
class PMatrixAbout(CorpusAbout, FactsAbout):
    """What pmatrix.h5 says of itself."""

    ridge: Annotated[float, "lambda of C + lambda (tr C / d_m) I, the matrix that was inverted"]
    shard: Annotated[str, "the part of the text that C is of, as 0/2; empty: the whole"] = ""
    editor: Annotated[str, "the editor whose p is in P; empty: the paper's, equation 18"] = ""
    contexts: Annotated[int, "how many contexts that editor's mean keys are over"] = 0


@dataclass(frozen=True, kw_only=True)
class StatisticsAbout(CorpusAbout, FactsAbout):
    """What stats.h5 says of itself."""

    m: Annotated[int, "how many facts there are"]
    editor: Annotated[str, "the editor whose p this is about; empty: the paper's"] = ""


@dataclass(frozen=True, kw_only=True)
class EditsAbout(CorpusAbout, FactsAbout):
    """What a run of edits says of itself."""

    method: Annotated[str, "the editor, a name that `kscli editors` lists"]
    protocol: Annotated[str, "sequential: one edit upon the other; single: each taken back"]
    order: Annotated[str, "the order in which facts were edited"]
    value: Annotated[str, "how the new value was found: optimised or random"]
    weight: Annotated[float, "the editor's lambda, mom2_update_weight; 0 where it has none"]
    batch: Annotated[int, "how many edits were made at once"]
    planned: Annotated[int, "how many edits were asked for"]
    held_out: Annotated[str, "the text of which perplexity was measured; empty: none"]


@dataclass(frozen=True)
class Dataset:
    """An array of a file: its type, its axes, and its meaning.

    `dtype` is the type that the writer stores, `text` for UTF-8 strings; the reader takes any
    width of the same kind. Axes of one name have one length in a file, and `d_m` has that of
    the attribute. What is `optional` may be absent; what is no `result` does not count for the
    file's fingerprint.
    """

    dtype: str
    axes: tuple[str, ...]
    meaning: str
    optional: bool = False
    result: bool = True

    @property
    def codes(self) -> str:
        """NumPy's codes for the types that the reader takes."""
        return {"text": "S", "int64": "iu", "bool": "b"}.get(self.dtype, "f")


@dataclass(frozen=True)
class Schema:
    """A kind of file: its name in a sentence, its attributes, and its datasets by name."""

    title: str
    about: type[About]
    datasets: Mapping[str, Dataset]


# Axes that may be of length 0.
MAY_BE_EMPTY = ("moved", "kept_out", "context", "paraphrase")


def _table(text: str, *, optional: bool = False, result: bool = True) -> dict[str, Dataset]:
    """Datasets from lines of name, type, axes ("-": none) and meaning, two spaces between them."""
    found = {}
    for line in text.strip().splitlines():
        name, dtype, axes, meaning = re.split(r"  +", line.strip(), maxsplit=3)
        found[name] = Dataset(dtype, tuple(axes.strip("-").split()), meaning, optional, result)
    return found


_LAYER = _table("layer  int64  layer  the numbers of the layers; the dimension scale")
_FACTS = _table("""
    facts/prompt    text   m  the prompt, with {} for the subject
    facts/subject   text   m  the subject
    facts/target    text   m  the text that completes the prompt
    facts/relation  text   m  the name of the relation; empty where there is none
    facts/case_id   int64  m  the number of the fact in the file that it came from
    token_id        int64  m  the id of the token at which the key was read
    position        int64  m  the index of that token in the prompt's tokens
""") | _table("facts/target_new  text  m  the text that an edit may write", optional=True)
_QUESTIONS = {
    name: Dataset(dtype, (kind,), meaning, optional=True)
    for kind in QUESTION_FIELDS
    for name, dtype, meaning in (
        (f"{kind}/fact", "int64", f"the index of the fact that each {kind} question is about"),
        (f"{kind}/prompt", "text", f"its prompt, of a {kind} question"),
        (f"{kind}/target", "text", f"its answer, of a {kind} question; empty where it has none"),
    )
}
_COV = _table("""
    count          int64    -              the number of tokens that C is a mean over
    second_moment  float32  layer d_m d_m  C = E[k k^T], both triangles
""") | _table(
    """
    settling/layer   int64    watched             the layers at which p was watched
    settling/tokens  int64    evaluation          the tokens read before each evaluation
    settling/rms     float64  evaluation watched  the estimated rms error that is left in p
    """,
    optional=True,
)
_KEYS = _table("keys  float32  layer m d_m  the key of every fact") | _table(
    """
    contexts      text     context      the texts that prompts were put into, {} for the prompt
    context_keys  float32  layer m d_m  the mean of every fact's key over these texts
    paraphrase_keys  float32  layer m d_m  its mean over the fact's paraphrases; NaN without
    """,
    optional=True,
)
# What files of a mixture of experts hold beside the others', or with an axis more.
_SHARED = "shared_second_moment  float32  layer d_shared d_shared  C of the experts that all have"
_EXPERTS: dict[str, dict[str, Dataset]] = {
    "cov": _table("""
        second_moment  float32  layer expert d_m d_m  C_e = E[g^2 k k^T], over all tokens
        routed         int64    layer expert          how many tokens were routed to the expert
    """)
    | _table(_SHARED, optional=True),
    "keys": _table("""
        keys     float32  layer m slot d_m  g k of every fact, of each expert that it is routed to
        experts  int64    layer m slot      the numbers of these experts; -1: there is no more
    """)
    | _table(
        """
    shared_keys  float32  layer m d_shared  g k of the experts that all have
    context_keys     float32  layer m context_slot d_m  the mean of g k over the contexts
    context_experts  int64    layer m context_slot      the experts of any context; -1: no more
    shared_context_keys  float32  layer m d_shared      that mean of the experts that all have
    paraphrase_keys     float32  layer m paraphrase_slot d_m  over paraphrases; NaN without
    paraphrase_experts  int64    layer m paraphrase_slot      their experts; -1: no more
    shared_paraphrase_keys  float32  layer m d_shared         of the experts that all have
    """,
        optional=True,
    ),
    "pmatrix": _table(
        "experts  int64  layer m slot  the experts that a fact is routed to; -1: there is no more"
    ),
    "edits": _table(
        "direction  float64  layer edit stacked  the direction, of all experts' W side by side"
    ),
}
_PMATRIX = (
    _table("""
    P         float32  layer m m  p[i, j]: fact i is edited, fact j is moved
    Q         float32  layer m m  the inner product of two keys
    leverage  float64  layer m    k^T C^-1 k of every fact
""")
    | _table(
        """
    whitened_cosine  float32  layer m m  as it is; it follows from P where P is the paper's
    paraphrase_p     float64  layer m    the mean p from a fact to its own paraphrases; NaN without
    """,
        optional=True,
    )
    | _table(
        """
    dead_coordinates    int64    layer  how many coordinates were 0 on every token
    condition           float64  layer  the condition estimate of C scaled to unit diagonal
    whitening_residual  float64  layer  the largest |L^-1 C L^-T x - x| / |x| over 8 random x
    solve_residual      float64  layer  the largest |C (C^-1 k) - k| / |k| over the keys
    storage_error       float64  layer  how far storing C in float32 moves p, an estimate
    """,
        optional=True,
        result=False,
    )
)
_WHENS = {
    "before": "in the clean model",
    "previous": "before this edit",
    "after": "after this edit",
}
_EDITS = _table("""
    known               bool     m               whether the clean model answers with the target
    protected           bool     m               whether its value was protected from the edits
    edited              int64    edit            the index of the edited fact
    target_new          text     edit            what was written
    delta               float64  layer edit d    what the edit adds to the fact's value
    direction           float64  layer edit d_m  the direction in which W is changed
    delta_norm          float64  edit            the length of delta
    price               float64  edit            the change of all text by that of the plain edit
    own_text_change     float64  edit            tr(dW C dW^T) of this edit alone, by tr(W C W^T)
    linear_error        float64  edit            the largest difference by the largest prediction
    live_error          float64  edit            the same of the live model's MLP output
    weight_change       float64  edit            the Frobenius norm of W's change so far
    p                   float64  edit m          the edited fact's row of P, first edited layer
    whitened_cosine     float64  edit m          its row of the whitened cosine
    cosine              float64  edit m          its row of the raw cosine
    gradient_cosine     float64  edit m          the cosine of its gradient with every fact's
    hidden_cosine       float64  edit m          that of its hidden state, first edited layer
    editor_p            float64  edit m          d^T k of its direction, first layer written
    paraphrase_p        float64  edit            the mean of that to its paraphrases; NaN without
    predicted           float64  edit m          the predicted length of every value's shift
    measured            float64  edit m          the length of the shift that W's change gives
    measured_live       float64  edit m          the length of the live MLP output's shift
    difference          float64  edit m          the length of the predicted less measured shift
    moved_index         int64    edit moved      the other facts of largest |p|, in that order
    moved_answer_before  text    edit moved      their answers in the clean model
    moved_answer_after  text     edit moved      their answers after this edit
    step                int64    pass            how many edits were made before this pass
    perplexity          float64  pass            the perplexity of held-out text; NaN without
    kl                  float64  pass            KL(clean || now) of its next token; NaN without
    text_change         float64  pass            tr(dW C dW^T) of all edits, by tr(W C W^T)
    logprob_true        float64  pass m          the log-probability of every fact's target
    rank_true           int64    pass m          the rank of that target's first token
    answer_changed      bool     pass m          whether the answer is not the clean model's
    paraphrase/known    bool     paraphrase       whether the clean model answers with the target
    paraphrase/changed  bool     pass paraphrase  whether its answer is not the clean model's
    logprob_new         float64  pass planned    the log-probability of every new target
    rank_new            int64    pass planned    the rank of that target's first token
    kept_out/number     int64    kept_out        the number of a planned edit that was not made
    kept_out/fact       int64    kept_out        the index of its fact
    kept_out/target_new  text    kept_out        what it would have written
    kept_out/reason     text     kept_out        why it was not made
""") | {
    name.format(target, when): Dataset(dtype, tuple(axes.split()), meaning.format(whose, then))
    for when, then in _WHENS.items()
    for target, whose in (("true", "own"), ("new", "edit's new"))
    for name, dtype, axes, meaning in (
        ("logprob_{}_{}", "float64", "edit", "the log-probability of the fact's {} target {}"),
        ("rank_{}_{}", "int64", "edit", "the rank of the fact's {} target's first token {}"),
        ("moved_logprob_{}_{}", "float64", "edit moved", "that of the moved facts' {} target {}"),
    )
}
_EDITS |= {
    f"scores/{name}": Dataset("float64", ("pass", "planned"), f"of each edit {score.meaning}")
    for name, score in SCORES.items()
}
STATISTIC = Dataset("float64", ("layer",), "one dataset for each statistic; NaN where undefined")

SCHEMAS: dict[str, Schema] = {
    "cov": Schema("second moments (cov.h5)", CovarianceAbout, _LAYER | _COV),
    "keys": Schema("keys of facts (keys.h5)", KeysAbout, _LAYER | _FACTS | _QUESTIONS | _KEYS),
    "pmatrix": Schema(
        "superposition matrices (pmatrix.h5)", PMatrixAbout, _LAYER | _FACTS | _PMATRIX
    ),
    "stats": Schema("statistics of P (stats.h5)", StatisticsAbout, _LAYER),
    "edits": Schema(
        "a run of edits (edits/METHOD-LAYERS-SEED.h5)",
        EditsAbout,
        _LAYER | _FACTS | _QUESTIONS | _EDITS,
    ),
}


def datasets_of(kind: str, about: About) -> dict[str, Dataset]:
    """Every dataset that a file of `kind` with these attributes may hold, by name.

    stats.h5 holds the statistics that its recipe names. Raises SchemaError where it names none.
    """
    declared = dict(SCHEMAS[kind].datasets)
    if about.n_experts:
        declared |= _EXPERTS.get(kind, {})
    if kind == "stats":
        names = about.recipe.get("statistics")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SchemaError("its attribute recipe names no statistics")
        declared |= dict.fromkeys(names, STATISTIC)
    return declared


def described(kind: str) -> dict[str, str]:
    """Every attribute and dataset of a kind with its meaning; statistics stand as `STATISTIC`."""
    schema = SCHEMAS[kind]
    attributes = {
        name: " ".join(get_args(hint)[1:])
        for cls in (Stamp, schema.about)
        for name, hint in get_type_hints(cls, include_extras=True).items()
    }
    datasets = {**_EXPERTS.get(kind, {}), **schema.datasets} | (
        {"STATISTIC": STATISTIC} if kind == "stats" else {}
    )
    return attributes | {name: dataset.meaning for name, dataset in datasets.items()}


# From fields to attributes, and back

_WANTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def to_attributes(about: Stamp | About) -> dict[str, Any]:
    """The attributes that say what `about` says."""
    found: dict[str, Any] = {}
    for each in fields(about):
        value = getattr(about, each.name)
        if isinstance(value, dict):
            found[each.name] = json.dumps(value, sort_keys=True)
        elif isinstance(value, str):
            found[each.name] = storable(value)
        elif value is not None or each.default is MISSING:
            found[each.name] = UNKNOWN if value is None else value
    return found


def from_attributes(cls: type[Any], held: Mapping[str, Any]) -> Any:
    """A `Stamp` or `About` from a file's attributes.

    Raises SchemaError, naming the attribute, where one is missing or of another type.
    """
    found = {}
    hints = get_type_hints(cls)
    for each in fields(cls):
        if each.name in held:
            found[each.name] = _value(each.name, held[each.name], hints[each.name])
        elif each.default is not None:
            raise SchemaError(f"it has no attribute {each.name}")
    return cls(**found)


def _value(name: str, held: Any, hint: Any) -> Any:
    """An attribute as the type that a field's hint asks for."""
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if types.NoneType in allowed and isinstance(held, str) and held == UNKNOWN:
        return None
    if type(held) in allowed:
        return held
    if type(held) is int and float in allowed:
        with suppress(OverflowError):
            return float(held)
    if get_origin(hint) is dict:
        with suppress(TypeError, ValueError, RecursionError):
            value = json.loads(held)
            if isinstance(value, dict) and (
                hint is Recipe or {*map(type, value.values())} <= {str}
            ):
                return value
    wanted = " or ".join(_WANTED.get(each, UNKNOWN) for each in allowed)
    if get_origin(hint) is dict:
        wanted = "a JSON object"
    shown = repr(held)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise SchemaError(f"its attribute {name} is {shown}, where {wanted} is needed")


def check_datasets(
    arrays: Mapping[str, Held], declared: Mapping[str, Dataset], about: About
) -> dict[str, int]:
    """Raise SchemaError, naming the dataset, unless there are the datasets as declared.

    Returns the length of every axis.
    """
    lengths = {"d_m": about.d_m} | ({"expert": about.n_experts} if about.n_experts else {})
    for name, wanted in declared.items():
        if name not in arrays:
            if wanted.optional:
                continue
            raise SchemaError(f"it has no dataset {name}")
        held = arrays[name]
        fits = (
            held.dtype.kind in wanted.codes
            and len(held.shape) == len(wanted.axes)
            and all(
                lengths.setdefault(axis, length) == length and (length or axis in MAY_BE_EMPTY)
                for axis, length in zip(wanted.axes, held.shape, strict=True)
            )
        )
        if not fits:
            axes = ", ".join(wanted.axes)
            raise SchemaError(
                f"its dataset {name} is {held.shape} of {held.dtype}, where ({axes}) of "
                f"{wanted.dtype} is needed"
            )
    return lengths
