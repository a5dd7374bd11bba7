"""kscli: knowledge superposition in language models, measured.

The functions here are those of `kscli.library`, imported when one is first used: see
`kscli guide library`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kscli.library import (
        CovarianceFile,
        EditsFile,
        Fact,
        KeysFile,
        KscliError,
        KscliWarning,
        PMatrixFile,
        Records,
        StatisticsFile,
        apply_edits,
        edit,
        extract_keys,
        load_model,
        plot,
        risk,
        second_moments,
        statistics,
        superposition,
    )
    from kscli.library import open_artifact as open  # noqa: A004

__all__ = [
    "CovarianceFile",
    "EditsFile",
    "Fact",
    "KeysFile",
    "KscliError",
    "KscliWarning",
    "PMatrixFile",
    "Records",
    "StatisticsFile",
    "apply_edits",
    "edit",
    "extract_keys",
    "load_model",
    "open",
    "plot",
    "risk",
    "second_moments",
    "statistics",
    "superposition",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kscli' has no attribute {name!r}")
    return getattr(import_module("kscli.library"), "open_artifact" if name == "open" else name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
