from __future__ import annotations

from pathlib import Path

import pytest

from kscli.models.loading import load_model
from kscli.models.locating import ModelOptions, locate_model
from kscli.models.shape import model_shape


def test_the_shape_is_that_of_the_loaded_model() -> None:
    options = ModelOptions("tiny", device="cpu", dtype="float32")
    shape = model_shape(locate_model(options), options)
    model = load_model(options)
    network = model.decoder.model
    assert shape.n_layers == model.decoder.n_layers
    assert shape.d_m == model.decoder.d_m
    assert shape.max_length == model.max_length
    assert shape.parameters == sum(p.numel() for p in network.parameters())
    layers = network.transformer.h  # type: ignore[union-attr]
    assert shape.layer_parameters == sum(p.numel() for p in layers.parameters())  # type: ignore[union-attr]


def test_the_shape_of_a_gguf_file(smollm2: Path) -> None:
    pytest.importorskip("gguf")
    options = ModelOptions(str(smollm2), device="cpu")
    shape = model_shape(locate_model(options), options)
    assert (shape.n_layers, shape.d_m, shape.hidden_size) == (30, 1536, 576)
    assert shape.parameters == 134_515_008
