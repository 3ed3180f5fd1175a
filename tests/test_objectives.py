"""What the papers say about a training row, checked against references that know the papers alone.

FIM's rows are checked twice: rows_by_hand has every row of a short document, with its probability; read_row
reads rows of real text back."""
from collections import Counter
from itertools import combinations, pairwise, permutations, product
from math import comb, nan

import numpy as np
import pytest
from conftest import as_stream

import objectives
from objectives import (IGNORE, OBJECTIVES, ON_PAIRS, TEXT, documents_in, fim, fim_meap, fim_psm, fim_spm,
                        knobs_of, mask, meap, meap_sft, ntp, sft)

# The FIM paper's section 3 and appendix D; p, m and s are prefix, middle and suffix. StarCoder: psm, joint.
LAYOUTS = {"psm": "<PRE> p <SUF> s <MID> m <EOT>", "joint": "<PRE> <SUF> s <MID> p m <EOT>",
           "labelled": "<SUF> s <PRE> p <MID> m <EOT>", "swapped": "<PRE> s <SUF> p <MID> m <EOT>"}
EIGHT = "a b c d e f g h <EOT>"
PAIR = "a b <MID> c d e <EOT>"


@pytest.mark.parametrize("name, knobs, ids, inputs, targets", [
    ("meap", {"mask_ratio": 0.25}, EIGHT, "a <MASK> c d <MASK> f g h", "b c d e f g h <EOT>"),
    # two documents: the first becomes a whole example, the second stays plain until the row is full
    ("fim_psm", {}, "a b <EOT> c d e f g", "<PRE> <SUF> b <MID> a <EOT> c", "<SUF> b <MID> a <EOT> c d"),
    # prefix "ab", middle "cd", suffix "efgh": it crosses the row's end, so its suffix is cut to "e"
    ("fim_psm", {}, EIGHT, "<PRE> a b <SUF> e <MID> c d", "a b <SUF> e <MID> c d <EOT>"),
    # prefix "abcd", middle "ef", suffix "gh": the suffix is too short, so the prefix's start goes, too
    ("fim_psm", {}, EIGHT, "<PRE> b c d <SUF> <MID> e f", "b c d <SUF> <MID> e f <EOT>"),
    ("fim_spm", {}, EIGHT, "<PRE> e <SUF> a b <MID> c d", "e <SUF> a b <MID> c d <EOT>"),
    ("fim", {}, EIGHT, "<PRE> <SUF> e <MID> a b c d", "<SUF> e <MID> a b c d <EOT>"),
    # prefix "a", middle "bcdefgh": they cannot pay, so the document stays plain
    ("fim_meap", {"fim_rate": 1, "mask_ratio": 0.2}, EIGHT, "a b <MASK> d e f g h", "b c d e f g h <EOT>"),
    ("sft", {}, PAIR, "a b <MID> c d e", "- - c d e <EOT>"),
    # one of five letters of the copy is masked; loss on the answer of the original and on that letter
    ("meap_sft", {"mask_ratio": 0.2, "min_answer": 2}, PAIR, "a b <MID> c d e <EOT> a b <MID> c <MASK> e",
     "- - c d e <EOT> - - - - d - -")])
def test_a_worked_example(corpora, name, knobs, ids, inputs, targets):
    """Letters are bytes and "-" is IGNORE. Where chance decides: this row is among 1,000 draws."""
    tok, rng = corpora["code in bytes"][0], np.random.default_rng(0)
    named = {"-": IGNORE} | {sign: i for i, sign in tok.names.items()}
    ids, *expected = ([named[word] if word in named else ord(word) for word in row.split()]
                      for row in (ids, inputs, targets))
    rows = (OBJECTIVES[name](np.array(ids), tok, rng, **knobs) for _ in range(1000))
    assert any([part.tolist() for part in row] == expected for row in rows), "never drawn"


def test_the_papers_numbers_are_the_defaults():
    """FIM: sections 3 and 4; MEAP: section 3. What the name of an objective fixes is no knob of it."""
    psm = {"fim_rate": 0.5, "span": "char", "max_document_tokens": 0}
    papers = psm | {"spm_rate": 0.5, "spm_layout": "joint"}
    assert knobs_of(fim) == papers and knobs_of(fim_psm) == psm
    assert knobs_of(fim_spm) == psm | {"spm_layout": "swapped"}
    assert knobs_of(meap) == {"mask_ratio": 0.15} and knobs_of(fim_meap) == papers | {"mask_ratio": 0.15}
    assert knobs_of(meap_sft) == {"mask_ratio": 0.1, "mask_region": "copy", "min_answer": 50}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_objective_keeps_the_contract(name, corpora):
    """What train.py needs of any objective, of OBJECTIVES or one's own, on any window."""
    objective, rng = OBJECTIVES[name], np.random.default_rng(sum(map(ord, name)))
    for trial in range(120):
        tok, window = random_window(list(corpora.values())[trial % 4], rng)
        if name in ON_PAIRS:
            text = window[~np.isin(window, tok.specials)][:-2]
            window = np.insert(np.append(text, tok.eot), rng.integers(len(text) + 1), tok.mid)
        before, knobs = window.copy(), random_knobs(objective, rng)
        row, again = (objective(window, tok, np.random.default_rng(trial), **knobs) for _ in range(2))
        assert np.array_equal(window, before), "the window is left as it was"
        assert all(map(np.array_equal, row, again)), "a pure function of rng"
        inputs, targets = row
        assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (len(inputs),)
        assert name in ON_PAIRS or len(inputs) == len(window) - 1, "rows of windows are stacked into a batch"
        assert inputs.min() >= 0 and targets.min() >= IGNORE and max(map(np.max, row)) < tok.n_vocab


@pytest.mark.parametrize("function, knob, value, expected", [
    *((function, knob, value, "0 to 1") for value in (-0.1, 1.5, nan) for function, knob in (
        (meap, "mask_ratio"), (meap_sft, "mask_ratio"), (fim, "fim_rate"), (fim, "spm_rate"))),
    (fim, "spm_layout", "jont", "one of swapped, labelled, joint"),
    (fim, "spm_layout", "swapped", "joint or labelled with spm_rate 0.5"),
    (fim, "span", "word", "one of char, token, line, mixed"), (fim, "max_document_tokens", 15, "16 to"),
    (meap_sft, "mask_region", "prompt", "one of copy, answer"), (meap_sft, "min_answer", -1, "0 to")])
def test_a_refused_knob_is_named_with_what_is_expected(tok, stream, function, knob, value, expected):
    with pytest.raises(ValueError, match=f"^{knob} {value}: expected {expected}"):
        function(stream[:50].astype(np.int64), tok, np.random.default_rng(0), **{knob: value})


@pytest.mark.parametrize("objective, plain", [(meap, ntp), (fim_meap, fim)])
@pytest.mark.parametrize("T, ratio", [(100, 0.15), (99, 0.15), (64, 0.05), (50, 0.5), (50, 0)])
def test_meap_masks_exactly_its_share_of_ordinary_inputs(tok, stream, objective, plain, T, ratio):
    for seed in range(30):
        window, rng = stream[999 * seed:][:T + 1].astype(np.int64), np.random.default_rng(seed)
        true, same = plain(window, tok, rng)
        inputs, targets = objective(window, tok, np.random.default_rng(seed), mask_ratio=ratio)
        assert np.array_equal(inputs, mask(true, ratio, tok, rng)) and np.array_equal(targets, same)
        changed = np.flatnonzero(inputs != true)
        assert len(changed) == (inputs == tok.mask).sum() == int(T * ratio)
        assert not np.isin(true[changed], tok.specials).any()


@pytest.mark.parametrize("objective, knobs, maskable", [
    (meap_sft, {"mask_ratio": 0.4, "min_answer": 2}, (8, 9, 11, 12, 13)),
    (meap_sft, {"mask_ratio": 0.7, "min_answer": 2, "mask_region": "answer"}, (11, 12, 13))])
def test_every_pair_of_ordinary_tokens_is_masked_equally_often(tok, objective, knobs, maskable):
    ids, rng = np.array([1, 2, tok.mid, 3, 4, 5, tok.eot, tok.pre]), np.random.default_rng(0)
    rows = [objective(ids, tok, rng, **knobs)[0] for _ in range(1500)]
    counts = Counter(tuple(np.flatnonzero(row == tok.mask).tolist()) for row in rows)
    assert_drawn(counts, dict.fromkeys(combinations(maskable, 2), 1 / comb(len(maskable), 2)))
    assert (mask(ids, 0.9, tok, rng) == np.where(ids < 6, tok.mask, ids)).all(), "each, if they are too few"


def lay_out(layout, prefix, middle, suffix, tok):
    parts = {"p": prefix, "m": middle, "s": suffix} | {sign: [i] for i, sign in tok.names.items()}
    return [i for word in LAYOUTS[layout].split() for i in parts[word]]


def cuts_by_hand(text, span):
    """{(first, second): its probability}: two uniform places; of lines two different ones."""
    if span == "mixed":
        both = Counter()
        for share, of in ((0.25, "line"), (0.75, "char")):
            both.update({cuts: share * p for cuts, p in cuts_by_hand(text, of).items()})
        return both
    places = range(len(text) + 1)
    pairs = product(places, repeat=2)
    if span == "line":
        pairs = permutations([i for i in places if i in (0, len(text)) or text[i - 1] == "\n"], 2)
    counts = Counter(tuple(sorted(pair)) for pair in pairs) or {(0, 0): 1}
    return {cuts: n / sum(counts.values()) for cuts, n in counts.items()}


def rows_by_hand(document, room, tok, span, layout, fim_rate, spm_rate):
    """{what a document may become: its probability}: all pairs of cuts, trimmed token by token."""
    text, rows, encode = [i for i in document if i != tok.eot], Counter(), list
    if span != "token":
        text, encode = tok.decode_bytes(text).decode("utf-8", "ignore"), tok.encode
    for ((first, second), p), order in product(cuts_by_hand(text, span).items(), ("psm", layout)):
        prefix, middle, suffix = map(encode, (text[:first], text[first:second], text[second:]))
        whole = example = lay_out(order, prefix, middle, suffix, tok)
        while len(example) > room and (suffix or prefix):
            suffix.pop() if suffix else prefix.pop(0)
            example = lay_out(order, prefix, middle, suffix, tok)
        stays_plain = len(whole) < len(document) or len(example) > room
        share = p * fim_rate * (1 - spm_rate if order == "psm" else spm_rate)
        rows[tuple(document[:room] if stays_plain else example)] += share
    rows[tuple(document[:room])] += 1 - fim_rate
    return +rows  # those above 0


@pytest.mark.parametrize("name, document, ends, empty, more, knobs", [
    # there is room for the whole example: each pair of cuts, each order and coin has its probability
    ("languages", "Ал\nя 語🙂", 1, 0, 60, ("char", "joint", 0.5, 0.3)),
    ("code", "def x(é):\n", 1, 0, 60, ("char", "labelled", 0.8, 0.5)),
    ("code", "return self.x\n", 1, 0, 60, ("token", "joint", 0.5, 0.7)),
    ("languages", "a\n\nя\n語", 1, 0, 60, ("line", "swapped", 0.7, 1)),
    ("languages", "a\nя\n語", 1, 0, 60, ("mixed", "swapped", 1, 1)),
    ("code in bytes", "", 1, 0, 60, ("char", "joint", 0.5, 0.5)),
    # it crosses the row's end, at its first document or after others, which are empty
    ("code in bytes", "abcdefg", 1, 0, 0, ("char", "joint", 1, 0.5)),
    ("code in bytes", "abcdefg", 0, 0, 0, ("char", "joint", 0.7, 0.5)),
    ("code in bytes", "abcdefghijkl", 0, 2, 0, ("token", "joint", 1, 0.5)),
    ("languages", "aЛя\nя 語", 0, 0, 0, ("char", "labelled", 1, 0.5)),
    ("code", "if x:\n    return self\n\n    def _x(self):\n", 1, 1, 0, ("line", "joint", 1, 0.3)),
    # encode would take longer tokens, so that an example may be shorter; characters that an edge cut in two
    ("code", b"def f(x):\n", 1, 0, 60, ("char", "labelled", 1, 0.5)),
    ("languages in bytes", "яbc語".encode()[1:-1], 1, 0, 60, ("char", "labelled", 1, 0.5))])
def test_each_row_of_a_short_document_has_its_probability(corpora, name, document, ends, empty, more, knobs):
    tok, rng, drawn = corpora[name][0], np.random.default_rng(0), Counter()
    document = [*(tok.encode(document) if isinstance(document, str) else document), *[tok.eot] * ends]
    window = np.array([tok.eot] * empty + document + [*b"x" * more])
    before = lay_out("psm", [], [], [], tok) * empty
    settings = dict(zip(("span", "spm_layout", "fim_rate", "spm_rate"), knobs))
    for _ in range(3000):
        row = row_of(fim, window, tok, rng, **settings)
        assert len(row) == len(window) and row[:len(before)] == before
        drawn[tuple(row[:row.index(tok.eot) + 1] if more else row[len(before):])] += 1
    assert_drawn(drawn, rows_by_hand(document, len(window) - len(before), tok, *knobs))


@pytest.mark.parametrize("knobs, example, p", [
    ({"fim_rate": 0.3}, "<PRE><SUF><MID><EOT>", 0.3),
    ({"fim_rate": 1, "spm_layout": "labelled"}, "<SUF><PRE><MID><EOT>", 0.5)], ids=["fim_rate", "spm_rate"])
def test_each_document_has_its_own_coin(tok, knobs, example, p):
    """Of five documents, here empty, a binomial number becomes such examples, not 0 or 5."""
    window, names = np.array([tok.eot] * 5 + [7] * 40), tok.names | {7: "x"}
    rows = ("".join(names[i] for i in row_of(fim, window, tok, seed, **knobs)) for seed in range(2000))
    counts = Counter(row.count(example) for row in rows)
    assert_drawn(counts, {k: comb(5, k) * p**k * (1 - p)**(5 - k) for k in range(6)})


def read_row(row, window, tok, span, spm_rate, spm_layout, max_document_tokens, fim_rate):
    """Reads a row as plain ids and examples, from left to right, and keeps each place of the window that its
    text may have got to. Yields "whole" for an example of all of its document's text, "cut" for one cut."""
    places, longest = {0}, max_document_tokens
    ends = [*(np.flatnonzero(window == tok.eot) + 1).tolist(), len(window)]

    def documents_from(start):
        end, least = min(end for end in ends if end > start), longest // 4
        if longest and end - start > longest:
            return range(start + least, min(start + longest, end - least) + 1)
        return [end] if longest or start in (0, *ends) else []

    while row:
        if row[0] not in (tok.pre, tok.suf):
            places, row = {at + 1 for at in places if window[at] == row[0]}, row[1:]
        else:
            n = row.index(tok.eot) + 1
            example, row = row[:n], row[n:]
            marks = [i for i, token in enumerate(example) if token in tok.specials]
            before, after, middle = (tok.decode_bytes(example[a:b]) for a, b in pairwise(marks))
            if example[0] == tok.suf or spm_rate == 1 and spm_layout == "swapped":
                before, after = after, before
            before += middle  # SPM joint reads as PSM with an empty prefix, which comes to the same
            whole, cut = set(), set()
            for at, end in ((at, end) for at in places for end in documents_from(at)):
                text = tok.decode_bytes(window[at:end].tolist())
                if span != "token":
                    text = text.decode("utf-8", "ignore").encode()  # less what an edge cut in two
                if text == before + after:
                    whole.add(end)
                elif not row and (text.startswith(before + after) if after else before in text):
                    cut.add(end)
            places = whole or cut
            yield "whole" if whole else "cut"
        assert places


@pytest.mark.parametrize("name", ["code", "code in bytes", "languages", "languages in bytes"])
def test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end(corpora, name):
    """So an empty suffix says that the document ends there, unless the row does."""
    rng, counts = np.random.default_rng(0), Counter()
    for trial in range(150):
        (tok, window), knobs = random_window(corpora[name], rng), random_knobs(fim, rng)
        row = row_of(fim, window, tok, trial, **knobs)
        assert len(row) == len(window)
        counts.update(read_row(row, window, tok, **knobs))
        for variant, fixed in ((fim_psm, {"spm_rate": 0}), (fim_spm, {"spm_rate": 1})):
            own, both = {knob: knobs[knob] for knob in knobs_of(variant)}, knobs | fixed
            assert row_of(variant, window, tok, trial, **own) == row_of(fim, window, tok, trial, **both)
        assert row_of(fim, window, tok, rng, **knobs | {"fim_rate": 0}) == window.tolist()
    assert counts["whole"] > 60 and counts["cut"] > 30, counts


@pytest.mark.parametrize("longest", [16, 64, 67])
def test_max_document_tokens_cuts_into_lengths_from_n_fourths_to_n(tok, longest):
    rng, n = np.random.default_rng(0), longest - longest // 4 + 1
    lengths = [*map(len, documents_in(np.full(200_000, 7), tok, rng, longest))][:-2]  # two share what is left
    assert_drawn(Counter(lengths), {length: 1 / n for length in range(longest // 4, longest + 1)})


@pytest.mark.parametrize("objective, knobs", [
    (sft, {}), (meap_sft, {}), (meap_sft, {"mask_region": "answer"}), (meap_sft, {"mask_ratio": 0}),
    (meap_sft, {"mask_ratio": 0.5, "min_answer": 20})])
def test_loss_is_on_the_answer_and_the_masked_tokens_of_the_copy_alone(objective, knobs, stream, tok):
    """MEAP's section 3.2: the terms t of its sum, U_q and U_m, are positions in original ++ copy."""
    settings = {"mask_ratio": 0, "min_answer": 0, "mask_region": ""} | knobs_of(objective) | knobs
    for n_prompt, n_answer, seed in product((0, 7, 60), (1, 20, 21, 50, 51, 120), range(8)):
        text = [token for token in stream[999 * seed:][:200].tolist() if token != tok.eot]
        original = [*text[:n_prompt], tok.mid, *text[n_prompt:n_prompt + n_answer], tok.eot]
        inputs, targets = objective(np.array(original), tok, np.random.default_rng(seed), **knobs)
        n, sequence = len(original), [*inputs.tolist(), tok.eot]
        copied = settings["mask_ratio"] > 0 and n_answer > settings["min_answer"]
        masked = [t for t, x in enumerate(sequence) if x == tok.mask]
        maskable = n_answer + (0 if settings["mask_region"] == "answer" else n_prompt)
        assert len(masked) == copied * int(settings["mask_ratio"] * maskable)
        assert all(t >= n and original[t - n] not in tok.specials for t in masked), "in the copy"
        true = original * (1 + copied)
        assert sequence == [tok.mask if t in masked else x for t, x in enumerate(true)]
        terms = {t: true[t] for t in (*range(n_prompt + 1, n), *masked)}  # predicted one position before
        assert {t + 1: x for t, x in enumerate(targets.tolist()) if x != IGNORE} == terms


def test_the_script_draws_every_objective_and_loses_no_text(capsys):
    objectives.main()
    sections = capsys.readouterr().out.strip().split("\n\n")
    for (name, objective), section in zip(OBJECTIVES.items(), sections, strict=True):
        title, _, *lines = section.splitlines()
        assert title.split()[0] == name and all(f" {knob}=" in title for knob in knobs_of(objective))
        inputs, targets = ([cell for line in lines if line.startswith(row) for cell in line.split()[1:]]
                           for row in ("input ", "target "))
        if name in ("ntp", "sft"):
            shown = "".join(inputs).replace("<MID>", "").replace("·", " ").replace("⏎", "\n")
            assert shown == TEXT and targets[-9:] == [*inputs[-8:], "<EOT>"]


def random_window(corpus, rng):
    """A tokenizer and a window of the corpus, or of documents of any characters, down to none."""
    (tok, stream), T = corpus, int(8 * 35 ** rng.random())
    if rng.random() < 0.5:
        signs = [*"aZ_9 \n\t\0\ufeff\u2028é\u0301(я語🙂", "    ", "\r\n", "return\n", "<MID>", "<EOT>"]
        sizes = (400 ** rng.random(20)).astype(int) - 1
        stream = as_stream([*("".join(rng.choice(signs, size)) for size in sizes), "a" * 300], tok)
    start = rng.integers(len(stream) - T)
    return tok, stream[start:start + T + 1].astype(np.int64)


def random_knobs(objective, rng):
    """Values for the knobs that this file knows; an objective's other knobs keep their defaults."""
    options = {"mask_ratio": (0, 0.15, 0.5, 1), "fim_rate": (0.5, 1), "spm_rate": (0, 0.5, 1),
               "spm_layout": ("swapped", "labelled", "joint"), "span": ("char", "token", "line"),
               "max_document_tokens": (0, 16, 50), "mask_region": ("copy", "answer"), "min_answer": (0, 50)}
    knobs = {knob: rng.choice(options[knob]).item() if knob in options else default
             for knob, default in knobs_of(objective).items()}
    if knobs.get("spm_rate") == 0.5 and knobs["spm_layout"] == "swapped":  # refused
        knobs["spm_layout"] = "labelled"
    return knobs


def row_of(objective, window, tok, rng, **knobs):
    """The T+1 ids of a row whose targets are its inputs, one place on. rng: a Generator or its seed."""
    inputs, targets = objective(window, tok, np.random.default_rng(rng), **knobs)
    assert np.array_equal(inputs[1:], targets[:-1])
    return [*inputs.tolist(), int(targets[-1])]


def assert_drawn(counts, shares):
    """Draws have no other outcomes than expected, and a chi-square within five deviations of its mean."""
    assert set(counts) <= set(shares), set(counts) - set(shares)
    n, freedom = counts.total(), len(shares) - 1
    chi_square = sum((counts[cell] - n * share) ** 2 / (n * share) for cell, share in shares.items())
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5 + 1e-9, (chi_square, freedom)
