"""The options that commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kscli.cli.complete import complete_editor, complete_layers, complete_model
from kscli.cli.output import Format
from kscli.editing.editors import EDITORS, editors_where, find_editor
from kscli.layers import require_understood
from kscli.records import known_formats
from kscli.resources import require_device_name

DEFAULT_MODEL = "tiny"
_LARGEST_SEED = 2**63 - 1  # what a file has room for


# Values that need no model to be wrong are refused before anything large is imported.


def _check_model(value: str | list[str] | None) -> str | list[str] | None:
    if value is not None and "" in ([value] if isinstance(value, str) else value):
        raise typer.BadParameter("it is empty; name a model.")
    return value


def _check_layers(value: str | None) -> str | None:
    if value is not None:
        require_understood(value)
    return value


def _check_folder(value: Path) -> Path:
    if value.exists() and not value.is_dir():
        raise typer.BadParameter(f"{value} is a file; name a folder.")
    return value


def _check_device(value: str) -> str:
    require_device_name(value)
    return value


def _check_editor(value: str | None) -> str | None:
    if value is not None:
        find_editor(value)
    return value


def _check_seed(value: int) -> int:
    if 0 <= value <= _LARGEST_SEED:
        return value
    raise typer.BadParameter(f"{value} is not in the range from 0 to {_LARGEST_SEED}.")


def _model(help_: str, default: str | bool = True) -> Any:
    return typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help=help_,
        show_default=default,
        callback=_check_model,
        autocompletion=complete_model,
    )


def _layer(help_: str, default: str | bool = True) -> Any:
    return typer.Option(
        "--layer",
        "--layers",
        metavar="LAYERS",
        help=help_,
        show_default=default,
        callback=_check_layers,
        autocompletion=complete_layers,
    )


def _file(name: str, help_: str, default: str | bool = True) -> Any:
    return typer.Option(name, metavar="FILE", help=help_, show_default=default)


def _output(help_: str, default: str | bool = True) -> Any:
    return typer.Option("--output", "-o", metavar="FILE", help=help_, show_default=default)


# Models and artifacts

Model = Annotated[
    str, _model("An alias (see `kscli models`), a Hub id, a local folder or a .gguf file.")
]
Models = Annotated[
    list[str] | None,
    _model("The model whose artifacts are read. Give it again for several models.", "tiny"),
]
ModelOrNone = Annotated[
    str | None, _model("The model whose artifacts are read and written.", "tiny")
]
Dir = Annotated[
    Path,
    typer.Option(
        "--dir",
        metavar="DIR",
        envvar="KSCLI_DIR",
        help="The folder that holds the artifacts of all models.",
        callback=_check_folder,
    ),
]
Cov = Annotated[Path | None, _file("--cov", "The cov.h5 to read.", "DIR/MODEL/cov.h5")]
Keys = Annotated[Path | None, _file("--keys", "The keys.h5 to read.", "DIR/MODEL/keys.h5")]
PMatrix = Annotated[
    Path | None, _file("--pmatrix", "The pmatrix.h5 to read.", "DIR/MODEL/pmatrix.h5")
]
PMatrices = Annotated[
    list[Path] | None,
    _file("--pmatrix", "A pmatrix.h5 to read instead of --model. Give it again for several files."),
]
Output = Annotated[Path | None, _output("The file to write.", "in DIR/MODEL/")]
PageOutput = Annotated[
    Path | None,
    _output("The page to write.", "DIR/MODEL/report.html; of several models DIR/report.html"),
]
FigureOutput = Annotated[
    Path | None,
    _output("The .png, .svg or .pdf file to write.", "DIR/MODEL/figures/KIND.png"),
]
EditsOutput = Annotated[
    Path | None, _output("The file to write.", "DIR/MODEL/edits/METHOD-LAYERS-SEED.h5")
]
FactsOutput = Annotated[Path, _output("The .jsonl file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Note = Annotated[
    str | None,
    typer.Option(
        "--note",
        metavar="TEXT",
        help="A text that is kept in the file. Say what the files themselves do not tell: the "
        "corpus, its date, the length limit.",
    ),
]

# Repositories of artifacts

Repository = Annotated[
    str, typer.Argument(metavar="OWNER/NAME", help="A data set repository of the Hub.")
]
RepositoryRevision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="A branch, tag or commit of the repository."),
]
ModelInRepository = Annotated[
    str | None,
    _model("The model whose artifacts are fetched.", "the only one that the repository holds"),
]
OnlyKinds = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="KIND",
        help="Only this kind of file: cov, keys, pmatrix or stats. Give it again for several.",
        show_default="all that there are",
    ),
]
LayersOfC = Annotated[
    str, _layer("The layers of C: all, 0, 0,3,5-8 or -1 (the last). Other files are not divided.")
]

# How the model is loaded and run

Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
        callback=_check_device,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16. auto is bfloat16 where the hardware multiplies "
        "it fast (CUDA from Ampere on, CPUs with AVX-512-BF16 or AMX), and float32 elsewhere and "
        "for tiny.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="The branch, tag or commit of a Hub model."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code in the model's repository."),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pickled weights, which can run code."),
]
MergeAdapter = Annotated[
    bool,
    typer.Option(
        "--merge-adapter",
        help="Merge the adapter (LoRA and others of peft) in the model's folder or repository into "
        "the weights. Where it is alone, its base model is loaded.",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        min=1,
        help="The most tokens in a batch, padding included.",
        show_default="by model, dtype and device",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="The most memory to use on the device (on a CPU: by this process), for example 24GiB.",
        show_default="what is free",
    ),
]
CheckpointEvery = Annotated[
    float,
    typer.Option(
        "--checkpoint-every",
        metavar="SECONDS",
        min=0.0,
        help="The time between two checkpoints. It is at least 20 times the time that saving one "
        "takes.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only print the plan: what memory holds, the number of passes, the time.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no notes.")]
OutputFormat = Annotated[
    Format, typer.Option("--format", "-f", help="How results are printed on stdout.")
]

# The corpus

Corpus = Annotated[
    str | None,
    typer.Option(
        "--corpus",
        metavar="CORPUS",
        help="wikipedia, wikipedia-20220301, tiny, hf:OWNER/NAME[:CONFIG[:SPLIT]], - for stdin, or "
        f"a file, folder or quoted pattern of {known_formats()}, or of JSON Lines or "
        "WikiExtractor's documents under any name.",
        show_default="wikipedia; tiny for the model tiny",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="FIELD",
        help="The field of a document that holds its text; text.en is the field en inside text.",
        show_default="text",
    ),
]
Shuffle = Annotated[
    str | None,
    typer.Option(
        "--shuffle",
        metavar="SEED|none",
        help="Draw the documents in the random order of a seed, instead of the first ones.",
        show_default="0 for a data set of the Hub; none for others",
    ),
]
Samples = Annotated[
    str, typer.Option("--samples", metavar="N|all", help="The most documents to read.")
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
        help="Cut every document at N tokens.",
        show_default="the model's positions, 2048 at most",
    ),
]
UntilSettled = Annotated[
    float | None,
    typer.Option(
        "--until-settled",
        metavar="TOL",
        help="Stop when the estimated error of p (root mean square) is at most TOL. It is "
        "estimated each time the number of tokens has doubled.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Read only the documents I, I+N, I+2N, ...; `kscli merge-cov` adds the parts up.",
    ),
]

# Facts, keys and P

Facts = Annotated[
    str | None,
    typer.Option(
        "--facts",
        metavar="FACTS",
        help="counterfact, tiny, hf:OWNER/NAME[:CONFIG[:SPLIT]], or a file of records of "
        "CounterFact, zsRE, KnowEdit, MQuAKE or known_1000, or of prompt (with {}), subject, "
        f"target: {known_formats(fields=True)}.",
        show_default="counterfact; tiny for the model tiny; those in an edited model's folder",
    ),
]


def _field(name: str, what: str) -> Any:
    return typer.Option(
        f"--{name}-field",
        metavar="NAME",
        help=f"The field of the facts' records that holds {what}.",
        show_default=name,
    )


PromptField = Annotated[
    str | None, _field("prompt", "the prompt, with {} or with the subject itself")
]
SubjectField = Annotated[str | None, _field("subject", "the subject")]
TargetField = Annotated[str | None, _field("target", "the target")]
Count = Annotated[
    str | None,
    typer.Option(
        "--count",
        metavar="N|all",
        help="Take the first N facts.",
        show_default="128, or all if there are fewer",
    ),
]
HowMany = Annotated[
    str, typer.Option("--count", metavar="N|all", help="The number of facts to take.")
]
Token = Annotated[
    Literal["subject-last", "subject-first", "last"],
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="The token at which keys are read: subject-last, subject-first or last (of the "
        "prompt).",
    ),
]
Contexts = Annotated[
    str | None,
    typer.Option(
        "--contexts",
        metavar="FILE|N",
        help="The context templates: keys are averaged over them too, as editors do. A file of "
        "texts, one a line, with {} for the prompt; or the number of texts of 10 tokens that the "
        "model makes up (context_templates, context_template_length_params).",
        show_default="20 as ROME has them, made up",
    ),
]
ContextsOfMean = Annotated[
    str | None,
    typer.Option(
        "--contexts",
        metavar="FILE|N",
        help="The texts over which an editor's mean key is taken, the bare prompt among them: a "
        "file with {} for the prompt, or the number of texts that the model makes up.",
        show_default="0",
    ),
]
Layers = Annotated[
    str,
    typer.Option(
        "--layers",
        "--layer",
        metavar="LAYERS",
        help="all, 0, 0,3,5-8 or -1 (the last).",
        callback=_check_layers,
        autocompletion=complete_layers,
    ),
]
_LAYER = "0, -1 (the last), 0,3,5-8 or all."
LayerOfPairs = Annotated[str | None, _layer(_LAYER, "0; all with --strongest")]
LayerOfRisk = Annotated[
    str | None,
    _layer(f"The layer to edit: {_LAYER}", "that of `kscli edit`; all with --by-layer"),
]
LayerOfFigure = Annotated[str | None, _layer(_LAYER, "what shows the kind best")]
EditedLayer = Annotated[
    str | None,
    _layer(
        "The layer to edit. Several, as in 3-7, with --method "
        f"{editors_where(lambda editor: editor.over_layers)}.",
        "the published one; else by the depth, see `kscli editors`",
    ),
]
Ridge = Annotated[
    float,
    typer.Option(
        "--ridge",
        metavar="LAMBDA",
        min=0.0,
        help="Add LAMBDA (tr C / d_m) I to C. 0 leaves C as it was measured.",
    ),
]
TopPairs = Annotated[
    int,
    typer.Option(
        "-k", metavar="K", min=1, help="The number of pairs to take, the strongest first."
    ),
]
TopFacts = Annotated[
    str,
    typer.Option(
        "-k", metavar="K|all", help="How many facts to list at each layer, the foremost first."
    ),
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        metavar="N",
        min=100,
        help="The number of bootstrap samples that give an interval.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        callback=_check_seed,
        help="The seed of all that is drawn at random. The same seed gives the same result.",
    ),
]

# Edits

Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="EDITOR",
        help="The editor. " + " ".join(f"{name}: {find_editor(name).title}." for name in EDITORS),
        callback=_check_editor,
        autocompletion=complete_editor,
    ),
]
EditorOfP = Annotated[
    str | None,
    typer.Option(
        "--editor",
        metavar="EDITOR",
        help="Show p of this editor, from the file that `kscli pmatrix --editor` makes.",
        show_default="the paper's P",
        callback=_check_editor,
        autocompletion=complete_editor,
    ),
]
WEIGHTED = editors_where(lambda editor: editor.direction.weight is not None)
NULL_SPACE = editors_where(lambda editor: editor.direction.metric == "null-space")
Weight = Annotated[
    float | None,
    typer.Option(
        "--weight",
        metavar="X",
        min=0.0,
        help=f"({WEIGHTED}) The weight lambda of what the model knew (mom2_update_weight; "
        "emmet: times emmet_lambda; alphaedit: L2).",
        show_default="by editor and model, see `kscli editors`",
    ),
]
Protect = Annotated[
    str | None,
    typer.Option(
        "--protect",
        metavar="known|all|FACTS",
        help="Leave the values of other facts where they are: of those that the model knows, of "
        "all in keys.h5, or of a file's.",
    ),
]
ProtectAt = Annotated[
    Literal["tokens", "subject"],
    typer.Option(
        "--protect-at",
        help="tokens: the keys of all tokens of each prompt and its target are protected. subject: "
        "the key of the subject's last token alone.",
    ),
]
ProtectRidge = Annotated[
    float | None,
    typer.Option(
        "--protect-ridge",
        metavar="X",
        min=0.0,
        help="Protect less exactly, at a lower price: X times the protected keys' median k^T C^-1 "
        "k is added to each. 0 is exact.",
        show_default="0.1; 0 with --protect-at subject",
    ),
]
MaxPrice = Annotated[
    float | None,
    typer.Option(
        "--max-price",
        metavar="X",
        help="Leave facts unprotected until no edit changes more than X times as much in all text "
        "as a plain one.",
        show_default="no limit",
    ),
]
NullSpace = Annotated[
    float | None,
    typer.Option(
        "--null-space",
        metavar="X",
        min=0.0,
        help=f"({NULL_SPACE}) Write in the span of the singular vectors of C whose singular "
        "value is below X (nullspace_threshold).",
        show_default="0.02",
    ),
]
RelativeNullSpace = Annotated[
    float | None,
    typer.Option(
        "--relative-null-space",
        metavar="X",
        min=0.0,
        help=f"({NULL_SPACE}) The same, below X times the mean singular value of C.",
    ),
]
EditedFacts = Annotated[
    list[str] | None,
    typer.Option(
        "--fact",
        metavar="SUBJECT|INDEX",
        help="A fact of pmatrix.h5 to edit. A subject stands for all its facts. Give it again for "
        "several facts.",
        show_default="those that --edits draws",
    ),
]
EditCount = Annotated[
    str,
    typer.Option(
        "--edits",
        metavar="N|all",
        help="Without --fact: edit this many facts, drawn with --seed. `kscli edit` and "
        "`kscli risk` draw the same facts.",
    ),
]
Order = Annotated[
    Literal["given", "random", "norm"],
    typer.Option(
        "--order",
        help="The order of the edits. norm: by ascending leverage, which interferes least.",
    ),
]
