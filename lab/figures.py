"""Draws what was measured. matplotlib is used here and nowhere else.

    python -m lab.figures rows FILE.png                         one text under five objectives
    python -m lab.figures curves FILE.png RUN [RUN ...]         how runs learned
    python -m lab.figures results out/eval/results.json FOLDER  the figures of evaluate.py again

bars, lines and scatter draw the panels of claims.py: a point a seed, their mean as a bar or a line.
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


def finish(axis, title="", legend=False, grid="both", **settings):
    """Title, labels (settings of axis.set), a grid and, if asked for, a legend."""
    axis.set(**settings)
    axis.set_title(title, fontsize=10)
    axis.grid(axis=grid, alpha=0.3)
    axis.set_axisbelow(True)
    if legend:
        axis.legend(fontsize=8)


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
    """Bits per byte of held-out text (of runs on pairs: of held-out answers) and, thin, the training loss."""
    fig, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    losses = axis.twinx()
    for folder, colour in zip(folders, cycle(COLOURS)):
        measured = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        held_out = [(line["step"], line.get("held_out_bpb", line.get("answer_bpb"))) for line in measured]
        held_out = np.array([point for point in held_out if point[1] is not None]).reshape(-1, 2)
        axis.plot(*held_out.T, marker="o", markersize=4, color=colour, label=Path(folder).resolve().name)
        losses.plot([line["step"] for line in measured], [line["loss"] for line in measured], linewidth=0.6,
                    color=colour)
    losses.set_ylabel("thin: training loss, nats per token")
    finish(axis, legend=True, xlabel="optimiser steps", ylabel="held-out text, bits per byte")
    return fig


# What evaluate.py measured

def draw(results, folder):
    """{run: {task: figures}}, as in results.json -> the list of PNGs written below folder, which is made if
    there is anything to draw."""
    paths = []
    for task, (drawing, needs) in FIGURES.items():
        measured = {name: tasks[task] for name, tasks in results.items() if tasks.get(task, {}).get(needs)}
        if measured:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(save(drawing(measured), folder / f"{task}.png"))
    if not paths:
        note(f"no figure: expected results of {', '.join(FIGURES)} (of runs that were fine-tuned, answers)")
    return paths


def needle(measured):
    """Shares of values recalled, and preferred to another, by context length and depth."""
    fig, axes = pyplot().subplots(2, len(measured), figsize=(1.6 + 2.9 * len(measured), 5.6),
                                  layout="constrained", squeeze=False, sharex=True, sharey=True)
    for column, (name, figures) in zip(axes.T, measured.items()):
        lengths, depths = (sorted({cell[key] for cell in figures["grid"]}) for key in ("number", "position"))
        for axis, key in zip(column, ("recalled", "preferred")):
            values = {(cell["number"], cell["position"]): 100 * cell[key]["mean"] for cell in figures["grid"]}
            grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
            axis.imshow(grid, cmap="YlGn", vmin=0, vmax=100, aspect="auto")
            for (i, j), value in np.ndenumerate(grid):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 70 else "black")
        column[0].set_title(name)
        column[1].set_xlabel("context, tokens")
        column[1].set_xticks(range(len(lengths)), lengths)
    for row, label in zip(axes, ("recalled, %", "preferred to another value, %\n(chance: 50)")):
        row[0].set_ylabel("depth of the needle, %")
        row[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        fig.colorbar(row[-1].images[0], ax=row, label=label)
    return fig


def records(measured):
    """The same by the position of the record that holds the answer."""
    counts = sorted({cell["number"] for figures in measured.values() for cell in figures["grid"]})
    fig, axes = pyplot().subplots(2, len(counts), figsize=(1.5 + 2.6 * len(counts), 5), layout="constrained",
                                  squeeze=False, sharex="col", sharey="row")
    for column, k in zip(axes.T, counts):
        for colour, (name, figures) in zip(cycle(COLOURS), measured.items()):
            cells = [cell for cell in figures["grid"] if cell["number"] == k]
            positions = [cell["position"] for cell in cells]
            for axis, key in zip(column, ("recalled", "preferred")):
                means, errors = percent(cell[key] for cell in cells)
                axis.errorbar(positions, means, errors, capsize=3, marker="o", markersize=4, label=name,
                              color=colour)
        finish(column[0], f"{k} records")
        finish(column[1], xlabel="position of the answer", xticks=positions)
        column[1].axhline(50, color="black", linewidth=0.8, linestyle="--")
    axes[0, 0].set(ylabel="recalled, %", ylim=(0, max(10, axes[0, 0].get_ylim()[1])))
    axes[1, 0].set(ylabel="preferred to another\nrecord's value, %", ylim=(0, 105))
    axes[0, -1].legend(fontsize=8)
    return fig


def percent(figures):
    return np.array([[100 * (f[key] or 0) for key in ("mean", "se")] for f in figures]).T


def answers(measured):
    """Bits per byte of held-out answers over the epochs of fine-tuning."""
    fig, axis = pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    for colour, (name, figures) in zip(cycle(COLOURS), measured.items()):
        axis.plot(*zip(*figures["curve"]), marker="o", markersize=3, label=name, color=colour)
    finish(axis, legend=True, xlabel="epochs of fine-tuning", ylabel="held-out answers, bits per byte")
    return fig


def attention(measured):
    """Shares of the last token's attention on the four parts of a text."""
    segments = [name for name in next(iter(measured.values())) if name.startswith("share of ")]
    fig, axis = pyplot().subplots(figsize=(7, 3.6), layout="constrained")
    width = 0.8 / len(measured)
    for number, (colour, (name, figures)) in enumerate(zip(cycle(COLOURS), measured.items())):
        means, errors = percent(figures[segment] for segment in segments)
        axis.bar(np.arange(len(segments)) + (number - (len(measured) - 1) / 2) * width, means, width,
                 yerr=errors, label=name, capsize=3, color=colour)
    axis.set_xticks(range(len(segments)), [segment.removeprefix("share of ") for segment in segments])
    finish(axis, legend=True, grid="y", ylabel="last token's attention, %")
    return fig


FIGURES = {"needle": (needle, "grid"), "records": (records, "grid"), "answers": (answers, "curve"),
           "attention": (attention, "share of answer")}  # {task: (drawing, what its result must have)}


# Panels of claims.py

def bars(axis, label, values):
    """{name: values (seeds,)}"""
    for i, (colour, of_seeds) in enumerate(zip(cycle(COLOURS), values.values())):
        axis.bar(i, of_seeds.mean(), 0.6, color=colour, alpha=0.5)
        axis.plot([i] * len(of_seeds), of_seeds, "o", color=colour, markersize=4)
    axis.set_xticks(range(len(values)), values, fontsize=8)
    finish(axis, label, grid="y")


def lines(axis, label, values):
    """{name: (x (n,), values (seeds, n))}, x numbers or words; a name that begins with exact is dashed."""
    colours = dict(zip(values, cycle(COLOURS)))
    for name, (xs, of_seeds) in values.items():
        is_exact, colour = name.startswith("exact"), colours.get(name.removeprefix("exact: "), colours[name])
        axis.plot(xs, of_seeds.mean(0), "--" if is_exact else "-", color=colour, label=name, linewidth=1.5)
        for of_seed in () if is_exact else of_seeds:
            axis.plot(xs, of_seed, ".", color=colour, markersize=4, alpha=0.6)
    finish(axis, label, legend=len(values) > 1)


def scatter(axis, label, pair):
    """[exact probabilities, the model's]"""
    axis.plot(*pair, ".", color=COLOURS[0], markersize=3, alpha=0.4)
    axis.plot([0, 1], [0, 1], "--", color="#888888", linewidth=1)
    finish(axis, label, xlabel="exact")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "curves", "results"))
    parser.add_argument("file", type=Path, help="the PNG to write; of results, the results.json to read")
    parser.add_argument("folder", type=Path, nargs="*", help="of curves, runs; of results, one for the PNGs")
    args = parser.parse_args(arguments)
    n = len(args.folder)
    if not {"rows": n == 0, "curves": n > 0, "results": n == 1}[args.what]:
        raise ValueError(f"{args.what}: got {n} folders; rows has none, curves one or more, results one")
    if args.what == "results":
        print(*draw(json.loads(args.file.read_text())["results"], *args.folder))
    else:
        print(save(rows() if args.what == "rows" else curves(args.folder), args.file, 200))


if __name__ == "__main__":
    main()
