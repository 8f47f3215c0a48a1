"""Networks that denoise a vector of d series, given what an encoder knows of the past.

A denoiser is a module of [`DenoiserSizes`] with `forward(sample, timestep, hidden, known)`: `(batch, d)`, training
steps k, one or `(batch,)`, the encoder's `(batch, hidden_size)`, and what is known of each series,
`(batch, num_known, d)`; it returns `(batch, d)`. Both treat the series as positions of a line, closed to a ring.

References:
    van den Oord et al. (2016), "WaveNet: A Generative Model for Raw Audio": gated dilated convolutions.
    Kong et al. (2021), "DiffWave: A Versatile Diffusion Model for Audio Synthesis": their use for denoising.
    Rasul et al. (2021), "Autoregressive Denoising Diffusion Models for Multivariate Probabilistic Time Series
        Forecasting": the same over the series of one time.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import UNet1DModel
from torch import Tensor, nn

from .mlp import TimeEmbedding


@dataclass
class DenoiserSizes:
    """What a denoiser is made for, and how large.

    Args:
        num_series: Series d.
        hidden_size: Of the encoder's vector.
        num_known: What is known of each series.
        num_train_timesteps: Training times N.
        num_layers, channels: Of the network over the series.
        width: Of the embedding of time.
    """

    num_series: int
    hidden_size: int
    num_known: int
    num_train_timesteps: int
    num_layers: int
    channels: int
    width: int


class _GatedBlock(nn.Module):
    def __init__(self, sizes: DenoiserSizes, dilation: int):
        super().__init__()
        channels = sizes.channels
        self.time = nn.Linear(sizes.width, channels)
        self.condition = nn.Conv1d(1 + sizes.num_known, 2 * channels, 1)
        self.dilated = nn.Conv1d(
            channels, 2 * channels, 3, padding=dilation, dilation=dilation, padding_mode="circular"
        )
        self.readout = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, hidden: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.dilated(hidden + self.time(time)[..., None]) + self.condition(condition)
        gate, value = gates.chunk(2, dim=1)
        change, skip = self.readout(gate.sigmoid() * value.tanh()).chunk(2, dim=1)
        return (hidden + change) / math.sqrt(2), skip


class WaveNetDenoiser(nn.Module):
    """Gated residual convolutions, as DiffWave and TimeGrad have them."""

    def __init__(self, sizes: DenoiserSizes):
        super().__init__()
        self.embed_time = TimeEmbedding(sizes.num_train_timesteps, sizes.width)
        self.embed_hidden = nn.Linear(sizes.hidden_size, sizes.width)
        self.embed = nn.Conv1d(1, sizes.channels, 1)
        self.spread = _spread(sizes.hidden_size, sizes.num_series)
        # a reach of 1, 2, 1, 2, ...; a ring of one or two series has no more
        reach = [min(2 ** (i % 2), max(1, sizes.num_series - 1)) for i in range(sizes.num_layers)]
        self.blocks = nn.ModuleList(_GatedBlock(sizes, dilation) for dilation in reach)
        last = nn.Conv1d(sizes.channels, 1, 1)
        nn.init.zeros_(last.weight)
        self.readout = nn.Sequential(nn.Conv1d(sizes.channels, sizes.channels, 1), nn.SiLU(), last)

    def forward(self, sample: Tensor, timestep: Tensor | float | int, hidden: Tensor, known: Tensor) -> Tensor:
        """See the module."""
        time = self.embed_time(timestep) + self.embed_hidden(hidden)
        condition = torch.cat([self.spread(hidden)[:, None], known], dim=1)
        values, total = nn.functional.silu(self.embed(sample[:, None])), torch.zeros((), device=sample.device)
        for block in self.blocks:
            values, skip = block(values, time, condition)
            total = total + skip
        return self.readout(total / math.sqrt(len(self.blocks)))[:, 0]


class UNetDenoiser(nn.Module):
    """Diffusers' one-dimensional U-Net, with the condition as further channels."""

    LEVELS = 3

    def __init__(self, sizes: DenoiserSizes):
        super().__init__()
        if sizes.channels % 4:
            raise ValueError(f"`denoiser_channels` of a unet must be a multiple of 4, got {sizes.channels}.")
        self.scale = 1000 / sizes.num_train_timesteps  # the embedding is made for a thousand steps
        self.spread = _spread(sizes.hidden_size, sizes.num_series)
        self.padding = -sizes.num_series % 2**self.LEVELS
        groups = math.gcd(8, sizes.channels)
        self.unet = UNet1DModel(
            in_channels=2 + sizes.num_known,
            out_channels=1,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=True,
            down_block_types=("DownResnetBlock1D",) * self.LEVELS,
            mid_block_type="MidResTemporalBlock1D",
            up_block_types=("UpResnetBlock1D",) * (self.LEVELS - 1),
            out_block_type="OutConv1DBlock",
            block_out_channels=tuple(sizes.channels * 2 ** (i + 1) for i in range(self.LEVELS)),
            norm_num_groups=groups,
            layers_per_block=max(1, sizes.num_layers // 8),
            act_fn="mish",
            downsample_each_block=False,
        )

    def forward(self, sample: Tensor, timestep: Tensor | float | int, hidden: Tensor, known: Tensor) -> Tensor:
        """See the module."""
        k = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        ring = torch.cat([sample[:, None], self.spread(hidden)[:, None], known], dim=1)
        while ring.shape[-1] < sample.shape[-1] + self.padding:  # a ring may be short of what it is padded by
            ring = torch.cat([ring, ring[..., : sample.shape[-1] + self.padding - ring.shape[-1]]], dim=-1)
        return self.unet(ring, k * self.scale, return_dict=False)[0][:, 0, : sample.shape[-1]]


def _spread(hidden_size: int, num_series: int) -> nn.Module:
    """One number for each series out of a hidden vector."""
    half = max(1, num_series // 2)
    return nn.Sequential(nn.Linear(hidden_size, half), nn.SiLU(), nn.Linear(half, num_series), nn.SiLU())


DENOISERS = {"wavenet": WaveNetDenoiser, "unet": UNetDenoiser}
