"""What a trained model can do, as numbers: every claim of the two papers that this repository can measure.

    python evaluate.py --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python evaluate.py --ckpt out/fim_spm --tasks stopping infill --run-tests      # runs what the model wrote

    bpb, middle_bpb     bits per byte of held-out text, left to right; of a middle given what is around it
    stopping, infill    does the model know when a middle is done; does what it fills in match, or pass the tests
    needle, multidoc, multineedle, choice     does it find what stands somewhere in its context
    answers             what held-out answers cost a fine-tuned model, and how many it knows
    attention           where it looks (attention.py)

Each is a function task(model, tok, ...) -> {name: figure}; a figure is {"mean", "se", "n", "unit"} (see figure).
Two functions do all the work with the model: score (how likely is this text after that one) and continuations (what
does the model say next). problems.py makes what they are asked.
"""
import difflib
import json
import math
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import PASSAGE, SEGMENTS, heatmap, masked_change, shares
from data import prepare, single_line_holes, split_lines, text_rows
from figures import draw, pyplot
from objectives import IGNORE, ORDERS, answer_prompt, check_choice, check_range, fim_prompt
from pairs import prepare_pairs
from problems import (cut_texts, docstring_questions, multidoc_prompts, multineedle_prompts, needle_prompts,
                      read_documents, read_problems, read_questions, stdlib_problems)
from sample import (Parser, best_first, collect, generate, infill_prompt, load_model, newest_run, one_line_errors,
                    pick_device)


def figure(values, weights=None, unit="%"):
    """A mean and its standard error: sum(values) / sum(weights), weights 1 by default.

    The error is a ratio estimator's, sqrt(n / (n-1) sum (v - mean w)^2) / sum(w); with weights 1 that is std / sqrt(n).
    What belongs together (ten holes of one function) should come in as one value with its weight. unit: "%" for
    shares (kept as 0 to 1), or what the table is to print. mean and se are None where there is nothing to tell."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, total = len(values), weights.sum()
    if not total:
        return {"mean": None, "se": None, "n": n, "unit": unit}
    mean = float(values.sum() / total)
    se = float(np.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / total) if n > 1 else None
    return {"mean": mean, "se": se, "n": n, "unit": unit}


class Score(NamedTuple):
    """Arrays (n,), an entry for each token of a continuation, given all before it."""
    log_p: np.ndarray      # its log-probability, nats
    likeliest: np.ndarray  # the id the model would have said
    watched: np.ndarray    # the log-probability of the watched id, nats


@torch.no_grad()
def score(model, pairs, watch=0, desc=None):
    """(prompt, continuation) pairs, lists of ids of any lengths -> a Score for each pair.

    Rows of like length share a batch, padded on the right (causal attention: no token sees the padding), and logits
    are looked at only where they predict a token of a continuation. A prompt is never empty; what does not fit the
    context is cut off its left. Raises ValueError where a continuation alone does not fit."""
    block_size, device = model.config.block_size, next(model.parameters()).device
    rows = []
    for prompt, continuation in pairs:
        if len(continuation) > block_size:
            raise ValueError(f"{len(continuation)} tokens to score do not fit the model's context of {block_size}")
        rows.append((list(prompt)[-(block_size + 1 - len(continuation)):], list(continuation)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    most = min(8192, 2**28 // model.config.vocab_size)  # tokens in a batch: suits a CPU's cache; 1 GB of logits
    scores = [None] * len(rows)
    with tqdm(total=len(rows), desc=desc, unit="text", leave=False, disable=desc is None) as bar:
        while order:
            T = sum(map(len, rows[order[0]])) - 1
            batch, order = order[:max(1, most // T)], order[max(1, most // T):]
            idx, targets = torch.zeros(len(batch), T, dtype=torch.long), torch.full((len(batch), T), IGNORE)
            for b, i in enumerate(batch):
                ids, n = sum(rows[i], []), len(rows[i][1])
                idx[b, :len(ids) - 1] = torch.tensor(ids[:-1])
                targets[b, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(rows[i][1], dtype=torch.long)
            idx, targets = idx.to(device), targets.to(device)
            logits, wanted = model(idx)[0], targets != IGNORE                   # (B, T, V), (B, T)
            log_p = F.log_softmax(logits[wanted].float(), dim=-1)               # (N, V), row after row
            columns = log_p.gather(1, targets[wanted][:, None])[:, 0], log_p.argmax(-1), log_p[:, watch]
            columns = [column.cpu().split([len(rows[i][1]) for i in batch]) for column in columns]
            for i, *parts in zip(batch, *columns):
                scores[i] = Score(*(part.numpy().astype(np.float64) for part in parts))
            bar.update(len(batch))
    return scores


@torch.no_grad()
def continuations(model, tok, prompts, max_new_tokens, n=1, temperature=0.0, seed=1, desc=None):
    """What the model says after each prompt, up to <EOT>: for each a list of n (ids, mean log-probability), see
    sample.collect. Prompts of equal length share a batch, the n samples of a prompt one pass over it."""
    device, config = next(model.parameters()).device, model.config
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    most = 2**31 // (8 * config.n_layer * config.n_embd * config.block_size)  # rows whose keys and values fill 2 GB
    size = max(1, min(most, 96 if device.type == "cpu" else 1024) // n)         # and what suits a CPU's cache
    batches = [same[start:start + size] for same in by_length.values() for start in range(0, len(same), size)]
    out = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, unit="prompt", leave=False, disable=desc is None) as bar:
        for number, batch in enumerate(batches):
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            samples = collect(generate(model, idx, max_new_tokens, temperature, stop=tok.eot, seed=seed + number, n=n,
                                       allowed=tok.eot + 1), tok)
            for b, i in enumerate(batch):
                out[i] = samples[b * n:(b + 1) * n]
            bar.update(len(batch))
    return out


def n_bytes(tok, ids):
    return int(tok.n_bytes[np.asarray(ids, np.int64)].sum())


def bits(log_p):
    return -log_p.sum() / math.log(2)


def bpb(model, tok, stream, n_windows=800):
    """Bits per byte of held-out left-to-right text: compares objectives and vocabularies (FIM, section 2.1; claim 1).

    Evenly spaced windows of block_size tokens, as in train.bits_per_byte; <EOT>, which is no text, is left out."""
    rows = list(text_rows(stream, tok, model.config.block_size, n_windows))
    scores = score(model, [(inputs[:1].tolist(), targets.tolist()) for inputs, targets in rows], desc="bpb")
    return {"left to right": figure([bits(s.log_p[tok.n_bytes[targets] > 0]) for s, (_, targets) in zip(scores, rows)],
                                    [n_bytes(tok, targets) for _, targets in rows], "bits/byte")}


def middle_bpb(model, tok, stream, orders=ORDERS, spm_layout="swapped", limit=200, seed=1):
    """Bits per byte of a middle that is given its prefix alone, or prefix and suffix; and of the whole text, left to
    right, or laid out as a FIM example, whose sentinels cost bits, too (Bavarian et al., 2022; claim 7)."""
    cuts = cut_texts(stream, tok, limit, model.config.block_size - 4, seed)
    middles = [n_bytes(tok, middle) for _, middle, _ in cuts]
    texts = [n_bytes(tok, prefix + middle + suffix) for prefix, middle, suffix in cuts]
    prompts = {"prefix alone": [prefix for prefix, _, _ in cuts]}
    for order in orders:
        prompts[order] = [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in cuts]
    figures = {}
    for name, given in prompts.items():
        pairs = [([tok.eot], prompt + middle) for prompt, (_, middle, _) in zip(given, cuts)]
        scores = score(model, pairs, desc=f"middle_bpb, {name}")
        cost = [bits(s.log_p[-len(middle):]) for s, (_, middle, _) in zip(scores, cuts)]
        figures[f"middle, {name}"] = figure(cost, middles, "bits/byte")
        if name in orders:
            figures[f"text, {name}"] = figure([bits(s.log_p) for s in scores], texts, "bits/byte")
    plain = [([tok.eot], tok.encode(tok.decode(prefix + middle + suffix))) for prefix, middle, suffix in cuts]
    cost = [bits(s.log_p) for s in score(model, plain, desc="middle_bpb, text")]
    return figures | {"text, left to right": figure(cost, texts, "bits/byte")}


def stopping(model, tok, stream, order="spm", spm_layout="swapped", limit=200, n=8, seed=1):
    """Whether the model knows when a middle is done: single-line holes in held-out text, filled greedily and, at
    temperature 0.8, n times with the best kept (those that ended in <EOT> first, then the likeliest per token).

    120 tokens of prefix, 80 of suffix, at most 40 to fill (in proportion, where the context is shorter); a model that
    has not stopped after 48 has not found the end. Stopping anywhere is easy, so count also how often what it filled
    in is a whole line, as every true middle is. And a line end is easily told from the rest of a line: whether the model
    reads the suffix shows in P(<EOT>) at the same place before a suffix that does not go on there."""
    scale = min(1, (model.config.block_size - 4) / 248)
    holes = single_line_holes(stream, tok, limit, seed, *(int(scale * size) for size in (120, 80, 40)))
    prompts = [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in holes]
    truths = [middle + [tok.eot] for _, middle, _ in holes]
    ends = score(model, list(zip(prompts, truths)), tok.eot, "stopping, P(<EOT>)")
    most = int(scale * 48)
    greedy = [samples[0] for samples in continuations(model, tok, prompts, most, desc="stopping, greedy")]
    best = [max(samples, key=lambda sample: (sample[0][-1] == tok.eot, sample[1]))
            for samples in continuations(model, tok, prompts, most, n, 0.8, seed, f"stopping, best of {n}")]
    figures = {}
    for name, samples in (("greedy", greedy), (f"best of {n}", best)):
        ended = [ids[-1] == tok.eot for ids, _ in samples]
        texts = [tok.decode(ids) for ids, _ in samples]
        figures[f"{name} ends in <EOT>"] = figure(ended)
        figures[f"{name} ends in <EOT> after a line end"] = figure([e and t[-1:] == "\n" for e, t in zip(ended, texts)])
        figures[f"{name} exact match"] = figure([e and t == tok.decode(u) for e, t, u in zip(ended, texts, truths)])
    elsewhere = [np.exp(s.watched[:-1]) for s in ends]
    figures |= {
        "P(<EOT>) at the true end": figure([math.exp(s.watched[-1]) for s in ends]),
        "P(<EOT>) elsewhere": figure([p.sum() for p in elsewhere], [len(p) for p in elsewhere]),
        "<EOT> likeliest at the true end": figure([s.likeliest[-1] == tok.eot for s in ends])}
    suffixes = [suffix for _, _, suffix in holes]
    for name, wrong in (("another hole's suffix", suffixes[1:] + suffixes[:1]),
                        ("the suffix a line later", [tok.encode("".join(split_lines(tok.decode(suffix))[1:]))[:len(suffix)]
                                                     for suffix in suffixes])):
        prompts = [fim_prompt(prefix, suffix, tok, order, spm_layout) for (prefix, _, _), suffix in zip(holes, wrong)]
        figures[f"P(<EOT>) there before {name}"] = figure(
            [math.exp(s.watched[-1]) for s in score(model, list(zip(prompts, truths)), tok.eot, "stopping, control")])
    return figures


def infill(model, tok, problems, orders=("spm",), spm_layout="swapped", n=1, temperature=0.0, seed=1, run_tests=False,
           samples=None):
    """Infilling benchmarks (FIM, section 2.2; claims 2, 3, 8): exact match, edit similarity (difflib's ratio), the
    share that ended in <EOT> and, with run_tests, pass@k over n samples, for k of 1, 10 and 100 up to n.

    Completions of at most a quarter of the context; one that did not end is cut where it begins to repeat the suffix.
    Errors take the holes of one function together. samples: a list that gets {"task_id", "completion", "order"}."""
    figures, reach = {}, 16 * model.config.block_size  # characters: many more than the context holds
    most = model.config.block_size // 4
    around = [(p.text[max(0, p.start - reach):p.start], p.text[p.end:p.end + reach]) for p in problems]
    truths = [p.text[p.start:p.end] for p in problems]
    kinds = defaultdict(lambda: defaultdict(list))  # {kind: {function: [number of a problem]}}
    for i, p in enumerate(problems):
        kind, *function = p.task_id.split("/")[:3]
        kinds[kind.replace("Infilling", "")]["/".join(function)].append(i)
    for order in orders if problems else ():
        prompts = [tuple(infill_prompt(model, tok, *texts, most, order, spm_layout)) for texts in around]
        distinct = list(dict.fromkeys(prompts))
        said = dict(zip(distinct, continuations(model, tok, distinct, most, n, temperature, seed, f"infill, {order}")))
        infills = [[best_first([sample], tok, suffix)[0] for sample in said[prompt]]
                   for prompt, (_, suffix) in zip(prompts, around)]
        tests = [(p, fill.text) for p, fills in zip(problems, infills) for fill in fills]
        if samples is not None:
            samples += [{"task_id": p.task_id, "completion": text, "order": order} for p, text in tests]

        def mean_over_samples(measure):
            return np.mean([[measure(fill, truth) for fill in fills] for fills, truth in zip(infills, truths)], axis=1)

        measured = {"exact match": mean_over_samples(lambda fill, truth: fill.text == truth),
                    "edit similarity": mean_over_samples(lambda fill, truth: difflib.SequenceMatcher(
                        None, fill.text, truth, autojunk=False).ratio()),
                    "ends in <EOT>": mean_over_samples(lambda fill, truth: fill.ended == "eot")}
        if run_tests:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                running = pool.map(lambda test: test[0].passes(test[1]), tests)
                passed = list(tqdm(running, f"infill, {order}, tests", len(tests), unit="test", leave=False))
            counts = np.reshape(passed, (-1, n)).sum(axis=1).tolist()
            measured |= {f"pass@{k}": np.array([pass_at_k(n, c, k) for c in counts]) for k in (1, 10, 100) if k <= n}
        for kind, functions in kinds.items():
            for name, values in measured.items():
                figures[f"{kind} {order} {name}"] = figure([values[i].sum() for i in functions.values()],
                                                           [len(i) for i in functions.values()])
    return figures


def pass_at_k(n, c, k):
    """The chance that one of k draws passes, of n samples of which c do: unbiased (Chen et al., 2021, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def recall(model, tok, made, desc):
    """[(cell, prompt ids, answer, another value)] -> the cells; whether greedy decoding would give the answer; whether
    the model prefers it to the other value; and the bits that it costs: four lists.

    Greedy decoding gives an answer if and only if each of its tokens is the likeliest after those before it."""
    cells, right, preferred, cost = [], [], [], []
    pairs = [(prompt, tok.encode(text)) for _, prompt, *texts in made for text in texts]
    scores = score(model, pairs, desc=desc)
    for (cell, *_), (_, answer), s, other in zip(made, pairs[::2], scores[::2], scores[1::2]):
        cells.append(cell)
        right.append((s.likeliest == answer).all())
        preferred.append(choose([s, other], 0))
        cost.append(bits(s.log_p))
    return cells, right, preferred, cost


def choose(scores, label):
    """1 where the labelled of some Scores has the highest mean log-probability per token, else 0. Where c of them tie,
    the right one among them counts 1 / c: knowing nothing scores chance."""
    means = np.array([s.log_p.mean() for s in scores])
    best = np.isclose(means, means.max(), rtol=0, atol=1e-9)
    return best[label] / best.sum()


def by(keys, values, unit="%"):
    """{key: figure of the values that have it}, keys in the order in which they come."""
    groups = defaultdict(list)
    for key, value in zip(keys, values):
        groups[key].append(value)
    return {key: figure(group, unit=unit) for key, group in groups.items()}


def needle(model, tok, stream, limit=400, seed=1):
    """Needle in a haystack (MEAP, claim 9): the share of values recalled, also by the length of the context in tokens;
    how often the value is preferred to another (chance: half); the bits that it costs. "grid": by length and depth."""
    made = needle_prompts(model.config.block_size, tok, stream, limit, seed)
    cells, right, preferred, cost = recall(model, tok, made, "needle")
    by_length = by([length for length, _ in cells], right)
    return {"recalled": figure(right), "preferred": figure(preferred), "bits of the value": figure(cost, unit="bits"),
            **{f"recalled at {length} tokens": f for length, f in by_length.items()},
            "grid": [{"length": length, "depth": depth, "recalled": f, "preferred": g} for ((length, depth), f), g in
                     zip(by(cells, right).items(), by(cells, preferred).values())]}


def multidoc(model, tok, limit=200, seed=1):
    """Multi-document question answering (MEAP, claim 10): the share of answers recalled, by the number of records and
    the position, from 1, of the one that holds the answer; and how often it is preferred to another record's value."""
    made = multidoc_prompts(model.config.block_size, tok, limit, seed)
    cells, right, preferred, _ = recall(model, tok, made, "multidoc")
    counts, by_cell = [k for k, _ in cells], by(cells, right)
    return {**{f"{k} records": f for k, f in by(counts, right).items()},
            **{f"{k} records, preferred": f for k, f in by(counts, preferred).items()},
            **{f"{k} records, answer at {position}": f for (k, position), f in by_cell.items()},
            "grid": [{"records": k, "position": position, "recalled": f, "preferred": g} for ((k, position), f), g in
                     zip(by_cell.items(), by(cells, preferred).values())]}


def multidoc_file(model, tok, documents):
    """Questions of Lost in the Middle's files: right if what the model says contains one of the answers (section 2.1).

    An example that the context does not hold is left out, and the share of the others told."""
    most = min(100, model.config.block_size // 4)
    kept = []
    for question, answers, texts, position in documents:
        prompt = tok.encode("Answer the question from the documents.\n\n" + "\n".join(texts) +
                            f"\n\nQuestion: {question}\nAnswer:")
        if len(prompt) + most <= model.config.block_size:
            kept.append((prompt, answers, (len(texts), position)))
    said = continuations(model, tok, [prompt for prompt, _, _ in kept], most, desc="multidoc, file")
    right = [any(plain_words(answer) in plain_words(tok.decode(samples[0][0])) for answer in answers)
             for samples, (_, answers, _) in zip(said, kept)]
    return {"file: fits the context": figure(np.arange(len(documents)) < len(kept)), "file: right": figure(right),
            **{f"file: {k} documents, answer at {position}": f
               for (k, position), f in by([cell for _, _, cell in kept], right).items()}}


def plain_words(text):
    """Lower case, without punctuation and articles, as question answering compares texts (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def multineedle(model, tok, stream, limit=200, seed=1):
    """Multi-needle reasoning (MEAP, claim 11): the share of values recalled through a chain of two or three lines, and
    how often the value is preferred to one outside the chain."""
    made = multineedle_prompts(model.config.block_size, tok, stream, limit, seed)
    numbers, right, preferred, _ = recall(model, tok, made, "multineedle")
    return {**{f"{n} needles": f for n, f in by(numbers, right).items()},
            **{f"{n} needles, preferred": f for n, f in by(numbers, preferred).items()}}


def choice(model, tok, questions, name="right"):
    """Multiple choice over (context, choices, label): the share where the right one is the likeliest (see choose)."""
    asked = [(context, text) for context, choices, _ in questions for text in choices]
    pairs = [(tok.encode(context) or [tok.eot], tok.encode(text)) for context, text in asked]
    scores = iter(score(model, pairs, desc="choice"))
    return {name: figure([choose([next(scores) for _ in choices], label) for _, choices, label in questions])}


def answers(model, tok, pairs, fine_tuned, limit=200, folder=None):
    """Held-out pairs of ids (prompt, answer) that fit the context (MEAP, claim 13): bits per byte of the answers, the
    share of their tokens, <EOT> too, that are the model's likeliest, and of answers where all are: greedy decoding would
    give them. A model that was not fine-tuned goes on from the prompt as from any text.

    "curve": [epoch, answer_bpb] at each evaluation of the training in folder, if it recorded any."""
    pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) + 2 <= model.config.block_size][:limit]
    asked = [((answer_prompt(prompt, tok) if fine_tuned else prompt), answer + [tok.eot]) for prompt, answer in pairs]
    scores = score(model, asked, desc="answers")
    right = [s.likeliest == answer for s, (_, answer) in zip(scores, asked)]
    figures = {"answer": figure([bits(s.log_p[:-1]) for s in scores], [n_bytes(tok, answer) for _, answer in pairs],
                                "bits/byte"),
               "likeliest token": figure([r.sum() for r in right], [len(r) for r in right]),
               "exact match": figure([r.all() for r in right])}
    metrics = Path(folder, "metrics.jsonl") if folder else None
    if metrics and metrics.is_file():
        lines = map(json.loads, metrics.read_text().splitlines())
        figures["curve"] = [[line["epoch"], line["answer_bpb"]] for line in lines if "answer_bpb" in line]
    return figures


def attention(model, tok, stream, reference=None, limit=50, seed=1, segments=PASSAGE):
    """Where the model looks (MEAP, claim 14; attention.py says how each is measured): the decay, and the rise in
    variance, as inputs are masked, within the model and, with a reference, from the reference's plain inputs to this
    model's masked ones, as the paper has NTP and MEAP; the shares of the last token's attention, errors over heads.
    "heatmap": one head's weights."""
    figures = {}
    for name, other in (("within the model", model), ("from the first, plain", reference)):
        if other is not None:
            there, fall, variance, rise = masked_change(other, model, tok, stream, limit, seed)
            figures[f"decay at masked positions, {name}"] = figure(fall, there)
            figures[f"rise of variance elsewhere, {name}"] = figure(rise, variance)
    for segment, share in zip(SEGMENTS, shares(model, tok, segments).T):
        figures[f"share of {segment}"] = figure(share)
    return figures | {"heatmap": heatmap(model, tok, segments)}


# What each task is given: model, tok and main's settings. A model that never saw a gap has no orders.
TASKS = {
    "bpb": lambda model, tok, a: bpb(model, tok, a.stream, 4 * a.limit),
    "middle_bpb": lambda model, tok, a: middle_bpb(model, tok, a.stream, a.orders, a.spm_layout, a.limit, a.seed),
    "stopping": lambda model, tok, a: stopping(model, tok, a.stream, a.orders[-1], a.spm_layout, a.limit,
                                               seed=a.seed) if a.orders else {},
    "infill": lambda model, tok, a: infill(model, tok, a.problems, a.orders, a.spm_layout, a.n, a.temperature, a.seed,
                                           a.run_tests, a.samples),
    "needle": lambda model, tok, a: needle(model, tok, a.stream, 2 * a.limit, a.seed),
    "multidoc": lambda model, tok, a: multidoc(model, tok, a.limit, a.seed) | (
        multidoc_file(model, tok, a.documents) if a.documents else {}),
    "multineedle": lambda model, tok, a: multineedle(model, tok, a.stream, a.limit, a.seed),
    "choice": lambda model, tok, a: choice(
        model, tok, docstring_questions(a.stream, tok, a.limit, a.seed), "docstring of a function") | (
        choice(model, tok, a.questions, "file: right") if a.questions else {}),
    "answers": lambda model, tok, a: answers(model, tok, prepare_pairs(a.pairs, tok=tok)[2], a.fine_tuned, a.limit, a.folder),
    "attention": lambda model, tok, a: attention(model, tok, a.stream, a.reference, -(-a.limit // 4), a.seed),
}


def table(results):
    """{checkpoint: {task: {name: figure}}} -> a text: a row for each figure, a column for each checkpoint."""
    def cell(f):
        if f is None or f["mean"] is None:
            return "-"
        scale, digits = (100, 1) if f["unit"] == "%" else (1, 3)
        se = "" if f["se"] is None else f" ± {scale * f['se']:.{digits}f}"
        return f"{scale * f['mean']:.{digits}f}{se}"

    rows = dict.fromkeys((task, name, f["unit"]) for task in TASKS for tasks in results.values()
                         for name, f in tasks.get(task, {}).items() if isinstance(f, dict) and "mean" in f)
    lines = [("task", "", "", *results)]
    lines += [(*row, *(cell(tasks.get(row[0], {}).get(row[1])) for tasks in results.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(part.ljust(width) if i < 3 else part.rjust(width)
                               for i, (part, width) in enumerate(zip(line, widths))) for line in lines)


def pool(results, objectives):
    """results, and {checkpoint: its objective} -> a column for each objective, {objective (runs): {task: figures}}: each
    figure the mean of its runs', with the standard error over the runs, such as seeds. What is no figure is left out."""
    groups, pooled = defaultdict(list), {}
    for name, tasks in results.items():
        groups[objectives[name]].append(tasks)
    for objective, runs in groups.items():
        column = pooled[f"{objective} ({len(runs)})"] = {}
        for task in runs[0]:
            means, units = defaultdict(list), {}
            for name, f in (item for run in runs for item in run[task].items()):
                if isinstance(f, dict) and "mean" in f:
                    units[name] = f["unit"]
                    means[name] += [f["mean"]] if f["mean"] is not None else []
            column[task] = {name: figure(means[name], unit=unit) for name, unit in units.items()}
    return pooled


def read_arguments(arguments):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under out/); "
                        "if the first was trained without masks, attention compares the others with it")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK", help=f"all, or of {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, help="about how many examples each task takes (default 200; of files all)")
    parser.add_argument("--seed", type=int, default=1, help="decides the examples (default 1)")
    parser.add_argument("--data", help="whose held-out part to use (default: what the first was trained on; "
                        "stdlib, if that was pairs)")
    parser.add_argument("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help="layouts of infills (default: those trained on)")
    parser.add_argument("--n", type=int, default=1, help="infill: completions of each problem, for pass@k (default 1)")
    parser.add_argument("--temperature", type=float, help="infill: 0 is greedy (default: 0 if --n is 1, else 0.8)")
    parser.add_argument("--run-tests", action="store_true", help="infill: run what the model wrote, in a process with "
                        "limits (see sandbox.py): a guard against accidents, not against malice")
    parser.add_argument("--problems", metavar="F", help="infill: a file of the HumanEval infilling benchmarks")
    parser.add_argument("--documents", metavar="F", help="multidoc: a file of Lost in the Middle")
    parser.add_argument("--questions", metavar="F", help="choice: a file with context, choices and label")
    parser.add_argument("--pairs", metavar="F", help="answers: as --data of train.py for sft (default: what the first was "
                        "fine-tuned on, or functions)")
    parser.add_argument("--out", default="out/eval", metavar="DIR", help="for results.json, samples (default out/eval)")
    parser.add_argument("--figures", metavar="DIR", help="draw PNGs there; needs matplotlib")
    parser.add_argument("--pool", action="store_true", help="print a column for each objective, errors over its runs (seeds)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    for task in args.tasks:
        check_choice("--tasks", task, ("all", *TASKS))
    args.tasks = list(TASKS) if "all" in args.tasks else args.tasks
    check_range("--limit", args.limit or 1, 1, 10**6)
    check_range("--seed", args.seed, 0, 2**31)
    check_range("--n", args.n, 1, 1000)
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.8
    check_range("--temperature", args.temperature, 0, 100)
    args.device = pick_device(args.device)
    if args.figures:
        pyplot()
    return args


@one_line_errors
def main(arguments=None):
    args = read_arguments(arguments)
    args.documents = read_documents(args.documents)[:args.limit] if args.documents else []
    args.questions = read_questions(args.questions)[:args.limit] if args.questions else []
    if args.problems:
        args.problems = read_problems(args.problems)[:args.limit]
    elif "infill" in args.tasks:
        args.problems = stdlib_problems(args.limit or 200, args.seed)
    args.limit = args.limit or 200
    out, first, asked, results, objectives = Path(args.out), None, args.orders, {}, {}
    out.mkdir(parents=True, exist_ok=True)
    for folder in args.ckpt or [newest_run()]:
        model, tok, checkpoint = load_model(folder, args.device)
        objective = checkpoint["objective"]
        args.folder, args.fine_tuned, data = folder, objective["answers"], checkpoint["config"]["data"]
        args.pairs = args.pairs or (data if args.fine_tuned else "functions")
        args.data = args.data or ("stdlib" if args.fine_tuned else data)
        _, _, args.stream = prepare(args.data, cache_dir=args.cache_dir, tok=tok)
        trained = (["psm"] if objective["spm_rate"] < 1 else []) + (["spm"] if objective["spm_rate"] else [])
        args.orders, args.spm_layout = (asked or trained) if objective["fim_rate"] else [], objective["spm_layout"]
        args.samples, args.reference = [], first[0] if first and first[1] == tok.to_dict() else None
        if not results and not objective["mask_ratio"]:
            first = model, tok.to_dict()
        name = Path(folder).resolve().name
        while name in results:
            name += "'"
        objectives[name] = checkpoint["config"]["objective"]
        results[name] = {task: TASKS[task](model, tok, args) for task in args.tasks}
        for order in args.orders if args.samples else ():  # the form that the benchmarks' own harness scores
            (out / f"samples-{name}-{order}.jsonl").write_text("".join(
                json.dumps({"task_id": s["task_id"], "completion": s["completion"]}) + "\n"
                for s in args.samples if s["order"] == order))
    print(table(pool(results, objectives) if args.pool else results))
    settings = {"data": args.data, "limit": args.limit, "seed": args.seed, "n": args.n, "temperature": args.temperature}
    (out / "results.json").write_text(json.dumps(settings | {"results": results}, indent=1))
    drawn = draw(results, Path(args.figures)) if args.figures else []
    print("written:", *(str(path) for path in (out / "results.json", *drawn)), file=sys.stderr)


if __name__ == "__main__":
    main()
