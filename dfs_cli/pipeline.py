"""The way of the data through a conversion: plan, surgery, tuning, operating point, evaluation."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from dfs_cli.artifact.manifest import Evaluation, Manifest
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig, check_budget
from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, default_workers, eval_loader, train_loader
from dfs_cli.data.preprocessing import resolve_preprocessing, train_transform
from dfs_cli.data.splits import DIGITS, Splits, check_class_count, open_splits
from dfs_cli.errors import ConfigError, DataError, UnsupportedModelError
from dfs_cli.evaluation.evaluate import evaluate_accuracy, evaluate_network
from dfs_cli.models.cifar import DIGITS_MODEL
from dfs_cli.models.zoo import load_model
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic, verify_conversion
from dfs_cli.tuning.calibration import calibrate
from dfs_cli.tuning.loop import StepRecord, resolve_epochs, seed_everything, tune
from dfs_cli.tuning.sensitivity import measure_damage, prefer_harmless_options
from dfs_cli.tuning.state import start_state

EVAL_BATCH = 256


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
        source: what to record about the original weights; None: what timm says where ``model`` is a name, else unknown.
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
    if source is None:
        source = describe_source(module, None if isinstance(model, str) else "given by the caller")
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
    tuning, steps_per_epoch = _resolve_tuning(tuning, splits.train)
    configuration = {
        "model": architecture,
        "budget": budget,
        "dynamic": dynamic.to_dict(),
        "tuning": tuning.to_dict(),
        "data": data.to_dict() if isinstance(data, DataConfig) else None,
        "preprocessing": preprocessing.to_dict(),
        "device": str(device),
        "steps": (tuning.epochs or 1) * steps_per_epoch,
        "images": {k: len(getattr(splits, k)) for k in ("train", "calibration", "validation")},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "threads": torch.get_num_threads(),
    }
    observer.configured(configuration, table)
    with _own_generators(tuning.seed):
        run = _Run(module, budget, dynamic, tuning, preprocessing, table, splits, device, observer)
        top1, top5 = run.evaluate_original()
        run.tune(steps_per_epoch)
        operating_point, validation = run.calibrate_and_validate()
    manifest = Manifest(
        architecture=architecture,
        model_args=model_args,
        class_names=splits.class_names,
        preprocessing=preprocessing,
        dynamic=dynamic,
        table=table,
        budget=budget,
        operating_point=operating_point,
        configuration=configuration | {"unreadable_training_images": sorted(run.train_log.found)},
        source=source | {"top1": top1, "top5": top5},
        validation=validation,
    )
    return Converted(run.network, manifest)


class _Run:
    """The stages of one conversion, once everything is resolved."""

    def __init__(
        self,
        original: nn.Module,
        budget: float,
        dynamic: DynamicConfig,
        tuning: TuningConfig,
        preprocessing: Preprocessing,
        table: CostTable,
        splits: Splits,
        device: torch.device,
        observer: Observer,
    ) -> None:
        self.budget, self.tuning, self.table, self.device, self.observer = budget, tuning, table, device, observer
        self.workers = tuning.workers or 0
        self.pin = device.type == "cuda"
        self.teacher = copy.deepcopy(original).to(device).eval()
        self.network = to_dynamic(self.teacher, dynamic, table)
        self.train_log = UnreadableLog("training", len(splits.train) + len(splits.calibration))
        self.held_out = self._load(splits.calibration)
        fit_scales(self.network, self.held_out[0])
        prefer_harmless_options(self.network, measure_damage(self.network, table, self.held_out[0]))
        verify_conversion(self.teacher, self.network, self.held_out[0][:8])
        train = splits.train
        if train.transform is not None:
            train = train.with_transform(train_transform(preprocessing, tuning.hflip, tuning.min_crop))
        self.train = train
        self.validation = splits.validation

    def _load(self, images: Images) -> list[torch.Tensor]:
        """The held-out images in memory: every price of cost is tried on all of them."""
        self.observer.stage("loading held-out images", len(images))
        batches = []
        for batch in eval_loader(images, EVAL_BATCH, self.workers):
            self.train_log.add(batch.unreadable)
            self.observer.advance(len(batch.targets) + len(batch.unreadable))
            if len(batch.targets):
                batches.append(batch.images.to(self.device))
        if not batches:
            raise DataError("there is no readable image among those held out for calibration")
        return batches

    def evaluate_original(self) -> tuple[float, float]:
        """Top-1 and top-5 of the original network on the validation split."""
        self.observer.stage("original", len(self.validation))
        loader = eval_loader(self.validation, EVAL_BATCH, self.workers, self.pin)
        log = UnreadableLog("validation", len(self.validation))
        return evaluate_accuracy(self.teacher, loader, self.device, log, self.observer.advance)

    def tune(self, steps_per_epoch: int) -> None:
        tuning = self.tuning
        sampler = EpochSampler(len(self.train), tuning.seed)
        loader = train_loader(self.train, sampler, tuning.batch_size, self.workers, self.pin)
        state = start_state(self.network, tuning, steps_per_epoch, tuning.epochs or 1)
        self.observer.stage("tuning", state.total_steps)
        tune(
            state,
            self.teacher,
            self.table,
            self.budget,
            loader,
            tuning,
            self.device,
            self.train_log,
            self.observer.step,
        )

    def calibrate_and_validate(self) -> tuple[float, Evaluation]:
        """The operating point, and the validation split's figures at it. Both in full precision, whatever tuning used."""
        self.observer.stage("calibrating", None)
        validation_images = len(self.validation)
        point = calibrate(
            self.network, self.table, self.held_out, self.budget, validation_images, self.observer.calibrated
        )
        self.observer.stage("validation", validation_images)
        loader = eval_loader(self.validation, EVAL_BATCH, self.workers, self.pin)
        log = UnreadableLog("validation", validation_images)
        evaluation = evaluate_network(
            self.network, self.table, loader, self.device, log, on_batch=self.observer.advance
        )
        return point.value, evaluation


def _resolve_tuning(tuning: TuningConfig, train: Images) -> tuple[TuningConfig, int]:
    """The settings with nothing left open, and the steps per epoch."""
    batch_size = min(tuning.batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    resolved = dataclasses.replace(
        tuning,
        epochs=resolve_epochs(tuning, steps_per_epoch),
        batch_size=batch_size,
        workers=default_workers(train) if tuning.workers is None else tuning.workers,
    )
    return resolved, steps_per_epoch


@contextmanager
def _own_generators(seed: int) -> Iterator[None]:
    """Seed everything random, and leave the caller's generators as they were."""
    python = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)


def describe_source(model: nn.Module, weights: str | None = None) -> dict[str, Any]:
    """Name, licence and origin of a model's timm weights; ``weights`` names others, of unknown licence."""
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
