import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import Batches, text_rows
from model import GPT, GPTConfig
from objectives import OBJECTIVES
from sample import load_checkpoint, load_model
from train import PRESETS, Config, bits_per_byte, learning_rate, make_optimizers, save_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory, documents):
    """The flags of a tiny model on a folder of real files, and a cache that the tests share."""
    text, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    for i, document in enumerate(documents):
        (text / f"{i}.py").write_text(document)
    return (f"--data {text} --cache-dir {cache} --tokenizer bpe --vocab-size 400 --n-layer 1 --n-head 2 --n-embd 32 "
            "--block-size 72 --batch-size 4 --device cpu --dtype fp32 --eval-tokens 256").split()


def small_model(n_vocab, **settings):
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_vocab, block_size=16, n_layer=2, n_head=2, n_embd=32, **settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def pair_data(objective, folder):
    """--data with pairs of lines of real text, for an objective that needs them."""
    if not OBJECTIVES[objective].answers:
        return []
    lines = [line for line in Path(train.__file__).read_text().splitlines() if line.strip()]
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": line, "answer": "\n".join(lines[i + 1:i + 6])}) + "\n" for i, line in enumerate(lines)))
    return ["--data", str(folder / "pairs.jsonl")]


def metrics(folder):
    """The lines of metrics.jsonl as strict JSON, which has no NaN."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl")) for line in lines]


def assert_same(a, b):
    """Nested dictionaries and lists of tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


def refusal(arguments, capsys):
    """-> (exit code, the last line on stderr without a progress bar, how many lines stderr has)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert not any("Traceback" in line for line in lines)
    return stop.value.code, lines[-1].split("\r")[-1], len(lines)


@pytest.mark.parametrize("warmup, final_lr, expected", [
    (4, 0.1, [0.5, 1, 1.5, 2, 1.7, 1.4, 1.1, 0.8, 0.5, 0.2]), (0, 0, [1.5, 1, 0.5, 0]), (20, 0, [0.1, 0.2])])
def test_the_learning_rate_warms_up_and_decays_in_lines(warmup, final_lr, expected):
    config = Config(lr=2.0, warmup=warmup, final_lr=final_lr, steps=len(expected))
    assert [learning_rate(step, config) for step in range(config.steps)] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_optimizer(optimizer, tied):
    model = small_model(60, tied=tied, bias=True, position="learned")
    optimizers = make_optimizers(model, Config(optimizer=optimizer, weight_decay=0.3))
    groups = [(type(o).__name__, group) for o in optimizers for group in o.param_groups]
    held = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for _, group in groups:  # matrices decay, biases and norms do not
        assert group["weight_decay"] in (0, 0.3)
        assert {p.dim() for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    muon = {id(p) for name, group in groups if name == "Muon" for p in group["params"]}
    assert muon == {id(p) for p in model.transformer.h.parameters() if p.dim() == 2 and optimizer == "muon"}


def test_bits_per_byte_is_that_of_one_token_at_a_time(tok, stream):
    model, T, bits, n_bytes = small_model(tok.n_vocab), 16, 0.0, 0
    at = int(np.flatnonzero(stream == tok.eot)[0])
    text = stream[at - 40:at - 40 + 5 * T + 1].astype(int)  # five windows side by side, an <EOT> in the middle
    model.eval()
    for start in range(0, 5 * T, T):
        for i in range(start + 1, start + T + 1):
            if text[i] != tok.eot:
                log_p = model(torch.tensor(text[start:i])[None])[0][0, -1].double().log_softmax(-1)
                bits -= log_p[text[i]].item() / math.log(2)
                n_bytes += len(tok.decode_bytes([text[i]]))
    assert bits_per_byte(model, text_rows(text, tok, T, 10**6), tok) == pytest.approx(bits / n_bytes, rel=1e-5)


def test_bits_per_byte_takes_windows_from_end_to_end_without_dropout(tok, stream):
    model = small_model(tok.n_vocab, dropout=0.5)
    ends = stream[:17], stream[-17:]
    expected = np.average([bits_per_byte(model, text_rows(part, tok, 16, 1), tok) for part in ends],
                          weights=[tok.n_bytes[part[1:]].sum() for part in ends])
    assert bits_per_byte(model, text_rows(stream, tok, 16, 2), tok) == pytest.approx(expected, rel=1e-5)
    assert model.training and bits_per_byte(model, text_rows(stream[:16], tok, 16, 2), tok) is None


def test_bits_per_byte_of_answers_leave_prompts_and_padding_out(tok, documents):
    model, ids = small_model(tok.n_vocab).eval(), tok.encode(documents[0])
    pairs, bits, n_bytes = [(ids[i:i + 4], ids[i + 4:i + 8]) for i in range(0, 120, 8)], 0.0, 0
    batches = train.PairBatches(pairs, OBJECTIVES["sft"], tok, 16, 1, 0)
    for row in batches.rows:  # one example after the other, as they stand in their row
        seen = []
        for prompt, answer in (batches.pairs[i] for i in row):
            seen += [*prompt, tok.mid]
            for x in answer:
                bits -= model(torch.tensor([seen]))[0][0, -1].double().log_softmax(-1)[x].item() / math.log(2)
                n_bytes += len(tok.decode_bytes([x]))
                seen.append(x)
            seen.append(tok.eot)
    found = bits_per_byte(model, train.answer_rows(pairs, tok, 16, 100), tok)
    assert found == pytest.approx(bits / n_bytes, rel=1e-5)


@pytest.mark.parametrize("clip", [0.01, 0])
def test_the_gradient_of_a_step_is_clipped(clip, base, tmp_path, monkeypatch):
    norms = []

    def make_watched_optimizers(model, config):
        first, *rest = make_optimizers(model, config)
        first.register_step_pre_hook(lambda *_: norms.append(math.hypot(*(p.grad.norm() for p in model.parameters()))))
        return [first, *rest]

    monkeypatch.setattr(train, "make_optimizers", make_watched_optimizers)
    train.main([*base, *f"--steps 2 --clip {clip} --out {tmp_path}".split()])
    assert norms == pytest.approx([clip] * 2, rel=1e-3) if clip else min(norms) > 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_torchs_own(bf16):
    """torch.optim.Muon computes in bf16 whatever the hardware has. In bf16 the weights are the same to the last bit; in
    fp32 they differ by what bf16's 8 bits lose: within a hundredth of what ten steps move."""
    torch.manual_seed(0)
    start = [0.02 * torch.randn(shape) for shape in ((384, 128), (384, 128), (128, 128), (64, 256))]
    ours, theirs = ([W.clone().requires_grad_() for W in start] for _ in range(2))
    optimizers = [train.Muon(ours, 0.01, 0.1, bf16),
                  torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(10):
        for W, V in zip(ours, theirs):
            W.grad = torch.randn_like(W) + W.detach()
            V.grad = W.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for W, V, W0 in zip(ours, theirs, start):
        assert (W - V).norm() <= (0.01 if not bf16 else 1e-6) * (V - W0).norm()
    assert all(W.dtype == torch.float32 for W in ours)


def test_orthogonalize_moves_every_singular_value_near_one():
    torch.manual_seed(0)
    G = torch.randn(3, 40, 100) * torch.logspace(-1, 1, 3)[:, None, None]
    for X in (G, G.mT):
        U, S, V = torch.linalg.svd(X, full_matrices=False)
        O = train.orthogonalize(X)
        values = torch.linalg.svdvals(O)
        assert values.min() > 0.5 and values.max() < 1.3
        torch.testing.assert_close(U.mT @ O @ V.mT, torch.diag_embed((U.mT @ O @ V.mT).diagonal(dim1=1, dim2=2)),
                                   rtol=0, atol=1e-4), "U and V are left as they are"


def test_batches_are_built_on_the_cpu_and_sent_later(tok, stream):
    """They are built in a thread, and a second thread at work on MPS crashes it."""
    batches = Batches(stream, OBJECTIVES["fim"], tok, 16, 2, seed=0)
    built = train.load(batches, 0, Config(grad_accum=2), torch.device("mps"))
    for micro_batches, device in (built, "cpu"), (train.send(built, torch.device("meta")), "meta"):
        assert [ids.device.type for pair in micro_batches for ids in pair] == 4 * [device]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_learns(objective, base, tmp_path, no_float64):
    flags = f"--objective {objective} --steps 30 --warmup 5 --lr 0.01 --out {tmp_path}"
    train.main([*base, *flags.split(), *pair_data(objective, tmp_path)])
    lines = metrics(tmp_path)
    assert abs(lines[0]["loss"] - math.log(400)) < 0.1  # it starts as a guess
    name = "answer_bpb" if OBJECTIVES[objective].answers else "held_out_bpb"
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.8 and lines[-1][name] < 4.1


def test_init_from_starts_with_the_very_weights_and_vocabulary(base, tmp_path, monkeypatch):
    train.main([*base, *f"--objective ntp --steps 3 --warmup 1 --out {tmp_path / 'ntp'}".split()])
    source, tok, _ = load_model(tmp_path / "ntp")
    idx = torch.randint(400, (2, 40))
    first = []

    monkeypatch.setattr(train, "describe", lambda config, model, *_: first.append((model(idx)[0].detach(), config)))
    # another corpus, on which another vocabulary would be learned; a smaller context is fine
    (tmp_path / "other.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 500)
    flags = f"--init-from {tmp_path / 'ntp'} --objective fim_spm --steps 3 --warmup 1 --data {tmp_path / 'other.txt'}"
    train.main([*flags.split(), *f"--block-size 64 --batch-size 2 --device cpu --cache-dir {tmp_path} --out {tmp_path / 'fim'}".split()])
    logits, config = first[0]
    assert torch.equal(logits, source(idx)[0]) and config.n_embd == 32 and config.block_size == 64
    saved = load_checkpoint(tmp_path / "fim")
    assert saved["tokenizer"] == tok.to_dict() and saved["step"] == 3
    moved = saved["model"]["transformer.h.0.mlp.c_fc.weight"] - source.transformer.h[0].mlp.c_fc.weight
    assert moved.abs().max() > 0
    shutil.rmtree(tmp_path / "ntp")  # a run needs its start no more


@pytest.mark.parametrize("objective", ["meap", "sft"])
def test_accumulated_batches_are_one_large_batch(objective, base, tmp_path, documents):
    """Also where their numbers of targets differ: answers of fine-tuning are long and short."""
    losses, data = [], []
    if objective == "sft":
        lines = [line for document in documents for line in document.split("\n") if len(line) > 10][:300]
        pairs = [{"prompt": line[:i % 9 + 1], "answer": line[i % 9 + 1:i % 60 + 12]} for i, line in enumerate(lines)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        data = ["--data", str(tmp_path / "a.jsonl")]
    for name, flags in (("large", "--batch-size 8"), ("accumulated", "--batch-size 4 --grad-accum 2")):
        flags = f"{flags} --objective {objective} --steps 4 --warmup 1 --out {tmp_path / name}"
        train.main([*base, *data, *flags.split()])
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def torchrun(*arguments, n=2, **settings):
    """A training run in n processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", train.__file__]
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **settings)


def test_two_processes_do_what_one_does(base, tmp_path):
    """Also with dropout, and when each accumulates batches itself. One of them writes and speaks for both."""
    flags = [*base, *"--objective fim_meap --grad-accum 4 --steps 3 --warmup 1 --dropout 0.1 --eval-every 2".split()]
    shown, errors = torchrun(*flags, "--out", tmp_path / "two").communicate(timeout=300)
    assert shown.count("done, saved") == shown.count("2 processes") == 1, errors
    train.main([*flags, "--out", str(tmp_path / "one")])
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("step", "tokens", "loss", "lr", *(["held_out_bpb"] if one["step"] == 2 else [])):
            assert one[key] == pytest.approx(two[key], abs=1e-5)
    weights = [load_checkpoint(tmp_path / name)["model"] for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lr, message", [(0.01, "stopped after step"), (1e30, "the loss is nan at step")])
def test_processes_stop_together(lr, message, base, tmp_path):
    """Ctrl-C is saved by the first of them, as by one alone; a loss that is lost ends them all, and nothing hangs."""
    flags = f"--grad-accum 2 --steps 3000 --warmup 0 --optimizer adamw --clip 0 --lr {lr} --save-every 3000"
    run = torchrun(*base, *flags.split(), "--out", tmp_path)
    while run.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.05)
    if lr < 1:
        time.sleep(1)
        run.send_signal(signal.SIGINT)
    shown, errors = run.communicate(timeout=300)
    assert run.returncode and message in shown + errors
    if lr < 1:
        assert shown.count("stopped") == 1 and load_checkpoint(tmp_path)["step"] == metrics(tmp_path)[-1]["step"] < 3000
    else:
        assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("objective, extra", [*((name, "") for name in OBJECTIVES), (
    "fim", "--fim-level document --optimizer adamw --position learned --no-tied --no-qk-norm --bias")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(objective, extra, base, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"

    def save_and_keep_a_copy(path, checkpoint):
        save_checkpoint(path, checkpoint)
        if checkpoint["step"] == 3:
            shutil.copytree(whole, part)
            with open(part / "metrics.jsonl", "a") as f:  # what a run leaves that is killed two steps later
                f.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
            (part / "ckpt.tmp").write_bytes(b"half a checkpoint")

    monkeypatch.setattr(train, "save_checkpoint", save_and_keep_a_copy)
    flags = f"--objective {objective} --steps 6 --warmup 2 --dropout 0.1 --grad-accum 2 --eval-every 2 --save-every 3"
    train.main([*base, *f"{flags} {extra} --out {whole}".split(), *pair_data(objective, tmp_path)])
    assert load_checkpoint(part)["step"] == 3
    train.main(["--resume", "--out", str(part), "--eval-every", "100"])  # evaluation leaves no trace in the weights
    first, second = load_checkpoint(whole), load_checkpoint(part)
    assert first["step"] == second["step"] == 6
    for key in ("model", "optimizers", "model_config", "objective", "tokenizer"):
        assert_same(first[key], second[key])
    assert [line["step"] for line in metrics(part)] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(metrics(whole), metrics(part), strict=True):
        assert all(one[key] == other[key] for key in ("step", "tokens", "loss", "lr"))
        assert one["tokens"] == one["step"] * 2 * 4 * 72 and (
            "held_out_bpb" in one or "answer_bpb" in one) == (one["step"] % 2 == 0)


def test_ctrl_c_saves_and_resume_finishes_on_the_same_text(base, tmp_path, documents, capsys):
    text = tmp_path / "text.py"
    text.write_text("".join(documents))
    flags = f"--data {text} --objective fim_spm --steps 300 --out {tmp_path}".split()
    command = [sys.executable, train.__file__, *base, *flags]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while run.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and metrics(tmp_path)):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    shown, _ = run.communicate()
    step = load_checkpoint(tmp_path)["step"]
    assert run.returncode == 0 and 0 < step < 300 and metrics(tmp_path)[-1]["step"] == step
    model, tok, _ = load_model(tmp_path)
    assert model(torch.tensor([tok.encode("import os")]))[0].isfinite().all()
    last = shown.splitlines()[-1]
    assert last == f"stopped after step {step}, saved; go on with: python train.py --out {tmp_path} --resume"
    resume = last.split("train.py ")[1].split()
    text.write_text("".join(documents[1:]))
    code, line, _ = refusal(resume, capsys)
    assert code == 1 and f"the text of --data {text} has changed" in line
    text.write_text("".join(documents))
    train.main(resume)
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == load_checkpoint(tmp_path)["step"] == 300


@pytest.mark.parametrize("room", [100, 1000, 0.5, 0.99])
def test_the_previous_checkpoint_survives_a_full_disk(room, base, tmp_path, capsys, monkeypatch):
    """A limit on the size of files fails as a full disk does; torch raises other errors early than late in a file."""
    resource, path = pytest.importorskip("resource"), tmp_path / "ckpt.pt"

    def save_with_little_room(path, checkpoint):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if checkpoint["step"] == 4:
            limit = room if room > 1 else int(room * path.stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save_checkpoint(path, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(train, "save_checkpoint", save_with_little_room)
    code, line, _ = refusal([*base, *f"--steps 6 --save-every 2 --out {tmp_path}".split()], capsys)
    assert code == 1 and line.endswith(f"{path}: step 4 could not be saved ([Errno 27] File too large); what was saved "
                                       "before is whole")
    assert load_checkpoint(tmp_path)["step"] == 2 and not (tmp_path / "ckpt.tmp").exists()
    monkeypatch.undo()
    train.main(["--resume", "--out", str(tmp_path)])
    assert load_checkpoint(tmp_path)["step"] == 6


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(base, tmp_path):
    """kill -9, by turns while a checkpoint is being written and at random."""
    flags = [*base, *"--objective fim_meap --steps 100 --warmup 2 --dropout 0.1 --grad-accum 2 --save-every 1".split()]
    killed, during_the_write = tmp_path / "killed", 0

    def saves():
        return {path.stat().st_mtime_ns for path in killed.glob("ckpt.pt")}

    for turn in range(3):
        before = saves()
        arguments = ["--resume", "--out", killed] if (killed / "ckpt.pt").exists() else [*flags, "--out", killed]
        run = subprocess.Popen([sys.executable, train.__file__, *map(str, arguments)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        while not saves() - before:
            assert run.poll() is None
        time.sleep(random.random() / 10)
        while turn % 2 == 0 and not (killed / "ckpt.tmp").exists() and run.poll() is None:
            pass
        run.kill()
        run.wait()
        during_the_write += (killed / "ckpt.tmp").exists()
        metrics(killed)
    assert during_the_write and load_checkpoint(killed)["step"] < 100
    train.main(["--resume", "--out", str(killed), "--save-every", "1000"])
    train.main([*flags, "--save-every", "1000", "--out", str(tmp_path / "whole")])
    first, second = load_checkpoint(tmp_path / "whole"), load_checkpoint(killed)
    assert_same(first["model"], second["model"])
    assert_same(first["optimizers"], second["optimizers"])
    steps = [line["step"] for line in metrics(killed)]
    assert steps == sorted(set(steps)) and steps[-1] == 100


def test_a_second_run_on_one_folder_is_refused(base, tmp_path, capsys):
    pytest.importorskip("fcntl")
    flags = [*base, "--steps", "2", "--out", str(tmp_path)]
    with train.lock(tmp_path):
        code, line, _ = refusal(flags, capsys)
        assert code == 1 and f"--out {tmp_path}: another run is at work in this folder" in line
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    train.main(flags)


@pytest.mark.parametrize("save_every, saved", [(2, True), (3, False), (100, False)])
def test_a_diverged_run_ends_and_keeps_the_last_good_state(save_every, saved, base, tmp_path, capsys, monkeypatch):
    """The third update throws the weights out. Its own loss was still fine: a checkpoint made then would look good."""
    monkeypatch.setattr(train, "learning_rate", lambda step, config: 1e30 if step == 2 else 1e-3)
    flags = f"--steps 20 --eval-every 3 --save-every {save_every} --out {tmp_path}"
    code, line, _ = refusal([*base, *flags.split()], capsys)
    assert code == 1 and re.search("the loss is nan at step [34]", line) and metrics(tmp_path)[-1]["step"] <= 3
    if (tmp_path / "ckpt.pt").exists():
        model, tok, checkpoint = load_model(tmp_path)
        ids = torch.tensor([tok.encode("import os\nimport sys\n")])
        assert model(ids, ids)[1].isfinite(), f"the checkpoint of step {checkpoint['step']} is broken"
    assert (tmp_path / "ckpt.pt").exists() == ("ckpt.pt keeps" in line) == saved


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                                   RuntimeError("MPS backend out of memory"), "--n-embd 100000000 --n-head 1"])
def test_out_of_memory_says_which_flags_to_lower(error, base, tmp_path, capsys, monkeypatch):
    flags = [*base, "--out", str(tmp_path)]
    if isinstance(error, str):  # 100 PB: refused at once
        flags += error.split()
    else:
        monkeypatch.setattr(GPT, "forward", lambda *_: (_ for _ in ()).throw(error))
    code, line, _ = refusal(flags, capsys)
    assert code == 1 and line.endswith("out of memory: lower --batch-size, --block-size or --n-embd; in sampling, --n")


def test_compile_without_a_compiler_is_one_line(base, tmp_path):
    bare = {"PATH": "", "CXX": "nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, train.__file__, *base, "--compile", "--out", tmp_path / "run"],
                         capture_output=True, text=True, timeout=300, env=os.environ | bare)
    line = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert line.startswith("train.py: --compile: ") and line.endswith("install it, or leave --compile out")


def test_a_held_out_text_shorter_than_a_window_is_no_mistake(tmp_path, base, documents):
    (tmp_path / "short.txt").write_text(documents[0][:3000])
    train.main([*base, *f"--data {tmp_path}/short.txt --block-size 256 --steps 2 --out {tmp_path}/run".split()])
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("block_size", ["8", "67"])
def test_a_small_context_trains_to_the_end(block_size, base, tmp_path):
    train.main([*base, "--objective", "fim_spm", "--block-size", block_size, "--steps", "2", "--out", str(tmp_path)])
    assert load_checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize("arguments, code, message", [
    ("--objective fmi", 2, "--objective fmi: expected one of ntp, meap, fim_psm, fim_spm, fim, fim_meap"),
    ("--preset huge", 2, "--preset huge: expected one of toy, laptop"), ("--steps -1", 2, "--steps -1: expected 1"),
    ("--spm-layout jont", 2, "--spm-layout jont: expected one of swapped, labelled, joint"), ("--lr 0", 2, "--lr 0"),
    ("--tokenizer words", 2, "--tokenizer words: expected one of bpe, bytes, gpt2"), ("--lr nan", 2, "--lr nan"),
    ("--n-embd 30 --n-head 4", 2, "n_embd 30 is not a multiple of n_head 4"), ("--dropout 1", 2, "--dropout 1.0"),
    ("--block-size 1000000", 2, "--block-size 1000000"), ("--vocab-size 200", 2, "--vocab-size 200"),
    ("--fim-rate 1.5", 2, "--fim-rate 1.5: expected 0 to 1"), ("--mask-ratio -1", 2, "--mask-ratio -1.0: expected 0"),
    ("--data /no/such/text", 1, "--data /no/such/text"), ("--device cuda:99", 2, "--device cuda:99"),
    ("--out a\udc80", 2, "'a\\udc80': not UTF-8 text"), ("--batch-size -4", 2, "--batch-size -4: expected 1"),
    ("--learning-rate 1", 2, "--learning-rate"), ("--step 5", 2, "--step"), ("--steps many", 2, "many"),
    ("--init-from {run} --block-size 73", 2, "--block-size 73: {run} has 72"),
    ("--init-from {run} --tokenizer bytes", 2, "--tokenizer bytes: {run} has bpe"),
    ("--init-from {run} --vocab-size 500", 2, "--vocab-size 500: {run} has 400"),
    ("--init-from {run} --n-layer 2", 2, "--n-layer 2: {run} has 1"),
    ("--init-from {run} --no-qk-norm", 2, "--no-qk-norm: {run} has it on"),
    ("--init-from {empty}", 1, "expected ckpt.pt, model.safetensors"), ("--init-from /no/such", 1, "no such file"),
    ("--objective sft", 2, "is no .jsonl or .json"), ("--objective sft --data stdlib", 2, "--data stdlib: plain text"),
    ("--data functions", 2, "--data functions: prompts and answers, which only"),
    ("--objective meap_sft --data functions --mask-region all", 2, "--mask-region all: expected one of copy, answer"),
    ("--resume", 2, "--out DIR"), ("--resume --out {run} --lr 0.5", 2, "--lr 0.02 to 0.5"),
    ("--resume --out {run} --objective meap", 2, "--objective ntp to meap"), ("--resume --out {run}", 2, "all its 1"),
    ("--grad-accum 3", 2, "--grad-accum 3: expected a multiple of 2, the number of processes"),
    ("--resume --out {empty}", 1, "ckpt.pt: no such checkpoint"), ("--out {run}", 2, "already holds a run")])
def test_a_mistake_is_one_line(arguments, code, message, base, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    if "--grad-accum" in arguments:
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "{run}" in arguments:
        train.main([*base, "--steps", "1", "--lr", "0.02", "--out", str(run)])
    flags = [] if "--resume" in arguments else [*base, "--out", str(tmp_path / "new")]
    before = sorted(tmp_path.rglob("*"))
    found, line, n_lines = refusal([*flags, *arguments.format(run=run, empty=tmp_path).split()], capsys)
    assert (found, n_lines) == (code, 1) and message.format(run=run) in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings_that_flags_override(preset):
    config = Config(**PRESETS[preset])
    assert config.n_embd % config.n_head == 0 and config.grad_accum >= 1 and 0 < config.warmup < config.steps
    assert config.make_objective() == OBJECTIVES[config.objective]
    given, _ = train.read_arguments(["--preset", preset, "--n-layer", "7", "--objective", "fim", "--spm-rate", "0.25"])
    assert (given.n_layer, given.lr, given.preset) == (7, config.lr, preset)
    assert (given.make_objective().fim_rate, given.make_objective().spm_rate) == (OBJECTIVES["fim"].fim_rate, 0.25)
