"""Datasets whose unreadable images are counted and named instead of being fatal or silently replaced."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset

from dfs_cli.data.decode import read_image
from dfs_cli.distributed import of_all
from dfs_cli.errors import DataError, printable

UNREADABLE_LIMIT = 0.01
"""Share of a split's images that may be unreadable."""


class Unreadable(NamedTuple):
    """Stands in a batch for an image that could not be read."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images (N, C, H, W), their class indices (N,), and the images that could not be read."""

    images: Tensor
    targets: Tensor
    unreadable: tuple[Unreadable, ...]


Sample = tuple[Tensor, int] | Unreadable


class InMemory(Dataset[tuple[Image.Image, int]]):
    """A source of images that lie in memory, as bytes (N, H, W) or (N, H, W, C), with their class indices (N,)."""

    pixels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])


class Images(Dataset[Sample]):
    """A map-style dataset of (image, class index), transformed, in the order of ``indices``.

    Args:
        source: (image, class index) by position; Pillow's images, or tensors (C, H, W) where there is no transform.
        transform: from an image to a tensor (C, H, W).
        indices: positions in ``source``; None: all.
        mode: Pillow's mode that images are converted to, as ``RGB`` or ``L``; None: as they are.

    ``draw`` makes random transforms repeatable: every process transforms an image in the same way until ``draw`` changes.
    With None, transforms use the global generators. ``note`` says where the images were opened, how many there are and what was
    left out; it is empty where the caller made them, and of parts of them.

    Example:
        >>> import torch
        >>> import dfs_cli
        >>> source = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4))
        >>> images = dfs_cli.Images(source, transform=lambda image: image + 1)
        >>> image, target = images.subset([2])[0]
        >>> float(image.mean()), target
        (1.0, 2)
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[[Any], Tensor] | None = None,
        indices: Sequence[int] | None = None,
        mode: str | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.draw: int | None = None
        self.note = ""
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        position = self.indices[index]
        try:
            image, target = self._read(position)
            if self.transform is not None:
                with _seeded(self.draw, position):
                    image = self.transform(image)
        except Exception as error:  # decoders raise anything, and so does resizing a line of pixels
            reason = str(error).partition(" <")[0] or type(error).__name__  # Pillow appends the file object
            return Unreadable(printable(self._name(position)), printable(reason))
        return image, int(target)

    def subset(self, indices: Sequence[int]) -> Images:
        """Some of the images, by position in this dataset."""
        part = Images(self.source, self.transform, [self.indices[i] for i in indices], self.mode)
        part.draw = self.draw
        return part

    def spread(self, count: int) -> Images:
        """At most ``count`` of the images, from all over: in a folder those of a class stand side by side."""
        count = min(count, len(self))
        return self.subset([i * len(self) // count for i in range(count)])

    def with_transform(self, transform: Callable[[Any], Tensor]) -> Images:
        """The same images under another transform."""
        return Images(self.source, transform, self.indices, self.mode)

    def names(self) -> list[str]:
        """Names of the images: paths, or positions in the source."""
        return [self._name(position) for position in self.indices]

    def _read(self, position: int) -> tuple[Any, int]:
        if isinstance(self.source, ImageDataset):
            # Not through ImageDataset: it replaces an unreadable image by the next one.
            file, target = self.source.reader[position][:2]
            with file:
                image = read_image(file)
        else:
            image, target = self.source[position][:2]
        return (image.convert(self.mode) if self.mode and isinstance(image, Image.Image) else image), target

    def _name(self, position: int) -> str:
        # Some readers of torchvision have an attribute of that name.
        filename = getattr(self.source, "filename", None)
        return str(filename(position)) if callable(filename) else f"image {position}"


@contextmanager
def _seeded(draw: int | None, position: int) -> Iterator[None]:
    """Random numbers that depend on ``draw`` and ``position`` alone; the generators are left as they were."""
    if draw is None:
        yield
        return
    seed = (draw * 1_000_003 + position) % 2**63
    before = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for every accelerator, each time
    try:
        yield
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable images."""
    readable = [s for s in samples if not isinstance(s, Unreadable)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    targets = torch.tensor([target for _, target in readable], dtype=torch.long)
    return Batch(images, targets, tuple(s for s in samples if isinstance(s, Unreadable)))


class UnreadableLog:
    """Counts and names the unreadable images of one split.

    Args:
        split: its name, for messages.
        total: how many images it has.

    ``reasons`` maps the names of the unreadable images to why they could not be read.
    """

    def __init__(self, split: str, total: int) -> None:
        self.split, self.total = split, total
        self.reasons: dict[str, str] = {}

    def join(self) -> None:
        """Add what other processes have found.

        Raises:
            DataError: as :meth:`add`.
        """
        for reasons in of_all(self.reasons):
            self.add([Unreadable(name, reason) for name, reason in reasons.items()])

    def add(self, unreadable: Sequence[Unreadable]) -> None:
        """Add images.

        Raises:
            DataError: more than ``UNREADABLE_LIMIT`` of the split's images are unreadable.
        """
        self.reasons.update((u.name, u.reason) for u in unreadable)
        if len(self.reasons) > UNREADABLE_LIMIT * self.total:
            name, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"more than 1% of the {self.total} {self.split} images are unreadable, the first is {name}: {reason}"
            )
