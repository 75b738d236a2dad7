"""The workload of a benchmark: a network, its images, and decisions that are real or forced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from dfs_cli.artifact.artifact import load_artifact
from dfs_cli.artifact.manifest import Manifest
from dfs_cli.config import DataConfig, DynamicConfig
from dfs_cli.control.base import controller_of
from dfs_cli.conversion.original import load_original
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.table import CostTable
from dfs_cli.data.classes import check_class_count
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import choose_workers, load_all
from dfs_cli.data.splits import open_splits
from dfs_cli.errors import ConfigError
from dfs_cli.freeze.weights import freeze_weights
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.passes import uncertainty
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.ranges import LARGE_BATCH
from dfs_cli.surgery.initialise import fit_steps
from dfs_cli.surgery.plan import SurgeryPlan, plan_costs, plan_surgery
from dfs_cli.surgery.swap import make_dynamic

_STEP_IMAGES = 4  # number of images from which step sizes are set
_CALIBRATION_IMAGES = 256  # training images from which static int8 gets its scales
_SCALE_IMAGES = 8  # random ones: their scales mean nothing

Mix = Mapping[int, float]
"""Shares of the blocks by bitwidth."""


@dataclass(frozen=True)
class Workload:
    """The workload of a benchmark.

    Args:
        dense: the network before its conversion.
        network: the dynamic one, on the CPU, in evaluation mode.
        table: its costs.
        gate: name of the controller, for people.
        images: (N, C, H, W); runs take them in turn.
        decisions: where decisions come from, for people.
        cost, batch_cost: mean cost of an image, alone and in a batch; they differ where the decisions in a batch are forced.
        calibration: (N, C, H, W), images that set the scales of static int8: training images where there are real ones.
        file_size: bytes of the dynamic network's file; None: there is no file.
        targets: (N,), the classes of real images; None: the images are random.
        is_original: whether ``dense`` has the original's weights.
    """

    dense: nn.Module
    network: DynamicResNet
    table: CostTable
    gate: str
    images: Tensor
    decisions: str
    cost: float
    batch_cost: float
    calibration: Tensor
    file_size: int | None = None
    targets: Tensor | None = None
    is_original: bool = False

    def batches(self) -> list[Batch]:
        """The real images in batches, with their classes."""
        assert self.targets is not None, "asked for where there are real images"
        parts = zip(self.images.split(LARGE_BATCH), self.targets.split(LARGE_BATCH), strict=True)
        return [Batch(images, targets, ()) for images, targets in parts]


def default_mix(options: Sequence[int]) -> dict[int, float]:
    """Half of the blocks at the fewest bits, half at the most that integer kernels take."""
    low = min(options)
    high = max((b for b in options if low < b <= BYTE_BITS), default=max(options))
    return {low: 0.5, high: 0.5} if low != high else {low: 1.0}


def draw_policies(mix: Mix, options: Sequence[int], blocks: int, seed: int, images: int = 1) -> Tensor:
    """Option indices (N, L): for each image, blocks at each bitwidth in the shares of ``mix``, drawn with ``seed``.

    Args:
        blocks: L.
        images: N.

    Raises:
        ConfigError: a bitwidth is none of the options.
    """
    if unknown := sorted(set(mix) - set(options)):
        raise ConfigError(f"--mix: {unknown[0]} bits is none of the options {','.join(map(str, options))}")
    # Rounded so that the counts add up: the rest goes to those that rounding reduced most.
    counts = {bits: int(share * blocks + 1e-9) for bits, share in mix.items()}
    for bits in sorted(mix, key=lambda b: counts[b] - mix[b] * blocks)[: blocks - sum(counts.values())]:
        counts[bits] += 1
    policy = torch.tensor([options.index(bits) for bits in sorted(counts) for _ in range(counts[bits])])
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([policy[torch.randperm(blocks, generator=generator)] for _ in range(images)])


def workload_of_model(
    model: nn.Module,
    dynamic: DynamicConfig,
    input_size: tuple[int, int, int],
    mix: Mix | None = None,
    seed: int = 0,
    refined: float = 0.0,
) -> Workload:
    """The workload of ``model`` made dynamic without tuning: random images, forced decisions.

    Args:
        input_size: (C, H, W) of the images.
        mix: None: :func:`default_mix`.
        seed: of the images, and of which blocks get which bitwidth.
        refined: of the images, how many take the second pass of a probe controller.

    Raises:
        ConfigError: ``refined`` is no share, or there is no second pass; or the mix has a bitwidth that is none of the options.
        UnsupportedModelError: the model cannot be converted.
    """
    plan = plan_surgery(model)
    table = plan_costs(model, dynamic, input_size, plan)
    mix = mix or default_mix(table.options)
    policies = draw_policies(mix, table.options, len(table.blocks), seed, LARGE_BATCH)
    images = _random_images(input_size, seed)
    network = untuned_network(model, dynamic, table, plan, images[:_STEP_IMAGES], policies)
    if refined:
        _refine(network, images, refined)
    return _forced(model, network, table, dynamic.gate, images, mix, seed)


@torch.inference_mode()
def _refine(network: DynamicResNet, images: Tensor, share: float) -> None:
    """Set the operating point so that a share of ``images`` (N, C, H, W) takes the second pass.

    Raises:
        ConfigError: it is no share, or there is no second pass.
    """
    passes = len(controller_of(network).views)
    if not 0 <= share <= 1 or passes == 1:
        raise ConfigError(
            f"--refined {share:g}: expected a share from 0 to 1, and a network of two passes, as --gate probe"
        )
    logits = torch.cat([network.run(part).logits for part in images.split(LARGE_BATCH)])
    ordered = uncertainty(logits).sort(descending=True).values
    last = round(share * len(images))
    # Between two images.
    ends = torch.cat([ordered[:1] + 1, ordered, ordered[-1:] - 1])
    network.controller.operating_point = float((ends[last] + ends[last + 1]) / 2)


def untuned_network(
    model: nn.Module,
    dynamic: DynamicConfig,
    table: CostTable,
    plan: SurgeryPlan,
    images: Tensor,
    policies: Tensor | None = None,
) -> DynamicResNet:
    """``model`` made dynamic, without tuning, as it would be exported.

    Args:
        images: (N, C, H, W), from which step sizes are set.
        policies: (M, L), to which decisions are forced; None: they are the controller's.
    """
    network = make_dynamic(model, dynamic, table, plan).network
    if policies is not None:
        controller_of(network).force(policies)
    fit_steps(network, images)
    freeze_weights(network)
    return network


def workload_of_file(
    path: Path,
    mix: Mix | None = None,
    data: DataConfig | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Workload:
    """The workload of a converted network: real images and real decisions; without ``data``, random images and forced ones.

    Decisions that are the same for every image are real on random images, too.

    Args:
        mix: None: :func:`default_mix`.
        checkpoint: the original's weights; None: those that the file names. Where they are not at hand, the dense network is
            timed and has no answers.
        seed: of random images, and of which blocks get which bitwidth.
        say: told which images were opened.

    Raises:
        ArtifactError: the file is missing, damaged, or not written by dfs.
        ConfigError: a mix is given where decisions are real, or has a bitwidth that is none of the options.
        DataError: images are missing or unreadable, or have other classes.
        WeightsError: ``checkpoint`` cannot be read or does not fit.
    """
    network, manifest = load_artifact(path)
    table, gate, file_size = manifest.table, manifest.dynamic.gate, path.stat().st_size
    least, most = controller_of(network).movable(table)
    if mix is not None and data is not None:
        raise ConfigError("--mix forces decisions, --data measures real ones: pass one of them")
    if mix is not None and least == most:
        raise ConfigError(f"--mix forces decisions: those of {path} are the same for every image, leave it out")
    if data is not None:
        dense = load_original(manifest, checkpoint, say)
        images, targets, calibration = _real_images(manifest, data, say)
        cost = _mean_cost(network, table, images)
        return Workload(
            dense=_architecture(manifest) if dense is None else dense,
            network=network,
            table=table,
            gate=gate,
            images=images,
            decisions="real, on validation images",
            cost=cost,
            batch_cost=cost,
            calibration=calibration,
            file_size=file_size,
            targets=targets,
            is_original=dense is not None,
        )
    dense, images = _architecture(manifest), _random_images(manifest.preprocessing.input_size, seed)
    if least == most:
        how = "the network's own, the same for every image"
        return Workload(dense, network, table, gate, images, how, least, least, images[:_SCALE_IMAGES], file_size)
    mix = mix or default_mix(table.options)
    controller_of(network).force(draw_policies(mix, table.options, len(table.blocks), seed, LARGE_BATCH))
    return _forced(dense, network, table, gate, images, mix, seed, file_size)


def _architecture(manifest: Manifest) -> nn.Module:
    """The dense network, with weights that mean nothing."""
    return timm.create_model(manifest.architecture, pretrained=False, **manifest.model_args.to_dict()).eval()


def _real_images(manifest: Manifest, data: DataConfig, say: Callable[[str], None]) -> tuple[Tensor, Tensor, Tensor]:
    """Validation images (N, C, H, W), their classes (N,), and training images (M, C, H, W), as the network sees them."""
    preprocessing = manifest.preprocessing
    splits = open_splits(data, preprocessing, class_names=manifest.class_names or None)
    check_class_count(splits.class_names, manifest.model_args.num_classes)
    workers = choose_workers(None, splits.validation, preprocessing, LARGE_BATCH, say)

    def load(name: str, images: Images) -> tuple[Tensor, Tensor]:
        log = UnreadableLog(name, len(images))
        batches, targets = load_all(images, LARGE_BATCH, workers, torch.device("cpu"), log)
        return torch.cat(batches), targets

    images, targets = load("validation", splits.validation)
    calibration, _ = load("training", splits.train.spread(_CALIBRATION_IMAGES))
    for note in (splits.train.note, splits.validation.note):
        if note:
            say(note)
    return images, targets, calibration


@torch.inference_mode()
def _forced(
    dense: nn.Module,
    network: DynamicResNet,
    table: CostTable,
    gate: str,
    images: Tensor,
    mix: Mix,
    seed: int,
    file_size: int | None = None,
) -> Workload:
    """The workload of a network whose decisions are forced to those of ``mix``."""
    decisions = network.run(images).decisions
    how = f"{','.join(f'{bits}:{share:g}' for bits, share in sorted(mix.items()))} of the blocks, drawn by seed {seed}"
    how += ", in batches anew for each image" if Decisions.of_pass(decisions.in_pass(0)).distinct() > 1 else ""
    refined = float(decisions.ran[:, -1].double().mean()) if decisions.passes > 1 else 0.0
    how += f", {refined:.0%} of the images in both passes" if decisions.passes > 1 else ""
    # Decisions that differ are those of batches, but for who takes a second pass.
    cost, batch_cost = (_mean_cost(network, table, batch) for batch in (images if refined else images[:1], images))
    return Workload(dense, network, table, gate, images, how, cost, batch_cost, images[:_SCALE_IMAGES], file_size)


@torch.inference_mode()
def _mean_cost(network: DynamicResNet, table: CostTable, images: Tensor) -> float:
    """Mean cost of ``images`` (N, C, H, W) with the network's decisions."""
    return float(torch.cat([table.cost(network.run(part).decisions) for part in images.split(LARGE_BATCH)]).mean())


def _random_images(input_size: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(LARGE_BATCH, *input_size, generator=torch.Generator().manual_seed(seed))


def size_of_images(images: Tensor) -> tuple[int, int, int]:
    """(C, H, W)."""
    _, channels, height, width = images.shape
    return channels, height, width
