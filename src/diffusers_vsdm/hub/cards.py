"""Model cards, rendered from what was measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import TOYS
from ..files import write_atomically


TEMPLATE = Path(__file__).with_name("model_card_template.md")
METRIC_NAMES = {
    "w2_standardized": "2-Wasserstein distance, standardised axes",
    "w2_floor": "the same between two samples of the data",
}


def render_card(folder: Path, record: dict[str, Any], model_name: str | None = None) -> ModelCard:
    """Render `README.md` in a model's folder.

    Args:
        folder: The model's folder.
        record: What `metrics.json` holds: `metrics`, `config` and `versions`.
        model_name: Title of the card. Defaults to the folder's name.
    """
    metrics, config = record["metrics"], record["config"]
    name = model_name or folder.resolve().name
    rows = [(label, metrics[key]) for key, label in METRIC_NAMES.items() if key in metrics]
    rows += [(f"straightness, dimension {i}", value) for i, value in enumerate(metrics.get("straightness", []))]
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        tags=["diffusers_vsdm", "unconditional-generation", "schrodinger-bridge"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="unconditional-generation",
                dataset_type=config["dataset_name"],
                dataset_name=config["dataset_name"],
                metric_type=label,
                metric_value=round(value, 4),
            )
            for label, value in rows
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        config=config,
        metrics=metrics,
        rows=rows,
        is_toy=not config["train_data_dir"] and config["dataset_name"] in TOYS,
        versions=record["versions"],
    )
    write_atomically(folder / "README.md", str(card).encode())
    return card
