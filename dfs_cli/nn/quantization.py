"""Uniform quantization with learned step sizes, as plain functions of tensors.

Source of the gradient: LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020). Step sizes are kept as
logarithms by the layers, so that they stay positive; with Adam, whose updates do not depend on the gradient's scale,
LSQ's gradient scale is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_STEP = 2.0**-100  # the step size of a channel of zeros


def identity(tensor: Tensor) -> tuple[int, int]:
    """A key that changes when the tensor is replaced or changed in place (tensors made in inference mode do not change)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and highest integer code of a ``bits``-bit quantizer; signed ranges are symmetric around zero."""
    if signed:
        return -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def quantize_codes(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Integer codes of ``x`` (as floating point numbers): ``round(x / step)`` within [``low``, ``high``]."""
    return torch.div(x, step).round_().clamp_(low, high)


class _FakeQuantize(torch.autograd.Function):
    """``step * codes(x)``. Only ``x`` and ``step`` are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.low, ctx.high = low, high
        return quantize_codes(x, step, low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, step = ctx.saved_tensors
        ratio = x / step
        grad_x = torch.ops.aten.hardtanh_backward(grad, ratio, *_open_ends(ctx.low, ctx.high))
        grad_step = None
        if ctx.needs_input_grad[1]:
            slope = ratio.mul(grad_x)
            grad_step = ratio.round_().clamp_(ctx.low, ctx.high).mul_(grad).sub_(slope).sum_to_size(step.shape)
        return grad_x if ctx.needs_input_grad[0] else None, grad_step, None, None


def _open_ends(low: float, high: float) -> tuple[float, float]:
    """The open range in which the gradient passes; without a lower end at zero, where ReLU puts half of the values."""
    return (low if low else -float("inf")), high


def _clip_gradient_(grad: Tensor, x: Tensor, step: Tensor, low: int, high: int) -> None:
    """Set ``grad`` to zero where ``x`` is outside the quantizer's range, in place, for a ``step`` of one element.

    With it LSQ's gradient of the step size (equation 3: the rounding error inside the range, the clipped code outside)
    is ``(<grad, quantized> - <clipped grad, x>) / step``.
    """
    ends = _open_ends(float(step) * low, float(step) * high)
    torch.ops.aten.hardtanh_backward.grad_input(grad, x.to(grad.dtype), *ends, grad_input=grad)


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
        return y.div_(step).round_().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, variance, weight, bias, step = ctx.saved_tensors
        (grad,), limits = grads, ctx.limits
        needs_x, _, _, needs_weight, needs_bias, _, needs_step = ctx.needs_input_grad[:7]
        y = functional.batch_norm(x.float(), mean, variance, weight, bias, eps=ctx.eps)
        grad_step = _dot(grad, quantize_codes(y, step, *limits)) if needs_step else None
        clipped = grad.clone()
        _clip_gradient_(clipped, y, step, *limits)
        if grad_step is not None:
            grad_step -= _dot(clipped, y) / step
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


def best_step(x: Tensor, bits: int, signed: bool, candidates: int = 24) -> Tensor:
    """The step size with the least squared error per row of ``x``, from a grid of clipping ranges.

    Args:
        x: (rows, values).

    Returns:
        (rows, 1), positive.
    """
    low, high = code_range(bits, signed)
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
    best, least = largest / high, torch.full_like(largest, float("inf"))
    for share in torch.linspace(1.0, 0.08 if bits <= 4 else 0.5, candidates).tolist():
        step = largest * (share / high)
        error = quantize_codes(x, step, low, high).mul_(step).sub_(x).square_().sum(dim=1, keepdim=True)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


BYTE_BITS = 8
"""Bitwidths up to this one run on bytes."""

LARGEST_BYTE = 127
"""The largest code of an 8-bit weight."""


def byte_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 8-bit codes to ``weight``, (C_out, ...), and the step size of each output channel, (C_out, 1, ...).

    The largest weight of a channel gets the largest code, and step sizes are bfloat16 numbers, so that both can be restored
    exactly from ``codes * steps``.
    """
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
    steps = (largest / LARGEST_BYTE).clamp_min(_SMALLEST_STEP).bfloat16().to(weight.dtype)
    return quantize_codes(weight, steps, -LARGEST_BYTE, LARGEST_BYTE), steps


def nearest_integer_bias(bias: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """``numerator`` and ``multiple``, (C,) each, of the fractions nearest to ``bias`` (C,), with multiples from 1 to ``limit``.

    Integer hardware adds a bias in units of weight step times input step. Weight codes of few bits do not fill a byte:
    multiplied by ``multiple`` they make the unit finer by that factor.
    """
    multiples = torch.arange(1, limit + 1, dtype=bias.dtype, device=bias.device)[:, None]
    error = ((bias * multiples).round() / multiples - bias).abs()
    # The smallest of the multiples that are equally good up to rounding.
    best = multiples[(error <= error.amin(dim=0) + 1e-9 * bias.abs() + 1e-12).to(torch.uint8).argmax(dim=0), 0]
    return (bias * best).round(), best


class Convolution(NamedTuple):
    """The geometry of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


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
        kept = x if unit is None else x.div(unit).to(torch.int8 if is_signed else torch.uint8)
        ctx.save_for_backward(kept, step, weight, steps, unit)
        ctx.limits, ctx.convolution, ctx.rows, ctx.scale = code_limits, convolution, rows, scale
        ctx.shape = None if probs is None else probs.shape
        return functional.conv2d(_quantize(x, step, code_limits), weight, None, *convolution)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, weight, steps, unit = ctx.saved_tensors
        if unit is not None:
            x = x.to(unit.dtype).mul_(unit)
        geometry, limits = ctx.convolution, ctx.limits
        quantized = _quantize(x, step, limits)
        needs_x, needs_step, _, needs_weight, _, needs_probs = ctx.needs_input_grad[:6]
        grad, grad_weight, _ = torch.ops.aten.convolution_backward(
            grads[0], quantized.to(grads[0].dtype), weight.to(grads[0].dtype), None,
            geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], geometry.groups,
            [needs_x or needs_step or needs_probs, needs_weight, False],
        )  # fmt: skip
        grad_step = effect = None
        if needs_probs:
            effect = x.new_zeros(ctx.shape)
            actual = _rowwise_dot(grad, quantized)
            for column, row, low, high in ctx.rows:
                other = x if row is None else _quantize(x, steps[row], (low, high))
                effect[:, column] = (_rowwise_dot(grad, other) - actual) * ctx.scale
        if needs_step:
            grad_step = _dot(grad, quantized)
        del quantized
        if limits is not None and (needs_x or needs_step):
            _clip_gradient_(grad, x, step, *limits)
        if grad_step is not None:
            grad_step = (grad_step - _dot(grad, x)) / step
        grad_x = grad if needs_x else None
        return grad_x, grad_step, None, grad_weight, None, effect, None, None, None, None, None


def _quantize(x: Tensor, step: Tensor, limits: tuple[int, int] | None) -> Tensor:
    return x if limits is None else quantize_codes(x, step, *limits).mul_(step)


def _rows_in_memory(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) as (N, values), in memory order."""
    if x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(len(x), -1)


def _same_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` (N, C, H, W) as (N, values), their values in the same order."""
    if a.stride() != b.stride():
        is_last = b.is_contiguous(memory_format=torch.channels_last)
        a = a.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    return _rows_in_memory(a.to(b.dtype)), _rows_in_memory(b)


def _rowwise_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of each image's values, (N,)."""
    a, b = _same_order(a, b)
    return (a * b).sum(dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    a, b = _same_order(a, b)
    return torch.dot(a.flatten(), b.flatten())


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
