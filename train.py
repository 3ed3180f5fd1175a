"""Train a GPT under one of the objectives.

    python train.py --objective fim_spm                   a toy on the standard library: minutes on a CPU
    python train.py --objective fim --preset laptop       larger and longer
    python train.py --preset gpt2 --data code.jsonl.gz --tokenizer gpt2        on a GPU
    python train.py --out out/fim_spm --resume            goes on where a run stopped
    python train.py --objective sft --init-from out/ntp   fine-tunes a finished model on prompts and answers
    torchrun --nproc_per_node=8 train.py --preset gpt2 --data code.jsonl.gz    on 8 GPUs, the same run

From top to bottom: settings, presets, the loop, optimisers, evaluation, several processes, the command line.
"""
import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cli import (Interrupt, Parser, checkpoint_fits, flag_of, has_fast_bf16, load_checkpoint, lock,
                 one_line_errors, open_metrics, pick_device, save_checkpoint)
from data import GENERATED, Batches, Tokenizer, prepare, split_lines, text_rows
from model import GPT, GPTConfig
from objectives import (IGNORE, OBJECTIVES, ON_PAIRS, check_choice, check_range, fim, fim_documents, knobs_of,
                        ntp)
from sample import infill, trained_orders


def setting(default, help, choices=None, low=None, high=math.inf):
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    """The settings of a run, each of them a flag: batch_size is --batch-size. The defaults are those of the
    toy; the other PRESETS override them. The knobs of the objectives are flags, too.

    Raises ValueError, naming the flag, for a value out of range."""
    objective: str = setting("ntp", "what to predict", tuple(OBJECTIVES))
    knobs: dict = field(default_factory=dict)  # of the objective, by name
    preset: str = setting("toy", "model, budget and learning rate in one; single flags override it")
    init_from: str = setting("", "a run's folder, or GPT-2's published weights: start from its weights, "
                             "shape and vocabulary")
    data: str = setting("stdlib", f"stdlib, site-packages, {', '.join(GENERATED)}, or a file, folder or glob "
                        "of text or .jsonl[.gz]; for sft and meap_sft functions, or .json[l][.gz] of pairs")
    tokenizer: str = setting("bpe", "learned from the data, raw bytes, or GPT-2's (a download)",
                             ("bpe", "bytes", "gpt2"))
    vocab_size: int = setting(2048, "ids of the bpe tokenizer, the 5 special ones included", low=1)
    fim_level: str = setting("context", "FIM inside the window, or on whole documents before",
                             ("context", "document"))
    n_layer: int = setting(4, "blocks", low=1)
    n_head: int = setting(2, "attention heads", low=1)
    n_embd: int = setting(128, "width", low=1)
    block_size: int = setting(256, "context, in tokens", low=8)
    dropout: float = setting(0.0, "share of activations dropped in training", low=0, high=0.99)
    position: str = setting("rope", "rotary or learned positions", ("rope", "learned"))
    qk_norm: bool = setting(True, "normalise queries and keys")
    token_shift: bool = setting(True, "each layer reads part of its input from the token before")
    tied: bool = setting(True, "output layer shares the token embedding")
    bias: bool = setting(False, "biases in linear layers and norms")
    gelu: str = setting("none", "exact GELU, or tanh, GPT-2's approximation", ("none", "tanh"))
    attention: str = setting("auto", "manual (written out, the faster on CPU), fused, or auto: "
                             "fused on a GPU", ("auto", "manual", "fused"))
    batch_size: int = setting(16, "rows in a batch", low=1)
    grad_accum: int = setting(1, "batches in a step; torchrun's processes share them", low=1)
    steps: int = setting(750, "optimiser steps", low=1)
    optimizer: str = setting("muon", "Muon on the blocks' matrices with AdamW on the rest, or AdamW",
                             ("muon", "adamw"))
    lr: float = setting(0.01, "peak learning rate", low=1e-12)
    embedding_lr: float = setting(3.0, "learning rate of the embeddings and the output layer, as a multiple "
                                  "of lr", low=0)
    warmup: int = setting(40, "steps of linear warm-up", low=0)
    final_lr: float = setting(0.0, "share of the peak at which the linear decay ends", low=0, high=1)
    weight_decay: float = setting(0.1, "decay of matrices", low=0)
    beta1: float = setting(0.9, "decay of the first moment, or Muon's momentum", low=0, high=0.9999)
    beta2: float = setting(0.95, "decay of AdamW's second moment", low=0, high=0.9999)
    clip: float = setting(1.0, "largest norm of the gradient, 0 for any", low=0)
    seed: int = setting(1, "decides weights, order of the data, cuts and masks", low=0, high=2**31)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    dtype: str = setting("auto", "arithmetic: auto is bf16 where that is faster",
                         ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the model")
    out: str = setting("", "folder of the run (default: out/OBJECTIVE, with a number where that is taken)")
    cache_dir: str = setting("cache", "folder of tokenised corpora")
    eval_every: int = setting(150, "steps between evaluations", low=1)
    eval_tokens: int = setting(32768, "held-out tokens in an evaluation, four times as many in the "
                               "last", low=1)
    save_every: int = setting(150, "steps between checkpoints", low=1)

    def __post_init__(self):
        check_choice("--preset", self.preset, PRESETS)
        for f in fields(self):
            flag, value = flag_of(f.name), getattr(self, f.name)
            if f.metadata.get("choices"):
                check_choice(flag, value, f.metadata["choices"])
            if f.metadata.get("low") is not None:
                check_range(flag, value, f.metadata["low"], f.metadata["high"])


def paper(n_layer, n_embd, n_head, lr, batch, params):
    """A model size of the FIM paper (table 3: shape, learning rate, tokens in a batch; context 2048), trained
    on 20 tokens a parameter (Hoffmann et al., 2022) instead of the paper's 100 B tokens. The paper has
    relative attention; these presets have rotary positions and normalised queries and keys."""
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": 2048, "bias": True,
            "tied": False, "token_shift": False, "tokenizer": "gpt2", "optimizer": "adamw", "lr": lr,
            "embedding_lr": 1.0, "batch_size": 8, "grad_accum": batch // (8 * 2048),
            "steps": 20 * params // batch, "warmup": 500, "final_lr": 0.1,
            "eval_every": 500, "save_every": 500}


# A CPU's budget holds too few documents for the paper's one hole a document.
SHORT = {"short_documents": 128}
# What GPT-2 has in place of rotary positions, normalised queries and keys, and the token shift.
GPT2 = {"position": "learned", "qk_norm": False, "token_shift": False, "gelu": "tanh", "bias": True}
PRESETS = {
    "toy": SHORT,
    "toy_gpt2": SHORT | GPT2,
    "laptop": SHORT | {"n_layer": 6, "steps": 3400, "lr": 0.008, "warmup": 100, "eval_every": 425,
                       "save_every": 425},
    "finetune": {"block_size": 1024, "batch_size": 4, "steps": 640, "lr": 0.002, "warmup": 20,
                 "eval_every": 80, "save_every": 160},
    "gpt2": GPT2 | {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "tokenizer": "gpt2",
                    "batch_size": 32, "grad_accum": 16, "steps": 5000, "lr": 2e-3, "embedding_lr": 1.0,
                    "beta1": 0.95, "warmup": 200, "final_lr": 0.1, "eval_every": 500, "save_every": 500},
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


def train(config, checkpoint=None, measure=None):
    """Runs the training that config describes. Returns the last evaluation, {"held_out_bpb": bits per byte}.

    checkpoint: the one to resume this run from, the weights of --init-from, or None for a new model.
    measure(model, tok, step) -> {name: value}: more to write into metrics.jsonl at each evaluation."""
    # Data: documents -> token stream -> windows -> rows, as the objective makes them.
    device, rank, world = join_processes(config)
    resuming = checkpoint is not None and "optimizers" in checkpoint
    tok, batches, held_out_rows = make_data(config, checkpoint, rank, world)
    data = {"tokenizer": tok.to_dict(), "stream_length": len(batches.stream)}
    if resuming and any(checkpoint[name] != value for name, value in data.items()):
        raise OSError(f"--resume: the text of --data {config.data} has changed since {config.out} was "
                      "started; put it back, or start anew with another --out")

    # Model and optimisers, and the state to start from.
    if config.dtype == "auto":  # the same in all processes, or their weights would drift apart
        is_faster = mean(float(has_fast_bf16(device)), world) > 0.5
        config = replace(config, dtype="bf16" if is_faster else "fp32")
    bf16 = config.dtype == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    model = make_model(config, tok.n_vocab, device)
    optimizers = make_optimizers(model, config, bf16)
    first = 0
    if checkpoint:
        with checkpoint_fits(config.out if resuming else config.init_from):
            model.load_state_dict(checkpoint["model"])
            if resuming:
                first = checkpoint["step"]
                for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
    forward = torch.compile(model) if config.compile else model
    if world > 1:
        forward = DistributedDataParallel(forward)  # averages the processes' gradients within backward()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run_lock = lock(out) if rank == 0 else nullcontext()
    metrics = open_metrics(out / "metrics.jsonl", first) if rank == 0 else None
    describe(config, model, tok, batches, device, first)

    tokens_per_step = config.batch_size * config.grad_accum * config.block_size
    log_every = max(1, min(20, config.steps // 20))
    report, n = {}, config.grad_accum // world
    model.train()
    with tqdm(total=config.steps, initial=first, unit="step", mininterval=1, dynamic_ncols=True,
              disable=rank > 0) as bar, ThreadPoolExecutor(1) as prefetch, Interrupt() as interrupt, run_lock:
        waiting = prefetch.submit(load, batches, first * n, n, device)
        logged, started = first, time.perf_counter()
        for step in range(first, config.steps):
            # The step's micro-batches, while a thread builds those of the next step. The main thread sends
            # them to the device: two threads that use MPS at once crash it (pytorch/pytorch issue 197805).
            micro_batches = [[ids.to(device, non_blocking=True) for ids in pair] for pair in waiting.result()]
            waiting = prefetch.submit(load, batches, (step + 1) * n, n, device)

            # Forward and backward. The loss of a step is the mean over all its targets, however they are
            # divided among the micro-batches and the processes.
            counts = [(targets != IGNORE).sum() for _, targets in micro_batches]
            n_targets, loss = mean(sum(counts), world).clamp(min=1), 0.0
            for i, (inputs, targets) in enumerate(micro_batches):
                torch.manual_seed(config.seed * 2**32 + (step * n + i) * world + rank)  # decides dropout
                with forward.no_sync() if world > 1 and i < n - 1 else nullcontext():
                    with autocast:
                        micro_loss = forward(inputs, targets)[1]
                    (micro_loss * counts[i] / n_targets).backward()
                loss = loss + micro_loss.detach() * counts[i] / n_targets

            # Update.
            if config.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config) * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
            done = step + 1
            bar.update()
            if done == first + 2:
                began = time.perf_counter()  # the first steps are slower than the others
            if done == first + 8:
                print_estimate(bar, (time.perf_counter() - began) / 6, config, first)

            # Now and then: log, evaluate, save.
            # If one process is asked to stop, all stop after the same step.
            stop = mean(float(interrupt.asked), world) > 0
            last = stop or done == config.steps
            if not last and done % log_every and done % config.eval_every and done % config.save_every:
                continue
            loss = mean(loss, world).item()
            stop_if_diverged(loss, done, config)
            speed = (done - logged) * tokens_per_step / (time.perf_counter() - started)
            tokens = done * tokens_per_step
            line = {"step": done, "tokens": tokens, "epoch": tokens / config.block_size / batches.n_windows,
                    "loss": loss, "lr": learning_rate(step, config), "tokens_per_s": round(speed)}
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            if done % config.eval_every == 0 or done == config.steps:
                report = held_out_report(model, held_out_rows, tok, config, done, autocast)
                if measure:
                    model.eval()
                    report |= measure(model, tok, done)
                    model.train()
                line |= report
            if rank == 0:
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            if last or done % config.save_every == 0:
                with torch.no_grad(), autocast:  # this step's update may have thrown the weights out
                    stop_if_diverged(mean(model(*micro_batches[-1])[1], world).item(), done, config)
                if rank == 0:
                    save_checkpoint(out / "ckpt.pt", data | {
                        "step": done, "config": asdict(config), "model_config": asdict(model.config),
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if stop:
                break
            logged, started = done, time.perf_counter()
    if world > 1:
        dist.destroy_process_group()
    print(f"done, saved in {out}; try: python sample.py --ckpt {out}" if done == config.steps else
          f"stopped after step {done}, saved; go on with: python train.py --out {out} --resume")
    return report


def make_data(config, checkpoint, rank, world):
    """-> (Tokenizer, Batches, rows(n): n held-out rows, (inputs, targets) of T ids each)."""
    tok = Tokenizer.from_dict(checkpoint["tokenizer"]) if config.init_from else None
    objective = partial(OBJECTIVES[config.objective], **config.knobs)
    shape = config.block_size, config.batch_size, config.seed, rank, world
    if rank > 0:
        dist.barrier()  # until rank 0 has made the cache
    if config.objective in ON_PAIRS:
        from lab.pairs import prepare_pairs
        tok, batches, held_out_rows = prepare_pairs(config.data, config.tokenizer, config.vocab_size, tok,
                                                    objective, *shape)
    else:
        tok, stream, held_out = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir,
                                        tok)
        if config.fim_level == "document":
            rng = np.random.default_rng(config.seed)
            stream, objective = fim_documents(stream, tok, rng, **config.knobs), ntp
        batches = Batches(stream, objective, tok, *shape)
        held_out_rows = partial(text_rows, held_out, config.block_size)
    if rank == 0 and world > 1:
        dist.barrier()
    return tok, batches, held_out_rows


def make_model(config, n_vocab, device):
    """A new GPT of the shape in config, its weights drawn with the seed."""
    torch.manual_seed(config.seed)
    shape = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    if config.attention == "auto":
        shape["attention"] = "fused" if device.type == "cuda" else "manual"
    return GPT(GPTConfig(n_vocab, **shape)).to(device)


def load(batches, start, n, device):
    """This process's micro-batches number start to start + n - 1, as tensors on the CPU."""
    pairs = [[torch.from_numpy(ids) for ids in batches.batch(i)] for i in range(start, start + n)]
    return [[ids.pin_memory() for ids in pair] for pair in pairs] if device.type == "cuda" else pairs


def learning_rate(step, config):
    """Linear warm-up to the peak lr, then linear decay to final_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step + 1 - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 - (1 - config.final_lr) * progress)


def make_optimizers(model, config, bf16=False):
    """-> [AdamW], or [AdamW, Muon] with --optimizer muon, where Muon has the matrices of the blocks.

    bf16: Muon's matrix products are in bf16 instead of fp32."""
    embeddings, hidden, vectors = [], [], []
    for name, p in model.named_parameters():
        (vectors if p.dim() < 2 else hidden if name.startswith("transformer.h.") else embeddings).append(p)
    groups = [{"params": embeddings, "scale": config.embedding_lr},
              {"params": vectors, "scale": 1.0, "weight_decay": 0.0}]
    muon = []
    if config.optimizer == "muon":
        muon = [Muon(hidden, config.lr, config.weight_decay, config.beta1, bf16)]
    else:
        groups.append({"params": hidden, "scale": 1.0})
    betas = config.beta1, config.beta2
    return [torch.optim.AdamW(groups, config.lr, betas, weight_decay=config.weight_decay, fused=True), *muon]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices W (n, m) with gradients G:

        M <- mu M + (1 - mu) G                                      momentum
        O = orthogonalize(mu M + (1 - mu) G)                        Nesterov momentum, singular values near 1
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(n, m)) O

    The factor 0.2 sqrt(max(n, m)) scales O to the size of AdamW's updates (Liu et al., 2025), so that one
    learning rate serves both optimisers."""

    def __init__(self, matrices, lr, weight_decay=0.1, momentum=0.95, bf16=False):
        super().__init__(matrices, {"lr": lr, "scale": 1.0, "weight_decay": weight_decay,
                                    "momentum": momentum})
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
    """G (k, n, m), k matrices U S V^T -> nearly U V^T: each singular value moves to between 0.7 and 1.2.

    Newton-Schulz iteration: X <- a X + (b A + c A^2) X with A = X X^T maps each singular value s to
    a s + b s^3 + c s^5 (Jordan et al., 2024; the coefficients are theirs)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = G.shape[1] > G.shape[2]
    X = G.mT if is_tall else G                                          # (k, n, m), n <= m: A is the smaller
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)            # every singular value is at most 1
    for _ in range(steps):
        A = X @ X.mT                                                    # (k, n, n)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


@torch.no_grad()
def text_bits(model, rows, tok, autocast=nullcontext()):
    """Two arrays with a number for each row: the bits of its targets under the model, -log2 of their
    probability, and the bytes of text that these targets stand for. <EOT>, which is no text, is left out
    of both.

    rows: (inputs, targets) of T ids each."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    rows, bits, sizes = list(rows), [], []
    n_bytes = torch.from_numpy(tok.n_bytes).to(device)
    batch_size = max(1, 2**25 // (model.config.block_size * model.config.vocab_size))
    for start in range(0, len(rows), batch_size):
        batch = zip(*rows[start:start + batch_size])
        inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in batch)
        size = n_bytes[targets.clamp(min=0)] * (targets != IGNORE)              # (B, T)
        with autocast:
            logits, _ = model(inputs)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.masked_fill(size == 0, IGNORE).flatten(),
                               ignore_index=IGNORE, reduction="none").view_as(targets)
        bits.append(nats.sum(1).cpu().numpy() / math.log(2))
        sizes.append(size.sum(1).cpu().numpy())
    model.train(was_training)
    return (np.concatenate(bits), np.concatenate(sizes)) if rows else (np.zeros(0), np.zeros(0))


def held_out_report(model, held_out_rows, tok, config, step, autocast):
    """Prints the model's bits per byte on held-out text and, if the model is trained to infill, one infill.

    Returns {name: bits per byte}, the figure that compares objectives and vocabularies, or {name: None} where
    no text is held out."""
    name = "answer_bpb" if config.objective in ON_PAIRS else "held_out_bpb"
    n_rows = config.eval_tokens * (4 if step == config.steps else 1) // config.block_size
    rows = list(held_out_rows(max(1, n_rows)))
    bits, sizes = text_bits(model, rows, tok, autocast)
    if not sizes.sum():
        tqdm.write(f"step {step}: no held-out text, or less than a window")
        return {name: None}
    bpb = float(bits.sum() / sizes.sum())
    stop_if_diverged(bpb, step, config)
    tqdm.write(f"step {step}: {bpb:.4f} held-out bits per byte"
               f"{' of the answers' if name == 'answer_bpb' else ''}")
    if trained_orders(config.knobs):
        tqdm.write(show_infill(model, tok, config, tok.decode(rows[step % len(rows)][0].tolist())))
    return {name: bpb}


def show_infill(model, tok, config, text):
    """A few lines to print: the line in the middle of a text, taken out and infilled greedily."""
    lines = split_lines(text)
    i = max(range(len(lines)), key=lambda i: (lines[i].strip() != "", -abs(i - len(lines) // 2)))
    model.eval()
    best, = infill(model, tok, "".join(lines[:i]), "".join(lines[i + 1:]),
                   order=trained_orders(config.knobs)[-1], spm_layout=config.knobs["spm_layout"],
                   max_new_tokens=min(64, model.config.block_size // 4))
    model.train()
    shown = split_lines(best.text)
    shown = "".join(shown[:3]) + ("..." if len(shown) > 3 else "")
    return f"{''.join(lines[max(0, i - 2):i])}⟦{shown}⟧{''.join(lines[i + 1:i + 2]).rstrip()}\n" \
           f"    (between ⟦ and ⟧: the model, {best.ended}; true: {lines[i].strip()!r})"


def stop_if_diverged(loss, step, config):
    if not math.isfinite(loss):
        saved = Path(config.out, "ckpt.pt")
        kept = f"{saved} keeps the last good state" if saved.exists() else "nothing was saved yet"
        raise OSError(f"the loss is {loss} at step {step}; {kept}; try a lower --lr than {config.lr}")


def describe(config, model, tok, batches, device, first):
    """Prints the run's header."""
    c, n_rows, million = model.config, config.steps * config.batch_size * config.grad_accum, 1e6
    knobs = "".join(f", {name} {value}" for name, value in config.knobs.items() if name != "short_documents")
    if n := config.knobs.get("short_documents"):
        knobs += f"; short documents: at most {n} tokens"
    print(f"model      {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}: "
          f"{model.n_params() / million:.2f} M parameters "
          f"({model.n_params(embedding=False) / million:.2f} M without embeddings)")
    print(f"data       {config.data}: {batches.describe()}, {config.tokenizer} vocabulary of {tok.n_vocab:,}")
    print(f"objective  {config.objective}{knobs}")
    print(f"training   {config.steps:,} steps of {config.batch_size * config.grad_accum} x "
          f"{config.block_size} tokens = {n_rows * config.block_size / million:.1f} M, "
          f"{n_rows / batches.n_windows:.1f} epochs, {config.optimizer}, learning rate {config.lr}")
    print(f"device     {device}, {config.dtype}, {c.attention} attention"
          + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
          + (f", {dist.get_world_size()} processes" if dist.is_initialized() else ""))
    print(f"out        {config.out}" + (f", going on after step {first}" if first else
                                        f", from {config.init_from}" if config.init_from else ""))


def print_estimate(bar, seconds, config, first):
    """Prints how long the run will take on this machine, from the seconds that a step takes. An evaluation
    runs forward passes, and a forward pass takes about a third of a step."""
    tokens_per_step = config.batch_size * config.grad_accum * config.block_size
    evaluated = config.eval_tokens * ((config.steps - first) // config.eval_every + 3) / tokens_per_step / 3
    minutes = seconds * (config.steps - first + evaluated) / 60
    duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} min"
    bar.write(f"time       about {duration} here, {seconds:.2f} s a step\n")


def join_processes(config):
    """-> (device, rank, world). A single process is rank 0 of 1. Under torchrun, every process runs train()
    on its share of a step's batches; rank 0 alone writes and prints.

    Raises ValueError where the batches cannot be shared evenly, or on MPS."""
    world, name = int(os.environ.get("WORLD_SIZE", 1)), config.device
    if world > 1 and (name.startswith("cuda") or name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU each
    device = pick_device(name)
    if world == 1:
        return device, 0, 1
    if config.grad_accum % world:
        raise ValueError(f"--grad-accum {config.grad_accum}: expected a multiple of {world}, the number of "
                         "processes that share a step's batches")
    if device.type == "mps":
        raise ValueError("--device mps: torchrun's processes train on cuda, a GPU each, or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo for tensors on the CPU, also beside NCCL: asking for a stop must not wait for the GPU. The timeout
    # is long because rank 0 may be slow (making the cache, saving); torchrun ends all processes if one fails.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    rank = dist.get_rank()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, world


def mean(x, world):
    """The mean of a number or a tensor over the processes, the same in each of them."""
    if world > 1:
        x = torch.as_tensor(x) / world
        dist.all_reduce(x)
    return x


def read_arguments(arguments):
    """The command line -> (Config, checkpoint): the one to resume from, that of --init-from, or None."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    for f in fields(Config):
        if f.name == "knobs":
            continue
        choices = ", ".join(PRESETS if f.name == "preset" else f.metadata["choices"] or ())
        default = f"default {f.default}" if f.default not in (None, "") else ""
        extra = "; ".join(filter(None, (choices, default)))
        help = f.metadata["help"] + (f" ({extra})" if extra else "")
        add_flag(parser, f.name, f.type, help)
    owners = defaultdict(dict)  # {knob: {objective: default}}
    for name, objective in OBJECTIVES.items():
        for knob, default in knobs_of(objective).items():
            owners[knob][name] = default
    for knob, defaults in owners.items():
        help = "knob of " + ", ".join(f"{name} (default {default})" for name, default in defaults.items())
        add_flag(parser, knob, type(next(iter(defaults.values()))), help)
    given = vars(parser.parse_args(arguments))
    given["knobs"] = {knob: given.pop(knob) for knob in owners if knob in given}
    if given.pop("resume", False):
        return resume(given)

    # Flags override what --init-from brings, which overrides the preset, which overrides the defaults.
    name = given.get("objective", "ntp")
    check_choice("--objective", name, OBJECTIVES)
    given = ({"preset": "finetune", "data": "functions"} if name in ON_PAIRS else {}) | given
    if given.get("data") == "functions" and name not in ON_PAIRS:
        raise ValueError("--data functions: prompts and answers, "
                         f"expected --objective {' or '.join(ON_PAIRS)}")
    check_choice("--preset", given.get("preset", "toy"), PRESETS)
    preset = PRESETS[given.get("preset", "toy")]
    known = knobs_of(OBJECTIVES[name])
    for knob, value in given["knobs"].items():
        if knob not in known:
            takes = ", ".join(map(flag_of, known)) or "none"
            raise ValueError(f"{flag_of(knob)} {value}: no knob of --objective {name}; "
                             f"expected its own: {takes}")
    given["knobs"] = known | {knob: value for knob, value in preset.items() if knob in known} | given["knobs"]
    check_knobs(name, given["knobs"])
    if given.get("fim_level") == "document" and known.keys() != knobs_of(fim).keys():
        raise ValueError(f"--fim-level document: expected --objective fim_psm, fim_spm or fim, not {name}")
    checkpoint = load_start(given) if given.get("init_from") else None
    settings = {key: value for key, value in preset.items() if key not in owners}
    brought = checkpoint["settings"] if checkpoint else {}
    if brought.get("position") == "rope" and "block_size" in preset:
        del brought["block_size"]  # rotary positions have no weights: the context may grow
    config = Config(**settings | brought | given)
    if not config.out:
        number = 1
        while (out := Path("out", config.objective + (f"-{number}" if number > 1 else ""))).exists():
            number += 1
        config.out = str(out)
    elif Path(config.out, "ckpt.pt").exists():
        raise ValueError(f"--out {config.out} already holds a run: --resume goes on with it, another --out "
                         "starts anew")
    return config, checkpoint


def add_flag(parser, name, kind, help):
    if kind is bool:
        parser.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=help)
    else:
        parser.add_argument(flag_of(name), type=kind, help=help, metavar=kind.__name__.upper())


def check_knobs(name, knobs):
    """Raises ValueError, naming the flag, where an objective, called on a few bytes, refuses its knobs."""
    tok = Tokenizer.bytes()
    ids = np.array([*b"def f():\n", tok.mid, *b"    return 1\n", tok.eot])
    try:
        OBJECTIVES[name](ids, tok, np.random.default_rng(0), **knobs)
    except ValueError as error:
        knob, _, rest = str(error).partition(" ")
        where = f"{flag_of(knob)} {rest}" if knob in knobs else f"--objective {name}: {error}"
        raise ValueError(where) from None


def load_start(given):
    """What --init-from names: {"model": weights, "tokenizer", "settings"}. The settings are those of
    Config that the run takes over.

    Raises ValueError where a flag contradicts one of the settings. A smaller context is allowed, and any
    context for a model with rotary positions."""
    path = Path(given["init_from"])
    ours = path.name == "ckpt.pt" or (path / "ckpt.pt").is_file()
    if ours:
        start = load_checkpoint(path)
    else:
        from lab.gpt2 import load_gpt2
        start = load_gpt2(path)
    settings = {f.name: start["model_config"][f.name] for f in fields(Config)
                if f.name in start["model_config"] and f.name not in ("attention", "dropout")}
    settings["tokenizer"] = start["config"]["tokenizer"] if ours else "gpt2"
    for name, value in settings.items():
        if name == "block_size" and (settings["position"] == "rope" or given.get(name, value) <= value):
            continue
        if given.get(name, value) != value:
            flag = f"{flag_of(name)} {given[name]}: {path} has {value}"
            if isinstance(value, bool):
                flag = flag_of(name if given[name] else "no_" + name)
                flag = f"{flag}: {path} has it {'on' if value else 'off'}"
            raise ValueError(f"{flag}; leave the flag out, or start without --init-from")
    if settings["position"] == "learned":
        wpe = start["model"]["transformer.wpe.weight"]
        start["model"]["transformer.wpe.weight"] = wpe[:given.get("block_size", len(wpe))]
    return {"model": start["model"], "tokenizer": start["tokenizer"], "settings": settings}


def resume(given):
    """-> (Config, checkpoint) of the run in --out. The flags given replace its settings where FREE allows it.

    Raises ValueError where a flag would change another setting, or where the run is finished."""
    if "out" not in given:
        raise ValueError("--resume: expected --out DIR, the folder of the run to go on with")
    checkpoint = load_checkpoint(given["out"])
    with checkpoint_fits(given["out"]):
        saved = Config(**checkpoint["config"])
        check_knobs(saved.objective, saved.knobs)
    knobs = given.pop("knobs")
    before = asdict(saved) | saved.knobs
    changed = [f"{flag_of(name)} {before.get(name)} to {value}" for name, value in (given | knobs).items()
               if name not in FREE and value != before.get(name)]
    if changed:
        raise ValueError(f"--resume goes on with the settings of {given['out']}, but these changed: "
                         f"{', '.join(changed)}; leave them out, or start anew with another --out")
    config = replace(saved, **given)
    if checkpoint["step"] >= config.steps:
        raise ValueError(f"--resume: {config.out} has all its {config.steps} steps; nothing is left to do")
    return config, checkpoint


@one_line_errors
def main(arguments=None):
    train(*read_arguments(arguments))


if __name__ == "__main__":
    main()
