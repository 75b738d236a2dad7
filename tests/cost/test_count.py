import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfs_cli.catalogue import list_convertible
from dfs_cli.config import DynamicConfig
from dfs_cli.cost.count import count_macs
from dfs_cli.surgery.plan import plan_costs


def test_counts_of_a_hand_counted_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, stride=2, groups=2), nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )  # fmt: skip
    count = count_macs(network.train(), (3, 8, 8))
    assert count.layers == {"0": 4 * 8 * 8 * 3 * 9, "2": 8 * 4 * 4 * 2 * 4, "4": 128 * 5}
    assert count.not_counted["batch_norm"] == 1
    assert network.training, "the model is left as it was"


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize("name", ["resnet18", "seresnet50", "skresnet18", "res2net50_14w_8s", "resnest14d"])
@pytest.mark.medium
def test_without_memory_the_same_is_counted(name: str) -> None:
    size = (3, 64, 64)
    assert list(count_macs(meta_model(name), size).layers.items()) == list(
        count_macs(meta_model(name).to_empty(device="cpu"), size).layers.items()
    )


@pytest.mark.slow
def test_without_memory_the_same_is_counted_for_every_architecture() -> None:
    for model in list_convertible():
        size = (1 if model.name == "resnet20_digits" else 3, 64, 64)
        found = count_macs(meta_model(model.name), size)
        assert found.layers == count_macs(meta_model(model.name).to_empty(device="cpu"), size).layers, model.name


@pytest.mark.parametrize(
    "name",
    [
        "seresnet50",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet18", "resnetblur50", "ecaresnet26t", "resnetrs50", "resnet50c")
        ),
    ],
)
@pytest.mark.medium
def test_the_dense_cost_agrees_with_torch(name: str) -> None:
    model = timm.create_model(name).eval()
    table = plan_costs(model, DynamicConfig(bits=(0, 32), fixed_bits=32, gate="rnn"), (3, 64, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert 2 * table.dense_macs == counter.get_total_flops()
    assert table.dearest * table.dense_macs == pytest.approx(table.dense_macs + sum(table.controller_macs[0]))
