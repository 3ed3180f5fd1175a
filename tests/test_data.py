"""From text to batches: nothing is lost, no text is on both sides, any batch can be drawn again."""
import gzip
import json
import os
import re
import sysconfig
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import tiktoken
from conftest import LANGUAGES, as_stream

import data
from data import (Batches, Tokenizer, hold_out, learn_bpe, load_documents, prepare, source_files,
                  text_rows)
from lab.document_fim import fim_documents
from objectives import fim, fim_meap, knobs_of, ntp

TEXTS = {
    "empty": "", "space": " ", "digits": "_x__ ½² Ⅷ ١٢٣ ① 1234567 don't",
    "line ends": "\r\n\r\n\t\tx  \n\n \r", "languages": LANGUAGES,
    "control": "\0 \x1c\x7f\x85\u2028\ufeff\ufffd a\0b\x01 \x1c\x1f\x7f\x85c\x0b\x0c d",
    "spaces": "a\xa0b \xa0\u2003\u3000 c\u200bd\u2028e", "emoji": "🙂👩‍👩‍👧🇫🇷 🏳️‍🌈 👍🏽 1️⃣",
    "marks": "e\u0301 n\u0303a\u030a\u0323 हिन्दी में ภาษาไทย \u1112\u1161\u11ab국 مَرْحَبًا בְּרֵאשִׁית",
    "sentinels": "<MID> <PRE><SUF><EOT><MASK><|endoftext|><|fim_middle|>",
    "every character": "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))}
RECORDS = [{"text": "one"}, {"id": 2, "content": "twö\n"}, {"text": None, "content": "three"}]
LINES, THREE = "\n\n".join(map(json.dumps, RECORDS)).encode(), ["one", "twö\n", "three"]
ANY_ENDS, ENDS = "a\r\nb\rc\n\r\n\r\rd\x0b\x0c\x85\u2028e\r", "a\nb\nc\n\n\n\nd\x0b\x0c\x85\u2028e\n"
RECORD = json.dumps({"text": ANY_ENDS}).encode()
FILES = {  # name: (content, its documents)
    "a.txt": ("Grüße\n\n".encode(), ["Grüße\n\n"]), "bom.py": (b"\xef\xbb\xbfx = 1\n", ["x = 1\n"]),
    "[a].txt": (b"x", ["x"]), "blank.txt": (b" \n", []), "none.json": (b"[]", []),
    **{name: (LINES, THREE) for name in ("a.jsonl", "a.ndjson", "A.NdJson", "a.json", "a.JSON")},
    **{name: (b"\xef\xbb\xbf" + LINES, THREE) for name in ("bom.JSONL", "bom.json")},
    "list.json": (json.dumps(RECORDS, indent=2).encode(), THREE), "one.jsonl": (b'{"text": "one"}', ["one"]),
    "object.json": (json.dumps(RECORDS[2], indent=2).encode(), ["three"]),
    "key.jsonl": (b'{"text": "one", "key": 17}\n{"text": "two", "key": null}', ["one", "two"]),
    "half of a surrogate pair.jsonl": (rb'{"text": "x \ud83d y"}', ["x \ufffd y"]),
    # a block of reading ends between \r and \n
    "long.txt": (b"x" * (2**20 - 2) + ANY_ENDS.encode(), ["x" * (2**20 - 2) + ENDS]),
    "ends.py": (ANY_ENDS.encode(), [ENDS]), "ends.jsonl": (RECORD + b"\r\n" + RECORD, [ENDS, ENDS]),
    "ends.json": (b"[%b,\r\n%b]" % (RECORD, RECORD), [ENDS, ENDS])}


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


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_undoes_encode_and_no_text_encodes_to_a_special_id(tok, text):
    for t in (tok, Tokenizer.bytes()):
        ids = t.encode(text)
        assert t.decode(ids) == text and t.encode_batch([text, text]) == [ids, ids]
        assert max(ids, default=0) < min(t.specials)
        assert t.n_bytes[ids].sum() == len(text.encode()) and not t.n_bytes[t.specials].any()
        assert t.decode([t.pre, *ids, t.suf, t.mid, t.mask, t.eot]) == text


def test_learn_bpe_merges_what_a_full_recount_would(documents):
    """By hand: ef occurs 7 times, ab twice in each of 3 words, cd 5 times."""
    assert learn_bpe({b"abab": 3, b"cd": 5, b"ef": 7}, 259)[256:] == [b"ef", b"ab", b"cd"]
    rng = np.random.default_rng(0)
    few_letters = [Counter(bytes(rng.integers(97, 99, rng.integers(1, 14)).tolist()) for _ in range(9))
                   for _ in range(40)]
    real = Counter(word.encode() for word in re.findall(r"\s*\w+|\W", documents[3][:2500] + LANGUAGES))
    for counts in ({b"aaaaaa": 3, b"aaa": 2, b"baaaab": 1}, {b"ab": 1}, {}, real, *few_letters):
        assert learn_bpe(dict(counts), 330) == recounting_bpe(counts, 330)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
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


@pytest.mark.parametrize("unit", [" ", "(", "éa\n"])
def test_a_very_long_line_is_encoded_like_any_other_text(unit, tmp_path):
    """A million spaces would overflow tiktoken's stack."""
    text = unit * (300_000 // len(unit)) + "end"
    (tmp_path / "line.txt").write_text(text)
    tok, *streams, _ = prepare(str(tmp_path / "line.txt"), "bpe", 270, tmp_path / "cache")
    assert all(np.flatnonzero(part == tok.eot).tolist() == [len(part) - 1] for part in streams)
    assert "".join(tok.decode(part.tolist()) for part in streams) == text == tok.decode(tok.encode(text))
    parts = re.findall(tok.CHUNK, text)
    assert len(parts) > 1 and max(map(len, parts)) <= 2**18
    assert all(part[-1] == unit[-1] for part in parts[:-1]), "cut behind line ends, if there are any"


def sides(documents):
    """(text, key) of documents -> the texts to train on, those held out."""
    split = list(hold_out(documents))
    return [[text for text, is_held_out in split if is_held_out == side] for side in (False, True)]


def test_the_split_depends_on_the_text_alone(documents):
    texts = [f"document {i}\n" for i in range(4000)]
    train, held_out = sides((text, text) for text in texts + texts[:500])
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(texts + texts[:500])
    again = sides((text, text) for text in documents + texts[::-1])
    assert set(held_out) <= set(again[1]) and set(train) <= set(again[0])
    assert abs(len(set(held_out)) - 200) < 5 * (4000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("text", ["real", "word " * 9, "Title\n" + "word " * 9])
def test_a_single_document_holds_its_tail_out(documents, text, tmp_path):
    text = documents[0] if text == "real" else text
    (tmp_path / "book.txt").write_text(text)
    tok, *streams, _ = prepare(str(tmp_path / "book.txt"), "bytes", cache_dir=tmp_path)
    train, held_out = (tok.decode(part.tolist()) for part in streams)
    assert train + held_out == text and 0.05 <= len(held_out) / len(text) < 0.1
    assert text is not documents[0] or train.endswith("\n")


@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_documents(tmp_path, name, packed):
    content, expected = FILES[name]
    path = tmp_path / (name + (".GZ" if "JSON" in name else ".gz") * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert load_documents(str(path)) == expected


@pytest.mark.parametrize("pattern, expected", [
    *((pattern, ["a", "c", "d", "one", "twö\n", "three", "b", "e", "f"]) for pattern in (
        "", "**", "**/*", "**/**/*", "relative")), ("*.txt", ["a"]), ("**/b.*", ["b"])])
def test_a_folder_or_glob_reads_each_text_once_and_skips_the_rest(pattern, expected, tmp_path, monkeypatch):
    """Links lead to a folder elsewhere, to itself, to one above, and from each of two folders to the other. A
    large binary is skipped at its first MiB that is not text."""
    root, block = tmp_path / "root", os.urandom(2**20) * 12
    for name, content in (
            ("root/a.txt", b"a"), ("root/sub/deep/b.py", b"b"), ("else/c.py", b"c"), ("else/deep/d.py", b"d"),
            ("root/c.jsonl", LINES), ("root/x/e.py", b"e"), ("root/y/f.py", b"f"), ("root/nul.bin", b"a\0"),
            ("root/bad.gz", b"x"), ("root/latin.txt", b"\xe9"), ("root/.git/g.txt", b"g"),
            ("root/__pycache__/h.py", b"h"), ("root/package.json", b'{"name": "x"}'),
            ("root/x.bin", block), ("root/x.gz", gzip.compress(block, 0))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for link, to in (("linked", "../else"), ("again", "../else"), ("itself", "."), ("sub/up", "../.."),
                     ("x/y", "../y"), ("y/x", "../x"), ("alias.txt", "a.txt"), ("loop.py", "loop.py")):
        (root / link).symlink_to(to)
    os.mkfifo(root / "fifo")
    monkeypatch.chdir(root)
    tracemalloc.start()
    assert load_documents("**/*" if pattern == "relative" else str(root / pattern)) == expected
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_the_modules_kept_apart_are_in_no_training_text():
    root = Path(sysconfig.get_paths()["stdlib"])
    kept_apart, files = {root / f"{name}.py" for name in data.KEPT_APART}, source_files("stdlib")
    assert all(path.exists() for path in kept_apart)
    assert not kept_apart & set(files) and root / "argparse.py" in files


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "no such file"), ("a.bin", b"a\0", "binary"), ("latin.txt", b"caf\xe9", "UTF-8"),
    *(("a.jsonl", LINES + end, "line 6 is not JSON") for end in (b'\n{"text": ', b"\n\0\n")),
    *((name, b"[" * 10**5, "line 1 ") for name in ("a.jsonl", "a.json")),  # nested too deep
    ("a.jsonl", LINES + b'\n{"title": "x"}', 'line 6 has no string field "text" or "content"'),
    *((name, content, ' 1 has no string field "text" or "content"')
      for name in ("a.ndjson", "a.json") for content in (b'{"text": 3}', b"[[3]]", b"5", b"null")),
    ("a.json", b'[{"text": "x"}, 3]', "record 2 "), ("a.json", b"[1,", "line 1 "), ("a.txt.gz", b"x", ""),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], ""), ("a.txt", b"", "no text"), ("a.json", b" \n", "no text")])
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    error = OSError if content is None else ValueError
    with pytest.raises(error, match=f"^--data {re.escape(str(path))}.*{message}.*$") as caught:
        prepare(str(path), "bytes", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_streams_are_documents_each_followed_by_eot_and_are_made_once(tmp_path, monkeypatch):
    """Six runs start together on a cold cache: whichever is first writes it; a lost race is no error."""
    barrier, make = Barrier(6), data.write_stream

    def write_together(path, *arguments):  # all of them find the cache cold
        barrier.wait(20)
        make(path, *arguments)

    monkeypatch.setattr(data, "write_stream", write_together)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: prepare("programs:99", "bpe", 300, tmp_path), range(6)))
    monkeypatch.setattr(data, "write_stream", None)
    made.append(prepare("programs:99", "bpe", 300, tmp_path))
    both = sides(data.read_files(source_files("programs:99", tmp_path)))
    for tok, *streams, name in made:
        assert all(len(texts) and np.array_equal(stream, as_stream(texts, tok))
                   for stream, texts in zip(streams, both, strict=True))
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name], "nothing else stays"
    assert tok.vocabulary == Tokenizer.train(both[0], 300).vocabulary, "from the training side alone"


def test_other_text_or_other_settings_get_another_cache_and_half_of_one_is_none(tmp_path, tok, monkeypatch):
    source, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    source.write_text('{"text": "one two three"}')
    names = [prepare(str(source), *settings)[3] for settings in
             (("bpe", 270, cache), ("bpe", 271, cache), ("bytes", 0, cache), ("bytes", 0, cache, tok))]
    source = source.rename(tmp_path / "a.txt")  # the same bytes, read as other text
    names.append(prepare(str(source), "bytes", 0, cache)[3])
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(str(source), "bytes", 1, cache)
    assert sorted(names) == sorted(path.name for path in cache.iterdir()) and len(set(names)) == 5


def test_a_batch_depends_on_seed_and_number_alone(tok, stream):
    def batches(seed=1):
        return Batches(stream, fim_meap, tok, 64, 3, seed)

    one, straddles_two_epochs = batches(), batches().n_windows // 3
    for number in (50, 0, straddles_two_epochs, 7, 50):
        assert np.array_equal(one.batch(number), batches().batch(number))
        assert not np.array_equal(one.batch(number), batches(seed=2).batch(number))
    masks = {row.tobytes() for number in range(20) for row in one.batch(number)[0] == tok.mask}
    assert len(masks) == 60, "positions are drawn afresh for each row"


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
    with pytest.raises(ValueError, match=f"has {2 * T - 1} tokens, expected at least {2 * T} for "):
        Batches(np.arange(2 * T - 1), ntp, tok, T, 1, seed=0)


def test_document_level_fim_loses_sentinels_at_the_cut(tok, stream):
    """It cuts windows out of finished examples (FIM, section 3.2)."""
    examples = fim_documents(stream, tok, 0, "fim", knobs_of(fim) | {"fim_rate": 1.0})
    rows, _ = Batches(examples, ntp, tok, 256, 720, seed=0).batch(0)
    n_pre, n_mid = ((rows == sign).sum(1) for sign in (tok.pre, tok.mid))
    assert n_pre.sum() > 9 and (n_pre != n_mid).any()


@pytest.mark.parametrize("N, T, n, starts", [
    (101, 10, 3, [0, 45, 90]), (101, 10, 99, [*range(0, 100, 10)]), (20, 10, 5, [0]), (10, 10, 5, [])])
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
