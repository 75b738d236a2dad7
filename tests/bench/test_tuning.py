import pytest
import torch
from common import SIZE, tiny_resnet

from dfs_cli.bench.tuning import bench_tuning, supposed_sensitivity
from dfs_cli.config import DynamicConfig, GateKind, TuningConfig
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.errors import ConfigError
from dfs_cli.observer import Observer
from dfs_cli.surgery.plan import plan_costs

TUNING = TuningConfig(batch_size=8, device="cpu")


class Progress(Observer):
    def __init__(self) -> None:
        self.done = 0

    def advance(self, units: int) -> None:
        self.done += units


@pytest.mark.parametrize(("gate", "budget"), [("probe", 0.05), ("rnn", 0.05), ("static", 0.05)])
def test_a_tuning_step_is_measured_against_a_dense_one(gate: GateKind, budget: float) -> None:
    model = tiny_resnet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dynamic, observer = DynamicConfig(bits=(0, 4, 8), gate=gate), Progress()
    bench = bench_tuning(model, resolve_preprocessing(model), dynamic, budget, TUNING, repeats=3, observer=observer)
    assert bench.time_ratio == pytest.approx(bench.tuning_seconds.median / bench.dense_seconds.median)
    assert bench.memory_ratio == pytest.approx(bench.tuning_bytes / bench.dense_bytes)
    assert observer.done == 2 + 3 and bench.repeats == 3
    assert bench.options == (0, 4, 8) and bench.gate == gate and bench.image_size == SIZE and bench.batch_size == 8
    assert (bench.second_pass_share > 0) == (gate == "probe")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_memory_by_hand() -> None:
    model = tiny_resnet()
    bench = bench_tuning(model, resolve_preprocessing(model), DynamicConfig(gate="rnn"), 0.05, TUNING, repeats=1)
    weights, images = 4 * sum(p.numel() for p in model.parameters()), 4 * 8 * 3 * 32 * 32
    # The dense step holds its weights, their gradients, AdamW's two moments, the images, and its features.
    assert 4 * weights + images < bench.dense_bytes < 4 * weights + 60 * images
    # The tuning step, beside the same, holds the original for distillation.
    assert bench.tuning_bytes > 5 * weights + images


def test_a_budget_that_cannot_be_spent_is_refused() -> None:
    model = tiny_resnet()
    with pytest.raises(ConfigError, match="cannot be spent"):
        bench_tuning(model, resolve_preprocessing(model), DynamicConfig(bits=(0, 4), gate="rnn"), 0.9, TUNING)


def test_the_fewer_bits_the_more_harm() -> None:
    table = plan_costs(tiny_resnet(), DynamicConfig(bits=(0, 4, 8), gate="static"), SIZE)
    sensitivity = supposed_sensitivity(table, torch.device("cpu"))
    assert sensitivity.layers is not None
    assert sensitivity.blocks.tolist() == [[1, 0.25, 0]] * 5
    assert sensitivity.layers.tolist() == [[float("inf"), 0.25, 0]] * 10  # two convolutions for each block
