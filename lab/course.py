"""Labs for a course: parts of this project to write, and a check that says at once what is right.

    python -m lab.course start 3 ../lab3              the project, with the functions of lab 3 empty
    python -m lab.course check 3 ../lab3 --no-mark    the tests of lab 3: a line for each task, with points
    python -m lab.course check 3 ../lab3              the same, then a training of minutes: the mark
    python -m lab.course mark 3 out/mark              in the lab's folder: that training alone

The handout is the docstring of each function, which stays, and docs/exercises.md. What a lab leaves empty is
cut out of this project's files, so there is no second copy of any code. check copies this project to a
temporary folder and takes only the lab's own files from the student's: whatever else was edited there, tests
above all, does not count. It exits with 0 only if all points are reached. Student code runs in processes of
its own with a time limit. That is a guard against accidents (an endless loop, a call of exit), not against
malice: code from strangers belongs in a container.

From top to bottom: the labs, start, check, the tests of a task, the trainings behind the marks.
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
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from xml.etree import ElementTree

# The five files are imported only where a mark is measured: in a student's folder they may be broken.
FIVE_FILES = ("objectives.py", "model.py", "data.py", "sample.py", "train.py")

ROOT = Path(__file__).resolve().parent.parent
COPIED = (*FIVE_FILES, "requirements.txt", "LICENSE", "README.md", "docs", "lab", "tests")
FLAGS_FILE = "flags.txt"  # of lab 5
SECONDS = 60  # for the tests of a lab, which take a tenth of that


class Task(NamedTuple):
    """What a student writes: a function such as "sample.PromptCache.cut_back_to", a file, or a rule to keep.

    tests: {file::test: what to look at where it fails}, the tests below tests/ that decide, with all of their
    parameters. Of the lab's functions they call only this one and those in needs."""
    name: str
    points: int
    tests: dict
    read_on: str
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
    """files: those that check takes from the student's folder."""
    title: str
    files: tuple
    tasks: list
    mark: Mark


# The bounds of the marks, and beside them what the project itself reaches with seeds 1 to 10.
NTP_BPB = (1.2, 1.45)    # lab 1, bits per byte after 250 steps; 1.40 to 1.42; less only if targets are seen
BYTES_PER_TOKEN = 3.0    # lab 2; no seed decides it: the project's own learn_bpe has 3.04 on Python 3.11
TIMES_COUNTING = 10.0    # lab 2, CPU time of learning over that of counting the words; the project: 3 to 4
RECALL = 0.9             # lab 3, a share of the questions; 8 seeds: 1.00, 2 seeds: 0.16 and 0.04
SAVED = 0.5              # lab 4, a share of what Bayes' rule saves; 0.89 to 0.97
END_MINUS_WRONG = 0.3    # lab 5, a difference of two probabilities; 0.36 to 0.44, exact 0.41
REUSED = 0.95            # lab 6; no seed decides it: two tokens of a prompt are computed again
LEADERBOARD_BPB = 1.18   # lab 7; the unchanged project has 1.19 to 1.20

LABS = {
    1: Lab("attention", ("model.py",), [
        Task("model.causal_mask", 1, {
            "test_model.py::test_the_mask_worked_by_hand[no_cache]":
                "your mask lets position i see i + 1, hides i itself, holds NaN (-inf * 0) or lacks like's "
                "dtype; write it down for T = S = 3",
            "test_model.py::test_the_mask_worked_by_hand[cache]":
                "with a cache, the T queries are the last of S positions: the diagonal moves by S - T"},
            "GPT-2's decoder: Vaswani et al., 2017, section 3.2.3"),
        Task("model.causal_attention", 2, {
            "test_model.py::test_attention_worked_by_hand":
                "a query's weights are a softmax over the keys, the last axis, of scores plus the mask; "
                "those returned are without dropout",
            "test_model.py::test_attention_and_its_gradients_are_those_of_torch":
                "the scores are divided by sqrt(D), where D is the size of a head, not n_embd"},
            "Vaswani et al., 2017, section 3.2.1, equation 1", ("model.causal_mask",)),
        Task("model.rotate", 1, {
            "test_model.py::test_rope_scores_depend_on_the_distance_alone":
                "x[i] and x[i + D/2] are a pair, and a later position turns it further, the same way"},
            "Su et al., 2021 (RoFormer), equations 12 and 34")],
        Mark("bits per byte after 250 steps of ntp", "ntp_bpb", *NTP_BPB)),
    2: Lab("tokens", ("data.py",), [
        Task("data.learn_bpe", 3, {
            "test_data.py::test_merges_worked_by_hand":
                "a pair counts once for each of its places in a word, times the word's frequency; merge from "
                "left to right; where no pair is left, the vocabulary ends",
            "test_data.py::test_learn_bpe_merges_what_a_full_recount_would":
                "count all pairs anew after each merge and compare: a merge changes the pairs on both of its "
                "sides, whose counts rise or fall; of two pairs with one count the smaller ids come first"},
            "Sennrich et al., 2016, section 3.2")],
        Mark("bytes per token on the standard library, vocabulary 2,048", "bytes_per_token", BYTES_PER_TOKEN,
             seconds=120)),
    3: Lab("MEAP", ("objectives.py",), [
        Task("objectives.mask", 1, {
            "test_objectives.py::test_a_mask_has_its_exact_size_and_falls_anywhere":
                "int(T * ratio) tokens are masked (all ordinary ones, if they are fewer), T the length of "
                "inputs, at places drawn anew with rng",
            "test_objectives.py::test_masking_spares_special_tokens_even_where_few_others_are_left":
                "a special token is never masked; the argument stays as it was: targets share its memory"},
            "the MEAP paper, arXiv 2502.07490, section 3"),
        Task("objectives.meap", 1, {
            "test_objectives.py::test_meap_masks_exactly_its_share_of_ordinary_inputs_and_no_target":
                "inputs are masked; targets are not: all are the true next tokens, and all count in the loss",
            "test_objectives.py::test_at_rate_0_all_are_next_token_prediction":
                "with mask_ratio 0 a row of meap is a row of ntp, id for id",
            "test_objectives.py::test_a_refused_knob_is_named_with_what_is_expected":
                "a ratio outside 0 to 1 raises ValueError: check_range in mask"},
            "the MEAP paper, arXiv 2502.07490, section 3", ("objectives.mask",))],
        Mark("share of the questions of `records` that are answered", "recall", RECALL, seconds=900)),
    4: Lab("FIM", ("objectives.py",), [
        Task("objectives.fim_prompt", 1, {
            "test_objectives.py::test_layouts_are_the_papers_and_a_prompt_stops_where_the_middle_begins":
                "compare your layouts, token by token, with the four at the top of objectives.py"},
            "the FIM paper, arXiv 2207.14255, section 3 and appendix D"),
        Task("objectives.split", 1, {
            "test_objectives.py::test_the_two_cuts_are_uniform_and_any_part_may_be_empty":
                "n characters have n + 1 places to cut, and the two cuts may fall on the same one",
            "test_objectives.py::test_cuts_at_lines_worked_by_hand":
                "with span line, the places are the start of each line and the end of the text, each once"},
            "the FIM paper, arXiv 2207.14255, sections 3 and 4.5"),
        Task("objectives.fim", 2, {
            "test_objectives.py::test_at_rate_0_all_are_next_token_prediction":
                "with fim_rate 0 a row of fim is a row of ntp, id for id",
            "test_objectives.py::test_each_document_has_its_own_coin_for_fim_and_each_example_for_its_order":
                "each document in the window becomes an example of its own: each document has its own draw "
                "against fim_rate, each example its own against spm_rate",
            "test_objectives.py::test_any_row_of_any_objective_holds_its_windows_text[fim]":
                "all knobs are passed on; the argument ids stays as it was; all randomness comes from rng"},
            "the FIM paper, arXiv 2207.14255, sections 3.1 and 3.2",
            ("objectives.fim_prompt", "objectives.split"))],
        Mark("share that the model saves of the bits that a suffix can save on markov", "saved", SAVED)),
    5: Lab("stopping", ("lab/corpora.py", FLAGS_FILE), [
        Task("lab/corpora.Markov.infill", 2, {
            "lab/test_corpora.py::test_infill_is_what_an_enumeration_of_all_middles_gives":
                "a next letter is weighted by all ways to go on from it to the suffix's first letter, with "
                "the prior of their lengths; <EOT> by that letter following at once",
            "lab/test_corpora.py::test_infill_of_an_impossible_text_is_nan":
                "where no middle joins the suffix, the probabilities are 0 / 0 = NaN"},
            "the docstring of Markov.infill: Bayes' rule"),
        Task(FLAGS_FILE, 1, {
            "lab/test_course.py::test_lab_5s_flags_show_middles_that_join_a_suffix":
                "with these flags no SPM example has a suffix for its middle to join; only --objective and "
                "its knobs may stand in the file"},
            "docs/usage.md, objectives and their knobs")],
        Mark("P(<EOT>) at the true end, SPM, minus that before another text's suffix", "end_minus_wrong",
             END_MINUS_WRONG)),
    6: Lab("editor", ("sample.py",), [
        Task("sample.infill_prompt", 1, {
            "test_sample.py::test_a_long_prompt_keeps_the_text_around_the_hole":
                "three sentinels and max_new_tokens need room; what goes is the text far from the hole, and "
                "neither side may push the other out; then alone warn says 'last 3 of 5 ... first 2 of 9'"},
            "docs/usage.md, sampling and infilling"),
        Task("sample.PromptCache.cut_back_to", 1, {
            "test_sample.py::test_a_prompt_cache_keeps_what_two_prompts_both_begin_with":
                "keys and values can be reused up to the first token that differs; the last token is always "
                "computed again, since its logits are needed; length is what a KVCache goes by, and ids "
                "becomes the new prompt"},
            "the FIM paper, arXiv 2207.14255, section 3.1"),
        Task("sample.best_first", 1, {
            "test_sample.py::test_samples_that_end_in_eot_come_first_then_the_likelier":
                "a sample without <EOT> did not join the suffix: it comes after all that did; within both "
                "groups the likelier first; ended is STOPPED or NOT_STOPPED"},
            "the FIM paper, arXiv 2207.14255, appendix H.3")],
        Mark("typing in SPM order: the share of the prompts' tokens that is reused, the output being equal",
             "reused", REUSED)),
    7: Lab("leaderboard", FIVE_FILES, [
        Task("no position sees a later one", 0, {
            "test_model.py::test_no_prediction_sees_the_future":
                "the prediction at position t changes with a token after t"}, "lab 1"),
        Task("the text that is held out stays so", 0, {
            "test_data.py::test_a_worked_example": "other documents than before are held out"}, "data.py"),
        Task("tokens hold the whole text", 0, {
            "test_data.py::test_decode_undoes_encode_and_no_text_encodes_to_a_special_id":
                "decode(encode(text)) is not the text, or a token's bytes are counted wrongly"}, "lab 2")],
        Mark("bits per byte of held-out text after 5 minutes, mean of 2 seeds", "leaderboard_bpb",
             high=LEADERBOARD_BPB, points=6, seconds=1300)),
}


def start(number, folder):
    """Makes the folder of a lab. Raises ValueError where it exists already or lies in this project."""
    lab = LABS[number]
    if folder.exists():
        raise ValueError(f"{folder} exists already: expected a new folder")
    if folder.resolve().is_relative_to(ROOT):
        raise ValueError(f"{folder} lies in the project: expected another place, such as ../lab{number}")
    copy_project(folder)
    to_write = [task.name for task in lab.tasks if function_of(task)]
    for task in filter(function_of, lab.tasks):
        file, path = function_of(task)
        text = (folder / file).read_text("utf-8")
        (folder / file).write_text(blank(text, path, number), "utf-8")
    if FLAGS_FILE in lab.files:
        (folder / FLAGS_FILE).write_text("# flags of train.py: --objective and its knobs\n")
        to_write.append(FLAGS_FILE)
    (folder / "lab.json").write_text(json.dumps({"lab": number}) + "\n")
    print(f"lab {number}, {lab.title}, in {folder}; to write: {', '.join(to_write) or 'what you like'}\n"
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


def blank(source, path, number):
    """Python source -> the same, but a function's body is one raise. Its signature and docstring stay."""
    node, lines = find(source, path), source.splitlines(keepends=True)
    docstring, *_ = node.body
    indent = " " * docstring.col_offset
    lines[docstring.end_lineno:node.end_lineno] = [
        f'{indent}raise NotImplementedError("lab {number}: {path[-1]}")\n']
    return "".join(lines)


def check(number, folder, with_mark=True):
    """Grades a lab's folder: prints a line for each task and the mark -> whether all points are reached.

    Raises ValueError if it is no folder of this lab."""
    lab = LABS[number]
    check_folder(number, folder)
    total = sum(task.points for task in lab.tasks)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary, "project")
        copy_project(copy)
        for file in lab.files:
            shutil.copy(folder / file, copy / file)
        points, found = 0, verdicts(copy, lab)
        for task in lab.tasks:
            look_at = found[task.name]
            if look_at is None:
                points += task.points
                print(f"passed   {task.points} of {task.points}  {task.name}")
            else:
                print(f"not yet  0 of {task.points}  {task.name}: {look_at} (read on: {task.read_on})")
        if with_mark:
            total += lab.mark.points
            given, text = 0, "needs all tasks"
            if not any(found.values()):
                given, text = judge_mark(number, copy, Path(temporary, "out"))
            points += given
            print(f"mark     {given} of {lab.mark.points}  {lab.mark.text}: {text}")
    print(f"lab {number}, {lab.title}: {points} of {total} points{'' if with_mark else ', without the mark'}")
    return points == total


def check_folder(number, folder):
    try:
        found = json.loads((folder / "lab.json").read_text("utf-8"))["lab"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}: no folder of a lab (it has no lab.json); make one with "
                         f"python -m lab.course start {number} {folder}") from None
    if found != number:
        raise ValueError(f"{folder} is a folder of lab {found}: expected one of lab {number}")
    for file in LABS[number].files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: expected {file} in it, which lab {number} is about")


def verdicts(copy, lab):
    """{name of a task: None if its tests pass, else a sentence: what to look at}. copy: a folder with the
    project and a student's files."""
    for file in lab.files:
        try:
            if file.endswith(".py"):
                compile((copy / file).read_bytes(), file, "exec")
        except (SyntaxError, ValueError) as error:  # ValueError: NUL characters
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            return {task.name: f"{file}{line}: {getattr(error, 'msg', error)}" for task in lab.tasks}
    return judge_tasks(copy, lab.tasks)


def judge_tasks(copy, tasks):
    """One process runs all tests. If it ends early or takes too long, each task gets a process of its own."""
    report, why = run_tests(copy, [test for task in tasks for test in task.tests])
    if why and len(tasks) == 1:
        return {tasks[0].name: why}
    if why:
        return {name: look_at for task in tasks for name, look_at in judge_tasks(copy, [task]).items()}
    found = {}
    for task in tasks:
        found[task.name] = next((sentence(task, error, look_at) for test, look_at in task.tests.items()
                                 if (error := first_error(test, report))), None)
        wrong = [name for name in task.needs if found.get(name)]
        if found[task.name] and wrong:
            found[task.name] += f"; this needs {' and '.join(wrong)}: make that pass first"
    return found


def run_tests(copy, tests):
    """-> {name of a test: "" or its error}, None; or, where they did not run to the end, {}, why."""
    report = copy.with_name("report.xml")
    report.unlink(missing_ok=True)
    status, printed = run(["-m", "pytest", "-q", "--rootdir=.", "-p", "no:cacheprovider", "--capture=no",
                           "--assert=plain", f"--junitxml={report}", *(f"tests/{test}" for test in tests)],
                          copy, SECONDS)
    if status is None:
        return {}, f"takes more than {SECONDS} seconds: is there a loop that never ends?"
    if not report.exists():
        errors = re.findall("^E +(.*)", printed, re.MULTILINE)
        return {}, errors[-1] if errors else f"ends the process of the tests, with status {status}"
    errors = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")]
        if bad and bad[0].get("message") == "collection failure":  # of a file, which has no classname
            error = re.findall("^E +(.*)", bad[0].text, re.MULTILINE)[-1]
            errors[file_of(case.get("name"))] = f"cannot be imported: {error}"
        else:
            name = f"{file_of(case.get('classname'))}::{case.get('name')}"
            errors[name] = " ".join(bad[0].get("message").split()) if bad else ""
    return errors, None


def file_of(module):
    return module.removeprefix("tests.").replace(".", "/") + ".py"


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


def first_error(test, report):
    """The error of a test, or of the first of its parameters that fails; "" if it passed."""
    errors = [error for name, error in report.items() if name == test or name.startswith(test + "[")]
    if not errors:
        return report.get(test.partition("::")[0], "was not run: does your file call exit?")
    return next(filter(None, errors), "")


def sentence(task, error, look_at):
    """An error of a test that decides a task -> what to look at."""
    if empty := re.search(r"NotImplementedError: lab \d+: (\w+)", error):
        name = empty[1]
        return "is not written yet" if task.name.endswith(name) else f"calls {name}, which is not written yet"
    if error.startswith(("cannot be imported", "was not run")):
        return error
    if error.startswith(("AssertionError", "assert ", "Failed")):
        return look_at
    return error[:250] if task.name == FLAGS_FILE else f"{error[:250]}; to look at: {look_at}"


def judge_mark(number, copy, out):
    """-> points, and a line about them."""
    mark = LABS[number].mark
    status, printed = run(["-m", "lab.course", "mark", str(number), str(out)], copy, mark.seconds)
    if status is None:
        return 0, f"takes more than {mark.seconds} seconds"
    if status or not (out / "mark.json").exists():
        lines = printed.replace("\r", "\n").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing was printed")
        return 0, f"no figure, status {status}: {last[:300]}"
    value = json.loads((out / "mark.json").read_text())["value"]
    expected = " and ".join(f"{words} {bound:g}" for words, bound in (
        ("at least", mark.low), ("at most", mark.high)) if math.isfinite(bound))
    return mark.points * (mark.low <= value <= mark.high), f"{value:.4f}, expected {expected}"


# The trainings behind the marks: (a folder to work in) -> the figure. Each at most 5 minutes on 2 cores.


def measure(number, out):
    """Writes the figure of a lab's mark to out/mark.json."""
    out.mkdir(parents=True, exist_ok=True)
    value = float(globals()[LABS[number].mark.measure](out))
    (out / "mark.json").write_text(json.dumps({"lab": number, "value": value}) + "\n")
    print(f"{LABS[number].mark.text}: {value:.4f}")


def ntp_bpb(out):
    import train
    flags = f"--objective ntp --steps 250 --eval-every 250 --cache-dir {out}/cache --out {out}/run"
    return train.train(*train.read_arguments(flags.split()))["held_out_bpb"]


def bytes_per_token(out):
    """Raises ValueError where learning takes too long."""
    from data import Tokenizer, is_held_out, load_documents
    texts = [text for text in load_documents("stdlib") if not is_held_out(text)]
    started = time.process_time()
    Tokenizer.train(texts, 256 + 5)  # nothing to learn: the words are counted
    counting = time.process_time() - started
    tok = Tokenizer.train(texts, 2048)
    times = (time.process_time() - started - 2 * counting) / counting
    if times > TIMES_COUNTING:
        raise ValueError(f"learn_bpe took {times:.1f} times as long as counting the words, {counting:.1f} s: "
                         f"expected at most {TIMES_COUNTING:g} times")
    print(f"learn_bpe took {times:.1f} times as long as counting the words")
    return sum(len(text.encode()) for text in texts) / sum(len(tok.encode(text)) for text in texts)


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
        if best >= RECALL:
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
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in allowed:
            raise ValueError(f"{FLAGS_FILE}: {word}, expected only {', '.join(sorted(allowed))}")
    if not words:
        raise ValueError(f"{FLAGS_FILE} names no flags: expected --objective and its knobs")
    plain = claims.markov("ntp")
    return plain._replace(flags=f"{plain.flags} {' '.join(words)}")  # of a flag given twice, the last counts


def reused(out):
    """Forty letters typed one by one before a suffix. Raises ValueError if the cache changes the output."""
    import torch

    from data import Tokenizer
    from model import GPT, GPTConfig
    from objectives import fim_prompt
    from sample import PromptCache, infill
    tok, shares = Tokenizer.bytes(), {}
    torch.manual_seed(1)
    model = GPT(GPTConfig(tok.n_vocab)).eval().requires_grad_(False)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)  # far from uniform: each token of the prompt counts
    text = ("def mean(xs):\n    return sum(xs) / max(1, len(xs))\n\n\n"
            "def spread(xs):\n    return max(xs) - min(xs)\n")
    for order in ("psm", "spm"):
        cache, n_reused, n_tokens = PromptCache(model.config), 0, 0
        for end in range(10, 50):
            prompt = partial(fim_prompt, tok=tok, order=order, spm_layout="swapped")
            settings = {"max_new_tokens": 8, "prompt": prompt}
            one, = infill(model, tok, text[:end], text[50:], cache=cache, **settings)
            plain, = infill(model, tok, text[:end], text[50:], **settings)
            if one.text != plain.text or abs(one.mean_log_p - plain.mean_log_p) > 1e-3:
                raise ValueError(f"{order}, prefix {text[:end]!r}: with the cache it infills {one.text!r}, "
                                 f"without it {plain.text!r}: expected the same")
            if end > 10:
                n_reused, n_tokens = n_reused + cache.reused, n_tokens + len(cache.ids)
        shares[order] = n_reused / n_tokens
    print(f"reused: {shares['psm']:.3f} in PSM, {shares['spm']:.3f} in SPM order")
    return shares["spm"]


def leaderboard_bpb(out):
    """train.py with its default flags, seeds 1 and 2. After 5 minutes it is told to stop, and saves."""
    values = []
    for seed in (1, 2):
        run = out / f"seed-{seed}"
        process = subprocess.Popen([sys.executable, "train.py", "--seed", str(seed), "--out", str(run),
                                    "--cache-dir", str(out / f"cache-{seed}")])
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        values.append(held_out_bpb(run))
        print(f"seed {seed}: {values[-1]:.4f} bits per byte")
    return sum(values) / len(values)


def held_out_bpb(run):
    """Bits per byte of the standard library's held-out documents, each in windows of block_size tokens. The
    bytes are those of the text, whatever the run's own code counts.

    Raises ValueError where tokens are not the whole text, or logits depend on a later token."""
    import torch

    from data import is_held_out, load_documents
    from lab.evaluate import score
    from sample import load_model
    model, tok, _ = load_model(run)
    texts = [text for text in load_documents("stdlib") if is_held_out(text)]
    T, pairs = model.config.block_size, []
    for text in texts:
        ids = tok.encode(text)
        if tok.decode(ids) != text:
            raise ValueError("decode(encode(text)) is not the text")
        ids = [tok.eot, *ids]
        pairs += [(ids[i:i + 1], ids[i + 1:i + 1 + T]) for i in range(0, len(ids) - 1, T)]
    idx = torch.tensor([pairs[0][1]])
    with torch.no_grad():
        before, after = (model(x)[0][:, :-1] for x in (idx, torch.cat((idx[:, :-1], idx[:, -1:] ^ 1), 1)))
    if not torch.allclose(before, after, atol=1e-4):
        raise ValueError("the logits at a position depend on a later token")
    nats = -sum(s.log_p.sum() for s in score(model, pairs))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("start", "check", "mark"))
    parser.add_argument("number", type=int, choices=LABS,
                        help=", ".join(f"{n} {lab.title}" for n, lab in LABS.items()))
    parser.add_argument("folder", type=Path, help="of the lab; of a mark: for its training")
    parser.add_argument("--no-mark", action="store_true", help="check the tests alone")
    args = parser.parse_args(arguments)
    try:
        if args.action == "start":
            start(args.number, args.folder)
        elif args.action == "mark":
            measure(args.number, args.folder)
        elif not check(args.number, args.folder, not args.no_mark):
            sys.exit(1)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
