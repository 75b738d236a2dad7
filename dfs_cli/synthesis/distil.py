"""Images by optimisation: noise, until batch-norm layers see what they remember."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import Preprocessing
from dfs_cli.distributed import of_all, rank, size
from dfs_cli.synthesis.moments import Moments

_RATE = 0.1  # of Adam, in units of the pixels' standard deviation
_CLASS_WEIGHT = 1.0
_SMOOTHNESS_WEIGHT = 0.02
_LEAST_CONFIDENCE = 0.5  # of the class that an image is made for
_SHIFT = 1 / 16  # of the image's sides, at most
_MAKING = "making"  # in the checkpoint


class Stage(NamedTuple):
    """Part of the optimisation: so many steps at a size (H, W), with so many images together, whose statistics are taken."""

    size: tuple[int, int]
    steps: int
    batch_size: int


def draw_targets(images: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class indices (N,), each class as often as the others, and the probabilities (N, classes) that images are made for.

    Images that a network is sure of say little about the borders between classes, which low bitwidths move: so the class has
    a probability from 0.5 to 1, and another one the rest (after IntraQ; Zhong et al., 2022).
    """
    targets = (
        torch.randperm(images, generator=generator) + torch.randint(classes, (1,), generator=generator)
    ) % classes
    others = (targets + torch.randint(1, classes, (images,), generator=generator)) % classes
    confidence = _LEAST_CONFIDENCE + (1 - _LEAST_CONFIDENCE) * torch.rand(images, 1, generator=generator)
    probabilities = confidence * F.one_hot(targets, classes) + (1 - confidence) * F.one_hot(others, classes)
    return targets, probabilities


def noise(images: int, preprocessing: Preprocessing, generator: torch.Generator) -> Tensor:
    """Gaussian noise with the pixels' mean and standard deviation, (N, C, H, W) as bytes: the baseline."""
    return _to_bytes(torch.randn(images, *preprocessing.input_size, generator=generator), preprocessing)


def distil(
    model: nn.Module,
    preprocessing: Preprocessing,
    images: int,
    stages: Sequence[Stage],
    generator: torch.Generator,
    device: torch.device,
    amp: bool = False,
    advance: Callable[[int], None] = lambda images: None,
    checkpoint: Checkpoint | None = None,
) -> Tensor:
    """Images (N, C, H, W), as bytes, under which the batch-norm layers of ``model`` see their stored statistics.

    With class targets, random shifts and flips and a prior for smoothness (DeepInversion; Yin et al., 2020), from coarse to
    fine.

    Args:
        model: left unchanged.
        images: N.
        stages: sizes, steps and batches, in order; the last size is that of the result.
        generator: of all random numbers, on the CPU.
        amp: compute in bfloat16, but for statistics.
        advance: called after each step, with the number of its images.
        checkpoint: where the images are saved now and then, and what it goes on from. Of several processes, all have as many
            images to make, and their states are saved together.
    """
    checkpoint = checkpoint or Checkpoint()
    model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last).eval()
    model.requires_grad_(False)
    saved = checkpoint.take(_MAKING) or []
    state = _State.restored(saved[rank()], generator) if len(saved) == size() else None
    if state is None:
        _, wanted = draw_targets(images, int(model.num_classes), generator)  # type: ignore[arg-type]
        x = torch.randn(images, preprocessing.input_size[0], *stages[0].size, generator=generator)
        state = _State(generator, wanted, x)
    else:
        advance(state.images_done(stages))
    with Moments(model) as moments, checkpoint.stop.waited_for():
        while state.stage < len(stages):
            _run_stage(state, stages[state.stage], model, moments, device, preprocessing, amp, advance, checkpoint)
    checkpoint.stop.obey()
    return _to_bytes(state.x, preprocessing)


@dataclass
class _State:
    """How far it has come.

    Args:
        generator: of all random numbers.
        wanted: class probabilities (N, classes).
        x: images (N, C, H, W) as they entered the stage.
        done: those that have left it.
        stage, step: number of stages done, and of steps with the present images.
        present: images that are being optimised, with Adam's state; None: none yet.
    """

    generator: torch.Generator
    wanted: Tensor
    x: Tensor
    done: list[Tensor] = field(default_factory=list)
    stage: int = 0
    step: int = 0
    present: tuple[Tensor, dict[str, Any]] | None = None

    def saved(self) -> dict[str, Any]:
        """Plain values, and tensors on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _on_cpu(values | {"generator": self.generator.get_state()})  # type: ignore[no-any-return]

    @classmethod
    def restored(cls, saved: dict[str, Any], generator: torch.Generator) -> _State:
        """What :meth:`saved` gave."""
        generator.set_state(saved["generator"])
        return cls(**{**saved, "generator": generator})

    def images_done(self, stages: Sequence[Stage]) -> int:
        """Images times steps that are done."""
        whole = sum(stage.steps for stage in stages[: self.stage]) * len(self.x)
        present = 0 if self.present is None else len(self.present[0]) * self.step
        return whole + sum(map(len, self.done)) * stages[self.stage].steps + present


def _run_stage(
    state: _State,
    stage: Stage,
    model: nn.Module,
    moments: Moments,
    device: torch.device,
    preprocessing: Preprocessing,
    amp: bool,
    advance: Callable[[int], None],
    checkpoint: Checkpoint,
) -> None:
    groups = list(zip(state.x.split(stage.batch_size), state.wanted.split(stage.batch_size), strict=True))
    for some, classes in groups[len(state.done) :]:
        start = _resize(some, stage.size).to(device)
        x = _optimise(
            state, model, moments, start, classes.to(device), stage.steps, preprocessing, amp, advance, checkpoint
        )
        state.done.append(x.cpu())
        state.step, state.present = 0, None
    state.x, state.done = torch.cat(state.done), []
    state.stage += 1


def _on_cpu(value: Any) -> Any:
    """Nested values, with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, (list, tuple)) else value


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _optimise(
    state: _State,
    model: nn.Module,
    moments: Moments,
    x: Tensor,
    wanted: Tensor,
    steps: int,
    preprocessing: Preprocessing,
    amp: bool,
    advance: Callable[[int], None],
    checkpoint: Checkpoint,
) -> Tensor:
    """Images (N, C, H, W) after ``steps`` steps from ``x``, for the class probabilities ``wanted`` (N, classes); after the rest
    of the steps where some are done already."""
    low, high = (limit.to(x.device) for limit in _pixel_limits(preprocessing))
    x = (x.clamp(low, high) if state.present is None else state.present[0].to(x.device)).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=_RATE, betas=(0.5, 0.9))
    if state.present is not None:
        optimizer.load_state_dict(state.present[1])
    while state.step < steps:
        optimizer.param_groups[0]["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * state.step / steps))
        seen = _jitter(x, state.generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp):
            logits = model(seen)
        loss = moments.take() + _CLASS_WEIGHT * F.cross_entropy(logits.float(), wanted)
        loss = loss + _SMOOTHNESS_WEIGHT * roughness(x)
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(low, high)
        advance(len(x))
        state.step, state.present = state.step + 1, (x.detach(), optimizer.state_dict())
        checkpoint.reached(_MAKING, lambda: of_all(state.saved()), milestone=state.step == steps)
    return x.detach()


def _jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` (N, C, H, W), shifted by a few pixels, and mirrored half of the time."""
    limits = [max(1, round(_SHIFT * side)) for side in x.shape[2:]]
    shifts = [int(torch.randint(-limit, limit + 1, (), generator=generator)) for limit in limits]
    x = x.roll(shifts, dims=(2, 3))
    return x.flip(3) if torch.rand((), generator=generator) < 0.5 else x


def roughness(x: Tensor) -> Tensor:
    """Mean squared difference between neighbouring pixels of ``x`` (N, C, H, W)."""
    return x.diff(dim=2).square().mean() + x.diff(dim=3).square().mean()


def _pixel_limits(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Black and white after normalisation, (1, C, 1, 1) each."""
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return -mean / std, (1 - mean) / std


def _to_bytes(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised images (N, C, H, W) as bytes."""
    low, high = _pixel_limits(preprocessing)
    return ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
