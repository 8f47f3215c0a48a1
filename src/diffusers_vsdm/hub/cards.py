"""Model cards, rendered from what was measured; what is written into them by hand stays."""

import functools
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, Template

from ..data import TOYS
from ..files import write_atomically


TEMPLATE = "model_card_template.md"
# of runs with a setting of this name
TEMPLATES = {"objective": "bridge_card_template.md", "differencing": "forecast_card_template.md"}
FORECASTING = "time-series-forecasting"
GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end -->\n?", flags=re.DOTALL)
METRIC_NAMES = {
    "w2_standardized": "2-Wasserstein distance, standardised axes",
    "w2_sde": "2-Wasserstein distance, backward SDE",
    "w2_ode": "2-Wasserstein distance, probability flow",
    "w2_floor": "the same between two samples of the data",
    "w2_forward": "2-Wasserstein distance of the forward end",
    "w2_forward_floor": "the same between two samples of the prior",
    "control_energy": "control energy, nats",
    "crps_sum": "CRPS-sum",
    "crps": "CRPS, weighted mean over the series",
    "nd_sum": "normalised deviation of the sum",
    "nrmse_sum": "normalised root mean squared error of the sum",
}


def render_card(
    folder: Path, record: dict[str, Any], repo_id: str | None = None, published: str | None = None
) -> ModelCard:
    """Render `README.md` in a model's folder.

    The parts between the template's markers are made anew, and the results of the metadata; all else is kept as it
    is: a card that is there already, or `published` where the folder's has nothing of anybody's own.

    Args:
        folder: The model's folder.
        record: What `metrics.json` holds: `metrics`, `config`, `command` and `versions`.
        repo_id: The repository that the card is for; without one its code names the folder, as seen from the working
            directory.
        published: The card that is on the Hub.
    """
    metrics, config = record["metrics"], record["config"]
    is_toy = not config["train_data_dir"] and config["dataset_name"] in TOYS
    task = _task(config)
    # GluonTS's names have no owner
    is_on_hub = not is_toy and not config["train_data_dir"] and ("/" in config["dataset_name"] or task != FORECASTING)
    name = folder.resolve().name if repo_id is None else repo_id.split("/")[-1]
    rows = [(label, metrics[key]) for key, label in METRIC_NAMES.items() if key in metrics]
    rows += [(f"straightness, dimension {i}", value) for i, value in enumerate(metrics.get("straightness", []))]
    likelihood = [("negative log-likelihood, nats", metrics["likelihood"]["nll"])] if "likelihood" in metrics else []
    data = ModelCardData(
        license=config["license"] or ("apache-2.0" if is_toy else None),
        library_name="diffusers",
        datasets=[config["dataset_name"]] if is_on_hub else None,
        tags=["diffusers_vsdm", task, "schrodinger-bridge"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=config["dataset_name"],
                dataset_name=config["dataset_name"],
                metric_type=label,
                metric_value=round(value, 4),
            )
            for label, value in rows + likelihood
        ]
        or None,
    )
    location = repo_id or _location(folder)
    template = _template(next((name for key, name in TEMPLATES.items() if key in config), TEMPLATE))
    card = ModelCard(template.render(model_name=name, location=location, is_toy=is_toy, rows=rows, **record))
    card.data = data
    path = folder / "README.md"
    old = ModelCard(path.read_text()) if path.exists() else None
    if published and (old is None or GENERATED.sub("", old.text) == GENERATED.sub("", card.text)):
        old = ModelCard(published)
    if old is not None:
        _merge(card, old, name, {"license": config["license"]} if config["license"] else {})
    write_atomically(path, str(card).encode())
    return card


def _task(config: dict[str, Any]) -> str:
    if "differencing" in config:
        return FORECASTING
    return "class-conditional-generation" if config.get("class_conditional") else "unconditional-generation"


@functools.cache
def _template(name: str) -> Template:
    """Compiled once; that is half of rendering."""
    return Environment(loader=FileSystemLoader(Path(__file__).parent)).get_template(name)


def _location(folder: Path) -> str:
    """What the card of a folder may say of its place: all of a path inside the working directory, or the last name."""
    is_inside = not folder.is_absolute() and ".." not in folder.parts
    return folder.as_posix() if is_inside else folder.resolve().name


def _merge(card: ModelCard, old: ModelCard, name: str, stated: dict[str, Any]) -> None:
    """Put the card's generated parts and results, and metadata that was stated, into the old one."""
    parts = {match[1]: match[0] for match in GENERATED.finditer(card.text)}
    text = GENERATED.sub(lambda match: parts.get(match[1], ""), old.text)
    card.text = text if GENERATED.search(old.text) else f"{old.text.rstrip()}\n{card.text}"
    fresh, kept = card.data.to_dict(), old.data.to_dict()
    kept.pop("model-index", None)
    card.data = ModelCardData(ignore_metadata_errors=True, **(fresh | {"model_name": name} | kept | stated))
