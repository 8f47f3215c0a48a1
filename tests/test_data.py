import math

import pytest
import torch

from diffusers_vsdm.data import TOYS, sample_toy


def draw(name, n=50_000, seed=0):
    return sample_toy(name, n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TOYS)
def test_is_reproducible_and_finite(name):
    points = draw(name, 1000)
    assert points.shape == (1000, 2) and points.dtype == torch.float32 and points.isfinite().all()
    assert torch.equal(points, draw(name, 1000)) and not torch.equal(points, draw(name, 1000, seed=1))


@pytest.mark.parametrize("name, std", [("spiral-8y", (2.09, 18.7)), ("checkerboard-6x", (21.8, 3.63))])
def test_papers_toys_have_the_published_spread(name, std):
    assert draw(name).std(0).tolist() == pytest.approx(std, rel=0.02)


def test_checkerboard_stays_on_its_cells():
    points = draw("checkerboard")
    assert (points.sin().prod(1) <= 1e-5).all() and points.abs().max() <= 2 * math.pi + 1e-5
    # all eight cells of that colour, evenly
    cells = (points / math.pi + 2).floor().clamp(0, 3) @ torch.tensor([4.0, 1.0])
    counts = cells.unique(return_counts=True)[1]
    assert len(counts) == 8 and (counts - 50_000 / 8).abs().max() < 4 * math.sqrt(50_000 / 8)


def test_spiral_winds_around():
    points = draw("spiral") / 0.4
    radius = points.norm(dim=1)
    angle = torch.atan2(points[:, 1], points[:, 0])
    # r = theta + pi up to the noise, whatever the number of turns
    turns = (radius - math.pi - angle) / (2 * math.pi)
    near = radius > 2
    assert ((turns - turns.round())[near].abs() * 2 * math.pi).median() < 0.25
    assert radius.max() < 3.5 * math.pi + 1.5


def test_gaussian_is_that_of_the_bridge():
    points = draw("gaussian", 200_000)
    assert points.mean(0).tolist() == pytest.approx([-8, 2], abs=0.03)
    torch.testing.assert_close(points.T.cov(), torch.tensor([[1.0, 1.0], [1.0, 5.0]]), rtol=0.03, atol=0)


def test_eight_gaussians_have_eight_even_modes():
    points = draw("8gaussians")
    mode = (torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)).round() % 8
    counts = mode.unique(return_counts=True)[1]
    assert len(counts) == 8 and (counts - 50_000 / 8).abs().max() < 4 * math.sqrt(50_000 / 8)
    assert points.norm(dim=1).mean() == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("name", ["moons", "swissroll"])
def test_is_centred_and_of_a_few_units(name):
    points = draw(name)
    assert points.mean(0).abs().max() < 0.5 and 0.5 < points.std(0).min() and points.std(0).max() < 3


def test_bad_requests():
    with pytest.raises(ValueError, match="one of the toy data sets.*spiral-8y.*got 'mnist'"):
        sample_toy("mnist", 10)
    with pytest.raises(ValueError, match="`n`"):
        sample_toy("moons", 0)
