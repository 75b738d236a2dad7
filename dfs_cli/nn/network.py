"""The dynamic network: stem, gate, block, gate, block, ..., head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dfs_cli.config import FULL_BITS, DynamicConfig
from dfs_cli.nn.gate import Gate, RefineGate
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.pooling import pools_after_one_convolution
from dfs_cli.nn.precision import Precision, Routing


class Layout(Protocol):
    """How a family of models is divided: what comes before the residual blocks, and what after."""

    def stem(self, model: nn.Module, images: Tensor) -> Tensor: ...

    def head(self, model: nn.Module, features: Tensor) -> Tensor: ...


@dataclass
class Block:
    """A residual block of the backbone: a black box whose convolutions follow ``precision``.

    Args:
        name: its path in the backbone.
        module: the block itself.
        skip: ``skip(module, x)`` is the block with its residual branch zeroed.
        precision: the bitwidth of its convolutions.
        channels: width of its input.
        keeps_input: skipping it gives its input, the very tensor.
    """

    name: str
    module: nn.Module
    skip: Callable[[nn.Module, Tensor], Tensor]
    precision: Precision
    channels: int
    keeps_input: bool = False


class Output(NamedTuple):
    """What a network makes of a batch of N images.

    Args:
        logits: (N, classes).
        decisions: (N, P * L) as option indices, pass after pass; -1 where an image did not enter the pass.
        probs: in training, the gate's probabilities (M, L, K) for the images it decided on.
        first: with two passes, the first one's logits (N, classes).
        unsure: with two passes, the indices (M,) of the images that entered the second.
    """

    logits: Tensor
    decisions: Tensor
    probs: Tensor | None
    first: Tensor | None = None
    unsure: Tensor | None = None


class DynamicResNet(nn.Module):
    """A residual network that chooses, for each image and block, one of K bitwidths.

    ``forward`` returns logits as any classifier does; :meth:`run` returns the decisions too. Images are grouped by the
    option that they chose, each group runs once, and an option that no image chose runs nothing.

    Args:
        backbone: the model whose layers were replaced by fractional ones.
        layout: its stem and head.
        blocks: its residual blocks, in order.
        edges: the precision of what always runs.
        config: options and gate.
        prices: (L, K), the cost of each option as a fraction of the dense network's cost.
        gate: what scores the options.

    ``operating_point`` is the price of cost: decisions maximise ``logits - operating_point * prices``. It is a plain
    number, moved in tuning and set by calibration.
    """

    prices: Tensor
    gate: Gate

    def __init__(
        self,
        backbone: nn.Module,
        layout: Layout,
        blocks: list[Block],
        edges: Precision,
        config: DynamicConfig,
        prices: Tensor,
        gate: Gate | RefineGate,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layout = layout
        self.blocks = blocks
        self.edges = edges
        self.config = config
        self.add_module("gate", gate)
        self.register_buffer("prices", prices.double(), persistent=False)
        self.operating_point = 0.0
        self.pools_first = pools_after_one_convolution(backbone, [block.name for block in blocks])

    def train(self, mode: bool = True) -> DynamicResNet:
        """As ``nn.Module.train``, except that normalisation keeps its statistics: a group may hold few images."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of ``images`` (N, C, H, W)."""
        return self.run(images).logits

    def run(self, images: Tensor, decisions: Tensor | None = None, explore: float = 0.0) -> Output:
        """Classify ``images`` and tell what was decided.

        Args:
            images: (N, C, H, W).
            decisions: (N, L) option indices to follow instead of the gate.
            explore: in training, the probability per block that images which skip it run its residual branch as well,
                without a gradient of its own, so that the gate learns what skipping cost them.
        """
        state = self.gate.start(len(images), images)
        chosen: list[Tensor] = []
        probs: list[Tensor] = []
        pooled: Tensor | None = None

        def decide(block: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
            nonlocal state, pooled
            if decisions is None or self.training:
                pooled = self.gate.pool(x, pooled, self._changed(block, chosen))
                logits, state = self.gate(block, pooled, state)
                logits = logits - self.operating_point * self.prices[block].to(logits.dtype)
            chosen.append(decisions[:, block] if decisions is not None else logits.argmax(dim=1))
            if self.training:
                probs.append(logits.softmax(dim=1))
            return chosen[-1], probs[-1] if probs else None

        logits, _ = self._walk(images, decide, explore)
        return Output(logits, torch.stack(chosen, dim=1), torch.stack(probs, dim=1) if probs else None)

    def _changed(self, block: int, chosen: list[Tensor]) -> Tensor | None:
        """The images (indices) whose features the block before has changed; None: any, or it is not worth finding out."""
        if not chosen or torch.is_grad_enabled() or chosen[-1].device.type != "cpu":
            return None
        if self.config.bits[0] != 0 or not self.blocks[block - 1].keeps_input:
            return None
        return chosen[-1].nonzero().flatten()

    def _walk(
        self, images: Tensor, decide: Callable[[int, Tensor], tuple[Tensor, Tensor | None]], explore: float
    ) -> tuple[Tensor, Tensor]:
        """Run the network once.

        Args:
            decide: from a block's index and its input (N, C, H, W) to the images' options (N,) and, in training, the
                gate's probabilities (N, K).

        Returns:
            Logits (N, classes) and the features (N, C, H, W) before the head.
        """
        x = self._stem(images)
        for i, block in enumerate(self.blocks):
            x = self._route(block, x, *decide(i, x), explore)
        return self.layout.head(self.backbone, x), x

    def _stem(self, images: Tensor) -> Tensor:
        """The first block's input, laid out as ``images`` are."""
        is_planar = images.device.type == "cpu" and images.is_contiguous() and not torch.is_grad_enabled()
        if not self.pools_first or not is_planar:
            return self.layout.stem(self.backbone, images)
        return self.layout.stem(self.backbone, images.contiguous(memory_format=torch.channels_last)).contiguous()

    @property
    def price(self) -> float:
        """What the gate's scores are charged per unit of cost."""
        return self.operating_point

    @price.setter
    def price(self, value: float) -> None:
        self.operating_point = value

    def fit_gate(self, images: Tensor) -> None:
        """Scale the gate's input to zero mean and unit deviation over ``images`` (N, C, H, W), run in full precision."""
        handles = []
        for i, block in enumerate(self.blocks):

            def normalise(_: nn.Module, inputs: tuple[Tensor, ...], index: int = i) -> None:
                self.gate.normalise_input(index, inputs[0])

            handles.append(block.module.register_forward_pre_hook(normalise))
        try:
            self.run_in_full(images)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run_in_full(self, images: Tensor) -> Tensor:
        """Logits in floating point throughout: before tuning, those of the model that this network was made from."""
        layers = (m for m in self.backbone.modules() if isinstance(m, (FractionalLayer, FractionalBatchNorm)))
        with ExitStack() as stack:
            for precision in {layer.precision for layer in layers}:
                stack.enter_context(precision.at(FULL_BITS))
            x = self.layout.stem(self.backbone, images)
            for block in self.blocks:
                x = block.module(x)
            return self.layout.head(self.backbone, x)

    def _route(self, block: Block, x: Tensor, choice: Tensor, probs: Tensor | None, explore: float) -> Tensor:
        """Run each group of images with its option, (N, C, H, W) to (N, C', H', W'), in the order of the batch."""
        if probs is None and not torch.is_grad_enabled():
            return self._infer(block, x, choice)
        groups = self._groups(choice, x.device)
        if len(groups) <= 1:
            return self._execute(block, x, groups[0][0] if groups else 0, probs, explore)
        outputs = [
            self._execute(block, x[rows], option, None if probs is None else probs[rows], explore)
            for option, rows in groups
        ]
        return torch.cat(outputs)[torch.cat([rows for _, rows in groups]).argsort()]

    def _infer(self, block: Block, x: Tensor, choice: Tensor) -> Tensor:
        """:meth:`_route` where no gradient is recorded: nothing is moved that need not be. It may write into ``x``."""
        groups = self._groups(choice, x.device)
        if len(groups) <= 1:
            return self._execute(block, x, groups[0][0] if groups else 0, None, 0.0)
        result: Tensor | None = None
        for option, rows in groups:
            if self.config.bits[option] == 0 and block.keeps_input:
                result = x
                continue
            y = self._execute(block, x[rows], option, None, 0.0)
            if result is None:
                result = _empty_batch(len(x), y)
            _put(y, result, rows)
        assert result is not None
        return result

    def _groups(self, choice: Tensor, device: torch.device) -> list[tuple[int, Tensor]]:
        """The options that ``choice`` (N,) names, ascending, and the indices, on ``device``, of the images that took each.

        A single option comes with ``choice`` itself: there is nothing to pick. An accelerator is waited for once, if that is
        where ``choice`` is.
        """
        if len(choice) == 1:
            return [(int(choice), choice)]
        # Not by torch.bincount, which on an accelerator waits for the smallest and the largest value first.
        options = torch.arange(len(self.config.bits), device=choice.device)
        counts = (choice[:, None] == options).sum(dim=0).tolist()
        taken = [(option, count) for option, count in enumerate(counts) if count]
        if len(taken) <= 1:
            return [(option, choice) for option, _ in taken]
        order = choice.argsort(stable=True).to(device, non_blocking=True)
        rows = order.split([count for _, count in taken])
        return [(option, r) for (option, _), r in zip(taken, rows, strict=True)]

    def _execute(self, block: Block, x: Tensor, option: int, probs: Tensor | None, explore: float) -> Tensor:
        bits = self.config.bits[option]
        if probs is None:
            return block.skip(block.module, x) if bits == 0 else self._run_block(block, x, bits, None)
        if bits != 0:
            y = self._run_block(block, x, bits, Routing(probs, self.config.bits))
            if self.config.bits[0] == 0:
                with torch.no_grad():
                    branch = y - block.skip(block.module, x)
                y = _with_gradient(y, branch, 1 - probs[:, 0])
            return y
        y = block.skip(block.module, x)
        if explore and torch.rand(()).item() < explore:
            second = int(probs[:, 1:].detach().mean(dim=0).argmax()) + 1
            with torch.no_grad():
                branch = self._run_block(block, x, self.config.bits[second], None) - y
            y = _with_gradient(y, branch, 1 - probs[:, 0])
        return y

    def _run_block(self, block: Block, x: Tensor, bits: int, routing: Routing | None) -> Tensor:
        with block.precision.at(bits, routing):
            result: Tensor = block.module(x)
        return result


def _empty_batch(images: int, like: Tensor) -> Tensor:
    """An uninitialised batch of ``images`` results, laid out in memory as ``like``."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((images, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=layout)


def _put(y: Tensor, result: Tensor, rows: Tensor) -> None:
    """Write the images ``y`` to the places ``rows`` (M,) of ``result``."""
    if result.device.type != "cpu":
        result[rows] = y.to(result.dtype)
        return
    for image, row in zip(y, rows.tolist(), strict=True):  # whole images: indexing would copy value by value
        result[row].copy_(image)


def _with_gradient(y: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """``y`` unchanged, with a gradient for ``weight`` (N,): ``<dL/dy, direction>`` for each image."""
    return y + (weight - weight.detach()).reshape(-1, 1, 1, 1) * direction
