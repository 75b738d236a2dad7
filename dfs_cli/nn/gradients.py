"""Quantization in training, with gradients for what is quantized, for step sizes and for gates.

Source of the gradient: LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020). Step sizes are kept as
logarithms by the layers, so that they stay positive; with Adam, whose updates do not depend on the gradient's scale,
LSQ's gradient scale is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dfs_cli.nn.pieces import dot, dots, groups_of_images, pieces
from dfs_cli.nn.quantization import Convolution, quantize, quantize_codes


class _FakeQuantize(torch.autograd.Function):
    """``step * codes(x)``. Only ``x`` and ``step`` are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high = low, high
        return quantize_codes(x, step, low, high).mul_(step) if step.numel() > 1 else quantize(x, step, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, step = ctx.saved_tensors
        if step.numel() == 1:
            return *_gradients(grad, x, step, (ctx.low, ctx.high), ctx.needs_input_grad[1]), None, None
        ratio = x / step
        grad_x = torch.ops.aten.hardtanh_backward(grad, ratio, *_open_ends(ctx.low, ctx.high))
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = ratio.mul(grad_x)
            grad_step = ratio.round_().clamp_(ctx.low, ctx.high).mul_(grad).sub_(slope).sum_to_size(step.shape)
        return grad_x, grad_step, None, None


def _open_ends(low: float, high: float) -> tuple[float, float]:
    """The open range in which the gradient passes; without a lower end at zero, where ReLU puts half of the values."""
    return (low if low else -float("inf")), high


def _gradients(
    grad: Tensor, x: Tensor, step: Tensor, limits: tuple[int, int], needs_step: bool, quantized: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``x`` and of ``step``, which has one element, from the gradient of the quantized ``x``.

    LSQ's gradient of the step size (equation 3: the rounding error inside the range, the clipped code outside) is
    ``(<grad, quantized> - <clipped grad, x>) / step``.

    Args:
        quantized: where it is at hand; ``grad`` may then be overwritten.
    """
    ends = _open_ends(*(float(step) * code for code in limits))
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    result = torch.empty_like(grad) if quantized is None else grad
    total = torch.zeros_like(step)
    for given, values, part, known in pieces(grad, x, result, x if quantized is None else quantized):
        if needs_step:
            total += dot(given, quantize(values, step, *limits) if quantized is None else known)
        torch.ops.aten.hardtanh_backward.grad_input(given, values.to(given.dtype), *ends, grad_input=part)
        if needs_step:
            total -= dot(part, values)
    return result, total / step if needs_step else None


def fake_quantize(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """``x`` rounded to multiples of ``step`` within [``low * step``, ``high * step``].

    Args:
        x: any shape.
        step: broadcastable to ``x``; positive.

    The gradient passes straight through the rounding inside the range and is zero outside (clipped); the step size has
    LSQ's gradient.
    """
    result = _FakeQuantize.apply(x, step, low, high)
    assert isinstance(result, Tensor)
    return result


class _QuantizedNorm(torch.autograd.Function):
    """Batch-norm with known statistics, quantized. What it rounds is computed again in the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        step: Tensor,
        low: int,
        high: int,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, variance, weight, bias, step)
        ctx.eps, ctx.limits = eps, (low, high)
        y = functional.batch_norm(x.float(), mean, variance, weight, bias, eps=eps)
        return quantize(y, step, low, high, out=y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, weight, bias, step = ctx.saved_tensors
        (grad,) = grads
        needs_x, _, _, needs_weight, needs_bias, _, needs_step = ctx.needs_input_grad[:7]
        y = functional.batch_norm(x.float(), mean, variance, weight, bias, eps=ctx.eps)
        clipped, grad_step = _gradients(grad, y, step, ctx.limits, needs_step)
        del y
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            clipped, x.float(), weight, mean, variance, None, None, False, ctx.eps, [needs_x, needs_weight, needs_bias]
        )
        return grad_x.to(x.dtype) if needs_x else None, None, None, grad_weight, grad_bias, None, grad_step, None, None


def normalise_quantized(
    x: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    eps: float,
    step: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """``fake_quantize(batch_norm(x, *tensors), step, low, high)`` with about the memory of batch-norm alone.

    Args:
        x: (N, C, H, W).
        tensors: mean and variance, which get no gradient, weight and bias, (C,) each.
        step: (), positive.
    """
    result = _QuantizedNorm.apply(x, *tensors, eps, step, low, high)
    assert isinstance(result, Tensor)
    return result


class OtherOptions(NamedTuple):
    """The other options of a block, from which the gate's gradient is computed.

    Args:
        probs: (N, K), the gate's probabilities.
        steps: (Q,), step sizes.
        rows: (column of ``probs``, row of ``steps`` or None for full precision, lowest code, highest code) per option.
        scale: factor of the gradient, where ``rows`` are a sample of the options.
    """

    probs: Tensor
    steps: Tensor
    rows: tuple[tuple[int, int | None, int, int], ...]
    scale: float = 1.0


class _QuantizedConvolution(torch.autograd.Function):
    """Convolution of the quantized input. The quantized input is computed again in the backward pass, not kept; an input that
    consists of codes is kept as bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        code_limits: tuple[int, int] | None,
        weight: Tensor,
        convolution: Convolution,
        probs: Tensor | None,
        steps: Tensor | None,
        rows: tuple[tuple[int, int | None, int, int], ...],
        scale: float,
        unit: Tensor | None,
        is_signed: bool,
    ) -> Tensor:
        kept = x if unit is None else _packed(x, unit, is_signed)
        ctx.save_for_backward(kept, step, weight, steps, unit)
        ctx.limits, ctx.convolution, ctx.rows, ctx.scale = code_limits, convolution, rows, scale
        ctx.shape = None if probs is None else probs.shape
        return functional.conv2d(_quantized(x, step, code_limits), weight, None, *convolution)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, weight, steps, unit = ctx.saved_tensors
        if unit is not None:
            x = _unpacked(x, unit)
        geometry, limits = ctx.convolution, ctx.limits
        quantized = _quantized(x, step, limits)
        needs_x, needs_step, _, needs_weight, _, needs_probs = ctx.needs_input_grad[:6]
        grad, grad_weight, _ = torch.ops.aten.convolution_backward(
            grads[0], quantized.to(grads[0].dtype), weight.to(grads[0].dtype), None,
            geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], geometry.groups,
            [needs_x or needs_step or needs_probs, needs_weight, False],
        )  # fmt: skip
        grad_step = effect = None
        if needs_probs:
            effect = x.new_zeros(ctx.shape)
            if ctx.rows:
                columns = [row[0] for row in ctx.rows]
                effect[:, columns] = _effects(grad, x, quantized, steps, ctx.rows) * ctx.scale
        if limits is not None and (needs_x or needs_step):
            grad, grad_step = _gradients(grad, x, step, limits, needs_step, quantized)
        grad_x = grad if needs_x else None
        return grad_x, grad_step, None, grad_weight, None, effect, None, None, None, None, None


def _effects(
    grad: Tensor, x: Tensor, quantized: Tensor, steps: Tensor, rows: tuple[tuple[int, int | None, int, int], ...]
) -> Tensor:
    """``<grad, Q_k(x) - quantized>`` for each image and each of K options, (N, K); arguments as in :class:`OtherOptions`."""
    effects: list[Tensor] = []
    codes: Tensor | None = None  # used again, where it fits: it stays in the cache
    for given, values, known in groups_of_images(grad, x, quantized):
        if codes is None or codes.shape != values.shape:
            codes = torch.empty_like(values)
        columns = []
        for _, row, low, high in rows:
            if row is None:
                columns.append(dots(given, values))
            else:
                torch.div(values, steps[row], out=codes).round_().clamp_(low, high)
                columns.append(dots(given, codes) * steps[row])
        effects.append(torch.stack(columns, dim=1) - dots(given, known)[:, None])
    return torch.cat(effects)


def _quantized(x: Tensor, step: Tensor, limits: tuple[int, int] | None) -> Tensor:
    return x if limits is None else quantize(x, step, *limits)


def _packed(x: Tensor, unit: Tensor, is_signed: bool) -> Tensor:
    """Codes as bytes, of ``x`` that consists of codes times ``unit``."""
    codes = torch.empty_like(x, dtype=torch.int8 if is_signed else torch.uint8)
    for given, part in pieces(x, codes):
        part.copy_(given / unit)
    return codes


def _unpacked(codes: Tensor, unit: Tensor) -> Tensor:
    x = torch.empty_like(codes, dtype=unit.dtype)
    for given, part in pieces(codes, x):
        part.copy_(given).mul_(unit)
    return x


def quantized_convolution(
    x: Tensor,
    step: Tensor | None,
    code_limits: tuple[int, int] | None,
    weight: Tensor,
    convolution: Convolution,
    others: OtherOptions | None = None,
    unit: Tensor | None = None,
    is_signed: bool = False,
) -> Tensor:
    """``conv2d(fake_quantize(x, step, *code_limits), weight)`` with about the memory of a dense convolution.

    Args:
        x: (N, C, H, W).
        step: (), positive; None with ``code_limits`` None: ``x`` is not quantized.
        weight: (C_out, C / groups, height, width), already quantized.
        others: gives ``others.probs`` the gradient ``<dL/dq, Q_k(x) - q>`` for each other option k, the first-order
            effect of taking it. This is elementwise work only: no other option is run.
        unit: (), where ``x`` consists of 8-bit codes times this step size, exactly.
        is_signed: whether those codes are signed.

    Returns:
        (N, C_out, H', W').
    """
    if step is None:
        step = x.new_ones(())
    probs, steps, rows, scale = others if others is not None else (None, None, (), 1.0)
    result = _QuantizedConvolution.apply(
        x, step, code_limits, weight, convolution, probs, steps, rows, scale, unit, is_signed
    )
    assert isinstance(result, Tensor)
    return result
