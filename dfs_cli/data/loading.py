"""Loaders whose order depends on seed and position alone."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

from dfs_cli.config import Preprocessing
from dfs_cli.data.images import Batch, Images, InMemory, UnreadableLog, collate
from dfs_cli.distributed import of_all, share
from dfs_cli.errors import DataError

_SHARED_MEMORY = Path("/dev/shm")


class EpochSampler(Sampler[int]):
    """A permutation of the images for each epoch, fixed by seed and epoch, from position ``start`` on.

    Args:
        images: how many there are.
        batch_size: of the batches of all processes together; None: there is one process.
    """

    def __init__(self, images: int, seed: int, batch_size: int | None = None) -> None:
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.epoch = 0
        self.start = 0

    @property
    def draw(self) -> int:
        """A number for the epoch's random choices, different for every seed and epoch."""
        return (self.seed * 1_000_003 + self.epoch) % 2**63

    def __len__(self) -> int:
        left = self.images - self.start
        return left if self.batch_size is None else left // self.batch_size * len(share(self.batch_size))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.draw)
        order = torch.randperm(self.images, generator=generator).tolist()[self.start :]
        if self.batch_size is None:
            yield from order
            return
        part = share(self.batch_size)
        for begin in range(0, len(order) - self.batch_size + 1, self.batch_size):
            yield from order[begin + part.start : begin + part.stop]


class Loader(DataLoader[Batch]):
    """A loader whose worker processes may die."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch's own class of iterators
        """Batches.

        Raises:
            DataError: a worker process died.
        """
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(f"a process that loads images died: {error}; try --workers 0") from None


def choose_workers(
    wanted: int | None,
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Number of processes that load ``images``.

    Batches reach the main process through shared memory, of which a container may have 64 MiB: where it is full, loading hangs.

    Args:
        wanted: None: none for images in memory, else up to two, or none where shared memory is too small.
        batch_size: of the largest batches.
        say: told where shared memory is too small.

    Raises:
        DataError: shared memory is too small for as many workers as are wanted.
    """
    workers = min(2, os.cpu_count() or 1) if wanted is None else wanted
    if not workers or (wanted is None and isinstance(images.source, InMemory | TensorDataset)):
        return 0
    values = max(math.prod(preprocessing.input_size), math.prod(preprocessing.train_size))
    # Each worker loads two batches ahead, and one is in use.
    needed = 4 * values * min(batch_size, len(images)) * (2 * workers + 1)
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else needed
    if free >= needed:
        return workers
    problem = (
        f"{_SHARED_MEMORY} has {free >> 20} MiB, and {workers} workers need {-(-needed >> 20)} MiB of shared memory"
    )
    if wanted is not None:
        raise DataError(f"{problem}: pass --workers 0, or give the container more (docker run --shm-size)")
    say(f"{problem}: images are loaded in this process, as with --workers 0")
    return 0


def train_loader(images: Images, sampler: EpochSampler, batch_size: int, workers: int, pin: bool) -> Loader:
    """Whole batches in the sampler's order."""
    return Loader(
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
    if not sum(of_all(len(batches))):
        raise DataError(f"none of the {unreadable.split} images is readable")
    return batches, torch.cat([torch.empty(0, dtype=torch.long), *targets])


def eval_loader(images: Images, batch_size: int, workers: int, pin: bool = False) -> Loader:
    """Every image once, in order."""
    return Loader(
        images,  # type: ignore[arg-type]  # collated to batches
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
    )
