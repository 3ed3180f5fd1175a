"""Labs for a course: parts of this project to write, and a check that says at once what is right.

    python -m lab.course start 3 ../lab3              the project, with the functions of lab 3 empty
    python -m lab.course check 3 ../lab3 --no-mark    the tests of lab 3: a line for each task, with points
    python -m lab.course check 3 ../lab3              the same, then a training of minutes: the mark
    python -m lab.course check 3 folders/*            a class: a table; --json prints all that was found
    python -m lab.course mark 3 out/mark              in the lab's folder: that training alone

The handout is the docstring of each function, which stays, and docs/exercises.md. What a lab leaves empty is
cut out of this project's files, so there is no second copy of any code. check copies this project to a
temporary folder and takes only the lab's own files from the student's: whatever else was edited there, tests
above all, does not count. It exits with 0 only where all points are reached, else with 1. Student code runs
in processes of its own with a time limit. That is a guard against accidents (an endless loop, a call of
exit), not against malice: code from strangers belongs in a container.
"""
import argparse
import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from xml.etree import ElementTree

# The five files are imported only where a mark is measured: in a student's folder they may be broken.
FIVE_FILES = ("objectives.py", "model.py", "data.py", "sample.py", "train.py")
FLAGS_FILE = "flags.txt"  # of lab 5
ROOT = Path(__file__).resolve().parent.parent
COPIED = (*FIVE_FILES, "requirements.txt", "LICENSE", "README.md", "docs", "lab", "tests")
SECONDS = 120  # for the tests of tasks, and thrice that for all of a file: they take a tenth of it


class Task(NamedTuple):
    """What a student writes: a function such as "sample.PromptCache.cut_back_to", a file, or a rule to keep.

    tests: those that decide, separated by spaces, in test_file of the lab if they name no file. Of the lab's
    functions they call only this one and those in needs."""
    name: str
    points: int
    tests: str
    needs: tuple = ()


class Mark(NamedTuple):
    """measure: the name of a function of this file, (folder) -> a number to lie between low and high.
    seconds: its time limit, far above the time that it needs on 2 cores."""
    text: str
    measure: str
    low: float = -math.inf
    high: float = math.inf
    points: int = 2
    seconds: int = 600


class Lab(NamedTuple):
    """files: those that check takes from the student's folder. test_file: once the functions pass their own
    tests, all tests in it run, for one point more."""
    title: str
    files: tuple
    test_file: str
    tasks: list
    mark: Mark


OURS = "lab/test_course.py::"
SHARE = f"{OURS}test_each_outcome_has_its_share_and_all_randomness_comes_in_as_rng"
# The bounds of the marks: docs/exercises.md says what the project itself reaches.
LABS = {
    1: Lab("attention", ("model.py",), "test_model.py", [
        Task("model.causal_mask", 1, "test_the_mask_worked_by_hand"),
        Task("model.causal_attention", 2, "test_attention_worked_by_hand "
             "test_attention_and_its_gradients_are_those_of_torch", ("model.causal_mask",)),
        Task("model.rotate", 1, "test_rope_scores_depend_on_the_distance_alone")],
        Mark("bits per byte of programs after 250 steps of ntp", "ntp_bpb", 0.15, 0.25)),
    2: Lab("tokens", ("data.py",), "test_data.py", [
        Task("data.learn_bpe", 3, "test_learn_bpe_merges_what_a_full_recount_would")],
        Mark("bytes per token on markov, vocabulary 1,024", "bytes_per_token", 3.4, seconds=120)),
    3: Lab("MEAP", ("objectives.py",), "test_objectives.py", [
        Task("objectives.mask", 1, f"{SHARE}[mask]"),
        Task("objectives.meap", 1, f"{OURS}test_meap_is_ntp_with_masked_inputs", ("objectives.mask",))],
        Mark("share of the questions of records that are answered", "recall", 0.9, seconds=900)),
    4: Lab("FIM", ("objectives.py",), "test_objectives.py", [
        Task("objectives.fim_prompt", 1, f"{OURS}test_a_prompt_in_each_layout"),
        Task("objectives.split", 1, f"{SHARE}[split] {SHARE}[split_lines]"),
        Task("objectives.fim", 2,
             "test_any_objective_keeps_the_contract[fim] test_each_document_has_its_own_coin "
             "test_each_row_of_a_short_document_has_its_probability "
             "test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end",
             ("objectives.fim_prompt", "objectives.split"))],
        Mark("share that the model saves of the bits that a suffix can save on markov", "saved", 0.5)),
    5: Lab("stopping", ("lab/corpora.py", FLAGS_FILE), "lab/test_corpora.py", [
        Task("lab/corpora.Markov.infill", 2, "test_infill_is_what_an_enumeration_of_all_middles_gives "
             "test_infill_of_an_impossible_text_is_nan"),
        Task(FLAGS_FILE, 1, f"{OURS}test_lab_5s_flags_show_middles_that_join_a_suffix")],
        Mark("P(<EOT>) at the true end, SPM, minus that before another's suffix", "end_minus_wrong", 0.3)),
    6: Lab("editor", ("sample.py",), "test_sample.py", [
        Task("sample.infill_prompt", 1, "test_a_long_prompt_keeps_the_text_around_the_hole "
             f"{OURS}test_a_context_without_room_for_text_is_refused"),
        Task("sample.PromptCache.cut_back_to", 1, f"{OURS}test_a_cache_keeps_what_two_prompts_begin_with"),
        Task("sample.best_first", 1, "test_samples_that_end_in_eot_come_first_then_the_likelier")],
        Mark("typing in SPM order: the share of the prompts' tokens that is reused", "reused", 0.95)),
    7: Lab("leaderboard", FIVE_FILES, "", [
        Task("no position sees a later one", 0, "test_model.py::test_no_prediction_sees_the_future"),
        Task("the text that is held out stays so", 0, "test_data.py::test_a_worked_example"),
        Task("tokens hold the whole text", 0,
             "test_data.py::test_decode_undoes_encode_and_no_text_encodes_to_a_special_id")],
        Mark("bits per byte of held-out text after 5 minutes, mean of 2 seeds", "leaderboard_bpb",
             high=0.15, points=6, seconds=1300)),
}


def start(number, folder):
    """Makes the folder of a lab. Raises ValueError where it exists already or lies in this project."""
    lab = LABS[number]
    if folder.exists():
        raise ValueError(f"{folder} exists already: expected a new folder")
    if folder.resolve().is_relative_to(ROOT):
        raise ValueError(f"{folder} lies in the project: expected another place, such as ../lab{number}")
    copy_project(folder)
    for task in filter(function_of, lab.tasks):
        blank(folder, task, number)
    if FLAGS_FILE in lab.files:
        (folder / FLAGS_FILE).write_text("# flags of train.py: --objective and its knobs\n")
    (folder / "lab.json").write_text(json.dumps({"lab": number}))
    to_write = ", ".join(task.name for task in lab.tasks if task.points) or "what you like"
    print(f"lab {number}, {lab.title}, in {folder}; to write: {to_write}\n"
          "handout: docs/exercises.md, and the docstrings\n"
          f"then: python -m lab.course check {number} {folder}")


def copy_project(folder):
    folder.mkdir(parents=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(ROOT / name, folder / name)


def function_of(task):
    """A task -> such as ("sample.py", ["PromptCache", "cut_back_to"]); None if it is no function."""
    file, *path = task.name.split(".")
    return (file + ".py", path) if (ROOT / (file + ".py")).exists() else None


def find(source, path):
    """The ast node of a function, path: [class,] function."""
    nodes = ast.parse(source).body
    for name in path:
        node = next(n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
        nodes = node.body
    return node


def blank(folder, task, number):
    """Makes the body of a task's function one raise. Its signature and docstring stay."""
    file, path = function_of(task)
    source = (folder / file).read_text("utf-8")
    node, lines = find(source, path), source.splitlines(keepends=True)
    lines[node.body[0].end_lineno:node.end_lineno] = [
        f'{" " * node.body[0].col_offset}raise NotImplementedError("lab {number}: {path[-1]}")\n']
    (folder / file).write_text("".join(lines), "utf-8")


# Check

def check(number, folders, with_mark=True, as_json=False):
    """Grades folders of a lab and prints what was found -> whether each has all points."""
    lab, results, width = LABS[number], [], max(len(str(folder)) for folder in folders)
    names = [task.name.removesuffix(".txt").rpartition(".")[2] for task in lab.tasks]
    names += ["all tests"] * bool(lab.test_file) + ["mark"] * with_mark
    if len(folders) > 1 and not as_json:
        print(f"{'folder':{width}}   points", *names, sep="  ")
    for folder in folders:
        try:
            rows, error = grade(number, folder, with_mark), ""
        except (ValueError, OSError) as wrong:
            rows, error = [], str(wrong)
        points, most = (sum(row[key] for row in rows) for key in ("points", "of"))
        results.append({"folder": str(folder), "lab": number, "points": points, "of": most, "error": error,
                        "passed": bool(rows) and all(row["passed"] for row in rows), "found": rows})
        if as_json:
            continue
        if len(folders) > 1:
            shown = [f"{row['points']:{len(name)}}" for row, name in zip(rows, names)] or [error]
            print(f"{folder!s:{width}}", f"{points:2} of {most:<2}", *shown, sep="  ", flush=True)
            continue
        for row in rows:
            print(f"{'passed ' if row['passed'] else 'not yet'}  {row['points']} of {row['of']}  "
                  f"{row['name']}{row['text'] and ': '}{row['text']}")
        print(error or f"lab {number}, {lab.title}: {points} of {most} points"
              f"{'' if with_mark else ', without the mark'}")
    if as_json:
        print(json.dumps(results, indent=1))
    return all(result["passed"] for result in results)


def grade(number, folder, with_mark):
    """-> a row for each task, for all tests of its file, and for the mark: a dict of name, points, of, passed
    and text. Raises ValueError if it is no folder of this lab."""
    lab = LABS[number]
    for file in ("lab.json", *lab.files):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no folder of lab {number} (it has no {file}); make one with "
                             f"python -m lab.course start {number} {folder}")
    if (made := (folder / "lab.json").read_text("utf-8")) != json.dumps({"lab": number}):
        raise ValueError(f"{folder}: expected a folder of lab {number}, its lab.json says {made}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary, "project")
        copy_project(copy)
        for file in lab.files:
            shutil.copy(folder / file, copy / file)
        tasks, found = list(lab.tasks), judge_tasks(copy, number, lab.tasks)
        if lab.test_file:
            tasks.append(Task(f"all of {lab.test_file}", 1, lab.test_file))
            too_soon = any(found[task.name] for task in lab.tasks if function_of(task))
            found |= ({tasks[-1].name: "needs the functions"} if too_soon
                      else judge_tasks(copy, number, tasks[-1:]))
        rows = [{"name": task.name, "points": 0 if found[task.name] else task.points, "of": task.points,
                 "passed": not found[task.name], "text": found[task.name]} for task in tasks]
        if with_mark:
            passed, text = (False, "needs all tasks") if any(found.values()) else judge_mark(
                number, copy, Path(temporary, "out"))
            rows.append({"name": f"mark, {lab.mark.text}", "points": lab.mark.points * passed,
                         "of": lab.mark.points, "passed": passed, "text": text})
    return rows


def judge_tasks(copy, number, tasks):
    """{name of a task: "" if its tests pass, else what failed}. copy: a folder with the project and a
    student's files. One process runs all tests; if it ends early, each task gets a process of its own."""
    tests = {task.name: [f"tests/{test}" if ".py" in test else f"tests/{LABS[number].test_file}::{test}"
                         for test in task.tests.split()] for task in tasks}
    report, why = run_tests(copy, sum(tests.values(), []))
    if why and len(tasks) > 1:
        return {name: error for task in tasks for name, error in judge_tasks(copy, number, [task]).items()}
    found = {}
    for task in tasks:
        errors = [why] if why else [first_error(test, report) for test in tests[task.name]]
        found[task.name] = next(filter(None, errors), "")
        wrong = [name for name in task.needs if found.get(name)]
        if found[task.name] and wrong:
            found[task.name] += f"; this needs {' and '.join(wrong)}: make that pass first"
    return found


def run_tests(copy, tests):
    """-> {name of a test: "" or its error}, ""; or, where they did not run to the end, {}, why."""
    report = copy.with_name("report.xml")
    report.unlink(missing_ok=True)
    seconds = SECONDS if "::" in tests[0] else 3 * SECONDS
    status, printed = run(["-m", "pytest", "-q", "--rootdir=.", "-p", "no:cacheprovider", "--capture=no",
                           f"--junitxml={report}", *tests], copy, seconds)
    if status is None:
        return {}, f"takes more than {seconds} seconds: is there a loop that never ends?"
    if not report.exists():
        if lines := re.findall("^E +(.*)", printed, re.MULTILINE):  # what all tests share cannot be imported
            why = f"cannot be imported: {' '.join(lines)[-300:]}".replace(f"{copy}/", "")
            return {test.partition("::")[0]: why for test in tests}, ""
        return {}, f"ends the process of the tests, with status {status}"
    errors = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad, module, name = case.find("failure"), case.get("classname"), case.get("name")
        bad = case.find("error") if bad is None else bad
        if module:
            file = module.replace(".", "/") + ".py"
            errors[f"{file}::{name}"] = "" if bad is None else f"{name}: {told(bad.get('message'))}"
        else:  # a file of tests that could not be collected
            lines = re.findall("^E +(.*)", bad.text, re.MULTILINE)
            errors[name.replace(".", "/") + ".py"] = f"cannot be imported: {' '.join(lines[-2:])}"
    return errors, ""


def told(message):
    """What pytest says of a failed test -> a line. Tests compare what they got with what they expect."""
    if empty := re.search(r"NotImplementedError: lab \d+: (\w+)", message):
        return f"{empty[1]} is not written yet"
    line = " ".join(message.removeprefix("AssertionError: ").split()).partition(" Use -v")[0]
    return re.sub("^(.*?)assert (.+?) == (.+)$", r"\1got \2, expected \3", line)[:400]


def first_error(test, report):
    """The error of a test, or the first one of its parameters or of its file; "" if all passed."""
    errors = [error for name, error in report.items()
              if name == test or name.startswith((f"{test}[", f"{test}::"))]
    broken = report.get(test.partition("::")[0]) or "was not run: does your file call exit?"
    return next(filter(None, errors), "") if errors else broken


def run(arguments, folder, seconds):
    """Runs python with these arguments in a folder -> its exit status, or None if the time is over, and the
    end of what it printed. The process and its children are gone afterwards."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    printed = deque(maxlen=4)  # reads; the rest of an endless output is dropped
    chunks = iter(lambda: process.stdout.read1(1 << 16), b"")
    reader = Thread(target=printed.extend, args=[chunks], daemon=True)
    reader.start()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return status, b"".join(printed).decode("utf-8", "replace")


# The marks

def judge_mark(number, copy, out):
    """-> whether a mark lies within its bounds, and a line about it."""
    mark = LABS[number].mark
    status, printed = run(["-m", "lab.course", "mark", str(number), str(out)], copy, mark.seconds)
    if status is None:
        return False, f"takes more than {mark.seconds} seconds"
    if status or not (out / "mark.json").exists():
        lines = printed.replace("\r", "\n").strip().split("\n")
        return False, f"no figure, status {status}: {lines[-1][:300]}"
    value = json.loads((out / "mark.json").read_text())["value"]
    expected = " and ".join(f"{words} {bound:g}" for words, bound in (
        ("at least", mark.low), ("at most", mark.high)) if math.isfinite(bound))
    return mark.low <= value <= mark.high, f"{value:.4f}, expected {expected}"


def measure(number, out):
    """Writes the figure of a lab's mark to out/mark.json."""
    out.mkdir(parents=True, exist_ok=True)
    value = float(globals()[LABS[number].mark.measure](out))
    (out / "mark.json").write_text(json.dumps({"lab": number, "value": value}) + "\n")
    print(f"{LABS[number].mark.text}: {value:.4f}")


def ntp_bpb(out):
    import train
    flags = ("--objective ntp --data programs --steps 250 --eval-every 250 "
             f"--cache-dir {out}/cache --out {out}/run")
    return train.train(*train.read_arguments(flags.split()))["held_out_bpb"]


def bytes_per_token(out, most=400):
    """Raises ValueError where learning takes as long as counting all pairs more than `most` times."""
    from data import Tokenizer, learn_bpe
    from lab.corpora import documents
    counts = Counter(text.encode() for text in documents("markov", 2000, seed=1))
    started = time.process_time()
    for _ in range(10):
        Counter(pair for word in counts for pair in pairwise(word))
    counting, started = (time.process_time() - started) / 10, time.process_time()
    tok = Tokenizer(learn_bpe(dict(counts), 1024))
    times = (time.process_time() - started) / counting
    if times > most:
        raise ValueError(f"learn_bpe took as long as {times:.0f} counts of pairs: expected at most {most}")
    print(f"learn_bpe took as long as {times:.0f} counts of all pairs")
    texts = documents("markov", 2000, seed=2)
    return sum(map(len, texts)) / sum(len(tok.encode(text)) for text in texts)


def claims_run(run, out):
    """A run of lab/claims.py, or lab 5's with the flags of FLAGS_FILE, own-1 -> its last metrics."""
    from lab import claims, rerun
    rerun.train_run(run, claims.ARMS | {"own": own_arm()}, out)
    return json.loads((out / run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])


def recall(out):
    """The best share of up to four seeds: looking a fact up is learned in one jump, and two seeds of ten do
    not make it in 600 steps."""
    best = 0.0
    for seed in (1, 2, 3, 4):
        best = max(best, claims_run(f"records-0.15-{seed}", out)["recall"])
        if best >= LABS[3].mark.low:
            break
    return best


def saved(out):
    """In the better of both orders."""
    figures = claims_run("markov-fim-0.9-1", out)
    return max(figures[f"{order}_saved"] / figures[f"bayes_{order}_saved"] for order in ("psm", "spm"))


def end_minus_wrong(out):
    figures = claims_run("own-1", out)
    print(f"by Bayes' rule: {figures['bayes_spm_end'] - figures['bayes_spm_another']:.4f}")
    return figures["spm_end"] - figures["spm_another"]


def own_arm():
    """Lab 5: the run of lab/claims.py on markov, with the objective and the knobs that flags.txt names.

    Raises ValueError for other flags."""
    from lab import claims
    from objectives import OBJECTIVES, knobs_of
    from train import flag_of
    if not (ROOT / FLAGS_FILE).exists():
        return claims.ARMS["markov-fim-0.9"]
    lines = (ROOT / FLAGS_FILE).read_text("utf-8").splitlines()
    words = " ".join(line for line in lines if not line.startswith("#")).split()
    knobs = {knob for objective in OBJECTIVES.values() for knob in knobs_of(objective)}
    allowed = {"--objective", *map(flag_of, knobs)}
    wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in allowed]
    if wrong or not words:
        raise ValueError(f"{FLAGS_FILE}: {' '.join(wrong) or 'no flags'}, expected only "
                         f"{', '.join(sorted(allowed))}")
    plain = claims.markov("ntp")
    return plain._replace(flags=f"{plain.flags} {' '.join(words)}")  # of a flag given twice, the last counts


def reused(out):
    """Forty letters typed one by one before a suffix. Raises ValueError if the cache changes the output."""
    import torch

    from data import Tokenizer
    from model import GPT, GPTConfig
    from objectives import fim_prompt
    from sample import PromptCache, infill
    torch.manual_seed(1)
    tok = Tokenizer.bytes()
    model = GPT(GPTConfig(tok.n_vocab)).eval().requires_grad_(False)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)  # far from uniform: each token of the prompt counts
    text, shares = "def mean(xs):\n    return sum(xs) / max(1, len(xs))\n\n\n" * 2, {}
    for order in ("psm", "spm"):
        cache, n_reused, n_tokens = PromptCache(model.config), 0, 0
        model.prompt = partial(fim_prompt, tok=tok, order=order, spm_layout="swapped")
        for end in range(10, 50):
            one, plain = (infill(model, tok, text[:end], text[50:], max_new_tokens=8, cache=c)[0]
                          for c in (cache, None))
            if one.text != plain.text or abs(one.mean_log_p - plain.mean_log_p) > 1e-3:
                raise ValueError(f"{order}, prefix {text[:end]!r}: with the cache it infills {one.text!r}, "
                                 f"expected {plain.text!r} as without it")
            n_reused, n_tokens = n_reused + cache.reused, n_tokens + len(cache.ids) * (end > 10)
        shares[order] = n_reused / n_tokens
    print(f"reused: {shares['psm']:.3f} in PSM, {shares['spm']:.3f} in SPM order")
    return shares["spm"]


def leaderboard_bpb(out):
    """train.py with its default flags, seeds 1 and 2. After 5 minutes it is told to stop, and saves."""
    for seed in (1, 2):
        process = subprocess.Popen([sys.executable, "train.py", "--seed", str(seed), "--out", f"{out}/{seed}",
                                    "--cache-dir", f"{out}/cache-{seed}"])
        with suppress(subprocess.TimeoutExpired):
            process.wait(300)
        process.terminate()
        process.wait()
    return (programs_bpb(out / "1") + programs_bpb(out / "2")) / 2


def programs_bpb(run, n=500):
    """Bits per byte of n held-out programs, each in windows of block_size tokens. The bytes are those of the
    text, whatever the run's own code counts. Raises ValueError where tokens lose text."""
    from lab.corpora import held_out_programs
    from lab.evaluate import score
    from sample import load_model
    model, tok, _ = load_model(run)
    texts, T, pairs = held_out_programs(n, seed=1), model.config.block_size, []
    for text in texts:
        ids = [tok.eot, *tok.encode(text)]
        if tok.decode(ids[1:]) != text:
            raise ValueError("decode(encode(text)) is not the text")
        pairs += [(ids[i:i + 1], ids[i + 1:i + 1 + T]) for i in range(0, len(ids) - 1, T)]
    nats = -sum(s.log_p.sum() for s in score(model, pairs))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("start", "check", "mark"))
    parser.add_argument("number", type=int, choices=LABS,
                        help=", ".join(f"{n} {lab.title}" for n, lab in LABS.items()))
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder",
                        help="of the lab, for check one or more; of a mark: for its training")
    parser.add_argument("--no-mark", action="store_true", help="check the tests alone")
    parser.add_argument("--json", action="store_true", help="check prints JSON")
    args = parser.parse_args(arguments)
    if args.action == "check":
        sys.exit(0 if check(args.number, args.folders, not args.no_mark, args.json) else 1)
    if len(args.folders) > 1:
        parser.error(f"{args.action}: expected one folder")
    try:
        (start if args.action == "start" else measure)(args.number, *args.folders)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
