"""What torch must not export by itself: layers on integer codes, as opaque nodes, and normalisation at one bitwidth."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dfs_cli.config import FULL_BITS
from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer
from dfs_cli.nn.normalisation import FRACTIONAL_NORMS, FractionalBatchNorm, norm_tensors
from dfs_cli.nn.quantization import Convolution, code_range

OPSET = 17
DOMAIN, OPAQUE = "dfs", "Quantized"
_PLAIN_NORMS = {fractional: plain for plain, fractional in FRACTIONAL_NORMS.items()}


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear layer at one bitwidth, as numbers.

    Args:
        codes: (C_out, ...), integer codes of the weight, as floating point numbers.
        scale: (C_out,), the weight's step sizes.
        step: the input's step size.
        low, high: the input's lowest and highest code.
        bits: up to 8 for what runs on bytes.
        bias: (C_out,) or None.
        geometry: None for a linear layer.
    """

    codes: np.ndarray
    scale: np.ndarray
    step: float
    low: int
    high: int
    bits: int
    bias: np.ndarray | None
    geometry: Convolution | None

    @classmethod
    def of(cls, layer: FractionalLayer, bits: int) -> QuantizedLayer:
        """What ``layer`` computes at ``bits``."""
        codes, scale, _ = layer._quantized_weight(bits)
        step = float(layer.log_input_steps.detach()[layer.bitwidths.index(bits)].exp())
        geometry = None
        if isinstance(layer, FractionalConv2d):
            assert not isinstance(layer.padding, str)
            geometry = Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)
        bias = None if layer.bias is None else layer.bias.detach().cpu().numpy()
        low, high = code_range(bits, layer._signed())
        return cls(codes.cpu().numpy(), scale.detach().cpu().numpy(), step, low, high, bits, bias, geometry)


class _Opaque(torch.autograd.Function):
    """Computes what the layer does; exported as one node that carries its key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _OpaqueLayer) -> Tensor:  # noqa: ARG004
        # A copy: what the layer does to its input's type must not be recorded for other readers of it.
        y: Tensor = layer.__dict__["layer"](x.clone())
        layer.shape = list(y.shape)
        return y

    @staticmethod
    def symbolic(graph: Any, x: Any, layer: _OpaqueLayer) -> Any:
        node = graph.op(f"{DOMAIN}::{OPAQUE}", x, key_s=layer.key)
        node.setType(x.type().with_sizes(layer.shape))
        return node


class _OpaqueLayer(nn.Module):
    def __init__(self, layer: nn.Module, key: str) -> None:
        super().__init__()
        # Not a submodule: its parameters are no part of what torch exports.
        self.__dict__["layer"], self.key = layer, key
        self.shape: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Opaque.apply(x, self)
        return y


class Traced(NamedTuple):
    """A part of the network as nodes, with its quantized layers by key; one input and one output."""

    graph: onnx.GraphProto
    layers: dict[str, QuantizedLayer]


@torch.no_grad()
def trace(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> tuple[Traced, Tensor]:
    """What ``run(module, x)`` computes at the bitwidths that the module's layers are set to.

    Args:
        module: left unchanged.
        x: (1, C, H, W).

    Returns:
        The nodes, and the output for ``x``.
    """
    plain = copy.deepcopy(module).requires_grad_(False)
    layers = _make_plain(plain)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an exporter that is old, and of shapes that are fixed on purpose
        torch.onnx.export(
            _Call(plain, run).eval(),
            (x,),
            content,  # type: ignore[arg-type]  # the exporter that is not dynamo takes it
            dynamo=False,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
        )
    return Traced(onnx.load_from_string(content.getvalue()).graph, layers), run(module, x)


class _Call(nn.Module):
    def __init__(self, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)


def _make_plain(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Replace, in place, fractional layers by what they are at the current bitwidth; those on integer codes are returned."""
    found: dict[str, QuantizedLayer] = {}
    for name, child in list(module.named_modules()):
        if isinstance(child, FractionalBatchNorm):
            module.set_submodule(name, _plain_norm(child))
        elif isinstance(child, FractionalLayer):
            assert isinstance(child, nn.Module)
            if (bits := child.precision.bits) == FULL_BITS:
                module.set_submodule(name, _plain_layer(child))
            elif getattr(child, "padding_mode", "zeros") == "zeros" and not isinstance(
                getattr(child, "padding", 0), str
            ):
                found[name] = QuantizedLayer.of(child, bits)
                module.set_submodule(name, _OpaqueLayer(child, name))
    return found


def _plain_layer(layer: FractionalLayer) -> nn.Module:
    """A layer in floating point with the weight that ``layer`` applies."""
    weight = layer._effective_weight().detach()
    new: nn.Module
    if isinstance(layer, FractionalConv2d):
        new = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None)
    new.load_state_dict({"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias.detach()}))
    return new


def _plain_norm(norm: FractionalBatchNorm) -> nn.Module:
    """The normalisation that ``norm`` is at its current bitwidth, of the class that it stands in for."""
    plain = copy.deepcopy(norm)
    for own, value in zip(norm_tensors(plain, FULL_BITS), norm_tensors(norm, norm.precision.bits), strict=True):
        if own is not None and value is not None:
            own.detach().copy_(value.detach())
    for name in ("bit_weight", "bit_bias", "bit_mean", "bit_var"):
        delattr(plain, name)
    plain.__class__ = _PLAIN_NORMS[type(norm)]  # type: ignore[assignment]
    return plain
