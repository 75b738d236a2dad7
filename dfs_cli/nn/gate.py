"""Gates: what looks at the features computed so far and scores the options of the next block."""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfs_cli.config import DynamicConfig

State = tuple[Tensor, Tensor]

_BIAS_SCALE = 6.0
_NOISE = 0.05
_SMALL_INPUT = 1 << 16  # values of an image: with fewer, summing all images takes no longer than picking some
_SCALARS = 2  # confidence and margin, in front of the pooled features


def initial_preference(bits: tuple[int, ...]) -> Tensor:
    """Scores (K,) that prefer full execution and, under a growing price of cost, each lower bitwidth in turn.

    A concave function of the relative cost ``(b / max b)**2``: the fourth root. Every option is then the best one for
    some price, from the highest bitwidth down to skipping, and the first choice is the highest.
    """
    relative = torch.tensor(bits, dtype=torch.float32) / max(bits)
    return _BIAS_SCALE * relative.sqrt()


def pool(features: Tensor) -> Tensor:
    """The mean over the pixels of ``features`` (N, C, H, W): (N, C), in single precision.

    Double precision would take forty times as long; on the CPU each image is summed alike in any batch.
    """
    return features.float().mean(dim=(2, 3))


class Gate(nn.Module):
    """A gate scores K options for each of L blocks, from the spatially averaged features that enter the block.

    In evaluation it computes in double precision from the averages: the same image then gets the same scores in every
    batch, up to differences far below what a decision depends on.

    Args:
        channels: width of the features that enter each block, in order.
        config: options and widths.

    ``preference`` (L, K) is what a score is without a look at the image.
    """

    def __init__(self, channels: list[int], config: DynamicConfig) -> None:
        super().__init__()
        self.channels = channels
        self.options = len(config.bits)
        self.embedding, self.hidden = config.embedding, config.hidden
        self.embed = nn.ModuleList(nn.Linear(c, config.embedding) for c in channels)
        self.preference = nn.Parameter(initial_preference(config.bits).repeat(len(channels), 1))

    def start(self, images: int, like: Tensor) -> State:
        """The state before the first block: zeros, (``images``, hidden) each."""
        dtype = torch.float32 if self.training else torch.float64
        zeros = torch.zeros(images, self.hidden, dtype=dtype, device=like.device)
        return zeros, zeros

    def pool(self, features: Tensor, known: Tensor | None = None, changed: Tensor | None = None) -> Tensor:
        """:func:`pool`, not again where it is known.

        Args:
            known: (N, C), means that are right for all images but ``changed`` (indices); it is written to.
        """
        if known is None or changed is None or len(changed) == len(features) or features[0].numel() < _SMALL_INPUT:
            return pool(features)
        for image in changed.tolist():  # picked one by one: features of that size are not to be copied
            known[image] = pool(features[image : image + 1])[0]
        return known

    def forward(self, block: int, pooled: Tensor, state: State) -> tuple[Tensor, State]:
        """Scores for one block.

        Args:
            block: its index.
            pooled: (N, C), the mean over the pixels of the block's input, see :meth:`pool`.
            state: as returned for the block before.

        Returns:
            Logits (N, K), and the state for the next block.
        """
        dtype = state[0].dtype
        with torch.autocast(pooled.device.type, enabled=False):
            scores, state = self._score(block, _linear(self.embed[block], pooled.to(dtype)), state)
            return scores + self.preference[block].to(dtype), state

    @torch.no_grad()
    def normalise_input(self, block: int, features: Tensor) -> None:
        """Scale a block's embedding so that pooled features like ``features`` have zero mean and unit deviation."""
        pooled = pool(features)
        deviation = pooled.std(dim=0, unbiased=False)
        # Channels that hardly vary, and lone images, must not be blown up.
        deviation = (
            deviation.clamp_min(0.1 * float(deviation.mean())) if deviation.any() else torch.ones_like(deviation)
        )
        layer = cast(nn.Linear, self.embed[block])
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ pooled.mean(dim=0))

    @abstractmethod
    def _score(self, block: int, embedded: Tensor, state: State) -> tuple[Tensor, State]: ...

    @abstractmethod
    def macs(self) -> list[int]:
        """Multiply-accumulates of the gate's linear maps for one image, per block."""


class RecurrentGate(Gate):
    """One LSTM along depth, shared by all blocks: the gate of DFS (Shen et al., 2020)."""

    def __init__(self, channels: list[int], config: DynamicConfig) -> None:
        super().__init__(channels, config)
        self.cell = nn.LSTMCell(config.embedding, config.hidden)
        self.head = nn.Linear(config.hidden, self.options, bias=False)
        nn.init.normal_(self.head.weight, std=_NOISE)

    def _score(self, block: int, embedded: Tensor, state: State) -> tuple[Tensor, State]:  # noqa: ARG002
        cell, dtype = self.cell, embedded.dtype
        weights = [p.to(dtype) for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
        hidden, memory = torch.lstm_cell(embedded, state, *weights)
        return _linear(self.head, hidden), (hidden, memory)

    def macs(self) -> list[int]:
        recurrent = 4 * self.hidden * (self.embedding + self.hidden)
        return [c * self.embedding + recurrent + self.hidden * self.options for c in self.channels]


class FeedForwardGate(Gate):
    """A small gate per block that sees only that block's input."""

    def __init__(self, channels: list[int], config: DynamicConfig) -> None:
        super().__init__(channels, config)
        self.heads = nn.ModuleList(nn.Linear(config.embedding, self.options, bias=False) for _ in channels)
        for head in self.heads:
            nn.init.normal_(cast(nn.Linear, head).weight, std=_NOISE)

    def _score(self, block: int, embedded: Tensor, state: State) -> tuple[Tensor, State]:
        return _linear(self.heads[block], embedded.relu()), state

    def macs(self) -> list[int]:
        return [c * self.embedding + self.embedding * self.options for c in self.channels]


class RefineGate(nn.Module):
    """Scores K options for each of L blocks of the second pass, from what the first one found.

    Args:
        channels: width of the features that enter each block; the last pass's pooled features are as wide as ``features``.
        features: width of the features that enter the classifier.
        config: options and hidden width.

    ``preference`` (L, K) is what a score is without a look at the image.
    """

    input_mean: Tensor
    input_deviation: Tensor

    def __init__(self, channels: list[int], features: int, config: DynamicConfig) -> None:
        super().__init__()
        self.blocks, self.options = len(channels), len(config.bits)
        width = _SCALARS + features
        self.register_buffer("input_mean", torch.zeros(width))
        self.register_buffer("input_deviation", torch.ones(width))
        self.embed = nn.Linear(width, config.hidden)
        self.head = nn.Linear(config.hidden, self.blocks * self.options, bias=False)
        nn.init.normal_(self.head.weight, std=_NOISE)
        self.preference = nn.Parameter(initial_preference(config.bits).repeat(len(channels), 1))

    def forward(self, summary: Tensor) -> Tensor:
        """Scores (N, L, K) for ``summary`` (N, 2 + features) as :func:`dfs_cli.nn.probe.summarise` makes it."""
        dtype = torch.float32 if self.training else torch.float64
        with torch.autocast(summary.device.type, enabled=False):
            x = (summary.to(dtype) - self.input_mean.to(dtype)) / self.input_deviation.to(dtype)
            scores = _linear(self.head, _linear(self.embed, x).relu())
            return scores.reshape(-1, self.blocks, self.options) + self.preference.to(dtype)

    @torch.no_grad()
    def normalise_input(self, summary: Tensor) -> None:
        """Scale the input so that summaries like these have zero mean and unit deviation."""
        self.input_mean.copy_(summary.mean(dim=0))
        deviation = summary.std(dim=0, unbiased=False)
        floor = 0.1 * float(deviation.mean()) or 1.0
        self.input_deviation.copy_(deviation.clamp_min(floor))

    def macs(self) -> list[int]:
        """Multiply-accumulates for one image that enters the second pass: all before its first block."""
        total = self.embed.weight.numel() + self.head.weight.numel()
        return [total] + [0] * (self.blocks - 1)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer applied in the precision of ``x``."""
    layer = cast(nn.Linear, layer)
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
