"""Draws what evaluate.py and claims.py measured. matplotlib is used here and nowhere else.

    python -m lab.figures out/eval/results.json figures      draws them again

    needle.png       share of values recalled, and preferred to another, by context length and depth
    records.png      the same by the position of the record that holds the answer
    answers.png      bits per byte of held-out answers over the epochs of fine-tuning
    attention.png    shares of the last token's attention on the four parts of a text

bars, lines and scatter draw the panels of claims.py: a point a seed, their mean as a bar or a line.
"""
import json
from pathlib import Path

from cli import Parser, one_line_errors

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


def draw(results, folder):
    """{checkpoint: {task: figures}}, as in results.json -> the list of PNGs written below folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt = pyplot()
    paths = []
    for task, drawing, needs in (("needle", needle, "grid"), ("records", records, "grid"),
                                 ("answers", answers, "curve"), ("attention", attention, None)):
        measured = {name: tasks[task] for name, tasks in results.items()
                    if task in tasks and (needs is None or tasks[task].get(needs))}
        if measured:
            figure = drawing(plt, measured)
            paths.append(folder / f"{task}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def needle(plt, measured):
    fig, axes = plt.subplots(2, len(measured), figsize=(1.6 + 2.9 * len(measured), 5.6), layout="constrained",
                             squeeze=False, sharex=True, sharey=True)
    for column, (name, figures) in enumerate(measured.items()):
        lengths, depths = (sorted({cell[key] for cell in figures["grid"]}) for key in ("number", "position"))
        for row, key in enumerate(("recalled", "preferred")):
            values = {(cell["number"], cell["position"]): 100 * cell[key]["mean"] for cell in figures["grid"]}
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


def records(plt, measured):
    counts = sorted({cell["number"] for figures in measured.values() for cell in figures["grid"]})
    fig, axes = plt.subplots(2, len(counts), figsize=(1.5 + 2.6 * len(counts), 5), layout="constrained",
                             squeeze=False, sharex="col", sharey="row")
    for column, k in enumerate(counts):
        for number, (name, figures) in enumerate(measured.items()):
            cells = [cell for cell in figures["grid"] if cell["number"] == k]
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


def answers(plt, measured):
    fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (name, figures) in enumerate(measured.items()):
        axis.plot(*zip(*figures["curve"]), marker="o", markersize=3, label=name,
                  color=COLOURS[number % len(COLOURS)])
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
        means, errors = ([100 * (figures[name][key] or 0) for name in segments] for key in ("mean", "se"))
        axis.bar(places, means, width, yerr=errors, label=name, capsize=3,
                 color=COLOURS[number % len(COLOURS)])
    axis.set_xticks(range(len(segments)), [segment.removeprefix("share of ") for segment in segments])
    axis.set_ylabel("last token's attention, %")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(fontsize=8)
    return fig


def bars(axis, label, values):
    """{name: values (seeds,)}"""
    for i, (name, of_seeds) in enumerate(values.items()):
        axis.bar(i, of_seeds.mean(), 0.6, color=COLOURS[i % len(COLOURS)], alpha=0.5)
        axis.plot([i] * len(of_seeds), of_seeds, "o", color=COLOURS[i % len(COLOURS)], markersize=4)
    axis.set_xticks(range(len(values)), values, fontsize=8)
    axis.set_title(label, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def lines(axis, label, values):
    """{name: (x (n,), values (seeds, n))}, x numbers or words; a name that begins with exact is dashed."""
    for i, (name, (xs, of_seeds)) in enumerate(values.items()):
        is_exact, colour = name.startswith("exact"), COLOURS[i % len(COLOURS)]
        if is_exact and name.removeprefix("exact: ") in values:
            colour = COLOURS[list(values).index(name.removeprefix("exact: "))]
        axis.plot(xs, of_seeds.mean(0), "--" if is_exact else "-", color=colour, label=name, linewidth=1.5)
        if not is_exact:
            for of_seed in of_seeds:
                axis.plot(xs, of_seed, ".", color=colour, markersize=4, alpha=0.6)
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.3)
    if len(values) > 1:
        axis.legend(fontsize=8)


def scatter(axis, label, pair):
    """[exact probabilities, the model's]"""
    axis.plot(*pair, ".", color=COLOURS[0], markersize=3, alpha=0.4)
    axis.plot([0, 1], [0, 1], "--", color="#888888", linewidth=1)
    axis.set_xlabel("exact")
    axis.set_title(label, fontsize=10)
    axis.grid(alpha=0.3)


@one_line_errors
def main(arguments=None):
    parser = Parser(description="Draws the figures of a results.json of lab.evaluate.")
    parser.add_argument("results", type=Path, help="its path")
    parser.add_argument("folder", type=Path, help="where to write the PNGs")
    args = parser.parse_args(arguments)
    print(*draw(json.loads(args.results.read_text())["results"], args.folder))


if __name__ == "__main__":
    main()
