"""From text to batches: nothing is lost on the way, no text is on both sides, any step can be drawn again.

The worked example takes four words all the way."""
import gzip
import json
import os
import re
import sysconfig
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import LANGUAGES, as_stream

import data
from data import (Batches, Tokenizer, learn_bpe, load_documents, prepare, read_records, split_documents,
                  split_lines, text_rows)
from objectives import OBJECTIVES, fim, fim_documents, ntp

NASTY = ["", " ", "\r\n\r\n\t\tx  \n\n \r", "\0 \x1c\x7f\x85\u2028\ufeff\ufffd", "e\u0301 n\u0303 \u200d",
         "🙂👩‍👩‍👧🇫🇷", "<MID> <PRE><SUF><EOT><MASK>", "<|endoftext|><|fim_middle|>",
         "_x__ ½² ١٢٣ 1234567 don't", LANGUAGES,
         "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))]
JSONL = b'{"text": "one"}\n\n{"id": 2, "content": "tw\\u00f6\\n"}\n'


def test_a_worked_example(tmp_path):
    """Four documents in bytes, of which a hash holds "four" out; two windows of five ids, which share one."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three", "four")))
    tok, train, held_out = prepare(str(path), "bytes", cache_dir=tmp_path)

    def shown(ids):
        return "".join("." if i == tok.eot else chr(i) for i in ids)

    assert shown(train) == "one.two.three." and shown(held_out) == "four."
    drawn = set()
    for seed in range(100):
        inputs, targets = Batches(train, ntp, tok, block_size=4, batch_size=2, seed=seed).batch(0)
        drawn.add((*map(shown, inputs), *map(shown, targets)))
    in_order = {("one.", "two.", "ne.t", "wo.t"), ("ne.t", "wo.t", "e.tw", "o.th"),
                ("e.tw", "o.th", ".two", ".thr"), (".two", ".thr", "two.", "thre")}  # offsets 0 to 3
    assert drawn == in_order | {(b, a, d, c) for a, b, c, d in in_order}


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_decode_undoes_encode_and_no_text_encodes_to_a_special_id(tok, text):
    for t in (tok, Tokenizer.bytes()):
        ids = t.encode(text)
        assert t.decode(ids) == text and t.encode_batch([text, text]) == [ids, ids]
        specials = {t.pre, t.suf, t.mid, t.eot, t.mask}
        assert set(t.specials) == specials and not specials & set(ids)
        assert t.n_bytes[ids].sum() == len(text.encode()) and not t.n_bytes[t.specials].any()
        assert t.decode([t.pre, *ids, t.suf, t.mid, t.mask, t.eot]) == text


def test_ids_are_the_vocabulary_then_five_specials_also_after_json(tok):
    for t, n in ((tok, 600), (Tokenizer.bytes(), 261), (Tokenizer.train(["ab ab"], 999), 256 + 2 + 5)):
        assert sorted([t.pre, t.suf, t.mid, t.eot, t.mask]) == [*range(n - 5, n)]
        assert t.n_vocab == n == len(t.n_bytes)
        copy = Tokenizer.from_dict(json.loads(json.dumps(t.to_dict())))
        assert (copy.vocabulary, copy.pattern, copy.specials) == (t.vocabulary, t.pattern, t.specials)
    with pytest.raises(ValueError, match="vocab-size 260: expected 261"):
        Tokenizer.train(["text"], 260)


def test_merges_worked_by_hand():
    """ef occurs 7 times, ab twice in each of 3 words, cd 5 times."""
    assert learn_bpe({b"abab": 3, b"cd": 5, b"ef": 7}, 259)[256:] == [b"ef", b"ab", b"cd"]


def test_learn_bpe_merges_what_a_full_recount_would(documents):
    rng = np.random.default_rng(0)
    few_letters = [Counter(bytes(rng.integers(97, 99, rng.integers(1, 14)).tolist()) for _ in range(9))
                   for _ in range(40)]
    real = Counter(word.encode() for word in re.findall(r"\s*\w+|\W", documents[3][:2500] + LANGUAGES))
    for counts in ({b"aaaaaa": 3, b"aaa": 2, b"baaaab": 1}, {b"ab": 1}, {}, real, *few_letters):
        assert learn_bpe(dict(counts), 330) == recounting_bpe(counts, 330)


def test_encoding_applies_merges_in_the_order_of_learning_and_never_across_pieces(tok, documents):
    rank = {text: i for i, text in enumerate(tok.vocabulary)}
    for text in documents[2:5]:
        expected = []
        for piece in re.findall(Tokenizer.PATTERN, text):
            parts = [bytes([byte]) for byte in piece.encode()]
            while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
                i = min(pairs)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            expected += [rank[part] for part in parts]
        assert tok.encode(text) == expected


@pytest.mark.parametrize("name", ["languages", "languages in bytes"])
def test_whole_characters_drops_halves_at_the_ends_and_no_more(corpora, name):
    tok, stream = corpora[name]
    ids = stream[:np.flatnonzero(stream == tok.eot)[0]].tolist()
    border = ["\ufffd" not in tok.decode(ids[:i]) for i in range(len(ids) + 1)]
    for start in range(0, len(ids), 3):
        for end in (start, start + 1, start + 2, start + 5, start + 40):
            borders = [i for i in range(start, min(end, len(ids)) + 1) if border[i]] or [start]
            assert ids[start:end][tok.whole_characters(ids[start:end])] == ids[borders[0]:borders[-1]]


def test_gpt2s_end_of_text_keeps_its_id_and_offline_the_message_names_the_alternatives(monkeypatch, tok):
    ranks = {text: i for i, text in enumerate(tok.vocabulary)}
    stub = tiktoken.Encoding("stub", pat_str=r"\s?\w+|\W", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 595})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": stub}.get)
    assert Tokenizer.gpt2().eot == stub.eot_token
    assert Tokenizer.gpt2().encode("Hi you") == stub.encode("Hi you")

    def offline(name):
        raise ConnectionError("Max retries exceeded\nwith url")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="^--tokenizer gpt2: .*--tokenizer bpe or bytes.*TIKTOKEN_CACHE_DIR.*$"):
        Tokenizer.gpt2()


def test_the_split_depends_on_the_text_alone(documents):
    texts = [f"document {i}\n" for i in range(4000)]
    train, held_out = split_documents(texts + texts[:500])
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(texts + texts[:500])
    again = split_documents(documents + texts[::-1])
    assert set(held_out) <= set(again[1]) and set(train) <= set(again[0])
    assert abs(len(set(held_out)) - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("text", ["real", "word " * 900, "Title\n" + "word " * 900],
                         ids=["lines", "one line", "a long line"])
def test_a_single_document_holds_its_tail_out(documents, text):
    text = documents[0] if text == "real" else text
    (train,), (held_out,) = split_documents([text])
    assert train + held_out == text and 0.05 <= len(held_out) / len(text) < 0.1
    assert text is not documents[0] or train.endswith("\n")


def test_modules_that_evaluation_runs_are_never_trained_on():
    root = Path(sysconfig.get_paths()["stdlib"])
    kept_out = {root / f"{name}.py" for name in data.EVALUATION_MODULES}
    assert all(path.exists() for path in kept_out)
    files = data.source_files("stdlib")
    assert not kept_out & set(files) and root / "argparse.py" in files


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "Grüße\n\n".encode(), ["Grüße\n\n"]), ("bom.py", b"\xef\xbb\xbfx = 1\n", ["x = 1\n"]),
    ("a.jsonl", JSONL, ["one", "twö\n"]), ("a.jsonl.gz", gzip.compress(JSONL), ["one", "twö\n"]),
    ("a.txt.gz", gzip.compress(b"x"), ["x"]), ("[a].txt", b"x", ["x"]), ("blank.txt", b" \n", [])])
def test_a_file_becomes_documents(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert load_documents(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name, content, place", [
    ("a.jsonl", b'{"n": 1}\n\n{"n": 2}\n', "line 3"),
    ("a.jsonl.gz", gzip.compress(b'{"n": 1}\n{"n": 2}'), "line 2"),
    ("a.json", b'\xef\xbb\xbf[{"n": 1},\n{"n": 2}]', "record 2")])
def test_records_come_with_their_place(tmp_path, name, content, place):
    (tmp_path / name).write_bytes(content)
    assert list(read_records(tmp_path / name, "--flag"))[1:] == [(place, {"n": 2})]
    (tmp_path / name).write_bytes(content[:-3])
    with pytest.raises(ValueError, match=f"^--flag {re.escape(str(tmp_path / name))}: "):
        list(read_records(tmp_path / name, "--flag"))


def test_lines_end_at_line_feeds_alone(documents):
    assert split_lines("a\r\n\n\x0cb\u2028c\n d") == ["a\r\n", "\n", "\x0cb\u2028c\n", " d"]
    assert split_lines("") == [] and split_lines(documents[0]) == documents[0].splitlines(keepends=True)


def test_a_folder_or_glob_reads_every_text_file_and_skips_the_rest(tmp_path):
    for name, content in (
            ("a.txt", b"a"), ("sub/deep/b.py", b"b"), ("c.jsonl", JSONL), ("nul.bin", b"a\0"),
            ("bad.gz", b"x"), ("latin.txt", b"\xe9"), (".git/d.txt", b"d"), ("__pycache__/e.py", b"e")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    assert load_documents(str(tmp_path)) == ["a", "one", "twö\n", "b"]
    assert load_documents(str(tmp_path / "*.txt")) == ["a"]
    assert load_documents(str(tmp_path / "**/b.*")) == ["b"]


@pytest.mark.parametrize("name, content, error, message", [
    ("missing.txt", None, OSError, "no such file"), ("fifo", os.mkfifo, ValueError, "not a regular file"),
    ("a.bin", b"text \0", ValueError, "binary"), ("latin.txt", b"caf\xe9", ValueError, "UTF-8"),
    ("a.jsonl", JSONL + b'{"text": ', ValueError, "line 4 is not"),
    ("a.jsonl", b"[" * 10**5, ValueError, "line 1 "),
    ("a.jsonl", b'{"n": %s, "text": ""}' % (b"1" * 5000), ValueError, "line 1 "),
    ("a.jsonl", JSONL + b'{"title": "x"}', ValueError, 'line 4 .*"text" or "content"'),
    ("a.jsonl", b'{"text": 3}', ValueError, "line 1 "), ("a.jsonl", b"[3]", ValueError, "line 1 "),
    ("nul.jsonl", JSONL + b"\0\0\n", ValueError, "line 4 is not JSON"),
    ("a.jsonl.gz", gzip.compress(JSONL)[:-9], ValueError, ""), ("a.txt.gz", b"x", ValueError, ""),
    ("empty.txt", b"", ValueError, "no text"), ("blank.txt", b" \n", ValueError, "no text")])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is os.mkfifo:
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f"^--data {re.escape(str(path))}.*{message}.*$") as caught:
        prepare(str(path), "bytes", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Simulated, as root may read everything: an unreadable folder looks empty to glob."""
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(data, "open", refuse, raising=False)
    for name, error, message in (
            ("folder", OSError, "to read this folder"), ("a.txt", ValueError, "to read it")):
        with pytest.raises(error, match=f"^--data {tmp_path / name}: no permission {message}$"):
            prepare(str(tmp_path / name), "bytes", cache_dir=tmp_path / "cache")


@pytest.fixture
def corpus(tmp_path, documents):
    """A .jsonl of functions and classes, about 150 documents, and an empty cache folder."""
    texts = [text for document in documents[2:6] for text in document.split("\n\n\n") if text.strip()]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "cache").mkdir()
    return tmp_path / "corpus.jsonl", tmp_path / "cache"


@pytest.mark.parametrize("tokenizer, copies", [("bpe", 1), ("bytes", 20)])  # 20: more than one block
def test_streams_are_documents_each_followed_by_eot_and_are_made_once(corpus, tokenizer, copies, monkeypatch):
    corpus[0].write_text(corpus[0].read_text() * copies)
    tok, *streams = prepare(str(corpus[0]), tokenizer, 400, corpus[1])
    sides = split_documents(load_documents(str(corpus[0])))
    for stream, texts in zip(streams, sides):
        assert len(texts) > 0 and np.array_equal(stream, as_stream(texts, tok))
    if tokenizer == "bpe":
        learned = Tokenizer.train(sides[0], 400)
        assert tok.vocabulary == learned.vocabulary, "from the training side alone"
    monkeypatch.setattr(data, "iter_documents", None)
    again, *cached = prepare(str(corpus[0]), tokenizer, 400, corpus[1])
    assert again.to_dict() == tok.to_dict() and all(map(np.array_equal, streams, cached))


@pytest.mark.parametrize("unit", ["x", " ", "é\n"])
def test_a_very_long_line_is_encoded_like_any_other_text(unit, tok, tmp_path, monkeypatch):
    """A million spaces used to overflow tiktoken's stack. Memory is bounded: parts are encoded one by one."""
    text = unit * (1_100_000 // len(unit))
    ids = tok.encode(text)
    assert tok.decode(ids) == text and tok.encode_batch([text, "x"]) == [ids, tok.encode("x")]
    (tmp_path / "line.txt").write_text(text + "end")
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts, encode=Tokenizer.encode_batch: (
        encode(self, texts) if sum(map(len, texts)) < 2**21 else pytest.fail("too much at a time")))
    learned, train, held_out = prepare(str(tmp_path / "line.txt"), "bpe", 300, tmp_path / "cache")
    assert [np.flatnonzero(part == learned.eot).tolist() for part in (train, held_out)] == [
        [len(train) - 1], [len(held_out) - 1]]
    assert learned.decode(train.tolist()) + learned.decode(held_out.tolist()) == text + "end"


def test_long_texts_are_cut_behind_line_ends(tok, documents, monkeypatch):
    text = "".join(documents)
    whole = tok.encode(text)
    monkeypatch.setattr(data, "LONGEST", 5000)
    parts, last = zip(*data.cut(text))
    assert "".join(parts) == text and len(parts) > 50 and max(map(len, parts)) <= 5000
    assert sum(last) == last[-1] == 1
    assert all(part.endswith("\n") for part in parts[:-1]) and list(data.cut("")) == [("", True)]
    assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) < len(whole) + len(parts)


def test_rare_words_are_forgotten_before_memory_is_full(monkeypatch):
    counted, single = [], Tokenizer.bytes().vocabulary
    texts = ["def " * 10 + "".join(f"x{i}y " for i in range(j, j + 50)) for j in range(0, 2000, 50)]
    monkeypatch.setattr(data, "MAX_WORDS", 100)
    monkeypatch.setattr(data, "learn_bpe", lambda counts, n: counted.append(counts) or single)
    Tokenizer.train(texts, 300)
    assert len(counted[0]) <= 100 and counted[0][b" def"] + counted[0][b"def"] >= 380


@pytest.mark.parametrize("name, damage", [
    *((name, how) for name in ("train", "held_out", "meta.json") for how in ("cut", "flip", "remove")),
    *(("meta.json", garbage) for garbage in (b"", b"null", b"{}", b"\xff", b'{"train": 3}'))])
def test_a_damaged_cache_is_made_again(corpus, name, damage):
    first, *streams = prepare(str(corpus[0]), "bpe", 400, corpus[1])
    streams = [np.array(stream) for stream in streams]
    path = next(corpus[1].iterdir()) / name
    whole = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":  # in meta.json the 3 of the pattern's {1,3}, which leaves it a valid file
        whole[max(len(whole) // 2, whole.find(b"{1,3}") + 3)] ^= 1
    if damage != "remove":
        path.write_bytes({"cut": whole[:-2], "flip": whole}.get(damage, damage))
    tok, *again = prepare(str(corpus[0]), "bpe", 400, corpus[1])
    assert tok.to_dict() == first.to_dict() and all(map(np.array_equal, streams, again))


def test_other_text_or_other_settings_get_another_cache(corpus, tok):
    def folders(source, *settings, **more):
        prepare(str(source), *settings, cache_dir=corpus[1], **more)
        return len(list(corpus[1].iterdir()))

    assert folders(corpus[0], "bpe", 400) == 1 == folders(corpus[0], "bpe", 400)
    assert folders(corpus[0], "bpe", 401) == 2
    assert folders(corpus[0], "bytes") == 3 and folders(corpus[0], "bytes", tok=tok) == 4
    renamed = corpus[0].rename(corpus[0].with_suffix(".txt"))
    assert folders(renamed, "bytes") == 5, "the same bytes, read as other text"
    renamed.write_text("other")
    assert folders(renamed, "bytes") == 6


def test_nothing_half_written_stays_behind(corpus, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(str(corpus[0]), "bytes", cache_dir=corpus[1])
    assert not list(corpus[1].iterdir())


@pytest.mark.parametrize("name", ["ntp", "fim_meap"])
def test_a_batch_depends_on_seed_step_and_rank_alone(tok, documents, name):
    stream = as_stream([text for text in documents if len(text) < 10_000], tok)

    def batches(seed=1, **rank):
        return Batches(stream, OBJECTIVES[name], tok, 64, 3, seed, **rank)

    one, straddles_two_epochs = batches(), batches().n_windows // 3
    for step in (50, 0, straddles_two_epochs, 7, 50):
        inputs, targets = one.batch(step)
        assert inputs.shape == targets.shape == (3, 64) and inputs.dtype == targets.dtype == np.int64
        assert np.array_equal((inputs, targets), batches().batch(step))
        assert not np.array_equal(inputs, batches(seed=2).batch(step)[0])
        for rank in (0, 1):  # the micro-batches 2 step and 2 step + 1 of a single process
            assert np.array_equal(batches(rank=rank, world=2).batch(step), one.batch(2 * step + rank))
    masks = {row.tobytes() for step in range(20) for row in one.batch(step)[0] == tok.mask}
    assert len(masks) == (60 if name == "fim_meap" else 1), "positions are drawn afresh for each row and step"


@pytest.mark.parametrize("T, N", [(16, 32), (16, 47), (7, 100), (32, 2000)])
def test_an_epoch_sees_every_window_once_and_epochs_differ(tok, T, N):
    batches, n, epochs = Batches(np.arange(N), ntp, tok, T, 1, seed=0), (N - T) // T, []
    for epoch in range(4):
        starts = [int(batches.batch(epoch * n + i)[0][0, 0]) for i in range(n)]
        phase = min(starts)
        assert sorted(starts) == [phase + i * T for i in range(n)] and phase < T
        for i, start in enumerate(starts):
            inputs, targets = batches.batch(epoch * n + i)
            assert inputs.tolist() == [[*range(start, start + T)]] and np.array_equal(targets, inputs + 1)
        epochs.append(starts)
    assert len(set(map(min, epochs))) > 1 and len(set(map(tuple, epochs))) == 4 or n < 3


def test_a_corpus_shorter_than_a_window_is_refused(tok):
    with pytest.raises(ValueError, match="has 2,047 tokens, expected at least 2,048 for --block-size 1024"):
        Batches(np.zeros(2047, np.uint16), ntp, tok, 1024, 1, 0)


@pytest.mark.parametrize("level", ["context", "document"])
def test_only_document_level_fim_loses_sentinels_at_the_cut(tok, stream, level):
    objective = partial(fim, fim_rate=1.0)
    if level == "document":
        stream, objective = fim_documents(stream, tok, np.random.default_rng(0), fim_rate=1.0), ntp
    batches, n_marks, n_halved = Batches(stream, objective, tok, 256, 8, seed=0), 0, 0
    for step in range(90):
        for row in batches.batch(step)[1].tolist():
            marks = [i for i in row if i in (tok.pre, tok.suf, tok.mid)]
            n_marks += len(marks)
            n_halved += bool(marks) and (marks[0] == tok.mid or marks[-1] != tok.mid)
    assert n_marks > 20 and (n_halved > 0) == (level == "document")


@pytest.mark.parametrize("N, T, n, starts", [
    (101, 10, 3, [0, 45, 90]), (101, 10, 99, [*range(0, 100, 10)]), (11, 10, 5, [0]), (20, 10, 5, [0]),
    (10, 10, 5, [])])
def test_rows_for_evaluation_are_evenly_spaced_and_do_not_overlap(N, T, n, starts):
    rows = list(text_rows(np.arange(N, dtype=np.uint16), T, n))
    assert [inputs.tolist() for inputs, _ in rows] == [[*range(start, start + T)] for start in starts]
    assert all(np.array_equal(targets, inputs + 1) and targets.dtype == np.int64 for inputs, targets in rows)


def recounting_bpe(counts, n):
    """BPE as Sennrich et al. describe it: count all pairs, merge the most frequent (ties: smaller ids)."""
    words, vocabulary = [([*word], count) for word, count in counts.items()], [bytes([i]) for i in range(256)]
    while len(vocabulary) < n:
        pairs = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            for i in range(len(word)):  # the word shrinks as it is merged
                if word[i:i + 2] == [a, b]:
                    word[i:i + 2] = [len(vocabulary)]
        vocabulary.append(vocabulary[a] + vocabulary[b])
    return vocabulary
