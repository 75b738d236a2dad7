"""Layers that run at the bitwidth their block is set to.

They keep the parameter names of the layers they replace (``weight``, ``bias``) and add step sizes. Weights have a step
size per output channel and bitwidth, inputs one per layer and bitwidth. Training runs quantized values; evaluation runs
integer codes and scales the result, as integer hardware does: up to 8 bits all but very long sums are integers that
floating point holds exactly, so the order of addition does not matter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.gain import GainedInput
from dfs_cli.nn.gradients import OtherOptions, fake_quantize, quantized_convolution
from dfs_cli.nn.integers import IntegerResult
from dfs_cli.nn.precision import Precision
from dfs_cli.nn.quantization import BYTE_BITS, Convolution, best_step, code_range, identity, input_range, quantize_codes
from dfs_cli.presets import FULL_BITS

# For a single image with at most this many values PyTorch uses another CPU convolution, which rounds differently.
_SMALL_INPUT = 20480
_SAMPLED_OPTIONS = 2


class QuantizedWeight(NamedTuple):
    codes: Tensor
    scale: Tensor
    key: tuple[Any, ...]


class FractionalLayer(GainedInput):
    """Shared by convolution and linear layer: a layer of C_out outputs and Q quantized bitwidths.

    ``source`` rounds what comes in to bytes, where that is known: at 8 bits such codes are read as they are. ``output`` rounds
    what goes out.
    """

    weight: Tensor
    bias: Tensor | None
    log_weight_steps: nn.Parameter  # (Q, C_out): natural logarithms of the step sizes
    log_input_steps: nn.Parameter  # (Q,)
    input_signed: Tensor  # (), bool
    source: ByteFeatures | None

    def _set_up(self, precision: Precision) -> None:
        self.bitwidths = bitwidths = precision.quantized
        self.precision = precision
        channels = self.weight.shape[0]
        device = self.weight.device
        self.log_weight_steps = nn.Parameter(torch.zeros(len(bitwidths), channels, device=device))
        self.log_input_steps = nn.Parameter(torch.zeros(len(bitwidths), device=device))
        self.register_buffer("input_signed", torch.tensor(False, device=device))
        self.register_buffer("input_gain", None)
        self.output: ByteFeatures | None = None
        self.read_from(None)
        self._cache: dict[int, QuantizedWeight] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}} | ({"_folded": {}} if "_folded" in self.__dict__ else {})

    def read_from(self, source: ByteFeatures | None) -> None:
        """Set ``source``, which is no part of the layer."""
        self.__dict__["source"] = source

    def _source_at(self, bits: int) -> ByteFeatures | None:
        """What has rounded the input as a bitwidth needs it; None: the layer does so itself."""
        source = self.source
        return source if bits == BYTE_BITS and bits in self.bitwidths else None

    def input_step(self, bits: int) -> Tensor:
        """The step size of the input's codes at a bitwidth, ()."""
        source = self._source_at(bits)
        return self.log_input_steps[self.bitwidths.index(bits)].exp() if source is None else source.step()

    def input_step_logarithm(self, bits: int) -> Tensor:
        """The tensor that holds the logarithm of that step size."""
        source = self._source_at(bits)
        return self.log_input_steps if source is None else source.log_feature_steps

    def input_limits(self, bits: int) -> tuple[int, int]:
        """The lowest and the highest code of the input at a bitwidth."""
        source = self._source_at(bits)
        return input_range(bits, self.is_signed()) if source is None else source.limits()

    def set_input_gain(self, gain: Tensor) -> None:
        super().set_input_gain(gain)
        self._cache.clear()
        self.__dict__.get("_folded", {}).clear()

    @torch.no_grad()
    def fit_weight_steps(self) -> None:
        """Set the step sizes of the weight to those with the least squared error."""
        rows = self.effective_weight().detach().flatten(1)
        for i, bits in enumerate(self.bitwidths):
            self.log_weight_steps[i] = best_step(rows, bits, signed=True).log().flatten()

    @torch.no_grad()
    def fit_input_steps(self, x: Tensor) -> None:
        """Set the step sizes of the input, and whether it is signed, from ``x``, a sample of any shape."""
        values = self.with_gain(x.detach().float()).reshape(1, -1)
        if values.shape[1] > 1 << 18:
            values = values[:, :: values.shape[1] >> 18]
        self.input_signed.fill_(bool((values < 0).any()))
        for i, bits in enumerate(self.bitwidths):
            self.log_input_steps[i] = best_step(values, bits, bool(self.input_signed)).log().squeeze()

    def weight_codes(self) -> Tensor | None:
        """The weight's integer codes at the widest bitwidth, as floating point numbers; None unless they restore it exactly."""
        if not self.bitwidths or self.effective_weight() is not self.weight:
            return None
        codes = self.quantized_weight(max(self.bitwidths)).codes
        return codes if torch.equal(codes * self._widest_step(), self.weight) else None

    @torch.no_grad()
    def set_weight_codes(self, codes: Tensor | None = None) -> None:
        """Set the weight to integer ``codes`` at the widest bitwidth (None: those with the least error over all bitwidths).

        This is final: narrower bitwidths quantize the result further, and the weight is no longer standardised.
        """
        if codes is None:
            codes = self._codes_for_all()
        self.weight.copy_(codes * self._widest_step())

    def _codes_for_all(self) -> Tensor:
        """Codes at the widest bitwidth with the least squared error summed over all bitwidths.

        Rounding to the nearest code may move a weight across a threshold of a narrower bitwidth: an error of one of its much
        larger steps. The code on the right side of that threshold is one away.
        """
        weight, widest = self.effective_weight(), self._widest_step()
        low, high = code_range(max(self.bitwidths), signed=True)
        nearest = quantize_codes(weight, widest, low, high)
        steps = self.log_weight_steps.exp()
        best, least = nearest, torch.full_like(weight, float("inf"))
        for offset in (0, -1, 1):
            codes = (nearest + offset).clamp_(low, high)
            error = (codes * widest - weight).square_()
            for step, bits in zip(steps, self.bitwidths, strict=True):
                if bits < max(self.bitwidths):
                    step, limits = step.reshape(self._weight_shape()), code_range(bits, signed=True)
                    difference = quantize_codes(codes * widest, step, *limits) - quantize_codes(weight, step, *limits)
                    error += (difference * step).square_()
            best, least = torch.where(error < least, codes, best), torch.minimum(error, least)
        return best

    def _widest_step(self) -> Tensor:
        # Computed on the CPU wherever the layer is: another device's exponential may differ in the last digit.
        logarithms = self.log_weight_steps.detach()[self.bitwidths.index(max(self.bitwidths))]
        return logarithms.cpu().exp().to(logarithms.device).reshape(self._weight_shape())

    def effective_weight(self) -> Tensor:
        """The weight that the layer applies or quantizes, behind the input's gain."""
        return self.weight

    def _weight_shape(self) -> tuple[int, ...]:
        return (-1,) + (1,) * (self.weight.dim() - 1)

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        bits, x = self.precision.bits, self.with_gain(x)
        y = self._forward_training(x, bits) if self.training else self._forward_inference(x, bits)
        return y if self.output is None else self.output(y)

    def _forward_inference(self, x: Tensor, bits: int) -> Tensor:
        if bits == FULL_BITS:
            return self._apply_weight(x, self.effective_weight(), self.bias)
        codes, scale, _ = self.quantized_weight(bits)
        step = self.input_step(bits)
        with self._exact(bits, x):
            y = self._apply_weight(quantize_codes(x.float(), step, *self.input_limits(bits)), codes, None)
        factor = (scale * step).reshape(self.channel_shape())
        # In place where no gradient is recorded: a new tensor of this size costs as much as the arithmetic.
        y = y * factor if torch.is_grad_enabled() else y.mul_(factor)
        return y if self.bias is None else y + self.bias.reshape(self.channel_shape())

    def _forward_training(self, x: Tensor, bits: int) -> Tensor:
        weight = self.effective_weight()
        if bits == FULL_BITS:
            # The gate's gradient is a small difference of large sums: the 8 bits of bfloat16 cannot hold it.
            x = x if self.precision.routing is None else x.float()
            return self._apply_quantized(x, None, None, weight)
        row = self.bitwidths.index(bits)
        weight_step = self.log_weight_steps[row].exp().reshape(self._weight_shape())
        weight = fake_quantize(weight, weight_step, *code_range(bits, signed=True))
        with self._exact(bits, x):
            if self._source_at(bits) is not None:
                return self._apply_quantized(x.float(), None, None, weight)
            return self._apply_quantized(x.float(), self.input_step(bits), self.input_limits(bits), weight)

    def _apply_quantized(
        self, x: Tensor, step: Tensor | None, limits: tuple[int, int] | None, weight: Tensor
    ) -> Tensor:
        """Apply the layer, in training, to ``x`` quantized with ``step`` and code ``limits``, or unquantized without them."""
        quantized = x if step is None or limits is None else fake_quantize(x, step, *limits)
        return self._apply_weight(quantized, weight, self.bias)

    def _others(self) -> OtherOptions | None:
        """The block's other options, from which the gate's gradient is computed; None where no gate needs one."""
        if (routing := self.precision.routing) is None:
            return None
        rows = tuple(
            (column, None, 0, 0)
            if other == FULL_BITS
            else (column, self.bitwidths.index(other), *self.input_limits(other))
            for column, other in enumerate(routing.bits)
            if other not in (0, self.precision.bits)
        )
        steps = self.log_input_steps.detach().exp()
        if (source := self._source_at(BYTE_BITS)) is not None:
            steps[self.bitwidths.index(BYTE_BITS)] = source.step().detach()
        # Each option costs a pass over the input. A random sample of them has the same expected gradient.
        sample = [rows[i] for i in torch.randperm(len(rows))[:_SAMPLED_OPTIONS].tolist()]
        scale = len(rows) / max(1, len(sample))
        return OtherOptions(routing.probs, steps, tuple(sample), scale)

    @staticmethod
    def _exact(bits: int, x: Tensor) -> AbstractContextManager[object]:
        """Disable automatic mixed precision for codes of more than 8 bits, which bfloat16 cannot hold."""
        return torch.autocast(x.device.type, enabled=False) if 8 < bits < FULL_BITS else nullcontext()

    def is_signed(self) -> bool:
        """Whether the codes of the input are signed."""
        # Cached: reading a buffer on an accelerator needs a device synchronisation.
        cached = self.__dict__.get("_signed_value")
        key = identity(self.input_signed)
        if cached is None or cached[0] != key:
            cached = (key, bool(self.input_signed))
            self.__dict__["_signed_value"] = cached
        return cached[1]

    def quantized_weight(self, bits: int) -> QuantizedWeight:
        """Integer codes of the weight, in its shape, and scales (C_out,), cached until the weight or its step sizes change."""
        key = (*identity(self.weight), *identity(self.log_weight_steps))
        cached = self._cache.get(bits)
        if cached is None or cached.key != key:
            # Made outside inference mode, so that a later call may record gradients of other tensors.
            with torch.inference_mode(False), torch.no_grad():
                scale = self.log_weight_steps[self.bitwidths.index(bits)].exp()
                low, high = code_range(bits, signed=True)
                codes = quantize_codes(self.effective_weight(), scale.reshape(self._weight_shape()), low, high)
            cached = self._cache[bits] = QuantizedWeight(codes, scale, key)
        return cached


FloatLayer = nn.Conv1d | nn.Conv2d | nn.Linear
"""The layers of attention, which is not quantized. Fractional layers are instances of these classes, too."""

CONVOLUTIONS: tuple[type[nn.Conv2d], ...] = (nn.Conv2d, StdConv2d)
"""The classes of convolution that :class:`FractionalConv2d` replaces."""


class FractionalConv2d(IntegerResult, FractionalLayer, nn.Conv2d):
    """A 2-d convolution that runs at ``precision.bits``.

    Where it replaces a weight-standardised convolution (BiT; Qiao et al., 2019, arXiv 1903.10520), it standardises the
    weight in the same way and quantizes the result.
    """

    standardise_eps: float | None = None

    @classmethod
    def from_module(cls, conv: nn.Conv2d, precision: Precision) -> FractionalConv2d:
        """Adopt the parameters of ``conv`` (they are shared, not copied)."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        new.training = conv.training
        if isinstance(conv, StdConv2d):
            new.standardise_eps = conv.eps
        new._set_up(precision)
        new.fold_in(None, None)
        return new

    def effective_weight(self) -> Tensor:
        if self.standardise_eps is None:
            return self.weight
        rows = self.weight.reshape(1, self.out_channels, -1)
        standard = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=self.standardise_eps)
        standard = standard.reshape_as(self.weight)
        return self.without_gain(standard)

    def set_weight_codes(self, codes: Tensor | None = None) -> None:
        super().set_weight_codes(codes)
        self.standardise_eps = None

    def channel_shape(self) -> tuple[int, ...]:
        return (1, -1, 1, 1)

    def _apply_quantized(
        self, x: Tensor, step: Tensor | None, limits: tuple[int, int] | None, weight: Tensor
    ) -> Tensor:
        others = self._others()
        source = self.source
        is_plain = step is None and others is None and source is None
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or is_plain:
            return super()._apply_quantized(x, step, limits, weight)
        geometry = Convolution(self.stride, self.padding, self.dilation, self.groups)
        unit, is_signed = (None, False) if source is None else (source.step().detach(), source.is_signed())
        y = quantized_convolution(x, step, limits, weight, geometry, others, unit, is_signed)
        return y if self.bias is None else y + self.bias.reshape(self.channel_shape())

    def _apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 1 and not self.training and x.device.type == "cpu" and x.numel() <= _SMALL_INPUT:
            return cast(Tensor, self._conv_forward(x.expand(2, -1, -1, -1), weight, bias)[:1])
        return cast(Tensor, self._conv_forward(x, weight, bias))
