"""The labs: empty, no task passes; as they are in this project, all do, each with the other tasks empty; the
wrong solutions below fail and are told why; what a student's file may do to the process that grades it."""
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import data
import objectives
import sample
import train
from data import Tokenizer
from lab import course
from lab.corpora import documents as generated
from lab.course import FLAGS_FILE, LABS
from model import GPTConfig

TASKS = {task.name: (number, task) for number, lab in LABS.items() for task in lab.tasks}


class Case(NamedTuple):
    """A solution, wrong or right, of a task or in a whole file: old text -> new text. test: one that tells,
    where the task's own do not and all tests of the file decide."""
    task: str
    old: str
    new: str
    file: str = ""
    test: str = ""


# Each round is graded at once, in one process: no task in it needs another one of it.
DRAW = "rng.permutation(ordinary)"
LITERAL = ("a, b = x.chunk(2, -1)\n    cos, sin = cos.chunk(2, -1)[0], sin.chunk(2, -1)[1]\n"
           "    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)")
WRONG = [
    [Case("model.causal_mask", "S - T + 1", "S - T + 2"),
     Case("model.rotate", "x * cos + x", "x * cos - x"),
     Case("data.learn_bpe", "pair_count[pair] += frequency[w]", "pair_count[pair] += 1"),
     Case("objectives.mask", "len(inputs) * ratio", "len(ordinary) * ratio"),
     Case("objectives.fim_prompt", "tok.mid, *prefix]", "*prefix, tok.mid]"),
     Case("objectives.split", "len(places), 2)", "len(places) - 1, 2)"),
     Case("lab/corpora.Markov.infill", "w[0] * self.P[a, s]", "w[0]"),
     Case(FLAGS_FILE, "", "--objective fim --spm-rate 0"),
     Case("sample.infill_prompt", "prefix[len(prefix) - for_prefix:]", "prefix[:for_prefix]"),
     Case("sample.PromptCache.cut_back_to", "len(ids) - 1", "len(ids)"),
     Case("sample.best_first", "(sample.ended != STOPPED, -sample.mean_log_p)", "-sample.mean_log_p")],
    [Case("model.causal_mask", "S - T + 1", "1"),
     Case("no position sees a later one", "F.pad(moving[:, :-1], (0, 0, 1, 0))",
          "F.pad(moving[:, 1:], (0, 0, 0, 1))", "model.py"),
     Case("model.rotate", "x.shape[-1] // 2", "1"),
     Case("data.learn_bpe", "for pair in change:", "for pair in [pair for pair in change if new in pair]:"),
     Case("objectives.mask", DRAW, "np.random.choice(ordinary, len(ordinary), replace=False)"),
     Case("objectives.fim_prompt", "[tok.pre, *prefix, tok.suf, *suffix, tok.mid]",
          "[tok.pre, *suffix, tok.suf, *prefix, tok.mid]"),
     Case("objectives.split", "sorted(rng.integers(0, len(places), 2))",
          "sorted(__import__('random').choices(range(len(places)), k=2))"),
     Case("lab/corpora.Markov.infill", "self.powers[1:len(w), :, s]", "self.powers[:len(w) - 1, :, s]"),
     Case(FLAGS_FILE, "", "--objective fim --span line"),
     Case("sample.infill_prompt", "room < 1", "room < 0", test="test_sentinels_are_text_but_for_raw"),
     Case("sample.PromptCache.cut_back_to", "self.ids, self.length = ids, self.reused", "self.ids = ids"),
     Case("sample.best_first", "-sample.mean_log_p)", "sample.mean_log_p)")],
    [Case("model.causal_attention", "F.dropout(weights, dropout) @ v", "weights @ v",
          test="test_dropout_acts_at_every_site_in_training_and_nowhere_else[manual]"),
     Case("objectives.mask", DRAW, "np.roll(ordinary, rng.integers(len(ordinary) + 1))"),
     Case("objectives.fim", "rng.random() < spm_rate", "rng.random() > spm_rate"),
     Case("objectives.split", "range(1, len(text)) if", "range(1, len(text) + 1) if"),
     Case("the text that is held out stays so", "HELD_OUT = 0.05", "HELD_OUT = 0.001", "data.py"),
     Case("tokens hold the whole text", "encode_ordinary(part)", "encode_ordinary(part.lower())", "data.py"),
     Case(FLAGS_FILE, "", "--objective fim --preset laptop")],
    [Case("model.causal_attention", "(q / math.sqrt(q.shape[-1]))", "q"),
     Case("objectives.meap", "return mask(inputs, mask_ratio, tok, rng), targets",
          "inputs = mask(inputs, mask_ratio, tok, rng)\n"
          "    return inputs, np.append(inputs[1:], targets[-1])"),
     Case("objectives.fim", "tok, rng, max_document_tokens)", "tok, rng)")],
    [Case("objectives.meap", "return mask(inputs, mask_ratio, tok, rng), targets",
          "return mask(inputs, mask_ratio, tok, rng).tolist(), targets.tolist()"),
     Case("objectives.fim", "return ntp(np.array(row), tok, rng)", "return row[:-1], row[1:]")],
    [Case("objectives.mask", "return masked", "return masked.tolist()"),
     Case("objectives.fim", "rng.random() < fim_rate", "np.random.default_rng(len(ids)).random() < fim_rate")],
    [Case("objectives.fim", "documents_in(ids, tok, rng, max_document_tokens)", "[ids.tolist()]")],
]
RIGHT = [Case("model.rotate", "return x * cos + x.roll(x.shape[-1] // 2, -1) * sin", LITERAL),
         Case("model.causal_attention", "(q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)",
              "q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])"),
         Case("objectives.mask", DRAW, "rng.choice(ordinary, len(ordinary), replace=False)"),
         Case(FLAGS_FILE, "", "--objective fim_spm --fim-rate 0.9 --spm-layout joint\n")]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copies the project: project() -> a new folder with it."""
    def copy():
        folder = tmp_path_factory.mktemp("lab") / "project"
        course.copy_project(folder)
        return folder
    return copy


def judge(folder, names, test={}):
    """Tasks of any labs at once: {name: what failed}. test: {name: the test in place of its own}"""
    tasks = []
    for number, task in (TASKS[name] for name in names):
        tests = (test.get(task.name) or task.tests).split()
        whole = [t if ".py" in t else f"{LABS[number].test_file}::{t}" for t in tests]
        tasks.append(task._replace(tests=" ".join(whole)))
    return course.judge_tasks(folder, 1, tasks)


def apply(folder, case):
    if case.task == FLAGS_FILE:
        return (folder / FLAGS_FILE).write_text(case.new)
    file, path = (case.file, None) if case.file else course.function_of(TASKS[case.task][1])
    text = (folder / file).read_text("utf-8")
    lines, first, last = text.splitlines(keepends=True), 0, None
    if path:
        node = course.find(text, path)
        first, last = node.lineno - 1, node.end_lineno
    body = "".join(lines[first:last])
    assert case.old in body, f"{case.task} has no {case.old!r}: adapt the solution to the code"
    lines[first:last] = [body.replace(case.old, case.new)]
    return (folder / file).write_text("".join(lines), "utf-8")


@pytest.fixture(scope="module")
def graded(project):
    """What is found in WRONG's rounds and in RIGHT."""
    def grade(part):
        folder = project()
        for case in part:
            apply(folder, case)
        return judge(folder, ["objectives.meap"] * (part is RIGHT) + [case.task for case in part],
                     {case.task: case.test for case in part})

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(grade, [*WRONG, RIGHT]))


@pytest.mark.parametrize("number, case", [(n, case) for n, part in enumerate(WRONG) for case in part])
def test_a_wrong_solution_fails_and_is_told_in_which_test(graded, number, case):
    assert graded[number][case.task].startswith("test_")


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.task)
def test_another_right_solution_passes(graded, case):
    assert graded[-1][case.task] == ""


def test_every_task_has_a_wrong_solution_and_every_lab_two():
    wrong = [case.task for part in WRONG for case in part]
    assert set(wrong) == set(TASKS)
    assert all(sum(wrong.count(task.name) for task in lab.tasks) >= 2 for lab in LABS.values())


# In each round these tasks and what they need are as in this project, and all other functions of their labs, or
# of lab 5, are empty. Lab 2 is apart, since the others' tests need a tokenizer, and so is lab 3, whose tests
# draw rows of lab 4.
ALONE = [["model.causal_attention", "sample.infill_prompt", "objectives.fim", "lab/corpora.Markov.infill"],
         ["model.rotate", "sample.PromptCache.cut_back_to", "objectives.fim_prompt"],
         ["model.causal_mask", "sample.best_first", "objectives.split"],
         ["objectives.mask", "data.learn_bpe", *(task.name for task in LABS[7].tasks)]]


@pytest.fixture(scope="module")
def alone(project):
    """What is found in each round of the tasks, and of those that are empty."""
    def grade(names):
        folder, written = project(), {*names, *(need for name in names for need in TASKS[name][1].needs)}
        labs = {5, *(TASKS[name][0] for name in names)}
        empty = [name for name, (number, task) in TASKS.items()
                 if number in labs and name not in written and course.function_of(task)]
        for name in empty:
            course.blank(folder, TASKS[name][1], TASKS[name][0])
        (folder / FLAGS_FILE).write_text("# nothing yet\n")
        found = judge(folder, [*names, *empty, FLAGS_FILE])
        return {name: found[name] for name in names}, {name: found[name] for name in [*empty, FLAGS_FILE]}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(grade, ALONE))


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_a_task_passes_without_the_others_and_fails_while_it_is_empty(alone, number):
    passed, empty = alone[number]
    assert not any(passed.values()), passed
    for name, told in empty.items():
        assert ("no flags, expected only" if name == FLAGS_FILE else "is not written yet") in told


# Tests of tasks that no other file has

@pytest.mark.parametrize("draw", [partial(objectives.mask, np.arange(99), 0.15, Tokenizer.bytes()),
                                  partial(objectives.split, "x" * 99)], ids=["mask", "split"])
def test_all_randomness_comes_in_as_rng(draw):
    drawn = [[list(draw(np.random.default_rng(seed))) for seed in range(9)] for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_a_prompt_cache_keeps_what_two_prompts_both_begin_with():
    """... but for the last token, whose logits are needed."""
    cache = sample.PromptCache(GPTConfig(60, block_size=24))
    for prompt, reused in (([1, 2, 3], 0), ([1, 2, 4], 2), ([1, 2, 4], 2), ([1, 2, 4, 5], 3), ([1, 2], 1),
                           ([1, 2, 4], 2), ([9, 2, 4], 0), ([9], 0)):
        cache.cut_back_to(prompt)
        assert (cache.reused, cache.length, cache.ids) == (reused, reused, prompt)
        cache.length = len(prompt)  # the model has seen the prompt


def test_lab_5s_flags_show_middles_that_join_a_suffix(monkeypatch):
    """On markov, at least every tenth document is an SPM example with a prefix and a suffix."""
    config, _ = train.read_arguments(course.own_arm().flags.split())
    kept, fim_example = [], objectives.fim_example

    def keep(prefix, middle, suffix, tok, order, spm_layout):
        kept.append(bool(order == "spm" and prefix and suffix))
        return fim_example(prefix, middle, suffix, tok, order, spm_layout)

    monkeypatch.setattr(objectives, "fim_example", keep)
    tok, rng, texts = Tokenizer.bytes(), np.random.default_rng(1), generated("markov", 300, seed=1)
    for text in texts:
        ids = np.array([*tok.encode(text), tok.eot, *tok.encode("x" * 9)])  # with room for the whole example
        objectives.OBJECTIVES[config.objective](ids, tok, rng, **config.knobs)
    assert sum(kept) > len(texts) / 10


# The folder of a student, from start to check

def test_a_lab_is_the_project_with_empty_functions(tmp_path, capsys):
    course.main(["start", "6", str(tmp_path / "lab6")])
    to_write = "sample.infill_prompt, sample.PromptCache.cut_back_to, sample.best_first"
    assert f"to write: {to_write}\n" in capsys.readouterr().out
    for name in course.FIVE_FILES:
        same = (tmp_path / "lab6" / name).read_text("utf-8") == (course.ROOT / name).read_text("utf-8")
        assert same == (name != "sample.py")
    text = (tmp_path / "lab6/sample.py").read_text("utf-8")
    assert text.count("raise NotImplementedError") == text.count('raise NotImplementedError("lab 6: ') == 3
    for path in (["infill_prompt"], ["PromptCache", "cut_back_to"], ["best_first"]):
        ours, theirs = (course.find(source, path) for source in ((course.ROOT / "sample.py").read_text(), text))
        assert theirs.body[0].value.value == ours.body[0].value.value and len(theirs.body) == 2
        assert [arg.arg for arg in theirs.args.args] == [arg.arg for arg in ours.args.args]


def test_from_start_to_full_marks_on_the_command_line(tmp_path, monkeypatch):
    """Three students of lab 6: as started; with this project's functions, whose mark is measured; with a file
    that is broken, as are tests and the checker in that folder, which do not count."""
    for name in ("empty", "right", "broken"):
        course.main(["start", "6", str(tmp_path / name)])
    (tmp_path / "right/sample.py").write_text((course.ROOT / "sample.py").read_text("utf-8"), "utf-8")
    for path in (*tmp_path.glob("*/tests/**/test_*.py"), tmp_path / "broken/data.py"):
        path.write_text("def test_everything(): pass\n")
    with open(tmp_path / "broken/sample.py", "a") as f:
        f.write("def best_first(:\n")

    def check(*arguments):
        done = subprocess.run([sys.executable, "-m", "lab.course", "check", "6", *arguments], cwd=course.ROOT,
                              capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, done.stdout

    code, said = check(str(tmp_path / "right"))
    assert code == 0 and said.endswith("lab 6, editor: 6 of 6 points\n"), said
    folders = [str(tmp_path / name) for name in ("empty", "broken", "no folder")]
    code, said = check(*folders, "--no-mark")
    rows = said.splitlines()
    assert code == 1 and [row.split()[:1] for row in rows] == [["folder"], *([name] for name in folders)], said
    assert rows[1].split()[1:] == "0 of 4 0 0 0 0".split() and "no folder of lab 6" in rows[3]
    code, said = check(*folders, "--no-mark", "--json")
    empty, broken, none = json.loads(said)
    assert code == 1 and [row["text"].count("is not written yet") for row in empty["found"]] == [1, 1, 1, 0]
    assert all("SyntaxError" in row["text"] for row in broken["found"][:3]) and none["points"] == none["of"] == 0


@pytest.mark.parametrize("found, mark, flags, code, said", [
    ("", True, [], 0, "5 of 5 points"), ("", False, [], 1, "3 of 5 points"), ("wrong", True, [], 1, "0 of 5"),
    ("", False, ["--no-mark"], 0, "3 of 3 points, without the mark")])
def test_check_exits_with_0_only_if_all_points_are_reached(monkeypatch, tmp_path, capsys, found, mark, flags,
                                                           code, said):
    course.main(["start", "3", str(tmp_path / "lab3")])
    monkeypatch.setattr(course, "judge_tasks", lambda copy, number, tasks: {t.name: found for t in tasks})
    monkeypatch.setattr(course, "judge_mark", lambda *_: (mark, ""))
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "3", str(tmp_path / "lab3"), *flags])
    assert stop.value.code == code and said in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("body, told", [
    ("import os; os._exit(0)", "with status 0"), ("import sys; sys.exit()", "SystemExit"),
    ("return nonsuch", "NameError: name 'nonsuch'"),
    ("while True: print('x' * 1000)", "takes more than 6 seconds: is there a loop that never ends?")])
def test_whatever_meap_does_the_grade_of_mask_stands(project, body, told, monkeypatch):
    monkeypatch.setattr(course, "SECONDS", 6)
    folder, (number, meap) = project(), TASKS["objectives.meap"]
    course.blank(folder, meap, number)
    apply(folder, Case("objectives.meap", 'raise NotImplementedError("lab 3: meap")', body))
    mask = TASKS["objectives.mask"][1]._replace(tests=LABS[3].tasks[0].tests.split()[0])
    found = course.judge_tasks(folder, 3, [mask, meap])
    assert found["objectives.mask"] == "" and told in found["objectives.meap"]
    assert "\n" not in found["objectives.meap"]


@pytest.mark.parametrize("old, new, told", [
    ("import inspect", "import nonsuch", "No module named 'nonsuch'"), ("def mask(", "def masked(", "'mask'"),
    ("import inspect", "raise SystemExit", "exit"), ("import inspect", "import inspect\0", "null bytes")])
def test_a_file_that_cannot_be_imported_is_a_line_for_each_task(project, old, new, told):
    folder = project()
    apply(folder, Case("objectives.mask", old, new, "objectives.py"))
    found = course.judge_tasks(folder, 3, LABS[3].tasks)
    assert found.keys() == {"objectives.mask", "objectives.meap"}
    assert all(told in line and "\n" not in line for line in found.values()), found


@pytest.mark.parametrize("message, line", [
    ("AssertionError: assert [1, 2] == [1, 3]\n\n  At index 1 diff: 2 != 3\n  Use -v to get more diff",
     "got [1, 2], expected [1, 3] At index 1 diff: 2 != 3"),
    ("AssertionError: why\nassert 1 == 2", "why got 1, expected 2"),
    ("NotImplementedError: lab 3: mask", "mask is not written yet"), ("ValueError: no", "ValueError: no")])
def test_a_failure_is_a_line_with_what_was_got_and_expected(message, line):
    assert course.told(message) == line


@pytest.mark.parametrize("arguments, message", [
    ("start 8 new", "invalid choice: 8"), ("begin 3 new", "invalid choice: 'begin'"),
    ("start 3 here", "here exists already: expected a new folder"), ("mark 3 a b", "mark: expected one folder"),
    (f"start 3 {course.ROOT}/lab3", "lies in the project: expected another place, such as ../lab3"),
    ("check 3 here", "here: no folder of lab 3 (it has no lab.json); make one with"),
    ("check 3 lab4", 'lab4: expected a folder of lab 3, its lab.json says {"lab": 4}')])
def test_a_bad_argument_is_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("lab4").mkdir()
    Path("lab4", "lab.json").write_text('{"lab": 4}')
    Path("lab4", "objectives.py").touch()
    with pytest.raises(SystemExit) as stop:
        course.main(arguments.split())
    shown = capsys.readouterr()
    assert stop.value.code and message in (shown.out + shown.err).splitlines()[-1]


# The marks, without their trainings

METRICS = {"held_out_bpb": 0.5, "recall": 0.93, "psm_saved": 1.0, "bayes_psm_saved": 4.0, "spm_saved": 3.0,
           "bayes_spm_saved": 4.0, "spm_end": 0.6, "spm_another": 0.2, "bayes_spm_end": 0.7,
           "bayes_spm_another": 0.1}


@pytest.mark.parametrize("number, flags, value", [
    (1, {"objective": "ntp", "data": "relay"}, 0.5), (3, {"objective": "meap", "data": "records"}, 0.93),
    (4, {"objective": "fim", "steps": 400}, 0.75), (5, {"objective": "fim", "steps": 400}, 0.4)])
def test_a_mark_is_read_off_the_metrics_of_a_training_of_minutes(monkeypatch, tmp_path, number, flags, value):
    def trained(config, checkpoint=None, measure=None):
        assert {name: getattr(config, name) for name in flags} == flags
        assert config.steps * config.batch_size * config.block_size <= 400 * 4096  # half of the default run
        Path(config.out).mkdir(parents=True)
        Path(config.out, "metrics.jsonl").write_text(f'{{"step": 1}}\n{json.dumps(METRICS)}\n')
        return METRICS

    monkeypatch.setattr(train, "train", trained)
    course.measure(number, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mark.json").read_text())["value"] == pytest.approx(value)


@pytest.mark.parametrize("recalls, value", [([0.99], 0.99), ([0.16, 0.95], 0.95), ([0.2, 0.3, 0.1, 0.2], 0.3)])
def test_a_seed_that_looks_nothing_up_gets_three_more_tries(monkeypatch, tmp_path, recalls, value):
    of_seed = {f"records-0.15-{seed}": {"recall": recall} for seed, recall in enumerate(recalls, 1)}
    monkeypatch.setattr(course, "claims_run", lambda run, out: of_seed[run])
    assert course.recall(tmp_path) == value


@pytest.mark.parametrize("number", LABS)
def test_a_mark_has_points_within_its_bounds_alone(monkeypatch, tmp_path, number):
    mark, ran = LABS[number].mark, (0, "")
    monkeypatch.setattr(course, "run", lambda *_: ran)
    for bound, outward in ((mark.low, -1), (mark.high, 1)):
        for value, passed in ((bound, True), (bound + 0.01 * outward, False), (math.nan, False)):
            if not math.isinf(value):
                (tmp_path / "mark.json").write_text(json.dumps({"value": value}))
                given, line = course.judge_mark(number, tmp_path, tmp_path)
                assert given == passed and f"{value:.4f}, expected " in line
    for ran, line in (((1, "a\n 3%|  \rthe loss is nan\n"), "no figure, status 1: the loss is nan"),
                      ((None, ""), f"takes more than {mark.seconds} seconds")):
        assert course.judge_mark(number, tmp_path, tmp_path) == (False, line)


def test_a_learner_that_recounts_all_pairs_is_too_slow_and_a_cache_that_forgets_nothing_wrong(monkeypatch,
                                                                                             tmp_path):
    """Labs 2 and 6, whose marks need no training."""
    for number in (2, 6):
        course.measure(number, tmp_path)
        assert json.loads((tmp_path / "mark.json").read_text())["value"] > LABS[number].mark.low
    with pytest.raises(ValueError, match="times: expected at most 1"):
        course.bytes_per_token(tmp_path, most=1)

    def forget_nothing(self, prompt):
        self.ids, self.length = prompt, min(self.length, len(prompt) - 1)

    monkeypatch.setattr(sample.PromptCache, "cut_back_to", forget_nothing)
    with pytest.raises(ValueError, match="expected .* as without it"):
        course.measure(6, tmp_path)


class Bigram(torch.nn.Module):
    """Its logits at a position depend on the token there."""
    def __init__(self, tok):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(tok.n_vocab, tok.n_vocab))
        self.config = GPTConfig(tok.n_vocab, block_size=16)

    def forward(self, idx, targets=None, cache=None):
        return self.table[idx], None


def test_the_leaderboards_figure_is_bits_over_bytes_of_held_out_documents_alone(monkeypatch, documents, tok):
    held_out = documents[:2]
    monkeypatch.setattr(data, "is_held_out", lambda text: text in held_out)
    monkeypatch.setattr(data, "load_documents", lambda source: documents)
    model = Bigram(tok)
    monkeypatch.setattr(sample, "load_model", lambda run: (model, tok, None))
    log_p, bits = model.table.detach().double().log_softmax(-1), 0
    for text in held_out:
        ids = [tok.eot, *tok.encode(text)]
        bits -= log_p[ids[:-1], ids[1:]].sum().item() / math.log(2)
    assert course.held_out_bpb("run") == pytest.approx(bits / sum(len(text.encode()) for text in held_out))
