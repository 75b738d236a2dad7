"""What the original network achieves, where a conversion had no images to find that out on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.config import DataConfig
from dfs_cli.conversion.defaults import default_data
from dfs_cli.conversion.setup import EVAL_BATCH, eval_batch
from dfs_cli.data.images import UnreadableLog
from dfs_cli.data.loading import choose_workers, eval_loader
from dfs_cli.data.splits import open_validation
from dfs_cli.errors import DfsError
from dfs_cli.evaluation.evaluate import evaluate_accuracy
from dfs_cli.models.zoo import load_model
from dfs_cli.observer import Observer


def original_top1(
    manifest: Manifest, data: DataConfig, device: torch.device, workers: int | None, observer: Observer
) -> float | None:
    """Top-1, in percent, of the network that was converted, on the validation split; None where its weights are not at hand.

    Raises:
        DataError: images are missing or unreadable, or have other classes.
    """
    try:
        model = _load(manifest)
    except DfsError as error:
        observer.note(f"the original cannot be compared: {error}")
        return None
    if model is None:
        observer.note(f"the original cannot be compared: its weights ({manifest.source.weights}) are not at hand")
        return None
    images = open_validation(default_data(manifest.architecture, data), manifest.preprocessing, manifest.classes)
    workers = choose_workers(workers, images, manifest.preprocessing, EVAL_BATCH)
    observer.stage("original", len(images))
    log = UnreadableLog("validation", len(images))
    loader = eval_loader(images, eval_batch(manifest.preprocessing), workers, device.type == "cuda")
    top1, _ = evaluate_accuracy(model.to(device), loader, device, log, observer.advance)
    return top1


def _load(manifest: Manifest) -> nn.Module | None:
    weights = manifest.source.weights
    if weights is None or weights in ("random", "given by the caller"):
        return None
    args = manifest.model_args
    if Path(weights).is_file():
        return load_model(manifest.architecture, True, Path(weights), args.num_classes, args.in_chans)
    return load_model(weights, True, None, args.num_classes, args.in_chans)
