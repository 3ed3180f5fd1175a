"""From text to batches.

    files -> documents -> token stream -> windows -> rows -> batch

    documents   one str each: a file, or a line of a .jsonl               load_documents
    stream      doc <EOT> doc <EOT> ...   one flat array of ids on disk,  prepare
                memory-mapped; one for training, one held out
    window      T+1 consecutive ids of the stream, starting anywhere:     Batches
                ... tail of a doc <EOT> whole doc <EOT> head of a doc ...
    row         an objective's T inputs and T targets for a window        objectives.py
    batch       B rows as two int64 arrays (B, T), a pure function of (seed, number): with no loader state to
                save, a resumed run sees the same batches as an uninterrupted one

Tokenizers run on tiktoken. The last five of the n_vocab ids are special: <EOT> <PRE> <SUF> <MID> <MASK>. No
text encodes to them, since encoding never looks for them: the characters "<MID>" in a document are text.
"""
import glob
import gzip
import hashlib
import heapq
import io
import json
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

GENERATED = ("markov", "records", "rare", "haystack", "chains", "programs")  # --data names of lab/corpora.py
HELD_OUT = 0.05
SKIP_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
# --data stdlib is without these modules, whose many doctests can judge a model. So are all figures in docs/.
KEPT_APART = ("_pydecimal", "collections/__init__", "difflib", "fractions", "heapq", "ipaddress",
              "statistics", "textwrap")


# Documents

def load_documents(source):
    """The documents of a --data source (see source_files): list[str]. Raises OSError or ValueError."""
    return [text for text, _ in read_files(source_files(source))]


def source_files(source, cache_dir="cache"):
    """The sorted files of a --data source: stdlib, site-packages, a file, folder or glob. OSError if none.

    A GENERATED corpus is written into a file in cache_dir first."""
    paths = sysconfig.get_paths()
    if source.partition(":")[0] in GENERATED:
        from lab.corpora import write
        return [write(source, cache_dir)]
    if source == "stdlib":
        root = Path(paths["stdlib"])
        kept_apart = {root / f"{name}.py" for name in KEPT_APART}
        return [f for f in files_below(root, SKIP_FOLDERS) if f.suffix == ".py" and f not in kept_apart]
    if source == "site-packages":
        roots = sorted({paths["purelib"], paths["platlib"]})
        return [f for root in roots for f in files_below(root) if f.suffix == ".py"]
    path = os.path.expanduser(source)
    files = files_below(path) if os.path.isdir(path) else [Path(f) for f in [path, *wildcards(path)]
                                                           if os.path.isfile(f)]
    if not files:
        raise OSError(f"--data {source}: no such file; expected stdlib, site-packages, "
                      f"{', '.join(GENERATED)}, or a file, folder or glob")
    return list({f.resolve(): f for f in sorted(files)}.values())  # a file with two names is read once


def files_below(root, skip=("__pycache__",)):
    """The sorted files in a folder and its subfolders."""
    files = [Path(folder, name) for folder, names in folders_below(root, skip) for name in names]
    return sorted(f for f in files if f.name[0] != "." and f.is_file())


def folders_below(root, skip=("__pycache__",)):
    """Yields (folder, names of its files) of a folder and its subfolders, linked ones too, hidden ones not. A
    folder that several links lead to, or a link to a folder around it, comes once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real not in seen:
            yield folder, names
        subfolders[:] = [name for name in sorted(subfolders)
                         if real not in seen and name not in skip and name[0] != "."]
        seen.add(real)


def wildcards(pattern):
    """glob.glob, in which ** follows each link once."""
    before, stars, after = re.sub(r"(^|/)\*\*$", r"\1**/*", pattern).partition("**/")
    if not stars:
        return glob.glob(pattern)
    folders = [folder for root in glob.glob(before or ".") for folder, _ in folders_below(root)]
    return [f for folder in folders for f in wildcards(os.path.join(glob.escape(folder), after))]


def read_files(files, desc="reading"):
    """Yields (text, key) of each document: str, the text never blank. A hash of the key decides whether it is
    held out; the key is the text, or what a record has in "held_out_key", as those of generated corpora have.
    A file is a document, or a .jsonl or .json of records, whose text is in "text" or "content".

    Raises ValueError if a single file is not UTF-8 text, or a .jsonl is damaged. Of several files, those that
    are not UTF-8 text are skipped; with desc "reading" (the progress bar's label) their number is printed."""
    skipped = []
    for path in tqdm(files, desc=desc, unit="file", leave=False, disable=None if len(files) > 1 else True):
        try:
            records = read_records(path, "--data") if kind_of(path) else [("", {"text": read_text(path)})]
            for place, record in records:
                fields = record if isinstance(record, dict) else {}
                texts = [fields[name] for name in ("text", "content") if isinstance(fields.get(name), str)]
                if not texts:
                    raise ValueError(f'--data {path}: {place} has no string field "text" or "content"')
                # JSON can hold half of a surrogate pair, which is no text: it becomes U+FFFD.
                text = re.sub("[\ud800-\udfff]", "\ufffd", newlines(texts[0]))
                if text.strip():
                    yield text, str(record.get("held_out_key", text))
        except (ValueError, PermissionError) as error:
            if len(files) == 1 or kind_of(path) == "lines":
                raise
            skipped.append(str(error).removeprefix("--data "))
    if skipped and desc == "reading":
        tqdm.write(f"skipped {len(skipped)} of {len(files)} files that are not readable UTF-8 text, "
                   f"first {skipped[0]}")


def newlines(text):
    """A text with \\n for each line end: so is all text that a model sees, in training and in a prompt."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def kind_of(path):
    """lines: a file with a JSON object on each line; json; or None: text. Each may be packed as .gz."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return {".jsonl": "lines", ".ndjson": "lines", ".json": "json"}.get(ending)


def read_text(path):
    """A file's text. Raises ValueError, at the first MiB that is not, if it is not UTF-8 text."""
    blocks = []
    with open_text(path) as f:
        while block := f.read(1 << 20):
            if "\0" in block:
                raise ValueError(f"--data {path}: a binary file (it has NUL bytes), expected text")
            blocks.append(block)
    return "".join(blocks)


@contextmanager
def open_text(path, flag="--data"):
    """A file as UTF-8 text, unpacked if it is a .gz. Raises ValueError, naming the flag, where it is not."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            yield f
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{flag} {path}: expected UTF-8 text, got {error}") from None


def read_records(path, flag):
    """Yields (place, record) of a .jsonl or .ndjson, an object per line, or of a .json: a list, an object, or
    an object per line. place: "line 3" or "record 3". Raises ValueError, naming flag, path and place."""
    with open_text(path, flag) as f:
        if kind_of(path) == "json":
            text = f.read()
            try:
                records = json.loads(text)
                records = records if isinstance(records, list) else [records]
                yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
                return
            except (ValueError, RecursionError):
                f = io.StringIO(text)
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{flag} {path}: line {number} is not JSON ({error})") from None


def lines_of(text):
    """A text's lines, with their line ends. (str.splitlines would also cut at form feeds and the like.)"""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# Tokenizer

class Tokenizer:
    """Byte-level BPE and five special ids.

    encode(text) -> list[int], decode(ids) -> str; decode(encode(text)) == text, and special ids decode to "".
    Attributes: n_vocab (special ids included); the ids pre suf mid eot mask, all in specials, their names
    in names; n_bytes, an int64 array (n_vocab,): the number of bytes of each id's text, 0 for a special id.
    """
    # One piece per match; tokens never cross pieces. A word includes one sign or space before it (".join",
    # " in", "_x"), signs include the line end after them ("):\n"), and a run of spaces stays together, except
    # its last before a word, so that indentation is one token. All characters beyond ASCII count as letters:
    # engines differ in what they call a letter, and a vocabulary that is learned with Python's re must find
    # the same pieces in tiktoken's.
    PATTERN = (r"(?:SIGN|[\t\v\f ])?LETTER+|[0-9]{1,3}| ?SIGN+[\r\n]*|SPACE*[\r\n]|SPACE+(?![^\t-\r ])|SPACE+"
               .replace("LETTER", r"[^\x00-@\[-`{-\x7f]").replace("SPACE", r"[\t-\r ]")
               .replace("SIGN", r"[\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f]"))
    # What is encoded at once: at most 2^18 characters, up to a line end where there is one. tiktoken's stack
    # overflows at a million spaces.
    CHUNK = r"(?s).{1,262143}(?:\n|\Z)|.{1,262144}"

    def __init__(self, vocabulary, pattern=PATTERN):
        """vocabulary: list[bytes], the text of each id in merge order, all 256 single bytes among them."""
        self.vocabulary, self.pattern = vocabulary, pattern
        self._tiktoken = tiktoken.Encoding("nanogap", pat_str=pattern, special_tokens={},
                                           mergeable_ranks={text: i for i, text in enumerate(vocabulary)})
        # <EOT> takes the id after the last merge, as GPT-2's <|endoftext|> does, so that the embeddings of
        # GPT-2's published weights keep their rows.
        n = len(vocabulary)
        self.specials = self.eot, self.pre, self.suf, self.mid, self.mask = [*range(n, n + 5)]
        self.names = dict(zip(self.specials, ("<EOT>", "<PRE>", "<SUF>", "<MID>", "<MASK>")))
        self.n_vocab = n + 5
        self.dtype = np.dtype("<u2" if self.n_vocab <= 2**16 else "<u4")  # of a stream on disk
        self.n_bytes = np.array([len(text) for text in vocabulary] + [0] * 5)

    @classmethod
    def bytes(cls):
        """One id per byte: nothing to learn; sequences are about three times as long as with BPE."""
        return cls([bytes([i]) for i in range(256)])

    @classmethod
    def train(cls, texts, n):
        """Learns a vocabulary of n ids (256 bytes and the special ids included) from an iterable of texts.

        n_vocab is below n if no pair is left to merge. Raises ValueError for an n out of range."""
        if not 261 <= n <= 10**6:
            raise ValueError(f"--vocab-size {n}: expected 261 to {10**6}")
        counts, n_read = Counter(), 0
        for text in texts:
            counts.update(piece[:1000] for piece in re.findall(cls.PATTERN, text))
            n_read += len(text)
            if n_read > 2**28:  # more text would change few merges, and its rare words would fill memory
                break
        counts = {piece.encode(): count for piece, count in counts.items()}
        return cls(learn_bpe(counts, n - 5))

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
        return [i for part in re.findall(self.CHUNK, text) for i in self._tiktoken.encode_ordinary(part)]

    def encode_batch(self, texts):
        """list[str], each at most a CHUNK -> list[list[int]], in parallel."""
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode_bytes(self, ids):
        return self._tiktoken.decode_bytes([i for i in ids if i < self.eot])

    def decode(self, ids, errors="replace"):
        """errors: what becomes of a character whose bytes are not all there, as in bytes.decode."""
        return self._tiktoken.decode([i for i in ids if i < self.eot], errors)


def learn_bpe(counts, n):
    """Byte-pair encoding (Sennrich et al., 2016) -> list[bytes], n entries, of which the first 256 are the
    single bytes; fewer where no pair is left.

    counts: dict[bytes, int], each distinct piece of the corpus with its frequency. Each step merges the most
    frequent pair of neighbours (ties: the smaller ids), from left to right in each piece, into one id, whose
    entry is the joined bytes of both. A pair counts wherever it stands, also overlapping: twice in b"aaa"."""
    words, frequency = [list(piece) for piece in counts], list(counts.values())
    vocabulary = [bytes([i]) for i in range(256)]
    pair_count, words_with = Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_count[pair] += frequency[w]
            words_with[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_count.items()]  # the most frequent pair comes first
    heapq.heapify(heap)
    while len(vocabulary) < n and heap:
        count, (a, b) = heapq.heappop(heap)
        if -count != pair_count[a, b] or count == 0:  # outdated: the pair's count has changed since
            continue
        new, change = len(vocabulary), Counter()
        vocabulary.append(vocabulary[a] + vocabulary[b])
        for w in words_with.pop((a, b)):
            word, i = words[w], 0
            for pair in pairwise(word):
                change[pair] -= frequency[w]
            while i < len(word) - 1:
                if word[i] == a and word[i + 1] == b:
                    word[i:i + 2] = [new]
                i += 1
            for pair in pairwise(word):
                change[pair] += frequency[w]
                words_with[pair].add(w)
        for pair in change:
            pair_count[pair] += change[pair]
            heapq.heappush(heap, (-pair_count[pair], pair))
    return vocabulary


# Token stream

def is_held_out(key):
    """True for 5% of documents, by a hash of their text (or of the key in its place)."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def hold_out(documents, whole=True):
    """(text, key) of documents -> yields (text, is it held out). No text changes sides; copies share a side.

    whole=False, for a corpus whose documents are all on one side, such as a single book: the last 5% of each
    document are held out instead, from a line start if one is near."""
    for text, key in documents:
        if whole:
            yield text, is_held_out(key)
        else:
            end = int(len(text) * (1 - HELD_OUT))
            end = text.rfind("\n", end * 9 // 10, end) + 1 or end
            yield text[:end], False
            yield text[end:], True


def prepare(source="stdlib", tokenizer="bpe", vocab_size=2048, cache_dir="cache", tok=None):
    """Documents -> (Tokenizer, training stream, held-out stream, name): two memory-mapped arrays of ids, and
    the name of the cache folder, which is a hash of the documents and of the settings.

    tokenizer: bpe, bytes or gpt2; or give a Tokenizer as tok. Documents are read from the disk again for each
    pass over them: memory does not grow with the corpus. Raises ValueError or OSError."""
    files = source_files(source, cache_dir)
    settings = tok.to_dict() if tok else [tokenizer, vocab_size, Tokenizer.PATTERN]
    digest, sides = hashlib.sha256(json.dumps(settings).encode()), set()
    for text, key in read_files(files):
        digest.update(text.encode() + b"\0" + (key.encode() if key != text else b""))
        sides.add(is_held_out(key))
    if not sides:
        raise ValueError(f"--data {source}: no text in it")
    name = digest.hexdigest()[:16]
    folder = Path(cache_dir, name)

    def texts(held_out, desc):
        return (text for text, is_out in hold_out(read_files(files, desc), len(sides) == 2)
                if is_out == held_out and text)

    if not folder.is_dir():
        tok = tok or make_tokenizer(tokenizer, vocab_size, texts(False, "learning the vocabulary"))
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache_dir))
        try:
            (temporary / "tokenizer.json").write_text(json.dumps(tok.to_dict()))
            write_stream(temporary / "train", tok, texts(False, "encoding"))
            write_stream(temporary / "held_out", tok, texts(True, "encoding"))
            os.rename(temporary, folder)  # the cache is there whole or not at all
        except OSError:
            if not folder.is_dir():  # else another run was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    tok = Tokenizer.from_dict(json.loads((folder / "tokenizer.json").read_text()))
    streams = [np.memmap(path, tok.dtype, "r") if path.stat().st_size else np.zeros(0, tok.dtype)
               for path in (folder / "train", folder / "held_out")]
    return tok, *streams, name


def make_tokenizer(name, vocab_size, texts):
    """name: bpe (learned from the texts), bytes or gpt2 -> Tokenizer."""
    return {"bpe": lambda: Tokenizer.train(texts, vocab_size), "bytes": Tokenizer.bytes,
            "gpt2": Tokenizer.gpt2}[name]()


def write_stream(path, tok, texts):
    """Writes doc <EOT> doc <EOT> ... into a file of 16-bit ids, or 32-bit ones for a large vocabulary."""
    parts = (part for text in texts for part in [*re.findall(tok.CHUNK, text), None])  # None: its end
    with open(path, "wb") as f:
        while block := list(islice(parts, 64)):
            encoded = iter(tok.encode_batch([part for part in block if part]))
            ids = [i for part in block for i in (next(encoded) if part else [tok.eot])]
            np.array(ids, tok.dtype).tofile(f)


# Windows, rows, batches

class Batches:
    """batch(number) -> (inputs, targets), int64 arrays (B, T), a pure function of (seed, number).

    objective(window, tok, rng) turns a window, ids (T+1,), into a row. Batch number holds rows number * B to
    number * B + B - 1, counted over the whole run. An epoch has (len(stream) - T) // T windows; its phase in
    [0, T), the offset of its first window, and its permutation of the windows are drawn from (seed, epoch).
    Raises ValueError if the stream is shorter than 2T tokens."""

    def __init__(self, stream, objective, tok, block_size, batch_size, seed):
        self.stream, self.objective, self.tok = stream, objective, tok
        self.T, self.B, self.seed = block_size, batch_size, seed
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
        bytes_per_token = self.tok.n_bytes[self.stream[:2**20]].mean()
        return f"{len(self.stream):,} tokens to train on, {bytes_per_token:.2f} bytes per token"

    def row(self, index):
        """The row with this number, counted over the whole run: inputs (T,), targets (T,)."""
        phase, order = self.epoch(index // self.n_windows)
        start = phase + order[index % self.n_windows] * self.T
        window = np.asarray(self.stream[start:start + self.T + 1], np.int64)
        return self.objective(window, self.tok, np.random.default_rng([self.seed, index, 1]))

    def batch(self, number):
        rows = map(self.row, range(number * self.B, (number + 1) * self.B))
        return tuple(np.stack(part) for part in zip(*rows))


def text_rows(stream, T, n):
    """Up to n rows of left-to-right text, (inputs, targets), each (T,) int64: evenly spaced windows, the same
    for every model of context T."""
    n = min((len(stream) - 1) // T, max(1, n))
    starts = np.linspace(0, len(stream) - 1 - T, max(0, n)).astype(int)
    windows = (stream[start:start + T + 1] for start in starts)
    return ((window[:-1].astype(np.int64), window[1:].astype(np.int64)) for window in windows)
