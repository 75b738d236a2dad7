"""Small networks and small real data, shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# No test may reach a hub; those that test what happens then set their own endpoint.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import timm
import torch
from PIL import Image
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

import dfs_cli
import dfs_cli.models  # registers the CIFAR ResNets
from dfs_cli.config import DynamicConfig
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a fresh model weights and statistics under which every block matters (timm zeroes each last scale)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return model.eval()


def tiny_resnet(block: type[nn.Module] = BasicBlock, seed: int = 0) -> nn.Module:
    """A timm ResNet of five blocks for 32x32 images."""
    torch.manual_seed(seed)
    model = ResNet(block, (2, 1, 1, 1), num_classes=5, channels=(8, 16, 16, 24), stem_type="deep", stem_width=8)
    model.pretrained_cfg = {"architecture": "tiny", "input_size": (3, 32, 32)}
    return randomise(model, seed)


def se_resnet() -> nn.Module:
    torch.manual_seed(0)
    attention = {"attn_layer": "se"}
    model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=5, channels=(8, 16, 16, 24), block_args=attention)
    model.pretrained_cfg = {"architecture": "tiny", "input_size": (3, 32, 32)}
    return randomise(model)


def preactivated_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = ResNetV2(
        (1, 1, 2, 1), channels=(32, 32, 64, 64), num_classes=5, stem_chs=16, stem_type="", preact=True,
        conv_layer=create_conv2d, norm_layer=BatchNormAct2d,
    )  # fmt: skip
    return randomise(model)


def make_dynamic(
    model: nn.Module, config: DynamicConfig | None = None, size: tuple[int, int, int] = (3, 32, 32), seed: int = 0
) -> DynamicResNet:
    """A calibrated dynamic network whose gate answers differently for different images."""
    config = config or DynamicConfig(gate="rnn")
    torch.manual_seed(seed)
    network = to_dynamic(model, config, plan_costs(model, config, size))
    sample = torch.randn(16, *size)
    fit_scales(network, sample)
    network.fit_gate(sample)
    return network


def spread_gate(network: DynamicResNet, scale: float = 4.0, seed: int = 0) -> None:
    """Make the gate's answer depend strongly on the image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.gate.named_parameters():
        if name.startswith("head") and name.endswith("weight"):
            nn.init.normal_(parameter, std=scale, generator=generator)
        elif name == "preference":
            nn.init.zeros_(parameter)


@pytest.fixture(params=[BasicBlock, Bottleneck], ids=["BasicBlock", "Bottleneck"])
def tiny(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_resnet(request.param)


@pytest.fixture(scope="session")
def digits_model() -> nn.Module:
    return dfs_cli.load_model("resnet20_digits")


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a folder of real digits, as JPEG files in ImageFolder layout."""

    def make(
        name: str = "data", classes: int = 10, per_class: int = 4, splits: tuple[str, ...] = ("train", "val")
    ) -> Path:
        from dfs_cli.data.digits import Digits

        source = Digits("train")
        root = tmp_path / name
        for offset, split in enumerate(splits):
            for target in range(classes):
                folder = root / split / str(target)
                folder.mkdir(parents=True)
                chosen = [i for i, t in enumerate(source.targets) if t == target]
                for i in chosen[offset * per_class : (offset + 1) * per_class]:
                    source[i][0].save(folder / f"{i}.jpg", quality=95)
        return root

    return make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits network, tuned for a few steps and written to a file."""
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    tuning = dfs_cli.TuningConfig(epochs=2, batch_size=64, hflip=0.0, workers=0)
    dfs_cli.save(dfs_cli.convert("resnet20_digits", 0.2, tuning=tuning), path)
    return path


def solid_image(path: Path, colour: int = 128) -> None:
    Image.new("L", (8, 8), colour).save(path)


def timm_model(name: str) -> nn.Module:
    """A timm model with random weights under which every block matters."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, pretrained=False))
