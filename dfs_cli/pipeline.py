"""The way of the data through a conversion: plan, surgery, tuning, operating point, evaluation."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dfs_cli.artifact.manifest import Manifest
from dfs_cli.config import DataConfig, DynamicConfig, Preprocessing, TuningConfig, check_budget
from dfs_cli.cost.operating_point import HIGHEST_SHARE, LOWEST_SHARE
from dfs_cli.cost.table import CostTable
from dfs_cli.data.images import Batch, Images, UnreadableLog
from dfs_cli.data.loading import EpochSampler, eval_loader, load_all, train_loader
from dfs_cli.data.preprocessing import resolve_preprocessing, train_transform
from dfs_cli.data.splits import Splits, check_class_count, open_splits
from dfs_cli.evaluation.evaluate import evaluate_accuracy, evaluate_network
from dfs_cli.models.zoo import load_model
from dfs_cli.nn.network import DynamicResNet
from dfs_cli.nn.probe import EVERYBODY_IS_SURE, ProbedResNet
from dfs_cli.resolve import (
    default_data,
    default_dynamic,
    default_tuning,
    describe_model,
    describe_source,
    resolve_device,
    resolve_tuning,
    unfamiliar,
)
from dfs_cli.surgery.biases import round_biases
from dfs_cli.surgery.convert import fit_scales, plan_costs, to_dynamic, verify_conversion
from dfs_cli.surgery.settling import settle
from dfs_cli.tuning.calibration import calibrate
from dfs_cli.tuning.loop import Goal, StepRecord, seed_everything, tune
from dfs_cli.tuning.plan import plan_passes
from dfs_cli.tuning.sensitivity import measure_damage, measure_layer_damage, prefer_harmless_options
from dfs_cli.tuning.state import start_state
from dfs_cli.tuning.static_mix import best_layer_mix, set_layer_bits

EVAL_BATCH = 256


class Observer:
    """Told what a conversion or an evaluation does; override what you want to show."""

    def job(self, name: str) -> None:
        """One of several conversions begins."""

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
        dynamic: options and gate; None: :func:`default_dynamic`.
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
    check_budget(budget)
    run = Run(model, budget, data, dynamic, tuning, preprocessing, source, observer)
    with run.own_generators():
        run.plan_dynamic()
        top1, top5 = run.evaluate_original()
        run.tune()
        run.calibrate()
        return run.finish(top1, top5)


class Run:
    """The stages of tuning one network; everything is resolved and checked in the constructor.

    Args:
        cost: the budget of a dynamic network, or the largest cost of a static one.
        dynamic: of a static network, its options.

    See :func:`convert` for the other arguments and for what is raised.
    """

    def __init__(
        self,
        model: nn.Module | str,
        cost: float,
        data: DataConfig | Splits | None = None,
        dynamic: DynamicConfig | None = None,
        tuning: TuningConfig | None = None,
        preprocessing: Preprocessing | None = None,
        source: dict[str, Any] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.observer = observer or Observer()
        module = load_model(model) if isinstance(model, str) else model
        if source is None:
            source = describe_source(module, None if isinstance(model, str) else "given by the caller")
        self.source = source
        self.architecture, self.model_args = describe_model(module)
        if not isinstance(data, Splits):
            data = default_data(self.architecture, data)
        tuning = tuning or default_tuning(data)
        self.dynamic = dynamic or default_dynamic(cost, tuning)
        self.device = resolve_device(tuning.device)
        self.preprocessing = preprocessing or resolve_preprocessing(module)
        self.table = plan_costs(module, self.dynamic, self.preprocessing.input_size)
        self.table.check_budget(cost)
        self.budget = cost
        self.splits = data if isinstance(data, Splits) else open_splits(data, self.preprocessing, tuning.seed)
        check_class_count(self.splits.class_names, self.model_args["num_classes"])
        self.tuning, self.steps_per_epoch = resolve_tuning(tuning, self.splits.train)
        self.workers = self.tuning.workers or 0
        self.pin = self.device.type == "cuda"
        self.configuration = {
            "model": self.architecture,
            "budget": cost,
            "dynamic": self.dynamic.to_dict(),
            "tuning": self.tuning.to_dict(),
            "data": data.to_dict() if isinstance(data, DataConfig) else None,
            "preprocessing": self.preprocessing.to_dict(),
            "device": str(self.device),
            "steps": self.steps,
            "images": {k: len(getattr(self.splits, k)) for k in ("train", "calibration", "validation")},
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
            "threads": torch.get_num_threads(),
        }
        self.observer.configured(self.configuration, self.table)
        self.teacher = copy.deepcopy(module).to(self.device).eval()
        self.train_log = UnreadableLog("training", len(self.splits.train) + len(self.splits.calibration))
        self.goal = Goal(cost)
        self.layer_bits: dict[str, int] = {}

    @property
    def steps(self) -> int:
        """Tuning steps in all."""
        return (self.tuning.epochs or 1) * self.steps_per_epoch

    @contextmanager
    def own_generators(self) -> Iterator[None]:
        """Seed everything random, and leave the caller's generators as they were."""
        python = random.getstate()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            seed_everything(self.tuning.seed)
            try:
                yield
            finally:
                random.setstate(python)

    def plan_dynamic(self) -> None:
        """Make the network and plan how it spends the budget."""
        sample = self._make_network()
        damage = measure_damage(self.network, self.table, sample)
        prefer_harmless_options(self.network, damage)
        if isinstance(self.network, ProbedResNet):
            counts = len(self.splits.calibration), len(self.splits.validation)
            self.goal = plan_passes(self.network, self.table, damage, self.budget, *counts)
        self.network.fit_gate(sample)

    def plan_static(self, bits: int | None) -> None:
        """Make a network of one pass that runs every block at ``bits``, or every layer at the best static mix for the cost."""
        sample = self._make_network()
        assert isinstance(self.network, ProbedResNet), "a static network is the first pass of a probed one"
        if bits is None:
            mix = best_layer_mix(self.table, *measure_layer_damage(self.network, self.table, sample), self.budget)
            set_layer_bits(self.network, mix)
            skipped = {layer.block for layer in self.table.layers if mix.get(layer.name) == 0}
            self.network.policy[[i for i in range(len(self.network.blocks)) if i in skipped]] = 0
            fit_scales(self.network, sample, [self.network.policy])
            self.table, self.layer_bits = self.table.with_layer_bits(mix), mix
        else:
            self.network.policy.fill_(self.dynamic.bits.index(bits))
        self.network.operating_point = EVERYBODY_IS_SURE
        self.goal = Goal(self.budget, share=0.0)

    def _make_network(self) -> Tensor:
        """The network, its scales fitted to a sample of the held-out images, (N, C, H, W), which is returned."""
        self.network = to_dynamic(self.teacher, self.dynamic, self.table)
        held_out = self.splits.calibration
        (sample, *_), _ = self._load(held_out.subset(range(min(EVAL_BATCH, len(held_out)))))
        fit_scales(self.network, sample)
        verify_conversion(self.teacher, self.network, sample[:8])
        return sample

    def _load(self, images: Images) -> tuple[list[Tensor], Tensor]:
        """Held-out images in memory (every price of cost is tried on all of them), and their classes."""
        self.observer.stage("loading held-out images", len(images))
        return load_all(images, EVAL_BATCH, self.workers, self.device, self.train_log, self.observer.advance)

    def evaluate_original(self) -> tuple[float, float]:
        """Top-1 and top-5 of the original network on the validation split."""
        self.observer.stage("original", len(self.splits.validation))
        log = UnreadableLog("validation", len(self.splits.validation))
        # A loader draws a number: tuning must not depend on whether the original was evaluated before.
        with torch.random.fork_rng(devices=[]):
            return evaluate_accuracy(self.teacher, self.validation_loader(), self.device, log, self.observer.advance)

    def validation_loader(self) -> DataLoader[Batch]:
        """The validation images, in order."""
        return eval_loader(self.splits.validation, EVAL_BATCH, self.workers, self.pin)

    def tune(self) -> None:
        """Tune the network for the goal."""
        tuning, train = self.tuning, self.splits.train
        if train.transform is not None:
            train = train.with_transform(train_transform(self.preprocessing, tuning.hflip, tuning.min_crop))
        sampler = EpochSampler(len(train), tuning.seed)
        loader = train_loader(train, sampler, tuning.batch_size, self.workers, self.pin)
        state = start_state(self.network, tuning, self.steps_per_epoch, tuning.epochs or 1)
        self.observer.stage("tuning", state.total_steps)
        tune(
            state,
            self.teacher,
            self.table,
            self.goal,
            loader,
            tuning,
            self.device,
            self.train_log,
            self.observer.step,
        )
        settle(self.network)
        round_biases(self.network, self.preprocessing.input_size)

    def calibrate(self) -> None:
        """Set the operating point on the held-out images, in full precision, whatever tuning used."""
        probed = isinstance(self.network, ProbedResNet)
        images, _ = self.unfamiliar_images() if probed else self._load(self.splits.calibration)
        self.observer.stage("calibrating", None)
        calibrate(self.network, self.table, images, self.budget, len(self.splits.validation), self.observer.calibrated)

    def unfamiliar_images(self) -> tuple[list[Tensor], Tensor]:
        """The held-out images in memory, and their classes, as thresholds of confidence are set on them."""
        return self._load(unfamiliar(self.splits.calibration, self.preprocessing, self.tuning))

    def finish(self, top1: float | None, top5: float | None) -> Converted:
        """Evaluate the network on the validation split, and describe it; the original's figures are recorded beside its own."""
        self.observer.stage("validation", len(self.splits.validation))
        log = UnreadableLog("validation", len(self.splits.validation))
        validation = evaluate_network(
            self.network, self.table, self.validation_loader(), self.device, log, on_batch=self.observer.advance
        )
        manifest = Manifest(
            architecture=self.architecture,
            model_args=self.model_args,
            class_names=self.splits.class_names,
            preprocessing=self.preprocessing,
            dynamic=self.dynamic,
            table=self.table,
            budget=self.budget,
            operating_point=self.network.operating_point,
            configuration=self.configuration | {"unreadable_training_images": sorted(self.train_log.found)},
            source=self.source | {"top1": top1, "top5": top5},
            validation=validation,
        )
        return Converted(self.network, manifest)
