"""Weights as integer codes, packed: what a file holds in place of floating point numbers that say no more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.normalisation import NEUTRAL, FractionalBatchNorm
from dfs_cli.nn.quantization import code_range

_CODES = "weight_codes"


def packed_tensors(network: DynamicResNet) -> dict[str, Tensor]:
    """The network's tensors on the CPU, as a file holds them.

    A weight that consists of codes of b bits is stored as those, b bits each: ``weight_codes`` in place of ``weight``. What
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
    """Signed codes of ``bits`` bits, of any shape, as bytes: 8 / ``bits`` codes in each, the first in its lowest bits.

    Args:
        codes: integers within ``code_range(bits, signed=True)``.

    Returns:
        (ceil(codes * bits / 8),), uint8.
    """
    low, _ = code_range(bits, signed=True)
    unsigned = (codes.flatten().to(torch.int32) - low).numpy().astype("<u4")
    planes = np.unpackbits(unsigned[:, None].view(np.uint8), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """What :func:`pack` packed, as floating point numbers of ``shape``.

    Raises:
        ValueError: ``packed`` is not of as many codes.
    """
    low, _ = code_range(bits, signed=True)
    count = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{tuple(packed.shape)} of {packed.dtype} is not {count} codes of {bits} bits")
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    unsigned = np.packbits(np.pad(planes, ((0, 0), (0, 32 - bits))), axis=1, bitorder="little").view("<u4")
    return (torch.from_numpy(unsigned.astype(np.int64)) + low).float().reshape(shape)
