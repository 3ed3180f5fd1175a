"""bench.py beside a stand-in for nanoGPT that the tests write: a bigram model behind the same names."""
import re

import pytest
import torch

import bench
import train
from model import GPT, GPTConfig

MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.table = config, torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        loss = targets is not None and torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1)
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

    def generate(self, idx, n):
        for _ in range(n):
            idx = torch.cat((idx, self(idx)[0][:, -1:].argmax(-1)), 1)
"""
TRAIN = """
import pickle, sys
from pathlib import Path
import numpy as np
import torch
from model import GPT, GPTConfig

given = dict(argument[2:].split("=") for argument in sys.argv[1:])
assert Path("configurator.py").exists()
folder = Path("data", given["dataset"])
n_vocab = pickle.loads((folder / "meta.pkl").read_bytes())["vocab_size"]
shape = [int(given[name]) for name in ("block_size", "n_layer", "n_head", "n_embd")]
for i in range(int(given["max_iters"]) + 1):
    print(f"iter {i}: loss 5.0000, time {1000 * (i + 1)}.00ms, mfu -100.00%")
model = GPT(GPTConfig(shape[0], n_vocab, *shape[1:], 0.0, False))
torch.nn.init.zeros_(model.table.weight)
if given["learning_rate"] == "0.003":  # it learns how often each byte comes
    counts = np.bincount(np.fromfile(folder / "train.bin", np.uint16), minlength=n_vocab)
    model.table.weight.data += torch.tensor(counts + 1).log()
torch.save({"model": model.state_dict()}, "ckpt.pt")
"""


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt")
    for name, text in (("model.py", MODEL), ("train.py", TRAIN), ("configurator.py", "")):
        (folder / name).write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def flags(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.py").write_text("".join(documents[:3]))
    return (f"--data {folder}/text.py --cache-dir {folder}/cache --tokenizer bytes --n-layer 1 --n-head 2 --n-embd 32 "
            "--block-size 32 --batch-size 2 --device cpu --repeats 2 --sample-tokens 40").split()


def tables(capsys):
    """-> one dict a table: the first cell of a row -> its other cells."""
    found = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in capsys.readouterr().out.split("\n")
             if line.startswith("|")]
    starts = [i - 1 for i, row in enumerate(found) if set(row[0]) == {"-"}]
    return [{row[0]: row[1:] for row in found[start + 2:end]} for start, end in zip(starts, [*starts[1:], None])]


def test_every_variant_is_measured_beside_nanogpt(flags, nanogpt, capsys):
    bench.main([*flags, "--dtype", "fp32", "--nanogpt", nanogpt])
    steps, sampling = tables(capsys)
    assert {"ntp, manual, fp32", "ntp, fused, fp32", "meap", "fim_psm", "fim_spm", "fim", "fim_meap",
            "nanoGPT, fp32"} <= steps.keys() and steps["ntp, manual, fp32"][3] == "1.00"
    for ms, _, tokens_per_s, *_ in steps.values():
        assert float(tokens_per_s.replace(",", "")) == pytest.approx(2 * 32 / float(ms) * 1e3, rel=0.1)
    assert sampling.keys() == {"KV cache", "no cache", "nanoGPT"} and sampling["KV cache"][2] == "1.000"


def test_time_to_loss_runs_both_and_says_whether_the_loss_was_reached(flags, nanogpt, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SHAPE", {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2})
    monkeypatch.setattr(bench, "NANOGPT", bench.SHAPE | {"max_iters": 3})
    monkeypatch.setattr(bench, "RACES", {1e-3: {"steps": 20, "warmup": 2}, 3e-3: {"steps": 1}})
    bench.main([*flags, "--nanogpt", nanogpt, "--time-to-loss"])
    rows, = tables(capsys)
    assert rows["nanoGPT, 0.001"] == ["6", "5.5645", "1"]  # 1 + 2 + 3 s; log 261
    assert float(rows["--steps 20 --warmup 2"][1]) < 5 and "not" not in rows["--steps 20 --warmup 2"][2]
    assert 2.5 < float(rows["nanoGPT, 0.003"][1]) < 4 and rows["--steps 1"][2].endswith(", not reached")


def test_the_flops_of_a_token_are_palms():
    for tied, n in ((True, 124_439_808 - 1024 * 768), (False, 124_439_808 - 1024 * 768)):
        config = train.Config(**train.PRESETS["gpt2"] | {"tied": tied})
        with torch.device("meta"):
            model = GPT(GPTConfig(50257, 1024, 12, 12, 768, bias=True, position="learned", qk_norm=False, tied=tied))
        variant = bench.Variant("gpt2", config, model, [], None, torch.device("cpu"))
        assert variant.flops_per_token() == 6 * n + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("arguments, code, message", [
    ("--nanogpt /no/such", 1, "--nanogpt /no/such: no model.py in it"), ("--time-to-loss", 2, "expected --nanogpt DIR"),
    ("--repeats 0", 2, "--repeats 0"), ("--sample-tokens 0", 2, "--sample-tokens 0"), ("--stps 5", 2, "--stps")])
def test_a_mistake_is_one_line(arguments, code, message, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*flags, *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == code and message in re.split("[\r\n]", error.rstrip())[-1] and "Traceback" not in error
