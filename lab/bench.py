"""How fast: training steps, building batches, sampling; side by side with nanoGPT on the reader's own machine.

    python bench.py                                 the toy, in every attention, dtype and objective: 2 minutes
    python bench.py --preset gpt2 --compile         any flag of train.py says what is measured
    python bench.py --nanogpt DIR                   the same beside a checkout of github.com/karpathy/nanoGPT
    python bench.py --nanogpt DIR --time-to-loss    both train from scratch to the same loss: 28 minutes on one thread

Variants take turns, a step each, in one process, so that whatever else the machine does slows all of them; tables show
medians. OMP_NUM_THREADS=1 in front measures one thread. In the table of steps, ratio is the speed against the first line's,
batch the time to build a step's batches, which train.py does meanwhile, as a share of the step, MB what the step holds, and
of peak the share of a GPU's bf16 arithmetic that it uses.
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

import train
from data import Batches, prepare, text_rows
from objectives import OBJECTIVES, check_range
from sample import Parser, generate, one_line_errors, pick_device

# bf16 TFLOPS without sparsity, from NVIDIA's data sheets: the first name that the GPU's own name contains
PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}

# --time-to-loss: nanoGPT's published setting for a CPU (its README, over config/train_shakespeare_char.py) at two
# learning rates, each against the flags of train.py that reach the same loss at the same shape.
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 12}
NANOGPT = SHAPE | {"max_iters": 6000, "warmup_iters": 100, "min_lr": 1e-4, "beta2": 0.99, "dropout": 0.0,
                   "compile": False, "dtype": "float32", "gradient_accumulation_steps": 1, "eval_iters": 1,
                   "log_interval": 1}
RACES = {1e-3: {"steps": 900}, 3e-3: {"steps": 1500}}


@dataclass
class Variant:
    """A model in training, one step at a time."""
    name: str
    config: train.Config
    model: torch.nn.Module
    optimizers: list
    batches: Batches
    device: torch.device
    step: int = 0
    peak: int = 0                                               # bytes that a step adds
    seconds: list = field(default_factory=list)                 # of each step
    batch_seconds: list = field(default_factory=list)           # of its batch, which train.py builds meanwhile

    def __post_init__(self):
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def load(self, step):
        return train.send(train.load(self.batches, step, self.config, self.device), self.device)

    def turn(self):
        started = time.perf_counter()
        micro_batches = self.load(self.step)
        synchronize(self.device)
        self.batch_seconds.append(time.perf_counter() - started)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        started = time.perf_counter()
        train.update(self.forward, micro_batches, self.optimizers, self.step, self.config, self.autocast)
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - started)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - before
        self.step += 1

    def memory(self):
        """Bytes of weights and optimiser state, and what a step adds: CUDA's peak or, elsewhere, the gradients and what
        the forward pass keeps for the backward pass."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        held = [part.nbytes for state in states for part in state.values() if isinstance(part, torch.Tensor)]
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        kept = {}

        def keep(part):
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
            return part

        if self.device.type != "cuda":
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part), self.autocast:
                loss = self.forward(*self.load(0)[0])[1]
            del loss  # until here, no two of its storages could have the same address
            self.peak = sum(weights.values()) + sum(n for pointer, n in kept.items() if pointer not in weights)
        return sum(weights.values()) + sum(held) + self.peak

    def flops_per_token(self):
        """6 N + 12 L H Q T (PaLM, appendix B): forward and backward, N the weights of matrix products."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        lookups = ["transformer.wpe.weight"]
        lookups += ["transformer.wte.weight"] * ("lm_head.weight" in sizes)     # if not tied
        c, n = self.config, sum(sizes.values()) - sum(sizes.get(name, 0) for name in lookups)
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    def row(self, first):
        """Its line in the table; first: the variant that it is compared with."""
        c, seconds = self.config, np.median(self.seconds)
        tokens = c.batch_size * c.grad_accum * c.block_size
        low, high = (f"{1e3 * quartile:.1f}" for quartile in np.percentile(self.seconds, (25, 75)))
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = next((tflops * 1e12 for name, tflops in PEAK.items() if name in gpu), None)
        return (self.name, f"{1e3 * seconds:.1f}", f"{low} to {high}", f"{tokens / seconds:,.0f}",
                f"{np.median(first.seconds) / seconds:.2f}", f"{np.median(self.batch_seconds) / seconds:.1%}",
                f"{self.memory() / 2**20:,.0f}",
                f"{self.flops_per_token() * tokens / seconds / peak:.1%}" if peak else "-")


def synchronize(device):
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def make_variants(config, tok, stream, device, nanogpt):
    """Yields a Variant at a time: what train.py would run, its other attentions, dtypes and objectives, and nanoGPT."""
    def batches(config):
        return Batches(stream, config.make_objective(), tok, config.block_size, config.batch_size, config.seed)

    def variant(config):
        model = train.make_model(config, tok.n_vocab, device)
        name = f"{config.objective}, {config.attention}, {config.dtype}" + ", compiled" * config.compile
        return Variant(name, config, model, train.make_optimizers(model, config, config.dtype == "bf16"), batches(config), device)

    attentions, dtypes = ["manual", "fused"], ["fp32"] + ["bf16"] * train.has_bf16(device)
    if device.type == "cuda":
        attentions.reverse()
    chosen = replace(config, attention=attentions[0] if config.attention == "auto" else config.attention,
                     dtype=dtypes[-1] if config.dtype == "auto" else config.dtype)
    yield (first := variant(chosen))
    for compiled in {False, config.compile}:
        for attention in attentions:
            for dtype in dtypes:
                if (other := replace(chosen, attention=attention, dtype=dtype, compile=compiled)) != chosen:
                    yield variant(other)
    for objective in OBJECTIVES:
        if objective != config.objective and not OBJECTIVES[objective].answers:
            other = replace(chosen, objective=objective)
            yield replace(first, name=objective, config=other, batches=batches(other), seconds=[], batch_seconds=[])
    if nanogpt:
        # its train.py computes in fp32 on a CPU, in bf16 and compiled on a GPU
        theirs = replace(chosen, dtype="bf16" if device.type == "cuda" else "fp32", compile=device.type == "cuda")
        model = nanogpt_model(nanogpt, chosen, tok.n_vocab, device)
        with redirect_stdout(None):
            optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        name = f"nanoGPT, {theirs.dtype}" + ", compiled" * theirs.compile
        yield Variant(name, theirs, model, [optimizer], first.batches, device)


def nanogpt_model(directory, config, n_vocab, device):
    """The GPT of the reader's checkout, at our shape. Raises OSError where there is none."""
    path = Path(directory, "model.py")
    if not path.is_file():
        raise OSError(f"--nanogpt {directory}: no model.py in it; expected a checkout of github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    with redirect_stdout(None):
        return module.GPT(module.GPTConfig(vocab_size=n_vocab, **shape)).to(device)


def bench_steps(variants, repeats):
    """Prints the table of training steps. A variant that the GPU's memory does not hold is left out, and said so."""
    running = []
    for variant in variants:
        try:
            for _ in range(3):  # the first steps allocate, compile and tune
                variant.turn()
            running.append(variant)
        except torch.OutOfMemoryError:
            print(f"{variant.name}: out of memory")
        variant.seconds.clear(), variant.batch_seconds.clear()
    for _ in trange(repeats, desc="steps", leave=False):
        for variant in running:
            variant.turn()
    table(("training step", "ms", "quartiles", "tokens/s", "ratio", "batch", "MB", "of peak"),
          [variant.row(running[0]) for variant in running])


@torch.no_grad()
def generate_without_cache(model, idx, n):
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1]
        idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)


def bench_sampling(config, n_vocab, device, nanogpt, n, repeats):
    """Prints the table of sampling n tokens after a single one, one row at a time."""
    model = train.make_model(config, n_vocab, device).eval()
    ways = {"KV cache": lambda idx: list(generate(model, idx, n)),
            "no cache": lambda idx: generate_without_cache(model, idx, n)}
    if nanogpt:
        theirs = nanogpt_model(nanogpt, config, n_vocab, device).eval()
        ways["nanoGPT"] = lambda idx: theirs.generate(idx, n)
    seconds = {name: [] for name in ways}
    for _ in trange(repeats + 1, desc="sampling", leave=False):
        for name, sample in ways.items():
            synchronize(device)
            started = time.perf_counter()
            sample(torch.zeros(1, 1, dtype=torch.long, device=device))
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: np.median(times[1:]) for name, times in seconds.items()}
    table((f"sampling {n} tokens", "s", "tokens/s", "ratio"),
          [(name, f"{s:.2f}", f"{n / s:,.0f}", f"{medians['KV cache'] / s:.3f}") for name, s in medians.items()])


def table(header, rows):
    """Prints Markdown that reads well in a terminal, too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths)), "|")
    print(flush=True)


def time_to_loss(directory, config, tok, stream, held_out, device):
    """Prints what nanoGPT's train.py and ours need for the same held-out loss. Evaluations are not in the seconds."""
    rows = []
    for lr, flags in RACES.items():
        theirs, their_loss = run_nanogpt(directory, lr, config, tok, stream, held_out, device)
        ours, our_loss = run_ours(flags, config, device)
        name = " ".join(f"{train.flag_of(flag)} {value}" for flag, value in flags.items())
        reached = f"{ours / theirs:.3f}" + ", not reached" * (our_loss > their_loss)
        rows += [(f"nanoGPT, {lr:g}", f"{theirs:.0f}", f"{their_loss:.4f}", "1"),
                 (name, f"{ours:.0f}", f"{our_loss:.4f}", reached)]
    table(("time to loss", "s", "nats/byte", "share of the time"), rows)


def run_nanogpt(directory, lr, config, tok, stream, held_out, device):
    """Runs the checkout's own train.py on our data -> (seconds of its steps, held-out nats per byte at the end)."""
    settings = NANOGPT | {"learning_rate": lr, "lr_decay_iters": NANOGPT["max_iters"], "device": device.type,
                          "eval_interval": NANOGPT["max_iters"], "dataset": "bench", "out_dir": "."}
    directory = Path(directory).resolve()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data", "bench")
        data.mkdir(parents=True)
        np.asarray(stream, np.uint16).tofile(data / "train.bin")
        np.asarray(held_out, np.uint16).tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tok.n_vocab}))
        Path(folder, "configurator.py").symlink_to(directory / "configurator.py")
        command = [sys.executable, directory / "train.py", *(f"--{name}={value}" for name, value in settings.items())]
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds, last = [], ""
        for last in tqdm(run.stdout, desc=f"nanoGPT, {lr:g}", total=NANOGPT["max_iters"], unit="line", leave=False):
            if found := re.match(r"iter \d+: loss .*, time ([\d.]+)ms", last):
                seconds.append(float(found[1]) / 1e3)
        if run.wait():
            raise OSError(f"--nanogpt {directory}: its train.py failed ({last.strip()})")
        weights = torch.load(Path(folder, "ckpt.pt"), map_location=device)["model"]
    model = nanogpt_model(directory, replace(config, **SHAPE, bias=False), tok.n_vocab, device)
    model.load_state_dict(weights)
    T = SHAPE["block_size"]
    rows = text_rows(held_out, tok, T, 4 * config.eval_tokens // T)  # as train.py evaluates at the end
    loss = train.bits_per_byte(model, rows, tok) * math.log(2)
    return sum(seconds[:NANOGPT["max_iters"]]), loss  # it takes a step more after its last evaluation


def run_ours(flags, config, device):
    """Runs our train.py -> (seconds of its steps, held-out nats per byte at the end)."""
    with tempfile.TemporaryDirectory() as folder:
        settings = SHAPE | {"data": config.data, "tokenizer": "bytes", "cache_dir": config.cache_dir, "device": device,
                            "out": folder, "eval_every": flags["steps"], "save_every": flags["steps"]} | flags
        arguments = [str(part) for name, value in settings.items() for part in (train.flag_of(name), value)]
        report = train.train(*train.read_arguments(arguments))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    return sum(tokens / [line["tokens_per_s"] for line in lines]), report["held_out_bpb"] * math.log(2)


@one_line_errors
def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog="All flags of train.py, too: python train.py --help")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT to measure beside")
    parser.add_argument("--time-to-loss", action="store_true", help="train nanoGPT and this to the same loss")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each variant, a fifth for sampling (20)")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens to sample (512)")
    args, rest = parser.parse_known_args(arguments)
    check_range("--repeats", args.repeats, 1, 10**6)
    check_range("--sample-tokens", args.sample_tokens, 1, 10**6)
    if args.time_to_loss and not args.nanogpt:
        raise ValueError("--time-to-loss: expected --nanogpt DIR, too, a checkout of nanoGPT to race with")
    config, _ = train.read_arguments([*rest, "--tokenizer", "bytes"] if args.time_to_loss else rest)
    device = pick_device(config.device)
    tok, stream, held_out = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir)
    print(f"torch {torch.__version__}, " + (torch.cuda.get_device_name(device) if device.type == "cuda" else
                                            f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"))
    if args.time_to_loss:
        return time_to_loss(args.nanogpt, config, tok, stream, held_out, device)
    print(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, vocabulary of {tok.n_vocab:,}, "
          f"{config.grad_accum} x {config.batch_size} x {config.block_size} tokens a step\n")
    bench_steps(make_variants(config, tok, stream, device, args.nanogpt), args.repeats)
    bench_sampling(config, tok.n_vocab, device, args.nanogpt, args.sample_tokens, max(1, args.repeats // 5))


if __name__ == "__main__":
    main()
