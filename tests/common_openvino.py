"""Graphs in OpenVINO, in a process of its own.

On processors with AMX, processes in which it had run were seen to die when they later started others. That process imports
this module, which therefore imports little.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np

# By default OpenVINO may run in bfloat16.
_SETTINGS = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
_EXACT = {"LP_TRANSFORMS_MODE": "NO"}


def run_openvino(model: bytes, images: np.ndarray, exact: bool) -> dict[str, np.ndarray]:
    """The outputs of a serialised graph for ``images`` (N, C, H, W), by name, joined along the first axis.

    Args:
        exact: without the transformations that round otherwise between integer layers.
    """
    return _process().submit(_run, model, images, _SETTINGS | (_EXACT if exact else {})).result()


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _run(model: bytes, images: np.ndarray, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    results = [compiled([image[None]]) for image in images]
    columns = [np.concatenate([result[i] for result in results]) for i in range(len(compiled.outputs))]
    # An output has the names of all values that it equals.
    return {name: column for port, column in zip(compiled.outputs, columns, strict=True) for name in port.names}
