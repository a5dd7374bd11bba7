"""The options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kscli.cli.complete import (
    complete_layers,
    complete_model,
)
from kscli.cli.output import Format

DEFAULT_MODEL = "tiny"
_LARGEST_SEED = 2**63 - 1  # what a file has room for


def seed(what: str) -> Any:
    """The option --seed, of `what`."""
    return typer.Option("--seed", metavar="N", callback=_check_seed, help=what)


def _check_seed(value: int) -> int:
    if 0 <= value <= _LARGEST_SEED:
        return value
    raise typer.BadParameter(f"{value} is not in the range from 0 to {_LARGEST_SEED}.")


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="An alias (see `kscli models`), Hub id, local folder or .gguf file.",
        autocompletion=complete_model,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A model whose artifacts are read; give it again for several.",
        show_default="tiny",
        autocompletion=complete_model,
    ),
]
ModelOrNone = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The model whose artifacts are read and written.",
        show_default="tiny",
        autocompletion=complete_model,
    ),
]
Dir = Annotated[
    Path,
    typer.Option("--dir", envvar="KSCLI_DIR", help="The folder of all models' artifacts."),
]
Layers = Annotated[
    str,
    typer.Option(
        "--layers",
        metavar="LAYERS",
        help="all, 0, 0,3,5-8 or -1 (the last).",
        autocompletion=complete_layers,
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16. auto: bfloat16 where the hardware multiplies it "
        "fast (CUDA from Ampere on, CPUs with AVX-512-BF16 or AMX), else float32.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="A Hub model's branch, tag or commit."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the model's repository brings."),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pickled weights, which can run code."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The file to write.",
        show_default="in DIR/MODEL/",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
OutputFormat = Annotated[
    Format, typer.Option("--format", "-f", help="How results are printed on stdout.")
]
Corpus = Annotated[
    str | None,
    typer.Option(
        "--corpus",
        metavar="CORPUS",
        help="wikipedia, wikipedia-20220301, tiny, hf:OWNER/NAME[:CONFIG[:SPLIT]], a file or "
        "folder of .txt .jsonl .json .csv .parquet (.gz, .zst), or - for stdin.",
        show_default="wikipedia; tiny for the model tiny",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="FIELD",
        help="The field that holds the text.",
        show_default="text",
    ),
]
Samples = Annotated[
    str,
    typer.Option("--samples", metavar="N|all", help="How many documents are read at most."),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", min=1, help="Stop after N tokens.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="N",
        min=1,
        help="Documents are cut at N tokens.",
        show_default="the model's positions, 2048 at most",
    ),
]
UntilSettled = Annotated[
    float | None,
    typer.Option(
        "--until-settled",
        metavar="TOL",
        help="Stop as soon as p is settled to TOL (rms), looked at as the tokens double.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Take documents I, I+N, I+2N, ...; `kscli merge-cov` adds the parts up.",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        min=1,
        help="Tokens in a batch at most, padding included.",
        show_default="by model, dtype and device",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Bound the device's memory (on a CPU: this process's), as in 24GiB.",
        show_default="what is free",
    ),
]
CheckpointEvery = Annotated[
    float,
    typer.Option(
        "--checkpoint-every",
        metavar="SECONDS",
        min=0.0,
        help="Save what is summed so often, or 20 times as long as saving takes.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what goes where, the passes and the time, and stop."),
]
Facts = Annotated[
    str | None,
    typer.Option(
        "--facts",
        metavar="FACTS",
        help="counterfact, tiny, hf:OWNER/NAME[:CONFIG[:SPLIT]], or a file: CounterFact's JSON, or "
        "CSV or JSONL of prompt (with {}), subject, target.",
        show_default="counterfact; tiny for the model tiny",
    ),
]
Count = Annotated[
    str | None,
    typer.Option(
        "--count",
        metavar="N|all",
        help="Take the first N facts.",
        show_default="128, or all if there are fewer",
    ),
]
Token = Annotated[
    Literal["subject-last", "subject-first", "last"],
    typer.Option(
        "--token", metavar="TOKEN", help="The key's token: subject-last, subject-first or last."
    ),
]
Ridge = Annotated[
    float,
    typer.Option(
        "--ridge",
        metavar="LAMBDA",
        min=0.0,
        help="Use C + LAMBDA (tr C / d_m) I. 0: C as it was measured.",
    ),
]
