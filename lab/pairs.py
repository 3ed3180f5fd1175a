"""Fine-tuning data: from pairs of texts to batches.

    records -> pairs (prompt, answer) -> ids -> rows of whole examples -> batch

    pairs   of one of the forms in read_pairs, or the standard library's functions: signature and docstring -> body
    row     examples (objectives.answer_example) one behind the other, as many as fit, then padding without loss:

            prompt <MID> answer <EOT> prompt <MID> answer <EOT> <EOT> <EOT>          no example is cut in two
"""
import ast
import textwrap
from collections import defaultdict
from functools import lru_cache

import numpy as np

from data import Batches, is_held_out, iter_documents, make_tokenizer, read_records, source_files, split_lines
from objectives import example_length, fit_pair


def prepare_pairs(source="functions", tokenizer="bpe", vocab_size=2048, tok=None):
    """source -> (Tokenizer, training pairs, held-out pairs), lists of (prompt, answer) as lists of ids.

    source: functions, or a file, folder or glob of .json[l][.gz]. tok: an existing Tokenizer in place of a new one. 5% are
    held out by a hash of the pair; of functions by a hash of the file they stand in, so that a model trained on the
    standard library has not read them. Raises ValueError or OSError with a sentence for the user."""
    if source in ("stdlib", "prose", "site-packages"):
        raise ValueError(f"--data {source}: plain text; fine-tuning needs functions, or a .jsonl or .json of pairs")
    found = function_pairs() if source == "functions" else [
        (pair, "\0".join(pair)) for path in source_files(source) for pair in read_pairs(path)]
    held_out = {text: is_held_out(text) for text in {text for _, text in found}}
    sides = {held: [pair for pair, text in found if held_out[text] == held] for held in (False, True)}
    if not sides[False]:
        raise ValueError(f"--data {source}: no pairs to train on in it")
    tok = tok or make_tokenizer(tokenizer, vocab_size, (text for pair in sides[False] for text in pair))
    encoded = [list(zip(*(tok.encode_batch(list(texts)) for texts in zip(*sides[held])))) for held in (False, True)]
    return tok, *encoded


@lru_cache(maxsize=1)
def function_pairs():
    """The functions of the standard library that have a docstring: [((prompt, answer), text of the file)]."""
    found = []
    for text in iter_documents("stdlib"):
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, RecursionError):  # a file of another Python
            continue
        lines = split_lines(text)
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) and node.body[1:]:
                code = split_lines(textwrap.dedent("".join(lines[node.lineno - 1:node.end_lineno])))
                n = node.body[0].end_lineno - node.lineno + 1
                found.append((("".join(code[:n]), "".join(code[n:])), text))
    return found


def read_pairs(path):
    """The pairs of a .jsonl or .json (one list), or either .gz, whose records have one of these forms:

        {"prompt", "answer"}
        {"instruction", "output"} and perhaps "input"                 Alpaca: prompt = instruction, blank line, input
        {"conversations": [{"from", "value"}, ...]}                   ShareGPT: a pair for each answer; what was said
                                                                      before, with blank lines between, is its prompt
    Raises ValueError with the number of the line (in a .json, of the record)."""
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        raise ValueError(f"--data {path}: is no .jsonl or .json of pairs, which fine-tuning needs (or functions)")
    for place, record in read_records(path, "--data"):
        try:
            pairs = pairs_of(record)
            yield from (pair for pair in pairs if pair[1].strip())
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"--data {path}: {place} is no pair: expected texts as prompt and answer, instruction and "
                             "output, or conversations of from and value") from None


def pairs_of(record):
    if "prompt" in record:
        return [(record["prompt"] + "", record["answer"] + "")]
    if "instruction" in record:
        return [("\n\n".join(filter(None, (record["instruction"], record.get("input")))), record["output"] + "")]
    turns = record["conversations"]
    return [("\n\n".join(turn["value"] for turn in turns[:i]), turn["value"] + "")
            for i, turn in enumerate(turns) if i and turn["from"] not in ("human", "user", "system")]


class PairBatches(Batches):
    """data.Batches of pairs: batch(step) -> (inputs, targets), int64 arrays (B, T), a pure function of (seed, step, rank).

    Examples are packed into rows once; each epoch draws an order of the rows, and each row its masks, afresh. n_windows
    is the number of rows in an epoch, n_cut that of the pairs that were too long for a row."""

    def __init__(self, pairs, objective, tok, block_size, batch_size, seed, rank=0, world=1):
        self.objective, self.tok, self.T, self.B = objective, tok, block_size, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.pairs = [fit_pair(*pair, objective, block_size) for pair in pairs]
        self.n_cut = sum(before != after for before, after in zip(pairs, self.pairs))
        self.rows = pack([example_length(*pair, objective, block_size) for pair in self.pairs], block_size)
        self.n_windows = len(self.rows)
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch, 0]).permutation(self.n_windows))

    def describe(self):
        cut = f", {self.n_cut:,} of them cut to fit" if self.n_cut else ""
        return f"{len(self.pairs):,} pairs to train on in {self.n_windows:,} rows{cut}"

    def row(self, index):
        row = self.rows[self._epoch(index // self.n_windows)[index % self.n_windows]]
        return self.objective.answer_row([self.pairs[i] for i in row], self.T, self.tok,
                                         np.random.default_rng([self.seed, index, 1]))


def pack(lengths, T):
    """Lengths of examples, each at most T -> rows, lists of their numbers, that fill at most T (best fit, the longest
    first: each goes where it leaves the least room)."""
    rows, with_room = [], defaultdict(list)  # with_room: {tokens left: [row]}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], T + 1) if with_room[room]), None)
        if room is None:
            row, room = [], T
            rows.append(row)
        else:
            row = with_room[room].pop()
        row.append(i)
        with_room[room - lengths[i]].append(row)
    return rows
