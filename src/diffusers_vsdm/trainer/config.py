"""The settings of a training run; `HfArgumentParser` makes the command line of this dataclass."""

import shlex
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers.optimization import SchedulerType

from ..data import TOYS
from ..drift import AVERAGES, BASES
from ..models import UNETS
from ..objectives import TIME_SAMPLINGS, WEIGHTINGS
from ..schedulers.noise_table import BETA_SCHEDULES
from ..schedulers.parameterization import PARAMETERIZATIONS
from ..schedulers.scheduling_vsdm import PRIORS
from ..solvers import SOLVERS
from ..stochastic_approximation import GRADIENTS, SIMULATION_PRIORS, STEP_COUNTS, UPDATES


POWER_LAW, EXPLODING, BROWNIAN = "power_law", "ve", "brownian"
# what may differ between the parts of a resumed run
INCIDENTAL = (
    "output_dir overwrite_output_dir cache_dir num_eval_samples num_eval_steps eval_batch_size"
    " num_likelihood_samples ddpm_num_inference_steps validation_steps logger logging_steps logging_dir"
    " validation_images statistics feature_weights dataloader_num_workers"
    " checkpointing_steps checkpoints_total_limit resume_from_checkpoint license push_to_hub hub_model_id"
    " hub_private_repo hub_revision hub_tag bridge_learning_rate"
).split()
# of this machine and this run alone: not for others' eyes
LOCAL = "output_dir overwrite_output_dir cache_dir logging_dir resume_from_checkpoint".split()
PLACES = (
    *("train_data_dir", "model_config_name_or_path", "pretrained_model_name_or_path"),
    *("statistics", "feature_weights"),
)
BASELINES = ("none", "sgm")
LR_SCHEDULERS = [
    s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT
]  # which takes rules of its own
# what `pretrained_model_name_or_path` decides
PRETRAINED = (
    "prediction_type ddpm_num_steps ddpm_beta_schedule beta_min beta_max beta_power beta_start beta_end sigma_min"
    " sigma_max model model_config_name_or_path"
).split()
LAMBDA_PER = ("all", "channel", "element")


def setting(default: Any, text: str, choices: Any = None) -> Any:
    """A field with its help."""
    metadata = {"help": text} if choices is None else {"help": text, "choices": list(choices)}
    return field(default=default, metadata=metadata)


def _default(setting: Field) -> Any:
    factory = setting.default_factory
    return setting.default if factory is MISSING else factory()


def _flag(name: str, value: Any) -> str:
    """As `HfArgumentParser` reads it."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(one)) for one in values)])


@dataclass
class DataConfig:
    """Where data come from."""

    dataset_name: str = setting("", f"An image data set on the Hub, or a toy: {', '.join(TOYS)}.")
    dataset_config_name: str = setting("", "Configuration of the data set on the Hub.")
    train_data_dir: str = setting("", "Folder of images or of parquet files, instead of a name.")
    cache_dir: str = setting("", "Folder for downloaded data sets, instead of the library's own.")
    split: str = setting("train", "Split of the data set on the Hub or in the folder; toys have none.")
    image_column: str = setting("", "Column of the images; by default image, img, images or pixel_values.")
    channels: int = setting(3, "Channels of images: 1 for grayscale, 3 for colour, or as many as arrays have.")
    resolution: int = setting(0, "Size that images are resized and cropped to; 0 to take them as they are.")

    @property
    def is_toy(self) -> bool:
        """Whether the data are one of the two-dimensional distributions."""
        return not self.train_data_dir and self.dataset_name in TOYS


@dataclass
class RunConfig:
    """Settings of Algorithm 1 on any data, with the names of Diffusers' `train_unconditional.py` where it has them."""

    script: ClassVar[str]
    positive: ClassVar[str] = (
        "ddpm_num_steps max_train_steps train_batch_size learning_rate max_grad_norm logging_steps beta_min"
        " sa_trajectories sa_step_scale gradient_accumulation_steps sigma_min sigma_max"
    )
    not_negative: ClassVar[str] = (
        "seed dataloader_num_workers num_epochs lr_warmup_steps sa_stages sa_steps sa_batch_size validation_steps"
        " ddpm_num_inference_steps checkpointing_steps checkpoints_total_limit"
    )

    output_dir: str = setting("vsdm-model", "Folder for the pipeline, its metrics, pictures and card.")
    overwrite_output_dir: bool = setting(False, "Write into a folder that exists and is not empty.")
    dataloader_num_workers: int = setting(0, "Processes that read the data.")
    seed: int = setting(0, "Seed of the data, the network, the noise and the simulations.")

    # process
    baseline: str = setting(
        "none", "`sgm` freezes lambda at 1, at 0 for ve: a score-based model without a learned drift.", BASELINES
    )
    standardize: bool = setting(False, "Train on data of mean 0 and standard deviation 1 in each dimension.")
    prior_type: str = setting("marginal", "Law of the first sample.", PRIORS)
    ddpm_beta_schedule: str = setting(
        POWER_LAW,
        "Table of betas; or ve, the variance-exploding process of EDM, where lambda starts at 1 / sigma_max^2; or"
        " brownian, which has its short steps at both ends.",
        (POWER_LAW, EXPLODING, BROWNIAN, *BETA_SCHEDULES),
    )
    beta_min: float = setting(0.1, "Smallest rate of the power law, per unit of time.")
    beta_max: float = setting(10.0, "Largest rate of the power law, per unit of time.")
    beta_power: float = setting(1.7, "Exponent of the power law.")
    beta_start: float = setting(0.0001, "Least beta of a step, of Diffusers' tables.")
    beta_end: float = setting(0.02, "Largest beta of a step, of Diffusers' tables.")
    sigma_min: float = setting(0.002, "Least standard deviation of the noise of ve.")
    sigma_max: float = setting(80.0, "Largest standard deviation of the noise of ve or brownian.")
    ddpm_num_steps: int = setting(100, "Training times N.")
    prediction_type: str = setting(
        "auto",
        "What the network predicts; auto is v_prediction for vectors, epsilon for images, and edm with ve.",
        ("auto", *PARAMETERIZATIONS),
    )
    basis: str = setting(
        "identity",
        "Basis in which the drift is diagonal; dct is for images, dense, which is learned, for vectors.",
        BASES,
    )
    lambda_per: str = setting("element", "One lambda for all dimensions, per channel, or per element.", LAMBDA_PER)
    lambda_varies: bool = setting(False, "A lambda for each training time; needs zeta 1.")
    solver: str = setting("heun", "Solver that the saved pipeline samples with.", SOLVERS)

    # optimization
    max_train_steps: int = setting(12_000, "Gradient steps.")
    num_epochs: int = setting(0, "Passes over the data, instead of a number of steps.")
    train_batch_size: int = setting(512, "Samples in a batch, per process.")
    gradient_accumulation_steps: int = setting(1, "Batches whose gradients are added up for a step.")
    learning_rate: float = setting(2e-3, "Peak learning rate of AdamW.")
    lr_scheduler: str = setting("cosine", "Learning-rate schedule, as in Diffusers.", LR_SCHEDULERS)
    lr_warmup_steps: int = setting(200, "Steps over which the learning rate rises.")
    adam_beta1: float = setting(0.9, "Decay of AdamW's mean gradient.")
    adam_beta2: float = setting(0.999, "Decay of AdamW's mean squared gradient.")
    adam_epsilon: float = setting(1e-8, "Added to AdamW's root mean square.")
    adam_weight_decay: float = setting(1e-6, "Weight decay of AdamW.")
    max_grad_norm: float = setting(1.0, "Largest norm of the gradient.")
    weighting: str = setting("simple", "Weighting of the score matching loss.", WEIGHTINGS)
    time_sampling: str = setting("uniform", "How often each training time is drawn.", TIME_SAMPLINGS)
    use_ema: bool = setting(True, "Save the exponential moving average of the weights.")
    ema_max_decay: float = setting(0.999, "Decay of that average.")

    # stochastic approximation
    zeta: float = setting(0.75, "The paper's zeta, in (0, 1].")
    zeta_placement: str = setting("divergence", "Term of the loss for lambda that zeta multiplies.", GRADIENTS)
    sa_update: str = setting("gradient", "Step along the gradient, or to its root: ipf needs zeta 1.", UPDATES)
    sa_stages: int = setting(40, "Stages of stochastic approximation, evenly spaced before lambda is frozen.")
    sa_start: float = setting(0.0, "Share of the steps before lambda is frozen that come before the first of them.")
    sa_trajectories: int = setting(256, "Simulated trajectories in a stage.")
    sa_steps: int = setting(0, "Steps of a trajectory; 0 for about 13 per unit of integrated beta.")
    sa_batch_size: int = setting(0, "Trajectories simulated at once; 0 for all.")
    sa_prior: str = setting("standard", "Law from which a stage simulates.", SIMULATION_PRIORS)
    sa_step_scale: float = setting(3.0, "a of the step size a / (k^alpha + b).")
    sa_step_offset: float = setting(3.0, "b of the step size.")
    sa_step_power: float = setting(0.6, "alpha of the step size, in (0.5, 1].")
    sa_step_count: str = setting("stages", "What k counts: stages, or changes of sign of each gradient.", STEP_COUNTS)
    sa_average: str = setting("polyak", "Average of the iterates that lambda is frozen at.", AVERAGES)
    frozen_fraction: float = setting(0.2, "Share of the steps, at the end, with lambda frozen at its average.")

    # logging
    validation_steps: int = setting(0, "Steps between two pictures and likelihoods while training; 0 for none.")
    ddpm_num_inference_steps: int = setting(0, "Steps of the solver for such a picture; 0 for the default, 50.")
    mixed_precision: str = setting(
        "", "Precision of training; by default as Accelerate is configured.", ("", "no", "fp16", "bf16")
    )
    logger: str = setting("none", "Where to log while training.", ("none", "tensorboard", "wandb"))
    logging_steps: int = setting(50, "Steps between two log entries.")
    logging_dir: str = setting("logs", "Folder for logs, inside `output_dir`.")
    checkpointing_steps: int = setting(0, "Steps between two checkpoints; 0 for none.")
    checkpoints_total_limit: int = setting(0, "Checkpoints to keep, the newest ones; 0 for all.")
    resume_from_checkpoint: str = setting("", "Go on from `latest`, or from a checkpoint's name or path.")

    # the Hub; whose token comes from `hf auth login` or from the variable HF_TOKEN
    license: str = setting("", "Licence of the model, for its card, as the Hub spells it; apache-2.0 for toys.")
    push_to_hub: bool = setting(False, "Push the model to the Hub.")
    hub_model_id: str = setting("", "Repository to push to; by default the name of `output_dir`.")
    hub_private_repo: bool = setting(False, "Make that repository private.")
    hub_revision: str = setting("", "Branch to push to, instead of main.")
    hub_tag: str = setting("", "Tag for what is pushed.")

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is out of its range; the message names it, its value and the range.
        """
        for name, setting in self.__dataclass_fields__.items():
            choices, value = setting.metadata.get("choices"), getattr(self, name)
            if choices is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
        for name in self.positive.split():
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in self.not_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.ddpm_beta_schedule == POWER_LAW and not self.beta_min <= self.beta_max:
            raise ValueError(f"`beta_max` {self.beta_max} must not be below `beta_min` {self.beta_min}.")
        if self.ddpm_beta_schedule == EXPLODING and not self.sigma_min < self.sigma_max:
            raise ValueError(f"`sigma_max` {self.sigma_max} must be above `sigma_min` {self.sigma_min}.")
        if not 0.5 < self.sa_step_power <= 1:
            raise ValueError(f"`sa_step_power` must lie in (0.5, 1], got {self.sa_step_power}.")
        if not 0 < self.zeta <= 1:
            raise ValueError(f"`zeta` must lie in (0, 1], got {self.zeta}.")
        if not 0 <= self.sa_start < 1:
            raise ValueError(f"`sa_start` must lie in [0, 1), got {self.sa_start}.")
        if not 0 <= self.frozen_fraction < 1:
            raise ValueError(f"`frozen_fraction` must lie in [0, 1), got {self.frozen_fraction}.")
        if self.zeta != 1 and (self.lambda_varies or self.sa_update == "ipf"):
            raise ValueError(
                f"`zeta` {self.zeta} has no fixed point with `lambda_varies` and no meaning with `sa_update` 'ipf':"
                " set it to 1."
            )
        if self.baseline == "none" and self.sa_stages >= (1 - self.sa_start) * self.adaptive_steps:
            raise ValueError(
                f"`sa_stages` {self.sa_stages} do not fit into the {self.adaptive_steps} steps before lambda is"
                " frozen: lower it, or raise `max_train_steps`."
            )

    @property
    def adaptive_steps(self) -> int:
        """Gradient steps before lambda is frozen."""
        return self.max_train_steps - max(1, int(self.frozen_fraction * self.max_train_steps))

    @property
    def stage_steps(self) -> frozenset[int]:
        """Numbers of gradient steps after which a stage of stochastic approximation runs."""
        if self.baseline == "sgm":
            return frozenset()
        first = self.sa_start * self.adaptive_steps
        left, parts = self.adaptive_steps - first, self.sa_stages + 1
        return frozenset(round(first + left * j / parts) for j in range(1, parts))

    def for_data(self, num_samples: int, num_processes: int = 1) -> Self:
        """These settings with `num_epochs`, if given, as a number of gradient steps.

        Raises:
            ValueError: The data are less than a batch on every process, or an epoch less than a step.
        """
        whole_batch = self.train_batch_size * num_processes
        if num_samples < whole_batch:
            raise ValueError(
                f"The data set has {num_samples} samples, less than a batch on each process ({whole_batch}): lower"
                " `train_batch_size`."
            )
        if not self.num_epochs:
            return self
        steps = self.num_epochs * (num_samples // whole_batch) // self.gradient_accumulation_steps
        if not steps:
            raise ValueError(
                f"`num_epochs` {self.num_epochs} of {num_samples // whole_batch} batches are less than the"
                f" {self.gradient_accumulation_steps} `gradient_accumulation_steps` of a step: train for more."
            )
        return replace(self, num_epochs=0, max_train_steps=steps)

    def identity(self, **facts: Any) -> dict[str, Any]:
        """The settings that make the run what it is, and facts of it: all that a resumed part must share."""
        return {key: value for key, value in asdict(self).items() if key not in INCIDENTAL} | facts

    @classmethod
    def default_identity(cls) -> dict[str, Any]:
        """These of a run whose settings are all the defaults."""
        return {setting.name: _default(setting) for setting in fields(cls) if setting.name not in INCIDENTAL}

    def public(self) -> dict[str, Any]:
        """The settings that may be published: without local paths, and folders by their last name."""
        hidden = {*LOCAL, *(key for key in asdict(self) if "hub" in key)}
        settings = {key: value for key, value in asdict(self).items() if key not in hidden}
        return settings | {
            key: Path(settings[key]).resolve().name
            for key in PLACES
            if settings.get(key) and Path(settings[key]).exists()
        }

    def command(self) -> str:
        """The command line of such a run, of public settings that are not the defaults."""
        public = self.public()
        given = {f.name: public[f.name] for f in fields(self) if f.name in public and public[f.name] != _default(f)}
        return " ".join(["accelerate launch", self.script, *(_flag(key, value) for key, value in given.items())])

    def prepare_output_dir(self) -> Path:
        """Make the output folder.

        Raises:
            FileExistsError: It exists, is not empty, and neither `overwrite_output_dir` nor a checkpoint is given.
        """
        folder = Path(self.output_dir)
        may_be_used = self.overwrite_output_dir or self.resume_from_checkpoint
        if folder.exists() and not (folder.is_dir() and (may_be_used or not any(folder.iterdir()))):
            raise FileExistsError(
                f"`output_dir` {folder} exists and is not an empty folder: choose another, or pass"
                " --overwrite_output_dir to write into it."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass
class TrainingConfig(RunConfig, DataConfig):
    """Settings of a run on images or toys."""

    script: ClassVar[str] = "training/train_vsdm.py"
    positive: ClassVar[str] = f"{RunConfig.positive} num_train_samples model_width num_eval_steps eval_batch_size"
    not_negative: ClassVar[str] = f"{RunConfig.not_negative} max_train_samples"

    dataset_name: str = setting("spiral-8y", f"An image data set on the Hub, or a toy: {', '.join(TOYS)}.")
    num_train_samples: int = setting(100_000, "Points drawn from a toy distribution as the training set.")
    max_train_samples: int = setting(0, "Images to use, the first ones; 0 for all.")
    random_flip: bool = setting(False, "Mirror images at random.")
    class_conditional: bool = setting(False, "Train on images with their classes, for guidance.")
    label_column: str = setting("label", "Column of the classes.")
    label_dropout: float = setting(0.1, "Share of the images that are shown without their class.")

    # network
    model: str = setting("auto", "Network; auto is mlp for vectors and tiny for images.", ("auto", "mlp", *UNETS))
    model_config_name_or_path: str = setting("", "Configuration of a UNet2DModel, instead.")
    pretrained_model_name_or_path: str = setting("", "A DDPM pipeline to start from: its network and table of betas.")
    model_width: int = setting(128, "Width of the mlp's hidden layers.")
    model_num_blocks: int = setting(3, "Residual blocks of the mlp.")

    # evaluation
    num_eval_samples: int = setting(3000, "Samples for the metrics; 0 for no evaluation.")
    num_likelihood_samples: int = setting(
        -1, "Data samples whose likelihood is measured; -1 for 500 of a toy that is evaluated, and no images."
    )
    num_eval_steps: int = setting(99, "Euler steps, at most, of the probability flow for the metrics.")
    eval_batch_size: int = setting(64, "Images in a picture of samples.")
    validation_images: int = setting(0, "Images for a FID with each picture while training; 0 for none.")
    statistics: str = setting("", "File of the data's statistics for it; by default of 10,000 training images.")
    feature_weights: str = setting("", "Weights of FID's Inception network; by default torch-fidelity downloads them.")
    channels_last: bool = setting(False, "Keep the channels of images together in memory: often faster in bf16.")

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            ValueError: A setting is out of its range; the message names it, its value and the range.
        """
        super().__post_init__()
        if self.num_likelihood_samples not in (-1, 0) and self.num_likelihood_samples < 2:
            raise ValueError(
                "`num_likelihood_samples` must be at least 2, for a standard error, 0 for none or -1, got"
                f" {self.num_likelihood_samples}."
            )
        if not 0 < self.label_dropout < 1:
            raise ValueError(
                f"`label_dropout` must lie in (0, 1), got {self.label_dropout}: it trains what samples and simulations"
                " without a class are made of."
            )
        if self.validation_images and (self.is_toy or self.validation_images < 2 or not self.validation_steps):
            raise ValueError(
                f"`validation_images` {self.validation_images} must be 0, or at least 2 for images with"
                " `validation_steps`."
            )
        default = self.default_identity()
        ignored = [f"`{name}`" for name in PRETRAINED if getattr(self, name) != default[name]]
        if self.pretrained_model_name_or_path and ignored:
            raise ValueError(
                f"`pretrained_model_name_or_path` {self.pretrained_model_name_or_path!r} brings its own network and"
                f" process: leave out {', '.join(ignored)}."
            )
        if self.basis != "identity" and (self.basis == "dense") != self.is_toy:
            raise ValueError(
                f"`basis` {self.basis!r} is for {'images' if self.is_toy else 'vectors'}, not these data."
            )

    @property
    def likelihood_samples(self) -> int:
        """Data samples whose likelihood is measured."""
        if self.num_likelihood_samples >= 0:
            return self.num_likelihood_samples
        return 500 if self.is_toy and self.num_eval_samples else 0
