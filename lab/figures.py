"""Draws what was measured. matplotlib is used here and nowhere else.

    python -m lab.figures RUN RUN ...    how runs learned: into curves.png
    python -m lab.figures rows           one text under five objectives: into rows.png
"""
import argparse
import json
from itertools import cycle
from pathlib import Path

import numpy as np

from data import Tokenizer
from objectives import OBJECTIVES, PROMPTS, knobs_of
from sample import Parser, note, one_line_errors

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's


def pyplot():
    """matplotlib's drawing functions, without a screen. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save(fig, path, dpi=150):
    fig.savefig(path, dpi=dpi)
    pyplot().close(fig)
    return path


# One text under five objectives

PARTS = {"prefix": ("def area(w, h):\n", "#c6dbef"), "middle": ("    a = w * h", "#a1d99b"),
         "suffix": ("\n    return a\n", "#fdd0a2")}
ROWS = {"ntp": "plain text", "meap": "15% masked", "fim_psm": "prefix first", "fim_spm": "suffix first",
        "fim": "joint SPM, or PSM"}
SENTINEL, MASK = "#756bb1", "#252525"


def objective_rows():
    """Yields (objective, [(text, colour)]): what a model reads of one short text, a cell a token, and the
    <EOT> that it must predict at the end."""
    whole = "".join(text for text, _ in PARTS.values())
    tok = Tokenizer.train([whole * 9], 2000)

    def cells(part):
        text, colour = PARTS[part]
        return [(tok.decode([i]), colour, i) for i in tok.encode(text)]

    special = {i: (name, MASK if i == tok.mask else SENTINEL, i) for i, name in tok.names.items()}
    plain = [cell for part in PARTS for cell in cells(part)] + [special[tok.eot]]
    for name in ROWS:
        objective = OBJECTIVES[name]
        if name in PROMPTS:  # the layout of training is the prompt of infilling, then the middle and <EOT>
            prompt = PROMPTS[name](cells("prefix"), cells("suffix"), tok, **knobs_of(objective))
            row = [special.get(cell, cell) for cell in (*prompt, *cells("middle"), tok.eot)]
        else:
            inputs, _ = objective(np.array([i for *_, i in plain]), tok, np.random.default_rng(2))
            row = [special.get(i, cell) for i, cell in zip((*inputs.tolist(), tok.eot), plain)]
        yield name, [(text.replace("\n", "⏎").replace(" ", "·"), colour) for text, colour, _ in row]


def rows(width=94):
    """A figure of 900 pixels: width, in characters of its monospace cells."""
    plt, drawn = pyplot(), list(objective_rows())
    fig, axis = plt.subplots(figsize=(9, 0.46 * len(drawn) + 0.45))
    fig.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, width), ylim=(len(drawn) + 0.75, -0.15))
    axis.axis("off")
    for y, (name, cells) in enumerate(drawn):
        axis.text(0.8, y + 0.26, name, va="center", family="monospace", size=10, weight="bold")
        axis.text(0.8, y + 0.64, ROWS[name], va="center", size=7.5, color="#555555")
        x = 13.5
        for text, colour in cells:
            size = len(text) + 0.7
            axis.add_patch(plt.Rectangle((x, y + 0.1), size, 0.72, facecolor=colour, edgecolor="white"))
            axis.text(x + size / 2, y + 0.46, text, ha="center", va="center", family="monospace", size=9.5,
                      color="white" if colour in (SENTINEL, MASK) else "black")
            x += size
    key = {part: colour for part, (_, colour) in PARTS.items()} | {"sentinel": SENTINEL, "masked": MASK}
    axis.legend([plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in key.values()], key, fontsize=9,
                ncols=len(key), loc="lower center", frameon=False, borderaxespad=0)
    return fig


# How runs learned

def curves(folders):
    """Bits per byte of held-out text (of runs on pairs: of held-out answers), and the training loss: two
    panels, a line for each run."""
    fig, axes = pyplot().subplots(1, 2, figsize=(9, 3.8), sharex=True, layout="constrained")
    for folder, colour in zip(folders, cycle(COLOURS)):
        measured = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        for axis, names in zip(axes, (("held_out_bpb", "answer_bpb"), ("loss",))):
            points = [(line["step"], line[name]) for line in measured for name in names if line.get(name)]
            if points:
                style = {"linewidth": 0.8} if len(points) > 50 else {"marker": "o", "markersize": 4}
                axis.plot(*zip(*points), color=colour, label=Path(folder).resolve().name, **style)
    for axis, label in zip(axes, ("held-out text, bits per byte", "training loss, nats per token")):
        axis.set(xlabel="optimiser steps", ylabel=label)
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "no run was evaluated yet", ha="center", transform=axis.transAxes)
    axes[1].legend(fontsize=8)
    return fig


# What evaluate.py measured

def draw(results, folder):
    """{run: {task: {name: figure}}}, as in results.json -> the PNGs written below folder, one for each task;
    says of which tasks nothing was measured. folder is made if there is anything to draw."""
    paths = []
    for task in dict.fromkeys(task for tasks in results.values() for task in tasks):
        measured = {run: {name: f for name, f in tasks.get(task, {}).items() if f["mean"] is not None}
                    for run, tasks in results.items()}
        if any(measured.values()):
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(save(points(measured), folder / f"{task}.png"))
        else:
            note(f"no figure of {task}: nothing was measured")
    return paths


def points(measured):
    """{run: {name: figure}} -> a row for each name, in it a point for each run, with its standard error; a
    panel for each unit."""
    names = {name: f["unit"] for figures in measured.values() for name, f in figures.items()}
    units = {unit: [name for name in names if names[name] == unit] for unit in names.values()}
    heights = [len(of_unit) * (0.2 + 0.1 * len(measured)) + 0.8 for of_unit in units.values()]
    fig, axes = pyplot().subplots(len(units), 1, figsize=(8, sum(heights) + 0.4), layout="constrained",
                                  height_ratios=heights, squeeze=False)
    for axis, (unit, of_unit) in zip(axes[:, 0], units.items()):
        scale = 100 if unit == "%" else 1
        for i, (colour, (run, figures)) in enumerate(zip(cycle(COLOURS), measured.items())):
            shift = 0.5 * ((i + 0.5) / len(measured) - 0.5)
            found = [(scale * f["mean"], y + shift, scale * (f["se"] or 0))
                     for y, name in enumerate(of_unit) if (f := figures.get(name))]
            xs, ys, errors = np.array(found).reshape(-1, 3).T
            axis.errorbar(xs, ys, xerr=errors, fmt="o", markersize=4, capsize=2, color=colour, label=run)
        if unit == "%":  # shares have one scale in all figures
            axis.set_xlim(min(-3, axis.get_xlim()[0]), max(103, axis.get_xlim()[1]))
        axis.set_yticks(range(len(of_unit)), of_unit, fontsize=8)
        axis.set(xlabel=f"{unit} ± a standard error", ylim=(len(of_unit) - 0.5, -0.5))
        axis.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper right",
               ncols=min(4, len(measured)))
    return fig


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or rows")
    runs = parser.parse_args(arguments).runs
    print(save(rows(), "rows.png", 200) if runs == ["rows"] else save(curves(runs), "curves.png", 200))


if __name__ == "__main__":
    main()
