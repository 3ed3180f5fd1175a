"""What the papers say about a training row, checked on real text, over whatever stands in OBJECTIVES.

The worked example shows every objective on eight letters. readings() at the bottom parses a FIM example back
to its parts; it knows the layouts from the paper alone."""
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations_with_replacement, product
from math import comb, nan
from pathlib import Path

import numpy as np
import pytest
from conftest import LANGUAGES, as_stream

from objectives import (IGNORE, OBJECTIVES, ON_PAIRS, PROMPTS, TEXT, documents_in, fim, fim_example, fim_meap,
                        fim_prompt, knobs_of, mask, meap, meap_sft, ntp, rows_of_every_objective, sft, split)

SWAPPED = {"spm_layout": "swapped"}
FIXED = {"fim_psm": {"spm_rate": 0}, "fim_spm": {"spm_rate": 1}}  # what is no knob
LAYOUTS = ("swapped", "labelled", "joint")
SPANS = ("char", "token", "line")
EIGHT = "a b c d e f g h <EOT>"
PAIR = "a b <MID> c d e <EOT>"


@pytest.mark.parametrize("name, knobs, ids, inputs, targets", [
    ("ntp", {}, EIGHT,
     "a b c d e f g h",
     "b c d e f g h <EOT>"),
    ("meap", {"mask_ratio": 0.25}, EIGHT,
     "a <MASK> c d <MASK> f g h",
     "b c d e f g h <EOT>"),
    # prefix "ab", middle "cd", suffix "efgh", of which four tokens of layout leave room for "e"
    ("fim_psm", {}, EIGHT,
     "<PRE> a b <SUF> e <MID> c d",
     "a b <SUF> e <MID> c d <EOT>"),
    # prefix "abcd", middle "ef", suffix "gh": the suffix is too short, so the prefix's start goes, too
    ("fim_psm", {}, EIGHT,
     "<PRE> b c d <SUF> <MID> e f",
     "b c d <SUF> <MID> e f <EOT>"),
    # prefix "a", middle "bcdefg", suffix "h": neither of them has room
    ("fim_psm", {"fim_rate": 1.0}, EIGHT,
     "a b c d e f g h",
     "b c d e f g h <EOT>"),
    ("fim_spm", {}, EIGHT,
     "<PRE> e <SUF> a b <MID> c d",
     "e <SUF> a b <MID> c d <EOT>"),
    ("fim", {}, EIGHT,
     "<PRE> <SUF> e <MID> a b c d",
     "<SUF> e <MID> a b c d <EOT>"),
    ("fim", {"spm_layout": "labelled"}, EIGHT,
     "<SUF> e <PRE> a b <MID> c d",
     "e <PRE> a b <MID> c d <EOT>"),
    ("fim_meap", {"fim_rate": 1.0, "spm_rate": 0.0, "mask_ratio": 0.125}, EIGHT,
     "<PRE> a b <SUF> e <MID> <MASK> d",
     "a b <SUF> e <MID> c d <EOT>"),
    ("sft", {}, PAIR,
     "a b <MID> c d e",
     "- - c d e <EOT>"),
    # one of five letters of the copy is masked; loss on the answer of the original and on that letter
    ("meap_sft", {"mask_ratio": 0.2, "min_answer": 2}, PAIR,
     "a b <MID> c d e <EOT> a b <MID> c <MASK> e",
     "- - c d e <EOT> - - - - d - -")])
def test_a_worked_example(corpora, name, knobs, ids, inputs, targets):
    """Letters are bytes and "-" is IGNORE. Randomness decides the rest, so: this row is among 1,000 draws."""
    tok, _ = corpora["code in bytes"]

    named = {"-": IGNORE, "<PRE>": tok.pre, "<SUF>": tok.suf, "<MID>": tok.mid, "<EOT>": tok.eot,
             "<MASK>": tok.mask}
    ids, inputs, targets = ([named[word] if word in named else ord(word) for word in row.split()]
                            for row in (ids, inputs, targets))
    for seed in range(1000):
        drawn = OBJECTIVES[name](np.array(ids), tok, np.random.default_rng(seed), **knobs)
        if (drawn[0].tolist(), drawn[1].tolist()) == (inputs, targets):
            return
    pytest.fail("never drawn")


def test_the_papers_numbers_are_the_defaults():
    """FIM's rate, orders, layout and cuts (sections 3 and 4), MEAP's ratios and lengths (section 3). What the
    name of an objective fixes is no knob of it."""
    papers = {"fim_rate": 0.5, "spm_rate": 0.5, "spm_layout": "joint", "span": "char", "max_document_tokens": 0}
    assert knobs_of(fim) == papers and knobs_of(OBJECTIVES["fim_spm"]) | {"spm_rate": 0.5} == papers | SWAPPED
    assert knobs_of(OBJECTIVES["fim_psm"]) | {"spm_rate": 0.5, "spm_layout": "joint"} == papers
    assert not {"spm_rate", "spm_layout"} & {*knobs_of(OBJECTIVES["fim_psm"])}
    assert "spm_rate" not in knobs_of(OBJECTIVES["fim_spm"])
    assert knobs_of(meap) == {"mask_ratio": 0.15} and knobs_of(fim_meap) == papers | knobs_of(meap)
    assert knobs_of(meap_sft) == {"mask_ratio": 0.1, "mask_region": "copy", "min_answer": 50}


@pytest.mark.parametrize("name, knob", [(name, knob) for name in OBJECTIVES for knob in knobs_of(OBJECTIVES[name])])
def test_each_knob_of_an_objective_changes_its_rows(corpora, name, knob):
    """A knob without an effect would be shown beside the drawing, and in --help, as if it had one."""
    tok, stream = corpora["code in bytes"]
    other = {"mask_ratio": 0.7, "fim_rate": 1.0, "spm_rate": 1.0, "spm_layout": "labelled", "span": "line",
             "max_document_tokens": 32, "mask_region": "answer", "min_answer": 10**6}
    for seed, (window, _) in enumerate(windows(stream, 20, T=200)):
        window = a_pair(window, tok, np.random.default_rng(1)) if name in ON_PAIRS else window
        row, changed = (OBJECTIVES[name](window, tok, np.random.default_rng(seed), **knobs)[0].tolist()
                        for knobs in ({}, {knob: other.get(knob)}))
        if row != changed:
            return
    pytest.fail(f"{name} does the same with another {knob}")


@pytest.mark.parametrize("name", PROMPTS)
def test_a_model_is_prompted_in_a_layout_of_its_training(corpora, name):
    """For any knobs: prompt, middle, <EOT> is one of the rows that the objective makes of the document."""
    (tok, _), rng = corpora["code in bytes"], np.random.default_rng(0)
    document = np.array([*b"abcdef" * 4, tok.eot])
    for _ in range(30):
        knobs = random_knobs(name, rng) | {"fim_rate": 1, "span": "char", "max_document_tokens": 0}
        plain = {knob: value for knob, value in knobs.items() if knob != "mask_ratio"}
        rows = [row_ids(OBJECTIVES[name.replace("_meap", "")], document, tok, rng, **plain).tolist()
                for _ in range(8)]
        expected = {tuple(PROMPTS[name](p, s, tok, **knobs) + m + [tok.eot]) for row in rows
                    if row[0] in (tok.pre, tok.suf) for p, m, s in readings(row, tok, plain | FIXED.get(name, {}))}
        assert expected & {*map(tuple, rows)}, (name, knobs)
    assert set(PROMPTS) == {name for name in OBJECTIVES if "fim_rate" in knobs_of(OBJECTIVES[name])}


@pytest.mark.parametrize("order, layout, expected", [
    *(("psm", layout, "<PRE> 1 2 <SUF> 4 5 6 <MID> 3 <EOT>") for layout in LAYOUTS),
    ("spm", "swapped", "<PRE> 4 5 6 <SUF> 1 2 <MID> 3 <EOT>"),
    ("spm", "labelled", "<SUF> 4 5 6 <PRE> 1 2 <MID> 3 <EOT>"),
    ("spm", "joint", "<PRE> <SUF> 4 5 6 <MID> 1 2 3 <EOT>")])
def test_layouts_are_the_papers_and_a_prompt_stops_where_the_middle_begins(tok, order, layout, expected):
    for prefix, middle, suffix in product(([], [1, 2]), ([], [3]), ([], [4, 5, 6])):  # each part may be empty
        present = prefix + middle + suffix
        kept = [word for word in expected.split() if not word.isdigit() or int(word) in present]
        ids = [int(word) if word.isdigit() else getattr(tok, word[1:-1].lower()) for word in kept]
        example = fim_example(prefix, middle, suffix, tok, order, layout)
        assert example == ids
        assert example == fim_prompt(prefix, suffix, tok, order, layout) + middle + [tok.eot]
    for function, parts in ((fim_prompt, 2), (fim_example, 3)):
        with pytest.raises(TypeError, match="order"):  # no default: the layout is that of a model's training
            function(*[[1]] * parts, tok)


@pytest.mark.parametrize("function, knob, value, expected", [
    *((function, knob, value, "0 to 1") for value in (-0.1, 1.5, nan) for function, knob in (
        (meap, "mask_ratio"), (meap_sft, "mask_ratio"), (fim, "fim_rate"), (fim, "spm_rate"))),
    (fim, "spm_layout", "jont", "one of swapped, labelled, joint"),
    (fim, "spm_layout", "swapped", "joint or labelled with spm_rate 0.5"),
    (fim, "span", "word", "one of char, token, line"),
    (fim, "max_document_tokens", 15, "16 to"), (fim, "max_document_tokens", -1, "16 to"),
    (meap_sft, "mask_region", "prompt", "one of copy, answer"), (meap_sft, "min_answer", -1, "0 to")])
def test_a_refused_knob_is_named_with_what_is_expected(tok, stream, function, knob, value, expected):
    named = "spm_layout swapped" if "joint or" in expected else f"{knob} {value}"
    window = stream[:50].astype(np.int64), tok, np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"^{named}: expected {expected}"):
        function(*window, **{knob: value})
    if knob in ("spm_rate", "spm_layout"):
        with pytest.raises(TypeError, match=knob):  # whose order its name fixes
            OBJECTIVES["fim_psm"](*window, **{knob: value})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_row_of_any_objective_holds_its_windows_text(name, corpora):
    """At the knobs' defaults and at random ones, on real text and on random documents."""
    rng, n_examples = np.random.default_rng(sum(map(ord, name))), 0
    for trial in range(300):
        knobs = random_knobs(name, rng) if trial % 3 else knobs_of(OBJECTIVES[name])
        tok, stream = list(corpora.values())[rng.integers(len(corpora))]
        if trial % 2:
            stream = random_documents(tok, rng)
        T = int(8 * 35 ** rng.random())
        (window, _), = windows(stream, 1, T, rng.integers(10**6))
        if name in ON_PAIRS and trial % 4:
            window = a_pair(window, tok, rng)
        before, seed = window.copy(), rng.integers(10**6)
        row, again = (OBJECTIVES[name](window, tok, np.random.default_rng(seed), **knobs) for _ in range(2))
        assert np.array_equal(window, before), "the window is left as it was"
        assert all(map(np.array_equal, row, again)), "randomness comes in as rng alone"
        assert all(isinstance(part, np.ndarray) for part in row)
        if name in ON_PAIRS and len(row[0]) >= len(window):  # the example and its copy, as one sequence
            window = np.concatenate((window, window))
        n_examples += check_row(*row, window, tok, knobs | FIXED.get(name, {}))
    assert n_examples > 20 or "fim_rate" not in knobs_of(OBJECTIVES[name])


@pytest.mark.parametrize("name, knobs", [
    ("meap", {"mask_ratio": 0}), ("fim_meap", {"fim_rate": 0, "mask_ratio": 0}),
    ("fim_psm", {"fim_rate": 0}), ("fim_spm", {"fim_rate": 0}), ("fim", {"fim_rate": 0})])
def test_at_rate_0_all_are_next_token_prediction(name, knobs, corpora):
    for tok, stream in corpora.values():
        for window, rng in windows(stream, 10, T=200):
            inputs, targets = OBJECTIVES[name](window, tok, rng, **knobs)
            assert np.array_equal(inputs, window[:-1]) and np.array_equal(targets, window[1:])


# Masks

@pytest.mark.parametrize("objective, plain", [(meap, ntp), (fim_meap, fim)])
@pytest.mark.parametrize("T, ratio", [(100, 0.15), (99, 0.15), (64, 0.05), (100, 0.5)])
def test_meap_masks_exactly_its_share_of_ordinary_inputs_and_no_target(corpora, objective, plain, T, ratio):
    tok, stream = corpora["code"]
    places = np.zeros(T)
    for seed, (window, _) in enumerate(windows(stream, 100, T)):
        inputs, targets = objective(window, tok, np.random.default_rng(seed), mask_ratio=ratio)
        true, same = plain(window, tok, np.random.default_rng(seed))
        masked = inputs == tok.mask
        assert masked.sum() == int(T * ratio) and not np.isin(true[masked], tok.specials).any()
        assert np.array_equal(inputs[~masked], true[~masked]) and np.array_equal(targets, same)
        places += masked
    assert plain is fim or np.abs(places / 100 - int(T * ratio) / T).max() < 0.25, "uniform over the row"


def test_a_mask_has_its_exact_size_and_falls_anywhere(tok):
    rng = np.random.default_rng(0)
    for T, ratio in product((1, 19, 20, 99), (0, 0.15, 1)):
        inputs, masked = np.arange(T), np.zeros(T, bool)
        inputs[::7] = tok.eot
        for _ in range(200):
            drawn = mask(inputs.copy(), ratio, tok, rng)
            assert (drawn == tok.mask).sum() == min(int(T * ratio), (inputs != tok.eot).sum())
            masked |= drawn == tok.mask
        assert int(T * ratio) == 0 or np.array_equal(masked, inputs != tok.eot)
    drawn = [mask(np.arange(99), 0.15, tok, np.random.default_rng(seed)) for seed in (*range(50), *range(50))]
    assert np.array_equal(drawn[:50], drawn[50:]), "randomness comes in as rng alone"
    pairs = [np.count_nonzero((row[1:] == tok.mask) & (row[:-1] == tok.mask)) for row in drawn]
    assert 1 < np.mean(pairs) < 3, "14 masks at uniform places have 14 x 13 / 99 pairs of neighbours"


def test_masking_spares_special_tokens_even_where_few_others_are_left(tok):
    inputs = np.array([tok.pre, tok.suf, 7, tok.mid, 8, tok.eot])
    masked = mask(inputs, 0.9, tok, np.random.default_rng(0)).tolist()
    assert masked == [tok.pre, tok.suf, tok.mask, tok.mid, tok.mask, tok.eot]
    assert inputs[2] == 7, "the argument stays as it was: targets share its memory"


# Fill-in-the-middle: which documents, where they are cut, what is trimmed

def test_the_two_cuts_are_uniform_and_any_part_may_be_empty():
    text, n, counts, rng = "abcdefghi", 20_000, Counter(), np.random.default_rng(0)
    for _ in range(n):
        prefix, middle, suffix = split(text, rng)
        assert prefix + middle + suffix == text
        counts[len(prefix), len(prefix + middle)] += 1
        assert split(text, np.random.default_rng(3)) == split(text, np.random.default_rng(3))
    cuts = list(combinations_with_replacement(range(10), 2))
    assert set(counts) == set(cuts)
    assert is_chi_square([(counts[i, j], n / 100 * (1 if i == j else 2)) for i, j in cuts])


def test_cuts_at_lines_worked_by_hand():
    rng = np.random.default_rng(0)
    drawn = {split("ab\n\ncd", rng, "line") for _ in range(200)}
    assert drawn == {tuple(parts.split("|")) for parts in (
        "||ab\n\ncd", "|ab\n|\ncd", "|ab\n\n|cd", "|ab\n\ncd|", "ab\n||\ncd", "ab\n|\n|cd", "ab\n|\ncd|",
        "ab\n\n||cd", "ab\n\n|cd|", "ab\n\ncd||")}
    n, counts = 4500, Counter(split("a\nb\n", rng, "line") for _ in range(4500))  # three places, each once
    pairs = [("", "a\nb\n"), ("a\n", "b\n"), ("a\nb\n", "")]
    expected = {(a, z[:len(z) - len(y)], y): n / 9 * (2 - (i == j))
                for i, (a, z) in enumerate(pairs) for j, (_, y) in enumerate(pairs) if i <= j}
    assert counts.keys() == expected.keys() and is_chi_square([(counts[c], expected[c]) for c in expected])


@pytest.mark.parametrize("span, name", [
    ("char", "code"), ("token", "code"), ("line", "code"), ("line", "code in bytes"), ("line", "languages")])
def test_cuts_fall_where_span_allows_and_the_middle_survives_trimming(corpora, span, name):
    """Cut by lines, a middle that lost a token would no longer be whole lines."""
    tok, stream = corpora[name]
    at_tokens, at_lines, trimmed = [], [], Counter()
    for window, rng in windows(stream, 200, T=99):
        ids = row_ids(fim, window, tok, rng, fim_rate=1.0, spm_rate=0.0, span=span)
        for source, example in examples(ids, window, tok):
            parts, = readings(example, tok, {"spm_rate": 0.0})
            at_tokens.append(any(sum(parts, []) == source[k:k + len(sum(parts, []))] for k in range(5)))
            text, (prefix, middle, suffix) = tok.decode_bytes(source), map(tok.decode_bytes, parts)
            start = 0 if suffix else text.index(prefix + middle)
            borders = [0, *(match.end() for match in re.finditer(b"\n", text)), len(text)]
            at_lines.append({start + len(prefix), start + len(prefix + middle)} <= set(borders))
            trimmed["suffix left" if suffix else "suffix gone"] += 1
            trimmed["prefix cut" if start else "prefix whole"] += 1
            if span != "token":
                assert parts[1] == tok.encode(middle.decode("utf-8")), "encoded on its own, as in a prompt"
    assert all(at_lines) == (span == "line") and (span == "line" or all(at_tokens) == (span == "token"))
    assert len(trimmed) == 4, trimmed


def test_a_document_whose_parts_encode_to_too_few_tokens_to_fill_its_place_stays_plain(tok, documents):
    window = np.array([*documents[0][:60].encode()])  # single bytes, where encode takes longer tokens
    for seed in range(20):
        ids = row_ids(fim, window, tok, np.random.default_rng(seed), fim_rate=1.0)
        assert np.array_equal(ids, window)


@pytest.mark.parametrize("longest", [16, 64, 67])
def test_short_documents_cover_each_document_and_are_n_fourths_to_n_tokens_long(tok, longest):
    rng = np.random.default_rng(0)
    for _ in range(100):
        window = np.where(rng.random(500) < rng.choice([0, 0.005, 0.1]), tok.eot, 7)
        whole = {part.tobytes() for part in np.split(window, np.flatnonzero(window == tok.eot) + 1)}
        found = [np.array(document) for document in documents_in(window, tok, rng, longest)]
        assert np.array_equal(np.concatenate(found), window), "each token once"
        for document in found:
            assert tok.eot not in document[:-1], "none spans two documents"
            assert len(document) <= longest
            assert document.tobytes() in whole or longest // 4 <= len(document)


def test_lengths_of_short_documents_are_uniform(tok):
    found = [*map(len, documents_in(np.full(10**6, 7), tok, np.random.default_rng(0), 64))]
    counts = Counter(found[:-2])  # the last two share what is left
    assert is_chi_square([(counts[n], (len(found) - 2) / 49) for n in range(16, 65)])


@pytest.mark.parametrize("span", ["char", "line"])
@pytest.mark.parametrize("name", ["languages", "languages in bytes"])
def test_a_window_cut_inside_a_character_invents_none(corpora, name, span):
    tok, stream = corpora[name]
    n_cut = 0
    for start in range(0, len(LANGUAGES.encode()), 2):
        window = stream[start:start + 91].astype(np.int64)
        n_cut += "\ufffd" in tok.decode(window.tolist())
        ids = row_ids(fim, window, tok, np.random.default_rng(start), fim_rate=1.0, spm_layout="labelled",
                      span=span, max_document_tokens=32)
        assert "\ufffd".encode() not in tok.decode_bytes(ids.tolist())
        for source, example in examples(ids, window, tok, shorter=True):
            (_, middle, _), = readings(example, tok, {"spm_layout": "labelled"})
            assert tok.decode_bytes(middle).decode("utf-8") in tok.decode_bytes(source).decode("utf-8")
    assert n_cut > 50, "most windows do begin or end inside a character"


# old row rule: an example is exactly as long as its document, or the document stays plain

@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_each_document_has_its_own_coin_for_fim_and_each_example_for_its_order(corpora, rate):
    """Five documents a window: the number of examples is binomial, not 0 or 5."""
    tok, _ = corpora["code in bytes"]
    knobs = {"fim_rate": rate, "spm_rate": rate, "spm_layout": "labelled"}
    n, length, counts, starts = 1000, 40, Counter(), Counter()
    window = as_stream(["x" * length] * 5, tok).astype(np.int64)
    for seed in range(n):
        ids = row_ids(fim, window, tok, np.random.default_rng(seed), **knobs)
        found = [example[0] for _, example in examples(ids, window, tok)]
        counts[len(found)] += 1
        starts.update(found)
    share = rate * (1 - too_short(length + 1, length))
    assert is_chi_square([(counts[k], n * comb(5, k) * share**k * (1 - share)**(5 - k)) for k in range(6)])
    total = starts.total()
    assert is_chi_square([(starts[tok.suf], rate * total), (starts[tok.pre], (1 - rate) * total)]), "SPM, PSM"


@pytest.mark.parametrize("max_document_tokens", [0, 16])
def test_an_example_that_closes_a_document_ends_in_that_documents_eot(corpora, max_document_tokens):
    tok, stream = corpora["code in bytes"]
    stream = stream[stream != tok.eot]
    stream[::91] = tok.eot
    for window, rng in windows(stream, 200, T=400):
        ids = row_ids(fim, window, tok, rng, fim_rate=1.0, max_document_tokens=max_document_tokens)
        assert (ids[window == tok.eot] == tok.eot).all()
        assert not ((ids[1:] == tok.eot) & (ids[:-1] == tok.eot)).any(), "and none stands behind it"


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_fragment_worked_by_hand(corpora, order, ends):
    """Six letters, with and without their <EOT>: all pairs of cuts, trimmed here letter by letter."""
    tok, _ = corpora["code in bytes"]
    text, expected = list(b"abcdef"), set()
    fragment = text + [tok.eot] * ends
    for first, second in combinations_with_replacement(range(7), 2):
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        while len(prefix + middle + suffix) + 4 > len(fragment) and prefix + suffix:
            if suffix:
                suffix.pop()
            else:
                prefix.pop(0)
        example = {"psm": [tok.pre, *prefix, tok.suf, *suffix, tok.mid, *middle, tok.eot],
                   "spm": [tok.suf, *suffix, tok.pre, *prefix, tok.mid, *middle, tok.eot]}[order]
        expected.add(tuple(example if len(example) == len(fragment) else fragment))  # no room: it stays plain
    knobs, rng = {"fim_rate": 1.0, "spm_layout": "labelled", "spm_rate": float(order == "spm")}, np.random.default_rng(0)
    drawn = {tuple(row_ids(fim, np.array(fragment), tok, rng, **knobs).tolist()) for _ in range(600)}
    assert drawn == expected


def test_the_surplus_comes_off_the_end_of_the_suffix_then_off_the_start_of_the_prefix(corpora):
    """In bytes nothing re-tokenises: the surplus is three sentinels and <EOT>, and examples show where it
    came off. At rate 1 a document stays plain only where prefix and suffix together are shorter than that."""
    tok, stream = corpora["code in bytes"]
    n, plain, from_prefix, empty = 16, 0, Counter(), set()
    for window, rng in windows(stream[stream != tok.eot], 2000, T=n - 1):
        found = list(examples(row_ids(fim, window, tok, rng, fim_rate=1.0, spm_rate=0.0), window, tok))
        plain += not found
        for source, example in found:
            parts, = readings(example, tok, {"spm_rate": 0.0})
            k = next(k for k in range(5) if sum(parts, []) == source[k:n - 4 + k])
            assert k == 0 or not parts[2]
            from_prefix[k] += 1
            empty |= {i for i, part in enumerate(parts) if not part}
    assert set(from_prefix) == {0, 1, 2, 3, 4} and from_prefix[0] > 1000 and empty == {0, 1, 2}
    assert abs(plain / 2000 - too_short(n, n)) < 0.03


def too_short(n_ids, n_characters):
    """The share of documents of single bytes that stay plain: four tokens of layout need room in prefix and
    suffix, less the place of their own <EOT>."""
    need = 4 - (n_ids - n_characters)
    cuts = list(product(range(n_characters + 1), repeat=2))
    return sum(n_characters - abs(i - j) < need for i, j in cuts) / len(cuts)


# end of the old row rule


# Fine-tuning

def loss_terms(prompt, answer, copy, tok):
    """MEAP's section 3.2 by brute force: {t: x_t} for t in U_q and U_m, positions in original ++ copy."""
    original = [*prompt, tok.mid, *answer, tok.eot]
    terms = {t: x for t, x in enumerate(original) if t > len(prompt)}
    for t, x in enumerate(copy):
        if x == tok.mask:
            terms[len(original) + t] = original[t]
    return terms


@pytest.mark.parametrize("objective, knobs", [
    (sft, {}), (meap_sft, {}), (meap_sft, {"mask_region": "answer"}), (meap_sft, {"mask_ratio": 0}),
    (meap_sft, {"mask_ratio": 0.5, "min_answer": 20})])
def test_loss_is_on_the_answer_and_the_masked_tokens_of_the_copy_alone(objective, knobs, stream, tok):
    settings = knobs_of(objective) | knobs
    for i in range(150):
        rng = np.random.default_rng(i)
        start, n_prompt, n_answer = rng.integers(9000), rng.integers(60), rng.integers(1, 120)
        text = [token for token in stream[start:start + 200].tolist() if token != tok.eot]
        prompt, answer = text[:n_prompt], text[n_prompt:n_prompt + n_answer]
        original = [*prompt, tok.mid, *answer, tok.eot]
        inputs, targets = objective(np.array(original), tok, rng, **knobs)
        sequence = [*inputs.tolist(), tok.eot]
        n, copy = len(original), sequence[len(original):]
        assert sequence[:n] == original
        copied = objective is meap_sft and settings["mask_ratio"] > 0 and len(answer) > settings["min_answer"]
        assert len(copy) == (n if copied else 0)
        masked = [t for t, x in enumerate(copy) if x == tok.mask]
        if copied:
            maskable = len(answer) + (len(prompt) if settings["mask_region"] == "copy" else 0)
            assert len(masked) == int(settings["mask_ratio"] * maskable)
            assert [original[t] if t in masked else x for t, x in enumerate(copy)] == original
        assert not {original[t] for t in masked} & set(tok.specials)
        assert settings.get("mask_region") != "answer" or all(t > len(prompt) for t in masked)
        # a target stands where its token is predicted: one position before it
        found = {t + 1: x for t, x in enumerate(targets.tolist()) if x != IGNORE}
        assert found == loss_terms(prompt, answer, copy, tok)


def test_over_many_draws_every_ordinary_token_of_the_copy_is_masked_but_no_other(tok):
    ids = np.array([*range(20), tok.mid, *range(100, 160), tok.eot])
    rows = [meap_sft(ids, tok, np.random.default_rng(i))[0] for i in range(300)]
    masked = {int(t) for row in rows for t in np.flatnonzero(row == tok.mask)}
    assert masked == {82 + t for t in range(81) if t != 20}  # its first token is among them, its <MID> is not


@pytest.mark.parametrize("n, copied", [(49, False), (50, False), (51, True)])
def test_only_answers_longer_than_50_tokens_get_a_copy(n, copied, tok):
    inputs, _ = meap_sft(np.array([1, 2, tok.mid, *range(n), tok.eot]), tok, np.random.default_rng(0))
    assert len(inputs) == (n + 4) * (1 + copied) - 1 and (tok.mask in inputs) == copied


@pytest.mark.parametrize("objective", [sft, meap_sft])
def test_a_window_without_an_answer_has_no_loss(objective, stream, tok):
    for window, rng in windows(stream, 10, T=100):
        inputs, targets = objective(window, tok, rng)
        assert np.array_equal(inputs, window[:-1]) and (targets == IGNORE).all()


# The drawing

@pytest.fixture(scope="module")
def drawing():
    """What `python objectives.py` prints, as {name of an objective: its lines}."""
    script = Path(__file__).resolve().parent.parent / "objectives.py"
    run = subprocess.run([sys.executable, "-X", "utf8", script], capture_output=True, check=True)
    return {section.split()[0]: section.strip() for section in run.stdout.decode().strip().split("\n\n")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_script_draws_every_objective_with_its_sentinels_and_masks(drawing, name):
    lines = drawing[name].splitlines()
    inputs, targets = (" ".join(line[7:] for line in lines if line.startswith(label)).split()
                       for label in ("input", "target"))
    knobs = knobs_of(OBJECTIVES[name])
    assert lines[0].split()[1:] and all(f"{knob}=" in lines[0] for knob in knobs) or not knobs
    assert "<EOT>" in targets and "<MASK>" not in targets
    assert "<MASK>" in inputs or "mask_ratio" not in knobs
    assert {"<PRE>", "<SUF>", "<MID>"} <= {*inputs} or "fim_rate" not in knobs
    if name in ("ntp", "sft"):  # nothing of the text is lost
        shown = "".join(inputs).replace("<MID>", "").replace("·", " ").replace("⏎", "\n")
        assert shown == TEXT


def test_every_drawn_row_is_a_row_of_the_whole_text(tok):
    for name, knobs, inputs, targets in rows_of_every_objective(TEXT, tok):
        ids = np.array([*tok.encode(TEXT), tok.eot])
        if name in ON_PAIRS:
            ids = np.append(inputs, targets[-1])[:np.flatnonzero(inputs == tok.eot).min(initial=len(inputs)) + 1]
            assert tok.decode(ids.tolist()) == TEXT and (ids == tok.mid).sum() == 1
            ids = np.concatenate((ids, ids))[:len(inputs) + 1]
        n = check_row(inputs, targets, ids, tok, knobs | FIXED.get(name, {}))
        assert n == ("fim_rate" in knobs)


# Helpers

def windows(stream, n, T, seed=0):
    """n random windows of T+1 ids, each with an rng."""
    rng = np.random.default_rng(seed)
    for start in rng.integers(len(stream) - T, size=n):
        yield stream[start:start + T + 1].astype(np.int64), rng


def random_documents(tok, rng):
    """A stream of documents of any characters, down to none: line ends, NUL, BOM, marks that combine, emoji,
    sentinels' names."""
    signs = ["a", "Z", "_", "9", " ", "    ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u2028", "é", "e\u0301",
             "я", "語", "🙂", "👩‍👩‍👧", "def ", "return\n", "(", "):\n", "<MID>", "<EOT>", "<|endoftext|>"]
    alphabet = [signs[i] for i in rng.choice(len(signs), rng.integers(1, len(signs)), replace=False)]
    sizes = (400 ** rng.random(20)).astype(int) - 1
    texts = ["".join(alphabet[i] for i in rng.integers(len(alphabet), size=size)) for size in sizes]
    return as_stream([*texts, "a" * 300], tok)


def random_knobs(name, rng):
    """Values for the knobs that this file knows; an objective's other knobs keep their defaults."""
    def choice(*options):
        return options[rng.integers(len(options))]

    knobs = {"mask_ratio": choice(0, 0.15, rng.random()), "fim_rate": choice(0, 0.5, 1),
             "spm_rate": choice(0, 0.5, 1), "spm_layout": choice(*LAYOUTS), "span": choice(*SPANS),
             "max_document_tokens": choice(0, 16, 50), "mask_region": choice("copy", "answer"),
             "min_answer": choice(0, 5, 50)}
    if knobs["spm_rate"] == 0.5 and knobs["spm_layout"] == "swapped":  # refused
        knobs["spm_layout"] = "labelled"
    return {knob: knobs.get(knob, default) for knob, default in knobs_of(OBJECTIVES[name]).items()}


def a_pair(window, tok, rng):
    """A window's ordinary tokens -> prompt <MID> answer <EOT>, as long as the window or shorter."""
    text = window[~np.isin(window, tok.specials)][:len(window) - 2]
    return np.insert(np.append(text, tok.eot), rng.integers(len(text) + 1), tok.mid)


def row_ids(objective, window, tok, rng, **knobs):
    """The T+1 ids of an unmasked row."""
    inputs, targets = objective(window, tok, rng, **knobs)
    return np.append(inputs, targets[-1])


def examples(ids, window, tok, shorter=False):
    """[(window's ids, the FIM example made of them)] of a row, under any rule of how much of a document is
    laid out: what is not in an example is the window's, in its order. shorter: a document may be several
    examples (max_document_tokens), so that all places are tried where one may end."""
    ids, window, ends = ids.tolist(), window.tolist(), [*np.flatnonzero(window == tok.eot) + 1, len(window)]

    def aligned(i, at):
        while i < len(ids) and ids[i] not in (tok.pre, tok.suf):
            if at == len(window) or ids[i] != window[at]:
                return None
            i, at = i + 1, at + 1
        if i == len(ids) or at == len(window):
            return [] if i == len(ids) else None
        end, document_ends = ids.index(tok.eot, i) + 1, min(end for end in ends if end > at)
        for source_ends in range(document_ends, at if shorter else document_ends - 1, -1):
            if is_of(ids[i:end], window[at:source_ends], tok) and (rest := aligned(end, source_ends)) is not None:
                return [(window[at:source_ends], ids[i:end]), *rest]
        return None

    found = aligned(0, 0)
    assert found is not None, (ids, window)
    return found


def is_of(example, source, tok, knobs={}):
    """Whether an example's text is that of source, less the end of its suffix and the start of its prefix."""
    text = tok.decode_bytes(source)
    parts = [map(tok.decode_bytes, reading) for reading in readings(example, tok, knobs)]
    return any(p + m + s in text if s else p + m in text for p, m, s in parts)


def readings(example, tok, knobs):
    """[(prefix, middle, suffix)], every way to read an example, given spm_rate and spm_layout or not: PSM and
    SPM swapped look alike, and SPM joint reads as PSM with an empty prefix."""
    places = [i for i, token in enumerate(example) if token in tok.specials]
    marks = [example[i] for i in places]
    assert places[0] == 0 and places[-1] == len(example) - 1 and len(places) == 4
    a, b, middle = (example[i + 1:j] for i, j in zip(places, places[1:]))
    rate, layout, found = knobs.get("spm_rate", 0.5), knobs.get("spm_layout", "any"), []
    psm, spm = rate < 1, rate > 0
    if marks == [tok.pre, tok.suf, tok.mid, tok.eot]:
        if psm or layout in ("joint", "any") and not a:
            found.append((a, middle, b))
        if spm and layout in ("swapped", "any"):
            found.append((b, middle, a))
    if marks == [tok.suf, tok.pre, tok.mid, tok.eot] and spm and layout in ("labelled", "any"):
        found.append((b, middle, a))
    assert found, f"not a layout of {knobs}: {marks}"
    return found


def check_row(inputs, targets, window, tok, knobs):
    """Asserts what holds for every row of every objective; returns the number of FIM examples in it."""
    T = len(window) - 1
    assert inputs.shape == targets.shape == (T,) and inputs.dtype == targets.dtype == np.int64
    # Unmask each input by the target of the position before it; where that is IGNORE, by the window.
    before = np.append(window[0], targets[:-1])
    before = np.where(before == IGNORE, window[:-1], before)
    ids = np.append(np.where(inputs == tok.mask, before, inputs), window[-1])
    if targets[-1] != IGNORE:
        ids[-1] = targets[-1]
    assert not np.isin(ids[:-1][inputs == tok.mask], tok.specials).any(), "no special token is masked"
    assert ((targets == IGNORE) | (targets == ids[1:])).all(), "a target is the true next token, or IGNORE"
    found = examples(ids, window, tok, knobs.get("max_document_tokens"))
    for source, example in found:
        assert is_of(example, source, tok, knobs), (tok.decode(source), example)
    return len(found)


def is_chi_square(cells):
    """cells: (observed, expected). True if chi-square is within five standard deviations of its mean."""
    chi_square, freedom = sum((observed - e) ** 2 / e for observed, e in cells), len(cells) - 1
    return chi_square < freedom + 5 * (2 * freedom) ** 0.5
