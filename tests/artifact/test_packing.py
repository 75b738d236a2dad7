import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from common import SIZE, make_dynamic, randomise, se_resnet, tiny_resnet
from safetensors.torch import save
from timm.layers import StdConv2d
from timm.models.resnetv2 import ResNetV2

from dfs_cli.artifact.packing import check_shapes, load_packed, pack, packed_tensors, unpack
from dfs_cli.config import DynamicConfig
from dfs_cli.control.threshold import ALWAYS_REFINE
from dfs_cli.freeze.weights import freeze_weights
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.quantization import byte_codes
from dfs_cli.surgery import swap
from dfs_cli.surgery.plan import plan_costs

pytestmark = pytest.mark.medium

Create = Callable[[], torch.nn.Module]


def standardised_resnet() -> torch.nn.Module:
    """A small relative of BiT: its convolutions standardise their weights."""
    torch.manual_seed(0)
    convolution = partial(StdConv2d, eps=1e-8)
    return ResNetV2([1] * 4, (256,) * 4, num_classes=5, conv_layer=convolution, stem_type="fixed").eval()


def config_of(bits: tuple[int, ...], fixed_bits: int = 8) -> DynamicConfig:
    return DynamicConfig(bits, fixed_bits, mirror=True)


def frozen_network(bits: tuple[int, ...], fixed_bits: int = 8, create: Create = tiny_resnet) -> DynamicResNet:
    """A frozen network in which every image takes both passes."""
    network = make_dynamic(create(), config_of(bits, fixed_bits))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2)).add_(0.01)
    freeze_weights(network)
    network.controller.operating_point = ALWAYS_REFINE
    return network


def empty_network(bits: tuple[int, ...], fixed_bits: int = 8, create: Create = tiny_resnet) -> DynamicResNet:
    """What a file is loaded into."""
    model, config = create(), config_of(bits, fixed_bits)
    return swap.make_dynamic(model, config, plan_costs(model, config, SIZE)).network


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    return len(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def test_numbers_are_a_stream_of_bytes_low_ones_first() -> None:
    assert zlib.decompress(pack([torch.tensor([-7.0, 0.0, 7.0])], "<i1").numpy().tobytes()) == b"\xf9\x00\x07"
    assert zlib.decompress(pack([torch.tensor([-2.0, 300.0])], "<i2").numpy().tobytes()) == b"\xfe\x2c\xff\x01"
    assert zlib.decompress(pack([torch.tensor([1.0])], "<f4").numpy().tobytes()) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8, 12, 16])
def test_packing_loses_nothing_and_needs_no_more_than_the_bits(bits: int) -> None:
    high, kind = 2 ** (bits - 1) - 1, "<i1" if bits <= 8 else "<i2"
    codes = torch.randint(-high, high + 1, (64, 50, 3, 1)).float()
    codes.view(-1)[:2] = torch.tensor([-high, high])
    packed = pack([codes[:20], codes[20:]], kind)
    parts = unpack(packed, kind, [codes[:20].shape, codes[20:].shape])
    assert torch.equal(torch.cat(parts), codes)
    assert len(packed) <= 1.01 * codes.numel() * bits / 8, "even where all codes are as frequent"
    bell = (torch.randn(20_000) * high / 4).round().clamp(-high, high)
    if 2 < bits <= 8:
        assert len(pack([bell], kind)) < 0.95 * len(bell) * bits / 8


def test_packed_floats_are_the_same_to_the_bit() -> None:
    values = torch.randn(5000) * torch.logspace(-30, 30, 5000)
    packed = pack([values], "<f4")
    assert torch.equal(unpack(packed, "<f4", [values.shape])[0], values)
    assert len(pack([torch.rand(5000)], "<f4")) < 0.93 * 4 * 5000, "exponents are much the same"


@pytest.mark.parametrize("damage", ["a byte less", "a byte more", "no stream", "fewer numbers", "more numbers"])
def test_a_stream_of_anything_else_is_refused(damage: str) -> None:
    codes = torch.tensor([-7.0, 0.0, 7.0, 1.0])
    packed = pack([codes], "<i1")
    damaged = {
        "a byte less": packed[:-1],
        "a byte more": torch.cat([packed, packed[:1]]),
        "no stream": torch.zeros(8, dtype=torch.uint8),
        "fewer numbers": pack([codes[:-1]], "<i1"),
        "more numbers": pack([torch.zeros(5)], "<i1"),
    }[damage]
    with pytest.raises(ValueError, match="is not 4 packed numbers of 1 bytes"):
        unpack(damaged, "<i1", [codes.shape])


def test_a_stream_that_claims_to_be_huge_is_not_unpacked() -> None:
    huge = torch.frombuffer(bytearray(zlib.compress(bytes(100_000_000))), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="is not 4 packed numbers"):
        unpack(huge, "<i1", [torch.Size([4])])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_bytes_are_found_again_in_what_they_make() -> None:
    weight = torch.randn(32, 24, 1, 1) * torch.logspace(-30, 30, 32).reshape(-1, 1, 1, 1)
    weight[3] = 0.0
    codes, steps = byte_codes(weight)
    assert codes.abs().amax() == 127 and torch.equal(codes, codes.round())
    assert ((codes * steps - weight).abs() <= 0.51 * steps + 0.005 * weight.abs()).all()
    again, same_steps = byte_codes(codes * steps)
    assert torch.equal(again, codes) and torch.equal(same_steps, steps)


def test_what_is_stored_does_not_depend_on_the_order_of_layers() -> None:
    network = frozen_network((0, 2, 8))
    stored = packed_tensors(network)
    block = network.blocks[0].module
    first = block.conv1
    del block.conv1
    block.conv1 = first  # the last one now
    assert all(torch.equal(tensor, stored[name]) for name, tensor in packed_tensors(network).items())


def test_what_can_be_derived_is_not_stored() -> None:
    network = frozen_network((0, 2, 8))
    assert not any("option_costs" in name for name in network.state_dict())
    stored = packed_tensors(network)
    neutral = ("running_mean", "running_var", "bit_mean", "bit_var", "num_batches_tracked")
    of_blocks = [name for name in network.state_dict() if ".layer" in name and ".bn" in name and ".output." not in name]
    kept = {name.rpartition(".")[2] for name in of_blocks} - set(neutral)
    assert kept == {"weight", "bias", "bit_weight", "bit_bias"}
    assert not any(name in stored for name in of_blocks), "what bitwidths have of their own is packed together"


@pytest.mark.parametrize(
    ("bits", "fixed_bits", "create"),
    [
        ((0, 2, 8), 8, tiny_resnet),
        ((0, 12), 32, tiny_resnet),
        pytest.param((3, 5), 6, tiny_resnet, marks=pytest.mark.slow),
        ((0, 32), 32, tiny_resnet),
        ((0, 4), 8, standardised_resnet),
        ((0, 4), 8, se_resnet),
    ],
)
def test_what_is_stored_gives_identical_logits(bits: tuple[int, ...], fixed_bits: int, create: Create) -> None:
    network = frozen_network(bits, fixed_bits, create)
    stored = packed_tensors(network)
    coded = {name for name in network.state_dict() if name.endswith("weight")} - set(stored)
    for name, module in network.named_modules():
        if isinstance(module, FractionalLayer):
            assert (f"{name}.weight" in coded) == (0 < max(module.bitwidths, default=0) < 32)
    again = empty_network(bits, fixed_bits, create)
    check_shapes(again, stored)
    load_packed(again, stored)
    again.controller.operating_point = network.controller.operating_point
    images = torch.randn(16, *SIZE)
    with torch.no_grad():
        expected, found = network.run(images), again.run(images)
    assert torch.equal(expected.logits, found.logits)
    assert bool(expected.decisions.equal(found.decisions).all()) and bool(expected.decisions.ran.all())
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in network.state_dict().items())


def test_loading_is_strict() -> None:
    network = frozen_network((0, 2, 8))
    stored = packed_tensors(network)
    name = "weight_codes.8"
    wide = torch.full((sum(m.weight.numel() for m in network.modules() if isinstance(m, FractionalLayer)),), -128.0)
    for changed in (
        {n: t for n, t in stored.items() if n != name},
        {n: t for n, t in stored.items() if n != "bit_bias"},
        stored | {"backbone.conv1.0.log_weight_steps": torch.zeros(1, 8)},
        stored | {"bit_bias": stored["bit_bias"][:-1]},
        stored | {"unknown": torch.zeros(1)},
        stored | {name: stored[name][:-1]},
        stored | {name: torch.cat([stored[name], stored[name]])},
        stored | {name: stored[name].float()},
        stored | {name: pack([wide], "<i1")},
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            load_packed(empty_network((0, 2, 8)), changed)


def test_codes_wider_than_their_layer_are_refused() -> None:
    network = frozen_network((0, 4))
    stored = packed_tensors(network)
    layers = [m for m in network.modules() if isinstance(m, FractionalLayer)]
    wide = torch.full((sum(m.weight.numel() for m in layers),), 8.0)
    with pytest.raises(ValueError, match="have more than 4 bits"):
        load_packed(empty_network((0, 4)), stored | {"weight_codes.8": pack([wide], "<i1")})


def test_step_sizes_of_attention_are_not_spread_over_channels() -> None:
    stored = packed_tensors(frozen_network((0, 8), create=se_resnet))
    name = next(n for n in stored if n.endswith(".weight_steps"))
    load_packed(empty_network((0, 8), create=se_resnet), stored)
    with pytest.raises(ValueError, match="other step sizes"):
        load_packed(empty_network((0, 8), create=se_resnet), stored | {name: stored[name][:1]})


SMALL = [((0, 2, 3, 4, 5, 6, 8), 8, 0.27), ((0, 4), 4, 0.15), ((0, 4), 8, 0.15)]
"""Options, bitwidth of the fixed layers, and the largest share of the original's size."""


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "gate", "bits", "fixed_bits", "share"),
    [
        ("resnet18", "probe", *SMALL[0]),
        *(
            pytest.param(name, gate, *small, marks=pytest.mark.slow)
            for name in ("resnet18", "resnet20_cifar", "resnet50", "seresnet50")
            for gate in ("probe", "rnn")
            for small in SMALL
            if (name, gate) != ("resnet20_cifar", "rnn")  # the gate is a tenth of so small a network
        ),
    ],
)
def test_files_are_small(name: str, gate: str, bits: tuple[int, ...], fixed_bits: int, share: float) -> None:
    model = randomise(timm.create_model(name))  # round numbers would need less room
    config = DynamicConfig(bits, fixed_bits, gate=gate)  # type: ignore[arg-type]
    network = swap.make_dynamic(model, config, plan_costs(model, config, (3, 64, 64))).network
    for layer in network.modules():
        if isinstance(layer, FractionalLayer):
            layer.fit_weight_steps()
    freeze_weights(network)
    assert size_of(packed_tensors(network)) <= share * size_of(model.state_dict())
