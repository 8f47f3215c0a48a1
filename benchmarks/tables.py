"""Write the tables of the docs from the records in `benchmarks/results/`.

    python -m benchmarks.tables

A table stands between `<!-- table NAME -->` and `<!-- end -->` in a file under `docs/` or in the README. Entries are
the mean and the standard deviation over seeds, or medians over repeats.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def by_name(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The metrics of a record's runs, grouped by configuration."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        groups.setdefault(run["name"], []).append(run["metrics"])
    return groups


def table(record: dict[str, Any], columns: dict[str, Callable[[list[dict[str, Any]]], str]]) -> str:
    """A Markdown table, one row for each configuration."""
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cell(runs) for cell in columns.values())] for name, runs in by_name(record).items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def each(key: str, digits: int) -> Callable[[list[dict[str, Any]]], str]:
    """A column of one metric."""
    return lambda runs: spread([run[key] for run in runs], digits)


def median(key: str, digits: int, factor: float = 1) -> Callable[[list[dict[str, Any]]], str]:
    """A column of one metric's median over repeats, times `factor`; a dash where it was not measured."""
    return lambda runs: f"{factor * statistics.median(run[key] for run in runs):.{digits}f}" if key in runs[0] else "-"


def axes(key: str, digits: int) -> Callable[[list[dict[str, Any]]], str]:
    """A column of a metric with one value for each dimension, x / y."""
    return lambda runs: " / ".join(spread([run[key][i] for run in runs], digits) for i in range(len(runs[0][key])))


TOY_COLUMNS = {
    "lambda * beta_max, x / y": axes("lambda_beta_max", 1),
    "straightness, x / y": axes("straightness", 1),
    "W2, 99 Euler steps": each("w2_standardized", 3),
    "W2, Heun, 5 calls": each("w2_heun_5", 3),
    "9 calls": each("w2_heun_9", 3),
    "19 calls": each("w2_heun_19", 3),
}
TABLES: dict[str, tuple[str, dict[str, Callable[[list[dict[str, Any]]], str]]]] = {
    "toys_paper": ("toys_paper.json", TOY_COLUMNS),
    "toys_simulation": ("toys_simulation.json", TOY_COLUMNS),
    "toys_standardized": ("toys_standardized.json", TOY_COLUMNS),
    "cifar10": (
        "cifar10.json",
        {
            "seconds": each("seconds", 0),
            "of them in stochastic approximation, %": median("sa_share", 1, 100),
            "lambda: least, quartiles, largest": lambda runs: " / ".join(f"{x:.2f}" for x in runs[0]["lambda"]),
            "killed": lambda runs: str(len(runs[0]["killed_after_checkpoint"])),
            "resumed run": lambda runs: "identical" if runs[0]["resumed_is_identical"] else "differs",
        },
    ),
    "training_speed": (
        "training_speed.json",
        {
            "images/s": median("images_per_second", 1),
            "relative": median("relative", 3),
            "peak memory, MB": median("peak_mb", 0),
            "in stochastic approximation, %": median("sa_share", 1, 100),
        },
    ),
    "prior_repair": (
        "prior_repair.json",
        {"brightness": each("brightness", 3), "Frechet distance": each("frechet", 2)},
    ),
    "conformance": (
        "conformance.json",
        {name: median(name, 0) for name in ("passed", "skipped", "failure", "error", "deselected")},
    ),
    "simulation": ("simulation.json", {"E[score x], x / y": axes("moment", 3)}),
}


def render(text: str) -> str:
    """`text` with every table between its markers made anew."""

    def fill(match: re.Match) -> str:
        file, columns = TABLES[match[1]]
        return f"<!-- table {match[1]} -->\n{table(json.loads((RESULTS / file).read_text()), columns)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for path in documents():
        path.write_text(render(path.read_text()))
