"""The `kscli` command: its sub-commands, and where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import textwrap
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperArgument, TyperGroup
from typer.exceptions import TyperException

from kscli import __version__
from kscli.cli import stderr
from kscli.cli.commands import COMMANDS, PLAIN, load_command
from kscli.errors import KscliError, is_out_of_memory


class _Group(TyperGroup):
    """Imports a command when it is asked for, and turns its errors into messages and exit codes.

    With `debug` the traceback of an error is shown before its message.
    """

    debug = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            if kwargs.get("standalone_mode", True):
                sys.exit(code)
            return code
        except KscliError as error:
            if self.debug:
                traceback.print_exc()
            _fail(str(error), error.exit_code)
        except TyperException as error:
            from kscli.cli.remedies import usage_mistake

            if error.message.startswith("Usage: "):  # a group without a command shows its help
                typer.echo(error.message, err=True)
                sys.exit(error.exit_code)
            _fail(usage_mistake(error), error.exit_code)
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
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    **PLAIN,
)


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", help="With --version: show those of PyTorch, CUDA and others, too."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="KSCLI_DEBUG",
            show_envvar=False,
            help="Show the traceback of an error, for a report of it.",
        ),
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

    Every option can also be given by a variable, as KSCLI_MODEL or KSCLI_MAX_LENGTH, or in
    kscli.toml or [tool.kscli] of pyproject.toml, of the nearest folder upward. The command line
    wins over a variable, and a variable over the file (`kscli guide settings`).
    """
    context.command.debug = debug  # type: ignore[attr-defined]
    if version:
        print_version(verbose=verbose)
    elif context.invoked_subcommand is None:
        context.fail("Missing command.")


def print_version(*, verbose: bool) -> None:
    """Print the version; if verbose, of what it runs on as well, one line each."""
    typer.echo(f"kscli {__version__}")
    if not verbose:
        return
    import platform
    from importlib.metadata import version

    import torch

    typer.echo(f"Python {platform.python_version()}, {platform.platform()}")
    typer.echo(f"torch {torch.__version__}")
    typer.echo(f"CUDA {torch.version.cuda or 'none'}: {cuda_devices()}")
    for name in ("transformers", "datasets", "tokenizers", "huggingface-hub", "numpy", "h5py"):
        typer.echo(f"{name} {version(name)}")


def cuda_devices() -> str:
    """The names of the CUDA devices that PyTorch sees."""
    import torch

    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return ", ".join(names) or "no device"


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
