"""Gates: what looks at the features computed so far and scores the options of the next block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfs_cli.config import DynamicConfig
from dfs_cli.nn.passes import split_top

State = tuple[Tensor, Tensor]

_BIAS_SCALE = 6.0
_NOISE = 0.05
_SCALARS = 2  # log-odds and margin of the first pass, in front of its pooled features
_SMALL_INPUT = 1 << 16  # values of an image: with fewer, summing all images takes no longer than picking some


_STRENGTH, _LARGEST_SHIFT = 1.0, 1.8
_FLOOR = 1e-5  # divergences below this, in nats, are noise


@torch.no_grad()
def shift_preference(preference: Tensor, sensitivity: Tensor) -> None:
    """Shift ``preference`` (L, K), in place, by how much less (or more) an option harms a block than it harms the average
    block.

    Args:
        sensitivity: (L, K), see :class:`dfs_cli.control.base.Sensitivity`.
    """
    log_harm = sensitivity.clamp_min(_FLOOR).log()
    shift = _STRENGTH * (log_harm.mean(dim=0) - log_harm)
    preference.add_(shift.clamp(-_LARGEST_SHIFT, _LARGEST_SHIFT))


def initial_preference(bits: tuple[int, ...]) -> Tensor:
    """Scores (K,) that prefer full execution and, under a growing cost multiplier, each lower bitwidth in turn.

    A concave function of the relative cost ``(b / max b)**2``: the fourth root. Every option is then the best one for
    some multiplier, from the highest bitwidth down to skipping, and the first choice is the highest.
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

    def __init__(self, channels: Sequence[int], config: DynamicConfig) -> None:
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
            scores, state = self._score(block, linear(self.embed[block], pooled.to(dtype)), state)
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
    def heads_of_scores(self) -> list[nn.Linear]:
        """The linear maps to scores: one for all blocks, or one for each."""

    @staticmethod
    @abstractmethod
    def macs(channels: Sequence[int], config: DynamicConfig) -> tuple[int, ...]:
        """Multiply-accumulates of such a gate's linear maps for one image, per block; arguments as for the gate."""


class RecurrentGate(Gate):
    """One LSTM along depth, shared by all blocks: the gate of DFS (Shen et al., 2020)."""

    def __init__(self, channels: Sequence[int], config: DynamicConfig) -> None:
        super().__init__(channels, config)
        self.cell = nn.LSTMCell(config.embedding, config.hidden)
        self.head = nn.Linear(config.hidden, self.options, bias=False)
        nn.init.normal_(self.head.weight, std=_NOISE)

    def _score(self, block: int, embedded: Tensor, state: State) -> tuple[Tensor, State]:  #
        cell, dtype = self.cell, embedded.dtype
        weights = [p.to(dtype) for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
        hidden, memory = torch.lstm_cell(embedded, state, *weights)
        return linear(self.head, hidden), (hidden, memory)

    def heads_of_scores(self) -> list[nn.Linear]:
        return [self.head]

    @staticmethod
    def macs(channels: Sequence[int], config: DynamicConfig) -> tuple[int, ...]:
        recurrent = 4 * config.hidden * (config.embedding + config.hidden)
        return tuple(c * config.embedding + recurrent + config.hidden * len(config.bits) for c in channels)


class FeedForwardGate(Gate):
    """A small gate per block that sees only that block's input."""

    def __init__(self, channels: Sequence[int], config: DynamicConfig) -> None:
        super().__init__(channels, config)
        self.heads = nn.ModuleList(nn.Linear(config.embedding, self.options, bias=False) for _ in channels)
        for head in self.heads:
            nn.init.normal_(cast(nn.Linear, head).weight, std=_NOISE)

    def _score(self, block: int, embedded: Tensor, state: State) -> tuple[Tensor, State]:
        return linear(self.heads[block], embedded.relu()), state

    def heads_of_scores(self) -> list[nn.Linear]:
        return [cast(nn.Linear, head) for head in self.heads]

    @staticmethod
    def macs(channels: Sequence[int], config: DynamicConfig) -> tuple[int, ...]:
        return tuple(c * config.embedding + config.embedding * len(config.bits) for c in channels)


class SecondPassGate(nn.Module):
    """Scores K options for each of L blocks of the second pass, from what the first one found.

    Args:
        channels: width of the features that enter each block; the last pass's pooled features are as wide as ``features``.
        features: width of the features that enter the classifier.
        config: options and hidden width.

    ``preference`` (L, K) is what a score is without a look at the image.
    """

    input_mean: Tensor
    input_deviation: Tensor

    def __init__(self, channels: Sequence[int], features: int, config: DynamicConfig) -> None:
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
        """Scores (N, L, K) for ``summary`` (N, 2 + features) as :func:`summarise` makes it."""
        dtype = torch.float32 if self.training else torch.float64
        with torch.autocast(summary.device.type, enabled=False):
            x = (summary.to(dtype) - self.input_mean.to(dtype)) / self.input_deviation.to(dtype)
            scores = linear(self.head, linear(self.embed, x).relu())
            return scores.reshape(-1, self.blocks, self.options) + self.preference.to(dtype)

    @torch.no_grad()
    def normalise_input(self, summary: Tensor) -> None:
        """Scale the input so that summaries like these have zero mean and unit deviation."""
        self.input_mean.copy_(summary.mean(dim=0))
        deviation = summary.std(dim=0, unbiased=False)
        floor = 0.1 * float(deviation.mean()) or 1.0
        self.input_deviation.copy_(deviation.clamp_min(floor))

    @staticmethod
    def macs(channels: Sequence[int], features: int, config: DynamicConfig) -> tuple[int, ...]:
        """Multiply-accumulates of such a gate for one image, before each block of the second pass: all before the first."""
        scores = len(channels) * len(config.bits)
        total = (_SCALARS + features) * config.hidden + config.hidden * scores
        return total, *[0] * (len(channels) - 1)


def summarise(logits: Tensor, features: Tensor) -> Tensor:
    """What a pass found, (N, 2 + C): log-odds, margin between the two largest logits, and pooled ``features`` (N, C, H, W)."""
    top, others = split_top(logits)
    scalars = torch.stack([top - others.logsumexp(dim=1), top - others[:, 0]], dim=1)
    return torch.cat([scalars, pool(features).double()], dim=1)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer applied in the precision of ``x``."""
    layer = cast(nn.Linear, layer)
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
