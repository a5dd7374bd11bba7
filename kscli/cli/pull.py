"""`kscli pull`."""

from __future__ import annotations

from pathlib import Path

from kscli.cli import options


def pull(
    repository: options.Repository,
    model: options.ModelInRepository = None,
    only: options.OnlyKinds = None,
    layers: options.LayersOfC = "all",
    revision: options.RepositoryRevision = None,
    directory: options.Dir = Path("artifacts"),
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Take a model's artifacts out of a data set repository of the Hub that `kscli push` wrote.

    Of C only the layers of --layers are fetched. All is checked before it is put in place: the
    SHA-256, the seal, that the layers are of one run, and that they are of the model. A file that
    is there already is left, and another one in its place needs --force.

    Examples:
      kscli pull someone/covariances -m gpt-j --layers 3-8
      kscli pull someone/covariances -m gpt-j --only cov --only keys --revision v1
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.hub.sharing import Selection
    from kscli.hub.sharing import pull as pull_files

    reporter = ConsoleReporter(quiet=quiet)
    pulled = pull_files(
        repository,
        directory,
        model,
        Selection(tuple(only or ()), layers),
        revision=revision,
        force=force,
        reporter=reporter,
    )
    for path, holding in pulled:
        reporter.note(
            f"wrote {path}, of {repository}, to which a file of fingerprint {holding.fingerprint} "
            "was pushed."
        )
