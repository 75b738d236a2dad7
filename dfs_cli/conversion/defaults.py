"""What a conversion uses where nothing is given, for the command line and the library alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.config import DataConfig, DynamicConfig, GateKind, SynthesisConfig, TuningConfig
from dfs_cli.cost.operating_point import LOWEST_SHARE
from dfs_cli.cost.weighting import mac_cost
from dfs_cli.data.splits import DIGITS, Splits
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.models.zoo import is_candidate
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.presets import PRESETS, Preset
from dfs_cli.records import Source

_PASSES = {"probe": 2}


def default_data(architecture: str, data: DataConfig | None = None) -> DataConfig:
    """``data``, or the embedded digits for the model that was trained on them.

    Raises:
        DataError: neither is there; the message says what to pass.
    """
    if data is not None and data.names_data:
        return data
    if architecture == DIGITS_MODEL:
        return (data or DataConfig()).replace(dataset=DIGITS)
    raise DataError(
        f"{architecture} needs images: pass --data DIR (class folders in train/ and val/) or --dataset, as torch/cifar10"
    )


def default_images(
    architecture: str, images: DataConfig | SynthesisConfig | None = None
) -> DataConfig | SynthesisConfig:
    """What a conversion is given; else the embedded digits, for the model that was trained on them; else synthetic images."""
    if isinstance(images, SynthesisConfig):
        return images
    if architecture == DIGITS_MODEL or (images is not None and images.names_data):
        return default_data(architecture, images)
    return SynthesisConfig()


def default_tuning(data: DataConfig | Splits | SynthesisConfig | None = None) -> TuningConfig:
    """The settings a conversion uses where none are given: small batches and no flips for the digits.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.default_tuning(dfs_cli.DataConfig(dataset="digits")).batch_size, dfs_cli.default_tuning().batch_size
        (64, 128)
    """
    if isinstance(data, DataConfig) and data.dataset == DIGITS:
        return TuningConfig(batch_size=64, hflip=0.0)
    return TuningConfig()


def default_options(gate: GateKind, budget: float, spend: bool = False, known: Sequence[int] | None = None) -> Preset:
    """The options that are needed for a budget.

    Up to 8 bits where that is all that a budget can be used for: more bits gain nothing. Where the budget itself is to be
    spent, and 8 bits in every pass do not cost as much, up to floating point.

    Args:
        known: bitwidths whose costs on a device are known; None: MACs count.
    """
    if known is not None:
        few = tuple(bits for bits in known if bits <= BYTE_BITS)
        return Preset(few if len(few) > 1 else tuple(known))
    up_to_8_bits = _PASSES.get(gate, 1) * mac_cost(max(PRESETS["lowbit"].bits))
    if not spend or LOWEST_SHARE * budget <= up_to_8_bits:
        return PRESETS["lowbit"]
    return PRESETS["static" if gate == "static" else "hardware"]


def default_dynamic(
    budget: float,
    tuning: TuningConfig,
    gate: GateKind = "probe",
    options: Preset | None = None,
    fixed_bits: int | None = None,
    mirror: bool | None = None,
    spend: bool = False,
    known: Sequence[int] | None = None,
) -> DynamicConfig:
    """What a converted network is made of, with nothing left open.

    Args:
        options: None: :func:`default_options`.
        fixed_bits: None: those that belong to the options.
        mirror: None: a probe's second pass sees the mirrored image where images are mirrored in tuning, that is, where it
            does not change their class; a static network sees one view.
        known: bitwidths whose costs on a device are known; None: MACs count.

    Raises:
        ConfigError: mirroring is asked for where there is no second pass.
    """
    if gate not in ("probe", "static") and mirror is not None:
        raise ConfigError(f"--mirror is for a second pass, which --gate {gate} does not have")
    options = options or default_options(gate, budget, spend, known)
    return DynamicConfig(
        bits=options.bits,
        fixed_bits=options.fixed_bits if fixed_bits is None else fixed_bits,
        gate=gate,
        mirror=(gate == "probe" and tuning.hflip > 0) if mirror is None else mirror,
    )


def resolve_device(kind: str) -> torch.device:
    """The device that a setting names.

    Raises:
        ConfigError: CUDA is asked for and not available.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: CUDA is not available here; pass --device cpu or auto")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def describe_source(model: nn.Module, weights: str | None = None) -> Source:
    """Name, licence and origin of a model's timm weights; ``weights`` names others, of unknown licence."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {}) or {}
    if weights is not None:
        return Source(weights)
    tag = f"{cfg.get('architecture')}.{cfg['tag']}" if cfg.get("tag") else cfg.get("architecture")
    origin = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("origin_url")
    return Source(tag, cfg.get("license"), origin or None)


def describe_model(model: nn.Module) -> tuple[str, ModelArgs]:
    """Architecture and arguments that rebuild ``model`` with timm.

    Raises:
        UnsupportedModelError: timm's own model under that name and arguments has another structure.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not is_candidate(architecture):
        raise UnsupportedModelError(
            "the model was not made by timm.create_model from what dfs list lists: its file could not be loaded again"
        )
    if getattr(model, "num_classes", 0) < 2:
        raise UnsupportedModelError(f"{architecture} has no classifier")
    args = ModelArgs(int(getattr(model, "num_classes", 0)), int(getattr(model, "in_chans", 3)))
    with torch.device("meta"):
        rebuilt = timm.create_model(architecture, **args.to_dict())
    if repr(rebuilt) != repr(model):
        raise UnsupportedModelError(
            f"the model differs in structure from timm's {architecture} with {args.to_dict()}: only these arguments are kept"
        )
    return architecture, args
