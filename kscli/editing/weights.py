"""The matrix that an edit changes: one layer's W in the live model.

Of a layer of experts it is (W_1 ... W_E), side by side, with that of shared experts last: the
linear map on stacked keys (`kscli.models.experts`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError, NumericsError
from kscli.models.down_projections import Projection
from kscli.models.experts import ExpertLayer
from kscli.models.loading import LoadedModel


class EditableWeight:
    """W of one layer, (d, width), which maps keys to values; kept as it was, W_0, to go back to.

    Raises ModelError where W is no matrix of floating-point numbers, as in a model that was
    quantised with bitsandbytes, GPTQ or AWQ.
    """

    def __init__(self, model: LoadedModel, layer: int) -> None:
        self.layer = layer
        # Views of the parameters, (d, n) each.
        self._blocks = _blocks(model.decoder.projections[layer], model.identity.model_id)
        self._original = [block.clone() for block in self._blocks]
        self._ends = np.cumsum([block.shape[1] for block in self._blocks]).tolist()
        self.shape: tuple[int, int] = len(self._blocks[0]), self._ends[-1]

    @property
    def original(self) -> NDArray[np.float64]:
        """W_0, (d, width)."""
        return np.concatenate([_as_array(block) for block in self._original], axis=1)

    @property
    def norm(self) -> float:
        """|W|, the Frobenius norm, as W is now."""
        return float(np.linalg.norm([float(block.double().norm()) for block in self._blocks]))

    def changed(self, change: NDArray[np.float64]) -> Tensor:
        """W_0 + `change` (d, width), rounded once, to the model's dtype."""
        return torch.cat([block.cpu() for block in self._changed(change)], dim=1)

    def set_change(self, change: NDArray[np.float64]) -> None:
        """Make W the W_0 + `change` (d, width), rounded once, to the model's dtype.

        Raises NumericsError, before anything changes, where that dtype has no room for it.
        """
        changed = list(self._changed(change))
        if not all(block.isfinite().all() for block in changed):
            dtype = changed[0].dtype
            widest = dtype in (torch.float32, torch.float64)
            raise NumericsError(
                f"an edit of layer {self.layer} is not finite in {dtype}; the change has "
                f"entries up to {abs(change).max():.2g}."
                + ("" if widest else " Use --dtype float32.")
            )
        self._set(changed)

    def values(self, keys: NDArray[np.float64]) -> NDArray[np.float64]:
        """W k for (m, width) keys, with W as it is now and without the bias: (m, d)."""
        found = np.zeros((len(keys), self.shape[0]))
        for weight, part in zip(self._blocks, self._parts(keys), strict=True):
            wide = torch.promote_types(weight.dtype, torch.float32)
            of_block = torch.as_tensor(part).to(weight.device, wide) @ weight.to(wide).T
            found += of_block.double().cpu().numpy()
        return found

    def restore(self) -> None:
        """Make W the W_0, bit for bit."""
        self._set(self._original)

    def _set(self, blocks: list[Tensor]) -> None:
        with torch.no_grad():
            for block, wanted in zip(self._blocks, blocks, strict=True):
                block.copy_(wanted)

    def _changed(self, change: NDArray[np.float64]) -> Iterator[Tensor]:
        """Each block of W_0 + `change`; one that is not changed is the original itself."""
        for block, part in zip(self._original, self._parts(change), strict=True):
            if part.any():
                exact = block.to("cpu", torch.float64) + torch.from_numpy(part)
                yield exact.to(block.dtype)
            else:
                yield block

    def _parts(self, rows: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """(n, width) cut into each block's columns."""
        return np.split(rows, self._ends[:-1], axis=1)


def _blocks(projection: Projection, model_id: str) -> list[Tensor]:
    """Views of the parameters of one layer's W, (d, n) each; writing to them changes the model."""
    if not isinstance(projection, ExpertLayer):
        return [_matrix(projection.name, projection.module, model_id)]
    if projection.downs:
        blocks = [_matrix(projection.name, down, model_id) for down in projection.downs]
    else:
        weight = _parameter(projection.name, projection.experts, "down_proj", 3, model_id)
        blocks = list(weight.mT if projection.transposed else weight)
    if projection.shared is not None:
        blocks.append(_matrix(f"shared experts of {projection.name}", projection.shared, model_id))
    return blocks


def _matrix(name: str, module: nn.Module, model_id: str) -> Tensor:
    weight = _parameter(name, module, "weight", 2, model_id)
    return weight.T if isinstance(module, Conv1D) else weight


def _parameter(name: str, module: nn.Module, attribute: str, ndim: int, model_id: str) -> Tensor:
    """A module's parameter, without its gradient's history."""
    parameter = getattr(module, attribute, None)
    if (
        not isinstance(parameter, nn.Parameter)
        or parameter.ndim != ndim
        or parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        or parameter.is_meta
    ):
        found = type(module).__name__
        if isinstance(parameter, Tensor):
            found = f"{found} of {str(parameter.dtype).removeprefix('torch.')}"
        raise ModelError(
            f"the down-projection {name} of {model_id} is a {found}, not a matrix of "
            "floating-point numbers that can be edited; use the model's unquantised weights."
        )
    return parameter.detach()


def _as_array(weight: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = weight.double().cpu().numpy()
    return found
