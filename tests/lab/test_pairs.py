"""Pairs of texts, from their files to the rows of a batch. (What the objectives make of one example is
checked in tests/test_objectives.py.)"""
import ast
import json
from functools import partial

import numpy as np
import pytest

from data import Tokenizer
from lab import corpora, pairs
from lab.pairs import PairBatches, prepare_pairs, read_pairs
from objectives import IGNORE, meap_sft, sft


def test_programs_are_pairs_of_docstring_and_body_on_their_own_sides(tmp_path):
    training, held_out = pairs.load_pairs("programs:300", tmp_path)
    texts = [prompt + answer for prompt, answer in training + held_out]
    assert sorted(texts) == sorted(corpora.documents("programs", 300, seed=0))
    assert all(prompt.endswith('    """\n') and "return" in answer for prompt, answer in training)
    seen, kept = ({corpora.key("".join(pair)) for pair in side} for side in (training, held_out))
    assert kept and not kept & seen


def test_two_pairs_in_a_row_worked_by_hand():
    tok = Tokenizer.bytes()
    inputs, targets = PairBatches([("ab", "cde"), ("f", "g")], sft, tok, 14, 1, seed=1).row(0)
    mid, eot, no = tok.mid, tok.eot, IGNORE
    assert inputs.tolist() == [*b"ab", mid, *b"cde", eot, *b"f", mid, *b"g", eot, eot, eot, eot]
    assert targets.tolist() == [no, no, *b"cde", eot, no, no, *b"g", eot, no, no, no, no]


@pytest.fixture(scope="module")
def text_pairs(documents):
    """200 pairs of many lengths from real text."""
    text = "".join(documents)
    drawn = np.random.default_rng(1).integers((0, 0, 1), (len(text) - 600, 180, 400), (200, 3))
    return [(text[start:start + n], text[start + n:start + n + m]) for start, n, m in drawn]


@pytest.mark.parametrize("objective, T", [(sft, 64), (sft, 300), (meap_sft, 128), (meap_sft, 300)])
def test_an_epoch_shows_each_pair_once_whole_and_its_answer_as_targets(objective, T, text_pairs, tok):
    """In rows that are nearly full."""
    batches = PairBatches(text_pairs, objective, tok, T, 1, seed=3)
    inputs, targets = map(np.stack, zip(*map(batches.row, range(batches.n_windows))))  # (rows, T)
    # a brute-force reading: an example ends with each <EOT>; a copy has masks
    parts = [part for row in inputs for part in "".join(map(chr, row)).split(chr(tok.eot))]
    seen = [tuple([*map(ord, side)] for side in part.split(chr(tok.mid)))
            for part in parts if chr(tok.mid) in part and chr(tok.mask) not in part]
    n_masks = (inputs == tok.mask).sum()
    fitting = [(prompt, answer) for prompt, answer in (map(tok.encode, pair) for pair in text_pairs)
               if len(answer) + 2 <= T // 2]
    cut = [(prompt[max(0, len(prompt) - (T // 2 - 2 - len(answer))):], answer) for prompt, answer in fitting]
    assert sorted(seen) == sorted(cut)
    copied = [len(prompt) + len(answer) for prompt, answer in cut if len(answer) > 50]
    assert n_masks == (sum(int(0.1 * n) for n in copied) if objective is meap_sft else 0)
    assert (targets != IGNORE).sum() == sum(len(answer) + 1 for _, answer in cut) + n_masks
    assert sum(np.flatnonzero(row != tok.eot)[-1] + 2 for row in inputs) > 0.94 * inputs.size


def test_the_header_says_how_many_are_left_out():
    pairs = [("prompt " * 9, "b" * 55), ("a", "b"), ("a", "b"), ("a", "b" * 63)]
    assert PairBatches(pairs, meap_sft, Tokenizer.bytes(), 128, 1, 1).describe() == (
        "3 pairs to train on in 2 rows, 1 with a masked copy; 1 do not fit half a row")


def test_rows_are_pure_and_their_masks_are_drawn_afresh(text_pairs, tok):
    objective = partial(meap_sft, mask_ratio=0.5)
    one, two = (PairBatches(text_pairs, objective, tok, 256, B, seed=1) for B in (4, 2))
    two.batch(7)
    halves = [two.batch(number) for number in (120, 121)]
    np.testing.assert_equal(one.batch(60), tuple(np.concatenate(part) for part in zip(*halves)))
    first, second = (sorted(one.row(i + start)[0].tolist() for i in range(one.n_windows))
                     for start in (0, one.n_windows))  # an epoch's rows; a row begins with a plain example
    assert [row[:10] for row in first] == [row[:10] for row in second] and first != second


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "p", "answer": "a"}, [("p", "a")]),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("Add.\n\n1 2", "3")]),
    ({"instruction": "Hi", "input": "", "output": "Ho"}, [("Hi", "Ho")]),
    ({"instruction": "Hi", "output": "Ho"}, [("Hi", "Ho")]),
    ({"conversations": [{"from": who, "value": text} for who, text in
                        (("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))]},
     [("q", "a"), ("q\n\na\n\nr", "b")])])
def test_each_form_of_record_gives_its_pairs(record, expected, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    assert list(read_pairs(tmp_path / "pairs.jsonl")) == expected


def test_held_out_rows_are_plain_whatever_the_objective(tmp_path):
    texts = [{"prompt": f"{i}: ", "answer": "ten " * (1 + i % 20)} for i in range(400)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tok, batches, rows, name), (_, _, rows_of_sft, name_of_sft) = (
        prepare_pairs(str(tmp_path / "p.jsonl"), "bytes", 0, None, objective, 256, 2, seed=1)
        for objective in (meap_sft, sft))
    assert name == name_of_sft
    np.testing.assert_equal(list(rows(100)), list(rows_of_sft(100)))
    shown = "".join(tok.decode(inputs[targets != IGNORE].tolist()) for inputs, targets in rows(100))
    n_held_out = sum((inputs == tok.mid).sum() for inputs, _ in rows(100))
    assert 5 < n_held_out == 400 - len(batches.stream) < 40 and shown.startswith("ten ")
    assert len(list(rows(2))) == 2


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "p", "answer": "a"}\n{"prompt": "p"', "line 2 is not JSON"),
    ("a.jsonl", '\n{"prompt": "p"}', "line 2 is no pair"), ("a.jsonl", "[1]", "line 1 is no pair"),
    ("a.jsonl", '{"prompt": 1, "answer": "a"}', "line 1 is no pair"), ("a.json", "5", "record 1 is no pair"),
    ("a.jsonl", '{"prompt": "p", "answer": " "}', "no pairs to train on"),
    ("a.txt", "hello", "is no .jsonl or .json"),
    ("a.jsonl", json.dumps({"prompt": "p", "answer": "a" * 40}), "--block-size 64: expected one whose half")])
def test_a_bad_file_is_one_sentence_with_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare_pairs(str(tmp_path / name), "bytes", 0, None, sft, 64, 2, seed=1)


def test_functions_are_signature_and_docstring_then_body_and_files_are_held_out_whole(documents, monkeypatch):
    monkeypatch.setattr(pairs, "load_documents", lambda source: documents)
    monkeypatch.setattr(pairs, "is_held_out", lambda text: text == documents[2])
    training, held_out = pairs.load_pairs("functions")
    assert len(training) > 100 and len(held_out) > 5
    for prompt, answer in training + held_out:
        assert prompt.startswith(("def ", "async def ")) and prompt.rstrip().endswith(('"', "'"))
        ast.parse(prompt + answer)
    assert all(answer.splitlines()[-1].strip() in documents[2] for _, answer in held_out)
    assert not {"".join(pair) for pair in training} & {"".join(pair) for pair in held_out}
