import copy
import math
import random

import pytest
import torch
from common import make_dynamic, tiny_resnet
from dfs_cli.surgery.convert import plan_costs
from dfs_cli.tuning.calibration import calibrate
from timm.models.resnet import BasicBlock
from torch import nn
from torch.utils.data import TensorDataset

from dfs_cli.config import DynamicConfig, TuningConfig
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, train_loader
from dfs_cli.errors import ConfigError, DivergedError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.tuning.loop import (
    Goal,
    StepRecord,
    _taught_images,
    _teacher_logits,
    resolve_epochs,
    seed_everything,
    target_at,
    tune,
)
from dfs_cli.tuning.losses import cost_excess, distillation_loss
from dfs_cli.tuning.sensitivity import measure_damage, prefer_harmless_options
from dfs_cli.tuning.state import TuningState, start_state

CPU = torch.device("cpu")


def shift(image: torch.Tensor) -> torch.Tensor:
    """An augmentation that draws from both generators that timm's use."""
    return image.roll((random.randrange(4), int(torch.randint(4, ()))), (1, 2))


def images(count: int = 64) -> Images:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 5)
    return Images(data, shift)


class Run:
    """A short run on a tiny network."""

    def __init__(self, config: TuningConfig, budget: float = 0.2, epochs: int = 3) -> None:
        self.config, self.budget = config, budget
        self.model = tiny_resnet(BasicBlock)
        self.table: CostTable = plan_costs(self.model, DynamicConfig(gate="rnn"), (3, 32, 32))
        self.network: DynamicResNet = make_dynamic(self.model)
        self.data = images()
        self.sampler = EpochSampler(len(self.data), config.seed)
        self.loader = train_loader(self.data, self.sampler, config.batch_size, config.workers or 0, pin=False)
        self.state: TuningState = start_state(self.network, config, len(self.data) // config.batch_size, epochs)
        self.records: list[StepRecord] = []

    def go(self, on_step: object = None) -> None:
        log = UnreadableLog("training", len(self.data))
        record = on_step or self.records.append
        tune(self.state, self.model, self.table, Goal(self.budget), self.loader, self.config, CPU, log, record)  # type: ignore[arg-type]


def test_cost_excess_by_hand() -> None:
    cost, expected = torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.4], requires_grad=True)
    excess = cost_excess(cost, expected, 0.1)
    assert excess.item() == pytest.approx(math.log(4))
    excess.backward()
    # d log(c) = dc / 0.4, and the mean halves it.
    assert expected.grad is not None and expected.grad.tolist() == pytest.approx([1.25, 1.25])


def test_nothing_rewards_spending() -> None:
    expected = torch.tensor([0.2], requires_grad=True)
    excess = cost_excess(torch.tensor([0.2]), expected, 0.4)
    excess.backward()
    assert excess.item() == 0 and expected.grad is not None and expected.grad.item() == 0


def test_cost_excess_does_not_depend_on_the_batch_size() -> None:
    cost = torch.tensor([0.3, 0.5])
    assert torch.equal(cost_excess(cost, cost, 0.1), cost_excess(cost.repeat(8), cost.repeat(8), 0.1))


def test_distillation_loss_is_zero_for_the_teacher_and_agrees_with_its_definition() -> None:
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    assert distillation_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum() / 4
    assert distillation_loss(logits, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_target_falls_geometrically_and_stays() -> None:
    values = [target_at(step, 100, 0.5, 1.0, 0.01) for step in (0, 25, 50, 99)]
    assert values == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_epochs_give_enough_steps() -> None:
    assert resolve_epochs(TuningConfig(), 100) == 4
    assert resolve_epochs(TuningConfig(), 5000) == 1
    assert resolve_epochs(TuningConfig(epochs=3), 5000) == 3


def test_warm_up_moves_the_gate_only_then_everything_moves() -> None:
    run = Run(TuningConfig(batch_size=16, warmup=0.5))
    before = copy.deepcopy(run.network.state_dict())
    changed_in: dict[str, set[str]] = {"gate": set(), "all": set()}

    def watch(record: StepRecord) -> None:
        for name, value in run.network.state_dict().items():
            if not torch.equal(value, before[name]):
                changed_in[record.phase].add(name)
                before[name] = value.clone()

    run.go(watch)
    assert changed_in["gate"] and all(name.startswith("gate.") for name in changed_in["gate"])
    assert any("log_weight_steps" in n for n in changed_in["all"])
    assert any(n.endswith("conv1.weight") for n in changed_in["all"])


def test_frozen_backbone_does_not_move() -> None:
    run = Run(TuningConfig(batch_size=16, freeze_backbone=True))
    before = copy.deepcopy(run.network.state_dict())
    run.go()
    changed = {n for n, v in run.network.state_dict().items() if not torch.equal(v, before[n])}
    assert any("log_input_steps" in n for n in changed)
    assert all(n.startswith("gate.") or "log_" in n or ".bit_" in n for n in changed)


def test_statistics_and_teacher_stay() -> None:
    run = Run(TuningConfig(batch_size=16))
    teacher = copy.deepcopy(run.model.state_dict())
    statistics = {k: v.clone() for k, v in run.network.state_dict().items() if "running" in k}
    run.go()
    assert all(torch.equal(v, teacher[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(run.network.state_dict()[k], v) for k, v in statistics.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_was_saved(workers: int) -> None:
    def go(interrupt: int | None) -> dict[str, torch.Tensor]:
        seed_everything(7)
        run = Run(TuningConfig(batch_size=16, workers=workers))
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
        fresh = Run(TuningConfig(batch_size=16, workers=workers))
        fresh.state.load_state_dict(saved)
        fresh.go()
        assert fresh.records[0].step == interrupt + 1 and fresh.records[-1].step == 12
        return fresh.network.state_dict()

    expected = go(None)
    for interrupt in (3, 4, 9):
        found = go(interrupt)
        assert all(torch.equal(v, found[k]) for k, v in expected.items()), interrupt


def test_a_saved_run_of_another_length_is_refused() -> None:
    state = Run(TuningConfig(batch_size=16)).state.state_dict()
    with pytest.raises(ConfigError, match="12 steps"):
        Run(TuningConfig(batch_size=16), epochs=4).state.load_state_dict(state)
    with pytest.raises(ConfigError):
        Run(TuningConfig(batch_size=32)).state.load_state_dict(state)


def test_an_interrupted_warm_up_freezes_nothing() -> None:
    run = Run(TuningConfig(batch_size=16, warmup=1.0))

    def stop(_: StepRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.go(stop)
    assert all(p.requires_grad for p in run.network.parameters())


def test_damage_by_hand_and_its_preference() -> None:
    run = Run(TuningConfig(batch_size=16))
    x = torch.randn(16, 3, 32, 32)
    damage = measure_damage(run.network, run.table, x)
    decisions = torch.full((16, 5), 4)
    with torch.no_grad():
        expected = run.network.run(x, decisions).logits.log_softmax(1)
        decisions[:, 2] = 1
        found = run.network.run(x, decisions).logits.log_softmax(1)
    by_hand = (expected.exp() * (expected - found)).sum(1).mean()
    assert damage[2, 1].item() == pytest.approx(by_hand.item(), rel=1e-3)
    assert (damage[:, 4] == 0).all() and (damage[:, 0] > damage[:, 2]).all()
    before = run.network.gate.preference.clone()
    prefer_harmless_options(run.network, damage)
    shift = run.network.gate.preference - before
    assert int(shift[:, 0].argmax()) == int(damage[:, 0].argmin())
    assert (shift[:, 4] == 0).all()


def test_nan_loss_stops_with_step_and_learning_rate() -> None:
    run = Run(TuningConfig(batch_size=16, lr=0.5, distillation=0.0))

    def poison(record: StepRecord) -> None:
        if record.step == 4:
            nn.init.constant_(run.network.backbone.get_submodule("fc").bias, float("nan"))  # type: ignore[arg-type]

    with pytest.raises(DivergedError, match=r"nan at step 5, learning rate \d"):
        run.go(poison)


@pytest.mark.parametrize("gate", ["rnn", "ff"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_calibration_meets_the_budget(gate: str, share: float) -> None:
    model = tiny_resnet(BasicBlock)
    config = DynamicConfig(gate=gate)  # type: ignore[arg-type]
    table = plan_costs(model, config, (3, 32, 32))
    budget = table.cheapest + share * (table.dearest - table.cheapest)
    network = make_dynamic(model, config)
    held_out, others = torch.randn(2, 600, 3, 32, 32, generator=torch.Generator().manual_seed(1)).unbind()
    point = calibrate(network, table, held_out.split(200), budget, validation_images=600)
    assert network.operating_point == point.value
    assert 0.92 * budget <= point.cost <= budget
    with torch.no_grad():
        cost = table.cost(network.run(others).decisions).mean().item()
    assert 0.9 * budget <= cost <= 1.01 * budget


def test_the_teacher_sees_both_views_of_images_that_enter_a_mirrored_second_pass() -> None:
    torch.manual_seed(0)
    images = torch.randn(10, 3, 4, 4)

    def teacher(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x[:, :, :, 0].flatten(1)  # what is on the left

    seen: list[int] = []
    logits = _teacher_logits(teacher, images, 4)  # type: ignore[arg-type]
    left, right = images[:, :, :, 0].flatten(1), images[:, :, :, 3].flatten(1)
    torch.testing.assert_close(logits[:4], (left[:4] + right[:4]) / 2)
    assert torch.equal(logits[4:], left[4:])
    assert torch.equal(_teacher_logits(teacher, images, 0), left)  # type: ignore[arg-type]
    assert seen == [14, 10]
    unsure = torch.tensor([7, 1, 4])
    for mirrored, taught in ((0, 10), (3, 7)):
        chosen = _taught_images(20, unsure, mirrored)
        assert chosen[:3].tolist() == unsure.tolist()
        assert len(chosen) == taught == len(chosen.unique())
