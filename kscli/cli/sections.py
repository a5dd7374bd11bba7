"""The sections of a help page of many options: which there are, and what stands in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typer.core import TyperCommand

MANY = 15  # a page of more options has sections
OWN = "Options"
"""The section of the options that are named in no other."""
SECTIONS: dict[str, str] = {
    "Model and layers": "model layer layers editor",
    OWN: "",
    "Facts, edits and keys": "prompt subject target target-new fact edits order facts count "
    "prompt-field subject-field target-field token contexts",
    "Editor": "method preset protocol batch keep weight",
    "The value that is written": "value value-norm steps learning-rate weight-decay kl-weight "
    "likelihood-weight norm-limit",
    "C": "ridge null-space relative-null-space",
    "Protection of other facts": "protect protect-at protect-ridge max-price",
    "Measurements": "measure-every moved generations",
    "Text": "corpus held-out held-out-tokens text-field shuffle samples tokens max-length "
    "until-settled shard",
    "How the model is loaded and run": "device dtype revision trust-remote-code allow-pickle "
    "merge-adapter batch-tokens max-memory checkpoint-every dry-run",
    "Seed, files and output": "seed cov keys pmatrix dir output save-model force format quiet help",
}


def sections(command: TyperCommand, context: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The headings of a command's help page, and under each the options and what they mean.

    Options are as wide in every section, so that what they mean is one column.
    """
    section_of = {
        f"--{name}": heading for heading, names in SECTIONS.items() for name in names.split()
    }
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{each: [] for each in SECTIONS}}
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            named = [section_of[name] for name in parameter.opts if name in section_of]
            is_option = parameter.param_type_name == "option"
            found[[*named, OWN][0] if is_option else "Arguments"].append(record)
    widest = max(len(name) for records in found.values() for name, _ in records)
    for heading, records in found.items():
        if records:
            yield heading, [(name.ljust(min(widest, 30)), meaning) for name, meaning in records]
