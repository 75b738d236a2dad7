"""Options that several commands share, under the names that timm's scripts use, as typed records.

A record is a dataclass whose fields are options. A command takes a record as one parameter;
:func:`dfs_cli.cli.expand.expand` makes the options of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfs_cli.config import DataConfig, DeviceKind, DynamicConfig, GateKind, TuningConfig
from dfs_cli.errors import ConfigError
from dfs_cli.presets import parse_bits

if TYPE_CHECKING:
    from torch import nn

    from dfs_cli.config import Preprocessing
    from dfs_cli.models.zoo import Loaded

MODEL, DATA, PREPROCESSING = "Model", "Data", "Preprocessing"
NETWORK, TUNING, OUTPUT, MACHINE = "Options and gate", "Tuning", "Output", "Machine"


def _option(*names: str, panel: str, help: str, **settings: Any) -> Any:  # noqa: A002  # typer's name
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A timm architecture, as resnet50 or resnet50.a1_in1k; see dfs list.")
]
FileName = Annotated[Path, typer.Argument(metavar="FILE", help="What dfs convert wrote.")]
Checkpoint = Annotated[
    Path | None, _option("--checkpoint", metavar="FILE", panel=MODEL, help="Weights: .safetensors, .pth, .pt or .tar.")
]
Pretrained = Annotated[bool, _option("--pretrained/--no-pretrained", panel=MODEL, help="Start from timm's weights.")]
NumClasses = Annotated[
    int | None, _option("--num-classes", panel=MODEL, help="Give the model a new, random classifier of N classes.")
]
InChans = Annotated[int | None, _option("--in-chans", panel=MODEL, help="Input channels (default: the model's).")]
DataDir = Annotated[
    Path | None,
    _option(
        "--data", "--data-dir", metavar="DIR", panel=DATA,
        help="Images: class folders in train/ and val/ (or valid/, validation/, eval/, test/).",
    ),
]  # fmt: skip
Dataset = Annotated[
    str,
    _option(
        "--dataset", metavar="NAME", panel=DATA, help="A dataset reader of timm, as torch/cifar10; --data is its root."
    ),
]
TrainSplit = Annotated[
    str | None, _option("--train-split", metavar="NAME", panel=DATA, help="Name of the training split.")
]
ValSplit = Annotated[
    str | None, _option("--val-split", metavar="NAME", panel=DATA, help="Name of the validation split.")
]
ClassMap = Annotated[
    Path | None,
    _option(
        "--class-map", metavar="FILE", panel=DATA,
        help="Names of the class folders in the order of the model's classes, a line each (default: natural order).",
    ),
]  # fmt: skip
NumSamples = Annotated[
    int | None, _option("--num-samples", metavar="N", panel=DATA, help="Use at most N images of each split.")
]
Download = Annotated[
    bool, _option("--dataset-download", panel=DATA, help="Let the reader of --dataset download it, where it can.")
]
ImgSize = Annotated[int | None, _option("--img-size", panel=PREPROCESSING, help="Image size (default: the model's).")]
CropPct = Annotated[
    float | None, _option("--crop-pct", panel=PREPROCESSING, help="Centre crop (default: the model's).")
]
Mean = Annotated[str | None, _option("--mean", metavar="M,M,M", panel=PREPROCESSING, help="Mean per channel.")]
Std = Annotated[
    str | None, _option("--std", metavar="S,S,S", panel=PREPROCESSING, help="Standard deviation per channel.")
]
Bits = Annotated[
    str | None,
    _option(
        "--bits", panel=NETWORK,
        help="Options of a block, as 0,4,8,32, or lowbit, hardware, static, paper, skipnet (default: lowbit; with --spend "
        "as many bits as the budget pays for).",
    ),
]  # fmt: skip
FixedBits = Annotated[
    int | None,
    _option(
        "--fixed-bits",
        panel=NETWORK,
        help="Bitwidth of stem, shortcuts and classifier (default: 8; paper, skipnet: 32).",
    ),
]
Gate = Annotated[
    GateKind,
    _option(
        "--gate", panel=NETWORK,
        help="A cheap first pass that decides which images take a second; a recurrent or a feed-forward gate before every "
        "block; or the best static mix of bitwidths.",
    ),
]  # fmt: skip
FirstView = Annotated[
    float | None,
    _option(
        "--first-view", metavar="SHARE", panel=NETWORK,
        help="With the probe gate, height and width of the images that the first pass sees, as a share of the full ones "
        "(default: 1; with costs on a device, what is best by them).",
    ),
]  # fmt: skip
Mirror = Annotated[
    bool | None,
    _option(
        "--mirror/--no-mirror", panel=NETWORK,
        help="Show the probe's second pass the mirrored image (default: if --hflip is not 0); with --gate static, show "
        "every image twice, once mirrored.",
    ),
]  # fmt: skip
Spend = Annotated[
    bool, _option("--spend", panel=NETWORK, help="Reach for the budget itself, even where less does as well.")
]
Limit = Annotated[
    float | None,
    _option(
        "--limit", metavar="COST", panel=NETWORK,
        help="What no image may cost more than, whatever it shows, in the unit of --budget (default: no limit).",
    ),
]  # fmt: skip
Epochs = Annotated[
    int | None,
    _option(
        "--epochs", panel=TUNING,
        help="Passes over the data (default: for 350 steps at least, but no epoch of more than 525).",
    ),
]  # fmt: skip
Steps = Annotated[int | None, _option("--steps", metavar="N", panel=TUNING, help="Tuning steps, in place of epochs.")]
TrainBatchSize = Annotated[
    int | None,
    _option("--batch-size", panel=TUNING, help="Images per step, of all processes (default: 128; digits 64)."),
]
LearningRate = Annotated[
    float | None, _option("--lr", panel=TUNING, help="Learning rate of the step sizes (default: 0.001).")
]
FreezeBackbone = Annotated[bool, _option("--freeze-backbone", panel=TUNING, help="Tune gates and quantizers only.")]
HFlip = Annotated[float | None, _option("--hflip", panel=TUNING, help="Flip probability (default: 0.5; digits 0).")]
MinCrop = Annotated[
    float | None, _option("--min-crop", panel=TUNING, help="Smallest area of a training crop (default: 0.9).")
]
Seed = Annotated[int, _option("--seed", panel=TUNING, help="Random seed.")]
EvalBatchSize = Annotated[
    int, _option("--batch-size", panel=MACHINE, help="Images per batch; decisions do not depend on it.")
]
GradAccumSteps = Annotated[
    int,
    _option(
        "--grad-accum-steps", metavar="N", panel=MACHINE,
        help="Divide each batch into N pieces, one after the other: less memory (default: as many as the device needs).",
    ),
]  # fmt: skip
TuningChannelsLast = Annotated[
    bool, _option("--channels-last/--no-channels-last", panel=MACHINE, help="Tune in the channels-last memory layout.")
]
Amp = Annotated[bool, _option("--amp", panel=MACHINE, help="Automatic mixed precision (bfloat16).")]
ChannelsLast = Annotated[bool, _option("--channels-last", panel=MACHINE, help="Channels-last memory layout.")]
DeviceOption = Annotated[DeviceKind, _option("--device", panel=MACHINE, help="Where to compute.")]
Workers = Annotated[
    int | None, _option("--workers", "-j", metavar="N", panel=MACHINE, help="Processes that load images.")
]
Force = Annotated[bool, _option("--force", "-f", panel=OUTPUT, help="Overwrite existing output files.")]
JsonOutput = Annotated[
    bool, _option("--json", panel=OUTPUT, help="Print one JSON object on stdout, and nothing else there.")
]
Quiet = Annotated[bool, _option("--quiet", "-q", panel=OUTPUT, help="No progress, no text.")]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which weights a model starts from."""

    checkpoint: Checkpoint = None
    pretrained: Pretrained = True
    num_classes: NumClasses = None
    in_chans: InChans = None

    def load(self, name: str, seed: int) -> Loaded:
        """The model, and where its weights come from."""
        from dfs_cli.models.zoo import load_described

        return load_described(name, self.pretrained, self.checkpoint, self.num_classes, self.in_chans, seed)

    def outline(self, name: str) -> nn.Module:
        """The model without meaningful weights, for counting."""
        from dfs_cli.models.zoo import load_outline

        return load_outline(name, self.checkpoint, self.num_classes, self.in_chans)


@dataclasses.dataclass(frozen=True)
class EvalDataOptions:
    """Where the images of a validation split come from."""

    data: DataDir = None
    dataset: Dataset = ""
    val_split: ValSplit = None
    class_map: ClassMap = None
    num_samples: NumSamples = None
    dataset_download: Download = False

    def config(self) -> DataConfig:
        """The settings."""
        return DataConfig(
            data_dir=None if self.data is None else str(self.data),
            dataset=self.dataset,
            train_split=getattr(self, "train_split", None),
            val_split=self.val_split,
            class_map=None if self.class_map is None else str(self.class_map),
            num_samples=self.num_samples,
            download=self.dataset_download,
        )


@dataclasses.dataclass(frozen=True)
class DataOptions(EvalDataOptions):
    """Where the images of a conversion come from."""

    train_split: TrainSplit = None


@dataclasses.dataclass(frozen=True)
class PreprocessingOptions:
    """How images become the network's input."""

    img_size: ImgSize = None
    crop_pct: CropPct = None
    mean: Mean = None
    std: Std = None

    def __post_init__(self) -> None:
        self.statistics()

    def statistics(self) -> dict[str, tuple[float, ...] | None]:
        """Mean and deviation per channel, where they are given."""
        return {"mean": numbers("--mean", self.mean), "std": numbers("--std", self.std)}

    def resolve(self, model: nn.Module) -> Preprocessing:
        """The settings, the model's own where nothing is given."""
        from dfs_cli.data.preprocessing import resolve_preprocessing

        return resolve_preprocessing(model, self.img_size, self.crop_pct, **self.statistics())


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """What the converted network is made of."""

    bits: Bits = None
    fixed_bits: FixedBits = None
    gate: Gate = "probe"
    mirror: Mirror = None
    first_view: FirstView = None
    spend: Spend = False

    def config(self, budget: float, tuning: TuningConfig, known: Sequence[int] | None = None) -> DynamicConfig:
        """The settings for a budget, with nothing left open; ``known`` bitwidths have costs on a device."""
        from dfs_cli.conversion.defaults import default_dynamic

        options = None if self.bits is None else parse_bits(self.bits)
        dynamic = default_dynamic(budget, tuning, self.gate, options, self.fixed_bits, self.mirror, self.spend, known)
        return dynamic.replace(first_view=self.first_view)


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """How a network is tuned, and where."""

    epochs: Epochs = None
    steps: Steps = None
    batch_size: TrainBatchSize = None
    lr: LearningRate = None
    freeze_backbone: FreezeBackbone = False
    hflip: HFlip = None
    min_crop: MinCrop = None
    seed: Seed = 0
    grad_accum_steps: GradAccumSteps = 1
    amp: Amp = False
    channels_last: TuningChannelsLast = True
    device: DeviceOption = "auto"
    workers: Workers = None

    def config(self, defaults: TuningConfig) -> TuningConfig:
        """``defaults`` with what was given in its place."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return defaults.replace(**given)


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas or spaces.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas") from None
