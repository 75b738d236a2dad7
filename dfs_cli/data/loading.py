"""Loaders whose order depends on seed and position alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dfs_cli.data.digits import Digits
from dfs_cli.data.images import Batch, Images, UnreadableLog, collate
from dfs_cli.errors import DataError


class EpochSampler(Sampler[int]):
    """A permutation of the images for each epoch, fixed by seed and epoch, from position ``start`` on."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.epoch = 0
        self.start = 0

    @property
    def draw(self) -> int:
        """A number for the epoch's random choices, different for every seed and epoch."""
        return (self.seed * 1_000_003 + self.epoch) % 2**63

    def __len__(self) -> int:
        return self.images - self.start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.draw)
        yield from torch.randperm(self.images, generator=generator).tolist()[self.start :]


def default_workers(images: Images) -> int:
    """Number of worker processes: 0 for the embedded digits, which are in memory, else up to 2."""
    return 0 if isinstance(images.source, Digits) else min(2, os.cpu_count() or 1)


def train_loader(images: Images, sampler: EpochSampler, batch_size: int, workers: int, pin: bool) -> DataLoader[Batch]:
    """Whole batches in the sampler's order."""
    return DataLoader(
        images,  # type: ignore[arg-type]  # collated to batches
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        drop_last=True,
        generator=torch.Generator().manual_seed(sampler.seed),
    )


def load_all(
    images: Images,
    batch_size: int,
    workers: int,
    device: torch.device,
    unreadable: UnreadableLog,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[list[Tensor], Tensor]:
    """Load all ``images`` to batches (N, C, H, W) on ``device``, and the class indices of all batches to one tensor.

    Args:
        on_batch: called after each batch with the number of its images, readable or not.

    Raises:
        DataError: no image is readable, or too many are unreadable.
    """
    batches, targets = [], []
    for batch in eval_loader(images, batch_size, workers):
        unreadable.add(batch.unreadable)
        on_batch(len(batch.targets) + len(batch.unreadable))
        if len(batch.targets):
            batches.append(batch.images.to(device))
            targets.append(batch.targets)
    if not batches:
        raise DataError(f"none of the {unreadable.split} images is readable")
    return batches, torch.cat(targets)


def eval_loader(images: Images, batch_size: int, workers: int, pin: bool = False) -> DataLoader[Batch]:
    """Every image once, in order."""
    return DataLoader(
        images,  # type: ignore[arg-type]  # collated to batches
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
    )
