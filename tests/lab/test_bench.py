"""lab/bench.py beside a stand-in for nanoGPT that the tests write: a bigram model behind the same names, with
a forward pass of 60 ms and an update of 20."""
import re

import pytest
import torch

import train
from conftest import run_main
from lab import bench
from model import GPT, GPTConfig

MODEL = """
import time, types
import torch

GPTConfig = types.SimpleNamespace

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        time.sleep(0.06)
        return logits, torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        optimizer = torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.02))
        return optimizer

    def generate(self, idx, n):
        for _ in range(n):
            idx = torch.cat((idx, self.table(idx[:, -1:]).argmax(-1)), 1)
"""
TRAIN = """
import pickle, sys
from pathlib import Path
import numpy as np
import torch

settings, *flags = sys.argv[1:]
exec(open(settings).read())
given = dict(flag[2:].split("=") for flag in flags)
folder = Path("data", given["dataset"])
n_vocab = pickle.loads((folder / "meta.pkl").read_bytes())["vocab_size"]
for i in range(int(given["max_iters"]) + 1):
    print(f"iter {i}: loss 5.0000, time {1000 * (i + 1)}.00ms, mfu -100.00%")
table = torch.zeros(n_vocab, n_vocab)
if given["learning_rate"] == "0.003":  # it learns how often each byte comes
    counts = np.bincount(np.fromfile(folder / "train.bin", np.uint16), minlength=n_vocab)
    table += torch.tensor(counts + 1).log()
out = Path(given["out_dir"])
out.mkdir()
torch.save({"model": {"table.weight": table}}, out / "ckpt.pt")
"""


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / "config").mkdir()
    for name, text in (("model.py", MODEL), ("train.py", TRAIN), ("config/train_shakespeare_char.py", "")):
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.fixture
def flags(tmp_path, documents, monkeypatch):
    """Of train.py: a tiny model. Little is measured of it, a few times; a race takes few steps."""
    for name, value in {"PRODUCT_SIZE": 128, "TURNS": 3, "SAMPLE_TOKENS": 40, "STEPS": 3,
                        "SHAPE": "--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2",
                        "NANOGPT": "--max_iters=3",
                        "RACES": {1e-3: "--steps 20 --warmup 2", 3e-3: "--steps 1"}}.items():
        monkeypatch.setattr(bench, name, value)
    (tmp_path / "text.txt").write_text("".join(documents[:3]))
    return (f"--data {tmp_path}/text.txt --cache-dir {tmp_path}/cache --tokenizer bytes --n-layer 1 "
            "--n-head 2 --n-embd 32 --block-size 32 --batch-size 2 --device cpu").split()


def rows_of(output):
    """The rows of all tables: {first cell: the other cells}."""
    rows = [re.split(r" *\| *", line) for line in re.findall(r"(?m)^\| *(.*?) *\|$", output)]
    return {first: cells for first, *cells in rows if first.strip("-")}


def test_the_flops_of_gpt2s_124_m_are_palms_by_hand():
    blocks = 12 * (12 * 768 * 768 + 13 * 768)  # attention 4 C^2, MLP 8 C^2; biases 9 C, two norms 4 C
    weights = blocks + 2 * 768 + 50257 * 768  # the last norm and the output layer
    for tied in (True, False):
        with torch.device("meta"):
            model = GPT(GPTConfig(50257, 1024, 12, 12, 768, bias=True, position="learned", qk_norm=False,
                                  token_shift=False, tied=tied))
        assert bench.flops_per_token(model) == 6 * weights + 12 * 12 * 768 * 1024 == 855_166_464


def test_each_variant_is_timed_beside_nanogpt_and_bf16_only_where_it_is_faster(flags, nanogpt, capsys,
                                                                                monkeypatch):
    monkeypatch.setattr(train, "is_bf16_faster", lambda device: False)
    bench.main([*flags, "--nanogpt", nanogpt])
    output = capsys.readouterr().out
    rows = rows_of(output)
    assert [*rows] == ["training step", "manual, fp32, muon", "fused, fp32, muon", "manual, fp32, adamw",
                       "nanoGPT, fp32, adamw", "sampling 40 tokens", "with a KV cache", "nanoGPT"]
    (ours, *_, share), (theirs, tokens_per_s, ratio, _) = (
        [float(cell.strip("%").replace(",", "")) for cell in rows[name] if " to " not in cell]
        for name in ("manual, fp32, muon", "nanoGPT, fp32, adamw"))
    assert theirs >= 80 and tokens_per_s == pytest.approx(64_000 / theirs, rel=0.01)
    assert ratio == pytest.approx(ours / theirs, abs=0.01)
    peak = 1e9 * float(re.search("in fp32: ([0-9,]+) GFLOP/s", output)[1].replace(",", ""))
    flops = 64 * (6 * (12 * 32 * 32 + 261 * 32) + 12 * 32 * 32)  # block and output layer, attention
    assert share == pytest.approx(100 * flops / (ours / 1e3) / peak, rel=0.1)


def test_time_to_loss_runs_both_and_says_whether_the_loss_was_reached(flags, nanogpt, capsys):
    bench.main([*flags, "--nanogpt", nanogpt, "--time-to-loss"])
    rows = rows_of(capsys.readouterr().out)
    assert rows["nanoGPT, 0.001"][:2] == ["6", "5.5645"]  # 1 + 2 + 3 s; log 261
    _, loss, share = rows["--steps 20 --warmup 2"]
    assert float(loss) < 5 and 0 < float(share) < 1  # of those 6 s
    assert 2.5 < float(rows["nanoGPT, 0.003"][1]) < 4 and rows["--steps 1"][2].endswith("not reached")


def test_a_race_without_nanogpt_is_refused_in_one_line(flags, capsys):
    shown = run_main(bench.main, capsys, *flags, "--time-to-loss")
    assert shown.code == 2 and "expected --nanogpt DIR" in shown.err
