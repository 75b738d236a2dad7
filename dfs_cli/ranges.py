"""Ranges of numbers that users give, and checks of them."""

from __future__ import annotations

from collections.abc import Sequence

from dfs_cli.errors import ConfigError

LARGEST_BATCH, MOST_WORKERS, LARGEST_SEED = 2**20, 1024, 2**32 - 1
LARGEST_LIMIT = 1e6
LARGE_BATCH = 64
"""Images per batch that ``dfs bench`` measures in PyTorch, besides single ones."""
BATCH_SIZES = (1, 8, 32)
"""Images per run that ``dfs bench`` measures in ONNX Runtime, by default."""


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Raises ConfigError unless ``value`` is None or from ``low`` to ``high``."""
    if value is not None and not low <= value <= high:
        shown = value if abs(value) < 2**64 else "of so many digits"
        raise ConfigError(f"{name} {shown}: expected {low} to {high}")


def check_loading(batch_size: int | None = None, workers: int | None = None) -> None:
    """Raises ConfigError where images cannot be loaded so."""
    check_range("batch-size", batch_size, 1, LARGEST_BATCH)
    check_range("workers", workers, 0, MOST_WORKERS)


def check_batch_sizes(sizes: Sequence[int]) -> None:
    """Raises ConfigError unless batches of each size fill a block of ``LARGE_BATCH`` images."""
    for size in sizes:
        if size < 1 or LARGE_BATCH % size:
            raise ConfigError(f"--batch-sizes {size}: expected divisors of {LARGE_BATCH}, as 1,8,32")


def check_budget(budget: float) -> None:
    """Raises ConfigError unless 0 < ``budget`` <= 1."""
    if not (0 < budget <= 1):
        raise ConfigError(f"budget {budget:g} is not in (0, 1]: it is a fraction of the dense 32-bit network's cost")


def check_limit(limit: float | None) -> None:
    """Raises ConfigError unless ``limit`` is None or a cost that an image may have."""
    if limit is not None and not 0 < limit <= LARGEST_LIMIT:
        raise ConfigError(
            f"limit {limit:g} is not above 0: it is a fraction of the dense 32-bit network's cost, as 0.05"
        )
