"""The output of a bridge's run: pipeline, metrics.json, samples.png and the model card."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import sample_toy
from ..hub.cards import render_card
from ..hub.remote_code import write_remote_code
from ..metrics.transport import normalized_path_energy, wasserstein2
from ..pipelines import BridgePipeline
from ..schedulers import VSDMScheduler
from .bridge import BridgeConfig, BridgeResult
from .evaluation import likelihood_data, measure_likelihood
from .pictures import EVALUATION_SEED, picture_paths, picture_samples
from .report import write_record


FLOW_STEPS = 50  # of heun, or as many as training times


def evaluate_bridge(config: BridgeConfig, pipeline: BridgePipeline) -> tuple[dict[str, Any], Tensor]:
    r"""How far the samples of a bridge of toys are from the data, and what the way there costs.

    Returns:
        `w2_sde` of the backward SDE over all training times, `w2_ode` of the probability flow in at most 99 calls of
        both networks, `w2_forward` of the other end, each with the `..._floor` of two samples of the truth;
        `control_energy`, $\frac12 \int E |z_f|^2 dg$; `path_energy` of the flow, normalised, at constant speed. W2 is
        on standardised axes, but between two data sets in their units. And the paths of the SDE, from the prior,
        `(num_times, n, d)`.
    """
    n, standardize = config.num_eval_samples, not config.prior_dataset_name
    generator = torch.Generator().manual_seed(EVALUATION_SEED)

    def prior() -> Tensor:
        if config.prior_dataset_name:
            return sample_toy(config.prior_dataset_name, n, generator)
        return pipeline.scheduler.sample_prior((n, *pipeline.event_shape), generator)

    def w2(x: Tensor, y: Tensor) -> float:
        return wasserstein2(x, y, standardize=standardize)

    data, more, start = (
        sample_toy(config.dataset_name, n, generator),
        sample_toy(config.dataset_name, n, generator),
        prior(),
    )
    process = pipeline.process()
    with torch.no_grad():
        path, _ = process.run(start, -1, generator)
        paths = pipeline._to_data_units(path).flip(0)
        x, _ = pipeline._to_model_units(data, None)
        forward, controls = process.run(x, 1, generator)
    scheduler = VSDMScheduler.from_config(pipeline.scheduler.config, solver="heun")
    flow = BridgePipeline(
        pipeline.unet, scheduler, pipeline.normalizer, pipeline.forward_unet, prior=pipeline.config["prior"]
    )
    flow.set_progress_bar_config(disable=True)
    steps = min(FLOW_STEPS, len(scheduler))
    options: dict[str, Any] = {"output_type": "pt", "return_dict": False, "return_trajectory": True}
    by_flow, flow_paths = flow(n, generator, steps, latents=start, **options)
    energy = 0.5 * (torch.diff(process.g) @ controls.double().square().flatten(2).sum(2).mean(1))
    return {
        "w2_sde": w2(paths[-1], data),
        "w2_ode": w2(by_flow, data),
        "w2_floor": w2(more, data),
        "w2_forward": w2(forward[-1], start),
        "w2_forward_floor": w2(prior(), start),
        "control_energy": float(energy),
        "path_energy": normalized_path_energy(flow_paths),
        "num_samples": n,
    }, paths


def write_bridge_report(result: BridgeResult) -> dict[str, Any]:
    """Write everything into the run's `output_dir`; returns what `metrics.json` holds."""
    config, pipeline = result.config, result.pipeline
    folder = Path(config.output_dir)
    pipeline.save_pretrained(folder)
    if not config.is_toy:
        steps = config.ddpm_num_inference_steps or None
        picture_samples(pipeline, config.eval_batch_size, steps).save(folder / "samples.png")
    pipeline.to("cpu")
    metrics: dict[str, Any] = {
        "losses": result.losses,
        "seconds": result.seconds,
        "start_seconds": result.start_seconds,
        "num_parameters": sum(p.numel() for net in (pipeline.unet, pipeline.forward_unet) for p in net.parameters()),
    }
    if config.is_toy and config.num_eval_samples:
        evaluation, paths = evaluate_bridge(config, pipeline)
        metrics |= evaluation
        data = sample_toy(
            config.dataset_name, config.num_eval_samples, torch.Generator().manual_seed(EVALUATION_SEED + 1)
        )
        start = config.prior_dataset_name or "noise"
        picture_paths(data, paths, "backward process", start).save(folder / "samples.png")
        if config.likelihood_samples and not config.prior_dataset_name:
            points = likelihood_data(config, None, config.likelihood_samples, config.seed)
            metrics["likelihood"] = measure_likelihood(pipeline, points, seed=config.seed)
    record = write_record(config, metrics)
    render_card(folder, record)
    write_remote_code(folder, type(pipeline).__name__)
    return record
