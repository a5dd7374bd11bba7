"""How figures name runs of edits."""

from __future__ import annotations

from collections.abc import Sequence

from kscli.editing.edits_file import EditsFile
from kscli.figures.style import Names, names
from kscli.layers import layers_text

# Of a run's name, what a title gives though it is the same in all runs.
_ALWAYS = 4


def run_names(runs: Sequence[EditsFile], given: Sequence[str] = ()) -> Names:
    """What all runs have in common, and what tells each apart, their files where nothing else.

    The names that were `given`, one a run, stand in the place of what tells them apart.
    """
    parts = [_parts(run) for run in runs]
    shared = names([part[:_ALWAYS] for part in parts]).shared
    own = names(parts).own
    if len(runs) > 1 and len(set(own)) < len(runs):
        own = tuple((*each, run.path.stem) for each, run in zip(own, runs, strict=True))
    if given:
        own = tuple((name,) for name in given)
    return Names(shared, own)


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
