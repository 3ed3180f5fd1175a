"""Training: what a run computes, what it leaves on the disk, and what it refuses."""
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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import train
from cli import has_fast_bf16, load_checkpoint, lock, save_checkpoint
from conftest import small_model
from data import Batches, prepare, text_rows
from model import GPT
from objectives import OBJECTIVES, ON_PAIRS, knobs_of, sft
from sample import load_model
from train import PRESETS, Config, learning_rate, make_optimizers, text_bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """text/: real Python files; pairs.jsonl: their lines, cut into prompt and answer; cache/."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i, document in enumerate(documents):
        (folder / "text" / f"{i}.py").write_text(document, "utf-8")
    lines = [line for document in documents for line in document.split("\n") if len(line) > 10][:300]
    with open(folder / "pairs.jsonl", "w") as f:
        for i, line in enumerate(lines):
            pair = {"prompt": line[:i % 9 + 1], "answer": line[i % 9 + 1:i % 60 + 12]}
            f.write(json.dumps(pair) + "\n")
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    """flags("--steps 3"): a tiny model's command line; of flags given twice, the last counts."""
    def flags(text=""):
        data = folder / ("pairs.jsonl" if re.search("--objective (meap_)?sft", text) else "text")
        return (f"--data {data} --cache-dir {folder / 'cache'} --tokenizer bpe --vocab-size 400 --n-layer 1 "
                "--n-head 2 --n-embd 32 --block-size 72 --batch-size 4 --device cpu --dtype fp32 "
                f"--eval-tokens 256 {text}").split()
    return flags


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """The folder of a run that has all its steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags(f"--objective fim_meap --steps 20 --eval-every 10 --lr 0.02 --out {out}"))
    return out


@pytest.fixture(scope="module")
def learned(flags, tmp_path_factory):
    """The folder of a run with learned positions."""
    out = tmp_path_factory.mktemp("learned")
    train.main(flags(f"--position learned --steps 1 --out {out}"))
    return out


def metrics(out):
    """The lines of metrics.jsonl as strict JSON, which has no NaN."""
    lines = (Path(out) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


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


def press_ctrl_c(monkeypatch, step, times=1):
    """Sends SIGINT to this process while a run makes its step number step."""
    presses = [signal.SIGINT] * times

    def learning_rate_and_ctrl_c(at, config):
        if at == step - 1 and presses:
            signal.raise_signal(presses.pop())
        return learning_rate(at, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate_and_ctrl_c)


def test_a_run_worked_by_hand(flags, tmp_path):
    """Three steps of AdamW, written out: losses, learning rates and weights, with a clipped gradient."""
    train.main(flags("--objective ntp --steps 3 --warmup 2 --lr 0.01 --embedding-lr 2 --final-lr 0.5 "
                     "--clip 0.3 --weight-decay 0.1 --optimizer adamw --beta1 0.9 --beta2 0.95 --seed 5 "
                     f"--out {tmp_path}"))
    lines, saved = metrics(tmp_path), load_checkpoint(tmp_path)
    config = Config(**saved["config"])
    tok, stream, _ = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir)
    batches = Batches(stream, OBJECTIVES["ntp"], tok, block_size=72, batch_size=4, seed=5)
    model = train.make_model(config, tok.n_vocab, torch.device("cpu"))
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}

    for step, lr in ((1, 0.005), (2, 0.01), (3, 0.005)):  # up to the peak in 2 steps, to half of it in 1
        inputs, targets = map(torch.from_numpy, batches.batch(step - 1))
        loss = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        assert norm > 0.3
        for name, p in model.named_parameters():
            m, v = moments[name]
            g = p.grad * 0.3 / norm
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.95 * v + 0.05 * g * g)
            scale = 2 if name == "transformer.wte.weight" else 1
            decay = 0.1 if p.dim() == 2 else 0
            update = (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8)
            p.data -= lr * scale * (update + decay * p.data)
        line = lines[step - 1]
        assert (line["step"], line["tokens"]) == (step, step * 4 * 72)
        assert (line["loss"], line["lr"]) == pytest.approx((loss.item(), lr), rel=1e-4)
        assert line["epoch"] == pytest.approx(step * 4 / batches.n_windows) and line["tokens_per_s"] > 0
    for name, p in model.state_dict().items():
        torch.testing.assert_close(saved["model"][name], p, rtol=0, atol=1e-4)


def test_what_a_run_prints_and_leaves(finished, flags, tmp_path, capsys):
    train.main(flags(f"--objective fim_meap --steps 20 --eval-every 10 --lr 0.02 --out {tmp_path / 'run'}"))
    shown = capsys.readouterr().out
    assert [line.split(" ")[0] for line in shown.splitlines()[:6]] == [
        "model", "data", "objective", "training", "device", "out"]
    assert "fim_meap, mask_ratio 0.15, fim_rate 0.5, spm_rate 0.5, spm_layout joint, span char; " \
           f"short documents: at most {train.PRESETS['toy']['short_documents']} tokens\n" in shown
    assert re.search(r"\ntime +about 1 min here, \d\.\d\d s a step\n", shown)
    assert "⟦" in shown
    assert shown.endswith(f"saved in {tmp_path / 'run'}; try: python sample.py --ckpt {tmp_path / 'run'}\n")
    assert sorted(path.name for path in finished.iterdir()) == ["ckpt.pt", "lock", "metrics.jsonl"]
    # The seed decides everything.
    assert_same(load_checkpoint(tmp_path / "run")["model"], load_checkpoint(finished)["model"])

    # The last evaluation takes four times --eval-tokens, from end to end of the held-out text.
    model, tok, checkpoint = load_model(finished)
    config = Config(**checkpoint["config"])
    _, _, held_out = prepare(config.data, config.tokenizer, config.vocab_size, config.cache_dir)
    bits, sizes = text_bits(model, text_rows(held_out, 72, 4 * 256 // 72), tok)
    lines = metrics(finished)
    assert lines[-1]["held_out_bpb"] == pytest.approx(bits.sum() / sizes.sum(), rel=1e-5)
    assert [line["step"] for line in lines if "held_out_bpb" in line] == [10, 20]


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


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_torchs_own(bf16):
    """torch.optim.Muon computes in bf16 whatever the hardware has. In bf16 the weights are the same to the
    last bit; in fp32 they differ by what bf16's 8 bits lose: within a hundredth of what ten steps move."""
    torch.manual_seed(0)
    start = [0.02 * torch.randn(shape) for shape in ((384, 128), (384, 128), (128, 128), (64, 256))]
    ours, theirs = ([W.clone().requires_grad_() for W in start] for _ in range(2))
    optimizers = [train.Muon(ours, 0.01, 0.1, momentum=0.9, bf16=bf16),
                  torch.optim.Muon(theirs, 0.01, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")]
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
        U, _, V = torch.linalg.svd(X, full_matrices=False)
        values = U.mT @ train.orthogonalize(X) @ V.mT  # diagonal where U and V are left as they are
        diagonal = values.diagonal(dim1=1, dim2=2)
        assert diagonal.min() > 0.5 and diagonal.max() < 1.3
        torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-4)


def test_bits_per_byte_is_that_of_one_token_at_a_time(tok, stream):
    """<EOT> is no text; prompts of fine-tuning are excluded; dropout is off."""
    model, at = small_model(tok.n_vocab, 16, dropout=0.5).train(), int(np.flatnonzero(stream == tok.eot)[0])
    text = stream[at - 40:at + 41].astype(np.int64)  # five windows of 16, an <EOT> in the middle one
    example = np.array([*text[:6], tok.mid, *text[6:15], tok.eot])
    rows = [*text_rows(text, 16, 5), sft(example, tok, None)]
    bits, sizes = text_bits(model, rows, tok)
    assert model.training
    model.eval()
    for row, (inputs, targets) in enumerate(rows):
        n_bits, n_bytes = 0.0, 0
        for i, target in enumerate(targets):
            if target != tok.eot and (row < 5 or i >= 6):
                log_p = model(torch.from_numpy(inputs[None, :i + 1]))[0][0, -1].double().log_softmax(-1)
                n_bits -= log_p[target].item() / math.log(2)
                n_bytes += len(tok.decode_bytes([target]))
        assert (bits[row], sizes[row]) == pytest.approx((n_bits, n_bytes), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_learns(objective, flags, tmp_path, no_float64):
    """... on a device without 64-bit floats."""
    train.main(flags(f"--objective {objective} --steps 30 --warmup 5 --lr 0.01 --out {tmp_path}"))
    lines = metrics(tmp_path)
    assert abs(lines[0]["loss"] - math.log(400)) < 0.1  # it starts as a guess
    name = "answer_bpb" if objective in ON_PAIRS else "held_out_bpb"
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.8 and lines[-1][name] < 4.1


@pytest.mark.parametrize("objective", ["meap", "meap_sft --min-answer 5"])
def test_accumulated_batches_are_one_large_batch(objective, flags, tmp_path):
    """Also where their numbers of targets differ: answers of fine-tuning are long and short."""
    losses = []
    for name, shape in (("large", "--batch-size 8"), ("accumulated", "--batch-size 2 --grad-accum 4")):
        run = f"--objective {objective} {shape} --optimizer adamw --steps 4 --warmup 1"
        train.main(flags(f"{run} --out {tmp_path / name}"))
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def torchrun(arguments):
    """A training run in two processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, train.__file__, *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_do_what_one_does(flags, tmp_path):
    """Also with dropout, and when each accumulates batches itself. One of them writes and prints for both."""
    run = "--objective fim_meap --grad-accum 4 --steps 3 --warmup 1 --dropout 0.1 --eval-every 2"
    shown, errors = torchrun(flags(f"{run} --out {tmp_path / 'two'}")).communicate(timeout=300)
    assert shown.count("done, saved") == shown.count("2 processes") == 1, errors
    train.main(flags(f"{run} --out {tmp_path / 'one'}"))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"tokens_per_s"}:
            assert one[key] == pytest.approx(two[key], abs=1e-5)
    one, two = (load_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


def test_ctrl_c_stops_two_processes_after_the_same_step(flags, tmp_path):
    run = torchrun(flags(f"--grad-accum 2 --steps 3000 --save-every 3000 --out {tmp_path}"))
    while run.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and metrics(tmp_path)):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    shown, errors = run.communicate(timeout=300)
    assert shown.count("stopped after step") == 1, errors
    assert load_checkpoint(tmp_path)["step"] == metrics(tmp_path)[-1]["step"] < 3000


@pytest.mark.parametrize("objective", [
    "fim_meap", "meap_sft --min-answer 5",
    "fim --fim-level document --optimizer adamw --position learned --no-tied --no-qk-norm --bias"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(objective, flags, tmp_path, monkeypatch, capsys):
    run = f"--objective {objective} --steps 6 --warmup 2 --dropout 0.1 --grad-accum 2 --eval-every 2"
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.main(flags(f"{run} --out {whole}"))
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step=3)
        train.main(flags(f"{run} --out {part}"))
    assert capsys.readouterr().out.endswith(
        f"stopped after step 3, saved; go on with: python train.py --out {part} --resume\n")
    assert load_checkpoint(part)["step"] == 3
    with open(part / "metrics.jsonl", "a") as f:  # what a run leaves that is killed two steps later
        f.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    # Evaluations do not touch the weights: their number may change.
    train.main(["--resume", "--out", str(part), "--eval-every", "100"])
    one, two = load_checkpoint(whole), load_checkpoint(part)
    for key in ("model", "optimizers", "step", "model_config", "tokenizer"):
        assert_same(one[key], two[key])
    assert two["config"] == one["config"] | {"out": str(part), "eval_every": 100}
    for one, two, step in zip(metrics(whole), metrics(part), range(1, 7), strict=True):
        assert one["step"] == step and ("held_out_bpb" in one or "answer_bpb" in one) == (step % 2 == 0)
        assert all(one[key] == two[key] for key in ("step", "tokens", "epoch", "loss", "lr"))


def test_auto_takes_bf16_where_it_is_faster():
    def seconds(A):
        timer = Timer("A @ A", globals={"A": A}, num_threads=torch.get_num_threads())
        return min(timer.timeit(2).mean for _ in range(10))

    A = torch.ones(256, 256)
    assert has_fast_bf16(torch.device("cpu")) == (seconds(A.bfloat16()) < seconds(A))


@pytest.mark.parametrize("fast, dtype", [(True, "bf16"), (False, "fp32")])
def test_a_resumed_run_keeps_the_arithmetic_that_auto_took(fast, dtype, flags, tmp_path, monkeypatch, capsys):
    for step, fast_here in ((1, fast), (2, not fast)):
        monkeypatch.setattr(train, "has_fast_bf16", lambda device: fast_here)
        with monkeypatch.context() as patch:
            press_ctrl_c(patch, step)
            train.main(flags(f"--dtype auto --steps 3 --out {tmp_path}") if step == 1 else
                       ["--resume", "--out", str(tmp_path)])
        assert f"device     cpu, {dtype}, " in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(flags, tmp_path, capsys, monkeypatch):
    press_ctrl_c(monkeypatch, step=3, times=2)
    code, line, _ = refusal(flags(f"--out {tmp_path}"), capsys)
    assert (code, line.endswith(": interrupted"), (tmp_path / "ckpt.pt").exists()) == (130, True, False)


def test_a_run_is_resumed_on_the_same_text_alone(flags, tmp_path, documents, capsys, monkeypatch):
    text, out = tmp_path / "text.py", tmp_path / "run"
    text.write_text("".join(documents), "utf-8")
    press_ctrl_c(monkeypatch, step=1)
    train.main(flags(f"--data {text} --steps 2 --out {out}"))
    text.write_text("".join(documents[1:]), "utf-8")
    code, line, _ = refusal(["--resume", "--out", str(out)], capsys)
    assert code == 1 and f"the text of --data {text} has changed" in line
    text.write_text("".join(documents), "utf-8")
    train.main(["--resume", "--out", str(out)])
    assert load_checkpoint(out)["step"] == 2


KILL_IN_THE_THIRD_SAVE = """
import os, signal, sys
import train
calls = []

def sync(file):
    calls.append(file)
    if len(calls) == 3:
        os.truncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = sync
train.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(flags, tmp_path):
    """kill -9: first when half of the third checkpoint is written, then at random."""
    killed = tmp_path / "killed"
    run = "--objective fim_meap --steps 30 --warmup 2 --dropout 0.1 --grad-accum 2"
    command = [sys.executable, "-c", KILL_IN_THE_THIRD_SAVE, *flags(f"{run} --save-every 1 --out {killed}")]
    first = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert load_checkpoint(killed)["step"] == 2 and (killed / "ckpt.tmp").exists()

    saved = (killed / "ckpt.pt").stat().st_mtime_ns
    second = subprocess.Popen([sys.executable, train.__file__, "--resume", "--out", killed],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while (killed / "ckpt.pt").stat().st_mtime_ns == saved:
        assert second.poll() is None
    time.sleep(random.random() / 10)
    second.kill()
    second.wait()
    assert 2 < load_checkpoint(killed)["step"] < 30

    train.main(["--resume", "--out", str(killed), "--save-every", "1000"])
    train.main(flags(f"{run} --save-every 1000 --out {tmp_path / 'whole'}"))
    one, two = load_checkpoint(tmp_path / "whole"), load_checkpoint(killed)
    assert_same([one["model"], one["optimizers"]], [two["model"], two["optimizers"]])
    assert [line["step"] for line in metrics(killed) if line["step"] % 3 == 0] == [*range(3, 31, 3)]


@pytest.mark.parametrize("room", [0, 0.9])
def test_the_previous_checkpoint_survives_a_full_disk(room, flags, tmp_path, capsys, monkeypatch):
    """A limit on the size of files fails as a full disk does. What torch raises depends on how much fits."""
    resource, path = pytest.importorskip("resource"), tmp_path / "ckpt.pt"

    def save_with_little_room(path, checkpoint):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if checkpoint["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 + int(room * path.stat().st_size), before[1]))
        try:
            save_checkpoint(path, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(train, "save_checkpoint", save_with_little_room)
    code, line, _ = refusal(flags(f"--steps 6 --save-every 2 --out {tmp_path}"), capsys)
    assert code == 1 and line.endswith(f"{path}: step 4 could not be saved ([Errno 27] File too large); what "
                                       "was saved before is whole")
    assert load_checkpoint(tmp_path)["step"] == 2 and not (tmp_path / "ckpt.tmp").exists()
    monkeypatch.undo()
    train.main(["--resume", "--out", str(tmp_path)])
    assert load_checkpoint(tmp_path)["step"] == 6


def test_a_second_run_on_one_folder_is_refused(flags, tmp_path, capsys):
    pytest.importorskip("fcntl")
    arguments = flags(f"--steps 1 --out {tmp_path}")
    with lock(tmp_path):
        code, line, _ = refusal(arguments, capsys)
        assert code == 1 and f"--out {tmp_path}: another run is at work in this folder" in line
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    train.main(arguments)


@pytest.mark.parametrize("save_every, is_saved", [(2, True), (3, False)])
def test_a_diverged_run_ends_and_keeps_the_last_good_state(save_every, is_saved, flags, tmp_path, capsys,
                                                                monkeypatch):
    """The third update throws the weights out. Its own loss is still fine: a checkpoint would look good."""
    monkeypatch.setattr(train, "learning_rate", lambda step, config: 1e30 if step == 2 else 1e-3)
    run = f"--steps 20 --eval-every 20 --save-every {save_every} --out {tmp_path}"
    code, line, _ = refusal(flags(run), capsys)
    assert code == 1 and re.search("the loss is nan at step [34]; .* try a lower --lr", line)
    assert metrics(tmp_path)[-1]["step"] <= 3
    assert (tmp_path / "ckpt.pt").exists() == ("ckpt.pt keeps the last good state" in line) == is_saved
    if is_saved:
        model, tok, checkpoint = load_model(tmp_path)
        ids = torch.tensor([tok.encode("import os\nimport sys\n")])
        assert checkpoint["step"] == 2 and model(ids, ids)[1].isfinite()


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("MPS backend out of memory"), "--n-embd 100000000 --n-head 1"])
def test_out_of_memory_says_which_flags_to_lower(error, flags, tmp_path, capsys, monkeypatch):
    if not isinstance(error, str):  # the string's model takes 100 PB: refused at once
        monkeypatch.setattr(GPT, "forward", lambda *_: (_ for _ in ()).throw(error))
    code, line, _ = refusal(flags(f"--out {tmp_path} {error if isinstance(error, str) else ''}"), capsys)
    assert code == 1
    assert line.endswith("out of memory: lower --batch-size, --block-size or --n-embd; in sampling, --n")


def test_compile_without_a_compiler_is_one_line(flags, tmp_path):
    bare = {"PATH": "", "CXX": "nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, train.__file__, *flags(f"--compile --out {tmp_path / 'run'}")],
                         capture_output=True, text=True, timeout=300, env=os.environ | bare)
    line = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert line.startswith("train.py: --compile: ") and line.endswith("install it, or leave --compile out")


@pytest.mark.parametrize("block_size", [8, 256])
def test_a_context_may_be_tiny_or_longer_than_the_held_out_text(block_size, flags, tmp_path, documents):
    (tmp_path / "short.txt").write_text(documents[0][:3000], "utf-8")
    train.main(flags(f"--data {tmp_path}/short.txt --block-size {block_size} --objective fim_spm --steps 2 "
                     f"--out {tmp_path}/run"))
    assert (metrics(tmp_path / "run")[-1]["held_out_bpb"] is None) == (block_size == 256)
    assert load_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("block_size", [64, 96])
def test_init_from_starts_with_the_very_weights_and_vocabulary(block_size, finished, tmp_path):
    """... on another text, from which another vocabulary would be learned, and with another context."""
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    (tmp_path / "other.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 500)
    train.main(f"--init-from {source} --objective fim_spm --steps 2 --warmup 0 --lr 1e-9 --device cpu "
               f"--block-size {block_size} --data {tmp_path / 'other.txt'} --cache-dir {tmp_path} "
               f"--out {tmp_path / 'run'}".split())
    shutil.rmtree(source)  # a run needs its start no more
    (before, tok, _), (after, tok_after, _) = load_model(finished), load_model(tmp_path / "run")
    assert tok_after.to_dict() == tok.to_dict() and after.config.block_size == block_size
    idx = torch.randint(tok.n_vocab, (2, 40))
    torch.testing.assert_close(after(idx)[0], before(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, code, message", [
    ("--objective fmi", 2, "--objective fmi: expected one of ntp, meap, fim_psm, fim_spm, fim, fim_meap"),
    ("--preset huge", 2, "--preset huge: expected one of toy, toy_gpt2"),
    ("--steps -1", 2, "--steps -1: expected 1"),
    ("--lr 0", 2, "--lr 0"),
    ("--lr nan", 2, "--lr nan"), ("--batch-size -4", 2, "--batch-size -4: expected 1"),
    ("--tokenizer words", 2, "--tokenizer words: expected one of bpe, bytes, gpt2"),
    ("--n-embd 30 --n-head 4", 2, "n_embd 30 is not a multiple of n_head 4"),
    ("--dropout 1", 2, "--dropout 1.0"),
    ("--block-size 1000000", 2, "--block-size 1000000"), ("--vocab-size 200", 2, "--vocab-size 200"),
    ("--learning-rate 1", 2, "--learning-rate"), ("--step 5", 2, "--step"), ("--steps many", 2, "many"),
    ("--data /no/such/text", 1, "--data /no/such/text"), ("--device cuda:99", 2, "--device cuda:99"),
    ("--out a\udc80", 2, "'a\\udc80': not UTF-8 text"),
    # the objectives' knobs
    ("--objective fim --fim-rate 1.5", 2, "--fim-rate 1.5: expected 0 to 1"),
    ("--objective meap --mask-ratio -1", 2, "--mask-ratio -1.0: expected 0 to 1"),
    ("--objective fim_spm --spm-layout jont", 2,
     "--spm-layout jont: expected one of swapped, labelled, joint"),
    ("--objective fim --spm-layout swapped", 2,
     "--spm-layout swapped: expected joint or labelled with spm_rate 0.5"),
    ("--objective fim_spm --spm-rate 0.9", 2,
     "--spm-layout swapped: expected joint or labelled with spm_rate 0.9"),
    ("--objective fim --short-documents 8", 2, "--short-documents 8: expected 16"),
    ("--objective meap --fim-rate 0.9", 2,
     "--fim-rate 0.9: no knob of --objective meap; expected its own: --mask-ratio"),
    ("--mask-ratio 0.1", 2, "--mask-ratio 0.1: no knob of --objective ntp; expected its own: none"),
    ("--objective fim_meap --fim-level document", 2,
     "--fim-level document: expected --objective fim_psm, fim_spm or fim, not fim_meap"),
    ("--objective half --share 2", 2, "--share 2.0: expected 0 to 1"),
    ("--objective half --share 0", 2, "--objective half: nothing is left"),
    # fine-tuning
    ("--init-from {learned} --block-size 73", 2, "--block-size 73: {learned} has 72"),
    ("--init-from {run} --tokenizer bytes", 2, "--tokenizer bytes: {run} has bpe"),
    ("--init-from {run} --vocab-size 500", 2, "--vocab-size 500: {run} has 400"),
    ("--init-from {run} --n-layer 2", 2, "--n-layer 2: {run} has 1"),
    ("--init-from {run} --no-qk-norm", 2, "--no-qk-norm: {run} has it on"),
    ("--init-from {empty}", 1, "expected ckpt.pt, model.safetensors"),
    ("--init-from /no/such", 1, "no such file"),
    ("--objective sft --data {text}", 2, "is no .jsonl or .json"),
    ("--objective sft --data stdlib", 2, "--data stdlib: plain text"),
    ("--data functions", 2, "--data functions: prompts and answers, expected --objective sft or meap_sft"),
    ("--objective meap_sft --mask-region all", 2, "--mask-region all: expected one of copy, answer"),
    # resuming, several processes, folders
    ("--resume", 2, "--out DIR"), ("--resume --out {run} --lr 0.5", 2, "--lr 0.02 to 0.5"),
    ("--resume --out {run} --objective meap", 2, "--objective fim_meap to meap"),
    ("--resume --out {run} --mask-ratio 0.3", 2, "--mask-ratio 0.15 to 0.3"),
    ("--resume --out {run}", 2, "has all its 20 steps"),
    ("--resume --out {empty}", 1, "ckpt.pt: no such checkpoint"),
    ("--grad-accum 3", 2, "--grad-accum 3: expected a multiple of 2, the number of processes"),
    ("--out {run}", 2, "already holds a run")])
def test_a_mistake_is_one_line(arguments, code, message, flags, folder, finished, learned, tmp_path, capsys,
                               monkeypatch):
    def half(ids, tok, rng, *, share=0.5):
        """A student's objective."""
        if not 0 <= share <= 1:
            raise ValueError(f"share {share}: expected 0 to 1")
        if share == 0:
            raise ValueError("nothing is left")
        return ids[:-1], ids[1:]

    monkeypatch.setitem(train.OBJECTIVES, "half", half)
    if "--grad-accum" in arguments:
        monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "empty").mkdir()
    paths = {"run": finished, "learned": learned, "empty": tmp_path / "empty", "text": folder / "text"}
    arguments = arguments.format(**paths)
    before = sorted([*tmp_path.rglob("*"), *finished.rglob("*")])
    given = arguments.split() if "--resume" in arguments else flags(f"--out {tmp_path / 'new'} {arguments}")
    exit_code, line, n_lines = refusal(given, capsys)
    assert (exit_code, n_lines) == (code, 1) and message.format(**paths) in line
    assert sorted([*tmp_path.rglob("*"), *finished.rglob("*")]) == before


def test_flags_go_over_the_start_over_the_preset_over_the_defaults(finished):
    def settings(arguments):
        return train.read_arguments(arguments.split())[0]

    assert settings("--preset laptop").n_layer == 6 and settings("--preset laptop --n-layer 7").n_layer == 7
    assert settings(f"--preset laptop --init-from {finished}").n_layer == 1
    assert (settings("--objective sft").preset, settings("--objective sft").data) == ("finetune", "functions")
    # A preset's knob goes to the objectives that have it.
    assert settings("--objective fim").knobs["short_documents"] == train.PRESETS["toy"]["short_documents"]
    assert settings("--objective fim --preset gpt2").knobs["short_documents"] == 0
    assert settings("--objective fim --short-documents 0 --spm-rate 0.25").knobs == {
        "fim_rate": 0.5, "spm_rate": 0.25, "spm_layout": "joint", "span": "char", "short_documents": 0}
    assert settings("--objective meap").knobs == {"mask_ratio": 0.15}
    assert settings("--objective ntp").knobs == {}


def test_help_names_every_setting_and_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    names = {*Config.__dataclass_fields__, "resume"} - {"knobs"}
    for objective in OBJECTIVES.values():
        names |= knobs_of(objective).keys()
    assert stop.value.code == 0 and all("--" + name.replace("_", "-") in shown for name in names)


def test_a_run_without_out_gets_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("fim", "fim-2", "fim-3"):
        config, _ = train.read_arguments(["--objective", "fim"])
        assert Path(config.out) == Path("out", expected)
        Path(config.out).mkdir(parents=True)


def preset_model(preset):
    """-> (GPT of the preset's shape, without memory for its weights; its Config)."""
    config = train.read_arguments(["--preset", preset, "--out", "unused"])[0]
    with torch.device("meta"):
        return train.make_model(config, 50257, torch.device("meta")), config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_whole_run(preset):
    model, config = preset_model(preset)
    assert model.config.block_size == config.block_size and 0 < config.warmup < config.steps


@pytest.mark.parametrize("preset, layers, width, heads, params, non_embedding, unit, lr, batch", [
    ("xxs", 6, 384, 6, 50, 11, 1e6, 1.6e-3, 2**19), ("xs", 8, 512, 8, 77, 26, 1e6, 1.4e-3, 2**19),
    ("small", 12, 768, 12, 164, 87, 1e6, 6e-4, 2**19), ("medium", 24, 1024, 16, 411, 308, 1e6, 3e-4, 2**19),
    ("large", 24, 1536, 16, 844, 689, 1e6, 2.5e-4, 2**19), ("xl", 24, 2048, 16, 1.4, 1.2, 1e9, 4e-4, 2**20),
    ("2.8b", 32, 2560, 32, 2.8, 2.6, 1e9, 3.2e-4, 2**20),
    ("6.9b", 32, 4096, 32, 6.9, 6.5, 1e9, 2.4e-4, 2**21)])
def test_presets_are_the_fim_papers_table_3(preset, layers, width, heads, params, non_embedding, unit, lr,
                                            batch):
    model, config = preset_model(preset)
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size) == (layers, width, heads, 2048)
    assert (config.lr, config.batch_size * config.grad_accum * 2048) == (lr, batch)
    # Within 3% of what rounds to the printed figure. Only 2.8b needs the 3%: 2.52 B here, printed 2.6 B (2.55
    # to 2.65), since the paper's relative attention has weights of its own.
    half = 0.5 if unit == 1e6 else 0.05
    for ours, printed in ((model.n_params(), params), (model.n_params(embedding=False), non_embedding)):
        assert (printed - half) * unit * 0.97 <= ours <= (printed + half) * unit * 1.03


def test_the_gpt2_preset_has_gpt2s_weights():
    """The names and shapes of nanoGPT's, which fit the published weights (there, matrices are transposed)."""
    model, _ = preset_model("gpt2")
    assert model.n_params() == 124_439_808
    C = 768
    expected = {"transformer.wte.weight": (50257, C), "transformer.wpe.weight": (1024, C),
                "lm_head.weight": (50257, C), "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,),
             "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for i in range(12):
        for name, shape in block.items():
            expected[f"transformer.h.{i}.{name}.weight"] = shape
            expected[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
