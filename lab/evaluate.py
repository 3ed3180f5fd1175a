"""What a trained model can do, as a table: the claims of the two papers that can be measured offline.

    python -m lab.evaluate --ckpt out/ntp out/fim_spm --tasks all --figures figures
    python -m lab.evaluate --ckpt out/fim_spm --tasks programs --n 10       # pass@10, and the best of ten

A task is a function (model, tok, a) -> {name: figure}; main says what a holds. The first paragraph of its
docstring is its line in --help. Two functions do all the work with the model: score (how likely is this text
after that one) and continuations (generate after each prompt). tasks.py asks the questions.
"""
import argparse
import inspect
import json
import math
import string
import textwrap
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import lines_of, prepare, text_rows
from lab.attention import compare, received
from lab.corpora import held_out_programs, hole, passes_all
from lab.figures import draw, pyplot
from lab.report import check_pool, figure, pool, table
from lab.tasks import needle_prompts, random_span_holes, read_documents, read_problems, record_questions
from objectives import ON_PAIRS, PROMPTS, mask
from sample import (Parser, best_first, collect, generate, infill_prompt, load_checkpoint, load_model,
                    newest_run, note, one_line_errors, pick_device, within)
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
    with tqdm(total=len(rows), desc=desc, unit="text", leave=False, disable=None) as bar:
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
    for number, batch in enumerate(tqdm(batches, desc, unit="batch", leave=False, disable=None)):
        idx = torch.tensor([prompts[i] for i in batch], device=device)
        samples = collect(generate(model, idx, max_new_tokens, temperature, stop=tok.eot, seed=seed + number,
                                   n=n, allowed=tok.eot + 1), tok)
        out |= {i: samples[b * n:(b + 1) * n] for b, i in enumerate(batch)}
    return [out[i] for i in range(len(prompts))]


def bpb(model, tok, a):
    """Bits per byte of held-out text, left to right, as train.py prints it: compares objectives and
    vocabularies (FIM paper: at rate 0.5 as low as without FIM)."""
    rows = text_rows(a.stream, model.config.block_size, 4 * a.limit)
    return {"held-out text, left to right": figure(*text_bits(model, rows, tok), "bits per byte")}


def middle_bpb(model, tok, a):
    """Bits per byte of a middle, given its prefix alone, or prefix and suffix (FIM paper: it is easier to
    predict given the suffix)."""
    holes = random_span_holes(a.stream, tok, a.limit, a.seed, model.config.block_size - 4)
    n_bytes, figures = [len(tok.decode_bytes(middle)) for _, middle, _ in holes], {}
    for name, layout in ({"prefix alone": lambda prefix, suffix: prefix} | a.layouts).items():
        pairs = [([tok.eot, *layout(prefix, suffix)], middle) for prefix, middle, suffix in holes]
        bits = [-s.log_p.sum() / math.log(2) for s in score(model, pairs, desc=f"middle_bpb, {name}")]
        figures[f"middle, {name}"] = figure(bits, n_bytes, "bits per byte")
    return figures


def stopping(model, tok, a):
    """Is <EOT> predicted where a middle ends, and only there, in held-out text of which a random span or
    whole lines are missing (FIM paper)?

    P(<EOT>) within the true middle: at its end, elsewhere, and at its end before a suffix that does not
    continue it: another hole's, or its own without the first line. Only a model that compares the middle with
    the suffix gives the true end a higher probability than these two controls."""
    figures, n_tokens = {}, min(120, model.config.block_size // 2 - 4)
    for kind, span in (("span", "char"), ("lines", "line")) if a.layouts else ():
        *_, layout = a.layouts.values()  # SPM, if the model knows both
        holes = random_span_holes(a.stream, tok, a.limit, a.seed, n_tokens, span)
        own = [suffix for *_, suffix in holes]
        later = [tok.encode("".join(lines_of(tok.decode(suffix))[1:])) for suffix in own]
        for of, suffixes in (("", own), (", another hole's suffix", own[1:] + own[:1]),
                             (", its suffix a line later", later)):
            pairs = [(layout(prefix, suffix), [*middle, tok.eot])
                     for (prefix, middle, _), suffix in zip(holes, suffixes) if suffix or not of]
            p = [np.exp(s.watched) for s in score(model, pairs, tok.eot, f"stopping, {kind}{of}")]
            figures[f"{kind}: P(<EOT>) at the true end{of}"] = figure([each[-1] for each in p])
            if not of:
                figures[f"{kind}: P(<EOT>) elsewhere in the middle"] = figure(
                    [each[:-1].sum() for each in p], [len(each) - 1 for each in p])
    return figures


def programs(model, tok, a):
    """Does a function of the corpus programs, held out, give the right results with its hole filled: a line,
    several lines, a random span of its body? pass@1; with --n N also pass@N and the best of N (FIM
    paper, section 4.5 and appendix H.3).

    Beside it three controls: another function's suffix in the prompt, nothing in the hole, and the function
    continued left to right from its prefix alone."""
    figures, truths = {}, held_out_programs(a.limit, a.seed)
    for kind, words in (("line", "one line"), ("lines", "several lines"), ("span", "random span")):
        rng = np.random.default_rng(a.seed)
        holes = [(text, *parts) for text in truths if (parts := hole(text, kind, rng))]
        prefixes, suffixes = ([tok.encode(part[i]) for part in holes] for i in (1, 3))
        asked = {f"{words}, left to right": [[tok.eot, *prefix] for prefix in prefixes]}  # {name: prompts}
        for order, layout in a.layouts.items():
            for of, given in (("", suffixes), (", another's suffix", suffixes[1:] + suffixes[:1])):
                asked[f"{words}, {order}{of}"] = list(map(layout, prefixes, given))
        for name, prompts in asked.items():
            drawn = continuations(model, tok, prompts, model.config.block_size // 3, a.n, a.temperature,
                                  a.seed, f"programs, {name}")
            passed = passes_all([(prefix + sample.text + suffix * ("left to right" not in name), text)
                                 for samples, (text, prefix, _, suffix) in zip(drawn, holes)
                                 for sample in best_first(samples, tok)])
            passed = np.reshape(passed, (-1, a.n))                              # (holes, n), the best first
            figures[f"{name}, pass@1"] = figure(passed.mean(1))
            if a.n > 1:
                figures[f"{name}, pass@{a.n}"] = figure(passed.any(1))
                figures[f"{name}, best of {a.n}"] = figure(passed[:, 0])
        figures[f"{words}, left empty"] = figure(passes_all(
            [(prefix + suffix, text) for text, prefix, _, suffix in holes]))
    return figures


def needle(model, tok, a):
    """Is a value found at the end of a long text that assigns it at some depth (MEAP paper: more often)?"""
    asked = needle_prompts(model.config.block_size, tok, a.stream, 2 * a.limit, a.seed)
    return recall(model, tok, asked, "depth {1:.0%}", "text of {0} tokens")


def records(model, tok, a):
    """Are questions on generated records answered, one to three records (hops) away: of runs on --data
    records or chains (MEAP paper: key information is retrieved more often)?"""
    asked = [question for corpus in ("records", "chains")
             for question in record_questions(corpus, model.config.block_size, tok, a.limit, a.seed)]
    return recall(model, tok, asked, "{0}, hops: {1}")


def recall(model, tok, questions, *groups):
    """[(cell, prompt ids, answer)] -> the share of answers that greedy decoding gives (it does if and only if
    each of an answer's tokens is the likeliest after those before it), and the bits that an answer costs.
    groups: what to call a cell of the table, a format of the cell's parts."""
    pairs = [(prompt, tok.encode(answer)) for _, prompt, answer in questions]
    scores = score(model, pairs, desc="recall")
    recalled = [(s.likeliest == answer).all() for s, (_, answer) in zip(scores, pairs)]
    bits = [-s.log_p.sum() / math.log(2) for s in scores]
    figures = {"recalled": figure(recalled), "the answer": figure(bits, unit="bits")}
    for words in groups:
        names = [f"recalled, {words.format(*cell)}" for cell, *_ in questions]
        figures |= {name: figure([is_right for is_right, other in zip(recalled, names) if other == name])
                    for name in names}
    return figures


def attention(model, tok, a):
    """Does attention to masked positions decay, and does its variance elsewhere rise, from plain inputs of
    the first run to masked inputs of this one (MEAP paper: decay by half, from NTP to MEAP)?"""
    T, rng = min(model.config.block_size, a.reference.config.block_size), np.random.default_rng(a.seed)
    plain = np.array([inputs for inputs, _ in text_rows(a.stream, T, -(-a.limit // 4))])
    masked = np.array([mask(row, 0.15, tok, rng) for row in plain])
    if not len(plain) or tok.to_dict() != a.reference_tok.to_dict():
        return {}
    before, fall, variance, rise = compare(received(a.reference, plain), received(model, masked),
                                           masked == tok.mask)
    return {"decay of attention to masked positions": figure(fall, before),
            "rise of its variance elsewhere": figure(rise, variance)}


def infill(model, tok, a):
    """Are the holes of --problems, a file of the HumanEval infilling benchmark, filled exactly? Writes --n
    samples of each for the benchmark's own script, which runs their tests: pass@k (FIM paper).

    A sample has at most a quarter of the context."""
    figures, most = {}, model.config.block_size // 4
    for order, layout in a.layouts.items():
        prompts = [infill_prompt(model, tok, prefix, suffix, most, layout)
                   for _, prefix, _, suffix in a.problems]
        drawn = continuations(model, tok, prompts, most, a.n, a.temperature, a.seed, f"infill, {order}")
        samples = [(task_id, middle, tok.decode(ids))
                   for (task_id, _, middle, _), of_one in zip(a.problems, drawn) for ids, _ in of_one]
        Path(a.out, f"samples-{a.name}-{order.lower()}.jsonl").write_text("".join(
            json.dumps({"task_id": task_id, "completion": text}) + "\n" for task_id, _, text in samples))
        figures[f"exact match, {order}"] = figure([text == middle for _, middle, text in samples])
    return figures


def multidoc(model, tok, a):
    """Does the first line of an answer contain a true one, in questions of --documents, a file of Lost in the
    Middle, judged as by its authors (MEAP paper: more often with 10 and 20 documents)?

    What the context does not hold is left out; "fits the context" is the share of the others."""
    most = min(100, model.config.block_size // 4)
    encoded = [(tok.encode(prompt), truths) for prompt, truths in a.documents]
    kept = [(ids, truths) for ids, truths in encoded if len(ids) + most <= model.config.block_size]
    drawn = continuations(model, tok, [ids for ids, _ in kept], most, desc="multidoc")
    lines = [plain_words(tok.decode(ids).split("\n")[0]) for ((ids, _),) in drawn]
    is_right = [any(plain_words(truth) in line for truth in truths)
                for line, (_, truths) in zip(lines, kept)]
    return {"fits the context": figure(np.arange(len(encoded)) < len(kept)), "right": figure(is_right)}


def plain_words(text):
    """Lower case, without punctuation and articles, as question answering compares texts (SQuAD's rule)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


TASKS = {task.__name__: task for task in (bpb, middle_bpb, stopping, programs, needle, records, attention,
                                          infill, multidoc)}
FILES = {"infill": "problems", "multidoc": "documents"}  # the flags that these tasks need


def layouts(objective, knobs, tok):
    """How a run was trained to infill: {PSM, SPM, or an objective's name: f(prefix, suffix) -> prompt}."""
    if objective not in PROMPTS:
        return {}
    prompt = partial(PROMPTS[objective], tok=tok, **knobs)
    if "spm_rate" not in knobs:
        return {objective.removeprefix("fim_").upper(): prompt}
    return {order: partial(prompt, spm_rate=rate) for order, rate in (("PSM", 0.0), ("SPM", 1.0))
            if knobs["spm_rate"] != 1 - rate}


def read_arguments(arguments):
    lines = ["{:<12} {}".format(name, " ".join(inspect.getdoc(task).split("\n\n")[0].split()))
             for name, task in TASKS.items()]
    lines = [textwrap.fill(line, 100, initial_indent="  ", subsequent_indent=" " * 15) for line in lines]
    parser = Parser(description=__doc__.splitlines()[0], epilog="\n".join(["tasks:", *lines]),
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--ckpt", nargs="+", metavar="DIR", help="folders of runs (default: the newest under out/)")
    flag("--tasks", nargs="+", default=["all"], choices=("all", *TASKS), metavar="TASK",
         help="all (the default; infill and multidoc with their files), or some of the tasks below")
    flag("--limit", type=within(1), help="about how many examples a task takes (200; of files all)")
    flag("--seed", type=within(1, 2**31), default=1, help="decides the examples (default 1)")
    flag("--data", help="whose held-out part to use (default: the first run's; stdlib, if that was pairs)")
    flag("--cache-dir", default="cache", help="folder of tokenised corpora (default cache)")
    flag("--n", type=within(1, 1000), default=1, help="programs, infill: samples of each hole (default 1)")
    flag("--temperature", type=within(0.0, 100.0), help="of samples (default 0, greedy; 0.8 with --n)")
    flag("--problems", metavar="F", help="infill: a file of the HumanEval infilling benchmark")
    flag("--documents", metavar="F", help="multidoc: a file of Lost in the Middle")
    flag("--out", default="out/eval", metavar="DIR", help="for results.json, added to (default out/eval)")
    flag("--figures", metavar="DIR", help="draw a PNG of each task there; needs matplotlib")
    flag("--pool", action="store_true", help="a column an objective, over runs that differ in the seed alone")
    flag("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    for task, name in FILES.items():
        if task in args.tasks and not getattr(args, name):
            raise ValueError(f"--tasks {task}: expected its file, --{name} F")
    if "all" in args.tasks:
        args.tasks = [task for task in TASKS if task not in FILES or getattr(args, FILES[task])]
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
    a.problems = read_problems(a.problems)[:a.limit] if a.problems else []
    a.limit = a.limit or 200
    first = next(iter(configs.values()))
    a.data = a.data or ("stdlib" if first["objective"] in ON_PAIRS else first["data"])
    file.parent.mkdir(parents=True, exist_ok=True)

    results = {}
    for a.name, folder in runs.items():
        model, tok, checkpoint = load_model(folder, a.device)
        a.layouts = layouts(configs[a.name]["objective"], configs[a.name]["knobs"], tok)
        a.stream = prepare(a.data, cache_dir=a.cache_dir, tok=tok)[2]
        if not results:
            a.reference, a.reference_tok = model, tok
        results[a.name] = {task: TASKS[task](model, tok, a) for task in a.tasks}
        settings = {key: getattr(a, key) for key in ("data", "limit", "seed", "n", "temperature")}
        settings["step"] = checkpoint["step"]
        saved["folders"][a.name] = folder
        saved["settings"][a.name] = saved["settings"].get(a.name, {}) | dict.fromkeys(a.tasks, settings)
        saved["results"][a.name] = saved["results"].get(a.name, {}) | results[a.name]
        file.write_text(json.dumps(saved, indent=1))
    columns = pool(results, configs) if a.pool else results
    print(table(columns))
    note(f"written: {' '.join(map(str, [file, *(draw(columns, Path(a.figures)) if a.figures else [])]))}")


if __name__ == "__main__":
    main()
