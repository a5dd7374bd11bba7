"""The `kscli` command: its sub-commands, and where errors become messages and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kscli import __version__
from kscli.cli import (
    cache_cov,
    export_cov,
    extract,
    import_cov,
    models,
    plot,
    pmatrix,
    run,
    show,
    stats,
    topk,
)
from kscli.errors import KscliError

INTERRUPTED = 130
TERMINATED = 143


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C but for the exit code."""


class _Group(TyperGroup):
    """Turns what a command raises for its user into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KscliError as error:
            raise _failed(str(error), error.exit_code) from error
        except _TerminatedError as error:
            raise _failed("terminated; nothing half-made was left behind.", TERMINATED) from error
        except KeyboardInterrupt as error:
            raise _failed("interrupted; nothing half-made was left behind.", INTERRUPTED) from error
        except BrokenPipeError as error:
            # Whoever read stdout has enough; what is still buffered has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except MemoryError as error:
            raise _failed("out of memory.", 1) from error
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _failed(f"{where}{error.strerror or error}", 1) from error


def _failed(text: str, code: int) -> typer.Exit:
    from kscli.cli.console import print_error

    print_error(text)
    return typer.Exit(code)


app = typer.Typer(
    name="kscli",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    run,
    cache_cov,
    extract,
    pmatrix,
    stats,
    topk,
    plot,
    models,
    show,
    export_cov,
    import_cov,
):
    command.register(app)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"kscli {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Measure knowledge superposition in language models.

    How far two facts share directions in an MLP's key space, and so what an edit of one does to
    the other: p(i, j) = k_i' C^-1 k_j / k_i' C^-1 k_i.

    [bold]kscli run[/bold] does everything at once on the embedded model; the stages are
    cache-cov, extract, pmatrix, stats, topk and plot, each of which reads and writes HDF5 files
    in DIR/MODEL/.
    """


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def main() -> None:
    """Run the command line."""
    # What there is to say, kscli says itself; other libraries' bars, logs and warnings would
    # stand between the user and it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.CRITICAL)
    # Threads that spin while they wait make a shared machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="kscli")
