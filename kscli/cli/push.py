"""`kscli push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kscli.cli import options


def push(
    repository: options.Repository,
    model: options.ModelOrNone = None,
    only: options.OnlyKinds = None,
    layers: options.LayersOfC = "all",
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, where it is new.")
    ] = False,
    directory: options.Dir = Path("artifacts"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Put a model's artifacts into a data set repository of the Hub, for others to pull.

    The repository is made if it does not exist. C goes layer by layer, so that others can take
    single layers. A card (README.md) says what the files are, and kscli.json has their SHA-256.
    Needs a token that may write (`hf auth login`, or HF_TOKEN). The files say in their attributes
    with which command they were made, paths included, and that is passed on too.

    Examples:
      kscli push me/covariances -m gpt-j
      kscli push me/covariances -m gpt-j --only cov --layers 3-8 --private
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.hub.sharing import Selection
    from kscli.hub.sharing import push as push_files
    from kscli.places import Places

    reporter = ConsoleReporter(quiet=quiet)
    places = Places(directory, model or options.DEFAULT_MODEL)
    selection = Selection(tuple(only or ()), layers)
    commit = push_files(
        repository, places, selection, private=private, force=force, reporter=reporter
    )
    if commit is None:
        reporter.note(f"{repository} holds all of it already.")
    else:
        reporter.note(f"wrote {places.folder.name} to {repository}, commit {commit}.")
