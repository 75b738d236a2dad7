"""Everything that a conversion needs, resolved and checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
from torch import nn

from dfs_cli.artifact.manifest import ModelArgs
from dfs_cli.config import (
    Configuration,
    DataConfig,
    DynamicConfig,
    Preprocessing,
    TuningConfig,
    check_budget,
)
from dfs_cli.control.base import Request
from dfs_cli.conversion.defaults import (
    default_data,
    default_dynamic,
    default_tuning,
    describe_model,
    describe_source,
    resolve_device,
)
from dfs_cli.cost.table import CostTable
from dfs_cli.data.classes import check_class_count
from dfs_cli.data.images import Images
from dfs_cli.data.loading import choose_workers
from dfs_cli.data.preprocessing import hard_crop_transform, resolve_preprocessing
from dfs_cli.data.splits import Splits, open_splits
from dfs_cli.errors import DataError
from dfs_cli.models.zoo import load_model
from dfs_cli.records import Source
from dfs_cli.surgery.plan import SurgeryPlan, plan_costs, plan_surgery

EVAL_BATCH = 256
"""Images per batch where nothing is trained."""


@dataclass(frozen=True)
class Setup:
    """A conversion that can begin.

    Args:
        model: the original, left unchanged.
        architecture, model_args, source: what is recorded about it.
        request: the budget, and how many images it is set on and for.
        dynamic, tuning, preprocessing: settings with nothing left open.
        data: where the images come from; None: splits that the caller opened.
        splits: the images.
        plan, table: what the surgery will do, and what options cost before anything is decided.
        device: where to compute.
        steps_per_epoch: of tuning.
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
    splits: Splits
    plan: SurgeryPlan
    table: CostTable
    device: torch.device
    steps_per_epoch: int
    configuration: Configuration = field(init=False)

    def __post_init__(self) -> None:
        configuration = Configuration(
            model=self.architecture,
            budget=self.request.budget,
            spend=self.request.spend,
            dynamic=self.dynamic,
            tuning=self.tuning,
            data=self.data,
            preprocessing=self.preprocessing,
            device=str(self.device),
            steps=self.steps,
            images={k: len(getattr(self.splits, k)) for k in ("train", "calibration", "validation")},
            versions={"torch": str(torch.__version__), "timm": timm.__version__},
            threads=torch.get_num_threads(),
        )
        object.__setattr__(self, "configuration", configuration)

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
    data: DataConfig | Splits | None = None,
    dynamic: DynamicConfig | None = None,
    tuning: TuningConfig | None = None,
    preprocessing: Preprocessing | None = None,
    source: Source | None = None,
    spend: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Setup:
    """Resolve and check everything; nothing runs yet. See :func:`dfs_cli.conversion.convert.convert` for arguments and
    errors; ``say`` is told what the user should know."""
    check_budget(budget)
    module = load_model(model) if isinstance(model, str) else model
    if source is None:
        source = describe_source(module, None if isinstance(model, str) else "given by the caller")
    architecture, model_args = describe_model(module)
    if not isinstance(data, Splits):
        data = default_data(architecture, data)
    tuning = tuning or default_tuning(data)
    dynamic = dynamic or default_dynamic(budget, tuning, spend=spend)
    device = resolve_device(tuning.device)
    preprocessing = preprocessing or resolve_preprocessing(module)
    plan = plan_surgery(module)
    table = plan_costs(module, dynamic, preprocessing.input_size, plan)
    table.check_budget(budget, spend)
    splits = data if isinstance(data, Splits) else open_splits(data, preprocessing, tuning.seed)
    for name in ("train", "calibration", "validation"):
        if not len(getattr(splits, name)):
            raise DataError(f"the {name} split has no images")
    check_class_count(splits.class_names, model_args.num_classes)
    batch_size = min(tuning.batch_size, len(splits.train))
    workers = choose_workers(tuning.workers, splits.train, preprocessing, max(batch_size, EVAL_BATCH), say)
    for images in (splits.train, splits.validation):  # now that nothing can be refused any more
        if images.note:
            say(images.note)
    return Setup(
        model=module,
        architecture=architecture,
        model_args=model_args,
        source=source,
        request=Request(budget, spend, len(splits.calibration), len(splits.validation)),
        dynamic=dynamic,
        tuning=tuning.replace(batch_size=batch_size, workers=workers),
        preprocessing=preprocessing,
        data=data if isinstance(data, DataConfig) else None,
        splits=splits,
        plan=plan,
        table=table,
        device=device,
        steps_per_epoch=len(splits.train) // batch_size,
    )


def hard_crops(held_out: Images, preprocessing: Preprocessing, tuning: TuningConfig) -> Images:
    """The held-out images as :func:`dfs_cli.data.preprocessing.hard_crop_transform` shows them, the same at every call."""
    if held_out.transform is None:
        return held_out
    images = held_out.with_transform(hard_crop_transform(preprocessing, tuning.hflip, tuning.min_crop))
    images.draw = tuning.seed
    return images
