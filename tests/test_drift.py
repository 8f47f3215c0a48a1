import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift


def test_is_neutral_at_birth_and_float64_whatever_the_cast():
    drift = AdaptiveDiagonalDrift((3, 4, 4), (3, 1, 1))
    assert drift.is_neutral and drift.lam.shape == (3, 1, 1) and drift.data_variance.shape == (3, 4, 4)
    drift.set_lambda(1 / 3)
    for cast in (drift.half(), drift.to(torch.bfloat16), drift.float()):
        assert cast.lam.dtype == torch.float64 and float(cast.lam[0, 0, 0]) == 1 / 3


@pytest.mark.parametrize("lambda_shape", [(2,), (3, 1), (1, 2, 1), (3, 1, 1, 1)])
def test_lambda_that_does_not_broadcast_is_refused(lambda_shape):
    with pytest.raises(ValueError, match="lambda_shape"):
        AdaptiveDiagonalDrift((3, 4, 4), lambda_shape)


@pytest.mark.parametrize("value", [-1.0, -1e-30, float("nan"), float("inf"), [1.0, -2.0]])
def test_lambda_that_is_negative_or_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="finite and not negative"):
        AdaptiveDiagonalDrift((2,)).set_lambda(torch.tensor(value))


def test_lambda_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="does not broadcast"):
        AdaptiveDiagonalDrift((2,)).set_lambda(torch.ones(3))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.sampled_from([0.0, 1.0, 3.0]))
def test_averages_are_the_weighted_means_of_the_iterates(directions, power):
    drift = AdaptiveDiagonalDrift((1,), ema_decay=0.8, averaging_power=power)
    iterates = []
    for direction in directions:
        drift.step(torch.tensor([direction], dtype=torch.float64), 0.5)
        iterates.append(float(drift.lam))
    np.testing.assert_allclose(iterates, np.exp(0.5 * np.cumsum(directions)), rtol=1e-12)
    weights = np.array([1.0])
    for k in range(2, len(iterates) + 1):
        new = (1 + power) / (k + power)
        weights = np.append((1 - new) * weights, new)
    np.testing.assert_allclose(float(drift.average("polyak")), weights @ iterates, rtol=1e-10)
    if power == 0:
        np.testing.assert_allclose(float(drift.average("polyak")), np.mean(iterates), rtol=1e-10)
    ema = 1.0
    for value in iterates:
        ema = 0.8 * ema + 0.2 * value
    np.testing.assert_allclose(float(drift.average("ema")), ema, rtol=1e-10)
    assert int(drift.num_updates) == len(directions)


def test_no_step_leaves_the_positive_numbers():
    drift = AdaptiveDiagonalDrift((2,))
    drift.step(torch.tensor([-1e4, 1e4]).double(), 1.0)
    assert (drift.lam > 0).all() and drift.lam.isfinite().all()


def test_moments_are_the_datas(tmp_path):
    data = torch.randn(1000, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    drift = AdaptiveDiagonalDrift((3,))
    drift.fit_moments(data)
    np.testing.assert_allclose(drift.data_mean, data.double().numpy().mean(0), rtol=1e-10)
    np.testing.assert_allclose(drift.data_variance, data.double().numpy().var(0, ddof=1), rtol=1e-10)
    data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        drift.fit_moments(data)
    with pytest.raises(ValueError, match="shape"):
        drift.fit_moments(torch.randn(10, 4))


def make_drift():
    drift = AdaptiveDiagonalDrift((2, 3, 3), (2, 1, 1), ema_decay=0.5)
    drift.fit_moments(torch.randn(50, 2, 3, 3))
    drift.step(torch.tensor([0.3, -0.2]).reshape(2, 1, 1).double(), 0.7)
    return drift


def same(a, b):
    return all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.buffers(), b.buffers(), strict=True)
    ) and dict(a.config) == dict(b.config)


def test_file_round_trip_is_exact_and_deterministic(tmp_path):
    drift = make_drift()
    drift.save_file(tmp_path / "deep" / "drift.safetensors")
    loaded = AdaptiveDiagonalDrift.load_file(tmp_path / "deep" / "drift.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(drift.buffers(), loaded.buffers(), strict=True))
    assert loaded.config["ema_decay"] == 0.5
    assert drift.to_bytes() == loaded.to_bytes() and drift.digest() == loaded.digest()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["drift.safetensors"]


def test_diffusers_round_trip_ignores_a_dtype(tmp_path):
    drift = make_drift()
    drift.save_pretrained(tmp_path)
    for kwargs in ({}, {"dtype": torch.float16}):
        loaded = AdaptiveDiagonalDrift.from_pretrained(tmp_path, **kwargs)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(drift.buffers(), loaded.buffers(), strict=True)
        )


@given(cut=st.integers(0, 1000), flip=st.integers(0, 200))
def test_damaged_files_are_refused(cut, flip, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "drift.safetensors"
    content = make_drift().to_bytes()
    path.write_bytes(content[: min(cut, len(content) - 1)])
    with pytest.raises(ValueError, match="damaged"):
        AdaptiveDiagonalDrift.load_file(path)
    damaged = bytearray(content)
    damaged[flip] ^= 0xFF  # in the header
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="damaged"):
        AdaptiveDiagonalDrift.load_file(path)


def test_a_file_with_impossible_numbers_is_refused(tmp_path):
    for name, value in (("data_mean", float("nan")), ("lam_ema", -1.0)):
        drift = make_drift()
        getattr(drift, name).fill_(value)
        drift.save_file(tmp_path / "drift.safetensors")
        with pytest.raises(ValueError, match="not finite, or a negative lambda"):
            AdaptiveDiagonalDrift.load_file(tmp_path / "drift.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        AdaptiveDiagonalDrift.load_file(tmp_path / "drift.safetensors")
