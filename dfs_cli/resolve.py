"""What a run uses where the user gave nothing, and what is recorded about the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
import torch
from torch import nn

from dfs_cli.config import PRESETS, DataConfig, DynamicConfig, Preprocessing, TuningConfig, default_preset
from dfs_cli.data.images import Images
from dfs_cli.data.loading import default_workers
from dfs_cli.data.preprocessing import unfamiliar_transform
from dfs_cli.data.splits import DIGITS, Splits
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.tuning.loop import resolve_epochs


def default_data(architecture: str, data: DataConfig | None = None) -> DataConfig:
    """``data``, or the embedded digits for the model that was trained on them.

    Raises:
        DataError: neither is there; the message says what to pass.
    """
    if data is not None and (data.data_dir is not None or data.dataset):
        return data
    if architecture == DIGITS_MODEL:
        return dataclasses.replace(data or DataConfig(), dataset=DIGITS)
    raise DataError(
        f"{architecture} needs images: pass --data DIR (class folders in train/ and val/) or --dataset, as torch/cifar10"
    )


def default_tuning(data: DataConfig | Splits | None = None) -> TuningConfig:
    """The settings a conversion uses where none are given: small batches and no flips for the digits."""
    if isinstance(data, DataConfig) and data.dataset == DIGITS:
        return TuningConfig(batch_size=64, hflip=0.0)
    return TuningConfig()


def default_dynamic(budget: float, tuning: TuningConfig) -> DynamicConfig:
    """The options and gate that a conversion uses where none are given.

    Images are mirrored for the second pass where they are mirrored in tuning, that is, where it does not change their class.
    """
    return DynamicConfig(bits=PRESETS[default_preset(budget, DynamicConfig.gate)], mirror=tuning.hflip > 0)


def resolve_device(kind: str) -> torch.device:
    """Raises ConfigError where CUDA is asked for and not available."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: CUDA is not available here; pass --device cpu or auto")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def resolve_tuning(tuning: TuningConfig, train: Images) -> tuple[TuningConfig, int]:
    """The settings with nothing left open, and the steps per epoch."""
    batch_size = min(tuning.batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    resolved = dataclasses.replace(
        tuning,
        epochs=resolve_epochs(tuning, steps_per_epoch),
        batch_size=batch_size,
        workers=default_workers(train) if tuning.workers is None else tuning.workers,
    )
    return resolved, steps_per_epoch


def describe_source(model: nn.Module, weights: str | None = None) -> dict[str, Any]:
    """Name, licence and origin of a model's timm weights; ``weights`` names others, of unknown licence."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {}) or {}
    if weights is not None:
        return {"weights": weights, "license": None, "origin": None}
    tag = f"{cfg.get('architecture')}.{cfg['tag']}" if cfg.get("tag") else cfg.get("architecture")
    origin = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("origin_url")
    return {"weights": tag, "license": cfg.get("license"), "origin": origin or None}


def describe_model(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments that rebuild ``model`` with timm.

    Raises:
        UnsupportedModelError: timm's own model under that name and arguments has another structure.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise UnsupportedModelError("the model was not made by timm.create_model: its file could not be loaded again")
    args: dict[str, Any] = {"num_classes": getattr(model, "num_classes", 0), "in_chans": getattr(model, "in_chans", 3)}
    if args["num_classes"] < 2:
        raise UnsupportedModelError(f"{architecture} has no classifier")
    with torch.device("meta"):
        rebuilt = timm.create_model(architecture, **args)
    if repr(rebuilt) != repr(model):
        raise UnsupportedModelError(
            f"the model differs in structure from timm's {architecture} with {args}: only those two arguments are kept"
        )
    return architecture, args


def unfamiliar(held_out: Images, preprocessing: Preprocessing, tuning: TuningConfig) -> Images:
    """The held-out images as :func:`dfs_cli.data.preprocessing.unfamiliar_transform` shows them, the same at every call."""
    if held_out.transform is None:
        return held_out
    images = held_out.with_transform(unfamiliar_transform(preprocessing, tuning.hflip, tuning.min_crop))
    images.draw = tuning.seed
    return images
