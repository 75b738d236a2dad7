import math

import pytest
import torch
from torch import nn

from dfs_cli.config import SynthesisConfig
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.synthesis import work
from dfs_cli.synthesis.work import plan_work, stages_for

CPU = torch.device("cpu")
RESNET50 = 4_100_000_000


@pytest.mark.parametrize(
    ("side", "sides"), [(8, [8]), (32, [32]), (64, [32, 64]), (224, [56, 112, 224]), (288, [72, 144, 288])]
)
def test_images_are_made_from_coarse_to_fine(side: int, sides: list[int]) -> None:
    stages = stages_for((side, side), 150, RESNET50)
    assert [stage.size[0] for stage in stages] == sides
    assert sum(stage.steps for stage in stages) == pytest.approx(150, abs=2)


def test_batches_grow_as_images_shrink() -> None:
    batches = [stage.batch_size for stage in stages_for((224, 224), 150, RESNET50)]
    assert batches == [512, 128, 32]
    assert [stage.batch_size for stage in stages_for((32, 32), 150, 41_000_000)] == [512]


@pytest.mark.parametrize("seconds", [1e-6, 1e-3, 0.1, 10.0])
def test_what_is_done_depends_on_the_speed_of_the_machine(
    seconds: float, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "step_seconds", lambda model, size, batch, amp, device: batch * seconds)
    preprocessing = resolve_preprocessing(digits_model)

    def plan(few_bits: bool, images: int | None = None, steps: int | None = None) -> work.Work:
        config = SynthesisConfig(images=images, steps=steps)
        return plan_work(digits_model, preprocessing, 500_000, config, few_bits, CPU)

    usual, few = plan(False), plan(True)
    assert math.log2(usual.images).is_integer() and 32 <= usual.images <= 1024 and 32 <= usual.tuning_steps <= 350
    assert usual.images <= few.images and usual.tuning_steps <= few.tuning_steps
    if usual.images > 32 and usual.tuning_steps > 32:
        assert usual.seconds <= 600
    given = plan(False, images=5, steps=7)
    assert given.images == 5 and [stage.steps for stage in given.stages] == [7]


def test_noise_takes_no_steps(digits_model: nn.Module) -> None:
    planned = plan_work(
        digits_model, resolve_preprocessing(digits_model), 500_000, SynthesisConfig("noise", 40), False, CPU
    )
    assert planned.images == 40 and planned.stages == ()
