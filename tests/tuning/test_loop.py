import copy
import random
from collections.abc import Callable

import pytest
import torch
from common import RNN, SIZE, make_dynamic, tiny_resnet
from torch import nn
from torch.utils.data import TensorDataset

from dfs_cli.config import DynamicConfig, TuningConfig
from dfs_cli.control.base import Request, Sensitivity, controller_of
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, train_loader
from dfs_cli.errors import ConfigError, DivergedError
from dfs_cli.nn.passes import TuningTarget
from dfs_cli.records import StepRecord
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.tuning.loop import seed_everything, tune
from dfs_cli.tuning.state import start_state
from dfs_cli.tuning.step import StepLoss, taught_images, teacher_logits

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")


def shift(image: torch.Tensor) -> torch.Tensor:
    """An augmentation that draws from both generators that timm's use."""
    return image.roll((random.randrange(4), int(torch.randint(4, ()))), (1, 2))


def images(count: int = 64) -> Images:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(count, *SIZE, generator=generator), torch.arange(count) % 5)
    return Images(data, shift)


SETTINGS = TuningConfig(epochs=3, batch_size=16)
"""Twelve steps."""


class Run:
    """A short run on a tiny network."""

    def __init__(self, config: TuningConfig = SETTINGS, dynamic: DynamicConfig = RNN, budget: float = 0.2) -> None:
        self.config = config
        self.model = tiny_resnet()
        self.table = plan_costs(self.model, dynamic, SIZE)
        self.network = make_dynamic(self.model, dynamic)
        harm = Sensitivity(torch.linspace(1.0, 0.1, len(dynamic.bits)).repeat(5, 1))
        controller, request = controller_of(self.network), Request(budget, True, 64, 64)
        self.target = controller.start(self.network, self.table, harm, request, torch.randn(8, *SIZE))
        self.data = images()
        self.sampler = EpochSampler(len(self.data), config.seed)
        self.loader = train_loader(self.data, self.sampler, config.batch_size, config.workers or 0, pin=False)
        self.state = start_state(self.network, config, len(self.data) // config.batch_size)
        self.records: list[StepRecord] = []

    def go(
        self, on_step: Callable[[StepRecord], None] | None = None, note: Callable[[str], None] = lambda text: None
    ) -> None:
        log = UnreadableLog("training", len(self.data))
        record = on_step or self.records.append
        tune(self.state, self.model, self.table, self.target, self.loader, self.config, CPU, log, record, note)


def test_everything_moves_from_the_first_step_on() -> None:
    run = Run(SETTINGS.replace(epochs=None, steps=1))
    before = copy.deepcopy(run.network.state_dict())
    run.go()
    changed = {n for n, v in run.network.state_dict().items() if not torch.equal(v, before[n])}
    assert any(n.startswith("controller.gate.") for n in changed) and any("log_weight_steps" in n for n in changed)
    assert any(n.endswith("conv1.weight") for n in changed)


def test_frozen_backbone_does_not_move() -> None:
    run = Run(SETTINGS.replace(freeze_backbone=True))
    before = copy.deepcopy(run.network.state_dict())
    run.go()
    changed = {n for n, v in run.network.state_dict().items() if not torch.equal(v, before[n])}
    assert any("log_input_steps" in n for n in changed)
    assert all(n.startswith("controller.") or "log_" in n or ".bit_" in n for n in changed)


def test_statistics_and_teacher_stay() -> None:
    run = Run()
    teacher = copy.deepcopy(run.model.state_dict())
    statistics = {k: v.clone() for k, v in run.network.state_dict().items() if "running" in k}
    run.go()
    assert all(torch.equal(v, teacher[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(run.network.state_dict()[k], v) for k, v in statistics.items())


@pytest.mark.medium
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_where_it_was_saved(workers: int) -> None:
    def go(interrupt: int | None) -> dict[str, torch.Tensor]:
        seed_everything(7)
        run = Run(SETTINGS.replace(workers=workers))
        seed_everything(7)
        if interrupt is None:
            run.go()
            return run.network.state_dict()
        saved: dict[str, object] = {}

        class StopError(Exception):
            pass

        def stop(record: StepRecord) -> None:
            if record.step == interrupt:
                saved.update(copy.deepcopy(run.state.state_dict()))
                raise StopError

        with pytest.raises(StopError):
            run.go(stop)
        seed_everything(99)
        fresh = Run(SETTINGS.replace(workers=workers))
        fresh.state.load_state_dict(saved)
        fresh.go()
        assert fresh.records[0].step == interrupt + 1 and fresh.records[-1].step == 12
        return fresh.network.state_dict()

    expected = go(None)
    for interrupt in (4, 9):  # at the end of an epoch, and within one
        found = go(interrupt)
        assert all(torch.equal(v, found[k]) for k, v in expected.items()), interrupt


def test_a_saved_run_of_another_length_is_refused() -> None:
    state = Run().state.state_dict()
    with pytest.raises(ConfigError, match="12 steps"):
        Run(SETTINGS.replace(epochs=4)).state.load_state_dict(state)
    with pytest.raises(ConfigError):
        Run(SETTINGS.replace(batch_size=32)).state.load_state_dict(state)


def test_nan_loss_stops_with_step_and_learning_rate() -> None:
    run = Run(SETTINGS.replace(lr=0.5, distillation=0.0))

    def poison(record: StepRecord) -> None:
        if record.step == 4:
            nn.init.constant_(run.network.backbone.get_submodule("fc").bias, float("nan"))  # type: ignore[arg-type]

    with pytest.raises(DivergedError, match=r"nan at step 5, learning rate \d"):
        run.go(poison)


@pytest.mark.parametrize(("name", "value"), [("loss", 1e4), ("gradient's norm", None)])
def test_an_explosion_stops_at_once(name: str, value: float | None) -> None:
    run = Run(SETTINGS.replace(distillation=0.0))
    bias = run.network.backbone.get_parameter("fc.bias")

    def explode(record: StepRecord) -> None:
        if record.step == 2 and value is not None:
            bias.data[0] = value  # of five classes, so nearly all images lose that much
        elif record.step == 2:
            bias.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(DivergedError, match=rf"the {name} is .* at step 3, learning rate \d"):
        run.go(explode)


def test_the_teacher_sees_both_views_of_images_that_enter_a_mirrored_second_pass() -> None:
    torch.manual_seed(0)
    images = torch.randn(10, 3, 4, 4)

    def teacher(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x[:, :, :, 0].flatten(1)  # what is on the left

    seen: list[int] = []
    logits = teacher_logits(teacher, images, 4)  # type: ignore[arg-type]
    left, right = images[:, :, :, 0].flatten(1), images[:, :, :, 3].flatten(1)
    torch.testing.assert_close(logits[:4], (left[:4] + right[:4]) / 2)
    assert torch.equal(logits[4:], left[4:])
    assert torch.equal(teacher_logits(teacher, images, 0), left)  # type: ignore[arg-type]
    assert seen == [14, 10]
    unsure = torch.tensor([7, 1, 4])
    for mirrored, taught in ((0, 10), (3, 7)):
        chosen = taught_images(20, unsure, mirrored, passes=10)
        assert chosen[:3].tolist() == unsure.tolist()
        assert len(chosen) == taught == len(chosen.unique())


def test_every_step_is_recorded() -> None:
    run = Run()
    run.go()
    assert [record.step for record in run.records] == list(range(1, 13)) and run.state.step == 12
    assert {record.target for record in run.records} == {0.2}
    rates = [record.lr for record in run.records]
    # Five times the learning rate for the controller, then a cosine to zero.
    assert rates[0] == pytest.approx(5e-3) and rates == sorted(rates, reverse=True)
    assert run.records[-1].multiplier == run.network.controller.cost_multiplier > 0


@pytest.mark.parametrize("gate", ["probe", "static"])
def test_other_controllers_tune_by_the_same_loop(gate: str) -> None:
    run = Run(SETTINGS.replace(epochs=1), RNN.replace(gate=gate))
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.go()
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    assert any("log_input_steps" in name for name in changed) and any("conv1.weight" in name for name in changed)
    assert any(name.startswith("controller.gate.") for name in changed) == (gate == "probe")
    assert {record.target for record in run.records} == {run.target.cost}


def test_a_batch_in_pieces_has_the_gradients_of_the_whole() -> None:
    found = []
    for pieces in (1, 3):
        # The teacher sees all images, and a static network explores nothing: no random choice is made.
        settings = TuningConfig(steps=3, batch_size=16, label_weight=0.0, grad_accum_steps=pieces)
        run = Run(settings, DynamicConfig(bits=(4,), gate="static"))
        run.go()
        found.append(run)
    whole, parts = found
    for record, expected in zip(parts.records, whole.records, strict=True):
        assert record[4:] == pytest.approx(expected[4:]) and record.loss == pytest.approx(expected.loss, rel=1e-3)
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(parts.network.state_dict()[name], value, rtol=1e-2, atol=1e-4)


def test_a_batch_that_does_not_fit_into_memory_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StepLoss.forward
    seen: list[int] = []
    notes: list[str] = []

    def small(self: StepLoss, images: torch.Tensor, targets: torch.Tensor, target: TuningTarget) -> object:
        seen.append(len(images))
        torch.rand(3)  # what a piece draws before it fails is drawn again
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, targets, target)

    monkeypatch.setattr(StepLoss, "forward", small)
    run = Run(SETTINGS.replace(epochs=None, steps=2))
    run.go(note=notes.append)
    assert seen == [16, 8, *[4] * 4, *[4] * 4] and run.state.pieces == 4 and run.state.step == 2
    assert [note.partition("divided into ")[2][:8] for note in notes] == ["2 pieces", "4 pieces"]
    fresh = Run(SETTINGS.replace(epochs=None, steps=2))
    fresh.state.load_state_dict(run.state.state_dict())
    assert fresh.state.pieces == 4, "a run that goes on knows it"
    monkeypatch.setattr(
        StepLoss, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        Run().go()
