"""How good a model's images are: samples by several solvers in several numbers of network calls, and their FID."""

import copy
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..data.images import as_bytes
from ..metrics.fidelity import (
    ENOUGH,
    FeatureStatistics,
    InceptionFeatures,
    fid_name,
    frechet_distance,
    kernel_distance_and_coverage,
)
from ..pipelines import VSDMPipeline
from ..schedulers import VSDMScheduler
from ..schedulers.grids import TIME_GRIDS
from ..solvers import SOLVERS
from .pictures import EVALUATION_SEED, picture_grid
from .processes import process_state
from .shards import load_shards, make_shards


SHOWN = 64  # images of a grid
SMALL_BATCH = 250
TOLD_BY = 64  # images by which a data set is told from another
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SamplingRun:
    """One way to sample: `solver[:order][/time_grid]@evaluations`, for instance `dpmsolver++:3/karras@10`.

    Attributes:
        solver: Key of [`SOLVERS`].
        evaluations: Network calls, at most.
        order: Of the solver; None for the pipeline's.
        time_grid: Key of [`TIME_GRIDS`]; None for the solver's own.
    """

    solver: str
    evaluations: int
    order: int | None = None
    time_grid: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the notation.

        Raises:
            ValueError: It is not one, or names no solver or grid.
        """
        found = re.fullmatch(r"(?P<solver>[^:/@]+)(:(?P<order>\d+))?(/(?P<grid>[^:/@]+))?@(?P<calls>\d+)", text)
        if not found:
            raise ValueError(f"`runs` must be like 'heun@35' or 'dpmsolver++:3/karras@10', got {text!r}.")
        if found["solver"] not in SOLVERS:
            raise ValueError(f"`runs`: the solver must be one of {tuple(SOLVERS)}, got {found['solver']!r}.")
        if found["grid"] not in (None, *TIME_GRIDS):
            raise ValueError(f"`runs`: the time grid must be one of {TIME_GRIDS}, got {found['grid']!r}.")
        order = int(found["order"]) if found["order"] else None
        run = cls(found["solver"], int(found["calls"]), order, found["grid"])
        if run.num_steps < 1:
            raise ValueError(f"`runs`: {text!r} has too few evaluations for a step.")
        return run

    @property
    def num_steps(self) -> int:
        """Steps of the solver; the last of a solver with several calls in a step needs one."""
        calls = SOLVERS[self.solver].calls_per_step
        return (self.evaluations + calls - 1) // calls

    def scheduler(self, scheduler: VSDMScheduler) -> VSDMScheduler:
        """That scheduler, with its drift, for this run."""
        order = {} if self.order is None else {"solver_order": self.order}
        return VSDMScheduler.from_config(scheduler.config, solver=self.solver, time_grid=self.time_grid, **order)

    def __str__(self) -> str:
        order = "" if self.order is None else f":{self.order}"
        return f"{self.solver}{order}{f'/{self.time_grid}' if self.time_grid else ''}@{self.evaluations}"


def sample_bytes(
    pipeline: VSDMPipeline, number: int, generator: torch.Generator, num_steps: int | None, **classes: Any
) -> Tensor:
    """Samples of a pipeline as whole numbers 0 to 255 on the CPU; of `classes` for one that knows them.

    Raises:
        FloatingPointError: They are not finite.
    """
    (images,) = pipeline(number, generator, num_steps, output_type="pt", return_dict=False, **classes)
    if not torch.isfinite(images).all():
        raise FloatingPointError("The samples hold NaN or infinite values: the solver or the network overflowed.")
    return as_bytes(2 * images - 1).cpu()


def digest(pipeline: VSDMPipeline) -> str:
    """Of all that a sample depends on: weights, scheduler with its drift, normalizer."""
    # without Diffusers' own notes, one of which lists keys in the order of a set
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part in (pipeline.unet, pipeline.normalizer, getattr(pipeline, "forward_unet", None)):
        for name, tensor in sorted(({} if part is None else part.state_dict()).items()):
            found.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@dataclass
class FidelityReport:
    """What [`measure_fidelity`] leaves in its folder.

    Attributes:
        rows: For each run its settings and measures.
        num_samples: Samples of each.
        num_reference: Of the data that FID is measured against; 0 if it is not known.
    """

    rows: list[dict[str, Any]]
    num_samples: int
    num_reference: int

    @property
    def fid_name(self) -> str:
        """What to call its FID."""
        return fid_name(self.num_samples, self.num_reference)

    def table(self) -> str:
        """The measures as a table in Markdown."""
        names = {"fid": self.fid_name, "kid": "KID x 1000", "precision": "precision", "recall": "recall"}
        shown = [name for name in names if name in self.rows[0]]
        lines = [["run", "evaluations", *(names[name] for name in shown)], ["---"] * (len(shown) + 2)]
        for row in self.rows:
            values = (row[name] * (1000 if name == "kid" else 1) for name in shown)
            lines.append([row["run"], str(row["evaluations"]), *(f"{value:.2f}" for value in values)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure_fidelity(
    pipeline: VSDMPipeline,
    runs: list[SamplingRun],
    num_samples: int,
    batch_size: int,
    seed: int,
    folder: Path,
    features: InceptionFeatures,
    statistics: FeatureStatistics | None,
    reference: Tensor | None,
    mixed_precision: str = "no",
    guidance_scale: float = 1.0,
) -> FidelityReport:
    """Sample by every run, in pieces that are kept, and compare with data.

    All processes sample, and return when the pieces are there; only the main one measures.

    Args:
        pipeline: The model of images.
        runs: The ways to sample.
        num_samples: Samples by each; the first noise of a sample is the same in all runs.
        batch_size: Samples in a piece.
        seed: Of the samples.
        folder: Where the pieces are kept, with a grid of samples for each run.
        features: The feature network.
        statistics: Of the data, for FID; by default those of `reference`.
        reference: Features of data `(m, d)`, for KID, precision and recall.
        mixed_precision: `bf16` or `fp16` for the network, or `no`.
        guidance_scale: For networks that know classes, which take turns.

    Raises:
        ValueError: The folder holds other samples, or a run is not defined for this model.
        FloatingPointError: Samples are not finite.
    """
    device, model, num_classes = pipeline.unet.device, digest(pipeline), pipeline.num_classes
    if num_classes is None and guidance_scale != 1:
        raise ValueError(f"`guidance_scale` {guidance_scale} is for networks that know classes: leave it out.")

    def classes(first: int, last: int) -> dict[str, Any]:
        if num_classes is None:
            return {}
        return {"class_labels": [i % num_classes for i in range(first, last)], "guidance_scale": guidance_scale}

    rows, num_reference = [], 0 if statistics is None else statistics.num_samples
    for run in runs:
        sampler = copy.copy(pipeline)  # with the same networks
        sampler.scheduler = run.scheduler(pipeline.scheduler)
        sampler.set_progress_bar_config(disable=True)
        sampler.scheduler.set_timesteps(run.num_steps)
        evaluations = len(sampler.scheduler.timesteps) * sampler.networks_per_evaluation

        def make(first: int, last: int, run: SamplingRun = run, sampler: VSDMPipeline = sampler) -> dict[str, Tensor]:
            generator = torch.Generator(device).manual_seed(seed * 1_000_000_007 + first)
            with torch.autocast(device.type, PRECISIONS[mixed_precision], enabled=mixed_precision != "no"):
                images = sample_bytes(sampler, last - first, generator, run.num_steps, **classes(first, last))
            return {"images": images, "features": features(images)}

        place = folder / "samples" / str(run).replace("/", "-")
        key = json.dumps([model, str(run), seed, mixed_precision, guidance_scale, features.digest])
        try:
            make_shards(place, key, num_samples, batch_size, make, str(run))
        except FloatingPointError as error:
            raise FloatingPointError(f"Run {run}: {error}") from error
        if not process_state().is_main_process:
            continue
        found = load_shards(place, num_samples, batch_size, "features")
        row: dict[str, Any] = {"run": str(run), **asdict(run), "evaluations": evaluations}
        row |= {"num_steps": run.num_steps, "num_samples": num_samples, "num_reference": num_reference}
        if statistics is not None:
            row["fid"] = frechet_distance(found, statistics)
        if reference is not None:
            row |= kernel_distance_and_coverage(found, reference)
        rows.append(row)
        shown = load_shards(place, min(num_samples, -(-SHOWN // batch_size) * batch_size), batch_size, "images")
        picture_grid(shown[:SHOWN].permute(0, 2, 3, 1).numpy() / 255).save(place.with_name(f"{place.name}.png"))
    return FidelityReport(rows, num_samples, num_reference)


class SmallFid:
    """FID of few images, to see a training go on.

    Args:
        features: The feature network.
        statistics: Of the data; by default of some of `dataset`.
        dataset: Images, with batched access.
        number: Images to sample.

    Attributes:
        name: Of the measure, with the number of samples.

    Raises:
        ValueError: The statistics are of another network, other images or other data.
    """

    def __init__(self, features: InceptionFeatures, statistics: FeatureStatistics | None, dataset: Any, number: int):
        self.features, self.number = features, number
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(EVALUATION_SEED))
        batches = chosen[: ENOUGH if statistics is None else SMALL_BATCH].split(SMALL_BATCH)
        found = torch.cat([features(as_bytes(dataset.__getitems__(batch.tolist()))) for batch in batches])
        self.statistics = FeatureStatistics.of(found) if statistics is None else statistics
        self.statistics.check(found, network=features.digest, shape=shape_name(dataset.event_shape))
        self.name = fid_name(number, self.statistics.num_samples)

    def __call__(self, pipeline: VSDMPipeline, num_steps: int | None = None) -> dict[str, float]:
        """The FID of a model, under its name; the same noise every time.

        Raises:
            FloatingPointError: The samples are not finite.
        """
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator(pipeline.unet.device).manual_seed(EVALUATION_SEED)
        found = []
        for start in range(0, self.number, SMALL_BATCH):
            size = min(SMALL_BATCH, self.number - start)
            found.append(self.features(sample_bytes(pipeline, size, generator, num_steps)))
        return {self.name: frechet_distance(torch.cat(found), self.statistics)}


def shape_name(shape: tuple[int, ...]) -> str:
    """Of images, as statistics tell it."""
    return "x".join(map(str, shape))


def reference_features(dataset: Any, number: int, seed: int, folder: Path, features: InceptionFeatures) -> Tensor:
    """Features of images of a data set, in pieces that are kept.

    Args:
        dataset: With batched access.
        number: How many, at most, chosen by `seed`.
        seed: Of the choice.
        folder: Where the pieces are kept.
        features: The feature network.

    Returns:
        `(number, d)`.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:number].tolist()

    def make(first: int, last: int) -> dict[str, Tensor]:
        return {"features": features(as_bytes(dataset.__getitems__(chosen[first:last])))}

    size = SMALL_BATCH
    some = as_bytes(dataset.__getitems__(chosen[:TOLD_BY])).cpu().contiguous().numpy().tobytes()
    known = [len(dataset), dataset.event_shape, number, seed, features.digest, hashlib.sha256(some).hexdigest()]
    key = json.dumps(known)
    make_shards(folder, key, len(chosen), size, make, "Reference")
    return load_shards(folder, len(chosen), size, "features")
