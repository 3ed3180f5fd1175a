"""What the tests share: the repository on sys.path, a corpus of real Python files, tokenizers and streams."""
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small a second thread only waits
for name in ("CI", "BUILD_NUMBER"):  # if set, pytest takes hours to tell how two long lists differ, also
    os.environ.pop(name, None)       # while it grades a wrong solution of a lab
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Tokenizer  # noqa: E402

MODULES = ("argparse ast base64 bisect calendar cmd configparser contextlib csv fnmatch functools glob "
           "json.decoder json.encoder keyword queue shlex string tempfile textwrap").split()
LANGUAGES = """All human beings are born free and equal in dignity and rights.
Все люди рождаются свободными и равными в своем достоинстве и правах.
すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. 🙂 👩‍👩‍👧 🇫🇷 naïve façade, e\u0301 n\u0303
"""


@pytest.fixture(scope="session")
def documents():
    """The sources of 20 standard library modules, as list[str]."""
    return [Path(importlib.util.find_spec(name).origin).read_text("utf-8") for name in MODULES]


@pytest.fixture(scope="session")
def tok(documents):
    return Tokenizer.train(documents, 600)


@pytest.fixture(scope="session")
def stream(documents, tok):
    """doc <EOT> doc <EOT> ... as a uint16 array (N,)."""
    return as_stream(documents, tok)


@pytest.fixture(scope="session")
def corpora(documents, tok, stream):
    """{name: (tokenizer, stream)}: code and multi-byte text, each in BPE tokens and in single bytes."""
    single, learned = Tokenizer.bytes(), Tokenizer.train([LANGUAGES], 380)
    return {"code": (tok, stream), "code in bytes": (single, as_stream(documents[2:6], single)),
            "languages": (learned, as_stream([LANGUAGES] * 20, learned)),
            "languages in bytes": (single, as_stream([LANGUAGES] * 20, single))}


@pytest.fixture
def no_float64():
    """Like Apple's MPS, fails at every torch operation on a 64-bit float."""
    import torch  # here, since the tests of data.py and objectives.py need no torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [part for part in tree_leaves((args, kwargs, result)) if isinstance(part, torch.Tensor)]
            assert all(part.dtype != torch.float64 for part in tensors), f"{func} meets a 64-bit float"
            return result

    with NoFloat64():
        yield


def as_stream(texts, tok):
    return np.array([i for text in texts for i in (*tok.encode(text), tok.eot)], np.uint16)


def small_model(n_vocab, block_size=24, **settings):
    """An untrained GPT with weights far above the initial 0.02: predictions and attention then differ from
    place to place, and a mistake shows."""
    import torch

    from model import GPT, GPTConfig
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_vocab, block_size, **{"n_layer": 2, "n_head": 2, "n_embd": 32} | settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def run_main(main, capsys, *arguments):
    """Runs a script's main -> what it prints, and its exit code with the one line of a refusal."""
    code = 0
    try:
        main([*arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert not code or shown.err.count("\n") == 1 and "Traceback" not in shown.err
    return SimpleNamespace(out=shown.out, err=shown.err, code=code)


def save_run(folder, model, tok, objective="ntp", **settings):
    """The folder of a run that has this model."""
    from dataclasses import asdict

    from objectives import OBJECTIVES, knobs_of
    from train import save_checkpoint
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "ckpt.pt", {
        "model": model.state_dict(), "optimizers": [], "step": 1, "model_config": asdict(model.config),
        "tokenizer": tok.to_dict(), "text": "name", "metrics_bytes": 0,
        "config": {"objective": objective, "knobs": knobs_of(OBJECTIVES[objective]), **settings}})
    return folder
