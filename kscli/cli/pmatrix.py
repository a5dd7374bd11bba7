"""`kscli pmatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kscli.cli import options

if TYPE_CHECKING:
    from kscli.editing.editor_p import EditorOfP


def pmatrix(
    context: typer.Context,
    model: options.ModelOrNone = None,
    cov: options.Cov = None,
    keys: options.Keys = None,
    layers: options.Layers = "all",
    ridge: options.Ridge = 0.0,
    editor: Annotated[
        str | None,
        typer.Option(
            "--editor",
            metavar="EDITOR",
            help="Compute p of this editor instead, and write it to pmatrix-EDITOR.h5.",
            autocompletion=options.complete_editor,
        ),
    ] = None,
    weight: options.Weight = None,
    null_space: options.NullSpace = None,
    relative_null_space: options.RelativeNullSpace = None,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute P[i, j] = k_i' C^-1 k_j / k_i' C^-1 k_i for all pairs of facts, and the cosines.

    Reads cov.h5 and keys.h5, loads no model, writes pmatrix.h5.

    With --editor: p[i, j] = d_i' k_j. d_i is the direction along which that editor writes fact i
    alone, at one layer of the clean model, with the settings that are published for the model.
    Where the editor takes a mean of keys over contexts, it is over those in keys.h5. The other
    commands show this p with the same --editor.

    Examples:
      kscli pmatrix -m gpt2-small
      kscli pmatrix -m gpt-j --editor rome && kscli topk -m gpt-j --editor rome
      kscli pmatrix --cov other/cov.h5 --keys artifacts/gpt2-small/keys.h5 -o other/pmatrix.h5
    """
    from kscli.artifacts import CovarianceFile, Existing, KeysFile
    from kscli.cli.console import ConsoleReporter
    from kscli.layers import select_layers
    from kscli.places import Places
    from kscli.pmatrix import write_pmatrix

    reporter = ConsoleReporter(quiet=quiet)
    if model is None and keys is not None:
        with KeysFile(keys) as facts:
            model = facts.model
    places = Places(directory, model or options.DEFAULT_MODEL)
    cuts = (null_space, relative_null_space)
    of_editor = chosen_editor(context, places.model, editor, weight, cuts)
    path = output or places.path("pmatrix", of_editor.name if of_editor else "")
    with (
        CovarianceFile(cov or places.path("cov")) as moments,
        KeysFile(keys or places.path("keys")) as facts,
    ):
        if write_pmatrix(
            moments,
            facts,
            path,
            layers=select_layers(layers, facts.layers, str(facts.path)),
            ridge=ridge,
            editor=of_editor,
            existing=Existing.FORCE if force else Existing.REFUSE,
            reporter=reporter,
        ):
            if of_editor and of_editor.editor.contexts:
                count = len(facts.contexts)
                reporter.note(f"the mean keys of {of_editor.name} are over {count} contexts.")
            reporter.note(f"wrote {path}")


def chosen_editor(
    context: typer.Context,
    model: str,
    name: str | None,
    weight: float | None,
    cuts: tuple[float | None, float | None],
) -> EditorOfP | None:
    """The editor whose p is asked for, with its published settings; None where it is the paper's.

    Raises UsageError for an editor that is not known, and for an option that it has no use for.
    """
    from kscli.cli.requests import refuse_given
    from kscli.editing.editor_p import editor_of_p
    from kscli.editing.editors import PAPERS_EDITOR, find_editor, without_effect
    from kscli.editing.null_space import null_space_cut

    for names, reason in without_effect(find_editor(name or PAPERS_EDITOR)):
        refuse_given(context, names, reason)
    return editor_of_p(name, model, weight, null_space_cut(*cuts))
