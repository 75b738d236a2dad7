"""The first stage of a conversion: the network that is to be tuned, and what it is tuned for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import affordable_images, controller_of
from dfs_cli.control.division import regret
from dfs_cli.conversion.agreement import ensure_agreement
from dfs_cli.conversion.setup import Setup, eval_batch, hard_crops
from dfs_cli.conversion.stages import Planned, unreadable_log
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import UnreadableLog
from dfs_cli.data.loading import load_all
from dfs_cli.distributed import of_first, size
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import MEASURING, Observer
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.equalise import equalise
from dfs_cli.surgery.initialise import fit_float_statistics, fit_steps
from dfs_cli.surgery.swap import make_dynamic, verify_conversion
from dfs_cli.tuning.sensitivity import divergence, measure
from dfs_cli.tuning.step import teacher_logits

Start = Callable[[DynamicConfig, CostTable], Planned]
"""Makes a network, and plans what it is tuned for."""

# Networks are compared on so many held-out images at most, which run through each of them and, twice, through the original.
_COMPARED, _RUNS = 2048, 6
# Two passes must gain something, or are not worth deciding about. Smaller images fit only after tuning: on held-out images a
# ResNet-56's first view of 0.625 lost 1.2 times as much as one pass did before it, and was 0.8 points ahead after it.
_DECIDING, _SMALLER = 1 / 0.9, 0.7


def make_network(setup: Setup, observer: Observer) -> Planned:
    """Surgery, step sizes, agreement with the original, sensitivities, and the controller's start."""
    teacher = copy.deepcopy(setup.model).to(setup.device).eval()
    splits = setup.splits
    unreadable = unreadable_log(setup)
    network = make_dynamic(teacher, setup.dynamic, setup.table, setup.plan).network
    some = splits.calibration.spread(eval_batch(setup.preprocessing))
    observer.stage("loading held-out images", len(some))
    (sample, *_), _ = load_all(some, len(some), setup.workers, setup.device, unreadable, observer.advance)
    observer.stage(MEASURING, None)
    fit_steps(network, sample)
    verify_conversion(teacher, network, sample[:8])
    network, agreement, gains = ensure_agreement(network, setup, teacher, sample, observer)
    sensitivity = measure(controller_of(network).needs, network, setup.plan, setup.table, sample)

    several = len(setup.alternatives)
    compared = sample if several == 1 else _compared(setup, unreadable, observer)
    shown = compared[: len(compared) // several]  # each network runs them many times

    def make(dynamic: DynamicConfig, table: CostTable) -> DynamicResNet:
        made = make_dynamic(teacher, dynamic, table, setup.plan).network
        equalise(made, gains)
        fit_steps(made, sample)
        return made

    def start(dynamic: DynamicConfig, table: CostTable) -> Planned:
        """The best candidate, started."""
        first = network if table is setup.table else make(dynamic, table)
        candidates = [
            (first if its_table is table else make(dynamic, its_table), its_table)
            for its_table in controller_of(first).candidates(table, sensitivity, setup.request)
        ]
        harms = (
            [divergence(candidate, teacher, sample) for candidate, _ in candidates] if len(candidates) > 1 else [0.0]
        )
        chosen, table = candidates[of_first(harms.index(min(harms)))]
        target = of_first(controller_of(chosen).start(chosen, table, sensitivity, setup.request, shown))
        policy = controller_of(chosen).first_policy()
        if policy is not None and FULL_BITS in table.options and not all(table.options[i] for i in policy.tolist()):
            fit_float_statistics(chosen, sample, policy)
        return Planned(chosen, dynamic, table, target, teacher, unreadable, agreement)

    planned = _most_promising(setup, start, compared, observer)
    network = planned.network
    if size() > 1:  # all begin with the same numbers, to the last bit
        point = of_first(network.controller.operating_point)
        network.load_state_dict(of_first({name: tensor.cpu() for name, tensor in network.state_dict().items()}))
        network.controller.operating_point = point
    return planned._replace(table=controller_of(network).settle(planned.table))


def _most_promising(setup: Setup, start: Start, images: Tensor, observer: Observer) -> Planned:
    """Of the networks that can be made, the one whose answers to ``images`` (N, C, H, W) are the best before tuning."""
    *dynamic, static = setup.alternatives
    if not dynamic:
        return start(*static)
    started = [start(*pair) for pair in dynamic if pair[1].cheapest <= setup.request.budget]
    started = [planned for planned in started if planned.target.share]
    if not (started and setup.request.is_bound):
        with suppress(ConfigError) if started else nullcontext():  # of what cannot be had in one pass
            started.insert(0, start(*static))  # of equally good ones it is the simplest
    regrets = of_first(_regrets(started, images, setup.dynamic.mirror))
    expected = [lost * _after_tuning(planned.table) for planned, lost in zip(started, regrets, strict=True)]
    best = started[expected.index(min(expected))]
    if len(started) > 1:
        found = zip(started, regrets, strict=True)
        losses = ", ".join(f"{_describe(planned.table)} {100 * lost:.2f}" for planned, lost in found)
        observer.note(f"points lost before tuning, on {len(images)} held-out images: {losses}")
    if best.table.passes == 1:
        observer.note("one pass for all images is better than two for this budget: the network is a static one")
    elif best.table.first_view != 1:
        observer.note(f"the first pass sees images of {best.table.first_view:g} of their height and width")
    return best


def _after_tuning(table: CostTable) -> float:
    """Beside one pass for all images, how much of the loss before tuning is to be expected."""
    if table.passes == 1:
        return 1.0
    return _DECIDING if table.first_view == 1 else _SMALLER


def _describe(table: CostTable) -> str:
    if table.passes == 1:
        return "one pass"
    return "two passes" + ("" if table.first_view == 1 else f" with a first view of {table.first_view:g}")


def _compared(setup: Setup, unreadable: UnreadableLog, observer: Observer) -> Tensor:
    """Held-out images (N, C, H, W) on which networks are compared, as hard as new ones."""
    images = setup.splits.calibration
    images = images.spread(affordable_images(setup.table, _RUNS, min(len(images), _COMPARED)))
    if setup.synthesis is None:
        images = hard_crops(images, setup.preprocessing, setup.tuning)
    observer.stage("loading held-out images", len(images))
    batches, _ = load_all(
        images, eval_batch(setup.preprocessing), setup.workers, setup.device, unreadable, observer.advance
    )
    return torch.cat(batches)


@torch.inference_mode()
def _regrets(started: Sequence[Planned], images: Tensor, is_mirrored: bool) -> list[float]:
    """Of each network's answers over the original's, the mean of both views where there are two; see
    :func:`dfs_cli.control.division.regret`."""
    wanted = teacher_logits(started[0].teacher, images, len(images) if is_mirrored else 0).softmax(dim=1)
    return [regret(p.network.eval().run(images, target=p.target).logits, wanted) for p in started]
