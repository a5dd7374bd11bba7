"""The matrix that an edit changes: one layer's down-projection in the live model."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from kscli.errors import ModelError, NumericsError
from kscli.models.experts import ExpertLayer
from kscli.models.loading import LoadedModel


class EditableWeight:
    """W of one layer, (d, d_m), which maps keys to values; kept as it was, W_0, to go back to.

    Raises ModelError where W is no matrix of floating-point numbers, as in a model that was
    quantised with bitsandbytes, GPTQ or AWQ.
    """

    def __init__(self, model: LoadedModel, layer: int) -> None:
        projection = model.decoder.projections[layer]
        if isinstance(projection, ExpertLayer):
            raise ModelError(
                f"layer {layer} of {model.identity.model_id} has {projection.n_experts} experts, "
                "and kscli edits dense layers only."
            )
        parameter = getattr(projection.module, "weight", None)
        if (
            not isinstance(parameter, torch.nn.Parameter)
            or parameter.ndim != 2
            or parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            or parameter.is_meta
        ):
            found = type(projection.module).__name__
            if isinstance(parameter, Tensor):
                found = f"{found} of {str(parameter.dtype).removeprefix('torch.')}"
            raise ModelError(
                f"the down-projection {projection.name} of {model.identity.model_id} is a {found}, "
                "not a matrix of floating-point numbers that can be edited; use the model's "
                "unquantised weights."
            )
        self.layer = layer
        self._parameter = parameter
        self._transposed = isinstance(projection.module, Conv1D)
        self._original = parameter.detach().clone()
        # What the matrix holds beyond d x d_m numbers is a bug of the structure's finding.
        self.shape: tuple[int, int] = tuple(self._oriented(parameter).shape)  # type: ignore[assignment]

    @property
    def original(self) -> NDArray[np.float64]:
        """W_0, (d, d_m)."""
        return self._oriented(self._original).double().cpu().numpy()

    @property
    def norm(self) -> float:
        """|W|, the Frobenius norm, as W is now."""
        return float(self._parameter.detach().double().norm())

    def changed(self, change: NDArray[np.float64]) -> Tensor:
        """W_0 + `change` (d, d_m), rounded once, to the model's dtype."""
        original = self._oriented(self._original).to("cpu", torch.float64)
        return (original + torch.from_numpy(change)).to(self._parameter.dtype)

    def set_change(self, change: NDArray[np.float64]) -> None:
        """Make W the W_0 + `change` (d, d_m), rounded once, to the model's dtype.

        Raises NumericsError, before anything changes, where that dtype has no room for it.
        """
        changed = self.changed(change)
        if not changed.isfinite().all():
            widest = changed.dtype in (torch.float32, torch.float64)
            raise NumericsError(
                f"an edit of layer {self.layer} is not finite in {changed.dtype}; the change has "
                f"entries up to {abs(change).max():.2g}."
                + ("" if widest else " Use --dtype float32.")
            )
        with torch.no_grad():
            self._oriented(self._parameter).copy_(changed)

    def values(self, keys: NDArray[np.float64]) -> NDArray[np.float64]:
        """W k for (m, d_m) keys, with W as it is now and without the bias: (m, d)."""
        weight = self._oriented(self._parameter.detach())
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = torch.as_tensor(keys).to(weight.device, wide) @ weight.to(wide).T
        return np.asarray(found.double().cpu().numpy())

    def restore(self) -> None:
        """Make W the W_0, bit for bit."""
        with torch.no_grad():
            self._parameter.copy_(self._original)

    def _oriented(self, weight: Tensor) -> Tensor:
        """A view of the parameter as (d, d_m)."""
        return weight.T if self._transposed else weight
