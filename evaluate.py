"""What a trained model can do, as numbers: every claim of the two papers that this repository can measure.

    python evaluate.py --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python evaluate.py --ckpt out/fim_spm --tasks stopping infill --run-tests      # runs what the model wrote

    bpb, middle_bpb     bits per byte of held-out text, left to right; of a middle given what is around it
    stopping, infill    does the model know when a middle is done; does what it fills in match, or pass the tests
    needle, multidoc, multineedle, choice     does it find what stands somewhere in its context
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
from data import prepare, single_line_holes
from figures import draw, pyplot
from objectives import IGNORE, ORDERS, check_choice, check_range, fim_prompt
from problems import (cut_texts, docstring_questions, multidoc_prompts, multineedle_prompts, needle_prompts,
                      read_documents, read_problems, read_questions, stdlib_problems)
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


def recall(model, tok, prompts, answers, desc):
    """Arrays (n,): would greedy decoding give the answer (a text), 0 or 1; and the bits that the answer costs.

    One pass each: it would if and only if every token of the answer is the likeliest after those before it."""
    pairs = [(prompt, tok.encode(answer)) for prompt, answer in zip(prompts, answers)]
    scores = score(model, pairs, desc=desc)
    right = [float((s.likeliest == answer).all()) for s, (_, answer) in zip(scores, pairs)]
    return np.array(right), np.array([bits(s.log_p) for s in scores])


def by(keys, values, unit="%"):
    """{key: figure of the values that have it}, keys in the order in which they come."""
    return {key: figure([value for k, value in zip(keys, values) if k == key], unit=unit) for key in dict.fromkeys(keys)}


def needle(model, tok, stream, limit=200, seed=1):
    """Needle in a haystack (MEAP, claim 9): the share of values recalled, by the length of the context in tokens, and the bits
    that a value costs, 13.1 for a guess among 9,000. "grid" has each length and depth."""
    made = needle_prompts(model.config.block_size, tok, stream, limit, seed)
    cells, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "needle")
    lengths = [length for length, _ in cells]
    return {"recalled": figure(right), "bits of the value": figure(cost, unit="bits"),
            **{f"recalled at {length} tokens": f for length, f in by(lengths, right).items()},
            "grid": [{"length": length, "depth": depth, "recalled": f, "bits": by(cells, cost, "bits")[length, depth]}
                     for (length, depth), f in by(cells, right).items()]}


def multidoc(model, tok, limit=200, seed=1):
    """Multi-document question answering (MEAP, claim 10): the share of answers recalled, by the number of records and
    the position, from 1, of the one that holds the answer; and the bits that an answer costs."""
    made = multidoc_prompts(model.config.block_size, tok, limit, seed)
    cells, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "multidoc")
    counts = [k for k, _ in cells]
    return {**{f"{k} records": f for k, f in by(counts, right).items()},
            **{f"{k} records, bits of the value": f for k, f in by(counts, cost, "bits").items()},
            "grid": [{"records": k, "position": position, "recalled": f} for (k, position), f in by(cells, right).items()],
            **{f"{k} records, answer at {position}": f for (k, position), f in by(cells, right).items()}}


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
    """Multi-needle reasoning (MEAP, claim 11): the share of values recalled through two or three assignments in a chain."""
    made = multineedle_prompts(model.config.block_size, tok, stream, limit, seed)
    hops, prompts, answers = zip(*made) if made else ((), (), ())
    right, cost = recall(model, tok, prompts, answers, "multineedle")
    return {**{f"{n} needles": f for n, f in by(hops, right).items()},
            **{f"{n} needles, bits of the value": f for n, f in by(hops, cost, "bits").items()}}


def choice(model, tok, questions, name="right"):
    """Multiple choice over (context, choices, label): the share where the right choice has the highest mean log-probability
    per token. Where c choices tie, the right one among them counts 1 / c: a model that knows nothing scores chance."""
    pairs = [(tok.encode(context) or [tok.eot], tok.encode(text)) for context, choices, _ in questions for text in choices]
    means = iter([s.log_p.mean() for s in score(model, pairs, desc="choice")])
    right = []
    for _, choices, label in questions:
        likelihoods = np.array([next(means) for _ in choices])
        best = np.isclose(likelihoods, likelihoods.max(), rtol=0, atol=1e-9)
        right.append(best[label] / best.sum())
    return {name: figure(right)}


def attention(model, tok, stream, reference=None, limit=50, seed=1, segments=PASSAGE):
    """Where the model looks (MEAP, claim 14; attention.py says how each is measured): decay and rise in variance as inputs
    are masked, within the model and, with a reference, from the reference's plain inputs to this model's masked ones, as
    the paper has NTP and MEAP; the shares of the last token's attention, errors over heads. "heatmap": one head's weights."""
    figures = {}
    for name, other in (("within the model", model), ("from the first, plain", reference)):
        if other is not None:
            there, fall, variance, rise = masked_change(other, model, tok, stream, limit, seed)
            figures[f"decay at masked positions, {name}"] = figure(fall, there)
            figures[f"rise of variance elsewhere, {name}"] = figure(rise, variance)
    for segment, share in zip(SEGMENTS, shares(model, tok, segments).T):
        figures[f"share of {segment}"] = figure(share)
    return figures | {"heatmap": heatmap(model, tok, segments)}


def infill_task(model, tok, args):
    samples = []
    figures = infill(model, tok, args.problems, args.orders, args.spm_layout, args.n, args.temperature, args.seed,
                     args.run_tests, samples)
    for order in args.orders:  # the form that the benchmarks' own harness scores
        path = args.out / f"samples-{args.name}-{order}.jsonl"
        path.write_text("".join(json.dumps({"task_id": s["task_id"], "completion": s["completion"]}) + "\n"
                                for s in samples if s["order"] == order))
    return figures


# What each task is given: model, tok and the settings of main. A model that never saw a gap has no orders.
TASKS = {
    "bpb": lambda model, tok, args: bpb(model, tok, args.stream, 4 * args.limit),
    "middle_bpb": lambda model, tok, args: middle_bpb(model, tok, args.stream, args.orders, args.spm_layout, args.limit,
                                                      args.seed),
    "stopping": lambda model, tok, args: stopping(model, tok, args.stream, args.orders[-1], args.spm_layout, args.limit,
                                                  seed=args.seed) if args.orders else {},
    "infill": infill_task,
    "needle": lambda model, tok, args: needle(model, tok, args.stream, args.limit, args.seed),
    "multidoc": lambda model, tok, args: multidoc(model, tok, args.limit, args.seed) | (
        multidoc_file(model, tok, args.documents) if args.documents else {}),
    "multineedle": lambda model, tok, args: multineedle(model, tok, args.stream, args.limit, args.seed),
    "choice": lambda model, tok, args: choice(
        model, tok, docstring_questions(args.stream, tok, args.limit, args.seed), "docstring of a function") | (
        choice(model, tok, args.questions, "file: right") if args.questions else {}),
    "attention": lambda model, tok, args: attention(model, tok, args.stream, args.reference, args.limit // 4, args.seed),
}


def table(results):
    """{checkpoint: {task: {name: figure}}} -> a text: a row for each figure, a column for each checkpoint."""
    def cell(f):
        if f is None or f["mean"] is None:
            return "-"
        scale, digits = (100, 1) if f["unit"] == "%" else (1, 3)
        se = "" if f["se"] is None else f" ± {scale * f['se']:.{digits}f}"
        return f"{scale * f['mean']:.{digits}f}{se}"

    rows = dict.fromkeys((task, name, f["unit"]) for tasks in results.values() for task, figures in tasks.items()
                         for name, f in figures.items() if isinstance(f, dict) and "mean" in f)
    lines = [("task", "", "", *results)]
    lines += [(*row, *(cell(tasks.get(row[0], {}).get(row[1])) for tasks in results.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(part.ljust(width) if i < 3 else part.rjust(width)
                               for i, (part, width) in enumerate(zip(line, widths))) for line in lines)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under out/); an NTP run "
                        "that comes first is what attention compares the others with")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK", help=f"all, or of {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, help="about how many examples each task takes (default 200; files: all)")
    parser.add_argument("--seed", type=int, default=1, help="decides the examples (default 1)")
    parser.add_argument("--data", help="make examples of this source's held-out part (default: what the first learned from)")
    parser.add_argument("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help="layouts of infills (default: those trained on)")
    parser.add_argument("--n", type=int, default=1, help="infill: completions of each problem, for pass@k (default 1)")
    parser.add_argument("--temperature", type=float, help="infill: 0 is greedy (default: 0 for one completion, 0.8 for more)")
    parser.add_argument("--run-tests", action="store_true", help="infill: run what the model wrote against the tests, in a "
                        "process with limits (sandbox.py says which): a guard against accidents, not against malice")
    parser.add_argument("--problems", metavar="F", help="infill: a file of the HumanEval infilling benchmarks, .jsonl[.gz]")
    parser.add_argument("--documents", metavar="F", help="multidoc: a file of Lost in the Middle, .jsonl[.gz]")
    parser.add_argument("--questions", metavar="F", help="choice: a .jsonl[.gz] with context, choices and label")
    parser.add_argument("--out", default="out/eval", metavar="DIR", help="for results.json and samples (default out/eval)")
    parser.add_argument("--figures", metavar="DIR", help="draw PNGs there; needs matplotlib")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    check_range("--limit", args.limit or 1, 1, 10**6)
    check_range("--seed", args.seed, 0, 2**31)
    check_range("--n", args.n, 1, 1000)
    for task in args.tasks:
        check_choice("--tasks", task, ("all", *TASKS))
    tasks = TASKS if "all" in args.tasks else args.tasks
    if args.figures:
        pyplot()
    device, asked, args.out, args.reference, results = pick_device(args.device), args.orders, Path(args.out), None, {}
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.8
    args.documents = read_documents(args.documents)[:args.limit] if args.documents else []
    args.questions = read_questions(args.questions)[:args.limit] if args.questions else []
    if args.problems:
        args.problems = read_problems(args.problems)[:args.limit]
    elif "infill" in tasks:
        args.problems = stdlib_problems(args.limit or 200, args.seed)
    args.limit = args.limit or 200
    args.out.mkdir(parents=True, exist_ok=True)

    for folder in args.ckpt or [newest_run()]:
        model, tok, checkpoint = load_model(folder, device)
        objective = checkpoint["objective"]
        args.data = args.data or checkpoint["config"]["data"]
        _, _, args.stream = prepare(args.data, cache_dir=args.cache_dir, tok=tok)
        args.spm_layout = objective["spm_layout"]
        trained = [order for order, rate in (("psm", 1 - objective["spm_rate"]), ("spm", objective["spm_rate"])) if rate]
        args.orders = (asked or trained) if objective["fim_rate"] else []
        args.name = Path(folder).resolve().name
        while args.name in results:
            args.name += "'"
        if not results and not objective["mask_ratio"]:
            first = model, tok.to_dict()
        args.reference = first[0] if results and first and first[1] == tok.to_dict() else None
        results[args.name] = {task: TASKS[task](model, tok, args) for task in tasks}
    print(table(results))
    path = args.out / "results.json"
    path.write_text(json.dumps({"data": args.data, "limit": args.limit, "seed": args.seed, "results": results}, indent=1))
    drawn = draw(results, Path(args.figures)) if args.figures else []
    print("written:", *(str(file) for file in (path, *drawn)), file=sys.stderr)


if __name__ == "__main__":
    main()
