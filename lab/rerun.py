"""What lab/claims.py runs on: trainings of more and more seeds, until the checks on their figures are
decided.

    arm      flags of train.py; a run is an arm with a seed, such as markov-ntp-301, and a folder of train.py
    check    a number for each seed, and the region in which a claim says that its mean lies
    verdict  holds     the whole 95% interval of the mean lies in that region
             fails     all of it lies outside: there is no difference as large as the one that would matter
             reversed  fails, and the opposite of the claim is as large
             undecided otherwise
"""
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train
from lab.probes import PROBES

FEWEST = 4  # seeds, at the first look


class Check(NamedTuple):
    """values (seeds,), of which a claim says that their mean lies between low and high. unit: bits, % of a
    share, or times: the logarithm of a ratio. exact: the exact answer, where one is known."""
    text: str
    values: np.ndarray
    low: float
    high: float
    unit: str
    exact: float | None = None


def more(text, values, delta, unit="bits", exact=None):
    """A claim that a mean is above delta, the smallest difference that would matter."""
    return Check(text, values, delta, math.inf, unit, exact)


def at_most(text, values, delta, unit="bits"):
    return Check(text, values, -math.inf, delta, unit)


def within(text, values, delta, unit="bits"):
    """A claim that there is no difference."""
    return Check(text, values, -delta, delta, unit)


def half_interval(values, confidence=0.95):
    """Half of the interval of a mean over n seeds: standard error times Student's t, n - 1 degrees of
    freedom."""
    df = len(values) - 1
    t = np.tan(np.linspace(0, math.pi / 2, 100_001)[:-1])             # from 0 to infinity
    weight = (1 + t * t / df) ** (-(df + 1) / 2) * (1 + t * t)        # density, times dt
    quantile = np.interp(confidence, weight.cumsum() / weight.sum(), t)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def judge(check, confidence=0.95):
    """-> holds, fails, reversed or undecided: see the top of this file."""
    mean, half = float(np.mean(check.values)), half_interval(check.values, confidence)
    if check.low < mean - half and mean + half < check.high:
        return "holds"
    if check.high == math.inf and mean + half < -check.low:
        return "reversed"
    return "fails" if mean + half < check.low or check.high < mean - half else "undecided"


def seeds_to_decide(check):
    """The number of seeds with which an undecided check would be decided, if its mean and spread stay."""
    distance = min(abs(float(np.mean(check.values)) - bound) for bound in (check.low, check.high))
    return math.ceil((1.96 * float(np.std(check.values, ddof=1)) / distance) ** 2) + 1


class Arm(NamedTuple):
    """flags of train.py, in which {out} and {seed} stand for the folder of all runs and the seed; the largest
    number of seeds; share: how much of its steps a run takes, where it ends once it has learned."""
    flags: str
    most: int = 16
    share: float = 1.0


class Results:
    """The figures of finished runs: r(arm, name) -> (seeds,), the last value of each."""

    def __init__(self, arms, out, first_seed=1, seeds=FEWEST):
        self.arms, self.out, self.first = arms, out, first_seed
        self.seeds, self.read = dict.fromkeys(arms, seeds), set()  # read: the arms that were asked for

    def runs(self, arm):
        self.read.add(arm)
        return [f"{arm}-{seed}" for seed in range(self.first, self.first + self.seeds[arm])]

    def log(self, arm):
        """Of each seed: a list of {"step", name: value}."""
        return [json.loads(Path(self.out, run, "figures.json").read_text())["figures"]
                for run in self.runs(arm)]

    def __call__(self, arm, name):
        return np.array([log[-1][name] for log in self.log(arm)])

    def minus(self, arm, other, name):
        """A figure of an arm minus that of another, for the seeds that both have."""
        n = min(self.seeds[arm], self.seeds[other])
        return self(arm, name)[:n] - self(other, name)[:n]

    def curve(self, arm, name):
        """-> steps (n,), values (seeds, n), for runs that all have the same number of evaluations."""
        logs = self.log(arm)
        return [line["step"] for line in logs[0]], np.array([[line[name] for line in log] for log in logs])


def study(claims, r, jobs):
    """Trains the arms of some claims with FEWEST seeds; then, as long as checks are undecided, the arms that
    they read with twice as many -> {name: checks}."""
    while True:
        train_all(r, jobs)
        checks, again = {name: [] for name in claims}, set()
        for name, claim in claims.items():
            r.read.clear()
            for check in claim(r):  # a generator: it reads the figures of one check after the other
                checks[name].append(check)
                if judge(check) == "undecided":
                    again |= {arm for arm in r.read if r.seeds[arm] == len(check.values) < r.arms[arm].most}
                r.read.clear()
        if not again:
            return checks
        print(f"not all checks are decided: twice as many seeds of {', '.join(sorted(again))}", flush=True)
        for arm in again:
            r.seeds[arm] *= 2


def command(run, arms, out):
    name, _, seed = run.rpartition("-")
    return f"{arms[name].flags.format(out=out, seed=seed)} --seed {seed} --out {out}/{run}"


def is_finished(run, arms, out):
    """Whether a run ended, with these very flags."""
    figures = Path(out, run, "figures.json")
    return figures.exists() and json.loads(figures.read_text())["command"] == command(run, arms, out)


def train_run(run, arms, out):
    """Trains a run from its beginning in this process, and writes its figures.json -> the last figures."""
    shutil.rmtree(Path(out, run), ignore_errors=True)
    config, start = train.read_arguments(command(run, arms, out).split())
    probe, figures = PROBES[run.partition("-")[0]], []

    def measure(model, tok, step):
        found = probe(model, tok, config.knobs, step == config.steps)
        figures.append({"step": step} | {name: value if isinstance(value, list) else float(value)
                                         for name, value in found.items()})
        if found.get("learned"):
            signal.raise_signal(signal.SIGTERM)  # train.py saves, and ends the run
        return {}

    train.train(config, start, measure)
    if not (figures and (figures[-1]["step"] == config.steps or figures[-1].get("learned"))):
        raise KeyboardInterrupt  # the run was told to stop before its end
    figures[-1] |= of_curve(figures)
    written = Path(out, run, "figures.tmp")
    written.write_text(json.dumps({"command": command(run, arms, out), "figures": figures}))
    os.replace(written, written.with_suffix(".json"))
    return figures[-1]


def logged_run(run, arms, out):
    """train_run, with what it prints in a file."""
    with open(Path(out, f"{run}.log"), "w") as log, redirect_stdout(log), redirect_stderr(log):
        train_run(run, arms, out)


def of_curve(figures, level=0.8):
    """Of all evaluations of a run: lowest_bits; log_steps and log_steps_far, the log of the step at which
    recall and far first reach a level, by linear interpolation; of the last step, where they never do."""
    out = {"lowest_bits": min(line["bits"] for line in figures)} if "bits" in figures[0] else {}
    for name, share in (("log_steps", "recall"), ("log_steps_far", "far")):
        if share in figures[0]:
            steps, shares = ([start, *(line[key] for line in figures)]
                             for start, key in ((1, "step"), (0, share)))
            i = next((i for i, share in enumerate(shares) if share >= level), None)
            out[name] = math.log(np.interp(level, shares[i - 1:i + 1], steps[i - 1:i + 1]) if i
                                 else steps[-1])
    return out


def train_all(r, jobs):
    """Trains every run of some Results that is not finished, in `jobs` processes of one thread each; last
    those that start from another run. Ctrl-C stops; the same call goes on. Raises OSError where a run
    fails."""
    left, started = {}, time.time()  # {run: its cost, about as its time}
    for name, arm in r.arms.items():
        given, _ = train.settings_parser("ntp").parse_known_args(arm.flags.split())
        tokens = given.steps * given.batch_size * given.block_size * arm.share
        left |= {run: tokens * given.n_layer * given.n_embd for run in r.runs(name)
                 if not is_finished(run, r.arms, r.out)}
    n_runs, in_all = len(left), sum(left.values())
    print(f"{n_runs} runs, {jobs} at a time", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    pool = ProcessPoolExecutor(jobs, get_context("spawn"))
    try:
        for starts_from_a_run in (False, True):
            futures = {pool.submit(logged_run, run, r.arms, r.out): run for run in left
                       if ("--init-from" in command(run, r.arms, r.out)) == starts_from_a_run}
            for future in as_completed(futures):
                run = futures[future]
                if error := future.exception():
                    raise OSError(f"{run} failed: {error} (see {Path(r.out, run)}.log)") from error
                del left[run]
                minutes, to_do = (time.time() - started) / 60, sum(left.values())
                now = ", ".join([run for future, run in futures.items() if future.running()][:jobs])
                print(f"{n_runs - len(left)} of {n_runs}: {run}; {minutes:.0f} min, about "
                      f"{minutes * to_do / (in_all - to_do):.0f} min left; now: {now}", flush=True)
        pool.shutdown()
    finally:
        for process in active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)
