"""Every timm architecture of class ResNet or ResNetV2: converts, trains, counts, saves and loads.

Each runs with its own widths, stem and options but few blocks: one of each structure that it has. What depth adds is
more of the same blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from common import everywhere, mixed_decisions, randomise, shallow_model, start_controller
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dfs_cli
from dfs_cli.artifact.artifact import load_artifact, save_artifact
from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.config import DynamicConfig, Preprocessing
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.freeze.batchnorm import fold_norms
from dfs_cli.models.zoo import candidate_names
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.families import FAMILIES
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.surgery.swap import make_dynamic

SIZE = (3, 64, 64)
CONFIG = DynamicConfig(bits=(0, 4, 8, 32), fixed_bits=FULL_BITS, gate="rnn")
FAMILY_NAMES = (
    "resnet18",
    "resnet26",
    "res2net50_48w_2s",
    "resnest14d",
    "skresnet18",
    "resnetv2_18",
    "resnetv2_50x1_bit",
)
"""One of each family of blocks that is quick to build."""
NAMES = [name for name in candidate_names() if not name.endswith(("_cifar", "_digits"))]


def register_shallow(name: str) -> str:
    """Register the architecture with few blocks."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return shallow_model(name, pretrained=pretrained, **kwargs)

    entrypoint.__name__, entrypoint.__module__ = f"shallow_{name}", __name__
    timm.models.register_model(entrypoint)
    return entrypoint.__name__


def signature(model: nn.Module) -> str:
    """What the checks depend on: the structure, without the widths."""
    names = [f"{name}:{type(m).__name__}" for name, m in model.named_modules()]
    return "|".join(names)


def zero_branch(block: nn.Module) -> nn.Module:
    """A block of timm whose residual branch gives zero, whatever its class."""
    block.zero_init_last()  # type: ignore[operator]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and not module.weight.any():
            nn.init.zeros_(module.bias)
    return block


def check_full_precision(model: nn.Module, network: DynamicResNet, images: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = model(images), network.run(images, everywhere(network, FULL_BITS, len(images))).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def check_folding(model: nn.Module, images: torch.Tensor) -> None:
    config = DynamicConfig(bits=(0, FULL_BITS), fixed_bits=FULL_BITS, gate="rnn")
    folded = fold_norms(make_dynamic(model, config, plan_costs(model, config, SIZE)).network)
    with torch.no_grad():
        expected, found = model(images), folded.run_in_full(images)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def check_skipping(model: nn.Module, network: DynamicResNet, images: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.isfinite(network.run(images, everywhere(network, 0, len(images))).logits).all()
        x = network.layout.stem(network.backbone, images)
        for block in network.blocks:
            skipped = block.skip(block.module, x)
            zeroed = zero_branch(model.get_submodule(block.name))
            torch.testing.assert_close(skipped, zeroed(x), msg=block.name)
            x = skipped


def check_batches_and_training(network: DynamicResNet, images: torch.Tensor) -> None:
    # Without the 4-bit option: where a sum is a tie between two codes, its last bit decides, and one step of 4 bits is large.
    exact = torch.tensor([0, 2, 3])
    options = exact[torch.randint(0, len(exact), (len(images), len(network.blocks)))]
    decisions = Decisions.of_pass(options)
    with torch.no_grad():
        together = network.run(images, decisions).logits
        alone = torch.cat([network.run(images[i : i + 1], decisions[i : i + 1]).logits for i in range(len(images))])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    network.train()
    decisions = mixed_decisions(network, len(images))
    network.run(images, decisions, TuningTarget(1.0, explored=1.0)).logits.logsumexp(dim=1).sum().backward()
    network.eval()
    kinds = {"controller.": 0, "log_": 0, "backbone.": 0}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
            kinds[next(k for k in kinds if k in name)] += bool(parameter.grad.any())
        parameter.grad = None
    assert all(kinds.values()), kinds


def check_costs(model: nn.Module, table: CostTable) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SIZE))
    assert 2 * table.dense_macs == counter.get_total_flops()
    assert table.dearest * table.dense_macs == pytest.approx(table.dense_macs + sum(table.controller_macs[0]))
    for layer in table.layers:
        parts = layer.name.split(".")
        if any(p in ("se", "attn", "fc1", "fc2") for p in parts):
            assert layer.block is None and layer.bits == FULL_BITS, layer.name
    quantized = {layer.name for layer in table.layers if layer.block is not None}
    for path, block in model.named_modules():
        if family := FAMILIES.get(type(block)):
            assert all(any(n.startswith(f"{path}.{part}") for n in quantized) for part in family.branch), path


def check_file(name: str, network: DynamicResNet, table: CostTable, images: torch.Tensor, folder: Path) -> None:
    preprocessing = Preprocessing(SIZE, SIZE, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
    point = network.controller.operating_point
    manifest = dfs_cli.Manifest(name, ModelArgs(1000), (), preprocessing, CONFIG, table, None, point)
    save_artifact(folder / "x.safetensors", network, manifest)
    loaded, found = load_artifact(folder / "x.safetensors")
    with torch.no_grad():
        a, b = network.run(images), loaded.run(images)
    assert found == manifest and torch.equal(a.logits, b.logits)
    assert bool(a.decisions.equal(b.decisions).all())


_seen: set[str] = set()


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", [name if name in FAMILY_NAMES else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_architecture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks for the first architecture of a structure; full precision and costs for the others too."""
    monkeypatch.setattr("dfs_cli.artifact.verify.is_candidate", lambda name: True)  # dfs list lists no shallow ones
    torch.manual_seed(0)
    shallow = register_shallow(name)
    model = randomise(timm.create_model(shallow))
    images = torch.randn(4, *SIZE)
    table = plan_costs(model, CONFIG, SIZE)
    network = make_dynamic(model, CONFIG, table).network
    check_full_precision(model, network, images)
    check_costs(model, table)
    if signature(model) in _seen:
        return
    _seen.add(signature(model))
    check_folding(model, images)
    fit_steps(network, images)
    start_controller(network, table, images)
    check_batches_and_training(network, images)
    check_file(shallow, network, table, images, tmp_path)
    check_skipping(model, network, images)  # last: it zeroes the branches of `model`


def test_every_family_is_among_them() -> None:
    assert len(NAMES) >= 123
    assert {"resnet18", "resnest50d", "skresnet18", "res2net50d", "resnetv2_50x1_bit", "ecaresnet26t"} <= set(NAMES)
