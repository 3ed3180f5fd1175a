"""Fine-tuning rows, checked position by position against the papers' definitions; packing; the files of pairs."""
import ast
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

import pairs
from objectives import IGNORE, OBJECTIVES, answer_example, fit_pair
from pairs import PairBatches, pack, prepare_pairs, read_pairs

SFT, MEAP = OBJECTIVES["sft"], OBJECTIVES["meap_sft"]


def loss_terms(prompt, answer, masked_copy, tok):
    """A brute-force reading of MEAP's section 3.2: {t: x_t} for t in U_q and U_m, positions of original ++ copy."""
    original = [*prompt, tok.mid, *answer, tok.eot]
    terms = {t: x for t, x in enumerate(original) if t > len(prompt)}
    for t, x in enumerate(masked_copy):
        if x == tok.mask:
            terms[len(original) + t] = original[t]
    return terms


@pytest.fixture(scope="module")
def some_pairs(documents, tok):
    """200 pairs of ids of many lengths from real text."""
    rng = np.random.default_rng(1)
    ids = tok.encode("".join(documents))
    cut = [(start := rng.integers(len(ids) - 200), start + rng.integers(0, 60), rng.integers(1, 120)) for _ in range(200)]
    return [(ids[a:b], ids[b:b + n]) for a, b, n in cut]


@pytest.mark.parametrize("region", ["copy", "answer"])
def test_loss_is_on_the_answer_and_the_masked_tokens_of_the_copy_alone(region, some_pairs, tok):
    objective = replace(MEAP, mask_region=region)
    for i, (prompt, answer) in enumerate(some_pairs):
        inputs, targets = answer_example(prompt, answer, objective, tok, np.random.default_rng(i), 1000)
        original = [*prompt, tok.mid, *answer, tok.eot]
        n = len(original)
        assert inputs[:n].tolist() == original
        copy = inputs[n:].tolist()
        assert len(copy) == (n if len(answer) > 50 else 0)
        maskable = len(answer) + (len(prompt) if region == "copy" else 0)
        masked = [t for t, x in enumerate(copy) if x == tok.mask]
        assert len(masked) == (int(0.1 * maskable) if copy else 0)
        assert not copy or [x for t, x in enumerate(copy) if t not in masked] == [
            x for t, x in enumerate(original) if t not in masked]
        assert not {t for t in masked if original[t] in tok.specials}
        assert region == "copy" or all(t > len(prompt) for t in masked)
        # a target stands where its token is predicted: one position before it
        found = {t + 1: x for t, x in enumerate(targets.tolist()) if x != IGNORE}
        assert found == loss_terms(prompt, answer, copy, tok)


def test_over_many_draws_every_ordinary_token_of_the_copy_is_masked_but_no_other(tok):
    prompt, answer = list(range(20)), list(range(100, 160))
    rows = [answer_example(prompt, answer, MEAP, tok, np.random.default_rng(i), 1000)[0] for i in range(300)]
    masked = {int(t) for row in rows for t in np.flatnonzero(row == tok.mask)}
    assert masked == {82 + t for t in range(81) if t != 20}  # the first of the copy is drawn, too; its <MID> is not


@pytest.mark.parametrize("n, copied", [(49, False), (50, False), (51, True)])
def test_only_answers_longer_than_50_tokens_get_a_copy(n, copied, tok):
    inputs, _ = answer_example([1, 2], list(range(n)), MEAP, tok, np.random.default_rng(0), 1000)
    assert len(inputs) == (n + 4) * (1 + copied) and (tok.mask in inputs) == copied


def test_the_number_is_a_field(tok):
    def masks(**changed):
        inputs, _ = answer_example([1], list(range(40)), replace(MEAP, **changed), tok, np.random.default_rng(0), 1000)
        return int((inputs == tok.mask).sum())

    assert (masks(min_answer=39), masks(min_answer=40), masks(min_answer=0, mask_ratio=0.5)) == (4, 0, 20)


@pytest.mark.parametrize("objective", [SFT, MEAP])
@pytest.mark.parametrize("T", [64, 128, 300])
def test_packing_loses_no_answer_token_and_cuts_no_example_in_two(objective, T, some_pairs, tok):
    batches = PairBatches(some_pairs, objective, tok, T, 1, seed=3)
    left = [answer for _, answer in some_pairs]
    for i in range(batches.n_windows):  # an epoch
        inputs, targets = batches.row(i)
        assert inputs.shape == targets.shape == (T,)
        end = 0
        for _, answer in [batches.pairs[j] for j in batches.rows[batches._epoch(0)[i]]]:
            start = int(np.flatnonzero(inputs[end:] == tok.mid)[0]) + end
            n = min(len(answer), T - 1)
            assert inputs[start + 1:start + 1 + n].tolist() == answer[:n] == targets[start:start + n].tolist()
            full = [a for a in left if a[:T - 1] == answer]
            left.remove(full[0])
            end = start + 1 + n
            if len(full[0]) + 2 <= T:
                assert inputs[end] == tok.eot == targets[end - 1]
            if objective is MEAP and 50 < n and 2 * n + 4 <= T:
                assert tok.mask in inputs[end:]
                end = int(np.flatnonzero(inputs[end:] == tok.mid)[0]) + end + 1 + n
        tail = targets[end:]
        assert (tail == IGNORE).all() and (inputs[end + 1:] == tok.eot).all()
    assert not left


def test_what_is_too_long_is_cut_in_the_prompt_first_and_counted(tok):
    long = list(range(100)), list(range(100, 130))
    assert fit_pair(*long, SFT, 64) == (long[0][-32:], long[1])
    assert fit_pair([1, 2], long[0], SFT, 64) == ([], long[0][:63])  # then the answer, and its <EOT>
    assert answer_example([], long[0][:63], SFT, tok, None, 64)[0].tolist() == [tok.mid, *long[0][:63]]
    batches = PairBatches([long, ([1], [2])], SFT, tok, 64, 1, 1)
    assert batches.n_cut == 1 and "1 of them cut" in batches.describe()


def test_rows_are_pure_and_ranks_share_them(some_pairs, tok):
    def batches(B, **ranks):
        return PairBatches(some_pairs, MEAP, tok, 128, B, seed=1, **ranks)

    one, again = batches(4), batches(4)
    again.batch(7)
    np.testing.assert_equal(one.batch(60), again.batch(60))
    halves = [batches(2, rank=rank, world=2).batch(5) for rank in (0, 1)]
    np.testing.assert_equal(one.batch(5), tuple(np.concatenate(part) for part in zip(*halves)))
    first, second = ([one.row(i + epoch * one.n_windows)[0].tolist() for i in range(one.n_windows)] for epoch in (0, 1))
    assert first != second and sorted(map(len, first)) == sorted(map(len, second))


def test_packing_fills_rows_well():
    lengths = np.random.default_rng(1).integers(5, 100, 500).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 128 for row in rows)
    assert sum(lengths) / (len(rows) * 128) > 0.95


RECORDS = [({"prompt": "p", "answer": "a"}, [("p", "a")]),
           ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("Add.\n\n1 2", "3")]),
           ({"instruction": "Hi", "input": "", "output": "Ho"}, [("Hi", "Ho")]),
           ({"instruction": "Hi", "output": "Ho"}, [("Hi", "Ho")]),
           ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]},
            [("q", "a"), ("q\n\na\n\nr", "b")])]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json"])
def test_each_form_of_record_gives_its_pairs(ending, tmp_path):
    path = tmp_path / f"pairs{ending}"
    records = [record for record, _ in RECORDS]
    text = json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records)) + "\n\n"
    (gzip.open if ending.endswith("gz") else open)(path, "wt").write(text)
    assert list(read_pairs(path)) == [pair for _, found in RECORDS for pair in found]


@pytest.mark.parametrize("name, text, message", [
    ("a.jsonl", '{"prompt": "p", "answer": "a"}\n{"prompt": "p"', "line 2 is not JSON"),
    ("a.jsonl", '\n{"prompt": "p"}', "line 2 is no pair"), ("a.jsonl", '{"text": "t"}', "line 1 is no pair"),
    ("a.jsonl", '{"prompt": 1, "answer": "a"}', "line 1 is no pair"), ("a.jsonl", "[1]", "line 1 is no pair"),
    ("a.jsonl", "\nnull", "line 2 is no pair"),
    ("a.jsonl", '{"prompt": "p", "answer": null}', "line 1 is no pair"), ("a.json", "{", "is not JSON"),
    ("a.json", '{"prompt": "p", "answer": "a"}', "is no pair"), ("a.txt", "hello", "is no .jsonl or .json"),
    ("a.jsonl", '{"prompt": "p", "answer": " "}', "no pairs to train on"), ("a.jsonl.gz", "no gzip", "cannot be read")])
def test_a_bad_file_is_one_sentence_with_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare_pairs(str(tmp_path / name), "bytes")


def test_functions_are_signature_and_docstring_then_body_and_files_are_held_out_whole(documents, tok, monkeypatch):
    monkeypatch.setattr(pairs, "iter_documents", lambda source: documents)
    pairs.function_pairs.cache_clear()
    monkeypatch.setattr(pairs, "is_held_out", lambda text: text == documents[2])
    _, train, held_out = prepare_pairs(tok=tok)
    pairs.function_pairs.cache_clear()
    train, held_out = ([tuple(map(tok.decode, pair)) for pair in side] for side in (train, held_out))
    assert len(train) > 100 and len(held_out) > 5
    for prompt, answer in train + held_out:
        assert prompt.startswith(("def ", "async def ")) and prompt.rstrip().endswith(('"""', "'''", '"', "'"))
        ast.parse(prompt + answer)
    assert all(answer.splitlines()[-1].strip() in documents[2] for _, answer in held_out)
    assert not {prompt + answer for prompt, answer in train} & {prompt + answer for prompt, answer in held_out}
