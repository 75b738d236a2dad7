import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import MakeFolder, solid_image
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageDataset
from torch import nn

from dfs_cli.config import DataConfig, Preprocessing
from dfs_cli.data.classes import check_class_count
from dfs_cli.data.digits import Digits
from dfs_cli.data.images import Images, Unreadable, UnreadableLog, collate
from dfs_cli.data.loading import EpochSampler, choose_workers, eval_loader, train_loader
from dfs_cli.data.preprocessing import eval_transform, resolve_preprocessing, train_transform
from dfs_cli.data.splits import open_splits, open_validation
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
    assert len(splits.train) + len(splits.calibration) == 50 and 1 <= len(splits.calibration) <= 10
    assert len(splits.validation) == 50
    assert [splits.train.note, splits.validation.note] == [
        f"training: 50 images of 10 classes in {root / 'train'}",
        f"validation: 50 images of 10 classes in {root / 'val'}",
    ]
    assert splits.class_names == NAMES
    assert not set(splits.train.indices) & set(splits.calibration.indices)
    again = open_splits(DataConfig(data_dir=str(root)), GREY)
    assert list(again.calibration.indices) == list(splits.calibration.indices)
    image, target = splits.validation[0]
    assert isinstance(image, torch.Tensor) and image.shape == (1, 8, 8) and target == 0


def test_an_image_is_held_out_whichever_others_are_there(make_folder: MakeFolder) -> None:
    root = make_folder(per_class=12)

    def held_out() -> set[str]:
        splits = open_splits(DataConfig(data_dir=str(root)), GREY, seed=3)
        assert not set(splits.train.names()) & set(splits.calibration.names())
        return set(splits.calibration.names())

    before = held_out()
    assert 6 <= len(before) <= 18, "about a tenth of 120"
    gone = {str(path.relative_to(root / "train")) for path in list((root / "train").rglob("*.jpg"))[::3]}
    for path in gone:
        (root / "train" / path).unlink()
    assert held_out() == before - gone
    for i in range(40):
        solid_image(root / "train" / "3" / f"new{i}.png")
    assert {name for name in held_out() if "new" not in name} == before - gone


def test_a_sample_is_the_same_whichever_folder_it_is_in(make_folder: MakeFolder) -> None:
    first, second = make_folder("one", per_class=5), make_folder("two", per_class=5)
    config = DataConfig(data_dir=str(first), num_samples=20)
    samples = [open_validation(c, GREY, NAMES).names() for c in (config, config.replace(data_dir=str(second)))]
    assert samples[0] == samples[1] and len(samples[0]) == 20
    assert set(open_validation(config.replace(num_samples=10), GREY, NAMES).names()) < set(samples[0])


def test_class_map(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(classes=3)
    (tmp_path / "map.txt").write_text("2\n0\nnine\n1\n")
    config = DataConfig(data_dir=str(root), class_map=str(tmp_path / "map.txt"))
    splits = open_splits(config, GREY)
    assert splits.class_names == ("2", "0", "nine", "1")
    images = open_validation(config, GREY, ("w", "x", "y", "z"))
    assert {(name[0], s[1]) for i, name in enumerate(images.names()) if not isinstance(s := images[i], Unreadable)} == {
        ("2", 0), ("0", 1), ("1", 3),
    }  # fmt: skip
    with pytest.raises(DataError, match=r"4 classes .* 10"):
        open_validation(config, GREY, NAMES)
    (tmp_path / "map.txt").write_text("0\n1\n")
    note = open_validation(config, GREY, ("x", "y")).note
    first = min((root / "val" / "2").iterdir(), key=lambda path: int(path.stem)).name
    assert note == f"validation: 8 images of 2 classes in {root / 'val'}; left out: 4 of class '2', as 2/{first}"
    for content, reason in (
        ("a\nb\na\n", "each index from 0 on one name"),
        ("", "each index"),
        (None, "cannot be read"),
    ):
        if content is None:
            (tmp_path / "map.txt").unlink()
        else:
            (tmp_path / "map.txt").write_text(content)
        with pytest.raises(DataError, match=reason):
            open_splits(config, GREY)
    with pytest.raises(ConfigError, match="class-map"):
        open_splits(DataConfig(dataset="digits", class_map="map.txt"), GREY)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "test"])
def test_validation_folder_names(name: str, make_folder: MakeFolder) -> None:
    root = make_folder(splits=("train", name))
    assert len(open_validation(DataConfig(data_dir=str(root)), GREY, NAMES)) == 40
    assert len(open_validation(DataConfig(data_dir=str(root / name)), GREY, NAMES)) == 40


def test_named_splits_and_sample_limit(make_folder: MakeFolder) -> None:
    root = make_folder(splits=("fit", "check"), per_class=5)
    config = DataConfig(data_dir=str(root), train_split="fit", val_split="check", num_samples=30)
    splits = open_splits(config, GREY)
    assert len(splits.train) + len(splits.calibration) == len(splits.validation) == 30
    targets = [s[1] for i in range(30) if not isinstance(s := splits.validation[i], Unreadable)]
    assert len(set(targets)) > 5, "a sample is drawn from all classes"


def test_validation_classes_are_mapped_by_name(make_folder: MakeFolder) -> None:
    root = make_folder(classes=4, splits=("val",))
    names = ("2", "3", "0", "1")
    images = open_validation(DataConfig(data_dir=str(root)), GREY, names)
    folders = [Path(images.source.filename(i)).parts[0] for i in range(len(images))]
    targets = [s[1] for i in range(len(images)) if not isinstance(s := images[i], Unreadable)]
    assert len(targets) == 16 and [names[t] for t in targets] == folders
    with pytest.raises(DataError, match="no images of class 'x', one of 5"):
        open_validation(DataConfig(data_dir=str(root)), GREY, (*names, "x"))


def test_bad_folders_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    cases = {
        "does not exist": tmp_path / "none",
        "is not a folder": tmp_path / "file",
        "no images in class folders": tmp_path / "empty",
        "one class": make_folder("one", classes=1),
    }
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    (tmp_path / "file").write_text("")
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
    assert len(splits.train) + len(splits.calibration) == 100 and len(splits.validation) == 20
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


@pytest.mark.parametrize(
    "error", [RuntimeError("no AVIF\nhere"), IndexError("index"), NotImplementedError("DDS"), MemoryError()]
)
def test_whatever_decoding_raises_is_an_unreadable_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = Digits("validation")

    def broken(index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise error
        return Image.fromarray(digits.pixels[index]), 0

    monkeypatch.setattr(Digits, "__getitem__", lambda self, index: broken(index))
    batch = collate([Images(digits, eval_transform(GREY))[i] for i in range(3)])
    assert len(batch.targets) == 2 and batch.unreadable[0].name == "image 1"
    assert batch.unreadable[0].reason == (str(error).replace("\n", r"\n") or "MemoryError")


def test_an_image_that_cannot_be_resized_is_unreadable() -> None:
    def refuse(image: Image.Image) -> torch.Tensor:  # noqa: ARG001
        raise ValueError("height and width must be > 0")

    assert Images(Digits("validation"), refuse)[0] == Unreadable("image 0", "height and width must be > 0")


@pytest.mark.parametrize(
    ("free", "wanted", "workers"), [(1 << 30, None, 2), (1 << 30, 3, 3), (1 << 10, None, 0), (0, 0, 0)]
)
def test_workers_need_shared_memory(
    free: int, wanted: int | None, workers: int, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_validation(DataConfig(data_dir=str(make_folder())), GREY, NAMES)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    told: list[str] = []
    assert choose_workers(wanted, images, GREY, 256, told.append) == workers
    assert len(told) == (free < 1 << 30 and wanted is None)
    # 40 images of 8x8 numbers of 4 bytes; two workers hold two batches each, and one is in use.
    needed = 40 * 8 * 8 * 4 * 5
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DataError, match="--workers 0"):
        choose_workers(2, images, GREY, 256)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    assert choose_workers(2, images, GREY, 256) == 2


@pytest.mark.medium
def test_a_worker_that_dies_is_one_line() -> None:
    def die(image: Image.Image) -> torch.Tensor:  # noqa: ARG001
        os._exit(1)

    with pytest.raises(DataError, match=r"a process that loads images died: .*--workers 0"):
        list(eval_loader(Images(Digits("validation"), die), 16, 1))


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
    with Image.open(tmp_path / "x.png") as image:
        # (102 / 255 - 0.3) / 0.4 = 0.25
        for transform in (eval_transform(GREY), train_transform(GREY, hflip=0.5, min_crop=0.5)):
            torch.testing.assert_close(transform(image), torch.full((1, 8, 8), 0.25))
