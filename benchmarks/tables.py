"""Write the tables of the docs from the records in `benchmarks/results/`.

    python -m benchmarks.tables

A table stands between `<!-- table NAME -->` and `<!-- end -->` in a file under `docs/` or in the README. Entries are
the mean and the standard deviation over seeds, or medians over repeats.
"""

import collections
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Columns = dict[str, Callable[[list[dict[str, Any]]], str]]


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


def table(record: dict[str, Any], columns: Columns) -> str:
    """A Markdown table, one row for each configuration."""
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cell(runs) for cell in columns.values())] for name, runs in by_name(record).items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def each(key: str, digits: int, factor: float = 1) -> Callable[[list[dict[str, Any]]], str]:
    """A column of one metric, times `factor`; a dash where it was not measured."""
    return lambda runs: spread([factor * run[key] for run in runs], digits) if key in runs[0] else "-"


def median(key: str, digits: int, factor: float = 1) -> Callable[[list[dict[str, Any]]], str]:
    """A column of one metric's median over repeats, times `factor`; a dash where it was not measured."""
    return lambda runs: f"{factor * statistics.median(run[key] for run in runs):.{digits}f}" if key in runs[0] else "-"


def with_error(key: str, error: str, digits: int) -> Callable[[list[dict[str, Any]]], str]:
    """A column of one run's metric and its standard error."""
    return lambda runs: f"{runs[0][key]:.{digits}f} ± {runs[0][error]:.{digits}f}"


def text(key: str) -> Callable[[list[dict[str, Any]]], str]:
    """A column as it is."""
    return lambda runs: str(runs[0][key])


def axes(key: str, digits: int) -> Callable[[list[dict[str, Any]]], str]:
    """A column of a metric with one value for each dimension, x / y."""
    return lambda runs: " / ".join(spread([run[key][i] for run in runs], digits) for i in range(len(runs[0][key])))


def with_table4(record: dict[str, Any]) -> dict[str, Any]:
    """Runs of some stages, between those of none and of forty."""
    rest = json.loads((RESULTS / "toys_table4.json").read_text())["runs"]
    known = {"spiral-8y SGM-10": "SGM", "spiral-8y VSDM-10": "40 stages"}
    runs = [run | {"name": known[run["name"]]} for run in rest if run["name"] in known] + record["runs"]
    return {"runs": sorted(runs, key=lambda run: 0 if run["name"] == "SGM" else int(run["name"].split()[0]))}


def in_order(record: dict[str, Any]) -> dict[str, Any]:
    """With the runs sorted by name: several processes leave them as they finish."""
    return record | {"runs": sorted(record["runs"], key=lambda run: (run["name"], run["seed"]))}


FEW_STEP_DEFAULT = "trig-fitted 3, quadratic"


def best_solvers(record: dict[str, Any]) -> dict[str, Any]:
    """Of the study of solvers, for each problem and number of calls: the best ones, and the default."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for run in record["runs"]:
        for calls in run["metrics"]:
            rows.setdefault((run["problem"], calls), {})

    def errors(calls: str, **where: str) -> list[tuple[list[float], str]]:
        runs = (run for run in record["runs"] if all(run[key] == value for key, value in where.items()))
        return sorted((run["metrics"][calls], run["name"]) for run in runs)

    for (problem, calls), row in rows.items():
        for whose in ("ours", "Diffusers"):
            (mean, error), name = errors(calls, problem=problem, process="neutral", whose=whose)[0]
            row[f"best, {whose}"] = f"{mean:.1e} ± {error:.0e} ({name})"
        for process in ("neutral", "neutral, moments", "learned"):
            (mean, _), _ = errors(calls, problem=problem, process=process, name=FEW_STEP_DEFAULT)[0]
            row[process] = f"{mean:.1e}"
        (mean, _), name = errors(calls, problem=problem, process="learned")[0]
        row["best, learned"] = f"{mean:.1e} ({name})"
    return {"runs": [{"name": f"{p}; {calls} calls", "metrics": row} for (p, calls), row in rows.items()]}


def rank_solvers(record: dict[str, Any]) -> dict[str, Any]:
    """The ten settings with the least errors, in the geometric mean over problems; lambda 1, nothing known."""
    logs: dict[str, dict[str, list[float]]] = {}
    for run in (run for run in record["runs"] if run["process"] == "neutral"):
        for calls, (mean, _) in run["metrics"].items():
            logs.setdefault(f"{run['name']} ({run['whose']})", {}).setdefault(calls, []).append(math.log(mean))
    means = {name: {calls: statistics.mean(x) for calls, x in each.items()} for name, each in logs.items()}
    ranked = sorted(means, key=lambda name: sum(means[name].values()))
    shown = ranked[:8] + [name for name in ranked if name.endswith("(Diffusers)")][:3]
    rows = (name for name in ranked if name in shown)
    return {"runs": [{"name": n, "metrics": {c: math.exp(x) for c, x in means[n].items()}} for n in rows]}


PATH = "lambda_beta_max_per_stage"


def limits(record: dict[str, Any]) -> dict[str, list[float]]:
    """Where lambda goes, by configuration: the mean of all seeds over the second half of the stages."""
    paths = {name: [run[PATH] for run in runs] for name, runs in by_name(record).items()}
    return {
        name: [statistics.mean(stage[i] for path in seeds for stage in path[len(path) // 2 :]) for i in range(2)]
        for name, seeds in paths.items()
        if len(seeds[0]) > 1
    }


def convergence(record: dict[str, Any], ends: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """How far the averaged lambda is from `ends`, by default its own limits."""
    rows, ends = [], limits(record) if ends is None else ends
    for run in (run for run in record["runs"] if run["name"] in ends):
        limit, path = ends[run["name"]], run["metrics"][PATH]
        average, metrics = list(path[0]), {"limit": limit}
        for k, stage in enumerate(path[1:], 1):
            weight = (1 + AVERAGING_POWER) / (k + AVERAGING_POWER)
            average = [old + weight * (new - old) for old, new in zip(average, stage, strict=True)]
            metrics[str(k)] = [100 * (value / end - 1) for value, end in zip(average, limit, strict=True)]
        rows.append({"name": run["name"], "metrics": run["metrics"] | metrics})
    return {"runs": rows}


def convergence_to_table4(record: dict[str, Any]) -> dict[str, Any]:
    """The same, from the limits of the longer runs."""
    return convergence(record, limits(json.loads((RESULTS / "toys_table4.json").read_text())))


def by_data(record: dict[str, Any]) -> dict[str, Any]:
    """Rows named after data set and method, the data sets together; seeds that not all of them have are left out."""
    runs = record["runs"]
    counts = collections.Counter(run["seed"] for run in runs)
    whole = (run for run in runs if counts[run["seed"]] == max(counts.values()))
    rows = [run | {"name": f"{run['data']}: {run['name']}"} for run in whole]
    return {"runs": sorted(rows, key=lambda run: [r["data"] for r in runs].index(run["data"]))}


def by_change(record: dict[str, Any]) -> dict[str, Any]:
    """Runs named `data: change` as one row for each change, with the metrics of both data sets."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for run in record["runs"]:
        data, change = run["name"].split(": ")
        metrics = {f"{data} {key}": value for key, value in run["metrics"].items()}
        rows.setdefault((change, run["seed"]), {}).update(metrics)
    return {"runs": [{"name": change, "metrics": metrics} for (change, _), metrics in rows.items()]}


def named(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The runs of these names alone; a list of errors becomes percentages by stage."""

    def arrange(record: dict[str, Any]) -> dict[str, Any]:
        runs = [run for run in record["runs"] if run["name"] in names]
        for run in runs:
            run["metrics"] |= {str(i): 100 * x for i, x in enumerate(run["metrics"].get("error", []), 1)}
        return {"runs": runs}

    return arrange


AVERAGING_POWER = 3  # the drift's default
TOY_COLUMNS = {
    "lambda * beta_max, x / y": axes("lambda_beta_max", 1),
    "straightness, x / y": axes("straightness", 1),
    "W2, 99 Euler steps": each("w2_standardized", 3),
    "W2, Heun, 5 calls": each("w2_heun_5", 3),
    "9 calls": each("w2_heun_9", 3),
    "19 calls": each("w2_heun_19", 3),
}
BRIDGE_COLUMNS: Columns = {  # what `evaluate_bridge` measures
    "W2, SDE": each("w2_sde", 3),
    "W2, flow": each("w2_ode", 3),
    "floor": each("w2_floor", 3),
    "W2, forward end": each("w2_forward", 3),
    "its floor": each("w2_forward_floor", 3),
    "path energy": each("path_energy", 3),
    "control energy": each("control_energy", 2),
}
# file, columns, and where the rows are not the record's runs what makes them
TABLES: dict[str, tuple] = {
    "toys_table4": (
        "toys_table4.json",
        {
            "lambda * beta_max, x / y": axes("lambda_beta_max", 1),
            "straightness, x / y": axes("straightness", 1),
            "W2, 99 Euler steps": each("w2_standardized", 3),
            "W2, Heun, 9 calls": each("w2_heun_9", 3),
            "path energy": each("normalized_path_energy", 2),
            "sliced W1": each("sliced_w1_standardized", 3),
            "PMF distance, 1e-4": each("pmf_distance", 2, 1e4),
            "in stochastic approximation, %": median("sa_share", 1, 100),
        },
    ),
    "toys_convergence": (
        "toys_table4.json",
        {"limit of lambda * beta_max, x / y": axes("limit", 1)}
        | {f"{k} stages, %": axes(str(k), 0) for k in (5, 10, 20, 40)},
        convergence,
    ),
    "toys_convergence_twenty": (
        "toys_convergence.json",
        {f"{k} stages, %": axes(str(k), 0) for k in (5, 10, 20)}
        | {key: TOY_COLUMNS[key] for key in ("lambda * beta_max, x / y", "straightness, x / y", "W2, 99 Euler steps")},
        convergence_to_table4,
    ),
    "methods": (
        "methods.json",
        {f"W2, {calls} calls": each(f"w2_{calls}", 3) for calls in (6, 8, 10, 20, 100)}
        | {
            "straightness": each("straightness_standardized", 1),
            "path energy": each("normalized_path_energy", 2),
        },
        by_data,
    ),
    "methods_seconds": ("methods.json", {"training, s, median over data sets": median("seconds", 0)}),
    "gaussian_ipf": (
        "gaussian.json",
        {f"stage {i}, %": each(str(i), 1) for i in range(1, 7)},
        named("exact score", "trained score"),
    ),
    "gaussian_flow": (
        "gaussian.json",
        {
            "W2 of the end points": each("w2", 3),
            "distance of each to its twin": each("distance_to_twin", 3),
            "eigenvalues of D": axes("lambda", 2),
        },
        named("flow"),
    ),
    "toys_budget": (
        "toys_budget.json",
        {
            "in stochastic approximation, %": each("sa_share", 1, 100),
            "lambda * beta_max, x / y": axes("lambda_beta_max", 1),
            "straightness, x / y": axes("straightness", 1),
            "W2, 99 Euler steps": each("w2_standardized", 3),
        },
        with_table4,
    ),
    "toys_default": (
        "toys_default.json",
        {
            "lambda * beta_max, x / y": axes("lambda_beta_max", 1),
            "straightness, x / y": axes("straightness", 1),
            "path energy": each("normalized_path_energy", 2),
            "W2, 99 Euler steps": each("w2_standardized", 3),
            "6 calls": each("w2_trig_6", 3),
            "10 calls": each("w2_trig_10", 3),
            "in stochastic approximation, %": each("sa_share", 1, 100),
        },
    ),
    "toys_turned": (
        "toys_turned.json",
        {
            "lambda * beta_max": axes("lambda_beta_max", 1),
            "axis of the largest, degrees": each("axis", 1),
            "straightness, x / y": axes("straightness", 1),
            "W2, 99 Euler steps": each("w2_standardized", 3),
        },
    ),
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
    "hub_speed": (
        "hub_speed.json",
        {
            "MB": median("megabytes", 1),
            "push, ms": median("push", 0, 1000),
            "beside `upload_folder`": median("push_ratio", 2),
            "cold load, ms": median("load", 0, 1000),
            "beside `snapshot_download` and a load": median("load_ratio", 2),
        },
    ),
    "scheduler_speed": (
        "scheduler_speed.json",
        {
            f"{method}, {solver}": median(f"{method}, {solver}", 2)
            for method in ("step", "add_noise")
            for solver in ("ddpm", "dpmsolver++", "unipc")
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
    "prior_repair_trained": (
        "prior_repair_trained.json",
        {"brightness": each("brightness", 3), "Frechet distance": each("frechet", 2)},
    ),
    "solvers": (
        "solvers_fixed.json",
        {
            "best of ours": text("best, ours"),
            "best of Diffusers": text("best, Diffusers"),
            "`trig-fitted`": text("neutral"),
            "`trig-fitted`, moments": text("neutral, moments"),
            "`trig-fitted`, learned λ": text("learned"),
            "best of ours, learned λ": text("best, learned"),
        },
        best_solvers,
    ),
    "solvers_ranked": (
        "solvers_fixed.json",
        {f"{calls} calls": each(str(calls), 5) for calls in (5, 6, 8, 10, 20, 50)},
        rank_solvers,
    ),
    "solvers_drawn": (
        "solvers_drawn.json",
        {f"{calls} calls": each(str(calls), 5) for calls in (5, 6, 8, 10, 20, 50)},
        rank_solvers,
    ),
    "toys_search": (
        "toys_search.json",
        {
            f"{data}: {label}": column(f"{data} {key}", digits)
            for data in ("spiral-8y", "checkerboard-6x")
            for label, key, column, digits in (
                ("straightness, x / y", "straightness", axes, 1),
                ("W2, 99 calls", "w2_standardized", each, 3),
                ("6 calls", "w2_trig_6", each, 3),
                ("10 calls", "w2_trig_10", each, 3),
            )
        },
        by_change,
    ),
    "toys_prediction": (
        "toys_prediction.json",
        {
            "straightness, x / y": axes("straightness", 2),
            "W2, 99 calls": each("w2_standardized", 3),
            "6 calls": each("w2_trig_6", 3),
            "10 calls": each("w2_trig_10", 3),
            "negative log-likelihood": each("nll", 3),
        },
    ),
    "likelihood_exact": (
        "likelihood_exact.json",
        {
            "truth - computed, nats": with_error("difference", "standard_error", 4),
            "network calls": each("num_function_evaluations", 0),
        },
    ),
    "likelihood_trained": (
        "likelihood_trained.json",
        {
            "truth - flow, nats": each("difference", 4),
            "flow, negative log-likelihood": each("nll", 3),
            "SDE, bound": each("bound", 3),
            "prior loss": each("prior_loss", 3),
            "drift matching": each("drift_matching", 3),
            "reconstruction": each("reconstruction", 3),
            "calls, flow": each("nll_evaluations", 0),
        },
    ),
    "likelihood_images": (
        "likelihood_images.json",
        {
            "flow": with_error("nll_bits_per_dimension", "nll_bits_per_dimension_standard_error", 3),
            "calls": each("nll_evaluations", 0),
            "SDE, bound": with_error("bound_bits_per_dimension", "bound_bits_per_dimension_standard_error", 3),
            "calls of it": each("bound_evaluations", 0),
            "of it reconstruction": each("reconstruction", 3, 1 / (768 * math.log(2))),
        },
    ),
    "bridges_toys": (
        "bridges_toys.json",
        BRIDGE_COLUMNS
        | {
            "NLL above the truth, nats": each("nll excess", 3),
            "bound above it": each("bound excess", 3),
            "ms a step": each("seconds per step", 1, 1000),
            "seconds": each("seconds", 0),
        },
        in_order,
    ),
    "bridges_gaussian": (
        "bridges_gaussian.json",
        {
            "relative error of z_f, %": each("relative error", 1, 100),
            "control energy": each("control energy", 3),
            "of the bridge": each("of the bridge", 3),
            "W2 of the forward end": each("forward end", 3),
            "seconds": each("seconds", 0),
        },
        in_order,
    ),
    "bridges_transport": (
        "bridges_transport.json",
        {
            "cBW2-UVP, %": each("cBW2-UVP", 2),
            "of the plan": each("cBW2-UVP floor", 2),
            "BW2-UVP, %": each("BW2-UVP", 2),
            "of the plan's ends": each("BW2-UVP floor", 2),
            "seconds": each("seconds", 0),
        },
        in_order,
    ),
    "bridges_transport_models": (
        "bridges_transport.json",
        BRIDGE_COLUMNS
        | {
            "NLL, nats": each("nll", 3),
            "bound": each("bound", 3),
            "ms a step": each("seconds per step", 1, 1000),
        },
        in_order,
    ),
    "forecast": (
        "forecast.json",
        {
            "CRPS-sum": each("crps_sum", 4),
            "CRPS": each("crps", 4),
            "CRPS-sum, 6 calls": each("crps_sum trig@6", 4),
            "10 calls": each("crps_sum trig@10", 4),
            "30 calls": each("crps_sum trig@30", 4),
            "150 calls": each("crps_sum ddpm@150", 4),
            "training, s": each("seconds", 0),
        },
        in_order,
    ),
    "forecast_baselines": (
        "forecast_baselines.json",
        {
            "CRPS-sum": each("crps_sum", 4),
            "CRPS": each("crps", 4),
            "seconds": lambda runs: f"{runs[0]['seconds_choosing'] + runs[0]['seconds']:.0f}",
        },
        in_order,
    ),
    "forecast_validation": (
        "forecast_validation.json",
        {"CRPS-sum": each("crps_sum", 4), "CRPS": each("crps", 4), "training, s": each("seconds", 0)},
        in_order,
    ),
    "forecast_speed": (
        "forecast_speed.json",
        {"seconds": median("seconds", 2), "CRPS-sum": median("crps_sum", 4)},
        in_order,
    ),
    "forecast_calibration": (
        "forecast_calibration.json",
        {"slope": each("slope", 2), "spread / error": each("spread", 2), "error / deviation": each("error", 2)},
        in_order,
    ),
    "images_pilot": (
        "images_pilot.json",
        {
            "FID (500 samples), 6 calls": each("fid trig@6", 1),
            "KID x 1000": each("kid trig@6", 1, 1000),
            "FID (500 samples), 20 calls": each("fid trig@20", 1),
            "KID x 1000, 20 calls": each("kid trig@20", 1, 1000),
            "lambda, median": lambda runs: f"{statistics.median(runs[0]['lambda']):.2f}",
        },
    ),
    "images_table": (
        "images_table.json",
        {
            f"{name}, {run.rpartition('@')[2]} calls": each(f"{key} {run}", 1, factor)
            for name, key, factor in (("FID (2,000 samples)", "fid", 1), ("KID x 1000", "kid", 1000))
            for run in ("trig@6", "trig@10", "trig@20", "trig@35", "euler-maruyama@200")
        },
    ),
    "images_bridge": (
        "images_bridge.json",
        {
            f"{name}, {label}": each(f"{key} {run}", 1, factor)
            for name, key, factor in (("FID (500 samples)", "fid", 1), ("KID x 1000", "kid", 1000))
            for run, label in (("trig@6", "6 calls"), ("trig@20", "20 calls"), ("euler-maruyama@50", "SDE, 50 calls"))
        }
        | {"start, s": each("start_seconds", 0), "training, s": each("seconds", 0)},
    ),
    "images_flow": (
        "images_flow.json",
        {f"{calls} calls": with_error(str(calls), f"{calls} error", 4) for calls in (5, 6, 8, 10, 20)},
    ),
    "simulation": ("simulation.json", {"E[score x], x / y": axes("moment", 3)}),
}


def render(text: str) -> str:
    """`text` with every table between its markers made anew."""

    def fill(match: re.Match) -> str:
        file, columns, *arrange = TABLES[match[1]]
        record = json.loads((RESULTS / file).read_text())
        for make in arrange:
            record = make(record)
        return f"<!-- table {match[1]} -->\n{table(record, columns)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for path in documents():
        path.write_text(render(path.read_text()))
