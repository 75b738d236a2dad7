"""ONNX and ONNX Runtime, which are optional packages."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dfs_cli.errors import ExportError, MissingDependencyError, first_line

if TYPE_CHECKING:
    import onnxruntime


def has_onnx() -> bool:
    """Whether graphs can be written and run."""
    return find_spec("onnx") is not None and find_spec("onnxruntime") is not None


def require_onnx() -> None:
    """Check that the packages are installed.

    Raises:
        MissingDependencyError: one is missing.
    """
    if not has_onnx():
        raise MissingDependencyError("ONNX graphs need onnx and onnxruntime: pip install 'dfs-cli[onnx]'")


def open_session(model: bytes | str, threads: int = 0, optimised: str = "") -> onnxruntime.InferenceSession:
    """An inference session on the CPU.

    Its threads sleep while they wait. Those that wait busily, the runtime's default, make two threads faster on a machine that
    does nothing else. Where one of them loses its core to another program, the other one waits at the next operation until it
    has it back, some milliseconds later: medians stay, means double, and two measurements differ by half.

    Args:
        model: a serialised model, or a file's name.
        threads: how many; 0: one for each core.
        optimised: name of a file to which the optimised graph is written.

    Raises:
        ExportError: ONNX Runtime cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimised:
        options.optimized_model_filepath = optimised
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class in common
        raise ExportError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from None
