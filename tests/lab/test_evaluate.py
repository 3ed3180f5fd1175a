"""Each score against a value found another way; an oracle that knows the answers and a blind model to which
all tokens are equally likely; the problems' own tests; the sandbox; and the files that a user may hand in."""
import gzip
import importlib.util
import itertools
import json
import math
import socket
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import save_run, small_model
from lab import attention, evaluate, sandbox, tasks
from lab.corpora import held_out_programs, hole
from lab.figures import main as draw_figures
from lab.pairs import load_pairs
from lab.report import check_pool, figure, pool, table
from model import GPT, GPTConfig
from objectives import OBJECTIVES, fim_example, fim_prompt, knobs_of
from sample import infill_prompt

LN2 = math.log(2)


@pytest.fixture(scope="module")
def model(tok):
    return small_model(tok.n_vocab, block_size=64)


class Oracle(torch.nn.Module):
    """Knows what follows the given prompts; elsewhere every token is equally likely. Without answers it is
    blind."""

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
            for t in range(idx.shape[1]):
                following = self.known.get(tuple(row[:len(row) - idx.shape[1] + t + 1]))
                if following is not None:
                    logits[b, t, following] = 50
        return logits, None


def means(figures):
    return {name: f["mean"] for name, f in figures.items() if "mean" in f}


def asked(tok, order=None, **settings):
    """What main gives a task: a model that infills in this order, in the joint layout."""
    layouts = {order: partial(fim_prompt, tok=tok, order=order, spm_layout="joint")} if order else {}
    return SimpleNamespace(**{"layouts": layouts, "seed": 1, "n": 1, "temperature": 0.0, "run_tests": False,
                              "reference": None, "folder": "none"} | settings)


def test_a_figure_worked_by_hand():
    # squared residuals 1/16, 9/16, 1/16, 1/16: their sum 3/4 over n - 1 = 3 is the variance, 1/4
    assert figure([1, 0, 1, 1]) == {"mean": 0.75, "se": math.sqrt(1 / 4) / math.sqrt(4), "n": 4, "unit": "%"}
    # 6 of 3 and 1 of 1: (6 + 1) / (3 + 1) = 7/4; residuals 6 - 3 * 7/4 = 3/4 and 1 - 7/4 = -3/4
    weighted = figure([6, 1], [3, 1], "bits")
    assert weighted["mean"] == 7 / 4 and weighted["se"] == pytest.approx(math.sqrt(2 * (9 / 16 + 9 / 16)) / 4)
    assert figure([])["mean"] is None and figure([1])["se"] is None


def test_pooled_runs_give_the_mean_and_the_error_over_seeds():
    def run(mean):
        return {"bpb": {"x": {"mean": mean, "se": 9, "n": 7, "unit": "bits/byte"}, "grid": [1]}}

    pooled = pool({"a": run(1.0), "b": run(2.0), "c": run(6.0), "d": run(None)},
                  {name: {"objective": "fim" if name == "d" else "ntp"} for name in "abcd"})
    assert list(pooled) == ["ntp (3)", "fim (1)"] and list(pooled["ntp (3)"]["bpb"]) == ["x"]
    assert pooled["ntp (3)"]["bpb"]["x"] == pytest.approx(
        {"mean": 3, "se": math.sqrt(7 / 3), "n": 3, "unit": "bits/byte"})
    assert table(pooled).splitlines()[1].split() == ["bpb", "x", "bits/byte", "3.000", "±", "1.528", "-"]


@pytest.mark.parametrize("name, value, is_pooled", [
    ("seed", 2, True), ("out", "out/b", True), ("objective", "meap", True), ("steps", 1500, False),
    ("fim_rate", 0.9, False), ("init_from", "ntp-2", True), ("init_from", "meap", False)])
def test_only_runs_that_differ_in_the_seed_are_pooled(name, value, is_pooled, model, tok, tmp_path):
    for base, objective, seed in (("ntp-1", "ntp", 1), ("ntp-2", "ntp", 2), ("meap", "meap", 1)):
        save_run(tmp_path / base, model, tok, objective, seed=seed)
    one = {"objective": "fim", "seed": 1, "out": "out/a", "steps": 750, "init_from": str(tmp_path / "ntp-1"),
           "knobs": {"fim_rate": 0.5}}
    value = str(tmp_path / value) if name == "init_from" else value
    other = one | ({"knobs": {name: value}} if name in one["knobs"] else {name: value})
    if is_pooled:
        check_pool({"a": one, "b": other})
    else:
        with pytest.raises(ValueError, match=f"a and b differ in more than the seed: {name}"):
            check_pool({"a": one, "b": other})


@pytest.mark.parametrize("objective, knobs, orders", [
    ("ntp", {}, []), ("fim_psm", {}, ["psm"]), ("fim_spm", {}, ["spm"]), ("fim", {}, ["psm", "spm"]),
    ("fim", {"spm_rate": 1.0}, ["spm"]), ("fim", {"spm_rate": 0.0}, ["psm"]), ("fim", {"fim_rate": 0.0}, [])])
def test_a_model_is_asked_in_the_layouts_of_its_training(objective, knobs, orders, tok):
    knobs = knobs_of(OBJECTIVES[objective]) | knobs
    layouts = evaluate.layouts(objective, knobs, tok)
    assert list(layouts) == orders
    for order, layout in layouts.items():
        assert layout([1, 2], [3]) == fim_prompt([1, 2], [3], tok, order, knobs.get("spm_layout"))


def test_score_gives_each_token_what_the_model_gives_it_alone(model, tok, stream):
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(30):
        n, m = rng.integers(1, 40), rng.integers(1, 20)
        ids = stream[(start := rng.integers(len(stream) - 60)):start + n + m].tolist()
        pairs.append((ids[:n], ids[n:]))
    for (prompt, continuation), s in zip(pairs, evaluate.score(model, pairs, watch=7)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation]))[0][0, len(prompt) - 1:-1]
        log_p = F.log_softmax(logits, dim=-1)
        expected = [log_p[i, token] for i, token in enumerate(continuation)]
        np.testing.assert_allclose(s.log_p, expected, atol=1e-4)
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


def test_bits_per_byte_are_those_of_a_plain_loop_and_of_a_blind_guess(model, tok, stream):
    nats = size = 0
    for start in np.linspace(0, len(stream) - 65, 40).astype(int):
        ids = torch.tensor(stream[start:start + 65].tolist())
        with torch.no_grad():
            log_p = F.log_softmax(model(ids[None, :-1])[0][0], dim=-1)
        nats -= sum(log_p[i, token].item() for i, token in enumerate(ids[1:]) if token != tok.eot)
        size += len(tok.decode_bytes(ids[1:].tolist()))
    measured = evaluate.bpb(model, tok, asked(tok, stream=stream, limit=10))["left to right"]["mean"]
    assert measured == pytest.approx(nats / LN2 / size, rel=1e-4)
    windows = [stream[start + 1:start + 513] for start in np.linspace(0, len(stream) - 513, 8).astype(int)]
    bits = sum((w != tok.eot).sum() for w in windows) * math.log2(tok.n_vocab)
    blind = evaluate.bpb(Oracle(tok), tok, asked(tok, stream=stream, limit=2))["left to right"]["mean"]
    assert blind == pytest.approx(bits / sum(len(tok.decode_bytes(w.tolist())) for w in windows))


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_middle_bits_per_byte_are_the_cost_of_the_middle_in_the_training_layout(model, tok, stream, order):
    figures = means(evaluate.middle_bpb(model, tok, asked(tok, order, stream=stream, limit=6, seed=2)))
    cuts = tasks.random_span_holes(stream, tok, 6, 2, 60)
    assert len(cuts) == 6

    def cost(ids, n):
        ids = torch.tensor([[tok.eot, *ids]])
        with torch.no_grad():
            nats = F.cross_entropy(model(ids)[0][0, :-1], ids[0, 1:], reduction="none")
        return nats[-n:].sum().item() / LN2

    size = sum(len(tok.decode_bytes(middle)) for _, middle, _ in cuts)
    with_suffix = sum(cost(fim_example(p, m, s, tok, order, "joint")[:-1], len(m)) for p, m, s in cuts)
    alone = sum(cost(p + m, len(m)) for p, m, s in cuts)
    assert figures[f"middle, {order}"] == pytest.approx(with_suffix / size, rel=1e-4)
    assert figures["middle, prefix alone"] == pytest.approx(alone / size, rel=1e-4)


def test_holes_are_single_lines_and_two_uniform_characters(tok, stream):
    text = tok.decode(stream.tolist())
    for prefix, middle, suffix in tasks.single_line_holes(stream, tok, 20, 1, 30, 20, 15):
        assert (len(prefix), len(suffix)) == (30, 20) and 0 < len(middle) <= 15
        line = tok.decode(middle)
        assert line.strip() and line.endswith("\n") and line.count("\n") == 1
        assert tok.decode(prefix + middle + suffix) in text and tok.decode(prefix).endswith("\n")
    holes = tasks.random_span_holes(stream, tok, 400, 1, 60)
    shares = []
    for parts in holes:
        texts = [tok.decode(part) for part in parts]
        assert parts[1] and sum(map(len, parts)) <= 60 and "".join(texts) in text
        shares.append([len(part) / len("".join(texts)) for part in texts])
    np.testing.assert_allclose(np.mean(shares, axis=0), 1 / 3, atol=0.05)  # of two uniform cuts


def test_an_oracle_stops_where_the_middle_ends_and_a_blind_model_by_chance(tok, stream):
    holes = tasks.single_line_holes(stream, tok, 6, 1) + tasks.random_span_holes(stream, tok, 6, 1, 120)
    oracle = Oracle(tok, [(fim_prompt(p, s, tok, "spm", "joint"), [*m, tok.eot]) for p, m, s in holes])
    figures = means(evaluate.stopping(oracle, tok, asked(tok, "spm", stream=stream, limit=6)))
    for kind in ("line", "span"):
        assert figures.pop(f"{kind}: P(<EOT>) elsewhere in the middle") < 1e-9
        for control in ("another hole's suffix", "the suffix a line later"):  # holes that it does not know
            assert figures.pop(f"{kind}: P(<EOT>) at the true end before {control}") < 0.01
        for where in ("at the true end", "elsewhere in the middle", "of another hole at the true end"):
            assert figures.pop(f"{kind}: P(the suffix's first 2 tokens) {where}") < 0.01  # it only infills
    assert len(figures) == 14 and all(value == pytest.approx(1) for value in figures.values())
    figures = means(evaluate.stopping(Oracle(tok), tok, asked(tok, "spm", stream=stream, limit=6), n=2))
    for name in ("true end", "true end before another hole's suffix"):
        assert figures[f"span: P(<EOT>) at the {name}"] == pytest.approx(1 / tok.n_vocab)
    assert figures["line: P(<EOT>) elsewhere in the middle"] == pytest.approx(1 / tok.n_vocab)
    assert figures["line: greedy ends in <EOT>"] == figures["span: best of 2 exact match"] == 0


def test_a_look_two_tokens_ahead_finds_where_a_middle_joins_its_suffix(tok, stream):
    holes = tasks.single_line_holes(stream, tok, 6, 1)
    knows = Oracle(tok, [([tok.eot, *prefix, *middle], suffix[:2]) for prefix, middle, suffix in holes])
    no_suffix = [(*holes[0][:2], [])]  # would be certain: a text of no tokens has probability 1
    right, *wrong = means(evaluate.lookahead(knows, tok, holes + no_suffix, 1)).values()
    assert right == pytest.approx(1) and max(wrong) < 1e-4
    for value in means(evaluate.lookahead(Oracle(tok), tok, holes, 1)).values():
        assert value == pytest.approx(tok.n_vocab ** -2)


PROMPTS = {"needle": lambda tok, stream: tasks.needle_prompts(512, tok, stream, 20, 3),
           "records": lambda tok, stream: tasks.records_prompts(512, tok, 10, 3),
           "multineedle": lambda tok, stream: tasks.multineedle_prompts(512, tok, stream, 10, 3)}


@pytest.mark.parametrize("name", PROMPTS)
def test_an_oracle_recalls_everything_and_a_blind_model_nothing(name, tok, stream):
    questions = PROMPTS[name](tok, stream)
    assert questions and all(len(prompt) <= 500 for _, prompt, *_ in questions)
    for _, prompt, answer, other in questions:
        assert tok.decode(prompt).count(f'"{answer}') == 1 and answer != other
    oracle = Oracle(tok, [(prompt, tok.encode(answer)) for _, prompt, answer, _ in questions])
    for model, recalled, preferred in ((oracle, 1, 1), (Oracle(tok), 0, 0.5)):
        for key, value in means(evaluate.recall(model, tok, questions, name)).items():
            if "bits" not in key:
                assert value == (preferred if "preferred" in key else recalled), key


def test_a_needle_lies_at_the_line_end_nearest_to_its_depth(tok, stream):
    for (length, depth), prompt, answer, _ in tasks.needle_prompts(512, tok, stream, 20, 1):
        assert len(prompt) == length - 12
        before, needle, after = tok.decode(prompt).partition(f' = "{answer}\n')
        name = before.rpartition("\n")[2]
        before, question = before.removesuffix(name), f'\nassert {name} == "'
        assert needle and after.endswith(question)
        before, after = before.encode(), after.removesuffix(question).encode()
        ends = [0] + [i for i, byte in enumerate(before + after, 1) if byte == ord("\n")]
        # depth is counted in tokens, this test in bytes: a tenth of the text for the difference
        nearest = min(abs(end - depth * len(before + after)) for end in ends)
        assert abs(len(before) - depth * len(before + after)) <= nearest + 0.1 * len(before + after)


def test_a_record_stands_at_its_position(tok):
    for (k, position), prompt, answer, other in tasks.records_prompts(512, tok, 10, 1):
        records, _, question = tok.decode(prompt).partition("}\n")
        lines = records.splitlines()[1:]
        key = question.removeprefix('assert records[').removesuffix('] == "')
        assert len(lines) == k and lines[position - 1] == f'{key}: "{answer},' and f'"{other},' in records


def test_a_chain_of_needles_leads_to_the_value(tok, stream):
    for (number, _), prompt, answer, other in tasks.multineedle_prompts(512, tok, stream, 5, 1):
        lines = [line.split(" = ") for line in tok.decode(prompt).splitlines() if line.count(" = ") == 1]
        values = {name: source for name, source in lines}
        name = tok.decode(prompt).rpartition("assert ")[2].split()[0]
        for _ in range(number):
            name = values[name]
        assert name == f'"{answer}' and f'"{other}' in values.values()


def test_choice_takes_the_likeliest_per_token_and_shares_ties(tok, stream):
    questions = tasks.docstring_questions(stream, tok, 8, 1)
    assert len(questions) == 8 and all(len(set(choices)) == 4 for _, choices, _ in questions)
    oracle = Oracle(tok, [(tok.encode(context), tok.encode(choices[label]))
                          for context, choices, label in questions])
    for model, share in ((oracle, 1), (Oracle(tok), 0.25)):
        figures = evaluate.choice(model, tok, asked(tok, stream=stream, limit=8))
        assert figures["docstring of a function"]["mean"] == share
    scores = [evaluate.Score(np.array(log_p), None, None)
              for log_p in ([-1.0, -1.0, -1.0], [-1.5], [-0.5, -3.0])]
    assert [evaluate.choose(scores, label) for label in range(3)] == [1, 0, 0]


def test_an_oracle_needs_no_bits_for_an_answer_and_a_blind_model_the_vocabulary(tok, tmp_path):
    pairs = [{"prompt": f"{i} and", "answer": f"the answer {i * i}"} for i in range(200)]
    too_long = [{"prompt": str(i) * 9000, "answer": "y"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs + too_long)))
    a = asked(tok, pairs=str(tmp_path / "pairs.jsonl"), limit=200, is_fine_tuned=True)
    knows = Oracle(tok, [([*tok.encode(p["prompt"]), tok.mid], [*tok.encode(p["answer"]), tok.eot])
                         for p in pairs])
    assert means(evaluate.answers(knows, tok, a)) == pytest.approx(
        {"answer": 0, "likeliest token": 1, "exact match": 1}, abs=1e-6)
    a.is_fine_tuned = False  # then the question has no <MID>, which this oracle waits for
    assert evaluate.answers(knows, tok, a)["exact match"]["mean"] == 0
    held_out = [answer for _, answer in load_pairs(a.pairs)[1] if answer != "y"]
    tokens = [token for answer in held_out for token in tok.encode(answer)]
    bits = len(tokens) * math.log2(tok.n_vocab)
    blind = means(evaluate.answers(Oracle(tok), tok, a))
    assert held_out and blind["answer"] == pytest.approx(bits / len("".join(held_out)))


@pytest.mark.parametrize("n", [1, 2])
def test_an_oracle_fills_programs_rightly_where_it_sees_their_own_suffix(n, tok):
    answers = []
    for kind in ("line", "lines", "span"):
        rng = np.random.default_rng(1)
        for parts in [hole(text, kind, rng) for text in held_out_programs(4, seed=1)]:
            if parts:
                prefix, middle, suffix = map(tok.encode, parts)
                answers.append((fim_prompt(prefix, suffix, tok, "spm", "joint"), [*middle, tok.eot]))
    given = asked(tok, "spm", limit=4, n=n, temperature=0.8 if n > 1 else 0.0)
    passed = means(evaluate.programs(Oracle(tok, answers), tok, given))
    own = [value for name, value in passed.items() if ", spm" in name and "another's" not in name]
    others = [value for name, value in passed.items() if "another's" in name or "left" in name]
    assert own == [1.0] * len(own) and len(own) == 3 * n and np.mean(others) < 0.2


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


@pytest.fixture(scope="module")
def problems():
    return tasks.stdlib_problems(5, 1)


def test_unmodified_functions_pass_and_empty_ones_do_not(problems):
    assert len(problems) >= 12
    assert {p.task_id.split("/")[0] for p in problems} == {
        "SingleLineInfilling", "MultiLineInfilling", "RandomSpanInfilling"}
    for p in problems:
        assert 0 < p.end - p.start <= 160
        assert p.passes(p.text[p.start:p.end]), p.task_id
    assert not any(p.passes("") for p in problems)


def prompt_of(p, tok):
    around = p.text[max(0, p.start - 8192):p.start], p.text[p.end:p.end + 8192]
    return infill_prompt(Oracle(tok), tok, *around, 128, asked(tok, "spm").layouts["spm"])


def test_an_oracle_fills_every_hole_and_a_blind_model_none(tok, problems):
    answers = [(prompt_of(p, tok), [*tok.encode(p.text[p.start:p.end]), tok.eot]) for p in problems]
    result = evaluate.infill(Oracle(tok, answers), tok, asked(tok, "spm", problems=problems, run_tests=True))
    assert [line["completion"] for line in result.pop("files")["samples-{}-spm"]] == [
        p.text[p.start:p.end] for p in problems]
    assert len(result) == 12 and all(value == 1 for value in means(result).values())
    a = asked(tok, "spm", problems=problems, n=2, temperature=0.8)
    blind = means(evaluate.infill(Oracle(tok), tok, a))
    assert all(value == 0 for name, value in blind.items() if "exact" in name)


def test_completions_are_plain_samples_also_where_they_repeat_the_suffix(tok, problems):
    p = max(problems, key=lambda p: p.start)
    runs_on = tok.encode(p.text[p.start:p.end + 2000])[:128]
    oracle = Oracle(tok, [(prompt_of(p, tok), runs_on)])
    result = evaluate.infill(oracle, tok, asked(tok, "spm", problems=[p]))
    assert result["files"]["samples-{}-spm"] == [{"task_id": p.task_id, "completion": tok.decode(runs_on)}]


def test_nothing_runs_unless_asked(tok, problems, monkeypatch):
    monkeypatch.setattr(sandbox, "run", None)
    a = asked(tok, "spm", problems=problems[:1])
    assert "SingleLine spm exact match" in evaluate.infill(Oracle(tok), tok, a)


PROBLEM = {"task_id": "SingleLineInfilling/HumanEval/0/L0", "prompt": "def f(x):\n",
           "canonical_solution": "    y = x + 1\n", "suffix": "    return y\n",
           "test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"}


def test_public_infilling_problems_are_read_and_judged(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as f:
        f.write(json.dumps(PROBLEM) + "\n\n")
    problem, = tasks.read_problems(tmp_path / "p.jsonl.gz")
    assert problem.passes("    y = 1 + x\n")
    assert not any(problem.passes(wrong) for wrong in ("    y = x\n", "", "    exit(0)\n"))


@pytest.mark.parametrize("answer, is_right", [
    (" a smith, I think", 1), ("The smith!\nQuestion", 1), (" Nobody.\nThe Smith.", 0)])
def test_lost_in_the_middle_is_prompted_and_judged_as_by_its_authors(answer, is_right, tok, tmp_path):
    ctxs = [{"title": "a", "text": "b"}, {"title": "c", "text": "d", "isgold": True}]
    record = {"question": "Who?", "answers": ["The Smith."], "ctxs": ctxs}
    too_long = record | {"question": "x" * 3000}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(too_long))
    documents = tasks.read_documents(tmp_path / "d.jsonl")
    prompt = ("Write a high-quality answer for the given question using only the provided search results "
              "(some of which might be irrelevant).\n\nDocument [1](Title: a) b\nDocument [2](Title: c) d\n\n"
              "Question: Who?\nAnswer:")
    assert documents[0] == (prompt, ["The Smith."], 2, 2)
    oracle = Oracle(tok, [(tok.encode(prompt), [*tok.encode(answer), tok.eot])])
    result = evaluate.multidoc(oracle, tok, asked(tok, documents=documents))
    assert means(result) == {
        "fits the context": 0.5, "right": is_right, "2 documents, answer at 2": is_right}
    assert result["files"] == {"answers-{}": [{"answers": ["The Smith."], "model_answer": answer}]}


DOCUMENT = {"question": "q", "answers": ["a"], "ctxs": [{"text": "t"}]}


@pytest.mark.parametrize("arguments, good, bad, message", [
    ("--problems F", PROBLEM, '{"task_id": ', "line 2 is not JSON"),
    ("--problems F", PROBLEM, "[1]", "line 2: expected task_id"),
    ("--problems F", PROBLEM, {"test": 3}, "line 2: expected task_id"),
    ("--documents F", DOCUMENT, {"answers": []}, "line 2: expected a question"),
    ("--documents F", DOCUMENT, {"ctxs": [{}]}, "line 2: expected a question"),
    ("--documents F.gz", DOCUMENT, None, "F.gz: expected UTF-8 text, got"),
    ("--tasks multidoc", None, None, "expected --documents F"),
    ("--tasks bpc", None, None, "invalid choice: 'bpc'"), ("--limit 0", None, None, "--limit: 0"),
    ("--n 0", None, None, "--n: 0"), ("--seed -1", None, None, "--seed: -1"),
    ("--temperature nan", None, None, "--temperature: nan"),
    ("--ckpt run none", None, None, "none: no such checkpoint"),
    ("--ckpt run longer --pool", None, None, "run and longer differ in more than the seed: steps")])
def test_a_mistake_gets_one_line_before_any_work(arguments, good, bad, message, model, tok, tmp_path, capsys,
                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "prepare", None)
    for name, steps in (("run", 1), ("longer", 2)):
        save_run(tmp_path / name, model, tok, steps=steps)
    bad = bad if isinstance(bad, str) else json.dumps((good or {}) | (bad or {}))
    (tmp_path / "F").write_text(f"{json.dumps(good)}\n{bad}\n")
    (tmp_path / "F.gz").write_bytes(gzip.compress(f"{json.dumps(good)}\n".encode() * 2000)[:60])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*([] if "tasks" in arguments else ["--tasks", "bpb"]),
                       *([] if "ckpt" in arguments else ["--ckpt", "run"]), *arguments.split()])
    printed = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and printed.count("\n") == 1 and message in printed


def test_attention_received_is_a_mean_over_heads_and_the_queries_that_see_a_position(model):
    rows = torch.randint(200, (3, 10))
    for kind in ("manual", "fused"):
        model.config.attention = kind
        att = attention.received(model, rows.numpy())
        assert model.config.attention == kind
    model.config.attention = "manual"
    weights = attention.weights(model, rows)
    assert weights.shape == (3, 2, 2, 10, 10)
    for n, j in itertools.product(range(3), range(10)):
        expected = np.mean([weights[n, :, :, i, j].mean() * (i + 1) for i in range(j, 10)])
        assert att[n, j] == pytest.approx(expected, rel=1e-4)


def test_decay_and_variance_are_the_papers_formulas():
    plain, masked = np.array([[1.0, 2, 3, 4]]), np.array([[0.5, 2, 1, 9]])
    is_masked = np.array([[True, False, True, False]])
    before, fall, variance, rise = (part[0] for part in attention.compare(plain, masked, is_masked))
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
    figures = means(evaluate.attention(even, tok, asked(tok, stream=stream, limit=16)))
    assert figures["decay at masked positions, within the model"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="context holds 128"):
        attention.shares(even, tok, ("", "d " * 160, "", "g"))


@pytest.fixture
def runs(tok, documents, tmp_path):
    """A folder with the runs ntp and fim, and files for the tasks that read some."""
    (tmp_path / "text.py").write_text("\n".join(documents[:3]))
    small = GPT(GPTConfig(tok.n_vocab, block_size=128, n_layer=1, n_head=1, n_embd=16))
    for name in ("ntp", "fim"):
        save_run(tmp_path / name, small, tok, name, data=str(tmp_path / "text.py"))
        (tmp_path / name / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 7.5}\n{"step": 2, "loss": 6, "epoch": 0.5, "answer_bpb": 2.0}\n')
    (tmp_path / "ntp/metrics.jsonl").write_text('{"step": 1, "loss": 7.5, "held_out_bpb": 2.5}\n')
    pairs = [{"prompt": f"{i}:", "answer": f"{i} {i}"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "problems.jsonl").write_text(f"{json.dumps(PROBLEM)}\n" * 3)
    (tmp_path / "documents.jsonl").write_text(json.dumps(DOCUMENT))
    return tmp_path


def run_tasks(folder, names, *arguments):
    evaluate.main(["--ckpt", *(str(folder / name) for name in names), "--limit", "2", "--device", "cpu",
                   "--out", str(folder / "out"), "--cache-dir", str(folder / "cache"), *arguments])


def test_a_run_writes_a_table_results_samples_and_figures(tok, runs, capsys, no_float64):
    can_draw = importlib.util.find_spec("matplotlib")
    run_tasks(runs, ("ntp", "fim"),
              *(f"--{name}={runs / name}.jsonl" for name in ("pairs", "problems", "documents")),
              *(["--figures", str(runs / "png")] if can_draw else []))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["task", "ntp", "fim"] and len({len(line) for line in lines}) == 1
    assert {line.split()[0] for line in lines[1:]} == set(evaluate.TASKS)
    assert "expects a sample of each of the 3 problems" in printed.err
    results = json.loads((runs / "out/results.json").read_text())["results"]
    assert results["ntp"]["bpb"] == results["fim"]["bpb"] and results["ntp"]["infill"] == {}
    assert {path.name for path in (runs / "out").iterdir()} == {
        "results.json", "samples-fim-psm.jsonl", "samples-fim-spm.jsonl"}
    samples = [json.loads(line) for line in (runs / "out/samples-fim-psm.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and all(sample.keys() == {"task_id", "completion"} for sample in samples)
    assert results["fim"]["answers"]["curve"] == [[0.5, 2.0]] and results["ntp"]["answers"]["curve"] == []
    assert not can_draw or {path.name for path in (runs / "png").iterdir()} == {
        "needle.png", "records.png", "answers.png", "attention.png"}


def test_results_of_other_runs_and_tasks_are_kept(tok, runs, capsys):
    run_tasks(runs, ["ntp"], "--tasks", "bpb", "records")
    (runs / "elsewhere").mkdir()
    (runs / "ntp").rename(runs / "elsewhere/ntp")  # another run of the same name
    run_tasks(runs, ["fim", "elsewhere/ntp"], "--tasks", "bpb")
    run_tasks(runs, ["fim"], "--tasks", "choice", "--seed", "2")
    saved = json.loads((runs / "out/results.json").read_text())
    assert {name: set(tasks) for name, tasks in saved["results"].items()} == {
        "ntp": {"bpb", "records"}, "fim": {"bpb", "choice"}, "ntp'": {"bpb"}}
    assert [saved["settings"]["fim"][task]["seed"] for task in ("bpb", "choice")] == [1, 2]
    assert capsys.readouterr().out.splitlines()[-2].split() == ["task", "fim"]  # the table is of this call


def test_help_has_a_sentence_on_each_task(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    told = capsys.readouterr().out.partition("tasks:\n")[2]
    starts = [line.split()[0] for line in told.splitlines() if line[:3].strip()]
    assert starts == list(evaluate.TASKS) and all(f"  {name}" in told for name in starts)


def test_figures_of_tasks_that_have_none_say_so_and_leave_no_folder(runs, capsys):
    pytest.importorskip("matplotlib")
    run_tasks(runs, ["ntp"], "--tasks", "bpb", "--figures", str(runs / "png"))
    assert "no figure" in capsys.readouterr().err and not (runs / "png").exists()


def test_one_text_and_how_runs_learned_are_drawn(runs):
    image = pytest.importorskip("matplotlib.image")
    draw_figures(["rows", str(runs / "rows.png")])
    pixels = np.round(image.imread(runs / "rows.png")[..., :3] * 255).astype(int)
    shares = {colour: (pixels == [int(colour[i:i + 2], 16) for i in (1, 3, 5)]).all(-1).mean()
              for colour in ("#c6dbef", "#a1d99b", "#fdd0a2", "#756bb1", "#252525")}
    assert pixels.shape[1] == 1800 and min(shares.values()) > 0.005
    draw_figures(["curves", str(runs / "curves.png"), str(runs / "ntp"), str(runs / "fim")])
    assert (runs / "curves.png").stat().st_size > 10_000


SERVER = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"


@pytest.mark.parametrize("program", [
    "while True: pass", "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "x = [0]\nwhile True: x += x", "open({outside!r}, 'w')", "import os\nos.open({outside!r}, os.O_CREAT)",
    "import os\nos.remove({present!r})", "import os\nos.rename({present!r}, {outside!r})", SERVER,
    "import ctypes", "import os\nos.fork()", "import os\nos.system('true')",
    "import subprocess\nsubprocess.run(['true'])",
    "print('x' * 10**9)", "import os\nos._exit(0)", "raise SystemExit(0)", "def f(): f()\nf()",
    "syntax error"])
def test_the_sandbox_stops_what_it_should(program, tmp_path):
    (tmp_path / "present").write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.format(outside=str(tmp_path / "outside"), present=str(tmp_path / "present"),
                                 port=server.getsockname()[1]) if "{" in program else program
        outcome = sandbox.run(program, timeout=1, memory=2**28)
    assert not outcome.ok and outcome.why
    assert {path.name for path in tmp_path.iterdir()} == {"present"}


def test_the_sandbox_lets_plain_programs_be():
    program = "open('note', 'w').write('x')\nassert open('note').read() == 'x'\nprint('done')"
    assert sandbox.run(program).why == "done"
    docstrings = {"right": ">>> f()\n1\n", "wrong": ">>> f()\n2\n"}
    outcome = sandbox.run("def f():\n    return 1\n", "m", docstrings, trace=True)
    assert outcome.passed == {"right": True, "wrong": False} and not outcome.ok
    assert 2 in outcome.lines["right"]
    program = "def f():\n    while True:\n        x = 1\n        return x\n"
    endless = program.index("        return"), len(program), "right"  # left out, it costs the others no time
    holes = {"endless": endless, "whole": (0, 0, "right")}
    outcome = sandbox.run(program, "m", docstrings, holes, timeout=20)
    assert outcome.passed == {"endless": False, "whole": True}
