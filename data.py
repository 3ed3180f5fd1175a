"""From text to batches.

    files -> documents -> token stream -> windows -> rows -> batch

    documents   one str each: a file, or a line of a .jsonl               iter_documents, split_documents
    stream      doc <EOT> doc <EOT> ...   one flat array of ids on disk,  prepare
                memory-mapped; one for training, one held out
    window      T+1 consecutive ids of the stream, starting anywhere:     Batches
                ... tail of a doc <EOT> whole doc <EOT> head of a doc ...
    row         an objective's T inputs and T targets for a window        objectives.py
    batch       B rows as two int64 arrays (B, T), a pure function of (seed, step, rank): with no loader
                state to save, a resumed run sees the same batches as an uninterrupted one

Tokenizers run on tiktoken. The last five of the n_vocab ids are special: <EOT> <PRE> <SUF> <MID> <MASK>. No
text encodes to them, since encoding never looks for them: the characters "<MID>" in a document are text.
"""
import glob
import gzip
import hashlib
import heapq
import json
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

GENERATED = ("markov", "relay", "records", "chains")  # --data names of lab/corpora.py
SPECIALS = ("pre", "suf", "mid", "eot", "mask")
HELD_OUT = 0.05
LONGEST = 1 << 18  # characters encoded at a time: a million spaces in a row overflow tiktoken's stack
MAX_WORDS = 1 << 20  # distinct words counted at a time in learning a vocabulary
SKIP_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Standard library modules whose doctests lab/evaluate.py runs: --data stdlib leaves them out of training.
EVALUATION_MODULES = ("_pydecimal", "collections/__init__", "difflib", "fractions", "heapq", "ipaddress",
                      "statistics", "textwrap")


class Tokenizer:
    """Byte-level BPE and five special ids.

    encode(text) -> list[int], decode(ids) -> str; decode(encode(text)) == text, and special ids decode to "".
    Attributes: n_vocab (special ids included), the ids pre suf mid eot mask, and n_bytes, an int64 array
    (n_vocab,): the number of bytes of each id's text, 0 for a special id.
    """
    # One piece per match; tokens never cross pieces. A word includes one sign or space before it (".join",
    # " in", "_x"), signs include the line end after them ("):\n"), and a run of spaces stays together, except
    # its last before a word, so that indentation is one token. The pattern must be valid both in Python's re
    # (for learning) and in tiktoken's regex engine (for encoding).
    PATTERN = r"(?:_|[^\r\n\w])?[^\W\d_]+|\d{1,3}| ?(?:_|[^\s\w])+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

    def __init__(self, vocabulary, pattern=PATTERN):
        """vocabulary: list[bytes], the text of each id in merge order, all 256 single bytes among them."""
        self.vocabulary, self.pattern = vocabulary, pattern
        self._tiktoken = tiktoken.Encoding("nanogap", pat_str=pattern, special_tokens={},
                                           mergeable_ranks={text: i for i, text in enumerate(vocabulary)})
        n = len(vocabulary)
        # <EOT> takes the id after the last merge, as GPT-2's <|endoftext|> does, so that the embeddings of
        # GPT-2's published weights keep their rows.
        self.eot, self.pre, self.suf, self.mid, self.mask = range(n, n + len(SPECIALS))
        self.specials = list(range(n, n + len(SPECIALS)))
        self.n_vocab = n + len(SPECIALS)
        self.n_bytes = np.array([len(text) for text in vocabulary] + [0] * len(SPECIALS))

    @classmethod
    def bytes(cls):
        """One id per byte: nothing to learn; sequences are about three times as long as with BPE."""
        return cls([bytes([i]) for i in range(256)])

    @classmethod
    def train(cls, texts, n):
        """Learns a vocabulary of n ids (256 bytes and the special ids included) from an iterable of texts.

        n_vocab is below n if no pair is left to merge. Raises ValueError for an n out of range."""
        if not 256 + len(SPECIALS) <= n <= 10**6:
            raise ValueError(f"--vocab-size {n}: expected {256 + len(SPECIALS)} to {10**6}")
        counts, rare = Counter(), 0
        for text in texts:
            for part, _ in cut(text):
                counts.update([piece[:1000] for piece in re.findall(cls.PATTERN, part)])
                while len(counts) > MAX_WORDS:  # bounds memory: drops rare words, as word2vec does
                    rare += 1
                    counts = Counter({piece: count for piece, count in counts.items() if count > rare})
        counts = {piece.encode("utf-8", "surrogatepass"): count for piece, count in counts.items()}
        return cls(learn_bpe(counts, n - len(SPECIALS)))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, downloaded by tiktoken at first use. Raises OSError where that fails."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' and tiktoken's own exceptions share no narrower base class
            raise OSError("--tokenizer gpt2: tiktoken could not download the GPT-2 vocabulary "
                          f"({type(error).__name__}); use --tokenizer bpe or bytes, which need no network, "
                          "or set TIKTOKEN_CACHE_DIR to a folder that already holds it") from None
        ranks = encoding._mergeable_ranks
        return cls(sorted(ranks, key=ranks.get), encoding._pat_str)

    def to_dict(self):
        """The Tokenizer as plain values for a checkpoint or JSON file (bytes as Latin-1 text)."""
        return {"vocabulary": [text.decode("latin-1") for text in self.vocabulary], "pattern": self.pattern}

    @classmethod
    def from_dict(cls, plain):
        return cls([text.encode("latin-1") for text in plain["vocabulary"]], plain["pattern"])

    def encode(self, text):
        if len(text) <= LONGEST:
            return self._tiktoken.encode_ordinary(text)
        return [i for part, _ in cut(text) for i in self._tiktoken.encode_ordinary(part)]

    def encode_batch(self, texts):
        """list[str] -> list[list[int]], in parallel."""
        if any(len(text) > LONGEST for text in texts):
            return [self.encode(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids):
        return self._tiktoken.decode_bytes([i for i in ids if i < self.eot])

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def whole_characters(self, ids):
        """ids, a list of text ids -> the slice without tokens at either end that hold part of a character."""
        start, end = 0, len(ids)
        while start < end and self.vocabulary[ids[start]][0] & 0xC0 == 0x80:  # 10xxxxxx: inside a character
            start += 1
        for last in range(end, max(start, end - 4), -1):  # a character is at most four bytes
            try:
                self.decode_bytes(ids[start:last]).decode("utf-8")
                return slice(start, last)
            except UnicodeDecodeError:
                continue
        return slice(start, start)


def cut(text):
    """Yields (part, is_last): a text in parts of at most LONGEST characters, each cut after the last line end
    in its second half, if there is one."""
    start = 0
    while len(text) - start > LONGEST:
        end = text.rfind("\n", start + LONGEST // 2, start + LONGEST) + 1 or start + LONGEST
        yield text[start:end], False
        start = end
    yield text[start:], True


def learn_bpe(counts, n):
    """Byte-pair encoding (Sennrich et al., 2016) -> list[bytes], n entries, of which the first 256 are the
    single bytes; fewer where no pair is left.

    counts: dict[bytes, int], each distinct piece of the corpus with its frequency. Each step merges the most
    frequent pair of neighbours (ties: the smaller ids), from left to right in each piece, into one id, whose
    entry is the joined bytes of both. A pair counts wherever it stands, overlapping or not: twice in b"aaa".

    For speed, pair counts are updated where a merge changes a word, and a heap holds (-count, pair); an entry
    popped with an outdated count is pushed back with the true one."""
    words, frequency = [list(piece) for piece in counts], list(counts.values())
    vocabulary = [bytes([i]) for i in range(256)]
    pair_count, words_with = Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += frequency[w]
            words_with[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    with tqdm(total=n, initial=256, desc="learning the vocabulary", unit="token", leave=False) as bar:
        while len(vocabulary) < n and heap:
            count, pair = heapq.heappop(heap)
            if -count != pair_count[pair]:
                if pair_count[pair]:
                    heapq.heappush(heap, (-pair_count[pair], pair))
                continue
            if count == 0:
                break
            (a, b), new = pair, len(vocabulary)
            vocabulary.append(vocabulary[a] + vocabulary[b])
            bar.update()
            grown = set()
            for w in words_with.pop(pair):
                word, f = words[w], frequency[w]
                i = 0
                while i < len(word) - 1:
                    if word[i] != a or word[i + 1] != b:
                        i += 1
                        continue
                    neighbours = []
                    if i > 0:
                        neighbours.append(((word[i - 1], a), (word[i - 1], new)))
                    if i + 2 < len(word):
                        neighbours.append(((b, word[i + 2]), (new, word[i + 2])))
                    for old, grow in neighbours:
                        pair_count[old] -= f
                        pair_count[grow] += f
                        words_with[grow].add(w)
                        grown.add(grow)
                    word[i:i + 2] = [new]
                    i += 1
            del pair_count[pair]
            for pair in grown:
                heapq.heappush(heap, (-pair_count[pair], pair))
    return vocabulary


def source_files(source, cache_dir="cache"):
    """The sorted files of a --data source: stdlib, site-packages, a file, folder or glob. OSError if none.

    A GENERATED corpus is written into a file in cache_dir first."""
    if source.partition(":")[0] in GENERATED:
        from lab.corpora import write
        return [write(source, cache_dir)]
    paths = sysconfig.get_paths()
    if source == "stdlib":
        root = Path(paths["stdlib"])
        kept_out = {root / f"{name}.py" for name in EVALUATION_MODULES}
        return [f for f in python_files(root, SKIP_FOLDERS) if f not in kept_out]
    if source == "site-packages":
        roots = sorted({Path(paths["purelib"]), Path(paths["platlib"])})
        return [f for root in roots for f in python_files(root, {"__pycache__"})]
    if "\0" in source:
        raise OSError(f"--data {source!r}: a path cannot hold a NUL character")
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not any(
            part.startswith(".") or part == "__pycache__" for part in f.relative_to(path).parts))
        if not files and not os.access(path, os.R_OK | os.X_OK):
            raise OSError(f"--data {source}: no permission to read this folder")
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if os.path.isfile(f))
    if not files:
        raise OSError(f"--data {source}: no such file; expected stdlib, site-packages, "
                      f"{', '.join(GENERATED)}, or a file, folder or glob")
    return files


def python_files(root, skip):
    """The sorted .py files under a folder, without those in subfolders whose names are in skip."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def iter_documents(source, files=None, desc="reading"):
    """Yields a source's documents: str, never blank. Each line of a .jsonl is one, its "text" or "content".

    Raises ValueError if a single file is not UTF-8 text, or a .jsonl is damaged. Of several files, those that
    are not UTF-8 text are skipped; with desc "reading" (the progress bar's label) their number is printed."""
    files = files or source_files(source)
    skipped = []
    for path in tqdm(files, desc=desc, unit="file", leave=False, disable=len(files) < 2):
        is_jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
        try:
            yield from filter(str.strip, jsonl_documents(path) if is_jsonl else [read_text(path)])
        except (ValueError, PermissionError) as error:
            if len(files) == 1 or is_jsonl:
                raise
            skipped.append(str(error).removeprefix("--data "))
    if skipped and desc == "reading":
        tqdm.write(f"skipped {len(skipped)} of {len(files)} files that are not readable UTF-8 text, "
                   f"first {skipped[0]}")


def read_text(path):
    """A file's text, unpacked if the file is a .gz. Raises ValueError if it is not readable UTF-8 text."""
    if not path.is_file():
        raise ValueError(f"--data {path}: not a regular file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            text = f.read()
    except PermissionError:
        raise ValueError(f"--data {path}: no permission to read it") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"--data {path}: expected UTF-8 text, got {error}") from None
    if "\0" in text:
        raise ValueError(f"--data {path}: a binary file (it has NUL bytes), expected text")
    return text


def jsonl_documents(path):
    for place, record in read_records(path, "--data"):
        text = record.get("text", record.get("content")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'--data {path}: {place} has no string field "text" or "content"')
        yield text


def read_records(path, flag):
    """Yields (place, record) of a .jsonl, or of a .json that is one list; either may be a .gz.

    place: "line 3" or "record 3". Raises ValueError, naming flag, path and place, if the file is damaged."""
    path, unit, number = Path(path), "line", 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            if path.name.removesuffix(".gz").endswith(".json"):
                unit = "record"
                for number, record in enumerate(json.load(f), 1):
                    yield f"record {number}", record
            else:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield f"line {number}", json.loads(line)
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{flag} {path}: cannot be read after {unit} {number} ({error})") from None
    except (ValueError, RecursionError) as error:  # a plain ValueError: an integer of thousands of digits
        raise ValueError(f"{flag} {path}: {unit} {number or 1} is not JSON ({error})") from None


def load_documents(source):
    """The documents of a source (see source_files): list[str]. Raises OSError or ValueError."""
    return list(iter_documents(source))


def is_held_out(text):
    """True for 5% of documents, by a hash of the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _split(documents, held_out):
    """Yields (text, is it held out); held_out: is_held_out of each document. If all documents fall on one
    side, as with a single book, the last 5% of each is held out instead, from a line start if one is near."""
    has_both = len(set(held_out)) == 2
    for text, is_out in zip(documents, held_out):
        if has_both:
            yield text, is_out
        else:
            end = int(len(text) * (1 - HELD_OUT))
            end = text.rfind("\n", end * 9 // 10, end) + 1 or end
            yield text[:end], False
            yield text[end:], True


def split_documents(docs):
    """list[str] -> (train, held_out), by the text alone: no text changes sides, and copies share a side."""
    parts = [part for part in _split(docs, [is_held_out(text) for text in docs]) if part[0]]
    return [text for text, is_out in parts if not is_out], [text for text, is_out in parts if is_out]


def prepare(source="stdlib", tokenizer="bpe", vocab_size=2048, cache_dir="cache", tok=None):
    """Documents -> (Tokenizer, training stream, held-out stream), the streams as memory-mapped arrays of ids.

    tokenizer: bpe, bytes or gpt2; or give a Tokenizer as tok. The result is cached under a hash of the files'
    contents and the settings, written whole or not at all, and written again if damaged. Documents are
    streamed: memory does not grow with the corpus. Raises ValueError or OSError."""
    files = source_files(source, cache_dir)
    settings = tok.to_dict() if tok else [tokenizer, vocab_size if tokenizer == "bpe" else None]
    digest = hashlib.sha256(json.dumps([2, settings]).encode())
    for path in tqdm(files, desc="checking the cache", unit="file", leave=False, disable=len(files) < 2):
        if path.is_file() and os.access(path, os.R_OK):
            with open(path, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
        digest.update(repr(path.suffixes).encode())  # a .txt is not read as a .jsonl is
    folder = Path(cache_dir, digest.hexdigest()[:16])
    try:
        return _load_streams(folder)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    held_out = [is_held_out(text) for text in iter_documents(source, files)]
    if not held_out:
        raise ValueError(f"--data {source}: no text in it")

    def parts(desc):
        return (part for part in _split(iter_documents(source, files, desc), held_out) if part[0])

    if tok is None:
        texts = (text for text, is_out in parts("counting words") if not is_out)
        tok = make_tokenizer(tokenizer, vocab_size, texts)
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache_dir))
    try:
        _write_streams(temporary, tok, parts("encoding"))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load_streams(folder)


def make_tokenizer(name, vocab_size, texts):
    """name: bpe (learned from the texts), bytes or gpt2 -> Tokenizer. Raises ValueError for another name."""
    makers = {"bpe": lambda: Tokenizer.train(texts, vocab_size), "bytes": Tokenizer.bytes,
              "gpt2": Tokenizer.gpt2}
    if name not in makers:
        raise ValueError(f"--tokenizer {name}: expected one of {', '.join(makers)}")
    return makers[name]()


def _write_streams(folder, tok, documents):
    dtype = np.dtype("<u2" if tok.n_vocab <= 2**16 else "<u4")
    meta = {"dtype": dtype.str, "tokenizer": tok.to_dict(), "train": [0, 0], "held_out": [0, 0]}

    def write(parts, name, f):
        texts, ends = zip(*parts) if parts else ((), ())
        ids = []
        for part, is_last in zip(tok.encode_batch(texts), ends):
            ids += [*part, tok.eot] if is_last else part
        block = np.array(ids, dtype).tobytes()
        f.write(block)
        length, checksum = meta[name]
        meta[name] = [length + len(ids), zlib.crc32(block, checksum)]

    with open(folder / "train", "wb") as train, open(folder / "held_out", "wb") as held_out:
        sides = {False: ("train", train), True: ("held_out", held_out)}
        waiting = {False: [], True: []}
        for text, is_out in documents:
            for part in cut(text):
                waiting[is_out].append(part)
                if sum(len(text) for text, _ in waiting[is_out]) > 1 << 20:
                    write(waiting[is_out], *sides[is_out])
                    waiting[is_out] = []
        for is_out, parts in waiting.items():
            write(parts, *sides[is_out])
    meta = json.dumps(meta)
    (folder / "meta.json").write_text(f"{zlib.crc32(meta.encode())}\n{meta}")


def _load_streams(folder):
    checksum, meta = (folder / "meta.json").read_text().split("\n")
    if zlib.crc32(meta.encode()) != int(checksum):
        raise ValueError(f"{folder / 'meta.json'} is damaged")
    meta, streams = json.loads(meta), []
    for name in ("train", "held_out"):
        length, checksum = meta[name]
        if length == 0:
            streams.append(np.zeros(0, meta["dtype"]))
            continue
        stream = np.memmap(folder / name, meta["dtype"], "r")
        actual = 0
        for start in range(0, len(stream), 1 << 22):
            actual = zlib.crc32(stream[start:start + (1 << 22)], actual)
        if (len(stream), actual) != (length, checksum):
            raise ValueError(f"{folder / name} is damaged")
        streams.append(stream)
    return Tokenizer.from_dict(meta["tokenizer"]), *streams


def split_lines(text):
    """A text's lines, with their line ends. (str.splitlines would also cut at form feeds and the like.)"""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def text_rows(stream, T, n):
    """Up to n rows of left-to-right text, (inputs, targets), each (T,) int64: evenly spaced windows, the same
    for every model of context T."""
    n = min((len(stream) - 1) // T, max(1, n))
    starts = np.linspace(0, len(stream) - 1 - T, max(0, n)).astype(int)
    windows = (stream[start:start + T + 1] for start in starts)
    return ((window[:-1].astype(np.int64), window[1:].astype(np.int64)) for window in windows)


class Batches:
    """batch(step) -> (inputs, targets), int64 arrays (B, T), a pure function of (seed, step, rank).

    objective(window, tok, rng) turns a window, ids (T+1,), into a row. Rows are numbered over the whole run:
    step s of rank r holds row (s * world + r) * B and the B - 1 after it, so one process that accumulates two
    batches sees the rows of two processes with one batch each. An epoch has (len(stream) - T) // T windows;
    its phase in [0, T), the offset of its first window, and its permutation of the windows are drawn from
    (seed, epoch). Raises ValueError if the stream is shorter than 2T tokens."""

    def __init__(self, stream, objective, tok, block_size, batch_size, seed, rank=0, world=1):
        self.stream, self.objective, self.tok = stream, objective, tok
        self.T, self.B, self.seed, self.rank, self.world = block_size, batch_size, seed, rank, world
        self.n_windows = (len(stream) - block_size) // block_size
        if self.n_windows < 1:
            raise ValueError(f"the training text has {len(stream):,} tokens, expected at least "
                             f"{2 * block_size:,} for --block-size {block_size}: "
                             "give more text or a smaller block size")
        self.epoch = lru_cache(maxsize=2)(self.draw_epoch)  # a batch may span two epochs

    def draw_epoch(self, epoch):
        rng = np.random.default_rng([self.seed, epoch, 0])
        return rng.integers(self.T), rng.permutation(self.n_windows)

    def describe(self):
        bytes_a_token = self.tok.n_bytes[self.stream[:2**20]].mean()
        return f"{len(self.stream):,} tokens to train on, {bytes_a_token:.2f} bytes a token"

    def window(self, index):
        """ids (T+1,) of window number index, counted over all steps, ranks and rows of the run."""
        phase, order = self.epoch(index // self.n_windows)
        start = phase + order[index % self.n_windows] * self.T
        return np.asarray(self.stream[start:start + self.T + 1], np.int64)

    def row(self, index):
        return self.objective(self.window(index), self.tok, np.random.default_rng([self.seed, index, 1]))

    def batch(self, step):
        first = (step * self.world + self.rank) * self.B
        return tuple(np.stack(part) for part in zip(*map(self.row, range(first, first + self.B))))
