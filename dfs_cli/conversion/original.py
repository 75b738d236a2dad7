"""The network that was converted, and what it achieves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.config import DataConfig
from dfs_cli.conversion.defaults import default_data
from dfs_cli.conversion.setup import eval_batch
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
    model = load_original(manifest, say=observer.note)
    if model is None:
        return None
    images = open_validation(default_data(manifest.architecture, data), manifest.preprocessing, manifest.classes)
    batch_size = eval_batch(manifest.preprocessing)
    workers = choose_workers(workers, images, manifest.preprocessing, batch_size)
    observer.stage("original", len(images))
    log = UnreadableLog("validation", len(images))
    loader = eval_loader(images, batch_size, workers, device.type == "cuda")
    top1, _ = evaluate_accuracy(model.to(device), loader, device, log, observer.advance)
    return top1


def load_original(
    manifest: Manifest, checkpoint: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> nn.Module | None:
    """The network that was converted; None where its weights are not at hand.

    Args:
        checkpoint: its weights; None: those that the manifest names.
        say: told why there is none.

    Raises:
        WeightsError: ``checkpoint`` cannot be read or does not fit.
    """
    args, weights = manifest.model_args, manifest.source.weights
    if checkpoint is not None:
        return load_model(manifest.architecture, True, checkpoint, args.num_classes, args.in_chans)
    if weights is None or weights in ("random", "given by the caller"):
        say(f"the original cannot be compared: its weights ({weights}) are not at hand")
        return None
    try:
        if Path(weights).is_file():
            return load_model(manifest.architecture, True, Path(weights), args.num_classes, args.in_chans)
        return load_model(weights, True, None, args.num_classes, args.in_chans)
    except DfsError as error:
        say(f"the original cannot be compared: {error}")
        return None
