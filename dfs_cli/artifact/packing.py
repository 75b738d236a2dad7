"""A network's tensors as a file holds them: weights as integer codes, and one packed tensor per kind."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dfs_cli.nn.features import ByteFeatures
from dfs_cli.nn.layers import FloatLayer, FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import NEUTRAL, FractionalBatchNorm
from dfs_cli.nn.quantization import BYTE_BITS, byte_codes, code_range

_BYTES, _PAIRS = "weight_codes.8", "weight_codes.16"
_STEPS = "weight_steps"
_PER_BITWIDTH = ("log_weight_steps", "log_input_steps", "log_feature_steps", "bit_weight", "bit_bias")
_TYPES = {_BYTES: "<i1", _PAIRS: "<i2"} | dict.fromkeys(_PER_BITWIDTH, "<f4")
_EMPTY = torch.empty(0)
_Weighted = FractionalLayer | FloatLayer


def packed_tensors(network: DynamicResNet) -> dict[str, Tensor]:
    """The network's tensors on the CPU, as a file holds them, without loss.

    Weights that consist of integer codes are stored as codes, those of all layers in one tensor: ``weight_codes.8`` (up to
    8 bits) or ``weight_codes.16``. Each kind of tensor with values per bitwidth is one tensor for all layers as well: in a
    small network the names alone would take as much space. These tensors are packed (:func:`pack`), the layers in the order
    of their names. Layers without learned step sizes get ``weight_steps``. Tensors of neutral values are left out, and those
    that half precision can hold exactly are stored in it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        for key, value in _neutral_values(module).items():
            if bool((tensors[f"{name}.{key}"] == value).all()):
                del tensors[f"{name}.{key}"]
    joined: dict[str, list[Tensor]] = {kind: [tensors.pop(n) for n in _names(tensors, kind)] for kind in _PER_BITWIDTH}
    for name, layer in _weighted(network):
        codes, steps = _codes(layer)
        if codes is not None:
            del tensors[f"{name}.weight"]
            joined.setdefault(_kind_of_codes(layer), []).append(codes.cpu())
        if steps is not None:
            tensors[f"{name}.{_STEPS}"] = steps.cpu().bfloat16()
    packed = {kind: pack(parts, _TYPES[kind]) for kind, parts in joined.items() if any(part.numel() for part in parts)}
    return packed | {name: _narrowed(tensor) for name, tensor in tensors.items()}


def _codes(layer: _Weighted) -> tuple[Tensor | None, Tensor | None]:
    """The layer's integer codes, None unless they restore its weight exactly, and the step sizes of a layer that has none."""
    if isinstance(layer, FractionalLayer):
        return layer.weight_codes(), None
    codes, steps = byte_codes(layer.weight.detach())
    return (codes, steps) if torch.equal(codes * steps, layer.weight) else (None, None)


def load_packed(network: DynamicResNet, tensors: dict[str, Tensor]) -> None:
    """Load the result of :func:`packed_tensors` into a network on the CPU, strictly.

    Raises:
        RuntimeError: names or shapes differ.
        ValueError: a packed tensor holds more or fewer numbers, or codes have more bits than their layer.
    """
    tensors = dict(tensors)
    for name, module in network.named_modules():
        for key, value in _neutral_values(module).items():
            tensors.setdefault(f"{name}.{key}", torch.full_like(getattr(module, key), value))
    state = network.state_dict()
    for kind in _PER_BITWIDTH:
        if names := _names(state, kind):
            if repeated := tensors.keys() & set(names):
                raise ValueError(f"{min(repeated)} is stored twice")
            parts = [state[name] for name in names]
            if any(part.numel() for part in parts):  # none where all is skipped or in floating point
                parts = unpack(tensors.pop(kind, _EMPTY), _TYPES[kind], [part.shape for part in parts])
            tensors |= dict(zip(names, parts, strict=True))
    coded = [(name, layer) for name, layer in _weighted(network) if f"{name}.weight" not in tensors]
    codes: dict[_Weighted, Tensor] = {}
    for kind in (_BYTES, _PAIRS):
        if layers := [layer for _, layer in coded if _kind_of_codes(layer) == kind]:
            parts = unpack(tensors.pop(kind, _EMPTY), _TYPES[kind], [layer.weight.shape for layer in layers])
            codes |= dict(zip(layers, parts, strict=True))
    for name, layer in coded:
        low, high = code_range(_bits_of_codes(layer), signed=True)
        if not torch.equal(codes[layer], codes[layer].clamp(low, high)):
            raise ValueError(f"the codes of {name} have more than {_bits_of_codes(layer)} bits")
        tensors[f"{name}.weight"] = codes[layer]
        if not isinstance(layer, FractionalLayer):
            steps = tensors.pop(f"{name}.{_STEPS}", _EMPTY)
            if steps.shape != (len(layer.weight),) + (1,) * (layer.weight.dim() - 1):
                raise ValueError(f"{name} has other step sizes: {tuple(steps.shape)}")
            tensors[f"{name}.weight"] = codes[layer] * steps.float()
    network.load_state_dict(tensors, strict=True)
    for _, layer in coded:
        if isinstance(layer, FractionalLayer):
            layer.set_weight_codes(codes[layer])


def check_shapes(outline: DynamicResNet, tensors: dict[str, Tensor]) -> None:
    """Compare the result of :func:`packed_tensors` with a network, which may be on the meta device, before it is loaded.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or type, or not finite; or a packed one is too short.
    """
    state = outline.state_dict()
    packed = {name: kind for kind in _PER_BITWIDTH for name in _names(state, kind)}
    optional = {f"{name}.{key}" for name, module in outline.named_modules() for key in _neutral_values(module)}
    for name, layer in _weighted(outline):
        weight, steps = f"{name}.weight", f"{name}.{_STEPS}"
        if weight not in tensors:
            packed[weight] = _kind_of_codes(layer)
            if not isinstance(layer, FractionalLayer):
                state[steps] = layer.weight.new_empty((len(layer.weight),) + (1,) * (layer.weight.dim() - 1)).bfloat16()
    numbers = dict.fromkeys(_TYPES, 0)
    for name, kind in packed.items():
        numbers[kind] += state.pop(name).numel()
    for kind, count in numbers.items():
        if count:
            state[kind] = torch.empty(_least_bytes(count, _TYPES[kind]), dtype=torch.uint8, device="meta")
    if missing := state.keys() - tensors.keys() - optional:
        raise ValueError(f"{min(missing)} is missing")
    for name, tensor in tensors.items():
        if name not in state:
            raise ValueError(f"there is no tensor {name[:80]!r} in the network")
        expected = state[name]
        is_long_enough = name in numbers and tensor.dim() == 1 and len(tensor) >= len(expected)
        if tensor.shape != expected.shape and not is_long_enough:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {tuple(expected.shape)} was expected")
        if tensor.dtype != expected.dtype and (tensor.dtype, expected.dtype) != (torch.float16, torch.float32):
            raise ValueError(f"{name} is of {tensor.dtype} where {expected.dtype} was expected")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds infinite or undefined numbers")


def _least_bytes(count: int, kind: str) -> int:
    """The fewest bytes into which :func:`pack` can put so many numbers: a bit for each of their bytes."""
    return -(-count * np.dtype(kind).itemsize // 8)


def _weighted(network: DynamicResNet) -> Iterator[tuple[str, _Weighted]]:
    """The layers whose weights may consist of integer codes, with their names, sorted by name."""
    for name, module in sorted(network.named_modules(), key=lambda named: named[0]):
        if isinstance(module, FloatLayer):
            yield name, module


def _bits_of_codes(layer: _Weighted) -> int:
    return max(layer.bitwidths) if isinstance(layer, FractionalLayer) else BYTE_BITS


def _kind_of_codes(layer: _Weighted) -> str:
    return _BYTES if _bits_of_codes(layer) <= BYTE_BITS else _PAIRS


def _names(tensors: Iterable[str], kind: str) -> list[str]:
    """The names of a kind among ``tensors``, sorted."""
    return sorted(name for name in tensors if name.endswith(f".{kind}"))


def _neutral_values(module: nn.Module) -> dict[str, float]:
    """By name, the values of tensors of ``module`` that a file leaves out where all their elements have this value."""
    if isinstance(module, FractionalLayer):
        return {"input_signed": False}
    if isinstance(module, ByteFeatures):
        return {"features_signed": False}
    return NEUTRAL if isinstance(module, FractionalBatchNorm) else {}


def _narrowed(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def pack(tensors: Sequence[Tensor], kind: str) -> Tensor:
    """``tensors`` of any shapes, their values side by side as numbers of the NumPy type ``kind``, as a zlib stream: all lowest
    bytes, then all second ones, and so on, each with separate Huffman codes (DEFLATE, RFC 1951).

    Codes near zero are the most frequent, and the exponents of floating point numbers vary little: such bytes need fewer bits.
    Sequences of bytes do not repeat, so the search for repetitions is left out.

    Returns:
        (bytes,), uint8.
    """
    numbers = np.concatenate([tensor.flatten().numpy().astype(kind) for tensor in tensors])
    encoder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    stream = bytearray()
    for plane in numbers.view(np.uint8).reshape(len(numbers), numbers.itemsize).T:
        stream += encoder.compress(plane.tobytes()) + encoder.flush(zlib.Z_BLOCK)
    return torch.frombuffer(stream + encoder.flush(), dtype=torch.uint8)


def unpack(packed: Tensor, kind: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors that :func:`pack` packed, in single precision and of ``shapes``.

    Raises:
        ValueError: ``packed`` does not hold as many numbers.
    """
    sizes = [shape.numel() for shape in shapes]
    count, width = sum(sizes), np.dtype(kind).itemsize
    mismatch = ValueError(f"{tuple(packed.shape)} of {packed.dtype} is not {count} packed numbers of {width} bytes")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) < _least_bytes(count, kind):
        raise mismatch
    decoder = zlib.decompressobj()
    try:
        # At most one byte more than expected: a damaged stream may expand to any length.
        content = decoder.decompress(packed.numpy().tobytes(), width * count + 1)
    except zlib.error:
        raise mismatch from None
    if len(content) != width * count or not decoder.eof or decoder.unused_data:
        raise mismatch
    numbers = np.frombuffer(np.frombuffer(content, np.uint8).reshape(width, count).T.tobytes(), kind)
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    return [torch.from_numpy(part.astype(np.float32)).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
