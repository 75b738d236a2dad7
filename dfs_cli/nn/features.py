"""Features as 8-bit codes: what blocks hand on, and what is added up to it.

Where a network has no more than 8 bits anywhere, its features between the blocks are bytes with learned step sizes, and so are
the two sides of the addition at a block's end. Integer hardware then needs floating point nowhere in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dfs_cli.nn.gradients import fake_quantize
from dfs_cli.nn.precision import Precision
from dfs_cli.nn.quantization import BYTE_BITS, LARGEST_BYTE, best_step, identity, quantize
from dfs_cli.presets import FULL_BITS

_SAMPLED = 1 << 18


class ByteFeatures(nn.Module):
    """Rounds features to 8-bit codes, with a step size for each of Q bitwidths of the layers before them.

    Args:
        precision: of those layers; None: whatever they have, the step size is the same (Q = 1), and rounding is not left out.
        unit: of which the step sizes are short multiples, see :meth:`step`; it is no part of this module.
    """

    features_signed: Tensor  # (), bool
    unit: ByteFeatures | None

    def __init__(self, precision: Precision | None, device: torch.device, unit: ByteFeatures | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.bitwidths = () if precision is None else precision.quantized
        self.__dict__["unit"] = unit
        self.log_feature_steps = nn.Parameter(torch.zeros(max(1, len(self.bitwidths)), device=device))
        self.register_buffer("features_signed", torch.tensor(False, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape, rounded to codes times their step size; unchanged where the layers before run in full."""
        if self.precision is not None and self.precision.bits == FULL_BITS:
            return x
        step, (low, high) = self.step(), self.limits()
        # Not by the mode of training, in which batch-norm, and all that is part of it, stays as in evaluation.
        if torch.is_grad_enabled():
            return fake_quantize(x.float(), step, low, high)
        return quantize(x.float(), step, low, high)

    def step(self) -> Tensor:
        """The step size, ().

        A number of 8 significant bits, or such a number times ``unit``'s step size. Codes times step sizes, and their sums, are
        then exact in single precision, in whatever order a runtime computes them.
        """
        row = 0 if self.precision is None else self.bitwidths.index(self.precision.bits)
        return self._shortened(self.log_feature_steps[row].exp())

    def _shortened(self, steps: Tensor) -> Tensor:
        if self.unit is None:
            return _shortened(steps)
        unit = self.unit.step()
        return _shortened(steps / unit) * unit

    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return (-LARGEST_BYTE - 1, LARGEST_BYTE) if self.is_signed() else (0, 2 * LARGEST_BYTE + 1)

    def is_signed(self) -> bool:
        # Reading a buffer on an accelerator needs a device synchronisation.
        cached = self.__dict__.get("_signed")
        key = identity(self.features_signed)
        if cached is None or cached[0] != key:
            cached = self.__dict__["_signed"] = (key, bool(self.features_signed))
        return cast(bool, cached[1])

    @torch.no_grad()
    def fit(self, samples: Sequence[Tensor]) -> None:
        """Set all step sizes, and whether codes are signed, from samples of any shape."""
        values = torch.cat([sampled(x) for x in samples])
        # What is added up may have any sign, whatever the samples show.
        self.features_signed.fill_(self.precision is not None or bool((values < 0).any()))
        if not values.any() and self.unit is not None:
            values = self.unit.step()[None]
        self.log_feature_steps.fill_(float(best_step(values[None], BYTE_BITS, self.is_signed()).log()))

    @torch.no_grad()
    def settle(self) -> None:
        """Make the step sizes final: the same on every device, though exponentials differ in the last digit."""
        self.log_feature_steps.copy_(self._shortened(self.log_feature_steps.exp()).log())


def sampled(x: Tensor) -> Tensor:
    """Values of ``x``, of any shape, evenly spaced in it: (values,), no more than step sizes are fitted on."""
    values = x.detach().flatten()
    return values[:: max(1, len(values) // _SAMPLED)].to(torch.float32, copy=True)


def _shortened(x: Tensor) -> Tensor:
    """``x`` rounded to 8 significant bits; the gradient passes straight through."""
    return x + (x.bfloat16().to(x.dtype) - x).detach()


class Stream(nn.Module):
    """The features that L blocks hand on, as codes.

    Args:
        groups: (L + 1,), for the input of each block and of the head, the index of its step size. Blocks that may hand on
            their input share a step size with it.
    """

    def __init__(self, groups: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.steps = nn.ModuleList(ByteFeatures(None, device) for _ in range(max(groups) + 1))

    def at(self, position: int) -> ByteFeatures:
        """What rounds the input of a block, or of the head at L."""
        return cast(ByteFeatures, self.steps[self.groups[position]])

    def fit(self, samples: Sequence[Tensor]) -> None:
        """Set the step sizes from samples of the L + 1 features."""
        for group, features in enumerate(self.steps):
            chosen = [x for x, its in zip(samples, self.groups, strict=True) if its == group]
            cast(ByteFeatures, features).fit(chosen)
