"""Where EleutherAI's lm-evaluation-harness is installed: log-likelihoods against a plain forward pass."""
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the lm_eval package")

from conftest import save_run, small_model  # noqa: E402
from lab.harness import Nanogap  # noqa: E402

T = 32


@pytest.fixture
def lm(tok, tmp_path):
    return Nanogap(ckpt=str(save_run(tmp_path, small_model(tok.n_vocab, T), tok)))


def asked(*args):
    return [SimpleNamespace(args=args)]


@torch.no_grad()
def log_p(lm, context, continuation):
    """ids, ids -> log-probabilities of the continuation's tokens, and whether each is the likeliest."""
    p = lm.model(torch.tensor([context + continuation]))[0][0].log_softmax(-1)[len(context) - 1:-1]
    return p[range(len(continuation)), continuation].sum().item(), p.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("context, continuation, split", [
    ("def mean(", "xs):\n", ("def mean(", "xs):\n")),
    ("return ", "sum(xs)", ("return", " sum(xs)")),  # a space belongs to the word behind it
    ("", "import os\n", (None, "import os\n"))])
def test_a_continuation_costs_what_a_forward_pass_says(context, continuation, split, lm):
    context_ids = [lm.tok.eot] if split[0] is None else lm.tok.encode(split[0])
    expected = log_p(lm, context_ids, lm.tok.encode(split[1]))
    (total, is_greedy), = lm.loglikelihood(asked(context, continuation), disable_tqdm=True)
    assert total == pytest.approx(expected[0], abs=1e-3) and is_greedy == expected[1]


def test_generation_is_greedy_and_ends_before_a_stop_text(lm):
    ids = lm.tok.encode("def mean(xs):\n")
    for _ in range(4):
        ids.append(lm.model(torch.tensor([ids]))[0][0, -1, :lm.tok.eot].argmax().item())
    expected = lm.tok.decode(ids[-4:])
    settings = {"until": [], "max_gen_toks": 4}
    assert lm.generate_until(asked("def mean(xs):\n", settings)) == [expected]
    settings["until"] = expected[2:4]  # a list, or a single text
    assert lm.generate_until(asked("def mean(xs):\n", settings)) == [expected[:expected.index(expected[2:4])]]


def test_a_whole_text_counts_each_token_once(lm, documents):
    short, long = "import os\n", documents[0][:500]
    total, = lm.loglikelihood_rolling(asked(short))
    assert total == pytest.approx(log_p(lm, [lm.tok.eot], lm.tok.encode(short))[0], abs=1e-3)
    for p in lm.model.parameters():
        torch.nn.init.zeros_(p)
    n, (total,) = len(lm.tok.encode(long)), lm.loglikelihood_rolling(asked(long))
    assert n > 2 * T and total == pytest.approx(-n * math.log(lm.tok.n_vocab))
