"""The library: convert, plan, load, save, evaluate, recalibrate, profile, cost_report."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dfs_cli.artifact.file import load_artifact, save_artifact
from dfs_cli.artifact.manifest import Evaluation
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig, check_budget
from dfs_cli.cost.operating_point import LOWEST_SHARE
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import default_workers, eval_loader, load_all
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.data.splits import open_splits, open_validation
from dfs_cli.errors import ConfigError, DataError
from dfs_cli.evaluation.evaluate import evaluate_network
from dfs_cli.export.runtime import require_onnx
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.models.zoo import load_outline
from dfs_cli.nn.probe import ProbedResNet
from dfs_cli.pipeline import EVAL_BATCH, Converted, Observer, convert
from dfs_cli.report import cost as report
from dfs_cli.resolve import default_data, default_tuning, describe_source, resolve_device, unfamiliar
from dfs_cli.surgery.convert import plan_costs
from dfs_cli.tuning.calibration import calibrate

if TYPE_CHECKING:
    from dfs_cli.export.check import Comparison

_RANDOM_IMAGES = 256

__all__ = [
    "Converted",
    "Observer",
    "convert",
    "cost_report",
    "default_data",
    "default_tuning",
    "describe_source",
    "evaluate",
    "export_onnx",
    "load",
    "plan",
    "profile",
    "recalibrate",
    "resolve_device",
    "save",
]


def plan(
    model: nn.Module | str, dynamic: DynamicConfig | None = None, preprocessing: Preprocessing | None = None
) -> CostTable:
    """The cost of every option of every block, without weights, data or tuning.

    Raises:
        UnsupportedModelError: the model is unknown or cannot be converted.
    """
    module = load_outline(model) if isinstance(model, str) else model
    preprocessing = preprocessing or resolve_preprocessing(module)
    return plan_costs(module, dynamic or DynamicConfig(), preprocessing.input_size)


def load(path: str | os.PathLike[str], device: str = "cpu") -> Converted:
    """A converted network from its file.

    Raises:
        ArtifactError: the file is missing, damaged, changed, or not one of dfs.
    """
    return Converted(*load_artifact(Path(path), resolve_device(device)))


def save(converted: Converted, path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a converted network to one safetensors file, atomically, and check that it loads to the same network.

    Raises:
        OutputError: the file exists and ``force`` is not given, or cannot be written.
    """
    save_artifact(Path(path), converted.network, converted.manifest, force)


def evaluate(
    converted: Converted,
    data: DataConfig | Images | None = None,
    *,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    amp: bool = False,
    channels_last: bool = False,
    observer: Observer | None = None,
) -> Evaluation:
    """Accuracy, cost and decisions of a converted network on a validation split.

    Args:
        data: None: the embedded digits, for their model.
        amp: compute in bfloat16 where automatic mixed precision does; decisions may differ.
        channels_last: keep images and features with their channels next to each other in memory.

    Raises:
        DataError: images are missing, unreadable, or of other classes.
    """
    observer = observer or Observer()
    network, manifest = converted
    if batch_size < 1:
        raise ConfigError(f"batch-size {batch_size} is below 1")
    if not isinstance(data, Images):
        data = open_validation(default_data(manifest.architecture, data), manifest.preprocessing, manifest.class_names)
    device = network.prices.device
    workers = default_workers(data) if workers is None else workers
    observer.stage("evaluating", len(data))
    loader = eval_loader(data, batch_size, workers, device.type == "cuda")
    log = UnreadableLog("validation", len(data))
    layout = torch.contiguous_format
    if channels_last:
        layout, network = torch.channels_last, copy.deepcopy(network).to(memory_format=torch.channels_last)
    return evaluate_network(network, manifest.table, loader, device, log, amp, layout, observer.advance)


def export_onnx(
    converted: Converted,
    path: str | os.PathLike[str],
    data: DataConfig | Images | None = None,
    *,
    static: bool = False,
    tensorrt: bool = False,
    force: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Comparison:
    """Write a converted network as an ONNX graph for one image, and compare the two.

    Args:
        data: whose validation split they are compared on. Without a folder or reader the embedded digits, for their model, else
            random images, ``num_samples`` of them (256).
        static: the most common policy on that split, without gate and control flow.
        tensorrt: as ``static``, of what TensorRT's importer takes; slower in ONNX Runtime.

    Raises:
        MissingDependencyError: onnx or onnxruntime is not installed.
        OutputError: the file exists and ``force`` is not given, or cannot be written.
        ExportError: the graph decides or answers otherwise than the network; nothing is written then.
        DataError: images are missing, too many of them unreadable, or they are of other classes.
    """
    require_onnx()
    from dfs_cli.export.write import random_batches, write_onnx

    observer, manifest = observer or Observer(), converted.manifest
    size = manifest.preprocessing.input_size
    is_given = data is not None and (isinstance(data, Images) or data.data_dir is not None or data.dataset)
    if not is_given and manifest.architecture != DIGITS_MODEL:
        if static or tensorrt:
            raise DataError("a static graph needs images to find the most common policy on: pass --data DIR")
        wanted = data.num_samples if isinstance(data, DataConfig) else None
        batches: Any = random_batches(size, wanted or _RANDOM_IMAGES)
        labelled, log = False, None
    else:
        if not isinstance(data, Images):
            data = open_validation(
                default_data(manifest.architecture, data), manifest.preprocessing, manifest.class_names
            )
        labelled, log = True, UnreadableLog("validation", len(data))
        batches = eval_loader(data, EVAL_BATCH, default_workers(data) if workers is None else workers)
    network = copy.deepcopy(converted.network).cpu().eval()
    observer.stage("comparing", None)  # once with bytes, and once more where they do not do

    def note(batch: Batch) -> None:
        if log is not None:
            log.add(batch.unreadable)
        observer.advance(len(batch.targets) + len(batch.unreadable))

    return write_onnx(Path(path), network, size, batches, labelled, static, tensorrt, force, note)


def recalibrate(
    converted: Converted,
    budget: float,
    data: DataConfig | Images | None = None,
    *,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Converted:
    """Move a tuned network to another budget, without tuning, by its operating point.

    Args:
        converted: left unchanged.
        budget: within the network's range: with the probe gate from the first pass alone to a second one in full for all.
        data: where the training images are: the operating point is set on those that the conversion held out of them.
            Or held-out images themselves. None: the embedded digits, for their model.
        workers: processes that load images; None: two at most, none for the embedded digits.
        observer: told about progress.

    Returns:
        A network at the new budget, not evaluated yet.

    Raises:
        ConfigError: the budget cannot be reached; the message names the range.
        DataError: images are missing, unreadable, or of other classes.
    """
    check_budget(budget)
    manifest, network = converted.manifest, copy.deepcopy(converted.network)
    low, high = manifest.table.cheapest, manifest.table.dearest
    if isinstance(network, ProbedResNet):
        first = network.policy[None].cpu()
        low = float(manifest.table.cost(first))
        high = low + float(manifest.table.pass_cost(torch.full_like(first, len(manifest.table.options) - 1)))
    if not low <= budget or not LOWEST_SHARE * budget <= high:
        raise ConfigError(f"budget {budget:g} is outside what this network can be moved to: {low:.4f} to {high:.4f}")
    made_with = manifest.configuration
    if not isinstance(data, Images):
        data = default_data(manifest.architecture, data)
        if stored := made_with.get("data"):
            data = replace(
                data, train_split=data.train_split or stored["train_split"], num_samples=stored["num_samples"]
            )
        splits = open_splits(data, manifest.preprocessing, made_with["tuning"]["seed"])
        if manifest.class_names and splits.class_names != manifest.class_names:
            raise DataError("the data has other classes than the network was converted with")
        data = splits.calibration
    if isinstance(network, ProbedResNet):
        data = unfamiliar(data, manifest.preprocessing, TuningConfig.from_dict(made_with["tuning"]))
    images = len(data)
    log = UnreadableLog("held-out", images)
    observer, workers = observer or Observer(), default_workers(data) if workers is None else workers
    observer.stage("loading held-out images", images)
    batches, _ = load_all(data, EVAL_BATCH, workers, network.prices.device, log, observer.advance)
    observer.stage("calibrating", None)
    validation_images = made_with.get("images", {}).get("validation", images)
    point = calibrate(network, manifest.table, batches, budget, validation_images, observer.calibrated)
    if point.cost < LOWEST_SHARE * budget:
        raise ConfigError(f"budget {budget:g} cannot be spent: with these options the network costs {point.cost:.4f}")
    return Converted(network, replace(manifest, budget=budget, operating_point=point.value, validation=None))


def profile(converted: Converted, evaluation: Evaluation | None = None) -> list[report.LayerRow]:
    """Per-layer bitwidth histograms: of ``evaluation``, or those that the conversion measured.

    Raises:
        ConfigError: neither exists.
    """
    evaluation = evaluation or converted.manifest.validation
    if evaluation is None:
        raise ConfigError("the network was never evaluated: pass an evaluation")
    return report.layer_rows(converted.manifest.table, evaluation)


def cost_report(converted: Converted) -> dict[str, Any]:
    """The cost report, ready for JSON; see :func:`dfs_cli.report.cost.cost_report`."""
    return report.cost_report(converted.manifest)
