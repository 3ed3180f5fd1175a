"""The lecture as a notebook: docs/lecture.ipynb, written from docs/lecture.md.

    python -m lab.notebook              after a change of words: cells with the same code keep their outputs
    python -m lab.notebook --execute    after a change of code: runs every cell, minutes; needs nbclient,
                                        ipykernel and matplotlib

A block of ```python becomes a code cell, the text between two of them Markdown. As slides: a heading begins a
slide, a question or a code cell a slide below it. A cell that draws is followed by ![...](lecture/NAME.png),
for readers of lecture.md: --execute writes that file, and the notebook leaves the line out.
"""
import base64
import json
import re
from itertools import accumulate, zip_longest
from pathlib import Path

from lab.figures import PARTS, SENTINEL
from objectives import fim_example
from sample import Parser, one_line_errors

DOCS = Path(__file__).resolve().parent.parent / "docs"
CODE = r"(?ms)^```python\n(.*?)\n```$(?:\n\n!\[[^\]]*\]\((lecture/[^)]+)\))?"


def cells(text):
    """The text of lecture.md -> the cells of the notebook, without outputs."""
    out, parts = [], re.split(CODE, text)                  # [words, code, picture, words, ..., words]
    for words, code, picture in zip_longest(parts[::3], parts[1::3], parts[2::3]):
        for part in re.split(r"(?m)^(?=#|\*\*Question)", words):
            slide = {"#": "slide", "*": "subslide"}.get(part[:1], "-")
            out.append({"cell_type": "markdown", "source": part.strip(),
                        "metadata": {"slideshow": {"slide_type": slide}}})
        out.append({"cell_type": "code", "source": code or "", "outputs": [], "execution_count": None,
                    "metadata": {"slideshow": {"slide_type": "subslide"}, "picture": picture}})
    return [cell for cell in out if cell["source"]]


def execute(notebook):
    """A notebook, a dict -> the same with its outputs. Raises nbclient's error where a cell fails."""
    import nbformat
    from nbclient import NotebookClient
    return NotebookClient(nbformat.from_dict(notebook), record_timing=False, coalesce_streams=True).execute()


def draw_layouts(axis, prefix, middle, suffix, tok):
    """Draws three texts: as they stand in a document, then as the two orders lay them out in training."""
    texts = [text.replace("\n", "⏎").replace(" ", "·") for text in (prefix, middle, suffix)]
    parts = [[(text, PARTS[name][1])] for text, name in zip(texts, ("prefix", "middle", "suffix"))]
    rows = {"the text": sum(parts, [])} | {order: fim_example(*parts, tok, order.lower(), "joint")
                                           for order in ("PSM", "SPM")}
    width = len("".join(texts) + "<PRE><SUF><MID><EOT>")
    size = min(11, 110 * axis.get_figure().get_figwidth() / (width + 12))
    for y, (name, row) in enumerate(rows.items()):
        shown, colours = zip(*[part if isinstance(part, tuple) else (tok.names[part], SENTINEL)
                               for part in row])
        *starts, _ = accumulate(map(len, shown), initial=0)
        bars = axis.barh(y, list(map(len, shown)), left=starts, color=colours, edgecolor="white", alpha=0.8)
        axis.bar_label(bars, shown, label_type="center", family="monospace", size=size)
        axis.text(-1, y, name, ha="right", va="center", size=size)
    axis.set(xlim=(-12, width), ylim=(len(rows) - 0.5, -0.5))
    axis.axis("off")


def draw_model(axis, config):
    """Draws model.GPT from top to bottom; to the right, what a block adds to each position's vector."""
    def box(x, y, text, colour="#eeeeee"):
        axis.text(x, y, text, ha="center", va="center", bbox={"boxstyle": "round", "facecolor": colour})

    axis.annotate("", (2.5, 0.6), (2.5, 8.4), arrowprops={"arrowstyle": "->", "lw": 2})
    box(2.5, 8.5, "ids (B, T)")
    box(2.5, 7.3, f"wte: V = {config.vocab_size} vectors, one per id: (B, T, C = {config.n_embd})", "#c6dbef")
    box(2.5, 1.5, "ln_f")
    box(2.5, 0.4, "lm_head: its product with every vector of wte: logits (B, T, V)", "#c6dbef")
    axis.barh(4, 9.7, 4.2, 2, color="none", edgecolor="gray", ls="--")
    axis.text(11.6, 2, f"block, {config.n_layer} times", ha="right")
    for y, norm, words, colour in (
            (5.5, "ln_1", f"attn: reads this and earlier\npositions, {config.n_head} heads", "#a1d99b"),
            (3.4, "ln_2", "mlp: each position alone,\nC to 4 C to C", "#fdd0a2")):
        axis.plot([2.5, 9.5, 9.5], [y, y, y - 0.9], color="black", lw=1)
        axis.annotate("", (2.7, y - 0.9), (9.55, y - 0.9), arrowprops={"arrowstyle": "->"})
        box(2.5, y - 0.9, "+")
        box(4, y, norm)
        box(6, y, "shift_tokens")
        box(9.5, y, words, colour)
    axis.set(xlim=(0, 12), ylim=(0, 9))
    axis.axis("off")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--execute", action="store_true", help="run every cell")
    args, path = parser.parse_args(arguments), DOCS / "lecture.ipynb"
    known = {"".join(cell["source"]): cell for cell in json.loads(path.read_text("utf-8"))["cells"]}
    notebook = {"nbformat": 4, "nbformat_minor": 4, "cells": cells((DOCS / "lecture.md").read_text("utf-8")),
                "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}}}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and (old := known.get(cell["source"])):
            cell |= {"outputs": old["outputs"], "execution_count": old["execution_count"]}
    if args.execute:
        notebook = execute(notebook)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                if png := output.get("data", {}).get("image/png"):
                    (DOCS / cell["metadata"]["picture"]).write_bytes(base64.b64decode(png))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
