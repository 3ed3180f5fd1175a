"""What a trained model can do, as a table: the claims of the two papers that can be measured offline.

    python -m lab.evaluate --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python -m lab.evaluate --ckpt out/fim_spm --tasks stopping infill --run-tests      # runs completions

A task is a function (model, tok, a) -> {name: figure}; report.py says what a figure is, main what a holds.
The first paragraph of its docstring is its line in --help. Two functions do all the work with the model:
score (how likely is this text after that one) and continuations (generate after each prompt). tasks.py asks
the questions.
"""
import argparse
import difflib
import inspect
import json
import math
import os
import string
import textwrap
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import lines_of, prepare, text_rows
from lab.attention import SEGMENTS, masked_change, shares
from lab.corpora import held_out_programs, hole, passes_all
from lab.figures import draw, pyplot
from lab.pairs import encode_pairs, load_pairs
from lab.report import check_pool, figure, figures_by, pool, table
from lab.tasks import (docstring_questions, multineedle_prompts, needle_prompts, random_span_holes,
                       read_documents, read_problems, records_prompts, single_line_holes, stdlib_problems)
from objectives import ON_PAIRS, PROMPTS
from sample import (STOPPED, Parser, best_first, collect, generate, infill_prompt, load_checkpoint,
                    load_model, newest_run, note, one_line_errors, pick_device, within)
from train import text_bits


class Score(NamedTuple):
    """Arrays (n,), an entry for each token of a continuation, given all before it."""
    log_p: np.ndarray      # its log-probability, nats
    likeliest: np.ndarray  # the likeliest id in its place
    watched: np.ndarray    # the log-probability of the watched id, nats


@torch.no_grad()
def score(model, pairs, watch=0, desc=None):
    """(prompt, continuation) pairs, lists of ids of any lengths -> a Score for each pair.

    Rows of like length share a batch, padded on the right (causal attention: no token sees the padding). A
    prompt is never empty; what does not fit the context is cut off its left. Raises ValueError where a
    continuation alone does not fit."""
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
            idx = torch.zeros(len(batch), T, dtype=torch.long)
            for b, i in enumerate(batch):
                ids = sum(rows[i], [])[:T]
                idx[b, :len(ids)] = torch.tensor(ids)
            logits, _ = model(idx.to(device))                                   # (B, T, V)
            for i, row in zip(batch, logits):
                first, n = len(rows[i][0]) - 1, len(rows[i][1])
                log_p = F.log_softmax(row[first:first + n].float(), dim=-1)     # (n, V)
                targets = torch.tensor(rows[i][1], dtype=torch.long, device=device)
                columns = log_p.gather(1, targets[:, None])[:, 0], log_p.argmax(-1), log_p[:, watch]
                scores[i] = Score(*(column.cpu().numpy().astype(np.float64) for column in columns))
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
    size = max(1, min(in_memory, 96 if device.type == "cpu" else 1024) // n)  # 96: suits a CPU's cache
    batches = [same[start:start + size] for same in by_length.values() for start in range(0, len(same), size)]
    out = {}
    for number, batch in enumerate(tqdm(batches, desc, unit="batch", leave=False, disable=desc is None)):
        idx = torch.tensor([prompts[i] for i in batch], device=device)
        samples = collect(generate(model, idx, max_new_tokens, temperature, stop=tok.eot, seed=seed + number,
                                   n=n, allowed=tok.eot + 1), tok)
        out |= {i: samples[b * n:(b + 1) * n] for b, i in enumerate(batch)}
    return [out[i] for i in range(len(prompts))]


def bits(log_p):
    return -log_p.sum() / math.log(2)


def bits_per_byte(tok, costs, texts):
    """Bits and ids of texts -> a figure."""
    return figure(costs, [len(tok.decode_bytes(ids)) for ids in texts], "bits/byte")


def bpb(model, tok, a):
    """Bits per byte of held-out text, left to right, as train.py prints it: compares objectives and
    vocabularies (FIM paper: at rate 0.5 as low as without FIM)."""
    rows = text_rows(a.stream, model.config.block_size, 4 * a.limit)
    return {"left to right": figure(*text_bits(model, rows, tok), "bits/byte")}


def middle_bpb(model, tok, a):
    """Bits per byte of a middle, given its prefix alone or prefix and suffix, and of the whole text, left to
    right or as a FIM example, whose sentinels cost bits, too (FIM paper: a middle is easier to predict given
    the suffix, the whole example harder than the plain text)."""
    holes = random_span_holes(a.stream, tok, a.limit, a.seed, model.config.block_size - 4)
    middles, texts = [middle for _, middle, _ in holes], [sum(hole, []) for hole in holes]
    figures = {}
    for name, layout in ({"prefix alone": lambda prefix, suffix: prefix} | a.layouts).items():
        pairs = [([tok.eot], [*layout(prefix, suffix), *middle]) for prefix, middle, suffix in holes]
        scores = score(model, pairs, desc=f"middle_bpb, {name}")
        cost = [bits(s.log_p[-len(middle):]) for s, middle in zip(scores, middles)]
        figures[f"middle, {name}"] = bits_per_byte(tok, cost, middles)
        if name in a.layouts:
            figures[f"text, {name}"] = bits_per_byte(tok, [bits(s.log_p) for s in scores], texts)
    plain = score(model, [([tok.eot], tok.encode(tok.decode(ids))) for ids in texts], desc="middle_bpb, text")
    return figures | {"text, left to right": bits_per_byte(tok, [bits(s.log_p) for s in plain], texts)}


def stopping(model, tok, a, n=8):
    """Is <EOT> emitted where a middle ends, in holes of held-out text of two kinds, a whole line, and a span
    between two uniform characters, on which models are trained (FIM paper)?

    A line has 120 tokens of prefix, 80 of suffix and at most 40 to fill, a span 120 in all (in proportion,
    where the context is shorter than 252). Samples may be 8 tokens longer than the longest middle."""
    figures, scale = {}, min(1, (model.config.block_size - 4) / 248)
    n_prefix, n_suffix, n_line = (int(scale * size) for size in (120, 80, 40))
    line_holes = single_line_holes(a.stream, tok, a.limit, a.seed, n_prefix, n_suffix, n_line)
    span_holes = random_span_holes(a.stream, tok, a.limit, a.seed, n_prefix)
    for layout in list(a.layouts.values())[-1:]:  # SPM, if the model knows both
        for kind, holes, longest in (("line", line_holes, n_line), ("span", span_holes, n_prefix)):
            of_kind = (filled(model, tok, holes, layout, longest + int(8 * scale), n, a.seed) |
                       eot_probabilities(model, tok, holes, layout) | lookahead(model, tok, holes, a.seed))
            figures |= {f"{kind}: {name}": f for name, f in of_kind.items()}
    return figures


def filled(model, tok, holes, layout, max_new_tokens, n, seed):
    """How many holes are filled with text that ends in <EOT>, and exactly: greedily, and by the best of n
    samples at temperature 0.8 (FIM paper, appendix H.3); where all are lines, also after a line end."""
    prompts = [layout(prefix, suffix) for prefix, _, suffix in holes]
    truths = [tok.decode(middle) for _, middle, _ in holes]
    figures = {}
    for name, count, temperature in (("greedy", 1, 0.0), (f"best of {n}", n, 0.8)):
        samples = continuations(model, tok, prompts, max_new_tokens, count, temperature, seed,
                                f"stopping, {name}")
        best = [best_first(of_one_prompt, tok)[0] for of_one_prompt in samples]
        ended = [sample.text if sample.ended == STOPPED else None for sample in best]
        figures[f"{name} ends in <EOT>"] = figure([text is not None for text in ended])
        if all(truth.endswith("\n") for truth in truths):
            figures[f"{name} ends in <EOT> after a line end"] = figure(
                [(text or "").endswith("\n") for text in ended])
        figures[f"{name} exact match"] = figure([text == truth for text, truth in zip(ended, truths)])
    return figures


def eot_probabilities(model, tok, holes, layout):
    """P(<EOT>) within the true middle: at its end, elsewhere, and at its end before a suffix that does not
    continue it: another hole's, or its own without the first line. Only a model that compares the middle with
    the suffix gives the true end a higher probability than these two controls."""
    def at_each_token(suffixes):
        pairs = [(layout(prefix, suffix), middle + [tok.eot])
                 for (prefix, middle, _), suffix in zip(holes, suffixes)]
        scores = score(model, pairs, tok.eot, "stopping, P(<EOT>)")
        return [np.exp(s.watched) for s in scores], [s.likeliest[-1] == tok.eot for s in scores]

    suffixes = [suffix for _, _, suffix in holes]
    moved_on = [tok.encode("".join(lines_of(tok.decode(suffix))[1:]))[:len(suffix)] for suffix in suffixes]
    p, is_likeliest = at_each_token(suffixes)
    p_another, _ = at_each_token(suffixes[1:] + suffixes[:1])
    p_moved_on, _ = at_each_token(moved_on)
    end = "P(<EOT>) at the true end"
    return {end: figure([each[-1] for each in p]),
            "P(<EOT>) elsewhere in the middle": figure([each[:-1].sum() for each in p],
                                                       [len(each) - 1 for each in p]),
            "<EOT> likeliest at the true end": figure(is_likeliest),
            f"{end} before another hole's suffix": figure([each[-1] for each in p_another]),
            f"{end} before the suffix a line later": figure(
                [each[-1] for each, suffix in zip(p_moved_on, moved_on) if suffix])}


def lookahead(model, tok, holes, seed, n=2):
    """Whether the same model, left to right, would know where a middle joins its suffix: the probability that
    the suffix's first n tokens come next, at the middle's true end and at one place elsewhere in it; and at
    the true end those of another hole's suffix. Holes with a shorter suffix are left out."""
    rng, pairs = np.random.default_rng(seed), []
    holes = [hole for hole in holes if len(hole[2]) >= n]
    for (prefix, middle, suffix), (_, _, another) in zip(holes, holes[1:] + holes[:1]):
        at_end = [tok.eot, *prefix, *middle]
        elsewhere = at_end[:1 + len(prefix) + rng.integers(len(middle))]
        pairs += [(at_end, suffix[:n]), (elsewhere, suffix[:n]), (at_end, another[:n])]
    p = np.array([np.exp(s.log_p.sum()) for s in score(model, pairs, desc="stopping, lookahead")])
    names = ("at the true end", "elsewhere in the middle", "of another hole at the true end")
    return {f"P(the suffix's first {n} tokens) {name}": figure(p[i::3]) for i, name in enumerate(names)}


def infill(model, tok, a):
    """Are holes in functions filled exactly, or nearly, and do the completions pass the tests (with
    --run-tests): the FIM paper's benchmarks, on the standard library or, with --problems, HumanEval?

    Edit similarity is difflib's ratio. Plain samples of at most a quarter of the context: no completion is
    cut. Errors take the holes of one function together."""
    figures, n, most = {"files": {}}, a.n, model.config.block_size // 4
    reach = 64 * most  # characters: many more than the context holds
    around = [(p.text[max(0, p.start - reach):p.start], p.text[p.end:p.end + reach]) for p in a.problems]
    truths = [p.text[p.start:p.end] for p in a.problems]
    kinds = defaultdict(lambda: defaultdict(list))  # {kind: {function: [number of a problem]}}
    for i, p in enumerate(a.problems):
        kind, *function = p.task_id.split("/")[:3]
        kinds[kind.replace("Infilling", "")]["/".join(function)].append(i)
    for order, layout in a.layouts.items():
        prompts = [infill_prompt(model, tok, *texts, most, layout) for texts in around]
        drawn = continuations(model, tok, prompts, most, n, a.temperature, a.seed, f"infill, {order}")
        completions = [[tok.decode(ids) for ids, _ in samples] for samples in drawn]
        tests = [(p, text) for p, texts in zip(a.problems, completions) for text in texts]
        figures["files"][f"samples-{{}}-{order}"] = [
            {"task_id": p.task_id, "completion": text} for p, text in tests]
        both = list(zip(completions, truths))
        measured = {  # {name: [mean over a problem's samples]}
            "exact match": [np.mean([text == truth for text in texts]) for texts, truth in both],
            "edit similarity": [np.mean([difflib.SequenceMatcher(None, text, truth, autojunk=False).ratio()
                                         for text in texts]) for texts, truth in both],
            "ends in <EOT>": [np.mean([ids[-1] == tok.eot for ids, _ in samples]) for samples in drawn]}
        if a.run_tests:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                passed = threads.map(lambda test: test[0].passes(test[1]), tests)
                passed = list(tqdm(passed, f"infill, {order}, tests", len(tests), unit="test", leave=False))
            counts = np.reshape(passed, (-1, n)).sum(axis=1).tolist()
            measured |= {f"pass@{k}": [pass_at_k(n, c, k) for c in counts] for k in (1, 10, 100) if k <= n}
        for kind, functions in kinds.items():
            for name, values in measured.items():
                sums = [sum(values[i] for i in numbers) for numbers in functions.values()]
                figures[f"{kind} {order} {name}"] = figure(sums, list(map(len, functions.values())))
    return figures


def programs(model, tok, a):
    """Does a function of the corpus programs, held out, give the right results with its hole filled: a line,
    several lines, a random span of its body? pass@1, or pass@k over --n samples, and the best of them (FIM
    paper, section 4.5 and appendix H.3).

    Beside it three controls: another function's suffix in the prompt, nothing in the hole, and the function
    continued left to right from its prefix alone."""
    figures, truths = {}, held_out_programs(a.limit, a.seed)
    most = model.config.block_size // 3

    def passing(name, texts, prompts, ends):
        """Runs what the model writes after each prompt: the hole's prefix, the text, what ends has for it."""
        drawn = continuations(model, tok, prompts, most, a.n, a.temperature, a.seed, f"programs, {name}")
        made = [[(prefix + sample.text + end, text) for sample in best_first(samples, tok)]
                for samples, (text, prefix, _, _), end in zip(drawn, texts, ends)]
        passed = iter(passes_all([pair for pairs in made for pair in pairs]))
        passed = [[next(passed) for _ in pairs] for pairs in made]              # (holes, n)
        for k in (k for k in (1, 10, 100) if k <= a.n):
            figures[name + (f", pass@{k}" if a.n > 1 else "")] = figure(
                [pass_at_k(a.n, sum(of_hole), k) for of_hole in passed])
        if a.n > 1:
            figures[f"{name}, best of {a.n}"] = figure([of_hole[0] for of_hole in passed])

    for kind, words in (("line", "one line"), ("lines", "several lines"), ("span", "random span")):
        rng = np.random.default_rng(a.seed)
        texts = [(text, *parts) for text in truths if (parts := hole(text, kind, rng))]
        prefixes, suffixes = ([tok.encode(part[i]) for part in texts] for i in (1, 3))
        own = [suffix for *_, suffix in texts]
        for order, layout in a.layouts.items():
            for of, given in (("", suffixes), (", another's suffix", suffixes[1:] + suffixes[:1])):
                passing(f"{words}, {order}{of}", texts, list(map(layout, prefixes, given)), own)
        plain = [[tok.eot, *prefix] for prefix in prefixes]
        passing(f"{words}, left to right", texts, plain, [""] * len(texts))
        figures[f"{words}, left empty"] = figure(passes_all(
            [(prefix + suffix, text) for text, prefix, _, suffix in texts]))
    return figures


def pass_at_k(n, c, k):
    """The chance that one of k draws passes, of n samples of which c do: unbiased (Chen et al., 2021,
    equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def needle(model, tok, a):
    """Is a value found at the end of a long text that assigns it at some depth (MEAP paper: more often)?"""
    prompts = needle_prompts(model.config.block_size, tok, a.stream, 2 * a.limit, a.seed)
    return recall(model, tok, prompts, "tokens")


def records(model, tok, a):
    """Is the value of one among 5, 10 or 20 records found by its key (as in Lost in the Middle)?"""
    prompts = records_prompts(model.config.block_size, tok, a.limit, a.seed)
    return recall(model, tok, prompts, "records")


def multineedle(model, tok, a):
    """Is a value found through a chain of two or three assignments in a text (MEAP paper: more often)?"""
    prompts = multineedle_prompts(model.config.block_size, tok, a.stream, a.limit, a.seed)
    return recall(model, tok, prompts, "needles")


def recall(model, tok, questions, unit):
    """[((number, position), prompt ids, answer, another value)] -> the share of answers that greedy decoding
    would give (it does if and only if each of the answer's tokens is the likeliest after those before it);
    how often the answer is preferred to the other value (chance: half); the bits that it costs. unit: of the
    number, such as records. "grid": the first two by number and position, for figures.py."""
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


def multidoc(model, tok, a):
    """Does the first line of an answer contain a true one, in questions of --documents, a file of Lost in the
    Middle, judged as by its authors (MEAP paper: more often with 10 and 20 documents)?

    What the context does not hold is left out; "fits the context" is the share of the others."""
    max_new_tokens = min(100, model.config.block_size // 4)
    encoded = [(tok.encode(prompt), truths, cell) for prompt, truths, *cell in a.documents]
    kept = [(ids, *rest) for ids, *rest in encoded if len(ids) + max_new_tokens <= model.config.block_size]
    drawn = continuations(model, tok, [ids for ids, *_ in kept], max_new_tokens, desc="multidoc")
    texts = [tok.decode(ids) for ((ids, _),) in drawn]
    is_right = [any(plain_words(truth) in plain_words(text.split("\n")[0]) for truth in truths)
                for text, (_, truths, _) in zip(texts, kept)]
    by_cell = figures_by([tuple(cell) for _, _, cell in kept], is_right)
    figures = {"fits the context": figure(np.arange(len(encoded)) < len(kept)), "right": figure(is_right)}
    figures |= {f"{k} documents, answer at {position}": f for (k, position), f in by_cell.items()}
    lines = [{"answers": truths, "model_answer": text} for text, (_, truths, _) in zip(texts, kept)]
    return figures | {"files": {"answers-{}": lines} if lines else {}} if encoded else {}


def plain_words(text):
    """Lower case, without punctuation and articles, as question answering compares texts (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def choice(model, tok, a):
    """Is the docstring of a held-out function the likeliest of four (chance: 25%)?"""
    questions = docstring_questions(a.stream, tok, a.limit, a.seed)
    pairs = [(tok.encode(context), tok.encode(text)) for context, texts, _ in questions for text in texts]
    scores = iter(score(model, pairs, desc="choice"))
    is_right = [choose([next(scores) for _ in texts], label) for _, texts, label in questions]
    return {"docstring of a function": figure(is_right)}


def answers(model, tok, a):
    """Bits per byte of held-out answers, how many of their tokens are the model's likeliest, and how many
    answers greedy decoding gives (MEAP paper: better after half the epochs of fine-tuning).

    Pairs that do not fit the context are left out. A model that was not fine-tuned gets no <MID>. "curve":
    [epoch, answer_bpb] at each evaluation of its training, if that recorded any."""
    pairs = [(prompt, answer) for prompt, answer in encode_pairs(load_pairs(a.pairs)[1], tok)
             if len(prompt) + len(answer) + 2 <= model.config.block_size][:a.limit]
    cue = [tok.mid] if a.is_fine_tuned else []
    scores = score(model, [(prompt + cue, answer + [tok.eot]) for prompt, answer in pairs], desc="answers")
    right = [s.likeliest == [*answer, tok.eot] for s, (_, answer) in zip(scores, pairs)]
    metrics = Path(a.folder, "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    cost = [bits(s.log_p[:-1]) for s in scores]
    return {"answer": bits_per_byte(tok, cost, [answer for _, answer in pairs]),
            "likeliest token": figure([r.sum() for r in right], [len(r) for r in right]),
            "exact match": figure([r.all() for r in right]),
            "curve": [[line["epoch"], line["answer_bpb"]] for line in lines if "answer_bpb" in line]}


def attention(model, tok, a):
    """Does attention to masked positions decay, does its variance elsewhere rise, and how much falls on the
    answer to a question (MEAP paper: decay by half, more on the answer)?

    Within the model and, with a reference, from the reference's plain inputs to this model's masked ones, as
    the paper has NTP and MEAP; the shares are of the last token's attention, errors over heads."""
    figures, n = {}, -(-a.limit // 4)
    for name, plain_model in (("within the model", model), ("from the first, plain", a.reference)):
        if plain_model is not None:
            before, fall, variance, rise = masked_change(plain_model, model, tok, a.stream, n, a.seed)
            figures[f"decay at masked positions, {name}"] = figure(fall, before)
            figures[f"rise of variance elsewhere, {name}"] = figure(rise, variance)
    of_segments = zip(SEGMENTS, shares(model, tok).T)
    return figures | {f"share of {name}": figure(share) for name, share in of_segments}


TASKS = {task.__name__: task for task in (bpb, middle_bpb, stopping, programs, infill, needle, records,
                                          multineedle, multidoc, choice, answers, attention)}


def layouts(objective, knobs, tok):
    """The layouts in which a model was trained to infill: {order, or else its objective: f(prefix, suffix) ->
    prompt, lists of ids}; {} for one that never saw a gap."""
    if objective not in PROMPTS or knobs.get("fim_rate") == 0:
        return {}
    prompt = partial(PROMPTS[objective], tok=tok, **knobs)
    if "spm_rate" not in knobs:
        return {objective.removeprefix("fim_"): prompt}
    return {order: partial(prompt, spm_rate=rate) for order, rate in (("psm", 0.0), ("spm", 1.0))
            if knobs["spm_rate"] != 1 - rate}


def read_arguments(arguments):
    lines = ["{:<12} {}".format(name, " ".join(inspect.getdoc(task).split("\n\n")[0].split()))
             for name, task in TASKS.items()]
    lines = [textwrap.fill(line, 100, initial_indent="  ", subsequent_indent=" " * 15) for line in lines]
    parser = Parser(description=__doc__.splitlines()[0], epilog="\n".join(["tasks:", *lines]),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under out/); if the "
         "first was trained without masks, attention compares the others to it")
    flag("--tasks", nargs="+", default=["all"], choices=("all", *TASKS), metavar="TASK",
         help="all (the default), or some of the tasks below")
    flag("--limit", type=within(1), help="about how many examples a task takes (200; of files all)")
    flag("--seed", type=within(0, 2**31), default=1, help="decides the examples (default 1)")
    flag("--data", help="whose held-out part to use (default: what the first was trained on; stdlib, if that "
         "was pairs)")
    flag("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    flag("--n", type=within(1, 1000), default=1, help="infill: samples of each problem (default 1)")
    flag("--temperature", type=within(0.0, 100.0), help="infill: 0: greedy (default 0; 0.8 if --n is not 1)")
    flag("--run-tests", action="store_true", help="infill: run the completions, in a process with limits: a "
         "guard against accidents, not against malice (see sandbox.py)")
    flag("--problems", metavar="F", help="infill: a file of the HumanEval infilling benchmark")
    flag("--documents", metavar="F", help="multidoc: a file of Lost in the Middle")
    flag("--pairs", metavar="F", help="answers: as --data of train.py for sft (default: what the first was "
         "fine-tuned on, or functions)")
    flag("--out", default="out/eval", metavar="DIR", help="for the results (default out/eval); those of "
         "other runs and tasks in it are kept")
    flag("--figures", metavar="DIR", help="draw PNGs there; needs matplotlib")
    flag("--pool", action="store_true", help="a column an objective, errors over its runs, which may differ "
         "in the seed alone")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    if "multidoc" in args.tasks and not args.documents:
        raise ValueError("--tasks multidoc: expected --documents F, a file of Lost in the Middle")
    args.tasks = list(TASKS) if "all" in args.tasks else args.tasks
    if args.temperature is None:
        args.temperature = 0.0 if args.n == 1 else 0.8
    args.device = pick_device(args.device)
    if args.figures:
        pyplot()
    return args


@one_line_errors
def main(arguments=None):
    a = read_arguments(arguments)
    # All that may be wrong with the runs and the files shows before any work.
    file, saved = Path(a.out, "results.json"), {"folders": {}, "settings": {}, "results": {}}
    if file.is_file():
        saved |= json.loads(file.read_text())
    runs, configs = {}, {}  # {name: folder}, {name: config}
    for path in a.ckpt or [newest_run()]:
        config, folder = load_checkpoint(path)["config"], Path(path).resolve()
        folder = folder.parent if folder.is_file() else folder
        name = folder.name
        while (saved["folders"] | runs).get(name, str(folder)) != str(folder):  # another run of that name
            name += "'"
        runs[name], configs[name] = str(folder), config
    if a.pool:
        check_pool(configs)
    a.documents = read_documents(a.documents)[:a.limit] if a.documents else []
    if a.problems:
        problems = read_problems(a.problems)
        a.problems = problems[:a.limit]
        if len(a.problems) < len(problems):
            note(f"--limit {a.limit}: the benchmarks' own harness expects a sample of each of the "
                 f"{len(problems):,} problems, and will refuse the file of samples")
    elif "infill" in a.tasks:
        a.problems = stdlib_problems(a.limit or 200, a.seed)
    a.limit = a.limit or 200
    first = next(iter(configs.values()))
    on_pairs = first["objective"] in ON_PAIRS
    a.data = a.data or ("stdlib" if on_pairs else first["data"])
    a.pairs = a.pairs or (first["data"] if on_pairs else "functions")
    file.parent.mkdir(parents=True, exist_ok=True)

    reference, results = None, {}
    for name, a.folder in runs.items():
        model, tok, checkpoint = load_model(a.folder, a.device)
        config = checkpoint["config"]
        a.is_fine_tuned = config["objective"] in ON_PAIRS
        a.layouts = layouts(config["objective"], config["knobs"], tok)
        a.stream = prepare(a.data, cache_dir=a.cache_dir, tok=tok)[2]
        a.reference = reference[0] if reference and reference[1] == tok.to_dict() else None
        if not results and not config["knobs"].get("mask_ratio"):
            reference = model, tok.to_dict()
        results[name] = {task: TASKS[task](model, tok, a) for task in a.tasks}
        for figures in results[name].values():  # files in the forms that the benchmarks' own scripts score
            for stem, lines in figures.pop("files", {}).items():
                path = file.with_name(f"{stem.format(name)}.jsonl")
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = {key: getattr(a, key) for key in ("data", "limit", "seed", "n", "temperature")}
        settings["step"] = checkpoint["step"]
        saved["folders"][name] = a.folder
        saved["settings"][name] = saved["settings"].get(name, {}) | dict.fromkeys(a.tasks, settings)
        saved["results"][name] = saved["results"].get(name, {}) | results[name]
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(saved, indent=1))
        temporary.replace(file)  # earlier results survive a crash
    print(table(pool(results, configs) if a.pool else results))
    note(f"written: {' '.join(map(str, [file, *(draw(results, Path(a.figures)) if a.figures else [])]))}")


if __name__ == "__main__":
    main()
