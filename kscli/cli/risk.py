"""`kscli risk`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kscli.cli import options
from kscli.cli.output import FOR_MACHINES, Format, print_line, print_rows
from kscli.editing.editors import DEFAULT_EDITOR, find_editor
from kscli.tables import FACTS_MOVED, PRICES, RISK_BY_LAYER, sentence, sequence_columns

if TYPE_CHECKING:
    from kscli.artifacts import PMatrixFile
    from kscli.editing.predicted_damage import SequenceRisk

PASSED = 3
"""The exit code where --fail-above was passed."""


def risk(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    layer: options.LayerOfRisk = None,
    fact: options.EditedFacts = None,
    sequence: Annotated[
        bool,
        typer.Option("--sequence", help="Take the facts as edits made one after the other."),
    ] = False,
    edits: options.EditCount = "all",
    order: options.Order = "given",
    editor: options.EditorOfP = None,
    seed: options.Seed = 0,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer", help="Compare the layers, instead of the facts; so does --layers all."
        ),
    ] = False,
    price: Annotated[
        bool,
        typer.Option("--price", help="List what it costs to protect all other facts, by edit."),
    ] = False,
    k: options.TopFacts = "20",
    fail_above: Annotated[
        float | None,
        typer.Option(
            "--fail-above",
            metavar="X",
            min=0.0,
            help="Exit with 3 when the largest damage passes X, listed or not: |p| of an edit, in "
            "a sequence the expected shift of a fact, or with --price the price.",
        ),
    ] = None,
    pmatrix: options.PMatrix = None,
    directory: options.Dir = Path("artifacts"),
    quiet: options.Quiet = False,
    output_format: options.OutputFormat = Format.table,
) -> None:
    """Predict the damage of edits, before any edit is made.

    Reads pmatrix.h5 and loads no model. An edit adds delta to the value of the edited fact. It
    moves the value of another fact by p times delta. So every number here is for a delta of
    length 1.

    With --fact: the other facts, in the order of |p|.

    Without --fact, or with --sequence: what a sequence of edits does to every fact. "expected" is
    the shift if the deltas are independent (the root of the sum of p²). "worst" is the shift if all
    deltas point in one direction (the sum of |p|). All edits move a fact that is not edited. Only
    later edits move a fact that is edited itself.

    With --by-layer or --layers all: at which layer to edit. "rms p" is to the other facts, and
    "p to paraphrases" to the fact's own, which says how far an edit generalises. The layer that is
    chosen has the least rms p divided by p to paraphrases, of those that reach the answer: there
    an edit that moves the paraphrases by 1 moves other facts the least. Read it with care. Some
    layers need a longer delta than others. A late layer has few layers after it that can carry the
    edit from the subject to the answer. The last layer has none, so an edit there works only if the
    subject ends the prompt. `kscli verify --where` says how well p foretold what edits did.

    "price" is what it would cost to move no other fact at its subject (edit --protect all
    --protect-at subject): how many times as much as the plain edit such an edit changes in all
    text, the median over the edited facts. With --price: the same of each edit, the dearest first.
    "of all text" is the rms of p to all tokens of the corpus, 1 / the root of k' C^-1 k.

    p is that of the paper, of the bare prompts' keys. --editor takes p of another editor.

    Examples:
      kscli risk -m gpt2-small --layer 5 --fact "Patrick Rambaud"
      kscli risk -m gpt2-small --fact "Patrick Rambaud" --fact 17 --layers all
      kscli risk -m gpt2-small --layer 5 --price
      kscli risk -m gpt-j --layer 5 --edits 100 --seed 1
      kscli risk -m gpt-j --edits 100 -k all -f json | jq -r 'map(select(.edit)) |
      sort_by(.edit_norm)[].subject'
      kscli risk -m gpt-j --fact 17 --fail-above 0.5 -q && kscli edit -m gpt-j --fact 17
    """
    from kscli.cli.console import ConsoleReporter
    from kscli.cli.requests import number_or_all, open_pmatrices, pmatrix_paths, refuse_given
    from kscli.editing.choice import choose_facts, find_facts
    from kscli.editing.predicted_damage import other_facts
    from kscli.editing.presets import default_layers, preset_for
    from kscli.errors import UsageError
    from kscli.layers import select_layers

    if sum((by_layer, sequence, price)) > 1:
        raise UsageError("--by-layer, --price and --sequence are three lists; ask for one.")
    by_layer = by_layer or (layer == "all" and not sequence and not price)
    reporter = ConsoleReporter(quiet=quiet)
    listed, drawn = number_or_all("-k", k), number_or_all("--edits", edits)
    with ExitStack() as stack:
        named = [pmatrix] if pmatrix else None
        models = None if pmatrix else [model]
        (file,) = open_pmatrices(pmatrix_paths(models, named, directory, editor), stack)
        if layer is None:
            layer = "all"
            if not by_layer:
                method = editor or DEFAULT_EDITOR
                published = preset_for(method, file.about.model if pmatrix else model)
                layer, why = default_layers(find_editor(method), published, file)
                reporter.note(f"p is of layer {layer}, {why}; --layer names another.")
        layers = select_layers(layer, file.layers, str(file.path))
        m = len(file.facts)
        if by_layer or price or (fact and not sequence):
            refuse_given(context, ("order",), "without a sequence")
        if fact and order != "random":
            refuse_given(context, ("seed",), "with --fact")
        if fact:
            refuse_given(context, ("edits",), "with --fact")
            edited = find_facts(file.facts, fact, file.path)
        else:
            edited = choose_facts(file.facts, drawn, seed, file.path)
        others = other_facts(file)
        copies = m - len({each.text for each in file.facts})
        if copies:
            reporter.warn(
                f"{copies} of the {m} facts of {file.path} have the text of another one; what an "
                "edit does to its own copies is not counted."
            )
        if not others[edited].any():
            reporter.warn(f"{file.path} holds no other fact that an edit could damage.")
        if by_layer:
            largest = print_layers(file, layers, edited, output_format)
        elif price:
            largest = print_prices(file, layers, edited, listed, output_format)
        elif sequence or not fact:
            from kscli.editing.predicted_damage import sequence_risk

            risks = [sequence_risk(file, number, edited, order, seed) for number in layers]
            largest = print_sequences(file, risks, listed, output_format)
        else:
            largest = print_moved(file, layers, edited, listed, output_format)
    if fail_above is not None and largest > fail_above:
        what = "price" if price else "damage"
        reporter.warn(f"the largest {what}, {largest:.3f}, passes --fail-above {fail_above:g}.")
        raise typer.Exit(PASSED)


def print_moved(
    file: PMatrixFile,
    layers: Sequence[int],
    edited: Sequence[int],
    k: int | None,
    output_format: Format,
) -> float:
    """Print the facts that each edit would move; returns the largest damage."""
    from kscli.editing.predicted_damage import layer_rows, least_layer, moved_rows_of

    of_layers = layer_rows(file, file.layers, edited)
    least = least_layer(of_layers)
    rows = moved_rows_of(file, layers, edited, k, of_layers)
    one = len(edited) == 1
    moves = f"What an edit of one fact moves{of_editor(file)}"
    title = f"{moves}: {sentence_of(file, edited[0])}" if one else ""
    print_rows(rows, FACTS_MOVED, output_format, title)
    by_number = {row["layer"]: row for row in of_layers}
    if output_format is Format.table and least is not None:
        others = [each for each in layers[:3] if each != least]
        here = ", ".join(f"{by_number[each]['rms']:.3f} at layer {each}" for each in others)
        print_line(
            f"Of the layers, {least} would do the least to the others: rms p "
            f"{by_number[least]['rms']:.3f}, per unit of |delta|"
            + (f"; it is {here}. " if here else ". ")
            + "See --by-layer."
        )
    return largest_of(by_number[number]["largest"] for number in layers)


def of_editor(file: PMatrixFile) -> str:
    """Whose p a table is of, to go on its title with; the paper's needs no word."""
    return f" by p of {file.about.editor}" if file.about.editor else ""


def sentence_of(file: PMatrixFile, index: int) -> str:
    """A fact of the file as the paper writes it."""
    from kscli.analysis.pairs import pair_facts

    return sentence(pair_facts(file.facts, index, index), "i")


def print_layers(
    file: PMatrixFile, layers: Sequence[int], edited: Sequence[int], output_format: Format
) -> float:
    """Print what each layer would do; returns the largest damage."""
    from kscli.editing.predicted_damage import least_layer, priced_layer_rows

    rows = priced_layer_rows(file, layers, edited)
    whose = of_editor(file)
    title = (
        f"What an edit moves{whose}, by its layer: {sentence_of(file, edited[0])}"
        if len(edited) == 1
        else f"What an edit of each of {len(edited)} facts moves{whose}, by its layer"
    )
    print_rows(rows, RISK_BY_LAYER, output_format, title)
    chosen = next((row for row in rows if row["chosen"]), None)
    if output_format is Format.table and chosen:
        print_line(
            f"Edit layer {chosen['layer']}: to move a fact's paraphrases by 1, an edit there moves "
            f"other facts by {chosen['ratio']:.3f} in root mean square, the least of the layers "
            "that reach the answer."
        )
    elif output_format is Format.table and (least := least_layer(rows)) is not None:
        print_line(
            f"An edit of layer {least} moves other facts least. Whether the model says the new "
            "target then, and in other words too, this does not tell: the facts have no "
            "paraphrases, of which keys would say how far an edit goes."
        )
    return largest_of(row["largest"] for row in rows)


def print_prices(
    file: PMatrixFile,
    layers: Sequence[int],
    edited: Sequence[int],
    k: int | None,
    output_format: Format,
) -> float:
    """Print what it costs each edit to move no other fact at its subject; returns the largest."""
    from kscli.editing.predicted_damage import risk_rows

    rows = risk_rows(file, layers, edited, "price", k)
    print_rows(rows, PRICES, output_format, "What it costs to protect all other facts, by edit")
    return largest_of(row["price"] for row in rows)


def print_sequences(
    file: PMatrixFile, risks: Sequence[SequenceRisk], k: int | None, output_format: Format
) -> float:
    """Print what a sequence does to original and to edited facts; returns the largest damage."""
    from kscli.editing.predicted_damage import sequence_rows

    rows = [row for each in risks for row in sequence_rows(file, each, k)]
    if output_format in FOR_MACHINES:
        print_rows(rows, [], output_format)
        return largest_of(each.largest for each in risks)
    n = len(risks[0].sequence)
    edits = f"{n} edits do" if n > 1 else "one edit does"
    whose = of_editor(file)
    for state, title in (
        ("original", f"What {edits} to facts that are not edited, per unit of |delta|{whose}"),
        ("edited", f"What the later of {n} edits do to the earlier, per unit of |delta|{whose}"),
    ):
        of_state = [row for row in rows if row["state"] == state]
        if of_state and (state == "original" or n > 1):
            columns = sequence_columns(edited=state == "edited", by_norm=risks[0].order == "norm")
            print_rows(of_state, columns, output_format, title)
    if output_format is Format.table and n > 1:
        for each in risks:
            print_line(saving(each, at_layer=len(risks) > 1, papers=not file.about.editor))
    return largest_of(each.largest for each in risks)


def saving(risk: SequenceRisk, *, at_layer: bool, papers: bool) -> str:
    """What the order norm saves, in words; that none costs less is proved of the paper's P."""
    least = ", the least there is" if papers else ""
    where = f"Layer {risk.layer}: the" if at_layer else "The"
    what = f"{where} sum of p² over later and earlier edits is {risk.interference:.3g}"
    if risk.order == "norm":
        return f"{what} in the order of ascending leverage{least}."
    return (
        f"{what}; with --order norm it is {risk.interference_norm:.3g}, "
        f"{abs(risk.saved):.0%} {'less' if risk.saved >= 0 else 'more'}{least}."
    )


def largest_of(values: Iterable[Any]) -> float:
    """The largest of the values that are defined; 0 where none is."""
    return max((float(value) for value in values if not math.isnan(value)), default=0.0)
