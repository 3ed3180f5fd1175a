"""Training objectives: what a model is asked to predict. Pure functions on token ids; randomness comes in as rng.

    NTP    next-token prediction: every token from those before it.
    MEAP   mask-enhanced autoregressive prediction (Zhuang et al., ICML 2025, arXiv 2502.07490): NTP with a share of the
           input tokens replaced by <MASK>. Targets, causal attention and inference stay as they are.
    FIM    fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255): NTP on text with its middle moved to the end.

           PSM            <PRE> prefix <SUF> suffix <MID> middle <EOT>
           SPM swapped    <PRE> suffix <SUF> prefix <MID> middle <EOT>
           SPM labelled   <SUF> suffix <PRE> prefix <MID> middle <EOT>     the paper's variant 1
           SPM joint      <PRE> <SUF> suffix <MID> prefix middle <EOT>     the paper's variant 2

Each is a point in one space, Objective(fim_rate, spm_rate, spm_layout, span, mask_ratio), and Objective.row turns a
window of the token stream into a training row. `python objectives.py` draws one text under every objective.
"""
from dataclasses import dataclass

import numpy as np

IGNORE = -1  # a target that costs nothing: torch's cross_entropy gets it as ignore_index

ORDERS = ("psm", "spm")
SPM_LAYOUTS = ("swapped", "labelled", "joint")
SPANS = ("char", "token", "line")


def check_range(name, value, low, high):
    if not low <= value <= high:  # also catches NaN
        raise ValueError(f"{name} {value}: expected {low} to {high}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value}: expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Objective:
    """A training objective. Raises ValueError where a field is out of its range.

    fim_rate     the share of pieces that become FIM examples, 0 to 1
    spm_rate     of those, the share in SPM order; the rest are PSM
    spm_layout   swapped, labelled or joint: see the top of this file
    span         where FIM may cut: char, token or line (the FIM paper, section 4.4)
    mask_ratio   the share of the row's inputs that become <MASK>, 0 to 1
    min_piece, max_piece   how many tokens of text a FIM example is made from, drawn log-uniformly between the two
                 (max_piece 0: up to the whole document). Short pieces teach when to stop, long ones long context.
    """
    fim_rate: float = 0.0
    spm_rate: float = 0.5
    spm_layout: str = "swapped"
    span: str = "char"
    mask_ratio: float = 0.0
    min_piece: int = 32
    max_piece: int = 0
    middle: str = "uniform"

    def __post_init__(self):
        for name in ("fim_rate", "spm_rate", "mask_ratio"):
            check_range(name, getattr(self, name), 0, 1)
        check_choice("spm_layout", self.spm_layout, SPM_LAYOUTS)
        check_choice("span", self.span, SPANS)
        check_range("min_piece", self.min_piece, 8, 10**9)
        if self.max_piece:
            check_range("max_piece", self.max_piece, self.min_piece, 10**9)

    def row(self, window, tok, rng):
        """window (T+1,) of ids -> inputs (T,), targets (T,): FIM reorders the text, MEAP hides inputs, targets stay true.

        Loss is on every token of a FIM example, <EOT> included: it is how a model says that it has joined the suffix."""
        ids = fim_window(window, self, tok, rng) if self.fim_rate else window
        inputs, targets = ids[:-1], ids[1:]
        if self.mask_ratio:
            inputs = mask_inputs(inputs, self.mask_ratio, tok, rng)
        return inputs, targets


OBJECTIVES = {
    "ntp": Objective(),
    "meap": Objective(mask_ratio=0.15),
    "fim_psm": Objective(fim_rate=0.5, spm_rate=0.0),
    "fim_spm": Objective(fim_rate=0.5, spm_rate=1.0),
    "fim": Objective(fim_rate=0.5, spm_rate=0.5),
    "fim_meap": Objective(fim_rate=0.5, spm_rate=0.5, mask_ratio=0.15),
}


def mask_inputs(inputs, ratio, tok, rng):
    """inputs (T,) -> a copy with exactly int(T * ratio) ordinary tokens replaced by <MASK>, never a special one.

    (All of them, where a row has fewer.) MEAP, section 3.1."""
    ordinary = np.flatnonzero(~np.isin(inputs, tok.specials))
    chosen = rng.permutation(ordinary)[:int(len(inputs) * ratio)]
    masked = inputs.copy()
    masked[chosen] = tok.mask
    return masked


def fim_prompt(prefix, suffix, tok, order="psm", spm_layout="swapped"):
    """The layout up to where the middle begins: what a model is given to infill. Lists of ids in, a list of ids out."""
    check_choice("order", order, ORDERS)
    check_choice("spm_layout", spm_layout, SPM_LAYOUTS)
    if order == "psm":
        return [tok.pre, *prefix, tok.suf, *suffix, tok.mid]
    if spm_layout == "swapped":
        return [tok.pre, *suffix, tok.suf, *prefix, tok.mid]
    if spm_layout == "labelled":
        return [tok.suf, *suffix, tok.pre, *prefix, tok.mid]
    return [tok.pre, tok.suf, *suffix, tok.mid, *prefix]


def fim_example(prefix, middle, suffix, tok, order="psm", spm_layout="swapped"):
    """The whole layout, as trained on: the prompt, then the middle and <EOT>."""
    return [*fim_prompt(prefix, suffix, tok, order, spm_layout), *middle, tok.eot]


def split_short(text, rng, places=None):
    n = len(text) if places is None else len(places) - 1
    length = int(n ** rng.random()) if n else 0
    first = rng.integers(0, n - length + 1)
    second = first + length
    if places is not None:
        first, second = places[first], places[second]
    return text[:first], text[first:second], text[second:]


def split_middle(text, rng, places=None):
    """text -> (prefix, middle, suffix), cut at two uniform positions (FIM, section 3). Any part may be empty.

    text: a str or a list of ids. places: the positions allowed, by default all len(text) + 1."""
    first, second = sorted(rng.integers(0, len(text) + 1 if places is None else len(places), 2))
    if places is not None:
        first, second = places[first], places[second]
    return text[:first], text[first:second], text[second:]


def split_ids(ids, span, tok, rng, middle="uniform"):
    """ids of whole characters -> (prefix, middle, suffix), lists of ids, cut by char, token or line.

    Characters and lines are cut in the text and each part is encoded on its own, as it will be in a prompt: the model
    must learn to go on from the middle of a token (FIM, section 4.4)."""
    split_middle = split_short if middle == "short" else globals()["split_middle"]
    if span == "token":
        return split_middle(ids, rng)
    text = tok.decode(ids)
    places = None
    if span == "line":
        places = [0, *(i + 1 for i, c in enumerate(text) if c == "\n" and i + 1 < len(text)), len(text)]
    return tuple(tok.encode(part) for part in split_middle(text, rng, places))


def pieces(window, objective, tok, rng):
    """Yields (start, end): the window cut at every <EOT>, and what lies between them cut at random lengths.

    Lengths are log-uniform from min_piece to max_piece, or to the whole fragment: if every FIM example filled its
    window, <EOT> would always come last, and the model would learn to stop by counting."""
    shortest = objective.min_piece
    start = 0
    for stop in (*np.flatnonzero(window == tok.eot), len(window)):
        longest = min(objective.max_piece or stop - start, stop - start)
        while start < stop:
            length = stop - start
            if length > shortest:
                length = int(shortest * (max(longest, shortest) / shortest) ** rng.random())
            if stop - start - length < shortest:  # no stumps
                length = stop - start
            yield start, start + length
            start += length
        start = stop + 1


def fim_window(window, objective, tok, rng):
    """Context-level FIM (section 4.3, its better variant): window (T+1,) -> ids (T+1,) with FIM examples in place.

    Each piece becomes an example with probability fim_rate, where it stood; neighbouring plain pieces are plain text,
    as if never cut."""
    ids = np.array(window)
    for start, end in pieces(window, objective, tok, rng):
        if rng.random() < objective.fim_rate:
            ids[start:end] = fim_piece(window[start:end].tolist(), objective, tok, rng)
    return ids


def fim_piece(ids, objective, tok, rng):
    """A piece of text -> the FIM example that takes its place, exactly as long.

    The surplus (three sentinels, <EOT>, parts that encode longer) comes off the far end of the suffix, then off the
    start of the prefix; never off the middle or <EOT>. A piece too short for that stays as it was, and so do tokens at
    its ends that hold half a character."""
    whole = tok.whole_characters(ids)
    room = whole.stop - whole.start
    prefix, middle, suffix = split_ids(ids[whole], objective.span, tok, rng, objective.middle)
    order = "spm" if rng.random() < objective.spm_rate else "psm"
    surplus = len(prefix) + len(middle) + len(suffix) + 4 - room
    if not 0 <= surplus <= len(prefix) + len(suffix):
        return ids
    from_suffix = min(surplus, len(suffix))
    suffix = suffix[:len(suffix) - from_suffix]
    prefix = prefix[surplus - from_suffix:]
    return ids[:whole.start] + fim_example(prefix, middle, suffix, tok, order, objective.spm_layout) + ids[whole.stop:]


def fim_documents(stream, objective, tok, rng):
    """Document-level FIM (section 4.3), for the comparison alone: stream (N,) -> a new, longer stream.

    Whole documents become FIM examples with probability fim_rate; windows cut later may lose their sentinels."""
    ids, start = [], 0
    for stop in np.flatnonzero(stream == tok.eot):
        document = stream[start:stop].tolist()
        if rng.random() < objective.fim_rate:
            order = "spm" if rng.random() < objective.spm_rate else "psm"
            parts = split_ids(document, objective.span, tok, rng)
            document = fim_example(*parts, tok, order, objective.spm_layout)[:-1]
        ids += [*document, tok.eot]
        start = stop + 1
    return np.array(ids, stream.dtype)


def main():
    """Draws one text under every objective: inputs, the targets below them, and where the loss is."""
    import sys

    from data import Tokenizer

    text = "def area(width, height):\n    size = width * height\n    return size\n"
    tok = Tokenizer.train([text] * 9, 310)
    window = np.array(tok.encode(text) + [tok.eot])
    names = {getattr(tok, name): f"<{name.upper()}>" for name in ("pre", "suf", "mid", "eot", "mask")}
    colour = sys.stdout.isatty()

    def show(title, inputs, targets):
        print(f"\n{paint(title, '1')}")
        cells = [(names.get(i) or tok.decode([i]).replace("\n", "⏎").replace(" ", "·"), i) for i in inputs]
        below = [(names.get(i) or tok.decode([i]).replace("\n", "⏎").replace(" ", "·"), i) for i in targets]
        widths = [max(len(a[0]), len(b[0])) for a, b in zip(cells, below)]
        line = 0
        while line < len(cells):
            end, width = line, 8
            while end < len(cells) and width + widths[end] < 118:
                width += widths[end] + 1
                end += 1
            for label, row in (("input", cells), ("target", below)):
                print(f"{label:8}" + " ".join(paint(shown.ljust(w), style(i)) for (shown, i), w
                                              in zip(row[line:end], widths[line:end])))
            line = end
        print("")

    def style(i):
        return "7" if i == tok.mask else "1;35" if i in names else "0"

    def paint(shown, code):
        return f"\033[{code}m{shown}\033[0m" if colour else shown

    for name, objective in OBJECTIVES.items():
        inputs, targets = objective.row(window, tok, np.random.default_rng(1))
        show(name, inputs, targets)


if __name__ == "__main__":
    main()
