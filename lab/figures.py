"""Draws what evaluate.py measured, from its results alone. matplotlib is wanted here and nowhere else.

    needle.png       share of values recalled, and preferred to another, context length x depth, for each checkpoint
    multidoc.png     the same by the position of the record that holds the answer
    answers.png      bits per byte of held-out answers over the epochs of fine-tuning
    attention.png    shares of the last token's attention on the four parts of a text
    head-NAME.png    one head's attention weights, tokens on the axes
"""
import json
import sys
from pathlib import Path

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # told apart by all (Paul Tol)


def pyplot():
    """matplotlib's drawing functions, without a screen. Raises ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--figures needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw(results, folder):
    """{checkpoint: {task: figures}}, as in results.json -> the list of PNGs written below folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt = pyplot()
    drawings = {}
    for task, drawing in (("needle", needle), ("multidoc", multidoc), ("attention", attention)):
        measured = {name: tasks[task] for name, tasks in results.items() if task in tasks}
        if measured and all(figures.get("grid", True) for figures in measured.values()):
            drawings[f"{task}.png"] = drawing(plt, measured)
    curves = {name: tasks["answers"]["curve"] for name, tasks in results.items() if tasks.get("answers", {}).get("curve")}
    if curves:
        drawings["answers.png"] = answers(plt, curves)
    for name, tasks in results.items():
        if "attention" in tasks:
            drawings[f"head-{name}.png"] = head(plt, name, tasks["attention"]["heatmap"])
    for name, figure in drawings.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return [folder / name for name in drawings]


def needle(plt, measured):
    fig, axes = plt.subplots(2, len(measured), figsize=(1.6 + 2.9 * len(measured), 5.6), layout="constrained",
                             squeeze=False, sharex=True, sharey=True)
    for column, (name, figures) in enumerate(measured.items()):
        lengths, depths = (sorted({cell[key] for cell in figures["grid"]}) for key in ("length", "depth"))
        for row, key in enumerate(("recalled", "preferred")):
            values = {(cell["length"], cell["depth"]): 100 * cell[key]["mean"] for cell in figures["grid"]}
            grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
            axes[row, column].imshow(grid, cmap="YlGn", vmin=0, vmax=100, aspect="auto")
            for i, line in enumerate(grid):
                for j, value in enumerate(line):
                    axes[row, column].text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8,
                                           color="white" if value > 70 else "black")
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("context, tokens")
        axes[1, column].set_xticks(range(len(lengths)), lengths)
    for row, label in enumerate(("recalled, %", "preferred to another value, %\n(chance: 50)")):
        axes[row, 0].set_ylabel("depth of the needle, %")
        axes[row, 0].set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
        fig.colorbar(axes[row, -1].images[0], ax=axes[row, :], label=label)
    return fig


def multidoc(plt, measured):
    counts = sorted({cell["records"] for figures in measured.values() for cell in figures["grid"]})
    fig, axes = plt.subplots(2, len(counts), figsize=(1.5 + 2.6 * len(counts), 5), layout="constrained", squeeze=False,
                             sharex="col", sharey="row")
    for column, k in enumerate(counts):
        for number, (name, figures) in enumerate(measured.items()):
            cells = [cell for cell in figures["grid"] if cell["records"] == k]
            positions = [cell["position"] for cell in cells]
            for axis, key in zip(axes[:, column], ("recalled", "preferred")):
                means, errors = ([100 * (cell[key][part] or 0) for cell in cells] for part in ("mean", "se"))
                axis.errorbar(positions, means, errors, capsize=3, marker="o", markersize=4, label=name,
                              color=COLOURS[number % len(COLOURS)])
                axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{k} records")
        axes[1, column].set(xlabel="position of the answer", xticks=positions)
        axes[1, column].axhline(50, color="black", linewidth=0.8, linestyle="--")
    axes[0, 0].set(ylabel="recalled, %", ylim=(0, max(10, axes[0, 0].get_ylim()[1])))
    axes[1, 0].set(ylabel="preferred to another\nrecord's value, %", ylim=(0, 105))
    axes[0, -1].legend(fontsize=8)
    return fig


def answers(plt, curves):
    fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        axis.plot(*zip(*curve), marker="o", markersize=3, label=name, color=COLOURS[number % len(COLOURS)])
    axis.set(xlabel="epochs of fine-tuning", ylabel="held-out answers, bits per byte")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return fig


def attention(plt, measured):
    segments = [name for name in next(iter(measured.values())) if name.startswith("share of ")]
    fig, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    width = 0.8 / len(measured)
    for number, (name, figures) in enumerate(measured.items()):
        places = [i + (number - (len(measured) - 1) / 2) * width for i in range(len(segments))]
        means, errors = ([100 * (figures[segment][key] or 0) for segment in segments] for key in ("mean", "se"))
        axis.bar(places, means, width, yerr=errors, label=name, capsize=3, color=COLOURS[number % len(COLOURS)])
    axis.set_xticks(range(len(segments)), [segment.removeprefix("share of ") for segment in segments])
    axis.set_ylabel("last token's attention, %")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8)
    return fig


def head(plt, name, heatmap):
    labels = [label.replace("\n", "⏎").replace(" ", "·") for label in heatmap["labels"]]
    size = 2 + 0.17 * len(labels)
    fig, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    past = [row[:i + 1] + [float("nan")] * (len(row) - i - 1) for i, row in enumerate(heatmap["weights"])]
    image = axis.imshow(past, cmap="magma_r", vmin=0)
    for set_ticks, rotation in ((axis.set_xticks, 90), (axis.set_yticks, 0)):
        set_ticks(range(len(labels)), labels, rotation=rotation, fontsize=6.5, family="monospace")
    axis.set(title=f"{name}, {heatmap['title']}", xlabel="looks at", ylabel="token")
    fig.colorbar(image, ax=axis, label="attention weight", shrink=0.7)
    return fig


if __name__ == "__main__":  # python figures.py results.json DIR draws them again
    print(*draw(json.loads(Path(sys.argv[1]).read_text())["results"], Path(sys.argv[2])))
