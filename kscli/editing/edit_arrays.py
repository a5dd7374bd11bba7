"""A run of edits as arrays, which what is tested of it is computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kscli.analysis.matrices import different_last_token
from kscli.scores import SCORES

if TYPE_CHECKING:
    from kscli.editing.edits_file import EditsFile

Real = NDArray[np.float64]
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class EditArrays:
    """A run of n edits of m facts, measured in s passes; what `EditsFile` says of a name holds.

    The facts and their keys are in two blocks, equation 6: those that no edit is about, and the
    edited ones; so are their values, equation 8.

    `single`: every edit was made in the clean model and taken back. `about` and `same_last_token`
    (n, m): which facts an edit is about, its own and those of the same text, and which have their
    keys at the token of its own. Edits of one number in `batch` (n,), ascending, were made at
    once. `delta` (n, D) is over all edited layers; `logprob_new` and `rank_new` (s, n) are without
    the edits that were kept out, and so are the `scores`, each (s, n), by name. The q paraphrases
    are of the facts `paraphrase_fact` (q,).
    """

    single: bool
    edited: Whole
    batch: Whole
    about: Mask
    same_last_token: Mask
    delta: Real
    p: Real
    whitened_cosine: Real
    cosine: Real
    gradient_cosine: Real
    hidden_cosine: Real
    editor_p: Real
    paraphrase_p: Real
    measured: Real
    linear_error: Real
    live_error: Real
    weight_change: Real
    logprob_true_after: Real
    logprob_new_after: Real
    rank_new_after: Whole
    step: Whole
    known: Mask
    protected: Mask
    logprob_true: Real
    answer_changed: Mask
    logprob_new: Real
    rank_new: Whole
    perplexity: Real
    kl: Real
    text_change: Real
    scores: Mapping[str, Real]
    paraphrase_fact: Whole
    paraphrase_known: Mask
    paraphrase_changed: Mask


def read_arrays(file: EditsFile) -> EditArrays:
    """The arrays of a run, from its file."""
    edited = file.values("edited")
    n = len(edited)
    made = edit_numbers(file)
    texts = np.array([fact.text for fact in file.facts], dtype=object)
    given: dict[str, Any] = {
        "single": file.about.protocol == "single",
        "edited": edited,
        "batch": made // file.about.batch,
        "about": texts[edited][:, None] == texts,
        "same_last_token": ~different_last_token(file.token_id)[edited],
        "delta": file.values("delta").reshape(n, -1),
        **{name: file.values(name)[:, made] for name in ("logprob_new", "rank_new")},
        "paraphrase_fact": file.paraphrase_fact,
        "paraphrase_known": file.values("paraphrase/known"),
        "paraphrase_changed": file.values("paraphrase/changed"),
        "scores": {name: file.values(f"scores/{name}")[:, made] for name in SCORES},
    }
    names = [each.name for each in fields(EditArrays)]
    return EditArrays(**{name: file.values(name) for name in names if name not in given} | given)


def edit_numbers(file: EditsFile) -> Whole:
    """The number of each edit that was made among those planned, (n,), from 0."""
    # The targets of edits that were never made are asked for, too.
    planned = np.arange(file.values("rank_new").shape[1])
    made = np.delete(planned, file.values("kept_out/number"))
    return made[: len(file.values("edited"))]


def passes(run: EditArrays) -> Iterator[tuple[int, slice, Mask]]:
    """Every pass but the first: its number, the edits in force, and the facts it tests."""
    tested = tested_facts(run)
    for number in range(1, len(run.step)):
        made = int(run.step[number])
        yield number, slice(made - 1 if run.single else 0, made), tested[number]


def tested_facts(run: EditArrays) -> Mask:
    """The known facts that no edit is about, (s, m); of a single edit's pass, not this one."""
    about = np.tile(run.about.any(axis=0), (len(run.step), 1))
    if run.single:
        about[1:] = run.about[run.step[1:] - 1]
    return np.asarray(run.known & ~about)
