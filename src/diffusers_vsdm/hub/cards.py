"""Model cards, rendered from what was measured; what is written into them by hand stays."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import TOYS
from ..files import write_atomically


TEMPLATE = Path(__file__).with_name("model_card_template.md")
GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end -->\n?", flags=re.DOTALL)
METRIC_NAMES = {
    "w2_standardized": "2-Wasserstein distance, standardised axes",
    "w2_floor": "the same between two samples of the data",
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
        repo_id: The repository that the card is for; without one its code names the folder.
        published: The card that is on the Hub.
    """
    metrics, config = record["metrics"], record["config"]
    is_toy = not config["train_data_dir"] and config["dataset_name"] in TOYS
    name = folder.resolve().name if repo_id is None else repo_id.split("/")[-1]
    rows = [(label, metrics[key]) for key, label in METRIC_NAMES.items() if key in metrics]
    rows += [(f"straightness, dimension {i}", value) for i, value in enumerate(metrics.get("straightness", []))]
    data = ModelCardData(
        license=config["license"] or ("apache-2.0" if is_toy else None),
        library_name="diffusers",
        datasets=None if is_toy or config["train_data_dir"] else [config["dataset_name"]],
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
        location=repo_id or name,
        is_toy=is_toy,
        rows=rows,
        **record,
    )
    path = folder / "README.md"
    local = path.read_text() if path.exists() else None
    if local and GENERATED.sub("", ModelCard(local).text) != GENERATED.sub("", card.text):
        card = _merged(card, ModelCard(local), name)
    elif old := published or local:
        card = _merged(card, ModelCard(old), name)
    write_atomically(path, str(card).encode())
    return card


def _merged(new: ModelCard, old: ModelCard, name: str) -> ModelCard:
    """The old card with the generated parts of the new one."""
    parts = {match[1]: match[0] for match in GENERATED.finditer(new.text)}
    text = GENERATED.sub(lambda match: parts.get(match[1], ""), old.text)
    if not GENERATED.search(old.text):
        text = f"{old.text.rstrip()}\n{new.text}"
    fresh, kept = new.data.to_dict(), old.data.to_dict()
    kept.pop("model-index", None)
    data = ModelCardData(ignore_metadata_errors=True, **(fresh | {"model_name": name} | kept))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
