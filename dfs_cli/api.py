"""The library's face: what a program does with networks, from conversion to export."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dfs_cli.artifact.artifact import load_artifact, save_artifact
from dfs_cli.artifact.manifest import Manifest
from dfs_cli.bench.cost_table import measure_costs
from dfs_cli.checkpoint import Checkpoint
from dfs_cli.comparison.config import SweepConfig
from dfs_cli.comparison.sweep import sweep
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, SynthesisConfig, TuningConfig
from dfs_cli.conversion.convert import convert
from dfs_cli.conversion.converted import Converted
from dfs_cli.conversion.defaults import default_data, default_tuning, resolve_device
from dfs_cli.conversion.recalibrate import recalibrate
from dfs_cli.conversion.setup import EVAL_BATCH, eval_batch
from dfs_cli.cost.decisions import Decisions
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import choose_workers, eval_loader
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.data.splits import Splits, open_validation
from dfs_cli.distributed import share
from dfs_cli.errors import ConfigError, DataError, DfsError
from dfs_cli.evaluation.chance import chance_hint
from dfs_cli.evaluation.evaluate import evaluate_network
from dfs_cli.export.runtime import require_onnx
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.models.zoo import load_model, load_outline
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.observer import Observer
from dfs_cli.presets import BatchSize, parse_batch
from dfs_cli.ranges import check_loading
from dfs_cli.records import Evaluation, Source
from dfs_cli.report import cost as report
from dfs_cli.surgery.plan import plan_costs

if TYPE_CHECKING:
    from dfs_cli.export.check import Comparison

_RANDOM_IMAGES = 256

__all__ = [
    "Checkpoint",
    "Converted",
    "CostTable",
    "DataConfig",
    "Decisions",
    "DeviceCosts",
    "DfsError",
    "DynamicConfig",
    "DynamicResNet",
    "Evaluation",
    "Images",
    "Manifest",
    "Observer",
    "Preprocessing",
    "Source",
    "Splits",
    "SweepConfig",
    "SynthesisConfig",
    "TuningConfig",
    "convert",
    "cost_report",
    "default_tuning",
    "evaluate",
    "export_onnx",
    "load",
    "load_model",
    "measure_costs",
    "plan",
    "profile",
    "recalibrate",
    "save",
    "sweep",
]


def plan(
    model: nn.Module | str, dynamic: DynamicConfig | None = None, preprocessing: Preprocessing | None = None
) -> CostTable:
    """The cost of every option of every block, without weights, data or tuning.

    Args:
        model: a timm model, or the name of one.
        dynamic: options and gate; None: the probe gate with 0 to 8 bits.
        preprocessing: whose image size counts; None: the model's own.

    Raises:
        UnsupportedModelError: the model is unknown or cannot be converted.

    Example:
        >>> import dfs_cli
        >>> table = dfs_cli.plan("resnet18")
        >>> len(table.blocks), round(table.dense_macs / 1e9, 2), round(table.dearest, 3)
        (8, 3.0, 0.125)
    """
    module = load_outline(model) if isinstance(model, str) else model
    preprocessing = preprocessing or resolve_preprocessing(module)
    return plan_costs(module, dynamic or DynamicConfig(), preprocessing.input_size)


def load(path: str | os.PathLike[str], device: str = "cpu") -> Converted:
    """A converted network from its file. Nothing in the file is executed.

    Raises:
        ArtifactError: the file is missing, damaged, changed, or not one of dfs.
        ConfigError: the device is not there.

    Example:
        >>> import dfs_cli
        >>> dfs_cli.load("nothing.safetensors")
        Traceback (most recent call last):
        ...
        dfs_cli.errors.ArtifactError: nothing.safetensors does not exist
    """
    return Converted(*load_artifact(Path(path), resolve_device(device)))


def save(converted: Converted, path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a converted network to one safetensors file, atomically, and check that it loads to the same network.

    Raises:
        OutputError: the file exists and ``force`` is not given, or cannot be written.
        ArtifactError: loaded back, the file gives other logits or decisions; nothing is kept then.

    Example:
        >>> import dfs_cli, pathlib, tempfile
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dfs_cli.save(converted, pathlib.Path(folder) / "model.safetensors")
        ...     dfs_cli.load(pathlib.Path(folder) / "model.safetensors").manifest == converted.manifest
        True
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
        batch_size: images per batch; decisions do not depend on it.
        workers: processes that load images; None: two at most, none for the embedded digits.
        amp: compute in bfloat16 where automatic mixed precision does; decisions may differ.
        channels_last: keep images and features with their channels next to each other in memory.
        observer: told about progress.

    Raises:
        ConfigError: the batch size or the number of workers is out of range.
        DataError: images are missing, unreadable, or of other classes.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> evaluation = dfs_cli.evaluate(converted)
        >>> evaluation.images, evaluation.cost == converted.manifest.validation.cost
        (450, True)
    """
    observer = observer or Observer()
    network, manifest = converted
    check_loading(batch_size, workers)
    if not isinstance(data, Images):
        data = open_validation(default_data(manifest.architecture, data), manifest.preprocessing, manifest.classes)
    device = network.device
    workers = choose_workers(workers, data, manifest.preprocessing, batch_size, observer.note)
    own = data.subset(share(len(data)))
    observer.stage("evaluating", len(own))
    loader = eval_loader(own, batch_size, workers, device.type == "cuda")
    log = UnreadableLog("validation", len(data))
    layout = torch.contiguous_format
    if channels_last:
        layout, network = torch.channels_last, copy.deepcopy(network).to(memory_format=torch.channels_last)
    evaluation = evaluate_network(network, manifest.table, loader, device, log, amp, layout, observer.advance)
    hint = chance_hint("the network", evaluation.top1, evaluation.images, manifest.model_args.num_classes)
    for note in filter(None, (data.note, hint)):
        observer.note(note)
    return evaluation


def export_onnx(
    converted: Converted,
    path: str | os.PathLike[str],
    data: DataConfig | Images | None = None,
    *,
    static: bool = False,
    tensorrt: bool = False,
    batch: BatchSize = 1,
    force: bool = False,
    workers: int | None = None,
    observer: Observer | None = None,
) -> Comparison:
    """Write a converted network as an ONNX graph, and compare the two.

    Args:
        data: whose validation split they are compared on. Without a folder or reader the embedded digits, for their model, else
            random images, ``num_samples`` of them (256).
        static: the most common policy on that split, without gate and control flow.
        tensorrt: as ``static``, of what TensorRT's importer takes; slower in ONNX Runtime.
        batch: how many images the graph takes at once: 1, another number, or ``dynamic`` for any. Of several images it runs
            each option on those that have it, and the second pass on the unsure ones alone.
        force: overwrite the file.
        workers: processes that load images; None: two at most, none for the embedded digits.
        observer: told about progress.

    Raises:
        MissingDependencyError: onnx or onnxruntime is not installed.
        ConfigError: the batch is none.
        OutputError: the file exists and ``force`` is not given, or cannot be written.
        ExportError: the graph decides or answers otherwise than the network; nothing is written then.
        DataError: images are missing, too many of them unreadable, or they are of other classes.

    Example:
        >>> import dfs_cli, pathlib, tempfile
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> converted = dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = dfs_cli.export_onnx(converted, pathlib.Path(folder) / "model.onnx")
        >>> comparison.images, comparison.holds
        (450, True)
    """
    require_onnx()
    check_loading(workers=workers)
    batch = parse_batch(batch)
    from dfs_cli.export.network import fixed_decisions
    from dfs_cli.export.write import random_batches, write_onnx

    observer, manifest = observer or Observer(), converted.manifest
    network, size = copy.deepcopy(converted.network).cpu().eval(), manifest.preprocessing.input_size
    is_given = isinstance(data, Images) or (data is not None and data.names_data)
    if not is_given and manifest.architecture != DIGITS_MODEL:
        if (static or tensorrt) and fixed_decisions(network) is None:
            raise DataError("a static graph needs images to find the most common policy on: pass --data DIR")
        wanted = data.num_samples if isinstance(data, DataConfig) else None
        batches: Any = random_batches(size, wanted or _RANDOM_IMAGES)
        labelled, log = False, None
    else:
        if not isinstance(data, Images):
            source = default_data(manifest.architecture, data)
            data = open_validation(source, manifest.preprocessing, manifest.classes)
        labelled, log = True, UnreadableLog("validation", len(data))
        batch_size = eval_batch(manifest.preprocessing)
        workers = choose_workers(workers, data, manifest.preprocessing, batch_size, observer.note)
        batches = eval_loader(data, batch_size, workers)
    observer.stage("comparing", None)  # once with 8-bit features, and once more where they do not do

    def on_batch(batch: Batch) -> None:
        if log is not None:
            log.add(batch.unreadable)
        observer.advance(len(batch.targets) + len(batch.unreadable))

    comparison = write_onnx(Path(path), network, size, batches, labelled, static, tensorrt, batch, force, on_batch)
    if isinstance(data, Images) and data.note:
        observer.note(data.note)
    return comparison


def profile(converted: Converted, evaluation: Evaluation | None = None) -> list[report.LayerRow]:
    """Per-layer bitwidth histograms: of ``evaluation``, or those that the conversion measured.

    Raises:
        ConfigError: neither exists.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> rows = dfs_cli.profile(dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning))
        >>> rows[0]["name"], rows[0]["histogram"]
        ('conv1', {8: 1.0})
    """
    evaluation = evaluation or converted.manifest.validation
    if evaluation is None:
        raise ConfigError("the network was never evaluated: pass an evaluation")
    return report.layer_rows(converted.manifest.table, evaluation)


def cost_report(converted: Converted) -> dict[str, Any]:
    """The cost report, ready for JSON; see :func:`dfs_cli.report.cost.cost_report`.

    Raises:
        ConfigError: the network was never evaluated.

    Example:
        >>> import dfs_cli
        >>> tuning = dfs_cli.TuningConfig(steps=1, batch_size=64, hflip=0.0)
        >>> report = dfs_cli.cost_report(dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning))
        >>> report["cost_all_8_bit"], report["keeps_budget"]
        (0.0625, True)
    """
    return report.cost_report(converted.manifest)
