import copy

import pytest
import torch
from torch import Tensor, nn

from dfs_cli.config import Preprocessing
from dfs_cli.data.preprocessing import resolve_preprocessing
from dfs_cli.synthesis.distil import Stage, distil, draw_targets, noise, roughness
from dfs_cli.synthesis.moments import Moments

CPU = torch.device("cpu")
STAGES = (Stage((8, 8), 60, 32),)


def make(model: nn.Module, images: int = 32, seed: int = 0, stages: tuple[Stage, ...] = STAGES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return distil(model, resolve_preprocessing(model), images, stages, generator, CPU)


@pytest.fixture(scope="module")
def made(digits_model: nn.Module) -> Tensor:
    return make(digits_model)


def shown(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (images / 255 - mean) / std


@torch.inference_mode()
def far(model: nn.Module, images: Tensor) -> float:
    """How far statistics are from those that are remembered."""
    with Moments(model) as moments:
        model(shown(images, resolve_preprocessing(model)))
        return float(moments.take())


@pytest.mark.medium
def test_images_come_closer_to_what_is_remembered_than_noise(digits_model: nn.Module, made: Tensor) -> None:
    preprocessing = resolve_preprocessing(digits_model)
    gaussian = noise(32, preprocessing, torch.Generator().manual_seed(0))
    assert far(digits_model, made) < 0.5 * far(digits_model, gaussian)


@pytest.mark.medium
def test_images_are_of_the_class_that_they_were_made_for_far_more_often_than_by_chance(
    digits_model: nn.Module, made: Tensor
) -> None:
    with torch.inference_mode():
        answers = digits_model(shown(made, resolve_preprocessing(digits_model))).argmax(dim=1)
    targets, _ = draw_targets(32, 10, torch.Generator().manual_seed(0))  # drawn first
    assert float((answers == targets).float().mean()) > 0.4


@pytest.mark.medium
def test_the_same_seed_gives_the_same_images_and_the_network_stays_as_it_was(
    digits_model: nn.Module, made: Tensor
) -> None:
    before = copy.deepcopy(digits_model.state_dict())
    again, other = make(digits_model), make(digits_model, seed=1)
    assert torch.equal(again, made)
    assert not torch.equal(other, made)
    assert all(torch.equal(before[name], tensor) for name, tensor in digits_model.state_dict().items())
    assert all(parameter.requires_grad for parameter in digits_model.parameters())


def test_images_of_several_batches_and_sizes_have_the_size_of_the_last_stage(digits_model: nn.Module) -> None:
    steps: list[int] = []
    stages = (Stage((4, 4), 2, 8), Stage((8, 8), 1, 3))
    generator = torch.Generator().manual_seed(0)
    made = distil(digits_model, resolve_preprocessing(digits_model), 8, stages, generator, CPU, advance=steps.append)
    assert made.shape == (8, 1, 8, 8) and made.dtype == torch.uint8
    assert steps == [8, 8, 3, 3, 2]


def test_targets_have_each_class_alike_and_another_one_besides() -> None:
    targets, wanted = draw_targets(40, 10, torch.Generator().manual_seed(0))
    assert torch.equal(targets.bincount(), torch.full((10,), 4))
    assert torch.allclose(wanted.sum(dim=1), torch.ones(40))
    assert torch.equal(wanted.argmax(dim=1), targets)
    assert ((wanted > 0).sum(dim=1) == 2).all() and float(wanted.amax(dim=1).min()) >= 0.5


def test_noise_has_the_statistics_of_pixels() -> None:
    preprocessing = Preprocessing((3, 32, 32), (3, 32, 32), "bicubic", 1.0, "center", (0.5,) * 3, (0.1,) * 3)
    made = noise(64, preprocessing, torch.Generator().manual_seed(0))
    pixels = made.double() / 255
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.01) and float(pixels.std()) == pytest.approx(0.1, abs=0.01)


def test_roughness_is_the_mean_squared_step_between_neighbours() -> None:
    ramp = torch.arange(4.0).repeat(4, 1)[None, None]
    assert float(roughness(ramp)) == 1.0
    assert float(roughness(3 * ramp.mT)) == 9.0
