from pathlib import Path

import pytest
import torch
from common import MakeFolder, solid_image
from sklearn.datasets import load_digits
from timm.data import ImageDataset
from torch import nn

from dfs_cli.config import DataConfig, Preprocessing
from dfs_cli.data.digits import Digits
from dfs_cli.data.images import Images, Unreadable, UnreadableLog, collate
from dfs_cli.data.loading import EpochSampler, eval_loader, train_loader
from dfs_cli.data.preprocessing import eval_transform, resolve_preprocessing, train_transform
from dfs_cli.data.splits import check_class_count, open_splits, open_validation
from dfs_cli.errors import ConfigError, DataError

GREY = Preprocessing((1, 8, 8), (1, 8, 8), "bicubic", 1.0, "center", (0.3,), (0.4,))
NAMES = tuple(str(i) for i in range(10))


def test_digits_are_split_for_good() -> None:
    splits = {name: Digits(name) for name in ("train", "calibration", "validation")}
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes == {"train": 1167, "calibration": 180, "validation": 450}
    assert sizes["validation"] >= 0.2 * 1797 and sizes["calibration"] >= 0.1 * (1797 - sizes["validation"])
    drawn = torch.cat([torch.from_numpy(s.pixels).flatten(1) for s in splits.values()])
    everything = torch.from_numpy((load_digits().data * 255 / 16).round())
    assert torch.equal(drawn.double().sum(0), everything.sum(0)), "the splits share no image and leave none out"
    first = splits["validation"][0]
    assert first[0].size == (8, 8) and first[1] == Digits("validation")[0][1]


def test_folder_is_split_into_train_calibration_and_validation(make_folder: MakeFolder) -> None:
    root = make_folder(per_class=5)
    splits = open_splits(DataConfig(data_dir=str(root)), GREY)
    assert (len(splits.train), len(splits.calibration), len(splits.validation)) == (45, 5, 50)
    assert splits.class_names == NAMES
    assert not set(splits.train.indices) & set(splits.calibration.indices)
    again = open_splits(DataConfig(data_dir=str(root)), GREY)
    assert list(again.calibration.indices) == list(splits.calibration.indices)
    image, target = splits.validation[0]
    assert isinstance(image, torch.Tensor) and image.shape == (1, 8, 8) and target == 0


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_validation_folder_names(name: str, make_folder: MakeFolder) -> None:
    root = make_folder(splits=("train", name))
    assert len(open_validation(DataConfig(data_dir=str(root)), GREY, NAMES)) == 40
    assert len(open_validation(DataConfig(data_dir=str(root / name)), GREY, NAMES)) == 40


def test_named_splits_and_sample_limit(make_folder: MakeFolder) -> None:
    root = make_folder(splits=("fit", "check"), per_class=5)
    config = DataConfig(data_dir=str(root), train_split="fit", val_split="check", num_samples=30)
    splits = open_splits(config, GREY)
    assert (len(splits.train), len(splits.calibration), len(splits.validation)) == (27, 3, 30)
    targets = [s[1] for i in range(30) if not isinstance(s := splits.validation[i], Unreadable)]
    assert len(set(targets)) > 5, "a sample is drawn from all classes"


def test_validation_classes_are_mapped_by_name(make_folder: MakeFolder) -> None:
    root = make_folder(classes=4, splits=("val",))
    names = ("2", "3", "0", "1")
    images = open_validation(DataConfig(data_dir=str(root)), GREY, names)
    folders = [Path(images.source.filename(i)).parts[0] for i in range(len(images))]
    targets = [s[1] for i in range(len(images)) if not isinstance(s := images[i], Unreadable)]
    assert len(targets) == 16 and [names[t] for t in targets] == folders
    with pytest.raises(DataError, match="4 classes"):
        open_validation(DataConfig(data_dir=str(root)), GREY, (*names, "x"))


def test_bad_folders_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    cases = {
        "does not exist": tmp_path / "none",
        "no class folders": tmp_path / "empty",
        "one class": make_folder("one", classes=1),
    }
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    for reason, root in cases.items():
        with pytest.raises(DataError, match=reason):
            open_splits(DataConfig(data_dir=str(root)), GREY)
    hollow = tmp_path / "hollow"
    for split in ("train", "val"):
        for name in "ab":
            (hollow / split / name).mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        open_splits(DataConfig(data_dir=str(hollow)), GREY)
    with pytest.raises(DataError, match="no split"):
        open_splits(DataConfig(data_dir=str(make_folder()), train_split="nope"), GREY)
    with pytest.raises(DataError, match="3 classes"):
        check_class_count(("a", "b", "c"), 10)
    with pytest.raises(DataError, match="has a class '0' that is not among"):
        open_validation(DataConfig(data_dir=str(make_folder("other"))), GREY, tuple("abcdefghij"))


def test_torchvision_readers_work(tmp_path: Path) -> None:
    import pickle

    import numpy as np

    # CIFAR-10 in the original's file format, with a few random images.
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        content = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    import hashlib

    from torchvision.datasets import CIFAR10

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    before = CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta
    try:
        CIFAR10.train_list = [[n, md5(n)] for n in names[:5]]
        CIFAR10.test_list = [[names[5], md5(names[5])]]
        CIFAR10.meta = {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")}
        colour = Preprocessing((3, 32, 32), (3, 32, 32), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
        splits = open_splits(DataConfig(data_dir=str(tmp_path), dataset="torch/cifar10"), colour)
    finally:
        CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = before
    assert (len(splits.train), len(splits.calibration), len(splits.validation)) == (90, 10, 20)
    assert splits.class_names == tuple("abcdefghij")


def test_unknown_readers_are_refused(tmp_path: Path) -> None:
    for name in ("torch/nonsense", "nonsense/x"):
        with pytest.raises(DataError, match="could not be opened"):
            open_splits(DataConfig(dataset=name, data_dir=str(tmp_path)), GREY)


def test_unreadable_images_are_counted_and_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            solid_image(tmp_path / name / f"{i}.png", 40 * i)
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:40])
    (tmp_path / "b" / "2.png").write_bytes(b"")
    images = Images(ImageDataset(str(tmp_path), input_img_mode="L"), eval_transform(GREY), mode="L")
    batch = next(iter(eval_loader(images, 10, 0)))
    assert batch.images.shape == (4, 1, 8, 8) and batch.targets.tolist() == [0, 0, 1, 1]
    assert [Path(u.name).parts[-2:] for u in batch.unreadable] == [("a", "1.png"), ("b", "2.png")]
    log = UnreadableLog("validation", 300)
    log.add(batch.unreadable)
    log.add(batch.unreadable)
    assert len(log.reasons) == 2
    with pytest.raises(DataError, match=r"more than 1% of the 199 validation images.*1\.png"):
        UnreadableLog("validation", 199).add(batch.unreadable)


def test_a_batch_may_be_wholly_unreadable() -> None:
    batch = collate([Unreadable("x", "y")])
    assert len(batch.targets) == 0 and batch.unreadable[0].name == "x"


def test_sampler_is_a_permutation_that_can_start_anywhere() -> None:
    sampler = EpochSampler(10, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(10))
    sampler.start = 4
    assert list(sampler) == first[4:] and len(sampler) == 6
    sampler.start, sampler.epoch = 0, 1
    assert list(sampler) != first


def test_loader_with_workers_gives_the_same_images(make_folder: MakeFolder) -> None:
    images = open_validation(DataConfig(data_dir=str(make_folder())), GREY, NAMES)
    alone = torch.cat([b.images for b in eval_loader(images, 16, 0)])
    helped = torch.cat([b.images for b in eval_loader(images, 16, 1)])
    assert torch.equal(alone, helped)
    sampler = EpochSampler(len(images), 0)
    assert sum(len(b.targets) for b in train_loader(images, sampler, 16, 0, pin=False)) == 32


def test_preprocessing_is_the_models_own_at_test_size() -> None:
    model = nn.Module()
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (3, 224, 224), "test_input_size": (3, 288, 288), "crop_pct": 0.9, "test_crop_pct": 1.0,
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear",
    }  # fmt: skip
    found = resolve_preprocessing(model)
    assert (found.input_size, found.train_size, found.crop_pct) == ((3, 288, 288), (3, 224, 224), 1.0)
    assert (found.mean, found.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    other = resolve_preprocessing(model, img_size=64, crop_pct=0.5, mean=(0.5,), std=(0.25, 0.25, 0.25))
    assert (other.input_size, other.train_size, other.crop_pct) == ((3, 64, 64), (3, 64, 64), 0.5)
    assert (other.mean, other.std) == ((0.5,) * 3, (0.25,) * 3)
    model.in_chans = 1  # type: ignore[assignment]
    grey = resolve_preprocessing(model)
    assert grey.input_size == (1, 288, 288) and grey.mean == pytest.approx((0.2,)) and grey.std == pytest.approx((0.5,))
    model.in_chans = 3  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="2 values for 3 channels"):
        resolve_preprocessing(model, std=(1.0, 2.0))


def test_transforms_by_hand(tmp_path: Path) -> None:
    solid_image(tmp_path / "x.png", 102)
    from PIL import Image

    with Image.open(tmp_path / "x.png") as image:
        # (102 / 255 - 0.3) / 0.4 = 0.25
        for transform in (eval_transform(GREY), train_transform(GREY, hflip=0.5, min_crop=0.5)):
            torch.testing.assert_close(transform(image), torch.full((1, 8, 8), 0.25))
