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
from conftest import save_run, small_model

import train
from data import Tokenizer, text_rows
from objectives import IGNORE, KNOBS, OBJECTIVES, ntp, sft
from sample import load_checkpoint, load_model
from train import GPT2, PRESETS, learning_rate, orthogonalize, read_arguments, save_checkpoint, text_bits

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


def refusal(arguments, capsys):
    """-> (exit code, the last line on stderr without a progress bar, how many lines stderr has)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, arguments)))
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    return stop.value.code, lines[-1].split("\r")[-1], len(lines)


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal to this process while a run makes its step number step."""
    waiting = [number]

    def learning_rate_and_signal(at, config):
        if at == step - 1 and waiting:
            signal.raise_signal(waiting.pop())
        return learning_rate(at, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate_and_signal)


@pytest.mark.parametrize("objective, grad_accum", [("ntp", 1), ("sft", 3)])
def test_a_run_worked_by_hand(objective, grad_accum, flags, tmp_path):
    """Three steps of AdamW with clipped gradients. Accumulated batches are one large batch: the loss is
    the mean over all their targets (of sft's batches, each has another number)."""
    train.main(flags(f"--objective {objective} --grad-accum {grad_accum} --steps 3 --warmup 2 --lr 0.01 "
                     "--embedding-lr-scale 2 --final-lr 0.5 --clip 0.3 --weight-decay 0.1 --optimizer adamw "
                     f"--beta1 0.9 --beta2 0.95 --seed 5 --out {tmp_path}"))
    lines, saved = metrics(tmp_path), load_checkpoint(tmp_path)
    tok, batches, _, _ = train.make_data(config := Namespace(**saved["config"]), None, 0, 1)
    model = train.make_model(config, tok.n_vocab, torch.device("cpu"))
    adamw = torch.optim.AdamW([
        {"params": [p], "weight_decay": 0.1 if p.dim() == 2 else 0, "scale": 2 if "wte" in name else 1}
        for name, p in model.named_parameters()], betas=(0.9, 0.95))
    for step, lr in ((1, 0.005), (2, 0.01), (3, 0.01)):  # up to the peak in 2 steps, from there down
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


@pytest.mark.parametrize("warmup, final_lr, expected", [
    (4, 0.1, [0.5, 1, 1.5, 2, 2, 1.7, 1.4, 1.1, 0.8, 0.5]), (0, 0, [2, 1.5, 1, 0.5]), (0, 0, [2]),
    (20, 0, [0.1, 0.2])])
def test_the_learning_rate_warms_up_and_decays_in_lines(warmup, final_lr, expected):
    """The last step's is above 0: where the line ends is the step after the last."""
    config = Namespace(lr=2.0, warmup=warmup, final_lr=final_lr, steps=len(expected))
    assert [learning_rate(step, config) for step in range(config.steps)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["", "--optimizer adamw --no-tied --bias --position learned"])
def test_a_single_step_changes_every_weight(shape, flags, tmp_path):
    train.main(flags(f"--steps 1 --warmup 0 {shape} --out {tmp_path}"))
    checkpoint = load_checkpoint(tmp_path)
    start = train.make_model(Namespace(**checkpoint["config"]), 400, torch.device("cpu")).state_dict()
    assert all((checkpoint["model"][name] != p).any() for name, p in start.items())


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
    for G in expected:
        torch.testing.assert_close(orthogonalize(G[None])[0], by_svd(G), rtol=0, atol=1e-4)
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


@pytest.mark.parametrize("objective", [*OBJECTIVES, "own --fim-rate 0.75"])
def test_every_objective_trains(objective, flags, tmp_path, monkeypatch, no_float64):
    """... on a device without 64-bit floats; also a student's, with one of FIM's knobs and not the others."""
    def own(ids, tok, rng, *, fim_rate=0.5):
        return ntp(np.roll(ids, 1) if rng.random() < fim_rate else ids, tok, rng)

    monkeypatch.setitem(OBJECTIVES, "own", own)
    train.main(flags(f"--objective {objective} --steps 8 --warmup 1 --lr 0.03 --out {tmp_path}"))
    lines = metrics(tmp_path)
    assert abs(lines[0]["loss"] - math.log(400)) < 0.1  # it starts as a guess
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert "own" not in objective or load_checkpoint(tmp_path)["config"]["knobs"] == {"fim_rate": 0.75}


def test_a_run_again_is_the_same_and_tells_what_it_does(finished, flags, tmp_path, capsys):
    train.main(flags(f"{FINISHED} --out {tmp_path}"))
    shown = capsys.readouterr().out
    assert re.findall(r"^(\w+)  +\S", shown, re.M)[:6] == "model data objective training device out".split()
    assert "fim_meap, mask_ratio 0.15, fim_rate 0.5, spm_rate 0.5, spm_layout joint, span char, " \
           f"max_document_tokens {PRESETS['toy']['max_document_tokens']}\n" in shown
    assert "\ntime       about 0." in shown and "⟦" in shown
    assert shown.endswith(f"saved in {tmp_path}; try: python sample.py --ckpt {tmp_path}\n")
    assert sorted(path.name for path in finished.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl"]
    one, two = load_checkpoint(tmp_path), load_checkpoint(finished)
    assert_same([one["model"], one["optimizers"]], [two["model"], two["optimizers"]])
    assert json.loads((finished / "config.json").read_text()) == two["config"]


def test_what_nobody_can_read_ends_no_run(flags, tmp_path):
    """Code page 1252 has none of the signs around an infill; then the program that reads our output exits."""
    command = flags(f"--objective fim_spm --steps 60 --eval-every 10 --out {tmp_path}")
    run = subprocess.Popen([sys.executable, train.__file__, *command], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert any(b"(between ? and ?: the model, " in line for line in run.stdout)
    run.stdout.close()
    assert b"Error" not in run.stderr.read() and run.wait() == 0 and load_checkpoint(tmp_path)["step"] == 60


@pytest.mark.parametrize("objective, stop", [
    ("fim_meap", signal.SIGINT), ("meap_sft --min-answer 5", signal.SIGTERM),
    ("fim --fim-level document --dtype auto --optimizer adamw --no-tied --no-qk-norm", signal.SIGINT)])
def test_a_resumed_run_is_the_uninterrupted_one(objective, stop, flags, tmp_path, monkeypatch, capsys):
    """Bit for bit. Evaluations do not touch the weights: their number may change."""
    run = f"--steps 6 --warmup 2 --dropout 0.1 --grad-accum 2 --eval-every 2 --objective {objective}"
    whole, part = tmp_path / "whole", tmp_path / "part"
    monkeypatch.setattr(train, "is_bf16_faster", lambda device: True)
    train.main(flags(f"{run} --out {whole}"))
    interrupt(monkeypatch, 3, stop)
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
        assert "held_out_bpb" in one or "answer_bpb" in one or one["step"] % 2
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


def test_a_finished_run_can_be_extended_and_is_no_fresh_one(finished, tmp_path, capsys, monkeypatch):
    """If it diverges on the way, it ends; what was saved before stays, and can be extended again."""
    arguments = ["--resume", "--out", str(shutil.copytree(finished, tmp_path / "run")), "--steps", "22"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, config: 1e38)
        code, line, _ = refusal(arguments, capsys)
    assert code == 1 and re.search("loss is (nan|inf) .* keeps the last good state; try a lower --lr", line)
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
    code, line, n_lines = refusal(["--resume", "--out", out], capsys)
    assert (code, n_lines) == (1, 1) and f"{text} is not the text with which {out} was started" in line
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


def test_init_from_starts_with_gpt2s_weights(folder, tmp_path, monkeypatch):
    """... as they are published: matrices transposed, without our prefix, and without our four new ids."""
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)  # GPT-2's own is a download
    before = small_model(257, 32, **GPT2)
    torch.save({name.removeprefix("transformer."): p.T if re.search(r"c_\w+\.weight", name) else p
                for name, p in before.state_dict().items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    train.main(f"{STILL} --init-from {tmp_path} --data {folder}/text/0.py --cache-dir {tmp_path} "
               f"--block-size 24 --out {tmp_path}/run".split())
    after, idx = load_model(tmp_path / "run")[0], torch.randint(257, (2, 24))
    torch.testing.assert_close(after(idx)[0][..., :257], before(idx)[0], rtol=1e-4, atol=1e-3)


def test_a_checkpoint_of_before_this_version_is_refused(finished, tmp_path, capsys):
    for missing, flag in (("text", "--resume --out"), ("knobs", "--resume --out"), ("knobs", "--init-from")):
        checkpoint = load_checkpoint(finished)
        del (checkpoint if missing == "text" else checkpoint["config"])[missing]
        save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
        code, line, n_lines = refusal([*flag.split(), tmp_path], capsys)
        assert (code, n_lines) == (1, 1) and "ckpt.pt: not a checkpoint of this version of nanogap" in line


@pytest.mark.parametrize("arguments, code, message", [
    ("--objective fmi", 2, "--objective: invalid choice: 'fmi' (choose from"),
    ("--steps -1", 2, "--steps: -1: expected at least 1"), ("--steps many", 2, "invalid int value: 'many'"),
    ("--lr nan", 2, "--lr: nan: expected"), ("--dropout 1", 2, "--dropout: 1: expected 0.0 to 0.99"),
    ("--n-embd 100000000 --n-head 1", 1, "out of memory: lower --batch-size, --block-size or --n-embd"),
    ("--step 5", 2, "unrecognized arguments: --step 5"), ("--data /no/text", 1, "/no/text: no such file"),
    ("--grad-accum 3", 2, "--grad-accum 3: expected a multiple of 2, the number of processes"),
    ("--objective fim --fim-rate 1.5", 2, "fim_rate 1.5: expected 0 to 1"),
    ("--objective fim_psm --spm-rate 0.5", 2,
     "--spm-rate 0.5; the knobs of --objective fim_psm: --fim-rate 0.5, --span char, --max-document-tokens"),
    ("--objective sft --data {text}", 2, "is no .jsonl or .json"), ("--out {run}", 2, "already holds a run"),
    ("--init-from {run} --n-layer 2", 2, "--n-layer 2: {run} has 1"), ("--resume", 2, "expected --out DIR"),
    ("--resume --out {run}", 2, "has all its 20 steps; --steps N"),
    ("--resume --out {run} --mask-ratio 0.3", 2, "--mask-ratio 0.3: {run} has 0.15"),
    ("--resume --out {text}", 1, "ckpt.pt: no such checkpoint")])
def test_a_mistake_is_one_line(arguments, code, message, flags, folder, finished, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if "--grad-accum" in arguments else "1")
    paths, before = {"run": finished, "text": folder / "text"}, sorted(folder.parent.rglob("*"))
    given = arguments.format(**paths).split()
    is_whole = "{run}" in arguments or "--resume" in given
    exit_code, line, n_lines = refusal(given if is_whole else flags(f"--out {folder}/new") + given, capsys)
    assert (exit_code, n_lines) == (code, 1) and message.format(**paths) in line
    assert sorted(folder.parent.rglob("*")) == before  # nothing is left behind


@pytest.mark.parametrize("arguments", [
    *(f"--objective {name}" for name in OBJECTIVES), "--objective fim --data x", "--preset laptop"])
def test_help_has_every_setting_in_groups_with_its_true_default(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    config, _ = read_arguments(arguments.split())
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments.split(), "--help"])
    shown = capsys.readouterr().out
    titles = "what to train:", "data:", "model:", "training:", "run:", "knobs of --objective "
    places = [shown.index(f"\n{title}") for title in titles]
    assert stop.value.code == 0 and places == sorted(places)
    for name, value in (vars(config) | config.knobs | {"resume": ""}).items():
        if name != "knobs":
            flag = f"--{name.replace('_', '-')}"
            start = shown.index(f"\n  {flag}")
            entry = " ".join(re.split(r"\n  --|\n\n", shown[start + 1:])[0].split())
            assert KNOBS[name] in entry if name in config.knobs else len(entry.split()) > 2
            assert flag in arguments or entry.endswith(f"(default: {value})") == (value != "")
            assert (start > places[-1]) == (name in config.knobs)


def preset_model(preset):
    """-> (GPT of the preset's shape, without memory for its weights; its settings)."""
    config, _ = read_arguments(["--preset", preset])
    with torch.device("meta"):
        return train.make_model(config, 50257, torch.device("meta")), config


@pytest.mark.parametrize("preset, layers, width, heads, params, non_embedding, unit, lr, batch", [
    ("xxs", 6, 384, 6, 50, 11, 1e6, 1.6e-3, 2**19), ("xs", 8, 512, 8, 77, 26, 1e6, 1.4e-3, 2**19),
    ("small", 12, 768, 12, 164, 87, 1e6, 6e-4, 2**19), ("medium", 24, 1024, 16, 411, 308, 1e6, 3e-4, 2**19),
    ("large", 24, 1536, 16, 844, 689, 1e6, 2.5e-4, 2**19), ("xl", 24, 2048, 16, 1.4, 1.2, 1e9, 4e-4, 2**20)])
def test_presets_are_table_3(preset, layers, width, heads, params, non_embedding, unit, lr, batch):
    """Of the FIM paper, within 3%: its relative attention has weights of its own. 20 tokens a parameter."""
    model, config = preset_model(preset)
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (layers, width, heads, 2048)
    assert (config.lr, config.batch_size * config.grad_accum * 2048) == (lr, batch)
    half = 0.5 if unit == 1e6 else 0.05  # of the last digit that the paper prints
    for ours, printed in ((model.n_params(), params), (model.n_params(embedding=False), non_embedding)):
        assert (printed - half) * unit * 0.97 <= ours <= (printed + half) * unit * 1.03
    assert config.steps * batch == pytest.approx(20 * model.n_params(), rel=0.03)


def test_the_gpt2_preset_has_gpt2s_weights():
    """In nanoGPT's names and shapes, which fit the published weights (there, matrices are transposed)."""
    (model, _), C = preset_model("gpt2"), 768
    shapes = {f"h.11.{name}": shape for name, shape in {
        "ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C)}.items()} | {"ln_f": (C,), "wte": (50257, C), "wpe": (1024, C)}
    weights = {name: tuple(p.shape) for name, p in model.transformer.state_dict().items()}
    for name, shape in shapes.items():
        assert weights[f"{name}.weight"] == shape and weights.get(f"{name}.bias", shape[:1]) == shape[:1]
    assert len(weights) == 12 * 12 + 4 and model.n_params() == 124_439_808
