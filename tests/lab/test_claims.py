"""The probes against an oracle that predicts by Bayes' rule and a blind model; the prior against what fim
draws; verdicts by hand; every arm's flags; every claim's checks; runs that end once the model has learned."""
import itertools
import math
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import run_main

import sample
import train
from data import Tokenizer, prepare
from lab import claims, probes, rerun
from lab.claims import ARMS, CLAIMS, arms_of
from lab.corpora import LETTERS, LONGEST, MARKOV, documents
from lab.rerun import Arm, Check, Results, half_interval, judge
from model import GPTConfig
from objectives import fim

TOK = Tokenizer.bytes()


COLUMNS = [*TOK.encode(LETTERS), TOK.eot]  # the ids of what corpora.Markov.infill predicts


class Model(torch.nn.Module):
    """predict: a row of T ids -> logits (T, V)."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.config = predict, GPTConfig(TOK.n_vocab, 512, 1, 1, 2)
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None, cache=None):
        seen = idx
        if cache:
            seen = cache.store("idx", idx[..., None])[..., 0]
            cache.length = seen.shape[1]
        return torch.stack([self.predict(row) for row in seen.tolist()])[:, -idx.shape[1]:], None


BLIND = Model(lambda row: torch.zeros(len(row), TOK.n_vocab))


def bayes(row, order):
    """Predicts each token of <EOT> prompt middle <EOT> by corpora.Markov.infill; elsewhere by P alone, and
    after a sentinel it knows nothing. It reads prefix and suffix off the ids, as a model must."""
    p = torch.full((len(row), TOK.n_vocab), 1 / TOK.n_vocab)
    for t, i in enumerate(row):
        if i in COLUMNS[:-1]:
            p[t] = 0
            p[t, COLUMNS[:-1]] = torch.tensor(MARKOV.P[COLUMNS.index(i)], dtype=torch.float)
    if TOK.mid in row:
        mid, suf = row.index(TOK.mid), row.index(TOK.suf)
        if order == "psm":
            prefix, suffix, start = row[row.index(TOK.pre) + 1:suf], row[suf + 1:mid], mid
        else:  # joint: the middle may begin after any letter; the first is the prefix's
            prefix, suffix, start = row[mid + 1:mid + 2], row[suf + 1:mid], mid + 1
        written = [*itertools.takewhile(lambda i: i not in (TOK.eot, 0), row[start + 1:])]  # 0: padding
        prior = probes.length_prior(len(prefix), len(suffix), order == "spm")
        if len(written) < len(prior):
            exact = MARKOV.infill(TOK.decode(prefix)[-1], TOK.decode(written), TOK.decode(suffix)[0], prior)
            if np.isfinite(exact).all():
                p[start:start + len(exact)] = 0
                p[start:start + len(exact), COLUMNS] = torch.tensor(exact, dtype=torch.float)
    return p.clamp(min=1e-9).log()


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_bayes_rule_itself_scores_as_the_exact_answer(order):
    out = probes.middles(Model(partial(bayes, order=order)), TOK, order, "joint", True, n=30)
    exact, model = out[f"{order}_scatter"]
    np.testing.assert_allclose(model, exact, atol=1e-3)
    for name in ("end", "elsewhere", "another", "saved"):
        assert out[f"{order}_{name}"] == pytest.approx(out[f"bayes_{order}_{name}"], abs=1e-3), name
    assert out[f"{order}_middle"] == pytest.approx(0, abs=1e-3)
    assert out[f"{order}_end"] > 3 * out[f"{order}_another"]
    assert out[f"{order}_saved"] > 1


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_the_prior_of_a_middles_length_is_how_fim_draws_it(order):
    """Of 10,000 documents: how many middles of each length there are, and how many the prior expects."""
    rng, counted, expected = np.random.default_rng(1), Counter(), np.zeros(33)
    for text in documents("markov", 10_000, seed=5):
        ids = np.array([*TOK.encode(text), *[TOK.eot] * 4])  # room for the sentinels
        row = fim(ids, TOK, rng, fim_rate=1, spm_rate=float(order == "spm"))[0].tolist()
        suf, mid = row.index(TOK.suf), row.index(TOK.mid)
        n_suffix = mid - suf - 1
        # In joint SPM, <PRE> <SUF> suffix <MID> prefix middle, let the prefix be one letter.
        n_prefix, n_middle = (suf - 1, len(row) - mid - 1) if order == "psm" else (1, len(row) - mid - 2)
        if n_suffix and n_prefix and n_middle >= 0:
            prior = probes.length_prior(n_prefix, n_suffix, order == "spm")
            expected[:len(prior)] += prior / prior.sum()
            counted[n_middle] += 1
    assert sum(counted.values()) > 4000
    for length in range(25):
        assert abs(counted[length] - expected[length]) < 4.5 * math.sqrt(expected[length] + 1), length


def test_a_blind_model_neither_reads_nor_recalls(monkeypatch):
    bits = math.log2(TOK.n_vocab)
    out = probes.on_markov(BLIND, TOK, {}, False)
    texts = documents("markov", 500, seed=1)
    exact = sum(map(MARKOV.document_bits, texts)) / sum(len(text) + 1 for text in texts)
    assert out["excess"] + out["coin"] == pytest.approx(bits - exact) and 1.5 < exact < 2
    assert out["coin"] == pytest.approx(math.log2(TOK.n_vocab / (TOK.n_vocab - 1)))
    assert probes.PROBES["records"](BLIND, TOK, {}, False)["recall"] == 0
    monkeypatch.setattr(probes, "held_out_stdlib", lambda: [str(i) for i in range(1000)])
    code = probes.on_stdlib(BLIND, TOK, {}, False)  # a token is a byte here
    assert code == {"bits": pytest.approx(bits - out["coin"]), "coin": pytest.approx(out["coin"])}


@pytest.mark.parametrize("n, confidence, t", [(2, 0.9, 6.314), (3, 0.99, 9.925), (30, 0.95, 2.045)])
def test_an_interval_is_that_of_students_table(n, confidence, t):
    values = np.array([1.0, -1.0] * (n // 2) + [0.0] * (n % 2))
    error = math.sqrt((values**2).sum() / (n - 1) / n)
    assert half_interval(values, confidence) == pytest.approx(t * error, rel=2e-3)


@pytest.mark.parametrize("low, high, mean, verdict", [
    (1, math.inf, 1.3, "holds"), (1, math.inf, 1.2, "undecided"), (1, math.inf, 0.8, "undecided"),
    (1, math.inf, -0.8, "fails"), (1, math.inf, -1.3, "reversed"), (-math.inf, 1, -5, "holds"),
    (-math.inf, 1, 1.2, "undecided"), (-math.inf, 1, 1.3, "fails"), (-1, 1, 0, "holds"),
    (-1, 1, -0.8, "undecided"), (-1, 1, 1.3, "fails"), (-1, 1, -1.3, "fails")])
def test_a_verdict_by_hand(low, high, mean, verdict):
    """Three seeds: standard deviation 0.1, so the interval is the mean +- 4.303 * 0.1 / sqrt(3) = 0.248."""
    assert judge(Check("", mean + np.array([-0.1, 0, 0.1]), low, high, "bits")) == verdict


@pytest.mark.parametrize("arm", ARMS)
def test_train_takes_the_flags_of_every_arm(arm, tmp_path):
    flags = re.sub("--init-from [^ ]+", "", rerun.command(f"{arm}-2", ARMS, tmp_path))  # no such run here
    config, _ = train.read_arguments(flags.split())
    assert config.seed == 2 and config.out == f"{tmp_path}/{arm}-2" and arm.partition("-")[0] in probes.PROBES
    if arm.startswith("markov"):  # the exact answers presuppose that no document is cut into shorter ones
        assert config.knobs.get("max_document_tokens", 1000) > LONGEST


class Made(Results):
    """Results with figures of one's own: of each arm the same number, with some noise, in each seed."""

    def __call__(self, arm, name):
        return (1.0 + ("ntp" in arm or "sft" == arm[-3:])) * np.linspace(0.99, 1.01, len(self.runs(arm)))

    def curve(self, arm, name):
        return [1, 2], np.stack([self(arm, name)] * 2, axis=1)

    def log(self, arm):
        return [[{"psm_scatter": [[0.1], [0.2]], "spm_scatter": [[0.1], [0.2]]}]] * len(self.runs(arm))


def test_the_page_answers_every_claim(tmp_path, monkeypatch, capsys):
    """With every figure of MEAP half of NTP's, what is claimed of it holds, and is on the page; of records
    with dropout it is as large as MEAP's, so there the control fails."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(claims, "change_of_attention", lambda *_: dict.fromkeys(
        ("decay", "variance_rise", "answer_rise"), 0.5))
    r = Made(ARMS, tmp_path, 301)
    checks = {name: list(claim(r)) for name, claim in CLAIMS.items()}
    claims.write(checks, r, tmp_path / "claims.md")
    page = (tmp_path / "claims.md").read_text()
    for name, claim in CLAIMS.items():
        assert set(arms_of(claim)) <= ARMS.keys()
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert claim.__doc__.splitlines()[0] in section and section.count("| **") + section.count(
            "| undecided") == len(checks[name]) > 0, name
        assert name not in claims.PICTURES or (tmp_path / "claims" / f"{name}.png").stat().st_size > 5000
    for row in (
            "lowest: ntp minus meap | more than 0.0150 | 1.0000 (0.9863 to 1.0137) | 4 |  | **holds***",
            "NTP over MEAP | more than x 1.20 | x 2.72 (x 2.68 to x 2.76) | 4 |  | **holds***",
            "NTP with dropout over MEAP | more than x 1.20 | x 1.00 (x 1.00 to x 1.00) | 4 |  | **fails**"):
        assert row in page
    assert "undecided. At most some" in capsys.readouterr().out


def test_undecided_checks_get_more_seeds_and_no_others_do(tmp_path, monkeypatch, capsys):
    """a minus b is clear with 4 seeds, c minus b with 16; d lies on the bound, and stays undecided."""
    monkeypatch.setattr(rerun, "train_all", lambda r, jobs: looks.append(dict(r.seeds)))
    looks, spread = [], np.array([-1, 1] * 8)
    figures = {"a": 9 + spread, "b": 0 * spread, "c": np.array([0, 2] * 2 + [2] * 12), "d": 1 + spread}

    class Figures(Results):
        def __call__(self, arm, name):
            return figures[arm][:len(self.runs(arm))]

    def claim(r):
        yield rerun.more("a", r.minus("a", "b", ""), 1)
        yield rerun.more("c", r.minus("c", "b", ""), 1)
        yield rerun.more("d", r("d", ""), 1)

    checks = rerun.study({"claim": claim}, Figures({name: Arm("") for name in "abcd"}, tmp_path), 1)
    assert looks == [dict(a=4, b=4, c=4, d=4), dict(a=4, b=8, c=8, d=8), dict(a=4, b=16, c=16, d=16)]
    assert [(len(check.values), judge(check)) for check in checks["claim"]] == [
        (4, "holds"), (16, "holds"), (16, "undecided")]
    assert "twice as many seeds of b, c, d" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ("--jobs 0", "argument --jobs: 0: expected 1 to 1024"),
    ("--only nothing", "argument --only: invalid choice: 'nothing'")])
def test_a_mistake_is_one_line(arguments, message, capsys):
    shown = run_main(claims.main, capsys, *arguments.split())
    assert shown.code == 2 and message in shown.err


@pytest.mark.parametrize("shares, step", [([0.4, 0.7, 0.9], 25), ([0.8, 0.97], 10), ([0.1, 0.2, 0.3], 30)])
def test_where_a_curve_reaches_a_level(shares, step):
    """Interpolated; at the first evaluation; never."""
    figures = [{"step": 10 * i, "recall": share} for i, share in enumerate(shares, 1)]
    assert rerun.of_curve(figures) == {"log_steps": pytest.approx(math.log(step))}


def test_runs_end_once_they_have_learned_and_are_not_trained_twice(tmp_path, monkeypatch, capsys):
    flags = ("--objective ntp --data markov:60 --tokenizer bytes --block-size 64 --batch-size 2 --n-layer 1 "
             f"--n-embd 16 --steps 9 --eval-every 2 --cache-dir {tmp_path}")
    monkeypatch.setitem(probes.PROBES, "markov", lambda *_: {"recall": 0.5, "learned": False})
    arms = {"markov-a": Arm(flags)}
    r = Results(arms, tmp_path, seeds=2)
    assert rerun.train_run("markov-a-1", arms, tmp_path)["step"] == 9
    assert rerun.is_finished("markov-a-1", arms, tmp_path)
    monkeypatch.setitem(probes.PROBES, "markov", lambda *_: {"recall": 1.0, "learned": True})
    rerun.train_run("markov-a-2", arms, tmp_path)
    np.testing.assert_array_equal(r("markov-a", "step"), [9, 2])
    assert sample.load_checkpoint(tmp_path / "markov-a-2")["step"] == 3  # the step after that is saved
    rerun.train_all(r, 1)  # nothing is left to train
    assert "0 runs" in capsys.readouterr().out
    other = {"markov-a": Arm(flags.replace("--steps 9", "--steps 5"))}
    assert not rerun.is_finished("markov-a-1", other, tmp_path)


def test_runs_are_trained_in_other_processes_until_one_fails(tmp_path, capsys):
    flags = ("--objective ntp --tokenizer bytes --block-size 64 --batch-size 2 --n-layer 1 --n-embd 16 "
             f"--steps 2 --eval-every 2 --cache-dir {tmp_path}")
    arms = {"markov-a": Arm(f"{flags} --data markov:60"),
            "markov-b": Arm(f"{flags} --data markov:60 --init-from {{out}}/markov-none-{{seed}}")}
    with pytest.raises(OSError, match="markov-b-201 failed: .*markov-none-201.*markov-b-201.log"):
        rerun.train_all(Results(arms, tmp_path, 201, seeds=1), 1)
    assert rerun.is_finished("markov-a-201", arms, tmp_path)
    assert "step 2" in (tmp_path / "markov-a-201.log").read_text()
    shown = capsys.readouterr().out
    assert "2 runs, 1 at a time" in shown and "1 of 2: markov-a-201; 0 min, about 0 min left" in shown


@pytest.mark.parametrize("corpus", ["records", "haystack", "chains"])
def test_a_model_that_knows_the_answers_alone_recalls_all_of_them(corpus):
    def read(row):
        logits = torch.zeros(len(row), TOK.n_vocab)
        for t in range(1, len(row) - 1):
            line = TOK.decode(row[1:t + 1]).split("\n")[-1]
            if line.startswith("? ") and len(line) >= 5:  # behind the key
                logits[t, row[t + 1]] = 9
        return logits

    out = probes.PROBES[corpus](Model(read), TOK, {}, True)
    assert out["recall"] == 1 and out["far"] == 1 and out["one_hop"] == 1
    assert ("several_hops" in out) == (corpus == "chains") != out["learned"]  # runs on chains go to their end


def test_drawn_answers_are_wrong_as_often_as_the_model_says():
    """A model that gives the right token a probability of 0.8, after one of 1 for the space."""
    def read(row):
        logits = torch.full((len(row), TOK.n_vocab), -math.inf)
        for t, right in enumerate(row[1:]):
            logits[t] = math.log(0.2 / (TOK.n_vocab - 1))
            logits[t, right] = math.log(0.8)
        return logits

    out = probes.PROBES["records"](Model(read), TOK, {}, True)
    assert out["log_wrong"] == pytest.approx(math.log(1 - 0.8**4))


def test_an_answer_is_right_only_as_a_whole():
    """A model that knows every byte but a value's last one: three of the four of " fig" are no answer."""
    def read(row):
        logits = torch.zeros(len(row), TOK.n_vocab)
        for t, right in enumerate(row[1:]):
            is_last_byte = row[t + 2:t + 3] in ([10], [0], [])  # a line end, padding or nothing follows
            logits[t, right - is_last_byte] = 9
        return logits

    assert probes.PROBES["records"](Model(read), TOK, {}, True)["recall"] == 0


def test_fine_tuning_turns_records_round(tmp_path):
    """on_answers takes every second token for a key."""
    tok, *_ = prepare("records:1000", "bpe", 512, tmp_path)
    for (prompt, answer), text in zip(probes.turned_round(20, seed=7), documents("records", 20, seed=7)):
        facts = [(value, key) for _, key, value in map(str.split, text.splitlines()) if f"= {key}" in prompt]
        assert text.startswith(prompt) and prompt.endswith("\n?")
        words = answer.split()
        assert [*zip(words[::2], words[1::2])] == [*dict.fromkeys(facts)][::-1]
        assert len(tok.encode(answer)) == len(words)
