"""Training: what a run computes, what it leaves on the disk, and what it refuses."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_main, save_run, small_model

import train
from data import text_rows
from objectives import IGNORE, KNOBS, OBJECTIVES, sft
from sample import load_checkpoint, load_model
from train import PRESETS, flag_of, learning_rate, read_arguments, save_checkpoint, text_bits

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit, also in a dict
STILL = "--objective fim_spm --steps 2 --warmup 0 --lr 1e-9 --device cpu --dtype fp32"  # moves no weight
FINISHED = "--objective fim_meap --steps 20 --eval-every 10 --lr 0.02"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """text/: real Python files; pairs.jsonl: their lines, cut into prompt and answer; cache/."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i, document in enumerate(documents[:8]):
        (folder / "text" / f"{i}.py").write_text(document, "utf-8")
    lines = enumerate(line for line in "".join(documents[:2]).split("\n")[:400] if len(line) > 10)
    pairs = [{"prompt": line[:i % 9 + 1], "answer": line[i % 9 + 1:i % 60 + 12]} for i, line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    """flags("--steps 3"): a tiny model's command line; of flags given twice, the last counts."""
    def flags(text=""):
        data = "pairs.jsonl" if re.search("--objective (meap_)?sft", text) else "text"
        return (f"--data {folder / data} --cache-dir {folder}/cache --vocab-size 400 --n-layer 1 --n-head 2 "
                "--n-embd 32 --block-size 72 --batch-size 4 --device cpu --dtype fp32 --eval-tokens 256 "
                f"{text}").split()
    return flags


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train.main(flags(f"{FINISHED} --out {out}"))
    return out


def metrics(out):  # strict JSON, which has no NaN
    return [json.loads(line, parse_constant=pytest.fail) for line in open(out / "metrics.jsonl")]


def interrupt(monkeypatch, step):
    """Presses Ctrl-C while a run makes its step number step."""
    waiting = [signal.SIGINT]

    def learning_rate_and_signal(at, config):
        if at == step - 1 and waiting:
            signal.raise_signal(waiting.pop())
        return learning_rate(at, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate_and_signal)


@pytest.mark.parametrize("objective, grad_accum", [("ntp", 1), ("sft", 3)])
def test_a_run_worked_by_hand(objective, grad_accum, flags, tmp_path):
    """Four steps of AdamW with clipped gradients. Accumulated batches are one large batch: the loss is
    the mean over all their targets (of sft's batches, each has another number)."""
    train.main(flags(f"--objective {objective} --grad-accum {grad_accum} --steps 4 --warmup 2 --lr 0.01 "
                     "--embedding-lr-scale 2 --final-lr 0.5 --clip 0.3 --weight-decay 0.1 --optimizer adamw "
                     f"--beta1 0.9 --beta2 0.95 --seed 5 --out {tmp_path}"))
    lines, saved = metrics(tmp_path), load_checkpoint(tmp_path)
    tok, batches, _, _ = train.make_data(config := Namespace(**saved["config"]), None, 0, 1)
    model = train.make_model(config, tok.n_vocab, torch.device("cpu"))
    adamw = torch.optim.AdamW([
        {"params": [p], "weight_decay": 0.1 if p.dim() == 2 else 0, "scale": 2 if "wte" in name else 1}
        for name, p in model.named_parameters()], betas=(0.9, 0.95))
    for step, lr in ((1, 0.005), (2, 0.01), (3, 0.01), (4, 0.0075)):  # 0.005 would be the fifth's
        parts = zip(*(batches.batch((step - 1) * grad_accum + i) for i in range(grad_accum)))
        inputs, targets = (torch.from_numpy(np.concatenate(part)) for part in parts)
        loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        expected = {"step": step, "tokens": step * grad_accum * 4 * 72, "loss": loss.item(), "lr": lr}
        assert {name: lines[step - 1][name] for name in expected} == pytest.approx(expected, rel=1e-4)
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        for group in adamw.param_groups:
            group["lr"] = lr * group["scale"]
            group["params"][0].grad *= 0.3 / norm
        assert norm > 0.3
        adamw.step()
    torch.testing.assert_close(saved["model"], dict(model.state_dict()), rtol=0, atol=2e-4)


def test_muon_is_its_formula_with_singular_values():
    """Five times, orthogonalize moves each singular value s to a s + b s^3 + c s^5."""
    def by_svd(G):
        U, s, V = torch.linalg.svd(G, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return U @ torch.diag(s) @ V

    torch.manual_seed(0)
    expected = [0.02 * torch.randn(shape) for shape in ((96, 32), (32, 32), (96, 32), (16, 64))]
    ours, moments = [W.clone().requires_grad_() for W in expected], [0.0] * 4
    muon = train.Muon(ours, 0.01, weight_decay=0.1, momentum=0.9)
    for _ in range(5):
        for i, W in enumerate(ours):
            W.grad = torch.randn_like(W)
            moments[i] = 0.9 * moments[i] + 0.1 * W.grad
            O = by_svd(0.9 * moments[i] + 0.1 * W.grad)
            expected[i] = 0.999 * expected[i] - 0.01 * 0.2 * max(W.shape) ** 0.5 * O
        muon.step()
    torch.testing.assert_close([W.detach() for W in ours], expected, rtol=0, atol=1e-5)


def test_bits_per_byte_is_that_of_one_token_at_a_time(tok, stream):
    """<EOT> is no text; prompts of fine-tuning are excluded."""
    model, at = small_model(tok.n_vocab, 16), int(np.flatnonzero(stream == tok.eot)[0])
    text = stream[at - 40:at + 41].astype(np.int64)  # five windows of 16, an <EOT> in the middle one
    rows = [*text_rows(text, 16, 5), sft(np.array([*text[:6], tok.mid, *text[6:15], tok.eot]), tok, None)]
    bits, n_bytes = text_bits(model, rows, tok)
    for row, (inputs, targets) in enumerate(rows):
        expected = np.zeros(2)
        for i, target in enumerate(targets):
            if target not in (tok.eot, IGNORE):
                log_p = model(torch.from_numpy(inputs[None, :i + 1]))[0][0, -1].double().log_softmax(-1)
                expected += -log_p[target].item() / math.log(2), len(tok.decode_bytes([target]))
        assert (bits[row], n_bytes[row]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [
    *OBJECTIVES, "ntp --optimizer adamw --no-tied --bias --position learned --n-embd 33 --n-head 11"])
def test_every_objective_trains_every_weight(objective, flags, tmp_path, no_float64):
    """... on a device without 64-bit floats."""
    train.main(flags(f"--objective {objective} --steps 8 --warmup 1 --lr 0.03 --out {tmp_path}"))
    lines = metrics(tmp_path)
    assert abs(lines[0]["loss"] - math.log(400)) < 0.1  # it starts as a guess
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    checkpoint = load_checkpoint(tmp_path)
    start = train.make_model(Namespace(**checkpoint["config"]), 400, torch.device("cpu")).state_dict()
    assert all((checkpoint["model"][name] != p).any() for name, p in start.items())


def test_a_run_tells_what_it_does_and_leaves_three_files(flags, tmp_path, capsys):
    shown = run_main(train.main, capsys, *flags(f"{FINISHED} --out {tmp_path}")).out
    assert re.findall(r"^(\w+)  +\S", shown, re.M) == "model data objective training device out time".split()
    assert "fim_meap, mask_ratio 0.15, fim_rate 0.5, spm_rate 0.5, spm_layout joint, span char, " \
           f"max_document_tokens {PRESETS['toy']['max_document_tokens']}\n" in shown
    assert "⟦" in shown and shown.endswith(f"saved in {tmp_path}; try: python sample.py --ckpt {tmp_path}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    assert json.loads((tmp_path / "config.json").read_text()) == load_checkpoint(tmp_path)["config"]


def test_what_nobody_can_read_ends_no_run(flags, tmp_path, monkeypatch):
    """The program that reads our output has exited. Code page 1252 has none of the signs around an infill."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding="cp1252"))
    train.main(flags(f"--objective fim_spm --steps 4 --eval-every 1 --out {tmp_path}"))
    assert load_checkpoint(tmp_path)["step"] == 4


@pytest.mark.parametrize("objective", [
    "fim_meap", "fim --fim-level document --dtype auto --optimizer adamw --no-tied --no-qk-norm"])
def test_a_resumed_run_is_the_uninterrupted_one(objective, flags, tmp_path, monkeypatch, capsys):
    """Bit for bit. Evaluations do not touch the weights: their number may change."""
    run = f"--steps 6 --warmup 2 --dropout 0.1 --grad-accum 2 --eval-every 2 --objective {objective}"
    whole, part = tmp_path / "whole", tmp_path / "part"
    monkeypatch.setattr(train, "is_bf16_faster", lambda device: True)
    train.main(flags(f"{run} --out {whole}"))
    interrupt(monkeypatch, 3)
    train.main(flags(f"{run} --out {part}"))
    assert capsys.readouterr().out.endswith(
        f"stopped after step 3, saved; go on with: python train.py --out {part} --resume\n")
    with open(part / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')  # what a run leaves that is killed two steps later
    monkeypatch.setattr(train, "is_bf16_faster", lambda device: False)  # it keeps what auto took
    train.main(["--resume", "--out", str(part), "--eval-every", "100"])
    one, two = load_checkpoint(whole), load_checkpoint(part)
    assert_same([one["model"], one["optimizers"]], [two["model"], two["optimizers"]])
    assert all(one[key] == two[key] for key in ("step", "model_config", "tokenizer", "text"))
    assert two["config"] == one["config"] | {"out": str(part), "eval_every": 100}
    for one, two in zip(metrics(whole), metrics(part), strict=True):
        assert "held_out_bpb" in one or one["step"] % 2
        assert all(one[key] == two[key] for key in ("step", "tokens", "epoch", "loss", "lr"))


ACCIDENTS = """
import os, signal, socket, sys, train
import torch._dynamo  # every optimiser needs it: once, before the fork
saves, rate, signals = [], train.learning_rate, [signal.SIGTERM]

def stop(step, config):
    if step == 1 and signals and os.environ["RANK"] == "1":
        signal.raise_signal(signals.pop())
    return rate(step, config)

def sync(file):
    saves.append(file)
    if len(saves) == 3:
        os.truncate(file, os.fstat(file).st_size // 2)
        os.killpg(0, signal.SIGKILL)
with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
    ports = [str(free.getsockname()[1]) for free in (one, two)]
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": "0" if os.fork() else "1"}
signal.alarm(200)  # should they wait for each other, they end
os.fsync, train.learning_rate = sync, stop
for arguments, os.environ["MASTER_PORT"] in zip((sys.argv[1:], ["--resume", *sys.argv[-2:]]), ports):
    train.main(arguments)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes of one, and kill -9")
def test_killed_and_gone_on_in_another_number_of_processes_a_run_has_the_same_weights(flags, tmp_path):
    """Two processes, as torchrun starts them. A signal to one stops both after step 2. They go on; kill -9
    strikes both when half of the third checkpoint is written. One process goes on from the second."""
    run, part, whole = "--objective meap_sft --dropout 0.1 --grad-accum 2", tmp_path / "a", tmp_path / "b"
    command = [sys.executable, "-c", ACCIDENTS, *flags(f"{run} --steps 6 --save-every 1 --out {part}")]
    killed = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True,
                            start_new_session=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout.count("2 processes") == 2 and (part / "ckpt.tmp").exists()
    assert killed.stdout.count("stopped after step 2") == 1 and load_checkpoint(part)["step"] == 2
    train.main(["--resume", "--out", str(part)])
    train.main(flags(f"{run} --steps 6 --out {whole}"))
    one, two = load_checkpoint(whole), load_checkpoint(part)
    assert_same([one["model"], one["optimizers"]], [two["model"], two["optimizers"]])
    assert [line["loss"] for line in metrics(part)] == [line["loss"] for line in metrics(whole)]
    assert metrics(part)[-1]["answer_bpb"] == metrics(whole)[-1]["answer_bpb"]


def test_a_finished_run_can_be_extended_and_is_no_fresh_one(finished, tmp_path, capsys, monkeypatch):
    """If it diverges on the way, it ends; what was saved before stays, and can be extended again."""
    arguments = ["--resume", "--out", str(shutil.copytree(finished, tmp_path / "run")), "--steps", "22"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, config: 1e38)
        shown = run_main(train.main, capsys, *arguments)
    assert shown.code == 1
    assert re.search("loss is .*(nan|inf) .* is from before; try a lower --lr", shown.err)
    assert len(metrics(tmp_path / "run")) == 20
    train.main(arguments)
    assert load_checkpoint(tmp_path / "run")["step"] == 22
    assert re.search(r"not a fresh run of 22 steps: .* decayed towards step\s+20", capsys.readouterr().out)


def test_a_run_is_resumed_on_the_same_text_alone(flags, tmp_path, documents, capsys, monkeypatch):
    text, other, out = tmp_path / "text.py", tmp_path / "other.py", tmp_path / "run"
    text.write_text(documents[0], "utf-8")
    interrupt(monkeypatch, 1)
    train.main(flags(f"--data {text} --tokenizer bytes --steps 2 --out {out}"))
    text.rename(other)
    text.write_text(documents[0].upper(), "utf-8")  # as long, byte for byte
    shown = run_main(train.main, capsys, "--resume", "--out", str(out))
    assert shown.code == 1 and f"{text} is not the text with which {out} was started" in shown.err
    train.main(["--resume", "--out", str(out), "--data", str(other)])
    assert load_checkpoint(out)["step"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk")
def test_the_previous_checkpoint_survives_a_full_disk(tok, tmp_path):
    path = save_run(tmp_path, small_model(tok.n_vocab), tok) / "ckpt.pt"
    before = load_checkpoint(path)
    (tmp_path / "ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"^{path}: step 1 could not be saved .*No space left.* is whole$"):
        save_checkpoint(path, before | {"text": "another"})
    assert torch.load(path, weights_only=True)["text"] == before["text"]
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_init_from_starts_with_the_very_weights_and_vocabulary(folder, finished, tmp_path, monkeypatch):
    """... on another text, from which another vocabulary would be learned, and with another context."""
    source, out = shutil.copytree(finished, tmp_path / "source"), tmp_path / "run"
    interrupt(monkeypatch, 1)
    train.main(f"{STILL} --init-from {source} --data {folder}/text/0.py --cache-dir {tmp_path} "
               f"--block-size 96 --out {out}".split())
    shutil.rmtree(source)  # a run needs its start no more
    train.main(["--resume", "--out", str(out)])
    (before, tok, _), (after, tok_after, _) = load_model(finished), load_model(out)
    assert tok_after.to_dict() == tok.to_dict() and after.config.block_size == 96
    idx = torch.randint(tok.n_vocab, (2, 40))
    torch.testing.assert_close(after(idx)[0], before(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, code, message", [
    ("--steps -1", 2, "--steps: -1: expected at least 1"), ("--lr nan", 2, "--lr: nan: expected"),
    ("--step 5", 2, "unrecognized arguments: --step 5"), ("--dropout 1", 2, "1: expected 0.0 to 0.99"),
    ("--n-embd 30 --n-head 4", 2, "30 is not a multiple of n_head 4"), ("--n-embd 22 --n-head 2", 2, "even"),
    ("--n-embd 100000000 --n-head 1", 1, "out of memory: lower --batch-size, --block-size or --n-embd"),
    ("--grad-accum 3", 2, "--grad-accum 3: expected a multiple of 2, the number of processes"),
    ("--objective fim --fim-rate 1.5", 2, "fim_rate 1.5: expected 0 to 1"),
    ("--objective fim_psm --spm-rate 0.5", 2,
     "--spm-rate 0.5; the knobs of --objective fim_psm: --fim-rate 0.5, --span char, --max-document-tokens"),
    ("--init-from {run} --n-layer 2", 2, "--n-layer 2: {run} has 1"), ("--resume", 2, "expected --out DIR"),
    ("--out {run}", 2, "holds a run"), ("--resume --out {run}", 2, "has all its 20 steps; --steps N"),
    ("--resume --out {run} --mask-ratio 0.3", 2, "--mask-ratio 0.3: {run} has 0.15"),
    ("--resume --out {text}", 1, "ckpt.pt: no such checkpoint")])
def test_a_mistake_is_one_line(arguments, code, message, flags, folder, finished, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if "--grad-accum" in arguments else "1")
    paths, before = {"run": finished, "text": folder / "text"}, sorted(folder.parent.rglob("*"))
    given = arguments.format(**paths).split()
    is_whole = "{run}" in arguments or "--resume" in given
    shown = run_main(train.main, capsys, *(given if is_whole else flags(f"--out {folder}/new") + given))
    assert shown.code == code and message.format(**paths) in shown.err
    assert sorted(folder.parent.rglob("*")) == before  # nothing is left behind


@pytest.mark.parametrize("arguments", [
    "--objective fim_meap --data x", "--objective meap_sft", "--preset laptop"])
def test_help_has_every_setting_with_its_true_default(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    config, _ = read_arguments(arguments.split())
    shown = run_main(train.main, capsys, *arguments.split(), "--help").out
    own = shown.index("\nknobs of --objective ")
    for name, value in (vars(config) | config.knobs | {"resume": ""}).items():
        if name != "knobs":
            entry = re.search(rf"\n  {flag_of(name)}[ ,\n].*(\n    .*)?", shown)
            words = " ".join(entry[0].split())
            assert KNOBS[name] in words if name in config.knobs else len(words.split()) > 2
            assert flag_of(name) in arguments or words.endswith(f"(default: {value})") == (value != "")
            assert (entry.start() > own) == (name in config.knobs)


@pytest.mark.parametrize("preset, layers, width, heads, params, non_embedding, unit, lr, batch", [
    ("xxs", 6, 384, 6, 50, 11, 1e6, 1.6e-3, 2**19), ("xs", 8, 512, 8, 77, 26, 1e6, 1.4e-3, 2**19),
    ("small", 12, 768, 12, 164, 87, 1e6, 6e-4, 2**19), ("medium", 24, 1024, 16, 411, 308, 1e6, 3e-4, 2**19),
    ("large", 24, 1536, 16, 844, 689, 1e6, 2.5e-4, 2**19), ("xl", 24, 2048, 16, 1.4, 1.2, 1e9, 4e-4, 2**20)])
def test_presets_are_table_3(preset, layers, width, heads, params, non_embedding, unit, lr, batch):
    """Of the FIM paper, within 3%: its relative attention has weights of its own. 20 tokens a parameter."""
    config, _ = read_arguments(["--preset", preset])
    with torch.device("meta"):  # without memory for the weights
        model = train.make_model(config, 50257, torch.device("meta"))
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (layers, width, heads, 2048)
    assert (config.lr, config.batch_size * config.grad_accum * 2048) == (lr, batch)
    half = 0.5 if unit == 1e6 else 0.05  # of the last digit that the paper prints
    for ours, printed in ((model.n_params(), params), (model.n_params(embedding=False), non_embedding)):
        assert (printed - half) * unit * 0.97 <= ours <= (printed + half) * unit * 1.03
    assert config.steps * batch == pytest.approx(20 * model.n_params(), rel=0.03)
