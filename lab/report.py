"""Figures with their errors, and the tables that evaluate.py prints.

A figure is {"mean", "se", "n", "unit"}; a task's result is {name: figure}, and results are {checkpoint:
{task: result}}. A result may hold more for figures.py to draw, such as a "grid"; the tables leave that out.
"""
from collections import defaultdict

import numpy as np


def figure(values, weights=None, unit="%"):
    """A mean and its standard error: sum(values) / sum(weights), weights 1 by default.

    The error is a ratio estimator's, sqrt(n / (n-1) sum (v - mean w)^2) / sum(w); with weights 1 that is std
    / sqrt(n). Values that depend on each other (ten holes of one function) should come in as their sum, with
    the sum of their weights. unit: "%" for shares (kept as 0 to 1), or the unit to print. An empty sample has
    the mean None."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, total = len(values), weights.sum()
    if not total:
        return {"mean": None, "se": None, "n": n, "unit": unit}
    mean = float(values.sum() / total)
    se = float(np.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / total) if n > 1 else None
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
    """Results -> a text: a row for each figure, a column for each checkpoint."""
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
        for name, unit in units.items():
            lines.append((task, name, unit, *(cell(column.get(name)) for column in columns)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(part.ljust(width) if i < 3 else part.rjust(width)
                               for i, (part, width) in enumerate(zip(line, widths))) for line in lines)


def pool(results, objectives):
    """Results, and {checkpoint: its objective} -> results with a column for each objective, "meap (3)" for
    three runs: each figure is the mean of its runs', with the standard error over the runs, such as seeds."""
    groups, pooled = defaultdict(list), {}
    for name, tasks in results.items():
        groups[objectives[name]].append(tasks)
    for objective, runs in groups.items():
        column = pooled[f"{objective} ({len(runs)})"] = {}
        for task in runs[0]:
            means, units = defaultdict(list), {}
            for run in runs:
                for name, f in only_figures(run[task]).items():
                    units[name] = f["unit"]
                    means[name] += [f["mean"]] if f["mean"] is not None else []
            column[task] = {name: figure(means[name], unit=unit) for name, unit in units.items()}
    return pooled
