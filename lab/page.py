"""Pages to look at in any browser, without a server or a network: each is one file with its data in it.

    python -m lab.page objectives page.html                           one text under every objective
    python -m lab.page infill page.html --prefix TEXT --suffix TEXT   what each token of an infill attends to
    python -m lab.page infill page.html                               the same, in a function of `programs`

A template in pages/ has a page's style and script; the data stand in it as JSON. To know which token of the
text each token of a row is, Tracer runs the objectives themselves on ids that remember their place.
"""
import base64
import json
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import objectives
from data import Tokenizer
from lab.attention import weights
from lab.corpora import held_out_programs, hole, passes_all
from objectives import IGNORE, fim_prompt, rows_of_every_objective
from sample import (Parser, add_sampling, collect, generate, infill_prompt, load_model, newest_run, note,
                    one_line_errors, pick_device, unescape)

LIMIT = 300_000  # bytes of a page


class Piece(str):
    """A piece of a text that remembers where the text has it. A slice of a piece is named as objectives.split
    cuts: text[:a] is the prefix, text[a:b] the middle, text[b:] the suffix."""

    def __new__(cls, text, start=0, part="text"):
        piece = super().__new__(cls, text)
        piece.start, piece.part = start, part
        return piece

    def __getitem__(self, key):
        if not isinstance(key, slice):
            return super().__getitem__(key)
        part = "prefix" if key.start is None else "suffix" if key.stop is None else "middle"
        return Piece(super().__getitem__(key), self.start + (key.start or 0), part)

    def partition(self, separator):  # a prompt, its end, an answer
        prompt, end, answer = super().partition(separator)
        return Piece(prompt, part="prompt"), end, Piece(answer, len(prompt + end), "answer")

    def __add__(self, end):
        return Piece(super().__add__(end), self.start, self.part)


class Token(NamedTuple):
    """id, the part that it belongs to, and its place: bytes start to end of the text (0, 0: in no place)."""
    id: int
    part: str
    start: int = 0
    end: int = 0


class Tracer:
    """Stands in for a Tokenizer. encode gives each token of a Piece an id of its own, n_vocab + its index in
    tokens; objectives move and mask such ids as they do others, and origin tells what each was.

    (Places are right for ASCII text, of a byte a character.)"""

    def __init__(self, tok):
        self.tok, self.tokens = tok, []

    def __getattr__(self, name):  # the special ids
        return getattr(self.tok, name)

    def encode(self, piece):
        first, start = self.tok.n_vocab + len(self.tokens), piece.start
        for i in self.tok.encode(piece):
            end = start + int(self.tok.n_bytes[i])
            self.tokens.append(Token(i, piece.part, start, end))
            start = end
        return list(range(first, self.tok.n_vocab + len(self.tokens)))

    def decode(self, ids, errors="replace"):
        tokens = [self.origin(i) for i in ids]
        text = self.tok.decode([token.id for token in tokens], errors)
        return Piece(text, tokens[0].start if tokens else 0)

    def origin(self, i):
        """An id, traced or not -> its Token."""
        if i >= self.tok.n_vocab:
            return self.tokens[i - self.tok.n_vocab]
        return Token(i, "mask" if i == self.tok.mask else "sentinel" if i in self.tok.specials else "text")


def objective_rows(text, tok, **settings):
    """An ASCII text -> a dict for each objective: its name and knobs, and for each position of its row the
    input's text, id, part and place; what a <MASK> hides; the target as [text, id], or None where IGNORE."""
    rows, tracer = [], Tracer(tok)
    for name, knobs, inputs, targets in rows_of_every_objective(Piece(text), tracer, **settings):
        tokens = []
        before = tok.n_vocab  # what a <MASK> hides: the target one position earlier (first: the first token)
        for i, target in zip(inputs.tolist(), targets.tolist()):
            token, place, hides = tracer.origin(i), tracer.origin(i), None
            if token.part == "mask" and before != IGNORE:
                place = tracer.origin(before)
                hides = show(tok, place.id)
            following = tracer.origin(target).id
            tokens.append({"text": show(tok, token.id), "id": token.id, "part": token.part,
                           "start": place.start, "end": place.end, "hides": hides,
                           "target": None if target == IGNORE else [show(tok, following), following]})
            before = target
        rows.append({"name": name, "knobs": " ".join(f"{knob}={value}" for knob, value in knobs.items()),
                     "tokens": tokens})
    return rows


def draw_infill(path, model, tok, prefix, suffix, **settings):
    """Writes the page of an infill, before its suffix and before another function's; the settings are those
    of infill_row. Raises ValueError or OSError."""
    other = some_holes()[0][2]
    write_infill(path, [infill_row(model, tok, prefix, after, **settings) for after in (suffix, other)])


def draw_example(path, model, tok, **settings):
    """The same for a function of `programs`: the first that the model fills rightly before its own suffix and
    otherwise before the other, or else the first that it fills rightly, or else the first."""
    holes, rows, texts = some_holes(), [], []
    for (prefix, middle, suffix), (*_, other) in zip(holes, holes[1:] + holes[:1]):
        rows.append([infill_row(model, tok, prefix, after, **settings) for after in (suffix, other)])
        text = tok.decode(rows[-1][0]["ids"], "ignore")
        texts.append((prefix + text + suffix, prefix + middle + suffix))
    right = passes_all(texts)
    ranks = [(right, right and own["ids"] != other["ids"]) for right, (own, other) in zip(right, rows)]
    best = ranks.index(max(ranks))
    write_infill(path, rows[best], "The example is a held-out function of the corpus programs, filled "
                 f"{'rightly' if right[best] else 'wrongly'} before its own suffix; of {len(right)} tried, "
                 f"{sum(right)} are right. Chosen: the first right one that another suffix changes, if any.")


def some_holes(n=8):
    """n held-out functions of `programs`, a line out of each: [(prefix, middle, suffix)], no part empty."""
    rng = np.random.default_rng(0)
    return [parts for document in held_out_programs(5 * n, seed=1)
            if (parts := hole(document, "line", rng))[2]][:n]


@torch.no_grad()
def infill_row(model, tok, prefix, suffix, max_new_tokens, prompt=None, warn=None, **sampling):
    """Fills a hole, with the settings of sample.infill -> a dict of lists. Of prompt and infill, T tokens:
    parts and tokens, as texts. Of the infill, n tokens: ids, their probabilities p, P(<EOT>) in their places,
    and attention (L, H, n, T-1) from the position before each, where it is predicted. Raises ValueError."""
    prompt, parts = prompt or getattr(model, "prompt", None), []

    def traced(*texts):  # a prompt is laid out alike, whatever its tokens are: here, names of their parts
        names = prompt(*([name] * len(ids) for name, ids in zip(("prefix", "suffix"), texts)))
        parts.extend(name if isinstance(name, str) else "sentinel" for name in names)
        return prompt(*texts)

    ids = infill_prompt(model, tok, prefix, suffix, max_new_tokens, prompt and traced, warn)
    idx = torch.tensor([ids], device=next(model.parameters()).device)           # (1, T-n)
    steps = generate(model, idx, max_new_tokens, stop=tok.eot, allowed=tok.eot + 1, **sampling)
    (middle, _), = collect(steps, tok)
    ids, n = [*ids, *middle], len(middle)
    idx = torch.tensor([ids[:-1]], device=idx.device)                           # (1, T-1)
    p = F.softmax(model(idx)[0][0, -n:].double(), dim=-1).cpu().numpy()         # (n, V)
    return {"parts": [*parts, *["middle"] * n], "tokens": [show(tok, i) for i in ids], "ids": middle,
            "p": p[np.arange(n), middle].round(4).tolist(), "p_eot": p[:, tok.eot].round(4).tolist(),
            "attention": weights(model, idx)[0, :, :, -n:].float().cpu().numpy()}


def write_infill(path, rows, about=""):
    """Writes what infill_row returned for the own suffix and another. The page opens on the layer whose mean
    over heads has the largest weight on one token of the own suffix, for the infill's first token. The
    smallest weights are left out where the page would be larger than LIMIT."""
    mean, is_suffix = rows[0]["attention"][:, :, 0].mean(1), np.array(rows[0]["parts"]) == "suffix"
    layer = int((mean * is_suffix[:-1]).max(1).argmax())                        # mean: (L, T-1)
    for least in (0, *(0.0005 * 2**k for k in range(12))):
        packed_rows = [row | {"attention": packed(row["attention"], least)} for row in rows]
        page = fill("infill", {"about": about, "layer": layer, "least": least, "rows": packed_rows})
        if len(page.encode()) <= LIMIT:
            break
    write(path, page)


def packed(attention, least):
    """Weights (L, H, n, T) in ten-thousandths, 0 below least, as JSON, compressed, in base64."""
    kept = np.where(attention >= least, attention, 0)
    numbers = json.dumps((10_000 * kept).round().astype(int).tolist(), separators=(",", ":"))
    return base64.b64encode(zlib.compress(numbers.encode())).decode()


def show(tok, i):
    """An id -> its text. Bytes that are no whole character and what does not print are shown as in Python's
    source; line ends stay."""
    if i in tok.names:
        return tok.names[i]
    text = tok.decode_bytes([i]).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def fill(template, data):
    """The page: a template with the data in it, no text of which can end the <script> that they stand in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    file = Path(__file__).with_name("pages") / f"{template}.html"
    return file.read_text(encoding="utf-8").replace("{{data}}", text)


def write(path, page):
    try:
        Path(path).write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from None
    print(f"{path}: {len(page.encode()) / 1000:.0f} kB, for any browser")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    pages = parser.add_subparsers(dest="page", required=True, metavar="objectives|infill", prog=parser.prog)
    for name in ("objectives", "infill"):
        page = pages.add_parser(name)
        page.add_argument("file", metavar="FILE.html", help="where the page is written")
    page.add_argument("--prefix", type=unescape, default="", metavar="TEXT",
                      help="text before the hole (default: with no suffix either, a function of programs)")
    page.add_argument("--suffix", type=unescape, default="", metavar="TEXT", help="text after the hole")
    page.add_argument("--order", choices=("psm", "spm"), help="of infilling, for a model trained in both")
    add_sampling(page)
    args = parser.parse_args(arguments)
    if args.page == "objectives":
        source = Path(objectives.__file__).read_text(encoding="utf-8")
        tok = Tokenizer.train([source, objectives.TEXT * 9], 600)  # as `python objectives.py` does
        return write(args.file, fill("objectives", {"rows": objective_rows(objectives.TEXT, tok)}))
    if args.n > 1:
        raise ValueError(f"--n {args.n}: expected one infill")
    model, tok, checkpoint = load_model(args.ckpt or newest_run(), pick_device(args.device))
    knobs, prompt = checkpoint["config"]["knobs"], None
    if args.order:
        if "spm_rate" not in knobs:
            raise ValueError(f"--order {args.order}: expected a model of fim or fim_meap, which have both")
        prompt = partial(fim_prompt, tok=tok, order=args.order, spm_layout=knobs["spm_layout"])
    settings = {"max_new_tokens": args.max_new_tokens, "prompt": prompt, "top_k": args.top_k,
                "top_p": args.top_p, "temperature": args.temperature or 0.0, "seed": args.seed}
    if args.prefix or args.suffix:
        draw_infill(args.file, model, tok, args.prefix, args.suffix, warn=note, **settings)
    else:
        draw_example(args.file, model, tok, **settings)


if __name__ == "__main__":
    main()
