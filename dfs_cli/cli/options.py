"""Options that several commands share, under the names that timm's scripts use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from dfs_cli.config import (
    DEFAULT_EDGE_BITS,
    PRESET_EDGE_BITS,
    DataConfig,
    DeviceKind,
    DynamicConfig,
    GateKind,
    TuningConfig,
    default_preset,
    parse_bits,
)
from dfs_cli.errors import ConfigError

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data", "--data-dir", metavar="DIR", help="Images: class folders in train/ and val/ (or validation/, test/)."
    ),
]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", metavar="NAME", help="A dataset reader of timm, as torch/cifar10; with --data as its root."
    ),
]
ValSplit = Annotated[str | None, typer.Option("--val-split", metavar="NAME", help="Name of the validation split.")]
NumSamples = Annotated[
    int | None, typer.Option("--num-samples", metavar="N", help="Use at most N images of each split.")
]
Download = Annotated[
    bool, typer.Option("--dataset-download", help="Let the reader of --dataset download it, where it can.")
]
Workers = Annotated[int | None, typer.Option("--workers", "-j", metavar="N", help="Processes that load images.")]
DeviceOption = Annotated[DeviceKind, typer.Option("--device", help="Where to compute.")]
Amp = Annotated[bool, typer.Option("--amp", help="Automatic mixed precision (bfloat16).")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Channels-last memory layout.")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", metavar="FILE", help="Weights: .safetensors, .pth, .pt or .tar.")
]
Pretrained = Annotated[bool, typer.Option(help="Start from timm's weights.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", help="Give the model a new, random classifier of N classes.")
]
InChans = Annotated[int | None, typer.Option("--in-chans", help="Input channels [default: the model's].")]
TrainSplit = Annotated[str | None, typer.Option("--train-split", metavar="NAME", help="Name of the training split.")]
ImgSize = Annotated[int | None, typer.Option("--img-size", help="Image size [default: the model's].")]
CropPct = Annotated[float | None, typer.Option("--crop-pct", help="Centre crop [default: the model's].")]
Mean = Annotated[str | None, typer.Option("--mean", metavar="M,M,M", help="Mean per channel.")]
Std = Annotated[str | None, typer.Option("--std", metavar="S,S,S", help="Standard deviation per channel.")]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help="Options of a block, as 0,4,8,32, or hardware, paper, skipnet, lowbit "
        "[default: hardware, for budgets up to 0.12 (rnn, ff: 0.06) lowbit].",
    ),
]
EdgeBits = Annotated[
    int | None,
    typer.Option("--edge-bits", help="Bitwidth of stem, shortcuts and classifier [default: 8; paper, skipnet: 32]."),
]
Gate = Annotated[
    GateKind,
    typer.Option("--gate", help="A cheap first pass that decides who needs a second; recurrent; or feed-forward."),
]
Mirror = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror", help="Show the probe's second pass the mirrored image [default: if --hflip is not 0]."
    ),
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the data [default: for 350 steps].")]
TrainBatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images per step [default: 128; digits 64].")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate of the step sizes [default: 0.001].")]
HFlip = Annotated[float | None, typer.Option("--hflip", help="Flip probability [default: 0.5; digits 0].")]
MinCrop = Annotated[float | None, typer.Option("--min-crop", help="Smallest area of a training crop [default: 0.9].")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite existing output files.")]


def data_config(
    data: Path | None,
    dataset: str,
    train_split: str | None,
    val_split: str | None,
    num_samples: int | None,
    download: bool,
) -> DataConfig:
    """The data settings that the options above give."""
    return DataConfig(
        data_dir=None if data is None else str(data),
        dataset=dataset,
        train_split=train_split,
        val_split=val_split,
        num_samples=num_samples,
        download=download,
    )


def dynamic_config(
    bits: str | None, edge_bits: int | None, gate: GateKind, budget: float, mirror: bool
) -> DynamicConfig:
    """Options and gate that the options above give for a budget."""
    preset = bits or default_preset(budget, gate)
    return DynamicConfig(
        bits=parse_bits(preset),
        edge_bits=PRESET_EDGE_BITS.get(preset, DEFAULT_EDGE_BITS) if edge_bits is None else edge_bits,
        gate=gate,
        mirror=mirror,
    )


def mirrors(gate: GateKind, mirror: bool | None, hflip: float) -> bool:
    """Whether the second pass sees the mirrored image."""
    if gate != "probe" and mirror is not None:
        raise ConfigError(f"--mirror is for the second pass of --gate probe, not for {gate}")
    return gate == "probe" and (hflip > 0 if mirror is None else mirror)


def tuned(defaults: TuningConfig, **given: Any) -> TuningConfig:
    """``defaults`` with what was given in its place; None: not given."""
    return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers separated by commas or spaces."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas") from None
