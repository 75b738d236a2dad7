"""What a file says is compared with the network that it names, before that network is allocated."""

from __future__ import annotations

import math
from itertools import pairwise

import timm
import torch
from torch import nn

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.control.base import controller_of
from dfs_cli.cost.table import CostTable
from dfs_cli.models.zoo import is_candidate
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.records import Evaluation
from dfs_cli.surgery.equalise import reserve_gains
from dfs_cli.surgery.plan import plan_costs
from dfs_cli.surgery.swap import make_dynamic

_TOLERANCE = 1e-6
_LARGEST_LOGARITHM = 80.0
"""Of step sizes: the exponential of more is no number in single precision."""


def create_model(manifest: Manifest, device: str) -> nn.Module:
    """The original architecture on ``device``, with meaningless weights.

    Raises:
        ValueError: it is none that ``dfs list`` lists.
    """
    if not is_candidate(manifest.architecture):
        raise ValueError(f"the architecture {manifest.architecture[:80]!r} is none of those that dfs list lists")
    with torch.random.fork_rng(devices=[]), torch.device(device):  # the caller's random state stays as it was
        return timm.create_model(manifest.architecture, pretrained=False, **manifest.model_args.to_dict()).eval()


def convert_model(model: nn.Module, manifest: Manifest) -> DynamicResNet:
    """The network that ``manifest`` describes, made of the original architecture.

    Raises:
        UnsupportedModelError, ValueError: the architecture cannot be converted, or its blocks or refitted layers are others.
    """
    network = make_dynamic(model, manifest.dynamic, manifest.table).network
    if manifest.agreement:
        reserve_gains(network, manifest.agreement.refitted)
    network.controller.operating_point = manifest.operating_point
    network.controller.limit = math.inf if manifest.limit is None else manifest.limit
    return network


def check_figures(manifest: Manifest, model: nn.Module) -> None:
    """Count the MACs again and compare all costs with them.

    Args:
        model: the original architecture, which may be on the meta device.

    Raises:
        UnsupportedModelError, ValueError: a figure of the manifest is not that of its network.
    """
    table, size = manifest.table, manifest.preprocessing.input_size
    expected = plan_costs(model, manifest.dynamic, size)
    if table.layer_bits:
        if len(table.layer_bits) != sum(layer.block is not None for layer in table.layers):
            raise ValueError("the cost table has individual bitwidths for some layers only")
        if table.layer_bits.keys() != {layer.name for layer in expected.layers if layer.block is not None}:
            raise ValueError("the cost table has other layers than the network")
        expected = expected.with_layer_bits(table.layer_bits)
    for name in ("blocks", "layers", "controller_macs", "first_view", "compulsory_passes"):
        if getattr(table, name) != getattr(expected, name):
            raise ValueError(
                f"the {name.replace('_', ' ')} of the cost table are not those of the network at this size"
            )
    if manifest.held_out and not _is_ascending((table.cheapest, manifest.held_out.cost, table.dearest)):
        raise ValueError("held_out.cost is not between the cheapest and the dearest")
    if manifest.movable and not _is_ascending((table.cheapest, *manifest.movable, table.dearest)):
        raise ValueError("movable: not two costs between the cheapest and the dearest, in order")
    made_with = manifest.configuration
    if made_with and (
        made_with.model, made_with.budget, made_with.limit, made_with.dynamic, made_with.preprocessing
    ) != (
        manifest.architecture, manifest.budget, manifest.limit, manifest.dynamic, manifest.preprocessing,
    ):  # fmt: skip
        raise ValueError("configuration: not that of this network")
    if manifest.keeps_limit is False:
        raise ValueError("validation.cost_max is above the limit")
    if manifest.validation:
        _check_evaluation(table, manifest.validation)


def _check_evaluation(table: CostTable, evaluation: Evaluation) -> None:
    """Raises ValueError unless counts add up to the images, and costs are those of the counts."""
    blocks, options, choices = len(table.blocks), len(table.options), evaluation.choices
    is_complete = len(choices) == table.passes and all(len(rows) == blocks for rows in choices)
    if not is_complete or any(len(row) != options for rows in choices for row in rows):
        raise ValueError("validation.choices: expected a count for each pass, block and option")
    runs = [sum(rows[0]) for rows in choices]
    if any(sum(row) != count for rows, count in zip(choices, runs, strict=True) for row in rows):
        raise ValueError("validation.choices: blocks of a pass ran for different numbers of images")
    if set(runs[: table.compulsory_passes]) != {evaluation.images} or max(runs) > evaluation.images:
        raise ValueError("validation.choices: the counts do not add up to the number of images")
    counts = torch.tensor(choices, dtype=torch.float64)
    total = float((counts * table.option_costs).sum()) + sum(n * table.fixed_cost(i) for i, n in enumerate(runs))
    if not _is_close(evaluation.cost, total / evaluation.images):
        raise ValueError(f"validation.cost {evaluation.cost:g} is not that of its choices")
    ordered = (table.cheapest, evaluation.cost_p50, evaluation.cost_p95, evaluation.cost_max, table.dearest)
    common = (table.cheapest, evaluation.dynamics.common_cost, evaluation.cost_max)
    if not (_is_ascending(ordered) and _is_ascending(common) and evaluation.cost <= ordered[3] * (1 + _TOLERANCE)):
        raise ValueError("validation: costs are not between the cheapest and the dearest")
    if not 1 <= evaluation.dynamics.policies <= evaluation.images:
        raise ValueError("validation.dynamics.policies: not between one and the number of images")
    if evaluation.top5 < evaluation.top1 - _TOLERANCE:
        raise ValueError("validation.top5 is below top1")


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


def _is_ascending(values: tuple[float, ...]) -> bool:
    return all(a <= b * (1 + _TOLERANCE) for a, b in pairwise(values))


def check_values(network: DynamicResNet, manifest: Manifest) -> None:
    """Check numbers that were loaded into ``network``.

    Raises:
        ValueError: a tensor holds infinite or undefined numbers, negative variances, step sizes or gains that are none, or the
            controller cannot decide by its state; the message names the tensor. Or it can be moved to other costs.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds infinite or undefined numbers")
        if name.endswith(("running_var", "bit_var")) and bool((tensor < 0).any()):
            raise ValueError(f"{name} holds negative variances")
        if name.endswith("input_gain") and bool((tensor <= 0).any()):
            raise ValueError(f"{name} holds gains that are not positive")
        if name.endswith("_steps") and bool((tensor.abs() > _LARGEST_LOGARITHM).any()):
            raise ValueError(f"{name} holds logarithms of step sizes beyond {_LARGEST_LOGARITHM:g}")
    controller = controller_of(network)
    controller.check(manifest.table)
    if controller.limit < controller.movable(manifest.table)[0]:
        raise ValueError("limit: below the cost of the cheapest decision")
    if manifest.movable and not all(map(_is_close, manifest.movable, controller.movable(manifest.table))):
        raise ValueError("movable: not the costs that the network can be moved to")
    if manifest.bound is not None and not _is_close(manifest.bound, controller.largest_cost(manifest.table)):
        raise ValueError("bound: not the largest cost of an image")
