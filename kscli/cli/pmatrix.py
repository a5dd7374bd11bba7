"""`kscli pmatrix`."""

from __future__ import annotations

from pathlib import Path

from kscli.cli import options


def pmatrix(
    model: options.ModelOrNone = None,
    cov: options.Cov = None,
    keys: options.Keys = None,
    layers: options.Layers = "all",
    ridge: options.Ridge = 0.0,
    directory: options.Dir = Path("artifacts"),
    output: options.Output = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute P[i, j] = k_i' C^-1 k_j / k_i' C^-1 k_i for all pairs of facts, and the cosines.

    Reads cov.h5 and keys.h5, loads no model, writes pmatrix.h5.

    Examples:
      kscli pmatrix -m gpt2-small
      kscli pmatrix --cov other/cov.h5 --keys artifacts/gpt2-small/keys.h5 -o other/pmatrix.h5
    """
    from kscli.artifacts import CovarianceFile, Existing, KeysFile
    from kscli.cli.console import ConsoleReporter
    from kscli.layers import select_layers
    from kscli.places import Places
    from kscli.superposition import write_pmatrix

    reporter = ConsoleReporter(quiet=quiet)
    if model is None and keys is not None:
        with KeysFile(keys) as facts:
            model = facts.model
    places = Places(directory, model or options.DEFAULT_MODEL)
    path = output or places.path("pmatrix")
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
            existing=Existing.FORCE if force else Existing.REFUSE,
            reporter=reporter,
        ):
            reporter.note(f"wrote {path}")
