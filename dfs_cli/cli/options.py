"""Options that several commands share, under the names that timm's scripts use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dfs_cli.config import DataConfig

Device = Literal["auto", "cpu", "cuda"]

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
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Amp = Annotated[bool, typer.Option("--amp", help="Automatic mixed precision (bfloat16).")]
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
