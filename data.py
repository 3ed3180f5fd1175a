"""From text to batches.

    files -> documents -> token stream -> windows -> rows -> batch

    documents   one str each: a file, or a line of a .jsonl                     iter_documents, split_documents
    stream      doc <EOT> doc <EOT> doc <EOT> ...   one flat array of ids, on   prepare
                disk, memory-mapped; one for training, one held out
    window      T+1 consecutive ids of the stream, starting anywhere:
                ... tail of a doc <EOT> whole doc <EOT> head of a doc ...        Batches
    row         what an objective makes of a window: T inputs and T targets     objectives.Objective.row
    batch       B rows as two int64 arrays (B, T), a pure function of (seed, step, rank): there is no loader state
                to save, a resumed run sees exactly what an uninterrupted one would have seen

Tokenizers run on tiktoken. Ids 0 .. n-6 are text; the last five are <PRE> <SUF> <MID> <EOT> <MASK>, which no text
encodes to, because encoding never looks for them: a document that contains the characters "<MID>" is ordinary text.
"""
import ast
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
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from objectives import check_choice, check_range, fim_documents

SPECIALS = ("pre", "suf", "mid", "eot", "mask")
HELD_OUT = 0.05
LONGEST = 1 << 18  # characters that are encoded at a time: a million spaces in a row overflow tiktoken's stack
MOST_WORDS = 1 << 20  # different words that learning a vocabulary counts
SKIP_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Standard library modules whose doctests evaluate.py runs: no part of stdlib or prose, so never trained on.
EVALUATION_MODULES = ("_pydecimal", "collections/__init__", "difflib", "fractions", "heapq", "ipaddress", "statistics",
                      "textwrap")


class Tokenizer:
    """Byte-level BPE and five special ids.

    encode(text) -> list[int] and decode(ids) -> str are inverse to each other on every text; special ids decode to
    nothing. Attributes: n_vocab (all ids, the special ones included), pre suf mid eot mask (int), and
    n_bytes, an int64 array (n_vocab,) with the bytes of text each id stands for (0 for a special one).
    """
    # One piece per match; tokens never cross pieces. A word takes one sign or space in front (".join", " in", "_x"),
    # signs take the line end behind them ("):\n"), and a run of spaces stays together up to the one before a word,
    # so that indentation is one token. Valid for Python's re, which learns, and for tiktoken's, which runs.
    PATTERN = r"(?:_|[^\r\n\w])?[^\W\d_]+|\d{1,3}| ?(?:_|[^\s\w])+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

    def __init__(self, vocabulary, pattern=PATTERN):
        """vocabulary: list[bytes], the text of each id in the order of learning, all 256 single bytes among them."""
        self.vocabulary, self.pattern = vocabulary, pattern
        self._tiktoken = tiktoken.Encoding("nanogap", pat_str=pattern, special_tokens={},
                                           mergeable_ranks={text: i for i, text in enumerate(vocabulary)})
        n = len(vocabulary)
        # tiktoken numbers GPT-2's <|endoftext|> just after its last merge; <EOT> takes that id, so that the
        # embeddings of GPT-2's published weights keep their rows.
        self.eot, self.pre, self.suf, self.mid, self.mask = range(n, n + len(SPECIALS))
        self.specials = list(range(n, n + len(SPECIALS)))
        self.n_vocab = n + len(SPECIALS)
        self.n_bytes = np.array([len(text) for text in vocabulary] + [0] * len(SPECIALS))

    @classmethod
    def bytes(cls):
        """One id per byte: nothing to learn, sequences about three times as long."""
        return cls([bytes([i]) for i in range(256)])

    @classmethod
    def train(cls, texts, n):
        """Learns n ids in all (256 bytes and the specials included) from an iterable of texts; fewer if they run out."""
        check_range("--vocab-size", n, 256 + len(SPECIALS), 10**6)
        counts, rare = Counter(), 0
        for text in texts:
            for part, _ in cut(text):
                counts.update([piece[:1000] for piece in re.findall(cls.PATTERN, part)])
                while len(counts) > MOST_WORDS:  # what is rare is forgotten, as in word2vec: memory has a bound
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
            raise OSError(f"--tokenizer gpt2: tiktoken could not download the GPT-2 vocabulary ({type(error).__name__}); "
                          "use --tokenizer bpe or bytes, which need no network, or set TIKTOKEN_CACHE_DIR to a folder "
                          "that already holds it") from None
        ranks = encoding._mergeable_ranks
        return cls(sorted(ranks, key=ranks.get), encoding._pat_str)

    def to_dict(self):
        """Plain values for a checkpoint or JSON file (bytes as latin-1 text)."""
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
        """The slice of ids (a list of text ids) left after dropping tokens that hold half a character at either end."""
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
    """Yields (part, whether it is the last): a text in parts of at most LONGEST characters, cut behind a line end if there
    is one in the part's second half."""
    start = 0
    while len(text) - start > LONGEST:
        end = text.rfind("\n", start + LONGEST // 2, start + LONGEST) + 1 or start + LONGEST
        yield text[start:end], False
        start = end
    yield text[start:], True


def learn_bpe(counts, n):
    """Byte-pair encoding (Sennrich et al., 2016): n entries, of which the first 256 are the single bytes.

    counts: dict[bytes, int], each distinct piece of the corpus with its frequency. Each step merges the most frequent
    pair of neighbours (ties: the smaller ids). Pair counts are updated where a merge happened, never recounted. A heap
    holds (-count, pair); an entry whose count has fallen since is put back with the true one when it comes up.
    """
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


def source_files(source):
    """The files that a --data source names: stdlib, prose, site-packages, a file, a folder or a glob. Sorted.

    Raises OSError where there are none."""
    paths = sysconfig.get_paths()
    if source in ("stdlib", "prose"):
        root = Path(paths["stdlib"])
        kept_out = {root / f"{name}.py" for name in EVALUATION_MODULES}
        return [f for f in _python_files(root, SKIP_FOLDERS) if f not in kept_out]
    if source == "site-packages":
        roots = sorted({Path(paths["purelib"]), Path(paths["platlib"])})
        return [f for root in roots for f in _python_files(root, {"__pycache__"})]
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
        raise OSError(f"--data {source}: no such file; expected stdlib, prose, site-packages, or a file, folder or glob")
    return files


def _python_files(root, skip):
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def iter_documents(source, files=None, desc="reading"):
    """Yields the documents (str, never empty) of a source.

    A file that was named itself must be UTF-8 text, else ValueError; among many files those that are not are skipped,
    and counted aloud (once: a later pass over the same files has another desc, the label of its progress bar). A .jsonl
    gives one document a line, from its "text" or "content"."""
    files = files or source_files(source)
    skipped = []
    for path in tqdm(files, desc=desc, unit="file", leave=False, disable=len(files) < 2):
        try:
            if not path.is_file():
                raise ValueError(f"--data {path}: not a regular file")
            name = path.name.removesuffix(".gz")
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
                if name.endswith(".jsonl"):
                    documents = _jsonl_documents(path, f)
                else:
                    text = f.read()
                    if "\0" in text:
                        raise ValueError(f"--data {path}: a binary file (it has NUL bytes), expected text")
                    documents = [_prose(path, text)] if source == "prose" else [text]
                yield from filter(str.strip, documents)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            skipped.append(f"{path}: expected UTF-8 text, got {error}")
        except ValueError as error:
            if len(files) == 1 or path.name.endswith((".jsonl", ".jsonl.gz")):
                raise
            skipped.append(str(error))
        except PermissionError:
            skipped.append(f"{path}: no permission to read it")
    if skipped and len(files) == 1:
        raise ValueError(f"--data {skipped[0].removeprefix('--data ')}")
    if skipped and desc == "reading":
        tqdm.write(f"skipped {len(skipped)} of {len(files)} files that are not readable UTF-8 text, first {skipped[0]}")


def _jsonl_documents(path, lines):
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--data {path}: line {number} is not JSON ({error})") from None
        text = record.get("text", record.get("content")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'--data {path}: line {number} has no string field "text" or "content"')
        yield text


def read_records(path, flag):
    """Yields (place, record) of a .jsonl or a .json that is one list, either perhaps .gz; place: "line 3" or "record 3".

    Raises ValueError that names flag, path and place where it is damaged."""
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: {unit} {number or 1} is not JSON ({error})") from None
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{flag} {path}: cannot be read after {unit} {number} ({error})") from None


def _prose(path, source):
    """The English in a Python file: its docstrings, or the topics of pydoc."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, RecursionError):
        return ""
    if path.name == "topics.py":
        return "\n\n".join(node.value for node in ast.walk(tree)
                           if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(filter(None, docstrings))


def load_documents(source):
    """The documents of a source (see source_files) as a list. Raises OSError or ValueError, naming the file."""
    return list(iter_documents(source))


def is_held_out(text):
    """True for 5% of documents, by a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < HELD_OUT * 2**64


def _split(documents, held_out):
    """Yields (text, is it held out). Where the hashes put every document on one side, as they do with a single book,
    the last 5% of each document is held out instead, from a line's start if there is one near."""
    mixed = len(set(held_out)) == 2
    for text, held in zip(documents, held_out):
        if mixed:
            yield text, held
        else:
            end = int(len(text) * (1 - HELD_OUT))
            end = text.rfind("\n", end * 9 // 10, end) + 1 or end
            yield text[:end], False
            yield text[end:], True


def split_documents(docs):
    """list[str] -> (train, held_out). The side depends on the text alone: it never moves, and copies never straddle."""
    parts = [part for part in _split(docs, [is_held_out(text) for text in docs]) if part[0]]
    return [text for text, held in parts if not held], [text for text, held in parts if held]


def prepare(source="stdlib", tokenizer="bpe", vocab_size=2048, cache_dir="cache", tok=None):
    """Documents -> (Tokenizer, training stream, held-out stream), the streams as memory-mapped arrays of ids.

    tokenizer: bpe, bytes or gpt2; or give a Tokenizer as tok. The result is cached under a key made of the files'
    contents and the settings, written whole or not at all, and made again where it is damaged. Documents are streamed:
    memory does not grow with the corpus. Raises ValueError or OSError with a sentence for the user."""
    files = source_files(source)
    settings = tok.to_dict() if tok else [tokenizer, vocab_size if tokenizer == "bpe" else None]
    digest = hashlib.sha256(json.dumps([1, source == "prose", settings]).encode())
    for path in tqdm(files, desc="checking the cache", unit="file", leave=False, disable=len(files) < 2):
        if path.is_file() and os.access(path, os.R_OK):
            with open(path, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
        digest.update(repr(path.suffixes).encode())  # a .txt is read in another way than a .jsonl
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
        tok = make_tokenizer(tokenizer, vocab_size, (text for text, held in parts("counting words") if not held))
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
    """bpe, learned from the texts, bytes or gpt2 -> Tokenizer."""
    makers = {"bpe": lambda: Tokenizer.train(texts, vocab_size), "bytes": Tokenizer.bytes, "gpt2": Tokenizer.gpt2}
    check_choice("--tokenizer", name, makers)
    return makers[name]()


def _write_streams(folder, tok, documents):
    dtype = np.dtype("<u2" if tok.n_vocab <= 2**16 else "<u4")
    meta = {"dtype": dtype.str, "tokenizer": tok.to_dict(), "train": [0, 0], "held_out": [0, 0]}

    def write(parts, name, f):
        texts, ends = zip(*parts) if parts else ((), ())
        ids = [i for part, end in zip(tok.encode_batch(texts), ends) for i in (*part, *([tok.eot] if end else []))]
        block = np.array(ids, dtype).tobytes()
        f.write(block)
        length, checksum = meta[name]
        meta[name] = [length + len(ids), zlib.crc32(block, checksum)]

    with open(folder / "train", "wb") as train, open(folder / "held_out", "wb") as held_out:
        sides = {False: ("train", train), True: ("held_out", held_out)}
        waiting = {False: [], True: []}
        for text, held in documents:
            for part in cut(text):
                waiting[held].append(part)
                if sum(len(text) for text, _ in waiting[held]) > 1 << 20:
                    write(waiting[held], *sides[held])
                    waiting[held] = []
        for held, parts in waiting.items():
            write(parts, *sides[held])
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
        found = 0
        for start in range(0, len(stream), 1 << 22):
            found = zlib.crc32(stream[start:start + (1 << 22)], found)
        if (len(stream), found) != (length, checksum):
            raise ValueError(f"{folder / name} is damaged")
        streams.append(stream)
    return Tokenizer.from_dict(meta["tokenizer"]), *streams


def single_line_holes(stream, tok, n, seed, n_prefix=120, n_suffix=80, n_middle=40):
    """n holes in the documents of a stream, each one line, as (prefix, middle, suffix): lists of exactly n_prefix, at most
    n_middle and exactly n_suffix ids. The middle ends with its line end; blank lines are no holes. Fewer than n, if the
    stream has no more in 50 n draws."""
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(stream == tok.eot)
    starts = np.concatenate(([0], ends[:-1] + 1))
    holes = []
    for _ in range(50 * n):
        if len(holes) == n or not len(ends):
            break
        document = rng.integers(len(ends))
        lines = split_lines(tok.decode(stream[starts[document]:ends[document]].tolist()))
        line = rng.integers(max(1, len(lines)))
        if not lines or not lines[line].strip():
            continue
        # 200 lines on either side hold 120 tokens, or the document does not
        parts = lines[max(0, line - 200):line], lines[line:line + 1], lines[line + 1:line + 200]
        prefix, middle, suffix = (tok.encode("".join(part)) for part in parts)
        if len(prefix) >= n_prefix and len(suffix) >= n_suffix and len(middle) <= n_middle:
            holes.append((prefix[-n_prefix:], middle, suffix[:n_suffix]))
    return holes


def split_lines(text):
    """Lines with their line ends. (str.splitlines would cut at form feeds and other signs, too.)"""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def text_rows(stream, tok, T, n):
    """Up to n rows of plain left-to-right text, (inputs, targets) of T ids each: evenly spaced windows, the same for every
    model of that context."""
    n = min((len(stream) - 1) // T, max(1, n))
    windows = (stream[start:start + T + 1] for start in np.linspace(0, len(stream) - 1 - T, max(0, n)).astype(int))
    return ((window[:-1].astype(np.int64), window[1:].astype(np.int64)) for window in windows)


class Batches:
    """batch(step) -> (inputs, targets), int64 arrays (B, T), a pure function of (seed, step, rank).

    Rows are numbered over the whole run: step s of rank r holds rows (s * world + r) * B and the B-1 after it, so one
    process that accumulates two batches sees the rows of two processes that make one each. The stream has
    n = (len - T) // T windows an epoch; each epoch draws a phase in [0, T), the offset of its first window, and a
    permutation of its windows, both from (seed, epoch). Raises ValueError if the stream is shorter than a window."""

    def __init__(self, stream, objective, tok, block_size, batch_size, seed, rank=0, world=1, fim_level="context"):
        self.stream, self.objective, self.tok = stream, objective, tok
        self.T, self.B, self.seed, self.rank, self.world = block_size, batch_size, seed, rank, world
        self.n_windows = (len(stream) - block_size) // block_size
        if self.n_windows < 1:
            raise ValueError(f"the training text has {len(stream):,} tokens, expected at least {2 * block_size:,} "
                             f"for --block-size {block_size}: give more text or a smaller block size")
        self.document_level = fim_level == "document"
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)  # a batch may straddle two

    def _draw_epoch(self, epoch):
        rng = np.random.default_rng([self.seed, epoch, 0])
        phase, order = rng.integers(self.T), rng.permutation(self.n_windows)
        stream = fim_documents(self.stream, self.objective, self.tok, rng) if self.document_level else self.stream
        return stream, phase, order

    def describe(self):
        return f"{len(self.stream):,} tokens to train on, {self.tok.n_bytes[self.stream[:2**20]].mean():.2f} bytes a token"

    def window(self, index):
        """Window number index of the run: ids (T+1,), counted over all steps, ranks and rows."""
        stream, phase, order = self._epoch(index // self.n_windows)
        start = phase + order[index % self.n_windows] * self.T
        return np.asarray(stream[start:start + self.T + 1], np.int64)

    def row(self, index):
        objective = replace(self.objective, fim_rate=0) if self.document_level else self.objective
        return objective.row(self.window(index), self.tok, np.random.default_rng([self.seed, index, 1]))

    def batch(self, step):
        first = (step * self.world + self.rank) * self.B
        return tuple(np.stack(part) for part in zip(*map(self.row, range(first, first + self.B))))
