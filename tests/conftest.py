"""Fixtures: small networks and small real data."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

# No test may reach a hub; those that test what happens then set their own endpoint.
os.environ["HF_HUB_OFFLINE"] = "1"
# There is a process for each core. OpenMP reads this when torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Synthetic images are kept in the user's cache folder, which tests leave alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dfs-tests-")

import pytest
from common import MakeFolder, tiny_resnet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import dfs_cli


def pytest_unconfigure() -> None:
    """Remove the cache folder of the tests."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as fast what is neither medium nor slow."""
    if not any(item.iter_markers("medium")) and not any(item.iter_markers("slow")):
        item.add_marker("fast")


@pytest.fixture(params=[BasicBlock, Bottleneck], ids=["BasicBlock", "Bottleneck"])
def tiny(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_resnet(request.param)


@pytest.fixture(scope="session")
def digits_model() -> nn.Module:
    return dfs_cli.load_model("resnet20_digits")


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
    dfs_cli.save(dfs_cli.convert("resnet20_digits", 0.2, tuning=tuning, spend=True), path)
    return path
