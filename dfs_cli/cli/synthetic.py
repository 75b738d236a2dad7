"""Options of conversions without images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfs_cli.cli.options import DATA
from dfs_cli.config import DataConfig, Kind, SynthesisConfig
from dfs_cli.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from dfs_cli.synthesis.splits import SyntheticImages as Made

Synthetic = Annotated[
    Kind | None,
    typer.Option(
        "--synthetic",
        rich_help_panel=DATA,
        help="Make images from the network, or of noise (default: distilled, where none are given).",
    ),
]
SyntheticImages = Annotated[
    int | None,
    typer.Option(
        "--synthetic-images",
        metavar="N",
        rich_help_panel=DATA,
        help="How many to make (default: what this machine makes in minutes).",
    ),
]
SyntheticSteps = Annotated[
    int | None,
    typer.Option(
        "--synthetic-steps", metavar="N", rich_help_panel=DATA, help="Steps that make each of them (default: 150)."
    ),
]
SaveSynthetic = Annotated[
    Path | None,
    typer.Option(
        "--save-synthetic",
        metavar="DIR",
        rich_help_panel=DATA,
        help="Write the images made as PNG files, to look at.",
    ),
]


@dataclasses.dataclass(frozen=True)
class SyntheticOptions:
    """How images are made where there are none."""

    synthetic: Synthetic = None
    synthetic_images: SyntheticImages = None
    synthetic_steps: SyntheticSteps = None
    save_synthetic: SaveSynthetic = None

    def choose(self, model: str, data: DataConfig) -> DataConfig | SynthesisConfig:
        """Where images come from: ``data`` if it names any.

        Raises:
            ConfigError: both are given.
        """
        from dfs_cli.conversion.defaults import default_images

        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if given and data.names_data:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is for conversions without images: leave out --data and --dataset"
            )
        if not given and not isinstance(chosen := default_images(model.partition(".")[0], data), SynthesisConfig):
            return chosen
        if of_data := [name for name, value in vars(data).items() if value]:
            raise ConfigError(f"--{of_data[0].replace('_', '-')} goes with --data or --dataset: pass one of them")
        try:
            return SynthesisConfig(
                kind=self.synthetic or "distilled", images=self.synthetic_images, steps=self.synthetic_steps
            )
        except ConfigError as error:
            raise ConfigError(f"--synthetic-{error}") from None

    def check_folder(self, force: bool) -> None:
        """Raises OutputError where the folder for images holds something, unless ``force`` is given."""
        folder = self.save_synthetic
        if folder is not None and folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not force)):
            raise OutputError(f"--save-synthetic {folder} is there already: pass another folder, or --force")

    def save(self, images: Made) -> None:
        """Write images into the folder, where one is given."""
        if self.save_synthetic is not None:
            images.save(self.save_synthetic)
