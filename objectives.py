"""Training objectives: what a model is asked to predict. Pure functions on token ids.

    NTP    next-token prediction: every token from the tokens before it
    MEAP   mask-enhanced autoregressive prediction (Zhuang et al., ICML 2025, arXiv 2502.07490):
           NTP with a share of the input tokens replaced by <MASK>
    FIM    fill-in-the-middle (Bavarian et al., 2022, arXiv 2207.14255):
           NTP on text whose middle is moved to the end

           PSM            <PRE> prefix <SUF> suffix <MID> middle <EOT>
           SPM joint      <PRE> <SUF> suffix <MID> prefix middle <EOT>    what the paper trains: appendix D's
           SPM labelled   <SUF> suffix <PRE> prefix <MID> middle <EOT>    second variant, and its first
           SPM swapped    <PRE> suffix <SUF> prefix <MID> middle <EOT>    as a well-known summary writes SPM

    SFT    supervised fine-tuning on pairs: prompt <MID> answer <EOT>, loss on the answer and its <EOT> alone

An objective is a function: ids (T+1,) of a window of the token stream -> inputs (T,), targets (T,), int64
arrays: what the model sees at each position, and what it must predict there (IGNORE: excluded from the loss).
tok is a data.Tokenizer, rng a numpy Generator. The keyword-only knobs are flags of train.py (mask_ratio is
--mask-ratio); a bad value raises ValueError. `python objectives.py` draws one text under every objective.
"""
import inspect

import numpy as np

IGNORE = -1  # a target that is excluded from the loss
SPM_LAYOUTS = ("swapped", "labelled", "joint")
SPANS = ("char", "token", "line", "mixed")


def ntp(ids, tok, rng):
    """Next-token prediction: the target at each position is the token that follows it."""
    return ids[:-1], ids[1:]


def meap(ids, tok, rng, *, mask_ratio=0.15):
    """NTP with masked inputs (MEAP, section 3). Targets are the true next tokens, masked or not."""
    inputs, targets = ntp(ids, tok, rng)
    return mask(inputs, mask_ratio, tok, rng), targets


def mask(inputs, ratio, tok, rng):
    """inputs (T,) -> a copy with exactly int(T * ratio) ordinary tokens, drawn uniformly, replaced by <MASK>.

    Special tokens are never masked. With fewer ordinary tokens than int(T * ratio), each one is masked."""
    check_range("mask_ratio", ratio, 0, 1)
    ordinary = np.flatnonzero(~np.isin(inputs, tok.specials))
    masked = inputs.copy()
    masked[rng.permutation(ordinary)[:int(len(inputs) * ratio)]] = tok.mask
    return masked


def fim(ids, tok, rng, *, fim_rate=0.5, spm_rate=0.5, spm_layout="joint", span="char", max_document_tokens=0):
    """Context-level FIM (FIM, section 3.2): each document in the window becomes a FIM example with
    probability fim_rate, in SPM order with probability spm_rate. Loss is on every token. Examples are laid
    out whole until the row has T + 1 tokens, as the window has.

    Raises ValueError for a knob that check_range or check_choice refuses, and for spm_layout swapped with
    both orders, where PSM and SPM examples could not be told apart."""
    check_range("fim_rate", fim_rate, 0, 1)
    check_range("spm_rate", spm_rate, 0, 1)
    check_choice("spm_layout", spm_layout, SPM_LAYOUTS)
    check_choice("span", span, SPANS)
    if spm_layout == "swapped" and 0 < spm_rate < 1:
        raise ValueError(f"spm_layout swapped: expected joint or labelled with spm_rate {spm_rate}, since "
                         "PSM of (prefix, suffix) and swapped SPM of (suffix, prefix) are the same ids")
    row = []
    for document in documents_in(ids, tok, rng, max_document_tokens):
        room = len(ids) - len(row)
        if rng.random() < fim_rate:
            order = "spm" if rng.random() < spm_rate else "psm"
            document = fim_document(document, room, tok, rng, order, spm_layout, span)
        row += document[:room]
        if len(row) == len(ids):  # examples are longer than their documents: the window's end is dropped
            break
    return ntp(np.array(row), tok, rng)


def documents_in(ids, tok, rng, max_document_tokens=0):
    """Yields each document in ids as a list of ids. An <EOT> belongs to the document that it ends; the window
    may cut the first and the last.

    With max_document_tokens N > 0 a longer one is cut into several: lengths are uniform from N/4 to N."""
    if max_document_tokens:
        check_range("max_document_tokens", max_document_tokens, 16, 10**9)
    start, least = 0, max_document_tokens // 4
    for end in (*(np.flatnonzero(ids == tok.eot) + 1).tolist(), len(ids)):
        while max_document_tokens and end - start > max_document_tokens:
            length = int(rng.integers(least, max_document_tokens + 1))
            length = min(length, end - start - least)  # leaves N/4 or more for the rest
            yield ids[start:start + length].tolist()
            start += length
        if start < end:
            yield ids[start:end].tolist()
        start = end


def fim_document(document, room, tok, rng, order, spm_layout, span):
    """The ids of a document -> the FIM example that takes its place, whole if it fits into room tokens.

    Only the last example in a row is made shorter: from its suffix's end, then its prefix's start, never its
    middle or <EOT>. In any other example a short or empty suffix thus says that the document ends there. If
    that is not enough, the document stays as it is."""
    text = document[:-1] if document[-1] == tok.eot else document
    if span == "token":
        prefix, middle, suffix = split(text, rng)
    else:  # parts are encoded each on its own, as in a prompt, so a model learns to go on inside a token
        parts = split(tok.decode(text, "ignore"), rng, span)  # ignore: characters that the window cut in two
        prefix, middle, suffix = map(tok.encode, parts)
    length = len(prefix) + len(middle) + len(suffix) + 4                # three sentinels and <EOT>
    surplus = max(0, length - room)
    if length < len(document) or surplus > len(prefix) + len(suffix):   # a row must be full
        return document
    from_suffix = min(surplus, len(suffix))
    return fim_example(prefix[surplus - from_suffix:], middle, suffix[:len(suffix) - from_suffix], tok, order,
                       spm_layout)


def split(text, rng, span="char"):
    """A str, or a list of ids to cut between tokens -> (prefix, middle, suffix), cut at two independent
    places, each uniform over all len(text) + 1. Any part may be empty (FIM, section 3).

    span "line" cuts at two different places of those where a line starts, after a \\n, or the text
    ends (section 4.5); "mixed" does so with probability 1/4. An empty text has three empty parts."""
    if span == "line" or span == "mixed" and rng.random() < 0.25:
        places = [0, *(i for i in range(1, len(text)) if text[i - 1] == "\n"), len(text)]
        # With replacement, a tenth of the middles in ten-line texts would be empty, and a model would learn
        # to write nothing.
        first, second = sorted(rng.choice(places, 2, replace=False).tolist())
    else:
        first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    return text[:first], text[first:second], text[second:]


def fim_example(prefix, middle, suffix, tok, order, spm_layout):
    """Lists of ids -> the whole layout, as in training: the prompt, then the middle and <EOT>."""
    return [*fim_prompt(prefix, suffix, tok, order, spm_layout), *middle, tok.eot]


def fim_prompt(prefix, suffix, tok, order, spm_layout):
    """Lists of ids -> the layout up to where the middle begins: the prompt for infilling (FIM, section 3).

    order: "psm" or "spm". spm_layout: one of SPM_LAYOUTS, see the top of this file; PSM ignores it."""
    if order == "psm":
        return [tok.pre, *prefix, tok.suf, *suffix, tok.mid]
    if spm_layout == "swapped":
        return [tok.pre, *suffix, tok.suf, *prefix, tok.mid]
    if spm_layout == "labelled":
        return [tok.suf, *suffix, tok.pre, *prefix, tok.mid]
    return [tok.pre, tok.suf, *suffix, tok.mid, *prefix]


def fim_psm(ids, tok, rng, *, fim_rate=0.5, span="char", max_document_tokens=0):
    """FIM in PSM order alone."""
    return fim(ids, tok, rng, fim_rate=fim_rate, spm_rate=0.0, span=span,
               max_document_tokens=max_document_tokens)


def fim_spm(ids, tok, rng, *, fim_rate=0.5, spm_layout="swapped", span="char", max_document_tokens=0):
    """FIM in SPM order alone."""
    return fim(ids, tok, rng, fim_rate=fim_rate, spm_rate=1.0, spm_layout=spm_layout, span=span,
               max_document_tokens=max_document_tokens)


def fim_meap(ids, tok, rng, *, mask_ratio=0.15, fim_rate=0.5, spm_rate=0.5, spm_layout="joint", span="char",
             max_document_tokens=0):
    """FIM, then MEAP's masking of its inputs."""
    inputs, targets = fim(ids, tok, rng, fim_rate=fim_rate, spm_rate=spm_rate, spm_layout=spm_layout,
                          span=span, max_document_tokens=max_document_tokens)
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
    original_and_copy = np.concatenate((ids, ids))
    inputs, targets = ntp(original_and_copy, tok, rng)
    counted = np.zeros(len(original_and_copy), bool)
    counted[n_prompt + 1:len(ids)] = True  # U_q
    counted[masked] = True                 # U_m
    inputs = np.where(np.isin(np.arange(len(inputs)), masked), tok.mask, inputs)
    return inputs, np.where(counted[1:], targets, IGNORE)


OBJECTIVES = {
    "ntp": ntp,
    "meap": meap,
    "fim_psm": fim_psm,
    "fim_spm": fim_spm,
    "fim": fim,
    "fim_meap": fim_meap,
    "sft": sft,
    "meap_sft": meap_sft,
}
ON_PAIRS = ("sft", "meap_sft")  # their ids are one example, prompt <MID> answer <EOT>, not a window of text


def trained_prompt(prefix, suffix, tok, *, spm_layout=None, spm_rate=1.0, **knobs):
    """Of a model trained in both orders: SPM, in which such models infill better (FIM, section 4.4)."""
    return fim_prompt(prefix, suffix, tok, "spm" if spm_layout and spm_rate else "psm", spm_layout)


# How a model trained under an objective is prompted for an infill: lists of ids prefix, suffix and the
# objective's knobs -> ids, after which the model writes the middle. A name without an entry cannot infill.
PROMPTS = dict.fromkeys(("fim_psm", "fim_spm", "fim", "fim_meap"), trained_prompt)

# The knobs in a sentence each, for train.py --help. (A knob that is not listed here works as well.)
KNOBS = {
    "mask_ratio": "share of the tokens that become <MASK>",
    "fim_rate": "probability that a document becomes a FIM example",
    "spm_rate": "probability that a FIM example is in SPM order, else PSM",
    "spm_layout": f"where SPM has its sentinels: {', '.join(SPM_LAYOUTS)}",
    "span": "where a document is cut: at any char, between any token, at line starts, or mixed: a quarter of "
            "the examples at line starts, the others at any char",
    "max_document_tokens": "cut longer documents into several first, so that a short training sees more "
                           "examples (not in the FIM paper); 0: leave them whole",
    "mask_region": "what may be masked: the whole copy, or only its answer",
    "min_answer": "only an answer of more tokens gets a masked copy",
}


def knobs_of(objective):
    """An objective -> {name: default} of its keyword-only parameters."""
    parameters = inspect.signature(objective).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_range(name, value, low, high):
    """Raises ValueError if value is outside low to high, or NaN."""
    if not low <= value <= high:  # false for NaN, too
        raise ValueError(f"{name} {value}: expected {low} to {high}")


def check_choice(name, value, choices):
    """Raises ValueError if value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value}: expected one of {', '.join(choices)}")


def rows_of_every_objective(text, tok, seed=31):
    """Yields (name, knobs, inputs, targets) of one text. Such a short text is always a FIM example."""
    for name, objective in OBJECTIVES.items():
        ids = tok.encode(text)
        if name in ON_PAIRS:
            prompt, end, answer = text.partition(":\n")
            ids = [*tok.encode(prompt + end), tok.mid, *tok.encode(answer)]
        shown = {"fim_rate": 1.0, "min_answer": 10}
        knobs = {knob: shown.get(knob, default) for knob, default in knobs_of(objective).items()}
        yield name, knobs, *objective(np.array([*ids, tok.eot]), tok, np.random.default_rng(seed), **knobs)


TEXT = ("def area(width, height):\n    size = width * height\n    if size < 0:\n        size = 0\n"
        "    return size\n")


def main():
    """Draws TEXT under every objective: the inputs and, below each input, its target."""
    import shutil
    import sys

    from data import Tokenizer
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the sign for a line end
    with open(__file__, encoding="utf-8") as f:
        tok = Tokenizer.train([f.read(), TEXT * 9], 600)
    names = tok.names | {IGNORE: ""}
    room = shutil.get_terminal_size().columns
    for name, knobs, inputs, targets in rows_of_every_objective(TEXT, tok):
        print(f"\n{name} {' '.join(f'{knob}={value}' for knob, value in knobs.items())}\n"
              f"loss on {(targets != IGNORE).sum()} targets of {len(targets)}")
        lines = ["input  ", "target "]
        for pair in zip(inputs.tolist(), targets.tolist()):
            cells = [names[i] if i in names else tok.decode([i]).replace("\n", "⏎").replace(" ", "·")
                     for i in pair]
            width = max(map(len, cells)) + 1
            if len(lines[0]) + width > room:
                print(*lines, sep="\n")
                lines = ["input  ", "target "]
            lines = [line + cell.ljust(width) for line, cell in zip(lines, cells)]
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
