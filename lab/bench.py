"""How fast: training steps and sampling; beside nanoGPT on your own machine.

    python -m lab.bench                                the toy: a minute on 2 cores
    python -m lab.bench --preset gpt2 --compile        any flag of train.py says what is measured
    python -m lab.bench --nanogpt DIR                  beside a checkout of github.com/karpathy/nanoGPT
    python -m lab.bench --nanogpt DIR --time-to-loss   both train from scratch to the same loss: half an hour

Variants take turns, a step each, in one process, so that other work on the machine slows all of them alike;
tables show medians. OMP_NUM_THREADS=1 in front measures one thread. Columns of the table of training steps:

    ratio     speed relative to the first row
    batch     time to build the step's batches, relative to the rest of the step
    of peak   the step's FLOP/s relative to those of a large matrix product of its dtype in this process
"""
import argparse
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
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import train
from data import prepare, text_rows
from sample import Parser, generate, one_line_errors, pick_device, within

PRODUCT_SIZE = 2048  # of the matrices whose product shows a CPU's peak; four times as large on a GPU
SAMPLE_TOKENS = 512

# --time-to-loss: nanoGPT's published setting for a CPU (its README, over config/train_shakespeare_char.py) at
# its own learning rate and at its best, and for each the flags of train.py that reach its loss
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 12}
NANOGPT = SHAPE | {"max_iters": 6000, "warmup_iters": 100, "min_lr": 1e-4, "beta2": 0.99, "dropout": 0.0,
                   "compile": False, "dtype": "float32", "gradient_accumulation_steps": 1, "eval_iters": 1,
                   "log_interval": 1}
RACES = {1e-3: "--steps 800", 3e-3: "--steps 1400"}


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


def make_variants(config, dtypes, n_vocab, device, nanogpt):
    """Yields (name, config, model, optimizers): what train.py would run; the same with the other attention,
    optimiser and dtype; nanoGPT."""
    def changed(**changes):
        return argparse.Namespace(**vars(config) | changes)

    on_gpu = device.type == "cuda"
    attention, dtype = config.attention, dtypes[-1] if config.dtype == "auto" else config.dtype
    if attention == "auto":
        attention = "fused" if on_gpu else "manual"
    config = changed(attention=attention, dtype=dtype)
    changes = [{}, {"attention": "manual" if attention == "fused" else "fused"},
               {"optimizer": "adamw" if config.optimizer == "muon" else "muon"},
               *({"dtype": name} for name in dtypes if name != dtype)]
    for c in [changed(**change) for change in changes]:
        model = train.make_model(c, n_vocab, device)
        name = f"{c.attention}, {c.dtype}, {c.optimizer}" + ", compiled" * c.compile
        yield name, c, model, train.make_optimizers(model, c)
    if nanogpt:  # on a GPU its train.py computes in bf16 and compiled, on a CPU in fp32
        c = changed(dtype="bf16" if on_gpu else "fp32", compile=on_gpu)
        model = nanogpt_model(nanogpt, c, n_vocab, device)
        with redirect_stdout(None):
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        yield f"nanoGPT, {c.dtype}, adamw" + ", compiled" * on_gpu, c, model, [optimizer]


def nanogpt_model(directory, config, n_vocab, device):
    """The GPT of the reader's checkout, at our shape."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(directory, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(config, name) for name in
             ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    with redirect_stdout(None):
        return module.GPT(module.GPTConfig(vocab_size=n_vocab, **shape)).to(device)


def step(config, model, optimizers, batches, number):
    """One step, that of train.train on one process without its reports and checkpoints -> seconds to build
    its batches, and of the rest."""
    n, device = config.grad_accum, next(model.parameters()).device
    started = clock(device)
    micro_batches = train.build_batches(batches, range(number * n, number * n + n), device)
    built = clock(device)
    for inputs, targets in micro_batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = model(inputs, targets)[1]
        (loss / n).backward()
    if config.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return built - started, clock(device) - built


def bench_steps(variants, batches, peaks, repeats):
    """Prints the table of training steps. A variant that exceeds the GPU's memory is named and left out."""
    running, rows, speeds = [], [], []
    for name, c, model, optimizers in variants:
        run = partial(step, c, torch.compile(model) if c.compile else model, optimizers, batches)
        try:
            for number in range(3):  # the first steps allocate, compile and tune
                run(number)
            running.append((name, c, flops_per_token(model), run, []))
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
    for number in trange(3, repeats + 3, desc="steps", leave=False):
        for *_, run, times in running:
            times.append(run(number))
    for name, c, flops, _, times in running:
        batch, seconds = np.median(times, axis=0)
        low, high = 1e3 * np.percentile(times, (25, 75), axis=0)[:, 1]
        speed = c.batch_size * c.grad_accum * c.block_size / seconds
        speeds.append(speed)
        share = f"{flops * speed / peaks[c.dtype]:.1%}" if c.dtype in peaks else "-"
        rows.append((name, f"{1e3 * seconds:.1f}", f"{low:.1f} to {high:.1f}", f"{speed:,.0f}",
                     f"{speed / speeds[0]:.2f}", f"{batch / seconds:.1%}", share))
    table(("training step", "ms", "quartiles", "tokens/s", "ratio", "batch", "of peak"), rows)


def bench_sampling(config, n_vocab, device, nanogpt, repeats):
    """Prints the table of sampling after a single token."""
    n, idx = SAMPLE_TOKENS, torch.zeros(1, 1, dtype=torch.long, device=device)
    model = train.make_model(config, n_vocab, device).eval()
    ways = {"with a KV cache": lambda: list(generate(model, idx, n))}
    if nanogpt:  # which has none
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


def run_nanogpt(directory, lr, config):
    """Runs the checkout's own train.py, in fp32, on our data -> (seconds of its steps, nats per byte)."""
    device, directory = pick_device(config.device), Path(directory).resolve()
    tok, stream, held_out, _ = prepare(config.data, "bytes", 0, config.cache_dir)
    most = NANOGPT["max_iters"]
    settings = NANOGPT | {"learning_rate": lr, "lr_decay_iters": most, "device": device.type,
                          "eval_interval": most, "dataset": "bench", "out_dir": "."}
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
        printed = [*tqdm(run.stdout, f"nanoGPT, {lr:g}", most, unit="line", leave=False)]
        if run.wait():
            raise OSError(f"--nanogpt {directory}: its train.py failed ({printed[-1:]})")
        model.load_state_dict(torch.load(Path(folder, "ckpt.pt"), map_location=device)["model"])
    ms = re.findall(r"(?m)^iter \d+: loss .*, time ([\d.]+)ms", "".join(printed))
    forward = model.forward
    model.forward = lambda idx: forward(idx, idx)  # without targets, it returns the last position's logits
    # The same rows as in train.py's last evaluation. nanoGPT takes one step more after its own.
    rows = text_rows(held_out, config.block_size, 4 * config.eval_tokens // config.block_size)
    bits, n_bytes = train.text_bits(model, rows, tok)
    return sum(map(float, ms[:most])) / 1e3, bits.sum() / n_bytes.sum() * math.log(2)


def run_ours(arguments):
    """Runs our train.py -> (seconds of its steps, without evaluations, and held-out nats per byte)."""
    with tempfile.TemporaryDirectory() as folder:
        config, start = train.read_arguments([*arguments, "--out", folder])
        config.eval_every = config.save_every = config.steps
        report = train.train(config, start)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    return sum(tokens / [line["tokens_per_s"] for line in lines]), report["held_out_bpb"] * math.log(2)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="and any flag of train.py")
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
        rows = []
        for lr, flags in RACES.items():
            theirs, their_loss = run_nanogpt(args.nanogpt, lr, config)
            ours, our_loss = run_ours([*rest, *flags.split()])
            share = f"{ours / theirs:.3f}" + (", loss not reached" if our_loss > their_loss else "")
            rows += [(f"nanoGPT, {lr:g}", f"{theirs:.0f}", f"{their_loss:.4f}", "1"),
                     (flags, f"{ours:.0f}", f"{our_loss:.4f}", share)]
        return table(("time to loss", "s", "nats/byte", "share of nanoGPT's time"), rows)
    tok, batches, _, _ = train.make_data(config, start, 0, 1)
    peaks = find_peaks(device)
    print(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, vocabulary of "
          f"{tok.n_vocab:,}, {config.grad_accum} x {config.batch_size} x {config.block_size} tokens a step\n")
    variants = make_variants(config, list(peaks), tok.n_vocab, device, args.nanogpt)
    bench_steps(variants, batches, peaks, args.repeats)
    bench_sampling(config, tok.n_vocab, device, args.nanogpt, max(1, args.repeats // 5))


if __name__ == "__main__":
    main()
