import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.observer import Observer
from dfs_cli.synthesis import splits
from dfs_cli.synthesis.cache import cache_folder
from dfs_cli.synthesis.distil import Stage
from dfs_cli.synthesis.splits import SyntheticImages, make_images, synthetic_splits
from dfs_cli.synthesis.work import Work

CPU = torch.device("cpu")
WORK = Work(4, 4, (Stage((8, 8), 1, 4),), 1, 1.0, amp=False)


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def make(model: nn.Module, observer: Observer, seed: int = 0, work: Work = WORK) -> Tensor:
    return make_images(model, resolve_preprocessing(model), work, seed, CPU, observer)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_cache")
def test_images_are_kept_for_the_same_weights_and_settings(
    digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, observer = make(digits_model, Observer()), Notes()
    monkeypatch.setattr(splits, "distil", None)  # calling it is an error
    again = make(digits_model, observer)
    assert torch.equal(again, made)
    assert observer.notes and "made before" in observer.notes[0]
    with pytest.raises(TypeError):
        make(digits_model, Observer(), seed=1)
    with pytest.raises(TypeError):
        make(digits_model, Observer(), work=WORK._replace(images=5))
    with torch.no_grad():
        digits_model.get_parameter("fc.bias")[0] += 1
        with pytest.raises(TypeError):
            make(digits_model, Observer())
        digits_model.get_parameter("fc.bias")[0] -= 1


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_made_again(content: bytes | None, digits_model: nn.Module) -> None:
    made = make(digits_model, Observer())
    (file,) = cache_folder().glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if content is None else content)
    assert torch.equal(make(digits_model, Observer()), made)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing(
    digits_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert make(digits_model, Observer()).shape == (4, 1, 8, 8)


def test_splits_show_the_pixels_that_were_made_with_the_originals_answers(digits_model: nn.Module) -> None:
    pixels = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    preprocessing = resolve_preprocessing(digits_model)
    # The model's own crop of photographs must not crop what has the right size.
    made = synthetic_splits(digits_model, preprocessing.replace(crop_pct=0.5), pixels, CPU)
    image, target = made.train[1]
    expected = (pixels[1] / 255 - preprocessing.mean[0]) / preprocessing.std[0]
    assert isinstance(image, torch.Tensor)
    torch.testing.assert_close(image, expected)
    with torch.inference_mode():
        assert target == int(digits_model(expected[None]).argmax())
    assert len(made.calibration) == len(made.validation) == 3 and len(made.class_names) == 10


@pytest.mark.parametrize("channels", [1, 3])
def test_images_can_be_looked_at(channels: int, tmp_path: Path) -> None:
    pixels = torch.randint(256, (70, channels, 8, 8), dtype=torch.uint8)
    images = SyntheticImages(pixels)
    images.targets = np.arange(70) % 2
    images.save(tmp_path)
    assert len(list(tmp_path.glob("0/*.png"))) == 35
    with Image.open(tmp_path / "1" / "00001.png") as saved:
        read = torch.from_numpy(np.array(saved)).reshape(8, 8, channels).permute(2, 0, 1)
    assert torch.equal(read, pixels[1])
    with Image.open(io.BytesIO(images.sheet())) as sheet:
        assert sheet.size == (8 * 10 + 2, 8 * 10 + 2)  # eight by eight, two pixels between them
