"""Pages to look at in any browser, without a server or a network: each is one file with its data in it.

    python -m lab.page objectives page.html                           one text under every objective
    python -m lab.page infill page.html --prefix TEXT --suffix TEXT   what each token of an infill attends to
    python -m lab.page infill page.html                               the same, in a function of `programs`

A template in pages/ has a page's style and script; the data stand in it as JSON.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import objectives
from data import Tokenizer
from lab.attention import weights
from lab.corpora import held_out_programs, hole, passes
from objectives import IGNORE, PROMPTS, TEXT, rows_of_every_objective
from sample import (Parser, collect, generate, infill, infill_prompt, load_model, newest_run, note,
                    one_line_errors, unescape)


# One text under every objective

class Token(NamedTuple):
    """id, the part that it belongs to, and its place: bytes start to end of the text (0, 0: in no place)."""
    id: int
    part: str
    start: int = 0
    end: int = 0


def objective_rows(text, tok, **settings):
    """A text -> a dict for each objective: its name and knobs, and for each position of its row the input's
    text, id, part and place; what a <MASK> hides; the target as [text, id], or None where IGNORE."""
    drawn, rows = list(rows_of_every_objective(text, tok, **settings)), []
    known = known_rows(text, tok, drawn)
    for name, knobs, inputs, targets in drawn:
        same = (row for row in known if len(row) == len(inputs) + 1
                and all(i in (tok.mask, token.id) for i, token in zip(inputs, row)))
        unmasked = next(same, [Token(i, "text") for i in inputs.tolist()])  # an objective of your own
        tokens = []
        for i, target, token in zip(inputs.tolist(), targets.tolist(), unmasked):
            is_mask = i == tok.mask
            tokens.append({"text": show(tok, i), "id": i, "part": "mask" if is_mask else token.part,
                           "start": token.start, "end": token.end,
                           "hides": show(tok, token.id) if is_mask else None,
                           "target": None if target == IGNORE else [show(tok, target), target]})
        rows.append({"name": name, "knobs": " ".join(f"{knob}={value}" for knob, value in knobs.items()),
                     "tokens": tokens})
    return rows


def known_rows(text, tok, drawn):
    """The rows that objectives make of a text, before any mask, as lists of Tokens. drawn: what
    rows_of_every_objective yields. With one seed, all FIM objectives cut a text alike."""
    prompt, end, answer = text.partition(":\n")
    psm = next(inputs.tolist() for name, _, inputs, _ in drawn if name == "fim_psm")
    suf, mid = psm.index(tok.suf), psm.index(tok.mid)
    prefix, suffix, middle = psm[1:suf], psm[suf + 1:mid], psm[mid + 1:]
    start = text.encode().index(tok.decode_bytes(prefix + middle + suffix))  # an example may be made shorter
    parts = (place(tok, 0, text=tok.encode(text))
             | place(tok, 0, prompt=tok.encode(prompt + end), answer=tok.encode(answer))
             | place(tok, start, prefix=prefix, middle=middle, suffix=suffix))
    pair = ["prompt", tok.mid, "answer", tok.eot]
    layouts = [["text", tok.eot], pair, pair + pair]
    layouts += [[*PROMPTS[name](["prefix"], ["suffix"], tok, **knobs), "middle", tok.eot]
                for name, knobs, *_ in drawn if name in PROMPTS]
    parts |= {i: [Token(i, "sentinel")] for i in tok.specials}
    return [[token for part in layout for token in parts[part]] for layout in layouts]


def place(tok, start, **parts):
    """Parts of a text, lists of ids that follow each other from byte start on -> the same as Tokens."""
    placed = {part: [] for part in parts}
    for part, ids in parts.items():
        for i in ids:
            end = start + int(tok.n_bytes[i])
            placed[part].append(Token(i, part, start, end))
            start = end
    return placed


# What each token of an infill attends to

@torch.no_grad()
def infill_row(model, tok, prefix, suffix):
    """Fills a hole greedily -> a dict of lists. Of prompt and infill, T tokens: parts and tokens, as texts.
    Of the infill, n tokens: their probabilities p, P(<EOT>) in their places, and attention (L, H, n, T-1), in
    ten-thousandths, from the position before each, where it is predicted. Raises ValueError."""
    def with_parts(prefix, suffix):
        return model.prompt([(i, "prefix") for i in prefix], [(i, "suffix") for i in suffix])

    max_new_tokens = min(64, model.config.block_size // 4)
    prompt = infill_prompt(model, tok, prefix, suffix, max_new_tokens,
                           with_parts if hasattr(model, "prompt") else None, note)
    ids, parts = zip(*[i if isinstance(i, tuple) else (i, "sentinel") for i in prompt])
    steps = generate(model, torch.tensor([ids]), max_new_tokens, temperature=0.0, stop=tok.eot,
                     allowed=tok.eot + 1)
    (middle, _), = collect(steps, tok)
    ids, n = [*ids, *middle], len(middle)
    idx = torch.tensor([ids[:-1]])                                              # (1, T-1)
    p = model(idx)[0][0, -n:].softmax(-1)                                       # (n, V)
    attention = weights(model, idx)[0, :, :, -n:]                               # (L, H, n, T-1)
    return {"parts": [*parts, *["middle"] * n], "tokens": [show(tok, i) for i in ids],
            "p": p[range(n), middle].tolist(), "p_eot": p[:, tok.eot].tolist(),
            "attention": (10_000 * attention).round().int().tolist()}


def some_holes(n):
    """n held-out functions of `programs`, a line out of each: [(prefix, middle, suffix)], no part empty."""
    rng = np.random.default_rng(0)
    return [parts for document in held_out_programs(5 * n, seed=1)
            if (parts := hole(document, "line", rng))[2]][:n]


def example(model, tok):
    """The first of eight held-out functions that the model fills rightly, else the last -> prefix, suffix."""
    for prefix, middle, suffix in some_holes(9)[1:]:
        best, = infill(model, tok, prefix, suffix)
        if passes(prefix + best.text + suffix, prefix + middle + suffix):
            break
    return prefix, suffix


# Both pages

def show(tok, i):
    """An id -> its text; bytes that are no whole character as in Python's source."""
    return tok.names[i] if i in tok.names else tok.decode([i], "backslashreplace")


def write(path, template, rows):
    """Writes the page: a template with the data in it, no text of which can end the <script> around them."""
    page = (Path(__file__).parent / "pages" / f"{template}.html").read_text("utf-8")
    Path(path).write_text(page.replace("{{data}}", json.dumps(rows).replace("<", "\\u003c")), "utf-8")
    print(f"written: {path}")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("page", choices=("objectives", "infill"))
    parser.add_argument("file", metavar="FILE.html", help="where the page is written")
    parser.add_argument("--prefix", type=unescape, default="", metavar="TEXT",
                        help="text before the hole (default: with no suffix either, a function of programs)")
    parser.add_argument("--suffix", type=unescape, default="", metavar="TEXT", help="text after the hole")
    parser.add_argument("--ckpt", metavar="DIR", help="a run's folder (default: the newest under out/)")
    args = parser.parse_args(arguments)
    if args.page == "objectives":
        source = Path(objectives.__file__).read_text(encoding="utf-8")
        tok = Tokenizer.train([source, TEXT * 9], 600)  # as `python objectives.py` does
        return write(args.file, "objectives", objective_rows(TEXT, tok))
    model, tok, _ = load_model(args.ckpt or newest_run())
    prefix, suffix = (args.prefix, args.suffix) if args.prefix or args.suffix else example(model, tok)
    (_, _, other), = some_holes(1)
    write(args.file, "infill", [infill_row(model, tok, prefix, after) for after in (suffix, other)])


if __name__ == "__main__":
    main()
