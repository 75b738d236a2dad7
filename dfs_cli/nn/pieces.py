"""Elementwise work on large tensors, a piece after the other: what stays in a core's cache need not come from memory again for
each operation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_VALUES = 1 << 17  # of a piece, for each thread
_LARGE_IMAGE = 1 << 15  # values from which on a dot product for each image is faster


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of parts of ``tensors``, which have one shape (any): of each the same values, all of them once.

    Parts have one dimension. Tensors with different layouts in memory, or with gaps, come as a whole.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
    elif all(tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        flat = [tensor.permute(0, 2, 3, 1).view(-1) for tensor in tensors]
    else:
        return [tensors]
    size = _piece(flat[0])
    return [tuple(flat)] if len(flat[0]) <= size else zip(*(tensor.split(size) for tensor in flat), strict=True)


def groups_of_images(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same images of each of ``tensors``, (M, ...) of (N, ...), in order: few images, or a single large one."""
    images = tensors[0]
    if not images.numel():
        return [tensors]
    count = max(1, _piece(images) * len(images) // images.numel())
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product, (), of two tensors of one shape."""
    if b.dim() == 4 and b.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).to(b.dtype), b.reshape(-1))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product, (N,), of each image of two tensors (N, C, H, W)."""
    if not len(b) or b[0].numel() < _LARGE_IMAGE:
        return (a * b).sum(dim=(1, 2, 3))
    return torch.stack([dot(image, other) for image, other in zip(a.split(1), b.split(1), strict=True)])


def _piece(tensor: Tensor) -> int:
    """Values of a piece: all of them where pieces gain nothing."""
    if tensor.device.type != "cpu" or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return max(1, tensor.numel())
    return _VALUES * torch.get_num_threads()
