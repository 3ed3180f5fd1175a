"""The labs: empty, no task passes; as they are in this project, all do, each with the other tasks empty; the
wrong solutions below fail and are told why; what a student's file may do to the process that grades it."""
import ast
import json
import math
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import save_run, small_model

import objectives
import sample
import train
from data import Tokenizer
from lab import course
from lab.corpora import documents, held_out_programs
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
DRAW, MEAP = "rng.permutation(ordinary)", "return mask(inputs, mask_ratio, tok, rng), targets"
WRONG = [
    [Case("model.causal_mask", "S - T + 1", "S - T + 2"),
     Case("model.rotate", "x * cos + x", "x * cos - x"),
     Case("data.learn_bpe", "pair_count[pair] += frequency[w]", "pair_count[pair] += 1"),
     Case("objectives.mask", "len(inputs) * ratio", "len(ordinary) * ratio"),
     Case("objectives.fim_prompt", "tok.mid, *prefix]", "*prefix, tok.mid]"),
     Case("objectives.split", "range(1, len(text)) if", "range(1, len(text) + 1) if"),
     Case("lab/corpora.Markov.infill", "w[0] * self.P[a, s]", "w[0]"),
     Case(FLAGS_FILE, "", "--objective fim --span line", FLAGS_FILE),
     Case("sample.infill_prompt", "prefix[len(prefix) - for_prefix:]", "prefix[:for_prefix]"),
     Case("sample.PromptCache.cut_back_to", "len(ids) - 1", "len(ids)"),
     Case("sample.best_first", "(sample.ended != STOPPED, -sample.mean_log_p)", "-sample.mean_log_p")],
    [Case("no position sees a later one", "F.pad(moving[:, :-1], (0, 0, 1, 0))",
          "F.pad(moving[:, 1:], (0, 0, 0, 1))", "model.py"),
     Case("data.learn_bpe", "for pair in change:", "for pair in [pair for pair in change if new in pair]:"),
     Case("objectives.mask", DRAW, "np.random.choice(ordinary, len(ordinary), replace=False)"),
     Case("objectives.split", "rng.integers(0, len(text) + 1, 2)",
          "__import__('random').choices(range(len(text) + 1), k=2)"),
     Case("sample.infill_prompt", "room < 1", "room < 0")],
    [Case("model.causal_attention", "F.dropout(weights, dropout) @ v", "weights @ v",
          test="test_dropout_acts_at_every_site_in_training_and_nowhere_else[manual]"),
     Case("objectives.mask", DRAW, "np.roll(ordinary, rng.integers(len(ordinary) + 1))"),
     Case("objectives.fim", "rng.random() < spm_rate", "rng.random() > spm_rate",
          test="test_each_row_of_a_short_document_has_its_probability"),
     Case("the text that is held out stays so", "HELD_OUT = 0.05", "HELD_OUT = 0.001", "data.py"),
     Case("tokens hold the whole text", "encode_ordinary(part)", "encode_ordinary(part.lower())", "data.py"),
     Case(FLAGS_FILE, "", "--objective fim --preset laptop", FLAGS_FILE)],
    [Case("model.causal_attention", "(q / math.sqrt(q.shape[-1]))", "q"),
     Case("objectives.mask", "return masked", "return masked.tolist()"),
     Case("objectives.fim", "tok, rng, max_document_tokens)", "tok, rng)",
          test="test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end[code]")],
    [Case("objectives.meap", MEAP, MEAP.replace("targets", "targets.tolist()"),
          test="test_any_objective_keeps_the_contract[meap]"),
     Case("objectives.fim", "return ntp(np.array(row), tok, rng)", "return row[:-1], row[1:]",
          test="test_any_objective_keeps_the_contract[fim]")],
    [Case("objectives.meap", MEAP, MEAP.replace(", targets", ", inputs"),
          test="test_meap_masks_exactly_its_share_of_ordinary_inputs"),
     Case("objectives.fim", "row = []", "row, fim_rate = [], rng.random() < fim_rate",
          test="test_each_document_has_its_own_coin")]]
RIGHT = [Case("model.rotate", "return x * cos + x.roll(x.shape[-1] // 2, -1) * sin",
              "(a, b), (cos, _), (_, sin) = (part.chunk(2, -1) for part in (x, cos, sin))\n"
              "    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)"),  # as its docstring says
         Case("model.causal_attention", "(q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)",
              "q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])"),
         Case("objectives.mask", DRAW, "rng.choice(ordinary, len(ordinary), replace=False)"),
         Case(FLAGS_FILE, "", "--objective fim_spm --fim-rate 0.9 --spm-layout joint\n", FLAGS_FILE)]
# In each round these tasks and what they need are written, by the cases or as in this project, and all other
# functions of their labs are empty. Lab 2 is in the last, since all other labs' tests use a tokenizer.
EMPTY_FLAGS = Case(FLAGS_FILE, "", "# nothing yet\n", FLAGS_FILE)
ALONE = [
    (["model.causal_attention", "sample.infill_prompt", "objectives.fim", "objectives.meap"], [EMPTY_FLAGS]),
    (["model.causal_mask", "model.rotate", "sample.PromptCache.cut_back_to", "sample.best_first",
      "objectives.fim_prompt", "objectives.split", "lab/corpora.Markov.infill"], []),
    ([*(case.task for case in RIGHT), "data.learn_bpe", *(task.name for task in LABS[7].tasks)], RIGHT)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """project(*cases) -> a new folder with this project and these changes."""
    def copy(*cases):
        folder = tmp_path_factory.mktemp("lab") / "project"
        course.copy_project(folder)
        for case in cases:
            file, path = (case.file, []) if case.file else course.function_of(TASKS[case.task][1])
            text = (folder / file).read_text("utf-8") if (folder / file).exists() else ""
            lines, first, last = text.splitlines(keepends=True), 0, None
            if path:
                node = course.find(text, path)
                first, last = node.lineno - 1, node.end_lineno
            body = "".join(lines[first:last])
            assert case.old in body, f"{case.task} has no {case.old!r}: adapt the solution to the code"
            lines[first:last] = [body.replace(case.old, case.new)]
            (folder / file).write_text("".join(lines), "utf-8")
        return folder
    return copy


def judge(folder, names, instead={}):
    """Tasks of any labs at once: {name: what failed}. instead: {name: the test in place of its own}"""
    tasks = []
    for number, task in (TASKS[name] for name in dict.fromkeys(names)):
        tests = (instead.get(task.name) or task.tests).split()
        whole = [test if ".py" in test else f"{LABS[number].test_file}::{test}" for test in tests]
        tasks.append(task._replace(tests=" ".join(whole)))
    return course.judge_tasks(folder, 1, tasks)


@pytest.fixture(scope="module")
def found(project):
    """What is found in the rounds of WRONG, then in those of ALONE."""
    def change(cases):
        return judge(project(*cases), [case.task for case in cases], {case.task: case.test for case in cases})

    def leave_alone(names, cases):
        folder = project(*cases)
        written = {*names, *(need for name in names for need in TASKS[name][1].needs)}
        empty = [name for name, (number, task) in TASKS.items() if name not in written
                 and number in {TASKS[name][0] for name in names} and course.function_of(task)]
        for name in empty:
            course.blank(folder, TASKS[name][1], TASKS[name][0])
        return judge(folder, [*names, *empty, *[FLAGS_FILE] * (EMPTY_FLAGS in cases)],
                     {"objectives.fim": "test_each_document_has_its_own_coin"})

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(change, WRONG), *pool.map(leave_alone, *zip(*ALONE))]


@pytest.mark.parametrize("number, case", [(n, case) for n, part in enumerate(WRONG) for case in part])
def test_a_wrong_solution_fails_and_is_told_in_which_test(found, number, case):
    assert found[number][case.task].startswith("test_")
    assert "got '<PRE><SUF>cab<MID>', expected '<PRE><SUF>c<MID>ab'" in found[0]["objectives.fim_prompt"]


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_a_task_passes_without_the_others_and_fails_while_it_is_empty(found, number):
    for name, told in found[len(WRONG) + number].items():
        empty = "no flags, expected only" if name == FLAGS_FILE else "is not written yet"
        assert told == "" if name in ALONE[number][0] else empty in told, name


# Tests of a single function, for those which the tests of their file only call through others

BYTES = Tokenizer.bytes()
WINDOW = np.array([BYTES.pre, 1, 2, BYTES.suf, 3, BYTES.mid, 4, 5, BYTES.eot])


def parts(text, cuts):
    return Counter((text[:i], text[i:j], text[j:]) for i, j in map(sorted, cuts))


@pytest.mark.parametrize("draw, expected", [
    (lambda rng: np.flatnonzero(objectives.mask(WINDOW, 0.25, BYTES, rng) == BYTES.mask),
     Counter(combinations((1, 2, 4, 6, 7), 2))),  # int(9 * 0.25) of the five ordinary tokens
    (lambda rng: objectives.split("ab", rng), parts("ab", product(range(3), repeat=2))),
    (lambda rng: objectives.split("a\n\nb\n", rng, "line"),
     parts("a\n\nb\n", combinations((0, 2, 3, 5), 2)))],
    ids=["mask", "split", "split_lines"])
def test_each_outcome_has_its_share_and_all_randomness_comes_in_as_rng(draw, expected):
    n, before = 300 * expected.total(), WINDOW.tolist()
    drawn, again = ([tuple(draw(rng)) for _ in range(n)] for rng in map(np.random.default_rng, (0, 0)))
    assert drawn == again
    shares = {outcome: round(count / n * expected.total()) for outcome, count in Counter(drawn).items()}
    assert shares == dict(expected)
    assert WINDOW.tolist() == before, "the argument stays as it was: targets share its memory"


@pytest.mark.parametrize("order, layout, expected", [
    ("psm", None, "<PRE>ab<SUF>c<MID>"), ("spm", "swapped", "<PRE>c<SUF>ab<MID>"),
    ("spm", "labelled", "<SUF>c<PRE>ab<MID>"), ("spm", "joint", "<PRE><SUF>c<MID>ab")])
def test_a_prompt_in_each_layout(order, layout, expected):
    prompt = objectives.fim_prompt([*b"ab"], [*b"c"], BYTES, order, layout)
    assert "".join(BYTES.names.get(i, chr(i)) for i in prompt) == expected


def test_meap_is_ntp_with_masked_inputs():
    inputs, targets = objectives.meap(np.append(WINDOW, 8), BYTES, np.random.default_rng(3), mask_ratio=0.25)
    assert inputs.tolist() == objectives.mask(WINDOW, 0.25, BYTES, np.random.default_rng(3)).tolist()
    assert targets.tolist() == [*WINDOW[1:], 8]


def test_a_context_without_room_for_text_is_refused():
    """Beside 20 new tokens and 3 sentinels, a context of 24 holds a letter."""
    model = SimpleNamespace(config=GPTConfig(60, 24), prompt=lambda prefix, suffix: prefix + suffix)
    assert sample.infill_prompt(model, BYTES, "ab", "cd", 20) == [*b"b"]
    with pytest.raises(ValueError, match="21.* context is 24 tokens, expected at most 20"):
        sample.infill_prompt(model, BYTES, "ab", "cd", 21)


def test_a_cache_keeps_what_two_prompts_begin_with():
    """... but for the last token, whose logits are needed."""
    cache = sample.PromptCache(GPTConfig(60, 24))
    for prompt, reused in (([1, 2, 3], 0), ([1, 2, 4], 2), ([1, 2, 4], 2), ([1, 2], 1), ([9, 2], 0)):
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
    rng = np.random.default_rng(1)
    for text in documents("markov", 300, seed=1):
        ids = np.array([*text.encode(), BYTES.eot, *b"x" * 9])  # with room for the whole example
        objectives.OBJECTIVES[config.objective](ids, BYTES, rng, **config.knobs)
    assert sum(kept) > 30


# The folder of a student, from start to check

def test_from_start_to_full_marks_on_the_command_line(tmp_path, capsys):
    """Lab 6, as started, then solved, in a folder whose tests and checker do not count."""
    course.main(["start", "6", str(tmp_path / "lab6")])
    assert "write: " + ", ".join(task.name for task in LABS[6].tasks) + "\n" in capsys.readouterr().out
    text = (tmp_path / "lab6/sample.py").read_text("utf-8")
    assert text.count('raise NotImplementedError("lab 6: ') == 3
    for path in (["infill_prompt"], ["PromptCache", "cut_back_to"], ["best_first"]):
        ours, theirs = (course.find(t, path) for t in ((course.ROOT / "sample.py").read_text("utf-8"), text))
        assert theirs.body[0].value.value == ours.body[0].value.value and len(theirs.body) == 2
        assert ast.dump(theirs.args) == ast.dump(ours.args)
    (tmp_path / "lab6/sample.py").write_text((course.ROOT / "sample.py").read_text("utf-8"), "utf-8")
    for path in (*tmp_path.glob("lab6/tests/**/test_*.py"), *tmp_path.glob("lab6/lab/*.py")):
        path.write_text("def test_everything(): assert False\n")

    done = subprocess.run([sys.executable, "-m", "lab.course", "check", "6", str(tmp_path / "lab6")],
                          cwd=course.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("lab 6, editor: 6 of 6 points\n"), done


@pytest.mark.parametrize("found, mark, flags, code, said", [
    ("", True, [], 0, "lab 3, MEAP: 5 of 5 points"), ("", False, [], 1, "lab 3, MEAP: 3 of 5 points"),
    ("wrong", True, [], 1, "lab 3, MEAP: 0 of 5 points"),
    ("", False, ["--no-mark"], 0, "lab 3, MEAP: 3 of 3 points, without the mark"),
    ("", True, ["lab3"], 0, "lab3   5 of 5      1     1          1     2\n"),
    ("", True, ["none"], 1, "none   0 of 0   none: no folder of lab 3 (it has no lab.json); make one with"),
    ("wrong", True, ["none", "--json"], 1, '"text": "wrong"')])
def test_check_exits_with_0_only_if_all_points_are_reached(monkeypatch, tmp_path, capsys, found, mark, flags,
                                                           code, said):
    monkeypatch.chdir(tmp_path)
    course.main(["start", "3", "lab3"])
    monkeypatch.setattr(course, "judge_tasks", lambda copy, number, tasks: {t.name: found for t in tasks})
    monkeypatch.setattr(course, "judge_mark", lambda *_: (mark, ""))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "3", "lab3", *flags])
    shown = capsys.readouterr().out
    assert stop.value.code == code and said in shown
    assert "--json" not in flags or [len(student["found"]) for student in json.loads(shown)] == [4, 0]


@pytest.mark.parametrize("body, told", [
    ("import os; os._exit(0)", "with status 0"), ("import sys; sys.exit()", "SystemExit"),
    ("while True: print('x' * 1000)", "takes more than 4 seconds: is there a loop that never ends?")])
def test_whatever_meap_does_is_a_line_and_the_grade_of_mask_stands(project, body, told, monkeypatch):
    monkeypatch.setattr(course, "SECONDS", 4 if "while" in body else 60)
    mask, meap = LABS[3].tasks
    tasks = [mask._replace(tests="test_the_papers_numbers_are_the_defaults"),
             meap._replace(tests="test_any_objective_keeps_the_contract[meap]")]
    folder = project(Case("objectives.meap", "    return", f"    {body}\n    return"))
    found = course.judge_tasks(folder, 3, tasks if "while" not in body else tasks[1:])
    assert not found.get(mask.name) and told in found[meap.name] and "\n" not in found[meap.name]


@pytest.mark.parametrize("old, new, told", [
    ("import inspect", "import nonsuch", "No module named 'nonsuch'"), ("def mask(", "def masked(", "'mask'"),
    ("import inspect", "raise SystemExit", "exit"), ("import inspect", "import inspect\0", "null bytes")])
def test_a_file_that_cannot_be_imported_is_a_line_for_each_task(project, old, new, told):
    tasks = [task._replace(tests="test_a_worked_example") for task in LABS[3].tasks]
    found = course.judge_tasks(project(Case("objectives.mask", old, new, "objectives.py")), 3, tasks)
    assert len(found) == 2 and all(told in line and "\n" not in line for line in found.values()), found


@pytest.mark.parametrize("arguments, message", [
    ("start 8 new", "invalid choice: 8"), ("start 3 here", "here exists already: expected a new folder"),
    (f"start 3 {course.ROOT}/lab3", "lies in the project: expected another place, such as ../lab3"),
    ("mark 3 a b", "mark: expected one folder"), ("check 3 here", "expected a folder of lab 3, its")])
def test_a_bad_argument_is_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/lab.json").write_text('{"lab": 4}')
    Path("here/objectives.py").touch()
    with pytest.raises(SystemExit) as stop:
        course.main(arguments.split())
    shown = capsys.readouterr()
    assert stop.value.code and message in (shown.out + shown.err).splitlines()[-1]


# The marks, without their trainings

METRICS = dict(held_out_bpb=0.5, recall=0.93, psm_saved=1.0, bayes_psm_saved=4.0, spm_saved=3.0, spm_end=0.6,
               bayes_spm_saved=4.0, spm_another=0.2, bayes_spm_end=0.7, bayes_spm_another=0.1)


@pytest.mark.parametrize("number, flags, value", [
    (1, {"objective": "ntp", "data": "programs"}, 0.5), (3, {"objective": "meap", "data": "records"}, 0.93),
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


def test_a_mark_has_points_within_its_bounds_alone(monkeypatch, tmp_path):
    ran = 0, ""
    monkeypatch.setattr(course, "run", lambda *_: ran)
    for value, passed in ((0.15, True), (0.14, False), (0.25, True), (0.26, False), (math.nan, False)):
        (tmp_path / "mark.json").write_text(json.dumps({"value": value}))
        assert course.judge_mark(1, tmp_path, tmp_path) == (
            passed, f"{value:.4f}, expected at least 0.15 and at most 0.25")
    for ran, line in (((1, "a\n 3%|  \rthe loss is nan\n"), "no figure, status 1: the loss is nan"),
                      ((None, ""), "takes more than 600 seconds")):
        assert course.judge_mark(1, tmp_path, tmp_path) == (False, line)


def test_labs_2_and_6_have_marks_that_need_no_training(monkeypatch, tmp_path):
    """A learner that counts all pairs again is too slow; a cache that forgets nothing changes the output."""
    course.measure(2, tmp_path)
    assert json.loads((tmp_path / "mark.json").read_text())["value"] > LABS[2].mark.low
    with pytest.raises(ValueError, match="expected at most 1"):
        course.bytes_per_token(tmp_path, most=1)

    monkeypatch.setattr(sample.PromptCache, "cut_back_to", lambda self, prompt: self.__dict__.update(
        ids=prompt, length=min(self.length, len(prompt) - 1)))
    with pytest.raises(ValueError, match="as without it"):
        course.measure(6, tmp_path)


def test_the_leaderboards_figure_is_bits_over_bytes_of_held_out_programs(monkeypatch, tmp_path):
    model = small_model(BYTES.n_vocab, block_size=1000)
    text, = held_out_programs(1, seed=1)
    ids = torch.tensor([BYTES.eot, *text.encode()])
    nats = model(ids[None, :-1], ids[None, 1:])[1].item()
    figure = course.programs_bpb(save_run(tmp_path / "run", model, BYTES), n=1)
    assert figure == pytest.approx(nats / math.log(2), rel=1e-4)
