"""Training objectives: what a model is asked to predict. Pure functions on token ids.

    NTP    next-token prediction: every token from the tokens before it
    MEAP   mask-enhanced autoregressive prediction (Zhuang et al., ICML 2025, arXiv 2502.07490):
           NTP with a share of the input tokens replaced by <MASK>
    FIM    fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255):
           NTP on text whose middle is moved to the end

           PSM            <PRE> prefix <SUF> suffix <MID> middle <EOT>
           SPM swapped    <PRE> suffix <SUF> prefix <MID> middle <EOT>
           SPM labelled   <SUF> suffix <PRE> prefix <MID> middle <EOT>    variant 1 of the paper's appendix D
           SPM joint      <PRE> <SUF> suffix <MID> prefix middle <EOT>    variant 2, which the paper trains

    SFT    supervised fine-tuning on pairs: prompt <MID> answer <EOT>, loss on the answer and its <EOT> alone

An objective is a function: ids (T+1,) of a window of the token stream -> inputs (T,), targets (T,), int64
arrays: what the model sees at each position, and what it must predict there (IGNORE: excluded from the loss).
tok is a data.Tokenizer, rng a numpy Generator. The keyword-only knobs are flags of train.py (mask_ratio is
--mask-ratio); a bad value raises ValueError. `python objectives.py` draws one text under every objective.
"""
import inspect
from functools import partial

import numpy as np

IGNORE = -1  # a target that is excluded from the loss


def ntp(ids, tok, rng):
    """Next-token prediction: the target at each position is the token that follows it."""
    return ids[:-1], ids[1:]


def mask(inputs, ratio, tok, rng):
    """inputs (T,) -> a copy with exactly int(T * ratio) ordinary tokens, drawn uniformly, replaced by <MASK>.

    Special tokens are never masked. With fewer ordinary tokens than int(T * ratio), each one is masked.
    Raises ValueError for a ratio outside 0 to 1."""
    check_range("mask_ratio", ratio, 0, 1)
    ordinary = np.flatnonzero(~np.isin(inputs, tok.specials))
    masked = inputs.copy()
    masked[rng.permutation(ordinary)[:int(len(inputs) * ratio)]] = tok.mask
    return masked


def meap(ids, tok, rng, *, mask_ratio=0.15):
    """NTP with masked inputs (MEAP, section 3). Targets are the true next tokens, masked or not."""
    inputs, targets = ntp(ids, tok, rng)
    return mask(inputs, mask_ratio, tok, rng), targets


def fim_prompt(prefix, suffix, tok, order="psm", spm_layout="swapped"):
    """Lists of ids -> the layout up to where the middle begins: the prompt for infilling (FIM, section 3).

    Raises ValueError for another order or layout."""
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
    """Lists of ids -> the whole layout, as in training: the prompt, then the middle and <EOT>."""
    return [*fim_prompt(prefix, suffix, tok, order, spm_layout), *middle, tok.eot]


def split(text, rng, span="char"):
    """A str or a list of ids (to cut between tokens) -> (prefix, middle, suffix), cut at two places, each
    uniform over all len(text) + 1.

    Any part may be empty (FIM, section 3). span "line" cuts only at line starts and the end, each of them one
    place (section 4.5)."""
    places = range(len(text) + 1)
    if span == "line":
        places = [0, *(i for i in range(1, len(text)) if text[i - 1] == "\n"), len(text)]
    first, second = (places[i] for i in sorted(rng.integers(0, len(places), 2)))
    return text[:first], text[first:second], text[second:]


def fim(ids, tok, rng, *, fim_rate=0.5, spm_rate=0.5, spm_layout="joint", span="char", short_documents=0):
    """Context-level FIM (FIM, section 3.2): each document in the window, whole or in part, becomes a FIM
    example with probability fim_rate, in SPM order with probability spm_rate. Loss is on every token.

    span: where to cut: char, token or line. short_documents: 0, or N: first cut each document into shorter
    ones of at most N tokens, so that a short training sees enough examples (not in the paper). Bad knobs, see
    check_fim, raise ValueError."""
    check_fim(fim_rate, spm_rate, spm_layout, span)
    row = np.array(ids)
    for start, end in fragments(ids, tok, rng, short_documents):
        if rng.random() < fim_rate:
            order = "spm" if rng.random() < spm_rate else "psm"
            row[start:end] = fim_fragment(ids[start:end].tolist(), tok, rng, order, spm_layout, span)
    return ntp(row, tok, rng)


def fim_meap(ids, tok, rng, *, mask_ratio=0.15, fim_rate=0.5, spm_rate=0.5, spm_layout="joint", span="char",
             short_documents=0):
    """FIM, then MEAP's masking of its inputs."""
    inputs, targets = fim(ids, tok, rng, fim_rate=fim_rate, spm_rate=spm_rate, spm_layout=spm_layout,
                          span=span, short_documents=short_documents)
    return mask(inputs, mask_ratio, tok, rng), targets


def sft(ids, tok, rng):
    """Fine-tuning on one example, ids = prompt <MID> answer <EOT>: targets before the answer are IGNORE."""
    inputs, targets = ntp(ids, tok, rng)
    in_answer = np.cumsum(inputs == tok.mid) > 0  # from <MID> on, inputs predict the answer and its <EOT>
    return inputs, np.where(in_answer, targets, IGNORE)


def meap_sft(ids, tok, rng, *, mask_ratio=0.1, mask_region="copy", min_answer=50):
    """MEAP's fine-tuning (MEAP, section 3): an example of N ids, then its copy with int(mask_ratio * ordinary
    tokens) masked, as one sequence: inputs, targets (2N-1,). Loss is on U_q, the answer of the original and
    its <EOT>, and on U_m, the masked tokens of the copy:

        L = - sum over t in U_q and U_m of log p(x_t | x_1 .. x_{t-1}, x^_1, [mask], .. x^_{t-1})

    Only an answer of more than min_answer tokens gets a copy; a shorter answer is trained as by sft.
    mask_region "answer" masks only tokens of the answer, as the authors' code does. (Their code also trains
    the copy as a sequence of its own; here, as in the paper, the copy can attend to the original.)"""
    check_range("mask_ratio", mask_ratio, 0, 1)
    check_choice("mask_region", mask_region, ("copy", "answer"))
    check_range("min_answer", min_answer, 0, 10**9)
    n_prompt = ids.tolist().index(tok.mid) if tok.mid in ids else len(ids)
    if mask_ratio == 0 or len(ids) - n_prompt - 2 <= min_answer:
        return sft(ids, tok, rng)
    maskable = np.arange(n_prompt if mask_region == "answer" else 0, len(ids))
    maskable = maskable[~np.isin(ids[maskable], tok.specials)]
    masked = len(ids) + rng.permutation(maskable)[:int(len(maskable) * mask_ratio)]  # positions in the copy
    doubled = np.concatenate((ids, ids))
    inputs, targets = ntp(doubled, tok, rng)
    counted = np.zeros(len(doubled), bool)
    counted[n_prompt + 1:len(ids)] = True
    counted[masked] = True
    inputs = np.where(np.isin(np.arange(len(inputs)), masked), tok.mask, inputs)
    return inputs, np.where(counted[1:], targets, IGNORE)


OBJECTIVES = {
    "ntp": ntp,
    "meap": meap,
    "fim_psm": partial(fim, spm_rate=0.0),
    "fim_spm": partial(fim, spm_rate=1.0, spm_layout="swapped"),
    "fim": fim,
    "fim_meap": fim_meap,
    "sft": sft,
    "meap_sft": meap_sft,
}
ON_PAIRS = ("sft", "meap_sft")  # their ids are one example, prompt <MID> answer <EOT>, not a window of text
ORDERS = ("psm", "spm")
SPM_LAYOUTS = ("swapped", "labelled", "joint")
SPANS = ("char", "token", "line")


def knobs_of(objective):
    """An objective -> {name: default} of its keyword-only parameters."""
    parameters = inspect.signature(objective).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def fragments(ids, tok, rng, short_documents=0):
    """Yields (start, end) of each document, whole or in part, in ids, its <EOT> included where ids holds it.

    With short_documents N > 0, a document of more than N tokens is cut: lengths are uniform from N/4 to N."""
    if short_documents:
        check_range("short_documents", short_documents, 16, 10**9)
    start = 0
    for end in (*(np.flatnonzero(ids == tok.eot) + 1).tolist(), len(ids)):
        while short_documents and end - start > short_documents:
            length = int(rng.integers(short_documents // 4, short_documents + 1))
            length = min(length, end - start - short_documents // 4)  # leaves N/4 or more for the rest
            yield start, start + length
            start += length
        if start < end:
            yield start, end
        start = end


def fim_fragment(ids, tok, rng, order, spm_layout, span):
    """The ids of a fragment (a list) -> the FIM example that takes its place, exactly as long.

    The surplus (sentinels, <EOT>, parts that encode longer) is cut from the end of the suffix, then from the
    start of the prefix, never from the middle or <EOT>. Where that cannot fit, or parts encode so short that
    the example would be shorter, the fragment stays plain."""
    head, (prefix, middle, suffix), tail = cut_fragment(ids, tok, rng, span)
    room = len(ids) - len(head) - len(tail) - 4  # three sentinels and <EOT>
    surplus = len(prefix) + len(middle) + len(suffix) - room
    if not 0 <= surplus <= len(prefix) + len(suffix):
        return ids
    from_suffix = min(surplus, len(suffix))
    suffix = suffix[:len(suffix) - from_suffix]
    prefix = prefix[surplus - from_suffix:]
    return head + fim_example(prefix, middle, suffix, tok, order, spm_layout) + tail


def cut_fragment(ids, tok, rng, span):
    """The ids of a fragment (a list) -> head, (prefix, middle, suffix), tail: lists of ids without its <EOT>.

    With span char or line the text is cut and each part encoded on its own, as in a prompt, so a model learns
    to continue from inside a token. head and tail: tokens of a character that the window's edge cuts."""
    text = ids[:-1] if ids[-1] == tok.eot else ids
    whole = tok.whole_characters(text)
    if span == "token":
        parts = split(text[whole], rng)
    else:
        parts = tuple(tok.encode(part) for part in split(tok.decode(text[whole]), rng, span))
    return text[:whole.start], parts, text[whole.stop:]


def fim_documents(stream, tok, rng, *, fim_rate=0.5, spm_rate=0.5, spm_layout="joint", span="char",
                  short_documents=0):
    """Document-level FIM, only for the comparison (FIM, section 4.4): stream (N,) -> a new, longer stream.

    Documents become FIM examples before windows are cut, so a window may hold part of an example without its
    sentinels."""
    check_fim(fim_rate, spm_rate, spm_layout, span)
    out = []
    for start, end in fragments(stream, tok, rng, short_documents):
        ids = stream[start:end].tolist()
        if rng.random() < fim_rate:
            order = "spm" if rng.random() < spm_rate else "psm"
            head, parts, tail = cut_fragment(ids, tok, rng, span)
            ids = head + fim_example(*parts, tok, order, spm_layout) + tail
        out += ids
    return np.array(out, stream.dtype)


def check_fim(fim_rate, spm_rate, spm_layout, span):
    """Raises ValueError if a knob is out of its range, or PSM and SPM examples could not be told apart."""
    check_range("fim_rate", fim_rate, 0, 1)
    check_range("spm_rate", spm_rate, 0, 1)
    check_choice("spm_layout", spm_layout, SPM_LAYOUTS)
    check_choice("span", span, SPANS)
    if spm_layout == "swapped" and 0 < spm_rate < 1:
        raise ValueError(f"spm_layout swapped: expected joint or labelled with spm_rate {spm_rate}, since "
                         "PSM of (prefix, suffix) and swapped SPM of (suffix, prefix) are the same ids")


def check_range(name, value, low, high):
    """Raises ValueError if value is outside low to high, or NaN."""
    if not low <= value <= high:  # false for NaN, too
        raise ValueError(f"{name} {value}: expected {low} to {high}")


def check_choice(name, value, choices):
    """Raises ValueError if value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: expected one of {', '.join(choices)}")


def main(arguments=None):
    """Draws one text under every objective: the inputs and, below each input, its target."""
    import shutil
    import sys

    from cli import Parser
    from data import Tokenizer

    parser = Parser(description=main.__doc__)
    parser.add_argument("--html", metavar="FILE", help="write a page for a browser instead")
    args = parser.parse_args(arguments)

    text = ("def area(width, height):\n    size = width * height\n    if size < 0:\n        size = 0\n"
            "    return size\n")
    with open(__file__, encoding="utf-8") as f:
        tok = Tokenizer.train([f.read(), text * 9], 600)  # words and parts of words
    shown, seed = {"fim_rate": 1.0, "min_answer": 10}, 31  # such a short text would show too little
    if args.html:
        from lab.page import draw_objectives
        return draw_objectives(args.html, text, tok, shown, seed)
    names = {getattr(tok, name): f"<{name.upper()}>" for name in ("pre", "suf", "mid", "eot", "mask")}

    def show(i, is_middle):
        """An id as (text, ANSI colour): special tokens violet, <MASK> inverted, all after <MID> green."""
        if i in names:
            return names[i], "7" if i == tok.mask else "35"
        colour = "32" if is_middle else "0"
        return tok.decode([i]).replace("\n", "⏎").replace(" ", "·") if i != IGNORE else "", colour

    for name, objective in OBJECTIVES.items():
        prompt, answer = text.split("(", 1)
        ids = [*tok.encode(prompt), tok.mid, *tok.encode(answer)] if name in ON_PAIRS else tok.encode(text)
        knobs = {knob: shown.get(knob, default) for knob, default in knobs_of(objective).items()}
        inputs, targets = objective(np.array([*ids, tok.eot]), tok, np.random.default_rng(seed), **knobs)
        print(f"\n{name} {' '.join(f'{knob}={value}' for knob, value in knobs.items())}\n"
              f"loss on {(targets != IGNORE).sum()} targets of {len(targets)}")
        in_middle = np.cumsum(inputs == tok.mid) > 0
        cells = [(show(i, m), show(t, m)) for i, t, m in zip(inputs.tolist(), targets.tolist(), in_middle)]
        widths = [max(len(text) for text, _ in cell) for cell in cells]
        start, room = 0, shutil.get_terminal_size().columns - 8
        while start < len(cells):
            end = start + 1
            while end < len(cells) and sum(widths[start:end + 1]) + end - start < room:
                end += 1
            for k, label in enumerate(("input", "target")):
                line = [cells[i][k][0].ljust(widths[i]) for i in range(start, end)]
                if sys.stdout.isatty():
                    line = [f"\033[{cells[start + i][k][1]}m{text}\033[0m" for i, text in enumerate(line)]
                print(f"{label:7}", *line)
            start = end


if __name__ == "__main__":
    from cli import one_line_errors
    one_line_errors(main)()
