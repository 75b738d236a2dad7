import pytest
import torch
from common import SIZE, make_dynamic, se_resnet, tiny_resnet

from dfs_cli.artifact.packing import packed_tensors
from dfs_cli.config import DynamicConfig
from dfs_cli.freeze.weights import freeze_weights
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet


def random_network(bits: tuple[int, ...], fixed_bits: int = 8, model: torch.nn.Module | None = None) -> DynamicResNet:
    """A network whose statistics and affine parameters differ from bitwidth to bitwidth, as after tuning."""
    network = make_dynamic(model or tiny_resnet(), DynamicConfig(bits, fixed_bits, mirror=True))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2, generator=generator)).add_(0.01)
    return network


def fractional(network: DynamicResNet) -> dict[str, FractionalLayer]:
    return {name: m for name, m in network.named_modules() if isinstance(m, FractionalLayer)}


def test_freezing_a_single_bitwidth_changes_no_code_and_folds_statistics() -> None:
    network = random_network((0, 8))
    images = torch.randn(4, *SIZE)
    widest = torch.full((4, 5), 1)
    with torch.no_grad():
        before, _ = network.follow(images, widest)
        freeze_weights(network)
        torch.testing.assert_close(network.follow(images, widest)[0], before, rtol=1e-4, atol=1e-4)
    codes = [layer.weight_codes() for layer in fractional(network).values()]
    assert codes and all(c is not None and torch.equal(c, c.round()) and c.abs().max() <= 127 for c in codes)


def test_freezing_moves_hardly_a_weight_across_a_narrower_threshold() -> None:
    network = random_network((0, 2, 3, 4, 8))
    layers = [m for m in fractional(network).values() if len(m.bitwidths) > 1]
    before = [{b: m.quantized_weight(b).codes for b in m.bitwidths} for m in layers]
    freeze_weights(network)
    changed, nearest, weights = dict.fromkeys((2, 3, 4), 0), dict.fromkeys((2, 3, 4), 0), 0
    for layer, codes in zip(layers, before, strict=True):
        weights += layer.weight.numel()
        for bits in changed:
            changed[bits] += int((layer.quantized_weight(bits).codes != codes[bits]).sum())
        layer.set_weight_codes(codes[8])
        for bits in nearest:
            nearest[bits] += int((layer.quantized_weight(bits).codes != codes[bits]).sum())
    assert all(nearest[b] > 0.001 * weights for b in nearest), "the test needs weights close to thresholds"
    assert all(changed[b] < 0.1 * nearest[b] for b in changed), (changed, nearest, weights)


@pytest.mark.parametrize("bits", [(0, 8), (0, 8, 32)])
def test_attention_is_rounded_to_bytes_unless_floating_point_is_an_option(bits: tuple[int, ...]) -> None:
    network = random_network(bits, model=se_resnet())
    before = {n: m.weight.clone() for n, m in network.named_modules() if n.endswith(("se.fc1", "se.fc2"))}
    freeze_weights(network)
    stored = packed_tensors(network)
    assert len(before) == 8
    for name, weight in before.items():
        kept = network.get_submodule(name).weight
        if 32 in bits:
            assert torch.equal(stored[f"{name}.weight"], weight)
        else:
            assert f"{name}.weight" not in stored and stored[f"{name}.weight_steps"].dtype == torch.bfloat16
            torch.testing.assert_close(kept, weight, rtol=0, atol=0.006 * float(weight.detach().abs().max()))


def test_fixed_layers_in_floating_point_keep_their_weights() -> None:
    network = random_network((0, 12), 32)
    before = {name: layer.weight.detach().clone() for name, layer in fractional(network).items()}
    freeze_weights(network)
    fixed = [n for n, layer in fractional(network).items() if layer.precision is network.fixed]
    assert fixed and all(torch.equal(before[n], network.get_submodule(n).weight) for n in fixed)  # type: ignore[arg-type]


def test_floating_point_options_keep_their_weights() -> None:
    network = random_network((0, 8, 32))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze_weights(network)
    stored = packed_tensors(network)
    for name, layer in fractional(network).items():
        kept = layer.precision is not network.fixed
        assert (f"{name}.weight" in stored) == kept
        assert torch.equal(before[f"{name}.weight"], layer.weight) == kept
    assert all(torch.equal(before[n], t) for n, t in stored.items() if ".bn" in n)


def test_the_controller_is_frozen_too() -> None:
    network = random_network((0, 8))
    with torch.no_grad():
        for parameter in network.controller.parameters():  # type: ignore[attr-defined]
            parameter.add_(1e-5)
    freeze_weights(network)
    for parameter in network.controller.parameters():  # type: ignore[attr-defined]
        assert torch.equal(parameter, parameter.half().float())
