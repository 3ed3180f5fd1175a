"""What a trained model can do, as a table: the claims of the two papers that can be measured offline.

    python -m lab.evaluate --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python -m lab.evaluate --ckpt out/fim_spm --tasks stopping infill --run-tests      # runs completions

    bpb, middle_bpb     bits per byte of held-out text, left to right; of a middle given what is around it
    stopping, infill    is <EOT> emitted where a middle ends; do completions match, or pass the tests
    needle, records, multineedle, multidoc, choice     is information from the context used
    answers             bits per byte of held-out answers, and how many are exact
    attention           where the model looks (attention.py)

Each is a function task(model, tok, ...) -> {name: figure}; report.py says what a figure is. Two functions do
all the work with the model: score (how likely is this text after that one) and continuations (generate after
each prompt). tasks.py makes the questions.
"""
import difflib
import json
import math
import os
import string
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import Parser, newest_run, one_line_errors, pick_device
from data import prepare, split_lines, text_rows
from lab.attention import PASSAGE, SEGMENTS, masked_change, shares
from lab.figures import draw, pyplot
from lab.pairs import encode_pairs, load_pairs
from lab.report import figure, figures_by, pool, table
from lab.tasks import (docstring_questions, multineedle_prompts, needle_prompts, random_span_holes,
                       read_documents, read_problems, records_prompts, single_line_holes, stdlib_problems)
from objectives import IGNORE, ON_PAIRS, ORDERS, check_choice, check_range, fim_prompt
from sample import STOPPED, best_first, collect, generate, infill_prompt, load_model, trained_orders
from train import text_bits


class Score(NamedTuple):
    """Arrays (n,), an entry for each token of a continuation, given all before it."""
    log_p: np.ndarray      # its log-probability, nats
    likeliest: np.ndarray  # the likeliest id in its place
    watched: np.ndarray    # the log-probability of the watched id, nats


@torch.no_grad()
def score(model, pairs, watch=0, desc=None):
    """(prompt, continuation) pairs, lists of ids of any lengths -> a Score for each pair.

    Rows of like length share a batch, padded on the right (causal attention: no token sees the padding), and
    logits are looked at only where they predict a token of a continuation. A prompt is never empty; what does
    not fit the context is cut off its left. Raises ValueError where a continuation alone does not fit."""
    block_size, device = model.config.block_size, next(model.parameters()).device
    rows = []
    for prompt, continuation in pairs:
        if len(continuation) > block_size:
            raise ValueError(f"{len(continuation)} tokens to score do not fit a context of {block_size}")
        rows.append((list(prompt)[-(block_size + 1 - len(continuation)):], list(continuation)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    batch_tokens = min(8192, 2**28 // model.config.vocab_size)  # suits a CPU's cache; 1 GB of logits
    scores = [None] * len(rows)
    with tqdm(total=len(rows), desc=desc, unit="text", leave=False, disable=desc is None) as bar:
        while order:
            T = sum(map(len, rows[order[0]])) - 1
            size = max(1, batch_tokens // T)
            batch, order = order[:size], order[size:]
            idx, targets = torch.zeros(len(batch), T, dtype=torch.long), torch.full((len(batch), T), IGNORE)
            for b, i in enumerate(batch):
                ids, n = sum(rows[i], []), len(rows[i][1])
                idx[b, :len(ids) - 1] = torch.tensor(ids[:-1])
                targets[b, len(ids) - 1 - n:len(ids) - 1] = torch.tensor(rows[i][1], dtype=torch.long)
            idx, targets = idx.to(device), targets.to(device)
            logits, is_scored = model(idx)[0], targets != IGNORE                # (B, T, V), (B, T)
            log_p = F.log_softmax(logits[is_scored].float(), dim=-1)            # (N, V), row after row
            columns = log_p.gather(1, targets[is_scored][:, None])[:, 0], log_p.argmax(-1), log_p[:, watch]
            columns = [column.cpu().split([len(rows[i][1]) for i in batch]) for column in columns]
            for i, *parts in zip(batch, *columns):
                scores[i] = Score(*(part.numpy().astype(np.float64) for part in parts))
            bar.update(len(batch))
    return scores


@torch.no_grad()
def continuations(model, tok, prompts, max_new_tokens, n=1, temperature=0.0, seed=1, desc=None):
    """n continuations of each prompt, up to <EOT>: for each prompt a list of (ids, mean log-probability), see
    sample.collect. Prompts of equal length share a batch, the n samples of a prompt one pass over it."""
    device, config = next(model.parameters()).device, model.config
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    in_memory = 2**31 // (8 * config.n_layer * config.n_embd * config.block_size)  # 2 GB of keys and values
    in_cache = 96 if device.type == "cpu" else 1024
    size = max(1, min(in_memory, in_cache) // n)
    batches = [same[start:start + size] for same in by_length.values() for start in range(0, len(same), size)]
    out = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, unit="prompt", leave=False, disable=desc is None) as bar:
        for number, batch in enumerate(batches):
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            samples = collect(generate(model, idx, max_new_tokens, temperature, stop=tok.eot,
                                       seed=seed + number, n=n, allowed=tok.eot + 1), tok)
            for b, i in enumerate(batch):
                out[i] = samples[b * n:(b + 1) * n]
            bar.update(len(batch))
    return out


def n_bytes(tok, ids):
    return int(tok.n_bytes[np.asarray(ids, np.int64)].sum())


def bits(log_p):
    return -log_p.sum() / math.log(2)


def bpb(model, tok, stream, n_rows=800):
    """Bits per byte of held-out left-to-right text, as train.py prints it: compares objectives and
    vocabularies (FIM paper: at rate 0.5 the left-to-right test loss equals that of the model trained without
    FIM)."""
    rows = text_rows(stream, model.config.block_size, n_rows)
    return {"left to right": figure(*text_bits(model, rows, tok), "bits/byte")}


def middle_bpb(model, tok, stream, orders=ORDERS, spm_layout="joint", limit=200, seed=1):
    """Bits per byte of a middle that is given its prefix alone, or prefix and suffix; and of the whole text,
    left to right, or laid out as a FIM example, whose sentinels cost bits, too (FIM paper: the middle is
    easier to predict given the suffix, the whole FIM example harder than the plain text)."""
    holes = random_span_holes(stream, tok, limit, seed, model.config.block_size - 4)
    n_middle = [n_bytes(tok, middle) for _, middle, _ in holes]
    n_text = [n_bytes(tok, prefix + middle + suffix) for prefix, middle, suffix in holes]
    prompts = {"prefix alone": [prefix for prefix, _, _ in holes]}
    for order in orders:
        prompts[order] = [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in holes]
    figures = {}
    for name, given in prompts.items():
        pairs = [([tok.eot], prompt + middle) for prompt, (_, middle, _) in zip(given, holes)]
        scores = score(model, pairs, desc=f"middle_bpb, {name}")
        cost = [bits(s.log_p[-len(middle):]) for s, (_, middle, _) in zip(scores, holes)]
        figures[f"middle, {name}"] = figure(cost, n_middle, "bits/byte")
        if name in orders:
            figures[f"text, {name}"] = figure([bits(s.log_p) for s in scores], n_text, "bits/byte")
    texts = [tok.decode(prefix + middle + suffix) for prefix, middle, suffix in holes]
    plain = [([tok.eot], tok.encode(text)) for text in texts]
    cost = [bits(s.log_p) for s in score(model, plain, desc="middle_bpb, text")]
    return figures | {"text, left to right": figure(cost, n_text, "bits/byte")}


def stopping(model, tok, stream, order="spm", spm_layout="joint", limit=200, n=8, seed=1):
    """Whether a model emits <EOT> where a middle ends, in two kinds of holes in held-out text:

        line    a whole line, with 120 tokens of prefix, 80 of suffix, at most 40 to fill
        span    120 tokens cut at two uniform characters: the FIM paper's random spans, and what is trained on

    (in proportion, where the context is shorter than 252). Samples may be 8 tokens longer than the longest
    middle."""
    scale = min(1, (model.config.block_size - 4) / 248)
    n_prefix, n_suffix, n_line = (int(scale * size) for size in (120, 80, 40))
    line_holes = single_line_holes(stream, tok, limit, seed, n_prefix, n_suffix, n_line)
    span_holes = random_span_holes(stream, tok, limit, seed, n_prefix)
    figures = {}
    for kind, holes, longest in (("line", line_holes, n_line), ("span", span_holes, n_prefix)):
        of_kind = filled(model, tok, holes, order, spm_layout, longest + int(8 * scale), n, seed)
        of_kind |= eot_probabilities(model, tok, holes, order, spm_layout)
        of_kind |= lookahead(model, tok, holes, seed)
        figures |= {f"{kind}: {name}": f for name, f in of_kind.items()}
    return figures


def filled(model, tok, holes, order, spm_layout, max_new_tokens, n, seed):
    """How many holes are filled with text that ends in <EOT>, and exactly: greedily, and by the best of n
    samples at temperature 0.8 (those that ended in <EOT> first, then the likeliest per token: FIM paper,
    appendix H.3).

    Where every middle is a whole line, also how many end in <EOT> after a line end."""
    prompts = [fim_prompt(prefix, suffix, tok, order, spm_layout) for prefix, _, suffix in holes]
    truths = [tok.decode(middle) for _, middle, _ in holes]
    figures = {}
    for name, count, temperature in (("greedy", 1, 0.0), (f"best of {n}", n, 0.8)):
        samples = continuations(model, tok, prompts, max_new_tokens, count, temperature, seed,
                                f"stopping, {name}")
        best = [best_first(of_one_prompt, tok)[0] for of_one_prompt in samples]
        has_ended = [sample.ended == STOPPED for sample in best]
        figures[f"{name} ends in <EOT>"] = figure(has_ended)
        if all(truth.endswith("\n") for truth in truths):
            figures[f"{name} ends in <EOT> after a line end"] = figure(
                [ended and sample.text.endswith("\n") for ended, sample in zip(has_ended, best)])
        is_exact = [sample.text == truth for sample, truth in zip(best, truths)]
        figures[f"{name} exact match"] = figure(np.logical_and(has_ended, is_exact))
    return figures


def eot_probabilities(model, tok, holes, order, spm_layout):
    """P(<EOT>) within the true middle: at its end, elsewhere, and at its end before a suffix that does not
    continue it: another hole's, or its own without the first line. Only a model that compares the middle with
    the suffix gives the true end a higher probability than these two controls."""
    def at_each_token(suffixes):
        pairs = [(fim_prompt(prefix, suffix, tok, order, spm_layout), middle + [tok.eot])
                 for (prefix, middle, _), suffix in zip(holes, suffixes)]
        scores = score(model, pairs, tok.eot, "stopping, P(<EOT>)")
        return [np.exp(s.watched) for s in scores], [s.likeliest[-1] == tok.eot for s in scores]

    suffixes = [suffix for _, _, suffix in holes]
    p, is_likeliest = at_each_token(suffixes)
    moved_on = [tok.encode("".join(split_lines(tok.decode(suffix))[1:]))[:len(suffix)] for suffix in suffixes]
    p_another, _ = at_each_token(suffixes[1:] + suffixes[:1])
    p_moved_on, _ = at_each_token(moved_on)
    return {"P(<EOT>) at the true end": figure([each[-1] for each in p]),
            "P(<EOT>) elsewhere in the middle": figure([each[:-1].sum() for each in p],
                                                       [len(each) - 1 for each in p]),
            "<EOT> likeliest at the true end": figure(is_likeliest),
            "P(<EOT>) at the true end before another hole's suffix": figure([each[-1] for each in p_another]),
            "P(<EOT>) at the true end before the suffix a line later": figure(
                [each[-1] for each, suffix in zip(p_moved_on, moved_on) if suffix])}


def lookahead(model, tok, holes, seed, n=2):
    """Whether the same model, left to right, would know where a middle joins its suffix: the probability that
    the suffix's first n tokens come next, at the middle's true end and at one place elsewhere in it; and at
    the true end those of another hole's suffix. Holes with a shorter suffix are left out."""
    rng, pairs = np.random.default_rng(seed), []
    holes = [hole for hole in holes if len(hole[2]) >= n]
    for (prefix, middle, suffix), (_, _, another) in zip(holes, holes[1:] + holes[:1]):
        before_end = prefix + middle[:rng.integers(len(middle))]
        pairs += [([tok.eot, *prefix, *middle], suffix[:n]), ([tok.eot, *before_end], suffix[:n]),
                  ([tok.eot, *prefix, *middle], another[:n])]
    p = np.array([np.exp(s.log_p.sum()) for s in score(model, pairs, desc="stopping, lookahead")])
    names = ("at the true end", "elsewhere in the middle", "of another hole at the true end")
    return {f"P(the suffix's first {n} tokens) {name}": figure(p[i::3]) for i, name in enumerate(names)}


def infill(model, tok, problems, orders=("spm",), spm_layout="joint", n=1, temperature=0.0, seed=1,
           run_tests=False, samples=None):
    """Infilling benchmarks as in the FIM paper (single-line, multi-line, random span): exact match, edit
    similarity (difflib's ratio), the share that ended in <EOT> and, with run_tests, pass@k over n samples,
    for k of 1, 10 and 100 up to n. Plain samples of at most a quarter of the context: no completion is cut.

    Errors take the holes of one function together. samples: a list that gets {"task_id", "completion",
    "order"}."""
    figures, reach = {}, 16 * model.config.block_size  # characters: many more than the context holds
    max_new_tokens = model.config.block_size // 4
    around = [(p.text[max(0, p.start - reach):p.start], p.text[p.end:p.end + reach]) for p in problems]
    truths = [p.text[p.start:p.end] for p in problems]
    kinds = defaultdict(lambda: defaultdict(list))  # {kind: {function: [number of a problem]}}
    for i, p in enumerate(problems):
        kind, *function = p.task_id.split("/")[:3]
        kinds[kind.replace("Infilling", "")]["/".join(function)].append(i)
    for order in orders if problems else ():
        prompts = [infill_prompt(model, tok, *texts, max_new_tokens, order, spm_layout) for texts in around]
        drawn = continuations(model, tok, prompts, max_new_tokens, n, temperature, seed, f"infill, {order}")
        completions = [[tok.decode(ids) for ids, _ in of_one_prompt] for of_one_prompt in drawn]
        tests = [(p, text) for p, texts in zip(problems, completions) for text in texts]
        if samples is not None:
            samples += [{"task_id": p.task_id, "completion": text, "order": order} for p, text in tests]
        measured = defaultdict(list)  # {name: [mean over a problem's samples]}
        for texts, of_one_prompt, truth in zip(completions, drawn, truths):
            measured["exact match"].append(np.mean([text == truth for text in texts]))
            measured["edit similarity"].append(np.mean([
                difflib.SequenceMatcher(None, text, truth, autojunk=False).ratio() for text in texts]))
            measured["ends in <EOT>"].append(np.mean([ids[-1] == tok.eot for ids, _ in of_one_prompt]))
        if run_tests:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                running = threads.map(lambda test: test[0].passes(test[1]), tests)
                passed = list(tqdm(running, f"infill, {order}, tests", len(tests), unit="test", leave=False))
            counts = np.reshape(passed, (-1, n)).sum(axis=1).tolist()
            measured |= {f"pass@{k}": [pass_at_k(n, c, k) for c in counts] for k in (1, 10, 100) if k <= n}
        for kind, functions in kinds.items():
            for name, values in measured.items():
                sums = [sum(values[i] for i in numbers) for numbers in functions.values()]
                figures[f"{kind} {order} {name}"] = figure(sums,
                                                           [len(numbers) for numbers in functions.values()])
    return figures


def pass_at_k(n, c, k):
    """The chance that one of k draws passes, of n samples of which c do: unbiased (Chen et al., 2021,
    equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def recall(model, tok, questions, unit):
    """[((number, position), prompt ids, answer, another value)] -> the share of answers that greedy decoding
    would give (it does if and only if each of the answer's tokens is the likeliest after those before it);
    how often the answer is preferred to the other value (chance: half); the bits that it costs. unit: of the
    number, such as records.

    "grid": the first two by number and position, for figures.py."""
    pairs = [(prompt, tok.encode(text)) for _, prompt, *texts in questions for text in texts]
    scores = score(model, pairs, desc=f"recall, {unit}")
    of_answers, of_others = scores[::2], scores[1::2]
    measured = {"recalled": [(s.likeliest == answer).all() for s, (_, answer) in zip(of_answers, pairs[::2])],
                "preferred": [choose(both, 0) for both in zip(of_answers, of_others)]}
    figures = {name: figure(values) for name, values in measured.items()}
    figures["bits of the value"] = figure([bits(s.log_p) for s in of_answers], unit="bits")
    cells = [cell for cell, *_ in questions]
    for name, values in measured.items():
        for number, f in figures_by([number for number, _ in cells], values).items():
            figures[f"{number} {unit}, {name}"] = f
    recalled, preferred = (figures_by(cells, values) for values in measured.values())
    figures["grid"] = [{"number": cell[0], "position": cell[1], "recalled": recalled[cell],
                        "preferred": preferred[cell]} for cell in recalled]
    return figures


def choose(scores, label):
    """1 where the labelled of some Scores has the highest mean log-probability per token, else 0. Where c of
    them tie, the right one among them counts 1 / c, so that an uninformed model scores chance."""
    means = np.array([s.log_p.mean() for s in scores])
    is_best = np.isclose(means, means.max(), rtol=0, atol=1e-9)
    return is_best[label] / is_best.sum()


def multidoc(model, tok, documents, samples=None):
    """Questions of Lost in the Middle's files: right if the first line of the answer contains one of the true
    ones, as in its authors' script (MEAP paper: better with 10 and 20 documents).

    An example that the context does not hold is left out; "fits the context" is the share of the others.
    samples: a list that gets {"answers": the true ones, "model_answer"}."""
    max_new_tokens = min(100, model.config.block_size // 4)
    kept = []
    for prompt, truths, n_documents, position in documents:
        ids = tok.encode(prompt)
        if len(ids) + max_new_tokens <= model.config.block_size:
            kept.append((ids, truths, (n_documents, position)))
    drawn = continuations(model, tok, [ids for ids, _, _ in kept], max_new_tokens, desc="multidoc")
    is_right = []
    for ((ids, _),), (_, truths, _) in zip(drawn, kept):
        text = tok.decode(ids)
        answer = plain_words(text.split("\n")[0])
        is_right.append(any(plain_words(truth) in answer for truth in truths))
        if samples is not None:
            samples.append({"answers": truths, "model_answer": text})
    return {"fits the context": figure(np.arange(len(documents)) < len(kept)), "right": figure(is_right),
            **{f"{k} documents, answer at {position}": f
               for (k, position), f in figures_by([cell for _, _, cell in kept], is_right).items()}}


def plain_words(text):
    """Lower case, without punctuation and articles, as question answering compares texts (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def choice(model, tok, questions):
    """Multiple choice over (context, choices, label): the share where the right one is the likeliest (see
    choose)."""
    asked = [(context, text) for context, choices, _ in questions for text in choices]
    pairs = [(tok.encode(context) or [tok.eot], tok.encode(text)) for context, text in asked]
    scores = iter(score(model, pairs, desc="choice"))
    is_right = [choose([next(scores) for _ in choices], label) for _, choices, label in questions]
    return {"docstring of a function": figure(is_right)}


def answers(model, tok, pairs, is_fine_tuned, limit=200, folder=None):
    """Held-out pairs of ids (prompt, answer) that fit the context (MEAP paper: better answers after half the
    epochs of fine-tuning): bits per byte of the answers, the share of their tokens, <EOT> too, that are the
    model's likeliest, and of answers where all are: greedy decoding would give them. A model that was not
    fine-tuned gets no <MID>.

    "curve": [epoch, answer_bpb] at each evaluation of the training in folder, if it recorded any."""
    pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) + 2 <= model.config.block_size][:limit]
    cue = [tok.mid] if is_fine_tuned else []
    asked = [(prompt + cue, answer + [tok.eot]) for prompt, answer in pairs]
    scores = score(model, asked, desc="answers")
    right = [s.likeliest == answer for s, (_, answer) in zip(scores, asked)]
    sizes = [n_bytes(tok, answer) for _, answer in pairs]
    figures = {"answer": figure([bits(s.log_p[:-1]) for s in scores], sizes, "bits/byte"),
               "likeliest token": figure([r.sum() for r in right], [len(r) for r in right]),
               "exact match": figure([r.all() for r in right])}
    metrics = Path(folder, "metrics.jsonl") if folder else None
    if metrics and metrics.is_file():
        lines = map(json.loads, metrics.read_text().splitlines())
        figures["curve"] = [[line["epoch"], line["answer_bpb"]] for line in lines if "answer_bpb" in line]
    return figures


def attention(model, tok, stream, reference=None, limit=50, seed=1, segments=PASSAGE):
    """Where the model looks (MEAP paper: masked positions receive half the attention, the answer more of it):
    the decay, and the rise in variance, as inputs are masked, within the model and, with a reference, from
    the reference's plain inputs to this model's masked ones, as the paper has NTP and MEAP; the shares of the
    last token's attention, errors over heads."""
    figures = {}
    for name, plain_model in (("within the model", model), ("from the first, plain", reference)):
        if plain_model is not None:
            before, fall, variance, rise = masked_change(plain_model, model, tok, stream, limit, seed)
            figures[f"decay at masked positions, {name}"] = figure(fall, before)
            figures[f"rise of variance elsewhere, {name}"] = figure(rise, variance)
    for segment, share in zip(SEGMENTS, shares(model, tok, segments).T):
        figures[f"share of {segment}"] = figure(share)
    return figures


# What each task is given: model, tok and main's settings. A model that never saw a gap has no orders.
TASKS = {
    "bpb": lambda model, tok, a: bpb(model, tok, a.stream, 4 * a.limit),
    "middle_bpb": lambda model, tok, a: middle_bpb(
        model, tok, a.stream, a.orders, a.spm_layout, a.limit, a.seed),
    "stopping": lambda model, tok, a: stopping(
        model, tok, a.stream, a.orders[-1], a.spm_layout, a.limit, seed=a.seed) if a.orders else {},
    "infill": lambda model, tok, a: infill(
        model, tok, a.problems, a.orders, a.spm_layout, a.n, a.temperature, a.seed, a.run_tests, a.samples),
    # MEAP paper: a value in a long text is found more often; so is a document's answer; so is the end of a
    # chain
    "needle": lambda model, tok, a: recall(
        model, tok, needle_prompts(model.config.block_size, tok, a.stream, 2 * a.limit, a.seed), "tokens"),
    "records": lambda model, tok, a: recall(
        model, tok, records_prompts(model.config.block_size, tok, a.limit, a.seed), "records"),
    "multineedle": lambda model, tok, a: recall(
        model, tok, multineedle_prompts(model.config.block_size, tok, a.stream, a.limit, a.seed), "needles"),
    "multidoc": lambda model, tok, a: multidoc(
        model, tok, a.documents, a.answered) if a.documents else {},
    "choice": lambda model, tok, a: choice(model, tok, docstring_questions(a.stream, tok, a.limit, a.seed)),
    "answers": lambda model, tok, a: answers(
        model, tok, encode_pairs(load_pairs(a.pairs)[1], tok), a.is_fine_tuned, a.limit, a.folder),
    "attention": lambda model, tok, a: attention(model, tok, a.stream, a.reference, -(-a.limit // 4), a.seed),
}


def read_arguments(arguments):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under "
                        "out/); if the first was trained without masks, attention compares the others to it")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK",
                        help=f"all, or of {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, help="about how many examples a task takes (200; of files all)")
    parser.add_argument("--seed", type=int, default=1, help="decides the examples (default 1)")
    parser.add_argument("--data", help="whose held-out part to use (default: what the first was trained on; "
                        "stdlib, if that was pairs)")
    parser.add_argument("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, help="of infills (default: those trained)")
    parser.add_argument("--n", type=int, default=1, help="infill: samples of each problem (default 1)")
    parser.add_argument("--temperature", type=float, help="infill: 0 is greedy (default: 0 if --n is 1)")
    parser.add_argument("--run-tests", action="store_true", help="infill: run the completions, in a process "
                        "with limits (see sandbox.py): a guard against accidents, not against malice")
    parser.add_argument("--problems", metavar="F", help="infill: a file of the HumanEval infilling benchmark")
    parser.add_argument("--documents", metavar="F", help="multidoc: a file of Lost in the Middle")
    parser.add_argument("--pairs", metavar="F", help="answers: as --data of train.py for sft (default: what "
                        "the first was fine-tuned on, or functions)")
    parser.add_argument("--out", default="out/eval", metavar="DIR", help="for the results (default out/eval)")
    parser.add_argument("--figures", metavar="DIR", help="draw PNGs there; needs matplotlib")
    parser.add_argument("--pool", action="store_true", help="a column an objective, errors over its runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    for task in args.tasks:
        check_choice("--tasks", task, ("all", *TASKS))
    if "multidoc" in args.tasks and not args.documents:
        raise ValueError("--tasks multidoc: expected --documents F, a file of Lost in the Middle")
    args.tasks = list(TASKS) if "all" in args.tasks else args.tasks
    if args.limit is not None:
        check_range("--limit", args.limit, 1, 10**6)
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
    if args.problems:
        problems = read_problems(args.problems)
        args.problems = problems[:args.limit]
        if len(args.problems) < len(problems):
            print(f"note: --limit {args.limit}: the benchmarks' own harness expects a sample of each of the "
                  f"{len(problems):,} problems, and will refuse the file of samples", file=sys.stderr)
    elif "infill" in args.tasks:
        args.problems = stdlib_problems(args.limit or 200, args.seed)
    args.limit = args.limit or 200
    out, asked, reference, results, objectives = Path(args.out), args.orders, None, {}, {}
    out.mkdir(parents=True, exist_ok=True)
    for folder in args.ckpt or [newest_run()]:
        model, tok, checkpoint = load_model(folder, args.device)
        config = checkpoint["config"]
        args.folder, args.is_fine_tuned = folder, config["objective"] in ON_PAIRS
        args.pairs = args.pairs or (config["data"] if args.is_fine_tuned else "functions")
        args.data = args.data or ("stdlib" if args.is_fine_tuned else config["data"])
        _, _, args.stream = prepare(args.data, cache_dir=args.cache_dir, tok=tok)
        args.orders = trained_orders(config["knobs"])
        args.orders = asked if asked and args.orders else args.orders
        args.spm_layout, args.samples, args.answered = config["knobs"].get("spm_layout"), [], []
        args.reference = reference[0] if reference and reference[1] == tok.to_dict() else None
        if not results and not config["knobs"].get("mask_ratio"):
            reference = model, tok.to_dict()
        name = Path(folder).resolve().name
        while name in results:
            name += "'"
        objectives[name] = config["objective"]
        results[name] = {task: TASKS[task](model, tok, args) for task in args.tasks}
        files = {f"answers-{name}": args.answered}  # in the forms that the benchmarks' own scripts score
        for order in args.orders:
            files[f"samples-{name}-{order}"] = [
                {"task_id": s["task_id"], "completion": s["completion"]}
                for s in args.samples if s["order"] == order]
        for file, lines in files.items():
            if lines:
                (out / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(pool(results, objectives) if args.pool else results))
    settings = {name: getattr(args, name) for name in ("data", "limit", "seed", "n", "temperature")}
    (out / "results.json").write_text(json.dumps(settings | {"results": results}, indent=1))
    drawn = draw(results, Path(args.figures)) if args.figures else []
    print("written:", *(str(path) for path in (out / "results.json", *drawn)), file=sys.stderr)


if __name__ == "__main__":
    main()
