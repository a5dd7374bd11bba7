"""The `kscli` command: its sub-commands, and where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperArgument, TyperGroup

from kscli import __version__
from kscli.cli import stderr
from kscli.cli.commands import COMMANDS, PLAIN, load_command
from kscli.errors import KscliError, is_out_of_memory


class _Group(TyperGroup):
    """Imports a command when it is asked for, and turns its errors into messages and exit codes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except KscliError as error:
            _fail(str(error), error.exit_code)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _fail(": ".join(["out of memory", *str(error).splitlines()[:1]]))
        except BrokenPipeError:
            sys.exit(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
        except SystemExit as error:
            # Rich and Typer exit with 1 where whoever read stdout has enough.
            if isinstance(error.__context__, BrokenPipeError):
                sys.exit(0)
            raise


def _fail(text: str, code: int = 1) -> NoReturn:
    from kscli.cli.console import print_error

    with contextlib.suppress(OSError):
        print_error(text)
    sys.exit(code)


# An option's name is not broken at its hyphens.
textwrap.TextWrapper.wordsep_re = textwrap.TextWrapper.wordsep_simple_re
# The type of an argument, such as <list[Path]>, says nothing that its name does not.
TyperArgument.display_type_rich = lambda self, ctx: None  # type: ignore[method-assign]
app = typer.Typer(
    name="kscli",
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    **PLAIN,
)


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

    p(i, j) = k_i' C^-1 k_j / k_i' C^-1 k_i says how far two facts share directions in the key
    space of an MLP, and so what an edit of fact i does to fact j.

    `kscli run` does everything at once, on the embedded model or on yours. The stages are
    cache-cov, extract, pmatrix, stats, topk and plot. Each stage reads and writes HDF5 files in
    DIR/MODEL/.

    \b
    Examples:
      kscli run
      kscli run -m gpt2-small --samples 20000
      kscli topk -m gpt2-small --layer 0
    """


def main() -> None:
    """Run the command line."""
    # What there is to say, kscli says itself; other libraries' bars, logs and warnings would
    # stand between the user and it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.CRITICAL)
    # Threads that spin while they wait make a shared machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    _open_closed_streams()
    stderr.install()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="kscli")
    finally:
        _discard_unwritten()


def _open_closed_streams() -> None:
    """Put /dev/null where the shell closed a standard stream.

    The next file that is opened would get the stream's number, and what is printed to it. Only
    stdout complains when written to, for results that get lost are an error.
    """
    for name, mode, flags in (
        ("stdin", "r", os.O_RDONLY),
        ("stdout", "w", os.O_RDONLY),
        ("stderr", "w", os.O_WRONLY),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))


def _discard_unwritten() -> None:
    """Drop what stdout did not take: it was reported, and would be again at the very end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
