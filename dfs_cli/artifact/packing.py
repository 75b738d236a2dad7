"""Weights as integer codes, packed: what a file holds in place of floating point numbers that say no more."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import NEUTRAL, FractionalBatchNorm
from dfs_cli.nn.quantization import BYTE_BITS, code_range

_CODES = "weight_codes"


def packed_tensors(network: DynamicResNet) -> dict[str, Tensor]:
    """The network's tensors on the CPU, as a file holds them.

    A weight that consists of integer codes is stored as those, packed: ``weight_codes`` in place of ``weight``. What
    normalisation does not need is left out, and what half precision can hold is stored in it. Nothing is lost.
    """
    tensors = {name: _narrowed(tensor.detach().cpu().contiguous()) for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, FractionalLayer) and (codes := module.weight_codes()) is not None:
            del tensors[f"{name}.weight"]
            tensors[f"{name}.{_CODES}"] = pack(codes.cpu(), max(module.bitwidths))
        elif isinstance(module, FractionalBatchNorm):
            for key, value in NEUTRAL.items():
                if bool((tensors[f"{name}.{key}"] == value).all()):
                    del tensors[f"{name}.{key}"]
    return tensors


def _narrowed(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def load_packed(network: DynamicResNet, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`packed_tensors` gave into a network on the CPU, strictly.

    Raises:
        RuntimeError: names or shapes differ.
        ValueError: there are more or fewer codes.
    """
    tensors = dict(tensors)
    codes = {}
    for name, module in network.named_modules():
        if isinstance(module, FractionalLayer) and f"{name}.{_CODES}" in tensors:
            packed = tensors.pop(f"{name}.{_CODES}")
            codes[module] = unpack(packed, max(module.bitwidths), module.weight.shape)
            tensors[f"{name}.weight"] = codes[module]
        elif isinstance(module, FractionalBatchNorm):
            for key, value in NEUTRAL.items():
                tensors.setdefault(f"{name}.{key}", torch.full_like(getattr(module, key), value))
    network.load_state_dict(tensors, strict=True)
    for module, values in codes.items():
        module.set_weight_codes(values)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of ``bits`` bits, of any shape, as a zlib stream of their bytes: two's complement, one byte each up to 8
    bits, else all low bytes and then all high ones, with a Huffman code for either.

    Codes near zero are the most frequent, so that up to 8 bits Huffman's code for them (DEFLATE, RFC 1951) needs less than
    ``bits`` bits. Nothing repeats: the search for repetitions is left out.

    Returns:
        (bytes,), uint8.
    """
    width = _bytes_per_code(bits)
    planes = codes.flatten().to(torch.int32).numpy().astype("<i4")[:, None].view(np.uint8)[:, :width].T
    encoder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    stream = bytearray()
    for plane in planes:
        stream += encoder.compress(plane.tobytes()) + encoder.flush(zlib.Z_BLOCK)
    return torch.frombuffer(stream + encoder.flush(), dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """What :func:`pack` packed, as floating point numbers of ``shape``.

    Raises:
        ValueError: ``packed`` is not of as many codes.
    """
    width, count = _bytes_per_code(bits), shape.numel()
    strangers = ValueError(f"{tuple(packed.shape)} of {packed.dtype} is not {count} codes of {bits} bits")
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
    planes = np.frombuffer(content, np.uint8).reshape(width, count)
    codes = torch.from_numpy(np.ascontiguousarray(planes.T).view(f"<i{width}").astype(np.float32))
    low, high = code_range(bits, signed=True)
    if not torch.equal(codes, codes.clamp(low, high)):
        raise strangers
    return codes.reshape(shape)


def _bytes_per_code(bits: int) -> int:
    return 1 if bits <= BYTE_BITS else 2
