"""Modules as ONNX nodes, by torch's exporter: quantized layers become opaque nodes, all else is exported at its bitwidth."""

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
from onnx import TensorProto, helper
from torch import Tensor, nn

from dfs_cli.errors import ExportError, first_line
from dfs_cli.export.constants import fold_constants
from dfs_cli.export.gains import Gain, fold_gains
from dfs_cli.export.pooling import round_before_pooling
from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.integers import Folded
from dfs_cli.nn.layers import FractionalConv2d, FractionalLayer
from dfs_cli.nn.normalisation import FRACTIONAL_NORMS, FractionalBatchNorm, norm_tensors
from dfs_cli.nn.quantization import BYTE_BITS, LARGEST_BYTE, Convolution
from dfs_cli.presets import FULL_BITS

OPSET = 17
DOMAIN, QUANTIZED, ROUNDED = "dfs", "Quantized", "Rounded"
MIDDLE = LARGEST_BYTE + 1
"""The unsigned byte that stands for zero where codes are signed."""

_PLAIN_NORMS = {fractional: plain for plain, fractional in FRACTIONAL_NORMS.items()}


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear layer at one bitwidth, as arrays.

    Args:
        codes: (C_out, ...), integer codes of the weight, as floating point numbers.
        scale: (C_out,), the weight's step sizes.
        step: the input's step size.
        low, high: the input's lowest and highest code.
        bits: bitwidth; layers of up to 8 bits run on integers.
        bias: (C_out,); None: there is none.
        geometry: stride, padding, dilation and groups; None: it is a linear layer.
        folded: the layer with the batch-norm behind it, where the network computes both at once.
    """

    codes: np.ndarray
    scale: np.ndarray
    step: float
    low: int
    high: int
    bits: int
    bias: np.ndarray | None
    geometry: Convolution | None
    folded: Folded | None = None

    @classmethod
    def of(cls, layer: FractionalLayer, bits: int) -> QuantizedLayer:
        """``layer`` at ``bits``."""
        codes, scale, _ = layer.quantized_weight(bits)
        step = float(layer.input_step(bits).detach())
        geometry = folded = None
        if isinstance(layer, FractionalConv2d):
            folded = layer.folded() if layer.is_normalised() else None
            assert not isinstance(layer.padding, str)
            geometry = Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)
        bias = None if layer.bias is None else layer.bias.detach().cpu().numpy()
        low, high = layer.input_limits(bits)
        return cls(codes.cpu().numpy(), scale.detach().cpu().numpy(), step, low, high, bits, bias, geometry, folded)

    @property
    def zero(self) -> int:
        """The unsigned byte that stands for zero in the input."""
        return 0 if self.low == 0 else MIDDLE


@dataclass(frozen=True)
class RoundedFeatures:
    """Features that are rounded to 8-bit codes: their step size, and the lowest and the highest code."""

    step: float
    low: int
    high: int
    bits = BYTE_BITS

    @classmethod
    def of(cls, features: ByteFeatures) -> RoundedFeatures:
        """``features`` at the current bitwidth."""
        return cls(float(features.step().detach()), *features.limits())

    @property
    def zero(self) -> int:
        """The unsigned byte that stands for zero."""
        return -self.low


class _Opaque(torch.autograd.Function):
    """Computes what the layer computes; exported as one node that carries its key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _OpaqueLayer) -> Tensor:  # noqa: ARG004
        # On a copy: a conversion of the input's type must not be recorded for the input's other readers.
        y: Tensor = layer.__dict__["layer"](x.clone())
        layer.shape = [int(size) for size in y.shape]
        return y

    @staticmethod
    def symbolic(graph: Any, x: Any, layer: _OpaqueLayer) -> Any:
        kind = ROUNDED if isinstance(layer.__dict__["layer"], ByteFeatures) else QUANTIZED
        node = graph.op(f"{DOMAIN}::{kind}", x, key_s=layer.key)
        node.setType(x.type().with_sizes(layer.shape))
        return node


class _OpaqueLayer(nn.Module):
    def __init__(self, layer: nn.Module, key: str) -> None:
        super().__init__()
        # Not a submodule: torch must not export its parameters.
        self.__dict__["layer"], self.key = layer, key
        self.shape: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Opaque.apply(x, self)
        return y


class Traced(NamedTuple):
    """A part of the network as nodes with one input and one output, and what its opaque nodes stand for, by key."""

    graph: onnx.GraphProto
    layers: dict[str, QuantizedLayer | RoundedFeatures]


@torch.no_grad()
def trace(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> tuple[Traced, Tensor]:
    """Trace ``run(module, x)`` at the bitwidths that the module's layers are set to.

    Args:
        module: it is left unchanged.
        x: (1, C, H, W).

    Returns:
        The nodes, and the output for ``x``.

    Raises:
        ExportError: ONNX has no operator for what the module computes.
    """
    plain = copy.deepcopy(module).requires_grad_(False)
    layers = _make_plain(plain)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and shapes are fixed on purpose
        try:
            torch.onnx.export(
                _Call(plain, run).eval(),
                (x,),
                content,  # type: ignore[arg-type]  # a buffer is accepted by this exporter
                dynamo=False,
                autograd_inlining=False,  # opaque nodes may follow each other
                opset_version=OPSET,
                input_names=["x"],
                output_names=["y"],
            )
        except RuntimeError as error:  # so are all of the exporter's
            what = f"a {type(module).__name__} cannot be written as an ONNX graph"
            raise ExportError(f"{what}: {first_line(error)}") from None
    model = onnx.load_from_string(content.getvalue())
    graph = round_before_pooling(fold_gains(fold_constants(_with_shapes(model, plain))), ROUNDED)
    return Traced(graph, layers), run(module, x)


def _with_shapes(model: onnx.ModelProto, module: nn.Module) -> onnx.ModelProto:
    """``model`` with the shapes of what its opaque nodes return."""
    opaque = {layer.key: layer for layer in module.modules() if isinstance(layer, _OpaqueLayer)}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            shape = opaque[key_of(node)].shape
            value = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape)
            model.graph.value_info.append(value)
    return model


def key_of(node: onnx.NodeProto) -> str:
    """The key of the layer that an opaque node stands for."""
    key: str = node.attribute[0].s.decode()
    return key


class _Call(nn.Module):
    def __init__(self, module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)


def _make_plain(module: nn.Module) -> dict[str, QuantizedLayer | RoundedFeatures]:
    """Replace fractional layers and what rounds features, in place, by plain or opaque ones at the current bitwidth; returns
    what is opaque."""
    quantized: dict[str, QuantizedLayer | RoundedFeatures] = {}

    def rounded(name: str, features: ByteFeatures) -> _OpaqueLayer:
        quantized[name] = RoundedFeatures.of(features)
        return _OpaqueLayer(features, name)

    for name, child in list(module.named_modules()):
        if isinstance(child, ByteFeatures):
            if name.rpartition(".")[2] != "output":  # others went with the layer whose output they round
                module.set_submodule(name, rounded(name, child))
        elif isinstance(child, FractionalBatchNorm):
            norm = _plain_norm(child)
            if child.output is not None:
                norm = nn.Sequential(norm, rounded(f"{name}.output", child.output))
            module.set_submodule(name, norm)
        elif isinstance(child, FractionalLayer):
            assert isinstance(child, nn.Module)
            if child.source is not None:  # no part of the module
                child.source.requires_grad_(False)
            new: nn.Module = child
            if (bits := child.precision.bits) == FULL_BITS:
                new = _plain_layer(child)
            elif getattr(child, "padding_mode", "zeros") == "zeros" and not isinstance(
                getattr(child, "padding", 0), str
            ):
                quantized[name] = QuantizedLayer.of(child, bits)
                new = _OpaqueLayer(child, name)
            if child.input_gain is not None and new is not child:
                new = nn.Sequential(Gain(child.input_gain, child.channel_shape()), new)
            if child.output is not None:
                new = nn.Sequential(new, rounded(f"{name}.output", child.output))
            module.set_submodule(name, new)
    return quantized


def _plain_layer(layer: FractionalLayer) -> nn.Module:
    """A plain layer in floating point, with the weight that ``layer`` applies."""
    weight = layer.effective_weight().detach()
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
    """``norm`` at its current bitwidth, as a layer of the class that it replaced."""
    plain = copy.deepcopy(norm, {id(norm.is_done): None})
    for tensor, value in zip(norm_tensors(plain, FULL_BITS), norm_tensors(norm, norm.precision.bits), strict=True):
        if tensor is not None and value is not None:
            tensor.detach().copy_(value.detach())
    for name in ("bit_weight", "bit_bias", "bit_mean", "bit_var"):
        delattr(plain, name)
    plain.output = None
    plain.__class__ = _PLAIN_NORMS[type(norm)]  # type: ignore[assignment]
    return plain
