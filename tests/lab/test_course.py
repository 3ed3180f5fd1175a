"""The labs: empty, no task passes; as they are in this project, all do; each of the wrong solutions below
fails its task and is told why; and what a student's file may do to the process that grades it."""
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from lab.corpora import documents
from lab.course import FLAGS_FILE, LABS
from model import GPTConfig

TASKS = {task.name: task for lab in LABS.values() for task in lab.tasks}


class Wrong(NamedTuple):
    """A mistake in a task's function, or in a whole file: old text -> new text; what the student is told."""
    task: str
    old: str
    new: str
    told: str
    file: str = ""


# Each round is graded at once, in one process: no task in it needs another one of it.
ROUNDS = [
    [Wrong("model.causal_mask", "S - T + 1", "S - T + 2", "lets position i see i + 1"),
     Wrong("model.rotate", "x * cos + x", "x * cos - x", "the same way"),
     Wrong("data.learn_bpe", "pair_count[pair] += frequency[w]", "pair_count[pair] += 1", "word's frequency"),
     Wrong("objectives.mask", "len(inputs) * ratio", "len(ordinary) * ratio", "T the length of inputs"),
     Wrong("objectives.fim_prompt", "tok.mid, *prefix]", "*prefix, tok.mid]", "token by token"),
     Wrong("objectives.split", "len(places), 2)", "len(places) - 1, 2)", "n + 1 places"),
     Wrong("lab/corpora.Markov.infill", "w[0] * self.P[a, s]", "w[0]", "<EOT> by that letter"),
     Wrong(FLAGS_FILE, "", "--objective fim --spm-rate 0", "no SPM example"),
     Wrong("sample.infill_prompt", "prefix[len(prefix) - for_prefix:]", "prefix[:for_prefix]", "the hole"),
     Wrong("sample.PromptCache.cut_back_to", "len(ids) - 1", "len(ids)", "always computed again"),
     Wrong("sample.best_first", "(sample.ended != STOPPED, -sample.mean_log_p)", "-sample.mean_log_p",
           "without <EOT>")],
    [Wrong("model.causal_mask", "S - T + 1", "1", "the last of S positions"),
     Wrong("no position sees a later one", "F.pad(moving[:, :-1], (0, 0, 1, 0))",
           "F.pad(moving[:, 1:], (0, 0, 0, 1))", "after t", "model.py"),
     Wrong("model.rotate", "x.shape[-1] // 2", "1", "x[i] and x[i + D/2]"),
     Wrong("data.learn_bpe", "for pair in change:", "for pair in [pair for pair in change if new in pair]:",
           "both of its sides"),
     Wrong("objectives.mask", "inputs.copy()", "inputs", "targets share its memory"),
     Wrong("objectives.fim_prompt", "[tok.pre, *prefix, tok.suf, *suffix, tok.mid]",
           "[tok.pre, *suffix, tok.suf, *prefix, tok.mid]", "token by token"),
     Wrong("objectives.split", "rng.integers(0, len(places), 2)", "rng.choice(len(places), 2, replace=False)",
           "may fall on the same one"),
     Wrong("lab/corpora.Markov.infill", "self.powers[1:len(w), :, s]", "self.powers[:len(w) - 1, :, s]",
           "all ways to go on"),
     Wrong(FLAGS_FILE, "", "--objective fim --span line", "no SPM example"),
     Wrong("sample.infill_prompt", "block_size - 3 - max_new_tokens", "block_size - 3", "need room"),
     Wrong("sample.PromptCache.cut_back_to", "self.ids, self.length = ids, self.reused", "self.ids = ids",
           "length is what"),
     Wrong("sample.best_first", "-sample.mean_log_p)", "sample.mean_log_p)", "without <EOT>")],
    [Wrong("model.causal_attention", "(q / math.sqrt(q.shape[-1]))", "q", "divided by sqrt(D)"),
     Wrong("objectives.meap", "return mask(inputs, mask_ratio, tok, rng), targets",
           "inputs = mask(inputs, mask_ratio, tok, rng)\n"
           "    return inputs, np.append(inputs[1:], targets[-1])", "targets are not"),
     Wrong("objectives.split", "range(1, len(text)) if", "range(1, len(text) + 1) if", "each once"),
     Wrong("the text that is held out stays so", "HELD_OUT = 0.05", "HELD_OUT = 0.001", "are held out",
           "data.py"),
     Wrong("tokens hold the whole text", "encode_ordinary(part)", "encode_ordinary(part.lower())",
           "is not the text", "data.py")],
    [Wrong("model.causal_attention", "dim=-1", "dim=-2", "over the keys"),
     Wrong("objectives.meap", "mask(inputs, mask_ratio, tok, rng)", "mask(ids, mask_ratio, tok, rng)[:-1]",
           "inputs are masked"),
     Wrong("objectives.fim", "rng.random() < fim_rate", "np.random.default_rng(len(ids)).random() < fim_rate",
           "its own draw")],
    [Wrong("model.causal_attention", "    return F.dropout(weights, dropout) @ v, weights",
           "    weights = F.dropout(weights, dropout)\n    return weights @ v, weights", "without dropout"),
     Wrong("objectives.fim", "documents_in(ids, tok, rng, max_document_tokens)", "[ids.tolist()]",
           "an example of its own")],
    [Wrong("objectives.fim", "row = []", "ids[:1] = 0\n    row = []", "argument ids stays")],
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copies the project: project() -> a new folder with it."""
    def copy():
        folder = tmp_path_factory.mktemp("lab") / "project"
        course.copy_project(folder)
        return folder
    return copy


@pytest.fixture(scope="module")
def empty(project):
    """What is found in folders where all functions of several labs are empty. Lab 2 stands alone, since the
    others' tests need a tokenizer; so does lab 3, since lab 4's tests call meap."""
    def grade(numbers, folder):
        for number, task in ((number, task) for number in numbers for task in LABS[number].tasks):
            if task.name == FLAGS_FILE:
                (folder / FLAGS_FILE).write_text("# nothing yet\n")
            else:
                file, path = course.function_of(task)
                text = (folder / file).read_text("utf-8")
                (folder / file).write_text(course.blank(text, path, number), "utf-8")
        return course.judge_tasks(folder, [task for number in numbers for task in LABS[number].tasks])

    with ThreadPoolExecutor(2) as pool:
        first, second, third = pool.map(grade, ([2], [3], [1, 4, 5, 6]), [project() for _ in range(3)])
    return first | second | third


@pytest.fixture(scope="module")
def untouched(project):
    return course.judge_tasks(project(), list(TASKS.values()))


@pytest.fixture(scope="module")
def graded(project):
    """What is found in each of ROUNDS."""
    def grade(part, folder):
        for wrong in part:
            spoil(folder, wrong)
        return course.judge_tasks(folder, [TASKS[wrong.task] for wrong in part])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(grade, ROUNDS, [project() for _ in ROUNDS]))


def spoil(folder, wrong):
    if wrong.task == FLAGS_FILE:
        return (folder / FLAGS_FILE).write_text(wrong.new)
    file, path = (wrong.file, None) if wrong.file else course.function_of(TASKS[wrong.task])
    text = (folder / file).read_text("utf-8")
    lines, first, last = text.splitlines(keepends=True), 0, None
    if path:
        node = course.find(text, path)
        first, last = node.lineno - 1, node.end_lineno
    body = "".join(lines[first:last])
    assert wrong.old in body, f"{wrong.task} has no {wrong.old!r}: adapt the wrong solution to the code"
    lines[first:last] = [body.replace(wrong.old, wrong.new)]
    return (folder / file).write_text("".join(lines), "utf-8")


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.points], ids=lambda task: task.name)
def test_no_task_passes_while_its_function_is_empty(empty, task):
    told = empty[task.name]
    assert told.startswith("is not written yet" if course.function_of(task) else "ValueError: flags.txt")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_passes_in_the_project_as_it_is(untouched, task):
    assert untouched[task] is None


@pytest.mark.parametrize("number, wrong", [(n, wrong) for n, part in enumerate(ROUNDS) for wrong in part])
def test_a_wrong_solution_fails_its_task_and_is_told_why(graded, number, wrong):
    others = {other.task for other in ROUNDS[number]}
    assert not others & set(TASKS[wrong.task].needs), "it must fail by its own mistake"
    assert wrong.told in graded[number][wrong.task]


def test_every_task_has_a_wrong_solution_and_every_lab_two():
    wrong = [wrong.task for part in ROUNDS for wrong in part]
    assert set(wrong) == set(TASKS)
    assert all(sum(wrong.count(task.name) for task in lab.tasks) >= 2 for lab in LABS.values())


def test_lab_5s_flags_show_middles_that_join_a_suffix(monkeypatch):
    """On markov, at least every tenth document is an SPM example with a prefix and a suffix."""
    config, _ = train.read_arguments(course.own_arm().flags.split())
    kept, fim_example = [], objectives.fim_example

    def keep(prefix, middle, suffix, tok, order, spm_layout):
        kept.append(order == "spm" and prefix and suffix)
        return fim_example(prefix, middle, suffix, tok, order, spm_layout)

    monkeypatch.setattr(objectives, "fim_example", keep)
    objective = partial(objectives.OBJECTIVES[config.objective], **config.knobs)
    tok, rng, texts = Tokenizer.bytes(), np.random.default_rng(1), documents("markov", 300, seed=1)
    for text in texts:
        objective(np.array([*tok.encode(text), tok.eot]), tok, rng)
    assert sum(map(bool, kept)) > len(texts) / 10


# The folder of a student

def started(number, folder):
    course.main(["start", str(number), str(folder)])
    return folder


def test_a_lab_is_the_project_with_empty_functions(tmp_path, capsys):
    folder = started(6, tmp_path / "lab6")
    to_write = "sample.infill_prompt, sample.PromptCache.cut_back_to, sample.best_first"
    assert f"to write: {to_write}\n" in capsys.readouterr().out
    for name in course.FIVE_FILES:
        assert (folder / name).read_text() == (course.ROOT / name).read_text() or name == "sample.py"
    text = (folder / "sample.py").read_text()
    assert text.count("raise NotImplementedError") == text.count('raise NotImplementedError("lab 6: ') == 3
    for path in (["infill_prompt"], ["PromptCache", "cut_back_to"], ["best_first"]):
        ours = course.find((course.ROOT / "sample.py").read_text(), path)
        theirs = course.find(text, path)
        assert theirs.body[0].value.value == ours.body[0].value.value and len(theirs.body) == 2
        assert [arg.arg for arg in theirs.args.args] == [arg.arg for arg in ours.args.args]
    assert (folder / "docs" / "exercises.md").exists() and (folder / "tests" / "test_sample.py").exists()


def test_edited_tests_do_not_count_and_a_pass_is_a_pass(tmp_path, capsys):
    """In lab 3's folder tests and the checker are emptied; mask is written, meap is not."""
    folder = started(3, tmp_path / "lab3")
    for path in [*folder.glob("tests/*.py"), folder / "lab" / "course.py", folder / "data.py"]:
        path.write_text("def test_everything(): pass\n")
    (folder / "objectives.py").write_text(course.blank(
        (course.ROOT / "objectives.py").read_text("utf-8"), ["meap"], 3))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        course.main(["check", "3", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "passed   1 of 1  objectives.mask"
    assert lines[1].startswith("not yet  0 of 1  objectives.meap: is not written yet (read on: ")
    assert lines[2].startswith("mark     0 of 2 ") and lines[2].endswith("needs all tasks")
    assert lines[3] == "lab 3, MEAP: 1 of 4 points" and stop.value.code == 1


@pytest.mark.parametrize("found, points_of_mark, flags, code, said", [
    (None, 2, [], 0, "4 of 4 points"), (None, 0, [], 1, "2 of 4 points"),
    ("wrong", 2, [], 1, "0 of 4 points"),
    (None, 0, ["--no-mark"], 0, "2 of 2 points, without the mark"), ("wrong", 0, ["--no-mark"], 1, "0 of 2")])
def test_check_exits_with_0_only_if_all_points_are_reached(monkeypatch, tmp_path, capsys, found,
                                                           points_of_mark, flags, code, said):
    folder = started(3, tmp_path / "lab3")
    monkeypatch.setattr(course, "judge_tasks", lambda copy, tasks: {task.name: found for task in tasks})
    monkeypatch.setattr(course, "judge_mark", lambda *_: (points_of_mark, ""))
    try:
        course.main(["check", "3", str(folder), *flags])
        assert code == 0
    except SystemExit as stop:
        assert stop.code == code
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_a_student_who_broke_a_file_is_told_so_by_a_check_in_that_folder(tmp_path):
    """The checker, run from the folder that it checks, must not fall with what it checks."""
    folder = started(6, tmp_path / "lab6")
    with open(folder / "sample.py", "a") as f:
        f.write("def best_first(:\n")
    run = subprocess.run([sys.executable, "-m", "lab.course", "check", "6", "."], cwd=folder,
                         capture_output=True, text=True)
    assert run.returncode == 1 and not run.stderr
    assert run.stdout.count("not yet  0 of 1  sample.") == run.stdout.count("sample.py, line ") == 3


@pytest.mark.parametrize("body, told", [
    ("import os; os._exit(0)", "with status 0"), ("import sys; sys.exit()", "SystemExit"),
    ("return nonsuch", "NameError: name 'nonsuch'")])
def test_whatever_meap_does_the_grade_of_mask_stands(project, body, told):
    folder = project()
    text = course.blank((folder / "objectives.py").read_text("utf-8"), ["meap"], 3)
    text = text.replace('raise NotImplementedError("lab 3: meap")', body)
    (folder / "objectives.py").write_text(text, "utf-8")
    found = course.verdicts(folder, LABS[3])
    assert found["objectives.mask"] is None and told in found["objectives.meap"]
    assert "\n" not in found["objectives.meap"]


def test_what_never_ends_and_prints_a_lot_is_a_line(project, monkeypatch):
    monkeypatch.setattr(course, "SECONDS", 3)
    folder = project()
    spoil(folder, Wrong("objectives.meap", "    return", "    while True: print('x' * 1000)\n    return", ""))
    found = course.judge_tasks(folder, LABS[3].tasks[1:])
    assert found == {"objectives.meap": "takes more than 3 seconds: is there a loop that never ends?"}


@pytest.mark.parametrize("change, told", [
    (lambda text: text.replace("def meap(", "def meap((", 1), "objectives.py, line"),
    (lambda text: text + "\0", "objectives.py: source code"),
    (lambda text: text.replace("import inspect", "import nonsuch", 1), "No module named 'nonsuch'"),
    (lambda text: text.replace("def mask(", "def masked(", 1), "cannot import name 'mask'"),
    (lambda text: text + "\nraise SystemExit\n", "exit")])
def test_a_file_that_cannot_be_imported_is_a_line_for_each_task(project, change, told):
    folder = project()
    text = (folder / "objectives.py").read_text("utf-8")
    (folder / "objectives.py").write_text(change(text), "utf-8")
    found = course.verdicts(folder, LABS[3])
    assert found.keys() == {"objectives.mask", "objectives.meap"}
    assert all(told in line and "\n" not in line for line in found.values()), found


@pytest.mark.parametrize("arguments, message", [
    ("start 8 new", "invalid choice: 8"), ("check 0 new", "invalid choice: 0"),
    ("start three new", "invalid int value: 'three'"), ("begin 3 new", "invalid choice: 'begin'"),
    ("start 3 here", "here exists already: expected a new folder"),
    (f"start 3 {course.ROOT}/lab3", "lies in the project: expected another place, such as ../lab3"),
    ("check 3 new", "new: no folder of a lab (it has no lab.json); make one with"),
    ("check 3 here", "here: no folder of a lab"), ("check 3 lab4", "lab4 is a folder of lab 4: expected one"),
    ("check 4 lab4", "lab4: expected objectives.py in it, which lab 4 is about")])
def test_bad_arguments_are_said_below_the_usage(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("lab4").mkdir()
    Path("lab4", "lab.json").write_text('{"lab": 4}')
    with pytest.raises(SystemExit) as stop:
        course.main(arguments.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and usage.startswith("usage: ") and message in error


# The marks, without their trainings

METRICS = {"held_out_bpb": 1.4, "recall": 0.93, "psm_saved": 1.0, "bayes_psm_saved": 4.0, "spm_saved": 3.0,
           "bayes_spm_saved": 4.0, "spm_end": 0.6, "spm_another": 0.2, "bayes_spm_end": 0.7,
           "bayes_spm_another": 0.1}


@pytest.mark.parametrize("number, flags, value", [
    (1, {"objective": "ntp", "steps": 250}, 1.4), (3, {"objective": "meap", "data": "records"}, 0.93),
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


@pytest.mark.parametrize("recalls, value, n_runs", [
    ([0.99], 0.99, 1), ([0.16, 0.95], 0.95, 2), ([0.2, 0.3, 0.1, 0.2], 0.3, 4)])
def test_a_seed_that_looks_nothing_up_gets_three_more_tries(monkeypatch, tmp_path, recalls, value, n_runs):
    runs = []

    def claims_run(run, out):
        runs.append(run)
        return {"recall": recalls[len(runs) - 1]}

    monkeypatch.setattr(course, "claims_run", claims_run)
    assert course.recall(tmp_path) == value and runs == [f"records-0.15-{i + 1}" for i in range(n_runs)]


@pytest.mark.parametrize("number", LABS)
def test_a_mark_has_points_within_its_bounds_alone(monkeypatch, tmp_path, number):
    mark, value = LABS[number].mark, 0.0

    def run(arguments, folder, seconds):
        assert arguments[:4] == ["-m", "lab.course", "mark", str(number)] and folder == tmp_path / "copy"
        (tmp_path / "mark.json").write_text(json.dumps({"value": value}))
        return 0, ""

    monkeypatch.setattr(course, "run", run)
    for bound, outward in ((mark.low, -1), (mark.high, 1)):
        for value, points in ((bound, mark.points), (bound + 0.01 * outward, 0), (math.nan, 0)):
            if not math.isinf(value):
                given, line = course.judge_mark(number, tmp_path / "copy", tmp_path)
                assert given == points and f"{value:.4f}, expected " in line
    monkeypatch.setattr(course, "run", lambda *_: (1, "a\n 3%|  \rcourse.py: the loss is nan\n"))
    (tmp_path / "mark.json").unlink()
    assert course.judge_mark(number, tmp_path, tmp_path) == (
        0, "no figure, status 1: course.py: the loss is nan")
    monkeypatch.setattr(course, "run", lambda *_: (None, ""))
    assert course.judge_mark(number, tmp_path, tmp_path) == (0, f"takes more than {mark.seconds} seconds")


def test_in_spm_order_nearly_all_of_a_prompt_is_reused(monkeypatch, tmp_path):
    """Lab 6's mark, which needs no training. A cache that forgets nothing changes the output."""
    course.measure(6, tmp_path)
    assert json.loads((tmp_path / "mark.json").read_text())["value"] > course.REUSED

    def forget_nothing(self, prompt):
        self.ids, self.length = prompt, min(self.length, len(prompt) - 1)

    monkeypatch.setattr(sample.PromptCache, "cut_back_to", forget_nothing)
    with pytest.raises(ValueError, match="expected the same"):
        course.measure(6, tmp_path)


class Bigram(torch.nn.Module):
    """Its logits at a position depend on the token there, or, if it cheats, on the one after it."""
    def __init__(self, tok, cheats=False):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(tok.n_vocab, tok.n_vocab))
        self.config, self.cheats = GPTConfig(tok.n_vocab, block_size=16), cheats

    def forward(self, idx, targets=None, cache=None):
        return self.table[idx.roll(-1, 1) if self.cheats else idx], None


def test_the_leaderboards_figure_is_bits_over_bytes_of_held_out_documents_alone(monkeypatch, documents, tok):
    held_out = [text for text in documents if data.is_held_out(text)] or documents[:1]
    monkeypatch.setattr(data, "is_held_out", lambda text: text in held_out)
    monkeypatch.setattr(data, "load_documents", lambda source: documents)
    model = Bigram(tok)
    monkeypatch.setattr(sample, "load_model", lambda run: (model, tok, None))
    log_p, bits = model.table.detach().double().log_softmax(-1), 0
    for text in held_out:
        ids = [tok.eot, *tok.encode(text)]
        bits -= log_p[ids[:-1], ids[1:]].sum().item() / math.log(2)
    assert course.held_out_bpb("run") == pytest.approx(bits / sum(len(text.encode()) for text in held_out))
    monkeypatch.setattr(sample, "load_model", lambda run: (Bigram(tok, cheats=True), tok, None))
    with pytest.raises(ValueError, match="depend on a later token"):
        course.held_out_bpb("run")
    lossy = SimpleNamespace(encode=lambda text: tok.encode(text)[:-1], decode=tok.decode, eot=tok.eot)
    monkeypatch.setattr(sample, "load_model", lambda run: (model, lossy, None))
    with pytest.raises(ValueError, match="is not the text"):
        course.held_out_bpb("run")


def test_flags_other_than_the_knobs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(course, "ROOT", tmp_path)
    (tmp_path / FLAGS_FILE).write_text("# mine\n--objective fim\n--fim-rate=0.9\n")
    config, _ = train.read_arguments(course.own_arm().flags.split())
    assert config.objective == "fim" and config.knobs["fim_rate"] == 0.9 and "markov" in config.data
    (tmp_path / FLAGS_FILE).write_text("--objective fim --preset laptop\n")
    with pytest.raises(ValueError, match="flags.txt: --preset, expected only --fim-rate, .*--objective"):
        course.own_arm()
