"""The library: convert, load, save, evaluate, profile, cost_report."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from dfs_cli.artifact.file import load_artifact, save_artifact
from dfs_cli.artifact.manifest import Evaluation, Manifest
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig, check_budget
from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, default_workers, eval_loader, train_loader
from dfs_cli.data.preprocessing import resolve_preprocessing, train_transform
from dfs_cli.data.splits import DIGITS, Splits, check_class_count, open_splits, open_validation
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.evaluation.evaluate import evaluate_accuracy, evaluate_network
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.models.zoo import load_model
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.report import cost as report
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic, verify_conversion
from dfs_cli.tuning.calibration import calibrate
from dfs_cli.tuning.loop import StepRecord, resolve_epochs, seed_everything, tune
from dfs_cli.tuning.state import start_state

_EVAL_BATCH = 256


class Observer:
    """Told what a conversion or an evaluation does; override what you want to show."""

    def configured(self, configuration: dict[str, Any], table: CostTable) -> None:
        """Everything is resolved; nothing has run yet."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage of ``total`` units begins (None: not known)."""

    def advance(self, units: int) -> None:
        """Units of the stage are done."""

    def step(self, record: StepRecord) -> None:
        """A tuning step is done."""

    def calibrated(self, price: float, cost: float) -> None:
        """A price of cost was tried on the held-out images."""


class Converted(NamedTuple):
    """A dynamic network and all that is known about it."""

    network: DynamicResNet
    manifest: Manifest

    @property
    def keeps_budget(self) -> bool:
        """Whether the cost on the validation split lies between 0.9 and 1.01 of the budget."""
        budget, validation = self.manifest.budget, self.manifest.validation
        if budget is None or validation is None:
            return False
        return LOWEST_SHARE * budget <= validation.cost <= HIGHEST_SHARE * budget


def default_data(architecture: str, data: DataConfig | None = None) -> DataConfig:
    """``data``, or the embedded digits for the model that was trained on them.

    Raises:
        DataError: neither is there; the message says what to pass.
    """
    if data is not None and (data.data_dir is not None or data.dataset):
        return data
    if architecture == DIGITS_MODEL:
        return dataclasses.replace(data or DataConfig(), dataset=DIGITS)
    raise DataError(
        f"{architecture} needs images: pass --data DIR (class folders in train/ and val/) or --dataset, as torch/cifar10"
    )


def default_tuning(data: DataConfig | Splits | None = None) -> TuningConfig:
    """The settings a conversion uses where none are given: small batches and no flips for the digits."""
    if isinstance(data, DataConfig) and data.dataset == DIGITS:
        return TuningConfig(batch_size=64, hflip=0.0)
    return TuningConfig()


def resolve_device(kind: str) -> torch.device:
    """Raises ConfigError where CUDA is asked for and not available."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: CUDA is not available here; pass --device cpu or auto")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def plan(
    model: nn.Module | str, dynamic: DynamicConfig | None = None, preprocessing: Preprocessing | None = None
) -> CostTable:
    """The cost of every option of every block, without data and without tuning.

    Raises:
        UnsupportedModelError, WeightsError: see :func:`dfs_cli.models.zoo.load_model`.
    """
    module = load_model(model) if isinstance(model, str) else model
    preprocessing = preprocessing or resolve_preprocessing(module)
    return plan_costs(module, dynamic or DynamicConfig(), preprocessing.input_size)


def convert(
    model: nn.Module | str,
    budget: float,
    data: DataConfig | Splits | None = None,
    *,
    dynamic: DynamicConfig | None = None,
    tuning: TuningConfig | None = None,
    preprocessing: Preprocessing | None = None,
    source: dict[str, Any] | None = None,
    observer: Observer | None = None,
) -> Converted:
    """Make a timm ResNet input-adaptive, tune it towards ``budget`` and evaluate it.

    Args:
        model: a timm model, which is left unchanged, or the name of one, loaded with its pretrained weights.
        budget: mean over images of bit-weighted MACs of the whole network, gate included, as a fraction of the dense
            32-bit network's.
        data: where the images are, or splits opened by the caller; None: the embedded digits, for their model.
        dynamic: options and gate.
        tuning: see :class:`TuningConfig`; None: :func:`default_tuning`.
        preprocessing: None: the model's own.
        source: what to record about the original weights; None: from the model's timm configuration.
        observer: told about progress.

    Returns:
        The network in evaluation mode, at its calibrated operating point. ``keeps_budget`` tells whether the validation
        split's cost is within the promised interval.

    Raises:
        ConfigError: a setting is out of range, or the budget cannot be reached.
        UnsupportedModelError: the model cannot be converted.
        DataError: images are missing, unreadable, or of other classes.
        DivergedError: tuning failed.
    """
    observer = observer or Observer()
    dynamic = dynamic or DynamicConfig()
    check_budget(budget)
    module = load_model(model) if isinstance(model, str) else model
    architecture, model_args = _describe(module)
    if not isinstance(data, Splits):
        data = default_data(architecture, data)
    tuning = tuning or default_tuning(data)
    device = resolve_device(tuning.device)
    preprocessing = preprocessing or resolve_preprocessing(module)
    table = plan_costs(module, dynamic, preprocessing.input_size)
    table.check_budget(budget)
    splits = data if isinstance(data, Splits) else open_splits(data, preprocessing, tuning.seed)
    check_class_count(splits.class_names, model_args["num_classes"])

    train = splits.train
    if train.transform is not None:
        train = train.with_transform(train_transform(preprocessing, tuning.hflip, tuning.min_crop))
    batch_size = min(tuning.batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    workers = default_workers(train) if tuning.workers is None else tuning.workers
    epochs = resolve_epochs(tuning, steps_per_epoch)
    tuning = dataclasses.replace(tuning, epochs=epochs, batch_size=batch_size, workers=workers)
    configuration = {
        "model": architecture,
        "budget": budget,
        "dynamic": dynamic.to_dict(),
        "tuning": tuning.to_dict(),
        "data": data.to_dict() if isinstance(data, DataConfig) else None,
        "preprocessing": preprocessing.to_dict(),
        "device": str(device),
        "steps": epochs * steps_per_epoch,
        "images": {k: len(getattr(splits, k)) for k in ("train", "calibration", "validation")},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "threads": torch.get_num_threads(),
    }
    observer.configured(configuration, table)

    seed_everything(tuning.seed)
    teacher = copy.deepcopy(module).to(device).eval()
    network = to_dynamic(teacher, dynamic, table)
    pin = device.type == "cuda"
    sampler = EpochSampler(len(train), tuning.seed)
    loader = train_loader(train, sampler, batch_size, workers, pin)
    train_log = UnreadableLog("training", len(train))
    held_out_log = UnreadableLog("held-out", len(splits.calibration))
    held_out = _load_all(splits.calibration, held_out_log, workers, device, observer)
    _fit_scales(network, teacher, loader, device)

    validation_loader = eval_loader(splits.validation, _EVAL_BATCH, workers, pin)
    observer.stage("original", len(splits.validation))
    before = evaluate_accuracy(
        teacher, validation_loader, device, UnreadableLog("validation", len(splits.validation)), observer.advance
    )
    state = start_state(network, tuning, steps_per_epoch, epochs)
    observer.stage("tuning", state.total_steps)
    tune(state, teacher, table, budget, loader, tuning, device, train_log, observer.step)
    observer.stage("calibrating", None)
    point = calibrate(network, table, held_out, budget, len(splits.validation), observer.calibrated)
    observer.stage("validation", len(splits.validation))
    validation_log = UnreadableLog("validation", len(splits.validation))
    after = evaluate_network(network, table, validation_loader, device, validation_log, tuning.amp, observer.advance)
    manifest = Manifest(
        architecture=architecture,
        model_args=model_args,
        class_names=splits.class_names,
        preprocessing=preprocessing,
        dynamic=dynamic,
        table=table,
        budget=budget,
        operating_point=point.value,
        configuration=configuration | {"unreadable_training_images": sorted(train_log.found | held_out_log.found)},
        source=(source or describe_source(module)) | {"top1": before[0], "top5": before[1]},
        validation=after,
    )
    return Converted(network, manifest)


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
    batch_size: int = _EVAL_BATCH,
    workers: int | None = None,
    amp: bool = False,
    observer: Observer | None = None,
) -> Evaluation:
    """Accuracy, cost and decisions of a converted network on a validation split.

    Args:
        data: None: the embedded digits, for their model.

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
    return evaluate_network(network, manifest.table, loader, device, log, amp, observer.advance)


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


def describe_source(model: nn.Module, weights: str | None = None) -> dict[str, Any]:
    """Name, licence and origin of a model's pretrained weights; ``weights`` names others, whose licence is not known."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {}) or {}
    if weights is not None:
        return {"weights": weights, "license": None, "origin": None}
    tag = f"{cfg.get('architecture')}.{cfg['tag']}" if cfg.get("tag") else cfg.get("architecture")
    origin = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("origin_url")
    return {"weights": tag, "license": cfg.get("license"), "origin": origin or None}


def _describe(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments that rebuild ``model`` with timm.

    Raises:
        UnsupportedModelError: timm's own model under that name and arguments has another structure.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        raise UnsupportedModelError("the model was not made by timm.create_model: its file could not be loaded again")
    args: dict[str, Any] = {"num_classes": getattr(model, "num_classes", 0), "in_chans": getattr(model, "in_chans", 3)}
    if args["num_classes"] < 2:
        raise UnsupportedModelError(f"{architecture} has no classifier")
    with torch.device("meta"):
        rebuilt = timm.create_model(architecture, **args)
    if repr(rebuilt) != repr(model):
        raise UnsupportedModelError(
            f"the model differs in structure from timm's {architecture} with {args}: only those two arguments are kept"
        )
    return architecture, args


def _load_all(
    images: Images, log: UnreadableLog, workers: int, device: torch.device, observer: Observer
) -> list[torch.Tensor]:
    """The held-out images in memory: every price of cost is tried on all of them."""
    observer.stage("loading held-out images", len(images))
    batches = []
    for batch in eval_loader(images, _EVAL_BATCH, workers):
        log.add(batch.unreadable)
        observer.advance(len(batch.targets) + len(batch.unreadable))
        if len(batch.targets):
            batches.append(batch.images.to(device))
    if not batches:
        raise DataError(f"there is no readable {log.split} image")
    return batches


def _fit_scales(network: DynamicResNet, original: nn.Module, loader: Any, device: torch.device) -> None:
    """Quantizer and gate scales from the first training batch; the network then still computes what the original does."""
    first: Batch = next(batch for batch in loader if len(batch.targets))
    images = first.images.to(device)
    fit_scales(network, images)
    verify_conversion(original, network, images[:8])
