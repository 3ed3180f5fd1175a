import math
import os
import pickle
import re
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from cli import load_checkpoint, newest_run
from conftest import small_model
from data import Tokenizer
from model import GPTConfig
from objectives import OBJECTIVES, knobs_of
from sample import (CUT, NOT_STOPPED, STOPPED, Infill, PromptCache, best_first, collect, generate, infill,
                    infill_prompt, load_model, pick, trained_orders, where_suffix_repeats, write_infill)

PREFIX, MIDDLE, SUFFIX = "def mean(xs):\n    return sum(xs)", " / len(xs)", "\n\nprint(mean([1, 2]))\n"


class Chain(torch.nn.Module):
    """A model that looks at the last token alone: its logits are a row of a table, so every draw can be
    checked. idx: the first tokens that it was given."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(block_size=64, n_layer=0)
        self.idx = None

    def forward(self, idx, cache):
        self.idx = idx if self.idx is None else self.idx
        cache.length += idx.shape[1]
        return self.table[idx], None


def speller(tok, first, text):
    """A Chain that after the id first spells text, whose tokens must differ, then emits <EOT>: each with
    probability 1/2."""
    table, ids = torch.zeros(tok.n_vocab, tok.n_vocab), [first, *tok.encode(text), tok.eot]
    table[ids[:-1], ids[1:]] = math.log(tok.n_vocab - 1)
    return Chain(table)


@pytest.mark.parametrize("order, spm_layout, marks", [
    ("psm", "swapped", "PRE prefix SUF suffix MID"), ("spm", "swapped", "PRE suffix SUF prefix MID"),
    ("spm", "labelled", "SUF suffix PRE prefix MID"), ("spm", "joint", "PRE SUF suffix MID prefix")])
def test_a_worked_example(order, spm_layout, marks):
    """The prompt is the training's layout up to where the middle begins; the infill is what the model emits
    before <EOT>. A token of probability 1/2 has log-probability -ln 2 nats."""
    tok = Tokenizer.bytes()
    parts = {"prefix": list(b"total = "), "suffix": list(b"(xs)\n"),
             "PRE": [tok.pre], "SUF": [tok.suf], "MID": [tok.mid]}
    expected_prompt = [i for mark in marks.split() for i in parts[mark]]
    model = speller(tok, expected_prompt[-1], "sum")
    filled, = infill(model, tok, "total = ", "(xs)\n", max_new_tokens=16, order=order, spm_layout=spm_layout)
    assert model.idx.tolist() == [expected_prompt]
    assert (filled.text, filled.ended, filled.mean_log_p) == ("sum", "stopped", pytest.approx(-math.log(2)))


def draw(model, prompt, n_tokens, **settings):
    """-> ids and log-probabilities, each (rows, steps)."""
    ids, log_p = zip(*generate(model, torch.tensor(prompt), n_tokens, **settings))
    return torch.stack(ids, 1), torch.stack(log_p, 1)


def naive_greedy(model, context, n_tokens, stop=None):
    """No cache and no batch: the whole context anew for each token, its newer half where it is full. If stop
    is given, only ids up to it are drawn."""
    size, out = model.config.block_size, []
    context = context[-size:]
    while len(out) < n_tokens and (not out or out[-1] != stop):
        if len(context) > size:
            context = context[-(size // 2):]
        out.append(model(torch.tensor([context]))[0][0, -1, :stop and stop + 1].argmax().item())
        context = context + out[-1:]
    return out


@pytest.mark.parametrize("n_prompt", [1, 9, 24, 40])
def test_greedy_generation_is_the_naive_loop_also_past_the_context(n_prompt):
    model, prompts = small_model(60), torch.randint(60, (2, n_prompt)).tolist()
    expected = [naive_greedy(model, prompt, 50) for prompt in prompts]
    for settings in ({"temperature": 0}, {"temperature": 3, "top_k": 1}, {"temperature": 3, "top_p": 1e-6}):
        assert draw(model, prompts, 50, **settings)[0].tolist() == expected
    assert draw(model, prompts, 50, temperature=0, n=2)[0].tolist() == [expected[0]] * 2 + [expected[1]] * 2


def test_samples_follow_the_models_distribution_and_the_seed():
    model, n = small_model(60), 20_000
    p = model(torch.tensor([[1, 2, 3]]))[0][0, -1].softmax(-1)
    found = draw(model, [[1, 2, 3]], 1, n=n)[0][:, 0].bincount(minlength=60) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    one, again, other = (draw(model, [[1, 2, 3]], 20, seed=seed, n=3)[0].tolist() for seed in (5, 5, 6))
    assert one == again != other and len(set(map(tuple, one))) == 3


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, 0, 1), (0.5, 0, 1), (2, 4, 1), (1, 0, 0.7), (0.8, 5, 0.9), (1, 100, 1), (1, 0, 0.01), (1e-40, 0, 1)])
def test_draws_come_from_what_temperature_top_k_and_top_p_leave(temperature, top_k, top_p):
    p = [0.30, 0.02, 0.25, 0.08, 0.15, 0.05, 0.12, 0.03]
    kept = {i: (x / max(p)) ** (1 / temperature) for i, x in enumerate(p)}
    kept = {i: kept[i] for i in sorted(kept, key=kept.get)[-top_k:]}
    total, nucleus = sum(kept.values()), {}
    for i in sorted(kept, key=kept.get, reverse=True):
        if sum(nucleus.values()) < top_p:
            nucleus[i] = kept[i] / total
    expected = torch.tensor([nucleus.get(i, 0.0) / sum(nucleus.values()) for i in range(8)])
    log_p, rng = torch.tensor(p).log().expand(20_000, 8), torch.Generator().manual_seed(1)
    found = pick(log_p, temperature, top_k, top_p, rng).bincount(minlength=8) / 20_000
    assert ((found > 0) == (expected > 0)).all() and (found - expected).abs().max() < 0.02


def test_a_row_that_stopped_stays_so_and_leaves_the_others_alone():
    torch.manual_seed(1)
    table, stop, lengths = torch.randn(8, 8), 3, []
    table[:, stop] = 0.5
    ids, log_p = draw(Chain(table), [[5], [6]], 60, temperature=0.7, top_k=6, seed=2, n=20, stop=stop)
    for b, (row, logs) in enumerate(zip(ids.tolist(), log_p)):
        lengths.append(n := row.index(stop) + 1)
        seen = [5 if b < 20 else 6, *row[:n - 1]]  # the model's own log-probabilities, without temperature
        torch.testing.assert_close(logs[:n], table.log_softmax(-1)[seen, row[:n]])
        assert set(row[n:]) <= {stop} and (logs[n:] == 0).all()
    assert ids.shape == (40, max(lengths)) and len(set(lengths)) > 3


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 5}, {"top_k": 3}, {"top_p": 0.5}])
def test_ids_that_are_not_allowed_are_never_drawn(settings):
    table = torch.randn(8, 8)
    table[:, 4:] += 5
    ids, log_p = draw(Chain(table), [[0]], 50, n=5, allowed=4, **settings)
    assert set(ids.flatten().tolist()) <= {0, 1, 2, 3}
    torch.testing.assert_close(log_p[:, 0], table.log_softmax(-1)[0, ids[:, 0]])  # still among all ids


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.5)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} {value}: expected"):
        draw(small_model(60), [[1]], 1, **{name: value})


def test_the_mean_log_probability_is_that_of_a_forward_pass(tok):
    model, prompt = small_model(tok.n_vocab, 64), tok.encode(PREFIX)
    model.lm_head.weight.data[tok.eot] *= 4
    rows = collect(generate(model, torch.tensor([prompt]), 30, stop=tok.eot, n=30), tok)
    assert {ids[-1] == tok.eot for ids, _ in rows} == {True, False}
    for ids, mean_log_p in rows:
        assert tok.eot not in ids[:-1] and (ids[-1] == tok.eot or len(ids) == 30)
        log_p = model(torch.tensor([prompt + ids]))[0][0].log_softmax(-1)
        expected = [log_p[len(prompt) + i - 1, ids[i]].item() for i in range(len(ids))]
        assert mean_log_p == pytest.approx(sum(expected) / len(ids), abs=1e-4)


def test_streamed_pieces_join_to_the_text():
    """A character may be spread over tokens: its parts must not be printed as broken characters."""
    tok, text = Tokenizer.bytes(), "naïve π = 3.14 ✓"
    ids = tok.encode(text)
    for ids, expected in ((ids + [tok.eot], text), (ids[:-1], text[:-1] + "\ufffd")):
        pieces = []
        collect([(torch.tensor([i]), torch.tensor([-1.0])) for i in ids], tok, pieces.append)
        assert "".join(pieces) == expected and len(pieces) > 5


def test_samples_that_end_in_eot_come_first_then_the_likelier(tok):
    """EOT-aware best of n (FIM, appendix H.3). Ranking leaves the texts as they were sampled."""
    samples = [("a", False, -0.1), ("b", True, -2.0), ("c", True, -1.0), (MIDDLE + SUFFIX, False, -0.05)]
    ranked = best_first([(tok.encode(text) + [tok.eot] * stopped, p) for text, stopped, p in samples], tok)
    assert ranked == [Infill("c", STOPPED, -1.0), Infill("b", STOPPED, -2.0),
                      Infill(MIDDLE + SUFFIX, NOT_STOPPED, -0.05), Infill("a", NOT_STOPPED, -0.1)]


@pytest.mark.parametrize("text, suffix, expected", [
    ("x + 1\n    return total\nmore", "    return total\n", 6), ("return total", "return total\n", 0),
    ("x + 1\n    return", "    return total\n", None), ("x)\n", ")\n", None), ("x", "", None),
    ("v\n}\nreturn total", "\n}\nreturn total\nrest", 1), ("v\nreturn total", "}\nreturn total\nrest", None)])
def test_where_the_suffix_begins_again(text, suffix, expected):
    """Short lines such as a bracket say too little: at least 8 visible characters count."""
    assert where_suffix_repeats(text, suffix) == expected


@pytest.mark.parametrize("max_new_tokens, text, ended", [
    (11, "sum(abcdefg", NOT_STOPPED), (12, "sum", CUT), (13, "sum(abcdefg)", STOPPED)])
def test_an_infill_that_does_not_stop_is_cut_where_it_repeats_the_suffix(max_new_tokens, text, ended):
    """One that ends in <EOT> is left as it is, even if it repeats the suffix."""
    tok = Tokenizer.bytes()
    model = speller(tok, tok.mid, "sum(abcdefg)")
    best, = infill(model, tok, "y = ", "(abcdefg)\n", max_new_tokens=max_new_tokens)
    assert (best.text, best.ended) == (text, ended) and best.mean_log_p == pytest.approx(-math.log(2))


@pytest.mark.parametrize("n_prefix, n_suffix", [
    (200, 200), (200, 3), (3, 200), (200, 0), (0, 200), (20, 20), (0, 0)])
def test_a_long_prompt_keeps_the_text_around_the_hole(n_prefix, n_suffix, documents, tok):
    ids, warnings = tok.encode(documents[0]), []
    texts = tok.decode(ids[:n_prefix]), tok.decode(ids[1000:1000 + n_suffix])
    prompt = infill_prompt(small_model(60, 64), tok, *texts, 16, "psm", "swapped", warnings.append)
    prefix, suffix = map(tok.encode, texts)
    at = prompt.index(tok.suf)
    kept_prefix, kept_suffix = prompt[1:at], prompt[at + 1:-1]
    assert kept_prefix == prefix[len(prefix) - len(kept_prefix):] and kept_suffix == suffix[:len(kept_suffix)]
    if len(prefix) + len(suffix) + 3 <= 64 - 16:
        assert (kept_prefix, kept_suffix, warnings) == (prefix, suffix, [])
    else:
        assert len(prompt) == 64 - 16  # no room is wasted, and neither side is starved
        assert min(n_prefix, 15) <= len(kept_prefix) and min(n_suffix, 15) <= len(kept_suffix)
        assert len(warnings) == 1 and f"last {len(kept_prefix)} of {len(prefix)}" in warnings[0]
        assert f"first {len(kept_suffix)} of {len(suffix)}" in warnings[0]


@pytest.mark.parametrize("order, layout", [
    ("psm", "swapped"), ("spm", "swapped"), ("spm", "labelled"), ("spm", "joint")])
def test_typing_on_reuses_the_cache_and_gives_the_infill_without_a_cache(order, layout, documents, tok):
    """In SPM order, text appended to the prefix leaves the keys and values of the suffix as they were (FIM,
    section 3.1)."""
    model, suffix = small_model(tok.n_vocab, 160), documents[0][1000:1200]
    settings = {"max_new_tokens": 12, "order": order, "spm_layout": layout}
    cache, before = PromptCache(model.config), []
    for typed in ("", " def me", " def mean(xs)", " def mean(xs)", "", "x" * 300):
        prefix = documents[0][:100] + typed
        one, = infill(model, tok, prefix, suffix, cache=cache, **settings)
        expected, = infill(model, tok, prefix, suffix, **settings)
        assert (one.text, one.ended) == (expected.text, expected.ended)
        assert one.mean_log_p == pytest.approx(expected.mean_log_p)
        prompt = infill_prompt(model, tok, prefix, suffix, 12, order, layout)
        shared = len(os.path.commonprefix([before, prompt]))
        assert cache.reused == min(shared, len(prompt) - 1)
        if order == "spm" and before and len(prompt) < 160 - 12:
            assert cache.reused > len(tok.encode(suffix)) + 2  # also the prefix, but for its last token
        before = prompt


def test_a_prompt_cache_keeps_what_two_prompts_both_begin_with():
    cache = PromptCache(GPTConfig(60, block_size=24))
    for prompt, reused in (([1, 2, 3], 0), ([1, 2, 4], 2), ([1, 2, 4], 2), ([1, 2, 4, 5], 3), ([1, 2], 1),
                           ([1, 2, 4], 2), ([9, 2, 4], 0), ([9], 0)):
        cache.cut_back_to(prompt)
        assert cache.reused == cache.length == reused and cache.ids == prompt
        cache.length = len(prompt)  # the model has seen the prompt


def test_sentinels_in_a_prompt_are_text(tok):
    prompt = infill_prompt(small_model(60, 64), tok, "a <MID> b", "<EOT><PRE>", 8, "psm", "swapped")
    assert [i for i in prompt if i in tok.specials] == [tok.pre, tok.suf, tok.mid]
    assert tok.decode(prompt) == "a <MID> b<EOT><PRE>"


def test_an_empty_prefix_and_suffix_can_be_infilled(tok):
    infills = infill(small_model(tok.n_vocab), tok, "", "", n=3, max_new_tokens=20, temperature=1.0)
    assert len(infills) == 3 and all(best.mean_log_p < 0 for best in infills)
    with pytest.raises(ValueError, match="21.* context is 24 tokens, expected at most 20"):
        infill(small_model(tok.n_vocab), tok, "", "", max_new_tokens=21)


@pytest.mark.parametrize("objective, knobs, orders", [
    ("ntp", {}, []), ("meap", {}, []), ("sft", {}, []), ("fim_psm", {}, ["psm"]), ("fim_spm", {}, ["spm"]),
    ("fim", {}, ["psm", "spm"]), ("fim_meap", {}, ["psm", "spm"]), ("fim", {"fim_rate": 0.0}, []),
    ("fim", {"spm_rate": 0.0}, ["psm"])])
def test_the_orders_that_an_objective_trains(objective, knobs, orders):
    assert trained_orders(knobs_of(OBJECTIVES[objective]) | knobs) == orders


@pytest.fixture(scope="module")
def runs(tmp_path_factory, documents):
    """A folder with three runs, fim, ntp and sft, and files for --file. The weights are drawn anew after the
    training, so large that every token of a prompt changes what the model emits."""
    root = tmp_path_factory.mktemp("runs")
    texts = {"text.py": "".join(documents[:3]), "zero.py": "x = 1\n", "two.py": "x = <FILL>\ny = <FILL>\n",
             "pairs.jsonl": "".join(f'{{"prompt": "{i}:", "answer": "{i} {i}"}}\n' for i in range(40)),
             "draft.py": f"\ufeff{PREFIX}<FILL>{SUFFIX}"}  # with a byte order mark, as some editors write it
    for name, text in texts.items():
        (root / name).write_text(text, "utf-8")
    (root / "latin.py").write_text("é<FILL>", "latin-1")
    for objective in ("fim", "ntp", "sft"):
        data = "pairs.jsonl" if objective == "sft" else "text.py"
        train.main((f"--objective {objective} --data {root}/{data} --cache-dir {root}/cache "
                    f"--out {root}/{objective} --steps 2 --vocab-size 400 --n-layer 1 --n-head 2 --n-embd 32 "
                    "--block-size 128 --batch-size 4 --device cpu --eval-tokens 256").split())
        checkpoint = load_checkpoint(root / objective)
        torch.manual_seed(1)
        for weights in checkpoint["model"].values():
            weights.normal_(std=0.3)
        torch.save(checkpoint, root / objective / "ckpt.pt")
    return root


@pytest.fixture
def cli(runs, capsys, monkeypatch):
    """Runs sample.py among the runs -> what it prints, and its exit code with the one line of a refusal."""
    def call(*arguments, ckpt="fim", main=sample.main):
        capsys.readouterr()
        code = 0
        if main is sample.main:
            arguments = ["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "12", *arguments]
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        assert not code or shown.err.count("\n") == 1 and "Traceback" not in shown.err
        return SimpleNamespace(out=shown.out, err=shown.err, code=code)

    monkeypatch.chdir(runs)
    return call


def test_the_command_line_continues_a_prompt(cli, runs):
    model, tok, _ = load_model(runs / "ntp")
    for text in ("import os\n", ""):
        continued = naive_greedy(model, tok.encode(text) or [tok.eot], 12, stop=tok.eot)
        shown = cli("--prompt", text.replace("\n", "\\n"), ckpt="ntp").out
        assert shown == text + tok.decode(continued) + "\n"
        assert cli("--prompt", text, "--stream", ckpt="ntp").out == shown
        for flag in (["--top-k", "1"], ["--top-p", "1e-6"]):
            assert cli("--prompt", text, "--temperature", "3", *flag, ckpt="ntp").out == shown
    assert cli("--prompt", "if", "--n", "3", ckpt="ntp").out.count(" of 3, -") == 3


def test_the_command_line_answers_in_the_format_of_fine_tuning(cli, runs):
    model, tok, _ = load_model(runs / "sft")
    answer = naive_greedy(model, [*tok.encode("7:\n"), tok.mid], 12, stop=tok.eot)
    assert cli("--instruct", "7:\\n", ckpt="sft").out == "7:\n" + tok.decode(answer) + "\n"


def test_the_command_line_draws_text_alone(cli, tok, monkeypatch):
    """A model that would go on with <MASK> or <PRE> emits its likeliest text instead."""
    table = torch.zeros(tok.n_vocab, tok.n_vocab)
    table[:, [tok.mask, tok.pre]] = 9
    table[:, tok.encode("x")] = 5
    config = {"objective": "fim_psm", "knobs": knobs_of(OBJECTIVES["fim_psm"])}
    monkeypatch.setattr(sample, "load_model", lambda *_: (Chain(table), tok, {"config": config}))
    assert cli("--prompt", "a").out == "a" + 12 * "x" + "\n"
    filled = cli("--prefix", "a", "--suffix", "b")
    assert filled.out == "a" + 12 * "x" + "b\n" and "never trained on" not in filled.err
    assert "this model was never trained on spm" in cli("--prefix", "a", "--order", "spm").err


def test_the_command_line_fills_a_hole(cli, runs, documents):
    model, tok, _ = load_model(runs / "fim")
    hole = ["--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n")]
    notes = []
    for flags, order in ((["--order", "psm"], "psm"), (["--order", "spm"], "spm"), ([], "spm")):
        shown = cli(*hole, *flags)
        best, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=12, order=order, spm_layout="joint")
        assert shown.out == PREFIX + best.text + SUFFIX + "\n"
        assert shown.err == f"({best.ended}, {best.mean_log_p:.2f} nats a token)\n"
        notes.append(shown.err)
    assert notes[0] != notes[1]  # the two orders can be told apart
    assert cli("--file", "draft.py").out == shown.out
    assert cli(*hole, "--stream").out.rstrip("\n") == best.text.rstrip("\n")
    assert cli("--suffix", "x").out.endswith("x\n") and cli("--prefix", "x").out.startswith("x")
    assert "of the prefix and the first" in cli("--prefix", documents[0][:2000], "--suffix", SUFFIX).err


def test_the_command_line_writes_the_best_infill_into_the_file(cli, tmp_path):
    draft = tmp_path / "draft.py"
    draft.write_text(f"{PREFIX}<FILL>{SUFFIX}")
    shown = cli("--file", str(draft), "--write", "--n", "3", "--temperature", "2")
    assert draft.read_text() == shown.out.split("nats a token\n")[1].split("\n--- 2 of 3")[0]
    assert draft.read_text() != PREFIX + SUFFIX and f"{draft}.orig" in shown.err
    assert cli("--file", str(draft), "--write").code == 2  # the hole is filled


def test_writing_an_infill_leaves_the_rest_of_the_file_as_it_was(tmp_path):
    """Byte for byte, with its permissions and line ends, also through a link; the old file is kept beside."""
    old = f"\ufeff# é\n{PREFIX}<FILL>{SUFFIX}".replace("\n", "\r\n").encode()
    draft, link = tmp_path / "draft.py", tmp_path / "link.py"
    draft.write_bytes(old)
    draft.chmod(0o755)
    link.symlink_to(draft)
    (tmp_path / "draft.py.orig").write_text("of an earlier hole")
    kept = write_infill(link, " / len(xs)  # ½\n")
    assert draft.read_bytes() == old.replace(b"<FILL>", " / len(xs)  # ½\r\n".encode())
    assert draft.stat().st_mode & 0o777 == 0o755 and link.is_symlink()
    assert kept == tmp_path / "draft.py.orig1" and kept.read_bytes() == old
    assert (tmp_path / "draft.py.orig").read_text() == "of an earlier hole"


def test_a_file_that_cannot_be_written_stays_as_it_was(cli, tmp_path, monkeypatch):
    draft = tmp_path / "draft.py"
    draft.write_text("x = <FILL>\n")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as full_disk:
            full_disk.setattr(os, step, fail)
            shown = cli("--file", str(draft), "--write", "--n", "2")
        assert shown.code == 1 and "No space left" in shown.err and draft.read_text() == "x = <FILL>\n"
        assert {path.name.rstrip("1") for path in tmp_path.iterdir()} == {"draft.py", "draft.py.orig"}


def test_the_command_line_ranks_samples(cli):
    hole = ["--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n")]
    shown = cli(*hole, "--n", "3").out
    ranks = [line for line in shown.splitlines() if line.startswith("--- ")]
    nats = [float(line.split()[-4]) for line in ranks]
    assert [line.split(",")[0] for line in ranks] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]
    assert shown.count(PREFIX) == shown.count(SUFFIX) == 3 and nats == sorted(nats, reverse=True)
    assert cli(*hole, "--n", "3", "--seed", "2").out != shown == cli(*hole, "--n", "3", "--seed", "1").out


def test_the_command_line_infills_while_one_types(cli, runs, monkeypatch):
    model, tok, _ = load_model(runs / "fim")
    typed = ["", "", " / len(xs)\\n"]  # an infill; take it, and another; type on

    def read(_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    shown = cli("--interactive", "--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n"))
    texts, prefix = [], PREFIX
    for line in (None, None, " / len(xs)\n"):
        prefix += line or "".join(texts[-1:])
        texts.append(infill(model, tok, prefix, SUFFIX, max_new_tokens=12, spm_layout="joint")[0].text)
    first, second, third = texts
    assert shown.out == (f"{PREFIX}{first}{SUFFIX}\n{PREFIX}{first}{second}{SUFFIX}\n"
                         f"{PREFIX}{first} / len(xs)\n{third}{SUFFIX}\n\n")
    reused = [int(n) for n in re.findall(r"(\d+) of the prompt's \d+ tokens reused", shown.err)]
    assert reused[0] == 0 and reused[1] >= len(tok.encode(SUFFIX)) + 2 <= reused[2]


@pytest.mark.parametrize("arguments, code, message", [
    ("--prompt a\udc80", 2, "lone surrogate"), ("--prefix \ud800 --suffix b", 2, "lone surrogate"),
    ("", 2, "expected one of --prompt"), ("--prompt a --suffix b", 2, "expected one of --prompt"),
    ("--prompt a --instruct b", 2, "expected one of --prompt"),
    ("--prefix a --file draft.py", 2, "expected one of --prompt"),
    ("--file zero.py", 2, "found 0"), ("--file two.py", 2, "found 2"), ("--file latin.py", 2, "UTF-8"),
    ("--interactive", 2, "lone surrogate"), ("--interactive --n 2", 2, "--n 2: expected one sample"),
    ("--interactive --prompt a", 2, "expected one of --prompt"),
    ("--prefix a --write", 2, "--write: expected --file"),
    ("--file draft.py --interactive --write", 2, "without --interactive"),
    ("--file missing.py", 1, "missing.py"), ("--prompt a --n 0", 2, "--n 0: expected 1"),
    ("--prompt a --n 2 --stream", 2, "--n 2: expected one"), ("--prompt a --top-k -1", 2, "--top-k -1"),
    ("--prompt a --top-p 1.5", 2, "--top-p 1.5: expected"), ("--prompt a --seeds 1", 2, "--seeds"),
    ("--prompt a --temp 1", 2, "--temp"),
    ("--prompt a --temperature -1", 2, "--temperature -1.0: expected 0"), ("--prompt a --n two", 2, "two"),
    ("--prompt a --temperature nan", 2, "--temperature nan"),
    ("--prompt a --device abacus", 2, "--device abacus"),
    ("--prompt a --device meta", 2, "--device meta: expected auto, cpu, cuda, cuda:N or mps"),
    ("--prefix a --max-new-tokens 0", 2, "--max-new-tokens 0"), ("--prefix a --order mps", 2, "mps"),
    ("--prefix a --max-new-tokens 125", 2, "--max-new-tokens 125"),
    ("--prefix a --ckpt ntp", 2, "ntp was trained with --objective ntp, which never saw a gap"),
    ("--instruct a", 2, "fim was trained with --objective fim, which never saw prompts"),
    ("--prompt a --ckpt none", 1, "none: no such checkpoint"),
    ("--prompt a --ckpt two.py", 1, "two.py: not")])
def test_a_mistake_is_one_line(arguments, code, message, cli, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "\udc80")
    shown = cli(*arguments.split())
    assert shown.code == code and message in shown.err and not shown.out


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("blown",)


@pytest.mark.parametrize("name", [
    "0", "100", "half", "-1", "flipped bit", "text", "pickle", "bomb", "torch bomb", "list", "other", "older",
    "newer", "wider", "taller", "other words"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_never_run(name, cli, runs, tmp_path):
    """By sample.py, and by train.py --resume."""
    whole, checkpoint = (runs / "fim/ckpt.pt").read_bytes(), load_checkpoint(runs / "fim") | {"step": 1}
    weight = whole.index(checkpoint["model"]["lm_head.weight"].numpy().tobytes())
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1:]
    raw = {"flipped bit": flipped, "half": whole[:len(whole) // 2], "text": b"hello\n",
           "pickle": pickle.dumps({"model": 1}), "bomb": pickle.dumps(Bomb())}
    raw |= {n: whole[:int(n)] for n in ("0", "100", "-1")}

    def changed(**settings):
        return checkpoint | {name: checkpoint[name] | settings for name in ("config", "model_config")}

    without_knobs = {key: value for key, value in checkpoint["config"].items() if key != "knobs"}
    saved = {"torch bomb": checkpoint | {"model": Bomb()}, "list": [1, 2], "other": {"model": {}},
             "older": checkpoint | {"config": without_knobs | {"span": "char"}}, "newer": changed(experts=8),
             "wider": changed(n_embd=64), "taller": changed(n_layer=2),
             "other words": checkpoint | {"tokenizer": {"words": ["a"]}}}
    path = tmp_path / "ckpt.pt"
    path.write_bytes(raw[name]) if name in raw else torch.save(saved[name], path)
    before = path.read_bytes()
    resumed = cli("--resume", "--out", str(tmp_path), main=train.main)
    for shown in (cli("--prompt", "a", ckpt=tmp_path), resumed):
        assert shown.code == 1 and str(tmp_path) in shown.err and not (runs / "blown").exists()
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_newest_run_is_the_default(runs, tmp_path, capsys, monkeypatch):
    for newest, other in (("fim", "ntp"), ("ntp", "fim")):
        os.utime(runs / newest / "ckpt.pt", (2e9, 2e9))
        os.utime(runs / other / "ckpt.pt", (1e9, 1e9))
        assert newest_run(runs) == runs / newest
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--prompt", "a"])
    assert stop.value.code == 1 and "no checkpoint under out/" in capsys.readouterr().err
