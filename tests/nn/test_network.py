import copy
from typing import cast

import pytest
import torch
from common import RNN, SIZE, Block, everywhere, make_dynamic, mixed_decisions, spread_gate, timm_model, tiny_resnet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import controller_of
from dfs_cli.cost.decisions import Decisions
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import Choose
from dfs_cli.nn.normalisation import FractionalBatchNorm
from dfs_cli.nn.passes import TuningTarget, View
from dfs_cli.presets import FULL_BITS
from dfs_cli.tuning.state import parameter_groups

FLOAT_FIXED = RNN.replace(fixed_bits=FULL_BITS)
EXPLORING = TuningTarget(1.0, explored=1.0)
NOT_EXPLORING = TuningTarget(1.0, explored=0.0)
WAITS = {"_local_scalar_dense", "bincount", "nonzero", "masked_select", "_unique2"}
"""Operations whose result, or the size of it, is known only once an accelerator is done."""


def test_full_precision_decisions_reproduce_timm(tiny: nn.Module) -> None:
    network = make_dynamic(tiny, FLOAT_FIXED)
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        expected = tiny(x)
        found = network.run(x, everywhere(network, 32, 6)).logits
        assert torch.equal(network(x), found), "a new network takes its widest options, and forward gives the logits"
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet26t", "seresnet50", "resnetblur50"])
def test_full_precision_reproduces_timm_architectures(name: str) -> None:
    model = timm_model(name)
    size = 32 if name == "resnet20_cifar" else 64
    network = make_dynamic(model, FLOAT_FIXED, (3, size, size))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        found = network.run(x, everywhere(network, 32, 2)).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_new_network_chooses_full_execution(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    with torch.no_grad():
        output = network.run(torch.randn(16, 3, 32, 32))
    assert (output.decisions.options == 4).all()


def test_original_is_left_unchanged(tiny: nn.Module) -> None:
    before = copy.deepcopy(tiny.state_dict())
    shape = repr(tiny)
    network = make_dynamic(tiny)
    network.train()
    network.run(torch.randn(4, 3, 32, 32)).logits.sum().backward()
    assert repr(tiny) == shape
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert all(p.grad is None for p in tiny.parameters())


def test_skipping_equals_a_zeroed_residual_branch(tiny: nn.Module) -> None:
    network = make_dynamic(tiny, FLOAT_FIXED)
    zeroed = copy.deepcopy(tiny)
    for module in zeroed.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            module.zero_init_last()
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(cast(torch.Tensor, last.bias))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.run(x, everywhere(network, 0, 4)).logits, zeroed(x))


def test_same_answer_alone_and_in_any_batch(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    spread_gate(network)
    x = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        together = network.run(x)
        assert together.decisions.distinct() > 8, "the test needs images that decide differently"
        again = network.run(x)
        assert torch.equal(again.logits, together.logits) and bool(again.decisions.equal(together.decisions).all())
        for size in (1, 5, 23):
            parts = [network.run(part) for part in x.split(size)]
            joined = Decisions.join(p.decisions for p in parts)
            assert bool(joined.equal(together.decisions).all())
            torch.testing.assert_close(torch.cat([p.logits for p in parts]), together.logits, rtol=1e-5, atol=1e-6)


def test_gradients_can_be_recorded_after_inference_mode(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network.run(x, everywhere(network, 4, 2)).logits
    found = network.run(x, everywhere(network, 4, 2)).logits
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())


def test_a_batch_of_none(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    with torch.no_grad():
        output = network.run(torch.empty(0, 3, 32, 32))
    assert output.logits.shape == (0, 5) and output.decisions.options.shape == (0, 1, 5)


def test_only_the_chosen_option_runs_and_skipped_images_run_nothing() -> None:
    network = make_dynamic(tiny_resnet(BasicBlock))
    seen: list[tuple[int, int]] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, FractionalLayer)
        seen.append((len(inputs[0]), layer.precision.bits))

    network.blocks[1].module.get_submodule("conv1").register_forward_pre_hook(record)
    options = torch.full((6, 5), 4)
    options[:, 1] = torch.tensor([0, 2, 2, 0, 4, 0])
    with torch.no_grad():
        network.run(torch.randn(6, 3, 32, 32), Decisions.of_pass(options))
    assert seen == [(2, 8), (1, 32)]
    seen.clear()
    options[:, 1] = 0
    with torch.no_grad():
        network.run(torch.randn(6, 3, 32, 32), Decisions.of_pass(options))
    assert seen == []


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_grouping_without_gradients_gives_what_grouping_with_gradients_gives(block: Block) -> None:
    """The one may write into a block's input, the other may not; both, and single images, agree."""
    network = make_dynamic(tiny_resnet(block))
    images = torch.randn(12, 3, 32, 32)
    kept = images.clone()
    decisions = mixed_decisions(network, 12)
    recorded = network.run(images, decisions).logits
    assert recorded.requires_grad
    with torch.no_grad():
        plain = network.run(images, decisions).logits
        alone = [network.run(images[i : i + 1], decisions[i : i + 1]).logits for i in range(12)]
        last = network.run(images.to(memory_format=torch.channels_last), decisions).logits
        others = network.run(images, decisions[torch.arange(11, -1, -1)]).logits
    torch.testing.assert_close(plain, recorded.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(alone), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(images, kept)
    assert not torch.allclose(plain, others, atol=1e-3), "decisions must reach the right images"


@pytest.mark.parametrize("bits", [RNN.bits, (0, 4, 8)], ids=["floats between blocks", "bytes between blocks"])
@pytest.mark.parametrize("gate", ["rnn", "ff"])
def test_gradients_reach_every_gate_step_size_and_weight(gate: str, bits: tuple[int, ...], tiny: nn.Module) -> None:
    network = make_dynamic(tiny, RNN.replace(gate=gate, bits=bits)).train()
    x = torch.randn(10, 3, 32, 32)
    for option in reversed(bits):
        output = network.run(x, everywhere(network, option, 10), EXPLORING)
        (output.logits.square().sum() * 1e-2).backward()
    groups = parameter_groups(network)
    assert all(groups) and sum(map(len, groups)) == len(list(network.parameters()))
    without = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any()
    ]
    unused = []
    for name, module in network.named_modules() if network.features else ():
        if isinstance(module, FractionalBatchNorm):  # floating point alone uses the original's
            unused += [f"{name}.weight", f"{name}.bias"]
        elif (
            isinstance(module, FractionalLayer) and module.source and module.bitwidths == (8,)
        ):  # bytes are read as they are
            unused.append(f"{name}.log_input_steps")
    assert sorted(without) == sorted(unused)


def test_gate_hears_about_skipped_blocks_only_when_exploring(tiny: nn.Module) -> None:
    network = make_dynamic(tiny).train()
    x = torch.randn(6, 3, 32, 32)
    for target, expected in ((NOT_EXPLORING, False), (EXPLORING, True)):
        network.zero_grad()
        network.run(x, everywhere(network, 0, 6), target).logits.square().sum().backward()
        grads = [p.grad for p in controller_of(network).parameters()]
        assert any(g is not None and bool(g.any()) for g in grads) is expected


def test_normalisation_keeps_its_statistics_in_training(tiny: nn.Module) -> None:
    network = make_dynamic(tiny).train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network.run(torch.randn(6, 3, 32, 32))
    after = network.state_dict()
    assert before and all(torch.equal(v, after[k]) for k, v in before.items())


def test_run_in_full_is_the_original_and_leaves_no_state(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = network.run(x, everywhere(network, 8, 3)).logits
        torch.testing.assert_close(network.run_in_full(x), tiny(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(network.run(x, everywhere(network, 8, 3)).logits, before)


def test_a_view_mirrors_along_the_width() -> None:
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert View().of(image) is image
    assert View(mirrored=True).of(image).flatten().tolist() == [2, 1, 0, 5, 4, 3]


def test_a_smaller_view_is_interpolated() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Halfway between four pixels each.
    assert View(scale=0.5).of(image).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert View(mirrored=True, scale=0.5).of(image).flatten().tolist() == [4.5, 2.5, 12.5, 10.5]
    assert View(scale=0.625).size_of(224, 64) == (140, 40) and View(scale=0.25).size_of(1) == (1,)


def test_each_size_of_the_images_has_statistics_of_its_own() -> None:
    model = tiny_resnet()
    network = make_dynamic(model, DynamicConfig(bits=(4, 8), gate="probe", first_view=0.5))
    policy = torch.ones(8, len(network.blocks), dtype=torch.long)
    small, x = View(scale=0.5), torch.randn(8, *SIZE)
    norms = [m for m in network.modules() if isinstance(m, FractionalBatchNorm)]
    assert norms and all(len(norm.bit_mean) == 2 * len(norm.bitwidths) for norm in norms)

    def logits(view: View) -> torch.Tensor:
        return network.follow(x, policy, view=view)[0]

    with torch.no_grad():
        before = logits(View()), logits(small)
        for norm in norms:
            norm.bit_bias[len(norm.bitwidths) :] += 1.0
        assert torch.equal(logits(View()), before[0]) and not torch.equal(logits(small), before[1])
        for norm in norms:
            norm.bit_bias[: len(norm.bitwidths)] += 1.0
        assert not torch.equal(logits(View()), before[0])


def follow(options: torch.Tensor) -> Choose:
    """Chooses ``options`` (N, L)."""
    return lambda block, _: (options[:, block], None)


def test_an_accelerator_is_waited_for_once_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the CPU, where gradients are recorded: a pass reads the options of each block, once, and nothing else."""
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    images = torch.randn(4, 3, 32, 32)
    waits: list[str] = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if name in WAITS:
                waits.append(name)
            return func(*args, **(kwargs or {}))

    read = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> object:
        waits.append("tolist")
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    for column in ([2, 0, 1, 0], [1, 1, 1, 1], [0, 0, 2, 2]):
        options = torch.tensor(column)[:, None].expand(-1, 5)
        expected = network.run(images, Decisions.of_pass(options)).logits  # what is read once is read
        waits.clear()
        with Waits():
            logits, _ = network.run_pass(images, follow(options))
        assert len(waits) == len(network.blocks), waits
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("gate", ["rnn", "probe"])
def test_mixed_precision_channels_last_differs_in_rounding_alone(gate: str) -> None:
    network = make_dynamic(tiny_resnet(Bottleneck), RNN.replace(gate=gate)).eval()
    spread_gate(network)
    if gate == "probe":
        network.controller.operating_point = 0.0
    images = torch.randn(12, 3, 32, 32)
    layouts: list[bool] = []
    with torch.no_grad():
        expected = network.run(images)
        network.to(memory_format=torch.channels_last)
        for block in network.blocks:
            block.module.register_forward_hook(
                lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
            )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network.run(images.to(memory_format=torch.channels_last), expected.decisions).logits.float()
    assert expected.decisions.distinct() > 1
    # Eight bits of mantissa, through five blocks.
    assert float((found - expected.logits).abs().max()) < 0.05 * float(expected.logits.abs().max())
    assert not torch.equal(found, expected.logits) and layouts and all(layouts)
