import pytest
import torch

from dfs_cli.nn.gradients import OtherOptions, fake_quantize, normalise_quantized, quantized_convolution
from dfs_cli.nn.pieces import dots
from dfs_cli.nn.quantization import Convolution, best_step, code_range, quantize_codes


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(2, True, (-1, 1)), (2, False, (0, 3)), (8, True, (-127, 127)), (8, False, (0, 255)), (16, False, (0, 65535))],
)
def test_code_range(bits: int, signed: bool, expected: tuple[int, int]) -> None:
    assert code_range(bits, signed) == expected


def test_codes_by_hand() -> None:
    x = torch.tensor([-1.0, -0.3, 0.0, 0.24, 0.26, 0.74, 10.0])
    # Multiples of 0.5 between -1 and 1; 0.24 rounds down, 0.26 up, 10 is clipped.
    assert quantize_codes(x, torch.tensor(0.5), -2, 2).tolist() == [-2, -1, 0, 0, 1, 1, 2]


def test_gradients_are_those_of_lsq() -> None:
    x = torch.tensor([-5.0, -0.6, 0.2, 0.9, 7.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, step, -2, 2)
    assert y.tolist() == [-1.0, -0.5, 0.0, 1.0, 1.0]
    y.sum().backward()
    assert x.grad is not None and step.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    # Clipped below: -2; above: 2; inside: round(v/s) - v/s = (-1 + 1.2) + (0 - 0.4) + (2 - 1.8).
    assert step.grad.item() == pytest.approx(-2 + 2 + 0.2 - 0.4 + 0.2, abs=1e-6)


def test_step_gradient_per_channel_is_summed_to_its_shape() -> None:
    weight = torch.randn(4, 3, 2, 2)
    step = torch.full((4, 1, 1, 1), 0.3, requires_grad=True)
    fake_quantize(weight, step, -7, 7).sum().backward()
    assert step.grad is not None and step.grad.shape == step.shape
    alone = torch.full((1,), 0.3, requires_grad=True)
    fake_quantize(weight[2], alone, -7, 7).sum().backward()
    assert alone.grad is not None
    assert step.grad[2].item() == pytest.approx(alone.grad.item(), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_best_step_is_no_worse_than_covering_the_range(bits: int) -> None:
    x = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    low, high = code_range(bits, signed=True)
    step = best_step(x, bits, signed=True)
    assert step.shape == (5, 1)

    def error(s: torch.Tensor) -> torch.Tensor:
        return (quantize_codes(x, s, low, high) * s - x).square().sum(1)

    covering = x.abs().amax(1, keepdim=True) / high
    assert (error(step) <= error(covering) * 1.001).all()  # rounding of 16-bit sums
    if bits == 2:
        assert (step < covering).all()


@pytest.mark.parametrize(("images", "size"), [(3, 4), (3, 200), (0, 4), (0, 200)])
def test_dot_products_of_each_image(images: int, size: int) -> None:
    a, b = torch.randn(2, images, 1, size, size, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(dots(a, b), (a * b).sum(dim=(1, 2, 3)))


def test_best_step_of_zeros_is_positive() -> None:
    assert (best_step(torch.zeros(2, 3), 4, signed=False) > 0).all()


GEOMETRY = Convolution((1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("unit", [None, 0.0625])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 15), (-7, 7)])
def test_quantized_convolution_has_the_gradients_of_its_parts(
    channels_last: bool, low: int, high: int, unit: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, 6, generator=generator)
    x = x.relu() if low == 0 else x
    step = None if unit is None else torch.tensor(unit)
    if step is not None:  # codes, which are kept as bytes
        x = (x / step).round() * step
    weight = torch.randn(5, 4, 3, 3, generator=generator)
    direction = torch.randn(3, 5, 6, 6, generator=generator)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    results = []
    for apart in (True, False):
        own = [t.clone().requires_grad_() for t in (x, torch.tensor(0.11), weight)]
        if apart:
            y = torch.nn.functional.conv2d(fake_quantize(own[0], own[1], low, high), own[2], padding=1)
        else:
            y = quantized_convolution(own[0], own[1], (low, high), own[2], GEOMETRY, None, step, low < 0)
        y.backward(direction)
        results.append([y, *(t.grad for t in own)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_gate_hears_the_first_order_effect_of_the_other_options() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 4, generator=generator)
    steps = torch.tensor([0.5, 0.1])
    weight = torch.randn(2, 3, 1, 1, generator=generator)
    probs = torch.full((2, 4), 0.25, requires_grad=True)
    # Options: 0 skip, 1 the one taken (step 0.5), 2 with step 0.1, 3 full precision.
    others = OtherOptions(probs, steps, ((2, 1, 0, 15), (3, None, 0, 0)), scale=2.0)
    y = quantized_convolution(x, steps[0], (0, 3), weight, Convolution((1, 1), (0, 0), (1, 1), 1), others)
    quantized = quantize_codes(x, steps[0], 0, 3) * steps[0]
    torch.testing.assert_close(y, torch.nn.functional.conv2d(quantized, weight))
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)
    at_input = torch.nn.functional.conv_transpose2d(grad, weight)
    fine = quantize_codes(x, steps[1], 0, 15) * steps[1]
    expected = torch.zeros(2, 4)
    expected[:, 2] = 2 * (at_input * (fine - quantized)).sum((1, 2, 3))
    expected[:, 3] = 2 * (at_input * (x - quantized)).sum((1, 2, 3))
    torch.testing.assert_close(probs.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 255)])
def test_quantized_normalisation_has_the_gradients_of_its_parts(low: int, high: int) -> None:
    torch.manual_seed(0)
    x, mean, variance = torch.randn(4, 5, 6, 7), torch.randn(5), torch.rand(5) + 0.5
    leaves = [x, torch.randn(5), torch.randn(5), torch.tensor(0.02)]
    grad, results, gradients = torch.randn_like(x), [], []
    for fused in (True, False):
        x, weight, bias, step = (leaf.clone().requires_grad_() for leaf in leaves)
        if fused:
            y = normalise_quantized(x, (mean, variance, weight, bias), 1e-5, step, low, high)
        else:
            y = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, eps=1e-5)
            y = fake_quantize(y, step, low, high)
        y.backward(grad)
        results.append(y.detach())
        gradients.append([leaf.grad for leaf in (x, weight, bias, step)])
    assert torch.equal(*results)
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
