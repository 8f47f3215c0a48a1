import math

import pytest
import torch

from diffusers_vsdm.metrics.transport import (
    normalized_path_energy,
    path_energy,
    pmf_distance,
    sliced_wasserstein1,
    straightness,
    wasserstein2,
)


def paths(function, n=101):
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    start = torch.randn(50, 2, dtype=torch.float64)
    return torch.stack([function(x, start) for x in t])


def test_straight_lines_have_no_curvature():
    assert straightness(paths(lambda t, x: x + t * torch.tensor([3.0, -2.0]).double()), 0.01).abs().max() < 1e-9


def test_parabolas_have_their_second_derivative():
    value = straightness(paths(lambda t, x: x + t**2 * torch.tensor([1.5, -4.0]).double()), 0.01)
    torch.testing.assert_close(value, torch.tensor([3.0, 8.0], dtype=torch.float64))


def test_sine_has_its_mean_absolute_second_derivative():
    value = straightness(paths(lambda t, x: x + torch.sin(2 * math.pi * t), 2001), 1 / 2000)
    # mean of |4 pi^2 sin| over a period
    assert value.tolist() == pytest.approx([8 * math.pi] * 2, rel=1e-3)


def test_bad_trajectories():
    with pytest.raises(ValueError, match="num_times"):
        straightness(torch.zeros(2, 5, 2), 0.1)
    with pytest.raises(ValueError, match="step"):
        straightness(torch.zeros(5, 5, 2), 0.0)


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(300, 3)
    shift = torch.tensor([3.0, 0.0, -4.0])
    assert wasserstein2(x[torch.randperm(300)] + shift, x) == pytest.approx(5.0, rel=1e-5)
    assert wasserstein2(x, x) == pytest.approx(0.0, abs=1e-6)


def test_wasserstein_in_one_dimension_is_the_sorted_distance():
    x, y = torch.randn(400, 1).double(), 2 * torch.randn(400, 1).double() + 1
    expected = (x.sort(0).values - y.sort(0).values).square().mean().sqrt()
    assert wasserstein2(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_wasserstein_takes_different_sizes():
    # two points against three: mass 1/3 each way, by hand
    assert wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.5], [1.0]])) == pytest.approx(
        math.sqrt(2 * 0.25 / 6)
    )


def test_wasserstein_of_gaussians_approaches_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=generator)
    y = torch.randn(2000, 2, generator=generator) * torch.tensor([2.0, 1.0]) + torch.tensor([1.0, 0.0])
    assert wasserstein2(x, y) == pytest.approx(math.sqrt(2.0), rel=0.05)


def test_standardizing_removes_the_units():
    x, y = torch.randn(200, 2), torch.randn(200, 2) + 1
    scale = torch.tensor([1.0, 50.0])
    assert wasserstein2(x * scale, y * scale, standardize=True) == pytest.approx(
        wasserstein2(x, y, standardize=True), rel=1e-5
    )


def test_bad_samples():
    with pytest.raises(ValueError, match="NaN"):
        wasserstein2(torch.full((5, 2), float("nan")), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="do not match"):
        wasserstein2(torch.zeros(5, 2), torch.zeros(5, 3))


def test_energy_of_straight_lines_is_their_squared_length():
    straight = paths(lambda t, x: x + t * torch.tensor([3.0, -4.0]).double())
    assert path_energy(straight, 0.01) == pytest.approx(25)
    assert normalized_path_energy(straight, 0.01) < 1e-9


def test_energy_of_a_detour():
    """A half circle: the same ends, and pi^2 / 4 times the energy."""

    def half_circle(t, x):
        angle = math.pi * torch.as_tensor(t)
        return x + torch.stack([1 - angle.cos(), angle.sin()])

    assert normalized_path_energy(paths(half_circle, 1001), 0.001) == pytest.approx(math.pi**2 / 4 - 1, rel=1e-3)


def test_energy_sees_the_clock():
    uneven = paths(lambda t, x: x + t**2 * torch.tensor([1.0, 0.0]).double(), 2001)
    assert path_energy(uneven, 1 / 2000) == pytest.approx(4 / 3, rel=1e-3)
    assert path_energy(uneven) == pytest.approx(1) and normalized_path_energy(uneven) < 1e-9
    with pytest.raises(ValueError, match="step"):
        path_energy(uneven, 0.0)


def test_sliced_distance_of_a_shift():
    """The mean over directions of |<direction, shift>|: 2 |shift| / pi in the plane."""
    x = torch.randn(400, 2)
    value = sliced_wasserstein1(x[torch.randperm(400)] + torch.tensor([3.0, -4.0]), x, num_projections=5000)
    assert value == pytest.approx(10 / math.pi, rel=0.03)


def test_pmf_distance_of_disjoint_and_equal_laws():
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    assert pmf_distance(x, x, bins=10) == 0
    # a half in each of two cells against a half in each of two others
    assert pmf_distance(x * torch.tensor([1.0, -1.0]), x, bins=10) == pytest.approx((4 * 0.25 / 100) ** 0.5)
    one, other = torch.randn(2, 5000, 2)
    assert pmf_distance(one, other) == pytest.approx((2 / 5000) ** 0.5 / 100, rel=0.1)
    far = one + torch.tensor([100.0, 0.0])
    assert pmf_distance(far, other) > 3 * pmf_distance(one, other)
    with pytest.raises(ValueError, match="plane"):
        pmf_distance(torch.zeros(3, 3), torch.zeros(3, 3))
