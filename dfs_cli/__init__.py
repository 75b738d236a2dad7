"""dfs: input-adaptive ResNets by Dynamic Fractional Skipping (Shen et al., AAAI 2020).

The names below are loaded on first use, so that ``dfs --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dfs_cli.api import (
        Converted,
        Observer,
        convert,
        cost_report,
        default_tuning,
        evaluate,
        export_onnx,
        load,
        plan,
        profile,
        recalibrate,
        save,
    )
    from dfs_cli.artifact.manifest import Evaluation, Manifest
    from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, SweepConfig, TuningConfig
    from dfs_cli.cost.table import CostTable
    from dfs_cli.data.images import Images
    from dfs_cli.data.splits import Splits
    from dfs_cli.errors import DfsError
    from dfs_cli.models.zoo import load_model
    from dfs_cli.nn.network import DynamicResNet
    from dfs_cli.sweep import sweep

_HOMES = {
    "Converted": "dfs_cli.api",
    "Observer": "dfs_cli.api",
    "convert": "dfs_cli.api",
    "cost_report": "dfs_cli.api",
    "default_tuning": "dfs_cli.api",
    "evaluate": "dfs_cli.api",
    "export_onnx": "dfs_cli.api",
    "load": "dfs_cli.api",
    "plan": "dfs_cli.api",
    "profile": "dfs_cli.api",
    "recalibrate": "dfs_cli.api",
    "save": "dfs_cli.api",
    "Evaluation": "dfs_cli.artifact.manifest",
    "Manifest": "dfs_cli.artifact.manifest",
    "DataConfig": "dfs_cli.config",
    "DynamicConfig": "dfs_cli.config",
    "Preprocessing": "dfs_cli.config",
    "TuningConfig": "dfs_cli.config",
    "CostTable": "dfs_cli.cost.table",
    "Images": "dfs_cli.data.images",
    "Splits": "dfs_cli.data.splits",
    "DfsError": "dfs_cli.errors",
    "load_model": "dfs_cli.models.zoo",
    "DynamicResNet": "dfs_cli.nn.network",
    "SweepConfig": "dfs_cli.config",
    "sweep": "dfs_cli.sweep",
}

__all__ = [
    "Converted",
    "CostTable",
    "DataConfig",
    "DfsError",
    "DynamicConfig",
    "DynamicResNet",
    "Evaluation",
    "Images",
    "Manifest",
    "Observer",
    "Preprocessing",
    "Splits",
    "SweepConfig",
    "TuningConfig",
    "__version__",
    "convert",
    "cost_report",
    "default_tuning",
    "evaluate",
    "export_onnx",
    "load",
    "load_model",
    "plan",
    "profile",
    "recalibrate",
    "save",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
