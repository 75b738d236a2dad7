"""The model's preprocessing, resolved by timm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from dfs_cli.config import Preprocessing

_HARD_CROP = 0.8


def resolve_preprocessing(
    model: nn.Module,
    img_size: int | None = None,
    crop_pct: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing:
    """The preprocessing of a timm model, with its test-time size for evaluation; arguments override the model's values.

    Raises:
        ConfigError: a value is out of range or does not fit the number of channels.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    in_chans = getattr(model, "in_chans", 3)
    # timm reads a zero as "not given": the user's values are set after it.
    args: dict[str, Any] = {"in_chans": in_chans}
    if img_size is not None:
        args["input_size"] = (in_chans, img_size, img_size)
    test = resolve_data_config(args, pretrained_cfg=cfg, use_test_size=True)
    train = resolve_data_config(args, pretrained_cfg=cfg, use_test_size=False)

    def per_channel(given: tuple[float, ...] | None, default: tuple[float, ...]) -> tuple[float, ...]:
        """The given values or the model's, averaged where the model's are for another number of channels."""
        if given is not None:
            return tuple(given) * in_chans if len(given) == 1 else tuple(given)
        return tuple(default) if len(default) == in_chans else (sum(default) / len(default),) * in_chans

    def with_channels(size: tuple[int, ...]) -> tuple[int, int, int]:
        return (in_chans, size[-2], size[-1])

    return Preprocessing(
        input_size=with_channels(test["input_size"]),
        train_size=with_channels(train["input_size"]),
        interpolation=test["interpolation"],
        crop_pct=test["crop_pct"] if crop_pct is None else crop_pct,
        crop_mode=test["crop_mode"],
        mean=per_channel(mean, test["mean"]),
        std=per_channel(std, test["std"]),
    )


def eval_transform(preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
    """timm's evaluation transform: resize, crop, normalise."""
    transform: Callable[[Any], Tensor] = create_transform(
        input_size=preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return transform


def hard_crop_transform(preprocessing: Preprocessing, hflip: float, min_crop: float) -> Callable[[Any], Tensor]:
    """Harder crops than in training, at the evaluation size.

    The original network was trained on the held-out images and is more confident on them than on new ones. With these crops
    they are about as hard as new images, so confidence thresholds are set on them.

    Args:
        hflip, min_crop: as for :func:`train_transform`.
    """
    at_test_size = dataclasses.replace(preprocessing, train_size=preprocessing.input_size)
    return train_transform(at_test_size, hflip, _HARD_CROP * min_crop)


def train_transform(preprocessing: Preprocessing, hflip: float, min_crop: float) -> Callable[[Any], Tensor]:
    """timm's training transform with mild augmentation: random resized crops and horizontal flips, no colour jitter.

    Args:
        hflip: probability of a horizontal flip.
        min_crop: smallest crop, as a share of the image's area.
    """
    transform: Callable[[Any], Tensor] = create_transform(
        input_size=preprocessing.train_size,
        is_training=True,
        scale=(min_crop, 1.0),
        ratio=(0.9, 1 / 0.9),
        hflip=hflip,
        color_jitter=0.0,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return transform
