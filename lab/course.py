"""Labs for a course: parts of this project to write, and a check that says at once what is right.

    python -m lab.course start 3 ../lab3              the project, with the functions of lab 3 empty
    python -m lab.course check 3 ../lab3 --no-mark    the tests of lab 3: a line for each task, with points
    python -m lab.course check 3 ../lab3              the same, then a training of minutes: the mark
    python -m lab.course check 3 folders/*            a class: a table; with --json for a program
    python -m lab.course mark 3 out/mark              in the lab's folder: that training alone

The handout: docs/exercises.md and the docstring of each function, which stays. check copies this project to
a temporary folder and takes only the lab's own files from the student's: tests that were edited do not count.
The tests of each task run in a process with a time limit, but with all your permissions: code from strangers
belongs in a container.
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
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from threading import Thread
from time import process_time
from timeit import timeit
from typing import NamedTuple

# The five files are imported only where a mark is measured: in a student's folder they may be broken.
FIVE_FILES = ("objectives.py", "model.py", "data.py", "sample.py", "train.py")
FLAGS_FILE = "flags.txt"  # of lab 5
ROOT = Path(__file__).resolve().parent.parent
COPIED = (*FIVE_FILES, "requirements.txt", "LICENSE", "README.md", "docs", "lab", "tests")
SECONDS = 60  # for the tests of a task, and thrice that for all of a file: they take a tenth of it
PAUSE = 20    # seconds from one line about a process that runs to the next


class Task(NamedTuple):
    """What a student writes: a function such as "sample.PromptCache.cut_back_to", a file, or a rule to keep.
    tests: those that decide, separated by spaces, in test_file of the lab if they name no file. Of the lab's
    functions they call only this one and those in needs."""
    name: str
    points: int
    tests: str
    needs: tuple = ()


class Lab(NamedTuple):
    """files: those that check takes from the student's folder. test_file: once the functions pass their own
    tests, all tests in it run, for one point more. measure: the name of a function of this file, (folder) ->
    the mark's figure, to lie between low and high. On 2 cores it needs far less than its limit, seconds."""
    title: str
    files: tuple
    test_file: str
    tasks: list
    mark: str
    measure: str
    low: float = -math.inf
    high: float = math.inf
    points: int = 2
    seconds: int = 600


OURS = "lab/test_course.py::"
SHARE = f"{OURS}test_each_outcome_has_its_share_and_all_randomness_comes_in_as_rng"
# The bounds of the marks: docs/exercises.md says what the project itself reaches.
LABS = {
    1: Lab("attention", ("model.py",), "test_model.py", [
        Task("model.causal_mask", 1, "test_the_mask_worked_by_hand"),
        Task("model.causal_attention", 2, "test_attention_worked_by_hand "
             "test_attention_and_its_gradients_are_those_of_torch", ("model.causal_mask",)),
        Task("model.rotate", 1, "test_rope_scores_depend_on_the_distance_alone")],
        "bits per byte of programs after 250 steps of ntp", "ntp_bpb", 0.15, 0.25),
    2: Lab("tokens", ("data.py",), "test_data.py", [
        Task("data.learn_bpe", 3, "test_learn_bpe_merges_what_a_full_recount_would")],
        "bytes per token on markov, vocabulary 1,024", "bytes_per_token", 3.4, seconds=120),
    3: Lab("MEAP", ("objectives.py",), "test_objectives.py", [
        Task("objectives.mask", 1, f"{SHARE}[mask]"),
        Task("objectives.meap", 1, f"{OURS}test_meap_is_ntp_with_masked_inputs", ("objectives.mask",))],
        "share of the questions of records that are answered", "recall", 0.9, seconds=900),
    4: Lab("FIM", ("objectives.py",), "test_objectives.py", [
        Task("objectives.fim_prompt", 1, f"{OURS}test_a_prompt_in_each_layout"),
        Task("objectives.split", 1, f"{SHARE}[split] {SHARE}[split_lines] "
             f"{SHARE}[split_mixed] {SHARE}[split_nothing]"),
        Task("objectives.fim", 2,
             "test_any_objective_keeps_the_contract[fim] test_each_document_has_its_own_coin "
             "test_each_row_of_a_short_document_has_its_probability "
             "test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end",
             ("objectives.fim_prompt", "objectives.split"))],
        "share that the model saves of the bits that a suffix can save on markov", "saved", 0.5),
    5: Lab("stopping", ("lab/corpora.py", FLAGS_FILE), "lab/test_corpora.py", [
        Task("lab/corpora.Markov.infill", 2, "test_infill_is_what_an_enumeration_of_all_middles_gives "
             "test_infill_of_an_impossible_text_is_nan "
             f"{OURS}test_a_middle_that_is_longer_than_any_of_the_prior_is_nan"),
        Task(FLAGS_FILE, 1, f"{OURS}test_lab_5s_flags_show_middles_that_join_a_suffix")],
        "P(<EOT>) at the true end, SPM, minus that before another's suffix", "end_minus_wrong", 0.3),
    6: Lab("editor", ("sample.py",), "test_sample.py", [
        Task("sample.infill_prompt", 1, "test_a_long_prompt_keeps_the_text_around_the_hole "
             f"{OURS}test_a_context_without_room_for_text_is_refused"),
        Task("sample.PromptCache.cut_back_to", 1, f"{OURS}test_a_cache_keeps_what_two_prompts_begin_with"),
        Task("sample.best_first", 1, "test_samples_that_end_in_eot_come_first_then_the_likelier")],
        "typing in SPM order: the share of the prompts' tokens that is reused", "reused", 0.95),
    7: Lab("leaderboard", FIVE_FILES, "", [
        Task("no position sees a later one", 0, "test_model.py::test_no_prediction_sees_the_future"),
        Task("the text that is held out stays so", 0, "test_data.py::test_a_worked_example"),
        Task("tokens hold the whole text", 0,
             "test_data.py::test_decode_undoes_encode_and_no_text_encodes_to_a_special_id")],
        "bits per byte of held-out text after 5 minutes, mean of 2 seeds", "leaderboard_bpb",
        high=0.15, points=6, seconds=1300),
}


def start(number, folder):
    """Makes the folder of a lab. Raises OSError where it exists already, ValueError in this project."""
    lab = LABS[number]
    if folder.resolve().is_relative_to(ROOT):
        raise ValueError(f"{folder} lies in the project: expected another place, such as ../lab{number}")
    copy_project(folder)
    to_write = [task.name for task in lab.tasks if task.points]
    for name in to_write:
        if name == FLAGS_FILE:
            (folder / name).write_text("# flags of train.py: --objective and its knobs\n")
            continue
        file, node = find(folder, name)  # its signature and docstring stay
        lines = file.read_text("utf-8").splitlines(keepends=True)
        lines[node.body[0].end_lineno:node.end_lineno] = [
            f'{" " * node.body[0].col_offset}raise NotImplementedError("lab {number}: {node.name}")\n']
        file.write_text("".join(lines), "utf-8")
    (folder / f"lab{number}.json").write_text("{}")  # check knows it by its name
    print(f"lab {number}, {lab.title}, in {folder}; to write: {', '.join(to_write) or 'what you like'}\n"
          f"handout: docs/exercises.md, the docstrings\nthen: python -m lab.course check {number} {folder}")


def copy_project(folder):
    shutil.copytree(ROOT, folder, ignore=lambda at, names: [
        name for name in names if name == "__pycache__" or Path(at) == ROOT and name not in COPIED])


def find(folder, name):
    """A function, such as "sample.PromptCache.cut_back_to" -> its file in the folder, its ast node."""
    file, *path = name.split(".")
    file = folder / f"{file}.py"
    node = ast.parse(file.read_text("utf-8"))
    for part in path:
        node = next(n for n in node.body if getattr(n, "name", "") == part)
    return file, node


def check(number, folders, with_mark=True, as_json=False):
    """Grades a folder of a lab, and prints a line for each task, or several, and prints a table with a line
    for each -> whether each has all points."""
    say = (lambda *_: None) if as_json else partial(print, flush=True)
    results, width, many = [], max(len(str(folder)) for folder in folders), len(folders) > 1
    for folder in folders:
        rows, error = [], ""
        try:
            for row in grade(number, folder, with_mark):
                rows.append(row)
                if not many:
                    say(f"{'passed ' if row['passed'] else 'not yet'}  {row['points']} of {row['of']}  "
                        f"{row['name']}{row['text'] and ': '}{row['text']}")
        except (ValueError, OSError) as wrong:
            error = str(wrong)
        points, most = (sum(row[key] for row in rows) for key in ("points", "of"))
        results.append({"folder": str(folder), "lab": number, "points": points, "of": most, "error": error,
                        "passed": not error and all(row["passed"] for row in rows), "found": rows})
        cells = "  ".join(f"{row['name'].partition(', ')[0]} {row['points']}" for row in rows)
        without = "" if with_mark else ", without the mark"
        say(f"{folder!s:{width}}  {points:2} of {most}  {error or cells}" if many else
            error or f"lab {number}, {LABS[number].title}: {points} of {most} points{without}")
    if as_json:
        print(json.dumps(results, indent=1))
    return all(result["passed"] for result in results)


def grade(number, folder, with_mark):
    """Yields a row for each task, for all tests of its file, and for the mark: a dict of name, points, of,
    passed and text. Raises ValueError if it is no folder of this lab."""
    lab, failed = LABS[number], []
    for file in (f"lab{number}.json", *lab.files):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no folder of lab {number} (it has no {file}); make one with "
                             f"python -m lab.course start {number} {folder}")

    def row(name, points, passed, text):
        failed.extend([name] * (not passed))
        return {"name": name, "points": points * passed, "of": points, "passed": passed, "text": text}

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        copy = Path(temporary, "project")
        copy_project(copy)
        for file in lab.files:
            shutil.copy(folder / file, copy / file)
        whole = Task(f"all of {lab.test_file}", 1, lab.test_file)
        for task in [*lab.tasks, whole] if lab.test_file else lab.tasks:
            too_soon = task is whole and {*failed} - {FLAGS_FILE}
            text = "needs the functions" if too_soon else run_tests(copy, number, task)
            if text and (wrong := " and ".join(name for name in task.needs if name in failed)):
                text += f"; this needs {wrong}: make that pass first"
            yield row(task.name, task.points, not text, text)
        if with_mark:
            passed, text = (False, "needs all tasks") if failed else judge_mark(
                number, copy, Path(temporary, "out"))
            yield row(f"mark, {lab.mark}", lab.points, passed, text)


def run_tests(copy, number, task):
    """-> "" if a task's tests pass, else in a line what failed first. copy: a folder with the project and a
    student's files."""
    tests = [f"tests/{test}" if ".py" in test else f"tests/{LABS[number].test_file}::{test}"
             for test in task.tests.split()]
    seconds = SECONDS if "::" in tests[0] else 3 * SECONDS
    status, lines = run(["-m", "pytest", "-x", "--rootdir=.", "-p", "no:cacheprovider", "--capture=no",
                         "--color=no", "-o", "console_output_style=classic", *tests],
                        copy, seconds, task.name)
    if status is None:
        return f"takes more than {seconds} seconds: is there a loop that never ends?"
    if status == 0 and any(re.search(r"\d passed", line) for line in lines):
        return ""
    error = " ".join(line[1:].strip() for line in lines if line.startswith("E  "))
    for line in lines:
        if re.match("(FAILED|ERROR) .*::", line):
            test = re.split("::| - ", line)[1]
            if empty := re.search(r"NotImplementedError: lab \d+: (\w+)", error):
                return f"{test}: {empty[1]} is not written yet"
            said = " ".join(error.removeprefix("AssertionError: ").split()).partition(" Use -v")[0]
            # Tests compare what they got with what they expect.
            said = re.sub("^(.*?)assert (.+?) == (.+)$", r"\1got \2, expected \3", said)
            return f"{test}: {said[:400]}"
    if error:
        return f"cannot be imported: {error[-300:]}".replace(f"{copy}/", "")
    return f"ends the process of the tests, with status {status}: is there a call of exit?"


def run(arguments, folder, seconds, what):
    """Runs python with these arguments in a folder -> its exit status, None if the time is over, and the last
    lines printed. Afterwards its children are gone, too. Says on stderr now and then how long it has run."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env=os.environ | {"PYTEST_ADDOPTS": ""})
    status, printed = None, deque(maxlen=1 << 20)  # its last bytes: output may be endless
    chunks = iter(lambda: process.stdout.read1(1 << 16), b"")
    reader = Thread(target=printed.extend, args=[chain.from_iterable(chunks)], daemon=True)
    reader.start()

    def lines():
        return re.split(r"[\r\n]+", bytes(printed).decode("utf-8", "replace").strip())

    try:
        for waited in range(0, seconds, PAUSE):
            if waited:
                print(f"{what}: {waited} s, {lines()[-1][:80]}", file=sys.stderr)
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(min(PAUSE, seconds - waited))
                break
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return status, lines()


def judge_mark(number, copy, out):
    """-> whether a mark lies within its bounds, and a line about it."""
    lab = LABS[number]
    status, lines = run(["-m", "lab.course", "mark", str(number), str(out)], copy, lab.seconds, "mark")
    if status is None:
        return False, f"takes more than {lab.seconds} seconds"
    if status or not (out / "mark.json").exists():
        return False, f"no figure, status {status}: {lines[-1][:300]}"
    value = json.loads((out / "mark.json").read_text())["value"]
    expected = " and ".join(f"{words} {bound:g}" for words, bound in (
        ("at least", lab.low), ("at most", lab.high)) if math.isfinite(bound))
    return lab.low <= value <= lab.high, f"{value:.4f}, expected {expected}"


def measure(number, out):
    """Writes the figure of a lab's mark to out/mark.json."""
    out.mkdir(parents=True, exist_ok=True)
    value = float(globals()[LABS[number].measure](out))
    (out / "mark.json").write_text(json.dumps({"lab": number, "value": value}) + "\n")
    print(f"{LABS[number].mark}: {value:.4f}")


MARKOV = ("--data markov:100000 --tokenizer bytes --block-size 128 --batch-size 32 --steps 400 --warmup 20 "
          "--eval-every 400 --eval-tokens 4096")


def figures(flags, out, probe=None):
    """Trains with these flags of train.py -> its last figures, with those of a probe of lab/probes.py."""
    import train
    from lab.probes import PROBES
    config, start = train.read_arguments(f"{flags} --cache-dir {out}/cache --out {out}/run".split())
    found, probe = {}, PROBES.get(probe)  # metrics.jsonl cannot hold all that a probe finds
    measure = probe and (lambda model, tok, _: found.update(probe(model, tok, config.knobs, True)) or {})
    return train.train(config, start, measure) | found


def ntp_bpb(out):
    return figures("--objective ntp --data programs --steps 250 --eval-every 250", out)["held_out_bpb"]


def bytes_per_token(out, most=400):
    """Raises ValueError where learning takes as long as counting all pairs more than `most` times."""
    from data import Tokenizer, learn_bpe
    from lab.corpora import documents
    counts = Counter(text.encode() for text in documents("markov", 2000, seed=1))
    count = timeit(lambda: Counter(pair for word in counts for pair in pairwise(word)), timer=process_time,
                   number=10) / 10
    started = process_time()
    tok = Tokenizer(learn_bpe(dict(counts), 1024))
    times = (process_time() - started) / count
    if times > most:
        raise ValueError(f"learn_bpe took as long as {times:.0f} counts of pairs: expected at most {most}")
    texts = documents("markov", 2000, seed=2)
    return sum(map(len, texts)) / sum(len(tok.encode(text)) for text in texts)


def recall(out):
    """The share of the first seed that reaches the bound, or else of the fourth: looking a fact up is learned
    in one jump, and two seeds of ten do not make it in 600 steps."""
    for seed in (1, 2, 3, 4):
        share = figures("--objective meap --data records --vocab-size 512 --block-size 128 --warmup 20 "
                        f"--steps 600 --eval-every 600 --seed {seed}", out / str(seed), "records")["recall"]
        if share >= LABS[3].low:
            break
    return share


def saved(out):
    run = figures(f"--objective fim --fim-rate 0.9 {MARKOV}", out, "markov")
    return max(run[f"{order}_saved"] / run[f"bayes_{order}_saved"] for order in ("psm", "spm"))


def end_minus_wrong(out):
    run = figures(own_flags(), out, "markov")
    return run["spm_end"] - run["spm_another"]


def own_flags():
    """Lab 5: the flags of its training, with those of flags.txt. Raises ValueError for other than knobs."""
    from train import OBJECTIVES, flag_of, knobs_of
    words = re.sub("(?m)^#.*", "", (ROOT / FLAGS_FILE).read_text("utf-8-sig")).split()
    knobs = {flag_of(knob) for objective in OBJECTIVES.values() for knob in knobs_of(objective)}
    wrong = [w for w in words if w.startswith("--") and w.partition("=")[0] not in knobs | {"--objective"}]
    if wrong or not words:
        raise ValueError(f"{FLAGS_FILE}: {' '.join(wrong) or 'no flags'}, expected only --objective and "
                         f"{', '.join(sorted(knobs))}")
    return f"{MARKOV} {' '.join(words)}"


def reused(out):
    """Forty letters typed one by one before a suffix."""
    from sample import GPT, GPTConfig, PromptCache, Tokenizer, fim_prompt, infill
    tok = Tokenizer.bytes()
    model = GPT(GPTConfig(tok.n_vocab)).eval()
    text = "def mean(xs):\n    return sum(xs) / max(1, len(xs))\n\n\n" * 2
    for order in ("psm", "spm"):
        cache, n_reused, n_tokens = PromptCache(model.config), 0, 0
        model.prompt = partial(fim_prompt, tok=tok, order=order, spm_layout="swapped")
        for end in range(10, 50):
            infill(model, tok, text[:end], text[50:], max_new_tokens=1, cache=cache)
            n_reused, n_tokens = n_reused + cache.reused, n_tokens + len(cache.ids) * (end > 10)
        print(f"{n_reused / n_tokens:.3f} reused in {order.upper()} order")
    return n_reused / n_tokens


def leaderboard_bpb(out):
    """train.py with its default flags, seeds 1 and 2. After 5 minutes it is told to stop, and saves."""
    for seed in (1, 2):
        with subprocess.Popen([sys.executable, "train.py", "--seed", str(seed), "--out", f"{out}/{seed}",
                               "--cache-dir", f"{out}/cache-{seed}"]) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(300)
            process.terminate()
    return (programs_bpb(out / "1") + programs_bpb(out / "2")) / 2


def programs_bpb(run, n=500):
    """Bits per byte of n held-out programs, each in windows of block_size tokens. The bytes are those of the
    text, whatever the run's own code counts."""
    from lab.corpora import held_out_programs
    from lab.evaluate import score
    from sample import load_model
    model, tok, _ = load_model(run)
    texts, T = held_out_programs(n, seed=1), model.config.block_size
    rows = [[tok.eot, *tok.encode(text)] for text in texts]
    pairs = [(ids[i:i + 1], ids[i + 1:i + 1 + T]) for ids in rows for i in range(0, len(ids) - 1, T)]
    nats = -sum(s.log_p.sum() for s in score(model, pairs))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("start", "check", "mark"))
    parser.add_argument("number", type=int, choices=LABS,
                        help=", ".join(f"{n} {lab.title}" for n, lab in LABS.items()))
    parser.add_argument("folders", nargs="+", type=Path, help="of the lab; of a mark: for its training")
    parser.add_argument("--no-mark", action="store_true", help="check the tests alone")
    parser.add_argument("--json", action="store_true", help="check prints JSON")
    args = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # a folder's name, or a test's message, in any letters
    if args.action == "check":
        sys.exit(0 if check(args.number, args.folders, not args.no_mark, args.json) else 1)
    try:
        for folder in args.folders:
            (start if args.action == "start" else measure)(args.number, folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
