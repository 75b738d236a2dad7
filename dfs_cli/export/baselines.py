"""Dense networks as ONNX graphs, to compare with: in floating point, and quantized by ONNX Runtime's tool."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfs_cli.export.batched import trace_batched
from dfs_cli.export.graph import Graph
from dfs_cli.export.lower import Lowering
from dfs_cli.export.network import IMAGES, finish
from dfs_cli.export.trace import trace
from dfs_cli.presets import BatchSize


def export_dense(model: nn.Module, input_size: tuple[int, int, int], batch: BatchSize = 1) -> bytes:
    """The graph of ``model`` in floating point, serialised.

    Args:
        input_size: (C, H, W) of the images that it runs on.
        batch: how many of them at once.
    """
    graph = Graph()
    traced, logits = (trace if batch == 1 else trace_batched)(
        model, lambda module, x: module(x), torch.zeros(1, *input_size)
    )
    made = finish(graph, Lowering(graph, traced, IMAGES).run(), int(logits.shape[1]), input_size, batch)
    content: bytes = made.SerializeToString()
    return content


def quantize_dense(model: bytes, images: Tensor) -> bytes:
    """``model`` with 8-bit weights (a scale per channel) and 8-bit activations, serialised.

    Args:
        model: a serialised graph, for one image or any number.
        images: (N, C, H, W), which set the scales of the activations.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(images.numpy())

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {IMAGES: image[None]}

    level = logging.getLogger().level
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
        source, prepared, target = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "target"))
        source.write_bytes(model)
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.getLogger().setLevel(level)
        return target.read_bytes()
