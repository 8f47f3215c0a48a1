"""Forecasters, histories and closed forms for tests."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from diffusers_vsdm import AdaptiveDiagonalDrift, ForecastModel, VSDMForecastPipeline, VSDMScheduler
from diffusers_vsdm.data.calendar import calendar_features
from diffusers_vsdm.data.frames import regular_frame


CONTEXT, AHEAD = 6, 4


def model(d=2, **given):
    chosen = {"prediction_length": AHEAD, "context_length": CONTEXT, "num_train_timesteps": 20, "lags": [1, 2]}
    chosen |= {"num_time_features": 2, "encoder_width": 8, "encoder_layers": 2, "denoiser_layers": 2}
    return ForecastModel(d, **(chosen | {"denoiser_channels": 8, "denoiser_width": 8} | given)).eval()


def randomized(module, std=0.3):
    """With a last layer that is not zero, so that inputs matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return module


def series(rows, d=2, seed=0, level=5.0):
    """Random walks away from 0, whole in float32, as GluonTS keeps them."""
    walks = level + np.random.default_rng(seed).standard_normal((rows, d)).cumsum(0)
    return walks.astype(np.float32).astype(np.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Exact(nn.Module):
    """The perfect answer for z_t ~ N(mean + phi * z_{t-1}, sigma^2), z_{t-1} as the lags tell it."""

    def __init__(self, scheduler, mean, phi, sigma, normalizer=None, differencing=0):
        super().__init__()
        self.scheduler, self.normalizer, self.differencing = scheduler, normalizer, differencing
        self.mean, self.phi, self.sigma = (torch.tensor(x) for x in (mean, phi, sigma))

    def forward(self, sample, timestep, hidden, known):
        before = -known[:, 1] if self.differencing else known[:, 0]  # of differences, (x_{t-2} - x_{t-1}) / c
        mean, sigma = self.mean + self.phi * before, self.sigma
        if self.normalizer is not None:
            mean, sigma = self.normalizer.normalize(mean), sigma / self.normalizer.std
        a, s = self.scheduler.marginal_scales(sample, torch.as_tensor(timestep).expand(len(sample)))
        off = (sample - a * mean) / (a**2 * sigma**2 + s**2)
        x0, eps = mean + a * sigma**2 * off, s * off
        return eps if self.scheduler.config.prediction_type == "epsilon" else a * eps - s * x0


PHI, MEAN, SIGMA = [0.7, -0.4], [0.3, -0.2], [0.5, 0.8]


def pipeline(
    lam=(1.0, 1.0),
    solver="trig",
    prior="conditional",
    beta_max=30.0,
    prediction="v_prediction",
    process=None,
    phi=(0.0, 0.0),
    **chosen,
):
    """With a process that is long enough to forget any data."""
    scheduler = VSDMScheduler.from_power_law(
        0.1, beta_max, 1.7, 200, solver=solver, prior_type=prior, prediction_type=prediction, clip_sample=False
    )
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor(lam, dtype=torch.float64))
    phi, mean, std = torch.tensor(phi), torch.tensor(MEAN), torch.tensor(SIGMA)
    mean, std = mean / (1 - phi), std / (1 - phi**2).sqrt()  # in the long run
    drift.data_mean.copy_(mean if process is None else process.normalize(mean))
    drift.data_variance.copy_(std**2 if process is None else (std / process.std) ** 2)
    scheduler.set_drift(drift)
    pipe = VSDMForecastPipeline(model(num_train_timesteps=200, **chosen), scheduler, process)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(phi=PHI, sigma=SIGMA, **given):
    pipe = pipeline(phi=phi, **given)
    differencing = pipe.model.config["differencing"]
    pipe.model.denoiser = Exact(pipe.scheduler, MEAN, phi, sigma, pipe.normalizer, differencing)
    return pipe


def closed_form(pipe, history):
    """Mean `(P, d)` and covariance `(d, P, P)` of the paths, in data units, in NumPy alone."""
    phi, sigma, mean = (np.asarray(x) for x in (pipe.model.denoiser.phi, pipe.model.denoiser.sigma, MEAN))
    config, past = pipe.model.config, history[-pipe.model.history_length :]
    changes = np.diff(past, axis=0) if config["differencing"] else past
    location = np.zeros(2)
    if config["scaling"] == "none":
        scale = np.ones(2)
    elif config["scaling"] == "mean":
        scale = np.abs(changes).mean(0)
    else:
        scale = changes.std(0)
        location = location if config["differencing"] else changes.mean(0)
    z = (changes[-1] - location) / scale
    means = []
    for _ in range(AHEAD):
        z = mean + phi * z
        means.append(z)
    lag = np.subtract.outer(np.arange(AHEAD), np.arange(AHEAD))
    mix = np.stack([np.where(lag >= 0, p ** np.maximum(lag, 0), 0) for p in phi]) * (sigma * scale)[:, None, None]
    paths = np.stack(means) * scale + location
    if config["differencing"]:
        paths, mix = past[-1] + paths.cumsum(0), mix.cumsum(1)
    return paths, mix @ mix.swapaxes(1, 2)


def small(freq=None, solver="trig", features=2, **given):
    pipe = pipeline(solver=solver, lam=(0.7, 1.9), prior="marginal", freq=freq, num_time_features=features, **given)
    randomized(pipe.model)
    return pipe


def clocked(freq="B", **given):
    return small(freq, features=calendar_features(frame(3, freq).index).shape[1], **given)


def frame(rows=20, freq="B", start="2024-01-03", names=("a", "b"), seed=0):
    stamps = pd.date_range(start, periods=rows, freq={"M": "ME"}.get(freq, freq))
    return regular_frame(pd.DataFrame(series(rows, seed=seed), stamps, list(names)), freq)


def quick(pipe, history, num_samples=3, seed=0, **given):
    return pipe(history, num_samples, generator=generator(seed), num_inference_steps=4, **given)
