"""Fine-tuning data: from pairs of texts to batches.

    records -> pairs (prompt, answer) -> examples -> rows of whole examples -> batch

    pairs     in a form of read_pairs, or of functions, the standard library's or the corpus programs':
              signature and docstring -> body
    example   ids of  prompt <MID> answer <EOT>,  at most half of the context: a masked copy fits behind it
    row       what the objective makes of whole examples, one behind the other, then padding:

              inputs    p p <MID> a a a <EOT>  p p p <MID> a a <EOT>  <EOT> <EOT>         T of them
              targets   . . a     a a <EOT> .  . . . a     a <EOT> .  .     .             . is IGNORE
"""
import ast
import hashlib
import json
import textwrap
from collections import defaultdict

import numpy as np

from data import (Batches, is_held_out, kind_of, lines_of, load_documents, make_tokenizer, newlines,
                  read_files, read_records, source_files)
from lab.corpora import body_start
from objectives import IGNORE, sft


def prepare_pairs(source, tokenizer, vocab_size, tok, objective, block_size, batch_size, seed,
                  cache_dir="cache"):
    """-> (Tokenizer, PairBatches, held_out_rows, a name of the pairs by their content).

    source: functions, programs, or a file, folder or glob of .json[l][.gz]. tok: None, or a Tokenizer in
    place of a new one. objective: sft or meap_sft with its knobs bound. held_out_rows(n): at most n rows,
    (inputs, targets) of T ids each, laid out by sft whatever the objective, so that one figure compares both.
    Raises ValueError or OSError."""
    training, held_out = load_pairs(source, cache_dir)
    name = hashlib.sha256(json.dumps([training, held_out]).encode()).hexdigest()[:16]
    tok = tok or make_tokenizer(tokenizer, vocab_size, (text for pair in training for text in pair))
    batches = PairBatches(training, objective, tok, block_size, batch_size, seed)
    examples = fit_examples(held_out, tok, block_size)
    rows = pack([len(ids) for ids in examples], block_size)

    def held_out_rows(n):
        chosen = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)
        return [lay_out([examples[i] for i in rows[k]], sft, tok, block_size, None) for k in chosen]

    return tok, batches, held_out_rows, name


def load_pairs(source, cache_dir="cache"):
    """source -> (training pairs, held-out pairs), lists of (prompt, answer) as texts. ValueError or OSError.

    5% are held out by a hash of the pair; of functions by a hash of the file they stand in, so that a model
    trained on the standard library has not read them."""
    if source == "functions":
        with_key = ((pair, text) for text in load_documents("stdlib") for pair in function_pairs(text))
    elif source.partition(":")[0] == "programs":
        documents = read_files(source_files(source, cache_dir))
        with_key = (((text[:(start := body_start(text))], text[start:]), key) for text, key in documents)
    else:
        with_key = ((pair, "\0".join(pair)) for path in source_files(source) for pair in read_pairs(path))
    training, held_out = [], []
    for pair, key in with_key:
        (held_out if is_held_out(key) else training).append(pair)
    if not training:
        raise ValueError(f"--data {source}: no pairs to train on in it")
    return training, held_out


def function_pairs(text):
    """Yields (prompt, answer) of each function of a Python file that has a docstring."""
    try:
        nodes = ast.walk(ast.parse(text))
    except (SyntaxError, RecursionError):  # a file of another Python
        return
    lines = lines_of(text)
    for node in nodes:
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and ast.get_docstring(node) and node.body[1:]:
            code = lines_of(textwrap.dedent("".join(lines[node.lineno - 1:node.end_lineno])))
            n = node.body[0].end_lineno - node.lineno + 1
            yield "".join(code[:n]), "".join(code[n:])


def read_pairs(path):
    """The pairs of a .jsonl or .json (one list), or either .gz, whose records have one of these forms:

        {"prompt", "answer"}
        {"instruction", "output"} and perhaps "input"     Alpaca: prompt = instruction, blank line, input
        {"conversations": [{"from", "value"}, ...]}       ShareGPT: a pair for each answer; its prompt is the
                                                          turns before it, with blank lines between
    Raises ValueError with the number of the line (in a .json, of the record)."""
    if not kind_of(path):
        raise ValueError(f"--data {path}: is no .jsonl or .json of pairs; expected one, or functions")
    for place, record in read_records(path, "--data"):
        try:
            pairs = [(newlines(prompt), newlines(answer)) for prompt, answer in pairs_of(record)]
        except (KeyError, TypeError, AttributeError):  # a field is missing, or is no text
            raise ValueError(f"--data {path}: {place} is no pair: expected texts as prompt and answer, "
                             "instruction and output, or conversations of from and value") from None
        yield from ((prompt, answer) for prompt, answer in pairs if answer.strip())


def pairs_of(record):
    if "prompt" in record:
        return [(record["prompt"], record["answer"])]
    if "instruction" in record:
        return [("\n\n".join(filter(None, (record["instruction"], record.get("input")))), record["output"])]
    turns = record["conversations"]
    return [("\n\n".join(turn["value"] for turn in turns[:i]), turn["value"])
            for i, turn in enumerate(turns) if i and turn["from"] not in ("human", "user", "system")]


def fit_examples(pairs, tok, block_size):
    """(prompt, answer), texts -> examples of at most block_size // 2 ids. A longer prompt loses its start; a
    pair whose answer alone is longer is left out."""
    examples = []
    for prompt, answer in pairs:
        prompt, answer = tok.encode(prompt), tok.encode(answer)
        room = block_size // 2 - len(answer) - 2  # for the prompt, beside <MID> and <EOT>
        if room >= 0:
            examples.append(np.array([*prompt[max(0, len(prompt) - room):], tok.mid, *answer, tok.eot]))
    return examples


def lay_out(examples, objective, tok, T, rng):
    """Examples -> a row, inputs (T,) and targets (T,). The <EOT> that ends an example is the input that
    separates it from the next one, which is not to be predicted from it."""
    inputs, targets, start = np.full(T, tok.eot), np.full(T, IGNORE), 0
    for ids in examples:
        x, y = objective(ids, tok, rng)
        inputs[start:start + len(x)], targets[start:start + len(x)] = x, y
        start += len(x) + 1
    return inputs, targets


def pack(lengths, T):
    """Lengths of examples, each at most T -> rows, lists of their numbers, that fill at most T (best fit, the
    longest first: each goes where it leaves the least room)."""
    rows, with_room = [], defaultdict(list)  # with_room: {tokens left: [row]}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], T + 1) if with_room[room]), T)
        if not with_room[room]:
            rows.append([])
            with_room[room].append(rows[-1])
        row = with_room[room].pop()
        row.append(i)
        with_room[room - lengths[i]].append(row)
    return rows


class PairBatches(Batches):
    """data.Batches of pairs of texts: batch(number) -> (inputs, targets), int64 arrays (B, T), a pure
    function of (seed, number). Examples are packed into rows once; each epoch draws an order of the rows, and
    each row its masks, afresh. stream: the examples. n_windows: rows in an epoch."""

    def __init__(self, pairs, objective, tok, block_size, batch_size, seed):
        self.objective, self.tok, self.seed = objective, tok, seed
        self.T, self.B = block_size, batch_size
        self.stream = fit_examples(pairs, tok, block_size)
        if not self.stream:
            raise ValueError(f"--block-size {block_size}: expected one whose half holds an answer")
        self.n_left_out = len(pairs) - len(self.stream)
        # the masks differ from draw to draw, the length does not; 1 is for the separator
        lengths = [len(objective(ids, tok, np.random.default_rng(0))[0]) + 1 for ids in self.stream]
        self.rows = pack(lengths, block_size)
        self.n_windows = len(self.rows)
        self.n_copied = sum(length > len(ids) + 1 for length, ids in zip(lengths, self.stream))

    def describe(self):
        return (f"{len(self.stream):,} pairs to train on in {self.n_windows:,} rows, {self.n_copied:,} "
                f"with a masked copy; {self.n_left_out:,} do not fit half a row")

    def row(self, index):
        """Row number index of the run, counted over the whole run."""
        order = np.random.default_rng([self.seed, index // self.n_windows, 0]).permutation(self.n_windows)
        rng = np.random.default_rng([self.seed, index, 1])
        examples = [self.stream[i] for i in self.rows[order[index % self.n_windows]]]
        return lay_out(examples, self.objective, self.tok, self.T, rng)
