"""How good sample paths of several series are, by GluonTS's evaluator, as the literature has it.

CRPS-sum is the continuous ranked probability score of the sum of all series, by 19 quantiles, over the sum of the
absolute truth (Salinas et al. 2019); TimeGrad and Table 3 of VSDM report it.

References:
    Salinas et al. (2019), "High-dimensional Multivariate Forecasting with Low-rank Gaussian Copula Processes".
"""

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np


LEVELS = tuple(np.round(np.arange(1, 20) / 20, 2))
# ours to GluonTS's
MEASURES = {
    "crps_sum": "m_sum_mean_wQuantileLoss",
    "crps": "mean_wQuantileLoss",
    "nd_sum": "m_sum_ND",
    "nrmse_sum": "m_sum_NRMSE",
}


def forecast_metrics(
    samples: Sequence[np.ndarray], truth: Sequence[Any], series: list[int] | None = None
) -> dict[str, float]:
    """Scores over all windows together; lower is better.

    Args:
        samples: Paths of each window, `(num_samples, prediction_length, d)`.
        truth: What came, `(prediction_length, d)` each, arrays or frames.
        series: Series that `crps` is of, by default all; what is said of the sum is of all in any case.

    Returns:
        `crps_sum`; `crps`, its mean over the series taken by themselves, weighted by their absolute values; and of the
        sum `nd_sum`, the normalised deviation of the median, and `nrmse_sum`, the normalised root mean squared error
        of the mean.

    Raises:
        ValueError: Windows and forecasts are not as many, or of other shapes, or hold NaN.
    """
    import pandas as pd
    from gluonts.evaluation import MultivariateEvaluator
    from gluonts.model.forecast import SampleForecast

    targets = [np.asarray(window, dtype=float) for window in truth]
    if len(samples) != len(targets) or not targets:
        raise ValueError(f"There are {len(samples)} forecasts and {len(targets)} windows: give one of each.")
    for paths, window in zip(samples, targets, strict=True):
        if paths.ndim != 3 or paths.shape[1:] != window.shape:
            raise ValueError(f"A forecast has shape {paths.shape}, and (num_samples, *{window.shape}) is needed.")
        if not np.isfinite(paths).all():
            raise ValueError("A forecast holds NaN or infinite values.")
        if np.isnan(window).any():
            raise ValueError("The truth holds missing values, of which no sum is known: leave such windows out.")
    evaluator = MultivariateEvaluator(
        quantiles=LEVELS, target_agg_funcs={"sum": np.sum}, eval_dims=series, num_workers=0
    )
    # none of these measures knows of time, so a clock is made up; those that look at the past complain of none
    index = pd.period_range("2000-01-01", periods=len(targets[0]), freq="D")
    forecasts = [SampleForecast(np.asarray(paths, dtype=float), index[0]) for paths in samples]
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = evaluator([pd.DataFrame(window, index) for window in targets], forecasts)
    return {ours: float(found[theirs]) for ours, theirs in MEASURES.items()}
