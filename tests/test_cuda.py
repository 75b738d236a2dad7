"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from common import RNN, make_dynamic, spread_gate, tiny_resnet
from timm.models.resnet import Bottleneck
from torch import Tensor

import dfs_cli
from dfs_cli.config import GateKind
from dfs_cli.nn.network import DynamicResNet

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.medium,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WAITS: tuple[tuple[GateKind, int], ...] = (("rnn", 5), ("ff", 5), ("probe", 3), ("static", 1))
"""How often a network of five blocks may wait for the GPU."""


def spread_network(gate: GateKind) -> DynamicResNet:
    """A network on the CPU that decides differently for different images, unless it is static."""
    network = make_dynamic(tiny_resnet(Bottleneck), RNN.replace(gate=gate)).eval().requires_grad_(False)
    if gate != "static":
        spread_gate(network)
    if gate == "probe":
        network.controller.operating_point = -1.0
    return network


def some_images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TF32, whose 10 bits of mantissa would hide what is compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.usefixtures("exact_floats")
@pytest.mark.parametrize("gate", [gate for gate, _ in WAITS])
@torch.inference_mode()
def test_decisions_and_answers_are_those_of_the_cpu(gate: GateKind) -> None:
    network, images = spread_network(gate), some_images()
    expected = network.run(images)
    assert (expected.decisions.distinct() > 2) == (gate != "static"), "the images must be decided on differently"
    found = network.cuda().run(images.cuda())
    assert torch.equal(found.decisions.options.cpu(), expected.decisions.options)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("gate", "most"), WAITS)
@torch.inference_mode()
def test_the_gpu_is_seldom_waited_for(gate: GateKind, most: int) -> None:
    network, images = spread_network(gate).cuda(), some_images().cuda()
    network.run(images)  # what is read once is read
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            network.run(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing CUDA operation" in str(w.message)]) <= most


@pytest.mark.usefixtures("exact_floats")
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("gate", [gate for gate, _ in WAITS])
def test_a_network_tuned_there_keeps_its_budget_and_is_the_same_on_the_cpu(
    gate: GateKind, amp: bool, tmp_path: Path
) -> None:
    tuning = dfs_cli.TuningConfig(steps=40, batch_size=64, hflip=0.0, amp=amp, device="cuda")
    dynamic = dfs_cli.DynamicConfig(gate=gate)
    converted = dfs_cli.convert("resnet20_digits", 0.1, dynamic=dynamic, tuning=tuning)
    assert converted.network.device.type == "cuda"
    assert converted.keeps_budget
    file = tmp_path / "model.safetensors"
    dfs_cli.save(converted, file)
    on_cpu = dfs_cli.evaluate(dfs_cli.load(file))
    there = converted.manifest.validation
    assert there is not None
    assert on_cpu.cost == pytest.approx(there.cost, rel=0.02)
    assert abs(on_cpu.top1 - there.top1) <= 100 * 3 / on_cpu.images


def test_evaluation_in_mixed_precision_loses_little(artifact: Path) -> None:
    converted = dfs_cli.load(artifact, "cuda")
    full = dfs_cli.evaluate(converted)
    mixed = dfs_cli.evaluate(converted, amp=True, channels_last=True)
    assert mixed.top1 > full.top1 - 2


def test_a_network_is_moved_to_another_budget_there(artifact: Path) -> None:
    moved = dfs_cli.recalibrate(dfs_cli.load(artifact, "cuda"), 0.1)
    evaluation = dfs_cli.evaluate(moved)
    assert evaluation.cost <= 1.01 * 0.1
