"""The generated corpora against brute force: probabilities by counting and by enumerating every text, the
checker on spoilt documents, the answers of questions by reading."""
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from data import GENERATED, prepare
from lab.corpora import CORPORA, LETTERS, MARKOV, Markov, documents, errors, questions

RELAY = "17 fox fig owl\n18 owl tea fox\n19 fox fig hen\n20 hen jam owl\n"


def chain():
    """Three letters whose probabilities are easy to calculate by hand."""
    language = Markov(3, 2)
    language.P = np.array([[0, 1, 0], [0.5, 0, 0.5], [0.75, 0.25, 0]])
    language.stationary = np.array([7, 8, 4]) / 19  # the solution of a = b/2 + 3c/4, b = a + c/4, c = b/2
    return language


def test_every_corpus_is_a_name_that_data_knows():
    assert set(GENERATED) == CORPORA.keys()


@pytest.mark.parametrize("name", CORPORA)
def test_a_document_depends_on_seed_and_index_alone(name):
    texts = documents(name, 5, seed=3)
    assert texts == documents(name, 5, seed=3) and texts[:2] == documents(name, 2, seed=3)
    assert len(set(texts + documents(name, 5, seed=4))) == 10


def test_markov_letters_follow_each_other_as_often_as_P_says():
    pairs = Counter(pair for text in documents("markov", 5000, seed=1) for pair in itertools.pairwise(text))
    count = np.array([[pairs[a, b] for b in LETTERS] for a in LETTERS])
    n = count.sum(1, keepdims=True)
    error = np.sqrt(MARKOV.P * (1 - MARKOV.P) / n)
    assert (np.abs(count / n - MARKOV.P) <= 4.5 * error).all()  # 104 shares: one is 4 errors off in 150 draws
    np.testing.assert_allclose(count.sum(1) / count.sum(), MARKOV.stationary, atol=0.01)


def test_entropy_rate_by_hand():
    h = 0.75 * np.log2(4 / 3) + 0.25 * 2
    assert chain().entropy_rate() == pytest.approx(8 / 19 * 1 + 4 / 19 * h)
    np.testing.assert_allclose(MARKOV.stationary @ MARKOV.P, MARKOV.stationary)


def test_documents_of_markov_are_8_to_32_letters_and_their_probabilities_are_exact():
    texts = documents("markov", 3000, seed=1)
    counts = Counter(map(len, texts))
    assert counts.keys() == set(range(8, 33)) and max(counts.values()) < 120 + 5 * 120 ** 0.5
    assert chain().document_bits("abca") == pytest.approx(np.log2(25) - np.log2([7 / 19, 1, 0.5, 0.75]).sum())


def test_bits_of_a_text_are_those_of_its_transitions():
    np.testing.assert_allclose(chain().bits("abca"), -np.log2([1, 0.5, 0.75]))


@pytest.mark.parametrize("before, after", list(itertools.product("abc", "abc")))
def test_infill_is_what_an_enumeration_of_all_middles_gives(before, after):
    """P(next | written) = the weight of all middles that begin with written + next, over that of written."""
    language, prior = chain(), np.array([0.3, 0.1, 0.4, 0.2])
    weight = defaultdict(float)  # of each beginning of a middle, "" to three letters, "." at its end
    for length, w in enumerate(prior):
        for letters in itertools.product("abc", repeat=length):
            text = [LETTERS.index(x) for x in (before, *letters, after)]
            p = w * np.prod([language.P[x, y] for x, y in itertools.pairwise(text)])
            for end in range(length + 1):
                weight["".join(letters[:end])] += p
            weight["".join(letters) + "."] += p
    for middle in ("", "a", "ba", "cab"):
        if weight[middle]:
            expected = [weight[middle + x] / weight[middle] for x in "abc."]
            p = language.infill(before, middle, after, prior)[-1]
            np.testing.assert_allclose(p, expected, atol=1e-12)


def test_infill_of_an_impossible_text_is_nan():
    assert np.isnan(chain().infill("a", "", "c", np.array([1.0]))).all()  # c never follows a


def test_relay_documents_have_no_errors():
    assert all(errors(text) == [] and len(text.splitlines()) >= 16 for text in documents("relay", 50, seed=1))
    assert errors(RELAY) == []


@pytest.mark.parametrize("right, wrong, error", [
    ("18 owl", "17 owl", [(1, "number"), (2, "number")]),
    ("19 fox fig hen", "19 fox tea hen", [(2, "gift")]),
    ("19 fox fig hen", "19 cow fig hen", [(2, "giver")]),
    ("18 owl tea fox", "18 owl tea hen", [(2, "giver")]),
    ("18 owl tea fox", "18 owl tea", [(1, "form")]),
    ("18 owl tea fox\n", "\n", [(1, "form")]),
    ("20 hen jam owl", "20 hen jam 3", [(3, "form")]),
    ("20 hen jam owl", "20 hen jam owl\f", [(3, "form")]),
])
def test_the_checker_finds_what_was_spoilt_and_nothing_else(right, wrong, error):
    assert errors(RELAY.replace(right, wrong)) == error


@pytest.mark.parametrize("name, most_hops", [("records", 1), ("chains", 3)])
def test_questions_have_the_answers_that_the_document_gives(name, most_hops):
    asked = [(text, q) for text in documents(name, 100, seed=1) for q in questions(text)]
    assert len(asked) == 400 and {q.hops for _, q in asked} == set(range(1, most_hops + 1))
    for text, q in asked:
        assert text[q.start:].startswith(f" {q.answer}\n") and text[:q.start].split("\n")[-1][:2] == "? "
        assert text.count("=") == q.n_records


def test_a_chain_by_hand():
    text = "= fox owl\n= cat hen\n= owl tea\n= hen jam\n? cat jam\n? fox tea\n"
    assert [(q.answer, q.hops, q.distance, q.n_records) for q in questions(text)] == [
        ("jam", 2, 1, 4), ("tea", 2, 3, 4)]


def test_a_corpus_is_a_data_source_by_its_name(tmp_path):
    tok, training, held_out, _ = prepare("relay:40", "bytes", cache_dir=tmp_path)
    texts = [tok.decode(part) for stream in (training, held_out)
             for part in np.split(stream, np.flatnonzero(stream == tok.eot) + 1) if len(part)]
    assert sorted(texts) == sorted(documents("relay", 40, seed=0)) and len(held_out)


@pytest.mark.parametrize("source", ["markov:", "markov:0", "markov:-1", "relay:many", "chains:1.5"])
def test_another_number_of_documents_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=f"--data {source}: expected a number of documents"):
        prepare(source, "bytes", cache_dir=tmp_path)
