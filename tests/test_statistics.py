import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vsdm import AdaptiveDiagonalDrift, DataNormalizer, VSDMScheduler
from diffusers_vsdm.statistics import Moments


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 2**31))
def test_moments_of_batches_are_those_of_the_whole(sizes, offset, seed):
    data = torch.randn((sum(sizes), 2, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    moments = Moments(batch for batch in data.split(sizes))
    for shape in ((2, 3), (2, 1), (1, 1)):
        pooled = tuple(i + 1 for i, size in enumerate(shape) if size == 1 and data.shape[i + 1] > 1)
        mean, variance = moments.pooled(shape)
        expected = (data.numpy().mean((0, *pooled)), data.numpy().var((0, *pooled), ddof=1))
        np.testing.assert_allclose(mean.squeeze(), np.squeeze(expected[0]), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(variance.squeeze(), np.squeeze(expected[1]), rtol=1e-7)


def test_a_drift_takes_batches_too():
    data = torch.randn(40, 3, 4, 4)
    whole, parts = AdaptiveDiagonalDrift((3, 4, 4)), AdaptiveDiagonalDrift((3, 4, 4))
    whole.fit_moments(data)
    parts.fit_moments(data.split(7))
    torch.testing.assert_close(whole.data_mean, parts.data_mean)
    torch.testing.assert_close(whole.data_variance, parts.data_variance)
    turned = AdaptiveDiagonalDrift((3, 4, 4), basis="dct")
    turned.fit_moments(data.split(7))
    # any rotation conserves what all coordinates vary together
    torch.testing.assert_close(turned.data_variance.sum(), whole.data_variance.sum())


def test_what_is_no_batch_is_refused():
    data = torch.randn(20, 3)
    torch.testing.assert_close(DataNormalizer.from_data(data.numpy()).mean, DataNormalizer.from_data(data).mean)
    with pytest.raises(ValueError, match="`torch.stack`"):
        DataNormalizer.from_data(list(data))
    with pytest.raises(TypeError, match="a batch that is a tuple"):
        DataNormalizer.from_data([(data, torch.zeros(20))])
    with pytest.raises(ValueError, match="empty"):
        VSDMScheduler().fit_moments([])
