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


def open_session(
    model: bytes | str, threads: int = 0, optimised: str = "", spin: bool = False
) -> onnxruntime.InferenceSession:
    """An inference session on the CPU.

    Args:
        model: a serialised model, or a file's name.
        threads: how many; 0: one for each core.
        optimised: name of a file to which the optimised graph is written.
        spin: whether threads busy-wait for work: faster on an idle machine, much slower on a busy one.

    Raises:
        ExportError: ONNX Runtime cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # Threads that keep waiting for this session's next call would slow down other work in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimised:
        options.optimized_model_filepath = optimised
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no class in common
        raise ExportError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from None
