"""How much can be done without images in a few minutes, by the speed of the machine."""

from __future__ import annotations

import copy
import math
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from dfs_cli.config import RECIPE_STEPS, SYNTHESIS_STEPS, Preprocessing, SynthesisConfig
from dfs_cli.distributed import size as processes
from dfs_cli.synthesis.distil import Stage
from dfs_cli.synthesis.moments import Moments

# Seconds for the images, and as many for tuning: those of a ResNet-18 at 224 pixels and whatever is smaller, and more for each
# multiply-accumulate above that, up to those of a ResNet-50.
_SECONDS, _SECONDS_PER_MAC, _MOST_SECONDS = 100.0, 75e-9, 270.0
_MACS = 1.82e9
_LEAST_IMAGES, _MOST_IMAGES = 32, 1024
_LEAST_STEPS = 32
_TIMED_IMAGES = 16
# Shares of the steps at a quarter, half and all of the image's size. Coarse steps cost little and give the large shapes.
_COARSE_TO_FINE = ((4, 0.5), (2, 0.3), (1, 0.2))
_SMALLEST_SIDE = 32
_TUNING_TIME = 2.3  # of a tuning step over one that makes images, in single precision both
# Multiply-accumulates of the images that are tuned on, or made, together: a few GiB.
_TUNING_MACS, _MAKING_MACS = 66e9, 132e9
_MOST_TUNED, _MOST_MADE = 128, 512
_FEW_BITS = 2.0  # below 8 bits, so many times the images and steps are needed


class Work(NamedTuple):
    """What is to be done.

    Args:
        images: to make.
        batch_size: images per tuning step.
        stages: of the optimisation.
        tuning_steps: on these images.
        seconds: that all of it will take.
        amp: whether images are optimised in bfloat16.
    """

    images: int
    batch_size: int
    stages: tuple[Stage, ...]
    tuning_steps: int
    seconds: float
    amp: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self._asdict(), "stages": [tuple(stage) for stage in self.stages]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Work:
        """What :meth:`to_dict` described."""
        return cls(**{**values, "stages": tuple(Stage(*stage) for stage in values["stages"])})


def stages_for(size: tuple[int, int], steps: int, macs: int) -> tuple[Stage, ...]:
    """``steps`` steps from coarse to fine, for images of ``size`` (H, W) with ``macs`` multiply-accumulates each."""
    fitting = [
        (factor, share) for factor, share in _COARSE_TO_FINE if min(size) // factor >= min(_SMALLEST_SIDE, *size)
    ]
    total = sum(share for _, share in fitting)
    return tuple(
        Stage(
            (size[0] // factor, size[1] // factor),
            max(1, round(steps * share / total)),
            _together(_MAKING_MACS * factor**2, macs, _MOST_MADE),
        )
        for factor, share in fitting
    )


def _together(total: float, macs: int, most: int) -> int:
    """A power of two of images that have ``total`` multiply-accumulates together, at least 2 and at most ``most``."""
    return min(most, 1 << max(1, int(math.log2(max(2.0, total / macs)))))


def plan_work(
    model: nn.Module,
    preprocessing: Preprocessing,
    macs: int,
    config: SynthesisConfig,
    few_bits: bool,
    device: torch.device,
) -> Work:
    """What can be done on this machine, by all processes, in minutes, measured on a step; what is given in ``config`` is done.

    Args:
        macs: multiply-accumulates of an image.
        few_bits: whether layers will have less than 8 bits, for which more is done.
    """
    batch_size = _together(_TUNING_MACS, macs, _MOST_TUNED)
    amp = has_bfloat16(device)
    size = preprocessing.input_size[1:]
    stages = stages_for(size, config.steps or SYNTHESIS_STEPS, macs) if config.kind == "distilled" else ()
    timed = min(batch_size, _TIMED_IMAGES)
    seconds, tuning = (
        step_seconds(model, preprocessing.input_size, timed, low, device) / timed for low in (amp, False)
    )
    seconds, tuning = seconds / processes(), tuning / processes()
    per_image = sum(seconds * stage.steps * math.prod(stage.size) / math.prod(size) for stage in stages)
    available = min(_MOST_SECONDS, _SECONDS + _SECONDS_PER_MAC * max(0.0, macs - _MACS))
    available *= _FEW_BITS if few_bits else 1.0
    fitting = available / per_image if per_image else _MOST_IMAGES
    images = config.images or min(_MOST_IMAGES, max(_LEAST_IMAGES, 1 << int(math.log2(max(1, fitting)))))
    tuning *= _TUNING_TIME * min(batch_size, images)
    steps = min(RECIPE_STEPS, max(_LEAST_STEPS, int(available / tuning)))
    return Work(images, batch_size, stages, steps, images * per_image + steps * tuning, amp)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself, and so faster than in single precision."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))


def step_seconds(
    model: nn.Module, input_size: tuple[int, int, int], batch_size: int, amp: bool, device: torch.device
) -> float:
    """Seconds of a step with ``batch_size`` images; the first one, which is slower, does not count."""
    model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).eval()
    model.requires_grad_(False)
    x = torch.zeros(batch_size, *input_size, device=device).to(memory_format=torch.channels_last).requires_grad_(True)
    seconds = 0.0
    with Moments(model) as moments:
        for _ in range(2):
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                total = model(x).float().sum()
            (grad,) = torch.autograd.grad(total + moments.take(), x)
            grad.sum().item()  # an accelerator is waited for
            seconds = time.perf_counter() - began
    return seconds
