"""The plan of the surgery: the blocks of a model and the roles of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from dfs_cli.config import DynamicConfig
from dfs_cli.control.factory import compulsory_passes, controller_macs
from dfs_cli.cost.count import MacCount, count_macs
from dfs_cli.cost.layer import LayerCost
from dfs_cli.cost.table import CostTable
from dfs_cli.errors import UnsupportedModelError, first_line
from dfs_cli.nn.layers import CONVOLUTIONS
from dfs_cli.nn.normalisation import FRACTIONAL_NORMS
from dfs_cli.nn.passes import View
from dfs_cli.presets import FULL_BITS
from dfs_cli.surgery.dataflow import Dataflow, dataflow_of
from dfs_cli.surgery.families import FAMILIES, LAYOUTS, family_names


@dataclass(frozen=True)
class SurgeryPlan:
    """The parts of a model that the surgery works on, by their paths.

    Args:
        blocks: the residual blocks, in order.
        channels: number of channels that enter each block.
        features: number of features that enter the classifier.
        branch: the layers that follow a block's option, with the block's index.
        fixed: the layers that always run.
        flows: by block, how features flow through it.
        stem: how they flow before the first block.
        norms: the batch-norms whose input depends on a bitwidth, with the layer of the branch whose bitwidth they follow: the
            one that their family names, or the one before them or, for lack of one, the one after.
    """

    blocks: tuple[str, ...]
    channels: tuple[int, ...]
    features: int
    branch: dict[str, int]
    fixed: tuple[str, ...]
    flows: tuple[Dataflow, ...]
    stem: Dataflow
    norms: dict[str, str]


def plan_surgery(model: nn.Module) -> SurgeryPlan:
    """Find the blocks and the roles of the layers of ``model``.

    Raises:
        UnsupportedModelError: the model's class or its blocks are of no known family.
    """
    blocks = find_blocks(model)
    branch: dict[str, int] = {}
    fixed: dict[str, None] = {}
    norms: dict[str, str] = {}
    inside: set[str] = set()
    for i, (path, block) in enumerate(blocks.items()):
        family = FAMILIES[type(block)]
        layer: str | None = None
        waiting: list[str] = []
        for name, module in block.named_modules(prefix=path):
            inside.add(name)
            if type(module) in FRACTIONAL_NORMS and not _is_within(name, path, (family.shortcut, *family.apart)):
                if family.norms is not None and _is_within(name, path, family.norms[:1]):
                    norms[name] = name.replace(f"{path}.{family.norms[0]}.", f"{path}.{family.norms[1]}.", 1)
                elif layer is None:
                    waiting.append(name)
                else:
                    norms[name] = layer
            if type(module) not in CONVOLUTIONS:
                continue
            if _is_within(name, path, family.branch):
                branch[name] = i
                layer = name
                norms.update(dict.fromkeys(waiting, name))
                waiting.clear()
            elif _is_within(name, path, (family.shortcut,)):
                fixed[name] = None
    for name, module in model.named_modules():
        if name not in inside and type(module) in (*CONVOLUTIONS, nn.Linear):
            fixed[name] = None
    flows = []
    for i, (path, block) in enumerate(blocks.items()):
        last = [name for name, index in branch.items() if index == i][-1:]
        shortcut = [name for name in fixed if name.startswith(f"{path}.")][-1:]
        flows.append(dataflow_of(block, [name.removeprefix(f"{path}.") for name in last + shortcut]).within(path))
    channels = (cast(nn.Conv2d, block.get_submodule("conv1")).in_channels for block in blocks.values())
    features = int(model.num_features)  # type: ignore[arg-type]
    stem = dataflow_of(_Stem(model))
    return SurgeryPlan(tuple(blocks), tuple(channels), features, branch, tuple(fixed), tuple(flows), stem, norms)


class _Stem(nn.Module):
    """The stem of a model alone, whose layers keep their paths."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules.update(model.named_children())
        self.layout = LAYOUTS[type(model)]

    def forward(self, images: Tensor) -> Tensor:
        return self.layout.stem(self, images)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks of ``model`` by path, in order.

    Raises:
        UnsupportedModelError: the model's class or its blocks are of no known family.
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if type(model) not in LAYOUTS:
        raise UnsupportedModelError(
            f"a {kind} cannot be converted: supported are {', '.join(c.__name__ for c in LAYOUTS)} "
            f"models of timm with {family_names()} blocks"
        )
    blocks = {name: module for name, module in model.named_modules() if type(module) in FAMILIES}
    if not blocks:
        # Blocks are the children of the stages.
        classes = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "downsample")})
        raise UnsupportedModelError(
            f"a {kind} with {', '.join(classes) or 'no residual'} blocks cannot be converted: "
            f"supported are {family_names()} blocks"
        )
    return blocks


def _is_within(name: str, path: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{path}.{part}.") for part in parts)


def plan_costs(
    model: nn.Module, config: DynamicConfig, input_size: tuple[int, int, int], plan: SurgeryPlan | None = None
) -> CostTable:
    """The cost of every option of every block of ``model`` at ``input_size`` (C, H, W); the model is not changed.

    Args:
        plan: of ``model``; None: it is computed.

    Raises:
        UnsupportedModelError: as :func:`plan_surgery`; or the model cannot run at that size.
    """
    plan = plan or plan_surgery(model)
    count = _count(model, input_size)
    first: dict[str, int] = {}
    if config.first_scale != 1:
        height, width = View(scale=config.first_scale).size_of(*input_size[1:])
        first = _count(model, (input_size[0], height, width)).layers
    layers = tuple(
        LayerCost(name, macs, block=plan.branch[name], first_macs=first.get(name))
        if name in plan.branch
        else LayerCost(name, macs, None, config.fixed_bits if name in plan.fixed else FULL_BITS, first.get(name))
        for name, macs in count.layers.items()
    )
    macs = controller_macs(config, plan.channels, plan.features)
    return CostTable(
        config.bits,
        plan.blocks,
        layers,
        macs,
        count.not_counted,
        first_view=config.first_scale,
        compulsory_passes=compulsory_passes(config),
    )


def _count(model: nn.Module, input_size: tuple[int, int, int]) -> MacCount:
    try:
        return count_macs(model, input_size)
    except RuntimeError as error:
        what = f"the model cannot run on images of size {input_size}"
        raise UnsupportedModelError(f"{what}: {first_line(error)}") from None
