"""What a trained model can do, as numbers: every claim of the two papers that this repository can measure.

    python evaluate.py --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python evaluate.py --ckpt out/fim_spm --tasks stopping infill --run-tests      # runs what the model wrote

Each task is a function task(model, tok, ...) -> {name: figure}; a figure is {"mean", "se", "n", "unit"} (see figure).
Two functions do all the work with the model: score (how likely is this text after that one) and continuations (what
does the model say next). Tasks are made from held-out text and a seed, so every checkpoint gets the same ones.
"""
import ast
import difflib
import gzip
import json
import math
import os
import sys
import sysconfig
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sandbox
from data import EVALUATION_MODULES, prepare, single_line_holes
from objectives import IGNORE, ORDERS, check_choice, check_range, fim_prompt, split_middle
from sample import (Parser, best_first, collect, generate, infill_prompt, load_model, newest_run, one_line_errors,
                    pick_device)


def figure(values, weights=None, unit="%"):
    """A mean and its standard error: sum(values) / sum(weights), weights 1 by default.

    The error is that of a ratio estimator, sqrt(n / (n-1) sum (v - mean w)^2) / sum(w), which for weights 1 is the usual
    std / sqrt(n). Things that belong together (ten holes of one function) must come in as one value with its weight.
    unit: "%" for shares (kept as 0 to 1), or what the table is to print."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, total = len(values), weights.sum()
    if not total:
        return {"mean": None, "se": None, "n": n, "unit": unit}
    mean = values.sum() / total
    se = float(np.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / total) if n > 1 else None
    return {"mean": float(mean), "se": se, "n": n, "unit": unit}


class Score(NamedTuple):
    """Arrays (n,), an entry for each token of a continuation, given all before it."""
    log_p: np.ndarray      # its log-probability, nats
    likeliest: np.ndarray  # the id the model would have said; greedy decoding gives the text where all of them agree
    watched: np.ndarray    # the log-probability of the watched id, nats


@torch.no_grad()
def score(model, pairs, watch=0, desc=None):
    """(prompt, continuation) pairs, lists of ids of any lengths -> a Score for each pair.

    Rows of like length share a batch, padded on the right (causal attention: no token sees the padding), and logits
    are looked at only where they predict a token of a continuation. A prompt is never empty; what does not fit the
    context is cut off its left. Raises ValueError where a continuation alone does not fit."""
    block_size, device = model.config.block_size, next(model.parameters()).device
    rows = [(list(prompt)[-max(1, block_size + 1 - len(continuation)):], list(continuation)) for prompt, continuation in pairs]
    for prompt, continuation in rows:
        if len(prompt) + len(continuation) > block_size + 1:
            raise ValueError(f"{len(continuation)} tokens to score do not fit the model's context of {block_size}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    most = min(8192, 2**28 // model.config.vocab_size)  # tokens in a batch: what fits a CPU's cache, and 1 GB of logits
    scores = [None] * len(rows)
    with tqdm(total=len(rows), desc=desc, unit="text", leave=False, disable=desc is None) as bar:
        while order:
            T = sum(map(len, rows[order[0]])) - 1
            batch, order = order[:max(1, most // T)], order[max(1, most // T):]
            idx, targets = torch.zeros(len(batch), T, dtype=torch.long), torch.full((len(batch), T), IGNORE)
            for b, i in enumerate(batch):
                prompt, continuation = rows[i]
                end = len(prompt) + len(continuation) - 1
                idx[b, :end] = torch.tensor((prompt + continuation)[:-1])
                targets[b, end - len(continuation):end] = torch.tensor(continuation, dtype=torch.long)
            logits = model(idx.to(device))[0]                                   # (B, T, V)
            wanted = (targets != IGNORE).to(device)
            log_p = F.log_softmax(logits[wanted].float(), dim=-1)               # (N, V), row after row
            columns = (log_p.gather(1, targets.to(device)[wanted][:, None])[:, 0], log_p.argmax(-1), log_p[:, watch])
            lengths = [len(rows[i][1]) for i in batch]
            for i, *parts in zip(batch, *(column.cpu().split(lengths) for column in columns)):
                scores[i] = Score(*(part.numpy().astype(np.float64) for part in parts))
            bar.update(len(batch))
    return scores


@torch.no_grad()
def continuations(model, tok, prompts, max_new_tokens, n=1, temperature=0.0, seed=1, desc=None):
    """What the model says after each prompt: per prompt a list of n (ids, mean log-probability), as sample.collect has it.

    Generation ends at <EOT>. Prompts of equal length share a batch, and the n samples of a prompt one pass over it."""
    device = next(model.parameters()).device
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    size = max(1, (96 if device.type == "cpu" else 1024) // n)  # the keys and values of 96 rows are what a CPU likes best
    batches = [same[start:start + size] for same in by_length.values() for start in range(0, len(same), size)]
    out = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, unit="prompt", leave=False, disable=desc is None) as bar:
        for number, batch in enumerate(batches):
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            samples = collect(generate(model, idx, max_new_tokens, temperature, stop=tok.eot, seed=seed + number, n=n), tok)
            for b, i in enumerate(batch):
                out[i] = samples[b * n:(b + 1) * n]
            bar.update(len(batch))
    return out


def n_bytes(tok, ids):
    return int(tok.n_bytes[np.asarray(ids, np.int64)].sum())


def bits(log_p):
    return -log_p.sum() / math.log(2)


def bpb(model, tok, stream, n_windows=800):
    """Bits per byte of held-out left-to-right text: the figure that compares objectives and vocabularies (FIM, claim 1).

    Evenly spaced windows of block_size tokens, as in train.bits_per_byte; <EOT>, which is no text, is left out."""
    T = model.config.block_size
    starts = np.linspace(0, len(stream) - 1 - T, min(n_windows, (len(stream) - 1) // T)).astype(int) if len(stream) > T else []
    windows = [stream[start:start + T + 1].tolist() for start in starts]
    scores = score(model, [(ids[:1], ids[1:]) for ids in windows], desc="bpb")
    return {"left to right": figure([bits(s.log_p[tok.n_bytes[ids[1:]] > 0]) for s, ids in zip(scores, windows)],
                                    [n_bytes(tok, ids[1:]) for ids in windows], "bits/byte")}


def cut_texts(stream, tok, n, n_tokens, seed):
    """n held-out texts of about n_tokens tokens, cut at two uniform characters: (prefix, middle, suffix) as ids, together
    at most n_tokens, the middle never empty."""
    rng, cuts = np.random.default_rng(seed), []
    for _ in range(50 * n if len(stream) > n_tokens else 0):
        start = rng.integers(len(stream) - n_tokens)
        ids = stream[start:start + n_tokens].tolist()
        parts = [tok.encode(part) for part in split_middle(tok.decode(ids[tok.whole_characters(ids)]), rng)]
        surplus = max(0, sum(map(len, parts)) - n_tokens)  # a cut token may encode longer
        if tok.eot not in ids and parts[1] and len(parts[2]) >= surplus:
            cuts.append((parts[0], parts[1], parts[2][:len(parts[2]) - surplus]))
        if len(cuts) == n:
            break
    return cuts


def middle_bpb(model, tok, stream, orders=ORDERS, spm_layout="swapped", limit=200, seed=1):
    """Bits per byte of a middle that is given its prefix alone, or prefix and suffix; and of the whole text, left to right
    or laid out as a FIM example, whose sentinels cost bits, too (FIM, section 4.1 and appendix; claim 7)."""
    cuts = cut_texts(stream, tok, limit, model.config.block_size - 4, seed)
    middles = [n_bytes(tok, middle) for _, middle, _ in cuts]
    texts = [n_bytes(tok, prefix + middle + suffix) for prefix, middle, suffix in cuts]
    figures = {}
    layouts = {"prefix alone": [prefix for prefix, _, _ in cuts]} | {
        order: [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in cuts] for order in orders}
    for name, prompts in layouts.items():
        scores = score(model, [([tok.eot], prompt + cut[1]) for prompt, cut in zip(prompts, cuts)], desc=f"middle_bpb {name}")
        figures[f"middle, {name}"] = figure([bits(s.log_p[-len(cut[1]):]) for s, cut in zip(scores, cuts)], middles, "bits/byte")
        if name in orders:
            figures[f"text, {name}"] = figure([bits(s.log_p) for s in scores], texts, "bits/byte")
    plain = score(model, [([tok.eot], tok.encode(tok.decode(p + m + s))) for p, m, s in cuts], desc="middle_bpb text")
    return figures | {"text, left to right": figure([bits(s.log_p) for s in plain], texts, "bits/byte")}


def stopping(model, tok, stream, order="spm", spm_layout="swapped", limit=200, n=8, seed=1):
    """Whether the model knows when a middle is done: single-line holes in held-out text, filled greedily and, at
    temperature 0.8, n times with the best kept (those that ended in <EOT> first, then the likeliest per token).

    120 tokens of prefix, 80 of suffix, at most 40 to fill (in proportion, where the context is shorter); a model that
    has not stopped after 48 has not found the end."""
    scale = min(1, (model.config.block_size - 4) / 248)
    holes = single_line_holes(stream, tok, limit, seed, *(int(scale * size) for size in (120, 80, 40)))
    prompts = [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in holes]
    truths = [middle + [tok.eot] for _, middle, _ in holes]
    ends = score(model, list(zip(prompts, truths)), tok.eot, "stopping: P(<EOT>)")
    most = int(scale * 48)
    greedy = [samples[0] for samples in continuations(model, tok, prompts, most, desc="stopping: greedy")]
    best = [max(samples, key=lambda sample: (sample[0][-1] == tok.eot, sample[1]))
            for samples in continuations(model, tok, prompts, most, n, 0.8, seed, f"stopping: best of {n}")]
    figures = {}
    for name, samples in (("greedy", greedy), (f"best of {n}", best)):
        figures[f"{name} ends in <EOT>"] = figure([ids[-1] == tok.eot for ids, _ in samples])
        figures[f"{name} exact match"] = figure([
            ids[-1] == tok.eot and tok.decode(ids) == tok.decode(truth) for (ids, _), truth in zip(samples, truths)])
    elsewhere = [np.exp(s.watched[:-1]) for s in ends]
    return figures | {
        "P(<EOT>) at the true end": figure([math.exp(s.watched[-1]) for s in ends]),
        "P(<EOT>) elsewhere": figure([p.sum() for p in elsewhere], [len(p) for p in elsewhere]),
        "<EOT> likeliest at the true end": figure([s.likeliest[-1] == tok.eot for s in ends])}


class Problem(NamedTuple):
    """An infilling problem as the public benchmarks have them: text[start:end] is the hole, the canonical solution."""
    task_id: str           # kind/module/function/number
    text: str
    start: int
    end: int
    test: str = ""         # Python to run after the text
    module: str = "__main__"
    docstrings: dict = {}  # {name: docstring}, whose examples must then pass

    def passes(self, completion):
        """Whether the tests pass with the completion in the hole. Runs it, in the sandbox: a model wrote it."""
        program = self.text[:self.start] + completion + self.text[self.end:] + self.test
        return sandbox.run(program, self.module, self.docstrings).ok


def functions_with_doctests():
    """Yields (module, source, name, docstring, start, end, ran) for the functions and methods of data.EVALUATION_MODULES
    whose docstrings hold examples that pass: where in the source the body behind the docstring stands, and (start, end)
    of each of its lines that the examples run. Runs each module once, in the sandbox: Python's own code, unchanged."""
    def with_examples(node, prefix=""):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from with_examples(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef) and len(child.body) > 1 and ">>>" in (ast.get_docstring(child) or ""):
                yield prefix + child.name, child

    for file in tqdm(EVALUATION_MODULES, desc="infill: checking doctests", unit="module", leave=False):
        text = Path(sysconfig.get_paths()["stdlib"], f"{file}.py").read_text("utf-8")
        module, functions = file.removesuffix("/__init__"), dict(with_examples(ast.parse(text)))
        docstrings = {name: node.body[0].value.value for name, node in functions.items()}
        outcome = sandbox.run(text, module, docstrings, trace=True, timeout=120)
        starts = list(accumulate(map(len, text.splitlines(keepends=True)), initial=0))
        for name, node in functions.items():
            if outcome.passed.get(name):
                first, last = node.body[1].lineno, node.end_lineno
                ran = [(starts[line - 1], starts[line]) for line in outcome.lines[name] if first <= line <= last]
                yield module, text, name, docstrings[name], starts[first - 1], starts[last], ran


def stdlib_problems(limit, seed, most=160):
    """Problems made of the standard library's functions with doctests, at most limit of each kind, as list[Problem].

    SingleLine: a line. MultiLine: two lines or more. RandomSpan: between two uniform characters of the body, up to ten a
    function; RandomSpanLight: the first of them (FIM, section 5.1; claim 8). A hole has at most `most` characters, so that
    a small context holds it, and starts in a line that the examples run, since they cannot judge another."""
    rng, holes = np.random.default_rng(seed), defaultdict(list)
    for module, text, name, docstring, start, end, ran in functions_with_doctests():
        ends = [start + n for n in accumulate(map(len, text[start:end].splitlines(keepends=True)))]
        spans = {"SingleLine": ran, "MultiLine": [(a, e) for a, b in ran for e in ends if e > b],
                 "RandomSpan": np.sort(rng.integers(start, end + 1, (500, 2))).tolist()}
        for kind, places in spans.items():
            fitting = [(a, b) for a, b in places if 0 < b - a <= most and text[a:b].strip() and
                       any(line <= a < line_end for line, line_end in ran)]
            for number, (a, b) in enumerate(fitting[:10] if kind == "RandomSpan" else fitting):
                problem = Problem(f"{kind}Infilling/{module}/{name}/{number}", text, a, b, "", module, {name: docstring})
                holes[kind].append(problem)
                if kind == "RandomSpan" and number == 0:
                    holes["RandomSpanLight"].append(problem._replace(task_id=f"{kind}InfillingLight/{module}/{name}/0"))
    return [problems[i] for problems in holes.values() for i in rng.permutation(len(problems))[:limit]]


def read_jsonl(path, flag, **types):
    """Yields (line number, record) of a .jsonl or .jsonl.gz whose records have the fields that types names.

    Raises ValueError with the line number where that is not so, OSError where there is no such file."""
    number = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    record = json.loads(line)
                    for name, kind in types.items():
                        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                            raise TypeError(f'no field "{name}" of type {kind.__name__}')
                    yield number, record
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: line {number} is not JSON ({error})") from None
    except TypeError as error:
        raise ValueError(f"{flag} {path}: line {number} has {error}") from None
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{flag} {path}: damaged after line {number} ({error})") from None


def read_problems(path):
    """A file of the public HumanEval infilling benchmarks, .jsonl or .jsonl.gz, as list[Problem]."""
    fields = ("task_id", "prompt", "suffix", "canonical_solution", "test", "entry_point")
    return [Problem(r["task_id"], r["prompt"] + r["canonical_solution"] + r["suffix"], len(r["prompt"]),
                    len(r["prompt"] + r["canonical_solution"]), f"\n\n{r['test']}\ncheck({r['entry_point']})\n")
            for _, r in read_jsonl(path, "--problems", **dict.fromkeys(fields, str))]


def pass_at_k(n, c, k):
    """The chance that of k draws out of n samples, of which c pass, one passes: unbiased (Chen et al., 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def infill(model, tok, problems, orders=("spm",), spm_layout="swapped", n=1, temperature=0.0, seed=1, run_tests=False,
           samples=None):
    """Infilling benchmarks: exact match, edit similarity (difflib's ratio), the share that ended in <EOT> and, with
    run_tests, pass@k over n samples (1, 10, 100, as far as n goes). Errors treat the holes of one function as one value.

    Completions of at most a quarter of the context; one that did not end is cut where it begins to repeat the suffix.
    samples: a list that gets {"task_id", "completion", "order"} for each completion, for the benchmarks' own harness."""
    figures, reach = {}, 16 * model.config.block_size  # characters: many more than the context holds
    most = model.config.block_size // 4
    around = [(p.text[max(0, p.start - reach):p.start], p.text[p.end:p.end + reach]) for p in problems]
    for order in orders:
        prompts = [tuple(infill_prompt(model, tok, *texts, most, order, spm_layout)) for texts in around]
        distinct = list(dict.fromkeys(prompts))
        said = dict(zip(distinct, continuations(model, tok, distinct, most, n, temperature, seed, f"infill {order}")))
        infills = [[best_first([s], tok, suffix)[0] for s in said[prompt]] for prompt, (_, suffix) in zip(prompts, around)]
        tests = [(p, fill.text) for p, fills in zip(problems, infills) for fill in fills]
        if samples is not None:
            samples += [{"task_id": p.task_id, "completion": text, "order": order} for p, text in tests]
        measured = {"exact match": [[fill.text == p.text[p.start:p.end] for fill in fills]
                                    for p, fills in zip(problems, infills)],
                    "edit similarity": [[difflib.SequenceMatcher(None, fill.text, p.text[p.start:p.end], False).ratio()
                                         for fill in fills] for p, fills in zip(problems, infills)],
                    "ends in <EOT>": [[fill.ended == "eot" for fill in fills] for fills in infills]}
        measured = {name: np.mean(values, axis=1) for name, values in measured.items()} if problems else {}
        if run_tests:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                passed = list(tqdm(pool.map(lambda test: test[0].passes(test[1]), tests), f"infill {order}: running tests",
                                   len(tests), unit="test", leave=False))
            counts = np.reshape(passed, (-1, n)).sum(axis=1).tolist()
            measured |= {f"pass@{k}": np.array([pass_at_k(n, c, k) for c in counts]) for k in (1, 10, 100) if k <= n}
        kinds = defaultdict(lambda: defaultdict(list))  # {kind: {function: [number of problem]}}
        for i, p in enumerate(problems):
            kinds[p.task_id.split("/")[0]]["/".join(p.task_id.split("/")[1:3])].append(i)
        for kind, functions in kinds.items():
            for name, values in measured.items():
                figures[f"{kind.replace('Infilling', '')} {order} {name}"] = figure(
                    [values[i].sum() for i in functions.values()], [len(i) for i in functions.values()])
    return figures


def invent(rng, n):
    """n distinct names and n distinct values of four digits."""
    names = set()
    while len(names) < n:
        names.add("".join(rng.choice(list(letters)) for letters in ("bdfgklmnprstvz", "aeiou") * 3))
    return sorted(names, key=lambda name: rng.random()), (rng.choice(9000, n, replace=False) + 1000).astype(str).tolist()


def hide(stream, tok, n_tokens, needles, question, rng):
    """A prompt of n_tokens ids: held-out text with the needles, {depth: line}, put in at the line ends nearest to these depths, 0
    to 1, then the question. None where there is no room for as much text again."""
    needles = {depth: tok.encode(line) for depth, line in sorted(needles.items())}
    question = tok.encode(question)
    n = n_tokens - len(question) - sum(map(len, needles.values()))
    if n < n_tokens // 3 or len(stream) <= n:
        return None
    start = rng.integers(len(stream) - n)
    text = np.asarray(stream[start:start + n], np.int64)
    places = np.array([0, *(i + 1 for i, token in enumerate(text.tolist()) if tok.decode_bytes([token]).endswith(b"\n"))])
    prompt, done = [], 0
    for depth, line in needles.items():
        place = max(done, int(places[np.abs(places - depth * n).argmin()]))
        prompt, done = prompt + text[done:place].tolist() + line, place
    return prompt + text[done:].tolist() + question


def recall(model, tok, prompts, answers, desc):
    """Whether greedy decoding gives each answer (a text), array (n,) of 0 or 1, and the bits that the answer costs, array (n,).

    One pass each: decoding would give the answer if and only if every token of it is the likeliest after the ones before."""
    pairs = [(prompt, tok.encode(answer)) for prompt, answer in zip(prompts, answers)]
    scores = score(model, pairs, desc=desc)
    right = [float((s.likeliest == answer).all()) for s, (_, answer) in zip(scores, pairs)]
    return np.array(right), np.array([bits(s.log_p) for s in scores])


def by(keys, values, **unit):
    """{key: figure of the values that have it}."""
    return {key: figure([value for k, value in zip(keys, values) if k == key], **unit) for key in dict.fromkeys(keys)}


DEPTHS = (0, 0.25, 0.5, 0.75, 1)


def needle_prompts(block_size, tok, stream, limit, seed):
    """(context length, depth), prompt, answer of needles in haystacks: a line `name = 1234` in held-out text, asked for at
    its end with `name ==`. Lengths are quarters of the context, limit prompts each."""
    rng, made = np.random.default_rng(seed), []
    for length in (block_size * quarter // 4 for quarter in (1, 2, 3, 4)):
        for i in range(limit):
            (name,), (value,) = invent(rng, 1)
            prompt = hide(stream, tok, length - 8, {DEPTHS[i % 5]: f"{name} = {value}\n"}, f"\nassert {name} ==", rng)
            made += [((length, DEPTHS[i % 5]), prompt, f" {value}")] if prompt else []
    return made


def needle(model, tok, stream, limit=200, seed=1):
    """Needle in a haystack (MEAP, section 4.2; claim 9): the share of values recalled, by context length (tokens) and
    depth, and the bits that a value costs: 13.1 for a blind guess. "grid": the figures of each cell, for a heatmap."""
    made = needle_prompts(model.config.block_size, tok, stream, limit, seed)
    cells, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "needle")
    return {"recalled": figure(right), "bits of the value": figure(cost, unit="bits"),
            **{f"recalled, {length} tokens": f for length, f in by([cell[0] for cell in cells], right).items()},
            "grid": [{"length": length, "depth": depth, "recalled": f, "bits": g} for ((length, depth), f), g in
                     zip(by(cells, right).items(), by(cells, cost, unit="bits").values())]}


def multidoc_prompts(block_size, tok, limit, seed):
    """(records, position), prompt, answer: k key-value records, as in Lost in the Middle (Liu et al., 2023, section 3), and a
    question for one of them. k is 5, 10 and 20, as far as the context holds them; limit prompts each."""
    rng, made = np.random.default_rng(seed), []
    for k, positions in ((5, (1, 3, 5)), (10, (1, 5, 10)), (20, (1, 5, 10, 15, 20))):
        for i in range(limit):
            names, values = invent(rng, k)
            position = positions[i % len(positions)]
            records = "".join(f"    {name!r}: {value},\n" for name, value in zip(names, values))
            prompt = tok.encode(f"records = {{\n{records}}}\nassert records[{names[position - 1]!r}] ==")
            made += [((k, position), prompt, f" {values[position - 1]}")] if len(prompt) < block_size - 8 else []
    return made


def multidoc(model, tok, limit=200, seed=1):
    """Multi-document question answering (MEAP, section 4.2; claim 10): the share of answers recalled, by the number of
    records and the position of the one that holds the answer, counted from 1."""
    made = multidoc_prompts(model.config.block_size, tok, limit, seed)
    cells, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "multidoc")
    counts = [k for k, _ in cells]
    return {**{f"{k} records": f for k, f in by(counts, right).items()},
            **{f"{k} records, bits of the value": f for k, f in by(counts, cost, unit="bits").items()},
            **{f"{k} records, answer at {position}": f for (k, position), f in by(cells, right).items()}}


def read_documents(path):
    """A file of Lost in the Middle, .jsonl[.gz]: list of (question, answers, texts, position of the gold one from 1 or 0)."""
    found = []
    for number, r in read_jsonl(path, "--documents", question=str, answers=list, ctxs=list):
        if not all(isinstance(answer, str) for answer in r["answers"]) or not r["answers"] or not all(
                isinstance(ctx, dict) and isinstance(ctx.get("text"), str) for ctx in r["ctxs"]):
            raise ValueError(f'--documents {path}: line {number}: expected "answers" to be texts and each of "ctxs" to have a "text"')
        gold = [i for i, ctx in enumerate(r["ctxs"], 1) if ctx.get("isgold") or ctx.get("hasanswer")]
        texts = [f"Document [{i}](Title: {ctx.get('title', '')}) {ctx['text']}" for i, ctx in enumerate(r["ctxs"], 1)]
        found.append((r["question"], r["answers"], texts, gold[0] if gold else 0))
    return found


def plain_words(text):
    """Lower case without punctuation and articles, as SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def multidoc_file(model, tok, documents, limit=200):
    """Questions from Lost in the Middle's files: right if the model's answer contains one of those given. Examples longer
    than the context are left out, and their share is told."""
    most = min(100, model.config.block_size // 4)
    prompts = [tok.encode("Answer the question from the documents.\n\n" + "\n".join(texts) + f"\n\nQuestion: {question}\nAnswer:")
               for question, _, texts, _ in documents[:limit]]
    fit = [len(prompt) + most <= model.config.block_size for prompt in prompts]
    kept = [(prompt, *document) for prompt, document, fits in zip(prompts, documents, fit) if fits]
    said = [tok.decode(s[0][0]) for s in continuations(model, tok, [kept_one[0] for kept_one in kept], most, desc="multidoc file")]
    right = [any(plain_words(answer) in plain_words(text) for answer in answers)
             for text, (_, _, answers, _, _) in zip(said, kept)]
    cells = [(len(texts), position) for _, _, _, texts, position in kept]
    return {"file: fits the context": figure(fit), "file: right": figure(right),
            **{f"file: {k} documents, answer at {position}": f for (k, position), f in by(cells, right).items()}}


def multineedle_prompts(block_size, tok, stream, limit, seed):
    """Hops, prompt, answer: a chain of two or three lines `a = 1234`, `b = a`, `c = b` in held-out text, asked for its end."""
    rng, made = np.random.default_rng(seed), []
    for hops in (2, 3):
        for _ in range(limit):
            names, values = invent(rng, hops)
            lines = [f"{name} = {source}\n" for name, source in zip(names, [values[0], *names])]
            needles = dict(zip(np.sort(rng.random(hops)).tolist(), lines))
            prompt = hide(stream, tok, block_size - 8, needles, f"\nassert {names[-1]} ==", rng)
            made += [(hops, prompt, f" {values[0]}")] if prompt else []
    return made


def multineedle(model, tok, stream, limit=200, seed=1):
    """Multi-needle reasoning (MEAP, section 4.2; claim 11): the share of values recalled through a chain of assignments."""
    made = multineedle_prompts(model.config.block_size, tok, stream, limit, seed)
    hops, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "multineedle")
    return {**{f"{n} needles": f for n, f in by(hops, right).items()},
            **{f"{n} needles, bits of the value": f for n, f in by(hops, cost, unit="bits").items()}}


def docstring_questions(stream, tok, limit, seed):
    """(context, four choices, label): a held-out function without its docstring, and which docstring's first line is its own."""
    functions = []
    for ids in np.split(np.asarray(stream), np.flatnonzero(np.asarray(stream) == tok.eot) + 1):
        try:
            text = tok.decode(ids.tolist())
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in nodes:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if 20 <= len(first) <= 120 and len(node.body) > 1:
                lines = text.splitlines(keepends=True)
                code = lines[node.lineno - 1:node.body[0].lineno - 1] + lines[node.body[0].end_lineno:node.end_lineno]
                functions.append(("".join(code)[:600], node.name, first))
    rng, questions = np.random.default_rng(seed), []
    docstrings = sorted({first for _, _, first in functions})
    for i in rng.permutation(len(functions))[:limit] if len(docstrings) >= 4 else ():
        code, name, first = functions[i]
        choices = [first, *rng.choice([other for other in docstrings if other != first], 3, replace=False).tolist()]
        order = rng.permutation(4).tolist()
        questions.append((f"{code}\n{name}.__doc__ = \"", [choices[j] for j in order], order.index(0)))
    return questions


def read_questions(path):
    """A .jsonl[.gz] with context, choices and label (the number of the right choice, from 0): list of the three."""
    found = []
    for number, r in read_jsonl(path, "--questions", context=str, choices=list, label=int):
        if not all(isinstance(choice, str) and choice for choice in r["choices"]) or not 0 <= r["label"] < len(r["choices"]):
            raise ValueError(f'--questions {path}: line {number}: expected "choices" to be texts and "label" the number of one, from 0')
        found.append((r["context"], r["choices"], r["label"]))
    return found


def choice(model, tok, questions):
    """Multiple choice: the share of questions whose right choice has the highest mean log-probability per token. Where c
    choices tie, the right one among them counts 1 / c."""
    pairs = [(tok.encode(context) or [tok.eot], tok.encode(text)) for context, choices, _ in questions for text in choices]
    means = iter([s.log_p.mean() for s in score(model, pairs, desc="choice")])
    right = []
    for _, choices, label in questions:
        likelihoods = np.array([next(means) for _ in choices])
        best = np.isclose(likelihoods, likelihoods.max(), rtol=0, atol=1e-9)
        right.append(best[label] / best.sum())
    return {"right": figure(right)}


TASKS = {
    "bpb": lambda model, tok, args: bpb(model, tok, args.stream, 4 * args.limit),
    "middle_bpb": lambda model, tok, args: middle_bpb(model, tok, args.stream, args.orders, args.spm_layout, args.limit,
                                                      args.seed),
    "stopping": lambda model, tok, args: args.orders and stopping(model, tok, args.stream, args.orders[-1],
                                                                  args.spm_layout, args.limit, 8, args.seed),
}


def table(results):
    """{checkpoint: {task: {name: figure}}} -> a text, a row for each figure and a column for each checkpoint."""
    def cell(f):
        if f["mean"] is None:
            return "-"
        scale, digits = (100, 1) if f["unit"] == "%" else (1, 3)
        se = "" if f["se"] is None else f" ± {scale * f['se']:.{digits}f}"
        return f"{scale * f['mean']:.{digits}f}{se}"

    rows = list(dict.fromkeys((task, name, f["unit"]) for tasks in results.values() for task, figures in tasks.items()
                              for name, f in figures.items()))
    lines = [["task", "", "", *results]]
    for task, name, unit in rows:
        found = [results[checkpoint].get(task, {}).get(name) for checkpoint in results]
        lines.append([task, name, unit, *(cell(f) if f else "-" for f in found)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(part.ljust(w) if i < 3 else part.rjust(w) for i, (part, w) in enumerate(zip(line, widths)))
                     for line in lines)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under out/)")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK", help=f"all, or some of {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, default=200, help="about how many examples a task takes (default 200)")
    parser.add_argument("--seed", type=int, default=1, help="decides the examples (default 1)")
    parser.add_argument("--data", help="whose held-out part the examples are made of (default: what the first was trained on)")
    parser.add_argument("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help="layouts to infill with (default: those trained on)")
    parser.add_argument("--out", default="out/eval", metavar="DIR", help="where results.json goes (default out/eval)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    check_range("--limit", args.limit, 1, 10**6)
    check_range("--seed", args.seed, 0, 2**31)
    for task in args.tasks:
        check_choice("--tasks", task, ("all", *TASKS))
    tasks = TASKS if "all" in args.tasks else args.tasks
    device = pick_device(args.device)
    asked_orders, results = args.orders, {}
    for folder in args.ckpt or [newest_run()]:
        model, tok, checkpoint = load_model(folder, device)
        objective = checkpoint["objective"]
        args.data = args.data or checkpoint["config"]["data"]
        _, _, args.stream = prepare(args.data, cache_dir=args.cache_dir, tok=tok)
        args.spm_layout = objective["spm_layout"]
        trained = (("psm",) if objective["spm_rate"] < 1 else ()) + (("spm",) if objective["spm_rate"] else ())
        args.orders = asked_orders or trained if objective["fim_rate"] else ()
        name = Path(folder).name if Path(folder).name not in results else str(folder)
        results[name] = {}
        for task in tasks:
            results[name][task] = TASKS[task](model, tok, args) or {}
    print(table(results))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out, "results.json")
    path.write_text(json.dumps({"seed": args.seed, "limit": args.limit, "data": args.data, "results": results}, indent=1))
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
