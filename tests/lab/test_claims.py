"""The probes against an oracle that predicts by Bayes' rule and a blind model; the prior against what fim
draws; verdicts by hand; every arm's flags; one run, judged and written down."""
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

import train
from data import Tokenizer, prepare
from lab import claims, probes, rerun
from lab.claims import ARMS, CLAIMS
from lab.corpora import LETTERS, LONGEST, MARKOV, documents, errors
from lab.rerun import Arm, Check, Claim, Results, judge
from model import GPTConfig
from objectives import fim

TOK = Tokenizer.bytes()


class Bayes(torch.nn.Module):
    """Predicts each token of <EOT> prompt middle <EOT> by corpora.Markov.infill; elsewhere by P alone, and
    after a sentinel it knows nothing. It reads prefix and suffix off the ids, as a model must."""

    def __init__(self, order):
        super().__init__()
        self.config, self.order = GPTConfig(TOK.n_vocab, 128, 1, 1, 2), order
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, targets=None, cache=None):
        p = torch.full((*idx.shape, TOK.n_vocab), 1 / TOK.n_vocab)
        letters = {TOK.encode(x)[0]: i for i, x in enumerate(LETTERS)}
        columns = torch.tensor([*letters, TOK.eot])
        for b, row in enumerate(idx.tolist()):
            for t, i in enumerate(row):
                if i in letters:
                    p[b, t] = 0
                    p[b, t, columns[:-1]] = torch.tensor(MARKOV.P[letters[i]], dtype=torch.float)
            if TOK.mid in row:
                self.predict_middle(p[b], row, columns)
        return p.clamp(min=1e-9).log(), None

    def predict_middle(self, p, row, columns):
        mid, suf = row.index(TOK.mid), row.index(TOK.suf)
        if self.order == "psm":
            prefix, suffix, start = row[row.index(TOK.pre) + 1:suf], row[suf + 1:mid], mid
        else:  # joint: the middle may begin after any letter; the first is the prefix's
            prefix, suffix, start = row[mid + 1:mid + 2], row[suf + 1:mid], mid + 1
        written = list(itertools.takewhile(lambda i: i not in (TOK.eot, 0), row[start + 1:]))  # 0: padding
        prior = probes.length_prior(len(prefix), len(suffix), self.order == "spm")
        if len(written) < len(prior):
            text = TOK.decode(written)
            exact = MARKOV.infill(TOK.decode(prefix)[-1], text, TOK.decode(suffix)[0], prior)
            if np.isfinite(exact).all():
                p[start:start + len(exact)] = 0
                p[start:start + len(exact), columns] = torch.tensor(exact, dtype=torch.float)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_bayes_rule_itself_scores_as_the_exact_answer(order):
    holes = probes.markov_holes(30)
    out, (exact, model) = probes.middles(Bayes(order), TOK, order, "joint", holes)
    np.testing.assert_allclose(model, exact, atol=1e-3)
    for name in ("end", "elsewhere", "another", "later", "saved"):
        assert out[f"{order}_{name}"] == pytest.approx(out[f"bayes_{order}_{name}"], abs=1e-3), name
    assert out[f"{order}_middle"] == pytest.approx(0, abs=1e-3)
    assert out[f"{order}_end"] > 3 * max(out[f"{order}_another"], out[f"{order}_later"])
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
    class Blind(Bayes):
        def forward(self, idx, targets=None, cache=None):
            return torch.zeros(*idx.shape, TOK.n_vocab), None

    knobs = {"fim_rate": 0.9, "spm_rate": 0.5, "spm_layout": "joint"}
    out = probes.on_markov(Blind("psm"), TOK, knobs, False)
    bits = math.log2(TOK.n_vocab)
    texts = documents("markov", 500, seed=1)
    exact = sum(map(MARKOV.document_bits, texts)) / sum(len(text) + 1 for text in texts)
    assert out["excess"] + out["coin"] == pytest.approx(bits - exact) and 1.5 < exact < 2
    assert out["coin"] == pytest.approx(math.log2(TOK.n_vocab / (TOK.n_vocab - 1)))
    for order in ("psm", "spm"):
        assert [out[f"{order}_{name}"] for name in ("end", "elsewhere", "another", "later")] == [
            pytest.approx(1 / TOK.n_vocab)] * 4
        assert out[f"{order}_saved"] < 0
    assert probes.on_records(Blind("psm"), TOK, {}, False)["recall"] == 0
    monkeypatch.setattr(probes, "load_documents", lambda source: [str(i) for i in range(1000)])
    code = probes.on_stdlib(Blind("psm"), TOK, {}, False)  # a token is a byte here
    assert code == {"bits": pytest.approx(bits - out["coin"]), "coin": pytest.approx(out["coin"])}


def test_a_verdict_by_hand():
    check = Check("", None, low=0.0, high=1.0)
    # three seeds: mean 0.5, standard deviation 0.1, interval +- 2.92 * 0.1 / sqrt(3)
    verdict, mean, half = judge(check, np.array([0.4, 0.5, 0.6]))
    assert (verdict, mean, half) == ("shows", pytest.approx(0.5), pytest.approx(0.16859, abs=1e-5))
    assert judge(check, np.array([1.4, 1.5, 1.6]))[0] == "does not show"
    assert judge(check, np.array([0.0, 0.1, 0.2]))[0] == "cannot be told"
    assert judge(check, np.zeros(3))[0] == "does not show"  # no difference at all is none above 0


@pytest.mark.parametrize("name", CLAIMS)
def test_the_rule_of_every_check_can_pass_and_fail(name):
    for check in CLAIMS[name].checks:
        inside = [x for x in (check.low, check.high) if math.isfinite(x)]
        assert inside and check.low < check.high
        middle = np.mean(inside) if len(inside) == 2 else inside[0] + (1 if inside[0] == check.low else -1)
        outside = check.low - 1 if math.isfinite(check.low) else check.high + 1
        noise = np.array([-1e-6, 0, 1e-6])
        assert judge(check, middle + noise)[0] == "shows"
        assert judge(check, outside + noise)[0] == "does not show"


@pytest.mark.parametrize("arm", ARMS)
def test_train_takes_the_flags_of_every_arm(arm, tmp_path):
    flags = rerun.flags_of(f"{arm}-2", ARMS, tmp_path)
    flags = flags.replace(f"--init-from {tmp_path}/{ARMS[arm].base}-2", "")  # there is no such run here
    config, _ = train.read_arguments(flags.split())
    assert config.seed == 2 and config.out == f"{tmp_path}/{arm}-2"
    if arm.startswith("markov"):  # the exact answers presuppose that no document is cut into shorter ones
        assert config.knobs.get("max_document_tokens", 1000) > LONGEST


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_has_its_arms(name):
    assert set(CLAIMS[name].arms) <= ARMS.keys() and len(CLAIMS[name].panels) >= 2


@pytest.mark.parametrize("arguments, message", [
    ("--jobs 0", "argument --jobs: 0: expected 1 to 1024"),
    ("--run markov-ntp", "--run markov-ntp: expected an arm and a seed, such as markov-ntp-1"),
    ("--run nothing-1", "--run nothing-1: expected an arm and a seed"),
    ("--only nothing", "argument --only: invalid choice: 'nothing'"),
])
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        claims.main(arguments.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_where_a_curve_reaches_a_level(tmp_path):
    for seed, shares in enumerate(([0.5, 0.8, 1.0], [0.95, 0.97, 1.0], [0.1, 0.2, 0.3]), 1):
        folder = tmp_path / f"a-{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": 10 * i, "epoch": i, "recall": share}) + "\n"
            for i, share in enumerate(shares, 1)))
    r = Results({"a": Arm("", None, seeds=3)}, tmp_path)
    np.testing.assert_allclose(r.until("a", "recall"), [25, 10, 30])  # interpolated; at once; never
    np.testing.assert_allclose(r.until("a", "recall", x="epoch"), [2.5, 1, 3])


def test_one_claim_from_training_to_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    flags = ("--objective ntp --data markov:60 --tokenizer bytes --block-size 64 --batch-size 2 --n-layer 1 "
             f"--n-embd 16 --steps 4 --eval-every 2 --cache-dir {tmp_path}")
    arms = {name: Arm(flags, probes.on_markov, seeds=2) for name in ("a", "b")}
    for run in ("a-1", "a-2", "b-1", "b-2"):
        assert not rerun.is_finished(run, arms, tmp_path)
        rerun.train_run(run, arms, tmp_path)
        assert rerun.is_finished(run, arms, tmp_path)
    r = Results(arms, tmp_path)
    claim = Claim("", "", ("a", "b"), [Check("difference", claims.minus("excess", "a", "b"), -0.1, 0.1)],
                  [("bars", claims.each("excess", "a", "b")),
                   ("lines", claims.over("step", "excess", "a", "b"))])
    table = rerun.table({"twins": claim}, r)
    assert "| [twins](#twins) | difference | -0.1000 to 0.1000 | 0.0000 ± 0.0000 |  | shows |" in table
    rerun.write({"twins": claim}, arms, r, tmp_path / "claims.md")
    assert table in (tmp_path / "claims.md").read_text()
    assert (tmp_path / "claims" / "twins.png").stat().st_size > 5000
    other = {"a": arms["a"]._replace(flags=arms["a"].flags.replace("--steps 4", "--steps 5"))}
    assert not rerun.is_finished("a-1", other, tmp_path) and not (tmp_path / "a-1" / "ckpt.pt").exists()


@pytest.mark.parametrize("corpus", ["records", "chains"])
def test_a_reader_of_the_records_answers_every_question(corpus):
    class Reader(Bayes):
        def forward(self, idx, targets=None, cache=None):
            logits = torch.zeros(*idx.shape, TOK.n_vocab)
            for b, row in enumerate(idx.tolist()):
                text = TOK.decode(row)
                facts = dict(line.split()[1:] for line in text.split("\n") if line.startswith("="))
                for t in range(1, len(row)):
                    line = TOK.decode(row[1:t + 1]).split("\n")[-1]
                    if line.startswith("? ") and 5 <= len(line) < 10:
                        value = line[2:5]
                        while value in facts:
                            value = facts[value]
                        logits[b, t, TOK.encode(f"{line[:5]} {value}\n")[len(line)]] = 9
            return logits, None

    reader = Reader("psm")
    reader.config = GPTConfig(TOK.n_vocab, 512, 1, 1, 2)
    out = probes.on_records(reader, TOK, {}, True, corpus)
    assert out["recall"] == 1 and out["far"] == 1 and out["hops_1"] == 1
    assert ("hops_3" in out) == (corpus == "chains")


def test_a_line_of_relay_is_five_tokens(tmp_path):
    """on_relay looks for the gift in the third."""
    tok, *_ = prepare("relay:1000", "bpe", 512, tmp_path)
    for text in documents("relay", 20, seed=1):
        assert {len(tok.encode(line + "\n")) for line in text.split("\n")[:-1]} == {5}
    prompt, answer = probes.gift_questions(1, seed=7)[0]
    assert len(tok.encode(answer)) == 2 * len({line.split()[1] for line in prompt.split("\n")[:-1]})


def test_relay_continuations_are_judged_by_the_checker():
    """A model that goes on with one fixed line: the checker's own errors, counted here by hand."""
    class Parrot(Bayes):
        def forward(self, idx, targets=None, cache=None):
            seen = idx
            if cache:
                seen = cache.store("idx", idx[..., None])[..., 0]
                cache.length = seen.shape[1]
            logits = torch.zeros(*idx.shape, TOK.n_vocab)
            line = TOK.encode("1 fox fig owl\n")
            for b, row in enumerate(seen.tolist()):
                last = len(row) - 1 - row[::-1].index(TOK.encode("\n")[0])
                logits[b, -1, line[(len(row) - 1 - last) % len(line)]] = 100
            return logits, None

    parrot = Parrot("psm")
    parrot.config = GPTConfig(TOK.n_vocab, 512, 1, 1, 2)
    out = probes.contradictions(parrot, TOK, n=4)
    given = ["".join(text.splitlines(keepends=True)[:10]) for text in documents("relay", 4, seed=3)]
    whole = [text + "1 fox fig owl\n" * 7 for text in given]  # 100 bytes hold seven lines
    wrong = [[e for e in errors(text) if e.line >= 10] for text in whole]
    known = sum(6 + any(line.split()[1] == "fox" for line in text.splitlines()) for text in given)
    assert out["contradictions"] == pytest.approx(
        sum(e.what == "gift" for of_text in wrong for e in of_text) / known)
    bad_lines = {(i, e.line) for i, of_text in enumerate(wrong) for e in of_text}
    assert out["any_error"] == pytest.approx(len(bad_lines) / 28)
