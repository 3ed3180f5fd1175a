"""Train a GPT under one of the objectives.

    python train.py --objective fim_spm                  a toy on the standard library's source: 5 minutes on 2 CPU cores
    python train.py --objective fim --preset laptop      larger and longer: 15 minutes
    python train.py --preset gpt2 --data code.jsonl.gz --tokenizer gpt2        on a GPU
    python train.py --out out/fim_spm --resume           goes on where a run stopped
    python train.py --objective sft --init-from out/ntp  fine-tunes a finished model, here on prompts and answers
    torchrun --nproc_per_node=8 train.py --preset gpt2 --data code.jsonl.gz        on 8 GPUs, the same run

Reads from top to bottom: settings, presets, the loop, what it reports, checkpoints, the command line.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data import Batches, Tokenizer, prepare, single_line_holes, split_lines, text_rows
from gpt2 import load_gpt2
from model import GPT, GPTConfig
from objectives import IGNORE, OBJECTIVES, Objective, check_choice, check_range
from pairs import PairBatches, prepare_pairs
from sample import (ENDINGS, Parser, checkpoint_fits, collect, generate, infill, instruct_prompt, load_checkpoint,
                    one_line_errors, pick_device)


def setting(default, help, choices=None, low=None, high=math.inf):
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    """Every setting is a flag: batch_size is --batch-size. The defaults are the toy's; PRESETS change some of them.

    Raises ValueError, naming the flag, where a value is out of range."""
    objective: str = setting("ntp", "what to predict", tuple(OBJECTIVES))
    preset: str = setting("toy", "model, budget and learning rate in one; single flags override it")
    init_from: str = setting("", "a run's folder, or GPT-2's published weights: start from its weights, shape and vocabulary")
    data: str = setting("stdlib", "stdlib, prose, site-packages, or a file, folder or glob of text or .jsonl[.gz]; for sft "
                        "and meap_sft functions, or .json[l][.gz] of pairs")
    tokenizer: str = setting("bpe", "learned from the data, raw bytes, or GPT-2's (a download)", ("bpe", "bytes", "gpt2"))
    vocab_size: int = setting(2048, "ids of the bpe tokenizer, the 5 special ones included", low=1)
    fim_rate: float = setting(None, "share of windows that become FIM examples")
    spm_rate: float = setting(None, "share of FIM examples in SPM order")
    spm_layout: str = setting(None, "where SPM puts its sentinels: swapped, labelled or joint")
    span: str = setting(None, "where FIM may cut: char, token, line, or mixed (char or line)")
    mask_ratio: float = setting(None, "share of inputs that MEAP masks, for meap_sft of the copy")
    mask_region: str = setting(None, "what meap_sft masks: the whole copy, or its answer alone")
    min_answer: int = setting(None, "meap_sft copies only answers of more tokens than this")
    min_piece: int = setting(None, "fewest tokens of text in a FIM example")
    max_piece: int = setting(None, "most tokens of text in a FIM example, 0 for up to a whole document")
    middle: str = setting(None, "length of the middle: uniform (two uniform cuts) or log_uniform (mostly short)")
    fim_level: str = setting("context", "FIM inside the window, or on whole documents before", ("context", "document"))
    n_layer: int = setting(4, "blocks", low=1)
    n_head: int = setting(2, "attention heads", low=1)
    n_embd: int = setting(128, "width", low=1)
    block_size: int = setting(256, "context, in tokens", low=8)
    dropout: float = setting(0.0, "share of activations dropped in training", low=0, high=0.99)
    position: str = setting("rope", "rotary or learned positions", ("rope", "learned"))
    qk_norm: bool = setting(True, "normalise queries and keys")
    token_shift: bool = setting(True, "attention reads part of its input from the token before")
    tied: bool = setting(True, "output layer shares the token embedding")
    bias: bool = setting(False, "biases in linear layers and norms")
    gelu: str = setting("none", "exact GELU, or tanh, GPT-2's approximation", ("none", "tanh"))
    attention: str = setting("auto", "manual (spelled out, the faster on CPU), fused, or auto: fused on a GPU",
                             ("auto", "manual", "fused"))
    batch_size: int = setting(16, "rows in a batch", low=1)
    grad_accum: int = setting(1, "batches in a step; torchrun's processes share them", low=1)
    steps: int = setting(1200, "optimiser steps", low=1)
    optimizer: str = setting("muon", "Muon on the blocks' matrices with AdamW on the rest, or AdamW", ("muon", "adamw"))
    lr: float = setting(0.006, "peak learning rate", low=1e-12)
    warmup: int = setting(40, "steps of linear warm-up", low=0)
    final_lr: float = setting(0.0, "share of the peak at which the linear decay ends", low=0, high=1)
    weight_decay: float = setting(0.1, "decay of matrices", low=0)
    beta1: float = setting(0.9, "AdamW's first moment", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's second moment", low=0, high=0.9999)
    clip: float = setting(1.0, "largest norm of the gradient, 0 for any", low=0)
    seed: int = setting(1, "decides weights, order of the data, cuts and masks", low=0, high=2**31)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    dtype: str = setting("auto", "arithmetic: auto is bf16 where the hardware has it", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the model")
    out: str = setting("", "folder of the run (default: out/OBJECTIVE, with a number where that is taken)")
    cache_dir: str = setting("cache", "folder of tokenised corpora")
    eval_every: int = setting(300, "steps between evaluations", low=1)
    eval_tokens: int = setting(65536, "held-out tokens in an evaluation; the last takes four times as many", low=1)
    save_every: int = setting(300, "steps between checkpoints", low=1)

    def __post_init__(self):
        check_choice("--preset", self.preset, PRESETS)
        for f in fields(self):
            flag, value = flag_of(f.name), getattr(self, f.name)
            if f.metadata["choices"]:
                check_choice(flag, value, f.metadata["choices"])
            if f.metadata["low"] is not None:
                check_range(flag, value, f.metadata["low"], f.metadata["high"])

    def make_objective(self):
        """The preset of that name, with the fields that were given as flags."""
        given = {f.name: getattr(self, f.name, None) for f in fields(Objective)}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return replace(OBJECTIVES[self.objective], **given)
        except ValueError as error:
            name, rest = str(error).split(" ", 1)
            raise ValueError(f"{flag_of(name)} {rest}") from None


def flag_of(name):
    return "--" + name.replace("_", "-")


def paper(n_layer, n_embd, n_head, lr, batch, params):
    """A size of the FIM paper (table 1: shape, learning rate, tokens in a batch, context 2048). It trained each on
    100 B tokens; the budget here is 20 tokens a parameter (Hoffmann et al., 2022)."""
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": 2048, "bias": True, "tied": False,
            "token_shift": False, "tokenizer": "gpt2", "optimizer": "adamw", "lr": lr, "batch_size": 8,
            "grad_accum": batch // (8 * 2048), "steps": 20 * params // batch, "warmup": 500, "final_lr": 0.1,
            "eval_every": 500, "save_every": 500}


PRESETS = {
    "toy": {},
    "laptop": {"n_layer": 6, "steps": 3600, "lr": 0.005, "warmup": 100, "eval_every": 450, "save_every": 225},
    "finetune": {"steps": 640, "lr": 0.002, "warmup": 20, "eval_every": 80, "save_every": 160},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "position": "learned", "qk_norm": False,
             "token_shift": False, "gelu": "tanh", "bias": True, "tokenizer": "gpt2", "batch_size": 32, "grad_accum": 16,
             "steps": 5000, "lr": 2e-3, "warmup": 200, "final_lr": 0.1, "eval_every": 500, "save_every": 500},
    "xxs": paper(6, 384, 6, 1.6e-3, 2**19, 50_000_000),
    "xs": paper(8, 512, 8, 1.4e-3, 2**19, 77_000_000),
    "small": paper(12, 768, 12, 6e-4, 2**19, 164_000_000),
    "medium": paper(24, 1024, 16, 3e-4, 2**19, 411_000_000),
    "large": paper(24, 1536, 16, 2.5e-4, 2**19, 844_000_000),
    "xl": paper(24, 2048, 16, 4e-4, 2**20, 1_400_000_000),
    "2.8b": paper(32, 2560, 32, 3.2e-4, 2**20, 2_800_000_000),
    "6.9b": paper(32, 4096, 32, 2.4e-4, 2**21, 6_900_000_000),
}
# What --resume may change; everything else decides the weights.
FREE = {"device", "out", "cache_dir", "eval_every", "eval_tokens", "save_every", "compile"}


def train(config, checkpoint=None):
    """Runs the training that config describes. Returns the last evaluation, a dict.

    checkpoint: where to start, if not anew: one of this run's own to resume from, or that of --init-from."""
    device, rank, world = join_processes(config)
    resuming = checkpoint is not None and "optimizers" in checkpoint
    tok = Tokenizer.from_dict(checkpoint["tokenizer"]) if config.init_from else None
    objective = config.make_objective()
    rows = config.block_size, config.batch_size, config.seed, rank, world
    if rank > 0:
        dist.barrier()  # until rank 0 has made the cache
    if objective.answers:
        tok, text, held_out = prepare_pairs(config.data, config.tokenizer, config.vocab_size, tok)
        batches = PairBatches(text, objective, tok, *rows)
    else:
        tok, text, held_out = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir, tok)
        batches = Batches(text, objective, tok, *rows, fim_level=config.fim_level)
    if rank == 0 and world > 1:
        dist.barrier()
    if resuming and (checkpoint["tokenizer"], checkpoint.get("stream_length")) != (tok.to_dict(), len(text)):
        raise OSError(f"--resume: the text of --data {config.data} has changed since {config.out} was started; put it back, "
                      "or start anew with another --out")
    model = make_model(config, tok.n_vocab, device)
    bf16 = config.dtype == "bf16" or config.dtype == "auto" and has_bf16(device)
    optimizers = make_optimizers(model, config, bf16)
    first = 0
    if checkpoint:
        with checkpoint_fits(config.out if resuming else config.init_from):
            model.load_state_dict(checkpoint["model"])
            if resuming:
                first = checkpoint["step"]
                for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out) if rank == 0 else nullcontext()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    forward = torch.compile(model) if config.compile else model
    if world > 1:  # averages the processes' gradients within backward()
        forward = DistributedDataParallel(forward)
    describe(config, model, tok, batches, held_out, objective, device, bf16, first)
    model.train()
    metrics, report, stopping = Metrics(out / "metrics.jsonl", first) if rank == 0 else None, {}, Interrupt()
    tokens_per_step = config.batch_size * config.grad_accum * config.block_size
    log_every = max(1, min(20, config.steps // 20))
    with tqdm(total=config.steps, initial=first, unit="step", mininterval=1, dynamic_ncols=True,
              disable=rank > 0) as bar, ThreadPoolExecutor(1) as prefetch, stopping, held:
        waiting = prefetch.submit(load, batches, first, config, device)
        logged, started = first, time.perf_counter()
        for step in range(first, config.steps):
            micro_batches = send(waiting.result(), device)
            waiting = prefetch.submit(load, batches, step + 1, config, device)
            total = update(forward, micro_batches, optimizers, step, config, autocast, rank, world)
            done = step + 1
            bar.update()
            stop = mean(float(stopping.asked), world) > 0  # one process was asked: all stop, after the same step
            last = done == config.steps or stop
            if done % log_every and done % config.eval_every and done % config.save_every and not last:
                continue

            loss = mean(total, world).item()
            stop_if_diverged(loss, done, config)
            now = time.perf_counter()
            speed = (done - logged) * tokens_per_step / (now - started)
            logged, started = done, now
            targets = micro_batches[-1][1]
            wanted = targets[targets != IGNORE].cpu()
            bpb = loss / math.log(2) / max(1e-9, tok.n_bytes[wanted].mean())
            bar.set_postfix_str(f"loss {loss:.3f}, {bpb:.3f} bits/byte, {speed:,.0f} tokens/s")
            tokens = done * tokens_per_step
            line = {"step": done, "tokens": tokens, "epoch": tokens / config.block_size / batches.n_windows, "loss": loss,
                    "lr": learning_rate(step, config), "tokens_per_s": round(speed)}
            if done % config.eval_every == 0 or done == config.steps:
                report = held_out_report(model, held_out, tok, objective, config, done, autocast)
                line |= report
                started = time.perf_counter()
            if rank == 0:
                metrics.write(line)
            if done % config.save_every == 0 or last:
                with torch.no_grad(), autocast:  # this step may have thrown the weights out
                    stop_if_diverged(mean(model(*micro_batches[-1])[1], world).item(), done, config)
            if rank == 0 and (done % config.save_every == 0 or last):
                save_checkpoint(out / "ckpt.pt", {
                    "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": done, "config": asdict(config), "model_config": asdict(model.config),
                    "objective": asdict(objective), "tokenizer": tok.to_dict(), "stream_length": len(text)})
            if stop:
                break
    if world > 1:
        dist.destroy_process_group()
    if done < config.steps:
        print(f"stopped after step {done}, saved; go on with: python train.py --out {out} --resume")
    else:
        print(f"done, saved in {out}; try: python sample.py --ckpt {out}")
    return report


def make_model(config, n_vocab, device):
    """A new GPT as config has it; its weights come from the seed."""
    torch.manual_seed(config.seed)
    shape = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name not in ("vocab_size", "attention")}
    attention = config.attention
    if attention == "auto":
        attention = "fused" if device.type == "cuda" else "manual"
    return GPT(GPTConfig(n_vocab, attention=attention, **shape)).to(device)


def load(batches, step, config, device):
    """This process's micro-batches of a step, as tensors that send can move to the device without waiting."""
    n = config.grad_accum // batches.world
    pairs = [[torch.from_numpy(ids) for ids in batches.batch(step * n + i)] for i in range(n)]
    return [[ids.pin_memory() for ids in pair] for pair in pairs] if device.type == "cuda" else pairs


def send(micro_batches, device):
    """The same on the device. Not in load's thread: two threads at work on MPS crash it (pytorch/pytorch issue 197805)."""
    return [[ids.to(device, non_blocking=device.type == "cuda") for ids in pair] for pair in micro_batches]


def update(forward, micro_batches, optimizers, step, config, autocast, rank=0, world=1):
    """One step of the optimisers; returns this process's share of the loss, a tensor: a GPU need not wait for its reader.

    The loss of a step is the mean over all its targets; in fine-tuning, batches have more or fewer of them."""
    n = len(micro_batches)
    counts = [(targets != IGNORE).sum() for _, targets in micro_batches]
    n_targets = mean(sum(counts), world)
    total = 0.0
    for i, (inputs, targets) in enumerate(micro_batches):
        # dropout, too, depends on the seed and the number of the batch alone
        torch.manual_seed(config.seed * 2**32 + (step * n + i) * world + rank)
        share = counts[i] / n_targets
        with forward.no_sync() if world > 1 and i < n - 1 else nullcontext():
            with autocast:
                loss = forward(inputs, targets)[1]  # nobody holds on to the logits
            (loss * share).backward()
        total = total + loss.detach() * share
    if config.clip:
        torch.nn.utils.clip_grad_norm_(forward.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
    return total


def join_processes(config):
    """-> (device, rank, world). Alone: rank 0 of 1. Under torchrun, every process runs train() on its share of a step's
    batches; rank 0 alone writes and prints. Raises ValueError where the batches cannot be shared out evenly."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if world > 1 and (name.startswith("cuda") or name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU each
    device = pick_device(name)
    if world == 1:
        return device, 0, 1
    if config.grad_accum % world:
        raise ValueError(f"--grad-accum {config.grad_accum}: expected a multiple of {world}, the number of processes "
                         "that share a step's batches")
    if device.type == "mps":
        raise ValueError("--device mps: torchrun's processes train on cuda, a GPU each, or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo for tensors on the CPU, also beside NCCL: asking for a stop must not wait for the GPU. torchrun ends the
    # processes if one fails, so waiting for a slow one (rank 0 making the cache, saving) may take long.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    rank = dist.get_rank()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, world


def mean(x, world):
    """A number's or tensor's mean over the processes, the same in each of them."""
    if world > 1:
        x = torch.as_tensor(x) / world
        dist.all_reduce(x)
    return x


def held_out_report(model, held_out, tok, objective, config, step, autocast):
    """Prints how the model does on held-out text, with one example, and returns the figure as {name: bits per byte}."""
    n_rows = config.eval_tokens * (4 if step == config.steps else 1) // config.block_size
    name, rows = ("answer_bpb", answer_rows) if objective.answers else ("held_out_bpb", text_rows)
    bpb = bits_per_byte(model, rows(held_out, tok, config.block_size, n_rows), tok, autocast)
    if bpb is None:
        tqdm.write(f"step {step}: no held-out text, or less than a window")
    else:
        stop_if_diverged(bpb, step, config)
        tqdm.write(f"step {step}: {bpb:.4f} held-out bits per byte{' of the answers' if objective.answers else ''}")
    if objective.answers and held_out:
        tqdm.write(show_answer(model, tok, *held_out[step % len(held_out)]))
    if objective.fim_rate and (hole := single_line_holes(held_out, tok, 1, seed=step)):
        tqdm.write(show_infill(model, tok, objective, *hole[0]))
    return {name: bpb}


def stop_if_diverged(loss, step, config):
    if not math.isfinite(loss):
        saved = Path(config.out, "ckpt.pt")
        kept = f"{saved} keeps the last good state" if saved.exists() else "nothing was saved yet"
        raise OSError(f"the loss is {loss} at step {step}; {kept}; try a lower --lr than {config.lr}")


def learning_rate(step, config):
    """Linear warm-up to the peak, then linear decay to final_lr of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step + 1 - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 - (1 - config.final_lr) * progress)


def make_optimizers(model, config, bf16=False):
    """[AdamW], and Muon for the blocks' matrices with --optimizer muon; bf16: whether Muon's products are in bf16."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        in_block = name.startswith("transformer.h.") and config.optimizer == "muon"
        (vectors if p.dim() < 2 else hidden if in_block else matrices).append(p)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(groups, config.lr, betas, weight_decay=config.weight_decay, fused=True)
    return [adamw] + ([Muon(hidden, config.lr, config.weight_decay, bf16)] if hidden else [])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices W (n, m) with gradients G:

        M <- 0.95 M + 0.05 G                                           momentum
        O = orthogonalize(0.95 M + 0.05 G)                             Nesterov's form of it, all singular values near 1
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(n, m)) O        scaled to the size of AdamW's updates (Liu et al.,
                                                                       2025, equation 4): one learning rate serves both
    """

    def __init__(self, matrices, lr, weight_decay=0.1, bf16=False):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)  # matrices of one shape are orthogonalised together
            for W in group["params"]:
                same_shape[W.shape].append(W)
            for (n, m), matrices in same_shape.items():
                looked_ahead = []
                for W in matrices:
                    if W not in self.state:
                        self.state[W]["momentum_buffer"] = torch.zeros_like(W)
                    M = self.state[W]["momentum_buffer"].lerp_(W.grad, 1 - group["momentum"])
                    looked_ahead.append(W.grad.lerp(M, group["momentum"]))
                updates = orthogonalize(torch.stack(looked_ahead).to(self.dtype))
                for W, O in zip(matrices, updates):
                    W.mul_(1 - group["lr"] * group["weight_decay"])
                    W.add_(O, alpha=-group["lr"] * 0.2 * max(n, m) ** 0.5)


def orthogonalize(G, steps=5):
    """G (k, n, m), k matrices with singular values S in G = U S V^T -> nearly U V^T: each S moves to between 0.7 and 1.2.

    Newton-Schulz iteration: X <- a X + (b A + c A^2) X with A = X X^T maps each singular value s to a s + b s^3 + c s^5,
    on the shorter side of the matrix (Jordan et al., 2024, whose coefficients these are)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = G.shape[1] > G.shape[2]
    X = G.mT if is_tall else G                                                  # (k, n, m), n <= m
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                    # now every singular value is at most 1
    for _ in range(steps):
        A = X @ X.mT                                                            # (k, n, n)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


def has_bf16(device):
    """Whether bf16 arithmetic is native here: on a CPU with AVX512-BF16 a step takes two thirds of its time in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch.cpu.get_capabilities says it officially, but not yet in every torch that this runs on
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@torch.no_grad()
def bits_per_byte(model, rows, tok, autocast=nullcontext()):
    """Bits per byte of held-out text, the figure that compares objectives and vocabularies.

    The cross-entropy of the targets of rows, pairs of arrays (T,), in bits, over the bytes of text they stand for; <EOT>,
    which is no text, is left out. None if there are no rows."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    n_bytes = torch.from_numpy(tok.n_bytes).to(device)
    rows, nats, total = list(rows), 0.0, 0
    for start in range(0, len(rows), 16):
        inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows[start:start + 16]))
        is_text = (targets != IGNORE) & (n_bytes[targets] > 0)
        with autocast:
            _, loss = model(inputs, targets.masked_fill(~is_text, IGNORE))
        nats += loss.item() * is_text.sum().item()
        total += n_bytes[targets[is_text]].sum().item()
    model.train(was_training)
    return nats / math.log(2) / total if total else None


def answer_rows(held_out, tok, T, n):
    """Up to n rows of prompts and answers, without a copy: targets are the answers."""
    batches = PairBatches(held_out, OBJECTIVES["sft"], tok, T, 1, seed=0)
    return map(batches.row, range(min(n, batches.n_windows)))


def show_infill(model, tok, objective, prefix, middle, suffix):
    """One held-out hole, filled greedily, as a few lines of text."""
    model.eval()
    order = "spm" if objective.spm_rate > 0 else "psm"
    best = infill(model, tok, tok.decode(prefix), tok.decode(suffix), order=order, spm_layout=objective.spm_layout,
                  max_new_tokens=min(64, model.config.block_size // 4))[0]
    model.train()
    before = "".join(split_lines(tok.decode(prefix))[-2:])
    after = "".join(split_lines(tok.decode(suffix))[:1])
    return (f"{before}⟦{best.text}⟧{after}"
            f"    (between ⟦ and ⟧: the model; {ENDINGS[best.ended]}; true: {tok.decode(middle).strip()!r})")


def show_answer(model, tok, prompt, answer):
    """One held-out prompt, answered greedily, as a few lines of text."""
    model.eval()
    most = min(64, model.config.block_size // 4)
    idx = torch.tensor([instruct_prompt(model, tok, prompt, most)], device=next(model.parameters()).device)
    ids, _ = collect(generate(model, idx, most, temperature=0, stop=tok.eot, allowed=tok.eot + 1), tok)[0]
    model.train()
    ended = ENDINGS["eot" if ids[-1] == tok.eot else "length"]
    return (f"{tok.decode(prompt[-most:])}⟦{tok.decode(ids)}⟧"
            f"    (between ⟦ and ⟧: the model; {ended}; true: {tok.decode(answer[:most])!r})")


def describe(config, model, tok, batches, held_out, objective, device, bf16, first):
    c = model.config
    tokens = config.steps * config.batch_size * config.grad_accum * config.block_size
    fim = (f"FIM on {objective.fim_rate:.0%} of windows, {objective.spm_rate:.0%} of them SPM ({objective.spm_layout}), "
           f"cut by {objective.span}" if objective.fim_rate else "")
    masked = "copy" if objective.answers else "inputs"
    meap = f"{objective.mask_ratio:.0%} of the {masked} masked" if objective.mask_ratio else ""
    print(f"model      {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}: "
          f"{model.n_params() / 1e6:.2f} M parameters ({model.n_params(embedding=False) / 1e6:.2f} M without embeddings)\n"
          f"data       {config.data}: {batches.describe()}, {len(held_out):,} held out, "
          f"{config.tokenizer} vocabulary of {tok.n_vocab:,}\n"
          f"objective  {', '.join(filter(None, (config.objective, fim, meap)))}\n"
          f"training   {config.steps:,} steps of {config.batch_size * config.grad_accum} x {config.block_size} tokens = "
          f"{tokens / 1e6:.1f} M, {tokens / config.block_size / batches.n_windows:.1f} epochs, {config.optimizer}, "
          f"learning rate {config.lr}\n"
          f"device     {device}, {'bf16' if bf16 else 'fp32'}, {c.attention} attention"
          + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
          + (f", {dist.get_world_size()} processes" if dist.is_initialized() else "")
          + f"\nout        {config.out}" + (f", going on after step {first}" if first else
                                     f", from {config.init_from}" if config.init_from else ""))


def lock(folder):
    """Keeps other runs out of a folder while the file that it returns is open: until the process ends, however it ends.
    Raises OSError where another run is at work. (On Windows and on some network disks there is no such lock.)"""
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"--out {folder}: another run is at work in this folder; wait, or take another") from None
    except OSError:
        pass
    return file


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines after its checkpoint, and half a line."""

    def __init__(self, path, first):
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= first else []
                except (ValueError, KeyError, TypeError):
                    pass
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self.file = open(path, "a")

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


class Interrupt:
    """Within it, Ctrl-C (or a plain kill) asks for a stop after the step at hand; a second Ctrl-C stops at once."""
    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step ...")

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def save_checkpoint(path, checkpoint):
    """Atomically: at any moment, also after a power cut, path is the old checkpoint or the new one, whole and on the
    disk. Raises OSError where there is no room for it."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns some failed writes into a RuntimeError
        temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: step {checkpoint['step']} could not be saved ({cause}); what was saved before is "
                      "whole") from None


def read_arguments(arguments):
    """The command line -> (Config, checkpoint to resume from or None)."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    for f in fields(Config):
        default = f"default {f.default}" if f.default not in (None, "") else ""
        choices = ", ".join(PRESETS if f.name == "preset" else f.metadata["choices"] or ())
        extra = "; ".join(filter(None, (choices, default)))
        help = f.metadata["help"] + (f" ({extra})" if extra else "")
        if f.type is bool:
            parser.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(flag_of(f.name), type=f.type, help=help.replace("%", "%%"), metavar=f.type.__name__.upper())
    given = vars(parser.parse_args(arguments))
    if given.pop("resume", False):
        return resume(given)
    check_choice("--objective", given.get("objective", "ntp"), OBJECTIVES)
    answers = OBJECTIVES[given.get("objective", "ntp")].answers
    given = ({"preset": "finetune", "data": "functions"} if answers else {}) | given
    if given.get("data") == "functions" and not answers:
        raise ValueError("--data functions: prompts and answers, which only --objective sft and meap_sft train on")
    check_choice("--preset", given.get("preset", "toy"), PRESETS)
    checkpoint = load_start(given) if given.get("init_from") else None
    brought = checkpoint["settings"] if checkpoint else {}
    config = Config(**PRESETS[given.get("preset", "toy")] | brought | given)
    config.make_objective()
    if not config.out:
        number = 1
        while (name := Path("out", config.objective + (f"-{number}" if number > 1 else ""))).exists():
            number += 1
        config.out = str(name)
    elif Path(config.out, "ckpt.pt").exists():
        raise ValueError(f"--out {config.out} already holds a run: --resume goes on with it, another --out starts anew")
    return config, checkpoint


def load_start(given):
    """What --init-from names: {"model": weights, "tokenizer", "settings": of Config, that the run takes over from it}.

    Raises ValueError where a flag contradicts one of the settings; a smaller context does not."""
    path = Path(given["init_from"])
    ours = path.name == "ckpt.pt" or (path / "ckpt.pt").is_file()
    start = load_checkpoint(path) if ours else load_gpt2(path)
    shape = {f.name: start["model_config"][f.name] for f in fields(Config)
             if f.name in start["model_config"] and f.name not in ("attention", "dropout")}
    settings = shape | {"tokenizer": start["config"]["tokenizer"] if ours else "gpt2"}
    for name, value in settings.items():
        if name == "block_size" and given.get(name, value) <= value:
            continue
        if given.get(name, value) != value:
            flag = f"{flag_of(name)} {given[name]}: {path} has {value}"
            if isinstance(value, bool):
                flag = f"{flag_of(name if given[name] else 'no_' + name)}: {path} has it {'on' if value else 'off'}"
            raise ValueError(f"{flag}; leave the flag out, or start without --init-from")
    if settings["position"] == "learned":
        wpe = start["model"]["transformer.wpe.weight"]
        start["model"]["transformer.wpe.weight"] = wpe[:given.get("block_size", len(wpe))]
    return {"model": start["model"], "tokenizer": start["tokenizer"], "settings": settings}


def resume(given):
    if "out" not in given:
        raise ValueError("--resume: expected --out DIR, the folder of the run to go on with")
    checkpoint = load_checkpoint(given["out"])
    with checkpoint_fits(given["out"]):
        saved = Config(**checkpoint["config"])
    changed = [f"{flag_of(name)} {getattr(saved, name)} to {value}" for name, value in given.items()
               if name not in FREE and value != getattr(saved, name)]
    if changed:
        raise ValueError(f"--resume goes on with the settings of {given['out']}, but these changed: {', '.join(changed)}; "
                         "leave them out, or start anew with another --out")
    config = replace(saved, **given)
    if checkpoint["step"] >= config.steps:
        raise ValueError(f"--resume: {config.out} has all its {config.steps} steps; nothing is left to do")
    return config, checkpoint


@one_line_errors
def main(arguments=None):
    train(*read_arguments(arguments))


if __name__ == "__main__":
    main()
