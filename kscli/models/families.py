"""The family and the size that a model's name tells, to compare sizes and to order figures.

Imports nothing heavy: the kinds of figure are listed without numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kscli.models.aliases import ALIASES, Alias

# "135M" in "SmolLM2-135M-Instruct", "0.5B" in "Qwen2.5-0.5B"; not the "7B" of "8x7B". With an "A"
# before it the size is what one token uses of a mixture of experts: "A3B" in "Qwen3-30B-A3B".
_SIZES = re.compile(r"(?<![A-Za-z0-9.])(A?)(\d+(?:\.\d+)?)([MBT])(?![A-Za-z0-9])", re.IGNORECASE)
_UNIT = {"m": 1e6, "b": 1e9, "t": 1e12}
_OF_EDITOR = ", p of "


@dataclass(frozen=True)
class Member:
    """A model's place in its family; of its `size` parameters one token uses the `active` ones."""

    family: str
    size: float
    active: float

    @property
    def sparse(self) -> bool:
        """Whether it is a mixture of experts, which has more parameters than one token uses."""
        return self.active < self.size


# Sizes that differ by no more than this factor are called one size.
_ONE_SIZE = 1.25


def of_one_active_size(dense: Member, sparse: Member) -> bool:
    """Whether the two are a dense model and a mixture of more parameters, one active size."""
    mixed = sparse.sparse and not dense.sparse
    return mixed and sparse.size > dense.size and _one_size(sparse.active, dense.active)


def of_one_size(dense: Member, sparse: Member) -> bool:
    """Whether the two are a dense model and a mixture of as many parameters in all."""
    return sparse.sparse and not dense.sparse and _one_size(sparse.size, dense.size)


def _one_size(one: float, other: float) -> bool:
    return 1 / _ONE_SIZE <= one / other <= _ONE_SIZE


def whose_p(model: str, editor: str) -> str:
    """A model's name for people where p is an editor's; with no editor, where it is the paper's."""
    return f"{model}{_OF_EDITOR}{editor}" if editor else model


def family_of(model: str, model_id: str = "") -> Member | None:
    """The family and size of a model by its display name, or by its id; None where no size is told.

    Known are the aliases and their Hub ids, and names that say a size, as `my-model-350M`,
    `Qwen2.5-0.5B-Instruct` or `my-mixture-30B-A3B`: their family is the rest of the name, whoever
    its owner.
    """
    names = [name for name in (model.partition(_OF_EDITOR)[0], model_id) if name]
    for name in names:
        alias = _alias(name)
        if alias is not None:
            return Member(alias.family, float(alias.parameters), float(alias.active))
    for name in names:
        base = _base(name)
        told = [
            (letter, float(number) * _UNIT[unit.lower()])
            for letter, number, unit in _SIZES.findall(base)
        ]
        size = next((size for letter, size in told if not letter), None)
        if size is not None:
            active = next((size for letter, size in told if letter), size)
            rest = re.sub(r"([-_.])[-_.]+", r"\1", _SIZES.sub("", base)).strip("-_.")
            return Member(rest or base, size, active)
    return None


def member_of(
    model: str, model_id: str = "", sizes: tuple[int, int] | None = None
) -> Member | None:
    """As `family_of`, with the parameters and active parameters that a file says.

    The family of a model whose name tells none is empty. None where nothing tells the sizes.
    """
    told = family_of(model, model_id)
    if sizes is None:
        return told
    size, active = map(float, sizes)
    return replace(told, size=size, active=active) if told else Member("", size, active)


def parameters(model: str) -> float | None:
    """How many parameters a model of this name has: an alias's, or what the name says."""
    member = family_of(model)
    return member.size if member else None


def family(model: str) -> str:
    """The family of a model of this name; one that tells no size is a family of its own."""
    member = family_of(model)
    return member.family if member else _base(model.partition(_OF_EDITOR)[0])


def _alias(name: str) -> Alias | None:
    """The alias that a name stands for: its own, or that of its Hub id."""
    names = (name, name.replace("--", "/"))
    return next((a for a in ALIASES if a.name in names or a.hub_id in names), None)


def _base(name: str) -> str:
    """The name less its owner or folder, and its extension."""
    return name.replace("--", "/").rpartition("/")[2].removesuffix(".gguf")
