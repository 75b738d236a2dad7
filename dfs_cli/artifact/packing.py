"""Weights as integer codes, packed: what a file holds in place of floating point numbers that say no more."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import NEUTRAL, FractionalBatchNorm
from dfs_cli.nn.quantization import BYTE_BITS, byte_codes, code_range

_BYTES, _PAIRS = "weight_codes.8", "weight_codes.16"
_STEPS = "weight_steps"
_PER_BITWIDTH = ("log_weight_steps", "log_input_steps", "bit_weight", "bit_bias")
_NOTHING = torch.empty(0)
_Weighted = FractionalLayer | nn.Conv1d | nn.Conv2d | nn.Linear


def packed_tensors(network: DynamicResNet) -> dict[str, Tensor]:
    """The network's tensors on the CPU, as a file holds them; nothing is lost.

    Weights that consist of integer codes are stored as those, of all layers in one tensor: ``weight_codes.8`` (up to 8 bits) or
    ``weight_codes.16``; ``weight_steps`` stands with them where the layer has no step sizes of its own. What layers have per
    bitwidth is one tensor of each kind as well: in a small network the names alone would take as much room. These tensors are
    packed (:func:`pack`). What says nothing is left out, and what half precision can hold is stored in it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    codes: dict[str, list[Tensor]] = {_BYTES: [], _PAIRS: []}
    for name, module in network.named_modules():
        for key, value in _neutral_values(module).items():
            if bool((tensors[f"{name}.{key}"] == value).all()):
                del tensors[f"{name}.{key}"]
    for name, module in _weighted(network):
        if isinstance(module, FractionalLayer):
            found = module.weight_codes()
        else:
            found, steps = byte_codes(module.weight.detach())
            if torch.equal(found * steps, module.weight):
                tensors[f"{name}.{_STEPS}"] = steps.cpu().bfloat16()
            else:
                found = None
        if found is not None:
            del tensors[f"{name}.weight"]
            codes[_kind_of_codes(module)].append(found.cpu())
    of_all = codes | {kind: [tensors.pop(name) for name in _names(network, kind)] for kind in _PER_BITWIDTH}
    joined = {kind: pack(parts, _TYPES[kind]) for kind, parts in of_all.items() if parts}
    return joined | {name: _narrowed(tensor) for name, tensor in tensors.items()}


def load_packed(network: DynamicResNet, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`packed_tensors` gave into a network on the CPU, strictly.

    Raises:
        RuntimeError: names or shapes differ.
        ValueError: there are more or fewer codes, or of more bits.
    """
    tensors = dict(tensors)
    for name, module in network.named_modules():
        for key, value in _neutral_values(module).items():
            tensors.setdefault(f"{name}.{key}", torch.full_like(getattr(module, key), value))
    state = network.state_dict()
    for kind in _PER_BITWIDTH:
        names = _names(network, kind)
        parts = unpack(tensors.pop(kind, _NOTHING), _TYPES[kind], [state[n].shape for n in names]) if names else []
        tensors |= dict(zip(names, parts, strict=True))
    coded = [(name, module) for name, module in _weighted(network) if f"{name}.weight" not in tensors]
    codes: dict[_Weighted, Tensor] = {}
    for kind in (_BYTES, _PAIRS):
        modules = [module for _, module in coded if _kind_of_codes(module) == kind]
        if modules:
            parts = unpack(tensors.pop(kind, _NOTHING), _TYPES[kind], [module.weight.shape for module in modules])
            codes |= dict(zip(modules, parts, strict=True))
    for name, module in coded:
        low, high = code_range(_bits_of_codes(module), signed=True)
        if bool((codes[module].clamp(low, high) != codes[module]).any()):
            raise ValueError(f"the codes of {name} have more than {_bits_of_codes(module)} bits")
        steps = 1.0 if isinstance(module, FractionalLayer) else tensors.pop(f"{name}.{_STEPS}", _NOTHING).float()
        tensors[f"{name}.weight"] = codes[module] * steps
    network.load_state_dict(tensors, strict=True)
    for _, module in coded:
        if isinstance(module, FractionalLayer):
            module.set_weight_codes(codes[module])


def _weighted(network: DynamicResNet) -> Iterator[tuple[str, _Weighted]]:
    """The layers whose weights may consist of integer codes, and their names, in order."""
    for name, module in network.named_modules():
        if isinstance(module, (FractionalLayer, nn.Conv1d, nn.Conv2d, nn.Linear)):
            yield name, module


def _bits_of_codes(layer: _Weighted) -> int:
    return max(layer.bitwidths) if isinstance(layer, FractionalLayer) else BYTE_BITS


def _kind_of_codes(layer: _Weighted) -> str:
    return _BYTES if _bits_of_codes(layer) <= BYTE_BITS else _PAIRS


def _names(network: DynamicResNet, kind: str) -> list[str]:
    """The tensors of ``network`` of a kind, in the order of the layers."""
    return [name for name in network.state_dict() if name.endswith(f".{kind}")]


def _neutral_values(module: nn.Module) -> dict[str, float]:
    """Names of tensors of ``module`` that a file does not hold where all their elements have this value."""
    if isinstance(module, FractionalLayer):
        return {"input_signed": False}
    return NEUTRAL if isinstance(module, FractionalBatchNorm) else {}


def _narrowed(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


_TYPES = {_BYTES: "<i1", _PAIRS: "<i2"} | dict.fromkeys(_PER_BITWIDTH, "<f4")


def pack(tensors: Sequence[Tensor], kind: str) -> Tensor:
    """``tensors`` of any shapes, their values side by side as numbers of the NumPy type ``kind``, as a zlib stream: all lowest
    bytes, then all second ones, and so on, with Huffman codes of their own (DEFLATE, RFC 1951).

    Codes near zero are the most frequent, and the exponents of floating point numbers much the same: they need fewer bits so.
    Nothing repeats: the search for repetitions is left out.

    Returns:
        (bytes,), uint8.
    """
    numbers = torch.cat([tensor.flatten() for tensor in tensors]).numpy().astype(kind)
    encoder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    stream = bytearray()
    for plane in numbers.view(np.uint8).reshape(len(numbers), -1).T:
        stream += encoder.compress(plane.tobytes()) + encoder.flush(zlib.Z_BLOCK)
    return torch.frombuffer(stream + encoder.flush(), dtype=torch.uint8)


def unpack(packed: Tensor, kind: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """What :func:`pack` packed, as single-precision tensors of ``shapes``.

    Raises:
        ValueError: ``packed`` is not of as many numbers.
    """
    sizes = [shape.numel() for shape in shapes]
    count, width = sum(sizes), np.dtype(kind).itemsize
    strangers = ValueError(f"{tuple(packed.shape)} of {packed.dtype} is not {count} packed numbers of {width} bytes")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise strangers
    decoder = zlib.decompressobj()
    try:
        # One byte more than there should be: a stream may claim to hold any amount.
        content = decoder.decompress(packed.numpy().tobytes(), width * count + 1)
    except zlib.error:
        raise strangers from None
    if len(content) != width * count or not decoder.eof or decoder.unused_data:
        raise strangers
    numbers = np.frombuffer(np.frombuffer(content, np.uint8).reshape(width, count).T.tobytes(), kind)
    parts = torch.from_numpy(numbers.astype(np.float32)).split(sizes)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
