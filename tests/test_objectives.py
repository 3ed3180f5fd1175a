"""What the papers and DESIGN.md say about a training row, checked on real text.

readings() at the bottom parses a FIM example back to its parts; it knows the layouts from the paper alone."""
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from math import log, nan
from pathlib import Path

import numpy as np
import pytest
from conftest import LANGUAGES, as_stream

from objectives import OBJECTIVES, Objective, fim_documents, fim_example, fim_prompt, mask_inputs, pieces, split_middle

LAYOUTS = ("swapped", "labelled", "joint")


@pytest.mark.parametrize("order, layout, expected", [
    *(("psm", layout, "<PRE> 1 2 <SUF> 4 5 6 <MID> 3 <EOT>") for layout in LAYOUTS),
    ("spm", "swapped", "<PRE> 4 5 6 <SUF> 1 2 <MID> 3 <EOT>"),
    ("spm", "labelled", "<SUF> 4 5 6 <PRE> 1 2 <MID> 3 <EOT>"),
    ("spm", "joint", "<PRE> <SUF> 4 5 6 <MID> 1 2 3 <EOT>")])
def test_layouts_are_the_papers_and_a_prompt_stops_where_the_middle_begins(tok, order, layout, expected):
    for prefix, middle, suffix in product(([], [1, 2]), ([], [3]), ([], [4, 5, 6])):  # each part may be empty
        kept = [word for word in expected.split() if not word.isdigit() or int(word) in prefix + middle + suffix]
        ids = [int(word) if word.isdigit() else getattr(tok, word[1:-1].lower()) for word in kept]
        example = fim_example(prefix, middle, suffix, tok, order, layout)
        assert example == ids
        assert example == fim_prompt(prefix, suffix, tok, order, layout) + middle + [tok.eot]


@pytest.mark.parametrize("order, layout, wrong", [("mps", "swapped", "mps"), ("spm", "jont", "jont")])
def test_an_unknown_order_or_layout_is_refused(tok, order, layout, wrong):
    with pytest.raises(ValueError, match=f"{wrong}: expected one of"):
        fim_prompt([1], [2], tok, order, layout)


@pytest.mark.parametrize("field, value, expected", [
    *((field, value, "0 to 1") for field in ("fim_rate", "spm_rate", "mask_ratio") for value in (-0.1, 1.5, nan)),
    ("spm_layout", "jont", "one of swapped, labelled, joint"), ("span", "word", "one of char, token, line, mixed"),
    ("middle", "short", "one of uniform, log_uniform"), ("min_piece", 3, "8 to"), ("max_piece", 16, "32 to"),
    ("max_piece", -1, "32 to")])
def test_a_bad_field_is_named_with_its_value_and_what_is_expected(field, value, expected):
    with pytest.raises(ValueError, match=f"{field} {value}: expected {expected}"):
        Objective(**{field: value})


@pytest.mark.parametrize("layout, spm_rate, span", [*product(LAYOUTS, (0, 1), ("char", "token", "line"))])
def test_every_example_parses_back_to_the_text_it_was_made_from(corpora, layout, spm_rate, span):
    """Round trip. With spm_rate 0 only PSM is a valid reading, with 1 only SPM."""
    objective = Objective(1.0, spm_rate, layout, span)
    for tok, stream in corpora.values():
        assert sum(check_row(*objective.row(window, tok, rng), window, objective, tok)
                   for window, rng in windows(stream, 15, T=200)) > 15


@pytest.mark.parametrize("name", [*(name for name in OBJECTIVES if not OBJECTIVES[name].answers), "random", "another"])
def test_any_row_of_any_objective_holds_its_windows_text(corpora, name):
    rng = np.random.default_rng(len(name))

    def choice(*options):
        return options[rng.integers(len(options))]

    for _ in range(60):
        objective = OBJECTIVES.get(name) or Objective(
            choice(0, 0.5, 1), choice(0, 0.5, 1), choice(*LAYOUTS), choice("char", "token", "line", "mixed"),
            choice(0, 0.15, 0.6), choice("uniform", "log_uniform"), choice(8, 16, 32), choice(0, 64))
        tok, stream = choice(*corpora.values())
        (window, _), = windows(stream, 1, rng.integers(16, 300), rng.integers(10**6))
        before = window.copy()
        check_row(*objective.row(window, tok, rng), window, objective, tok)
        assert np.array_equal(window, before), "the window is left as it was"


@pytest.mark.parametrize("name", [*OBJECTIVES, "random"])
def test_any_row_of_random_documents_holds_its_windows_text(name, corpora, n_rows=72):
    """Documents of any characters, down to none: line ends, NUL, BOM, marks that combine, emoji, sentinels' names."""
    signs = ["a", "Z", "_", "9", " ", "    ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u2028", "é", "e\u0301", "я", "語",
             "🙂", "👩‍👩‍👧", "def ", "return\n", "(", "):\n", "<MID>", "<EOT>", "<|endoftext|>"]
    rng = np.random.default_rng(sum(map(ord, name)))
    for _ in range(n_rows):
        tok = corpora[["code", "languages", "languages in bytes"][rng.integers(3)]][0]
        some = [signs[i] for i in rng.choice(len(signs), rng.integers(1, len(signs)), replace=False)]
        sizes = (400 ** rng.random(20)).astype(int) - 1
        texts = ["".join(some[i] for i in rng.integers(len(some), size=size)) for size in sizes]
        T = int(8 * 20 ** rng.random() ** 2)
        (window, _), = windows(as_stream([*texts, "a" * 160], tok), 1, T, rng.integers(10**6))
        objective = OBJECTIVES.get(name) or Objective(
            rng.random(), rng.random(), LAYOUTS[rng.integers(3)], ["char", "token", "line", "mixed"][rng.integers(4)],
            rng.random(), ["uniform", "log_uniform"][rng.integers(2)], int(rng.integers(8, 40)))
        check_row(*objective.row(window, tok, rng), window, objective, tok)


@pytest.mark.parametrize("span, name", [("char", "code"), ("token", "code"), ("mixed", "code"), ("line", "code"),
                                        ("line", "code in bytes"), ("line", "languages")])
def test_cuts_fall_where_span_allows_and_the_middle_survives_trimming(corpora, span, name):
    """Cut by lines, a middle that lost a token would no longer be whole lines."""
    tok, stream = corpora[name]
    objective, at_tokens, at_lines, trimmed = Objective(1.0, 0.0, span=span, min_piece=100), [], [], Counter()
    for window, rng in windows(stream, 200, T=99):
        for source, example in examples(row_ids(objective, window, tok, rng), window, tok):
            parts, = readings(example, objective, tok)
            at_tokens.append(any(sum(parts, []) == source[k:k + len(sum(parts, []))] for k in range(5)))
            text, (prefix, middle, suffix) = tok.decode_bytes(source), map(tok.decode_bytes, parts)
            start = 0 if suffix else text.index(prefix + middle)
            borders = [0, *(match.end() for match in re.finditer(b"\n", text)), len(text)]
            at_lines.append({start + len(prefix), start + len(prefix + middle)} <= set(borders))
            trimmed.update(["suffix left" if suffix else "suffix gone", "prefix cut" if start else "prefix whole"])
            if span != "token":
                assert parts[1] == tok.encode(middle.decode("utf-8")), "encoded on its own, as it will be in a prompt"
    assert all(at_lines) == (span == "line") and (span == "line" or all(at_tokens) == (span == "token"))
    assert len(trimmed) == 4, trimmed
    assert span != "mixed" or 0.35 < np.mean(at_lines) < 0.65, "half each"


def test_the_surplus_comes_off_the_end_of_the_suffix_then_off_the_start_of_the_prefix(corpora):
    """In bytes nothing re-tokenises: the surplus is three sentinels and <EOT>, and examples show where it came off. At
    rate 1 a piece stays plain only where prefix and suffix together are shorter than that; empty parts do no harm."""
    tok, stream = corpora["code in bytes"]
    n, plain, from_prefix, empty = 16, 0, Counter(), set()
    objective = Objective(1.0, 0.0, min_piece=n)
    for window, rng in windows(stream[stream != tok.eot], 2000, T=n - 1):
        found = list(examples(row_ids(objective, window, tok, rng), window, tok))
        plain += not found
        for source, example in found:
            parts, = readings(example, objective, tok)
            k = next(k for k in range(5) if sum(parts, []) == source[k:n - 4 + k])
            assert k == 0 or not parts[2]
            from_prefix[k] += 1
            empty |= {i for i, part in enumerate(parts) if not part}
    assert set(from_prefix) == {0, 1, 2, 3, 4} and from_prefix[0] > 1000 and empty == {0, 1, 2}
    too_short = sum(n - abs(i - j) < 4 for i, j in product(range(n + 1), repeat=2)) / (n + 1) ** 2
    assert abs(plain / 2000 - too_short) < 0.03


@pytest.mark.parametrize("middle", ["uniform", "log_uniform"])
def test_cuts_are_uniform_or_the_middles_length_is_log_uniform(middle):
    counts, n, rng = Counter(), 20_000, np.random.default_rng(0)
    for _ in range(n):
        prefix, cut_out, suffix = split_middle("abcdefghi", rng, middle)
        assert prefix + cut_out + suffix == "abcdefghi"
        counts[len(prefix), len(prefix + cut_out)] += 1
    cuts = [(i, j) for i in range(10) for j in range(i, 10)]
    expected = {(i, j): n / 100 * (1 if i == j else 2) for i, j in cuts}  # any part may be empty
    if middle == "log_uniform":  # a middle of k characters, 1 <= k < 9, stands in any of 10 - k places
        expected = {(i, j): n * log((j - i + 1) / (j - i), 9) / (10 - j + i) for i, j in cuts if 0 < j - i < 9}
    assert set(counts) == set(expected)
    chi_square, freedom = sum((counts[cut] - e) ** 2 / e for cut, e in expected.items()), len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


@pytest.mark.parametrize("rate", [0, 0.25, 0.5, 0.9, 1])
def test_fim_rate_is_a_share_of_windows_and_spm_rate_a_share_of_examples(corpora, rate):
    """A window is spared whole: plain text keeps its long context."""
    tok, stream = corpora["code in bytes"]
    first, plain = [], 0
    for window, rng in windows(stream[stream != tok.eot], 500, T=149):
        ids = row_ids(Objective(rate, rate, "labelled", min_piece=16, max_piece=32), window, tok, rng)
        first += [example[0] for _, example in examples(ids, window, tok)]
        plain += np.array_equal(ids, window)
    assert abs(plain / 500 - (1 - rate)) < 0.08 and (0 < rate < 1 or plain == 500 * (1 - rate))
    assert abs(first.count(tok.suf) / max(1, len(first)) - rate) < 0.05  # in SPM order


@pytest.mark.parametrize("low, high", [(8, 0), (8, 16), (32, 0), (32, 128), (64, 200), (40, 40)])
def test_pieces_cover_each_document_between_their_bounds(tok, low, high):
    rng, objective = np.random.default_rng(0), Objective(1.0, min_piece=low, max_piece=high)
    for _ in range(200):
        window = np.where(rng.random(500) < rng.choice([0, 0.005, 0.1]), tok.eot, 7)
        found = list(pieces(window, objective, tok, rng))
        covered = [i for start, end in found for i in range(start, end)]
        assert covered == np.flatnonzero(window != tok.eot).tolist(), "each token once, in order, and never <EOT>"
        fragments = [m.span() for m in re.finditer("x+", "".join("x" if i == 7 else "." for i in window))]
        for start, end in found:
            fragment, = [last - first for first, last in fragments if first <= start and end <= last]
            assert min(low, fragment) <= end - start
            assert end - start <= max(high, 2 * low - 1) or not high  # a document shorter than 2 low cannot be cut


def test_piece_lengths_are_log_uniform(tok):
    rng, window = np.random.default_rng(0), np.full(200_000, 7)
    found = [end - start for start, end in pieces(window, Objective(1.0, min_piece=32, max_piece=1024), tok, rng)]
    assert np.log2(np.quantile(found, [0.25, 0.5, 0.75])) == pytest.approx([6.25, 7.5, 8.75], abs=0.35)


@pytest.mark.parametrize("layout, spm_rate", [*product(LAYOUTS, (0, 1)), ("labelled", 0.5)])
def test_document_level_fim_keeps_every_documents_text(tok, documents, stream, layout, spm_rate):
    objective = Objective(0.7, spm_rate, layout)
    ids = fim_documents(stream, objective, tok, np.random.default_rng(0))
    *rebuilt, tail = (part.tolist() for part in np.split(ids, np.flatnonzero(ids == tok.eot) + 1))
    assert tail == [] and len(rebuilt) == len(documents) and ids.dtype == stream.dtype
    plain = [tok.encode(text) + [tok.eot] for text in documents]
    assert 5 < sum(a != b for a, b in zip(plain, rebuilt)) < 20
    for text, before, after in zip(documents, plain, rebuilt):
        assert after == before or text in [tok.decode(p + m + s) for p, m, s in readings(after, objective, tok)]


@pytest.mark.parametrize("span", ["char", "line"])
@pytest.mark.parametrize("name", ["languages", "languages in bytes"])
def test_a_window_cut_inside_a_character_invents_none(corpora, name, span):
    tok, stream = corpora[name]
    objective, cut = Objective(1.0, 0.5, "labelled", span=span, min_piece=16), 0
    for start in range(len(LANGUAGES.encode())):
        window = stream[start:start + 91].astype(np.int64)
        cut += "\ufffd" in tok.decode(window.tolist())
        ids = row_ids(objective, window, tok, np.random.default_rng(start))
        assert "\ufffd".encode() not in tok.decode_bytes(ids.tolist())
        for source, example in examples(ids, window, tok):
            (_, middle, _), = readings(example, objective, tok)
            assert tok.decode_bytes(middle).decode("utf-8") in tok.decode_bytes(source).decode("utf-8")
    assert cut > 100, "most windows do begin or end inside a character"


@pytest.mark.parametrize("fim_rate", [0, 1])
@pytest.mark.parametrize("T, ratio", [(100, 0.15), (99, 0.15), (64, 0.05), (100, 0.5)])
def test_meap_masks_exactly_its_share_of_ordinary_inputs(corpora, fim_rate, T, ratio):
    tok, stream = corpora["code"]
    objective, places = Objective(fim_rate=fim_rate, mask_ratio=ratio), np.zeros(T)
    for seed, (window, _) in enumerate(windows(stream, 100, T)):
        inputs, targets = objective.row(window, tok, np.random.default_rng(seed))
        true, same = replace(objective, mask_ratio=0).row(window, tok, np.random.default_rng(seed))
        masked = inputs == tok.mask
        assert masked.sum() == int(T * ratio) and not np.isin(true[masked], tok.specials).any()
        assert np.array_equal(inputs[~masked], true[~masked]) and np.array_equal(targets, same), "targets stay true"
        places += masked
    assert fim_rate or np.abs(places / 100 - int(T * ratio) / T).max() < 0.25, "uniform over the row"


def test_masking_spares_special_tokens_even_where_few_others_are_left(tok):
    inputs = np.array([tok.pre, tok.suf, 7, tok.mid, 8, tok.eot])
    masked = mask_inputs(inputs, 0.9, tok, np.random.default_rng(0)).tolist()
    assert masked == [tok.pre, tok.suf, tok.mask, tok.mid, tok.mask, tok.eot]
    assert inputs[2] == 7, "the argument stays as it was: targets share its memory"


def test_the_script_draws_every_preset_with_its_sentinels_and_masks():
    script = Path(__file__).resolve().parent.parent / "objectives.py"
    shown = subprocess.run([sys.executable, "-X", "utf8", script], capture_output=True, check=True).stdout.decode()
    drawn = set()
    for section in shown.split("\n\n"):
        names = set(re.findall(rf"\b({'|'.join(OBJECTIVES)}):?(?=\s)", section.strip().splitlines()[0]))
        lines = {label: re.findall("<[A-Z]+>", " ".join(re.findall(f"^{label} .*", section, re.MULTILINE)))
                 for label in ("input", "target")}
        if names:
            drawn |= names
            assert ("<MASK>" in lines["input"]) == any("meap" in name for name in names)
            assert {"<PRE>", "<SUF>", "<MID>"}.issubset(lines["input"]) == any("fim" in name for name in names)
            assert "<EOT>" in lines["target"] and "<MASK>" not in lines["target"]
    assert drawn == set(OBJECTIVES)


def windows(stream, n, T, seed=0):
    """n random windows of T+1 ids, each with an rng."""
    rng = np.random.default_rng(seed)
    for start in rng.integers(len(stream) - T, size=n):
        yield stream[start:start + T + 1].astype(np.int64), rng


def row_ids(objective, window, tok, rng):
    """The T+1 ids of an unmasked row."""
    inputs, targets = objective.row(window, tok, rng)
    return np.append(inputs, targets[-1])


def examples(ids, window, tok):
    """Yields each FIM example of a row as (the ids that stood there, the example). All else must be as it was."""
    i, ids, window = 0, ids.tolist(), window.tolist()
    while i < len(ids):
        end = ids.index(tok.eot, i) + 1 if ids[i] in (tok.pre, tok.suf) else i + 1
        if end > i + 1:
            yield window[i:end], ids[i:end]
        else:
            assert ids[i] == window[i]
        i = end


def readings(example, objective, tok):
    """[(prefix, middle, suffix)], every way to read an example. PSM and SPM swapped look alike, and SPM joint reads as
    PSM with an empty prefix."""
    places = [i for i, token in enumerate(example) if token in tok.specials]
    marks = [example[i] for i in places]
    assert places[0] == 0 and places[-1] == len(example) - 1 and len(places) == 4
    a, b, middle = (example[i + 1:j] for i, j in zip(places, places[1:]))
    psm, spm, found = objective.spm_rate < 1, objective.spm_rate > 0, []
    if marks == [tok.pre, tok.suf, tok.mid, tok.eot]:
        if psm or objective.spm_layout == "joint" and not a:
            found.append((a, middle, b))
        if spm and objective.spm_layout == "swapped":
            found.append((b, middle, a))
    if marks == [tok.suf, tok.pre, tok.mid, tok.eot] and spm and objective.spm_layout == "labelled":
        found.append((b, middle, a))
    assert found, f"not a layout of {objective}: {marks}"
    return found


def check_row(inputs, targets, window, objective, tok):
    """Asserts all that holds for every row of every objective; returns the number of FIM examples in it."""
    T, masked, n = len(window) - 1, inputs == tok.mask, 0
    assert inputs.shape == targets.shape == (T,) and tok.mask not in targets
    ids = np.append(window[0] if masked[0] else inputs[0], targets)
    ordinary = ~np.isin(ids[:-1], tok.specials)
    assert np.array_equal(inputs[~masked], ids[:-1][~masked]) and ordinary[masked].all()
    assert masked.sum() == min(int(T * objective.mask_ratio), ordinary.sum())
    assert objective.fim_rate > 0 or np.array_equal(ids, window)
    for n, (source, example) in enumerate(examples(ids, window, tok), 1):
        source = tok.decode_bytes(source)
        read = [tuple(map(tok.decode_bytes, parts)) for parts in readings(example, objective, tok)]
        assert any(source.startswith(p + m + s) if s else p + m in source for p, m, s in read), (source, read)
    return n
