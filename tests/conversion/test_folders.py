"""Conversions on folders of images."""

from pathlib import Path

import pytest
import torch
from common import MakeFolder

import dfs_cli
from dfs_cli.config import DataConfig, TuningConfig
from dfs_cli.errors import DivergedError
from dfs_cli.observer import Observer
from dfs_cli.records import StepRecord

TUNING = TuningConfig(steps=3, batch_size=32, hflip=0.0)


class Told(Observer):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, record: StepRecord) -> None:
        self.losses.append(record.loss)


@pytest.mark.medium
def test_a_seed_repeats_a_run_whatever_the_number_of_workers(make_folder: MakeFolder) -> None:
    data = DataConfig(data_dir=str(make_folder(per_class=8)))
    runs = []
    for workers in (0, 2):
        told = Told()
        tuning = TUNING.replace(workers=workers, hflip=0.5, min_crop=0.5)
        converted = dfs_cli.convert("resnet20_digits", 0.1, data, tuning=tuning, observer=told)
        runs.append((converted, told.losses))
    (alone, losses), (helped, others) = runs
    assert losses == others
    expected = helped.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.network.state_dict().items())
    assert alone.manifest.operating_point == helped.manifest.operating_point
    assert alone.manifest.validation is not None and helped.manifest.validation is not None
    assert alone.manifest.validation.replace(images_per_second=0.0) == helped.manifest.validation.replace(
        images_per_second=0.0
    )


@pytest.mark.slow
def test_another_order_of_classes_is_told_and_a_class_map_mends_it(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(per_class=6)
    for split in ("train", "val"):
        for digit in range(10):
            (root / split / str(digit)).rename(root / split / f"class{(digit + 3) % 10}")
    order = tmp_path / "classes.txt"
    order.write_text("\n".join(f"class{(digit + 3) % 10}" for digit in range(10)))
    data, told = DataConfig(data_dir=str(root)), Told()
    converted = dfs_cli.convert("resnet20_digits", 0.1, data, tuning=TUNING, observer=told)
    assert converted.manifest.source.top1 is not None and converted.manifest.source.top1 < 20
    hints = [note for note in told.notes if "--class-map" in note]
    assert len(hints) == 1 and hints[0].startswith("the original network is no better than chance on these images: ")
    mapped, told = data.replace(class_map=str(order)), Told()
    converted = dfs_cli.convert("resnet20_digits", 0.1, mapped, tuning=TUNING, observer=told)
    assert converted.manifest.source.top1 is not None and converted.manifest.source.top1 > 90
    assert not [note for note in told.notes if "--class-map" in note]
    moved = dfs_cli.recalibrate(converted, 0.08, data)
    assert moved.manifest.budget == 0.08, "the file knows the order of its classes"


@pytest.mark.medium
def test_an_absurd_learning_rate_stops_with_a_word() -> None:
    tuning = TUNING.replace(lr=1e6, steps=50)
    with pytest.raises(DivergedError, match=r"at step \d+, learning rate [0-9e+]+: try a smaller --lr"):
        dfs_cli.convert("resnet20_digits", 0.1, tuning=tuning)
