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


WINDOW = np.array([257, 1, 2, 258, 3, 259, 4, 5, 256])  # special ids: 256 is <EOT>
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
     Case("objectives.split", "range(1, len(text)) if", "range(1, len(text) + 1) if"),
     Case("lab/corpora.Markov.infill", "w[0] * self.P[a, s]", "w[0]"),
     Case(FLAGS_FILE, "", "--objective fim --spm-rate 0", FLAGS_FILE),
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
     Case(FLAGS_FILE, "", "--objective fim --span line", FLAGS_FILE),
     Case("sample.infill_prompt", "room < 1", "room < 0", test="test_sentinels_are_text_but_for_raw"),
     Case("sample.PromptCache.cut_back_to", "self.ids, self.length = ids, self.reused", "self.ids = ids"),
     Case("sample.best_first", "-sample.mean_log_p)", "sample.mean_log_p)")],
    [Case("model.causal_attention", "F.dropout(weights, dropout) @ v", "weights @ v",
          test="test_dropout_acts_at_every_site_in_training_and_nowhere_else[manual]"),
     Case("objectives.meap", "return mask(inputs, mask_ratio, tok, rng), targets",
          "inputs = mask(inputs, mask_ratio, tok, rng)\n"
          "    return inputs, np.append(inputs[1:], targets[-1])"),
     Case("objectives.fim", "rng.random() < spm_rate", "rng.random() > spm_rate",
          test="test_each_row_of_a_short_document_has_its_probability"),
     Case("the text that is held out stays so", "HELD_OUT = 0.05", "HELD_OUT = 0.001", "data.py"),
     Case("tokens hold the whole text", "encode_ordinary(part)", "encode_ordinary(part.lower())", "data.py"),
     Case(FLAGS_FILE, "", "--objective fim --preset laptop", FLAGS_FILE)],
    [Case("model.causal_attention", "(q / math.sqrt(q.shape[-1]))", "q"),
     Case("objectives.meap", "return mask(inputs, mask_ratio, tok, rng), targets",
          "return mask(inputs, mask_ratio, tok, rng).tolist(), targets.tolist()"),
     Case("objectives.fim", "tok, rng, max_document_tokens)", "tok, rng)",
          test="test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end[code]")],
    [Case("objectives.mask", DRAW, "np.roll(ordinary, rng.integers(len(ordinary) + 1))"),
     Case("objectives.fim", "return ntp(np.array(row), tok, rng)", "return row[:-1], row[1:]",
          test="test_any_objective_keeps_the_contract[fim]")],
    [Case("objectives.mask", "return masked", "return masked.tolist()"),
     Case("objectives.fim", "row = []", "row, fim_rate = [], rng.random() < fim_rate",
          test="test_each_document_has_its_own_coin")],
]
RIGHT = [Case("model.rotate", "return x * cos + x.roll(x.shape[-1] // 2, -1) * sin", LITERAL),
         Case("model.causal_attention", "(q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)",
              "q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])"),
         Case("objectives.mask", DRAW, "rng.choice(ordinary, len(ordinary), replace=False)"),
         Case(FLAGS_FILE, "", "--objective fim_spm --fim-rate 0.9 --spm-layout joint\n", FLAGS_FILE)]


# In each round these tasks and what they need are as in this project, and all other functions of their labs,
# or of lab 5, are empty. Labs 2 and 3 are apart: other labs' tests use a tokenizer, lab 3's use rows of FIM.
ALONE = [["model.causal_attention", "sample.infill_prompt", "objectives.fim", "lab/corpora.Markov.infill"],
         ["model.rotate", "sample.PromptCache.cut_back_to", "objectives.fim_prompt"],
         ["model.causal_mask", "sample.best_first", "objectives.split"],
         ["objectives.mask", "data.learn_bpe", *(task.name for task in LABS[7].tasks)]]


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
    """What is found in WRONG's rounds, in RIGHT, where meap is as it was, and in ALONE's, in this order."""
    def change(cases):
        names = ["objectives.meap"] * (cases is RIGHT) + [case.task for case in cases]
        return judge(project(*cases), names, {case.task: case.test for case in cases})

    def leave_alone(names):
        folder, written = project(), {*names, *(need for name in names for need in TASKS[name][1].needs)}
        labs = {5, *(TASKS[name][0] for name in names)}
        empty = [(number, task) for number, task in TASKS.values()
                 if number in labs and task.name not in written and course.function_of(task)]
        for number, task in empty:
            course.blank(folder, task, number)
        (folder / FLAGS_FILE).write_text("# nothing yet\n")
        return judge(folder, [*names, *(task.name for _, task in empty), FLAGS_FILE])

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(change, [*WRONG, RIGHT]), *pool.map(leave_alone, ALONE)]


@pytest.mark.parametrize("number, case", [(n, case) for n, part in enumerate(WRONG) for case in part])
def test_a_wrong_solution_fails_and_is_told_in_which_test(found, number, case):
    assert found[number][case.task].startswith("test_")


def test_other_right_solutions_pass(found):
    assert not any(found[len(WRONG)].values()), found[len(WRONG)]


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_a_task_passes_without_the_others_and_fails_while_it_is_empty(found, number):
    for name, told in found[len(WRONG) + 1 + number].items():
        empty = "no flags, expected only" if name == FLAGS_FILE else "is not written yet"
        assert told == "" if name in ALONE[number] else empty in told, name


def test_every_task_has_a_wrong_solution_and_every_lab_two():
    wrong = [case.task for part in WRONG for case in part]
    assert set(wrong) == set(TASKS)
    assert all(sum(wrong.count(task.name) for task in lab.tasks) >= 2 for lab in LABS.values())


# Tests of a single function, for those which the tests of their file only call through others

BYTES = Tokenizer.bytes()


def parts(text, places):
    return Counter((text[:i], text[i:j], text[j:]) for i, j in map(sorted, product(places, repeat=2)))


@pytest.mark.parametrize("draw, expected", [
    (lambda rng: np.flatnonzero(objectives.mask(WINDOW, 0.25, BYTES, rng) == BYTES.mask),
     Counter(combinations((1, 2, 4, 6, 7), 2))),  # int(9 * 0.25) of the five ordinary tokens
    (lambda rng: objectives.split("ab", rng), parts("ab", range(3))),
    (lambda rng: objectives.split("a\n\nb\n", rng, "line"), parts("a\n\nb\n", (0, 2, 3, 5)))],
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
    tok, rng, texts = BYTES, np.random.default_rng(1), documents("markov", 300, seed=1)
    for text in texts:
        ids = np.array([*tok.encode(text), tok.eot, *tok.encode("x" * 9)])  # with room for the whole example
        objectives.OBJECTIVES[config.objective](ids, tok, rng, **config.knobs)
    assert sum(kept) > len(texts) / 10


# The folder of a student, from start to check

def test_from_start_to_full_marks_on_the_command_line(tmp_path, capsys):
    """Lab 6: solved, in a folder whose tests and checker do not count; and as started."""
    for name in ("right", "empty"):
        course.main(["start", "6", str(tmp_path / name)])
    assert "write: " + ", ".join(task.name for task in LABS[6].tasks) + "\n" in capsys.readouterr().out
    text = (tmp_path / "empty/sample.py").read_text("utf-8")
    assert text.count('raise NotImplementedError("lab 6: ') == 3
    for path in (["infill_prompt"], ["PromptCache", "cut_back_to"], ["best_first"]):
        ours, theirs = (course.find(t, path) for t in ((course.ROOT / "sample.py").read_text("utf-8"), text))
        assert theirs.body[0].value.value == ours.body[0].value.value and len(theirs.body) == 2
        assert ast.dump(theirs.args) == ast.dump(ours.args)
    (tmp_path / "right/sample.py").write_text((course.ROOT / "sample.py").read_text("utf-8"), "utf-8")
    for path in (*tmp_path.glob("right/tests/**/test_*.py"), *tmp_path.glob("right/lab/*.py")):
        path.write_text("def test_everything(): assert False\n")

    def check(*arguments):
        done = subprocess.run([sys.executable, "-m", "lab.course", "check", "6", *arguments], cwd=course.ROOT,
                              capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, done.stdout

    code, said = check(str(tmp_path / "right"))
    assert code == 0 and said.endswith("lab 6, editor: 6 of 6 points\n"), said
    code, said = check(str(tmp_path / "empty"), str(tmp_path / "none"), "--no-mark", "--json")
    empty, none = json.loads(said)
    assert code == 1 and "no folder of lab 6" in none["error"] and none["points"] == empty["points"] == 0
    assert "infill_prompt is not written yet" in empty["found"][0]["text"] and not empty["passed"]


@pytest.mark.parametrize("found, mark, flags, code, said", [
    ("", True, [], 0, "5 of 5 points"), ("", False, [], 1, "3 of 5 points"), ("wrong", True, [], 1, "0 of 5"),
    ("", False, ["--no-mark"], 0, "3 of 3 points, without the mark"),
    ("", True, ["lab3"], 0, "lab3     5 of 5      1     1          1     2")])
def test_check_exits_with_0_only_if_all_points_are_reached(monkeypatch, tmp_path, capsys, found, mark, flags,
                                                           code, said):
    monkeypatch.chdir(tmp_path)
    course.main(["start", "3", "lab3"])
    monkeypatch.setattr(course, "judge_tasks", lambda copy, number, tasks: {t.name: found for t in tasks})
    monkeypatch.setattr(course, "judge_mark", lambda *_: (mark, ""))
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "3", "lab3", *flags])
    assert stop.value.code == code and said in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("body, told", [
    ("import os; os._exit(0)", "with status 0"), ("import sys; sys.exit()", "SystemExit")])
def test_whatever_meap_does_the_grade_of_mask_stands(project, body, told):
    folder = project(Case("objectives.meap", "    return", f"    {body}\n    return"))
    tasks = [TASKS[name][1]._replace(tests=test) for name, test in (  # quick ones, which need no torch
        ("objectives.mask", "test_the_papers_numbers_are_the_defaults"),
        ("objectives.meap", "test_any_objective_keeps_the_contract[meap]"))]
    found = course.judge_tasks(folder, 3, tasks)
    assert found["objectives.mask"] == "" and told in found["objectives.meap"]
    assert "\n" not in found["objectives.meap"]


def test_what_never_ends_and_prints_a_lot_is_a_line(project, monkeypatch):
    monkeypatch.setattr(course, "SECONDS", 3)
    folder = project(Case("objectives.meap", "    return", "    while True: print('x' * 1000)\n    return"))
    assert judge(folder, ["objectives.meap"]) == {
        "objectives.meap": "takes more than 3 seconds: is there a loop that never ends?"}


@pytest.mark.parametrize("old, new, told", [
    ("import inspect", "import nonsuch", "No module named 'nonsuch'"), ("def mask(", "def masked(", "'mask'"),
    ("import inspect", "raise SystemExit", "exit"), ("import inspect", "import inspect\0", "null bytes")])
def test_a_file_that_cannot_be_imported_is_a_line_for_each_task(project, old, new, told):
    tasks = [task._replace(tests="test_a_worked_example") for task in LABS[3].tasks]
    found = course.judge_tasks(project(Case("objectives.mask", old, new, "objectives.py")), 3, tasks)
    assert len(found) == 2 and all(told in line and "\n" not in line for line in found.values()), found


@pytest.mark.parametrize("message, line", [
    ("AssertionError: assert [1, 2] == [1, 3]\n\n  At index 1 diff: 2 != 3\n  Use -v to get more diff",
     "got [1, 2], expected [1, 3] At index 1 diff: 2 != 3"),
    ("AssertionError: why\nassert 1 == 2", "why got 1, expected 2"),
    ("NotImplementedError: lab 3: mask", "mask is not written yet"), ("ValueError: no", "ValueError: no")])
def test_a_failure_is_a_line_with_what_was_got_and_expected(message, line):
    assert course.told(message) == line


@pytest.mark.parametrize("arguments, message", [
    ("start 8 new", "invalid choice: 8"), ("begin 3 new", "invalid choice: 'begin'"),
    ("start 3 here", "here exists already: expected a new folder"), ("mark 3 a b", "expected one folder"),
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


@pytest.mark.parametrize("recalls, value", [([0.16, 0.95], 0.95), ([0.2, 0.3, 0.1, 0.2], 0.3)])
def test_a_seed_that_looks_nothing_up_gets_three_more_tries(monkeypatch, tmp_path, recalls, value):
    of_seed = {f"records-0.15-{seed}": {"recall": recall} for seed, recall in enumerate(recalls, 1)}
    monkeypatch.setattr(course, "claims_run", lambda run, out: of_seed[run])
    assert course.recall(tmp_path) == value


def test_a_mark_has_points_within_its_bounds_alone(monkeypatch, tmp_path):
    ran = 0, ""
    monkeypatch.setattr(course, "run", lambda *_: ran)
    for value, passed in ((1.2, True), (1.1, False), (1.4, True), (1.5, False), (math.nan, False)):
        monkeypatch.setitem(LABS, 3, LABS[3]._replace(mark=LABS[3].mark._replace(low=1.2, high=1.4)))
        (tmp_path / "mark.json").write_text(json.dumps({"value": value}))
        assert course.judge_mark(3, tmp_path, tmp_path) == (
            passed, f"{value:.4f}, expected at least 1.2 and at most 1.4")
    for ran, line in (((1, "a\n 3%|  \rthe loss is nan\n"), "no figure, status 1: the loss is nan"),
                      ((None, ""), "takes more than 900 seconds")):
        assert course.judge_mark(3, tmp_path, tmp_path) == (False, line)


def test_labs_2_and_6_have_marks_that_need_no_training(monkeypatch, tmp_path):
    """A learner that counts all pairs again is too slow; a cache that forgets nothing changes the output."""
    course.measure(2, tmp_path)
    assert json.loads((tmp_path / "mark.json").read_text())["value"] > LABS[2].mark.low
    with pytest.raises(ValueError, match="expected at most 1"):
        course.bytes_per_token(tmp_path, most=1)

    def forget_nothing(self, prompt):
        self.ids, self.length = prompt, min(self.length, len(prompt) - 1)

    monkeypatch.setattr(sample.PromptCache, "cut_back_to", forget_nothing)
    with pytest.raises(ValueError, match="as without it"):
        course.measure(6, tmp_path)


def test_the_leaderboards_figure_is_bits_over_bytes_of_held_out_programs(monkeypatch, tmp_path):
    model = small_model(BYTES.n_vocab, block_size=1000)
    text, = held_out_programs(1, seed=1)
    ids = torch.tensor([BYTES.eot, *text.encode()])
    nats = model(ids[None, :-1], ids[None, 1:])[1].item()
    figure = course.programs_bpb(save_run(tmp_path / "run", model, BYTES), n=1)
    assert figure == pytest.approx(nats / math.log(2), rel=1e-4)
