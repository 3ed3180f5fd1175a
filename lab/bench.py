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
    MB          memory: weights, optimiser state and what a step adds
    of peak     the step's FLOP/s over the peak: on a GPU in bf16 the data sheet's, else what a large matrix
                product of the same dtype reaches here, in the same process, on the same threads
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
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import train
from cli import Parser, flag_of, has_fast_bf16, one_line_errors, pick_device
from data import Batches, prepare, text_rows
from objectives import OBJECTIVES, ON_PAIRS, check_range, knobs_of
from sample import generate

# bf16 TFLOP/s without sparsity, from NVIDIA's data sheets: the first name that the GPU's own name contains
DATA_SHEET = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
PRODUCT_SIZE = 2048  # of the matrices whose product shows a CPU's peak; four times as large on a GPU
SAMPLE_TOKENS = 512

# --time-to-loss: nanoGPT's published setting for a CPU (its README, over config/train_shakespeare_char.py) at
# its own learning rate and at its best, each with the flags of train.py that reach its loss at the same shape
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 12}
NANOGPT = SHAPE | {"max_iters": 6000, "warmup_iters": 100, "min_lr": 1e-4, "beta2": 0.99, "dropout": 0.0,
                   "compile": False, "dtype": "float32", "gradient_accumulation_steps": 1, "eval_iters": 1,
                   "log_interval": 1}
RACES = {1e-3: "--steps 800", 3e-3: "--steps 1400"}


@dataclass
class Variant:
    """A model in training, one step at a time."""
    name: str
    config: train.Config
    model: torch.nn.Module
    optimizers: list
    batches: Batches
    device: torch.device
    times: list = field(default_factory=list)  # of each step: seconds to build its batches, in all, to update

    def __post_init__(self):
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def load(self, step):
        n = self.config.grad_accum
        micro_batches = train.load(self.batches, step * n, n, self.device)
        return [[ids.to(self.device) for ids in pair] for pair in micro_batches]

    def turn(self):
        """One step, timed: that of train.train on one process, without its reports and checkpoints."""
        step = len(self.times)
        start = clock(self.device)
        micro_batches = self.load(step)
        loaded = clock(self.device)
        for inputs, targets in micro_batches:
            with self.autocast:
                loss = self.forward(inputs, targets)[1]
            (loss / len(micro_batches)).backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        before_update = clock(self.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                lr = train.learning_rate(step % self.config.steps, self.config)
                group["lr"] = lr * group.get("scale", 1)  # nanoGPT's groups have no scale
            optimizer.step()
            optimizer.zero_grad()
        end = clock(self.device)
        self.times.append((loaded - start, end - loaded, end - before_update))

    def memory(self):
        """Bytes of weights and optimiser state, and what a step adds: CUDA's peak or, elsewhere, gradients
        and what the forward pass keeps for the backward pass."""
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        held = sum(weights.values())
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                held += sum(part.nbytes for part in state.values() if isinstance(part, torch.Tensor))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.turn()
            return held + torch.cuda.max_memory_allocated(self.device) - before
        kept = {}

        def keep(part):
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
            return part

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part), self.autocast:
            loss = self.forward(*self.load(0)[0])[1]
        del loss  # until here, no two of its storages could have the same address
        activations = sum(size for pointer, size in kept.items() if pointer not in weights)
        return held + sum(weights.values()) + activations  # gradients are as large as the weights

    def row(self, first, peaks):
        """Its line in the table; first: the variant that it is compared with; peaks: {dtype: FLOP/s}."""
        c = self.config
        batch, step, update = np.median(self.times, axis=0)
        low, high = 1e3 * np.percentile(self.times, (25, 75), axis=0)[:, 1]
        first_step = np.median(first.times, axis=0)[1]
        tokens_per_s = c.batch_size * c.grad_accum * c.block_size / step
        peak = peaks.get(c.dtype)
        share = f"{flops_per_token(self.model) * tokens_per_s / peak:.1%}" if peak else "-"
        return (self.name, f"{1e3 * step:.1f}", f"{low:.1f} to {high:.1f}", f"{tokens_per_s:,.0f}",
                f"{first_step / step:.2f}", f"{update / step:.1%}", f"{batch / step:.1%}",
                f"{self.memory() / 2**20:,.0f}", share)


def flops_per_token(model):
    """6 N + 12 L C T (PaLM, appendix B): forward and backward. N: the parameters without embeddings, which
    are looked up; an embedding that the output layer shares counts as that layer's matrix."""
    c, sizes = model.config, {name: p.numel() for name, p in model.named_parameters()}
    n = sum(sizes.values()) - sizes.get("transformer.wpe.weight", 0)
    if "lm_head.weight" in sizes:  # not shared
        n -= sizes["transformer.wte.weight"]
    return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def find_peaks(device):
    """Prints and returns {dtype: FLOP/s}, for the column "of peak": of fp32, and of bf16 if faster."""
    n = PRODUCT_SIZE * (4 if device.type == "cuda" else 1)
    peaks = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        if name == "bf16" and not has_fast_bf16(device):
            print("bf16 is left out: it is not faster than fp32 here")
            continue
        A, B = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(12):
            start = clock(device)
            A @ B
            seconds.append(clock(device) - start)
        peaks[name] = 2 * n**3 / min(seconds)  # the fastest: whatever else runs makes a peak look lower
        print(f"a product of {n} x {n} matrices in {name}: {peaks[name] / 1e9:,.0f} GFLOP/s")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    tflops = next((tflops for name, tflops in DATA_SHEET.items() if name in gpu), None)
    if tflops and "bf16" in peaks:
        peaks["bf16"] = tflops * 1e12
        print(f"data sheet of {gpu} in bf16: {1000 * tflops:,} GFLOP/s")
    return peaks


def make_variants(config, dtypes, tok, stream, device, nanogpt):
    """Yields a Variant at a time: what train.py would run; the other attentions, dtypes, optimisers and
    objectives; nanoGPT."""
    def variant(c, model=None, optimizers=None):
        model = model or train.make_model(c, tok.n_vocab, device)
        optimizers = optimizers or train.make_optimizers(model, c, c.dtype == "bf16")
        objective = partial(OBJECTIVES[c.objective], **c.knobs)
        batches = Batches(stream, objective, tok, c.block_size, c.batch_size, c.seed)
        name = f"{c.objective}, {c.attention}, {c.dtype}, {c.optimizer}" + ", compiled" * c.compile
        return Variant(name, c, model, optimizers, batches, device)

    attentions = ["fused", "manual"] if device.type == "cuda" else ["manual", "fused"]
    chosen = replace(config, attention=attentions[0] if config.attention == "auto" else config.attention,
                     dtype=dtypes[-1] if config.dtype == "auto" else config.dtype)
    first = variant(chosen)
    yield first
    for attention in attentions:
        for dtype in dtypes:
            other = replace(chosen, attention=attention, dtype=dtype)
            if other != chosen:
                yield variant(other)
    if config.compile:
        yield variant(replace(chosen, compile=False))
    yield variant(replace(chosen, optimizer="adamw" if config.optimizer == "muon" else "muon"))
    for objective in OBJECTIVES:
        if objective == config.objective or objective in ON_PAIRS:
            continue
        known = knobs_of(OBJECTIVES[objective])
        knobs = known | {knob: value for knob, value in train.PRESETS[config.preset].items() if knob in known}
        # With the first variant's model and optimisers: an objective changes the data alone.
        yield variant(replace(chosen, objective=objective, knobs=knobs), first.model, first.optimizers)
    if nanogpt:
        # its train.py computes in fp32 on a CPU, in bf16 and compiled on a GPU
        on_gpu = device.type == "cuda"
        theirs = replace(chosen, dtype="bf16" if on_gpu else "fp32", compile=on_gpu)
        model = nanogpt_model(nanogpt, config, tok.n_vocab, device)
        with redirect_stdout(None):
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        label = f"nanoGPT, {theirs.dtype}, adamw" + ", compiled" * on_gpu
        yield Variant(label, theirs, model, [optimizer], first.batches, device)


def nanogpt_model(directory, config, n_vocab, device):
    """The GPT of the reader's checkout, at our shape."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(directory, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = {name: getattr(config, name) for name in names}
    with redirect_stdout(None):
        return module.GPT(module.GPTConfig(vocab_size=n_vocab, **shape)).to(device)


def bench_steps(variants, peaks, repeats):
    """Prints the table of training steps. A variant that exceeds the GPU's memory is named and left out."""
    running = []
    for variant in variants:
        try:
            for _ in range(3):  # the first steps allocate, compile and tune
                variant.turn()
            running.append(variant)
        except torch.OutOfMemoryError:
            print(f"{variant.name}: out of memory")
        variant.times.clear()
    for _ in trange(repeats, desc="steps", leave=False):
        for variant in running:
            variant.turn()
    table(("training step", "ms", "quartiles", "tokens/s", "ratio", "optimizer", "batch", "MB", "of peak"),
          [variant.row(running[0], peaks) for variant in running])


@torch.no_grad()
def generate_without_cache(model, idx, n):
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1]
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)


def bench_sampling(config, n_vocab, device, nanogpt, repeats):
    """Prints the table of sampling after a single token, one row at a time."""
    n = SAMPLE_TOKENS
    model = train.make_model(config, n_vocab, device).eval()
    ways = {"KV cache": lambda idx: list(generate(model, idx, n)),
            "no cache": lambda idx: generate_without_cache(model, idx, n)}
    if nanogpt:
        theirs = nanogpt_model(nanogpt, config, n_vocab, device).eval()
        ways["nanoGPT"] = lambda idx: theirs.generate(idx, n)
    seconds = {name: [] for name in ways}
    for _ in trange(repeats + 1, desc="sampling", leave=False):
        for name, sample in ways.items():
            idx = torch.zeros(1, 1, dtype=torch.long, device=device)
            start = clock(device)
            sample(idx)
            seconds[name].append(clock(device) - start)
    medians = {name: np.median(times[1:]) for name, times in seconds.items()}
    cached = medians["KV cache"]
    table((f"sampling {n} tokens", "s", "tokens/s", "ratio"),
          [(name, f"{s:.2f}", f"{n / s:,.0f}", f"{cached / s:.3f}") for name, s in medians.items()])


def table(header, rows):
    """Prints Markdown that reads well in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|")
    print(flush=True)


def time_to_loss(directory, config, arguments, tok, stream, held_out, device):
    """Prints what nanoGPT's train.py, in fp32, and ours need for the same held-out loss, in seconds without
    evaluations."""
    rows = []
    for lr, flags in RACES.items():
        theirs, their_loss = run_nanogpt(directory, lr, config, tok, stream, held_out, device)
        ours, our_loss = run_ours([*arguments, *flags.split()])
        share = f"{ours / theirs:.3f}" + (", loss not reached" if our_loss > their_loss else "")
        rows += [(f"nanoGPT, {lr:g}", f"{theirs:.0f}", f"{their_loss:.4f}", "1"),
                 (flags, f"{ours:.0f}", f"{our_loss:.4f}", share)]
    table(("time to loss", "s", "nats/byte", "share of nanoGPT's time"), rows)


def run_nanogpt(directory, lr, config, tok, stream, held_out, device):
    """Runs the checkout's own train.py on our data -> (seconds of its steps, held-out nats per byte)."""
    settings = NANOGPT | {"learning_rate": lr, "lr_decay_iters": NANOGPT["max_iters"], "device": device.type,
                          "eval_interval": NANOGPT["max_iters"], "dataset": "bench", "out_dir": "."}
    model = nanogpt_model(directory, config, tok.n_vocab, device)
    directory = Path(directory).resolve()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data", "bench")
        data.mkdir(parents=True)
        np.asarray(stream, np.uint16).tofile(data / "train.bin")
        np.asarray(held_out, np.uint16).tofile(data / "val.bin")
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
    bits, sizes = train.text_bits(model, rows, tok)
    return sum(seconds[:NANOGPT["max_iters"]]), bits.sum() / sizes.sum() * math.log(2)


def run_ours(arguments):
    """Runs our train.py -> (seconds of its steps, held-out nats per byte)."""
    with tempfile.TemporaryDirectory() as folder:
        config, _ = train.read_arguments([*arguments, "--out", folder])
        report = train.train(replace(config, eval_every=config.steps, save_every=config.steps))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    return sum(tokens / [line["tokens_per_s"] for line in lines]), report["held_out_bpb"] * math.log(2)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog="and any flag of train.py")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--time-to-loss", action="store_true", help="train nanoGPT and this to the same loss")
    parser.add_argument("--repeats", type=int, default=15,
                        help="steps of each variant, a fifth of it for sampling (15)")
    args, rest = parser.parse_known_args(arguments)
    check_range("--repeats", args.repeats, 1, 10**6)
    if args.nanogpt and not Path(args.nanogpt, "model.py").is_file():
        raise OSError(f"--nanogpt {args.nanogpt}: no model.py in it; expected a checkout of "
                      "github.com/karpathy/nanoGPT")
    if args.time_to_loss and not args.nanogpt:
        raise ValueError("--time-to-loss: expected --nanogpt DIR, too, the checkout to race with")
    if args.time_to_loss:
        rest += ["--tokenizer", "bytes"]
        for name, value in SHAPE.items():
            rest += [flag_of(name), str(value)]
    config, _ = train.read_arguments(rest)
    device = pick_device(config.device)
    tok, stream, held_out = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir)
    hardware = f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {hardware}")
    if args.time_to_loss:
        return time_to_loss(args.nanogpt, config, rest, tok, stream, held_out, device)
    peaks = find_peaks(device)
    print(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
          f"vocabulary of {tok.n_vocab:,}, {config.grad_accum} x {config.batch_size} x {config.block_size} "
          "tokens a step\n", flush=True)
    bench_steps(make_variants(config, list(peaks), tok, stream, device, args.nanogpt), peaks, args.repeats)
    bench_sampling(config, tok.n_vocab, device, args.nanogpt, max(1, args.repeats // 5))


if __name__ == "__main__":
    main()
