"""How fast: training steps and sampling; beside nanoGPT on your own machine.

    python -m lab.bench                                the toy: a minute on 2 cores
    python -m lab.bench --preset gpt2 --compile        any flag of train.py says what is measured
    python -m lab.bench --nanogpt DIR                  beside a checkout of github.com/karpathy/nanoGPT
    python -m lab.bench --nanogpt DIR --time-to-loss   both train from scratch to the same loss: half an hour

Variants take turns, a step each, in one process, so that other work on the machine slows all of them alike;
tables show medians. ratio: speed relative to the first row. of peak: the step's FLOP/s relative to those of
a large matrix product of its dtype in this process. OMP_NUM_THREADS=1 in front measures one thread.
"""
import argparse
import json
import pickle
import re
import runpy
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import train
from model import GPT, IGNORE
from sample import Parser, generate, one_line_errors, pick_device

PRODUCT_SIZE = 2048  # of the matrices whose product shows a CPU's peak; four times as large on a GPU
TURNS, SAMPLE_TURNS = 15, 3  # after those which warm up
SAMPLE_TOKENS = 512

# --time-to-loss: the command for a CPU in nanoGPT's README, but with twice the context and three times the
# steps, at its learning rate and at the best one; and for each the flags of train.py that reach its loss
SHAPE = "--n_layer=4 --n_head=4 --n_embd=128 --block_size=128 --batch_size=12"
STEPS = 6000  # and one more, after its last checkpoint
NANOGPT = (f"{SHAPE} --compile=False --dtype=float32 --dropout=0.0 --eval_iters=1 --log_interval=1 "
           f"--max_iters={STEPS} --lr_decay_iters={STEPS} --eval_interval={STEPS}")
RACES = {1e-3: "--steps 800", 3e-3: "--steps 1400"}


def seconds_of(f, device):
    """How long f() takes, and what it starts on the device, which was idle."""
    started = time.perf_counter()
    f()
    getattr(torch, device.type).synchronize()
    return time.perf_counter() - started


def find_peak(dtype, device):
    """Prints and returns the FLOP/s of a large product: the fastest of 12, as other work slows the rest."""
    n = PRODUCT_SIZE * (4 if device.type == "cuda" else 1)
    A = torch.randn(n, n, device=device).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    peak = 2 * n**3 / min(seconds_of(lambda: A @ A, device) for _ in range(12))
    print(f"a product of {n} x {n} matrices in {dtype}: {peak / 1e9:,.0f} GFLOP/s")
    return peak


def flops_per_token(model):
    """6 N + 12 L C T (PaLM, appendix B): forward and backward. N: the parameters without embeddings, which
    are looked up, but with the output layer, even where it is the embedding's matrix."""
    c = model.config
    n = GPT.n_params(model, embedding=False)  # of nanoGPT's model, too: it has the same names
    return 6 * (n + c.n_embd * c.vocab_size) + 12 * c.n_layer * c.n_embd * c.block_size


def make_variants(config, n_vocab, device, nanogpt):
    """Yields (name, dtype, model, optimizers): what train.py would run; the same with the other attention,
    optimiser and, if bf16 is the faster one, dtype; nanoGPT, from what its model.py defines."""
    on_gpu, dtypes = device.type == "cuda", ("fp32", "bf16")[:1 + train.is_bf16_faster(device)]
    if config.attention == "auto":
        config.attention = "fused" if on_gpu else "manual"
    if config.dtype == "auto":
        config.dtype = dtypes[-1]
    choices = {"attention": ("manual", "fused"), "optimizer": ("muon", "adamw"), "dtype": dtypes}
    changes = [{name: value} for name, values in choices.items() for value in values
               if value != getattr(config, name)]
    for change in ({}, *changes):
        c = argparse.Namespace(**vars(config) | change)
        model = train.make_model(c, n_vocab, device)
        yield f"{c.attention}, {c.dtype}, {c.optimizer}", c.dtype, model, train.make_optimizers(model, c)
    if nanogpt:
        names = "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"
        shape = {name: getattr(config, name) for name in names}
        model = nanogpt["GPT"](nanogpt["GPTConfig"](vocab_size=n_vocab, **shape)).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        dtype = dtypes[-1] if on_gpu else "fp32"  # its train.py has bf16 on a GPU alone
        yield f"nanoGPT, {dtype}, adamw", dtype, model, [optimizer]


def step(config, dtype, model, optimizers, micro_batches):
    """A step of train.train on one process, without its reports and checkpoints."""
    for inputs, targets in micro_batches:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(inputs, targets)[1]
        (loss / config.grad_accum).backward()
    if config.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def bench_steps(config, variants, batches, device):
    """Prints the table of training steps. A variant that exceeds the GPU's memory is named and left out."""
    peaks = {dtype: find_peak(dtype, device) for dtype in sorted({dtype for _, dtype, *_ in variants})}
    build = partial(train.build_batches, batches, range(config.grad_accum), device)
    print(f"building a step's batches: {1e3 * min(seconds_of(build, device) for _ in range(12)):.1f} ms")
    micro_batches, running = build(), {}
    for name, dtype, model, optimizers in variants:
        forward = torch.compile(model) if config.compile else model
        run = partial(step, config, dtype, forward, optimizers, micro_batches)
        try:
            for _ in range(3):  # the first steps allocate, compile and tune
                seconds_of(run, device)
            running[name] = run, flops_per_token(model) / peaks[dtype]
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
    times = [[seconds_of(run, device) for run, _ in running.values()] for _ in trange(TURNS, leave=False)]
    quartiles = np.percentile(times, (25, 50, 75), axis=0).T * 1e3
    n_tokens = config.grad_accum * config.batch_size * config.block_size
    print("\n| training step        |     ms | quartiles        | tokens/s | ratio | of peak |\n"
          "|---|---|---|---|---|---|")
    for (name, (_, share)), (low, ms, high) in zip(running.items(), quartiles):
        print(f"| {name:20} | {ms:6.1f} | {low:6.1f} to {high:6.1f} | {1e3 * n_tokens / ms:8,.0f} | "
              f"{quartiles[0, 1] / ms:5.2f} | {1e3 * n_tokens / ms * share:7.1%} |")


def bench_sampling(ours, theirs, device):
    """Prints the table of sampling after a single token. theirs: nanoGPT's model, which has no cache."""
    n, idx = SAMPLE_TOKENS, torch.zeros(1, 1, dtype=torch.long, device=device)
    ways = {"with a KV cache": lambda: [*generate(ours.eval(), idx, n)]}
    if theirs:
        ways["nanoGPT"] = lambda: theirs.eval().generate(idx, n)
    times = [[seconds_of(f, device) for f in ways.values()] for _ in trange(1 + SAMPLE_TURNS, leave=False)]
    medians = np.median(times[1:], axis=0)
    print(f"\n| sampling {n} tokens |     s | tokens/s | ratio |\n|---|---|---|---|")
    for name, s in zip(ways, medians):
        print(f"| {name:19} | {s:5.2f} | {n / s:8,.0f} | {medians[0] / s:5.3f} |")


def race(directory, model, config, arguments, device, tok, batches, held_out_rows):
    """Prints the table of the race: the checkout's own train.py, in fp32, then ours, on the same data. Times
    are of steps alone, without evaluations; losses are on the same held-out rows. model: nanoGPT's."""
    rows = held_out_rows(4 * config.eval_tokens // config.block_size)  # those of train.py's last evaluation
    inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows))
    targets[targets == tok.eot] = IGNORE  # no text: train.py leaves it out, too
    table = ["\n| time to loss    |    s | nats/byte | share of nanoGPT's time |\n|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "val"):  # val is for an estimate of its own, which is not read
            batches.stream.tofile(f"{folder}/{name}.bin")
        Path(folder, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tok.n_vocab}))
        for lr, flags in RACES.items():
            # It looks for a dataset in data/, where an absolute path stays as it is.
            command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split(),
                       f"--learning_rate={lr}", f"--device={device.type}", f"--dataset={folder}",
                       f"--out_dir={folder}/theirs-{lr}"]
            with subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True) as run:
                printed = "".join(tqdm(run.stdout, f"nanoGPT, {lr:g}", STEPS, unit="line", leave=False))
            their_s = sum(map(float, re.findall(r"time ([\d.]+)ms", printed)[:STEPS])) / 1e3
            model.load_state_dict(torch.load(f"{folder}/theirs-{lr}/ckpt.pt", map_location=device)["model"])
            their_loss = model.eval().requires_grad_(False)(inputs, targets)[1].item()
            train.train(*train.read_arguments([*arguments, *flags.split(), f"--out={folder}/ours-{lr}"]))
            lines = [json.loads(line) for line in Path(folder, f"ours-{lr}", "metrics.jsonl").open()]
            s = sum(np.diff([0, *(x["tokens"] for x in lines)]) / [x["tokens_per_s"] for x in lines])
            loss = lines[-1]["held_out_bpb"] * np.log(2)
            table += [f"| nanoGPT, {lr:<6g} | {their_s:4.0f} | {their_loss:9.4f} | 1 |",
                      f"| {flags:15} | {s:4.0f} | {loss:9.4f} | {s / their_s:.3f}"
                      f"{', loss not reached' if loss > their_loss else ''} |"]
    print(*table, sep="\n")


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog="and any flag of train.py")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--time-to-loss", action="store_true", help="train nanoGPT and this to the same loss")
    args, rest = parser.parse_known_args(arguments)
    nanogpt = runpy.run_path(f"{args.nanogpt}/model.py") if args.nanogpt else None
    if args.time_to_loss:
        if not nanogpt:
            raise ValueError("--time-to-loss: expected --nanogpt DIR, too, the checkout to race with")
        rest += ["--tokenizer=bytes", *SHAPE.replace("_", "-").split()]
    config, start = train.read_arguments(rest)
    device = pick_device(config.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    tok, batches, held_out_rows, _ = train.make_data(config, start, 0, 1)
    variants = [*make_variants(config, tok.n_vocab, device, nanogpt)]
    ours, theirs = variants[0][2], variants[-1][2] if nanogpt else None
    if args.time_to_loss:
        return race(args.nanogpt, theirs, config, rest, device, tok, batches, held_out_rows)
    bench_steps(config, variants, batches, device)
    bench_sampling(ours, theirs, device)


if __name__ == "__main__":
    main()
