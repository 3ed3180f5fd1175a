"""Pages to look at in any browser, without a server or a network: each is one file with its data in it.

    python -m lab.page objectives page.html                           one text under every objective
    python -m lab.page infill page.html --prefix TEXT --suffix TEXT   what each token of an infill attends to

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
from objectives import IGNORE, fim_prompt, rows_of_every_objective
from sample import (Parser, add_sampling, collect, generate, infill_prompt, load_model, newest_run, note,
                    one_line_errors, pick_device, unescape)

LIMIT = 300_000  # bytes of a page
# What stands after another hole. A model that reads the suffix finds its infill less likely before this one.
OTHER_SUFFIX = '''
        if limit is not None and total > limit:
            raise ValueError("the total is above the limit")
        return total

    def report(self, stream):
        """Write a line for each entry, the largest first."""
        for name, size in sorted(self.entries.items(), key=size_of):
            stream.write("%s: %d\\n" % (name, size))
'''


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


def draw_objectives(path, text, tok, **settings):
    """Writes the page of one text under every objective. Raises OSError."""
    write(path, fill("objectives", {"rows": objective_rows(text, tok, **settings)}))


def draw_infill(path, model, tok, prefix, suffix, max_new_tokens, prompt=None, warn=None, **sampling):
    """Writes the page of one infill; the settings are those of sample.infill. Raises ValueError or OSError.

    The smallest attention weights are left out where the page would be larger than LIMIT."""
    prompt, parts = prompt or getattr(model, "prompt", None), []

    def traced(*texts):  # a prompt is laid out alike, whatever its tokens are: here, names of their parts
        names = prompt(*([name] * len(ids) for name, ids in zip(("prefix", "suffix"), texts)))
        parts.extend(name if isinstance(name, str) else "sentinel" for name in names)
        return prompt(*texts)

    ids = infill_prompt(model, tok, prefix, suffix, max_new_tokens, prompt and traced, warn)
    idx = torch.tensor([ids], device=next(model.parameters()).device)           # (1, T)
    steps = generate(model, idx, max_new_tokens, stop=tok.eot, allowed=tok.eot + 1, **sampling)
    (middle, _), = collect(steps, tok)

    is_suffix = np.array(parts) == "suffix"
    other = np.array(ids)
    other[is_suffix] = np.resize(tok.encode(OTHER_SUFFIX), is_suffix.sum())  # as long: all positions stay
    if is_suffix.any():
        prompts = {"Before its own suffix": ids, "Before another suffix": other.tolist()}
    else:
        prompts = {"Without a suffix": ids}

    data = {"parts": [*parts, *["middle"] * len(middle)], "ids": middle, "rows": []}
    attentions = []
    for title, ids in prompts.items():
        p, p_eot, attention = look(model, [*ids, *middle], len(middle), tok.eot)
        attentions.append(attention)
        data["rows"].append({"title": title, "tokens": [show(tok, i) for i in [*ids, *middle]],
                             "p": p.round(4).tolist(), "p_eot": p_eot.round(4).tolist()})
    for least in (0, *(0.0005 * 2**k for k in range(12))):
        for row, attention in zip(data["rows"], attentions):
            row["attention"] = packed(attention, least)
        page = fill("infill", data | {"least": least})
        if len(page.encode()) <= LIMIT:
            break
    write(path, page)


@torch.no_grad()
def look(model, ids, n, eot):
    """A list of T ids, the last n of which are a middle -> arrays: the middle's probabilities (n,), P(<EOT>)
    in its places (n,), and attention weights (L, H, n, T-1). Row t of each is that of the position before the
    middle's token t, where the model predicts this token."""
    idx = torch.tensor([ids[:-1]], device=next(model.parameters()).device)      # (1, T-1)
    p = F.softmax(model(idx)[0][0, -n:].double(), dim=-1).cpu().numpy()         # (n, V)
    attention = weights(model, idx)[0, :, :, -n:].float().cpu().numpy()
    return p[np.arange(n), ids[-n:]], p[:, eot], attention


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
    page.add_argument("--prefix", type=unescape, default="", metavar="TEXT", help="text before the hole")
    page.add_argument("--suffix", type=unescape, default="", metavar="TEXT", help="text after the hole")
    page.add_argument("--order", choices=("psm", "spm"), help="of infilling, for a model trained in both")
    add_sampling(page)
    args = parser.parse_args(arguments)
    if args.page == "objectives":
        source = Path(objectives.__file__).read_text(encoding="utf-8")
        tok = Tokenizer.train([source, objectives.TEXT * 9], 600)  # as `python objectives.py` does
        return draw_objectives(args.file, objectives.TEXT, tok)
    if args.n > 1:
        raise ValueError(f"--n {args.n}: expected one infill")
    path = args.ckpt or newest_run()
    model, tok, checkpoint = load_model(path, pick_device(args.device))
    knobs, prompt = checkpoint["config"]["knobs"], None
    if args.order:
        if "spm_rate" not in knobs:
            raise ValueError(f"--order {args.order}: expected a model of fim or fim_meap, which have both")
        prompt = partial(fim_prompt, tok=tok, order=args.order, spm_layout=knobs["spm_layout"])
    draw_infill(args.file, model, tok, args.prefix, args.suffix, args.max_new_tokens, prompt, note,
                temperature=args.temperature or 0.0, top_k=args.top_k, top_p=args.top_p, seed=args.seed)


if __name__ == "__main__":
    main()
