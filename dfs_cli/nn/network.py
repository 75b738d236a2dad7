"""The executor: runs passes over a residual network, groups images by option, and runs only what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dfs_cli.cost.decisions import Decisions
from dfs_cli.nn.features import ByteFeatures, Stream
from dfs_cli.nn.grouping import empty_batch, groups_of, put
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.passes import FULL_VIEW, Output, TuningTarget, View
from dfs_cli.nn.pooling import pools_after_one_convolution
from dfs_cli.nn.precision import Precision, Routing
from dfs_cli.presets import FULL_BITS


class Layout(Protocol):
    """The parts of a model before and after its residual blocks.

    ``stem`` maps images (N, C, H, W) to the first block's input, ``head`` the last block's output to logits (N, classes).
    """

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
        channels: number of channels of its input.
        keeps_input: when skipped, it returns its input tensor itself.
        output: rounds what the block hands on; None: nothing does.
    """

    name: str
    module: nn.Module
    skip: Callable[[nn.Module, Tensor], Tensor]
    precision: Precision
    channels: int
    keeps_input: bool = False
    output: ByteFeatures | None = None


class Decider(Protocol):
    """The interface of a controller as seen from the network; see :class:`dfs_cli.control.base.Controller`."""

    views: tuple[View, ...]
    operating_point: float
    cost_multiplier: float
    limit: float

    def run(
        self,
        network: DynamicResNet,
        images: Tensor,
        decisions: Decisions | None = None,
        target: TuningTarget | None = None,
    ) -> Output: ...

    def policies(self) -> list[Tensor]: ...

    def freeze(self) -> None: ...

    def force(self, policies: Tensor) -> None: ...


Choose = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""From a block's index and input (N, C, H, W) to the options (N,) of the images and, in training, the probabilities (N, K) with
which they were chosen; None where there are none."""


class DynamicResNet(nn.Module):
    """A residual network that runs each block of each image with one of K options, as its controller decides.

    ``forward`` returns logits as any classifier does; :meth:`run` returns the decisions too. Images are grouped by the
    option that was chosen for them, each group runs once, and an option that no image has does not run.

    Args:
        backbone: the model whose layers were replaced by fractional ones.
        layout: its stem and head.
        blocks: its residual blocks, in order.
        fixed: the precision of the fixed layers, which has the viewpoint of all layers.
        bits: the K options, ascending bitwidths.
        controller: chooses the options, a :class:`dfs_cli.control.base.Controller`.
        features: what blocks hand on as bytes; None: floating point numbers.

    Example:
        >>> import torch
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> network, _ = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> images = torch.rand(3, 1, 8, 8)
        >>> output = network.run(images)
        >>> output.logits.shape, output.decisions.options.shape
        (torch.Size([3, 10]), torch.Size([3, 2, 9]))
        >>> bool(torch.equal(network(images), output.logits))
        True
    """

    controller: Decider

    def __init__(
        self,
        backbone: nn.Module,
        layout: Layout,
        blocks: Sequence[Block],
        fixed: Precision,
        bits: tuple[int, ...],
        controller: nn.Module,
        features: Stream | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layout = layout
        self.blocks = blocks
        self.fixed = fixed
        self.bits = bits
        self.add_module("controller", controller)
        self.features = features
        self.pools_first = pools_after_one_convolution(backbone, [block.name for block in blocks])

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.backbone.parameters()).device

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

    def run(self, images: Tensor, decisions: Decisions | None = None, target: TuningTarget | None = None) -> Output:
        """Classify ``images`` and return the decisions, too.

        Args:
            images: (N, C, H, W).
            decisions: followed instead of the controller's; they may have fewer passes.
            target: what the network is tuned for, in training.
        """
        return self.controller.run(self, images, decisions, target)

    def seeing(self, view: View) -> AbstractContextManager[None]:
        """Let the layers see images of the size of ``view`` within the context."""
        return self.fixed.viewpoint.at(int(view.scale != 1))

    def run_pass(
        self, images: Tensor, choose: Choose, explored: float = 0.0, view: View = FULL_VIEW
    ) -> tuple[Tensor, Tensor]:
        """One pass over ``images`` (N, C, H, W), with the options that ``choose`` returns block by block.

        Args:
            explored: see :class:`dfs_cli.nn.passes.TuningTarget`.
            view: what the pass sees of the images.

        Returns:
            Logits (N, classes) and the features (N, C', H', W') before the head.
        """
        with self.seeing(view):
            x = self.stem(view.of(images))
            for i, block in enumerate(self.blocks):
                x = self._route(block, x, *choose(i, x), explored)
            return self.layout.head(self.backbone, x), x

    @torch.no_grad()
    def run_block(self, index: int, x: Tensor, option: int) -> Tensor:
        """A block's output for its input ``x`` (N, C, H, W), with one option for all images."""
        return self._execute(self.blocks[index], x, option, None, 0.0)

    @torch.no_grad()
    def finish(self, first: int, x: Tensor, option: int) -> Tensor:
        """Logits (N, classes) from the input ``x`` (N, C, H, W) of block ``first``, with one option from there on."""
        for index in range(first, len(self.blocks)):
            x = self.run_block(index, x, option)
        logits: Tensor = self.layout.head(self.backbone, x)
        return logits

    def follow(
        self,
        images: Tensor,
        options: Tensor,
        probs: Tensor | None = None,
        explored: float = 0.0,
        view: View = FULL_VIEW,
    ) -> tuple[Tensor, Tensor]:
        """One pass over ``images`` (N, C, H, W) with known ``options`` (N, L), which were chosen with ``probs`` (N, L, K).

        One device synchronisation, not one per block. Returns as :meth:`run_pass`.
        """
        known = options.cpu()
        return self.run_pass(images, lambda i, _: (known[:, i], None if probs is None else probs[:, i]), explored, view)

    def stem(self, images: Tensor) -> Tensor:
        """The first block's input, in the memory layout of ``images``."""
        is_planar = images.device.type == "cpu" and images.is_contiguous() and not torch.is_grad_enabled()
        if not self.pools_first or not is_planar:
            x = self.layout.stem(self.backbone, images)
        else:
            x = self.layout.stem(self.backbone, images.contiguous(memory_format=torch.channels_last)).contiguous()
        return x if self.features is None else self.features.at(0)(x)

    @torch.no_grad()
    def run_in_full(
        self, images: Tensor, kept: Precision | None = None, visit: Callable[[Tensor], None] = lambda features: None
    ) -> Tensor:
        """Logits (N, classes) of ``images`` (N, C, H, W) in floating point: before tuning, those of the original model.

        Args:
            kept: layers of this precision stay at its bitwidth.
            visit: called with the input of each block and of the head.
        """
        layers = (m for m in self.backbone.modules() if isinstance(m, (FractionalLayer, FractionalBatchNorm)))
        with ExitStack() as stack:
            for precision in {layer.precision for layer in layers} - {kept}:
                stack.enter_context(precision.at(FULL_BITS))
            x = self.layout.stem(self.backbone, images)
            visit(x)
            for block in self.blocks:
                x = block.module(x)
                visit(x)
            return self.layout.head(self.backbone, x)

    def _route(self, block: Block, x: Tensor, choice: Tensor, probs: Tensor | None, explored: float) -> Tensor:
        """Run each group of images with its option, (N, C, H, W) to (N, C', H', W'), in the order of the batch."""
        if probs is None and not torch.is_grad_enabled():
            return self._infer(block, x, choice)
        groups = groups_of(choice, len(self.bits), x.device)
        if len(groups) <= 1:
            return self._execute(block, x, groups[0][0] if groups else 0, probs, explored)
        outputs = [
            self._execute(block, x[rows], option, None if probs is None else probs[rows], explored)
            for option, rows in groups
        ]
        return torch.cat(outputs)[torch.cat([rows for _, rows in groups]).argsort()]

    def _infer(self, block: Block, x: Tensor, choice: Tensor) -> Tensor:
        """:meth:`_route` without gradients: it copies as little as possible, and may write into ``x``."""
        groups = groups_of(choice, len(self.bits), x.device)
        if len(groups) <= 1:
            return self._execute(block, x, groups[0][0] if groups else 0, None, 0.0)
        result: Tensor | None = None
        for option, rows in groups:
            if self.bits[option] == 0 and block.keeps_input:
                result = x
                continue
            y = self._execute(block, x[rows], option, None, 0.0)
            if result is None:
                result = empty_batch(len(x), y)
            put(y, result, rows)
        assert result is not None
        return result

    def _execute(self, block: Block, x: Tensor, option: int, probs: Tensor | None, explored: float) -> Tensor:
        bits = self.bits[option]
        if probs is None:
            return _skip(block, x) if bits == 0 else self._run_block(block, x, bits, None)
        if bits != 0:
            y = self._run_block(block, x, bits, Routing(probs, self.bits))
            if self.bits[0] == 0:
                with torch.no_grad():
                    branch = y - _skip(block, x)
                y = _with_gradient(y, branch, 1 - probs[:, 0])
            return y
        y = _skip(block, x)
        if explored and torch.rand(()).item() < explored:
            second = int(probs[:, 1:].detach().mean(dim=0).argmax()) + 1
            with torch.no_grad():
                branch = self._run_block(block, x, self.bits[second], None) - y
            y = _with_gradient(y, branch, 1 - probs[:, 0])
        return y

    def _run_block(self, block: Block, x: Tensor, bits: int, routing: Routing | None) -> Tensor:
        with block.precision.at(bits, routing):
            result: Tensor = block.module(x)
            return result if block.output is None else block.output(result)


def _skip(block: Block, x: Tensor) -> Tensor:
    y = block.skip(block.module, x)
    return y if block.output is None or block.keeps_input else block.output(y)


def _with_gradient(y: Tensor, direction: Tensor, weight: Tensor) -> Tensor:
    """``y`` unchanged, with a gradient for ``weight`` (N,): ``<dL/dy, direction>`` for each image."""
    return y + (weight - weight.detach()).reshape(-1, 1, 1, 1) * direction
