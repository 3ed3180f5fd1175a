"""From text to batches: nothing is lost on the way, no text is on both sides, any batch can be drawn again.

The worked example takes four words all the way."""
import gzip
import json
import os
import re
import sysconfig
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import tiktoken
from conftest import LANGUAGES, as_stream

import data
from data import (Batches, Tokenizer, chunks, hold_out, learn_bpe, lines_of, load_documents, newlines,
                  prepare, source_files, text_rows)
from lab.document_fim import fim_documents
from objectives import OBJECTIVES, fim, knobs_of, ntp

EVERY_CHARACTER = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
NASTY = ["", " ", "\r\n\r\n\t\tx  \n\n \r", "\0 \x1c\x7f\x85\u2028\ufeff\ufffd", "e\u0301 n\u0303 \u200d",
         "🙂👩‍👩‍👧🇫🇷", "<MID> <PRE><SUF><EOT><MASK>", "<|endoftext|><|fim_middle|>",
         "_x__ ½² ١٢٣ 1234567 don't", LANGUAGES, EVERY_CHARACTER]
SCRIPTS = {
    "Arabic": "مَرْحَبًا بِكُمْ فِي الْمَدْرَسَةِ", "Hindi": "हिन्दी में लिखना, क्षत्रिय १२३",
    "Thai": "ภาษาไทยเป็นภาษาที่ไพเราะ", "Hebrew": "בְּרֵאשִׁית בָּרָא",
    "Korean": "\u1112\u1161\u11ab국어", "emoji": "👨‍👩‍👧 🏳️‍🌈 👍🏽 1️⃣",
    "marks": "e\u0301 n\u0303a\u030a\u0323", "control": "a\0b\x01 \x1c\x1f\x7f\x85c\x0b\x0c d",
    "spaces": "a\xa0b \xa0\u2003\u3000 c\u200bd\u2028e", "digits": "½ ² Ⅷ ١٢٣ ① 12345", "case": "İıſKß ǅ ª"}
RECORDS = [{"text": "one"}, {"id": 2, "content": "twö\n"}, {"text": None, "content": "three"}]
LINES = "\n\n".join(map(json.dumps, RECORDS)).encode()


def test_a_worked_example(tmp_path):
    """Four documents in bytes, of which a hash holds "four" out; two windows of five ids, which share one."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three", "four")))
    tok, train, held_out, _ = prepare(str(path), "bytes", cache_dir=tmp_path)

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
        assert max(ids, default=0) < min(t.specials)
        assert t.n_bytes[ids].sum() == len(text.encode()) and not t.n_bytes[t.specials].any()
        assert t.decode([t.pre, *ids, t.suf, t.mid, t.mask, t.eot]) == text


def test_ids_are_the_vocabulary_then_five_specials_also_after_json(tok):
    for t, n in ((tok, 600), (Tokenizer.bytes(), 261), (Tokenizer.train(["ab ab"], 999), 256 + 2 + 5)):
        assert sorted([t.pre, t.suf, t.mid, t.eot, t.mask]) == t.specials == [*range(n - 5, n)]
        assert t.n_vocab == n == len(t.n_bytes)
        copy = Tokenizer.from_dict(json.loads(json.dumps(t.to_dict())))
        assert (copy.vocabulary, copy.pattern, copy.specials) == (t.vocabulary, t.pattern, t.specials)
    with pytest.raises(ValueError, match="vocab-size 260: expected 261"):
        Tokenizer.train(["text"], 260)


def test_learn_bpe_merges_what_a_full_recount_would(documents):
    """By hand: ef occurs 7 times, ab twice in each of 3 words, cd 5 times."""
    assert learn_bpe({b"abab": 3, b"cd": 5, b"ef": 7}, 259)[256:] == [b"ef", b"ab", b"cd"]
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


@pytest.mark.parametrize("text", [*SCRIPTS.values(), EVERY_CHARACTER], ids=[*SCRIPTS, "all"])
def test_pythons_re_and_tiktoken_find_the_same_pieces(text):
    """Each piece is an id of this vocabulary: tiktoken's pieces are those that it encodes to."""
    pieces = re.findall(Tokenizer.PATTERN, text)
    assert "".join(pieces) == text
    whole = sorted({piece.encode() for piece in pieces} - {bytes([i]) for i in range(256)})
    tok = Tokenizer([bytes([i]) for i in range(256)] + whole)
    assert [tok.decode_bytes([i]) for i in tok.encode(text)] == [piece.encode() for piece in pieces]


def test_gpt2s_end_of_text_keeps_its_id_and_offline_the_message_names_the_alternatives(monkeypatch, tok):
    ranks = {text: i for i, text in enumerate(tok.vocabulary)}
    stub = tiktoken.Encoding("stub", pat_str=r"\s?\w+|\W", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 595})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": stub}.get)
    assert Tokenizer.gpt2().eot == stub.eot_token
    assert Tokenizer.gpt2().encode("Hi you") == stub.encode("Hi you")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("no such\nfile"))
    with pytest.raises(OSError, match="^--tokenizer gpt2: .*--tokenizer bpe or bytes.*TIKTOKEN_CACHE_DIR.*$"):
        Tokenizer.gpt2()


@pytest.mark.parametrize("unit", ["x", " ", "(", "é\n", "\u3000"])
def test_a_very_long_line_is_encoded_like_any_other_text(unit, tmp_path):
    """A million spaces would overflow tiktoken's stack."""
    text = unit * (600_000 // len(unit)) + "end"
    (tmp_path / "line.txt").write_text(text)
    tok, *streams, _ = prepare(str(tmp_path / "line.txt"), "bpe", 270, tmp_path / "cache")
    assert all(np.flatnonzero(part == tok.eot).tolist() == [len(part) - 1] for part in streams)
    assert "".join(tok.decode(part.tolist()) for part in streams) == text == tok.decode(tok.encode(text))
    parts = chunks(text, 5000)
    assert "".join(parts) == text and max(map(len, parts)) <= 5000
    assert all(part[-1] == unit[-1] for part in parts[:-1]), "cut behind line ends, if there are any"


def sides(texts, whole=True):
    """The documents to train on, those held out."""
    split = list(hold_out([(text, text) for text in texts], whole))
    return [[text for text, is_held_out in split if is_held_out == side] for side in (False, True)]


def test_the_split_depends_on_the_text_alone(documents):
    texts = [f"document {i}\n" for i in range(4000)]
    train, held_out = sides(texts + texts[:500])
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(texts + texts[:500])
    again = sides(documents + texts[::-1])
    assert set(held_out) <= set(again[1]) and set(train) <= set(again[0])
    assert abs(len(set(held_out)) - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("text", ["real", "word " * 9, "Title\n" + "word " * 9])
def test_a_single_document_holds_its_tail_out(documents, text, tmp_path):
    text = documents[0] if text == "real" else text
    (train,), (held_out,) = sides([text], whole=False)
    assert train + held_out == text and 0.05 <= len(held_out) / len(text) < 0.1
    assert text is not documents[0] or train.endswith("\n")
    (tmp_path / "book.txt").write_text(text)
    tok, *streams, _ = prepare(str(tmp_path / "book.txt"), "bytes", cache_dir=tmp_path)
    assert [tok.decode(stream.tolist()) for stream in streams] == [train, held_out]


def test_modules_that_evaluation_runs_are_never_trained_on():
    root = Path(sysconfig.get_paths()["stdlib"])
    kept_out, files = {root / f"{name}.py" for name in data.EVALUATION_MODULES}, source_files("stdlib")
    assert all(path.exists() for path in kept_out)
    assert not kept_out & set(files) and root / "argparse.py" in files


@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "Grüße\n\n".encode(), ["Grüße\n\n"]), ("bom.py", b"\xef\xbb\xbfx = 1\n", ["x = 1\n"]),
    ("[a].txt", b"x", ["x"]), ("blank.txt", b" \n", []),
    *((name, start + LINES, ["one", "twö\n", "three"]) for start in (b"", b"\xef\xbb\xbf")
      for name in ("a.jsonl", "a.JSONL", "a.ndjson", "A.NdJson", "a.json", "a.JSON")),
    ("list.json", json.dumps(RECORDS, indent=2).encode(), ["one", "twö\n", "three"]),
    ("object.json", json.dumps(RECORDS[2], indent=2).encode(), ["three"]),
    ("one.jsonl", LINES.splitlines()[0], ["one"]), ("none.json", b"[]", []),
    ("key.jsonl", b'{"text": "one", "key": 17}\n{"text": "two", "key": null}', ["one", "two"]),
    ("half of a surrogate pair.jsonl", rb'{"text": "x \ud83d y"}', ["x \ufffd y"])])
def test_a_file_becomes_documents(tmp_path, name, content, expected, packed):
    path = tmp_path / (name + (".GZ" if name.isupper() else ".gz") * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert load_documents(str(path)) == expected
    if expected:
        tok, *streams, _ = prepare(str(path), "bytes", cache_dir=tmp_path / "cache")
        assert sorted(tok.decode(np.concatenate(streams).tolist())) == sorted("".join(expected))


def test_all_line_ends_become_line_feeds(tmp_path):
    """In files and in JSON strings, also where a block of reading ends between \\r and \\n."""
    text, expected = "a\r\nb\rc\n\r\n\r\rd\x0b\x0c\x85\u2028e\r", "a\nb\nc\n\n\n\nd\x0b\x0c\x85\u2028e\n"
    long, record = "x" * (2**20 - 1), json.dumps({"text": text}).encode()
    for name, content in (("a.py", text.encode()), ("b.txt.gz", gzip.compress(text.encode())),
                          ("c.jsonl", record + b"\r\n" + record), ("d.ndjson", record + b"\r" + record),
                          ("e.json", b"[" + record + b",\r\n" + record + b"]")):
        (tmp_path / name).write_bytes(content)
        assert set(load_documents(str(tmp_path / name))) == {expected}, name
    (tmp_path / "long.txt").write_bytes((long + text).encode())
    assert load_documents(str(tmp_path / "long.txt")) == [long + expected]
    assert newlines(text) == expected == newlines(expected)
    assert lines_of("a\r\n\n\x0cb\u2028c\n d") == ["a\r\n", "\n", "\x0cb\u2028c\n", " d"]


def test_a_folder_or_glob_reads_every_text_file_and_skips_the_rest(tmp_path):
    """A large binary is skipped at its first MiB that is not text."""
    block = os.urandom(2**20) * 50
    for name, content in (
            ("a.txt", b"a"), ("sub/deep/b.py", b"b"), ("c.jsonl", LINES), ("nul.bin", b"a\0"),
            ("bad.gz", b"x"), ("latin.txt", b"\xe9"), (".git/d.txt", b"d"), ("__pycache__/e.py", b"e"),
            ("package.json", b'{"name": "x"}'), ("x.bin", block), ("x.gz", gzip.compress(block, 0))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    tracemalloc.start()
    for pattern in ("", "**", "**/*"):
        assert load_documents(str(tmp_path / pattern)) == ["a", "one", "twö\n", "three", "b"]
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert load_documents(str(tmp_path / "*.txt")) == ["a"]
    assert load_documents(str(tmp_path / "**/b.*")) == ["b"]


@pytest.mark.parametrize("pattern", ["", "**/*.py", "**/**/*.py", "relative"])
def test_linked_folders_are_read_and_each_file_once(tmp_path, monkeypatch, pattern):
    """Links to one folder elsewhere, to itself, to a folder above, and of two folders to each other."""
    root = tmp_path / "root"
    for name in ("root/a", "root/sub/b", "else/c", "else/deep/d", "root/x/e", "root/y/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(name[-1])
    for link, to in (("linked", "../else"), ("again", "../else"), ("itself", "."), ("sub/up", "../.."),
                     ("x/y", "../y"), ("y/x", "../x"), ("alias.py", "a.py"), ("loop.py", "loop.py")):
        (root / link).symlink_to(to)
    monkeypatch.chdir(root)
    source = "**/*.py" if pattern == "relative" else str(root / pattern)
    assert sorted(load_documents(source)) == [*"abcdef"] and len(source_files(source)) == 6


@pytest.mark.parametrize("name, content, error, message", [
    ("missing.txt", None, OSError, "no such file"),
    ("a.bin", b"text \0", ValueError, "binary"), ("latin.txt", b"caf\xe9", ValueError, "UTF-8"),
    ("a.jsonl", LINES + b'\n{"text": ', ValueError, "line 6 is not"),
    ("a.jsonl", b"[" * 10**5, ValueError, "line 1 "), ("a.json", b"[" * 10**5, ValueError, "line 1 "),
    ("a.jsonl", b'{"n": %s, "text": ""}' % (b"1" * 5000), ValueError, "line 1 "),
    ("a.jsonl", LINES + b'\n{"title": "x"}', ValueError, 'line 6 .*"text" or "content"'),
    *((name, content, ValueError, ' 1 has no string field "text" or "content"')
      for name in ("a.ndjson", "a.json") for content in (b'{"text": 3}', b"[[3]]", b"5", b"null")),
    ("a.json", b'[{"text": "x"}, 3]', ValueError, "record 2 "), ("a.json", b"[1,", ValueError, "line 1 "),
    ("nul.jsonl", LINES + b"\n\0\0\n", ValueError, "line 6 is not JSON"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], ValueError, ""), ("a.txt.gz", b"x", ValueError, ""),
    ("empty.txt", b"", ValueError, "no text"), ("blank.json", b" \n", ValueError, "no text")])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f"^--data {re.escape(str(path))}.*{message}.*$") as caught:
        prepare(str(path), "bytes", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


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
    tok, *streams, name = prepare(str(corpus[0]), tokenizer, 400, corpus[1])
    both = sides(load_documents(str(corpus[0])))
    for stream, texts in zip(streams, both):
        assert len(texts) > 0 and np.array_equal(stream, as_stream(texts, tok))
    learned = Tokenizer.train(both[0], 400).vocabulary
    assert tokenizer == "bytes" or tok.vocabulary == learned, "from the training side alone"
    monkeypatch.setattr(data, "write_stream", None)
    again, *cached, same = prepare(str(corpus[0]), tokenizer, 400, corpus[1])
    assert again.to_dict() == tok.to_dict() and all(map(np.array_equal, streams, cached)) and name == same


@pytest.mark.parametrize("source, tokenizer", [("corpus", "bytes"), ("corpus", "bpe"), ("relay:99", "bytes")])
def test_runs_that_start_together_on_a_cold_cache_share_it(corpus, source, tokenizer, monkeypatch):
    """Six at once: whichever is first writes it, and a lost race is no error."""
    source, barrier, make = str(corpus[0]) if source == "corpus" else source, Barrier(6), data.write_stream

    def write_together(path, *arguments):  # all of them find the cache cold
        barrier.wait(20)
        make(path, *arguments)

    monkeypatch.setattr(data, "write_stream", write_together)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: prepare(source, tokenizer, 300, corpus[1]), range(6)))
    assert len({name for *_, name in made}) == 1
    for tok, *streams, _ in made:
        assert tok.to_dict() == made[0][0].to_dict() and all(map(np.array_equal, streams, made[0][1:3]))
    assert [path.name for path in corpus[1].iterdir() if path.is_dir()] == [made[0][3]], "nothing else stays"


def test_other_text_or_other_settings_get_another_cache(corpus, tok):
    def folder(source, *settings, **more):
        return prepare(str(source), *settings, cache_dir=corpus[1], **more)[3]

    names = [folder(corpus[0], *settings) for settings in (("bpe", 400), ("bpe", 401), ("bytes",))]
    names.append(folder(corpus[0], "bytes", tok=tok))
    moved = corpus[0].rename(corpus[0].with_name("moved.ndjson"))
    assert folder(moved, "bpe", 400) == names[0]
    renamed = moved.rename(moved.with_suffix(".txt"))
    names.append(folder(renamed, "bytes"))  # the same bytes, read as other text
    renamed.write_text(renamed.read_text().swapcase())
    names.append(folder(renamed, "bytes"))  # as long, but not the same
    assert sorted(names) == sorted(path.name for path in corpus[1].iterdir()) and len(set(names)) == 6


def test_nothing_half_written_stays_behind(corpus, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(str(corpus[0]), "bytes", cache_dir=corpus[1])
    assert not list(corpus[1].iterdir())


@pytest.mark.parametrize("name", ["ntp", "fim_meap"])
def test_a_batch_depends_on_seed_and_number_alone(tok, documents, name):
    stream = as_stream([text for text in documents if len(text) < 10_000], tok)

    def batches(seed=1):
        return Batches(stream, OBJECTIVES[name], tok, 64, 3, seed)

    one, straddles_two_epochs = batches(), batches().n_windows // 3
    for number in (50, 0, straddles_two_epochs, 7, 50):
        inputs, targets = one.batch(number)
        assert inputs.shape == targets.shape == (3, 64) and inputs.dtype == targets.dtype == np.int64
        assert np.array_equal((inputs, targets), batches().batch(number))
        assert not np.array_equal(inputs, batches(seed=2).batch(number)[0])
    masks = {row.tobytes() for number in range(20) for row in one.batch(number)[0] == tok.mask}
    assert len(masks) == (60 if name == "fim_meap" else 1), "positions are drawn afresh for each row"


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
    """Document-level FIM cuts windows out of finished examples (FIM, section 3.2)."""
    objective = partial(fim, fim_rate=1.0)
    if level == "document":
        stream, objective = fim_documents(stream, tok, 0, "fim", knobs_of(fim) | {"fim_rate": 1.0}), ntp
    batches = Batches(stream, objective, tok, 256, 8, seed=0)
    marks = [[i for i in row if i in (tok.pre, tok.suf, tok.mid)]
             for number in range(90) for row in batches.batch(number)[1].tolist()]
    marks = [row for row in marks if row]
    halved = [row for row in marks if row[0] == tok.mid or row[-1] != tok.mid]
    assert len(marks) > 20 and bool(halved) == (level == "document")


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
    while len(vocabulary) < n and any(len(word) > 1 for word, _ in words):
        pairs = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            for i in range(len(word)):  # the word shrinks as it is merged
                if word[i:i + 2] == [a, b]:
                    word[i:i + 2] = [len(vocabulary)]
        vocabulary.append(vocabulary[a] + vocabulary[b])
    return vocabulary
