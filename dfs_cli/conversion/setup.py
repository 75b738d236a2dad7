"""Everything that a conversion needs, resolved and checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import timm
import torch
from torch import nn

from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.checkpoint import Checkpoint
from dfs_cli.config import Configuration, DataConfig, DynamicConfig, Preprocessing, SynthesisConfig, TuningConfig
from dfs_cli.control import factory
from dfs_cli.control.base import Request
from dfs_cli.conversion.defaults import (
    default_dynamic,
    default_images,
    default_tuning,
    describe_model,
    describe_source,
    resolve_device,
)
from dfs_cli.conversion.identity import SPLITS, identity_of
from dfs_cli.cost.device import DeviceCosts
from dfs_cli.cost.table import CostTable
from dfs_cli.cost.weighting import mac_cost
from dfs_cli.data.classes import check_class_count
from dfs_cli.data.images import Images
from dfs_cli.data.loading import choose_workers
from dfs_cli.data.preprocessing import hard_crop_transform, resolve_preprocessing
from dfs_cli.data.splits import Splits, open_splits
from dfs_cli.distributed import of_first, size
from dfs_cli.errors import ConfigError, DataError
from dfs_cli.models.zoo import load_model
from dfs_cli.nn.quantization import BYTE_BITS
from dfs_cli.observer import Observer
from dfs_cli.ranges import check_budget, check_limit
from dfs_cli.records import Source
from dfs_cli.surgery.plan import SurgeryPlan, plan_costs, plan_surgery
from dfs_cli.synthesis.moments import check_remembers
from dfs_cli.synthesis.splits import make_images, synthetic_splits
from dfs_cli.synthesis.work import Work, plan_work

EVAL_BATCH = 256
"""Images per batch where nothing is trained, at most."""

_MOST_PIXELS = 1 << 21  # of a batch: a few GiB of features

_WORK = "work"  # in the checkpoint: a machine takes another time when it is measured again


@dataclass(frozen=True)
class Setup:
    """A conversion that can begin.

    Args:
        model: the original, left unchanged.
        architecture, model_args, source: what is recorded about it.
        request: the budget, and how many images it is set on and for.
        dynamic, tuning, preprocessing: settings with nothing left open.
        data: where the images come from; None: splits that the caller opened, or synthetic ones.
        synthesis: how many images were made, and how; None: they are real.
        splits: the images.
        plan, table: what the surgery will do, and what options cost before anything is decided.
        alternatives: settings and costs of the networks that can be made, the first ones as above: on a device, of several
            sizes of what the first pass sees, and of a static one, of which that is made which promises most.
        device: where to compute.
    """

    model: nn.Module
    architecture: str
    model_args: ModelArgs
    source: Source
    request: Request
    dynamic: DynamicConfig
    tuning: TuningConfig
    preprocessing: Preprocessing
    data: DataConfig | None
    synthesis: SynthesisConfig | None
    splits: Splits
    plan: SurgeryPlan
    table: CostTable
    alternatives: tuple[tuple[DynamicConfig, CostTable], ...]
    device: torch.device
    configuration: Configuration = field(init=False)

    def __post_init__(self) -> None:
        configuration = Configuration(
            model=self.architecture,
            budget=self.request.budget,
            spend=self.request.spend,
            limit=self.request.limit if self.request.limit < math.inf else None,
            dynamic=self.dynamic,
            tuning=self.tuning,
            data=self.data,
            synthesis=self.synthesis,
            preprocessing=self.preprocessing,
            device=str(self.device),
            steps=self.steps,
            images={k: len(getattr(self.splits, k)) for k in SPLITS},
            versions={"torch": str(torch.__version__), "timm": timm.__version__},
            threads=torch.get_num_threads(),
        )
        object.__setattr__(self, "configuration", configuration)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of the training images."""
        return len(self.splits.train) // self.tuning.batch_size

    @property
    def steps(self) -> int:
        """Tuning steps in all."""
        return self.tuning.total_steps(self.steps_per_epoch)

    @property
    def workers(self) -> int:
        """Processes that load images."""
        return self.tuning.workers or 0

    @property
    def pin(self) -> bool:
        """Whether batches are pinned in memory on their way to an accelerator."""
        return self.device.type == "cuda"


def prepare(
    model: nn.Module | str,
    budget: float,
    data: DataConfig | Splits | SynthesisConfig | None = None,
    dynamic: DynamicConfig | None = None,
    tuning: TuningConfig | None = None,
    preprocessing: Preprocessing | None = None,
    source: Source | None = None,
    spend: bool = False,
    observer: Observer | None = None,
    costs: DeviceCosts | None = None,
    checkpoint: Checkpoint | None = None,
    limit: float | None = None,
) -> Setup:
    """Resolve and check everything; nothing is tuned yet. Where there are no images, they are made last. See
    :func:`dfs_cli.conversion.convert.convert` for arguments and errors."""
    check_budget(budget)
    check_limit(limit)
    most = math.inf if limit is None else limit
    observer, checkpoint = observer or Observer(), checkpoint or Checkpoint()
    module = load_model(model) if isinstance(model, str) else model
    if source is None:
        source = describe_source(module, None if isinstance(model, str) else "given by the caller")
    architecture, model_args = describe_model(module)
    if not isinstance(data, Splits):
        data = default_images(architecture, data)
    tuning = tuning or default_tuning(data)
    known = None if costs is None else costs.options
    dynamic = dynamic or default_dynamic(budget, tuning, spend=spend, known=known)
    device = resolve_device(tuning.device)
    preprocessing = preprocessing or resolve_preprocessing(module)
    plan = plan_surgery(module)
    if costs is not None:
        dynamic = _without_dominated(dynamic, costs, observer)
    settings = factory.alternatives(dynamic, costs)
    tables = [plan_costs(module, one, preprocessing.input_size, plan) for one in settings]
    if costs is not None:
        tables = [table.on_device(costs, one.gate) for one, table in zip(settings, tables, strict=True)]
    dynamic, table = settings[0], tables[0]
    min(tables, key=lambda table: table.cheapest).check_budget(budget, spend, most)
    synthesis = None
    if isinstance(data, SynthesisConfig):
        if spend:
            raise ConfigError("--spend needs images: without them the cost is a bound, not a mean that can be reached")
        checkpoint.identify(
            identity_of(module, budget, spend, data, dynamic, tuning, preprocessing, costs, None, limit)
        )
        splits, synthesis, tuning = _make_splits(
            module,
            preprocessing,
            data,
            tuning,
            table,
            min(budget, most),
            dynamic.mirror,
            device,
            observer,
            checkpoint,
        )
    else:
        splits = data if isinstance(data, Splits) else open_splits(data, preprocessing, tuning.seed)
        checkpoint.identify(
            identity_of(module, budget, spend, data, dynamic, tuning, preprocessing, costs, splits, limit)
        )
    for name in SPLITS:
        if not len(getattr(splits, name)):
            raise DataError(f"the {name} split has no images")
    check_class_count(splits.class_names, model_args.num_classes)
    batch_size = min(tuning.batch_size, len(splits.train))
    if batch_size < size():
        raise ConfigError(f"batch-size {batch_size} is less than one image for each of {size()} processes")
    largest = max(batch_size, eval_batch(preprocessing))
    workers = choose_workers(tuning.workers, splits.train, preprocessing, largest, observer.note)
    for images in (splits.train, splits.validation):  # now that nothing can be refused any more
        if images.note:
            observer.note(images.note)
    return Setup(
        model=module,
        architecture=architecture,
        model_args=model_args,
        source=source,
        request=Request(budget, spend, len(splits.calibration), len(splits.validation), synthesis is not None, most),
        dynamic=dynamic,
        tuning=tuning.replace(batch_size=batch_size, workers=workers),
        preprocessing=preprocessing,
        data=data if isinstance(data, DataConfig) else None,
        synthesis=synthesis,
        splits=splits,
        plan=plan,
        table=table,
        alternatives=tuple(zip(settings, tables, strict=True)),
        device=device,
    )


def _without_dominated(dynamic: DynamicConfig, costs: DeviceCosts, observer: Observer) -> DynamicConfig:
    """The settings without options that a wider one is as cheap as."""
    useful = costs.useful(dynamic.bits)
    if left_out := [bits for bits in dynamic.bits if bits not in useful]:
        observer.note(
            f"options of {','.join(map(str, left_out))} bits are left out: {','.join(map(str, useful))} bits cost no more there"
        )
    return dynamic.replace(bits=useful)


def _make_splits(
    model: nn.Module,
    preprocessing: Preprocessing,
    config: SynthesisConfig,
    tuning: TuningConfig,
    table: CostTable,
    budget: float,
    mirror: bool,
    device: torch.device,
    observer: Observer,
    checkpoint: Checkpoint,
) -> tuple[Splits, SynthesisConfig, TuningConfig]:
    """Splits of images made from ``model``, how many were made and how, and how to tune on them: without labels."""
    if config.kind == "distilled":
        check_remembers(model, len(table.blocks))
    if table.device is None:
        few_bits = budget < table.passes * mac_cost(BYTE_BITS)
    else:
        few_bits = any(0 < bits < BYTE_BITS for bits in table.options)
    if (known := checkpoint.get(_WORK)) is not None:
        work = Work.from_dict(known)
    else:
        observer.stage("timing this machine", None)
        work = of_first(plan_work(model, preprocessing, table.dense_macs, config, few_bits, device))
        checkpoint.keep(_WORK, work.to_dict())
    if tuning.steps is None and tuning.epochs is None:
        tuning = tuning.replace(steps=work.tuning_steps)
    # 8 bits need next to no tuning, and made images may lead the weights astray.
    frozen = tuning.freeze_backbone or not few_bits
    tuning = tuning.replace(
        label_weight=0.0, batch_size=min(tuning.batch_size, work.batch_size), freeze_backbone=frozen
    )
    for text in _what_is_done(work, config, few_bits, mirror):
        observer.note(text)
    made = make_images(model, preprocessing, work, tuning.seed, device, observer, checkpoint)
    steps = sum(stage.steps for stage in work.stages) or None
    return synthetic_splits(model, preprocessing, made, device), config.replace(images=work.images, steps=steps), tuning


def _what_is_done(work: Work, config: SynthesisConfig, few_bits: bool, mirror: bool) -> list[str]:
    """What the user should know before it begins."""
    made = "are made from what the network remembers" if config.kind == "distilled" else "of Gaussian noise are made"
    minutes = max(1, round(work.seconds / 60))
    lines = [
        f"no images are given: {work.images} {made}, and it is tuned on them; real images give more (--data DIR)",
        f"making images and tuning will take about {minutes} minute{'' if minutes == 1 else 's'} on this machine",
    ]
    if few_bits:
        lines.append(
            "below 8 bits more images and steps are needed: --synthetic-images and --steps N for fewer, which loses more"
        )
    if mirror:
        lines.append(
            "the second pass sees the mirrored image; whether that keeps its class cannot be known without images: "
            "--no-mirror --hflip 0 if it does not"
        )
    return lines


def eval_batch(preprocessing: Preprocessing) -> int:
    """Images per batch where nothing is trained: fewer where they are large."""
    return max(1, min(EVAL_BATCH, _MOST_PIXELS // math.prod(preprocessing.input_size[1:])))


def hard_crops(held_out: Images, preprocessing: Preprocessing, tuning: TuningConfig) -> Images:
    """The held-out images as :func:`dfs_cli.data.preprocessing.hard_crop_transform` shows them, the same at every call."""
    if held_out.transform is None:
        return held_out
    images = held_out.with_transform(hard_crop_transform(preprocessing, tuning.hflip, tuning.min_crop))
    images.draw = tuning.seed
    return images
