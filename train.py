"""Train a GPT under one of the objectives.

    python train.py --objective fim_spm                   a toy on small programs: minutes on a CPU
    python train.py --objective fim --preset laptop       larger and longer
    python train.py --preset gpt2 --data code.jsonl.gz --tokenizer gpt2        on a GPU
    python train.py --out out/fim_spm --resume            goes on where a run stopped
    python train.py --objective sft --init-from out/ntp   fine-tunes a finished model on prompts and answers
    torchrun --nproc_per_node=8 train.py --preset gpt2 --data code.jsonl.gz    on 8 GPUs, the same run

From top to bottom: presets and settings, the loop, learning rate and optimisers, evaluation, what is printed,
and what the loop needs from the machine: processes, arithmetic, files.
"""
import argparse
import ctypes
import json
import math
import os
import shlex
import signal
import sys
import time
import timeit
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import GENERATED, Batches, Tokenizer, lines_of, prepare, text_rows
from model import GPT, GPTConfig
from objectives import IGNORE, KNOBS, OBJECTIVES, ON_PAIRS, PROMPTS, documents_in, knobs_of, ntp
from sample import Parser, infill, load_checkpoint, load_weights, one_line_errors, pick_device, within

# Presets and settings

def paper(n_layer, n_embd, n_head, lr, params, batch=2**19):
    """A model of the FIM paper (table 3: shape, learning rate, tokens per batch; context 2048), trained on 20
    tokens per parameter (Hoffmann et al., 2022) instead of the paper's 100 B tokens. The paper has relative
    attention; these presets have rotary positions and normalised queries and keys."""
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "block_size": 2048, "bias": True,
            "tied": False, "token_shift": False, "tokenizer": "gpt2", "optimizer": "adamw", "lr": lr,
            "embedding_lr_scale": 1.0, "batch_size": 8, "grad_accum": batch // (8 * 2048),
            "steps": 20 * params // batch, "warmup": 500, "final_lr": 0.1, "eval_every": 500,
            "save_every": 500}


# A CPU's budget holds too few long documents for the paper's one hole per document.
SHORT = {"max_document_tokens": 128}
# A text's defaults, under those of a preset: programs are short, of few words, and filled by lines, too.
SUITS = {"programs": {"vocab_size": 1024, "steps": 850, "eval_every": 170, "fim_rate": 0.9, "span": "mixed"}}
# What GPT-2 has in place of rotary positions, normalised queries and keys, and the token shift.
GPT2 = {"position": "learned", "qk_norm": False, "token_shift": False, "gelu": "tanh", "bias": True}
PRESETS = {
    "toy": SHORT | {"data": "programs:40000"},
    "toy_gpt2": SHORT | GPT2,
    "laptop": SHORT | {"n_layer": 6, "steps": 3400, "lr": 0.008, "warmup": 100, "eval_every": 425,
                       "save_every": 425},
    "finetune": {"block_size": 1024, "batch_size": 4, "steps": 640, "lr": 0.002, "warmup": 20,
                 "eval_every": 80, "save_every": 160},
    "gpt2": GPT2 | {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "tokenizer": "gpt2",
                    "batch_size": 32, "grad_accum": 16, "steps": 5000, "lr": 2e-3, "embedding_lr_scale": 1.0,
                    "beta1": 0.95, "warmup": 200, "final_lr": 0.1, "eval_every": 500, "save_every": 500},
    # Each process needs 16 bytes per parameter (weights, gradients, AdamW's two moments, in fp32) and the
    # activations.
    "xxs": paper(6, 384, 6, 1.6e-3, 50_000_000),            # 0.8 GB
    "xs": paper(8, 512, 8, 1.4e-3, 77_000_000),             # 1.2 GB
    "small": paper(12, 768, 12, 6e-4, 164_000_000),         # 2.6 GB
    "medium": paper(24, 1024, 16, 3e-4, 411_000_000),       # 6.6 GB
    "large": paper(24, 1536, 16, 2.5e-4, 844_000_000),      # 13.5 GB
    "xl": paper(24, 2048, 16, 4e-4, 1_400_000_000, 2**20),  # 22.4 GB
}
# What --resume may change. (steps, too, decides the weights: describe says so.)
RESUME_MAY_CHANGE = {"data", "out", "cache_dir", "steps", "device", "compile", "eval_every", "eval_tokens",
                     "save_every"}

# The flags of train.py, in groups: a title, an example, and of each flag the default, what it is, its choices
# or the type that converts and checks it (else the default's type).
SETTINGS = [
    ("what to train", "--objective fim --preset laptop",
     ("--objective", "ntp", "what to predict", OBJECTIVES),
     ("--preset", "toy", "model, budget and learning rate in one; other flags go over it", PRESETS),
     ("--init-from", "", "a run's folder, or GPT-2's weights: start from its weights, shape, vocabulary")),
    ("data", "--data 'src/**/*.py' --vocab-size 4096",
     ("--data", "stdlib", f"stdlib, site-packages, {', '.join(GENERATED)}, or a file, folder or glob of "
      "text or .jsonl[.gz]; for sft and meap_sft functions, or .json[l][.gz] of pairs"),
     ("--tokenizer", "bpe", "learned from the data, raw bytes, or GPT-2's (a download)",
      ("bpe", "bytes", "gpt2")),
     ("--vocab-size", 2048, "ids of the bpe tokenizer, the 5 special ones included", within(261, 10**6)),
     ("--fim-level", "context", "FIM inside the window, or on whole documents before",
      ("context", "document")),
     ("--cache-dir", "cache", "folder of tokenised corpora")),
    ("model", "--n-layer 6 --n-embd 192 --n-head 3",
     ("--n-layer", 4, "blocks", within(1)),
     ("--n-head", 2, "attention heads", within(1)),
     ("--n-embd", 128, "width", within(1)),
     ("--block-size", 256, "context, in tokens", within(8)),
     ("--dropout", 0.0, "share of activations dropped in training", within(0.0, 0.99)),
     ("--position", "rope", "rotary or learned positions", ("rope", "learned")),
     ("--qk-norm", True, "normalise queries and keys"),
     ("--token-shift", True, "each layer reads part of its input from the token before"),
     ("--tied", True, "output layer shares the token embedding"),
     ("--bias", False, "biases in linear layers and norms"),
     ("--gelu", "exact", "exact GELU, or tanh, GPT-2's approximation", ("exact", "tanh")),
     ("--attention", "auto", "manual (written out, the faster on CPU), fused, or auto: fused on a GPU",
      ("auto", "manual", "fused"))),
    ("training", "--steps 3000 --lr 0.005 --seed 2",
     ("--steps", 750, "optimiser steps", within(1)),
     ("--batch-size", 16, "rows in a batch", within(1)),
     ("--grad-accum", 1, "batches in a step; torchrun's processes share them", within(1)),
     ("--optimizer", "muon", "Muon on the blocks' matrices with AdamW on the rest, or AdamW",
      ("muon", "adamw")),
     ("--lr", 0.01, "peak learning rate", within(1e-12)),
     ("--embedding-lr-scale", 3.0, "times --lr: learning rate of embeddings and output", within(0.0)),
     ("--warmup", 40, "steps of linear warm-up", within(0)),
     ("--final-lr", 0.0, "share of the peak at which the linear decay ends", within(0.0, 1.0)),
     ("--weight-decay", 0.1, "decay of matrices", within(0.0)),
     ("--beta1", 0.9, "decay of the first moment, or Muon's momentum", within(0.0, 0.9999)),
     ("--beta2", 0.95, "decay of AdamW's second moment", within(0.0, 0.9999)),
     ("--clip", 1.0, "largest norm of the gradient, 0 for any", within(0.0)),
     ("--seed", 1, "decides weights, order of the data, cuts and masks", within(0, 2**31))),
    ("run", "--out out/first --eval-every 100",
     ("--out", "", "folder of the run (none: out/OBJECTIVE, with a number where that is taken)"),
     ("--device", "auto", "auto, cpu, cuda or mps"),
     ("--dtype", "auto", "arithmetic; auto: bf16 where that is faster", ("auto", "fp32", "bf16")),
     ("--compile", False, "torch.compile the model"),
     ("--eval-every", 150, "steps between evaluations", within(1)),
     ("--eval-tokens", 32768, "held-out tokens per evaluation, four times as many in the last", within(1)),
     ("--save-every", 150, "steps between checkpoints", within(1))),
]


def settings_parser(objective):
    """An argparse parser of SETTINGS; its last group is the objective's own knobs."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    knobs = knobs_of(OBJECTIVES[objective])
    shown = ", ".join(f"{flag_of(knob)} {default}" for knob, default in knobs.items())
    parser.hint = f"; the knobs of --objective {objective}: {shown or 'none'}"
    own = [(flag_of(knob), default, KNOBS.get(knob, f"see {objective} in objectives.py"))
           for knob, default in knobs.items()]
    own_title = f"knobs of --objective {objective} (another has others)"
    for title, example, *flags in (*SETTINGS, (own_title, shown, *own)):
        group = parser.add_argument_group(title, f"such as {example}" if example else "none")
        for flag, default, help, *values in flags:
            kind = values[0] if values else type(default)
            if isinstance(default, bool):
                how = {"action": argparse.BooleanOptionalAction}
            elif callable(kind):
                how = {"type": kind, "metavar": kind.__name__.upper()}
            else:
                how = {"choices": kind}
            help += "" if default == "" else " (default: %(default)s)"
            try:
                group.add_argument(flag, default=default, help=help, **how)
            except argparse.ArgumentError:
                raise ValueError(f"--objective {objective}: its knob {flag} has the name of a flag of "
                                 "train.py; rename it") from None
    return parser


def flag_of(name):
    return "--" + name.replace("_", "-")


def read_arguments(arguments=None):
    """The command line -> (config, start). config: each setting by name, the objective's own in config.knobs.
    start: the checkpoint to resume from, what --init-from brings, or None. Raises ValueError or OSError."""
    # A first parser reads what decides about the other flags and their defaults.
    first = Parser(add_help=False)
    first.add_argument("--objective", default="ntp", choices=OBJECTIVES)
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--data")
    first.add_argument("--init-from", default="")
    first.add_argument("--out", default="")
    first.add_argument("--resume", action="store_true")
    given, _ = first.parse_known_args(arguments)

    # Defaults: what suits the text, under the preset, under what a checkpoint has (fixed). A flag goes over
    # them, but may not change what is fixed (below).
    objective, start, fixed = given.objective, None, {}
    defaults = {"preset": "finetune", "data": "functions"} if objective in ON_PAIRS else {"preset": "toy"}
    defaults |= PRESETS[given.preset or defaults["preset"]]
    defaults = SUITS.get((given.data or defaults.get("data", "")).partition(":")[0], {}) | defaults
    if given.resume:
        if not given.out:
            raise ValueError("--resume: expected --out DIR, the folder of the run to go on with")
        start = load_checkpoint(given.out)
        fixed = start["config"] | start["config"]["knobs"]
        objective = fixed["objective"]
    elif given.init_from:
        start, fixed = load_start(given.init_from, defaults)
        if objective in ON_PAIRS and start["data"].startswith("programs"):
            defaults["data"] = start["data"]  # pairs of the text that the base knows
    parser = settings_parser(objective)
    names = vars(parser.parse_args([])).keys()  # of all settings
    parser.set_defaults(**{name: value for name, value in (defaults | fixed).items() if name in names})
    config = parser.parse_args(arguments)

    # What the checkpoint fixes stays. With rotary positions the context may grow; learned ones can be cut.
    free = RESUME_MAY_CHANGE if given.resume else {"block_size"}
    for name, value in fixed.items():
        if name in names and name not in free and getattr(config, name) != value:
            flag, path = ("--resume", given.out) if given.resume else ("--init-from", given.init_from)
            raise ValueError(f"{flag_of(name)} {getattr(config, name)}: {path} has {value}; leave it out, or "
                             f"start anew without {flag}")
    if given.init_from and config.position == "learned":
        positions = start["model"]["transformer.wpe.weight"]
        start["model"]["transformer.wpe.weight"] = positions[:config.block_size]
    config.knobs = {knob: vars(config).pop(knob) for knob in knobs_of(OBJECTIVES[objective])}
    del config.resume
    if given.resume and start["step"] >= config.steps:
        raise ValueError(f"--resume: {config.out} has all its {config.steps} steps; --steps N goes on to N")
    if not given.resume and given.out and Path(given.out, "ckpt.pt").exists():
        raise ValueError(f"--out {given.out} already holds a run: go on with --resume, or take another --out")
    return config, start


def load_start(path, defaults):
    """What --init-from names -> (a checkpoint of step 0: "model", "tokenizer", "data"; the settings that it
    fixes)."""
    if Path(path).name == "ckpt.pt" or Path(path, "ckpt.pt").is_file():
        start = load_checkpoint(path)
        tokenizer, data = start["config"]["tokenizer"], start["config"]["data"]
    else:
        from lab.gpt2 import load_gpt2
        start, tokenizer, data = load_gpt2(path), "gpt2", ""
    fixed = start["model_config"] | {"tokenizer": tokenizer}
    del fixed["attention"], fixed["dropout"]  # free to change: they have no weights
    if fixed["position"] == "rope" and "block_size" in defaults:
        del fixed["block_size"]  # rotary positions have no weights either: the preset's context counts
    return {"step": 0, "model": start["model"], "tokenizer": start["tokenizer"], "data": data}, fixed


# The loop

def train(config, start=None, measure=None):
    """Runs the training that config describes. Returns the last evaluation, see held_out_report; {} if the
    run was stopped before the first.

    start: the checkpoint to resume this run from, the weights of --init-from as one of step 0, or None for a
    new model.
    measure(model, tok, step) -> {name: value}: more to write into metrics.jsonl at each evaluation."""
    # Data: documents -> token stream -> windows -> rows, as the objective makes them.
    device, rank, world = join_processes(config)
    tok, batches, held_out_rows, text_name = make_data(config, start, rank, world)
    first = start["step"] if start else 0  # the step to begin with; 0: nothing to resume
    resumed = start if first else None
    if resumed and resumed["text"] != text_name:  # made of its content: the text may lie in another place
        raise OSError(f"--resume: --data {config.data} is not the text with which {config.out} was started; "
                      "put that back, or start anew with another --out")

    # Model and optimisers, and the state to start from.
    if config.dtype == "auto":  # the same in all processes, or their weights would drift apart
        config.dtype = "bf16" if all_reduce_mean(float(is_bf16_faster(device)), world) > 0.5 else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16")
    model = make_model(config, tok.n_vocab, device)
    optimizers = make_optimizers(model, config)
    if start:
        load_weights(model, start["model"], config.out if resumed else config.init_from)
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    forward = torch.compile(model) if config.compile else model
    if world > 1:
        forward = DistributedDataParallel(forward)  # averages the processes' gradients within backward()

    # A step has grad_accum micro-batches; of `world` processes this one takes every world-th. The first are
    # built before the run's folder is: a bad value of an objective's knob shows here.
    numbers = range(first * config.grad_accum + rank, (first + 1) * config.grad_accum, world)
    micro_batches = build_batches(batches, numbers, device)
    out, metrics = open_run(config, resumed) if rank == 0 else (None, None)
    describe(config, model, tok, batches, device, resumed)

    tokens_per_step = config.batch_size * config.grad_accum * config.block_size
    log_every = max(1, min(20, config.steps // 20))
    report, logged_step, logged_at = {}, first, time.perf_counter()
    model.train()
    with signals_to_stop() as asked_to_stop, tqdm(
            total=config.steps, initial=first, unit="step", mininterval=1, dynamic_ncols=True,
            disable=True if rank > 0 else None) as bar:
        for step in range(first, config.steps):
            # 1. Forward and backward. The loss of a step is the mean over all its targets, however they are
            # divided among micro-batches and processes.
            counts = [(targets != IGNORE).sum() for _, targets in micro_batches]
            n_targets = all_reduce_mean(sum(counts), world).clamp(min=1)  # mean: DDP averages gradients, too
            loss = 0.0
            for number, count, (inputs, targets) in zip(numbers, counts, micro_batches):
                torch.manual_seed(config.seed * 2**32 + number)  # decides dropout
                with forward.no_sync() if world > 1 and number != numbers[-1] else nullcontext():
                    with autocast:
                        micro_loss = forward(inputs, targets)[1]
                    (micro_loss * count / n_targets).backward()
                loss = loss + micro_loss.detach() * count / n_targets

            # 2. Build the next step's micro-batches, while a GPU is still at work.
            done = step + 1
            if done < config.steps:
                numbers = [number + config.grad_accum for number in numbers]
                micro_batches = build_batches(batches, numbers, device)

            # 3. Update the weights.
            if config.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config) * group["scale"]  # scale: see make_optimizers
                optimizer.step()
                optimizer.zero_grad()
            bar.update()
            if done == first + 2:
                began = time.perf_counter()  # the first steps are slower than the others
            if done == first + 8:
                seconds = (time.perf_counter() - began) / 6
                say(f"time       about {seconds * (config.steps - done) / 60:.1f} min here, and evaluations; "
                    f"{seconds:.2f} s per step\n")

            # 4. Now and then, log and evaluate. If one process is asked to stop, all stop, after this step.
            stop = all_reduce_mean(float(bool(asked_to_stop)), world) > 0
            last = done == config.steps
            evaluates = last or done % config.eval_every == 0
            saves = last or stop or done % config.save_every == 0
            if not (evaluates or saves or done % log_every == 0):
                continue
            loss = all_reduce_mean(loss, world).item()
            # The loss is from before the update: check that the updated weights, too, are finite.
            weights = sum(p.abs().sum().item() for p in model.parameters())
            if not math.isfinite(loss + weights):
                raise OSError(f"the loss is {loss}, the sum of the weights {weights} at step {done}; the "
                              f"last checkpoint, if any, is from before; try a lower --lr than {config.lr}")
            speed = (done - logged_step) * tokens_per_step / (time.perf_counter() - logged_at)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            tokens = done * tokens_per_step
            line = {"step": done, "tokens": tokens, "epoch": tokens / config.block_size / batches.n_windows,
                    "loss": loss, "lr": learning_rate(step, config), "tokens_per_s": round(speed)}
            if evaluates:
                model.eval()
                report = held_out_report(model, held_out_rows, tok, config, done, autocast)
                line |= report | (measure(model, tok, done) if measure else {})
                model.train()

            # 5. Write the line and, now and then, a checkpoint.
            if rank == 0:
                metrics.write(json.dumps(line).encode() + b"\n")
                metrics.flush()
            if saves and rank == 0:
                save_checkpoint(out / "ckpt.pt", {
                    "step": done, "config": vars(config), "model_config": asdict(model.config),
                    "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "tokenizer": tok.to_dict(), "text": text_name, "metrics_bytes": metrics.tell()})
            if stop:
                break
            logged_step, logged_at = done, time.perf_counter()
    if world > 1:
        del forward  # freed after its process group, it may wait for ever
        dist.destroy_process_group()
    name = shlex.quote(config.out)
    say(f"done, saved in {config.out}; try: python sample.py --ckpt {name}" if done == config.steps else
        f"stopped after step {done}, saved; go on with: python train.py --out {name} --resume")
    return report


def make_data(config, start, rank, world):
    """-> (Tokenizer, Batches, rows(n): n held-out rows, (inputs, targets) of T ids each, the text's name)."""
    tok = Tokenizer.from_dict(start["tokenizer"]) if config.init_from else None
    objective = partial(OBJECTIVES[config.objective], **config.knobs)
    size_and_seed = config.block_size, config.batch_size, config.seed
    if rank > 0:
        dist.barrier()  # until rank 0 has made the cache
    if config.objective in ON_PAIRS:
        from lab.pairs import prepare_pairs
        data = prepare_pairs(config.data, config.tokenizer, config.vocab_size, tok, objective,
                             *size_and_seed, config.cache_dir)
    else:
        tok, stream, held_out, text_name = prepare(config.data, config.tokenizer, config.vocab_size,
                                                   config.cache_dir, tok)
        if config.fim_level == "document":
            from lab.document_fim import fim_documents
            stream, objective = fim_documents(stream, tok, config.seed, config.objective, config.knobs), ntp
        held_out_rows = partial(text_rows, held_out, config.block_size)
        data = tok, Batches(stream, objective, tok, *size_and_seed), held_out_rows, text_name
    if rank == 0 and world > 1:
        dist.barrier()
    return data


def build_batches(batches, numbers, device):
    """The batches of these numbers, (inputs, targets) each, as tensors on the device."""
    pairs = [[torch.from_numpy(ids) for ids in batches.batch(number)] for number in numbers]
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        pairs = [[ids.pin_memory() for ids in pair] for pair in pairs]
    return [[ids.to(device, non_blocking=True) for ids in pair] for pair in pairs]


def make_model(config, n_vocab, device):
    """A new GPT of the shape in config, its weights drawn with the seed."""
    torch.manual_seed(config.seed)
    shape = {f.name: getattr(config, f.name) for f in fields(GPTConfig)} | {"vocab_size": n_vocab}
    if config.attention == "auto":
        shape["attention"] = "fused" if device.type == "cuda" else "manual"
    return GPT(GPTConfig(**shape)).to(device)


# Learning rate and optimisers

def learning_rate(step, config):
    """Linear warm-up to the peak lr, then linear decay that would reach final_lr * lr one step after the
    last. step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * (1 - (1 - config.final_lr) * progress)


def make_optimizers(model, config):
    """-> [AdamW], or [AdamW, Muon] with --optimizer muon, where Muon has the matrices of the blocks."""
    embeddings, hidden, vectors = [], [], []  # embeddings: and an output layer of its own
    for name, p in model.named_parameters():
        (vectors if p.dim() < 2 else hidden if name.startswith("transformer.h.") else embeddings).append(p)
    groups = [{"params": embeddings, "scale": config.embedding_lr_scale},
              {"params": vectors, "scale": 1.0, "weight_decay": 0.0}]
    muon = []
    if config.optimizer == "muon":
        muon = [Muon(hidden, config.lr, config.weight_decay, config.beta1, config.dtype == "bf16")]
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
    learning rate serves both optimisers. bf16: the matrix products are in bf16 instead of fp32."""

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


# Evaluation

def held_out_report(model, held_out_rows, tok, config, step, autocast):
    """Prints the model's bits per byte on held-out text and, if the model can infill, one infill.

    Returns {name: bits per byte}, the figure that compares objectives and vocabularies, or {name: None} where
    no text is held out."""
    name = "answer_bpb" if config.objective in ON_PAIRS else "held_out_bpb"
    n_rows = config.eval_tokens * (4 if step == config.steps else 1) // config.block_size
    rows = list(held_out_rows(max(1, n_rows)))
    bits, n_bytes = text_bits(model, rows, tok, autocast)
    if not n_bytes.sum():
        say(f"step {step}: no held-out text, or less than a window")
        return {name: None}
    bpb = float(bits.sum() / n_bytes.sum())
    say(f"step {step}: {bpb:.4f} held-out bits per byte{' of the answers' if name == 'answer_bpb' else ''}")
    if config.objective in PROMPTS:
        say(show_infill(model, tok, config, rows[step % len(rows)][0]))
    return {name: bpb}


@torch.no_grad()
def text_bits(model, rows, tok, autocast=nullcontext()):
    """rows, (inputs, targets) of T ids each -> bits (N,), n_bytes (N,): per row, -log2 p summed over the
    targets, and the length of the targets' text. Both without <EOT>, which is no text. Expects the model in
    evaluation mode."""
    device = next(model.parameters()).device
    rows, bits, lengths = list(rows), [np.zeros(0)], [np.zeros(0)]
    bytes_of = torch.from_numpy(tok.n_bytes).to(device)
    batch_size = max(1, 2**25 // (model.config.block_size * model.config.vocab_size))
    for start in range(0, len(rows), batch_size):
        batch = zip(*rows[start:start + batch_size])
        inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in batch)
        n_bytes = bytes_of[targets.clamp(min=0)] * (targets != IGNORE)          # (B, T)
        with autocast:
            logits, _ = model(inputs)
        targets = targets.masked_fill(n_bytes == 0, IGNORE)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE,
                               reduction="none").view_as(targets)
        bits.append(nats.sum(1).cpu().numpy() / math.log(2))
        lengths.append(n_bytes.sum(1).cpu().numpy())
    return np.concatenate(bits), np.concatenate(lengths)


def show_infill(model, tok, config, ids):
    """A few lines to print: a line of the longest document in a window, taken out and infilled greedily."""
    lines = lines_of(tok.decode(max(documents_in(ids, tok, None), key=len)))
    # A line at four fifths: in a program of ten lines, that is within the body.
    i = max(range(len(lines)), key=lambda i: (lines[i].strip() != "", -abs(i - len(lines) * 4 // 5)))
    best, = infill(model, tok, "".join(lines[:i]), "".join(lines[i + 1:]),
                   prompt=partial(PROMPTS[config.objective], tok=tok, **config.knobs),
                   max_new_tokens=min(64, model.config.block_size // 4))
    shown = lines_of(best.text)
    shown = "".join(shown[:3]) + ("..." if len(shown) > 3 else "")
    return f"{''.join(lines[max(0, i - 9):i])}⟦{shown}⟧{''.join(lines[i + 1:i + 4]).rstrip()}\n" \
           f"    (between ⟦ and ⟧: the model, {best.ended}; true: {lines[i].strip()!r})"


def describe(config, model, tok, batches, device, resumed):
    """Prints the run's header."""
    c, n_rows, million = model.config, config.steps * config.batch_size * config.grad_accum, 1e6
    say(f"model      {c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context {c.block_size}: "
        f"{model.n_params() / million:.2f} M parameters "
        f"({model.n_params(embedding=False) / million:.2f} M without embeddings)")
    say(f"data       {config.data}: {batches.describe()}, {config.tokenizer} vocabulary of {tok.n_vocab:,}")
    knobs = "".join(f", {knob} {value}" for knob, value in config.knobs.items())
    say(f"objective  {config.objective}{knobs}")
    say(f"training   {config.steps:,} steps of {config.batch_size * config.grad_accum} x "
        f"{config.block_size} tokens = {n_rows * config.block_size / million:.1f} M, "
        f"{n_rows / batches.n_windows:.1f} epochs, {config.optimizer}, learning rate {config.lr}")
    say(f"device     {device}, {config.dtype}, {c.attention} attention"
        + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
        + (f", {dist.get_world_size()} processes" if dist.is_initialized() else ""))
    say(f"out        {config.out}" + (f", going on after step {resumed['step']}" if resumed else
                                      f", from {config.init_from}" if config.init_from else ""))
    if resumed and resumed["config"]["steps"] != config.steps:
        say(f"           not a fresh run of {config.steps} steps: its learning rate decayed towards step "
            f"{resumed['config']['steps']} until now")


def say(text):
    """Prints a text, above the progress bar. Training goes on where nothing can be printed any more."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:  # the program that reads our output has exited, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Processes, arithmetic, files

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


@contextmanager
def signals_to_stop():
    """Ctrl-C or kill fills the list that this gives, and the loop saves after its step. A second one stops at
    once."""
    asked = []

    def ask(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def all_reduce_mean(x, world):
    """The mean of a number or a tensor over the processes, the same in each of them."""
    if world > 1:
        x = torch.as_tensor(x) / world
        dist.all_reduce(x)
    return x


def is_bf16_faster(device):
    """True if the device computes faster in bf16 than in fp32. On a CPU, products are timed: AVX512-BF16
    halves their time on AMD's Zen 4, but doubles it on a Xeon whose AMX is off; elsewhere it is emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    A = torch.ones(512, 512)
    fp32, bf16 = (min(timeit.repeat(lambda: X @ X, number=1, repeat=20)) for X in (A, A.bfloat16()))
    return device.type == "cpu" and bf16 < fp32


def open_run(config, resumed):
    """Makes the run's folder, sets config.out and writes config.json -> (folder, metrics.jsonl: a binary
    file, open for appending, cut to what it held when the resumed checkpoint was saved)."""
    number = 1
    while not config.out:
        try:
            name = Path("out", config.objective + (f"-{number}" if number > 1 else ""))
            name.mkdir(parents=True)
            config.out = str(name)
        except FileExistsError:
            number += 1
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(vars(config), indent=1) + "\n")
    metrics = open(out / "metrics.jsonl", "ab")
    metrics.truncate(min(metrics.tell(), resumed["metrics_bytes"] if resumed else 0))
    return out, metrics


def save_checkpoint(path, checkpoint):
    """Writes a checkpoint atomically: path is always, even after a power cut, the old or the new one, whole.

    Raises OSError if the checkpoint cannot be written."""
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
        raise OSError(f"{path}: step {checkpoint['step']} could not be saved ({cause}); "
                      "what was saved before is whole") from None


@one_line_errors
def main(arguments=None):
    # Tell glibc, Linux's C library, to keep freed memory for the next tensors. By itself glibc returns large
    # blocks to the system and takes them again, a page fault for every 4 kB: 12% of a step on a CPU.
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)      # M_MMAP_THRESHOLD
    train(*read_arguments(arguments))


if __name__ == "__main__":
    main()
