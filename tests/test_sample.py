import os
import pickle
import re
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from data import Tokenizer
from model import GPT, GPTConfig
from sample import best_first, collect, generate, infill, infill_prompt, load_checkpoint, newest_run, pick

PREFIX, MIDDLE, SUFFIX = "def mean(xs):\n    return sum(xs)", " / len(xs)", "\n\nprint(mean([1, 2]))\n"


def small_model(n_vocab=60, block_size=24):
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_vocab, block_size, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)


class Chain(torch.nn.Module):
    """A model that looks at the last token alone: its logits are a row of a table, so every draw can be checked."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(block_size=64, n_layer=0)

    def forward(self, idx, cache):
        cache.length += idx.shape[1]
        return self.table[idx], None


def draw(model, prompt, n_tokens, **settings):
    """-> ids and log-probabilities, each (rows, steps)."""
    return tuple(torch.stack(part, 1) for part in zip(*generate(model, torch.tensor(prompt), n_tokens, **settings)))


def naive_greedy(model, context, n_tokens):
    """No cache and no batch: the whole context anew for each token, its newer half where it is full."""
    size, out = model.config.block_size, []
    context = context[-size:]
    for _ in range(n_tokens):
        if len(context) > size:
            context = context[-(size // 2):]
        out.append(model(torch.tensor([context]))[0][0, -1].argmax().item())
        context = context + out[-1:]
    return out


@pytest.mark.parametrize("n_prompt", [1, 9, 24, 40])
def test_greedy_generation_is_the_naive_loop_also_past_the_context(n_prompt):
    model, prompts = small_model(), torch.randint(60, (2, n_prompt)).tolist()
    expected = [naive_greedy(model, prompt, 50) for prompt in prompts]
    for settings in ({"temperature": 0}, {"temperature": 3, "top_k": 1}, {"temperature": 3, "top_p": 1e-6}):
        assert draw(model, prompts, 50, **settings)[0].tolist() == expected
    assert draw(model, prompts, 50, temperature=0, n=2)[0].tolist() == [expected[0]] * 2 + [expected[1]] * 2


def test_samples_follow_the_models_distribution_and_the_seed():
    model, n = small_model(), 20_000
    p = model(torch.tensor([[1, 2, 3]]))[0][0, -1].softmax(-1)
    found = draw(model, [[1, 2, 3]], 1, n=n)[0][:, 0].bincount(minlength=60) / n
    assert ((found - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    one, again, other = (draw(model, [[1, 2, 3]], 20, seed=seed, n=3)[0].tolist() for seed in (5, 5, 6))
    assert one == again != other and len(set(map(tuple, one))) == 3


@pytest.mark.parametrize("temperature, top_k, top_p", [(1, 0, 1), (0.5, 0, 1), (2, 4, 1), (1, 0, 0.7), (0.8, 5, 0.9),
                                                       (1, 100, 1), (1, 0, 0.01), (1e-40, 0, 1)])
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


def test_stop_ends_a_row_and_costs_the_others_nothing():
    torch.manual_seed(1)
    table, stop, lengths = torch.randn(8, 8), 3, []
    table[:, stop] = 0.5
    ids, log_p = draw(Chain(table), [[5], [6]], 60, temperature=0.7, top_k=6, seed=2, n=20, stop=stop)
    for b, (row, logs) in enumerate(zip(ids.tolist(), log_p)):
        lengths.append(n := row.index(stop) + 1)
        seen = [5 if b < 20 else 6, *row[:n - 1]]  # log-probabilities are the model's own, before temperature and cuts
        torch.testing.assert_close(logs[:n], table.log_softmax(-1)[seen, row[:n]])
        assert set(row[n:]) <= {stop} and (logs[n:] == 0).all()
    assert ids.shape == (40, max(lengths)) and len(set(lengths)) > 3


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 5}, {"top_k": 3}, {"top_p": 0.5}])
def test_ids_that_are_not_allowed_are_never_drawn(settings):
    table = torch.randn(8, 8)
    table[:, 4:] += 5
    assert set(draw(Chain(table), [[0]], 100, n=5, allowed=4, **settings)[0].flatten().tolist()) <= {0, 1, 2, 3}


def test_the_mean_log_probability_is_that_of_a_forward_pass(tok):
    model, prompt = small_model(tok.n_vocab, 64), tok.encode(PREFIX)
    model.lm_head.weight[tok.eot] *= 4
    rows = collect(generate(model, torch.tensor([prompt]), 30, stop=tok.eot, n=30), tok)
    assert {ids[-1] == tok.eot for ids, _ in rows} == {True, False}
    for ids, mean_log_p in rows:
        assert tok.eot not in ids[:-1] and (ids[-1] == tok.eot or len(ids) == 30)
        log_p = model(torch.tensor([prompt + ids]))[0][0].log_softmax(-1)
        expected = [log_p[len(prompt) + i - 1, ids[i]].item() for i in range(len(ids))]
        assert mean_log_p == pytest.approx(sum(expected) / len(ids), abs=1e-4)


def test_streamed_pieces_join_to_the_text():
    """A character may be spread over tokens: its parts must not be printed as broken characters."""
    tok, pieces, text = Tokenizer.bytes(), [], "naïve π = 3.14 ✓"
    collect([(torch.tensor([i]), torch.tensor([-1.0])) for i in [*tok.encode(text), tok.eot]], tok, pieces.append)
    assert "".join(pieces) == text and len(pieces) > 5


def test_samples_that_end_in_eot_come_first_then_the_likelier(tok):
    """FIM paper, appendix on EOT-aware best-of-n. One that did not stop is cut where it repeats the suffix."""
    samples = [("a", False, -0.1), ("b", True, -2.0), (MIDDLE + SUFFIX, True, -1.0), (MIDDLE + SUFFIX, False, -0.05)]
    ranked = best_first([(tok.encode(text) + [tok.eot] * stopped, p) for text, stopped, p in samples], tok, SUFFIX)
    assert [(best.text, best.ended, best.mean_log_p) for best in ranked] == [
        (MIDDLE + SUFFIX, "eot", -1.0), ("b", "eot", -2.0), (MIDDLE, "suffix", -0.05), ("a", "length", -0.1)]


@pytest.mark.parametrize("text, suffix, expected", [
    ("x + 1\n    return total\nmore", "    return total\n", 6), ("return total", "return total\n", 0),
    ("x + 1\n    return", "    return total\n", None), ("x)\n", ")\n", None), ("x", "", None), ("", "return x\n", None),
    ("v\n}\nreturn total", "\n}\nreturn total\nrest", 1), ("v\nreturn total", "}\nreturn total\nrest", None)])
def test_where_the_suffix_begins_again(text, suffix, expected):
    """Short lines such as a bracket say too little: at least 8 visible characters count."""
    assert sample.where_suffix_repeats(text, suffix) == expected


@pytest.mark.parametrize("order, layout, marks", [
    ("psm", "swapped", "PRE prefix SUF suffix MID"), ("spm", "swapped", "PRE suffix SUF prefix MID"),
    ("spm", "labelled", "SUF suffix PRE prefix MID"), ("spm", "joint", "PRE SUF suffix MID prefix")])
def test_infill_prompts_as_in_training_and_returns_the_text_before_eot(order, layout, marks, tok, monkeypatch):
    parts = {"prefix": tok.encode(PREFIX), "suffix": tok.encode(SUFFIX), "PRE": [tok.pre], "SUF": [tok.suf],
             "MID": [tok.mid]}

    def oracle(model, idx, *_, **__):
        assert idx.tolist() == [[i for mark in marks.split() for i in parts[mark]]]
        for i in [*tok.encode(MIDDLE), tok.eot]:
            yield torch.tensor([i]), torch.tensor([-0.5])

    monkeypatch.setattr(sample, "generate", oracle)
    filled = infill(small_model(block_size=64), tok, PREFIX, SUFFIX, max_new_tokens=16, order=order, spm_layout=layout)
    assert filled == [sample.Infill(MIDDLE, "eot", -0.5)]


def test_an_infill_holds_text_alone(tok):
    """A model that would say <MASK> or <PRE> inside the middle is made to say its likeliest text instead."""
    table = torch.zeros(tok.n_vocab, tok.n_vocab)
    table[:, [tok.mask, tok.pre]] = 9
    table[:, tok.encode("x")] = 5
    assert infill(Chain(table), tok, "a = ", "\n", max_new_tokens=4)[0].text == "xxxx"


@pytest.mark.parametrize("n_prefix, n_suffix", [(200, 200), (200, 3), (3, 200), (200, 0), (0, 200), (20, 20), (0, 0)])
def test_a_long_prompt_keeps_the_text_around_the_hole(n_prefix, n_suffix, documents, tok):
    ids, warnings = tok.encode(documents[0]), []
    texts = tok.decode(ids[:n_prefix]), tok.decode(ids[1000:1000 + n_suffix])
    prompt = infill_prompt(small_model(block_size=64), tok, *texts, 16, "psm", "swapped", warnings.append)
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


@pytest.mark.parametrize("order, layout", [("psm", "swapped"), ("spm", "swapped"), ("spm", "labelled"), ("spm", "joint")])
def test_typing_on_reuses_the_cache_and_gives_the_infill_that_starting_afresh_gives(order, layout, documents, tok):
    """FIM paper, section 3: in SPM order, text appended to the prefix leaves the suffix's keys and values as they were."""
    model, suffix = small_model(tok.n_vocab, 160), documents[0][1000:1200]
    prompts = [f"{documents[0][:100]}{typed}" for typed in ("", " def me", " def mean(xs)", " def mean(xs)", "", "x" * 300)]
    cache, before = sample.PromptCache(model.config), []
    for prefix in prompts:
        settings = {"max_new_tokens": 12, "order": order, "spm_layout": layout}
        one, afresh = (infill(model, tok, prefix, suffix, cache=c, **settings)[0] for c in (cache, None))
        assert (one.text, one.ended) == (afresh.text, afresh.ended) and one.mean_log_p == pytest.approx(afresh.mean_log_p)
        prompt = infill_prompt(model, tok, prefix, suffix, 12, order, layout)
        shared = len(os.path.commonprefix([before, prompt]))
        assert cache.reused == min(shared, len(prompt) - 1)
        if order == "spm" and before and len(prompt) < 160 - 12:
            assert cache.reused > len(tok.encode(suffix)) + 2  # and all but the last token of the prefix that was there
        before = prompt


def test_sentinels_in_a_prompt_are_text(tok):
    prompt = infill_prompt(small_model(block_size=64), tok, "a <MID> b", "<EOT><PRE>", 8, "psm", "swapped")
    assert [i for i in prompt if i in tok.specials] == [tok.pre, tok.suf, tok.mid]
    assert tok.decode(prompt) == "a <MID> b<EOT><PRE>"


def test_an_empty_prefix_and_suffix_can_be_infilled(tok):
    infills = infill(small_model(tok.n_vocab), tok, "", "", n=3, max_new_tokens=20, temperature=1.0)
    assert len(infills) == 3 and all(best.text and best.mean_log_p < 0 for best in infills)
    with pytest.raises(ValueError, match="21.* context is 24 tokens, expected at most 20"):
        infill(small_model(tok.n_vocab), tok, "", "", max_new_tokens=21)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, documents):
    """A folder with three trained runs, fim, ntp and sft, and files for --file."""
    root = tmp_path_factory.mktemp("runs")
    texts = {"text.py": "".join(documents[:3]), "zero.py": "x = 1\n", "two.py": "x = <FILL>\ny = <FILL>\n",
             "draft.py": f"{PREFIX}<FILL>{SUFFIX}", "latin.py": "é<FILL>"}
    for name, text in texts.items():
        (root / name).write_text(text, "latin-1" if name == "latin.py" else "utf-8")
    (root / "pairs.jsonl").write_text("".join(f'{{"prompt": "{i}:", "answer": "{i} {i}"}}\n' for i in range(40)))
    for objective in ("fim", "ntp", "sft"):
        data = "pairs.jsonl" if objective == "sft" else "text.py"
        train.main((f"--data {root}/{data} --cache-dir {root}/cache --out {root}/{objective} --objective {objective} "
                    "--steps 30 --vocab-size 400 --n-layer 1 --n-head 2 --n-embd 32 --block-size 128 --batch-size 4 "
                    "--device cpu --eval-tokens 256 --dropout 0.1").split())
    return root


@pytest.fixture
def cli(runs, capsys, monkeypatch):
    """Runs sample.py among the runs -> what it prints, and its exit code with the one line of a refusal."""
    def call(*arguments, ckpt="fim", resume=None):
        capsys.readouterr()
        code = 0
        try:
            if resume:
                train.main(["--resume", "--out", str(resume)])
            else:
                sample.main(["--ckpt", str(ckpt), "--device", "cpu", "--max-new-tokens", "12", *arguments])
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        assert not code or shown.err.count("\n") == 1 and "Traceback" not in shown.err
        return SimpleNamespace(out=shown.out, err=shown.err, code=code)

    monkeypatch.chdir(runs)
    return call


def test_the_command_line_continues_a_prompt(cli, runs):
    model, tok, _ = sample.load_model(runs / "ntp")
    with torch.no_grad():
        model.lm_head.weight[tok.pre:] = 0  # a prompt is continued by text or <EOT>
    for text in ("import os\n", ""):
        expected = text + tok.decode(naive_greedy(model, tok.encode(text) or [tok.eot], 12))
        shown = cli("--prompt", text.replace("\n", "\\n"), ckpt="ntp").out
        assert shown == expected + "\n" and len(expected) > len(text)
        assert cli("--prompt", text, "--stream", ckpt="ntp").out == shown
    assert cli("--prompt", "if", "--n", "3", ckpt="ntp").out.count(" of 3, -") == 3


def test_the_command_line_answers_in_the_format_of_fine_tuning(cli, runs):
    model, tok, _ = sample.load_model(runs / "sft")
    prompt, said = [*tok.encode("7:\n"), tok.mid], []
    while len(said) < 12 and said[-1:] != [tok.eot]:
        said.append(model(torch.tensor([prompt + said]))[0][0, -1, :tok.eot + 1].argmax().item())
    assert cli("--instruct", "7:\\n", ckpt="sft").out == "7:\n" + tok.decode(said) + "\n"
    assert "the last 115 of" in cli("--instruct", "7" * 500, ckpt="sft").err
    refused = cli("--instruct", "7:", ckpt="fim")
    assert refused.code == 2 and "fim was trained with --objective fim, which never saw prompts" in refused.err

def test_the_command_line_draws_text_alone(cli, tok, monkeypatch):
    """A model that would go on with <MASK> or <PRE> is made to say its likeliest text instead."""
    table = torch.zeros(tok.n_vocab, tok.n_vocab)
    table[:, [tok.mask, tok.pre]] = 9
    table[:, tok.encode("x")] = 5
    monkeypatch.setattr(sample, "load_model", lambda *_: (Chain(table), tok, {}))
    assert cli("--prompt", "a").out == "a" + 12 * "x" + "\n"


def test_the_command_line_fills_a_hole(cli, runs, documents, monkeypatch):
    model, tok, _ = sample.load_model(runs / "fim")
    hole = ["--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n")]
    orders, fim_prompt = [], sample.fim_prompt
    monkeypatch.setattr(sample, "fim_prompt", lambda *args: orders.append(args[3]) or fim_prompt(*args))
    for flags, order in ((["--order", "psm"], "psm"), (["--order", "spm"], "spm"), ([], "spm")):
        shown = cli(*hole, *flags)
        best, = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=12, order=order)
        assert shown.out == PREFIX + best.text + SUFFIX + "\n" and shown.err.count("\n") == 1
        assert orders.pop() == orders.pop() == order  # the command line's, then ours
    assert cli(*hole).out == cli("--file", "draft.py").out == shown.out
    assert cli(*hole, "--stream").out.rstrip("\n") == best.text.rstrip("\n")
    assert cli("--suffix", "x").out.endswith("x\n") and cli("--prefix", "x").out.startswith("x")
    assert "of the prefix and the first" in cli("--prefix", documents[0][:2000], "--suffix", SUFFIX).err

    shown = cli(*hole, "--n", "3").out
    ranks = [line for line in shown.splitlines() if line.startswith("--- ")]
    nats = [float(line.split()[-4]) for line in ranks]
    assert [line.split(",")[0] for line in ranks] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]
    assert shown.count(PREFIX) == shown.count(SUFFIX) == 3 and nats == sorted(nats, reverse=True)
    assert cli(*hole, "--n", "3", "--seed", "2").out != shown == cli(*hole, "--n", "3", "--seed", "1").out


def test_the_command_line_infills_while_one_types(cli, runs, monkeypatch):
    model, tok, _ = sample.load_model(runs / "fim")
    typed = ["", "", " / len(xs)\\n"]  # an infill; take it, and another; type on

    def read(_):
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", read)
    shown = cli("--interactive", "--prefix", PREFIX, "--suffix", SUFFIX.replace("\n", "\\n"))
    first = infill(model, tok, PREFIX, SUFFIX, max_new_tokens=12)[0].text
    second = infill(model, tok, PREFIX + first, SUFFIX, max_new_tokens=12)[0].text
    third = infill(model, tok, PREFIX + first + " / len(xs)\n", SUFFIX, max_new_tokens=12)[0].text
    assert shown.out == (f"{PREFIX}{first}{SUFFIX}\n{PREFIX}{first}{second}{SUFFIX}\n"
                         f"{PREFIX}{first} / len(xs)\n{third}{SUFFIX}\n\n")
    reused = [int(n) for n in re.findall(r"(\d+) of the prompt's \d+ tokens reused", shown.err)]
    assert reused[0] == 0 and reused[1] >= len(tok.encode(SUFFIX)) + 2 <= reused[2]


@pytest.mark.parametrize("arguments, code, message", [
    ("--prompt a\udc80", 2, "lone surrogate"), ("--prefix \ud800 --suffix b", 2, "lone surrogate"),
    ("", 2, "expected one of --prompt"), ("--prompt a --suffix b", 2, "expected one of --prompt"),
    ("--file zero.py", 2, "found 0"), ("--file two.py", 2, "found 2"), ("--file latin.py", 2, "UTF-8"),
    ("--interactive --n 2", 2, "--n 2: expected one sample"), ("--interactive --prompt a", 2, "expected one of --prompt"),
    ("--file missing.py", 1, "missing.py"), ("--prompt a --n 0", 2, "--n 0: expected 1"),
    ("--prompt a --n 2 --stream", 2, "--n 2: expected one"), ("--prompt a --top-k -1", 2, "--top-k -1"),
    ("--prompt a --top-p 1.5", 2, "--top-p 1.5: expected"), ("--prompt a --seeds 1", 2, "--seeds"),
    ("--prompt a --temp 1", 2, "--temp"),
    ("--prompt a --temperature -1", 2, "--temperature -1.0: expected 0"), ("--prompt a --n two", 2, "two"),
    ("--prompt a --temperature nan", 2, "--temperature nan"), ("--prompt a --device abacus", 2, "--device abacus"),
    ("--prompt a --device meta", 2, "--device meta: expected auto, cpu, cuda, cuda:N or mps"),
    ("--prefix a --max-new-tokens 0", 2, "--max-new-tokens 0"), ("--prefix a --order mps", 2, "mps"),
    ("--prefix a --max-new-tokens 125", 2, "--max-new-tokens 125"),
    ("--prefix a --ckpt ntp", 2, "ntp was trained with --objective ntp, which never saw a gap"),
    ("--prompt a --ckpt none", 1, "none: no such checkpoint"), ("--prompt a --ckpt two.py", 1, "two.py: not")])
def test_a_mistake_is_one_line(arguments, code, message, cli):
    shown = cli(*arguments.split())
    assert shown.code == code and message in shown.err and not shown.out


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("blown",)


@pytest.mark.parametrize("name", ["0", "1", "100", "half", "-1", "flipped bit", "text", "pickle", "new pickle",
                                  "bomb", "torch bomb", "list", "other", "newer", "wider", "taller", "other words"])
@pytest.mark.parametrize("resume", [False, True], ids=["sample", "resume"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_never_run(name, resume, cli, runs, tmp_path):
    whole, checkpoint = (runs / "fim/ckpt.pt").read_bytes(), load_checkpoint(runs / "fim") | {"step": 20}
    weight = whole.index(checkpoint["model"]["lm_head.weight"].numpy().tobytes())
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1:]
    raw = {"flipped bit": flipped, "half": whole[:len(whole) // 2], "text": b"hello\n",
           "pickle": pickle.dumps({"model": 1}, 2), "new pickle": pickle.dumps({"model": 1}, 4), "bomb": pickle.dumps(Bomb(), 2)}
    raw |= {n: whole[:int(n)] for n in ("0", "1", "100", "-1")}

    def changed(**settings):
        return checkpoint | {name: checkpoint[name] | settings for name in ("config", "model_config")}

    saved = {"torch bomb": checkpoint | {"model": Bomb()}, "list": [1, 2], "other": {"model": {}},
             "newer": changed(experts=8), "wider": changed(n_embd=64), "taller": changed(n_layer=2),
             "other words": checkpoint | {"tokenizer": {"words": ["a"]}}}
    path = tmp_path / "ckpt.pt"
    path.write_bytes(raw[name]) if name in raw else torch.save(saved[name], path)
    before = path.read_bytes()
    shown = cli("--prompt", "a", ckpt=tmp_path, resume=resume and tmp_path)
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
