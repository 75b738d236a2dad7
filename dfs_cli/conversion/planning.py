"""The first stage of a conversion: the network that is to be tuned, and what it is tuned for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from dfs_cli.config import DynamicConfig
from dfs_cli.control.base import affordable_images, controller_of
from dfs_cli.conversion.agreement import ensure_agreement
from dfs_cli.conversion.setup import Setup, eval_batch, hard_crops
from dfs_cli.conversion.stages import Planned, tune_network, unreadable_log
from dfs_cli.cost.table import CostTable
from dfs_cli.data.loading import load_all
from dfs_cli.distributed import of_all, of_first, share, size
from dfs_cli.errors import ConfigError
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import MEASURING, Observer
from dfs_cli.surgery.equalise import equalise
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.swap import make_dynamic, verify_conversion
from dfs_cli.tuning.losses import distillation_loss
from dfs_cli.tuning.sensitivity import divergence, measure
from dfs_cli.tuning.state import start_state
from dfs_cli.tuning.step import teacher_logits

Start = Callable[[DynamicConfig, CostTable], Planned]
"""Makes a network, and plans what it is tuned for."""

# Each network is tuned for this share of the steps before they are compared, on so many held-out images at most, which run
# through each network and, twice, through the original.
_TRIAL, _COMPARED, _RUNS = 0.1, 2048, 6


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
        target = of_first(controller_of(chosen).start(chosen, table, sensitivity, setup.request, sample))
        return Planned(chosen, dynamic, table, target, teacher, unreadable, agreement)

    planned = _most_promising(setup, start, observer)
    network = planned.network
    if size() > 1:  # all begin with the same numbers, to the last bit
        point = of_first(network.controller.operating_point)
        network.load_state_dict(of_first({name: tensor.cpu() for name, tensor in network.state_dict().items()}))
        network.controller.operating_point = point
    return planned._replace(table=controller_of(network).settle(planned.table))


def _most_promising(setup: Setup, start: Start, observer: Observer) -> Planned:
    """Of the networks that can be made, the one to tune."""
    if len(setup.alternatives) == 1:
        return start(*setup.alternatives[0])
    *dynamic, static = setup.alternatives
    started = [start(*pair) for pair in dynamic if pair[1].cheapest <= setup.request.budget]
    started = [planned for planned in started if planned.target.share]
    if not (started and setup.request.is_bound):
        with suppress(ConfigError) if started else nullcontext():  # of what cannot be had in one pass
            started.append(start(*static))
    best = started[0] if len(started) == 1 else started[_try(setup, started, observer)]
    if best.dynamic.gate == "static":
        observer.note("one pass for all images is better than two for this budget: the network is a static one")
    elif best.dynamic.first_scale != 1:
        observer.note(f"the first pass sees images of {best.dynamic.first_scale:g} of their height and width")
    return best


def _try(setup: Setup, started: Sequence[Planned], observer: Observer) -> int:
    """Tune each of the networks for a little while, on a copy: smaller images, above all, need that before they can be judged.

    Returns:
        The index of the one whose predictions for held-out images are then closest to the original's.
    """
    steps = max(2, round(_TRIAL * setup.steps))
    tuning = setup.tuning.replace(steps=steps, epochs=None)
    batches = _held_out(setup, started[0], observer)
    observer.stage(f"tuning each of {len(started)} networks for {steps} steps", len(started))
    harms = []
    for planned in started:
        tried = planned._replace(network=copy.deepcopy(planned.network))
        state = start_state(tried.network, tuning, setup.steps_per_epoch)
        tune_network(setup, tried, state, Observer(), lambda: None)
        harms.append(_harm(tried, setup.dynamic.mirror, batches))
        observer.advance(1)
    found = ", ".join(f"{_describe(p.dynamic)} {harm:.4f}" for p, harm in zip(started, harms, strict=True))
    observer.note(f"divergence from the original after {steps} steps, in nats: {found}")
    return of_first(harms.index(min(harms)))


def _describe(dynamic: DynamicConfig) -> str:
    return (
        "one pass" if dynamic.gate == "static" else f"two passes, the first one at {dynamic.first_scale:g} of the size"
    )


def _held_out(setup: Setup, planned: Planned, observer: Observer) -> list[Tensor]:
    """Held-out images on which networks are compared, (N, C, H, W) each; of several processes each has a share."""
    images = setup.splits.calibration
    images = images.spread(affordable_images(setup.table, _RUNS, min(len(images), _COMPARED)))
    if setup.synthesis is None:
        images = hard_crops(images, setup.preprocessing, setup.tuning)
    images = images.subset(share(len(images)))
    observer.stage("loading held-out images", len(images))
    batch = eval_batch(setup.preprocessing)
    batches, _ = load_all(images, batch, setup.workers, setup.device, planned.unreadable, observer.advance)
    return list(batches)


@torch.inference_mode()
def _harm(planned: Planned, is_mirrored: bool, batches: Sequence[Tensor]) -> float:
    """Divergence, in nats, of a network's predictions from the original's, the mean of both views where there are two."""
    total = images = 0.0
    for batch in batches:
        wanted = teacher_logits(planned.teacher, batch, len(batch) if is_mirrored else 0)
        logits = planned.network.eval().run(batch, target=planned.target).logits
        total += float(distillation_loss(logits, wanted, temperature=1.0)) * len(batch)
        images += len(batch)
    totals = of_all((total, images))
    return sum(t for t, _ in totals) / sum(n for _, n in totals)
