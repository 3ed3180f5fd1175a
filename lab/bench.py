"""How fast: training steps, building batches, sampling; beside nanoGPT on the reader's own machine.

    python -m lab.bench                                the toy and its variants: at most 3 minutes on 2 cores
    python -m lab.bench --preset gpt2 --compile        any flag of train.py says what is measured
    python -m lab.bench --nanogpt DIR                  beside a checkout of github.com/karpathy/nanoGPT
    python -m lab.bench --nanogpt DIR --time-to-loss   both train from scratch to the same loss: half an hour

Variants take turns, a step each, in one process, so that other work on the machine slows all of them alike;
tables show medians. OMP_NUM_THREADS=1 in front measures one thread. Columns of the table of training steps:

    ratio       speed against that of the first row
    optimizer   share of the step that the optimisers' update takes
    batch       time to build a step's batches, which train.py does meanwhile, as a share of the step
    of peak     the step's FLOP/s over what a large matrix product of the same dtype reaches here, in the same
                process, on the same threads
"""
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import train
from data import Batches, prepare, text_rows
from objectives import OBJECTIVES, ON_PAIRS, knobs_of
from sample import Parser, generate, one_line_errors, pick_device, within

PRODUCT_SIZE = 2048  # of the matrices whose product shows a CPU's peak; four times as large on a GPU
SAMPLE_TOKENS = 512

# --time-to-loss: nanoGPT's published setting for a CPU (its README, over config/train_shakespeare_char.py) at
# its own learning rate and at its best, each with the flags of train.py that reach its loss at the same shape
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 12}
NANOGPT = SHAPE | {"max_iters": 6000, "warmup_iters": 100, "min_lr": 1e-4, "beta2": 0.99, "dropout": 0.0,
                   "compile": False, "dtype": "float32", "gradient_accumulation_steps": 1, "eval_iters": 1,
                   "log_interval": 1}
RACES = {1e-3: "--steps 800", 3e-3: "--steps 1400"}


class Variant:
    """A model in training, one step at a time. times: of each step, the seconds to build its batches, of the
    rest, and of the update of the weights in it."""

    def __init__(self, name, config, model, optimizers, batches):
        self.name, self.config, self.model, self.optimizers = name, config, model, optimizers
        self.batches, self.times, self.device = batches, [], next(model.parameters()).device
        self.forward = torch.compile(model) if config.compile else model

    def step(self):
        """One step, timed: that of train.train on one process, without its reports and checkpoints."""
        c, n, started = self.config, self.config.grad_accum, clock(self.device)
        numbers = range(len(self.times) * n, len(self.times) * n + n)
        micro_batches = train.build_batches(self.batches, numbers, self.device)
        built = clock(self.device)
        for inputs, targets in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=c.dtype == "bf16"):
                loss = self.forward(inputs, targets)[1]
            (loss / n).backward()
        if c.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        before_update = clock(self.device)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        end = clock(self.device)
        self.times.append((built - started, end - built, end - before_update))


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def seconds_of(f, device):
    started = clock(device)
    f()
    return clock(device) - started


def flops_per_token(model):
    """6 N + 12 L C T (PaLM, appendix B): forward and backward. N: the parameters without embeddings, which
    are looked up, but with the output layer, even where it is the embedding's matrix."""
    c = model.config
    n = sum(p.numel() for name, p in model.named_parameters()
            if name.split(".")[-2] not in ("wte", "wpe", "lm_head"))
    return 6 * (n + c.n_embd * c.vocab_size) + 12 * c.n_layer * c.n_embd * c.block_size


def find_peaks(device):
    """Prints and returns {dtype: FLOP/s} of a large product, in fp32 and, if that is faster, in bf16."""
    n, peaks = PRODUCT_SIZE * (4 if device.type == "cuda" else 1), {}
    for name in ["fp32", "bf16"][:1 + train.is_bf16_faster(device)]:
        A = torch.randn(n, n, device=device).to(torch.bfloat16 if name == "bf16" else torch.float32)
        # The fastest of 12: whatever else runs makes a peak look lower.
        peaks[name] = 2 * n**3 / min(seconds_of(lambda: A @ A, device) for _ in range(12))
        print(f"a product of {n} x {n} matrices in {name}: {peaks[name] / 1e9:,.0f} GFLOP/s")
    return peaks


def make_variants(config, dtypes, tok, batches, device, nanogpt):
    """Yields a Variant at a time: what train.py would run; the other objectives, attentions, dtypes and
    optimisers; nanoGPT."""
    def changed(**changes):
        return Namespace(**vars(config) | changes)

    attentions = ["fused", "manual"] if device.type == "cuda" else ["manual", "fused"]
    config = changed(attention=attentions[0] if config.attention == "auto" else config.attention,
                     dtype=dtypes[-1] if config.dtype == "auto" else config.dtype)
    configs = [config]
    for name in [name for name in OBJECTIVES if not {name, config.objective}.intersection(ON_PAIRS)]:
        knobs = knobs_of(OBJECTIVES[name])
        preset = {knob: value for knob, value in train.PRESETS[config.preset].items() if knob in knobs}
        configs += [changed(objective=name, knobs=knobs | preset)] if name != config.objective else []
    configs += [changed(attention=attention, dtype=dtype) for attention in attentions for dtype in dtypes]
    configs += [changed(compile=False), changed(optimizer="adamw" if config.optimizer == "muon" else "muon")]
    for c in [c for i, c in enumerate(configs) if c not in configs[:i]]:
        if c.objective == config.objective:  # the others change the data alone: theirs is the first model
            model, rows = train.make_model(c, tok.n_vocab, device), batches
            optimizers = train.make_optimizers(model, c)
        else:
            rows = Batches(batches.stream, partial(OBJECTIVES[c.objective], **c.knobs), tok, c.block_size,
                           c.batch_size, c.seed)
        name = f"{c.objective}, {c.attention}, {c.dtype}, {c.optimizer}" + ", compiled" * c.compile
        yield Variant(name, c, model, optimizers, rows)
    if nanogpt:
        on_gpu = device.type == "cuda"  # where its train.py computes in bf16 and compiled; on a CPU in fp32
        c = changed(dtype="bf16" if on_gpu else "fp32", compile=on_gpu)
        model = nanogpt_model(nanogpt, config, tok.n_vocab, device)
        with redirect_stdout(None):
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        yield Variant(f"nanoGPT, {c.dtype}, adamw" + ", compiled" * on_gpu, c, model, [optimizer], batches)


def nanogpt_model(directory, config, n_vocab, device):
    """The GPT of the reader's checkout, at our shape."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(directory, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(config, name) for name in
             ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    with redirect_stdout(None):
        return module.GPT(module.GPTConfig(vocab_size=n_vocab, **shape)).to(device)


def bench_steps(variants, peaks, repeats):
    """Prints the table of training steps. A variant that exceeds the GPU's memory is named and left out."""
    running, rows = [], []
    for variant in variants:
        try:
            for _ in range(3):  # the first steps allocate, compile and tune
                variant.step()
            variant.times.clear()
            running.append(variant)
        except torch.OutOfMemoryError:
            print(f"{variant.name}: out of memory")
    for _ in trange(repeats, desc="steps", leave=False):
        for variant in running:
            variant.step()
    for variant in running:
        c = variant.config
        batch, step, update = np.median(variant.times, axis=0)
        low, high = 1e3 * np.percentile(variant.times, (25, 75), axis=0)[:, 1]
        speed = c.batch_size * c.grad_accum * c.block_size / step
        share = f"{flops_per_token(variant.model) * speed / peaks[c.dtype]:.1%}" if c.dtype in peaks else "-"
        ratio = np.median(running[0].times, axis=0)[1] / step
        rows.append((variant.name, f"{1e3 * step:.1f}", f"{low:.1f} to {high:.1f}", f"{speed:,.0f}",
                     f"{ratio:.2f}", f"{update / step:.1%}", f"{batch / step:.1%}", share))
    table(("training step", "ms", "quartiles", "tokens/s", "ratio", "optimizer", "batch", "of peak"), rows)


@torch.no_grad()
def generate_without_cache(model, idx, n):
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1]
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)


def bench_sampling(config, n_vocab, device, nanogpt, repeats):
    """Prints the table of sampling after a single token, one row at a time."""
    n, idx = SAMPLE_TOKENS, torch.zeros(1, 1, dtype=torch.long, device=device)
    model = train.make_model(config, n_vocab, device).eval()
    ways = {"KV cache": lambda: list(generate(model, idx, n)),
            "no cache": lambda: generate_without_cache(model, idx, n)}
    if nanogpt:
        theirs = nanogpt_model(nanogpt, config, n_vocab, device).eval()
        ways["nanoGPT"] = lambda: theirs.generate(idx, n)
    times = [[seconds_of(sample, device) for sample in ways.values()]
             for _ in trange(repeats + 1, desc="sampling", leave=False)]
    medians = np.median(times[1:], axis=0)
    table((f"sampling {n} tokens", "s", "tokens/s", "ratio"),
          [(name, f"{s:.2f}", f"{n / s:,.0f}", f"{medians[0] / s:.3f}") for name, s in zip(ways, medians)])


def table(header, rows):
    """Prints Markdown that reads well in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|")
    print(flush=True)


def time_to_loss(directory, config, arguments):
    """Prints what nanoGPT's train.py, in fp32, and ours need for the same held-out loss, in seconds without
    evaluations."""
    rows = []
    for lr, flags in RACES.items():
        theirs, their_loss = run_nanogpt(directory, lr, config)
        ours, our_loss = run_ours([*arguments, *flags.split()])
        share = f"{ours / theirs:.3f}" + (", loss not reached" if our_loss > their_loss else "")
        rows += [(f"nanoGPT, {lr:g}", f"{theirs:.0f}", f"{their_loss:.4f}", "1"),
                 (flags, f"{ours:.0f}", f"{our_loss:.4f}", share)]
    table(("time to loss", "s", "nats/byte", "share of nanoGPT's time"), rows)


def run_nanogpt(directory, lr, config):
    """Runs the checkout's own train.py on our data -> (seconds of its steps, held-out nats per byte)."""
    device, directory = pick_device(config.device), Path(directory).resolve()
    tok, stream, held_out, _ = prepare(config.data, "bytes", 0, config.cache_dir)
    settings = NANOGPT | {"learning_rate": lr, "lr_decay_iters": NANOGPT["max_iters"], "device": device.type,
                          "eval_interval": NANOGPT["max_iters"], "dataset": "bench", "out_dir": "."}
    model = nanogpt_model(directory, config, tok.n_vocab, device).eval()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data", "bench")
        data.mkdir(parents=True)
        stream.tofile(data / "train.bin")
        held_out.tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tok.n_vocab}))
        Path(folder, "configurator.py").symlink_to(directory / "configurator.py")
        flags = [f"--{name}={value}" for name, value in settings.items()]
        run = subprocess.Popen([sys.executable, directory / "train.py", *flags], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds, line = [], ""
        for line in tqdm(run.stdout, f"nanoGPT, {lr:g}", NANOGPT["max_iters"], unit="line", leave=False):
            if match := re.match(r"iter \d+: loss .*, time ([\d.]+)ms", line):
                seconds.append(float(match[1]) / 1e3)
        if run.wait():
            raise OSError(f"--nanogpt {directory}: its train.py failed ({line.strip()})")
        model.load_state_dict(torch.load(Path(folder, "ckpt.pt"), map_location=device)["model"])
    forward = model.forward
    model.forward = lambda idx: forward(idx, idx)  # without targets, it returns the last position's logits
    # The same rows as in train.py's last evaluation. nanoGPT takes one step more after its own.
    rows = text_rows(held_out, config.block_size, 4 * config.eval_tokens // config.block_size)
    bits, n_bytes = train.text_bits(model, rows, tok)
    return sum(seconds[:NANOGPT["max_iters"]]), bits.sum() / n_bytes.sum() * math.log(2)


def run_ours(arguments):
    """Runs our train.py -> (seconds of its steps, held-out nats per byte)."""
    with tempfile.TemporaryDirectory() as folder:
        config, start = train.read_arguments([*arguments, "--out", folder])
        config.eval_every = config.save_every = config.steps
        report = train.train(config, start)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    return sum(tokens / [line["tokens_per_s"] for line in lines]), report["held_out_bpb"] * math.log(2)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog="and any flag of train.py")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--time-to-loss", action="store_true", help="train nanoGPT and this to the same loss")
    parser.add_argument("--repeats", type=within(1), default=15,
                        help="steps of each variant, a fifth of it for sampling (15)")
    args, rest = parser.parse_known_args(arguments)
    if args.nanogpt and not Path(args.nanogpt, "model.py").is_file():
        raise OSError(f"--nanogpt {args.nanogpt}: no model.py in it; expected a checkout of "
                      "github.com/karpathy/nanoGPT")
    if args.time_to_loss:
        if not args.nanogpt:
            raise ValueError("--time-to-loss: expected --nanogpt DIR, too, the checkout to race with")
        rest += ["--tokenizer=bytes", *(f"{train.flag_of(name)}={value}" for name, value in SHAPE.items())]
    config, start = train.read_arguments(rest)
    device = pick_device(config.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
          + (torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)))
    if args.time_to_loss:
        return time_to_loss(args.nanogpt, config, rest)
    tok, batches, _, _ = train.make_data(config, start, 0, 1)
    peaks = find_peaks(device)
    print(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, vocabulary of "
          f"{tok.n_vocab:,}, {config.grad_accum} x {config.batch_size} x {config.block_size} tokens a step\n")
    bench_steps(make_variants(config, list(peaks), tok, batches, device, args.nanogpt), peaks, args.repeats)
    bench_sampling(config, tok.n_vocab, device, args.nanogpt, max(1, args.repeats // 5))


if __name__ == "__main__":
    main()
