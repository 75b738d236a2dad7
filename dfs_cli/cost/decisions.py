"""Decisions for images: which passes they took, and which option each block had in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_RUN = -1
"""Stands for the option of every block in a pass that an image did not take."""


@dataclass(frozen=True)
class Decisions:
    """The decisions for N images in P passes over L blocks.

    Args:
        options: (N, P, L), indices into the K options; ``NOT_RUN`` in passes that an image did not take.

    Example:
        >>> import torch
        >>> import dfs_cli
        >>> decisions = dfs_cli.Decisions(torch.tensor([[[1, 1], [-1, -1]], [[1, 1], [2, 0]]]))
        >>> decisions.ran.tolist(), decisions.distinct()
        ([[True, False], [True, True]], 2)
        >>> decisions.bits((0, 4, 8)).tolist()
        [[4, 4, -1, -1], [4, 4, 8, 0]]
    """

    options: Tensor

    @classmethod
    def of_pass(cls, options: Tensor) -> Decisions:
        """One pass for all images, with ``options`` (N, L)."""
        return cls(options[:, None])

    @classmethod
    def alike(cls, policy: Tensor, images: int, passes: int = 1) -> Decisions:
        """The same ``policy``, (P, L) or (L,) for each of so many passes, for each of the ``images``."""
        rows = policy if policy.dim() == 2 else policy.expand(passes, -1)
        return cls(rows.expand(images, -1, -1))

    @classmethod
    def join(cls, parts: Iterable[Decisions]) -> Decisions:
        """The decisions for several batches, one after the other."""
        return cls(torch.cat([part.options for part in parts]))

    def __len__(self) -> int:
        return len(self.options)

    def __getitem__(self, rows: Tensor | slice) -> Decisions:
        return Decisions(self.options[rows])

    @property
    def passes(self) -> int:
        """P: how many passes an image may take."""
        return self.options.shape[1]

    @property
    def blocks(self) -> int:
        """L: how many blocks there are."""
        return self.options.shape[2]

    @property
    def ran(self) -> Tensor:
        """(N, P), whether an image took a pass."""
        return self.options[:, :, 0] != NOT_RUN

    def in_pass(self, index: int) -> Tensor:
        """(N, L), the options in a pass."""
        return self.options[:, index]

    def followed_by(self, options: Tensor) -> Decisions:
        """The same decisions and one more pass, with ``options`` (N, L)."""
        return Decisions(torch.cat([self.options, options[:, None]], dim=1))

    def cpu(self) -> Decisions:
        return Decisions(self.options.cpu())

    def equal(self, other: Decisions) -> Tensor:
        """(N,), whether the decisions equal those of ``other``, which is for N images or for one."""
        return (self.options == other.options).flatten(1).all(dim=1)

    def distinct(self) -> int:
        """Number of different policies."""
        return len(self.options.flatten(1).unique(dim=0))

    def most_common(self) -> Decisions:
        """The decisions, for one image, that most images share; of equally common ones, the first in ascending order."""
        policies, counts = self.options.flatten(1).unique(dim=0, return_counts=True)
        return Decisions(policies[counts.argmax()].reshape(1, self.passes, self.blocks))

    def counts(self, options: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """(P, L, K), how many images have each of the K options; ``options`` is K."""
        counts = torch.stack([(self.options == option).sum(dim=0) for option in range(options)], dim=-1)
        return tuple(tuple(tuple(block) for block in blocks) for blocks in counts.tolist())

    def bits(self, bits: tuple[int, ...]) -> Tensor:
        """(N, P * L), the bitwidths that the options stand for, pass after pass; -1 where a pass was not run."""
        table = torch.tensor([*bits, NOT_RUN], device=self.options.device)
        return table[self.options.flatten(1)]
