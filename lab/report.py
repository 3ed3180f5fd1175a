"""Figures with their errors, {"mean", "se", "n", "unit"}, and the tables of evaluate.py's results, which are
{run: {task: {name: figure}}}.
"""
from collections import defaultdict

import numpy as np

# Settings in which runs that are pooled may differ.
MAY_DIFFER = {"seed", "out", "cache_dir", "device", "compile", "eval_every", "eval_tokens", "save_every",
              "knobs"}  # each knob is compared alone


def figure(values, weights=None, unit="%"):
    """A mean and its standard error: sum(values) / sum(weights), weights 1 by default.

    The error is a ratio estimator's, sqrt(n / (n-1) sum (v - mean w)^2) / sum(w); with weights 1 that is std
    / sqrt(n). unit: "%" for shares (kept as 0 to 1), or the unit to print. The mean of no values is None."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, total = len(values), weights.sum()
    mean = float(values.sum() / total) if total else None
    se = None
    if total and n > 1:
        se = float(np.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / total)
    return {"mean": mean, "se": se, "n": n, "unit": unit}


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
        columns = [tasks[task] for tasks in results.values()]
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
            units = {name: f["unit"] for run in runs for name, f in run[task].items()}
            means = {name: [run[task][name]["mean"] for run in runs if name in run[task]] for name in units}
            column[task] = {name: figure([mean for mean in means[name] if mean is not None], unit=unit)
                            for name, unit in units.items()}
    return pooled


def check_pool(configs):
    """Raises ValueError where two of {run: its config} have one objective, but other settings than the seed
    differ. Runs that were fine-tuned may start from ntp-1 and ntp-2."""
    firsts = {}
    for run, config in configs.items():
        settings = {name: value for name, value in (config | config["knobs"]).items()
                    if name not in MAY_DIFFER}
        settings["init_from"] = config.get("init_from", "").rstrip("0123456789")
        first, expected = firsts.setdefault(config["objective"], (run, settings))
        for name in sorted(settings | expected):
            if settings.get(name) != expected.get(name):
                raise ValueError(f"--pool: {first} and {run} differ in more than the seed: {name} is "
                                 f"{expected.get(name)} and {settings.get(name)}")
