"""Training objectives: what a model is asked to predict. Pure functions on token ids; randomness comes in as rng.

    NTP    next-token prediction: every token from those before it.
    MEAP   mask-enhanced autoregressive prediction (Zhuang et al., ICML 2025, arXiv 2502.07490): NTP with a share of the
           input tokens replaced by <MASK>. Targets, causal attention and inference stay as they are.
    FIM    fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255): NTP on text with its middle moved to the end.

           PSM            <PRE> prefix <SUF> suffix <MID> middle <EOT>
           SPM swapped    <PRE> suffix <SUF> prefix <MID> middle <EOT>
           SPM labelled   <SUF> suffix <PRE> prefix <MID> middle <EOT>     the paper's variant 1
           SPM joint      <PRE> <SUF> suffix <MID> prefix middle <EOT>     the paper's variant 2

    SFT    supervised fine-tuning on pairs: prompt <MID> answer <EOT>, loss on the answer and its <EOT> alone.
           MEAP's form (its section 3.2) adds a masked copy behind: see answer_example.

Each is a point in one space, Objective(fim_rate, spm_rate, spm_layout, span, mask_ratio, ...). Objective.row turns a
window of the token stream into a training row, Objective.answer_row some pairs. `python objectives.py` draws one text
under every objective.
"""
from dataclasses import dataclass, replace

import numpy as np

IGNORE = -1  # a target that costs nothing: torch's cross_entropy gets it as ignore_index

ORDERS = ("psm", "spm")
SPM_LAYOUTS = ("swapped", "labelled", "joint")
SPANS = ("char", "token", "line", "mixed")
MIDDLES = ("uniform", "log_uniform")
MASK_REGIONS = ("copy", "answer")


def check_range(name, value, low, high):
    if not low <= value <= high:  # also catches NaN
        raise ValueError(f"{name} {value}: expected {low} to {high}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} {value}: expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Objective:
    """A training objective. Raises ValueError where a field is out of its range.

    fim_rate     the share of windows whose pieces become FIM examples, 0 to 1; the others stay plain text
    spm_rate     the share of FIM examples in SPM order; the rest are PSM
    spm_layout   swapped, labelled or joint: see the top of this file
    span         where FIM may cut: char, token or line (the FIM paper, section 4.4), or mixed: char or line, half each
    mask_ratio   the share of the row's inputs that become <MASK>, 0 to 1
    middle       how long the middle is: uniform (the paper's two uniform cuts) or log_uniform (mostly short)
    min_piece, max_piece   how many tokens of text a FIM example is made from, drawn log-uniformly between the two
                 (max_piece 0: up to the whole document). Short pieces teach when to stop, long ones long context.
    answers      True: fine-tuning on pairs; mask_ratio is then the share of the copy that is masked
    mask_region  what of the copy may be masked: copy (all of it, the MEAP paper) or answer (its authors' code)
    min_answer   only an answer of more tokens than this gets a masked copy
    """
    fim_rate: float = 0.0
    spm_rate: float = 0.5
    spm_layout: str = "swapped"
    span: str = "char"
    mask_ratio: float = 0.0
    middle: str = "uniform"
    min_piece: int = 32
    max_piece: int = 0
    answers: bool = False
    mask_region: str = "copy"
    min_answer: int = 50

    def __post_init__(self):
        for name in ("fim_rate", "spm_rate", "mask_ratio"):
            check_range(name, getattr(self, name), 0, 1)
        check_choice("spm_layout", self.spm_layout, SPM_LAYOUTS)
        check_choice("span", self.span, SPANS)
        check_choice("middle", self.middle, MIDDLES)
        check_range("min_piece", self.min_piece, 8, 10**9)
        if self.max_piece:
            check_range("max_piece", self.max_piece, self.min_piece, 10**9)
        check_choice("mask_region", self.mask_region, MASK_REGIONS)
        check_range("min_answer", self.min_answer, 0, 10**9)
        if self.answers:
            check_range("fim_rate", self.fim_rate, 0, 0)

    def row(self, window, tok, rng):
        """window (T+1,) of ids -> inputs (T,), targets (T,): FIM reorders the text, MEAP hides inputs, targets stay true.

        Loss is on every token of a FIM example, <EOT> included: it is how a model says that it has joined the suffix."""
        ids = fim_window(np.asarray(window), self, tok, rng) if self.fim_rate else np.asarray(window)
        inputs, targets = ids[:-1], ids[1:]
        if self.mask_ratio:
            inputs = mask_inputs(inputs, self.mask_ratio, tok, rng)
        return inputs, targets

    def answer_row(self, pairs, T, tok, rng):
        """Pairs of ids (prompt, answer) that fit -> inputs (T,), targets (T,): their examples one behind the other, then
        <EOT> as padding, where targets are IGNORE. An example sees those before it, as a document does in a window."""
        inputs, targets = np.full(T, tok.eot), np.full(T, IGNORE)
        start = 0
        for pair in pairs:
            seen, wanted = answer_example(*pair, self, tok, rng, T)
            inputs[start:start + len(seen)], targets[start:start + len(seen)] = seen, wanted
            start += len(seen)
        return inputs, targets


# The paper cuts half of its texts, by char, uniformly. A small model learns where to stop from many short holes, half of
# them whole lines, and pays for each in left-to-right loss: README shows how much.
FIM = Objective(fim_rate=0.3, span="mixed", middle="log_uniform")
OBJECTIVES = {
    "ntp": Objective(),
    "meap": Objective(mask_ratio=0.15),
    "fim_psm": replace(FIM, spm_rate=0.0),
    "fim_spm": replace(FIM, spm_rate=1.0),
    "fim": replace(FIM, spm_rate=0.5),
    "fim_meap": replace(FIM, spm_rate=0.5, mask_ratio=0.15),
    "sft": Objective(answers=True),
    "meap_sft": Objective(answers=True, mask_ratio=0.1),
}


def mask_inputs(inputs, ratio, tok, rng):
    """inputs (T,) -> a copy with exactly int(T * ratio) ordinary tokens replaced by <MASK>, never a special one.

    (All of them, where a row has fewer.) MEAP, section 3.1."""
    ordinary = np.flatnonzero(~np.isin(inputs, tok.specials))
    chosen = rng.permutation(ordinary)[:int(len(inputs) * ratio)]
    masked = inputs.copy()
    masked[chosen] = tok.mask
    return masked


def answer_prompt(prompt, tok):
    """What a fine-tuned model is given to answer, lists of ids: <MID>, here as in FIM, says "now write, and then stop"."""
    return [*prompt, tok.mid]


def answer_example(prompt, answer, objective, tok, rng, T):
    """A pair of ids that fits T (see fit_pair) -> inputs (n,), targets (n,), n <= T: what to predict after each input,
    IGNORE where there is no loss.

    SFT       prompt <MID> answer <EOT>                     loss on the answer and its <EOT>
    MEAP      the same, then a copy of it with int(mask_ratio * its ordinary tokens) of them read as <MASK>: loss on the
              answer of the original, U_q, and on the masked tokens of the copy, U_m (MEAP, section 3.2),
                  L = - sum over t in U_q and U_m of log p(x_t | x_1 .. x_{t-1}, x^_1, [mask], .. x^_{t-1})
              Only where the answer is longer than min_answer (50) tokens, and twice as long fits T.

    The authors' code differs from their paper: it masks tokens of the answer alone (mask_region="answer"), and trains the
    copy as a sequence of its own, which cannot look the masked tokens up in the original. Here, as in the paper, it can."""
    ids = np.array([*answer_prompt(prompt, tok), *answer, tok.eot][:T])
    n, first = len(ids), len(prompt) + 1
    wanted = np.full(n, IGNORE)
    wanted[first:] = ids[first:]
    if has_copy(answer, objective, T):
        maskable = np.arange(first if objective.mask_region == "answer" else 0, n)
        maskable = maskable[~np.isin(ids[maskable], tok.specials)]
        masked = rng.permutation(maskable)[:int(len(maskable) * objective.mask_ratio)]
        copy, wanted_of_copy = ids.copy(), np.full(n, IGNORE)
        copy[masked], wanted_of_copy[masked] = tok.mask, ids[masked]
        ids, wanted = np.concatenate((ids, copy)), np.concatenate((wanted, wanted_of_copy))
    return ids, np.append(wanted[1:], IGNORE)


def has_copy(answer, objective, T):
    return objective.mask_ratio > 0 and len(answer) > objective.min_answer and 2 * (len(answer) + 2) <= T


def fit_pair(prompt, answer, objective, T):
    """(prompt, answer) such that answer_example fits T: the prompt is cut on its left, and where the answer alone is too
    long, that on its right; it then loses its <EOT>, too, as it does not end there."""
    room = T // 2 if has_copy(answer, objective, T) else T
    return prompt[max(0, len(prompt) + len(answer) + 2 - room):], answer[:T - 1]


def example_length(prompt, answer, objective, T):
    """How many tokens answer_example makes of a pair that fits T."""
    return min(T, len(prompt) + len(answer) + 2) * (2 if has_copy(answer, objective, T) else 1)


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


def split_middle(text, rng, middle="uniform", places=None):
    """text -> (prefix, middle, suffix). text: a str or a list of ids; places: where it may be cut, by default anywhere.

    uniform: two uniform positions (FIM, section 3), so any part may be empty; a third of the text is middle on average.
    log_uniform: the middle's length is 1 to almost all of it, 1 to 9 as likely as 10 to 99, and its place uniform."""
    n = len(text) if places is None else len(places) - 1
    if middle == "uniform" or n == 0:
        first, second = sorted(rng.integers(0, n + 1, 2))
    else:
        length = int(n ** rng.random())
        first = rng.integers(0, n - length + 1)
        second = first + length
    if places is not None:
        first, second = places[first], places[second]
    return text[:first], text[first:second], text[second:]


def split_ids(ids, objective, tok, rng):
    """ids of whole characters -> (prefix, middle, suffix), lists of ids, cut as objective.span and .middle say.

    Characters and lines are cut in the text and each part is encoded on its own, as it will be in a prompt: the model
    must learn to go on from the middle of a token (FIM, section 4.4)."""
    span = objective.span
    if span == "mixed":
        span = "char" if rng.random() < 0.5 else "line"
    if span == "token":
        return split_middle(ids, rng, objective.middle)
    text = tok.decode(ids)
    places = None
    if span == "line":
        places = [0, *(i for i in range(1, len(text)) if text[i - 1] == "\n"), len(text)]
    parts = split_middle(text, rng, objective.middle, places)
    return tuple(tok.encode(part) for part in parts)


def pieces(window, objective, tok, rng):
    """Yields (start, end): the window cut at every <EOT>, and what lies between them cut at random lengths.

    Lengths are log-uniform from min_piece to max_piece, or to the whole fragment: if every FIM example filled its
    window, <EOT> would always come last, and the model would learn to stop by counting."""
    shortest = objective.min_piece
    start = 0
    for stop in (*np.flatnonzero(window == tok.eot), len(window)):
        longest = max(shortest, min(objective.max_piece or len(window), stop - start))
        while start < stop:
            left = stop - start
            length = min(left, int(shortest * (longest / shortest) ** rng.random()))
            if left - length < shortest:  # no stumps
                length = left if left <= max(longest, 2 * shortest - 1) else left - shortest
            yield start, start + length
            start += length
        start = stop + 1


def fim_window(window, objective, tok, rng):
    """Context-level FIM (section 4.3, its better variant): window (T+1,) -> ids (T+1,).

    With probability fim_rate, each piece of the window becomes a FIM example where it stood. Whole windows, not single
    pieces, are spared: plain text then keeps its long context."""
    ids = np.array(window)
    if rng.random() < objective.fim_rate:
        for start, end in pieces(window, objective, tok, rng):
            ids[start:end] = fim_piece(window[start:end].tolist(), objective, tok, rng)
    return ids


def fim_piece(ids, objective, tok, rng):
    """A piece of text -> the FIM example that takes its place, exactly as long.

    The surplus (three sentinels, <EOT>, parts that encode longer) comes off the far end of the suffix, then off the
    start of the prefix; never off the middle or <EOT>. A piece too short for that stays as it was, and so do tokens at
    its ends that hold half a character."""
    whole = tok.whole_characters(ids)
    room = whole.stop - whole.start
    prefix, middle, suffix = split_ids(ids[whole], objective, tok, rng)
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
            parts = split_ids(document, objective, tok, rng)
            document = fim_example(*parts, tok, order, objective.spm_layout)[:-1]
        ids += [*document, tok.eot]
        start = stop + 1
    return np.array(ids, stream.dtype)


def main():
    """Draws one text under every objective: the inputs, under each the target it must predict, and what is hidden."""
    import shutil
    import sys

    from data import Tokenizer

    text = ("def area(width, height):\n    size = width * height\n    if size < 0:\n        size = 0\n"
            "    return size\n")
    with open(__file__) as f:
        tok = Tokenizer.train([f.read(), text * 9], 600)  # words and parts of words
    window = np.array(tok.encode(text) + [tok.eot])
    pair = [tok.encode(part) for part in text.split("(", 1)]
    sentinels = {getattr(tok, name): f"<{name.upper()}>" for name in ("pre", "suf", "mid", "eot", "mask")}
    styles = {"prefix": "34", "middle": "32;1", "suffix": "33", "sentinel": "35", "mask": "7", "text": "0"}
    # what follows each sentinel, in the order in which it comes
    layouts = {"psm": ("prefix", "suffix", "middle"), "swapped": ("suffix", "prefix", "middle"),
               "labelled": ("suffix", "prefix", "middle"), "joint": ("suffix", "suffix", "prefix")}

    def paint(shown, role):
        return f"\033[{styles[role]}m{shown}\033[0m" if sys.stdout.isatty() else shown

    def cells(ids, parts):
        """Each id as (text, role); parts: the roles that the next sentinels open."""
        role, parts = "text", list(parts)
        for i in ids.tolist():
            if i == IGNORE:
                yield "", "text"
            elif i == tok.mask:
                yield "<MASK>", "mask"
            elif i in sentinels:
                role = "text" if i == tok.eot else parts.pop(0) if parts else role
                yield sentinels[i], "sentinel"
            else:
                yield tok.decode([i]).replace("\n", "⏎").replace(" ", "·"), role

    def draw(title, objective, parts=()):
        rng = np.random.default_rng(4)
        inputs, targets = answer_example(*pair, objective, tok, rng, 10**9) if objective.answers else \
            objective.row(window, tok, rng)
        above = list(cells(inputs, parts))
        below = list(cells(np.concatenate((inputs[:1], targets)), parts))[1:]  # roles depend on the sentinel in front
        print(f"\n{title}; loss on {(targets != IGNORE).sum()} targets of {len(targets)}")
        start, room = 0, shutil.get_terminal_size().columns - 8
        while start < len(above):
            end, width = start, 0
            while end < len(above) and width + max(len(above[end][0]), len(below[end][0])) < room:
                width += max(len(above[end][0]), len(below[end][0])) + 1
                end += 1
            for label, row in (("input", above), ("target", below)):
                print(f"{label:7}", *(paint(row[i][0].ljust(max(len(above[i][0]), len(below[i][0]))), row[i][1])
                                      for i in range(start, end)))
            start = end

    print("colours:", *(paint(f" {role} ", role) for role in styles if role != "text"))
    always = {"fim_rate": 1.0}
    draw("ntp: next-token prediction", OBJECTIVES["ntp"])
    draw("meap: 15% of the inputs masked, targets true", OBJECTIVES["meap"])
    draw("fim_psm: prefix, suffix, middle", replace(OBJECTIVES["fim_psm"], **always), layouts["psm"])
    for layout in SPM_LAYOUTS:
        title = f"fim_spm: suffix, prefix, middle ({layout}{', the default' if layout == 'swapped' else ''})"
        draw(title, replace(OBJECTIVES["fim_spm"], spm_layout=layout, **always), layouts[layout])
    draw("fim: PSM or SPM, at random; fim_meap: the same with 15% of the inputs masked",
         replace(OBJECTIVES["fim_meap"], spm_rate=0.0, **always), layouts["psm"])
    draw("sft: an answer", OBJECTIVES["sft"], ["middle"])
    draw("meap_sft: the answer, then a copy with 10% of it masked", replace(OBJECTIVES["meap_sft"], min_answer=0),
         ["middle"] * 2)


if __name__ == "__main__":
    main()
