"""Step sizes and statistics per bitwidth, set once before tuning from a sample of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures, sampled
from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import FractionalBatchNorm, match_statistics, moments
from dfs_cli.nn.passes import FULL_VIEW, View
from dfs_cli.presets import FULL_BITS


@torch.no_grad()
def fit_steps(network: DynamicResNet, images: Tensor) -> None:
    """Set all step sizes, and batch-norm's statistics per bitwidth, from ``images`` (N, C, H, W).

    The statistics are measured under the policies of the network's controller.
    """
    was_training = network.training
    network.eval()
    expected: dict[FractionalBatchNorm, tuple[Tensor, Tensor]] = {}

    def observe_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        cast(FractionalLayer, layer).fit_input_steps(inputs[0])

    def observe_moments(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        expected[cast(FractionalBatchNorm, norm)] = moments(inputs[0])

    for layer in network.backbone.modules():
        if isinstance(layer, FractionalLayer):
            layer.fit_weight_steps()

    handed_on: list[Tensor] = []
    outputs: dict[ByteFeatures, Tensor] = {}

    def observe_output(output: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outputs[cast(ByteFeatures, output)] = sampled(inputs[0])

    with (
        hooked(network, FractionalLayer, observe_input),
        hooked(network, FractionalBatchNorm, observe_moments),
        hooked(network.backbone, ByteFeatures, observe_output),
    ):
        network.run_in_full(images, visit=lambda x: handed_on.append(sampled(x)))
    if network.features is not None:
        network.features.fit(handed_on)
    for output, values in outputs.items():  # in units of the features' step sizes
        output.fit([values])

    def match(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        norm = cast(FractionalBatchNorm, norm)
        if (bits := norm.precision.bits) != FULL_BITS:
            match_statistics(norm, bits, expected[norm], inputs[0])

    scales = dict.fromkeys(view.scale for view in (FULL_VIEW, *network.controller.views))
    with hooked(network, FractionalBatchNorm, match), _normalising_apart(network):
        for policy, scale in product(network.controller.policies(), scales):
            network.follow(images, policy.expand(len(images), -1), view=View(scale=scale))
    network.train(was_training)


@torch.no_grad()
def fit_float_statistics(network: DynamicResNet, images: Tensor, policy: Tensor) -> None:
    """Correct the statistics that batch-norm has in floating point for what ``policy`` (L,), with which tuning begins, skips,
    from ``images`` (N, C, H, W)."""
    expected: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def observe(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        expected[norm] = moments(inputs[0])

    def correct(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not isinstance(norm, FractionalBatchNorm) or norm.precision.bits == FULL_BITS:
            match_statistics(cast(nn.BatchNorm2d, norm), FULL_BITS, expected[norm], inputs[0])

    was_training = network.training
    network.eval()
    with hooked(network.backbone, nn.BatchNorm2d, observe):
        network.run_in_full(images)
    with hooked(network.backbone, nn.BatchNorm2d, correct), _normalising_apart(network):
        network.follow(images, policy.expand(len(images), -1))
    network.train(was_training)


@contextmanager
def _normalising_apart(network: DynamicResNet) -> Iterator[None]:
    """Let every batch-norm see what its convolution gives, within the context."""
    convs = [layer for layer in network.modules() if isinstance(layer, FractionalConv2d)]
    for conv in convs:
        conv.gives_codes = False
    try:
        yield
    finally:
        for conv in convs:
            conv.gives_codes = True


@contextmanager
def hooked(network: nn.Module, kind: type, hook: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Call ``hook`` with the inputs of every layer of a kind before it runs, within the context."""
    handles = [m.register_forward_pre_hook(hook) for m in network.modules() if isinstance(m, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
