"""The 6n+2 residual networks of He et al. (2016, section 4.2) with 1x1-convolution shortcuts, as DFS uses them.

Importing this module registers ``resnet{20,32,38,44,56,74,110}_cifar`` and ``resnet20_digits`` with timm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "resnet20_digits.safetensors"
DIGITS_MODEL = "resnet20_digits"
DEPTHS = (20, 32, 38, 44, 56, 74, 110)
CHANNELS = (16, 32, 64)


class _NoStage(nn.Identity):
    """Takes the place of the fourth stage in timm's forward."""


def _build_resnet(depth: int, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> ResNet:
    """timm's ResNet with three stages of (depth - 2) / 6 basic blocks, a 3x3 stem and no pooling before them."""
    blocks = (depth - 2) // 6
    model = ResNet(
        BasicBlock,  # type: ignore[arg-type]  # timm's annotation names instances, it takes the class
        (blocks, blocks, blocks),
        num_classes=num_classes,
        in_chans=in_chans,
        channels=CHANNELS,
        stem_type="deep",  # the only stem of timm whose width can be chosen; replaced below
        stem_width=CHANNELS[0] // 2,
        **kwargs,
    )
    stem = nn.Conv2d(in_chans, CHANNELS[0], kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    for name, module in (("conv1", stem), ("maxpool", nn.Identity()), ("layer4", _NoStage())):
        model.add_module(name, module)
    model.feature_info = [{"num_chs": CHANNELS[0], "reduction": 1, "module": "act1"}] + [
        {"num_chs": c, "reduction": 2**i, "module": f"layer{i + 1}"} for i, c in enumerate(CHANNELS)
    ]
    return model


def _config(size: int, channels: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (channels, size, size),
        "pool_size": (size // 4, size // 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

_CONFIGS: dict[str, Any] = {f"resnet{depth}_cifar.untrained": _config(32, 3, **_IMAGENET) for depth in DEPTHS} | {
    f"{DIGITS_MODEL}.sklearn": _config(8, 1, mean=(0.3053,), std=(0.3760,), file=str(DIGITS_WEIGHTS), license="mit")
}
default_cfgs = generate_default_cfgs(_CONFIGS)


def _register(name: str, depth: int) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> ResNet:
        defaults = {"in_chans": default_cfgs[name].default.input_size[0]}
        model = build_model_with_cfg(_build_resnet, name, pretrained, depth=depth, **(defaults | kwargs))
        assert isinstance(model, ResNet)
        return model

    entrypoint.__name__ = name
    entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"ResNet-{depth} of three stages for small images."
    entrypoint.__module__ = __name__
    register_model(entrypoint)


for _depth in DEPTHS:
    _register(f"resnet{_depth}_cifar", _depth)
_register(DIGITS_MODEL, 20)
