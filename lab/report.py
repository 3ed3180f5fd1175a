"""Figures with their errors, and the tables that evaluate.py prints.

A figure is {"mean", "se", "n", "unit"}; a task's result is {name: figure}, and results are {run: {task:
result}}. A result may hold more for figures.py to draw, such as a "grid"; the tables leave that out.
"""
from collections import defaultdict
from pathlib import Path

import numpy as np

from sample import load_checkpoint

# Settings in which runs that are pooled may differ.
MAY_DIFFER = {"seed", "out", "cache_dir", "device", "compile", "eval_every", "eval_tokens", "save_every"}


def figure(values, weights=None, unit="%"):
    """A mean and its standard error: sum(values) / sum(weights), weights 1 by default.

    The error is a ratio estimator's, sqrt(n / (n-1) sum (v - mean w)^2) / sum(w); with weights 1 that is std
    / sqrt(n). Values that depend on each other (ten holes of one function) should come in as their sum, with
    the sum of their weights. unit: "%" for shares (kept as 0 to 1), or the unit to print. An empty sample has
    the mean None."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, total = len(values), weights.sum()
    mean = float(values.sum() / total) if total else None
    se = None
    if total and n > 1:
        se = float(np.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / total)
    return {"mean": mean, "se": se, "n": n, "unit": unit}


def figures_by(keys, values):
    """{key: figure of the values that have it}, keys in the order in which they come."""
    groups = defaultdict(list)
    for key, value in zip(keys, values):
        groups[key].append(value)
    return {key: figure(group) for key, group in groups.items()}


def only_figures(result):
    return {name: f for name, f in result.items() if isinstance(f, dict) and "mean" in f}


def table(results):
    """Results -> a text: a row for each figure, a column for each run."""
    def cell(f):
        if f is None or f["mean"] is None:
            return "-"
        scale, digits = (100, 1) if f["unit"] == "%" else (1, 3)
        se = "" if f["se"] is None else f" ± {scale * f['se']:.{digits}f}"
        return f"{scale * f['mean']:.{digits}f}{se}"

    lines = [("task", "", "", *results)]
    for task in next(iter(results.values())):
        columns = [only_figures(tasks[task]) for tasks in results.values()]
        units = {name: f["unit"] for column in columns for name, f in column.items()}
        lines += [(task, name, unit, *(cell(column.get(name)) for column in columns))
                  for name, unit in units.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(part.ljust(width) if i < 3 else part.rjust(width)
                               for i, (part, width) in enumerate(zip(line, widths))) for line in lines)


def pool(results, configs):
    """Results, and {run: its config} -> results with a column for each objective, "meap (3)" for three runs:
    each figure is the mean of its runs', with the standard error over the runs, such as seeds."""
    groups, pooled = defaultdict(list), {}
    for run, tasks in results.items():
        groups[configs[run]["objective"]].append(tasks)
    for objective, runs in groups.items():
        column = pooled[f"{objective} ({len(runs)})"] = {}
        for task in runs[0]:
            found = [pair for run in runs for pair in only_figures(run[task]).items()]
            column[task] = {name: figure([other["mean"] for its_name, other in found if its_name == name and
                                          other["mean"] is not None], unit=f["unit"]) for name, f in found}
    return pooled


def check_pool(configs):
    """Raises ValueError where two of {run: its config} have one objective, but other settings than the seed
    differ. Runs that were fine-tuned may start from runs that differ in the seed."""
    def settings(config):
        kept = {name: value for name, value in (config | config["knobs"]).items() if name not in MAY_DIFFER}
        if config.get("init_from") and Path(config["init_from"], "ckpt.pt").is_file():
            kept["init_from"] = settings(load_checkpoint(config["init_from"])["config"])
        return kept

    firsts = {}
    for run, config in configs.items():
        first = firsts.setdefault(config["objective"], run)
        one, other = settings(configs[first]), settings(config)
        differ = sorted(name for name in one | other if name != "knobs" and one.get(name) != other.get(name))
        if differ:
            values = [(configs[r] | configs[r]["knobs"]).get(differ[0]) for r in (first, run)]
            raise ValueError(f"--pool: {first} and {run} differ in more than the seed: {', '.join(differ)} "
                             f"({differ[0]} is {values[0]} and {values[1]})")
