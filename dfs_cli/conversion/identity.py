"""Which conversion it is: what must be the same for one that was interrupted to be gone on with."""

from __future__ import annotations

from typing import Any

from torch import nn

from dfs_cli.artifact.artifact import tensor_digest
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, SynthesisConfig, TuningConfig
from dfs_cli.conversion.defaults import describe_model
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.data.splits import Splits

SPLITS = ("train", "calibration", "validation")


def identity_of(
    model: nn.Module,
    budget: float,
    spend: bool,
    data: DataConfig | Splits | SynthesisConfig,
    dynamic: DynamicConfig,
    tuning: TuningConfig,
    preprocessing: Preprocessing,
    costs: DeviceCosts | None,
    splits: Splits | None,
    limit: float | None,
) -> dict[str, Any]:
    """Plain values. Device, processes and the place of folders may change; what is in the folders must not.

    Args:
        splits: None: they are not made yet.
    """
    source: Any = "given" if isinstance(data, Splits) else data.to_dict() | {"data_dir": None}
    return {
        "model": describe_model(model)[0],
        "weights": tensor_digest(model.state_dict()),
        "budget": budget,
        "spend": spend,
        "limit": limit,
        "data": source,
        "images": None if splits is None else {name: len(getattr(splits, name)) for name in SPLITS},
        "dynamic": dynamic.to_dict(),
        "tuning": {n: v for n, v in tuning.to_dict().items() if n not in ("device", "workers")},
        "preprocessing": preprocessing.to_dict(),
        "costs": costs and costs.to_dict(),
    }
