"""Every scorer against a value found another way, an oracle that knows the answers and a model that knows nothing, the
problems' own tests, the sandbox, and the files that a user may hand in."""
import gzip
import importlib.util
import itertools
import json
import math
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention
import evaluate
import problems
import sandbox
import train
from data import single_line_holes
from model import GPT, GPTConfig
from objectives import OBJECTIVES, fim_example, fim_prompt
from sample import infill_prompt

LN2 = math.log(2)


@pytest.fixture(scope="module")
def model(tok):
    """Weights well above the initial 0.02, so that predictions differ and a mistake shows."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(tok.n_vocab, block_size=64, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


class Oracle(torch.nn.Module):
    """Knows what follows some prompts, and finds every token equally likely elsewhere; without any it knows nothing."""

    def __init__(self, tok, answers=()):
        super().__init__()
        self.config = GPTConfig(tok.n_vocab, block_size=512, n_layer=1, n_head=1, n_embd=2)
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.known = {(*prompt, *answer[:i]): answer[i] for prompt, answer in answers for i in range(len(answer))}

    def forward(self, idx, targets=None, cache=None):
        seen = idx
        if cache:
            seen = cache.layers[0].store("idx", idx[..., None])[..., 0]
            cache.length = seen.shape[1]
        logits = torch.zeros(*idx.shape, self.config.vocab_size)
        for b, row in enumerate(seen.tolist() if self.known else ()):
            for t in range(idx.shape[1]):
                following = self.known.get(tuple(row[:len(row) - idx.shape[1] + t + 1]))
                if following is not None:
                    logits[b, t, following] = 50
        return logits, None


def means(figures):
    return {name: f["mean"] for name, f in figures.items() if "mean" in f}


def test_a_figure_is_a_mean_with_its_standard_error():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    f = evaluate.figure(values)
    assert f["mean"] == 2.8 and f["n"] == 5
    assert f["se"] == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert evaluate.figure([6, 1], [3, 1])["mean"] == 7 / 4
    assert evaluate.figure([6, 1], [3, 1])["se"] == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)
    assert evaluate.figure([])["mean"] is None and evaluate.figure([1])["se"] is None


def test_pooled_runs_give_the_mean_and_the_error_over_seeds():
    def run(mean):
        return {"bpb": {"x": {"mean": mean, "se": 9, "n": 7, "unit": "bits/byte"}, "grid": [1]}}

    pooled = evaluate.pool({"a": run(1.0), "b": run(2.0), "c": run(6.0), "d": run(None)},
                           {"a": "ntp", "b": "ntp", "c": "ntp", "d": "fim"})
    assert list(pooled) == ["ntp (3)", "fim (1)"] and list(pooled["ntp (3)"]["bpb"]) == ["x"]
    assert pooled["ntp (3)"]["bpb"]["x"] == pytest.approx({"mean": 3, "se": math.sqrt(7 / 3), "n": 3, "unit": "bits/byte"})
    assert "-" in evaluate.table(pooled).splitlines()[1] and "3.000 ± 1.528" in evaluate.table(pooled)


def test_score_gives_each_token_what_the_model_gives_it_alone(model, tok, stream):
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(30):
        n, m = rng.integers(1, 40), rng.integers(1, 20)
        ids = stream[(start := rng.integers(len(stream) - 60)):start + n + m].tolist()
        pairs.append((ids[:n], ids[n:]))
    for (prompt, continuation), s in zip(pairs, evaluate.score(model, pairs, watch=7)):
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([prompt + continuation]))[0][0], dim=-1)[len(prompt) - 1:-1]
        np.testing.assert_allclose(s.log_p, [log_p[i, token] for i, token in enumerate(continuation)], atol=1e-4)
        np.testing.assert_allclose(s.watched, log_p[:, 7], atol=1e-4)
        assert s.likeliest.tolist() == log_p.argmax(-1).tolist()


def test_score_cuts_a_long_prompt_on_its_left(model):
    long, short = evaluate.score(model, [(list(range(100)), [5, 6]), (list(range(37, 100)), [5, 6])])
    np.testing.assert_allclose(long.log_p, short.log_p, atol=1e-5)
    with pytest.raises(ValueError, match="65 tokens"):
        evaluate.score(model, [([1], [2] * 65)])


def test_continuations_are_those_of_a_loop_without_a_cache(model, tok):
    prompts = [list(range(n, 2 * n)) for n in (3, 9, 3, 20, 9)]
    for prompt, samples in zip(prompts, evaluate.continuations(model, tok, prompts, 12)):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != tok.eot:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0][0, -1, :tok.eot + 1].argmax()))
        assert samples[0][0] == ids[len(prompt):]


def test_bits_per_byte_are_those_of_training_and_of_a_blind_guess(model, tok, stream):
    ours = evaluate.bpb(model, tok, stream, 40)["left to right"]
    assert ours["mean"] == pytest.approx(train.bits_per_byte(model, train.text_rows(stream, tok, 64, 40), tok), rel=1e-5) and ours["n"] == 40
    blind = evaluate.bpb(Oracle(tok), tok, stream, 10)["left to right"]["mean"]
    windows = np.concatenate([stream[s + 1:s + 513] for s in np.linspace(0, len(stream) - 513, 10).astype(int)])
    assert blind == pytest.approx((windows != tok.eot).sum() * math.log2(tok.n_vocab) / tok.n_bytes[windows].sum())


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_middle_bits_per_byte_are_the_cost_of_the_middle_in_the_training_layout(model, tok, stream, order):
    figures = means(evaluate.middle_bpb(model, tok, stream, [order], "joint", limit=6, seed=2))
    cuts = problems.cut_texts(stream, tok, 6, 60, 2)
    assert len(cuts) == 6

    def cost(ids, n):
        ids = torch.tensor([[tok.eot, *ids]])
        with torch.no_grad():
            return F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:], reduction="none")[-n:].sum().item() / LN2

    size = sum(len(tok.decode_bytes(middle)) for _, middle, _ in cuts)
    with_suffix = sum(cost(fim_example(p, m, s, tok, order, "joint")[:-1], len(m)) for p, m, s in cuts)
    alone = sum(cost(p + m, len(m)) for p, m, s in cuts)
    assert figures[f"middle, {order}"] == pytest.approx(with_suffix / size, rel=1e-4)
    assert figures["middle, prefix alone"] == pytest.approx(alone / size, rel=1e-4)


def test_an_oracle_stops_where_the_middle_ends_and_a_blind_model_by_chance(tok, stream):
    holes = single_line_holes(stream, tok, 6, 1)
    oracle = Oracle(tok, [(fim_prompt(p, s, tok, "spm"), [*m, tok.eot]) for p, m, s in holes])
    figures = means(evaluate.stopping(oracle, tok, stream, limit=6))
    assert figures.pop("P(<EOT>) elsewhere") < 1e-9
    for control in ("another hole's suffix", "the suffix a line later"):  # it knows the holes with their own suffix alone
        assert figures.pop(f"P(<EOT>) there before {control}") < 0.01
    assert all(value == pytest.approx(1) for value in figures.values())
    figures = means(evaluate.stopping(Oracle(tok), tok, stream, limit=6, n=2))
    for name in ("P(<EOT>) at the true end", "P(<EOT>) elsewhere"):
        assert figures[name] == pytest.approx(1 / tok.n_vocab)
    assert figures["greedy ends in <EOT>"] == figures["best of 2 exact match"] == 0


RECALL = {"needle": (problems.needle_prompts, evaluate.needle, ["stream"]),
          "multidoc": (problems.multidoc_prompts, evaluate.multidoc, []),
          "multineedle": (problems.multineedle_prompts, evaluate.multineedle, ["stream"])}


@pytest.mark.parametrize("name", RECALL)
def test_an_oracle_recalls_everything_and_a_blind_model_nothing(name, tok, stream):
    make, task, needs = RECALL[name]
    given = [stream] * len(needs)
    made = make(512, tok, *given, 10, 3)
    assert made and all(len(prompt) <= 512 - problems.ROOM for _, prompt, *_ in made)
    for _, prompt, answer, other in made:  # the answer stands in the prompt, once, and is not the other value
        assert tok.decode(prompt).count(f'"{answer}') == 1 and answer != other
    oracle = Oracle(tok, [(prompt, tok.encode(answer)) for _, prompt, answer, _ in made])
    for model, right, preferred in ((oracle, 1, 1), (Oracle(tok), 0, 0.5)):
        for key, value in means(task(model, tok, *given, 10, 3)).items():
            if "bits" not in key:
                assert value == (preferred if "preferred" in key else right), key


def test_a_needle_lies_at_its_depth_and_the_prompt_has_its_length(tok, stream):
    for (length, depth), prompt, answer, _ in problems.needle_prompts(512, tok, stream, 20, 1):
        text = tok.decode(prompt)
        assert len(prompt) == length - problems.ROOM
        assert abs(text.index(f'"{answer}') / len(text) - depth) < 0.35


def test_a_chain_of_needles_leads_to_the_value(tok, stream):
    for number, prompt, answer, other in problems.multineedle_prompts(512, tok, stream, 5, 1):
        lines = [line.split(" = ") for line in tok.decode(prompt).splitlines() if line.count(" = ") == 1]
        values = {name: source for name, source in lines}
        name = tok.decode(prompt).rpartition("assert ")[2].split()[0]
        for _ in range(number):
            name = values[name]
        assert name == f'"{answer}' and f'"{other}' in values.values()


def test_choice_takes_the_likeliest_per_token_and_shares_ties(tok, stream):
    questions = problems.docstring_questions(stream, tok, 8, 1)
    assert len(questions) == 8 and all(len(set(choices)) == 4 for _, choices, _ in questions)
    oracle = Oracle(tok, [(tok.encode(context), tok.encode(choices[label])) for context, choices, label in questions])
    assert evaluate.choice(oracle, tok, questions)["right"]["mean"] == 1
    assert evaluate.choice(Oracle(tok), tok, questions)["right"]["mean"] == 0.25
    scores = [evaluate.Score(np.array(log_p), None, None) for log_p in ([-1.0, -1.0, -1.0], [-1.5], [-0.5, -3.0])]
    assert [evaluate.choose(scores, label) for label in range(3)] == [1, 0, 0]


def test_answers_cost_an_oracle_nothing_and_a_blind_model_all(tok, stream):
    ids = stream[:400].tolist()
    pairs = [(ids[i:i + 5], ids[i + 5:i + 5 + n]) for i, n in zip(range(0, 360, 40), range(3, 12))]
    too_long = ([1], [2] * 600)
    knows = Oracle(tok, [([*prompt, tok.mid], [*answer, tok.eot]) for prompt, answer in pairs])
    assert means(evaluate.answers(knows, tok, [too_long, *pairs], True)) == pytest.approx(
        {"answer": 0, "likeliest token": 1, "exact match": 1}, abs=1e-6)
    assert evaluate.answers(knows, tok, pairs, False)["exact match"]["mean"] == 0  # without <MID> it knows nothing
    blind = means(evaluate.answers(Oracle(tok), tok, pairs, True))
    tokens = [token for _, answer in pairs for token in answer]
    assert blind["answer"] == pytest.approx(len(tokens) * math.log2(tok.n_vocab) / len(tok.decode_bytes(tokens)))


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


@pytest.fixture(scope="module")
def some_problems():
    return problems.stdlib_problems(5, 1)


def test_unmodified_functions_pass_and_empty_ones_do_not(some_problems):
    assert len(some_problems) >= 16
    assert {p.task_id.split("/")[0] for p in some_problems} == {
        "SingleLineInfilling", "MultiLineInfilling", "RandomSpanInfilling", "RandomSpanInfillingLight"}
    for p in some_problems:
        assert 0 < p.end - p.start <= 160
        assert p.passes(p.text[p.start:p.end]), p.task_id
    assert not any(p.passes("") for p in some_problems)


def test_an_oracle_fills_every_hole_and_a_blind_model_none(tok, some_problems):
    answers = [(infill_prompt(Oracle(tok), tok, p.text[max(0, p.start - 8192):p.start], p.text[p.end:p.end + 8192], 128,
                              "spm", "swapped"), [*tok.encode(p.text[p.start:p.end]), tok.eot]) for p in some_problems]
    samples = []
    figures = means(evaluate.infill(Oracle(tok, answers), tok, some_problems, run_tests=True, samples=samples))
    assert len(figures) == 16 and all(value == 1 for value in figures.values())
    assert [s["completion"] for s in samples] == [p.text[p.start:p.end] for p in some_problems]
    figures = means(evaluate.infill(Oracle(tok), tok, some_problems, n=2, temperature=0.8))
    assert all(value == 0 for name, value in figures.items() if "exact" in name)


def test_nothing_runs_unless_asked(tok, some_problems, monkeypatch):
    monkeypatch.setattr(sandbox, "run", None)
    assert "SingleLine spm exact match" in evaluate.infill(Oracle(tok), tok, some_problems[:1])


def test_public_infilling_problems_are_read_and_judged(tmp_path):
    record = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n",
              "canonical_solution": "    y = x + 1\n", "suffix": "    return y\n",
              "test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"}
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as f:
        f.write(json.dumps(record) + "\n\n")
    problem, = problems.read_problems(tmp_path / "p.jsonl.gz")
    assert problem.passes("    y = 1 + x\n")
    assert not problem.passes("    y = x\n") and not problem.passes("") and not problem.passes("    exit(0)\n")


def test_lost_in_the_middle_files_are_read_and_judged(tok, tmp_path):
    record = {"question": "Who?", "answers": ["The Smith."], "ctxs": [{"title": "a", "text": "b"},
                                                                      {"title": "c", "text": "d", "isgold": True}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"question": "x" * 3000}))
    documents = problems.read_documents(tmp_path / "d.jsonl")
    assert documents[0][1:] == (["The Smith."], ["Document [1](Title: a) b", "Document [2](Title: c) d"], 2)
    prompt = tok.encode("Answer the question from the documents.\n\nDocument [1](Title: a) b\n"
                        "Document [2](Title: c) d\n\nQuestion: Who?\nAnswer:")
    oracle = Oracle(tok, [(prompt, [*tok.encode(" a smith, I think"), tok.eot])])
    figures = means(evaluate.multidoc_file(oracle, tok, documents))
    assert figures == {"file: fits the context": 0.5, "file: right": 1, "file: 2 documents, answer at 2": 1}
    assert means(evaluate.multidoc_file(Oracle(tok), tok, documents))["file: right"] == 0


GOOD = {"problems": dict.fromkeys(("task_id", "prompt", "suffix", "canonical_solution", "test", "entry_point"), "x"),
        "documents": {"question": "q", "answers": ["a"], "ctxs": [{"text": "t"}]},
        "questions": {"context": "c", "choices": ["a", "b"], "label": 1}}


@pytest.mark.parametrize("kind, bad, said", [
    ("problems", '{"task_id": ', "not JSON"), ("problems", "[1]", 'no field "task_id"'),
    ("problems", {"test": 3}, 'no field "test" of type str'), ("documents", {"answers": []}, '"answers"'),
    ("documents", {"ctxs": [{}]}, '"ctxs"'), ("questions", {"label": 2}, '"label" to be 0 to 1'),
    ("questions", {"choices": [1]}, '"choices"')])
def test_a_damaged_file_gets_one_line_with_the_line_number(kind, bad, said, tmp_path, capsys):
    good = GOOD[kind]
    bad = bad if isinstance(bad, str) else json.dumps(good | bad)
    (tmp_path / "f.jsonl").write_text(f"{json.dumps(good)}\n{bad}\n")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f"--{kind}", str(tmp_path / "f.jsonl")])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and "line 2" in message and said in message


def test_half_a_gzip_file_gets_one_line(tmp_path):
    whole = gzip.compress("\n".join(json.dumps(GOOD["questions"]) for _ in range(2000)).encode())
    (tmp_path / "f.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="f.jsonl.gz: cannot be read after line"):
        problems.read_questions(tmp_path / "f.jsonl.gz")


def test_attention_received_is_a_mean_over_heads_and_the_queries_that_see_a_position(model):
    rows = torch.randint(200, (3, 10))
    for attention_kind in ("manual", "fused"):
        model.config.attention = attention_kind
        found = attention.received(model, rows.numpy())
        assert model.config.attention == attention_kind
    model.config.attention = "manual"
    weights = attention.weights(model, rows)
    assert weights.shape == (3, 2, 2, 10, 10)
    for n, j in itertools.product(range(3), range(10)):
        expected = np.mean([weights[n, :, :, i, j].mean() * (i + 1) for i in range(j, 10)])
        assert found[n, j] == pytest.approx(expected, rel=1e-4)


def test_decay_and_variance_are_the_papers_formulas():
    plain, masked = np.array([[1.0, 2, 3, 4]]), np.array([[0.5, 2, 1, 9]])
    hidden = np.array([[True, False, True, False]])
    there, fall, variance, rise = (part[0] for part in attention.compare(plain, masked, hidden))
    assert fall / there == pytest.approx(((1 + 3) - (0.5 + 1)) / (1 + 3))
    assert variance == np.var([2, 4]) and variance + rise == np.var([2, 9])


def test_a_model_that_looks_everywhere_alike_has_no_decay_and_shares_by_length(model, tok, stream):
    even = GPT(model.config).eval()
    for block in even.transformer.h:
        torch.nn.init.zeros_(block.attn.c_attn.weight)
    figures = means(evaluate.attention(even, tok, stream, limit=4, segments=("a b c ", "d", "e f", "g h i j k l")))
    lengths = [len(tok.encode(text)) for text in ("a b c ", "d", "e f", "g h i j k l")]
    for name, length in zip(attention.SEGMENTS, lengths):
        assert figures[f"share of {name}"] == pytest.approx(length / sum(lengths), rel=1e-4)
    assert figures["decay at masked positions, within the model"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="context holds 64"):
        attention.shares(even, tok, ("", "d " * 80, "", "g"))


def test_the_whole_run_writes_a_table_results_samples_and_figures(model, tok, documents, tmp_path, capsys, no_float64):
    (tmp_path / "text.py").write_text("\n".join(documents[:3]))
    small = GPT(GPTConfig(tok.n_vocab, block_size=128, n_layer=1, n_head=1, n_embd=16))
    for name in ("ntp", "fim"):
        (tmp_path / name).mkdir()
        objective = {f: getattr(OBJECTIVES[name], f) for f in OBJECTIVES[name].__dataclass_fields__}
        train.save_checkpoint(tmp_path / name / "ckpt.pt", {
            "model": small.state_dict(), "model_config": vars(small.config), "tokenizer": tok.to_dict(), "step": 1,
            "optimizers": [], "objective": objective, "config": {"data": str(tmp_path / "text.py"), "objective": name}})
    ckpt, fim, out, cache, png = (str(tmp_path / name) for name in ("ntp", "fim", "out", "cache", "png"))
    (tmp_path / "fim/metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "epoch": 0.5, "answer_bpb": 2.0}\n')
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"prompt": "{i}:", "answer": "{i} {i}"}}\n' for i in range(60)))
    can_draw = importlib.util.find_spec("matplotlib")
    evaluate.main(["--ckpt", ckpt, fim, "--limit", "2", "--out", out, "--cache-dir", cache, "--device", "cpu",
                   "--pairs", str(tmp_path / "pairs.jsonl"), *(["--figures", png] if can_draw else [])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "ntp", "fim"] and len({len(line) for line in lines}) == 1
    assert {line.split()[0] for line in lines[1:]} == set(evaluate.TASKS)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results["ntp"]["bpb"] == results["fim"]["bpb"] and results["ntp"]["infill"] == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "samples-fim-psm.jsonl", "samples-fim-spm.jsonl"}
    assert results["fim"]["answers"]["curve"] == [[0.5, 2.0]] and "curve" not in results["ntp"]["answers"]
    assert not can_draw or {path.name for path in (tmp_path / "png").iterdir()} == {
        "needle.png", "multidoc.png", "answers.png", "attention.png", "head-ntp.png", "head-fim.png"}


SERVER = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"


@pytest.mark.parametrize("program", [
    "while True: pass", "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "x = [0]\nwhile True: x += x", "open({outside!r}, 'w')", "import os\nos.open({outside!r}, os.O_CREAT)",
    "import os\nos.remove({present!r})", "import os\nos.rename({present!r}, {outside!r})", SERVER, "import ctypes",
    "import os\nos.fork()", "import os\nos.system('true')", "import subprocess\nsubprocess.run(['true'])",
    "print('x' * 10**9)", "import os\nos._exit(0)", "raise SystemExit(0)", "def f(): f()\nf()", "syntax error"])
def test_the_sandbox_stops_what_it_should(program, tmp_path):
    (tmp_path / "present").write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.format(outside=str(tmp_path / "outside"), present=str(tmp_path / "present"),
                                 port=server.getsockname()[1]) if "{" in program else program
        outcome = sandbox.run(program, timeout=1, memory=2**28)
    assert not outcome.ok and outcome.why
    assert {path.name for path in tmp_path.iterdir()} == {"present"}


def test_the_sandbox_lets_plain_programs_be():
    assert sandbox.run("open('note', 'w').write('x')\nassert open('note').read() == 'x'\nprint('done')").why == "done"
    docstrings = {"right": ">>> f()\n1\n", "wrong": ">>> f()\n2\n"}
    outcome = sandbox.run("def f():\n    return 1\n", "m", docstrings, trace=True)
    assert outcome.passed == {"right": True, "wrong": False} and not outcome.ok and 2 in outcome.lines["right"]
    program = "def f():\n    while True:\n        x = 1\n        return x\n"
    endless = program.index("        return"), len(program), "right"  # left out, it costs the others no time
    outcome = sandbox.run(program, "m", docstrings, {"endless": endless, "whole": (0, 0, "right")}, timeout=20)
    assert outcome.passed == {"endless": False, "whole": True}
