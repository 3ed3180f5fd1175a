"""The labs: empty, no task passes; as they are in this project, all do, each with the other tasks empty; the
wrong solutions below fail and are told why, right ones pass; what a student's file may do to the process that
grades it."""
import ast
import inspect
import io
import json
import math
from collections import Counter
from contextlib import redirect_stdout
from importlib import import_module
from itertools import combinations, product
from operator import attrgetter
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
from lab import course, probes
from lab.corpora import MARKOV, documents, held_out_programs
from lab.course import FLAGS_FILE, LABS
from model import GPTConfig

TASKS = {task.name: (number, task) for number, lab in LABS.items() for task in lab.tasks}
TO_WRITE = [name for name, (_, task) in TASKS.items() if task.points and name != FLAGS_FILE]


class Case(NamedTuple):
    """A solution, wrong or right, of a task: in its function, or in another one, old text -> new text. test:
    one that tells, where the task's own do not and all tests of the file decide, or where others are slow."""
    task: str
    old: str
    new: str
    function: str = ""
    test: str = ""


MASK, DRAW = "objectives.mask", "rng.permutation(ordinary)"
MEAP = "return mask(inputs, mask_ratio, tok, rng), targets"
CONTRACT = "test_any_objective_keeps_the_contract"
ROWS = "test_each_row_of_a_short_document_has_its_probability"
COIN = "test_each_document_has_its_own_coin"  # the fastest of fim's
SCALED = "(q / math.sqrt(q.shape[-1]))"
WRONG = [Case(task, *change) for task, changes in {
    "model.causal_mask": [("S - T + 1", "S - T + 2"), ("S - T + 1", "1"), (", device=like.device", "")],
    "model.causal_attention": [(SCALED, "q"), ("F.dropout(weights, dropout) @ v", "weights @ v"),
        ("F.dropout(weights, dropout) @ v", "F.dropout(weights @ v, dropout)"),
        ("F.dropout(weights, dropout) @ v", "(weights * (torch.rand_like(weights) >= dropout)) @ v"),
        ("return F", "weights = F.dropout(weights, dropout)\n    return F")],
    "model.rotate": [("x * cos + x", "x * cos - x"), ("x.shape[-1] // 2", "1")],
    "data.learn_bpe": [("pair_count[pair] += frequency[w]", "pair_count[pair] += 1"),
        ("for pair in change:", "for pair in [pair for pair in change if new in pair]:"),
        ("len(vocabulary) < n", "len(vocabulary) <= n"), ("count == 0", "count >= -1"),
        ("heapq.heapify(heap)", "pass")],
    MASK: [("len(inputs) * ratio", "len(ordinary) * ratio"),
        (DRAW, "np.random.choice(ordinary, len(ordinary), replace=False)"),
        (DRAW, "np.roll(ordinary, rng.integers(len(ordinary) + 1))"),
        ("return masked", "return masked.tolist()"), ("inputs.copy()", "inputs"),
        ("int(len(inputs) * ratio)", "round(len(inputs) * ratio)")],
    "objectives.meap": [(MEAP, MEAP.replace("targets", "targets.tolist()"), "", f"{CONTRACT}[meap]"),
        (MEAP, MEAP.replace(", targets", ", inputs")), ("mask_ratio, tok, rng)", "0.15, tok, rng)")],
    "objectives.fim_prompt": [("tok.mid, *prefix]", "*prefix, tok.mid]"),
        ("return [tok.pre, tok.suf, *suffix, tok.mid, *prefix]",
         "prefix[:0] = [tok.pre, tok.suf, *suffix, tok.mid]\n    return prefix")],
    "objectives.split": [("range(1, len(text)) if", "range(1, len(text) + 1) if"),
        ("rng.integers(0, len(text) + 1, 2)", "__import__('random').choices(range(len(text) + 1), k=2)"),
        ("len(text) + 1, 2", "len(text), 2"), ("rng.random() < 0.25", "rng.random() < 0.75"),
        ("len(text)]", "len(text)]\n        places = [*{*places}]")],
    "objectives.fim": [("rng.random() < spm_rate", "rng.random() > spm_rate", "", ROWS),
        ("tok, rng, max_document_tokens)", "tok, rng)", "",
         "test_an_example_holds_its_documents_whole_text_unless_it_crosses_the_rows_end[code]"),
        ("return ntp(np.array(row), tok, rng)", "return row[:-1], row[1:]"),
        ("np.array(row)", "np.array(row, np.int32)"),
        ("row = []", "row, fim_rate = [], rng.random() < fim_rate", "", COIN),
        ("row = []", "row, spm_rate = [], float(rng.random() < spm_rate)", "", COIN)],
    "lab/corpora.Markov.infill": [("w[0] * self.P[a, s]", "w[0]"), ("powers[1:len(w)", "powers[:len(w) - 1"),
        ("prior[n:] ", "prior[n:]; w /= w.sum()"), (" if len(w) else 0", ""),
        ("enumerate(letters)", "enumerate(letters[-1:] * len(letters))"),
        ("powers[1:len(w)", "powers[1:len(prior) - n")],
    FLAGS_FILE: [("", "--objective fim --span line"), ("", "--objective fim --preset laptop"),
        ("", "--objective fim_psm --fim-rate 1")],
    "sample.infill_prompt": [("prefix[len(prefix) - for_prefix:]", "prefix[:for_prefix]"),
        ("block_size - 3 -", "block_size -"), ("if warn:", "if not warn:"), ("room < 1", "room < 0"),
        ("room // 3", "round(room / 3)"),
        ("tok.encode(newlines(suffix))", "tok.encode(newlines(prefix + suffix))[len(tok.encode(prefix)):]")],
    "sample.PromptCache.cut_back_to": [("len(ids) - 1", "len(ids)"), ("self.length, len", "len"),
        ("self.ids, self.length",
         "self.reused = sum(a == b for a, b in zip(self.ids, ids[:-1]))\n        self.ids, self.length")],
    "sample.best_first": [("(sample.ended != STOPPED, -sample.mean_log_p)", "-sample.mean_log_p"),
        ("-sample.mean_log_p", "-sample.mean_log_p * len(sample.text)"),
        ("-sample.mean_log_p", "-sample.mean_log_p / len(sample.text)")],
    "no position sees a later one": [
        ("F.pad(moving[:, :-1], (0, 0, 1, 0))", "F.pad(moving[:, 1:], (0, 0, 0, 1))", "model.shift_tokens")],
    "the text that is held out stays so": [("HELD_OUT *", "0.001 *", "data.is_held_out")],
    "tokens hold the whole text": [
        ("encode_ordinary(part)", "encode_ordinary(part.lower())", "data.Tokenizer.encode")]
}.items() for change in changes]
RIGHT = [
    *(Case(name, "", "", test=COIN if name == "objectives.fim" else "") for name in TO_WRITE),
    Case("model.causal_mask",
         'torch.full((T, S), float("-inf"), dtype=like.dtype, device=like.device).triu(S - T + 1)',
         "torch.ones(T, S).tril(S - T).log().to(like)"),
    Case("model.rotate", "return x * cos + x.roll(x.shape[-1] // 2, -1) * sin",
         "(a, b), (cos, _), (_, sin) = (part.chunk(2, -1) for part in (x, cos, sin))\n"
         "    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)"),  # as its docstring says
    Case("model.rotate", "rotations.to(x.dtype)", "rotations[:, None, :, :, :].expand(2, *x.shape)"),
    Case("model.causal_attention", f"{SCALED} @ k.transpose(-2, -1)",
         "q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])"),
    Case(MASK, DRAW, "rng.choice(ordinary, len(ordinary), replace=False)"),
    Case("sample.infill_prompt", "prefix[len(prefix) - for_prefix:]", "prefix[-for_prefix:]"),  # never 0
    *(Case(FLAGS_FILE, "", f"# mine\n{flags}\n") for flags in (
        "--objective fim --fim-rate 0.9", "--objective fim_spm --fim-rate 0.9 --spm-layout joint"))]


@pytest.fixture
def change(monkeypatch, tmp_path):
    """change(name, old, new): replaces text in a function until the test ends; no old: all of its text."""
    def change(name, old, new):
        if name == FLAGS_FILE:
            (tmp_path / FLAGS_FILE).write_text(new)
            return monkeypatch.setattr(course, "ROOT", tmp_path)
        module, *path = name.split(".")
        module = import_module(module.replace("/", "."))
        function, made = attrgetter(".".join(path))(module), {}
        text = inspect.getsource(function)
        assert old in text, f"{name} has no {old!r}: adapt the solution to the code"
        text = text.replace(old, new) if old else new
        exec(f"if True:\n{text}" if text[0] == " " else text, vars(module), made)
        monkeypatch.setattr(function, "__code__", made[path[-1]].__code__)
    return change


@pytest.fixture
def judge(monkeypatch, tmp_path, documents, tok, stream, corpora):
    """judge(task, test) -> what a grade says of it. The tests run in this process and with the fixtures that
    are there: with a process and a copy of the project for each, they would take minutes."""
    values = {"documents": documents, "tok": tok, "stream": stream, "corpora": corpora}
    fixtures = type("Fixtures", (), {name: pytest.fixture(lambda self, value=value: value, scope="session")
                                     for name, value in values.items()})()

    def run(arguments, *_):
        more = "--noconftest -p no:faulthandler -p no:unraisableexception"  # the last is slow
        with redirect_stdout(io.StringIO()) as printed:
            status = pytest.main([*arguments[2:], *more.split()], plugins=[fixtures])
        return status, printed.getvalue().splitlines()

    monkeypatch.chdir(course.ROOT)
    monkeypatch.setattr(course, "run", run)
    return lambda task, test="": course.run_tests(
        tmp_path, TASKS[task][0], TASKS[task][1]._replace(tests=test or TASKS[task][1].tests))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """{function that a lab leaves empty: its text there}"""
    root = tmp_path_factory.mktemp("labs")
    for number in range(1, 7):
        course.start(number, root / str(number))
    return {name: ast.unparse(course.find(root / str(TASKS[name][0]), name)[1]) for name in TO_WRITE}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.task.rpartition(".")[2])
def test_a_wrong_solution_fails_and_is_told_in_which_test(judge, change, case):
    change(case.function or case.task, case.old, case.new)
    told = judge(case.task, case.test)
    assert told.startswith("test_") and "\n" not in told
    if case.new == "*prefix, tok.mid]":
        assert "got '<PRE><SUF>cab<MID>', expected '<PRE><SUF>c<MID>ab'" in told


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.task.rpartition(".")[2])
def test_a_right_solution_passes_while_the_other_functions_are_empty(judge, change, empty, case):
    """... but for those that it needs."""
    for name in {*empty} - {case.task, *TASKS[case.task][1].needs}:
        if TASKS[name][0] == TASKS[case.task][0]:
            change(name, "", empty[name])
    if case.old or case.task == FLAGS_FILE:
        change(case.task, case.old, case.new)
    assert judge(case.task, case.test) == ""


@pytest.mark.parametrize("name", [*TO_WRITE, FLAGS_FILE])
def test_a_task_that_is_empty_says_so(judge, change, empty, name):
    change(name, "", empty.get(name, "# nothing yet\n"))
    if name in empty:
        ours, theirs = course.find(course.ROOT, name)[1], ast.parse(empty[name]).body[0]
        assert ast.dump(ours.args) == ast.dump(theirs.args) and len(theirs.body) == 2
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
    assert ("no flags, expected only" if name == FLAGS_FILE else "is not written yet") in judge(name)


# Tests of a single function, for those which the tests of their file only call through others

BYTES = Tokenizer.bytes()
WINDOW = np.array([BYTES.pre, 1, 2, BYTES.suf, 3, BYTES.mid, 4, 5, BYTES.eot])


def parts(text, cuts):
    return Counter((text[:i], text[i:j], text[j:]) for i, j in map(sorted, cuts))


TEXT = "a\n\nb\n"
BY_CHAR, BY_LINE = parts(TEXT, product(range(6), repeat=2)), parts(TEXT, combinations((0, 2, 3, 5), 2))


@pytest.mark.parametrize("draw, expected", [
    (lambda rng, window: np.flatnonzero(objectives.mask(window, 0.3, BYTES, rng) == BYTES.mask),
     Counter(combinations((1, 2, 4, 6, 7), 2))),  # int(9 * 0.3) of the five ordinary tokens
    (lambda rng, _: objectives.split("ab", rng), parts("ab", product(range(3), repeat=2))),
    (lambda rng, _: objectives.split(TEXT, rng, "line"), BY_LINE),
    (lambda rng, _: objectives.split(TEXT, rng, "mixed"), BY_CHAR + BY_LINE + BY_LINE),  # 36 to 6 + 6
    (lambda rng, _: objectives.split("", rng, "line"), Counter([("", "", "")]))],
    ids=["mask", "split", "split_lines", "split_mixed", "split_nothing"])
def test_each_outcome_has_its_share_and_all_randomness_comes_in_as_rng(draw, expected):
    n, window = 300 * expected.total(), WINDOW.copy()
    drawn, again = ([tuple(draw(rng, window)) for _ in range(n)]
                    for rng in map(np.random.default_rng, (0, 0)))
    assert window.tolist() == WINDOW.tolist(), "the argument stays as it was: targets share its memory"
    assert drawn == again
    shares = {outcome: round(count / n * expected.total()) for outcome, count in Counter(drawn).items()}
    assert shares == dict(expected)


@pytest.mark.parametrize("order, layout, expected", [
    ("psm", None, "<PRE>ab<SUF>c<MID>"), ("spm", "swapped", "<PRE>c<SUF>ab<MID>"),
    ("spm", "labelled", "<SUF>c<PRE>ab<MID>"), ("spm", "joint", "<PRE><SUF>c<MID>ab")])
def test_a_prompt_in_each_layout(order, layout, expected):
    prefix, suffix = [*b"ab"], [*b"c"]
    prompt = objectives.fim_prompt(prefix, suffix, BYTES, order, layout)
    assert "".join(BYTES.names.get(i, chr(i)) for i in prompt) == expected
    assert (prefix, suffix) == ([*b"ab"], [*b"c"]), "the arguments stay as they were"


def test_a_middle_that_is_longer_than_any_of_the_prior_is_nan():
    """The prior allows one letter: of a middle of two, what follows the second has no probability."""
    text = documents("markov", 1, seed=1)[0]
    prior = np.array([0.5, 1.5])
    p = MARKOV.infill(text[0], text[1:4], text[1], prior)
    assert np.isfinite(p).all(1)[[0, 2, 3]].tolist() == [True, False, False] and prior.tolist() == [0.5, 1.5]


def test_meap_is_ntp_with_masked_inputs():
    for rng, same in zip(*(map(np.random.default_rng, range(9)) for _ in "ab")):
        inputs, targets = objectives.meap(np.append(WINDOW, 8), BYTES, rng, mask_ratio=0.25)
        assert inputs.tolist() == objectives.mask(WINDOW, 0.25, BYTES, same).tolist()
        assert targets.tolist() == [*WINDOW[1:], 8]


def test_a_context_without_room_for_text_is_refused():
    """Beside 20 new tokens and 3 sentinels, a context of 24 holds a letter, beside 19 two: the suffix, with a
    third of the room rounded down, has none. Prefix and suffix are encoded apart."""
    model = SimpleNamespace(config=GPTConfig(60, 24), prompt=lambda prefix, suffix: prefix + suffix)
    assert sample.infill_prompt(model, BYTES, "ab", "cd", 20) == [*b"b"]
    assert sample.infill_prompt(model, BYTES, "ab", "cd", 19) == [*b"ab"]
    assert sample.infill_prompt(model, Tokenizer([*BYTES.vocabulary, b"bc"]), "ab", "cd", 9) == [*b"abcd"]
    for text in ("ab", ""):
        with pytest.raises(ValueError):
            sample.infill_prompt(model, BYTES, text, text, 21)


def test_a_cache_keeps_what_two_prompts_begin_with():
    """... but for the last token, whose logits are needed."""
    cache = sample.PromptCache(GPTConfig(60, 24))
    for prompt, reused in (([1, 2, 3], 0), ([1, 2, 4], 2), ([1, 2, 4], 2), ([1, 2], 1), ([1, 2, 7], 2),
                           ([9, 2], 0), ([8, 2, 3], 0)):
        cache.cut_back_to(prompt)
        assert (cache.reused, cache.length, cache.ids) == (reused, reused, prompt)
        cache.length = len(prompt)  # the model has seen the prompt
    cache.length = 1  # ... but failed on it
    cache.cut_back_to([8, 2, 3, 4])
    assert (cache.reused, cache.length) == (1, 1)


def test_lab_5s_flags_show_middles_that_join_a_suffix(monkeypatch, tmp_path):
    """On markov, at least every tenth document is an SPM example with a prefix and a suffix."""
    if not (course.ROOT / FLAGS_FILE).exists():  # in the project itself
        (tmp_path / FLAGS_FILE).write_text("--objective fim --fim-rate 0.9")
        monkeypatch.setattr(course, "ROOT", tmp_path)
    config, _ = train.read_arguments(course.own_flags().split())
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

def test_from_start_to_full_marks(tmp_path, capsys, monkeypatch):
    """Lab 2, as started, then solved, in a folder whose tests and checker do not count. One test stands for
    all of the file."""
    monkeypatch.setattr(course, "SECONDS", 600)
    tasks = [task._replace(tests=f"test_data.py::{task.tests}") for task in LABS[2].tasks]
    lab = LABS[2]._replace(tasks=tasks, test_file="test_data.py::test_a_worked_example")
    monkeypatch.setitem(LABS, 2, lab)
    course.main(["start", "2", str(tmp_path / "lab2")])
    assert "to write: data.learn_bpe\n" in capsys.readouterr().out
    (tmp_path / "lab2/data.py").write_text((course.ROOT / "data.py").read_text("utf-8"), "utf-8")
    for path in (*tmp_path.glob("lab2/tests/**/test_*.py"), *tmp_path.glob("lab2/lab/*.py")):
        path.write_text("def test_everything(): assert False\n")
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "2", str(tmp_path / "lab2")])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.endswith("lab 2, tokens: 6 of 6 points\n"), shown


@pytest.mark.parametrize("found, mark, flags, code, said", [
    ("", True, [], 0, "lab 3, MEAP: 5 of 5 points"), ("", False, [], 1, "lab 3, MEAP: 3 of 5 points"),
    ("wrong", True, [], 1, "not yet  0 of 1  objectives.meap: wrong; this needs objectives.mask: make that"),
    ("wrong", True, [], 1, "not yet  0 of 1  all of test_objectives.py: needs the functions\n"),
    ("", False, ["--no-mark"], 0, "lab 3, MEAP: 3 of 3 points, without the mark\n"),
    ("", True, ["none"], 1, "  5 of 5  objectives.mask 1  objectives.meap 1  all of "
                            "test_objectives.py 1  mark 2\n"
                            "none   0 of 0  none: no folder of lab 3 (it has no lab3.json); make one with "),
    ("wrong", True, ["none", "--json"], 1, '"text": "wrong"')])
def test_check_exits_with_0_only_if_all_points_are_reached(monkeypatch, tmp_path, capsys, found, mark, flags,
                                                           code, said):
    monkeypatch.chdir(tmp_path)
    course.main(["start", "3", "lab3"])
    monkeypatch.setattr(course, "run_tests", lambda *_: found)
    monkeypatch.setattr(course, "judge_mark", lambda *_: (mark, ""))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "3", "lab3", *flags])
    shown = capsys.readouterr().out
    assert stop.value.code == code and said in shown
    assert "--json" not in flags or [len(student["found"]) for student in json.loads(shown)] == [4, 0]


@pytest.mark.parametrize("task, old, new, told", [
    (0, DRAW, "np.random.choice(ordinary, len(ordinary), False)", "comes_in_as_rng[mask]: got [("),
    (1, "return mask(", "import os; os._exit(0)\n    (", "with status 0"),
    (1, "return mask(", "import sys; sys.exit()\n    (", "SystemExit"),
    (1, "return mask(", "while True: print('x' * 999)\n    (", "4 seconds: is there a loop that never ends?"),
    (0, "import inspect", "import nonsuch", "cannot be imported: ModuleNotFoundError: No module named 'nons"),
    (0, "import inspect", "raise SystemExit", "xit"), (0, "import inspect", "import re\0", "null bytes")])
def test_whatever_a_file_does_is_a_line(tmp_path, capsys, monkeypatch, task, old, new, told):
    """While it lasts, stderr says so. With CI set, pytest would look for hours for why two lists differ."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(course, "SECONDS", 4 if "while" in new else 600)
    monkeypatch.setattr(course, "PAUSE", 3)
    course.copy_project(tmp_path / "project")
    text = (tmp_path / "project/objectives.py").read_text("utf-8")
    assert old in text
    (tmp_path / "project/objectives.py").write_text(text.replace(old, new, 1), "utf-8")
    tests = LABS[3].tasks[task].tests if old == DRAW else f"{CONTRACT}[meap]"
    line = course.run_tests(tmp_path / "project", 3, LABS[3].tasks[task]._replace(tests=tests))
    assert told in line and "\n" not in line and str(tmp_path) not in line, line
    assert "while" not in new or capsys.readouterr().err.startswith("objectives.meap: 3 s, ")


def test_of_an_endless_output_only_the_end_is_kept(tmp_path):
    status, lines = course.run(["-c", "while True: print('x' * 999)"], tmp_path, 2, "")
    assert status is None and 0 < sum(map(len, lines)) <= 2**20


@pytest.mark.parametrize("folder, message", [
    (".", "File exists: '.'"),
    (f"{course.ROOT}/lab3", "lies in the project: expected another place, such as ../lab3")])
def test_a_lab_is_started_in_a_new_folder_outside_the_project(tmp_path, monkeypatch, capsys, folder, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        course.main(["start", "3", folder])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


# The marks, without their trainings

METRICS = dict(recall=0.93, psm_saved=1.0, bayes_psm_saved=4.0, spm_saved=3.0, bayes_spm_saved=4.0,
               spm_end=0.6, spm_another=0.2)


@pytest.mark.parametrize("number, flags, value", [
    (1, {"objective": "ntp", "data": "programs"}, 0.5), (3, {"objective": "meap", "data": "records"}, 0.93),
    (4, {"objective": "fim", "steps": 400}, 0.75), (5, {"objective": "fim_spm", "steps": 400}, 0.4)])
def test_a_mark_is_read_off_the_figures_of_a_training_of_minutes(monkeypatch, tmp_path, number, flags, value):
    def trained(config, checkpoint, measure):
        assert {name: getattr(config, name) for name in flags} == flags
        assert config.steps * config.batch_size * config.block_size <= 600 * 4096  # of 900 in the default run
        assert not measure or measure(None, None, config.steps) == {}  # metrics.jsonl cannot hold all of them
        return {"held_out_bpb": 0.5}

    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(probes, "PROBES", dict.fromkeys(("records", "markov"), lambda *_: METRICS))
    monkeypatch.setattr(course, "ROOT", tmp_path)
    (tmp_path / FLAGS_FILE).write_text("--objective fim_spm")
    course.measure(number, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mark.json").read_text())["value"] == pytest.approx(value)


def test_a_mark_has_points_within_its_bounds_alone(monkeypatch, tmp_path):
    ran = 0, []
    monkeypatch.setattr(course, "run", lambda *_: ran)
    for value, passed in ((0.15, True), (0.14, False), (0.25, True), (0.26, False), (math.nan, False)):
        (tmp_path / "mark.json").write_text(json.dumps({"value": value}))
        assert course.judge_mark(1, tmp_path, tmp_path) == (
            passed, f"{value:.4f}, expected at least 0.15 and at most 0.25")
    for ran, line in (((1, ["a", " 3%|", "the loss is nan"]), "no figure, status 1: the loss is nan"),
                      ((None, []), "takes more than 600 seconds")):
        assert course.judge_mark(1, tmp_path, tmp_path) == (False, line)


def test_labs_2_and_6_have_marks_that_need_no_training(tmp_path):
    """A learner that counts all pairs again after each merge is too slow."""
    course.measure(6, tmp_path)
    assert json.loads((tmp_path / "mark.json").read_text())["value"] > LABS[6].low
    with pytest.raises(ValueError, match="expected at most 1"):
        course.bytes_per_token(tmp_path, most=1)


def test_the_leaderboards_figure_is_bits_over_bytes_of_held_out_programs(tmp_path):
    model = small_model(BYTES.n_vocab, block_size=1000)
    text, = held_out_programs(1, seed=1)
    ids = torch.tensor([BYTES.eot, *text.encode()])
    nats = model(ids[None, :-1], ids[None, 1:])[1].item()
    figure = course.programs_bpb(save_run(tmp_path / "run", model, BYTES), n=1)
    assert figure == pytest.approx(nats / math.log(2), rel=1e-4)
