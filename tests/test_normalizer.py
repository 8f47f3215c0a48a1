import pytest
import torch

from diffusers_vsdm import DataNormalizer


def test_standardizes_and_inverts(tmp_path):
    data = torch.randn(5000, 2) * torch.tensor([2.0, 19.0]) + torch.tensor([1.0, -7.0])
    normalizer = DataNormalizer.from_data(data)
    z = normalizer.normalize(data)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(normalizer.denormalize(z), data, rtol=1e-5, atol=1e-4)
    normalizer.save_pretrained(tmp_path)
    loaded = DataNormalizer.from_pretrained(tmp_path, dtype=torch.float16)
    assert torch.equal(loaded.mean, normalizer.mean) and torch.equal(loaded.std, normalizer.std)


def test_pools_dimensions():
    data = torch.randn(200, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    normalizer = DataNormalizer.from_data(data, (3, 1, 1))
    torch.testing.assert_close(normalizer.std.flatten(), data.transpose(0, 1).flatten(1).std(1))


@pytest.mark.parametrize(
    "data, shape, message",
    [
        (torch.ones(10, 2), None, "does not vary"),
        (torch.full((10, 2), float("nan")), None, "NaN"),
        (torch.randn(1, 2), None, "Two samples"),
        (torch.randn(10, 2), (3,), "broadcast"),
        (torch.randn(10, 2), (1, 2), "broadcast"),
    ],
)
def test_bad_data(data, shape, message):
    with pytest.raises(ValueError, match=message):
        DataNormalizer.from_data(data, shape)
