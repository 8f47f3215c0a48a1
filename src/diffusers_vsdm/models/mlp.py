"""A residual network for vectors, called as `UNet2DModel` is."""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class MLPModelOutput(BaseOutput):
    """Output of [`MLPModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels)`): The prediction, of whatever the scheduler says.
    """

    sample: Tensor


class TimeEmbedding(nn.Sequential):
    r"""Fourier features of t = (k + 1) / N through two layers.

    Args:
        num_train_timesteps (`int`): N.
        width (`int`): Size of the embedding.
        num_frequencies (`int`, defaults to 8): Octaves of the features.
    """

    octaves: Tensor

    def __init__(self, num_train_timesteps: int, width: int, num_frequencies: int = 8):
        layers = nn.Linear(1 + 2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        super().__init__(*layers)
        self.num_train_timesteps = num_train_timesteps
        self.register_buffer("octaves", 2.0 ** torch.arange(num_frequencies) * math.pi / 2, persistent=False)

    def forward(self, input: Tensor | float | int) -> Tensor:
        """Embeddings `(batch or 1, width)` of training steps k, one or `(batch,)`."""
        k = torch.as_tensor(input, device=self.octaves.device).reshape(-1, 1)
        t = (k.float() + 1) / self.num_train_timesteps
        phase = t * self.octaves.float()
        return super().forward(torch.cat([t, phase.sin(), phase.cos()], dim=1).to(next(self.parameters()).dtype))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.time = nn.Linear(width, width)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, hidden: Tensor, time: Tensor, rows: Tensor | None) -> Tensor:
        shift = self.time(time)
        shift = shift if rows is None else nn.functional.embedding(rows, shift)
        return hidden + self.contract(nn.functional.silu(self.expand(self.norm(hidden)) + shift))


class MLPModel(ModelMixin, ConfigMixin):
    r"""Residual multilayer perceptron $f(x_t, k)$ for vectors.

    Args:
        in_channels (`int`): Dimension d of the vectors.
        num_train_timesteps (`int`): N; the training step k enters as Fourier features of t = (k + 1) / N.
        width (`int`, defaults to 128): Width of the hidden layers.
        num_blocks (`int`, defaults to 3): Residual blocks.
        num_frequencies (`int`, defaults to 8): Octaves of the features of t.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        num_train_timesteps: int,
        width: int = 128,
        num_blocks: int = 3,
        num_frequencies: int = 8,
    ):
        super().__init__()
        self.embed_time = TimeEmbedding(num_train_timesteps, width, num_frequencies)
        self.embed = nn.Linear(in_channels, width)
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(num_blocks))
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, in_channels))

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, return_dict: bool = True
    ) -> MLPModelOutput | tuple[Tensor]:
        """Predict from `sample`, shape `(batch, in_channels)`, at training steps k: one, or `(batch,)`."""
        if sample.ndim != 2 or sample.shape[1] != self.config["in_channels"]:
            raise ValueError(
                f"`sample` must have shape (batch, {self.config['in_channels']}), got {tuple(sample.shape)}."
            )
        rows, num_times = None, self.config["num_train_timesteps"]
        if isinstance(timestep, Tensor) and timestep.numel() > num_times and not timestep.is_floating_point():
            # each time is embedded once, and not for every sample that has it
            rows, timestep = timestep.flatten(), torch.arange(num_times, device=timestep.device)
        time = self.embed_time(timestep)
        hidden = self.embed(sample)
        for block in self.blocks:
            hidden = block(hidden, time, rows)
        output = self.readout(hidden)
        return MLPModelOutput(sample=output) if return_dict else (output,)
