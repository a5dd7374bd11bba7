"""The weights in which two models of one shape differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kscli.editing.weights import EditableWeight
from kscli.errors import ModelError
from kscli.models.down_projections import Projection
from kscli.models.experts import ExpertLayer
from kscli.models.loading import LoadedModel

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Differences:
    """`changes` are dW (d, d_m) of the down-projections that differ, by layer; `sizes` |dW| / |W|.

    Of a layer of experts dW is (d, width), that of all experts side by side. `others` are the names
    of all other weights that differ.
    """

    changes: Mapping[int, Array]
    sizes: Mapping[int, float]
    others: tuple[str, ...]


def compare_models(base: LoadedModel, edited: LoadedModel) -> Differences:
    """Compare all weights, the base's rounded as the edited model's are.

    A model that was edited and saved in bfloat16 so differs from its float32 base where it was
    edited, in whatever dtype the two are loaded. Raises ModelError where the two have not the same
    weights, by name and shape.
    """
    before, after = _weights(base), _weights(edited)
    _require_alike(base, before, edited, after)
    different = {name for name, weight in before.items() if _differs(weight, after[name])}
    changes, sizes = {}, {}
    for layer in base.decoder.layers:
        names = _names_of(before, base.decoder.projections[layer])
        if not different & names:
            continue
        was, now = (
            torch.from_numpy(EditableWeight(model, layer).original) for model in (base, edited)
        )
        rounded = was.to(_narrowest(now)).double()
        changes[layer] = (now - rounded).numpy()
        sizes[layer] = float(np.linalg.norm(changes[layer]) / np.linalg.norm(rounded))
        different -= names
    return Differences(changes, sizes, tuple(sorted(different)))


def _weights(model: LoadedModel) -> dict[str, Tensor]:
    return dict(model.decoder.model.named_parameters())


def _names_of(weights: Mapping[str, Tensor], projection: Projection) -> set[str]:
    """The names of the weights that are a layer's W."""
    if isinstance(projection, ExpertLayer):
        shared = () if projection.shared is None else (projection.shared,)
        of_modules = [each.weight for each in (*projection.downs, *shared)]
        own = of_modules if projection.downs else [projection.experts.down_proj, *of_modules]
        return {name for name, each in weights.items() if any(each is weight for weight in own)}
    return {f"{projection.name}.weight"}


def _differs(before: Tensor, after: Tensor) -> bool:
    narrow = _narrowest(after)
    return not torch.equal(before.detach().cpu().to(narrow), after.detach().cpu().to(narrow))


def _narrowest(weight: Tensor) -> torch.dtype:
    """The dtype of fewest digits that holds all entries of a weight as they are."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return dtype
    return weight.dtype


def _require_alike(
    base: LoadedModel,
    before: Mapping[str, Tensor],
    edited: LoadedModel,
    after: Mapping[str, Tensor],
) -> None:
    names = base.identity.model_id, edited.identity.model_id
    alone = sorted(before.keys() ^ after.keys())
    if alone:
        owner = names[0] if alone[0] in before else names[1]
        raise ModelError(
            f"{names[0]} and {names[1]} are not of one architecture: only {owner} has the weight "
            f"{alone[0]}. Name the model that was edited, and what it became."
        )
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            shapes = " and ".join(str(tuple(each.shape)) for each in (weight, after[name]))
            raise ModelError(
                f"{names[0]} and {names[1]} differ in the shape of {name} ({shapes}). Name the "
                "model that was edited, and what it became."
            )
