"""What is measured: a network, its images, and decisions that are real or forced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from dfs_cli.artifact.file import load_artifact
from dfs_cli.config import LARGE_BATCH, DataConfig, DynamicConfig, parse_mix
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, UnreadableLog
from dfs_cli.data.loading import default_workers, load_all
from dfs_cli.data.splits import open_validation
from dfs_cli.errors import ConfigError
from dfs_cli.nn.gate import FeedForwardGate
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.probe import EVERYBODY_IS_SURE, ProbedResNet
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.surgery.biases import round_biases
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic
from dfs_cli.surgery.settling import settle

_SCALE_IMAGES = 4


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        dense: the network before its conversion.
        network: the dynamic one, on the CPU, in evaluation mode.
        table: its costs.
        images: (N, C, H, W); runs go through them in turn.
        decisions: where decisions come from, for people.
        file_size: bytes of the dynamic network's file; None: as it would be written.
        known: images and their classes, on which its graph is compared with the network; None: its decisions are forced.
        policies: (N, L), forced option indices for the images of a batch where they differ; ``network`` itself decides for the
            first row.
    """

    dense: nn.Module
    network: DynamicResNet
    table: CostTable
    images: Tensor
    decisions: str
    file_size: int | None = None
    known: Batch | None = None
    policies: Tensor | None = None


def default_mix(options: Sequence[int]) -> str:
    """Half of the blocks at the fewest bits, half at the most that integer kernels take."""
    low = min(options)
    high = max((b for b in options if low < b <= BYTE_BITS), default=max(options))
    return f"{low}:0.5,{high}:0.5"


def draw_policies(mix: dict[int, float], options: Sequence[int], blocks: int, seed: int, images: int = 1) -> Tensor:
    """Option indices (``images``, ``blocks``): for each image as many blocks for each bitwidth as its share says; which ones
    is drawn by ``seed``.

    Raises:
        ConfigError: a bitwidth is none of the options.
    """
    if strangers := sorted(set(mix) - set(options)):
        raise ConfigError(f"--mix: {strangers[0]} bits is none of the options {','.join(map(str, options))}")
    # Rounded so that the counts add up: what is left goes to those that lost most.
    counts = {bits: int(share * blocks + 1e-9) for bits, share in mix.items()}
    for bits in sorted(mix, key=lambda b: counts[b] - mix[b] * blocks)[: blocks - sum(counts.values())]:
        counts[bits] += 1
    policy = torch.tensor([options.index(bits) for bits in sorted(counts) for _ in range(counts[bits])])
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([policy[torch.randperm(blocks, generator=generator)] for _ in range(images)])


@torch.no_grad()
def force(network: DynamicResNet, policy: Tensor) -> DynamicResNet:
    """A copy of ``network`` that decides for ``policy`` (L,) whatever it sees, with all the work of deciding.

    A probe network stops after its first pass.
    """
    network = copy.deepcopy(network)
    if isinstance(network, ProbedResNet):
        network.policy.copy_(policy)
        network.operating_point = EVERYBODY_IS_SURE
        return network
    gate = network.gate
    heads = gate.heads if isinstance(gate, FeedForwardGate) else [gate.get_submodule("head")]
    for head in heads:
        nn.init.zeros_(head.get_parameter("weight"))
    gate.preference.copy_(nn.functional.one_hot(policy, gate.options))
    network.operating_point = 0.0
    return network


def subject_of_model(
    model: nn.Module, dynamic: DynamicConfig, input_size: tuple[int, int, int], mix: str, seed: int
) -> Subject:
    """``model`` made dynamic, not tuned, on random images, with the decisions of ``mix``.

    Raises:
        ConfigError: the mix is no mix, or of other bitwidths than the options.
        UnsupportedModelError: the model cannot be converted.
    """
    table = plan_costs(model, dynamic, input_size)
    policies = draw_policies(parse_mix(mix), table.options, len(table.blocks), seed, LARGE_BATCH)
    images = _random_images(input_size, seed)
    network = to_dynamic(model, dynamic, table)
    fit_scales(network, images[:_SCALE_IMAGES])
    settle(network)
    round_biases(network, input_size)
    return _forced(Subject(model, network, table, images, ""), mix, policies, seed)


def _forced(subject: Subject, mix: str, policies: Tensor, seed: int) -> Subject:
    """``subject`` with the decisions ``policies`` (N, L), those of the first image where there is one for all."""
    is_probed = isinstance(subject.network, ProbedResNet)
    how = f"{mix} of the blocks, drawn by seed {seed}"
    how += ", the first pass alone" if is_probed else ", in batches anew for each image"
    network = force(subject.network, policies[0])
    return replace(subject, network=network, decisions=how, policies=None if is_probed else policies)


def subject_of_file(path: Path, mix: str | None, data: DataConfig | None, seed: int) -> Subject:
    """A converted network on real images, with its own decisions; without ``data`` on random ones, with those of ``mix``.

    Raises:
        ArtifactError: the file is missing, damaged, or not one of dfs.
        ConfigError: both are given, or the mix is no mix, or of other bitwidths than the options.
        DataError: images are missing or unreadable, or of other classes.
    """
    network, manifest = load_artifact(path)
    # Weights make no difference to the time.
    dense = timm.create_model(manifest.architecture, pretrained=False, **manifest.model_args).eval()
    size, table, file_size = manifest.preprocessing.input_size, manifest.table, path.stat().st_size
    if data is None:
        mix = mix or default_mix(table.options)
        policies = draw_policies(parse_mix(mix), table.options, len(table.blocks), seed, LARGE_BATCH)
        subject = Subject(dense, network, table, _random_images(size, seed), "", file_size)
        return _forced(subject, mix, policies, seed)
    if mix is not None:
        raise ConfigError("--mix forces decisions, --data measures real ones: pass one of them")
    found = open_validation(data, manifest.preprocessing, manifest.class_names)
    log = UnreadableLog("validation", len(found))
    batches, targets = load_all(found, LARGE_BATCH, default_workers(found), torch.device("cpu"), log)
    known = Batch(torch.cat(batches), targets, ())
    return Subject(dense, network, table, known.images[:LARGE_BATCH], "real, on validation images", file_size, known)


def _random_images(input_size: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(LARGE_BATCH, *input_size, generator=torch.Generator().manual_seed(seed))
