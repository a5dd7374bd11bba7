"""Every causal type that transformers registers, at its default configuration: found or refused?

    python tests/benchmarks/causal_types.py [TYPE ...]

The models are built on the meta device, without weights, so nothing is run: a mixture of experts
that is found here is checked against its own output when it is loaded. Prints a line for each
type and the counts. Exits with 1 where anything but a sentence of kscli's ends the search.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from kscli.errors import KscliError, first_line
from kscli.models.config import sizes_of
from kscli.models.down_projections import find_down_projections, select_alike


def look(model_type: str) -> tuple[str, str]:
    """What becomes of a type: its outcome, and what is said of it."""
    try:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        return "does not build", f"{type(error).__name__}: {first_line(error)[:100]}"
    try:
        projections = find_down_projections(model, *sizes_of(config))
        chosen = select_alike(projections, "all", model_type)
    except KscliError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc(limit=-1)
    first = next(iter(chosen.values()))
    outcome = "found, experts" if len(first.sizes) > 1 else "found, dense"
    return outcome, f"{len(chosen)} of {sizes_of(config)[1]} layers, {first.name}, {first.sizes}"


def main(types: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    for model_type in types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcome, said = look(model_type)
        counts[outcome] += 1
        print(f"{model_type:24} {outcome:16} {said}", flush=True)
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
