"""Each score against a value found another way; an oracle that knows the answers and a blind model to which
all tokens are equally likely; the sandbox; the figures; and the files that a user may hand in."""
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import as_stream, run_main, save_run, small_model
from lab import attention, evaluate, sandbox, tasks
from lab.corpora import held_out_programs, hole
from lab.figures import main as draw_figures
from lab.report import check_pool, figure, pool, table
from model import GPTConfig
from objectives import IGNORE, fim_example, fim_prompt


@pytest.fixture(scope="module")
def model(tok):
    model = small_model(tok.n_vocab, block_size=64)
    model.transformer.wte.weight.data[tok.mask] *= 9  # often the likeliest id, which is never to be written
    return model


class Oracle(torch.nn.Module):
    """Knows what follows the given prompts; elsewhere every token is equally likely."""

    def __init__(self, tok, answers=()):
        super().__init__()
        self.config = GPTConfig(tok.n_vocab, block_size=512, n_layer=1, n_head=1, n_embd=2)
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.known = {(*prompt, *answer[:i]): following for prompt, answer in answers
                      for i, following in enumerate(answer)}

    def forward(self, idx, targets=None, cache=None):
        seen = idx
        if cache:
            seen = cache.store("idx", idx[..., None])[..., 0]
            cache.length = seen.shape[1]
        logits = torch.zeros(*idx.shape, self.config.vocab_size)
        for b, row in enumerate(seen.tolist() if self.known else ()):
            for t in range(-idx.shape[1], 0):
                logits[b, t, self.known.get(tuple(row[:len(row) + t + 1]), [])] = 50  # []: nowhere
        return logits, None


def infilling(tok, holes):
    """An Oracle that knows the middles of these holes, [(prefix, middle, suffix)] of ids, in joint SPM."""
    return Oracle(tok, [(fim_prompt(p, s, tok, "spm", "joint"), [*m, tok.eot]) for p, m, s in holes])


def measured(task, model, tok, order=None, **settings):
    """A task's {name: mean}, of a model that infills in this order, in the joint layout."""
    layouts = {order.upper(): partial(fim_prompt, tok=tok, order=order, spm_layout="joint")} if order else {}
    a = SimpleNamespace(**{"layouts": layouts, "seed": 1, "n": 1, "temperature": 0.0} | settings)
    return {name: f["mean"] for name, f in task(model, tok, a).items()}


def test_a_figure_worked_by_hand():
    # squared residuals 1/16, 9/16, 1/16, 1/16: their sum 3/4 over n - 1 = 3 is the variance, 1/4
    assert figure([1, 0, 1, 1]) == {"mean": 0.75, "se": math.sqrt(1 / 4) / math.sqrt(4), "n": 4, "unit": "%"}
    # 6 of 3 and 1 of 1: (6 + 1) / (3 + 1) = 7/4; residuals 6 - 3 * 7/4 = 3/4 and 1 - 7/4 = -3/4
    weighted = figure([6, 1], [3, 1], "bits")
    assert weighted["mean"] == 7 / 4 and weighted["se"] == pytest.approx(math.sqrt(2 * (9 / 16 + 9 / 16)) / 4)
    assert figure([])["mean"] is None and figure([1])["se"] is None


def test_pooled_runs_give_the_mean_and_the_error_over_seeds():
    def run(mean):
        return {"bpb": {"x": {"mean": mean, "se": 9, "n": 7, "unit": "bits"}}}

    pooled = pool({"a": run(1.0), "b": run(2.0), "c": run(6.0), "d": run(None)},
                  {name: {"objective": "fim" if name == "d" else "ntp"} for name in "abcd"})
    assert list(pooled) == ["ntp (3)", "fim (1)"] and math.sqrt(7 / 3) == pytest.approx(1.528, abs=1e-3)
    assert table(pooled).splitlines()[1].split() == ["bpb", "x", "bits", "3.000", "±", "1.528", "-"]


@pytest.mark.parametrize("name, value", [("n_layer", 6), ("fim_rate", 0.9), ("init_from", "meap-1")])
def test_only_runs_that_differ_in_the_seed_are_pooled(name, value):
    one = {"objective": "fim", "seed": 1, "out": "out/a", "n_layer": 4, "init_from": "ntp-1",
           "knobs": {"fim_rate": 0.5}}
    runs = {"a": one, "b": one | {"seed": 2, "out": "out/b", "init_from": "ntp-2"}}
    check_pool(runs | {"c": one | {"objective": "meap", "n_layer": 6}})
    other = one | ({"knobs": {name: value}} if name in one["knobs"] else {name: value})
    with pytest.raises(ValueError, match=f"a and c .* than the seed: {name}"):
        check_pool(runs | {"c": other})


def test_score_gives_each_token_what_the_model_gives_it_alone(model, stream):
    rng, pairs = np.random.default_rng(1), []
    for start, n, m in rng.integers((0, 1, 1), (len(stream) - 120, 100, 20), (30, 3)):
        pairs.append((stream[start:start + n].tolist(), stream[start + n:start + n + m].tolist()))
    for (prompt, continuation), s in zip(pairs, evaluate.score(model, pairs, watch=7)):
        prompt = prompt[-(65 - len(continuation)):]  # cut on its left, where the context does not hold it
        logits, _ = model(torch.tensor([(prompt + continuation)[:-1]]))
        log_p = logits[0, len(prompt) - 1:].detach().log_softmax(-1)
        np.testing.assert_allclose(s.log_p, log_p[range(len(continuation)), continuation], atol=1e-4)
        np.testing.assert_allclose(s.watched, log_p[:, 7], atol=1e-4)
        assert s.likeliest.tolist() == log_p.argmax(-1).tolist()
    with pytest.raises(ValueError, match="65 tokens"):
        evaluate.score(model, [([1], [2] * 65)])


def test_continuations_are_those_of_a_loop_without_a_cache(model, tok):
    prompts = [list(range(start, start + n)) for start, n in enumerate((3, 9, 3, 20, 9))]
    for prompt, samples in zip(prompts, evaluate.continuations(model, tok, prompts, 12, n=2)):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != tok.eot:
            ids.append(int(model(torch.tensor([ids]))[0][0, -1, :tok.eot + 1].argmax()))
        assert [new for new, _ in samples] == [ids[len(prompt):]] * 2


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_middle_bits_per_byte_are_the_cost_of_the_middle_in_the_training_layout(model, tok, stream, order):
    cuts = tasks.random_span_holes(stream, tok, 6, 2, 60)
    nats = {"prefix alone": 0, order.upper(): 0}
    for prefix, middle, suffix in cuts:
        rows = prefix + middle, fim_example(prefix, middle, suffix, tok, order, "joint")[:-1]
        for name, ids in zip(nats, rows):
            _, loss = model(torch.tensor([[tok.eot, *ids[:-1]]]),
                            torch.tensor([[IGNORE] * (len(ids) - len(middle)) + middle]))
            nats[name] += loss.item() * len(middle)
    size = sum(len(tok.decode_bytes(middle)) for _, middle, _ in cuts)
    figures = measured(evaluate.middle_bpb, model, tok, order, stream=stream, limit=6, seed=2)
    assert figures == pytest.approx({f"middle, {name}": cost / math.log(2) / size
                                     for name, cost in nats.items()}, rel=1e-4)


def test_holes_lie_in_a_document_and_between_two_line_starts_if_asked(documents, tok, stream):
    for span in ("char", "line"):
        for prefix, middle, suffix in tasks.random_span_holes(stream, tok, 400, 1, 60, span):
            assert middle and len(prefix + middle + suffix) <= 60
            text = tok.decode(prefix + middle + suffix)
            assert any(text in document for document in documents)
            assert span == "char" or all(not after or tok.decode(before).endswith("\n")
                                         for before, after in ((prefix, prefix), (middle, suffix)))
    short = held_out_programs(20, 1)  # of these a hole has the whole document
    holes = tasks.random_span_holes(as_stream(short, tok), tok, 50, 1, 508)
    assert len(holes) == 50 and {"".join(map(tok.decode, hole)) for hole in holes} <= set(short)


def test_an_oracle_stops_where_the_middle_ends_and_a_blind_model_by_chance(tok, stream):
    holes = [hole for span in ("char", "line")
             for hole in tasks.random_span_holes(stream, tok, 6, 1, 120, span)]
    chance = 1 / tok.n_vocab
    for model, at_end, elsewhere in ((infilling(tok, holes), 1, 0), (Oracle(tok), chance, chance)):
        figures = measured(evaluate.stopping, model, tok, "spm", stream=stream, limit=6)
        assert len(figures) == 8
        for name, value in figures.items():  # the oracle does not know holes with another suffix
            expected = at_end if name.endswith("end") else elsewhere if "elsewhere" in name else chance
            assert value == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("task", [evaluate.needle, evaluate.records])
def test_an_oracle_recalls_everything_and_a_blind_model_nothing(task, tok, stream):
    questions = (tasks.needle_prompts(512, tok, stream, 20, 1) if task is evaluate.needle else
                 sum((tasks.record_questions(name, 512, tok, 10, 1) for name in ("records", "chains")), []))
    assert len(questions) >= 10 and all(len(prompt) <= 500 for _, prompt, _ in questions)
    answers = [(prompt, tok.encode(answer)) for _, prompt, answer in questions]
    blind_bits = np.mean([len(answer) for _, answer in answers]) * math.log2(tok.n_vocab)
    for model, recalled, bits in ((Oracle(tok, answers), 1, 0), (Oracle(tok), 0, blind_bits)):
        figures = measured(task, model, tok, stream=stream, limit=10)
        assert figures.pop("the answer") == pytest.approx(bits, abs=1e-6)
        assert len(figures) > 4 and set(figures.values()) == {recalled}


def test_a_needle_lies_at_the_line_end_nearest_to_its_depth(tok, stream):
    for (length, depth), prompt, answer in tasks.needle_prompts(512, tok, stream, 20, 1):
        assert len(prompt) == length - 12
        before, needle, after = tok.decode(prompt).partition(f' = "{answer}\n')
        before, _, name = before.rpartition("\n")
        after, question, _ = after.partition(f'\nassert {name} == "')
        n, line = len(before + after), max(map(len, (before + after).split("\n")))
        assert needle and question and abs(len(before) - depth * n) <= line + 0.1 * n  # depth is of tokens


def test_an_oracle_fills_programs_rightly_where_it_sees_their_own_suffix(tok):
    holes = []
    for kind in ("line", "lines", "span"):
        rng = np.random.default_rng(1)
        drawn = [hole(text, kind, rng) for text in held_out_programs(4, seed=1)]
        holes += [map(tok.encode, parts) for parts in drawn if parts]
    passed = measured(evaluate.programs, infilling(tok, holes), tok, "spm", limit=4, n=2)
    own = {name: value for name, value in passed.items() if ", SPM" in name and "another's" not in name}
    others = [value for name, value in passed.items() if name not in own]
    assert set(own.values()) == {1} and np.mean(others) < 0.2
    assert list(own)[:3] == ["one line, SPM, pass@1", "one line, SPM, pass@2", "one line, SPM, best of 2"]


PROBLEM = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n",
           "canonical_solution": "    y = x + 1\n", "suffix": "    return y\n"}


def test_an_oracle_fills_public_problems_and_the_benchmark_gets_its_samples(tok, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(PROBLEM))
    hole = [tok.encode(PROBLEM[name]) for name in ("prompt", "canonical_solution", "suffix")]
    a = {"problems": tasks.read_problems(tmp_path / "p.jsonl"), "out": tmp_path, "name": "run"}
    assert measured(evaluate.infill, infilling(tok, [hole]), tok, "spm", **a) == {"exact match, SPM": 1}
    assert json.loads((tmp_path / "samples-run-spm.jsonl").read_text()) == {
        "task_id": PROBLEM["task_id"], "completion": PROBLEM["canonical_solution"]}
    assert measured(evaluate.infill, Oracle(tok), tok, "spm", **a) == {"exact match, SPM": 0}


@pytest.mark.parametrize("answer, is_right", [
    (" a smith, I think", 1), ("The smith!\nQuestion", 1), (" Nobody.\nThe Smith.", 0)])
def test_lost_in_the_middle_is_prompted_and_judged_as_by_its_authors(answer, is_right, tok, tmp_path):
    record = {"question": "Who?", "answers": ["The Smith."],
              "ctxs": [{"title": "a", "text": "b"}, {"title": "c", "text": "d"}]}
    (tmp_path / "d.json").write_text(json.dumps([record, record | {"question": "too long " * 300}]))
    prompt = ("Write a high-quality answer for the given question using only the provided search results "
              "(some of which might be irrelevant).\n\nDocument [1](Title: a) b\nDocument [2](Title: c) d\n\n"
              "Question: Who?\nAnswer:")
    oracle = Oracle(tok, [(tok.encode(prompt), [*tok.encode(answer), tok.eot])])
    a = {"documents": tasks.read_documents(tmp_path / "d.json")}
    assert measured(evaluate.multidoc, oracle, tok, **a) == {"fits the context": 0.5, "right": is_right}


@pytest.mark.parametrize("arguments, message", [
    ("--problems list.jsonl", "line 2: expected task_id"), ("--ckpt run none", "none: no such checkpoint"),
    ("--documents list.jsonl", "line 1: expected a question"), ("--n 0", "--n: 0"),
    ("--tasks multidoc", "expected its file, --documents F"),
    ("--ckpt run longer --pool", "run and longer differ in more than the seed: steps is 1 and 2")])
def test_a_mistake_is_one_line_before_any_work(arguments, message, model, tok, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "prepare", None)
    for name, steps in (("run", 1), ("longer", 2)):
        save_run(tmp_path / name, model, tok, steps=steps)
    record = PROBLEM | {"question": "", "ctxs": [], "answers": [1]}  # an answer is a text
    (tmp_path / "list.jsonl").write_text(json.dumps(record) + "\n[1]")
    shown = run_main(evaluate.main, capsys, *f"--tasks bpb --ckpt run {arguments}".split())
    assert shown.code in (1, 2) and message in shown.err  # in one line: see run_main


def test_attention_received_is_a_mean_over_heads_and_the_queries_that_see_a_position(model):
    model.config.attention, rows = "fused", torch.randint(200, (3, 10))
    att, weights = attention.received(model, rows.numpy()), attention.weights(model, rows)
    assert model.config.attention == "fused" and weights.shape == (3, 2, 2, 10, 10)
    for n, j in np.ndindex(3, 10):
        expected = np.mean([weights[n, :, :, i, j].mean() * (i + 1) for i in range(j, 10)])
        assert att[n, j] == pytest.approx(expected, rel=1e-4)


def test_decay_and_variance_are_the_papers_formulas():
    plain, masked = np.array([[1.0, 2, 3, 4]]), np.array([[0.5, 2, 1, 9]])
    before, fall, variance, rise = np.ravel(attention.compare(plain, masked, plain % 2 == 1))  # 1 and 3
    assert fall / before == pytest.approx(((1 + 3) - (0.5 + 1)) / (1 + 3))
    assert variance == np.var([2, 4]) and variance + rise == np.var([2, 9])


def test_a_model_that_looks_everywhere_alike_has_no_decay_and_shares_by_length(tok, stream):
    even = small_model(tok.n_vocab, block_size=128)
    for block in even.transformer.h:
        torch.nn.init.zeros_(block.attn.c_attn.weight)
    segments = ("a b c ", "d", "e f", "g h i j k l")
    lengths = np.array([len(tok.encode(text)) for text in segments])
    shares = attention.shares(even, tok, segments).mean(0)
    np.testing.assert_allclose(shares, lengths / sum(lengths), rtol=1e-4)
    settings = {"stream": stream, "limit": 16, "reference": even, "reference_tok": tok}
    figures = measured(evaluate.attention, even, tok, **settings)
    assert figures["decay of attention to masked positions"] == pytest.approx(0, abs=1e-5)


@pytest.fixture
def runs(tok, documents, tmp_path):
    """A folder with the runs ntp and fim, and files for the tasks that read some."""
    (tmp_path / "text.py").write_text("\n".join(documents[:3]))
    small = small_model(tok.n_vocab, 128, n_layer=1, n_head=1, n_embd=16)
    for name, bpb in (("ntp", 2.5), ("fim", None)):
        save_run(tmp_path / name, small, tok, name, data=str(tmp_path / "text.py"))
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 7, "answer_bpb": bpb}))
    (tmp_path / "problems.jsonl").write_text(f"{json.dumps(PROBLEM)}\n" * 3)
    (tmp_path / "documents.jsonl").write_text('{"question": "q", "answers": ["a"], "ctxs": [{"text": "t"}]}')
    return tmp_path


def run_tasks(folder, names, *arguments):
    evaluate.main(["--ckpt", *(str(folder / name) for name in names), "--limit", "2", "--device", "cpu",
                   "--out", str(folder / "out"), "--cache-dir", str(folder / "cache"), *arguments])


def test_a_run_writes_a_table_results_and_samples(runs, capsys, no_float64):
    run_tasks(runs, ("ntp", "fim"), *(f"--{name}={runs / name}.jsonl" for name in ("problems", "documents")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "ntp", "fim"] and len({len(line) for line in lines}) == 1
    assert {line.split()[0] for line in lines[1:]} == set(evaluate.TASKS)
    results = json.loads((runs / "out/results.json").read_text())["results"]
    assert results["ntp"]["bpb"] == results["fim"]["bpb"] and results["ntp"]["infill"] == {}
    assert {path.name for path in (runs / "out").iterdir()} == {
        "results.json", "samples-fim-psm.jsonl", "samples-fim-spm.jsonl"}
    told = run_main(evaluate.main, capsys, "--help").out.partition("tasks:\n")[2]
    assert [line.split()[0] for line in told.splitlines() if line[:3].strip()] == list(evaluate.TASKS)


def test_results_of_other_runs_and_tasks_are_kept(runs, capsys):
    run_tasks(runs, ["ntp"], "--tasks", "bpb", "records")
    (runs / "elsewhere").mkdir()
    (runs / "ntp").rename(runs / "elsewhere/ntp")  # another run of the same name
    run_tasks(runs, ["fim", "elsewhere/ntp"], "--tasks", "bpb")
    run_tasks(runs, ["fim"], "--tasks", "stopping", "--seed", "2")
    saved = json.loads((runs / "out/results.json").read_text())
    assert {name: set(tasks) for name, tasks in saved["results"].items()} == {
        "ntp": {"bpb", "records"}, "fim": {"bpb", "stopping"}, "ntp'": {"bpb"}}
    assert [saved["settings"]["fim"][task]["seed"] for task in ("bpb", "stopping")] == [1, 2]
    assert capsys.readouterr().out.splitlines()[-9].split() == ["task", "fim"]  # the table is of this call


def test_what_there_is_is_drawn(runs, capsys, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.chdir(runs)
    run_tasks(runs, ["ntp"], "--tasks", "bpb", "records", "stopping", "--figures", "png")
    assert "no figure of stopping" in capsys.readouterr().err  # ntp does not infill
    assert {path.name for path in (runs / "png").iterdir()} == {"bpb.png", "records.png"}
    for arguments in (["rows"], ["ntp", "fim"]):
        assert run_main(draw_figures, capsys, *arguments).code == 0
    rows, curves = (image.imread(f"{name}.png")[..., :3] for name in ("rows", "curves"))
    for colour in ("c6dbef", "a1d99b", "fdd0a2", "756bb1", "252525"):  # a prefix ... what is masked
        assert (np.round(rows * 255) == list(bytes.fromhex(colour))).all(-1).mean() > 0.005
    assert (curves == 1).all(-1).mean() < 0.95
    shown = run_main(draw_figures, capsys, "ntp", "elsewhere")
    assert shown.code == 1 and "No such file or directory: 'elsewhere/metrics.jsonl'" in shown.err


@pytest.mark.parametrize("program", [
    "while True: pass", "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "x = [0]\nwhile True: x += x", "open({outside!r}, 'w')", "import os\nos.open({outside!r}, os.O_CREAT)",
    "import os\nos.remove({present!r})", "import ctypes", "import socket\nsocket.socket()",
    "import os\nos.fork()", "import subprocess\nsubprocess.run(['true'])", "print('x' * 10**9)",
    "import os\nos._exit(0)", "raise SystemExit(0)", "def f(): f()\nf()", "syntax error"])
def test_the_sandbox_stops_what_it_should(program, tmp_path):
    (tmp_path / "present").write_text("here")
    paths = {name: str(tmp_path / name) for name in ("present", "outside")}
    assert not sandbox.run(program.format(**paths), "m", {"runs": ""}, timeout=1).ok
    assert {path.name for path in tmp_path.iterdir()} == {"present"}


def test_the_sandbox_lets_plain_programs_be():
    program = ("import atexit\natexit.register(print, 'the end')\n"
               "open('note', 'w').write('x')\nassert open('note').read() == 'x'\nprint('done')")
    assert sandbox.run(program, "m", {"runs": ""}) == (True, {"runs": True})
    program = "def f(n):\n    while n == 0:\n        pass\n    return 1\n"  # one endless loop stops no other
    docstrings = {"endless": ">>> f(0)\n1\n", "right": ">>> f(1)\n1\n", "wrong": ">>> f(1)\n2\n"}
    outcome = sandbox.run(program, "m", docstrings, timeout=20, each=0.5)
    assert outcome.passed == {"endless": False, "right": True, "wrong": False} and not outcome.ok
