"""What is generated is what the model says, and a hole is laid out as in training; mistakes are one line."""
import io
import math
import os
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_main, save_run, small_model

import sample
from data import Tokenizer
from objectives import OBJECTIVES, fim_prompt, knobs_of
from sample import (NOT_STOPPED, REPEATS, STOPPED, Infill, PromptCache, encode_raw, generate, infill,
                    infill_prompt, load_checkpoint, load_model, unescape)

PREFIX, SUFFIX = "def mean(xs):\n    return sum(xs)", "\n\nprint(mean([1, 2]))\n"
BYTES = Tokenizer.bytes()
PSM, SPM = (partial(fim_prompt, tok=BYTES, order=order, spm_layout="joint") for order in ("psm", "spm"))


class Chain(torch.nn.Module):
    """Its logits are the last token's row of a table, so draws can be checked. seen: what it was given."""

    def __init__(self, table):
        super().__init__()
        self.table, self.seen = torch.nn.Parameter(table), []
        self.config = SimpleNamespace(block_size=64)

    def forward(self, idx, cache):
        self.seen.append(idx.tolist())
        cache.length += idx.shape[1]
        return self.table[idx], None


def speller(first, text):
    """A Chain that after id first spells text, of differing bytes, then <EOT>, each with probability 1/2."""
    table, ids = torch.zeros(BYTES.n_vocab, BYTES.n_vocab), [first, *text.encode(), BYTES.eot]
    table[ids[:-1], ids[1:]] = math.log(BYTES.n_vocab - 1)
    return Chain(table)


def test_a_worked_example():
    """The infill is what the model emits before <EOT>; probability 1/2 is a log-probability of -ln 2 nats.
    Three samples share one pass over the prompt. CRLF line ends become \\n, as in training."""
    model = speller(ord(" "), "sum")
    infills = infill(model, BYTES, "total\r\n= ", "(xs)\r\n", n=3, prompt=SPM, max_new_tokens=16)
    assert infills == 3 * [Infill("sum", STOPPED, pytest.approx(-math.log(2)))]
    assert model.seen == [[[BYTES.pre, BYTES.suf, *b"(xs)\n", BYTES.mid, *b"total\n= "]],
                          *([[i]] * 3 for i in b"sum")]


@pytest.mark.parametrize("objective, knobs", [
    ("fim_psm", {}), ("fim_spm", {"spm_layout": "swapped"}), ("fim_spm", {"spm_layout": "labelled"}),
    ("fim", {}), ("fim", {"spm_rate": 0.0, "spm_layout": "swapped"}), ("fim_meap", {})])
def test_a_hole_is_laid_out_as_in_the_training_of_the_checkpoint(objective, knobs, tmp_path):
    """Each row of the training begins with an infill's prompt, then has its middle and <EOT>. Of a model
    trained in both orders, these are the rows in SPM order."""
    text, knobs = "one text", knobs_of(OBJECTIVES[objective]) | {"fim_rate": 1.0} | knobs
    save_run(tmp_path, small_model(BYTES.n_vocab), BYTES, objective, knobs=knobs)
    model, tok, _ = load_model(tmp_path)
    laid_out = [[*infill_prompt(model, tok, text[:i], text[j:], 4), *text[i:j].encode(), tok.eot]
                for i in range(9) for j in range(i, 9)]
    window, n = np.array(2 * [*text.encode(), tok.eot]), 0
    for seed in range(40):
        inputs, targets = OBJECTIVES[objective](window, tok, np.random.default_rng(seed), **knobs)
        n += [inputs[0], *targets[:11]] in laid_out
    assert n == 40 if knobs.get("spm_rate", 0) in (0, 1) else 10 < n < 30


def draw(model, prompt, most, **settings):
    """-> ids and log-probabilities, each (rows, steps)."""
    return [torch.stack(part, 1) for part in zip(*generate(model, torch.tensor(prompt), most, **settings))]


def naive_greedy(model, context, n_tokens, stop=None):
    """The whole context anew for each token, its newer half where it is full. Draws no id beyond stop."""
    size, out = model.config.block_size, []
    context = context[-size:]
    while len(out) < n_tokens and (not out or out[-1] != stop):
        context = context if len(context) <= size else context[-(size // 2):]
        out.append(model(torch.tensor([context]))[0][0, -1, :stop and stop + 1].argmax().item())
        context = context + out[-1:]
    return out


@pytest.mark.parametrize("n_prompt", [1, 24, 40])
def test_greedy_generation_is_the_naive_loop_also_past_the_context(n_prompt):
    model, prompts = small_model(60, n_layer=1), torch.randint(60, (2, n_prompt)).tolist()
    expected = [naive_greedy(model, prompt, 50) for prompt in prompts]
    assert draw(model, prompts, 50, temperature=0, n=2)[0].tolist() == [expected[0]] * 2 + [expected[1]] * 2


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, 0, 1), (0.5, 0, 1), (2, 4, 1), (1, 0, 0.75), (0.8, 5, 0.9), (1, 100, 1), (1, 0, 0.01), (1e-40, 0, 1)])
def test_draws_come_from_what_temperature_top_k_and_top_p_leave(temperature, top_k, top_p):
    p = [0.30, 0.02, 0.25, 0.08, 0.15, 0.05, 0.12, 0.03]
    q = {i: (p[i] / max(p)) ** (1 / temperature) for i in sorted(range(8), key=lambda i: -p[i])[:top_k or 8]}
    heads = [[*q][:k] for k in range(1, len(q) + 1)]
    nucleus = next(head for head in heads if sum(q[i] for i in head) > top_p * sum(q.values()) - 1e-6)
    expected = torch.tensor([q[i] / sum(q[j] for j in nucleus) if i in nucleus else 0.0 for i in range(8)])
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "n": 20_000}
    found = draw(Chain(torch.tensor([p]).log()), [[0]], 1, **settings)[0][:, 0].bincount(minlength=8) / 20_000
    assert ((found > 0) == (expected > 0)).all() and (found - expected).abs().max() < 0.02


def test_a_row_that_stopped_stays_so_and_leaves_the_others_alone():
    """Log-probabilities are the model's own: without temperature, and among all ids, allowed or not."""
    torch.manual_seed(1)
    table, stop = torch.randn(8, 8), 3
    table[:, stop], table[:, 6:] = 0.5, 3.0
    settings = {"temperature": 0.7, "top_k": 5, "seed": 2, "n": 20, "stop": stop, "allowed": 6}
    ids, log_p = draw(Chain(table), [[5], [4]], 60, **settings)
    seen = torch.cat((torch.tensor([[5]] * 20 + [[4]] * 20), ids[:, :-1]), 1)
    ended = (seen == stop).cumsum(1) > 0
    torch.testing.assert_close(log_p, table.log_softmax(-1)[seen, ids].masked_fill(ended, 0.0))
    assert (ids[ended] == stop).all() and (ids[:, -1] == stop).all() and ids.max() < 6
    assert not ended[:, -1].all() and len(set(ended.sum(1).tolist())) > 3
    steps, lengths = generate(Chain(table), torch.tensor([[5], [4]]), 60, **settings), (~ended).sum(1)
    for row, (shown, mean) in enumerate(sample.collect(steps, SimpleNamespace(eot=stop))):
        assert shown == ids[row, :lengths[row]].tolist()
        assert mean == pytest.approx(log_p[row].sum().item() / len(shown))


@pytest.mark.parametrize("most, expected", [(9, "aé✓"), (6, "aé✓"), (5, "aé"), (4, "aé"), (2, "a"), (1, "a")])
def test_no_character_is_cut(most, expected):
    """One that the limit cuts is left out, also of a stream, whose pieces join to the text."""
    pieces = []
    best, = infill(speller(BYTES.mid, "aé✓"), BYTES, "", "", prompt=PSM, max_new_tokens=most,
                   stream=pieces.append)
    assert best.text == expected == "".join(pieces) and len(pieces) == min(most, 7)


def test_samples_that_end_in_eot_come_first_then_the_likelier():
    """EOT-aware best of n (FIM, appendix H.3). Ranking leaves the texts as they were sampled."""
    a, b, c, d = (Infill("a", NOT_STOPPED, -0.1), Infill("b" * 30, STOPPED, -20.0),
                  Infill("c", STOPPED, -1.0), Infill("d" + SUFFIX, NOT_STOPPED, -0.05))
    samples = [([*i.text.encode()] + [BYTES.eot] * (i.ended == STOPPED), i.mean_log_p) for i in (a, b, c, d)]
    assert sample.best_first(samples, BYTES) == [c, b, d, a]


@pytest.mark.parametrize("text, suffix, expected", [
    ("x + 1\n    return total\nmore", "    return total\n", 6), ("return total", "return total\n", 0),
    ("x + 1\n    return", "    return total\n", None), ("x abcdefg", "abcdefg", None),
    ("x abc defgh", "abc defgh", 2), ("x", "", None), ("x abcdefgh", "abcdefgh\x0crest", None),
    ("v\n}\nreturn total", "\n}\nreturn total\nrest", 1), ("v\nreturn total", "}\nreturn total\nrest", None)])
def test_where_the_suffix_begins_again(text, suffix, expected):
    """A bracket says too little: at least 8 visible characters count. A form feed ends no line."""
    assert sample.where_suffix_repeats(text, suffix) == expected


@pytest.mark.parametrize("limit, text, ended", [
    (12, "sum\n(abcdefg", NOT_STOPPED), (13, "sum", REPEATS), (14, "sum\n(abcdefg)", STOPPED)])
def test_an_infill_that_does_not_stop_is_cut_where_it_repeats_the_suffix(limit, text, ended):
    """One that ends in <EOT> is left as it is, even if it repeats the suffix."""
    model = speller(BYTES.mid, "sum\n(abcdefg)")
    best, = infill(model, BYTES, "y = ", "\r\n(abcdefg)\r\nrest", prompt=PSM, max_new_tokens=limit)
    assert (best.text, best.ended, best.mean_log_p) == (text, ended, pytest.approx(-math.log(2)))


@pytest.mark.parametrize("n_prefix, n_suffix, last, first", [
    (200, 200, 30, 15), (40, 10, 35, 10), (20, 40, 20, 25), (200, 3, 42, 3), (3, 200, 3, 42), (200, 0, 45, 0),
    (0, 200, 0, 45), (25, 20, 25, 20), (0, 0, 0, 0)])
def test_a_long_prompt_keeps_the_text_around_the_hole(n_prefix, n_suffix, last, first):
    """Of a context of 64, 16 tokens are for the infill and 3 for sentinels. Of the 45 left, the suffix gets a
    third, the prefix the rest, and either takes what the other does not need."""
    prefix, suffix, warnings = b"0123456789" * 20, b"abcdefghij" * 20, []
    texts = prefix[:n_prefix].decode(), suffix[:n_suffix].decode()
    prompt = infill_prompt(small_model(BYTES.n_vocab, 64), BYTES, *texts, 16, PSM, warnings.append)
    assert prompt == PSM(prefix[n_prefix - last:n_prefix], suffix[:first])
    expected = (f"the last {last} of {n_prefix} tokens of the prefix and the first {first} of {n_suffix} of "
                "the suffix")
    assert [warning[warning.index("the last"):] for warning in warnings] == [expected] * (
        n_prefix + n_suffix > 45)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_typing_on_reuses_the_cache_and_gives_the_infill_without_a_cache(order, documents, tok):
    """In SPM order, typing on leaves the suffix's keys and values as they were (FIM, section 3.1)."""
    model, suffix = small_model(tok.n_vocab, 160), documents[0][1000:1200]
    model.prompt = partial(fim_prompt, tok=tok, order=order, spm_layout="joint")
    cache, before = PromptCache(model.config), []
    for typed in ("", " def me", " def mean(xs)", " def mean(xs)", "", "x" * 300):
        texts = documents[0][:100] + typed, suffix
        one, = infill(model, tok, *texts, max_new_tokens=12, cache=cache)
        expected, = infill(model, tok, *texts, max_new_tokens=12)
        assert one == Infill(expected.text, expected.ended, pytest.approx(expected.mean_log_p))
        prompt = infill_prompt(model, tok, *texts, 12)
        assert cache.reused == min(len(os.path.commonprefix([before, prompt])), len(prompt) - 1)
        before = prompt


def test_sentinels_and_line_ends_as_they_are_typed(tok):
    assert encode_raw("<PRE>a b<SUF><MASK><<EOT>x<MID>", tok) == [
        tok.pre, *tok.encode("a b"), tok.suf, tok.mask, *tok.encode("<"), tok.eot, *tok.encode("x"), tok.mid]
    assert unescape(r"a\nb\tc\\nd\q") + unescape("\\") == "a\nb\tc\\nd\\q\\"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tok):
    """A folder with runs whose weights are so large that every token of a prompt changes what follows."""
    root = tmp_path_factory.mktemp("runs")
    for objective in ("fim", "fim_psm", "ntp", "sft"):
        save_run(root / objective, small_model(tok.n_vocab, 128), tok, objective)
    return root


@pytest.fixture
def cli(runs, capsys, monkeypatch):
    """Runs sample.py among the runs -> what it prints, and its exit code with the one line of a refusal."""
    def call(*arguments, ckpt="fim"):
        flags = "--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "12"
        return run_main(sample.main, capsys, *flags, *arguments)

    monkeypatch.chdir(runs)
    return call


@pytest.mark.parametrize("ckpt, flag, text, prompt", [
    ("ntp", "--prompt", "import os\\n", "import os\n"), ("ntp", "--prompt", "", "<EOT>"),
    ("sft", "--instruct", "7:\r\n", "7:\n<MID>"), ("fim", "--raw", "<SUF>b<PRE>a<MID>", "<SUF>b<PRE>a<MID>")])
def test_the_command_line_goes_on_after_a_prompt(ckpt, flag, text, prompt, cli, runs):
    model, tok, _ = load_model(runs / ckpt)
    answer = tok.decode(naive_greedy(model, encode_raw(prompt, tok), 12, stop=tok.eot), "ignore")
    for more in ("", "--stream", "--temperature 3 --top-k 1", "--temperature 3 --top-p 1e-6"):
        shown = cli(flag, text, *more.split(), ckpt=ckpt).out
        assert shown == unescape(text).replace("\r", "") + answer + "\n"
    assert cli(flag, text, "--n", "3", ckpt=ckpt).out.count(" of 3, -") == 3


def test_the_command_line_fills_a_hole(cli, runs, documents):
    (model, tok, _), texts = load_model(runs / "fim"), set()
    hole = ["--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n")]
    for flags, order in (["--order", "psm"], "psm"), (["--order", "spm"], "spm"), ([], "spm"):
        best, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=12,
                       prompt=partial(fim_prompt, tok=tok, order=order, spm_layout="joint"))
        shown, nats = cli(*hole, *flags), f"{best.mean_log_p:.2f} nats per token"
        assert (shown.out, shown.err) == (PREFIX + best.text + SUFFIX + "\n", f"({best.ended}, {nats})\n")
        texts.add(best.text)
    assert len(texts) == 2  # the two orders can be told apart
    assert cli(*hole, "--stream").out == best.text + "\n"
    assert cli("--suffix=-1\\n").out.endswith("-1\n\n") and cli("--prefix", "x").out.startswith("x")
    assert "of the prefix and the first" in cli("--prefix", documents[0][:2000], "--suffix", SUFFIX).err
    infills = infill(model, tok, PREFIX, SUFFIX, 3, max_new_tokens=12, temperature=0.8, seed=2)
    assert cli(*hole, "--n", "3", "--seed", "2").out == "".join(
        f"--- {rank} of 3, {best.ended}, {best.mean_log_p:.2f} nats per token\n{PREFIX}{best.text}{SUFFIX}\n"
        for rank, best in enumerate(infills, 1))


@pytest.mark.parametrize("flags", [["--prompt", "a"], ["--prefix", "a"], ["--raw", "a", "--stream"]])
def test_only_text_is_drawn_and_what_the_terminal_lacks_is_replaced(flags, cli, monkeypatch):
    """A model that would go on with <MASK> or <PRE> emits its likeliest text instead, here a sign beyond
    ASCII. stdout is as under PYTHONIOENCODING=ascii."""
    model, config = speller(ord("a"), "é"), {"objective": "fim", "knobs": {}}
    model.table.data[:, [BYTES.mask, BYTES.pre]], model.prompt = 99, SPM
    monkeypatch.setattr(sample, "load_model", lambda *_: (model, BYTES, {"config": config}))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    cli(*flags)
    assert sys.stdout.buffer.getvalue() == b"a?\n"


@pytest.mark.parametrize("arguments, code, message", [
    ("--prompt a\udc80", 2, "not UTF-8"), ("--prompt a --suffix b", 2, "expected one of --prompt"),
    ("--suffix -1\\n", 2, "--suffix: expected one argument: one that begins with - is written --flag=-value"),
    ("--prompt a --seed 99999999999999999999", 2, "--seed: 99999999999999999999: expected 0 to"),
    ("--prompt a --n 2 --stream", 2, "--n 2: expected one"),
    ("--prompt a --device abacus", 2, "--device abacus: not"),
    ("--prefix a --max-new-tokens 125", 2, "at most 124"), ("--prefix a --ckpt ntp", 2, "trained to infill"),
    ("--prefix a --order spm --ckpt fim_psm", 2, "trained with --objective fim_psm, expected fim or"),
    ("--instruct a", 2, "fim was trained with --objective fim, which never saw prompts"),
    ("", 2, "expected one of --prompt"), ("--prompt a --ckpt none", 1, "none: no such checkpoint")])
def test_a_mistake_is_one_line(arguments, code, message, cli):
    shown = cli(*arguments.split())
    assert shown.code == code and message in shown.err and not shown.out


def test_a_damaged_or_foreign_checkpoint_is_refused_and_never_run(runs, tmp_path, monkeypatch):
    whole, checkpoint = (runs / "fim/ckpt.pt").read_bytes(), load_checkpoint(runs / "fim")
    Bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("blown",))})
    path, larger = tmp_path / "ckpt.pt", checkpoint["model_config"] | {"n_embd": 64}
    monkeypatch.chdir(tmp_path)
    for content in (b"", b"hello\n", whole[:len(whole) // 2], whole[:-1], [1, 2], pickle.dumps(Bomb()),
                    checkpoint | {"model": Bomb()}, checkpoint | {"model_config": larger},
                    checkpoint | {"model_config": larger | {"of_a_newer_version": 1}},
                    checkpoint | {"config": {"objective": "fim"}},  # of an older version
                    {key: checkpoint[key] for key in checkpoint if key != "text"}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(OSError, match=f"^{tmp_path}.*: (not a checkpoint|its weights do not fit).*$"):
            load_model(tmp_path)
    assert [*tmp_path.iterdir()] == [path], "no Bomb has made a folder"


def test_the_newest_run_is_the_default(runs, tmp_path):
    for number, name in enumerate(("fim", "ntp", "fim", "sft")):
        os.utime(runs / name / "ckpt.pt", (2e9 + number, 2e9 + number))
        assert sample.newest_run(runs) == runs / name
    with pytest.raises(OSError, match=f"^no checkpoint under {tmp_path}/.*$"):
        sample.newest_run(tmp_path)
