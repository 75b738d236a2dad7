import copy
from collections import Counter

import pytest
import torch
from conftest import make_dynamic, spread_gate, timm_model, tiny_resnet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfs_cli.config import FULL_BITS, DynamicConfig
from dfs_cli.nn.layers import FractionalLayer
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.pooling import MaxPool2d
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic
from dfs_cli.surgery.folding import fold_norms
from dfs_cli.tuning.state import parameter_groups

FLOAT_EDGES = DynamicConfig(edge_bits=FULL_BITS, gate="rnn")


def decisions_of(network: DynamicResNet, images: int, option: int) -> torch.Tensor:
    return torch.full((images, len(network.blocks)), option)


def test_full_precision_decisions_reproduce_timm(tiny: nn.Module) -> None:
    network = make_dynamic(tiny, FLOAT_EDGES)
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        expected = tiny(x)
        found = network.run(x, decisions_of(network, 6, 4)).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet26t", "seresnet50", "resnetblur50"])
def test_full_precision_reproduces_timm_architectures(name: str) -> None:
    model = timm_model(name)
    size = 32 if name == "resnet20_cifar" else 64
    network = make_dynamic(model, FLOAT_EDGES, (3, size, size))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        found = network.run(x, decisions_of(network, 2, 4)).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_new_network_chooses_full_execution(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    with torch.no_grad():
        output = network.run(torch.randn(16, 3, 32, 32))
    assert (output.decisions == 4).all()


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
    network = make_dynamic(tiny)
    zeroed = copy.deepcopy(tiny)
    for module in zeroed.modules():
        if hasattr(module, "zero_init_last"):
            module.zero_init_last()
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.bias)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), network.edges.at(FULL_BITS):
        found = network.run(x, decisions_of(network, 4, 0)).logits
        torch.testing.assert_close(found, zeroed(x))


def test_same_answer_alone_and_in_any_batch(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    spread_gate(network)
    x = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        together = network.run(x)
        assert len(together.decisions.unique(dim=0)) > 8, "the test needs images that decide differently"
        for size in (1, 5, 23):
            parts = [network.run(part) for part in x.split(size)]
            assert torch.equal(torch.cat([p.decisions for p in parts]), together.decisions)
            torch.testing.assert_close(torch.cat([p.logits for p in parts]), together.logits, rtol=1e-5, atol=1e-6)


def test_gradients_can_be_recorded_after_inference_mode(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network.run(x, decisions_of(network, 2, 1)).logits
    found = network.run(x, decisions_of(network, 2, 1)).logits
    found.sum().backward()
    torch.testing.assert_close(found.detach(), expected.clone())


def test_batches_of_one_and_none(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    lone = torch.randn(1, 3, 32, 32)
    fit_scales(network, lone)
    network.fit_gate(lone)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    with torch.no_grad():
        assert network.run(torch.empty(0, 3, 32, 32)).logits.shape == (0, 5)


def test_evaluation_is_deterministic(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    spread_gate(network)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        first, second = network.run(x), network.run(x)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.decisions, second.decisions)


def test_only_the_chosen_option_runs_and_skipped_images_run_nothing() -> None:
    network = make_dynamic(tiny_resnet(BasicBlock))
    seen: list[tuple[int, int]] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, FractionalLayer)
        seen.append((len(inputs[0]), layer.precision.bits))

    first = network.blocks[1]
    assert isinstance(first.module.conv1, nn.Module)
    first.module.conv1.register_forward_pre_hook(record)
    decisions = decisions_of(network, 6, 4)
    decisions[:, 1] = torch.tensor([0, 2, 2, 0, 4, 0])
    with torch.no_grad():
        network.run(torch.randn(6, 3, 32, 32), decisions)
    assert seen == [(2, 8), (1, 32)]
    seen.clear()
    decisions[:, 1] = 0
    with torch.no_grad():
        network.run(torch.randn(6, 3, 32, 32), decisions)
    assert seen == []


def test_grouping_without_gradients_gives_what_grouping_with_gradients_gives() -> None:
    """The one may write into a block's input, the other may not; both, and single images, agree."""
    for block in (BasicBlock, Bottleneck):
        network = make_dynamic(tiny_resnet(block))
        images = torch.randn(12, 3, 32, 32)
        kept = images.clone()
        decisions = torch.randint(len(network.config.bits), (12, len(network.blocks)))
        recorded = network.run(images, decisions).logits
        assert recorded.requires_grad
        with torch.no_grad():
            plain = network.run(images, decisions).logits
            alone = [network.run(i[None], d[None]).logits for i, d in zip(images, decisions, strict=True)]
            last = network.run(images.to(memory_format=torch.channels_last), decisions).logits
        torch.testing.assert_close(plain, recorded.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat(alone), plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(images, kept)


def test_decisions_reach_the_right_images() -> None:
    network = make_dynamic(tiny_resnet(BasicBlock))
    x = torch.randn(10, 3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    decisions = torch.randint(0, 5, (10, len(network.blocks)), generator=generator)
    with torch.no_grad():
        together = network.run(x, decisions).logits
        alone = torch.cat([network.run(x[i : i + 1], decisions[i : i + 1]).logits for i in range(10)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        others = network.run(x, decisions.flip(0)).logits
    assert not torch.allclose(together, others, atol=1e-3)


@pytest.mark.parametrize("gate", ["rnn", "ff"])
def test_gradients_reach_every_gate_step_size_and_weight(gate: str, tiny: nn.Module) -> None:
    network = make_dynamic(tiny, DynamicConfig(gate=gate)).train()  # type: ignore[arg-type]
    x = torch.randn(10, 3, 32, 32)
    for option in (1, 2, 3, 4, 0):
        output = network.run(x, decisions_of(network, 10, option), explore=1.0)
        (output.logits.square().sum() * 1e-2).backward()
    without = []
    for group in parameter_groups(network):
        assert group
    for name, parameter in network.named_parameters():
        if parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any():
            without.append(name)
    assert without == []


def test_gate_hears_about_skipped_blocks_only_when_exploring(tiny: nn.Module) -> None:
    network = make_dynamic(tiny).train()
    x = torch.randn(6, 3, 32, 32)
    for explore, expected in ((0.0, False), (1.0, True)):
        network.zero_grad()
        network.run(x, decisions_of(network, 6, 0), explore=explore).logits.square().sum().backward()
        grads = [p.grad for p in network.gate.parameters()]
        assert any(g is not None and bool(g.any()) for g in grads) is expected


def test_normalisation_keeps_its_statistics_in_training(tiny: nn.Module) -> None:
    network = make_dynamic(tiny).train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network.run(torch.randn(6, 3, 32, 32))
    after = network.state_dict()
    assert before and all(torch.equal(v, after[k]) for k, v in before.items())


def test_price_of_cost_lowers_the_bits(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(16, 3, 32, 32)
    means = []
    for price in (0.0, 30.0, 100.0, 400.0, 1e6):
        network.operating_point = price
        with torch.no_grad():
            means.append(float(network.run(x).decisions.float().mean()))
    assert means[0] == 4 and means[-1] == 0
    assert means == sorted(means, reverse=True) and len(set(means)) >= 4


def test_run_in_full_leaves_no_state(tiny: nn.Module) -> None:
    network = make_dynamic(tiny)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before = network.run(x, decisions_of(network, 3, 2)).logits
        network.run_in_full(x)
        assert torch.equal(network.run(x, decisions_of(network, 3, 2)).logits, before)


def test_an_accelerator_is_waited_for_once_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the CPU: operations whose result, or the size of it, is known only once an accelerator is done."""
    network = make_dynamic(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    device = torch.device("cpu")
    waits = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket.__name__ in {
                "_local_scalar_dense",
                "bincount",
                "nonzero",
                "masked_select",
                "_unique2",
            }:
                waits.append(func)
            return func(*args, **(kwargs or {}))

    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append("tolist") or read(tensor))
    for choice in (torch.tensor([2, 0, 1, 0]), torch.tensor([1, 1]), torch.tensor([2])):
        waits.clear()
        with Waits():
            groups = network._groups(choice, device)
        assert len(waits) == 1
        assert [(option, len(rows)) for option, rows in groups] == sorted(Counter(read(choice)).items())
        if len(groups) > 1:  # a lone option comes with the choice itself
            assert all((choice[rows] == option).all() for option, rows in groups)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # what cached weights are known by
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("gate", ["rnn", "ff", "probe"])
def test_an_accelerator_is_waited_for_nowhere_else(gate: str, amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that claim to be on CUDA and have no values: to ask for one, or to mix devices, is an error."""
    network = make_dynamic(tiny_resnet(Bottleneck), DynamicConfig(gate=gate)).eval()  # type: ignore[arg-type]
    monkeypatch.setattr(FractionalLayer, "_signed", lambda _: False)  # read once per placement
    waits: list[str] = []

    def groups(choice: torch.Tensor, device: torch.device) -> list[tuple[int, torch.Tensor]]:
        if choice.device.type == "cuda":
            waits.append("groups")
        rows = torch.arange(len(choice), device=device)
        return [(0, rows[:1]), (2, rows[1:3]), (4, rows[3:])]

    def nonzero(found: torch.Tensor) -> torch.Tensor:
        waits.append("nonzero")
        return torch.arange(4, device=found.device)[:, None]

    copy_to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(network, "_groups", groups)
    monkeypatch.setattr(torch.Tensor, "nonzero", nonzero)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: waits.append("cpu") or copy_to_cpu(tensor))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), torch.no_grad():

        def pretend(tensor: torch.Tensor) -> torch.Tensor:
            layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda", memory_format=layout)

        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(pretend(parameter)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, pretend(buffer))
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
            output = network.run(pretend(torch.empty(6, 3, 32, 32)))
    assert output.logits.device.type == output.decisions.device.type == "cuda"
    assert waits == (["cpu", "nonzero", "cpu"] if gate == "probe" else ["groups"] * len(network.blocks))


@pytest.mark.parametrize("gate", ["rnn", "probe"])
def test_mixed_precision_channels_last_differs_in_rounding_alone(gate: str) -> None:
    network = make_dynamic(tiny_resnet(Bottleneck), DynamicConfig(gate=gate)).eval()  # type: ignore[arg-type]
    spread_gate(network)
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
    assert len(expected.decisions.unique()) > 1
    # Eight bits of mantissa, through five blocks.
    assert float((found - expected.logits).abs().max()) < 0.05 * float(expected.logits.abs().max())
    assert not torch.equal(found, expected.logits) and layouts and all(layouts)


def test_means_of_unchanged_features_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_dynamic(tiny_resnet(Bottleneck), DynamicConfig(bits=(0, 4, 8), gate="rnn"))
    spread_gate(network)
    images = torch.randn(12, 3, 32, 32)
    changed = []
    find = network._changed
    monkeypatch.setattr(network, "_changed", lambda block, chosen: changed.append(find(block, chosen)) or changed[-1])
    with torch.no_grad():
        found = network.run(images)
        monkeypatch.setattr(network, "_changed", lambda block, chosen: None)
        expected = network.run(images)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.decisions, expected.decisions)
    assert any(images is not None and 0 < len(images) < 12 for images in changed)


@pytest.mark.parametrize("size", [7, 8, 31])
def test_max_pooling_is_that_of_torch(size: int) -> None:
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    x = torch.randn(3, 5, size, size + 1)
    with torch.no_grad():
        found = MaxPool2d.adopt(pool)(x)
    assert torch.equal(found, pool(x)) and found.stride() == pool(x).stride()


def test_only_stems_of_one_convolution_choose_their_layout() -> None:
    for name, expected in (
        ("resnet18", True),
        ("resnet50", True),
        ("resnetv2_50", False),
        ("resnet50_gn", False),
        ("resnet10t", False),
    ):
        model = timm_model(name)
        network = to_dynamic(model, FLOAT_EDGES, plan_costs(model, FLOAT_EDGES, (3, 64, 64)))
        assert network.pools_first == expected, name
        assert fold_norms(network).pools_first == expected, name
        images = torch.randn(3, 3, 64, 64)
        with torch.no_grad():
            wanted = network.layout.stem(network.backbone, images)
            found = network._stem(images)
            alone = torch.cat([network._stem(image[None]) for image in images])
            last = network._stem(images.to(memory_format=torch.channels_last))
        assert torch.equal(found, alone) and found.stride() == wanted.stride(), name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-5)
        assert last.is_contiguous(memory_format=torch.channels_last), name
    assert not make_dynamic(timm_model("resnet20_cifar")).pools_first
