"""Synthetic images are kept in the user's cache folder, under a hash of what they were made from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfs_cli.atomic import File, write_files
from dfs_cli.config import Preprocessing
from dfs_cli.distributed import size
from dfs_cli.errors import OutputError
from dfs_cli.locks import locked
from dfs_cli.synthesis.work import Work

_RECIPE = 2
"""Raised where the same settings give other images."""


def cache_folder() -> Path:
    """``dfs/synthetic`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfs" / "synthetic"


def cached(model: nn.Module, preprocessing: Preprocessing, work: Work, seed: int) -> Tensor | None:
    """The images (N, C, H, W) that were made before; None: there are none, or they cannot be read."""
    try:
        tensors = safetensors.torch.load_file(_path(model, preprocessing, work, seed))
    except (OSError, SafetensorError):
        return None
    images = tensors.get("images")
    expected = (work.images, *preprocessing.input_size)
    return images if images is not None and images.dtype == torch.uint8 and images.shape == expected else None


def store(images: Tensor, model: nn.Module, preprocessing: Preprocessing, work: Work, seed: int) -> None:
    """Keep images (N, C, H, W), where that is possible."""
    path = _path(model, preprocessing, work, seed)
    content = safetensors.torch.save({"images": images.contiguous()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            write_files([File(path, content)], replace=True)
    except (OSError, OutputError):
        return  # the next run makes them again


def _path(model: nn.Module, preprocessing: Preprocessing, work: Work, seed: int) -> Path:
    settings: tuple[Any, ...] = (_RECIPE, preprocessing, work.images, work.stages, work.amp, seed)
    if size() > 1:  # each makes its share
        settings += (size(),)
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return cache_folder() / f"{digest.hexdigest()[:32]}.safetensors"
