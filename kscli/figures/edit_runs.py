"""What the figures of runs of edits share: how runs are named, and what is read from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kscli.editing.edits_file import EditsFile
from kscli.figures.style import Names, layers_text, names

# Of a run's name, what a title gives though it is the same in all runs.
_ALWAYS = 4


def run_names(runs: Sequence[EditsFile]) -> Names:
    """What all runs have in common, and what tells each apart, their files where nothing else."""
    parts = [_parts(run) for run in runs]
    shared = names([part[:_ALWAYS] for part in parts]).shared
    own = names(parts).own
    if len(runs) > 1 and len(set(own)) < len(runs):
        own = tuple((*each, run.path.stem) for each, run in zip(own, runs, strict=True))
    return Names(shared, own)


def is_sequence(run: EditsFile) -> bool:
    """Whether the edits were made one upon the other, and not each in the clean model."""
    return run.about.protocol == "sequential"


def is_edited(run: EditsFile) -> NDArray[np.bool_]:
    """Which facts were edited, (m,)."""
    edited = np.zeros(len(run.facts), dtype=bool)
    edited[run.values("edited")] = True
    return edited


def is_about(run: EditsFile) -> NDArray[np.bool_]:
    """Which facts an edit is about, (m,): those edited and their copies, facts of the same text."""
    edited = {run.facts[int(fact)].text for fact in run.values("edited")}
    return np.array([fact.text in edited for fact in run.facts], dtype=bool)


def _parts(run: EditsFile) -> tuple[str, ...]:
    about = run.about
    edits = "single edits" if about.protocol == "single" else "edits"
    return (
        run.model,
        about.method,
        layers_text(run.layers),
        f"{run.edits} {edits if run.edits > 1 else 'edit'}",
        f"{about.value} values",
        f"order {about.order}",
        f"seed {about.seed}",
        f"m = {len(run.facts)}",
    )
