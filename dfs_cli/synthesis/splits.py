"""Synthetic images as the splits of a conversion, and what they look like."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import Preprocessing
from dfs_cli.data.images import Images, InMemory
from dfs_cli.data.loading import eval_loader
from dfs_cli.data.preprocessing import eval_transform
from dfs_cli.data.splits import Splits, image_mode
from dfs_cli.distributed import is_first, joined_rows, of_first, rank, size
from dfs_cli.observer import Observer
from dfs_cli.synthesis.cache import cached, store
from dfs_cli.synthesis.distil import distil, noise
from dfs_cli.synthesis.work import Work

_SHOWN, _COLUMNS = 64, 16
_BATCH = 32
_MADE = "images"  # in the checkpoint
_APART = 1_000_003  # seeds of processes


class SyntheticImages(InMemory):
    """Images (N, C, H, W) as bytes. Their classes are 0 until the original network has given them others."""

    def __init__(self, images: Tensor) -> None:
        pixels = images.permute(0, 2, 3, 1).numpy()
        self.pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        self.targets = np.zeros(len(images), dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write each image as a PNG file into ``folder``, in a folder named after its class."""
        for index in range(len(self)):
            image, target = self[index]
            path = folder / f"{target}" / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)

    def sheet(self) -> bytes:
        """The first images beside each other, as a PNG file."""
        pixels = torch.from_numpy(self.pixels[:_SHOWN])
        pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        columns = min(_COLUMNS, math.ceil(math.sqrt(len(pixels))))
        file = io.BytesIO()
        Image.fromarray(make_grid(pixels, nrow=columns, padding=2).permute(1, 2, 0).numpy()).save(file, format="PNG")
        return file.getvalue()


def make_images(
    model: nn.Module,
    preprocessing: Preprocessing,
    work: Work,
    seed: int,
    device: torch.device,
    observer: Observer,
    checkpoint: Checkpoint | None = None,
) -> Tensor:
    """Make images (N, C, H, W), as bytes, or take those that were made before with the same weights and settings."""
    checkpoint = checkpoint or Checkpoint()
    made: Tensor | None = checkpoint.get(_MADE)
    if made is not None:
        return made
    generator = torch.Generator().manual_seed(seed)
    if not work.stages:
        made = noise(work.images, preprocessing, generator)
    elif (made := of_first(cached(model, preprocessing, work, seed) if is_first() else None)) is not None:
        observer.note(f"{len(made)} synthetic images were made before with these weights and settings")
    else:
        own = -(-work.images // size())  # all processes make as many, step by step with each other
        observer.stage("making images", own * sum(stage.steps for stage in work.stages))
        generator.manual_seed(seed + rank() * _APART)
        made = distil(model, preprocessing, own, work.stages, generator, device, work.amp, observer.advance, checkpoint)
        made = joined_rows(made)[0][: work.images]
        if is_first():
            store(made, model, preprocessing, work, seed)
    checkpoint.keep(_MADE, made)
    return made


def synthetic_splits(model: nn.Module, preprocessing: Preprocessing, made: Tensor, device: torch.device) -> Splits:
    """The splits of a conversion: the images ``made`` (N, C, H, W), the same in all, with the original's answers as classes,
    which are numbered.

    They have the size of the network's input already, and are not cropped.
    """
    shown = replace(preprocessing, crop_pct=1.0)
    transform, mode = eval_transform(shown), image_mode(preprocessing)
    source = SyntheticImages(made)
    images = Images(source, transform, mode=mode)
    source.targets = _answers(model, images, device).numpy()
    names = tuple(str(i) for i in range(int(model.num_classes)))  # type: ignore[arg-type]
    return Splits(images, images, images, names)


@torch.inference_mode()
def _answers(model: nn.Module, images: Images, device: torch.device) -> Tensor:
    """The classes (N,) that ``model`` gives ``images``."""
    model = copy.deepcopy(model).to(device)
    return torch.cat([model(batch.images.to(device)).argmax(dim=1).cpu() for batch in eval_loader(images, _BATCH, 0)])
