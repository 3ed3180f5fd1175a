"""The generated corpora against brute force: probabilities by counting and by enumerating every text,
the answers of questions by reading."""
import doctest
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import hold_out, prepare, read_files, source_files
from lab.corpora import (CORPORA, LETTERS, MARKOV, Markov, arguments, body_start, documents,
                         function_of, hole, key, passes, passes_all, questions)


def chain():
    """Three letters whose probabilities are easy to calculate by hand."""
    language = Markov(3, 2)
    language.P = np.array([[0, 1, 0], [0.5, 0, 0.5], [0.75, 0.25, 0]])
    language.stationary = np.array([7, 8, 4]) / 19  # the solution of a = b/2 + 3c/4, b = a + c/4, c = b/2
    return language


@pytest.mark.parametrize("name", CORPORA)
def test_a_document_depends_on_seed_and_index_alone(name):
    texts = documents(name, 5, seed=3)
    assert texts == documents(name, 5, seed=3) and texts[:2] == documents(name, 2, seed=3)
    assert len(set(texts + documents(name, 5, seed=4))) == 10


def test_documents_of_markov_are_8_to_32_letters_that_follow_each_other_as_often_as_P_says():
    texts = documents("markov", 5000, seed=1)
    lengths = Counter(map(len, texts))
    assert lengths.keys() == set(range(8, 33)) and max(lengths.values()) < 200 + 5 * 200 ** 0.5
    pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
    count = np.array([[pairs[a, b] for b in LETTERS] for a in LETTERS])
    n = count.sum(1, keepdims=True)
    error = np.sqrt(MARKOV.P * (1 - MARKOV.P) / n)
    assert (np.abs(count / n - MARKOV.P) <= 4.5 * error).all()  # 104 shares: one is 4 errors off in 150 draws
    np.testing.assert_allclose(count.sum(1) / count.sum(), MARKOV.stationary, atol=0.01)


def test_markov_worked_by_hand():
    h = 0.75 * np.log2(4 / 3) + 0.25 * 2
    assert chain().entropy_rate() == pytest.approx(8 / 19 * 1 + 4 / 19 * h)
    np.testing.assert_allclose(MARKOV.stationary @ MARKOV.P, MARKOV.stationary)
    assert chain().document_bits("abca") == pytest.approx(np.log2(25) - np.log2([7 / 19, 1, 0.5, 0.75]).sum())


@pytest.mark.parametrize("before, after", list(itertools.product("abc", "abc")))
def test_infill_is_what_an_enumeration_of_all_middles_gives(before, after):
    """P(next | written) = the weight of all middles that begin with written + next, over that of written."""
    language, prior = chain(), np.array([0.3, 0.1, 0.4, 0.2])
    weight = defaultdict(float)  # of each beginning of a middle, "" to three letters, "." at its end
    for length, w in enumerate(prior):
        for letters in itertools.product("abc", repeat=length):
            text = [LETTERS.index(x) for x in (before, *letters, after)]
            p = w * np.prod([language.P[x, y] for x, y in itertools.pairwise(text)])
            for begun in itertools.accumulate([*letters, "."], initial=""):
                weight[begun] += p
    for middle in ("", "a", "ba", "cab"):
        if weight[middle]:
            written = [middle[:n] for n in range(len(middle) + 1)]
            expected = [[weight[w + x] / weight[w] for x in "abc."] for w in written]
            np.testing.assert_allclose(language.infill(before, middle, after, prior), expected, atol=1e-12)


def test_infill_of_an_impossible_text_is_nan():
    assert np.isnan(chain().infill("a", "", "c", np.array([1.0]))).all()  # c never follows a


@pytest.mark.parametrize("name, most_hops", [("records", 1), ("haystack", 1), ("chains", 3)])
def test_questions_have_the_answers_that_the_document_gives(name, most_hops):
    asked = [(text, q) for text in documents(name, 100, seed=1) for q in questions(text)]
    assert len(asked) == (400 if name == "chains" else 800)
    assert {q.hops for _, q in asked} == set(range(1, most_hops + 1))
    for text, q in asked:
        assert text[q.start:].startswith(f" {q.answer}\n") and text[:q.start].split("\n")[-1][:2] == "? "
        assert text.count("=") == q.n_records


def test_a_chain_by_hand():
    text = "= fox owl\n= cat hen\n= owl tea\n= hen jam\n? cat jam\n? fox tea\n"
    assert [(q.answer, q.hops, q.distance, q.n_records) for q in questions(text)] == [
        ("jam", 2, 1, 4), ("tea", 2, 3, 4)]


@pytest.mark.parametrize("source", [*(f"{name}:0" for name in CORPORA), "markov:", "chains:1.5"])
def test_a_corpus_is_a_data_source_and_another_number_of_documents_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=f"--data {source}: expected a number of documents"):
        prepare(source, "bytes", cache_dir=tmp_path)


PROGRAMS = documents("programs", 300, seed=1)
SQUARES = '''def squares(xs):
    """The sum of the squares of the numbers in xs that are greater than 3.

    >>> squares([4, 2, 5])
    41
    >>> squares([3])
    0
    """
    total = 0
    for x in xs:
        if x > 3:
            total += x * x
    return total
'''


def with_body(body):
    return SQUARES[:body_start(SQUARES)] + "".join(f"    {line}\n" for line in body)


def test_programs_do_what_their_examples_show():
    for text in PROGRAMS:
        f = function_of(text)
        test = doctest.DocTestParser().get_doctest(f.__doc__, f.__globals__, f.__name__, None, 0)
        assert len(test.examples) == 2 and doctest.DocTestRunner(verbose=False).run(test).failed == 0, text


def test_one_sentence_has_one_meaning_however_the_code_is_written():
    meanings = defaultdict(list)
    for text in documents("programs", 3000, seed=2):
        meanings[text.split('"""')[1].split("\n")[0]].append(key(text))
    assert len(meanings) < 2800 and all(len(set(same)) == 1 for same in meanings.values())


def test_no_held_out_meaning_is_trained_on(tmp_path):
    """... also where words, names and style differ. (Functions that differ in one call are two meanings.)"""
    bodies = {False: defaultdict(set), True: defaultdict(set)}  # of each meaning
    for text, is_held_out in hold_out(read_files(source_files("programs:4000", tmp_path))):
        results = [*map(function_of(text), arguments(text))]
        bodies[is_held_out][str(results)].add(text[body_start(text):])
    assert len(bodies[True]) > 80 and not bodies[True].keys() & bodies[False].keys()
    assert max(map(len, bodies[True].values())) > 3  # one meaning in more than three spellings


@pytest.mark.parametrize("body, right", [
    (["return sum(y ** 2 for y in xs if y >= 4)"], True),
    (["while xs and xs[0] <= 3:", "    xs.pop(0)", "if not xs:", "    return 0",
      "return xs[0] ** 2 + squares(xs[1:])"], True),
    (["return sum(x * x for x in xs if x > 4)"], False),
    (["return {2: 41, 0: 0}[len(xs) % 3]"], False),
    (["return float(sum(x * x for x in xs if x > 3))"], False),
    (["return ("], False),
    (["while True:", "    pass"], False),
    (["return squares(xs)"], False),
    (["return [0] * 10 ** 12"], False),
    (["import os", "return sum(x * x for x in xs if x > 3)"], False),
    (["print(1)", "return sum(x * x for x in xs if x > 3)"], False),
    (["exit()"], False),
    (["().__class__.__base__.__subclasses__()", "return sum(x * x for x in xs if x > 3)"], True)])
def test_a_filled_function_passes_if_it_gives_the_results(body, right):
    assert passes(with_body(body), SQUARES) == right


def test_many_are_judged_in_one_process_as_they_are_alone():
    """Also beside one that takes its process with it, for want of a stack."""
    fatal = with_body(["for _ in range(10 ** 6):", "    xs = map(abs, xs)", "return list(xs)"])
    filled = [(text, text) for text in PROGRAMS[:60]] + [(PROGRAMS[1], PROGRAMS[0]), (fatal, SQUARES)]
    assert passes_all(filled) == [True] * 60 + [False] * 2


@pytest.mark.parametrize("kind", ["line", "lines", "span"])
def test_holes_are_parts_of_the_body_and_never_empty(kind):
    rng = np.random.default_rng(1)
    for text in PROGRAMS:
        body, parts = text[body_start(text):], hole(text, kind, rng)
        if parts is None:
            assert kind == "lines" and body.count("\n") == 1
            continue
        prefix, middle, suffix = parts
        assert prefix + middle + suffix == text and middle and len(prefix) >= body_start(text)
        if kind != "span":
            assert prefix.endswith("\n") and middle.endswith("\n")
            assert middle.count("\n") == 1 if kind == "line" else middle.count("\n") > 1
