"""Images of a batch, grouped by what is done with them."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(choice: Tensor, count: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """The options in ``choice`` (N,), ascending, each with the indices, on ``device``, of the images that have it.

    A single option comes with ``choice`` itself, as its indices are not needed. One device synchronisation, if ``choice``
    is on an accelerator.

    Args:
        count: K.
    """
    if len(choice) == 1:
        return [(int(choice), choice)]
    # Not by torch.bincount, which first synchronises with an accelerator for the smallest and the largest value.
    options = torch.arange(count, device=choice.device)
    counts = (choice[:, None] == options).sum(dim=0).tolist()
    present = [(option, count) for option, count in enumerate(counts) if count]
    if len(present) <= 1:
        return [(option, choice) for option, _ in present]
    order = choice.argsort(stable=True).to(device, non_blocking=True)
    rows = order.split([count for _, count in present])
    return [(option, r) for (option, _), r in zip(present, rows, strict=True)]


def empty_batch(images: int, like: Tensor) -> Tensor:
    """An uninitialised batch of ``images`` results, laid out in memory as ``like``."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((images, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout)


def put(y: Tensor, result: Tensor, rows: Tensor) -> None:
    """Write the M images ``y`` to the ``rows`` (M,) of ``result``."""
    if result.device.type != "cpu":
        result[rows] = y.to(result.dtype)
        return
    for image, row in zip(y, rows.tolist(), strict=True):  # whole images: indexing would copy value by value
        result[row].copy_(image)
