"""A tuned network at another budget or under another limit, without tuning."""

from __future__ import annotations

import copy
import math

from dfs_cli.config import DataConfig, TuningConfig
from dfs_cli.control.base import Request, controller_of
from dfs_cli.conversion import stages
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.defaults import default_data
from dfs_cli.conversion.setup import eval_batch
from dfs_cli.cost.operating_point import LOWEST_SHARE
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.loading import choose_workers
from dfs_cli.data.splits import open_splits
from dfs_cli.errors import ConfigError
from dfs_cli.observer import Observer
from dfs_cli.ranges import check_budget, check_limit, check_loading
from dfs_cli.records import Tuned


def recalibrate(
    converted: Converted,
    budget: float | None = None,
    data: DataConfig | Images | None = None,
    *,
    limit: float | None = None,
    spend: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Converted:
    """Move a tuned network to another budget, without tuning, by its operating point, or put it under a limit.

    Args:
        converted: left unchanged.
        budget: within the network's range: with the probe gate from the first pass alone to a second one in full for all. None:
            the operating point stays.
        data: where the training images are: the operating point is set on those that the conversion held out of them.
            Or held-out images themselves. None: the embedded digits, for their model.
        limit: what no image may cost more than; None: the limit that the network has, if any.
        spend: reach for the budget itself, even where less does as well on the held-out images.
        workers: processes that load images; None: two at most, none for the embedded digits.
        observer: told about progress.

    Returns:
        A network at the new budget and under the new limit, not evaluated yet.

    Raises:
        ConfigError: the budget cannot be reached, or the limit cannot be kept; the message names the range.
        DataError: images are missing, unreadable, or of other classes.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> moved = dfs_cli.recalibrate(converted, 0.05)
        >>> moved.manifest.budget, moved.manifest.held_out.cost <= 0.05, moved.keeps_budget is None
        (0.05, True, True)
        >>> dfs_cli.evaluate(dfs_cli.recalibrate(converted, limit=0.03)).cost_max <= 0.03
        True
    """
    check_loading(workers=workers)
    converted = _limited(converted, limit)
    if budget is None:
        return converted
    check_budget(budget)
    observer = observer or Observer()
    manifest, network = converted.manifest, converted.network
    low, high = controller_of(network).movable(manifest.table)
    if not low <= budget or (spend and not LOWEST_SHARE * budget <= high):
        least = math.ceil(low * 1e4) / 1e4  # rounded to nearest, it might not be reachable
        raise ConfigError(f"budget {budget:g} is outside what this network can be moved to: {least:.4f} to {high:.4f}")
    made_with = manifest.configuration
    tuning = made_with.tuning if made_with else TuningConfig()
    note = ""
    if not isinstance(data, Images):
        data = default_data(manifest.architecture, data)
        if made_with and (stored := made_with.data):
            data = data.replace(train_split=data.train_split or stored.train_split, num_samples=stored.num_samples)
        splits = open_splits(data, manifest.preprocessing, tuning.seed, manifest.class_names or None)
        data, note = splits.calibration, splits.train.note
    held_out = stages.held_out_images(
        data,
        controller_of(network).uses_hard_crops(spend),
        manifest.preprocessing,
        tuning,
        choose_workers(workers, data, manifest.preprocessing, eval_batch(manifest.preprocessing), observer.note),
        network.device,
        UnreadableLog("held-out", len(data)),
        observer,
    )
    if note:
        observer.note(note)
    validation_images = made_with.images.get("validation", len(data)) if made_with else len(data)
    request = Request(budget, spend, len(data), validation_images, limit=controller_of(network).limit)
    point = stages.set_operating_point(network, manifest.table, held_out, request, observer)
    if spend and point.cost < LOWEST_SHARE * budget:
        raise ConfigError(f"budget {budget:g} cannot be spent: with these options the network costs {point.cost:.4f}")
    moved = manifest.replace(
        budget=budget,
        operating_point=point.value,
        configuration=made_with and made_with.replace(budget=budget, spend=spend),
        held_out=Tuned(point.cost, point.top1),
        bound=None,
        validation=None,
    )
    return Converted(network, moved)


def _limited(converted: Converted, limit: float | None) -> Converted:
    """A copy of a network under ``limit``, at its operating point; None: under the limit that it has."""
    check_limit(limit)
    manifest, network = converted.manifest, copy.deepcopy(converted.network)
    if limit is None:
        return Converted(network, manifest)
    controller, table = controller_of(network), manifest.table
    low, _ = controller.movable(table)
    if limit < low:
        raise ConfigError(
            f"limit {limit:g} is below the cheapest that this network can decide for an image, {low:.4f}: "
            f"pass --limit {math.ceil(low * 1e4) / 1e4:.4f} or more, or convert to a smaller budget"
        )
    controller.limit = limit
    limited = manifest.replace(
        limit=limit,
        configuration=manifest.configuration and manifest.configuration.replace(limit=limit),
        held_out=None,
        movable=controller.movable(table),
        bound=manifest.bound and controller.largest_cost(table),
        validation=None,
    )
    return Converted(network, limited)
