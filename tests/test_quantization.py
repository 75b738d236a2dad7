import pytest
import torch

from dfs_cli.nn.quantization import best_step, code_range, fake_quantize, quantize_codes, route_gradient


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


def test_best_step_of_zeros_is_positive() -> None:
    assert (best_step(torch.zeros(2, 3), 4, signed=False) > 0).all()


def test_route_gradient_is_the_first_order_effect_of_the_other_options() -> None:
    x = torch.tensor([[0.3, 0.8], [0.1, 0.6]])
    steps = torch.tensor([0.5, 0.1])
    quantized = quantize_codes(x, steps[0], 0, 3) * steps[0]
    probs = torch.full((2, 4), 0.25, requires_grad=True)
    # Options: 0 skip, 1 the one taken (step 0.5), 2 with step 0.1, 3 full precision.
    out = route_gradient(quantized, x, steps, probs, ((2, 1, 0, 15), (3, None, 0, 0)))
    assert torch.equal(out, quantized)
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out.backward(grad)
    fine = quantize_codes(x, steps[1], 0, 15) * steps[1]
    expected = torch.zeros(2, 4)
    expected[:, 2] = (grad * (fine - quantized)).sum(1)
    expected[:, 3] = (grad * (x - quantized)).sum(1)
    torch.testing.assert_close(probs.grad, expected)
