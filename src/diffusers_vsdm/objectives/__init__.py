"""What models are trained and judged by."""

from .divergence import divergence, draw_probe
from .path_kl import (
    Estimate,
    LikelihoodBound,
    PathKL,
    drift_matching,
    implicit_matching,
    likelihood_bound,
    path_log_ratio,
)
from .score_matching import TIME_SAMPLINGS, WEIGHTINGS, denoising_score_matching, time_probabilities


__all__ = [
    "TIME_SAMPLINGS",
    "WEIGHTINGS",
    "Estimate",
    "LikelihoodBound",
    "PathKL",
    "denoising_score_matching",
    "divergence",
    "draw_probe",
    "drift_matching",
    "implicit_matching",
    "likelihood_bound",
    "path_log_ratio",
    "time_probabilities",
]
