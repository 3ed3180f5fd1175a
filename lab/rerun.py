"""What lab/claims.py runs on: trainings with several seeds, verdicts on their figures, a page about them.

    Arm    a training: flags of train.py, a probe of probes.py, the number of seeds
    Check  a number with a value a seed, and the bounds between which a claim says that it lies
    Claim  a sentence of a paper, its arms, its checks, a figure

A run is an arm with a seed, such as markov-ntp-1, and a folder of train.py. From top to bottom: what a claim
is, judging it, running, writing down.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import train
from lab.figures import bars, lines, pyplot, scatter
from sample import load_checkpoint, pick_device


class Arm(NamedTuple):
    """What is trained, with seeds 1, 2, ... base: the name of the arm that it starts from, seed by seed.
    probe(model, tok, knobs, is_last) -> {name: value} is called at each evaluation."""
    flags: str
    probe: Callable
    seeds: int = 3
    base: str = ""


class Check(NamedTuple):
    """values(r) -> (seeds,), which a claim says lies between low and high; exact(r): the exact answer to the
    same question, where one is known. unit: bits, steps, epochs, or % for a share."""
    text: str
    values: Callable
    low: float = -math.inf
    high: float = math.inf
    unit: str = "bits"
    exact: Callable = None


class Claim(NamedTuple):
    """Where a claim stands, what it says, the names of the arms that it needs, its checks, and the panels
    of its figure: (label, data(r)), see draw."""
    source: str
    sentence: str
    arms: tuple
    checks: list
    panels: list


# Student's t: the 90% interval of a mean over n seeds is mean +- T_90[n] * standard error.
T_90 = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13}


def judge(check, values):
    """-> verdict, mean, half of the 90% interval over the seeds. "shows" if the whole interval lies between
    low and high, "does not show" if none of it does, else "cannot be told"."""
    mean, n = float(np.mean(values)), len(values)
    half = T_90[n] * float(np.std(values, ddof=1)) / math.sqrt(n)
    if check.low < mean - half and mean + half < check.high:
        return "shows", mean, half
    if mean + half <= check.low or check.high <= mean - half:
        return "does not show", mean, half
    return "cannot be told", mean, half


class Results:
    """The metrics of finished runs: r(arm, name) -> (seeds,), the last values."""

    def __init__(self, arms, out):
        """arms: {name: Arm}"""
        self.out, self.log = out, {}
        for name, arm in arms.items():
            paths = [Path(out, f"{name}-{seed}", "metrics.jsonl") for seed in range(1, arm.seeds + 1)]
            self.log[name] = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]

    def __call__(self, arm, name):
        return np.array([log[-1][name] for log in self.log[arm]])

    def curve(self, arm, name, x="step"):
        """-> x (n,), such as step or epoch, and values (seeds, n): one for each evaluation."""
        points = [[(line[x], line[name]) for line in log if name in line] for log in self.log[arm]]
        return [x for x, _ in points[0]], np.array([[value for _, value in of_seed] for of_seed in points])

    def until(self, arm, name, level=0.9, x="step"):
        """(seeds,): where a curve first reaches level, between two evaluations by linear interpolation; its
        end, where it never does."""
        xs, values = self.curve(arm, name, x)
        out = []
        for row in values:
            i = next((i for i, value in enumerate(row) if value >= level), len(row))
            if i in (0, len(row)):
                out.append(xs[min(i, len(row) - 1)])
            else:
                out.append(xs[i - 1] + (xs[i] - xs[i - 1]) * (level - row[i - 1]) / (row[i] - row[i - 1]))
        return np.array(out, float)

    def groups(self, arm, name):
        """A list of [x, value], which a probe wrote for a figure -> x (n,), values (seeds, n)."""
        kept = [dict(log[-1][name]) for log in self.log[arm]]
        xs = sorted(set.intersection(*map(set, kept)))
        return xs, np.array([[of_seed[x] for x in xs] for of_seed in kept])


def flags_of(run, arms, out):
    """The flags with which train.py trains a run."""
    name, _, seed = run.rpartition("-")
    base = f" --init-from {out}/{arms[name].base}-{seed}" if arms[name].base else ""
    return f"{arms[name].flags.format(out=out)} --seed {seed}{base} --out {out}/{run}"


def train_run(run, arms, out):
    """Trains a run, or goes on with it, in this process."""
    resume = ["--resume"] if Path(out, run, "ckpt.pt").exists() else []
    config, checkpoint = train.read_arguments([*flags_of(run, arms, out).split(), *resume])
    probe = arms[run.rpartition("-")[0]].probe
    train.train(config, checkpoint, lambda model, tok, step: probe(model, tok, config.knobs,
                                                                   step == config.steps))


def is_finished(run, arms, out):
    """Whether a run ended with these very flags. One that was started with other flags is removed."""
    folder, flags = Path(out, run), flags_of(run, arms, out)
    command = folder / "command.txt"
    if not command.exists() or command.read_text() != flags:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command.write_text(flags)
    if not (folder / "ckpt.pt").exists():
        return False
    checkpoint = load_checkpoint(folder)
    return checkpoint["step"] == checkpoint["config"]["steps"]


def train_all(arms, out, jobs, module):
    """Trains every run that is not finished: at most `jobs` at a time, each on one thread in a process of its
    own, `python -m module --run RUN`, and each base before what starts from it. Ctrl-C stops and saves them.

    Raises OSError where a run fails."""
    left = {}  # {run: the number of its tokens}
    for name, arm in arms.items():
        for run in (f"{name}-{seed}" for seed in range(1, arm.seeds + 1)):
            if not is_finished(run, arms, out):
                flags = flags_of(run, arms, out).split()
                given, _ = train.settings_parser("ntp").parse_known_args(flags)
                left[run] = given.steps * given.batch_size * given.block_size
    at_work, n_runs, done, started = {}, len(left), 0, time.time()
    try:
        while left or at_work:
            for run in list(left):
                name, _, seed = run.rpartition("-")
                base = f"{arms[name].base}-{seed}"
                if len(at_work) < jobs and base not in left and base not in at_work:
                    with open(Path(out, run, "log.txt"), "a") as log:
                        process = subprocess.Popen(
                            [sys.executable, "-m", module, "--out", str(out), "--run", run],
                            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True)  # a terminal's Ctrl-C comes here alone
                    at_work[run] = process, left.pop(run), time.time()
            time.sleep(0.2)
            for run, (process, tokens, since) in list(at_work.items()):
                if process.poll() is None:
                    continue
                if process.returncode:
                    log = Path(out, run, "log.txt")
                    raise OSError(f"{run} failed: {log.read_text().strip().splitlines()[-1]} (see {log})")
                del at_work[run]
                done += tokens
                rest = sum(left.values()) + sum(tokens for _, tokens, _ in at_work.values())
                print(f"{n_runs - len(left) - len(at_work)} of {n_runs}: {run}, {time.time() - since:.0f} s; "
                      f"about {(time.time() - started) * rest / done / 60:.0f} min left", flush=True)
    finally:
        for process, _, _ in at_work.values():
            process.terminate()  # train.py saves first
        for process, _, _ in at_work.values():
            process.wait()


def shown(value, unit):
    return {"%": f"{100 * value:.1f}%", "bits": f"{value:.4f}", "steps": f"{value:.0f}",
            "epochs": f"{value:.2f}"}[unit]


def bounds(check):
    if check.low == -math.inf:
        return f"at most {shown(check.high, check.unit)}"
    if check.high == math.inf:
        return f"at least {shown(check.low, check.unit)}" if check.low else "above 0"
    return f"{shown(check.low, check.unit)} to {shown(check.high, check.unit)}"


def table(claims, r):
    """Markdown: a row for each check of {name: Claim}."""
    rows = ["| claim | measured | the claim says | here | exact | verdict |", "|---|---|---|---|---|---|"]
    for name, claim in claims.items():
        for i, check in enumerate(claim.checks):
            verdict, mean, half = judge(check, check.values(r))
            exact = shown(float(np.mean(check.exact(r))), check.unit) if check.exact else ""
            rows.append(f"| {'' if i else f'[{name}](#{name})'} | {check.text} | {bounds(check)} | "
                        f"{shown(mean, check.unit)} ± {shown(half, check.unit)} | {exact} | {verdict} |")
    return "\n".join(rows).replace("<EOT>", "`<EOT>`")


def write(claims, arms, r, path, first=()):
    """Writes the page: the table, and a section with a figure for each claim. first: (name, panels) of
    figures that come before those."""
    figures = path.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    dtype = "bf16" if train.is_bf16_faster(device) else "fp32"
    intro = ("Written by `python -m lab.claims`: do not edit. Models of a million parameters, trained for "
             "minutes each, nearly all on generated corpora whose truth is known (`lab/corpora.py`). "
             f"Device: {device}, {dtype}, torch {torch.__version__}.\n\n"
             "A check is a number with a value a seed; ± is half of its 90% interval over the seeds. A claim "
             "*shows* if the whole interval lies within what the claim says, and *does not show* if none of "
             "it does; else it *cannot be told*. The bounds were written before the runs. In the figures a "
             "point is a seed, a bar or a line the mean.")
    parts = ["# Every claim of both papers, at toy size", intro, table(claims, r)]
    for name, panels in first:
        draw(figures / f"{name}.png", panels, r)
        parts += [f"## {name}", f"![{name}]({figures.name}/{name}.png)"]
    for name, claim in claims.items():
        draw(figures / f"{name}.png", claim.panels, r)
        commands = []
        for arm in claim.arms:
            base = f" --init-from out/claims/{arms[arm].base}-SEED" if arms[arm].base else ""
            commands.append(f"python train.py {arms[arm].flags.format(out='out/claims')}{base}")
        sentence = f"{claim.source}: {claim.sentence}".replace("<EOT>", "`<EOT>`")
        parts += [f"## {name}", sentence, f"![{name}]({figures.name}/{name}.png)",
                  f"Seeds 1 to {arms[claim.arms[0]].seeds} of\n\n```sh\n" + "\n".join(commands) + "\n```"]
    path.write_text("\n\n".join(parts) + "\n")


def draw(path, panels, r):
    """Draws panels side by side. data(r) is {label: (seeds,)}, drawn as bars; {label: (x, (seeds, n))}, as
    lines; or two lists [exact, model], as points."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained")
    for axis, (label, data) in zip(axes, panels):
        values = data(r)
        if isinstance(values, list):
            scatter(axis, label, values)
        elif isinstance(next(iter(values.values())), tuple):
            lines(axis, label, values)
        else:
            bars(axis, label, values)
    fig.savefig(path, dpi=110)
    plt.close(fig)
