"""Uniform quantization with learned step sizes, as plain functions of tensors.

Source of the gradient: LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020). Step sizes are kept as
logarithms by the layers, so that they stay positive; with Adam, whose updates do not depend on the gradient's scale,
LSQ's gradient scale is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        inside = (ratio >= ctx.low) & (ratio <= ctx.high)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_step = None
        if ctx.needs_input_grad[1]:
            # LSQ, equation 3: round(v/s) - v/s inside the range, the clipped code outside.
            slope = ratio.round().clamp_(ctx.low, ctx.high).sub_(ratio.mul_(inside))
            grad_step = slope.mul_(grad).sum_to_size(step.shape)
        return grad_x, grad_step, None, None


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


def best_step(x: Tensor, bits: int, signed: bool, candidates: int = 24) -> Tensor:
    """The step size with the least squared error per row of ``x``, found on a grid of clipping ranges.

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


class _RouteGradient(torch.autograd.Function):
    """Identity on the quantized input; backward gives the gate the first-order effect of the options not taken."""

    @staticmethod
    def forward(
        ctx: Any, quantized: Tensor, x: Tensor, steps: Tensor, probs: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(quantized, x, steps)
        ctx.options, ctx.shape = options, probs.shape
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        quantized, x, steps = ctx.saved_tensors
        effect = grad.new_zeros(ctx.shape)
        for column, row, low, high in ctx.options:
            other = x if row is None else quantize_codes(x, steps[row], low, high).mul_(steps[row])
            effect[:, column] = (grad * (other - quantized)).flatten(1).sum(1)
        return grad, None, None, effect, None


def route_gradient(quantized: Tensor, x: Tensor, steps: Tensor, probs: Tensor, options: tuple[Any, ...]) -> Tensor:
    """``quantized`` unchanged, with a gradient for ``probs``: ``<dL/dq, Q_k(x) - q>`` for each other option k.

    Args:
        quantized: (N, ...), the input as quantized by the option taken.
        x: (N, ...), the input before quantization.
        steps: (Q,), step sizes.
        probs: (N, K), the gate's probabilities.
        options: a tuple (column of ``probs``, row of ``steps`` or None for full precision, low, high) per other option.

    This costs elementwise work only: no other option is run.
    """
    result = _RouteGradient.apply(quantized, x, steps, probs, options)
    assert isinstance(result, Tensor)
    return result
